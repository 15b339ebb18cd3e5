"""Layers of experts, tokens that are routed to them, and what they compute, token by token and expert by expert."""

from __future__ import annotations

from typing import Any

import torch
from blocks import MLPCall
from ffn_blocks import ACTIVATIONS
from rounding import Arithmetic, Rounded
from torch import Tensor
from torch.nn import functional as F


def layer(
    E: int, d: int, h: int, d_out: int, gated: bool, bias: bool, scale: bool, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    found = {"w_in": torch.randn(E, h, d) / d**0.5, "w_out": torch.randn(E, d_out, h) / h**0.5}
    if gated:
        found["w_gate"] = torch.randn(E, h, d) / d**0.5
    if bias:
        found |= {"b_in": torch.randn(E, h), "b_out": torch.randn(E, d_out)}
        if gated:
            found["b_gate"] = torch.randn(E, h)
    if scale:
        found["scale"] = torch.randint(1, 6, (E, h)).float()
    return {name: t.to(dtype).requires_grad_() for name, t in found.items()}


def routing(
    T: int, k: int, E: int, dtype: torch.dtype = torch.float64, skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """Distinct experts per token, none of them `skip`; weights that require grad."""
    scores = torch.rand(T, E)
    if skip is not None and k < E:
        scores[:, skip] = -1
    return scores.topk(k).indices, torch.rand(T, k).to(dtype).requires_grad_()


def token_by_token(x: Tensor, index: Tensor, weights: Tensor, activation: str, **p: Tensor) -> Tensor:
    rows = []
    for t in range(len(x)):
        y = torch.zeros(p["w_out"].shape[1], dtype=x.dtype)
        for e, share in zip(index[t].tolist(), weights[t], strict=True):
            if e >= len(p["w_in"]):
                continue
            hidden = F.linear(x[t], p["w_in"][e], p["b_in"][e] if "b_in" in p else None)
            if "w_gate" in p:
                gate = F.linear(x[t], p["w_gate"][e], p["b_gate"][e] if "b_gate" in p else None)
                hidden = ACTIVATIONS[activation](gate) * hidden
            else:
                hidden = ACTIVATIONS[activation](hidden)
            if "scale" in p:
                hidden = hidden * p["scale"][e]
            y = y + share * F.linear(hidden, p["w_out"][e], p["b_out"][e] if "b_out" in p else None)
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, p["w_out"].shape[1])


def upstream(y: Tensor) -> Tensor:
    """The gradient of y that `results` gives gradients for: values that every dtype holds."""
    return torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16().to(y.dtype)


def results(y: Tensor, x: Tensor, weights: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    target = upstream(y)
    sources = {"x": x, "weights": weights, **parameters}
    found = torch.autograd.grad((y * target).sum(), list(sources.values()), allow_unused=True)
    zero = {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(sources.items(), found, strict=True)}
    return {"y": y.detach(), **zero}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def bounds_of(
    dtype: torch.dtype, x: Tensor, index: Tensor, weights: Tensor, dy: Tensor, p: dict[str, Tensor]
) -> dict[str, Rounded]:
    """How far rounding may take what `results` returns of experts that are gated and without biases."""
    by = Arithmetic(dtype)
    zero = {"y": dy, "x": x, "weights": weights, **p}
    value, error = ({name: torch.zeros_like(t, dtype=torch.float64) for name, t in zero.items()} for _ in range(2))

    def add(name: str, place: Any, found: Rounded) -> None:
        value[name][place] += found.value
        # Of each sum over the experts of a token, as much again as the rounding of what is added.
        error[name][place] += found.error + by.unit * found.largest

    for e in range(len(p["w_in"])):
        token, place = (index == e).nonzero(as_tuple=True)
        share, given = by.exact(weights[token, place, None]), by.exact(dy[token])
        block = MLPCall(
            x[token], dy[token], p["w_in"][e], p["w_out"][e], p["w_gate"][e], scale=p["scale"][e], activation="silu"
        )
        found = block.bounds(dtype, (given * share).stored())
        y = found.pop("y")
        add("y", token, (y * share).stored())
        add("weights", (token, place), (y * given).stored().sum(1).stored())
        add("x", token, found.pop("x"))
        for name in p:
            add(name, e, found[name])
    return {name: Rounded(value[name], error[name], by) for name in zero}


def expert_by_expert(x: Tensor, index: Tensor, weights: Tensor, **p: Tensor) -> Tensor:
    """What a module of ordinary layers does."""
    y = torch.zeros_like(x)
    for e in range(len(p["w_in"])):
        token, place = (index == e).nonzero(as_tuple=True)
        hidden = F.silu(F.linear(x[token], p["w_gate"][e])) * F.linear(x[token], p["w_in"][e]) * p["scale"][e]
        y = y.index_add(0, token, F.linear(hidden, p["w_out"][e]) * weights[token, place, None])
    return y
