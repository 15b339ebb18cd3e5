"""How far rounding may take a tangent kernel and its products from float64, by the formulas of `ffn_blocks`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ffn_blocks import Bundle
from rounding import MANY, Arithmetic, Rounded, gated
from torch import Tensor

from fusion_kernels.ntk import Kernel


def _linear(x: Rounded, weight: Rounded, bias: Rounded | None) -> Rounded:
    z = x @ weight.T
    return z if bias is None else z + bias


def factors(by: Arithmetic, bundle: Bundle, x: Tensor) -> tuple[Rounded, dict[str, Rounded]]:
    """What the Jacobian is made of: hidden values and slopes `in`, `gate`, each (N, neurons)."""
    parts, a = {name: by.exact(t) for name, t in bundle.parts().items()}, bundle.scale_exponent
    p = torch.ones_like(bundle.w_in[0, :, 0]) if bundle.scale is None else bundle.scale[0]

    def power(exponent: float) -> Rounded:
        return by.exact(p.double() ** exponent).rounded(4)

    rows = by.exact(x)
    z = _linear(rows, parts["w_in"], parts.get("b_in"))
    if "w_gate" not in parts:
        value, slope = (z * power(-a)).activated(bundle.activation)
        return power(1 - a) * value, {"in": power(1 - 2 * a) * slope}
    g, z = _linear(rows, parts["w_gate"], parts.get("b_gate")) * power(-a), z * power(-a)
    value, slope, up, passes = gated(g, z, bundle.activation, bundle.gating)
    of_slopes = power(1 - 2 * a)
    return power(1 - a) * value * up, {"in": of_slopes * value * passes, "gate": of_slopes * slope * up}


def _of_outputs(
    by: Arithmetic, bundle: Bundle, direction: Tensor | None, kernel: Kernel
) -> tuple[Rounded, Rounded, float]:
    """The weights of both sides' slopes, (neurons, 1) each, and the number beside the hidden values."""
    w_out = by.exact(bundle.w_out[0])
    neurons, outputs = w_out.value.shape
    if direction is None:
        norm = torch.linalg.vector_norm(w_out.value, ord=2 if kernel == "gd" else 1, dim=1, keepdim=True)
        left = by.exact(norm).rounded(outputs + 4)
        return left, left if kernel == "gd" else by.exact(torch.ones(neurons, 1)), float(outputs)
    q = w_out @ by.exact(direction)[:, None]
    weight = direction.double().square().sum() if kernel == "gd" else direction.double().abs().sum()
    return q, q if kernel == "gd" else q.sign(), float(weight)


def gram(
    by: Arithmetic,
    bundle: Bundle,
    x1: Tensor,
    x2: Tensor | None,
    *,
    kernel: Kernel = "gd",
    params: str | Sequence[str] | None = None,
    reduce: Tensor | None = None,
    metric: Tensor | None = None,
) -> Rounded:
    """(N1, N2) of `ntk_gram`, for the trace or a vector; everything given is exact."""
    params = tuple(bundle.parts()) if params is None else (params,) if isinstance(params, str) else params
    weight1, weight2, coefficient = _of_outputs(by, bundle, reduce, kernel)
    m = torch.ones(len(weight1.value)) if metric is None else metric
    metrics = (m.double().sqrt(),) * 2 if kernel == "gd" else (m, torch.ones_like(m))

    def side(x: Tensor, weight: Rounded, metric: Tensor, signs: bool) -> tuple[Rounded, Rounded, dict[str, Rounded]]:
        hidden, slopes = factors(by, bundle, x)
        rows = by.exact(x)
        if signs:
            rows, hidden, slopes = rows.sign(), hidden.sign(), {name: s.sign() for name, s in slopes.items()}
        weigh = by.exact(metric).rounded()
        of_slopes = weigh * weight[:, 0]
        return rows.stored(), (hidden * weigh).stored(), {n: (s * of_slopes).stored() for n, s in slopes.items()}

    rows1, hidden1, slopes1 = side(x1, weight1, metrics[0], False)
    rows2, hidden2, slopes2 = side(x1 if x2 is None else x2, weight2, metrics[1], kernel == "sign")
    constant = coefficient * ("b_out" in params)
    total = by.exact(torch.full((len(x1), len(rows2.value)), constant, dtype=torch.float64)).rounded(3)
    neurons = len(m)
    if "w_out" in params:
        total = total + by.exact(torch.tensor([coefficient], dtype=torch.float64)).rounded(2) * (hidden1 @ hidden2.T)
    for name, slope in slopes1.items():
        over_inputs = by.exact(torch.full_like(total.value, float(f"b_{name}" in params)))
        if f"w_{name}" in params:
            over_inputs = over_inputs + rows1 @ rows2.T
        # The sum may go on to that of the gate and of the hidden values.
        total = total + (over_inputs * (slope @ slopes2[name].T)).rounded(2 * neurons)
    return total


def products(by: Arithmetic, bundle: Bundle, x: Tensor, v: Tensor) -> tuple[Rounded, Rounded]:
    """Jᵀ v of w_in (neurons, d), and K v (N, outputs) of a kernel of all parts, by J Jᵀ v or from the kernel itself."""
    hidden, slopes = factors(by, bundle, x)
    rows, weights, given = by.exact(x), by.exact(bundle.w_out[0]), by.exact(v)
    ones = by.exact(torch.ones(len(x), 1))
    back = {name: slope * (given @ weights.T) for name, slope in slopes.items()}
    pushed = hidden @ (hidden.T @ given) + ones @ given.sum(0).view(1, -1)
    # The kernel has a row for every output of every input.
    outputs = v.shape[1]
    pairs = torch.arange(len(x)).repeat_interleave(outputs)
    over_inputs = (rows @ rows.T + ones @ ones.T)[pairs][:, pairs]
    by_kernel = (hidden @ hidden.T + ones @ ones.T) @ given
    for name, slope in slopes.items():
        with_bias = rows @ (back[name].T @ rows).T + ones @ back[name].sum(0).view(1, -1)
        pushed = pushed + (slope * with_bias) @ weights
        each = (slope.view(len(x), 1, -1) * weights.T).view(len(pairs), -1)
        by_kernel = by_kernel + ((over_inputs * (each @ each.T)).rounded(2) @ given.view(-1, 1)).view(*v.shape)
    return back["in"].T @ rows, pushed.or_by(by_kernel)


def enough(bundle: Bundle, x1: Tensor, x2: Tensor | None) -> bool:
    """Whether the entries of a kernel have `MANY` errors of their own: there are no more than hidden values."""
    return min(len(x1), len(x1 if x2 is None else x2)) * bundle.w_in.shape[1] >= MANY


def sums(a: Rounded, b: Rounded) -> tuple[Rounded, Rounded, Rounded]:
    """Of `ntk_sums`, from the kernels of both blocks: the values of each are added up in float64."""
    wide = Arithmetic(a.by.dtype, total=torch.finfo(torch.float64).eps / 2)
    a, b = (Rounded(k.value, k.error, wide) for k in (a, b))
    difference = a + -b
    inner = [(left * right).sum(0).sum(0) for left, right in ((a, a), (a, b), (b, b), (difference, difference))]
    return inner[0].stack(*inner[1:]), a.sum(1).stack(b.sum(1)), a.sum(0).stack(b.sum(0))
