"""Matrix product operators: decompositions and training steps, beside tensorly where it is installed.

    python bench/mpo.py [--repeats 7] [--threads 1] [--out bench/results/mpo-cpu.json]

Matrices of 768 x 768 and 768 x 3072 with the published factors. Per matrix: seconds of `mpo_decompose`, and of
tensorly's `tensor_train_matrix` on the same tensor (which gives no spectra), with the relative errors of both, whole
and with bonds of at most 64; then a training step (forward, backward, AdamW) on 2,048 tokens: of a plain `nn.Linear`,
of one under `MpoConfig`, which chooses the factors (the published ones for 768 x 768, others for 768 x 3072), and of
tensorly-torch's `FactorizedLinear` with the published ones; central tensors are frozen. All are timed in turn, in
random order in every round; medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fused_mlp import in_turn
from peft import get_peft_model
from torch import Tensor, nn

from mlp_fusion import MpoConfig, mpo_decompose
from mlp_fusion.companions.operators import Shapes

#: Rows, columns -> factors, as the paper has them.
MATRICES: dict[tuple[int, int], Shapes] = {
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
    (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4)),
}
TOKENS, CUT = 2048, 64


def medians(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    return {name: found["median"] for name, found in in_turn(works, rounds, math.inf).items()}


def tensorly_decompose(weight: Tensor, shapes: Shapes, bonds: list[int]) -> Any:
    """tensorly's tensor-train matrix with the same factors."""
    import tensorly

    tensorly.set_backend("pytorch")
    from tensorly.decomposition import tensor_train_matrix

    return tensor_train_matrix(weight.reshape(*shapes[0], *shapes[1]), rank=[1, *bonds, 1])


def decompositions(weight: Tensor, shapes: Shapes, repeats: int, peer: bool) -> dict[str, Any]:
    """Seconds and errors of decompositions."""
    chain = mpo_decompose(weight, shapes)
    cut = chain.truncated(CUT)
    works: dict[str, Callable[[], Any]] = {"seconds": lambda: mpo_decompose(weight, shapes)}
    found: dict[str, Any] = {
        "bonds": chain.bonds,
        "parameters": chain.numel,
        "error": _error(chain.matrix(), weight),
        "cut_error": _error(cut.matrix(), weight),
        "cut_bound": chain.error_bound(CUT) / float(weight.norm()),
    }
    if peer:
        works["peer_seconds"] = lambda: tensorly_decompose(weight, shapes, list(chain.bonds))
        whole, small = (tensorly_decompose(weight, shapes, list(c.bonds)) for c in (chain, cut))
        found["peer_error"] = _error(whole.to_matrix(), weight)
        found["peer_cut_error"] = _error(small.to_matrix(), weight)
    return {**found, **medians(works, repeats)}


def _error(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


def steps(weight: Tensor, shapes: Shapes, repeats: int, peer: bool) -> dict[str, float]:
    """Seconds of a training step of a plain layer, of one with a chain, and of tensorly-torch's."""
    x = torch.randn(TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(1))

    def layer() -> nn.Linear:
        made = nn.Linear(weight.shape[1], len(weight))
        made.weight.data.copy_(weight)
        return made

    chained = get_peft_model(nn.Sequential(layer()), MpoConfig(target_modules=["0"]))  # type: ignore[arg-type]
    models: dict[str, nn.Module] = {"plain": layer(), "chain": chained}
    if peer:
        import tltorch

        bonds = mpo_decompose(weight, shapes).bonds
        other = tltorch.FactorizedLinear.from_linear(
            layer(), auto_tensorize=False, in_tensorized_features=shapes[1], out_tensorized_features=shapes[0],
            rank=(1, *bonds, 1), factorization="BlockTT", implementation="reconstructed",
        )  # fmt: skip
        other.weight.factors[2].requires_grad_(False)
        models["peer"] = other
    works = {name: _step(model, x) for name, model in models.items()}
    return medians(works, repeats)


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def work() -> None:
        inputs = x.clone().requires_grad_()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def main() -> None:
    """Measure all, write and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="*", help="columns; all by default")
    parser.add_argument("--out", type=Path, default=Path("build/mpo.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = [name for name in ("tensorly", "tltorch") if importlib.util.find_spec(name)]
    rows = []
    for shape, shapes in MATRICES.items():
        if options.sizes and shape[1] not in options.sizes:
            continue
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02
        row: dict[str, Any] = {"rows": shape[0], "columns": shape[1], "threads": options.threads}
        row["decomposition"] = decompositions(weight, shapes, options.repeats, "tensorly" in peers)
        row["step"] = steps(weight, shapes, options.repeats, "tltorch" in peers)
        rows.append(row)
        print(json.dumps(row), flush=True)
    machine = {"processor": platform.machine(), "torch": torch.__version__, "tokens": TOKENS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
