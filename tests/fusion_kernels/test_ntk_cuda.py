"""The backend `"cuda"` of `ntk_gram`: on a GPU where there is one, and everywhere by an emulation of its kernels.

The emulation (`tests/support/ntk_emulation.cpp`) runs the kernels' own index arithmetic and order of operations, with
the registers of a warp as the PTX manual lays them out. What it cannot show is what the GPU tests here are for:
barriers, asynchronous copies, launches. Where there is an nvcc the library is built as setup.py builds it, linked
against the stable ABI and loaded; its kernels must not spill, and fit the 99 KiB of shared memory of compute capability
8.6.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_build
import pytest
import torch
from ffn_blocks import ACTIVATIONS, KERNELS, make_bundle
from ntk_emulation import Emulation
from ntk_precision import (
    PRECISIONS,
    STRIPS,
    assert_bfloat16_beats_torch,
    assert_comparisons,
    assert_long_sums_round,
    assert_not_finite_is_kept,
    assert_nothing_above_is_read,
    assert_precise,
    assert_sums,
    moved,
)

from fusion_kernels import BackendUnavailableError, native, ntk_gram
from fusion_kernels.library import Backend
from fusion_kernels.ntk import Kernel, cuda_backend
from fusion_kernels.ntk import compare as comparison
from fusion_kernels.ntk import gram as module
from fusion_kernels.ntk import reference as reference

pytestmark = pytest.mark.slow

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
NO_COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) is None


@pytest.fixture(params=["emulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors are to lie for `backend="cuda"` to take them."""
    if request.param == "cuda":
        if cuda_backend.why_not() is not None:
            pytest.skip(f"backend 'cuda': {cuda_backend.why_not()}")
        return "cuda"
    emulation = request.getfixturevalue("emulation")
    monkeypatch.setattr(native, "cuda_operators", lambda: emulation)
    for operator in (module._NTK_GRAM, module._NTK_GRAM_OUT, comparison._NTK_SUMS):
        *others, cuda = operator.backends
        monkeypatch.setattr(operator, "backends", [Backend("cuda", cuda.function, ("cpu",)), *others])
    return "cpu"


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation(device: str, kernel: Kernel, activation: str, gated: bool) -> None:
    bundle = make_bundle(33, 40, 5, gated=gated, scale=True, scale_exponent=0.5, activation=activation)
    x = torch.randn(37, 33).double()
    metric = torch.rand(40).double()
    assert_precise("cuda", bundle, x, None, device, kernel=kernel)
    if activation == "gelu":
        direction = torch.randn(5).double()
        weights = {"metric": metric.float().double(), "reduce": direction.float().double()}
        assert_precise("cuda", bundle, x, x[:20].flip(0), device, kernel=kernel, **weights)


@pytest.mark.parametrize(
    ("rows", "others", "d", "neurons"),
    [
        (1, None, 1, 1), (17, None, 1, 123), (123, 1, 17, 17), (1, 123, 123, 1), (128, None, 32, 32),
        (129, 257, 33, 31), (257, None, 64, 1), (300, None, 5, 70), (40, None, 1537, 17),
    ],
)  # fmt: skip
def test_odd_shapes(device: str, rows: int, others: int | None, d: int, neurons: int) -> None:
    bundle = make_bundle(d, neurons, 3, gated=rows % 2 == 1, scale=True, scale_exponent=0.5)
    x2 = None if others is None else torch.randn(others, d).double()
    assert_precise("cuda", bundle, torch.randn(rows, d).double(), x2, device)


def test_many_tiles(device: str) -> None:
    """More rows of tiles than are walked together, of both kernels."""
    bundle = make_bundle(7, 9, 3)
    assert_precise("cuda", bundle, torch.randn(1200, 7).double(), None, device)
    assert_precise("cuda", bundle, torch.randn(1161, 7).double(), torch.randn(150, 7).double(), device)


@pytest.mark.parametrize(
    "params",
    [
        "w_in", "b_in", "w_out", "b_out", ("b_in", "b_gate"), ("w_in", "b_gate"), ("w_in", "b_in", "w_gate"),
        ("b_gate", "w_gate", "b_out"), ("w_in", "w_gate", "b_gate", "w_out", "b_out"),
    ],
    ids=str,
)  # fmt: skip
def test_every_choice_of_parts(device: str, params: Any) -> None:
    """Terms multiplied by inputs, by a bias or by both take one pass each, and the later ones add to the first."""
    bundle = make_bundle(20, 33, 4, gated=True, scale=True, scale_exponent=0.5)
    assert_precise("cuda", bundle, torch.randn(140, 20).double(), None, device, params=params)
    assert_precise("cuda", bundle, torch.randn(11, 20).double(), torch.randn(5, 20).double(), device, params=params)


