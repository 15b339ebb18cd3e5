"""`FusedMLP` and `FusedGLU`: feed-forward modules of fused neurons.

Weights live in child projections (`torch.nn.Linear`, or the class the host model uses), so that optimisers, LoRA, FSDP
and quantisers see what they expect. What is added is `scale`, the number of neurons that each fused neuron stands for.

The forward pass hands the children's weights to `fusion_kernels.fused_mlp` or `fused_glu_mlp`. Where a child is more
than its weights (an adapter around it, hooks on it, a quantised weight), the pass runs through the children instead, so
that they take part, and says so once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fusion_kernels import fused_glu_mlp, fused_mlp
from fusion_kernels.activations import get_activation
from fusion_kernels.gates import PLAIN, Gate
from mlp_fusion.modules.activations import CONFIG_ACTIVATIONS
from mlp_fusion.modules.layouts import make_projection, obstacle, read_bundle, read_projection, weights_of
from mlp_fusion.modules.scaled import ScaledModule
from mlp_fusion.neurons import NeuronBundle

Self_ = TypeVar("Self_", bound="FusedFFN")


class FusedFFN(ScaledModule):
    """What plain and gated fused feed-forward modules share; use :class:`FusedMLP` or :class:`FusedGLU`.

    Its `scale` is `(h,)`.
    """

    #: role -> default child name, in the order of the constructor's projections
    ROLES: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        projections: Mapping[str, nn.Module],
        activation: str,
        *,
        scale: Tensor | None = None,
        parameterization: str = "folded",
        names: Mapping[str, str] | None = None,
        dropout: float = 0.0,
        checkpoint_level: int = 1,
        gating: Gate = PLAIN,
    ) -> None:
        """Build from ready projections whose weights already are in `parameterization`.

        Args:
            projections: role -> projection, the roles of `ROLES`.
            activation: a name in `fusion_kernels.activations.ACTIVATIONS`.
            scale: `(h,)` cluster sizes; must be None for `folded`.
            parameterization: see the class.
            names: role -> child name, where the host model calls them otherwise.
            dropout: probability of the dropout behind the output projection.
            checkpoint_level: see the class.
            gating: limits and offset of a gated FFN, a `fusion_kernels.Gate`.

        Raises:
            ValueError: unknown activation, parameterization or level, a scale where there can be none, or limits where
                there is no gate.
        """
        super().__init__(activation, scale, parameterization, checkpoint_level, gating)
        if not gating.plain and not self.gated:
            raise ValueError("gating has limits or an offset, and a plain FFN has no gate")
        self.projection_names = dict(self.ROLES if names is None else names)
        for role, module in projections.items():
            self.add_module(self.projection_names[role], module)
        self.dropout = nn.Dropout(dropout)

    @property
    def gated(self) -> bool:
        return "w_gate" in self.ROLES

    def projection(self, role: str) -> nn.Module:
        """The child projection in `role`, with whatever adapter has been put around it."""
        return self._modules[self.projection_names[role]]  # type: ignore[return-value]

    def _weights(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weight `(out, in)` and bias of every projection, as in `ROLES`, or None where one of them has to be called.

        None as well when x has another dtype than the weights, outside autocast: torch then raises a clear error. And
        None in a trace and for ONNX, which hold torch's own operations: they run where this package is not.
        """
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # type: ignore[attr-defined]
            return None
        found = []
        for role in self.ROLES:
            projection = self.projection(role)
            reason = obstacle(projection)
            if reason is not None:
                if not torch.compiler.is_compiling():
                    _say_once(reason)
                return None
            found.append(weights_of(projection))
        same = x.dtype == found[0][0].dtype or torch.is_autocast_enabled(x.device.type)
        return found if same else None

    def _activated(self, projection: nn.Module, x: Tensor, factor: Tensor | None) -> Tensor:
        """What act makes of projection(x) * factor, within the limits of a gate."""
        z = projection(x)
        z = self.gating.inside(z if factor is None else _times(z, factor))
        return self.gating.after(get_activation(self.activation).function(z))

    def _projected(self, hidden: Tensor, factor: Tensor | None, projection: nn.Module) -> Tensor:
        """dropout(projection(hidden * factor))."""
        return self._dropped(projection(hidden if factor is None else _times(hidden, factor)))

    def _dropped(self, y: Tensor) -> Tensor:
        # A dropout that drops nothing would still draw a mask in training.
        dropout = self._modules["dropout"]
        return dropout(y) if self.training and dropout.p > 0.0 else y  # type: ignore[misc, operator, union-attr]

    @classmethod
    def from_bundle(
        cls: type[Self_],
        bundle: NeuronBundle,
        parameterization: str = "folded",
        *,
        names: Mapping[str, str] | None = None,
        kind: type[nn.Module] = nn.Linear,
        dropout: float = 0.0,
        checkpoint_level: int = 1,
    ) -> Self_:
        """A module that computes `bundle.forward`, in the parameterization asked for.

        Args:
            bundle: one FFN (B = 1), gated for `FusedGLU` and plain for `FusedMLP`.
            parameterization: `folded`, `scaled` or `split`. A bundle without a scale has p = 1: nothing is scaled.
            names: role -> child name; `ROLES` when None.
            kind: `torch.nn.Linear` or transformers' `Conv1D`.
            dropout: probability of the dropout behind the output projection.
            checkpoint_level: see the class.

        Raises:
            ValueError: B != 1, a gated bundle for a plain module or the reverse, unknown parameterization.

        Examples:
            >>> fc1, fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
            >>> wide = mlp_fusion.FusedMLP.from_mlp(fc1, fc2).as_bundle()
            >>> narrow = wide.reduce(torch.arange(16)[None] // 2)  # neurons in pairs
            >>> ffn = mlp_fusion.FusedMLP.from_bundle(narrow, "scaled")
            >>> ffn.scale, ffn.fc1.weight.shape
            (tensor([2., 2., 2., 2., 2., 2., 2., 2.]), torch.Size([8, 8]))
            >>> x = torch.randn(5, 8)
            >>> torch.allclose(ffn(x), narrow.forward(x)[0], atol=1e-4)
            True
        """
        projections, scale = cls.split_bundle(bundle, parameterization, kind)
        return cls(
            projections,
            bundle.activation,
            scale=scale,
            parameterization=parameterization,
            names=names,
            dropout=dropout,
            checkpoint_level=checkpoint_level,
            gating=bundle.gating,
        )

    @classmethod
    def split_bundle(
        cls, bundle: NeuronBundle, parameterization: str, kind: type[nn.Module] = nn.Linear
    ) -> tuple[dict[str, nn.Module], Tensor | None]:
        """The projections (role -> new module) and the scale that represent `bundle` in `parameterization`."""
        if bundle.batch != 1:
            raise ValueError(f"a module holds one FFN, the bundle has {bundle.batch}: select one")
        if bundle.gated != ("w_gate" in cls.ROLES):
            raise ValueError(f"{cls.__name__} takes a {'gated' if 'w_gate' in cls.ROLES else 'plain'} bundle")
        b = bundle.parameterized(parameterization)
        biases = {"w_in": b.b_in, "w_gate": b.b_gate, "w_out": b.b_out}
        projections = {}
        for role in cls.ROLES:
            weight = getattr(b, role)[0]
            bias = biases[role]
            weight = weight.t() if role == "w_out" else weight
            projections[role] = make_projection(weight, None if bias is None else bias[0], kind)
        return projections, None if b.scale is None else b.scale[0].clone()

    def as_bundle(self) -> NeuronBundle:
        """This FFN as a `NeuronBundle` with B = 1, in its own parameterization; detached views of the weights.

        Raises:
            InputError: a projection is not a plain `Linear` or `Conv1D` (an adapter, a quantised layer).
        """
        projections = {role: self.projection(role) for role in self.ROLES}
        return read_bundle(projections, self.activation, self.scale, self.scale_exponent, gating=self.gating)

    def trainable_parts(self) -> tuple[str, ...]:
        """Which of the bundle's tensors require grad: the parameters that count in this module's tangent kernel."""
        parts = []
        for role in self.ROLES:
            for name, parameter in self.projection(role).named_parameters(recurse=False):
                if parameter.requires_grad:
                    parts.append(role if name == "weight" else role.replace("w_", "b_"))
        return tuple(parts)

    @torch.no_grad()
    def merge_scale(self) -> None:
        """Fold p into the weights, in place: afterwards this is a plain FFN with the same outputs and no `scale`.

        Parameters keep their identity (and so stay in their optimiser), but their dynamics change: do this for export
        or inference, not in the middle of a training run.

        Examples:
            >>> fc1, fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
            >>> ffn = mlp_fusion.FusedMLP.from_mlp(fc1, fc2, scale=torch.full((16,), 3.0), parameterization="split")
            >>> x = torch.randn(5, 8)
            >>> before = ffn(x)
            >>> ffn.merge_scale()
            >>> ffn.scale, torch.allclose(ffn(x), before, atol=1e-4)
            (None, True)
        """
        if self.scale is None:
            return
        folded, _ = self.split_bundle(self.as_bundle(), "folded")
        for role in self.ROLES:
            current = self.projection(role)
            weight, bias = read_projection(current)
            plain_weight, plain_bias = read_projection(folded[role])
            weight.copy_(plain_weight)
            if bias is not None and plain_bias is not None:
                bias.copy_(plain_bias)
        self._forget_scale()


