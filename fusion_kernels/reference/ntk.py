"""The empirical NTK of a feed-forward block in closed form: the specification of `fusion_kernels::ntk_gram`.

With p the scale (1 where there is none), a its exponent and x an input row, the block is

    plain   F_o(x) = sum_j p_j^(1-a)  phi(z_j) v_jo + c_o              z_j = (u_j.x + b_j) / p_j^a
    gated   F_o(x) = sum_j p_j^(1-2a) phi(g_j) z_j v_jo + c_o          g_j = (t_j.x + e_j) / p_j^a,  z_j = u_j.x + b_j

and its Jacobian has rank-one pieces, so that no derivative is ever formed:

    dF_o/dv_jq = [o = q] A_j      dF_o/db_j = S_j v_jo      dF_o/du_jk = S_j v_jo x_k      (likewise e, t with T_j)

    plain   A = p^(1-a) phi(z)        S = p^(1-2a) phi'(z)
    gated   A = p^(1-2a) phi(g) z     S = p^(1-2a) phi(g)         T = p^(1-3a) phi'(g) z

The kernels are the products of those factors over two sets of rows, with m the metric (1 where there is none):

    K_oo'(x, x') = [o = o'] (1 + sum_j m_j A_j A'_j) + (x.x' + 1) sum_j m_j v_jo v_jo' S_j S'_j

In "sign" the sign of a product is the product of the signs, so v_jo' and the second set's factors enter by their signs.
A contraction over outputs turns v_jo v_jo' into one weight per neuron and [o = o'] into one number: for the trace
|v_j|_2^2 and O, in "sign" |v_j|_1 and O; for the kernel of the function r.F, with q = v r, q_j^2 and |r|_2^2, in "sign"
|q_j| and |r|_1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation


def factors(
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    scale: Tensor | None,
    a: float,
    activation: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return A and `{"in": S}`, for a gated block `{"in": S, "gate": T}`; each (rows, neurons)."""
    phi = get_activation(activation)
    p = w_in.new_ones(w_in.shape[0]) if scale is None else scale
    z = F.linear(x, w_in, b_in)
    if w_gate is None:
        z = z / p**a
        return p ** (1 - a) * phi.function(z), {"in": p ** (1 - 2 * a) * phi.derivative(z)}
    g = F.linear(x, w_gate, b_gate) / p**a
    s = p ** (1 - 2 * a) * phi.function(g)
    return s * z, {"in": s, "gate": p ** (1 - 3 * a) * phi.derivative(g) * z}


def contraction(w_out: Tensor, direction: Tensor | None, kernel: str) -> tuple[Tensor, Tensor, float]:
    """How the outputs enter a kernel of one number per pair of rows.

    Args:
        w_out: (neurons, outputs).
        direction: r (outputs,) for the kernel of r.F; None for the trace.
        kernel: `"gd"` or `"sign"`.

    Returns:
        The weights (neurons,) of the first and of the second set's slopes, whose product weighs a neuron, and the
        number that stands for `[o = o']`. In "gd" the two are equal, so that the kernel of one set of rows with itself
        is a Gram matrix of rounded vectors: positive semidefinite up to the rounding of one product.
    """
    if direction is None:
        if kernel == "gd":
            norms = torch.linalg.vector_norm(w_out, dim=1)
            return norms, norms, float(w_out.shape[1])
        return torch.linalg.vector_norm(w_out, ord=1, dim=1), w_out.new_ones(w_out.shape[0]), float(w_out.shape[1])
    q = w_out @ direction
    if kernel == "gd":
        return q, q, float(direction.double().square().sum())
    return q, q.sign(), float(direction.double().abs().sum())


