"""Hartigan's moves in Triton, interpreted on the CPU: which are made, and what is kept between rounds."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch

from fusion_kernels.kmeans import triton_backend, triton_heuristics
from fusion_kernels.kmeans._triton_moves import _best_move_kernel, _select_moves_kernel
from fusion_kernels.kmeans._triton_sweep import State
from fusion_kernels.kmeans.triton_run import Run
from fusion_kernels.kmeans.types import Options, Seeding
from points import neuron_like

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share a work list only cost time here."""
    monkeypatch.setattr(triton_heuristics, "_PROGRAMS", 1)


def greedy(gain: list[float], source: list[int], target: list[int]) -> list[int]:
    taken: set[int] = set()
    moves = []
    for j in sorted(range(len(gain)), key=lambda j: (-gain[j], j)):
        if gain[j] > 0 and source[j] not in taken and target[j] not in taken:
            taken |= {source[j], target[j]}
            moves.append(j)
    return sorted(moves)


@pytest.mark.parametrize("kind", ["random", "equal", "chain", "none"])
def test_selected_moves_are_those_of_the_greedy_walk(kind: str) -> None:
    n, K = 123, 65
    g = torch.Generator().manual_seed(0)
    source = torch.randint(K, (1, n), generator=g, dtype=torch.int32)
    target = (source + torch.randint(1, K, (1, n), generator=g, dtype=torch.int32)) % K
    gain = torch.rand(1, n, generator=g, dtype=torch.float64) - 0.3
    if kind == "equal":
        gain = gain.sign()
    elif kind == "none":
        gain = -gain.abs()
    elif kind == "chain":
        # Every move but the first waits for the one before it.
        source = torch.arange(n, dtype=torch.int32)[None] % (K - 1)
        target = source + 1
        gain = torch.linspace(2, 1, n, dtype=torch.float64)[None]
    integers = torch.full((1, n), -7, dtype=torch.int32)
    state, n_iter, n_changed = (torch.zeros(1, dtype=torch.int32) for _ in range(3))
    labels, counts = source.clone(), torch.bincount(source[0], minlength=K).to(torch.int32)[None]
    lists = [integers[:, :K].clone() for _ in range(3)]
    changed = torch.zeros(1, K, dtype=torch.int32)
    _select_moves_kernel[(1,)](
        state, n_iter, n_changed, *lists, changed, labels, gain, target, counts, integers.clone(),
        torch.zeros(1, K, dtype=torch.int64), integers[:, :K].clone(), n, K, BLOCK=32, BK=32,
    )  # fmt: skip
    moves = greedy(gain[0].tolist(), source[0].tolist(), target[0].tolist())
    assert (labels != source).nonzero()[:, 1].tolist() == moves
    assert torch.equal(labels[0, moves], target[0, moves])
    touched = sorted({*source[0, moves].tolist(), *target[0, moves].tolist()})
    assert lists[0][0, : int(n_changed)].tolist() == touched
    assert torch.equal(counts[0].long(), torch.bincount(labels[0], minlength=K))
    assert lists[2][0, touched].tolist() == counts[0, touched].tolist()
    assert not bool(changed.any())
    assert int(state) == (State.FIXED if kind == "none" else State.RUNNING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["weighted", "ties", "empty clusters"])
def test_what_is_kept_between_rounds_is_what_a_search_of_everything_finds(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round by round and bit by bit; what is kept of some points is a bound that a search would raise."""
    n, d = 101, 3
    x = neuron_like(n, d, dtype=dtype)[None]
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "empty clusters":
        x = x[:, :14].repeat_interleave(8, 1)[:, :n]
    launched, kept, lost = Run.launch, 0, 0

    def watched(run: Run, kernel: Any, programs: int, **own: Any) -> None:
        nonlocal kept, lost
        known = run.target.clone()
        launched(run, kernel, programs, **own)
        if kernel is not _best_move_kernel:
            return
        found = {name: getattr(run, name).clone() for name in ("target", "least", "second", "cost")}
        bounds = torch.full_like(run.second, math.nan)
        again = {"target_ptr": torch.full_like(run.target, -1), "least_ptr": bounds.clone(), "second_ptr": bounds}
        gain = torch.empty_like(run.cost)
        launched(run, kernel, programs, **{**own, **again, "gain_ptr": gain, "lost_ptr": torch.empty_like(run.labels)})
        where = (run.labels >= 0) & (run.state == State.RUNNING)[:, None]
        assert torch.equal(found["target"][where], again["target_ptr"][where])
        assert torch.equal(found["least"][where], again["least_ptr"][where])
        assert torch.equal(found["cost"][where], gain[where])
        assert bool((found["second"] <= bounds)[where].all())
        kept += int((found["second"] < bounds)[where].sum())
        lost += int(((known < 0) | (known == run.labels))[where].sum())

    monkeypatch.setattr(Run, "launch", watched)
    weight = torch.rand(1, n, generator=torch.Generator().manual_seed(1)) - 0.1
    options = Options(16, Seeding.RANDOM, max_iter=6)
    triton_backend.kmeans(x, weight.clamp(min=0).to(dtype) if kind == "weighted" else None, None, options)
    assert lost > n // 2
    assert kind == "empty clusters" or kept > 0
