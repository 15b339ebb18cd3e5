"""What the operators of blocks take and return beside the block itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusion_kernels.ffn import FFN

#: y (T, d_out); z, g, a (T, N), each empty (0,) where the level does not save it or the block has none. Of experts all
#: have a row for every choice, y in the order of the choices, the others sorted by expert.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
#: What the forward has kept for the backward: its z, g, a.
Saved = tuple[Tensor, Tensor, Tensor]


def rows_of_call(inputs: tuple[Tensor, ...]) -> int:
    """How many rows an operator computes of x and its extra inputs, whose first, if any, has an entry for each."""
    return inputs[min(1, len(inputs) - 1)].shape[0]


class Needs(NamedTuple):
    """Of x and of each tensor of a block, in their order, whether its gradient is asked for."""

    x: bool
    w_in: bool
    w_out: bool
    w_gate: bool
    b_in: bool
    b_gate: bool
    b_out: bool
    scale: bool

    @property
    def bits(self) -> int:
        """As one number, x the lowest bit."""
        x, w_in, w_out, w_gate, b_in, b_gate, b_out, scale = self
        return x | w_in << 1 | w_out << 2 | w_gate << 3 | b_in << 4 | b_gate << 5 | b_out << 6 | scale << 7


class Gradients(NamedTuple):
    """The gradients of x and of each tensor of a block, in their order; each has the shape of what it belongs to.

    None is there for what was not asked for, or is not there itself. The operator returns empty (0,) tensors instead.
    """

    x: Tensor | None
    w_in: Tensor | None
    w_out: Tensor | None
    w_gate: Tensor | None
    b_in: Tensor | None
    b_gate: Tensor | None
    b_out: Tensor | None
    scale: Tensor | None

    def asked(self, x: Tensor, ffn: FFN, needs: Needs) -> Gradients:
        """Those that are asked for, cast to the dtype of what they belong to."""
        # Casts to nothing else cost a microsecond each, which is much of a small block's step.
        return Gradients._make(
            [
                None if not need or t is None or of is None else t if t.dtype is of.dtype else t.to(of.dtype)
                for t, of, need in zip(self, (x, *ffn.tensors), needs, strict=True)
            ]
        )
