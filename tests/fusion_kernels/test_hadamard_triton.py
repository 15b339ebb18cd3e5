"""The Triton backend of transforms and Fastfood, interpreted on the CPU, against the reference."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch

from fusion_kernels.hadamard import gpu_cases, heuristics, triton_backend
from fusion_kernels.proof.cases import failure

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 entries, so that few entries need several tiles and passes."""
    monkeypatch.setattr(heuristics, "TILE_BITS", 5)
    monkeypatch.setattr(heuristics, "FAR_BITS", 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "bits"), [(0, 3), (1, 0), (37, 0), (3, 1), (5, 4), (1, 5), (3, 6), (1, 8)])
def test_transforms_have_the_bits_of_the_reference(rows: int, bits: int, dtype: torch.dtype) -> None:
    assert failure(gpu_cases.transform_case(rows, bits, dtype, CPU)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "size"), [(1, 1), (2, 3), (40, 4), (11, 20), (5, 100), (100, 130), (70, 40), (3, 260)])
def test_projections_err_by_what_their_sums_allow(d: int, size: int, dtype: torch.dtype) -> None:
    assert failure(gpu_cases.fastfood_case(d, size, dtype, CPU)) is None


def test_rows_of_any_number_of_axes_and_none() -> None:
    theta = torch.randn(2, 3, 4)
    together = triton_backend.fastfood(theta, 5, 1)
    assert together.shape == (2, 3, 5)
    assert torch.equal(together[1, 2], triton_backend.fastfood(theta[1, 2], 5, 1))
    assert triton_backend.fastfood(theta[:0], 5, 1).shape == (0, 3, 5)
    assert triton_backend.fastfood_transposed(theta[:, :0], 7, 1).shape == (2, 0, 7)


def test_the_cases_as_they_are_run_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert failure(gpu_cases.transform_case(3, 13, torch.float32, CPU)) is None
    assert failure(gpu_cases.fastfood_case(200, 5000, torch.float32, CPU)) is None


@pytest.mark.parametrize("bits", range(31))
def test_passes_cover_every_bit_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile, far in ((5, 2), (12, 8)):
        monkeypatch.setattr(heuristics, "TILE_BITS", tile)
        monkeypatch.setattr(heuristics, "FAR_BITS", far)
        passes = heuristics.passes(bits)
        assert [low for low, _, _ in passes] == [sum(b for _, b, _ in passes[:i]) for i in range(len(passes))]
        assert sum(b for _, b, _ in passes) == bits
        for low, some, width in passes[1:]:
            assert some <= far
            assert width * 2**some == 2**tile
            assert width <= 2**low


@pytest.mark.parametrize(
    ("rows", "entries", "blocks", "runs"),
    [(1, 256, 16_384, 1024), (1, 256, 64, 8), (1, 1 << 18, 16, 1), (0, 4, 4, 1), (5, 1 << 15, 128, 1), (1, 1, 7, 1)],
)
def test_sums_are_split_where_there_are_few_numbers(rows: int, entries: int, blocks: int, runs: int) -> None:
    assert heuristics.runs(rows, entries, blocks) == runs


def test_a_sign_that_is_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_cases.fastfood_case(5, 20, torch.float32, CPU)
    right = triton_backend.fastfood

    def wrong(theta: torch.Tensor, size: int, seed: int) -> torch.Tensor:
        return right(theta * torch.tensor([1, 1, -1, 1, 1]), size, seed)

    monkeypatch.setattr(triton_backend, "fastfood", wrong)
    assert "y errs by" in str(failure(case))


def test_an_order_of_additions_that_is_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_cases.transform_case(3, 6, torch.float32, CPU)
    right = triton_backend.hadamard

    def backwards(x: torch.Tensor) -> torch.Tensor:
        # The transform of x in reversed bits is that of x, in reversed bits: highest first.
        places = torch.tensor([int(f"{i:06b}"[::-1], 2) for i in range(64)])
        return right(x[:, places])[:, places]

    monkeypatch.setattr(triton_backend, "hadamard", backwards)
    assert "other bits than the reference" in str(failure(case))