@pytest.mark.parametrize(("rows", "others"), [(0, None), (0, 4), (4, 0)])
def test_no_rows(device: str, rows: int, others: int | None) -> None:
    bundle = moved(make_bundle(5, 6, 3), device, torch.float32)
    x2 = None if others is None else torch.randn(others, 5, device=device)
    gram = ntk_gram(bundle, torch.randn(rows, 5, device=device), x2, backend="cuda")
    assert gram.shape == (rows, rows if others is None else others)


@pytest.mark.parametrize("precision", ["highest", "tf32x3", "bf16x3", "bf16"])
def test_only_the_result_is_written(device: str, precision: Any) -> None:
    bundle = moved(make_bundle(5, 6, 3), device, torch.float32)
    x = torch.randn(133, 5, device=device)
    expected = ntk_gram(bundle, x, backend="cuda", precision=precision)
    out = torch.full((268, 151), float("nan"), device=device)
    ntk_gram(bundle, x, backend="cuda", precision=precision, out=out[1:267:2, 7:140])
    assert torch.equal(out[1:267:2, 7:140], expected)
    out[1:267:2, 7:140] = float("nan")
    assert out.isnan().all()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_bfloat16_errs_less_than_torch_in_bfloat16(device: str, gated: bool) -> None:
    assert_bfloat16_beats_torch("cuda", gated, device)


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x3"])
def test_long_sums_round(device: str, precision: Any) -> None:
    assert_long_sums_round("cuda", precision, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "others", "params", "block_size"), STRIPS)
def test_sums_of_two_kernels(
    device: str, dtype: torch.dtype, kernel: Kernel, rows: int, others: int | None, params: Any, block_size: int | None
) -> None:
    assert_sums(cuda_backend, device, dtype, kernel, rows, others, params, block_size)


def test_comparisons_by_strips(device: str) -> None:
    assert_comparisons("cuda", device)


def test_a_strip_reads_nothing_above_the_diagonal(emulation: Emulation) -> None:
    assert_nothing_above_is_read(emulation.ntk_strip)


