"""`FusedExperts`: the expert layers of Mixture-of-Experts models, with fused neurons and the kernels for them.

Two ways to use it. A module in the place of a model's own experts: parameters keep their names and shapes, and `scale`
comes beside them. Or the kernels alone on a model as it is: importing this package registers `"fused"` with
transformers' experts interface, so that `model.set_experts_implementation("fused")` (or
`experts_implementation="fused"` in `from_pretrained`) runs the experts of any family that uses the interface through
`fusion_kernels.fused_experts`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from fusion_kernels import Gate, fused_experts, split_gate_up
from fusion_kernels.gates import PLAIN
from mlp_fusion.errors import InputError
from mlp_fusion.modules.activations import CONFIG_ACTIVATIONS
from mlp_fusion.modules.gates import form_of
from mlp_fusion.modules.scaled import ScaledModule
from mlp_fusion.neurons import NeuronBundle

IMPLEMENTATION = "fused"

_ACTIVATIONS = {type(ACT2FN[name]): ours for name, ours in CONFIG_ACTIVATIONS.items()}
#: Whether torch.compile hands modules to functions whose results it takes as constants, as `form_of` is one.
_MODULES_ARE_CONSTANTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


def read_experts(module: nn.Module) -> NeuronBundle:
    """The experts of a module of transformers' experts interface, with B = the number of experts; views of its weights.

    Raises:
        InputError: the experts do more than a feed-forward block (a gate of their own that is no `Gate`, a norm behind
            it), have an activation that the kernels do not know, or weights that are not plain floating-point
            parameters.
    """
    m: Any = module
    name = type(module).__qualname__
    if getattr(m, "has_post_expert_norm", False):
        raise InputError(f"{name} has a norm behind every expert: its experts are not plain feed-forward blocks")
    layout = "concatenated" if m.is_concatenated else "interleaved"
    if m.has_gate and type(module)._apply_gate is not _default_apply_gate:  # type: ignore[attr-defined]
        activation, gating = _own_gate(module, layout)
    elif type(m.act_fn) in _ACTIVATIONS:
        activation, gating = _ACTIVATIONS[type(m.act_fn)], PLAIN
    else:
        raise InputError(f"{name} has the activation {type(m.act_fn).__qualname__}, for which there is no kernel")
    first = m.gate_up_proj if m.has_gate else m.up_proj
    biases = (m.gate_up_proj_bias if m.has_gate else m.up_proj_bias, m.down_proj_bias) if m.has_bias else (None, None)
    tensors = {"gate_up_proj": first, "down_proj": m.down_proj, "bias": biases[0], "down_proj_bias": biases[1]}
    for what, t in tensors.items():
        if t is not None and (type(t) not in (nn.Parameter, Tensor) or not t.is_floating_point()):
            raise InputError(f"{name}.{what} is a {type(t).__qualname__} of {t.dtype}: load the experts unquantised")
    first, down = (t.mT if m.is_transposed else t for t in (first, m.down_proj))
    w_gate = b_gate = None
    w_in, b_in = first, biases[0]
    if m.has_gate:
        w_gate, w_in = _gate_and_up(first, layout)
        if b_in is not None:
            b_gate, b_in = _gate_and_up(b_in, layout)
    return NeuronBundle(
        w_in=w_in, w_gate=w_gate, w_out=down.mT, b_in=b_in, b_gate=b_gate, b_out=biases[1], activation=activation,
        gating=gating,
    )  # fmt: skip


def _own_gate(module: nn.Module, layout: str) -> tuple[str, Gate]:
    """Activation and gate of a module that gates in a way of its own.

    Raises:
        InputError: no kernel gates in this way.
    """
    if torch.compiler.is_compiling() and not _MODULES_ARE_CONSTANTS:
        raise InputError(
            f"{type(module).__qualname__} gates in a way of its own, which torch.compile cannot ask it for before "
            "torch 2.12: use that, or another experts_implementation"
        )
    found = form_of(module, "_apply_gate", layout)
    if isinstance(found, str):
        raise InputError(
            f"{type(module).__qualname__} gates in a way of its own, which {found}: use another experts_implementation"
        )
    activation, limit, clamp, up_offset = found
    return activation, Gate(limit, clamp, up_offset)  # type: ignore[arg-type]


def _gate_and_up(stored: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The halves of (E, 2h, ...) as (E, h, ...)."""
    gate, up = split_gate_up(stored.transpose(0, 1), layout)
    return gate.transpose(0, 1), up.transpose(0, 1)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`"fused"` of transformers' experts interface: hidden_states (T, d), top_k_index and top_k_weights (T, k)."""
    return stack_forward(read_experts(self), hidden_states, top_k_index, top_k_weights)


