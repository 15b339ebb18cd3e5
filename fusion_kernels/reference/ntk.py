"""The empirical NTK of a feed-forward block in closed form: the specification of `fusion_kernels::ntk_gram`.

With p the scale (1 where there is none), a its exponent and x an input row, the block is

    plain   F_o(x) = sum_j p_j^(1-a)  phi(z_j) v_jo + c_o              z_j = (u_j.x + b_j) / p_j^a
    gated   F_o(x) = sum_j p_j^(1-2a) phi(g_j) z_j v_jo + c_o          g_j = (t_j.x + e_j) / p_j^a,  z_j = u_j.x + b_j

and its Jacobian has rank-one pieces, so that no derivative is ever formed:

    dF_o/dv_jq = [o = q] A_j      dF_o/db_j = S_j v_jo      dF_o/du_jk = S_j v_jo x_k      (likewise e, t with T_j)

    plain   A = p^(1-a) phi(z)        S = p^(1-2a) phi'(z)
    gated   A = p^(1-2a) phi(g) z     S = p^(1-2a) phi(g)         T = p^(1-3a) phi'(g) z

The kernels are the products of those factors over two sets of rows. "gd" weighs neuron j by |v_j|_2^2; in "sign" the
sign of a product is the product of the signs, so the weight is |v_j|_1 and the second set enters by its signs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation


def _factors(
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
) -> Tensor:
    """Return the (N1, N2) kernel, summed over outputs and over the parts named in `params`.

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
    """
    # Autocast would run the products in a dtype that a solve on the result cannot bear.
    with torch.no_grad(), torch.autocast(x1.device.type, enabled=False):
        block = (w_in, w_gate, b_in, b_gate, scale, scale_exponent, activation)
        a1, slopes1 = _factors(x1, *block)
        a2, slopes2 = (a1, slopes1) if x2 is None else _factors(x2, *block)
        right = x1 if x2 is None else x2
        n_outputs = w_out.shape[1]
        if kernel == "gd":
            # Half of the weight |v|^2 on each side, so that the kernel of one set of rows with itself is a Gram matrix
            # of rounded vectors: positive semidefinite up to the rounding of one product.
            weight1 = weight2 = torch.linalg.vector_norm(w_out, dim=1)
        else:
            weight1, weight2 = torch.linalg.vector_norm(w_out, ord=1, dim=1), w_out.new_ones(w_out.shape[0])
            right, a2, slopes2 = right.sign(), a2.sign(), {name: s.sign() for name, s in slopes2.items()}

        gram = x1.new_zeros(x1.shape[0], right.shape[0])
        if "w_out" in params:
            gram += n_outputs * (a1 @ a2.T)
        if "b_out" in params:
            gram += n_outputs
        for name, slope1 in slopes1.items():
            if f"w_{name}" not in params and f"b_{name}" not in params:
                continue
            over_inputs = x1 @ right.T if f"w_{name}" in params else torch.zeros_like(gram)
            if f"b_{name}" in params:
                over_inputs += 1.0
            gram += over_inputs * ((slope1 * weight1) @ (slopes2[name] * weight2).T)
        if kernel == "gd" and x2 is None:
            # A matrix product may sum the two triangles in different orders.
            gram = gram.triu() + gram.triu(1).T
        return gram