@pytest.mark.parametrize("reduce", ["full", "diagonal"])
def test_outputs_are_products_by_torch(device: str, reduce: Any) -> None:
    bundle = make_bundle(5, 6, 3, gated=True)
    x = torch.randn(7, 5).double()
    exact = ntk_gram(bundle, x, reduce=reduce, backend="reference")
    found = ntk_gram(moved(bundle, device, torch.float64), x.to(device), reduce=reduce, backend="cuda")
    torch.testing.assert_close(found.cpu(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_stays_so(emulation: Emulation, precision: str) -> None:
    assert_not_finite_is_kept(emulation.ntk_operand, precision)


def test_precisions_are_checked(device: str) -> None:
    x = torch.randn(4, 5, device=device)
    single, double = (moved(make_bundle(5, 6, 3), device, dtype) for dtype in (torch.float32, torch.float64))
    default = ntk_gram(single, x, backend="cuda")
    assert torch.equal(default, ntk_gram(single, x, backend="cuda", precision="tf32x3"))
    assert not torch.equal(default, ntk_gram(single, x, backend="cuda", precision="highest"))
    for block, options, message in (
        (double, {}, "this kernel is torch.float64, use 'highest'"),
        (single, {"reduce": "full"}, "reduce='full' has an axis of outputs, use 'highest'"),
        (single, {"backend": "reference"}, "backend 'reference' computes in the dtype itself, use 'highest'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ntk_gram(block, x, **{"backend": "cuda", "precision": "bf16", **options})


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_tile_is_computed_once(emulation: Emulation, symmetric: bool) -> None:
    for rows in range(1, 36):
        for columns in [rows] if symmetric else (1, 7, 8, 9, 31):
            expected = {(i, j) for i in range(rows) for j in range(i + 1 if symmetric else columns)}
            found = [emulation.tile(t, rows, columns, symmetric) for t in range(len(expected))]
            assert set(found) == expected


def test_tiles_of_the_largest_launch(emulation: Emulation) -> None:
    """The square root that finds a tile's row is off by its rounding for none of the rows that one launch has."""
    rows = 65535
    for row in (*range(0, rows - 8, 509), rows - 9):
        band = row // 8 * 8
        first = band * (band + 1) // 2
        assert emulation.tile(first, rows, rows, True) == (band, 0)
        last = (band + 8) * (band + 9) // 2 - 1
        assert emulation.tile(last, rows, rows, True) == (band + 7, band + 7)


def test_shared_memory_is_read_and_written_without_conflicts(emulation: Emulation) -> None:
    assert emulation.library.bank_conflicts() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so() -> None:
    with pytest.raises(BackendUnavailableError, match="torch finds no CUDA device"):
        ntk_gram(make_bundle(5, 6, 3), torch.randn(4, 5).double(), backend="cuda")


def test_a_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    reason = native.load(tmp_path, "_cuda")
    assert reason is not None
    assert "_cuda*.so): install with MLP_FUSION_BUILD=cuda, nvcc" in reason


# What nvcc makes of it.


@dataclass(frozen=True)
class Build:
    """The library's folder, the toolkit's, and what ptxas said: (kernel, capability) -> its report."""

    folder: Path
    toolkit: Path
    reports: dict[tuple[str, int], str]


@pytest.fixture(scope="module")
def built() -> Build:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if nvcc is None or NO_COMPILER:
        pytest.skip("there is no nvcc in CUDA_HOME or on the PATH, or no C++ compiler")
    folder = cuda_build.kept(nvcc)
    entries = re.split(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", (folder / cuda_build.SAID).read_text())[1:]
    reports = {
        (name, int(capability)): report
        for name, capability, report in zip(entries[::3], entries[1::3], entries[2::3], strict=True)
    }
    plan = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    toolkit = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    assert toolkit is not None
    return Build(folder, Path(toolkit[1].strip()), reports)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_within_the_resources(built: Build, emulation: Emulation, capability: int) -> None:
    reports = {name: report for (name, of), report in built.reports.items() if of == capability}
    assert len([name for name in reports if "operand_kernel" in name]) == 5
    tiles = [name for name in reports if "gram_kernel" in name]
    assert len(tiles) == 5
    strips = [name for name in reports if "columns_kernel" in name or "rows_kernel" in name]
    assert len(strips) == 4
    for name, report in reports.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (name, report)
        fixed = re.search(r"(\d+) bytes smem", report)
        planes = re.search(r"gram_kernelILi(\d)E", name)
        shared = emulation.library.shared_memory(int(planes[1])) if planes else int(fixed[1]) if fixed else 0
        assert shared <= SHARED_MEMORY[capability], name
        assert (shared > 0) == (name in tiles + strips)


def test_the_library_links_and_loads(built: Build) -> None:
    library = built.folder / "fusion_kernels" / "_cuda.abi3.so"
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); o = torch.ops.fusion_kernels_cuda\n"
        "print(*(f.default._schema.name for f in (o.ntk_operand, o.ntk_tiles, o.ntk_strip)))\n"
        "try:\n"
        "    none = torch.zeros(1, 2, 0)\n"
        "    o.ntk_tiles(none, none, 0, 0, 0, False, 0, 0, False, True, torch.zeros(2, 2))\n"
        "except NotImplementedError as error:\n"
        "    print('CUDA' in str(error))\n"
    )
    found = os.pathsep.join([str(built.folder), str(built.toolkit / "lib64"), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {**os.environ, "LD_LIBRARY_PATH": found}
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], env=environment, capture_output=True, text=True, check=False
    )
    names = [f"fusion_kernels_cuda::{name}" for name in ("ntk_operand", "ntk_tiles", "ntk_strip")]
    assert done.stdout.split() == [*names, "True"], done.stderr


def test_tensor_cores_are_fed_asynchronously(built: Build) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("there is no disassembler: Triton has one")
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (kernels,) = built.folder.rglob("ntk_tensor_cores.cu.o")
    code = subprocess.run(
        [tools / "cuobjdump", "-sass", kernels],
        env={**os.environ, "PATH": os.pathsep.join([str(tools), os.environ["PATH"]])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert code.count("Function :") == 6
    for instruction in ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"):
        assert code.count(instruction) >= 4, instruction
    assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code)
