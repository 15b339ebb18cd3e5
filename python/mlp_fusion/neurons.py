"""`NeuronBundle`: a feed-forward layer (FFN) as the compression methods see it, a bundle of neurons.

Notation: B problems (layers or experts of one shape), N neurons, `d` inputs, `d_out` outputs, D the length of a
neuron's vector. A plain FFN is `y = sum_j act(w_in_j . x + b_in_j) w_out_j + b_out`; a gated one multiplies
`act(w_gate_j . x + b_gate_j)` by `w_in_j . x + b_in_j`, so that `w_in` is the up projection; within limits and with an
offset where it has a `fusion_kernels.Gate` that says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN, TENSORS
from fusion_kernels.kmeans.means import cluster_means, cluster_sums

Parameterization = Literal["folded", "scaled", "split"]

#: In place of an activation's name: a function of each neuron by itself that the kernels do not know.
UNNAMED = "unnamed"

#: How much of the cluster size p the weights carry: weights are stored as p^a times the canonical ones.
SCALE_EXPONENTS: dict[str, float] = {"scaled": 0.0, "split": 0.5}

#: Parts with a neuron axis, in the order of their columns in :meth:`NeuronBundle.vectors`.
_VECTOR_FIELDS = ("w_gate", "w_in", "b_gate", "b_in", "w_out")


def check_parameterization(name: str) -> Parameterization:
    """Return `name` if it is a parameterization, else raise ValueError."""
    if name not in get_args(Parameterization):
        raise ValueError(f"unknown parameterization {name!r}: use one of {', '.join(get_args(Parameterization))}")
    return name  # type: ignore[return-value]


def scale_power(scale: Tensor, exponent: float) -> Tensor:
    """`scale ** exponent`, and 0 where `scale` is 0: an empty cluster contributes nothing, whatever the exponent."""
    return torch.where(scale > 0, scale.clamp(min=torch.finfo(scale.dtype).tiny) ** exponent, torch.zeros_like(scale))


def reciprocal(scale: Tensor) -> Tensor:
    """`1 / scale`, of any sign, since a scale may be trained; and 0 where `scale` is 0."""
    return torch.where(scale != 0, scale, torch.ones_like(scale)).reciprocal() * (scale != 0)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry of a tensor is NaN or infinite; in one pass over it, of floating types that are computed in."""
    if not tensor.numel():
        return True
    least, largest = torch.aminmax(tensor)  # NaN where there is one
    return bool(least.isfinite() & largest.isfinite())


