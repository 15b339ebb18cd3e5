"""What the host does around the Triton kernels of k-means: the order of tiles, when it asks, how much it takes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusion_kernels import gpu
from fusion_kernels.kmeans import reference, triton_backend, triton_heuristics, triton_points, triton_run
from fusion_kernels.kmeans._triton_gram import _tile_in_bands
from fusion_kernels.kmeans._triton_sweep import State
from fusion_kernels.kmeans.gpu_cases import scattered
from fusion_kernels.kmeans.types import Algorithm, KMeansResult, Options


@triton.jit
def _bands_kernel(out_ptr, side, BLOCK: tl.constexpr):
    t = tl.minimum(tl.arange(0, BLOCK), side * (side + 1) // 2 - 1)
    i, k = _tile_in_bands(t, side)
    tl.store(out_ptr + 2 * t, i)
    tl.store(out_ptr + 2 * t + 1, k)


@pytest.mark.parametrize("side", [1, 7, 8, 9, 24, 29])
def test_tiles_of_gram_come_in_bands(side: int) -> None:
    count = side * (side + 1) // 2
    out = torch.empty(count, 2, dtype=torch.int32)
    _bands_kernel[(1,)](out, side, BLOCK=512)
    tiles = [tuple(tile) for tile in out.tolist()]
    assert sorted(tiles) == [(i, k) for i in range(side) for k in range(i + 1)]
    # A column of a band, and then the next: programs that run together share it.
    for band in range(0, side, 8):
        own = [tile for tile in tiles if band <= tile[0] < band + 8]
        assert own == tiles[tiles.index(own[0]) :][: len(own)]
        left = [tile for tile in own if tile[1] < band]
        assert own[: len(left)] == sorted(left, key=lambda tile: (tile[1], tile[0]))


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class Device:
    """A device that is `late` rounds behind the host with its answers, and done after `done` rounds."""

    def __init__(self, late: int, done: int) -> None:
        self.late, self.done, self.round, self.waited = late, done, 0, 0

    def ask(self) -> tuple[Tensor, Any]:
        asked = self.round

        def wait() -> None:
            self.waited += self.round < asked + self.late

        event = SimpleNamespace(query=lambda: self.round >= asked + self.late, synchronize=wait)
        return torch.tensor(asked >= self.done), event


def rounds(device: Device, most: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rounds the host launches."""
    monkeypatch.setattr(triton_run._Poll, "_ask", lambda _: device.ask())
    monkeypatch.setattr(triton_run, "recorded", lambda work: work)

    def once() -> None:
        device.round += 1

    running = SimpleNamespace(state=torch.full((3,), int(State.RUNNING)).as_subclass(OnGpu))
    triton_run.Run._iterate(running, once, most)  # type: ignore[arg-type]
    return device.round


def test_the_host_never_runs_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    every = triton_run._POLL_EVERY
    prompt = Device(late=1, done=20)
    # Asked at 23, known when the graph of eight rounds that follows has been launched.
    assert rounds(prompt, 1000, monkeypatch) == 31
    assert prompt.waited == 0
    slow = Device(late=10**6, done=20)
    assert rounds(slow, 1000, monkeypatch) == 23 + triton_run._UNANSWERED * every
    # The answers to two questions that came before the one that says so, and that one.
    assert slow.waited == 3
    busy = Device(late=1, done=10**6)
    assert rounds(busy, 1000, monkeypatch) == 1000
    for most in (0, 1, 7, 8, 15, 22):
        assert rounds(Device(late=1, done=10**6), most, monkeypatch) == most


class Recorder:
    """Stands in for graphs: what is recorded is counted, and launched again when it is replayed."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, work: Callable[[], object]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Tensors of the CPU as on a GPU whose answers are there at once, with two rounds in a graph."""
    recorder = Recorder()
    monkeypatch.setattr(triton_run, "_POLL_EVERY", 2)
    monkeypatch.setattr(triton_run, "_runs_ahead", lambda _: True)
    monkeypatch.setattr(triton_run, "recorded", recorder)
    event = SimpleNamespace(query=lambda: True, synchronize=lambda: None)
    monkeypatch.setattr(triton_run._Poll, "_ask", lambda self: ((self.state != State.RUNNING).all(), event))
    return recorder


