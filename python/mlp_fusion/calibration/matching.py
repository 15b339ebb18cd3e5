"""NTK matching: scales under which a reduced feed-forward layer (FFN) has the tangent kernel of the original.

The function of an FFN with effective input weights u_i and output weights V_i does not depend on its scale p: stored
weights are p^a u_i and p^(a-1) V_i, and the forward pass undoes it. Its kernel does. With A_i and B_i what neuron i
contributes to the kernel of the folded FFN (p = 1) through its input weights and through its output weights,

    K(p) = sum_i p_i^(-s a) A_i + p_i^(s (1 - a)) B_i          s = 2 for gradient descent, 1 for sign descent

because a gradient with respect to weights stored c times larger is c times smaller. So p is what is matched here, with
the outputs left exactly as they are; this is the realisation of per-neuron factors c1 on A and c2 on B that a fused
module with one scale has. With the scale explicit (a = 0) only B depends on p, and min |K(p) - K|_F is a non-negative
least squares in p^s whose normal equations are products of Gram entries. With it split (a = 1/2), c2 = 1 / c1 for every
neuron, and log p is found by a quasi-Newton method.

Source: MLP Fusion (arXiv 2307.08941) matches the kernel by the cluster sizes; fitting the factors is this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels import ntk_gram
from fusion_kernels.ntk import Kernel
from fusion_kernels.ntk import reference as reference
from mlp_fusion.calibration.nnls import nnls
from mlp_fusion.neurons import SCALE_EXPONENTS, NeuronBundle

#: Rows whose kernel is matched.
MATCHING_ROWS = 384
#: Matched scales lie between these: a neuron of scale 0 would never learn again.
SMALLEST, LARGEST = 1e-2, 1e4
#: With the scale split: about how many rows are matched first, and quasi-Newton steps on these and on all.
_COARSE_ROWS = 128
_COARSE_STEPS, _STEPS = 80, 20


def match_ntk(
    original: NeuronBundle, reduced: NeuronBundle, x: Tensor, *, kernel: Kernel, parameterization: str
) -> NeuronBundle:
    """`reduced` with the scale that brings its tangent kernel on `x` closest to the original's, in Frobenius norm.

    Args:
        original: the FFN before, B = 1.
        reduced: after, B = 1, in any parameterization. Silent neurons (of scale 0) stay so.
        x: `(T, d)` inputs.
        kernel: `"gd"`, what gradient descent sees, or `"sign"`, what Adam-like methods see.
        parameterization: the parameterization that will be trained: `scaled` or `split`.

    Returns:
        The same function, canonical, with scales between 0.01 and 10,000.

    Memory: a few `(T, T)` and `(T, K)` matrices, and a `(K, K)` one. Time: `T^2 (K + d)` operations per step.

    Raises:
        ValueError: `parameterization` has no scale (`folded`), or a bundle holds more than one FFN.
    """
    if parameterization not in SCALE_EXPONENTS:
        raise ValueError(
            f"a {parameterization!r} FFN has no scale to match its kernel with: use {' or '.join(SCALE_EXPONENTS)}"
        )
    if original.batch != 1 or reduced.batch != 1:
        raise ValueError(f"matching takes one FFN, the bundles have {original.batch} and {reduced.batch}: select one")
    present = reduced.canonical().scale
    folded = reduced.parameterized("folded")
    silent = torch.zeros_like(folded.w_out[0, :, 0], dtype=torch.bool) if present is None else present[0] == 0
    parts = tuple(name for name in ("w_gate", "w_in", "b_gate", "b_in") if getattr(original, name) is not None)
    x = x.to(original.w_in.dtype)
    # What is solved for is the difference of two kernels: no fewer bits than the dtype has.
    target = ntk_gram(original, x, params=(*parts, "w_out"), kernel=kernel, precision="highest")
    if SCALE_EXPONENTS[parameterization] == 0.0:
        rest = target - ntk_gram(folded, x, params=parts, kernel=kernel, precision="highest")
        scale = _explicit(folded, x, rest, kernel)
    else:
        start = torch.ones_like(folded.w_out[0, :, 0]) if present is None else present[0]
        scale = _split(folded, x, target, start, kernel)
    scale = scale.clamp(SMALLEST, LARGEST).masked_fill(silent, 0.0)
    scale = scale.to(torch.promote_types(folded.w_out.dtype, torch.float32))
    # Silent neurons: `folded` gave them w_out = 0, and `unfolded` leaves it so.
    return folded.unfolded(scale.unsqueeze(0))


def _explicit(folded: NeuronBundle, x: Tensor, rest: Tensor, kernel: Kernel) -> Tensor:
    """`(K,)` scales for a = 0: the kernel of the output weights, `sum_i p_i^s B_i`, is to be `rest`."""
    # In float64: rows of few different tokens leave a matrix of low rank, which rounding in the working precision would
    # make indefinite by more than the ridge that it is solved with.
    left = folded.hidden(x)[0].double()
    right = left.sign() if kernel == "sign" else left
    outputs = folded.w_out.shape[2]
    gram = (left.T @ left) * (right.T @ right) * outputs**2
    cross = ((left.T @ rest.double()).T * right).sum(dim=0) * outputs
    factors = nnls(gram, cross)
    return factors if kernel == "sign" else factors.sqrt()


def _split(folded: NeuronBundle, x: Tensor, target: Tensor, start: Tensor, kernel: Kernel) -> Tensor:
    """`(K,)` scales for a = 1/2: `sum_i p_i^(-s/2) A_i + p_i^(s/2) B_i` is to be `target`, over log p."""
    found = start.to(target.dtype).clamp(SMALLEST, LARGEST).log()
    # Most of the way on a few of the rows: a step's time grows with their square.
    every = max(1, len(x) // _COARSE_ROWS)
    for chosen, steps in ((slice(None, None, every), _COARSE_STEPS), (slice(None), _STEPS)):
        found = _descend(_Factors(folded, x[chosen], kernel), target[chosen, chosen], found, kernel, steps)
    return found.exp()


def _descend(factors: _Factors, target: Tensor, start: Tensor, kernel: Kernel, steps: int) -> Tensor:
    """`(K,)` logarithms of scales, a few quasi-Newton steps better than `start`."""
    power = 1.0 if kernel == "gd" else 0.5
    norm = target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)
    low, high = torch.tensor(SMALLEST).log().item(), torch.tensor(LARGEST).log().item()
    # In units in which all scales curve the objective about equally: neurons differ by orders of magnitude.
    by_c1, by_c2 = factors.squares()
    curvature = (-2.0 * power * start).exp() * by_c1 + (2.0 * power * start).exp() * by_c2
    unit = (curvature + curvature.mean()).clamp(min=torch.finfo(target.dtype).tiny).rsqrt()
    unit = unit / unit.mean()
    point = (start / unit).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=steps, history_size=20, line_search_fn="strong_wolfe",
        tolerance_change=1e-7, tolerance_grad=1e-7,
    )  # fmt: skip

    def loss() -> Tensor:
        # The gradient by hand: both terms are linear in their factors.
        log_scale = point.detach() * unit
        bounded = log_scale.clamp(low, high)
        c1, c2 = (-power * bounded).exp(), (power * bounded).exp()
        difference = factors.kernel(c1, c2) - target
        by_c1, by_c2 = factors.gradient(difference)
        gradient = power * (c2 * by_c2 - c1 * by_c1)
        # Beyond the bounds the objective is flat, but for a slope that leads back.
        outside = log_scale - bounded
        point.grad = unit * (2.0 * gradient.masked_fill(outside != 0, 0.0) / norm + 2.0 * outside)
        return difference.square().sum() / norm + outside.square().sum()

    optimizer.step(loss)
    return (point.detach() * unit).clamp(low, high)


class _Factors:
    """The factors of the folded FFN's kernel: `M_r * (S_r c1 S'_r^T)` summed over projections, plus `H c2 H'^T`."""

    def __init__(self, folded: NeuronBundle, x: Tensor, kernel: Kernel) -> None:
        sign = kernel == "sign"
        weight = folded.w_out[0].abs().sum(1) if sign else torch.linalg.vector_norm(folded.w_out[0], dim=1)
        hidden, slopes = reference.factors(folded.at(0), x)
        products = x @ (x.sign() if sign else x).T
        self._inputs = [
            (products + float(f"b_{name}" in folded.named()), s * weight, s.sign() if sign else s * weight)
            for name, s in slopes.items()
        ]
        outputs = folded.w_out.shape[2]
        self._hidden = hidden * outputs, hidden.sign() if sign else hidden

    def kernel(self, c1: Tensor, c2: Tensor) -> Tensor:
        total = (self._hidden[0] * c2) @ self._hidden[1].T
        for products, left, right in self._inputs:
            total += products * ((left * c1) @ right.T)
        return total

    def gradient(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products of `difference` with every `A_i` and every `B_i`."""
        by_c2 = ((difference.T @ self._hidden[0]) * self._hidden[1]).sum(dim=0)
        by_c1 = torch.zeros_like(by_c2)
        for products, left, right in self._inputs:
            by_c1 += (((products * difference).T @ left) * right).sum(dim=0)
        return by_c1, by_c2

    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared Frobenius norms of every `A_i` (over projections, without what they share) and of every `B_i`."""
        by_c2 = self._hidden[0].square().sum(dim=0) * self._hidden[1].square().sum(dim=0)
        by_c1 = torch.zeros_like(by_c2)
        for products, left, right in self._inputs:
            by_c1 += ((products.square().T @ left.square()) * right.square()).sum(dim=0)
        return by_c1, by_c2
