"""Which backend of blocks runs on a GPU: contests, what is kept, and compilers. The CPU stands in for the GPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import make_block
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fusion_kernels import proof
from fusion_kernels.experts.operators import EXPERTS
from fusion_kernels.ffn import FFN
from fusion_kernels.library import Backend, Operator
from fusion_kernels.mlp import choice as module
from fusion_kernels.mlp import heuristics, measuring, reference_backend, torch_backend
from fusion_kernels.mlp.choice import Choice
from fusion_kernels.mlp.heuristics import Shape
from fusion_kernels.mlp.operators import MLP
from fusion_kernels.proof import cache
from fusion_kernels.proof.key import facts

CPU, LOW = torch.device("cpu"), torch.bfloat16
FORWARD, BACKWARD = reference_backend.forward, torch_backend.backward
SHAPE = Shape(0, 12, 9, 7, False, 1)
NAME = "mlp, bfloat16, d 12 h 9 out 7, gelu, trained"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.delenv(proof.SWITCH, raising=False)
    monkeypatch.setattr(module, "TOKENS", 32)
    proof.forget_decisions()
    yield tmp_path
    proof.forget_decisions()


def off(x: Tensor, ffn: FFN, level: int) -> tuple[Tensor, ...]:
    y, *kept = FORWARD(x, ffn, level)
    return (y * 1.05, *kept)


def failing(*_: Any) -> Any:
    raise RuntimeError("no such\ninstruction")


class Race:
    """A choice among stand-ins with the times given, and a record of what was timed."""

    def __init__(self, ms: Mapping[str, float], **forwards: Callable[..., Any]) -> None:
        self.timed: list[list[str]] = []
        self.unproved: set[str] = set()
        self.ms, forwards = ms, {"torch": FORWARD, "cublas": FORWARD, "epilogue": FORWARD, **forwards}
        self.choice = Choice(lambda x, ffn: "torch", ("cublas", "epilogue"))
        operator = Operator("stand-in", "() -> ()")
        for name in forwards:
            operator.register(Backend(name, forwards[name], ("cpu",), proof=_Unless(self, name)))
        self.choice.attach(operator, lambda name: (forwards[name], BACKWARD))
        self.choice.clock = self.clock

    def clock(self, works: Mapping[str, Callable[[], object]], recordable: bool) -> dict[str, float]:
        assert recordable
        for work in works.values():
            work()
        self.timed.append([*works])
        return {name: self.ms[name] for name in works}

    def __call__(self, tokens: int, times: int = 1, level: int = 1, dtype: torch.dtype = LOW) -> str:
        block = make_block(tokens, dtype=dtype, scale=None)
        return [self.choice((block.x,), block.ffn, level) for _ in range(times)][-1]


class _Unless:
    def __init__(self, race: Race, name: str) -> None:
        self.race, self.name = race, name

    def __call__(self, device: torch.device) -> str | None:
        return "it is wrong here" if self.name in self.race.unproved else None

    reason = __call__

    def state(self, device: torch.device) -> str:
        return str(self(device))


def kept() -> dict[str, Any]:
    found: dict[str, Any] = cache.Cache(facts(CPU)).section("measured")
    return found


# --- contests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "winner"),
    [
        ({"torch": 1.0, "cublas": 0.98, "epilogue": 0.99}, "torch"),
        ({"torch": 1.0, "cublas": 0.96, "epilogue": 0.99}, "cublas"),
        ({"torch": 1.0, "cublas": 0.96, "epilogue": 0.9}, "epilogue"),
        ({"torch": 1.0, "cublas": 1.2, "epilogue": 1.1}, "torch"),
    ],
)
def test_a_kernel_has_to_win_by_three_percent(ms: dict[str, float], winner: str) -> None:
    race = Race(ms)
    assert race(40, times=3) == "torch"
    assert not race.timed
    assert race(40) == winner
    assert race(40, times=9) == winner
    assert race.timed == [["torch", "cublas", "epilogue"]]
    assert kept() == {f"{NAME}, 32 tokens": {"backend": winner, "ms": ms, "refused": {}}}


def test_who_errs_or_fails_is_not_timed() -> None:
    race = Race({"torch": 1.0, "cublas": 0.1, "epilogue": 0.1}, cublas=off, epilogue=failing)
    assert race(64, times=5) == "torch"
    assert race.timed == [["torch"]]
    (entry,) = kept().values()
    assert entry["refused"]["cublas"].startswith("y errs by ")
    assert entry["refused"]["epilogue"] == "RuntimeError: no such instruction"


def test_gradients_are_held_to_their_bounds() -> None:
    block = make_block(64, dtype=LOW, scale=None)

    def late(*arguments: Any) -> Any:
        found = BACKWARD(*arguments)
        return found._replace(w_in=found.w_in * 1.1)

    pairs = {"torch": (FORWARD, BACKWARD), "cublas": (FORWARD, late)}
    outcome = measuring.contest(pairs, (block.x,), block.ffn, 1, lambda works, _: dict.fromkeys(works, 1.0), ())
    assert outcome.backend == "torch"
    assert outcome.refused["cublas"].startswith("gradient of w_in is ")
    forward = measuring.contest(pairs, (block.x,), block.ffn, 2, lambda works, _: {"torch": 1.0, "cublas": 0.5}, ())
    assert (forward.backend, forward.refused) == ("cublas", {})


def test_what_runs_without_measurements_has_to_run() -> None:
    with pytest.raises(RuntimeError, match="no such"):
        Race({}, torch=failing)(64, times=4)


def test_where_there_is_no_room() -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    race = Race({"torch": 1.0}, cublas=full)
    with pytest.warns(RuntimeWarning, match=f"^{NAME}, 64 tokens is not measured: CUDA out of memory$"):
        assert race(64, times=6) == "torch"
    assert not kept()


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_answers_are_by_powers_of_two_and_outlive_the_process() -> None:
    fast = {"torch": 1.0, "cublas": 0.5, "epilogue": 0.7}
    race = Race(fast)
    assert race(33, times=2) == race(63, times=2) == "torch" or race.timed
    assert race(63) == "cublas"
    assert race(31, times=9) == "torch"  # too few tokens to be worth it
    # More tokens go by what was measured for fewer, until they have been measured.
    race.ms = {**fast, "cublas": 2.0}
    assert race(200, times=3) == "cublas"
    assert race(200) == "epilogue"
    again = Race({})
    assert [again(tokens, times=3) for tokens in (31, 40, 127, 128)] == ["torch", "cublas", "cublas", "epilogue"]
    assert again.choice.known_rows(CPU, LOW, SHAPE, "gelu", "torch") == [(32, "cublas"), (128, "epilogue")]
    assert not again.timed
    # Another subject: nothing is known.
    assert again.choice.known_rows(CPU, LOW, SHAPE, "silu", "torch") == []


def test_a_measured_kernel_has_to_be_proved() -> None:
    race = Race({"torch": 1.0, "cublas": 0.5, "epilogue": 0.7})
    assert race(64, times=4) == "cublas"
    race.unproved = {"cublas"}
    assert race(64) == "torch"
    assert race.choice.known_rows(CPU, LOW, SHAPE, "gelu", "torch") == []
    another = Race({"torch": 1.0, "epilogue": 0.7})
    another.unproved = {"cublas"}
    assert another(256, times=4) == "epilogue"
    assert another.timed == [["torch", "epilogue"]]


def test_what_is_not_proved_yet_is_proved_before_the_turn_to_measure_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof takes a turn with the same file: within that of a measurement it would wait for itself."""

    def proved(self: _Unless, device: torch.device) -> str | None:
        with cache.Cache(facts(device)).turn(0.1):
            return None

    monkeypatch.setattr(_Unless, "__call__", proved)
    fast = {"torch": 1.0, "cublas": 0.5, "epilogue": 0.7}
    assert Race(fast)(64, times=4) == "cublas"
    block = make_block(64, dtype=LOW, scale=None)
    assert Race(fast).choice.measure((block.x,), block.ffn, 1)["backend"] == "cublas"


