"""The empirical NTK of a feed-forward block in closed form: the specification of the operators `fusion_kernels::ntk_*`.

With p the scale (1 where there is none), a its exponent and x an input row, the block is

    plain   F_o(x) = sum_j p_j^(1-a)  phi(z_j) v_jo + c_o              z_j = (u_j.x + b_j) / p_j^a
    gated   F_o(x) = sum_j p_j^(1-a)  phi(g_j) z_j v_jo + c_o          g_j = (t_j.x + e_j) / p_j^a,  z_j likewise

and its Jacobian has rank-one pieces, so that no derivative is ever formed:

    dF_o/dv_jq = [o = q] A_j      dF_o/db_j = S_j v_jo      dF_o/du_jk = S_j v_jo x_k      (likewise e, t with T_j)

    plain   A = p^(1-a) phi(z)        S = p^(1-2a) phi'(z)
    gated   A = p^(1-a) phi(g) z      S = p^(1-2a) phi(g)         T = p^(1-2a) phi'(g) z

and where the gate has limits or an offset (`fusion_kernels.gates`), with s the limited phi,

    gated   A = p^(1-a) s(g) up(z)    S = p^(1-2a) s(g) up'(z)    T = p^(1-2a) s'(g) up(z)

The kernels are the products of those factors over two sets of rows, with m the metric (1 where there is none):

    K_oo'(x, x') = [o = o'] (1 + sum_j m_j A_j A'_j) + (x.x' + 1) sum_j m_j v_jo v_jo' S_j S'_j

In "sign" the sign of a product is the product of the signs, so v_jo' and the second set's factors enter by their signs.
A contraction over outputs turns v_jo v_jo' into one weight per neuron and [o = o'] into one number: for the trace
|v_j|_2^2 and O, in "sign" |v_j|_1 and O; for the kernel of the function r.F, with q = v r, q_j^2 and |r|_2^2, in "sign"
|q_j| and |r|_1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN, PARTS
from fusion_kernels.gates import Gate
from fusion_kernels.library import check_name
from fusion_kernels.ntk.types import Differentiated, check_names

# The names that this backend knows: it takes none for another, and refuses a new one until that stands here.
_KERNELS, _REDUCTIONS = ("gd", "sign"), ("trace", "full", "diagonal", "vector")
_PRODUCTS, _VIAS = ("trace", "full", "vector"), ("auto", "ghost", "direct")

#: Bytes of one temporary of a block of rows; a few such are held beside the result.
BLOCK_BYTES = 64 << 20


def factors(ffn: FFN, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A and `{"in": S}` of the rows x (N, d), for a gated block `{"in": S, "gate": T}`; each (N, neurons).

    All tensors share one dtype, float32 or float64, and one device.
    """
    a = ffn.scale_exponent
    p = ffn.w_in.new_ones(ffn.w_in.shape[0]) if ffn.scale is None else ffn.scale
    z, of_hidden, of_slopes = F.linear(x, ffn.w_in, ffn.b_in) / p**a, p ** (1 - a), p ** (1 - 2 * a)
    g = None if ffn.w_gate is None else F.linear(x, ffn.w_gate, ffn.b_gate) / p**a
    hidden, slopes = of_arguments(ffn.activation, ffn.gating, z, g)
    return of_hidden * hidden, {name: of_slopes * slope for name, slope in slopes.items()}


