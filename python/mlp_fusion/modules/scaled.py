"""What every fused module has: neurons that stand for several, and how that is stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fusion_kernels.activations import get_activation
from fusion_kernels.gates import PLAIN, Gate
from mlp_fusion.neurons import SCALE_EXPONENTS, check_parameterization, output_factor, scale_power

Self_ = TypeVar("Self_", bound="Scaled")


def _is_observed() -> bool:
    """Whether a compiler, a tracer, a mode or a transform looks at what is computed, and could not see what is kept."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


class Scaled(nn.Module):
    """A module that holds the scale of fused neurons.

    Attributes:
        scale: buffer (or parameter, when one was passed), the number p of neurons that each fused one stands for, or
            None when p = 1 or p is folded into the weights.
        parameterization: `scaled` (p explicit; Adam-like optimisers), `split` (sqrt(p) on both sides; SGD-like) or
            `folded` (p inside the output weights; export and inference).
    """

    scale: Tensor | None

    def __init__(self, scale: Tensor | None, parameterization: str) -> None:
        """Raises ValueError: unknown parameterization, or a scale where there can be none."""
        super().__init__()
        self.parameterization = check_parameterization(parameterization)
        if scale is not None and parameterization == "folded":
            raise ValueError("a folded module has its scale inside the output weights: pass scale=None")
        if scale is not None and not scale.is_floating_point():
            scale = scale.float()
        if isinstance(scale, nn.Parameter):
            self.register_parameter("scale", scale)
        else:
            self.register_buffer("scale", scale)

    @property
    def scale_exponent(self) -> float:
        """How much of p the stored weights carry: the a of p^a."""
        return SCALE_EXPONENTS.get(self.parameterization, 0.0)

    @property
    @abstractmethod
    def gated(self) -> bool:
        """Whether the activation of a gate projection multiplies an up projection."""

    @property
    def up_multiplies(self) -> bool:
        """Whether an up projection is a factor of the hidden values as it is, with the p^a that it carries."""
        return self.gated

    def _factors(self) -> tuple[Tensor | None, Tensor | None]:
        """What multiplies pre-activations and what multiplies activations; None for 1.

        Of a gated block, the former are the gate's, and up's where that does not just multiply.
        """
        scale, a = self.scale, self.scale_exponent
        if scale is None or a == 0.0:
            return None, scale
        return scale_power(scale, -a), output_factor(scale, a, self.up_multiplies)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.scale is None and f"{prefix}scale" in state_dict:
            raise ValueError(
                f"{prefix}scale is in the state, and this module has no scale: its weights are plain ones, with the "
                "scale inside; build it with a scale, or load a state in which the scale is merged"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _forget_scale(self) -> None:
        """After p went into the weights."""
        del self.scale
        self.register_buffer("scale", None)
        self.parameterization = "folded"

    def _apply(self: Self_, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self_:
        """Keep a float32 scale float32 when the module is cast to half precision: it holds counts."""
        before = self.scale
        super()._apply(fn, recurse)
        if before is not None and self.scale is not None and not isinstance(before, nn.Parameter):
            lowered = torch.finfo(self.scale.dtype).bits < min(32, torch.finfo(before.dtype).bits)
            self.scale = before.to(self.scale.device) if lowered else self.scale
        return self


class ScaledModule(Scaled):
    """A module of fused neurons; its subclasses hold the weights.

    Attributes:
        activation: a name in `fusion_kernels.activations`.
        gating: the `fusion_kernels.Gate` of a gated module.
        scale, parameterization: see :class:`Scaled`.
        checkpoint_level: which hidden tensors are kept for the backward: 0 pre-activations and activations, 1
            pre-activations, 2 none, at the price of computing the first product again. May be changed at any time. On
            a CPU it counts from 33 tokens on: what fewer keep is small, and torch's own autograd the fastest.
    """

    #: A copy of the scale and what :meth:`_scale_of_operator` made of it.
    _kept: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        activation: str,
        scale: Tensor | None,
        parameterization: str,
        checkpoint_level: int,
        gating: Gate = PLAIN,
    ) -> None:
        """Raises ValueError: unknown activation, parameterization or level, or a scale where there can be none."""
        super().__init__(scale, parameterization)
        get_activation(activation)
        self.activation, self.gating = activation, gating
        if checkpoint_level not in (0, 1, 2):
            raise ValueError(f"checkpoint_level must be 0, 1 or 2, got {checkpoint_level!r}")
        self.checkpoint_level = checkpoint_level

    @property
    def up_multiplies(self) -> bool:
        return self.gated and self.gating.plain

    def _scale_of_operator(self) -> Tensor | None:
        """:meth:`_factors` as `fusion_kernels.fused_mlp` takes them: None, (h,), or (2, h) with what is behind first.

        The powers of a scale that is not trained, on a CPU, are kept for as long as its values are the same: they take
        longer than a block of one token. The values decide, because they may be written to in ways that leave no trace.
        """
        scale = self.scale
        if scale is None or self.scale_exponent == 0.0:
            return scale
        plain = type(scale) is Tensor and scale.device.type == "cpu" and not scale.requires_grad
        keeps, kept = plain and not _is_observed(), self._kept
        if keeps and kept is not None and kept[0].dtype == scale.dtype and torch.equal(kept[0], scale):
            return kept[1]
        before, behind = self._factors()
        assert before is not None
        assert behind is not None
        if not keeps:
            return torch.stack([behind, before])
        with torch.inference_mode(False), torch.no_grad():
            self._kept = scale.clone(), torch.stack([behind, before])
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        gating = "" if self.gating.plain else f"gating={self.gating}, "
        return (
            f"activation={self.activation}, {gating}parameterization={self.parameterization}, "
            f"checkpoint_level={self.checkpoint_level}"
        )