@dataclass(frozen=True, eq=False)
class NeuronBundle(FFN):
    """B feed-forward layers of one shape, neuron by neuron: `FFN` with a batch axis, and what methods do with it.

    Attributes:
        w_in: `(B, N, d)` input weights; of a gated FFN, the up projection.
        w_out: `(B, N, d_out)` output weights, a row per neuron.
        activation: a name in `fusion_kernels.activations.ACTIVATIONS`, or :data:`UNNAMED`: neurons can then be merged
            and chosen, but not computed.
        w_gate: `(B, N, d)` gate projection, or None for a plain FFN.
        b_in, b_gate: `(B, N)` biases of `w_in` and `w_gate`, or None.
        b_out: `(B, d_out)` output bias, or None. Clustering leaves it alone; a refit fits it.
        scale: `(B, N)` size-scaling vector p (how many neurons each one stands for), or None for all ones.
        scale_exponent: the exponent a: the stored weights are p^a times the canonical ones, and the forward pass
            divides that out again. 0 is the explicit-P form, 1/2 the sqrt(P) split.
        gating: a `fusion_kernels.Gate`, limits and offset of a gated FFN; none by default.

    Raises:
        ValueError: shapes disagree, or the activation is unknown.

    Source: MLP Fusion (arXiv 2307.08941), which writes P = diag(p).

    Examples:
        >>> bundle = mlp_fusion.NeuronBundle(
        ...     w_in=torch.randn(1, 3, 8), w_out=torch.randn(1, 3, 4), activation="gelu", b_in=torch.randn(1, 3)
        ... )
        >>> bundle.vectors().shape  # [w_in, b_in, w_out] of each neuron
        torch.Size([1, 3, 13])
        >>> labels = torch.tensor([[0, 0, 1]])
        >>> bundle.reduce(labels).scale
        tensor([[2., 1.]])
    """

    def __post_init__(self) -> None:
        if self.activation != UNNAMED:
            get_activation(self.activation)
        self.check("B")

    @property
    def batch(self) -> int:
        return self.w_in.shape[0]

    @property
    def width(self) -> int:
        """N, the number of neurons."""
        return self.w_in.shape[1]

    @property
    def working_dtype(self) -> torch.dtype:
        """What is computed in: float64 where the weights have it, else float32."""
        return torch.promote_types(self.w_in.dtype, torch.float32)

    @property
    def layout(self) -> tuple[object, ...]:
        """What two bundles must share to be stacked: shapes, dtypes, which tensors there are, and the function."""
        own = self.named()
        shapes = tuple((f, (tuple(own[f].shape[1:]), own[f].dtype) if f in own else None) for f in TENSORS)
        return (*shapes, *self.function, self.scale_exponent)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> NeuronBundle:
        """The bundle in another dtype or on another device. The scale keeps at least float32: it holds counts."""
        moved = self.map(lambda t: t.to(device=device, dtype=dtype))
        if self.scale is None:
            return moved
        scale_dtype = torch.promote_types(dtype or self.scale.dtype, torch.float32)
        return dataclasses.replace(moved, scale=self.scale.to(device=device, dtype=scale_dtype))

    @staticmethod
    def stack(bundles: Sequence[NeuronBundle]) -> NeuronBundle:
        """Join bundles along B.

        Raises:
            ValueError: there are none, or their `layout` differs.
        """
        if not bundles:
            raise ValueError("no bundles to stack")
        first = bundles[0]
        if any(b.layout != first.layout for b in bundles):
            raise ValueError("bundles of different shape, dtype or activation cannot be stacked")
        joined: dict[str, Any] = {name: torch.cat([getattr(b, name) for b in bundles]) for name in first.named()}
        return dataclasses.replace(first, **joined)

    def select(self, index: int) -> NeuronBundle:
        """Problem `index` alone, as a bundle with B = 1."""
        if not 0 <= index < self.batch:
            raise IndexError(f"problem {index} of a bundle of {self.batch}")
        return self.map(lambda t: t[index : index + 1])

    # --- parameterization --------------------------------------------------------------------------------------------

    def _scale_weights(self, factor: Tensor) -> dict[str, Any]:
        """Every tensor with a neuron axis times the `(B, N)` factor, in that tensor's dtype."""
        scaled = {}
        for name in _VECTOR_FIELDS:
            tensor = getattr(self, name)
            if tensor is not None:
                by_row = factor.unsqueeze(-1) if tensor.ndim == 3 else factor
                scaled[name] = (tensor * by_row).to(tensor.dtype)
        return scaled

    def canonical(self) -> NeuronBundle:
        """The same function with a = 0: weights as the cluster centroids are, the whole of p explicit."""
        if self.scale is None or self.scale_exponent == 0.0:
            return dataclasses.replace(self, scale_exponent=0.0)
        weights = self._scale_weights(scale_power(self.scale, -self.scale_exponent))
        return dataclasses.replace(self, **weights, scale_exponent=0.0)

    def parameterized(self, parameterization: str) -> NeuronBundle:
        """The same function with p explicit (`scaled`), split as sqrt(p) (`split`) or inside `w_out` (`folded`).

        Which one keeps the training dynamics depends on the optimiser: explicit p for Adam-like ones, the split for
        SGD-like ones. A bundle without a scale is returned as it is: p = 1 everywhere.

        Raises:
            ValueError: unknown parameterization, or a negative scale to be split.
        """
        check_parameterization(parameterization)
        bundle = self.canonical()
        if bundle.scale is None:
            return bundle
        if parameterization == "folded":
            w_out = (bundle.w_out * bundle.scale.unsqueeze(-1)).to(bundle.w_out.dtype)
            return dataclasses.replace(bundle, w_out=w_out, scale=None)
        exponent = SCALE_EXPONENTS[parameterization]
        if exponent == 0.0:
            return bundle
        if bool((bundle.scale < 0).any()):
            raise ValueError(f"a negative scale has no {parameterization!r} form: use 'scaled' or 'folded'")
        weights = bundle._scale_weights(scale_power(bundle.scale, exponent))
        return dataclasses.replace(bundle, **weights, scale_exponent=exponent)

    def unfolded(self, scale: Tensor) -> NeuronBundle:
        """The same function with the `(B, N)` scale taken out of `w_out` again: the inverse of folding it.

        A neuron of scale 0 is silent: its `w_out` becomes 0.

        Raises:
            ValueError: the bundle has a scale already.
        """
        if self.scale is not None:
            raise ValueError("the bundle has a scale already")
        w_out = (self.w_out * reciprocal(scale).unsqueeze(-1)).to(self.w_out.dtype)
        return dataclasses.replace(self, w_out=w_out, scale=scale, scale_exponent=0.0)

    # --- clustering --------------------------------------------------------------------------------------------------

    def vectors(self) -> Tensor:
        """The `(B, N, D)` rows that are clustered: `[w_in, b_in, w_out]`; gated `[w_gate, w_in, b_gate, b_in, w_out]`.

        Rows are canonical (a = 0), so that tied neurons have equal rows in every parameterization.
        """
        bundle = self.canonical()
        columns = [t for t in (getattr(bundle, name) for name in _VECTOR_FIELDS) if t is not None]
        return torch.cat([t if t.ndim == 3 else t.unsqueeze(-1) for t in columns], dim=-1)

    @property
    def vector_length(self) -> int:
        """D, the columns of :meth:`vectors`."""
        columns = [t for t in (getattr(self, name) for name in _VECTOR_FIELDS) if t is not None]
        return sum(t.shape[-1] if t.ndim == 3 else 1 for t in columns)

    def with_vectors(self, rows: Tensor, scale: Tensor | None) -> NeuronBundle:
        """A bundle of the neurons `rows`, laid out as :meth:`vectors` does; all else as here.

        Args:
            rows: `(B, K, D)`; cast to the dtype of `w_in`.
            scale: `(B, K)` or None.

        Raises:
            ValueError: `rows` is not `(B, K, D)`.
        """
        widths = [(name, getattr(self, name)) for name in _VECTOR_FIELDS]
        sizes = [(n, t.shape[-1] if t.ndim == 3 else 1, t.ndim) for n, t in widths if t is not None]
        if rows.ndim != 3 or rows.shape[0] != self.batch or rows.shape[2] != self.vector_length:
            raise ValueError(f"rows have shape {tuple(rows.shape)}, expected ({self.batch}, K, {self.vector_length})")
        pieces = rows.to(self.w_in.dtype).split([size for _, size, _ in sizes], dim=-1)
        tensors: dict[str, Any] = {
            name: (piece if ndim == 3 else piece.squeeze(-1)).contiguous()
            for (name, _, ndim), piece in zip(sizes, pieces, strict=True)
        }
        return dataclasses.replace(self, **tensors, scale=scale, scale_exponent=0.0)

    def reduce(
        self,
        labels: Tensor,
        weights: Tensor | None = None,
        n_clusters: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> NeuronBundle:
        """Fuse each cluster into one neuron: its (weighted) mean row, scaled by the number of neurons it stands for.

        Args:
            labels: `(B, N)` integers in `[0, K)`.
            weights: `(B, N)` non-negative weights of the mean, or None for equal ones.
            n_clusters: K; the largest label + 1 when None.
            dtype: of the result; that of `w_in` when None. Means are taken in float32 at least.

        Returns:
            A bundle of K neurons with `scale` = cluster sizes (sums of this bundle's scale where it has one). A
            cluster without members becomes a zero neuron of scale 0; no method leaves one.

        Raises:
            ValueError: a shape is wrong or a label lies outside `[0, K)`.
        """
        if labels.shape != self.w_in.shape[:2]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {tuple(self.w_in.shape[:2])}")
        if weights is not None and weights.shape != labels.shape:
            raise ValueError(f"weights have shape {tuple(weights.shape)}, expected {tuple(labels.shape)}")
        K = n_clusters if n_clusters is not None else (int(labels.max()) + 1 if labels.numel() else 0)
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= K):
            raise ValueError(f"labels lie in [{int(labels.min())}, {int(labels.max())}], expected [0, {K})")
        bundle, dtype = self.canonical(), dtype or self.w_in.dtype
        wide = torch.promote_types(dtype, torch.float32)
        sizes = torch.ones_like(self.w_in[..., 0], dtype=wide) if self.scale is None else self.scale.to(wide)
        weights = sizes if weights is None else weights.to(wide) * sizes
        means: dict[str, Any] = {}
        for name in _VECTOR_FIELDS:
            tensor = getattr(bundle, name)
            if tensor is not None:
                rows = tensor if tensor.ndim == 3 else tensor.unsqueeze(-1)
                means[name] = cluster_means(rows, weights, labels, K).to(dtype).view(-1, K, *tensor.shape[2:])
        if bundle.b_out is not None:
            means["b_out"] = bundle.b_out.to(dtype)
        scale = cluster_sums(torch.ones_like(sizes).unsqueeze(-1), sizes, labels, K).squeeze(-1)
        return dataclasses.replace(bundle, **means, scale=scale, scale_exponent=0.0)

    # --- the function ------------------------------------------------------------------------------------------------

    def hidden(self, x: Tensor) -> Tensor:
        """What the output weights multiply: activations, gated where the FFN is, and scaled.

        Args:
            x: `(T, d)` rows for every problem, or `(B, T, d)`.

        Returns:
            `(B, T, N)`.
        """
        act = get_activation(self.activation).function

        def project(weight: Tensor, bias: Tensor | None, divided: bool = True) -> Tensor:
            z = x @ weight.transpose(1, 2)
            z = z if bias is None else z + bias.unsqueeze(1)
            if not divided or self.scale is None or self.scale_exponent == 0.0:
                return z
            return (z * scale_power(self.scale, -self.scale_exponent).unsqueeze(1)).to(z.dtype)

        if self.w_gate is None:
            hidden = act(project(self.w_in, self.b_in))
        else:
            up = project(self.w_in, self.b_in, divided=not self.up_multiplies)
            hidden = self.gating.after(act(self.gating.inside(project(self.w_gate, self.b_gate)))) * self.gating.up(up)
        if self.scale is not None:
            # The scale may be float32 beside bfloat16 weights; the second product wants the weights' dtype.
            factor = output_factor(self.scale, self.scale_exponent, self.up_multiplies)
            hidden = (hidden * factor.unsqueeze(1)).to(hidden.dtype)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """The FFN itself, the obvious way: the reference that every faster path is compared with.

        Args:
            x: `(T, d)` rows for every problem, or `(B, T, d)`.

        Returns:
            `(B, T, d_out)`.
        """
        y = self.hidden(x) @ self.w_out
        return y if self.b_out is None else y + self.b_out.unsqueeze(1)


def output_factor(scale: Tensor, exponent: float, up_multiplies: bool) -> Tensor:
    """What multiplies the hidden activations: p^(1-a), or p^(1-2a) when they carry the p^a of an up projection."""
    if exponent == 0.0:
        return scale  # whatever its sign: a scale that is trained may pass through 0
    return scale_power(scale, 1.0 - (2.0 if up_multiplies else 1.0) * exponent)