def of_arguments(activation: str, gate: Gate, z: Tensor, g: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """`factors` without the powers of p that stand before them: of z and, of a gated block, g as they stand above."""
    phi = get_activation(activation)
    if g is None:
        return phi.function(z), {"in": phi.derivative(z)}
    value = phi.function(gate.inside(g))
    s, up, slope = gate.after(value), gate.up(z), gate.through_gate(phi.derivative(gate.inside(g)), g, value)
    return s * up, {"in": gate.through_up(s, z), "gate": slope * up}


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
    ffn: FFN,
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
        x1: (N1, d), of the block's dtype and on its device.
        x2: (N2, d), or None for `x1`.
        params: some of `PARTS`.
        kernel: `"gd"` or `"sign"`.
        reduce: `"trace"`, `"full"`, `"diagonal"`, or `"vector"` with `direction`.
        direction: (outputs,).
        metric: (neurons,) or None.
        precision: `"highest"`, the products of the dtype itself.
        block_size: rows at a time; None takes as many as `BLOCK_BYTES` hold.
        out: where to put the result.

    Returns:
        (N1, N2); (N1, N2, outputs, outputs) for `"full"`; (N1, N2, outputs) for `"diagonal"`. Beside it, (N, neurons)
        matrices and blocks of rows, for the latter two with an axis of neurons.
    """
    check_names(kernel, reduce, direction, _KERNELS, _REDUCTIONS)
    check_name("precision", precision, ("highest",))
    first, second = sides(x1, x2, ffn, metric, kernel)
    rows, columns, outputs = len(first.x), len(second.x), ffn.w_out.shape[1]
    axes = {"full": (outputs, outputs), "diagonal": (outputs,)}.get(reduce, ())
    gram = x1.new_empty(rows, columns, *axes) if out is None else out
    is_symmetric = kernel == "gd" and x2 is None
    per_pair = outputs * max(outputs, len(ffn.w_in)) if axes else 1
    for here in _row_blocks(rows, columns * per_pair * x1.element_size(), block_size):
        if not is_symmetric:
            gram[here] = between(first[here], second, params, reduce, direction, kernel)
            continue
        # A matrix product may sum the two triangles in different orders: one is computed, and mirrored.
        begin = here.start
        tile = between(first[here], second[: here.stop], params, reduce, direction, kernel)
        tile[:, begin:] = symmetric(tile[:, begin:])
        gram[here, : here.stop] = tile
        gram[:begin, here] = transposed(tile[:, :begin])
    return gram


@dataclass(frozen=True)
class Side:
    """One set of rows as a kernel takes it: with the metric, and in "sign" on the right by signs.

    Attributes:
        x: (N, d).
        hidden: A (N, neurons).
        slopes: S and T (N, neurons).
        w_out: (neurons, outputs).
    """

    x: Tensor
    hidden: Tensor
    slopes: dict[str, Tensor]
    w_out: Tensor

    def __getitem__(self, rows: slice) -> Side:
        slopes = {name: slope[rows] for name, slope in self.slopes.items()}
        return Side(self.x[rows], self.hidden[rows], slopes, self.w_out)


def sides(x1: Tensor, x2: Tensor | None, ffn: FFN, metric: Tensor | None, kernel: str) -> tuple[Side, Side]:
    """The left and the right side of a kernel; arguments as in `ntk_gram`."""
    a1, slopes1 = factors(ffn, x1)
    a2, slopes2 = (a1, slopes1) if x2 is None else factors(ffn, x2)
    right = x1 if x2 is None else x2
    if metric is not None:
        m1, m2 = (metric.sqrt(), metric.sqrt()) if kernel == "gd" else (metric, torch.ones_like(metric))
        a1, slopes1 = a1 * m1, {name: s * m1 for name, s in slopes1.items()}
        a2, slopes2 = a2 * m2, {name: s * m2 for name, s in slopes2.items()}
    left = Side(x1, a1, slopes1, ffn.w_out)
    if kernel == "gd":
        return left, Side(right, a2, slopes2, ffn.w_out)
    return left, Side(right.sign(), a2.sign(), {name: s.sign() for name, s in slopes2.items()}, ffn.w_out.sign())


def between(
    left: Side, right: Side, params: Sequence[str], reduce: str, direction: Tensor | None, kernel: str
) -> Tensor:
    """The kernel of some rows on the left with some on the right: the formulas, as they stand above."""
    outputs = left.w_out.shape[1]
    per_pair = left.x.new_zeros(len(left.x), len(right.x))
    if "w_out" in params:
        per_pair += left.hidden @ right.hidden.T
    if "b_out" in params:
        per_pair += 1.0
    if reduce == "full":
        gram = per_pair[:, :, None, None] * torch.eye(outputs, dtype=per_pair.dtype, device=per_pair.device)
    elif reduce == "diagonal":
        gram = per_pair[:, :, None].repeat(1, 1, outputs)
    else:
        weight1, weight2, coefficient = contraction(left.w_out, direction, kernel)
        gram = coefficient * per_pair
    for name in left.slopes:
        if f"w_{name}" not in params and f"b_{name}" not in params:
            continue
        over_inputs = left.x @ right.x.T if f"w_{name}" in params else torch.zeros_like(per_pair)
        if f"b_{name}" in params:
            over_inputs += 1.0
        s1, s2 = left.slopes[name], right.slopes[name]
        if reduce in ("full", "diagonal"):
            pairs = over_inputs[:, :, None] * s1[:, None] * s2[None]
            axes = "nmj,jo,jp->nmop" if reduce == "full" else "nmj,jo,jo->nmo"
            gram += torch.einsum(axes, pairs, left.w_out, right.w_out)
        else:
            gram += over_inputs * ((s1 * weight1) @ (s2 * weight2).T)
    return gram


def _row_blocks(rows: int, bytes_per_row: int, block_size: int | None) -> Iterator[slice]:
    """Blocks of rows, of `block_size` or of `BLOCK_BYTES` at most."""
    step = max(1, BLOCK_BYTES // max(1, bytes_per_row)) if block_size is None else block_size
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def symmetric(gram: Tensor) -> Tensor:
    """`gram` (N, N, ...) with its lower part mirrored, outputs included: exactly symmetric."""
    if gram.ndim == 4:
        n, _, outputs, _ = gram.shape
        flat = symmetric(gram.transpose(1, 2).reshape(n * outputs, n * outputs))
        return flat.view(n, outputs, n, outputs).transpose(1, 2)
    rows = torch.arange(gram.shape[0], device=gram.device)
    lower = (rows[:, None] >= rows).view(*gram.shape[:2], *(1,) * (gram.ndim - 2))
    return torch.where(lower, gram, gram.transpose(0, 1))


def transposed(gram: Tensor) -> Tensor:
    """(n, m, ...) as (m, n, ...), with the outputs exchanged too."""
    return gram.transpose(0, 1).transpose(2, 3) if gram.ndim == 4 else gram.transpose(0, 1)


def ntk_sums(
    x1: Tensor,
    x2: Tensor | None,
    a: Differentiated,
    b: Differentiated,
    kernel: str,
    direction: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over the kernels A and B of two blocks, as in `ntk_gram`, without storing either.

    Args:
        a, b: with as many outputs.
        direction: (outputs,) for the kernels of r.F, or None for their traces.
        block_size: rows at a time; None takes as many as `BLOCK_BYTES` hold.

    Returns:
        (4,): <A, A>, <A, B>, <B, B> and |A - B|^2; (2, N1), the sums of the rows of A and of B; (2, N2), of their
        columns. All float64, and of the same rounded values, so that taking means off the first is exact.
    """
    reduce = "trace" if direction is None else "vector"
    check_names(kernel, reduce, direction, _KERNELS, _REDUCTIONS)
    left_a, right_a = sides(x1, x2, a.ffn, a.metric, kernel)
    left_b, right_b = sides(x1, x2, b.ffn, b.metric, kernel)
    columns = len(right_a.x)
    sums = x1.new_zeros(4, dtype=torch.float64)
    of_rows = x1.new_zeros(2, len(x1), dtype=torch.float64)
    of_columns = x1.new_zeros(2, columns, dtype=torch.float64)
    for here in _row_blocks(len(x1), columns * x1.element_size(), block_size):
        ka = between(left_a[here], right_a, a.params, reduce, direction, kernel).double()
        kb = between(left_b[here], right_b, b.params, reduce, direction, kernel).double()
        sums += torch.stack([ka.square().sum(), (ka * kb).sum(), kb.square().sum(), (ka - kb).square().sum()])
        of_rows[:, here] = torch.stack([ka.sum(1), kb.sum(1)])
        of_columns += torch.stack([ka.sum(0), kb.sum(0)])
    return sums, of_rows, of_columns


def jvp(
    x: Tensor,
    ffn: FFN,
    tangents: Sequence[Tensor | None],
) -> Tensor:
    """Return J times a change of the parameters: (N, outputs).

    Args:
        x: (N, d); the block as in `ntk_gram`.
        tangents: by `PARTS`, each of its part's shape, or None for 0.
    """
    hidden, slopes = factors(ffn, x)
    result = x.new_zeros(len(x), ffn.w_out.shape[1])
    moved = dict(zip(PARTS, tangents, strict=True))
    for name in slopes:
        weight, bias = moved[f"w_{name}"], moved[f"b_{name}"]
        if weight is not None:
            result += (slopes[name] * (x @ weight.T)) @ ffn.w_out
        if bias is not None:
            result += (slopes[name] * bias) @ ffn.w_out
    if moved["w_out"] is not None:
        result += hidden @ moved["w_out"]
    if moved["b_out"] is not None:
        result += moved["b_out"]
    return result


def vjp(
    x: Tensor,
    ffn: FFN,
    cotangent: Tensor,
    params: Sequence[str],
) -> list[Tensor]:
    """Return J' times `cotangent` (N, outputs): the gradients by `params`, in their order, each of its part's shape."""
    hidden, slopes = factors(ffn, x)
    gradients = {"w_out": hidden.T @ cotangent, "b_out": cotangent.sum(0)}
    for name, slope in slopes.items():
        back = slope * (cotangent @ ffn.w_out.T)
        gradients |= {f"w_{name}": back.T @ x, f"b_{name}": back.sum(0)}
    return [gradients[part] for part in params]


def ntk_vp(
    x: Tensor,
    ffn: FFN,
    v: Tensor,
    params: Sequence[str],
    kernel: str,
    reduce: str,
    direction: Tensor | None,
    metric: Tensor | None,
) -> Tensor:
    """Return K v, with the kernel of x (N, d) as `ntk_gram` has it, `BLOCK_BYTES` of its rows at a time.

    Args:
        v: (N, outputs) for the `"full"` kernel; (N, M) for `"trace"` and `"vector"`.
        others: as in `ntk_gram`.
    """
    check_names(kernel, reduce, direction, _KERNELS, _PRODUCTS)
    left, right = sides(x, None, ffn, metric, kernel)
    outputs = ffn.w_out.shape[1]
    per_pair = outputs * max(outputs, len(ffn.w_in)) if reduce == "full" else 1
    product = torch.empty_like(v)
    for here in _row_blocks(len(x), len(x) * per_pair * x.element_size(), None):
        gram = between(left[here], right, params, reduce, direction, kernel)
        product[here] = torch.einsum("nmop,mp->no", gram, v) if reduce == "full" else gram @ v
    return product


def sample_gradients(
    x: Tensor,
    ffn: FFN,
    cotangents: Tensor,
    params: Sequence[str],
    metric: Tensor | None,
) -> Tensor:
    """Return the gradients of sum_t c_nt . F(x_nt) for x (N, S, d), times the root of the metric: (N, parameters)."""
    rows = []
    for tokens, c in zip(x, cotangents, strict=True):
        gradients = dict(zip(params, vjp(tokens, ffn, c, params), strict=True))
        if metric is not None:
            for part in gradients.keys() - {"b_out"}:
                gradients[part] = (gradients[part].movedim(0, -1) * metric.sqrt()).movedim(-1, 0)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients.values()]))
    return torch.stack(rows)


