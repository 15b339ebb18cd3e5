"""`Gate`: what a gated block does to its gate and its up projection beside the activation, limits and an offset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fusion_kernels.library import check_name

Clamp = Literal["none", "above", "both", "after"]


@dataclass(frozen=True)
class Gate:
    """The form of a gated block: hidden = after(phi(inside(gate))) * (limited(up) + up_offset).

    With a limit L, `limited` is up in [-L, L]. Of the gate, `clamp` says what is limited: nothing (`none`), the
    argument of phi from `above` by L or on `both` sides, or phi's value from above by L (`after`). Derivatives are 0
    beyond a limit and those of the inside at it, as `torch.clamp` has them.

    Attributes:
        limit: L, positive; None for no limit at all.
        clamp: of the gate; `none` without a limit.
        up_offset: added to the up projection, behind its limit.

    Raises:
        ValueError: a limit that is not positive and finite, an offset that is not finite, a clamp that is unknown or
            has no limit.

    Examples:
        >>> gate = fusion_kernels.Gate(limit=7.0, clamp="above", up_offset=1.0)  # with quick_gelu: gpt-oss
        >>> x, w_gate, w_up, w_down = (9 * torch.randn(8, 8) for _ in range(4))
        >>> y = fusion_kernels.fused_glu_mlp(x, w_gate, w_up, w_down, activation="quick_gelu", gating=gate)
        >>> g, up = (x @ w_gate.T).clamp(max=7), (x @ w_up.T).clamp(-7, 7)
        >>> torch.allclose(y, (g * torch.sigmoid(1.702 * g) * (up + 1)) @ w_down.T, rtol=1e-3, atol=1e-2)
        True
    """

    limit: float | None = None
    clamp: Clamp = "none"
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        check_name("clamp", self.clamp, get_args(Clamp))
        if self.limit is None and self.clamp != "none":
            raise ValueError(f"clamp {self.clamp!r} needs a limit: give one, or use 'none'")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be positive and finite, or None for no limit, got {self.limit!r}")
        if not math.isfinite(self.up_offset):
            raise ValueError(f"up_offset must be finite, got {self.up_offset!r}")

    @property
    def plain(self) -> bool:
        """Whether the block is phi(gate) * up: then a factor of up is one of the hidden values."""
        return self.limit is None and self.up_offset == 0.0

    @property
    def arguments(self) -> tuple[float | None, str, float]:
        """Its fields, as operators take them."""
        return self.limit, self.clamp, self.up_offset

    def inside(self, gate: Tensor) -> Tensor:
        """What phi takes."""
        if self.clamp not in ("above", "both") or self.limit is None:
            return gate
        return gate.clamp(-self.limit if self.clamp == "both" else None, self.limit)

    def after(self, value: Tensor) -> Tensor:
        """What multiplies up, of phi's value."""
        return value.clamp(max=self.limit) if self.clamp == "after" else value

    def up(self, up: Tensor) -> Tensor:
        """What is multiplied: up limited, and the offset."""
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return up + self.up_offset if self.up_offset else up

    def through_gate(self, gradient: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        """`gradient` where the limits let the gate through, else 0.

        Args:
            gradient: by phi's argument.
            gate: before its limit.
            value: phi's, before its limit.
        """
        if self.clamp == "none" or self.limit is None:
            return gradient
        if self.clamp == "after":
            return _where(value <= self.limit, gradient)
        inside = gate <= self.limit
        return _where(inside & (gate >= -self.limit) if self.clamp == "both" else inside, gradient)

    def through_up(self, gradient: Tensor, up: Tensor) -> Tensor:
        """`gradient` where the limit lets up through, else 0."""
        if self.limit is None:
            return gradient
        return _where((up >= -self.limit) & (up <= self.limit), gradient)


def _where(inside: Tensor, gradient: Tensor) -> Tensor:
    return torch.where(inside, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))


#: No limits, no offset: phi(gate) * up.
PLAIN = Gate()