def _times(hidden: Tensor, factor: Tensor) -> Tensor:
    """hidden * factor in the dtype of hidden; the factor may be float32 beside a bfloat16 model."""
    return (hidden * factor).to(hidden.dtype)


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"a fused FFN holds {reason}: it runs through its projections one by one, so that it takes part, "
        "and without the fused kernels",
        stacklevel=2,
    )


class FusedMLP(FusedFFN):
    """`y = fc2(act(fc1(x)) * scale)`: a plain feed-forward module of fused neurons.

    The state_dict is that of a plain MLP (`fc1.weight`, `fc1.bias`, `fc2.weight`, `fc2.bias`) plus `scale`.

    Shapes: x `(..., d)` -> y `(..., d_out)`, any number of leading dimensions, in the dtype of the weights.

    Source: MLP Fusion (arXiv 2307.08941) for P = diag(scale) between activation and output projection.

    Examples:
        >>> fc1, fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        >>> sizes = torch.full((16,), 3.0)
        >>> ffn = mlp_fusion.FusedMLP.from_mlp(fc1, fc2, "gelu", sizes, parameterization="scaled")
        >>> sorted(ffn.state_dict())
        ['fc1.bias', 'fc1.weight', 'fc2.bias', 'fc2.weight', 'scale']
        >>> x = torch.randn(2, 5, 8)
        >>> torch.allclose(ffn(x), fc2(torch.nn.functional.gelu(fc1(x)) * 3), atol=1e-4)
        True
    """

    ROLES: ClassVar[Mapping[str, str]] = {"w_in": "fc1", "w_out": "fc2"}

    @classmethod
    def from_mlp(
        cls,
        fc1: nn.Linear,
        fc2: nn.Linear,
        activation: str = "gelu",
        scale: Tensor | None = None,
        parameterization: str = "folded",
        checkpoint_level: int = 1,
    ) -> FusedMLP:
        """Take over the weights of `y = fc2(act(fc1(x)) * scale)`; copies, so the originals stay as they are.

        Args:
            fc1, fc2: projections d -> h and h -> d_out, with or without bias.
            activation: `gelu` (exact), `gelu_tanh`, `quick_gelu`, `relu`, `relu2` or `silu`, or what transformers'
                configs call them (`gelu_new`, `swish`, ...).
            scale: `(h,)` cluster sizes, integer or floating; None for all ones. A `torch.nn.Parameter` stays one.
            parameterization: how the module stores the scale: `folded`, `scaled` or `split`; the outputs are the same.
            checkpoint_level: what is kept for the backward, see the class.

        Raises:
            ValueError: shapes disagree, unknown activation or parameterization, a trainable scale to be folded.
            InputError: a projection is not a plain `Linear` or `Conv1D`.

        Examples:
            >>> fc1, fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
            >>> x, sizes = torch.randn(5, 8), torch.arange(1, 17)
            >>> make = mlp_fusion.FusedMLP.from_mlp
            >>> ffns = [make(fc1, fc2, "relu", sizes, form) for form in ("folded", "scaled", "split")]
            >>> [torch.allclose(ffn(x), fc2(torch.relu(fc1(x)) * sizes), atol=1e-4) for ffn in ffns]
            [True, True, True]
        """
        projections = {"w_in": fc1, "w_out": fc2}
        return _from_projections(cls, projections, activation, scale, parameterization, checkpoint_level, PLAIN)

    def forward(self, x: Tensor) -> Tensor:
        weights = self._weights(x)
        if weights is None:
            before, behind = self._factors()
            hidden = self._activated(self.projection("w_in"), x, before)
            return self._projected(hidden, behind, self.projection("w_out"))
        (w_in, b_in), (w_out, b_out) = weights
        scale = self._scale_of_operator()
        y = fused_mlp(x, w_in, b_in, w_out, b_out, scale, self.activation, self.checkpoint_level)
        return self._dropped(y)