def gradient_gram(
    x: Tensor,
    ffn: FFN,
    cotangents: Tensor,
    params: Sequence[str],
    metric: Tensor | None,
    via: str,
) -> Tensor:
    """Return the inner products of all pairs of `sample_gradients`: (N, N), symmetric.

    Args:
        via: how other backends are to compute it; of no meaning here.
    """
    check_name("form", via, _VIAS)
    gram = x.new_zeros(len(x), len(x))
    blocks = _sample_blocks(x, ffn)
    for number, here in enumerate(blocks):
        own = sample_gradients(x[here], ffn, cotangents[here], params, metric)
        for there in blocks[: number + 1]:
            other = own if there == here else sample_gradients(x[there], ffn, cotangents[there], params, metric)
            gram[here, there] = own @ other.T
    return symmetric(gram)


def gradient_norms(
    x: Tensor,
    ffn: FFN,
    cotangents: Tensor,
    params: Sequence[str],
    metric: Tensor | None,
    via: str,
) -> Tensor:
    """Return the Euclidean norms of `sample_gradients`: (N,). Arguments as in `gradient_gram`."""
    check_name("form", via, _VIAS)
    norms = x.new_zeros(len(x))
    for here in _sample_blocks(x, ffn):
        norms[here] = sample_gradients(x[here], ffn, cotangents[here], params, metric).norm(dim=1)
    return norms


def _sample_blocks(x: Tensor, ffn: FFN) -> list[slice]:
    """Samples whose gradients by the block's parts take `BLOCK_BYTES`."""
    parameters = sum(t.numel() for name, t in ffn.named().items() if name in PARTS)
    return list(_row_blocks(len(x), parameters * x.element_size(), None))
