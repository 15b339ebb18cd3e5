"""A feed-forward block as the tangent-kernel functions take it: its neurons, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN, PARTS, TENSORS
from fusion_kernels.ntk.sharing import check_untied
from fusion_kernels.ntk.types import Block


def ffn_of(block: Block) -> FFN:
    """The block's neurons, with its batch axis.

    Raises:
        TypeError: it is nothing that has them.
    """
    if not hasattr(block, "as_bundle"):
        raise TypeError(
            f"block is a {type(block).__name__}: give what has as_bundle(), a mlp_fusion.NeuronBundle, FusedMLP or "
            "FusedGLU (FusedMLP.from_mlp makes one of two linear layers)"
        )
    bundle = block.as_bundle()
    return FFN(*(getattr(bundle, field.name) for field in dataclasses.fields(FFN)))


@dataclass(frozen=True)
class Prepared:
    """One block and the rows it is asked about: detached, checked, in one dtype, without the batch dimension.

    Attributes:
        rows: name -> (N, d).
        ffn: without the neurons of scale 0 where the exponent is not 0.
        kept: (neurons,) bool, the neurons that are in `ffn`; None for all.
        parts: the parts to differentiate by.
        metric: (neurons,) or None.
    """

    rows: Mapping[str, Tensor]
    ffn: FFN
    kept: Tensor | None
    parts: list[str]
    metric: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.ffn.w_in.dtype

    @property
    def outputs(self) -> int:
        """O, how many outputs the block has."""
        return self.ffn.w_out.shape[1]

    def described(self) -> tuple[Tensor | float | str | None, ...]:
        """The block's tensors, a and `FFN.function`, as every operator takes them behind its rows."""
        return (*self.ffn.tensors, self.ffn.scale_exponent, *self.ffn.function)


def all_finite(t: Tensor) -> bool:
    """Whether no value of `t` is infinite or NaN."""
    # One pass that allocates nothing; both NaN and infinities survive it.
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or NaN; all are of one dtype and device."""
    # All at once: where they lie on a GPU, every answer waits for it.
    extremes = [extreme for t in tensors.values() if t.numel() for extreme in t.aminmax()]
    if not extremes or bool(torch.stack(extremes).isfinite().all()):
        return None
    return next(name for name, t in tensors.items() if not all_finite(t))


def prepare(
    block: Block,
    rows: Mapping[str, Tensor | None],
    params: str | Sequence[str] | None,
    metric: Tensor | None,
    others: Mapping[str, Tensor | None] | None = None,
) -> Prepared:
    """Check a call, and bring its tensors into the dtype of the computation.

    Args:
        rows: name -> (N, d) inputs, or None for those that are not given; the first is there.
        params, metric: as in `ntk_gram`.
        others: further tensors whose dtype, device and values are to be checked, and whose shapes are the caller's
            business; they are returned among the rows.

    Raises:
        ValueError: see `ntk_gram`.
    """
    ffn = ffn_of(block)
    _check_block(ffn)
    own = ffn.named()
    parts = _parts(block, params, [part for part in PARTS if part in own])
    check_untied(block, own, parts)
    given = {**rows, **(others or {}), **own, "metric": metric}
    tensors = {name: t.detach() for name, t in given.items() if t is not None}
    _check_rows([name for name in rows if name in tensors], tensors, ffn)
    dtype = _common_dtype(tensors)
    tensors = {name: (t[0] if name in own else t).to(dtype) for name, t in tensors.items()}
    unfit = first_not_finite(tensors)
    if unfit is not None:
        raise ValueError(f"{unfit} has values that are not finite")
    metric = tensors.pop("metric", None)
    if metric is not None and bool((metric < 0).any()):
        raise ValueError("metric must not be negative")
    exponent = float(ffn.scale_exponent)
    single = FFN.of([tensors.pop(name, None) for name in TENSORS], ffn.activation, exponent, ffn.gating)
    kept = _kept(single)
    if kept is not None:
        neurons: dict[str, Any] = {name: t[kept] for name, t in single.named().items() if name != "b_out"}
        single = dataclasses.replace(single, **neurons)
        metric = None if metric is None else metric[kept]
    return Prepared(tensors, single, kept, parts, metric)


def _check_block(ffn: FFN) -> None:
    """Raise ValueError unless the tensors are those of one block with a known activation."""
    get_activation(ffn.activation)
    if ffn.w_in.ndim == 3 and ffn.w_in.shape[0] != 1:
        raise ValueError(
            f"a tangent kernel is of one block: w_in has a batch of {ffn.w_in.shape[0]}, select one of them"
        )
    ffn.check("1")


def _check_rows(rows: Sequence[str], tensors: Mapping[str, Tensor], ffn: FFN) -> None:
    """Raise ValueError for rows or a metric of a wrong shape, or a tensor that is elsewhere than the first rows."""
    _, neurons, d = ffn.w_in.shape
    for name, t in tensors.items():
        if name in rows and (t.ndim != 2 or t.shape[1] != d):
            raise ValueError(f"{name} must be (N, {d}) for this block, got {tuple(t.shape)}")
        if name == "metric" and tuple(t.shape) != (neurons,):
            raise ValueError(f"metric must be {(neurons,)}, one per neuron, got {tuple(t.shape)}")
        if t.device != tensors[rows[0]].device:
            raise ValueError(f"{name} is on {t.device}, {rows[0]} is on {tensors[rows[0]].device}")


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The widest dtype of all, float32 at least; scale and metric may be integers (cluster sizes) and do not decide.

    Raises:
        ValueError: another tensor has no floating-point dtype.
    """
    dtype = torch.float32
    for name, t in tensors.items():
        if name in ("scale", "metric"):
            continue
        if not t.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {t.dtype}")
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _kept(ffn: FFN) -> Tensor | None:
    """The neurons that do something, or None for all of them.

    An empty cluster is a silent neuron: no output, no gradient. Powers of its scale would be infinite.

    Raises:
        ValueError: a scale is negative, and its exponent is not 0.
    """
    if ffn.scale_exponent == 0 or ffn.scale is None:
        return None
    if bool((ffn.scale < 0).any()):
        raise ValueError(f"scale must not be negative where its exponent is not 0 (it is {ffn.scale_exponent})")
    return ffn.scale > 0 if bool((ffn.scale == 0).any()) else None


def _parts(block: Block, params: str | Sequence[str] | None, present: Sequence[str]) -> list[str]:
    """Return the parts to count, in the order of `PARTS`.

    Raises:
        ValueError: an unknown part, one that is not `present`, or none at all.
    """
    if params is None:
        trainable_parts = getattr(block, "trainable_parts", None)
        params = present if trainable_parts is None else trainable_parts()
    wanted = (params,) if isinstance(params, str) else tuple(params)
    for part in wanted:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}: use some of {', '.join(PARTS)}")
        if part not in present:
            raise ValueError(f"this block has no {part}: its parts are {', '.join(present)}")
    if not wanted:
        raise ValueError(f"no part to differentiate by: unfreeze one or name it in params, of {', '.join(present)}")
    return [part for part in PARTS if part in wanted]