@pytest.mark.parametrize(("algorithm", "most"), [("lloyd", 100), ("hartigan", 100), ("hartigan", 4)])
def test_rounds_of_a_graph_are_rounds(recorder: Recorder, algorithm: str, most: int) -> None:
    x = torch.stack([scattered(90, 2, seed, torch.float64) for seed in range(2)])
    options = Options(9, seed=3, algorithm=Algorithm(algorithm), max_iter=most)
    expected = reference.kmeans(x, None, None, options)
    found = triton_backend.kmeans(x, None, None, options)
    iterated = int(expected[KMeansResult._fields.index("n_iter")].max())
    assert iterated >= 5
    for name, own, true in zip(KMeansResult._fields, found, expected, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    # Of either kind one graph; the first round, and a last one that is left over, are launched by themselves.
    assert recorder.recorded == (1 if algorithm == "lloyd" else 2)
    assert recorder.replayed >= 2


def test_few_rounds_are_not_recorded(recorder: Recorder) -> None:
    x = scattered(90, 2, 0, torch.float64)[None]
    triton_backend.kmeans(x, None, None, Options(9, seed=3, max_iter=2))
    assert recorder.recorded == 0


def test_a_graph_is_recorded_beside_the_current_stream_and_closed_after_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = []

    class Graph:
        def capture_begin(self, **how: Any) -> None:
            said.append(("begin", how))

        def capture_end(self) -> None:
            said.append("end")

        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def stream(which: object) -> Iterator[None]:
        said.append(("on", which))
        yield
        said.append("off")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: f"another of {device}, {priority}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(gpu, "_recording_stream", functools.cache(gpu._recording_stream.__wrapped__))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    replay = gpu.recorded(lambda: said.append("work"))
    begin = ("begin", {"capture_error_mode": "thread_local"})
    assert said == [("on", "another of 3, -1"), begin, "work", "end", "off"]
    replay()
    assert said[-1] == "replay"
    said.clear()
    with pytest.raises(ZeroDivisionError):
        gpu.recorded(lambda: 1 // 0)
    assert said == [("on", "another of 3, -1"), begin, "end"]


def test_the_workspace_is_half_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 6 << 30)
    x = torch.zeros(2, 3).as_subclass(OnGpu)
    assert triton_backend._workspace(x, Options(1)) == 32 << 30
    assert triton_backend._workspace(x, Options(1, workspace_bytes=5)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_see_the_same_alignment_whatever_points_are_a_view_of(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers: list[int] = []
    original = triton_points.prepare

    def watched(x: Tensor, weight: Tensor | None, start: Tensor | None, *rest: Any) -> Any:
        pointers.append(x.data_ptr() % 16)
        points = original(x, weight, start, *rest)
        pointers.append(points.weight.data_ptr() % 16)
        return points

    monkeypatch.setattr(triton_backend, "prepare", watched)
    n, d = 7, 16
    base = torch.randn(n * d + 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weight = torch.rand(n + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    odd = base[1:].view(1, n, d), weight[1:].view(1, n).to(dtype)
    even = odd[0].clone(), odd[1].clone()
    options = Options(2, max_iter=2)
    found, expected = (triton_backend.kmeans(x, w, None, options) for x, w in (odd, even))
    assert set(pointers) == {0}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_gram_leaves_a_stage_out_where_it_would_not_fit() -> None:
    large = gpu.LARGE_SHARED_MEMORY
    assert triton_heuristics.gram_config(3072, True, large, 9).num_stages == 3
    assert triton_heuristics.gram_config(3072, True, large, 10).num_stages == 2
    assert triton_heuristics.nearest_config(3072, large, 10).num_stages == 2