def ntk_gram(
    x1: Tensor,
    x2: Tensor | None,
    w_in: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    scale: Tensor | None,
    scale_exponent: float,
    activation: str,
    params: Sequence[str],
    kernel: str,
    reduce: str = "trace",
    direction: Tensor | None = None,
    metric: Tensor | None = None,
    precision: str = "highest",
    block_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the kernel of two sets of rows, summed over the parts named in `params`.

    Args:
        x1: (N1, d). All tensors share one dtype, float32 or float64, and one device.
        x2: (N2, d), or None for `x1`.
        w_in, w_gate: (neurons, d); the block is gated when `w_gate` is there.
        b_in, b_gate: (neurons,).
        w_out: (neurons, outputs).
        scale: (neurons,).
        scale_exponent, activation: a and the name of phi.
        params: some of `w_in`, `b_in`, `w_gate`, `b_gate`, `w_out`, `b_out`.
        kernel: `"gd"` or `"sign"`.
        reduce: `"trace"`, `"full"`, `"diagonal"`, or `"vector"` with `direction`.
        direction: (outputs,).
        metric: (neurons,) or None.
        precision: `"highest"`, the products of the dtype itself.
        block_size: of no meaning here.
        out: where to put the result.

    Returns:
        (N1, N2); (N1, N2, outputs, outputs) for `"full"`; (N1, N2, outputs) for `"diagonal"`.
    """
    # Autocast would run the products in a dtype that a solve on the result cannot bear.
    with torch.no_grad(), torch.autocast(x1.device.type, enabled=False):
        block = (w_in, w_gate, b_in, b_gate, scale, scale_exponent, activation)
        a1, slopes1 = factors(x1, *block)
        a2, slopes2 = (a1, slopes1) if x2 is None else factors(x2, *block)
        right = x1 if x2 is None else x2
        m = w_out.new_ones(w_out.shape[0]) if metric is None else metric
        m1, m2 = (m.sqrt(), m.sqrt()) if kernel == "gd" else (m, torch.ones_like(m))
        v2 = w_out
        if kernel == "sign":
            right, a2, slopes2 = right.sign(), a2.sign(), {name: s.sign() for name, s in slopes2.items()}
            v2 = w_out.sign()

        outputs = w_out.shape[1]
        same = "w_out" in params, "b_out" in params
        per_pair = x1.new_zeros(x1.shape[0], right.shape[0])
        if same[0]:
            per_pair += (a1 * m1) @ (a2 * m2).T
        if same[1]:
            per_pair += 1.0
        if reduce == "full":
            gram = per_pair[:, :, None, None] * torch.eye(outputs, dtype=x1.dtype, device=x1.device)
        elif reduce == "diagonal":
            gram = per_pair[:, :, None].repeat(1, 1, outputs)
        else:
            weight1, weight2, coefficient = contraction(w_out, direction, kernel)
            gram = coefficient * per_pair
        for name, slope1 in slopes1.items():
            if f"w_{name}" not in params and f"b_{name}" not in params:
                continue
            over_inputs = x1 @ right.T if f"w_{name}" in params else torch.zeros_like(per_pair)
            if f"b_{name}" in params:
                over_inputs += 1.0
            s1, s2 = slope1 * m1, slopes2[name] * m2
            if reduce in ("full", "diagonal"):
                pairs = over_inputs[:, :, None] * s1[:, None] * s2[None]
                gram += torch.einsum("nmj,jo,jp->nmop" if reduce == "full" else "nmj,jo,jo->nmo", pairs, w_out, v2)
            else:
                gram += over_inputs * ((s1 * weight1) @ (s2 * weight2).T)
        if kernel == "gd" and x2 is None:
            # A matrix product may sum the two triangles in different orders.
            gram = symmetric(gram)
        return gram if out is None else out.copy_(gram)


def symmetric(gram: Tensor) -> Tensor:
    """`gram` (N, N, ...) with its lower part mirrored, outputs included: exactly symmetric."""
    if gram.ndim == 4:
        n, _, outputs, _ = gram.shape
        flat = symmetric(gram.transpose(1, 2).reshape(n * outputs, n * outputs))
        return flat.view(n, outputs, n, outputs).transpose(1, 2)
    rows = torch.arange(gram.shape[0], device=gram.device)
    lower = (rows[:, None] >= rows).view(*gram.shape[:2], *(1,) * (gram.ndim - 2))
    return torch.where(lower, gram, gram.transpose(0, 1))


def ntk_sums(
    x1: Tensor,
    x2: Tensor | None,
    a: Sequence[Tensor | None],
    a_exponent: float,
    a_activation: str,
    a_params: Sequence[str],
    b: Sequence[Tensor | None],
    b_exponent: float,
    b_activation: str,
    b_params: Sequence[str],
    kernel: str,
    direction: Tensor | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Return (4,) float64: <A, A>, <A, B>, <B, B> and |A - B|^2 of the kernels A and B of two blocks, as in `ntk_gram`.

    Args:
        a, b: `w_in`, `w_gate`, `b_in`, `b_gate`, `w_out`, `scale`, `metric` of each.
        direction: (outputs,) for the kernels of r.F, or None for their traces.
        block_size: of no meaning here.
    """
    reduce = "trace" if direction is None else "vector"
    ka, kb = (
        ntk_gram(x1, x2, *block[:6], exponent, activation, params, kernel, reduce, direction, block[6]).double()  # type: ignore[call-arg,arg-type]
        for block, exponent, activation, params in (
            (a, a_exponent, a_activation, a_params),
            (b, b_exponent, b_activation, b_params),
        )
    )
    return torch.stack([ka.square().sum(), (ka * kb).sum(), kb.square().sum(), (ka - kb).square().sum()])