def stack_forward(b: NeuronBundle, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same of a stack that was read, without a scale."""
    return fused_experts(
        hidden_states, top_k_index, top_k_weights, b.w_in, b.w_out.mT, b.w_gate, b_in=b.b_in, b_out=b.b_out,
        b_gate=b.b_gate, activation=b.activation, gating=b.gating,
    )  # fmt: skip


class FusedExperts(ScaledModule):
    """y_t = sum_k weight_tk expert_(index_tk)(x_t), every expert a plain or gated block of fused neurons.

    Its forward takes what the experts modules of transformers take. Parameters are those of transformers' Mixtral,
    Qwen-MoE and others: `gate_up_proj` `(E, 2h, d)` (plain: `up_proj` `(E, h, d)`), `down_proj` `(E, d_out, h)`, and
    `gate_up_proj_bias`, `up_proj_bias`, `down_proj_bias` where there are biases. `scale` is `(E, h)`. Call
    :meth:`merge_scale` before exporting: other programs do not know a scale.

    Examples:
        >>> w_in, w_out, sizes = torch.randn(4, 16, 8), torch.randn(4, 16, 8), torch.full((4, 16), 2.0)
        >>> bundle = mlp_fusion.NeuronBundle(w_in=w_in, w_out=w_out, activation="silu", scale=sizes)
        >>> experts = mlp_fusion.FusedExperts(bundle, "scaled")
        >>> experts(torch.randn(6, 8), torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)).shape
        torch.Size([6, 8])
        >>> experts.scale.shape
        torch.Size([4, 16])
    """

    down_proj_bias: Tensor | None

    @torch.no_grad()
    def __init__(self, bundle: NeuronBundle, parameterization: str = "folded", *, checkpoint_level: int = 1) -> None:
        """Compute what `bundle` computes, expert by expert.

        Args:
            bundle: one problem per expert (B = E); copied.
            parameterization: `folded`, `scaled` or `split`. A bundle without a scale has p = 1: nothing is scaled.
            checkpoint_level: see :class:`ScaledModule`.

        Raises:
            ValueError: unknown parameterization or level.
        """
        b = bundle.parameterized(parameterization)
        scale = None if b.scale is None else b.scale.clone()
        super().__init__(b.activation, scale, parameterization, checkpoint_level, b.gating)
        self.num_experts = b.batch
        self.down_proj = nn.Parameter(b.w_out.mT.clone(memory_format=torch.contiguous_format))
        self.register_parameter("down_proj_bias", None if b.b_out is None else nn.Parameter(b.b_out.clone()))
        first, bias = (b.w_in,), (b.b_in,)
        if b.w_gate is not None:
            first, bias = (b.w_gate, b.w_in), (b.b_gate, b.b_in)  # type: ignore[assignment]
        biases = [t for t in bias if t is not None]
        if len(biases) not in (0, len(bias)):
            raise ValueError("gate and up projections must both have biases, or neither")
        self._first = "gate_up_proj" if b.gated else "up_proj"
        self.register_parameter(self._first, nn.Parameter(torch.cat(first, 1)))
        self.register_parameter(f"{self._first}_bias", nn.Parameter(torch.cat(biases, 1)) if biases else None)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        scale: Tensor | None = None,
        parameterization: str = "folded",
        *,
        checkpoint_level: int = 1,
    ) -> FusedExperts:
        """Take over the weights of an experts module of transformers; copies, so the original stays as it is.

        Args:
            experts: a module of a class that uses transformers' experts interface.
            scale: `(E, h)` cluster sizes, integer or floating; None for ones.
            parameterization, checkpoint_level: see the constructor.

        Raises:
            InputError: the experts are more than feed-forward blocks, or quantised.
            ValueError: scale has another shape; unknown parameterization or level.

        Examples:
            >>> from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
            >>> experts = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=4))
            >>> _ = [torch.nn.init.normal_(weight) for weight in experts.parameters()]
            >>> routed = torch.randn(6, 8), torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
            >>> fused = mlp_fusion.FusedExperts.from_experts(experts)
            >>> torch.allclose(fused(*routed), experts(*routed), atol=1e-3)
            True
        """
        bundle = read_experts(experts)
        if scale is not None:
            scale = scale.detach() if scale.is_floating_point() else scale.float()
        return cls(dataclasses.replace(bundle, scale=scale), parameterization, checkpoint_level=checkpoint_level)

    @property
    def gated(self) -> bool:
        return self._first == "gate_up_proj"

    def _blocks(self) -> dict[str, Tensor | None]:
        """The stored tensors as the operator and the bundle name them, with their gradients."""
        first: Tensor = getattr(self, self._first)
        bias: Tensor | None = getattr(self, f"{self._first}_bias")
        found: dict[str, Tensor | None] = {"w_in": first, "b_in": bias, "w_gate": None, "b_gate": None}
        if self.gated:
            found["w_gate"], found["w_in"] = first.chunk(2, 1)
            if bias is not None:
                found["b_gate"], found["b_in"] = bias.chunk(2, 1)
        return found

    def as_bundle(self) -> NeuronBundle:
        """The experts as a `NeuronBundle` with B = E, in this module's parameterization; detached views."""
        blocks = {name: None if t is None else t.detach() for name, t in self._blocks().items()}
        return NeuronBundle(
            w_out=self.down_proj.detach().mT,
            b_out=None if self.down_proj_bias is None else self.down_proj_bias.detach(),
            activation=self.activation,
            gating=self.gating,
            scale=None if self.scale is None else self.scale.detach(),
            scale_exponent=0.0 if self.scale is None else self.scale_exponent,
            **blocks,  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def merge_scale(self) -> None:
        """Fold p into the weights, in place: afterwards these are plain experts with the same outputs and no `scale`.

        Parameters keep their identity, but their dynamics change: do this for export or inference.

        Examples:
            >>> w_in, w_out, sizes = torch.randn(4, 16, 8), torch.randn(4, 16, 8), torch.full((4, 16), 2.0)
            >>> bundle = mlp_fusion.NeuronBundle(w_in=w_in, w_out=w_out, activation="silu", scale=sizes)
            >>> experts = mlp_fusion.FusedExperts(bundle, "split")
            >>> routed = torch.randn(6, 8), torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
            >>> before = experts(*routed)
            >>> experts.merge_scale()
            >>> experts.scale, torch.allclose(experts(*routed), before, atol=1e-3)
            (None, True)
        """
        if self.scale is None:
            return
        plain = FusedExperts(self.as_bundle(), "folded")
        for name, parameter in self.named_parameters():
            if name != "scale":
                parameter.copy_(plain.get_parameter(name))
        self._forget_scale()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `(T, d)`, expert ids and their shares `(T, k)` -> `(T, d_out)`."""
        blocks = self._blocks()
        before, behind = self._factors()
        if before is not None:
            for role in ("in",) if not self.gated else ("gate",) if self.up_multiplies else ("gate", "in"):
                weight, bias = blocks[f"w_{role}"], blocks[f"b_{role}"]
                blocks[f"w_{role}"] = weight * before.unsqueeze(2)  # type: ignore[operator]
                blocks[f"b_{role}"] = None if bias is None else bias * before
        w_in = blocks["w_in"]
        assert w_in is not None
        return fused_experts(
            hidden_states, top_k_index, top_k_weights, w_in, self.down_proj, blocks["w_gate"], b_in=blocks["b_in"],
            b_out=self.down_proj_bias, b_gate=blocks["b_gate"], scale=behind,
            activation=self.activation, gating=self.gating, checkpoint_level=self.checkpoint_level,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {super().extra_repr()}"


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
