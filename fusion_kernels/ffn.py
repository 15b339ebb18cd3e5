"""`FFN`: the one type of a feed-forward block. Its fields, their order and which way round they lie are decided here.

Everything that takes a block's tensors one by one, in Python, in an operator's schema or in compiled code, takes them
in the order of :data:`TENSORS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fusion_kernels.gates import PLAIN, Gate

FFN_ = TypeVar("FFN_", bound="FFN")


@dataclass(frozen=True, eq=False)
class FFN:
    """A feed-forward block, neuron by neuron: every tensor with an axis of N neurons has it before all but the batch's.

    With p the scale (1 where it is None), a its exponent and phi the activation, the block computes

        plain   y = sum_j p_j^(1-a)  phi((w_in_j.x + b_in_j) / p_j^a) w_out_j + b_out
        gated   y = sum_j p_j^(1-a)  phi((w_gate_j.x + b_gate_j) / p_j^a) (w_in_j.x + b_in_j) / p_j^a w_out_j + b_out

    so that a = 0 is the explicit multiplication by the cluster sizes p and a = 1/2 the square-root split. The limits
    and the offset of `gating` are those of what is divided by p^a already. What stands behind or before a block says
    whether its tensors have axes in front, of layers or experts, as `...` below.

    Attributes:
        w_in: `(..., N, d)` input weights; of a gated block, the up projection.
        w_out: `(..., N, d_out)` output weights, a row per neuron: the transpose of what `torch.nn.Linear` stores.
        activation: a name in `fusion_kernels.activations.ACTIVATIONS`.
        w_gate: `(..., N, d)` gate projection, or None for a plain block.
        b_in, b_gate: `(..., N)` biases of `w_in` and `w_gate`, or None.
        b_out: `(..., d_out)` output bias, or None.
        scale: `(..., N)` p, of a floating-point or integer dtype, or None for ones. The operators of
            `fusion_kernels.mlp` also take `(2, N)` with a = 0: what multiplies phi, then what multiplies its argument,
            and up where `gating` is not plain.
        scale_exponent: a.
        gating: limits and offset of a gated block.

    The constructor checks nothing; :meth:`check` does.
    """

    w_in: Tensor
    w_out: Tensor
    activation: str
    w_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_gate: Tensor | None = None
    b_out: Tensor | None = None
    scale: Tensor | None = None
    scale_exponent: float = 0.0
    gating: Gate = dataclasses.field(default_factory=Gate)

    @classmethod
    def of(
        cls: type[FFN_],
        tensors: Sequence[Any],
        activation: str,
        scale_exponent: float = 0.0,
        gating: Gate = PLAIN,
    ) -> FFN_:
        """A block of its tensors, in the order of :data:`TENSORS`."""
        w_in, w_out, w_gate, b_in, b_gate, b_out, scale = tensors
        return cls(w_in, w_out, activation, w_gate, b_in, b_gate, b_out, scale, scale_exponent, gating)

    @staticmethod
    def of_linears(stored: Sequence[Any], activation: str, gating: Gate = PLAIN) -> FFN:
        """A block of tensors in the order of :data:`TENSORS` that lie as `torch.nn.Linear` stores them.

        That is, with an output weight `(..., d_out, N)`, which becomes a view.
        """
        w_in, w_out, w_gate, b_in, b_gate, b_out, scale = stored
        return FFN(w_in, w_out.mT, activation, w_gate, b_in, b_gate, b_out, scale, 0.0, gating)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The block's tensors in the order of :data:`TENSORS`, None for those that it lacks."""
        return (self.w_in, self.w_out, self.w_gate, self.b_in, self.b_gate, self.b_out, self.scale)

    @property
    def gated(self) -> bool:
        return self.w_gate is not None

    @property
    def function(self) -> tuple[str | float | None, ...]:
        """Activation and gate, as operators take them: see :data:`FUNCTION`."""
        return (self.activation, *self.gating.arguments)

    @property
    def up_multiplies(self) -> bool:
        """Whether the up projection is a factor as it is, so that what it is to be divided by may be so behind."""
        return self.gated and self.gating.plain

    def named(self) -> dict[str, Tensor]:
        """The tensors that there are, by name, in the order of :data:`TENSORS`."""
        return {name: t for name, t in zip(TENSORS, self.tensors, strict=True) if t is not None}

    def map(self: FFN_, function: Callable[[Tensor], Tensor]) -> FFN_:
        """The block with `function` of each of its tensors."""
        changed: dict[str, Any] = {name: function(t) for name, t in self.named().items()}
        return dataclasses.replace(self, **changed)

    def at(self, index: int) -> FFN:
        """Block `index` of those along the first axis, without that axis."""
        tensors = [None if t is None else t[index] for t in self.tensors]
        return FFN.of(tensors, self.activation, self.scale_exponent, self.gating)

    def as_bundle(self: FFN_) -> FFN_:
        """Itself: what the operators of `fusion_kernels` ask every block for."""
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that each tensor has if it fits the neurons and inputs of `w_in` and the outputs of `w_out`."""
        *axes, neurons, d = self.w_in.shape
        outputs = self.w_out.shape[-1]
        matrix, vector = (*axes, neurons, d), (*axes, neurons)
        shapes = (matrix, (*axes, neurons, outputs), matrix, vector, vector, (*axes, outputs), vector)
        return dict(zip(TENSORS, shapes, strict=True))

    def check(self, *axes: str) -> None:
        """Raise ValueError unless the tensors fit each other.

        Args:
            axes: what the axes before those of a single block are called; none for one block.
        """
        before = "".join(f"{axis}, " for axis in axes)
        if any(t.ndim != len(axes) + 2 for t in (self.w_in, self.w_out)):
            raise ValueError(
                f"w_in must be ({before}neurons, d) and w_out ({before}neurons, outputs), "
                f"got {tuple(self.w_in.shape)} and {tuple(self.w_out.shape)}"
            )
        shapes = self.shapes()
        for name, t in self.named().items():
            if tuple(t.shape) != shapes[name]:
                raise ValueError(f"{name} must be {shapes[name]} to fit w_in and w_out, got {tuple(t.shape)}")
        if self.b_gate is not None and self.w_gate is None:
            raise ValueError("b_gate is there without w_gate: a plain block has no gate")
        if not self.gating.plain and self.w_gate is None:
            raise ValueError("gating has limits or an offset, and there is no w_gate: a plain block has no gate")


#: The names of a block's tensors, in the order in which everything takes them.
TENSORS = tuple(f.name for f in dataclasses.fields(FFN) if f.name not in ("activation", "scale_exponent", "gating"))
#: Those that are parameters; the scale is none.
PARTS = TENSORS[:-1]
#: What it computes of them, in an operator's schema: :attr:`FFN.function`.
FUNCTION = "str activation, float? gate_limit, str gate_clamp, float up_offset"
#: A block's tensors in an operator's schema.
SCHEMA = ", ".join(f"Tensor{'' if name in ('w_in', 'w_out') else '?'} {name}" for name in TENSORS)
