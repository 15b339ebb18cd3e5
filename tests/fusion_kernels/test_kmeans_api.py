"""k-means as a public function and an operator: batches, determinism, dtypes, `torch.compile`, errors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion_kernels import kmeans as public_kmeans
from fusion_kernels import native
from fusion_kernels.kmeans import OPERATOR, KMeansResult, Status, cpu_backend
from fusion_kernels.kmeans import reference as reference
from fusion_kernels.kmeans.types import Algorithm, Metric, Options, Seeding
from fusion_kernels.library import Backend, BackendUnavailableError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BACKENDS = ("reference",) if native.UNAVAILABLE else ("reference", "cpu")
#: Options that `kmeans` below adds to every call: the backend under test, if the test names none.
COMMON: dict[str, Any] = {}


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMON, "backend", request.param)


def kmeans(x: Tensor, n_clusters: int, **options: Any) -> KMeansResult:
    return public_kmeans(x, n_clusters, **{**COMMON, **options})


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 1


def random_weights(n: int, seed: int = 1) -> Tensor:
    return 0.1 + 3 * torch.rand(n, generator=torch.Generator().manual_seed(seed))


def assert_same(a: KMeansResult, b: KMeansResult) -> None:
    for name in KMeansResult._fields:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True, msg=name)


def problem(result: KMeansResult, b: int) -> KMeansResult:
    return KMeansResult(*(field[b] for field in result))


# --- independence and determinism ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_problem_is_the_same_alone_and_in_a_batch(algorithm: str, dtype: torch.dtype) -> None:
    # Odd sizes, so that the problems of a batch start at unaligned addresses.
    x = torch.stack([normal(123, 17, seed=s, dtype=dtype) for s in range(3)])
    w = torch.stack([random_weights(123, seed=s) for s in range(3)])
    options: dict[str, Any] = {"algorithm": algorithm, "seed": 7, "n_init": 2}
    batch = kmeans(x, 19, sample_weight=w, **options)
    for b in range(3):
        assert_same(problem(batch, b), kmeans(x[b].clone(), 19, sample_weight=w[b].clone(), **options))
    centroids, labels = x[:, :19].clone(), torch.arange(123).remainder(19).repeat(3, 1)
    for init in (centroids, labels):
        batch = kmeans(x, 19, sample_weight=w, init=init, algorithm=algorithm)
        for b in range(3):
            assert_same(problem(batch, b), kmeans(x[b], 19, sample_weight=w[b], init=init[b], algorithm=algorithm))


@pytest.mark.usefixtures("each_backend")
def test_all_zero_weights_spoil_their_own_problem_only() -> None:
    x = torch.stack([normal(60, 4, seed=s) for s in range(3)])
    w = torch.stack([random_weights(60, seed=s) for s in range(3)])
    w[1] = 0
    result = kmeans(x, 5, sample_weight=w)
    assert result.status.tolist() == [Status.OK, Status.ZERO_WEIGHT, Status.OK]
    spoilt = problem(result, 1)
    assert not bool(spoilt.labels.any())
    assert not bool(spoilt.centroids.any())
    assert float(spoilt.inertia) == 0
    assert spoilt.counts.tolist() == [60, 0, 0, 0, 0]
    for b in (0, 2):
        assert_same(problem(result, b), kmeans(x[b], 5, sample_weight=w[b]))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_points_spoil_their_own_problem_only(value: float) -> None:
    x = torch.stack([normal(50, 4, seed=s) for s in range(3)])
    clean = kmeans(x, 6)
    x[1, 7, 2] = value
    result = kmeans(x, 6)
    assert result.status.tolist() == [Status.OK, Status.NON_FINITE, Status.OK]
    assert not bool(result.labels[1].any())
    assert bool(result.centroids[1].isnan().all())
    assert bool(result.inertia[1].isnan())
    for b in (0, 2):
        assert_same(problem(result, b), problem(clean, b))


@pytest.mark.usefixtures("each_backend")
def test_non_finite_centroids_spoil_their_own_problem_only() -> None:
    x = torch.stack([normal(50, 4, seed=s) for s in range(2)])
    init = x[:, :6].clone()
    init[0, 3, 1] = math.nan
    result = kmeans(x, 6, init=init)
    assert result.status.tolist() == [Status.NON_FINITE, Status.OK]
    assert_same(problem(result, 1), kmeans(x[1], 6, init=init[1]))


@pytest.mark.usefixtures("each_backend")
def test_non_finite_wins_over_every_other_status() -> None:
    x = torch.full((3, 2), math.nan)
    assert int(kmeans(x, 5, sample_weight=torch.zeros(3)).status) == Status.NON_FINITE
    assert int(kmeans(torch.zeros(3, 2), 5, sample_weight=torch.zeros(3)).status) == Status.ZERO_WEIGHT


@pytest.mark.usefixtures("each_backend")
def test_the_seed_decides_everything() -> None:
    x, w = normal(300, 9), random_weights(300)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for init in ("k-means++", "random"):
        first = kmeans(x, 20, sample_weight=w, init=init, seed=11)
        assert torch.equal(torch.get_rng_state(), state), "the global random stream belongs to the caller"
        assert_same(first, kmeans(x, 20, sample_weight=w, init=init, seed=11))
        assert not torch.equal(first.labels, kmeans(x, 20, sample_weight=w, init=init, seed=12).labels)


@pytest.mark.usefixtures("each_backend")
def test_a_large_offset_does_not_cancel() -> None:
    x = normal(200, 6, dtype=torch.float64)
    init = x[:9].clone()
    far, near = kmeans(x + 2.0**24, 9, init=init + 2.0**24), kmeans(x, 9, init=init)
    assert torch.equal(far.labels, near.labels)
    assert float(far.inertia) == pytest.approx(float(near.inertia), rel=1e-6)


@pytest.mark.usefixtures("each_backend")
def test_inputs_are_left_alone() -> None:
    x, w, init = normal(60, 4), random_weights(60), normal(5, 4)
    copies = x.clone(), w.clone(), init.clone()
    result = kmeans(x, 5, sample_weight=w, init=init)
    result.centroids.zero_()
    assert all(torch.equal(a, b) for a, b in zip((x, w, init), copies, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_devices_agree(device: str) -> None:
    x, w = normal(200, 9), random_weights(200)
    expected = kmeans(x, 14, sample_weight=w)
    result = kmeans(x.to(device), 14, sample_weight=w.to(device), backend="reference")
    assert result.labels.device.type == device
    torch.testing.assert_close(result.inertia.cpu(), expected.inertia, rtol=1e-5, atol=0)
    again = kmeans(x.to(device), 14, sample_weight=w.to(device), backend="reference")
    assert_same(result, again)


# --- dtypes, the operator, torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = normal(90, 5).to(dtype)
    w = random_weights(90).to(dtype)
    result = kmeans(x, 8, sample_weight=w, init=x[:8])
    assert result.centroids.dtype == result.inertia.dtype == torch.float32
    assert_same(result, kmeans(x.float(), 8, sample_weight=w.float(), init=x[:8].float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    x = normal(30, 3, dtype=dtype)
    for points, batch in ((x, ()), (x[None], (1,))):
        result = kmeans(points, 4)
        shapes = [(*batch, 30), (*batch, 4, 3), batch, (*batch, 4), batch, batch]
        assert [tuple(f.shape) for f in result] == shapes
        integer = torch.int64
        assert [f.dtype for f in result] == [integer, dtype, dtype, integer, integer, integer]


def test_strided_points_and_gradients() -> None:
    x = normal(6, 40).T
    assert not x.is_contiguous()
    assert_same(kmeans(x, 5), kmeans(x.contiguous(), 5))
    assert not kmeans(x.clone().requires_grad_(), 5).centroids.requires_grad


def test_numbers_of_numpy_are_numbers() -> None:
    x, integer = normal(40, 3), np.int64
    found = kmeans(x, integer(5), n_init=np.int8(2), max_iter=integer(7), seed=np.uint32(3), tol=np.float32(0.5))
    assert_same(found, kmeans(x, 5, n_init=2, max_iter=7, seed=3, tol=0.5))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", ["none", "centroids", "labels"])
def test_opcheck(start: str, weighted: bool) -> None:
    x = torch.stack([normal(23, 3, seed=s) for s in range(2)])
    w = torch.stack([random_weights(23, seed=s) for s in range(2)]) if weighted else None
    init = {"none": None, "centroids": x[:, :4].clone(), "labels": torch.arange(23).remainder(4).repeat(2, 1)}[start]
    args = (x, w, init, 4, "k-means++", 1, "hartigan", 20, 0.0, 3)
    torch.library.opcheck(torch.ops.fusion_kernels.kmeans.default, args)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("batched", [False, True])
def test_compiles_to_one_operator(backend: str, batched: bool) -> None:
    graphs: list[list[str]] = []

    def inspect(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def function(x: Tensor, w: Tensor) -> Tensor:
        result = kmeans(2 * x, 5, sample_weight=w, seed=1)
        return result.centroids + result.inertia[..., None, None]

    torch._dynamo.reset()
    x, w = normal(40, 3), random_weights(40)
    if batched:
        x, w = x[None], w[None]
    compiled = torch.compile(function, fullgraph=True, backend=inspect)
    torch.testing.assert_close(compiled(x, w), function(x, w))
    assert sum("fusion_kernels.kmeans" in target for target in graphs[0]) == 1


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(6, 3)
XB = torch.zeros(2, 6, 3)

ERRORS: list[tuple[type[Exception], str, Tensor, dict[str, Any]]] = [
    (TypeError, r"x is list: pass a torch\.Tensor", [[0.0]], {}),  # type: ignore[list-item]
    (TypeError, r"x is torch\.int64: convert", X.long(), {}),
    (TypeError, r"x is torch\.complex64: convert", X.to(torch.complex64), {}),
    (ValueError, r"x has shape \(3,\): pass \(N, D\), or \(B, N, D\)", X[0], {}),
    (ValueError, r"x has shape \(6, 0\): pass points with at least one column", X[:, :0], {}),
    (ValueError, r"n_clusters is 0: pass at least 1", X, {"n_clusters": 0}),
    (TypeError, r"n_clusters is float: pass an int", X, {"n_clusters": 2.0}),
    (ValueError, r"n_init is 0: pass at least 1", X, {"n_init": 0}),
    (ValueError, r"max_iter is -1: pass at least 0", X, {"max_iter": -1}),
    (ValueError, r"seed is -1: pass at least 0", X, {"seed": -1}),
    (ValueError, r"seed is \d+: pass less than 2\*\*63", X, {"seed": 2**63}),
    (TypeError, r"tol is str: pass a float", X, {"tol": "0"}),
    (ValueError, r"tol is -1\.0: pass 0 or a positive finite number", X, {"tol": -1.0}),
    (ValueError, r"tol is nan: pass 0 or a positive finite number", X, {"tol": math.nan}),
    (ValueError, r"unknown algorithm 'elkan': use one of hartigan, lloyd", X, {"algorithm": "elkan"}),
    (ValueError, r"unknown backend 'cudnn': use one of auto, .*reference", X, {"backend": "cudnn"}),
    (TypeError, r"sample_weight is list: pass a torch\.Tensor or None", X, {"sample_weight": [1.0] * 6}),
    (TypeError, r"sample_weight is torch\.bool: convert", X, {"sample_weight": X[:, 0] > 0}),
    (ValueError, r"sample_weight has shape \(5,\): x needs \(6,\)", X, {"sample_weight": torch.ones(5)}),
    (ValueError, r"sample_weight has shape \(6,\): x needs \(2, 6\)", XB, {"sample_weight": torch.ones(6)}),
    (ValueError, r"sample_weight is on meta: move it to cpu", X, {"sample_weight": torch.ones(6, device="meta")}),
    (ValueError, r"sample_weight holds NaN, infinity or negative", X, {"sample_weight": torch.full((6,), -1.0)}),
    (ValueError, r"sample_weight holds NaN, infinity or negative", X, {"sample_weight": torch.full((6,), math.nan)}),
    (ValueError, r"sample_weight holds NaN, infinity or negative", X, {"sample_weight": torch.full((6,), math.inf)}),
    (ValueError, r"unknown init 'kmeans\+\+': use one of k-means\+\+, random", X, {"init": "kmeans++"}),
    (TypeError, r"init is int: pass 'k-means\+\+' or 'random' .*or a torch\.Tensor", X, {"init": 3}),
    (TypeError, r"init is torch\.bool: pass floating point centroids or integer labels", X, {"init": X > 0}),
    (ValueError, r"init has shape \(3, 3\): centroids .* need \(2, 3\)", X, {"init": torch.zeros(3, 3)}),
    (ValueError, r"init has shape \(2, 3\): centroids .* need \(2, 2, 3\)", XB, {"init": torch.zeros(2, 3)}),
    (ValueError, r"init has shape \(2,\): labels .* need \(6,\)", X, {"init": torch.zeros(2, dtype=torch.int64)}),
    (ValueError, r"init is on meta: move it to cpu", X, {"init": torch.zeros(2, 3, device="meta")}),
    (ValueError, r"init holds labels outside \[0, 2\)", X, {"init": torch.full((6,), 2)}),
    (ValueError, r"init holds labels outside \[0, 2\)", X, {"init": torch.full((6,), -1)}),
    (ValueError, r"n_init is 2: pass 1 when init is a tensor", X, {"init": torch.zeros(2, 3), "n_init": 2}),
]


@pytest.mark.parametrize(("kind", "message", "x", "options"), ERRORS, ids=[e[1][:50] for e in ERRORS])
def test_errors(kind: type[Exception], message: str, x: Tensor, options: dict[str, Any]) -> None:
    n_clusters = options.get("n_clusters", 2)
    rest = {name: value for name, value in options.items() if name != "n_clusters"}
    with pytest.raises(kind, match=message) as caught:
        kmeans(x, n_clusters, **rest)
    assert "\n" not in str(caught.value)


def test_a_backend_that_cannot_run_here_says_so() -> None:
    with pytest.raises(BackendUnavailableError, match="'reference': runs on cpu, cuda, the tensor is on meta"):
        kmeans(X.to("meta"), 2, backend="reference")
    assert OPERATOR.select("reference", torch.device("cpu")).why_not(None) is None


@pytest.mark.parametrize("what", ["algorithm", "seeding"])
def test_an_unknown_name_is_an_error_everywhere(what: str) -> None:
    """Each of the places where a name could become a flag: no backend may take one name for another."""
    place = {"seeding": 4, "algorithm": 6}[what]
    arguments: list[Any] = [X[None], None, None, 2, "k-means++", 1, "lloyd", 5, 0.0, 0, None]
    arguments[place] = "nonsense"
    message = "unknown .* 'nonsense': use one of"
    with pytest.raises(ValueError, match=message):
        Options(2, **{what: "nonsense"})
    with pytest.raises(ValueError, match=message):
        torch.ops.fusion_kernels.kmeans(*arguments)
    for backend in OPERATOR.backends:
        with pytest.raises(ValueError, match=message):
            backend.function(*arguments)


def test_names_and_members_are_the_same_option() -> None:
    options = Options(2, seeding="random", algorithm="lloyd")  # type: ignore[arg-type]
    assert options == Options(2, seeding=Seeding.RANDOM, algorithm=Algorithm.LLOYD)
    assert options.algorithm is Algorithm.LLOYD


def test_a_backend_that_declines_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """`"auto"` goes on to the next, before anything runs; by name the reason is given."""

    def takes(options: Options) -> str | None:
        return None if options.algorithm is Algorithm.LLOYD else "it has no Hartigan moves: use algorithm='lloyd'"

    def function(*_: object) -> Any:
        raise AssertionError("it declined")

    picky = Backend("picky", function, ("cpu",), takes=takes)
    expected = kmeans(X + torch.arange(6)[:, None], 2)
    monkeypatch.setattr(OPERATOR, "backends", [picky, *OPERATOR.backends])
    assert_same(kmeans(X + torch.arange(6)[:, None], 2), expected)
    with pytest.raises(BackendUnavailableError, match="kmeans: backend 'picky': it has no Hartigan moves: use"):
        kmeans(X, 2, backend="picky")
    with pytest.raises(AssertionError, match="it declined"):
        kmeans(X, 2, algorithm="lloyd", backend="picky")
    with pytest.raises(AssertionError, match="it declined"):
        kmeans(X, 2, algorithm="lloyd")


@pytest.mark.parametrize(
    "asked", OPERATOR.variants, ids=lambda a: f"{a.seeding.value}, {a.algorithm.value}, {a.metric.value}"
)
def test_a_backend_does_what_is_asked_or_declines(asked: Options) -> None:
    """Whatever an option can be: a new one that a backend does not know, and does not decline, fails here."""
    x = normal(60, 3, dtype=torch.float64)[None]
    options = (7, asked.seeding.value, 1, asked.algorithm.value, 100, 0.0, 3, None, asked.metric.value)
    expected = reference.kmeans(x, None, None, Options(*options))  # type: ignore[arg-type]
    for backend in OPERATOR.backends:
        if backend.refuses(torch.device("cpu"), asked) is None:
            for found, right in zip(backend.function(x, None, None, *options), expected, strict=True):
                torch.testing.assert_close(found, right, msg=backend.name)


def test_every_option_has_its_variants() -> None:
    """What `backends()` asks about, and the test above: all members of all enumerations."""
    named = {(asked.seeding, asked.algorithm, asked.metric) for asked in OPERATOR.variants}
    assert named == set(itertools.product(Seeding, Algorithm, Metric))
    enumerations = {f.name for f in dataclasses.fields(Options) if isinstance(getattr(Options(1), f.name), Enum)}
    assert enumerations == {"seeding", "algorithm", "metric"}


def made_up(kind: type[Enum]) -> Enum:
    """A member that `kind` may get some day, which no backend has heard of."""
    new = object.__new__(kind)
    new._name_, new._value_ = "NEW", "new"
    return new


NEW = [("seeding", "init", Seeding), ("algorithm", "algorithm", Algorithm), ("metric", "metric", Metric)]


@pytest.mark.parametrize(("field", "argument", "kind"), NEW, ids=[field for field, _, _ in NEW])
def test_a_new_member_is_computed_as_no_other(field: str, argument: str, kind: type[Enum]) -> None:
    """Every backend declines it, in words that name the argument, and raises where it is called all the same."""
    asked = dataclasses.replace(Options(2, max_iter=5), **{field: made_up(kind)})
    arguments = (X[None], None, None, *(getattr(asked, f.name) for f in dataclasses.fields(Options)))
    for backend in OPERATOR.backends:
        reason = backend.takes(asked)
        assert reason is not None, backend.name
        assert reason.startswith(f"it has no {argument}='new': use "), backend.name
        with pytest.raises(ValueError, match=f"kmeans: backend '{backend.name}': it has no {argument}='new'"):
            backend.function(*arguments)
    with pytest.raises(BackendUnavailableError, match=f"it has no {argument}='new'"):
        OPERATOR.select("auto", torch.device("cpu"), asked)


@pytest.mark.parametrize(("field", "kind"), [(field, kind) for field, _, kind in NEW], ids=[new[0] for new in NEW])
def test_no_branch_takes_a_new_member_for_another(field: str, kind: type[Enum]) -> None:
    """Also behind what a backend declares: where the code chooses, it has a choice for that member or none.

    Few points go by the Gram matrix, many by products; both forms draw seeds of their own.
    """
    asked = dataclasses.replace(Options(2, max_iter=5), **{field: made_up(kind)})
    functions = [reference.kmeans, *([] if native.UNAVAILABLE else [cpu_backend.kmeans])]
    for x in (X[None] + torch.arange(6)[:, None], normal(3000, 2)[None]):
        for function in functions:
            with pytest.raises(ValueError, match=f"no {kind.__name__} 'new' here"):
                function(x, None, None, asked)
