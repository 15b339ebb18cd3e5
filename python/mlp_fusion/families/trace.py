"""Which products with parameters a module computes, in order, and what happens when an output of one is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Functions that are products -> what they are called here.
_PRODUCTS: dict[Any, str] = {
    F.linear: "linear",
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), "matmul"),
    **dict.fromkeys((torch.bmm, Tensor.bmm), "bmm"),
    **dict.fromkeys((torch.addmm, Tensor.addmm), "addmm"),
    torch.baddbmm: "baddbmm",
    **dict.fromkeys((F.conv1d, F.conv2d, torch.conv1d, torch.conv2d), "conv"),
    torch.einsum: "einsum",
}
_MOST_PRODUCTS = 4000

#: Replaces the output of a product; gets it and the axis that counts features.
Override = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Product:
    """One product with a parameter, y = x W, as it was called.

    Attributes:
        index: its place in the order of products.
        parameter: the parameter's name.
        expert: which slice of a stack of experts, or None for the whole.
        operation: `linear`, `matmul`, `bmm`, `addmm`, `baddbmm`, `conv` or `einsum`.
        x, y: what went in and what came out.
        axis: which axis of `x` and `y` counts features.
        bias: name of the bias that the function added, or None.
        weight: the parameter, as it was used: a slice, a transposed view.
    """

    index: int
    parameter: str
    expert: int | None
    operation: str
    x: Tensor
    y: Tensor
    axis: int
    bias: str | None
    weight: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """`values` as (positions, features)."""
        return values.movedim(self.axis, -1).reshape(-1, values.shape[self.axis])

    @property
    def n_in(self) -> int:
        return self.x.shape[self.axis]

    @property
    def n_out(self) -> int:
        return self.y.shape[self.axis]

    @property
    def pointwise(self) -> bool:
        """Whether each position is multiplied by itself: not so for a convolution with a kernel or with groups."""
        if self.operation != "conv":
            return True
        return all(size == 1 for size in self.weight.shape[2:]) and self.weight.shape[1] == self.n_in


class Trace(TorchFunctionMode):
    """Records products with parameters; `overrides[i]` replaces the output of product i.

    Args:
        owners: address of a parameter's storage -> its name and itself. Slices of a stack of experts and transposed
            views are found by it like whole parameters.
        overrides: by index of the product.
    """

    def __init__(
        self, owners: Mapping[int, tuple[str, Tensor]], overrides: Mapping[int, Override] | None = None
    ) -> None:
        super().__init__()
        self.owners, self.overrides = owners, overrides or {}
        self.products: list[Product] = []

    def _owner(self, value: Tensor) -> tuple[str, Tensor] | None:
        return None if value.is_meta else self.owners.get(value.untyped_storage().data_ptr())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = _PRODUCTS.get(func)
        if operation is None or not isinstance(out, Tensor):
            return out
        operands = [*(args[1:] if operation == "einsum" else args), *kwargs.values()]
        flat = [part for value in operands for part in (value if isinstance(value, (list, tuple)) else [value])]
        owned = [(value, self._owner(value)) for value in flat if isinstance(value, Tensor)]
        weights = [(value, owner) for value, owner in owned if owner is not None and owner[1].dim() >= 2]
        inputs = [value for value, owner in owned if owner is None]
        if len(weights) != 1 or not inputs:
            return out
        weight, (name, parameter) = weights[0]
        biases = [owner[0] for _, owner in owned if owner is not None and owner[1].dim() == 1]
        index, axis = len(self.products), 1 if operation == "conv" else -1
        if index in self.overrides:
            out = self.overrides[index](out, axis)
        if index == _MOST_PRODUCTS:
            raise RuntimeError(f"more than {_MOST_PRODUCTS} products")
        x = inputs[-1] if operation == "addmm" else inputs[0]
        self.products.append(
            Product(
                index, name, _slice(weight, parameter), operation, x.detach().clone(), out.detach().clone(), axis,
                biases[0] if biases else None, weight.detach(),
            )
        )  # fmt: skip
        return out


def _slice(weight: Tensor, parameter: Tensor) -> int | None:
    """Which expert of the stack `parameter` a matrix is, or None where it is no slice."""
    offset = weight.storage_offset() - parameter.storage_offset()
    if weight.dim() == 2 and parameter.dim() == 3:
        return offset // parameter.stride(0)
    if weight.dim() == 2 and parameter.dim() == 2 and weight.numel() < parameter.numel():
        return offset // weight.numel()
    return None


class Probe:
    """A module that can be called again and again, traced, with outputs of its products replaced.

    Args:
        module: with real, small weights.
        call: calls it.
        x: what it is called on.
        how: in words.
        arguments: what it is called on besides, of an experts module.
    """

    def __init__(
        self, module: nn.Module, call: Callable[[], Any], x: Tensor, how: str, arguments: tuple[Tensor, ...] = ()
    ) -> None:
        self.module, self.call, self.x, self.how, self.arguments = module, call, x, how, arguments
        self.parameters = dict(module.named_parameters())
        self.owners = {p.untyped_storage().data_ptr(): (n, p) for n, p in self.parameters.items() if p.numel()}

    def run(self, overrides: Mapping[int, Override] | None = None) -> tuple[list[Product], Any]:
        """The products of one call, and what the module returned."""
        # The same noise each time, where a module draws some: what differs between two calls is then the override.
        torch.manual_seed(0)
        with torch.no_grad(), Trace(self.owners, overrides) as trace:
            out = self.call()
        return trace.products, out


def set_all(values: Tensor) -> Override:
    """Replace a product's output by `values`, (positions, features)."""

    def change(y: Tensor, axis: int) -> Tensor:
        shape = y.movedim(axis, -1).shape
        return values.to(y.dtype).reshape(shape).movedim(-1, axis).contiguous()

    return change


def set_one(row: int, column: int, value: float) -> Override:
    """Replace one entry of a product's output."""

    def change(y: Tensor, axis: int) -> Tensor:
        moved = y.movedim(axis, -1)
        flat = moved.reshape(-1, moved.shape[-1]).clone()
        flat[row, column] = value
        return flat.reshape(moved.shape).movedim(-1, axis).contiguous()

    return change


def influence(
    probe: Probe, products: list[Product], source: Product, column: int
) -> dict[int, tuple[list[int], list[int]]] | None:
    """Later products whose input follows one output of `source`, in its middle row.

    Returns:
        Index of the product -> the rows and the columns of its input that follow; None where the order or the shapes of
        products depend on the value.
    """
    values = source.rows(source.y)
    row = values.shape[0] // 2
    # Larger than it was, and positive: no activation is flat there.
    changed, _ = probe.run({source.index: set_one(row, column, abs(float(values[row, column])) + 1.0)})
    if len(changed) != len(products):
        return None
    found = {}
    for before, after in zip(products[source.index + 1 :], changed[source.index + 1 :], strict=True):
        if before.x.shape != after.x.shape:
            return None
        follows = (before.rows(before.x) - after.rows(after.x)).abs() > 1e-7
        if bool(follows.any()):
            rows, columns = follows.nonzero(as_tuple=True)
            found[before.index] = (sorted(set(rows.tolist())), sorted(set(columns.tolist())))
    return found
