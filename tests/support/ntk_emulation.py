"""The CUDA library's operators on CPU tensors, by the emulation in `ntk_emulation.cpp`: everything but the hardware."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("ntk_emulation.cpp")
#: `Format` of csrc/cuda/gram.h.
_FORMATS = {"highest": 0, "bf16": 1, "bf16x3": 2, "tf32x3": 3}
_NAMES = {torch.float32: "float", torch.float64: "double"}


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _padded(columns: int) -> int:
    return (columns + 31) // 32 * 32


class Emulation:
    """What `torch.ops.fusion_kernels_cuda` has; compiled into `folder`."""

    def __init__(self, folder: Path) -> None:
        library = folder / "ntk_emulation.so"
        compiler = os.environ.get("CXX", "c++").split()[0]
        flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.library = ctypes.CDLL(str(library))

    def activations(self) -> list[str]:
        """The names in `csrc/activation.h`, by the numbers that its functions switch on."""
        self.library.activation_name.restype = ctypes.c_char_p
        names = [self.library.activation_name(number).decode() for number in range(self.library.activation_count())]
        assert [self.library.activation_number(name.encode()) for name in names] == list(range(len(names)))
        return names

    def ntk_operand(
        self,
        x: Tensor,
        z: Tensor,
        g: Tensor | None,
        shrink: Tensor | None,
        of_hidden: Tensor,
        of_in: Tensor,
        of_gate: Tensor | None,
        activation: str,
        limit: float | None,
        clamp: str,
        up_offset: float,
        signs: bool,
        inputs: bool,
        slopes_in: bool,
        slopes_gate: bool,
        hidden: bool,
        precision: str,
    ) -> Tensor:
        (n, d), h = x.shape, z.shape[1]
        columns = [_padded(d) * inputs, _padded(h) * slopes_in, _padded(h) * slopes_gate, _padded(h) * hidden]
        dtype = torch.bfloat16 if precision.startswith("bf16") else x.dtype
        result = torch.full((2 if precision.endswith("x3") else 1, n, sum(columns)), float("nan"), dtype=dtype)
        tensors = [_pointer(t) for t in (x, z, g, shrink, of_hidden, of_in, of_gate)]
        getattr(self.library, f"operand_{_NAMES[x.dtype]}")(
            (ctypes.c_void_p * 7)(*tensors),
            _integers(n, d, h, *columns),
            activation.encode(),
            None if limit is None else ctypes.byref(ctypes.c_double(limit)),
            clamp.encode(),
            ctypes.c_double(up_offset),
            ctypes.c_bool(signs),
            _FORMATS[precision],
            ctypes.c_void_p(result.data_ptr()),
        )
        return result

    def ntk_tiles(
        self,
        left: Tensor,
        right: Tensor,
        inputs: int,
        neurons: int,
        slopes: int,
        hidden: bool,
        bias: float,
        constant: float,
        accumulate: bool,
        symmetric: bool,
        out: Tensor,
    ) -> None:
        planes, n1, columns = left.shape
        n2 = right.shape[1]
        assert right.shape == (planes, n2, columns)
        ranges = _padded(inputs), slopes * _padded(neurons), hidden * _padded(neurons)
        assert sum(ranges) == columns
        assert out.shape == (n1, n2)
        assert all(side.stride()[1:] == (columns, 1) or side.shape[1] <= 1 or not columns for side in (left, right))
        assert n2 <= 1 or out.stride(1) == 1
        precision = {(True, 1): "bf16", (True, 2): "bf16x3", (False, 1): "highest", (False, 2): "tf32x3"}[
            left.dtype == torch.bfloat16, planes
        ]
        getattr(self.library, f"tiles_{_NAMES[out.dtype]}")(
            ctypes.c_void_p(left.data_ptr()),
            ctypes.c_void_p(right.data_ptr()),
            _integers(n1, n2, *ranges, n2 if n1 <= 1 else out.stride(0), left.stride(0), right.stride(0)),
            ctypes.c_double(bias),
            ctypes.c_double(constant),
            ctypes.c_bool(accumulate),
            ctypes.c_bool(symmetric),
            _FORMATS[precision],
            ctypes.c_void_p(out.data_ptr()),
        )

    def ntk_strip(
        self, a: Tensor, b: Tensor, first: int, symmetric: bool, sums: Tensor, rows: Tensor, columns: Tensor
    ) -> None:
        n, m = a.shape
        assert b.shape == (n, m)
        assert rows.shape == (2, n)
        assert columns.shape[1] >= m
        assert sums.shape[0] >= (m + 127) // 128
        getattr(self.library, f"strip_{_NAMES[a.dtype]}")(
            ctypes.c_void_p(_pointer(a)),
            ctypes.c_void_p(_pointer(b)),
            _integers(n, m, first, rows.stride(0), columns.shape[1]),
            ctypes.c_bool(symmetric),
            ctypes.c_void_p(_pointer(sums)),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_void_p(_pointer(columns)),
        )

    def tile(self, index: int, rows: int, columns: int, symmetric: bool) -> tuple[int, int]:
        """Row and column of the tile that block number `index` computes."""
        place = _integers(0, 0)
        self.library.tile_place(*(ctypes.c_int64(i) for i in (index, rows, columns)), ctypes.c_bool(symmetric), place)
        return place[0], place[1]