class FusedGLU(FusedFFN):
    """`y = down(act(gate(x)) * up(x) * scale)`: a gated feed-forward module of fused neurons (SwiGLU, GeGLU).

    The state_dict is that of a plain gated MLP (`gate`, `up`, `down`) plus `scale`.

    Shapes: x `(..., d)` -> y `(..., d_out)`, in the dtype of the weights.

    Examples:
        >>> gate, up, down = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        >>> ffn = mlp_fusion.FusedGLU.from_mlp(gate, up, down)
        >>> x = torch.randn(2, 5, 8)
        >>> torch.allclose(ffn(x), down(torch.nn.functional.silu(gate(x)) * up(x)), atol=1e-4)
        True
    """

    ROLES: ClassVar[Mapping[str, str]] = {"w_gate": "gate", "w_in": "up", "w_out": "down"}

    @classmethod
    def from_mlp(
        cls,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        activation: str = "silu",
        scale: Tensor | None = None,
        parameterization: str = "folded",
        checkpoint_level: int = 1,
        gating: Gate = PLAIN,
    ) -> FusedGLU:
        """Take over the weights of `y = down(act(gate(x)) * up(x) * scale)`; arguments as in `FusedMLP.from_mlp`.

        `gating` says within which limits, and with which offset of up.

        Examples:
            >>> gate, up, down = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
            >>> sizes = torch.full((16,), 2.0)
            >>> ffn = mlp_fusion.FusedGLU.from_mlp(gate, up, down, scale=sizes, parameterization="split")
            >>> x = torch.randn(5, 8)
            >>> torch.allclose(ffn(x), down(torch.nn.functional.silu(gate(x)) * up(x) * 2), atol=1e-4)
            True
        """
        projections = {"w_gate": gate, "w_in": up, "w_out": down}
        return _from_projections(cls, projections, activation, scale, parameterization, checkpoint_level, gating)

    def forward(self, x: Tensor) -> Tensor:
        weights = self._weights(x)
        if weights is None:
            before, behind = self._factors()
            gate, up = self._activated(self.projection("w_gate"), x, before), self.projection("w_in")(x)
            up = up if before is None or self.up_multiplies else _times(up, before)
            return self._projected(gate * self.gating.up(up), behind, self.projection("w_out"))
        (w_gate, b_gate), (w_up, b_up), (w_down, b_down) = weights
        biases, scale = (b_gate, b_up, b_down), self._scale_of_operator()
        options = (self.activation, self.checkpoint_level)
        y = fused_glu_mlp(x, w_gate, w_up, w_down, *biases, scale, *options, gating=self.gating)
        return self._dropped(y)


def _from_projections(
    cls: type[Self_],
    projections: Mapping[str, nn.Module],
    activation: str,
    scale: Tensor | None,
    parameterization: str,
    checkpoint_level: int,
    gating: Gate,
) -> Self_:
    if isinstance(scale, nn.Parameter) and parameterization == "folded":
        raise ValueError("a trainable scale cannot be folded into the weights: use scaled or split")
    activation = CONFIG_ACTIVATIONS.get(activation, activation)
    bundle = read_bundle(projections, activation, scale, gating=gating)
    module = cls.from_bundle(bundle, parameterization, checkpoint_level=checkpoint_level)
    for role, source in projections.items():
        for name, parameter in source.named_parameters(recurse=False):
            module.projection(role).get_parameter(name).requires_grad_(parameter.requires_grad)
    if isinstance(scale, nn.Parameter):
        trainable = nn.Parameter(scale.detach().to(torch.promote_types(scale.dtype, torch.float32), copy=True))
        del module.scale
        module.register_parameter("scale", trainable)
    return module
