"""A Transformer with everything that looks like a feed-forward layer and is none, and FFNs laid out in any way.

The classes of transformers show what there is today. This one holds in one place what must never be taken for an FFN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel


class ToyConfig(PretrainedConfig):
    """`layout` names a class of `LAYOUTS`; with `shared`, all layers have one FFN; `more_heads` widens attention."""

    model_type = "toy"

    def __init__(
        self, hidden_size: int = 16, ffn_width: int = 40, layers: int = 2, layout: str = "plain", limit: float = 5.0,
        shared: bool = False, more_heads: int = 0, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.hidden_size, self.ffn_width, self.layers = hidden_size, ffn_width, layers
        self.layout, self.limit, self.shared, self.more_heads = layout, limit, shared, more_heads
        super().__init__(**kwargs)


class Plain(nn.Module):
    """gelu between two biased layers."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.a = nn.Linear(config.hidden_size, config.ffn_width)
        self.b = nn.Linear(config.ffn_width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


class UpFirst(nn.Module):
    """One projection whose first half is the up projection."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.both = nn.Linear(config.hidden_size, 2 * config.ffn_width, bias=False)
        self.out = nn.Linear(config.ffn_width, config.hidden_size, bias=False)
        self.limit = config.limit

    def join(self, both: Tensor) -> Tensor:
        up, gate = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.join(self.both(x)))


class Interleaved(UpFirst):
    """Gate and up alternate."""

    def join(self, both: Tensor) -> Tensor:
        return F.silu(both[..., ::2]) * both[..., 1::2]


class Clamped(UpFirst):
    """Gate first; both are clamped, which shows at large arguments only."""

    def join(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + 1)


class Scaled(UpFirst):
    """A constant factor behind the activation."""

    def join(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return 0.25 * F.relu(gate) * up


class Unnamed(UpFirst):
    """Elementwise, with a function that nobody has a name for."""

    def join(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return torch.sin(gate) * torch.atan(up)


class Normed(nn.Module):
    """A norm in front of the output projection, over the neurons: they are no longer independent."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.a = nn.Linear(config.hidden_size, config.ffn_width)
        self.norm = nn.LayerNorm(config.ffn_width)
        self.b = nn.Linear(config.ffn_width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(F.gelu(self.a(x))))


class Unlike(nn.Module):
    """Parameters of an FFN's shapes whose output depends on something besides."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.a = nn.Linear(config.hidden_size, config.ffn_width)
        self.other = nn.Linear(config.hidden_size, 1)
        self.per_token = nn.Linear(1, config.ffn_width)
        self.b = nn.Linear(config.ffn_width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)) * self.per_token(self.other(x).exp()).exp())


class Hidden(Normed):
    """The same, with a width that no key moves."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(ToyConfig(hidden_size=config.hidden_size, ffn_width=3 * config.hidden_size))


LAYOUTS: dict[str, type[nn.Module]] = {
    "plain": Plain, "up first": UpFirst, "interleaved": Interleaved, "clamped": Clamped, "scaled": Scaled,
    "unnamed": Unnamed, "normed": Normed, "unlike": Unlike, "hidden": Hidden,
}  # fmt: skip


class Attention(nn.Module):
    """With low-rank keys and a gate on its output; where it is wider, values go through a convolution."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        d, wide = config.hidden_size, config.hidden_size + config.more_heads
        self.q, self.v, self.gate = (nn.Linear(d, wide) for _ in range(3))
        self.o = nn.Linear(wide, d)
        self.k = nn.Sequential(nn.Linear(d, 4, bias=False), nn.Linear(4, wide, bias=False))
        convolution = nn.Conv1d(wide, wide, 3, padding=1, groups=wide)
        self.convolution = convolution if config.more_heads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), dim=-1)
        values = self.convolution(self.v(x).mT).mT
        return self.o(torch.sigmoid(self.gate(x)) * (weights @ values))


class ToyLayer(nn.Module):
    """Attention, an FFN, and an adapter."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.attention = Attention(config)
        self.ffn = LAYOUTS[config.layout](config)
        self.adapter = nn.Sequential(nn.Linear(d, 4), nn.ReLU(), nn.Linear(4, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.ffn(x)
        return x + self.adapter(x)


class Patches(nn.Module):
    """Patch embeddings: convolutions with activations between them, the middle one pointwise."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 12, 2, 2)
        self.middle = nn.Conv2d(12, 12, 1)
        self.second = nn.Conv2d(12, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.middle(F.gelu(self.first(x)))))


class Pooler(nn.Module):
    """The first token, through a layer and tanh, as BERT's; then a classification head."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classes = nn.Linear(config.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(torch.tanh(self.dense(x)))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.patches = Patches(config)
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(config.layers)])
        for layer in self.layers[1:] if config.shared else ():
            layer.ffn = self.layers[0].ffn
        self.pooler = Pooler(config)
        self.post_init()

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.pooler(hidden_states[:, 0])