def test_shipped_measurements_come_behind_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "".join(c if c.isalnum() else "_" for c in facts(CPU)["device"].replace(", ", ","))
    shipped = {f"{NAME}, 64 tokens": {"backend": "epilogue"}, f"{NAME}, 32 tokens": {"backend": "nothing we know"}}
    (tmp_path / f"{name}.json").write_text(json.dumps({"measured": shipped}), encoding="utf-8")
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    module._shipped.cache_clear()
    race = Race({"torch": 1.0, "cublas": 0.5, "epilogue": 0.7})
    assert (race(100), race(40)) == ("epilogue", "torch")
    assert race(100, times=9) == "epilogue"
    assert not race.timed
    block = make_block(100, dtype=LOW, scale=None)
    assert race.choice.measure((block.x,), block.ffn, 1)["backend"] == "cublas"
    assert race(100) == Race({})(100) == "cublas"
    module._shipped.cache_clear()


@pytest.mark.parametrize(("how", "timed"), [("auto", 1), ("trust", 1), ("proved", 0), ("off", 0)])
def test_switches(how: str, timed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(proof.SWITCH, how)
    race = Race({"torch": 1.0, "cublas": 0.5, "epilogue": 0.7})
    assert race(64, times=9) == ("cublas" if timed else "torch")
    assert len(race.timed) == timed
    monkeypatch.setenv(proof.SWITCH, "auto")
    race(64, times=9)
    monkeypatch.setenv(proof.SWITCH, how)
    assert race(64) == ("torch" if how == "off" else "cublas")
    if how == "off":
        assert race.choice.known_rows(CPU, LOW, SHAPE, "gelu", "torch") == []


def test_nothing_is_measured_while_recording_or_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race({"torch": 1.0, "cublas": 0.5, "epilogue": 0.7})
    assert race(64, times=9, dtype=torch.float32) == "torch"
    monkeypatch.setattr(proof, "may_stop_here", lambda: False)
    assert race(64, times=9) == "torch"
    assert not race.timed
    monkeypatch.undo()


def test_what_is_measured_of_experts_and_of_blocks() -> None:
    known = heuristics.subject(LOW, Shape(0, 8, 6, 8, True, 2, 4), "silu")
    assert known == "experts 4, bfloat16, d 8 h 6 out 8, gated silu, forward"
    assert EXPERTS.choice.rivals == ("triton",)
    assert MLP.choice.rivals == ("cublas", "epilogue")
    assert [heuristics.bucket(n) for n in (0, 1, 2, 3, 1023, 1024, 1025)] == [0, 1, 2, 2, 512, 1024, 1024]


def of_experts(*rivals: str, waiting: tuple[str, ...] = ()) -> tuple[Choice, tuple[Tensor, ...], FFN]:
    """A choice between backends of experts, `loop` the default; and a call: 20 tokens with 4 experts each."""
    choice = Choice(lambda x, ffn: "loop", rivals, waiting)
    operator = Operator("stand-in of experts", "() -> ()")
    for name in ("loop", *rivals):
        operator.register(Backend(name, failing, ("cpu",)))
    choice.attach(operator, lambda name: EXPERTS._functions[name][1:])
    ffn = FFN(*(torch.randn(3, 8, 8, dtype=LOW) for _ in range(2)), "silu")
    return (
        choice,
        (torch.randn(20, 8, dtype=LOW), torch.randperm(80), torch.tensor([30, 30, 80], dtype=torch.int32)),
        ffn,
    )


def test_of_experts_every_choice_of_a_token_counts() -> None:
    """20 tokens with 4 choices each are 80 rows: enough to be worth a contest, and kept under as many."""
    choice, rows, ffn = of_experts("grouped_mm")
    choice.clock = lambda works, _: {name: float(len(name) + (work() is None)) for name, work in works.items()}
    assert [choice(rows, ffn, 1) for _ in range(4)] == ["loop"] * 4
    (name,) = kept()
    assert name == "experts 3, bfloat16, d 8 h 8 out 8, silu, trained, 64 tokens"
    assert set(kept()[name]["ms"]) == {"loop", "grouped_mm"}


@pytest.mark.parametrize(("waiting", "recordable"), [("loop", False), ("others", True)])
def test_who_waits_for_the_device_is_timed_without_a_graph(waiting: str, recordable: bool) -> None:
    assert EXPERTS.choice.waiting == ("loop",)
    assert MLP.choice.waiting == ()
    choice, rows, ffn = of_experts("grouped_mm", waiting=(waiting,))
    choice.clock = lambda works, how: dict.fromkeys(works, float(how))
    assert choice.measure(rows, ffn, 1)["ms"] == dict.fromkeys(("loop", "grouped_mm"), float(recordable))


def test_blocks_of_experts_that_are_measured_measure_nothing_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they wait for the turn with the file, which this thread has, where something has yet to be proved."""
    race = Race({"torch": 1.0, "cublas": 0.5, "epilogue": 0.7})
    choice, rows, ffn = of_experts()
    monkeypatch.setattr(proof, "PATIENCE", 0.1)
    choice.clock = lambda works, _: dict.fromkeys(works, 1.0)
    inner: list[str] = []

    def forward(*given: Any) -> Any:
        inner.append(race(64, times=9))
        with cache.Cache(proof.facts(CPU)).turn(0.1):
            return EXPERTS._functions["loop"][1](*given)

    choice._pairs = lambda name: (forward, EXPERTS._functions["loop"][2])
    choice.measure(rows, ffn, 1)
    assert (inner, race.timed) == (["torch"], [])
    assert race(64, times=9) == "cublas"


def test_what_is_timed_runs_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []

    @contextlib.contextmanager
    def guard(x: Tensor) -> Iterator[None]:
        assert x.shape == (20, 8)
        inside.append(True)
        yield
        inside.pop()

    choice, rows, ffn = of_experts()
    monkeypatch.setattr(module, "device_guard", guard)
    choice.clock = lambda works, _: dict.fromkeys(works, float(len(inside)))
    assert choice.measure(rows, ffn, 1)["ms"] == {"loop": 1.0}
    assert not inside


# --- compilers -------------------------------------------------------------------------------------------------------


def graphs_of(choose: Callable[..., str] | None, tokens: int = 40) -> tuple[str, list[Tensor]]:
    """What a compiler sees of a block, forward and backward, and the results."""
    block = make_block(tokens, dtype=torch.float32).training()
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    with pytest.MonkeyPatch.context() as patch:
        if choose is not None:
            patch.setattr(MLP, "_traced", choose)
        y = torch.compile(block.fused, fullgraph=True, backend=backend)()
    found = block.gradients(y)
    return "".join(seen), [y, *found.values()]


def test_a_choice_of_torch_is_inlined() -> None:
    """Inductor can then fuse it: no node of ours stands in its way."""
    seen, found = graphs_of(lambda *_: "torch")
    assert "ops.fusion_kernels" not in seen
    assert seen.count("aten.mm") + seen.count("aten.addmm") >= 6
    for one, other in zip(found, graphs_of(None)[1], strict=True):
        torch.testing.assert_close(one, other)


def test_any_other_choice_stays_one_node() -> None:
    for choose in (None, lambda *_: "reference"):
        seen, _ = graphs_of(choose)
        assert seen.count("fusion_kernels.mlp.default") == 1
        assert seen.count("fusion_kernels.mlp_backward.default") == 1
        assert "aten.mm" not in seen


def test_a_trace_goes_by_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice itself is traced, as on a GPU; tokens are looked at only where it depends on them."""
    known: list[tuple[int, str]] = []
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(MLP.choice, "known_rows", lambda *about: asked.append(about) or known)

    def choose(rows: tuple[Tensor, ...], ffn: FFN, level: int, backend: str) -> str:
        return MLP.choice.traced(rows, ffn, level)

    assert "ops.fusion_kernels" not in graphs_of(choose)[0]
    assert asked == [(CPU, torch.float32, Shape(0, 12, 9, 7, False, 1), "gelu", "torch")]
    known[:] = [(32, "reference")]
    assert "fusion_kernels.mlp.default" in graphs_of(choose, 40)[0]
    assert "ops.fusion_kernels" not in graphs_of(choose, 31)[0]
