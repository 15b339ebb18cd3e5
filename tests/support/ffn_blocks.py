"""Small random feed-forward blocks, written out, and their Jacobians: what the tangent-kernel tests compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels import Gate
from fusion_kernels.ffn import FFN, PARTS
from fusion_kernels.gates import PLAIN
from fusion_kernels.ntk import Kernel

# Not the engine's own table: the oracle shares nothing with what it checks.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
    "silu": F.silu,
}
KERNELS: tuple[Kernel, ...] = ("gd", "sign")


class Bundle(FFN):
    """One block, with its batch axis."""

    def parts(self) -> dict[str, Tensor]:
        """Its parameters without that axis."""
        return {name: t[0] for name, t in self.named().items() if name in PARTS}

    def to(self, dtype: torch.dtype) -> Bundle:
        return self.map(lambda t: t.to(dtype))


def make_bundle(
    d: int,
    neurons: int,
    outputs: int,
    *,
    gated: bool = False,
    bias: bool = True,
    scale: bool = False,
    scale_exponent: float = 0.0,
    activation: str = "gelu",
    gating: Gate = PLAIN,
    spread: float = 1.0,
) -> Bundle:
    """A random block; of rows of unit variance its pre-activations have about that of `spread`."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=torch.float64)

    return Bundle(
        w_in=spread * randn(neurons, d) / d**0.5,
        w_out=randn(neurons, outputs) / neurons**0.5,
        w_gate=spread * randn(neurons, d) / d**0.5 if gated else None,
        b_in=randn(neurons) if bias else None,
        b_gate=randn(neurons) if bias and gated else None,
        b_out=randn(outputs) if bias else None,
        scale=torch.randint(1, 12, (1, neurons)).double() if scale else None,
        scale_exponent=scale_exponent,
        activation=activation,
        gating=gating,
    )


def forward(bundle: Bundle, parts: dict[str, Tensor], x: Tensor) -> Tensor:
    """The block, written out, as a function of its stored parameters."""
    phi = ACTIVATIONS[bundle.activation]
    a = bundle.scale_exponent
    p = torch.ones_like(parts["w_in"][:, 0]) if bundle.scale is None else bundle.scale[0]
    z = x @ parts["w_in"].T + parts.get("b_in", 0.0)
    if "w_gate" in parts:
        g = (x @ parts["w_gate"].T + parts.get("b_gate", 0.0)) / p**a
        limit, clamp, offset = bundle.gating.arguments
        if clamp in ("above", "both"):
            g = torch.clamp(g, -limit if clamp == "both" else None, limit)
        s = torch.clamp(phi(g), max=limit) if clamp == "after" else phi(g)
        up = z / p**a if limit is None else torch.clamp(z / p**a, -limit, limit)
        hidden = p ** (1 - a) * s * (up + offset)
    else:
        hidden = p ** (1 - a) * phi(z / p**a)
    return hidden @ parts["w_out"] + parts.get("b_out", 0.0)


def jacobian_grams(bundle: Bundle, x1: Tensor, x2: Tensor, kernel: Kernel) -> dict[str, Tensor]:
    """The kernel of each part from explicit Jacobians."""
    parts = bundle.parts()
    j1 = torch.func.jacrev(lambda theta: forward(bundle, theta, x1))(parts)
    j2 = torch.func.jacrev(lambda theta: forward(bundle, theta, x2))(parts)
    grams = {}
    for name in parts:
        left, right = j1[name].flatten(1), j2[name].flatten(1)
        grams[name] = left @ (right if kernel == "gd" else right.sign()).T
    return grams


def jacobians(bundle: Bundle, x: Tensor) -> dict[str, Tensor]:
    """Part -> (N, outputs, parameters of the part)."""
    parts = bundle.parts()
    found = torch.func.jacrev(lambda theta: forward(bundle, theta, x))(parts)
    return {name: j.flatten(2) for name, j in found.items()}


def full_gram(
    bundle: Bundle,
    x1: Tensor,
    x2: Tensor,
    kernel: Kernel,
    parts: tuple[str, ...] | None = None,
    metric: Tensor | None = None,
) -> Tensor:
    """(N1, N2, outputs, outputs) from explicit Jacobians, with a metric by neuron."""
    j1, j2 = jacobians(bundle, x1), jacobians(bundle, x2)
    total = torch.zeros(())
    for name in j1 if parts is None else parts:
        left, right = j1[name], j2[name] if kernel == "gd" else j2[name].sign()
        if metric is not None and name != "b_out":
            left = left * metric.repeat_interleave(left.shape[2] // len(metric))
        total = total + torch.einsum("noj,mpj->nmop", left, right)
    return total
