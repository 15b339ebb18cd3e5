"""Batched weighted k-means: many independent problems side by side, as one operator.

`kmeans` is the public function; `fusion_kernels::kmeans` is the operator behind it, which stays one node under
`torch.compile`. The reference in `fusion_kernels.kmeans.reference` specifies what every backend computes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection
from enum import Enum
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.kmeans import cpu_backend, gpu_backend, host_backend
from fusion_kernels.kmeans import reference as reference
from fusion_kernels.kmeans.metrics import unit_rows
from fusion_kernels.kmeans.types import Algorithm, KMeansResult, Metric, Options, Results, Seeding, Status
from fusion_kernels.library import Backend, Operator, Provable, by_member, member, operator
from fusion_kernels.proof import Proof

__all__ = ["ASSIGN", "OPERATOR", "KMeansResult", "Status", "kmeans", "kmeans_assign", "register"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SEEDINGS = tuple(seeding.value for seeding in Seeding)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _fake(
    x: Tensor,
    sample_weight: Tensor | None,
    init: Tensor | None,
    n_clusters: int,
    *_: object,
) -> Results:
    B, N, D = x.shape
    integer = functools.partial(x.new_empty, dtype=torch.int64)
    return (
        integer((B, N)),
        x.new_empty((B, n_clusters, D)),
        x.new_empty((B,)),
        integer((B, n_clusters)),
        integer((B,)),
        integer((B,)),
    )


OPERATOR: Operator = operator(
    "kmeans",
    "(Tensor x, Tensor? sample_weight, Tensor? init, int n_clusters, str seeding, int n_init, str algorithm, "
    "int max_iter, float tol, int seed, int? workspace_bytes=None, str metric='euclidean') "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    options=lambda x, sample_weight, init, *rest: Options(*rest),
    variants=[
        Options(1, seeding=seeding, algorithm=algorithm, metric=metric)
        for seeding, algorithm, metric in itertools.product(Seeding, Algorithm, Metric)
    ],
)


ASSIGN: Operator = operator(
    "kmeans_assign",
    "(Tensor x, Tensor centroids) -> Tensor",
    lambda x, centroids: x.new_empty(x.shape[:2], dtype=torch.int64),
)


def register(
    name: str,
    function: Callable[[Tensor, Tensor | None, Tensor | None, Options], Results],
    device_types: tuple[str, ...],
    why_not: Callable[[torch.device | None], str | None] = lambda _: None,
    *,
    known: Collection[Enum],
    remedy: str = "backend='reference'",
    proof: Provable | None = None,
) -> None:
    """Add a backend of `fusion_kernels::kmeans`; its inputs' values are checked before `function` sees them.

    It declines every seeding, algorithm and metric that is not among those `known` to it, with what to use instead as
    the `remedy`. The checks that read values live here rather than in :func:`kmeans`, where `torch.compile` could not
    trace them.
    """

    def takes(options: Options) -> str | None:
        lacking = options.beyond(known)
        return None if lacking is None else f"it has no {lacking}: use {remedy}"

    def checked(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, *rest: Any) -> Results:
        options = Options(*rest)
        reason = takes(options)
        if reason is not None:
            raise ValueError(f"kmeans: backend {name!r}: {reason}")
        _check_values(sample_weight, init, options)
        return function(x, sample_weight, init, options)

    OPERATOR.register(Backend(name, checked, device_types, why_not, takes, proof))


_PROOF = Proof("kmeans triton", "fusion_kernels.kmeans.gpu_cases:triton")

register("triton", gpu_backend.kmeans, ("cuda",), gpu_backend.why_not, known=gpu_backend.KNOWN, proof=_PROOF)
register("cpu", cpu_backend.kmeans, ("cpu",), lambda _: native.UNAVAILABLE, known=cpu_backend.KNOWN)
# Ahead of the reference, which on a GPU waits for the device twice per seed.
register("host", host_backend.kmeans, ("cuda",), lambda _: native.UNAVAILABLE, known=cpu_backend.KNOWN)
register(
    "reference",
    reference.kmeans,
    ("cpu", "cuda"),
    known=reference.KNOWN,
    remedy=f"one of {', '.join(sorted(str(option.value) for option in reference.KNOWN))}",
)
# Behind the reference, and so for those who ask by name: it rounds the points.
register("triton-fast", gpu_backend.kmeans_fast, ("cuda",), gpu_backend.why_not, known=gpu_backend.KNOWN)
ASSIGN.register(Backend("triton", gpu_backend.assign, ("cuda",), gpu_backend.why_not, proof=_PROOF))
ASSIGN.register(Backend("cpu", cpu_backend.assign, ("cpu",), lambda _: native.UNAVAILABLE))
ASSIGN.register(Backend("reference", reference.assign, ("cpu", "cuda")))


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    sample_weight: Tensor | None = None,
    init: str | Tensor = "k-means++",
    n_init: int = 1,
    algorithm: str = "hartigan",
    max_iter: int = 100,
    tol: float = 0.0,
    seed: int = 0,
    metric: str = "euclidean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> KMeansResult:
    """Partition points into clusters of small weighted inertia; the problems of a batch are independent.

    A point of weight w counts like w copies of it: in seeding, means, inertia, moves and relocation. Points of
    weight 0 shape nothing and are labelled at the end with the nearest centroid that has points.

    `"lloyd"` alternates nearest centroids and weighted means (Lloyd 1982) until the labels stop changing. A cluster
    that loses all its points gets the one with the largest weighted squared distance to its centroid. `"hartigan"`
    continues with moves of single points that lower the inertia (Hartigan 1975; Telgarsky & Vattani 2010) until no
    move does; with few points per cluster, where nearly every partition is a fixed point of Lloyd's iteration, this
    matters. Every round makes moves between disjoint pairs of clusters, the largest decrease first, ties to the
    lowest point. Its result is never worse than Lloyd's from the same seeds, and it never empties a cluster.

    Labels, centroids, counts and inertia belong together. Every point has the nearest of the centroids that are
    returned, which is what :func:`kmeans_assign` says of them: squared distances are decided in float64, whatever the
    dtype, and only those that agree there to 14 digits are ties, which may go to either. The centroids are the weighted
    means of their points, up to their rounding: at a fixed point both hold. Stopped by `max_iter` or `tol` the
    centroids are not quite means. float32 points that products in float32 cannot tell apart, groups of a few that lie
    a hundred times their size from each other, are clustered in float64. While there are `n_clusters` distinct points
    of positive weight, no cluster is empty unless `max_iter` is 0. With `N <= n_clusters` every point is a cluster of
    its own, whatever `init` says, and the clusters left over repeat the last point (zeros if N is 0).

    `metric="cosine"` is spherical k-means (Dhillon & Modha 2001; Hornik, Feinerer, Kober & Buchta 2012). Points, and
    given centroids, are divided by their norms in the dtype of the computation, and that is what all the rest is about.
    Centroids have norm 1: the weighted sum S of a cluster's points divided by its norm. Where that is less than 2**-20
    of the cluster's weight, as of opposite points, S has no direction: the centroid stays where it was, or, of given
    labels, is the first point. The distance is 1 - cos, half of the squared Euclidean one between unit vectors: seeds
    are drawn, labels decided and clusters refilled by it. The inertia is the weighted sum of 1 - cos, and a move gains
    what it adds to the sum of all |S| (Dhillon, Guan & Kogan 2002). A point of zeros has no direction: it counts as a
    point of weight 0, is never a cluster of its own, and gets the label of the first cluster that has points.

    Values of x that are not finite, and weights that are all zero, spoil their own problem only: see
    :class:`Status`. The same seed gives the same result. All problems use the same random stream, so that a problem
    has the same result alone as in a batch. The result is not differentiable.

    Args:
        x: (N, D) or (B, N, D) points, D >= 1. float32 or float64; float16 and bfloat16 are computed in float32.
        n_clusters: K >= 1.
        sample_weight: (N,) or (B, N) non-negative finite weights, floating point or integer; None for ones.
        init: `"k-means++"` (Arthur & Vassilvitskii 2007, greedy: every step draws 2 + floor(ln K) points with
            probability proportional to weight times squared distance and keeps the best), `"random"` (K different
            points, drawn with probability proportional to weight), floating point centroids (K, D) or (B, K, D), or
            integer labels (N,) or (B, N) in [0, K).
        n_init: number of seedings to try; the result with the lowest inertia is returned, the first of equals. 1 when
            `init` is a tensor.
        algorithm: `"hartigan"` or `"lloyd"`.
        max_iter: most Lloyd iterations, and most rounds of Hartigan moves after them. 0 assigns the points to the
            initial centroids.
        tol: if positive, Lloyd also stops once the squared shift of all centroids together is no more than tol times
            the mean weighted variance of the columns of x, with `metric="cosine"` their mean square, 1 / D.
        seed: in [0, 2**63).
        metric: `"euclidean"` or `"cosine"`.
        backend: `"auto"` or the name of a backend. On CUDA `"auto"` is `"triton"` where its kernels are proved, else
            `"host"`: the compiled kernels of the CPU, on a copy. `"triton-fast"`, which `"auto"` never takes, clusters
            the points rounded to 11 significant bits. Only `"auto"` can be traced by `torch.compile`.
        workspace_bytes: bound on the memory that backends other than the reference use beside inputs and results; None
            for their default. It never changes labels by more than the choice between near-ties.

    Returns:
        :class:`KMeansResult`, with the batch dimension of x or without.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        BackendUnavailableError: `backend` cannot run here, or lacks what is asked for.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [12.0]])
        >>> found = fusion_kernels.kmeans(x, 2)
        >>> found.centroids.sort(dim=0).values
        tensor([[ 0.5000],
                [11.0000]])
        >>> weighted = fusion_kernels.kmeans(x, 2, sample_weight=torch.tensor([3, 1, 1, 1, 1]))
        >>> weighted.centroids.min()
        tensor(0.2500)
        >>> rays = torch.tensor([[3.0, 4.0], [30.0, 40.0], [-5.0, 0.0]])
        >>> fusion_kernels.kmeans(rays, 2, metric="cosine").centroids.sort(dim=0).values
        tensor([[-1.0000,  0.0000],
                [ 0.6000,  0.8000]])
    """
    _check_points(x)
    _check_options(n_clusters, n_init, algorithm, max_iter, tol, seed, workspace_bytes, metric)
    if sample_weight is not None:
        _check_weights(x, sample_weight)
    start, seeding = _check_init(x, init, n_clusters, n_init)

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batched = x.ndim == 3
    points = x.detach().to(dtype)
    weights = None if sample_weight is None else sample_weight.detach().to(dtype)
    if start is not None:
        start = start.detach().to(dtype if start.is_floating_point() else torch.int64)
    if not batched:
        points = points.unsqueeze(0)
        weights = None if weights is None else weights.unsqueeze(0)
        start = None if start is None else start.unsqueeze(0)
    options = (n_clusters, seeding, n_init, algorithm, max_iter, float(tol), seed, workspace_bytes, metric)
    results: Results = OPERATOR.function(backend, points, weights, start, *options)(points, weights, start, *options)
    if batched:
        return KMeansResult(*results)
    return KMeansResult(*(result.squeeze(0) for result in results))


def kmeans_assign(x: Tensor, centroids: Tensor, *, metric: str = "euclidean", backend: str = "auto") -> Tensor:
    """The nearest centroid of every point: what :func:`kmeans` calls its labels, for points that it has not seen.

    Args:
        x: (N, D) or (B, N, D) points, D >= 1. float32 or float64; float16 and bfloat16 are computed in float32.
        centroids: (K, D) or (B, K, D) floating point, K >= 1, on the device of x; computed in the dtype of x.
        metric: `"euclidean"`, or `"cosine"`: by the angle, where points, and centroids, of zeros count as NaN does.
        backend: `"auto"` or the name of a backend. Only `"auto"` can be traced by `torch.compile`.

    Returns:
        (N,) or (B, N) int64. Squared distances that agree to 14 digits in float64 are ties, which go to the lowest id;
        points that are not finite to 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or device.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> centroids = torch.tensor([[0.0], [10.0]])
        >>> fusion_kernels.kmeans_assign(torch.tensor([[1.0], [9.0], [5.0]]), centroids)
        tensor([0, 1, 0])
    """
    _check_points(x)
    if not isinstance(centroids, Tensor):
        raise TypeError(f"centroids is {type(centroids).__name__}: pass a torch.Tensor")
    if centroids.dtype not in _FLOATS:
        raise TypeError(f"centroids is {centroids.dtype}: convert it to one of {', '.join(map(str, _FLOATS))}")
    if centroids.ndim != x.ndim or centroids.shape[:-2] + centroids.shape[-1:] != x.shape[:-2] + x.shape[-1:]:
        expected = f"({', '.join([*map(str, x.shape[:-2]), 'K', str(x.shape[-1])])})"
        raise ValueError(f"centroids has shape {tuple(centroids.shape)}: this x needs {expected}")
    if centroids.shape[-2] == 0:
        raise ValueError(f"centroids has shape {tuple(centroids.shape)}: pass at least one centroid")
    if centroids.device != x.device:
        raise ValueError(f"centroids is on {centroids.device}: move it to {x.device}, where x is")
    asked = member("metric", metric, Metric)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    points, centres = x.detach().to(dtype), centroids.detach().to(dtype)
    if x.ndim == 2:
        points, centres = points.unsqueeze(0), centres.unsqueeze(0)
    seen_as = by_member({Metric.EUCLIDEAN: lambda t: t, Metric.COSINE: _directions_or_nan}, asked)
    points, centres = seen_as(points), seen_as(centres)
    labels: Tensor = ASSIGN.function(backend, points, centres)(points, centres)
    return labels.squeeze(0) if x.ndim == 2 else labels


def _directions_or_nan(x: Tensor) -> Tensor:
    unit = unit_rows(x)
    return torch.where(unit.any(-1, keepdim=True), unit, math.nan)


def _check_points(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}: pass a torch.Tensor")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {x.dtype}: convert it to one of {', '.join(map(str, _FLOATS))}")
    if x.ndim not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}: pass (N, D), or (B, N, D) for a batch")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass points with at least one column")


def _check_options(
    n_clusters: int,
    n_init: int,
    algorithm: str,
    max_iter: int,
    tol: float,
    seed: int,
    workspace_bytes: int | None,
    metric: str,
) -> None:
    for name, value, least in (
        ("n_clusters", n_clusters, 1),
        ("n_init", n_init, 1),
        ("max_iter", max_iter, 0),
        ("seed", seed, 0),
        ("workspace_bytes", 1 if workspace_bytes is None else workspace_bytes, 1),
    ):
        if not isinstance(value, Integral):
            raise TypeError(f"{name} is {type(value).__name__}: pass an int")
        if value < least:
            raise ValueError(f"{name} is {value}: pass at least {least}")
    if seed >= 2**63:
        raise ValueError(f"seed is {seed}: pass less than 2**63")
    if not isinstance(tol, Real):
        raise TypeError(f"tol is {type(tol).__name__}: pass a float")
    if not 0.0 <= tol < math.inf:
        raise ValueError(f"tol is {tol}: pass 0 or a positive finite number")
    member("algorithm", algorithm, Algorithm)
    member("metric", metric, Metric)


def _check_weights(x: Tensor, sample_weight: Tensor) -> None:
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight is {type(sample_weight).__name__}: pass a torch.Tensor or None")
    if sample_weight.dtype not in _FLOATS + _INTEGERS:
        raise TypeError(f"sample_weight is {sample_weight.dtype}: convert it to floating point or integers")
    if sample_weight.shape != x.shape[:-1]:
        raise ValueError(f"sample_weight has shape {tuple(sample_weight.shape)}: x needs {tuple(x.shape[:-1])}")
    if sample_weight.device != x.device:
        raise ValueError(f"sample_weight is on {sample_weight.device}: move it to {x.device}, where x is")


def _check_init(x: Tensor, init: str | Tensor, n_clusters: int, n_init: int) -> tuple[Tensor | None, str]:
    """The initial centroids or labels, if given, and the name of the seeding."""
    if isinstance(init, str):
        if init not in _SEEDINGS:
            raise ValueError(
                f"unknown init {init!r}: use one of {', '.join(_SEEDINGS)}, a tensor of centroids or one of labels"
            )
        return None, init
    if not isinstance(init, Tensor):
        raise TypeError(f"init is {type(init).__name__}: pass {' or '.join(map(repr, _SEEDINGS))} or a torch.Tensor")
    if init.dtype not in _FLOATS + _INTEGERS:
        raise TypeError(f"init is {init.dtype}: pass floating point centroids or integer labels")
    if init.is_floating_point():
        kind, shape = "centroids", (*x.shape[:-2], n_clusters, x.shape[-1])
    else:
        kind, shape = "labels", tuple(x.shape[:-1])
    if tuple(init.shape) != shape:
        raise ValueError(f"init has shape {tuple(init.shape)}: {kind} for this x and n_clusters need {shape}")
    if init.device != x.device:
        raise ValueError(f"init is on {init.device}: move it to {x.device}, where x is")
    if n_init != 1:
        raise ValueError(f"n_init is {n_init}: pass 1 when init is a tensor, as every run would be the same")
    return init, _SEEDINGS[0]


def _check_values(sample_weight: Tensor | None, init: Tensor | None, options: Options) -> None:
    n_clusters = options.n_clusters
    if sample_weight is not None and not bool((sample_weight.isfinite() & (sample_weight >= 0)).all()):
        raise ValueError("sample_weight holds NaN, infinity or negative values: pass finite weights of at least 0")
    if init is not None and not init.is_floating_point() and not bool(((init >= 0) & (init < n_clusters)).all()):
        raise ValueError(f"init holds labels outside [0, {n_clusters}): relabel them or raise n_clusters")
    if (
        options.metric is Metric.COSINE
        and init is not None
        and init.is_floating_point()
        and not bool(init.any(2).all())
    ):
        raise ValueError("init holds a centroid of zeros, which has no direction: pass another, or metric='euclidean'")
