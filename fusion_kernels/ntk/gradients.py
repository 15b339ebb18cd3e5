"""Inner products of per-sample gradients of a feed-forward block over sequences of tokens.

The gradient of sample n is `g_n = sum_t J(x_nt)' c_nt`, a sum over S tokens of outer products of each linear layer. Its
inner products are the operators of `operators.py`; the formulas are in `torch_backend.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fusion_kernels.library import Operator, check_name
from fusion_kernels.ntk.block import prepare
from fusion_kernels.ntk.jacobian import check_columns, check_tangents, moved_parts, tangent_arguments
from fusion_kernels.ntk.operators import NTK_GRADIENT_GRAM, NTK_GRADIENT_NORMS, NTK_JVP
from fusion_kernels.ntk.types import VIAS, Block, Via


def _run(
    op: Operator,
    block: Block,
    x: Tensor,
    cotangents: Tensor,
    params: str | Sequence[str] | None,
    metric: Tensor | None,
    via: Via,
    backend: str,
) -> Tensor:
    function = op.function(backend, x)
    if x.ndim != 3:
        raise ValueError(f"x must be (N, S, d), sequences of tokens, got {tuple(x.shape)}")
    check_name("form", via, VIAS)
    prepared = prepare(block, {"x": x.flatten(0, 1)}, params, metric, {"cotangents": cotangents})
    check_columns("cotangents", cotangents, (*x.shape[:2], prepared.outputs))
    rows = prepared.rows["x"].view(x.shape)
    return function(rows, *prepared.described(), prepared.rows["cotangents"], prepared.parts, prepared.metric, via)


def gradient_gram(
    block: Block,
    x: Tensor,
    cotangents: Tensor,
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    form: Via = "auto",
    backend: str = "auto",
) -> Tensor:
    """Return all inner products of per-sample gradients: a tangent kernel of sequences, contracted by `cotangents`.

    Args:
        block, params, metric: as in `ntk_gram`.
        x: (N, S, d), the block's inputs at every token.
        cotangents: (N, S, outputs), the derivative of each sample's loss by the block's outputs.
        form: what the products are computed through: `"ghost"`, products of tokens, or `"direct"`, the gradients;
            they differ by rounding and cost. `"auto"` takes the cheaper one for each part.
        backend: as in `jvp`; the reference forms gradients whatever `form` says.

    Returns:
        (N, N), exactly symmetric, in the dtype of the computation. Memory beyond it: a few (N S, neurons) matrices and
        blocks of 64 MiB, or a token's products with all others where those are larger.

    Raises:
        ValueError: as in `ntk_gram`, cotangents that do not fit, or an unknown form.
        BackendUnavailableError: `backend` cannot run here.

    Sources: Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv 1510.01799; Li et al., "Large
    Language Models Can Be Strong Differentially Private Learners", 2022, arXiv 2110.05679 (ghost).

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x, cotangents = torch.randn(3, 5, 8), torch.randn(3, 5, 4)
        >>> gram = fusion_kernels.gradient_gram(block, x, cotangents)
        >>> norms = fusion_kernels.gradient_norms(block, x, cotangents)
        >>> gram.shape, torch.allclose(gram.diagonal(), norms.square(), rtol=1e-4)
        (torch.Size([3, 3]), True)
    """
    return _run(NTK_GRADIENT_GRAM, block, x, cotangents, params, metric, form, backend)


def gradient_norms(
    block: Block,
    x: Tensor,
    cotangents: Tensor,
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    form: Via = "auto",
    backend: str = "auto",
) -> Tensor:
    """Return the Euclidean norm of each sample's gradient: (N,); arguments as in `gradient_gram`.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x, cotangents = torch.randn(3, 5, 8), torch.randn(3, 5, 4)
        >>> norms = fusion_kernels.gradient_norms(block, x, cotangents)
        >>> gradient = torch.autograd.grad((cotangents[0] * block(x[0])).sum(), list(block.parameters()))
        >>> torch.allclose(norms[0], torch.cat([part.flatten() for part in gradient]).norm(), rtol=1e-4)
        True
    """
    return _run(NTK_GRADIENT_NORMS, block, x, cotangents, params, metric, form, backend)


def gradient_dots(
    block: Block, x: Tensor, cotangents: Tensor, direction: Mapping[str, Tensor], *, backend: str = "auto"
) -> Tensor:
    """Return the inner product of each sample's gradient with one direction, without forming a gradient.

    Args:
        block, x, cotangents, backend: as in `gradient_gram`.
        direction: part -> tensor of the part's shape, with its batch dimension of 1: a gradient of other data, say.

    Returns:
        (N,), in the dtype of the computation.

    Raises:
        ValueError: as in `gradient_gram`, or a direction that does not fit the block.

    Source: Wang et al., "Data Shapley in One Training Run", 2024, arXiv 2406.11011 (the ghost dot product).

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x, cotangents = torch.randn(3, 5, 8), torch.randn(3, 5, 4)
        >>> direction = fusion_kernels.vjp(block, x[0], cotangents[0])
        >>> dots = fusion_kernels.gradient_dots(block, x, cotangents, direction)
        >>> gram = fusion_kernels.gradient_gram(block, x, cotangents)
        >>> torch.allclose(dots, gram[0], rtol=1e-3, atol=1e-4)
        True
    """
    function = NTK_JVP.function(backend, x)
    if x.ndim != 3:
        raise ValueError(f"x must be (N, S, d), sequences of tokens, got {tuple(x.shape)}")
    others = {"cotangents": cotangents, **check_tangents(block, direction, "direction")}
    prepared = prepare(block, {"x": x.flatten(0, 1)}, moved_parts(direction), None, others)
    check_columns("cotangents", cotangents, (*x.shape[:2], prepared.outputs))
    c = prepared.rows["cotangents"]
    moved = function(prepared.rows["x"], *prepared.described(), tangent_arguments(prepared, "direction"))
    return (moved.view_as(c) * c).sum((1, 2))
