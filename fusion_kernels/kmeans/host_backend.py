"""k-means of points on a GPU by the compiled kernels of the CPU: the points go to the host, the results come back.

A copy of points costs milliseconds where the reference costs seconds: a GPU makes nothing slower while its own kernels
are not proved.
"""

from __future__ import annotations

from torch import Tensor

from fusion_kernels.kmeans import cpu_backend
from fusion_kernels.kmeans.gpu_backend import refuse_capture
from fusion_kernels.kmeans.types import Options, Results


def kmeans(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options) -> Results:
    """As `fusion_kernels.kmeans.reference.kmeans`, with results on the device of x.

    Raises:
        RuntimeError: a CUDA graph is being recorded.
    """
    refuse_capture(x)
    weight, start = (None if t is None else t.cpu() for t in (sample_weight, init))
    labels, centroids, inertia, counts, n_iter, status = cpu_backend.kmeans(x.cpu(), weight, start, options)
    to = x.device
    return labels.to(to), centroids.to(to), inertia.to(to), counts.to(to), n_iter.to(to), status.to(to)
