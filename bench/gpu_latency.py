"""What a round of Hartigan's moves and a seed of k-means++ wait for on a GPU: counted, not timed, and without a GPU.

    python bench/gpu_latency.py [--points 3072] [--clusters 768] [--out bench/results/gpu-latency.json]

Both are latency: programs that do little and wait for memory, step after step. A dependent step is one turn of a loop
that loads, of the program of a launch that has most of them; the launches of a round follow each other. How many turns
there are follows from the blocks of the launches, which are the host's own, and from what rounds find: candidates,
turns of the selection, changed clusters, points to search again. The rounds are those of neuron-like points, walked
through here in float64. Barriers and fences are counted in the machine code, once per instruction: those within a loop
run again in each turn. Needs Triton, whose compiler needs no GPU, and no TRITON_INTERPRET.

`FIRST` is the form that the kernels had before any of this was counted, `BEFORE` the one in which rounds searched all
clusters for every point. Both are kept here as numbers, since neither is in the source any more.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import triton
from support import neuron_like, triton_aot
from torch import Tensor

from fusion_kernels import kmeans
from fusion_kernels.kmeans import triton_heuristics

CAPABILITY = 90
#: Of the machine code of `FIRST`, sm_90, Triton 3.6.0: barriers and fences for the whole device.
FIRST_CODE = {
    "_select_moves_kernel": {"barriers": 66, "fences": 48},
    "_plus_plus_kernel": {"barriers": 62},
}
_CODE = {"barriers": r"\bBAR\.", "fences": r"\bMEMBAR\.\S*(GPU|SYS)"}


@dataclass(frozen=True)
class Round:
    """What one round of moves finds.

    Attributes:
        candidates: points whose move lowers the inertia.
        turns: of the selection, until no candidate is free.
        moves: that are made.
        listed: changed clusters of the round before, which this one looks at; at most all in the first.
        searched: most points of one program that are searched for among all clusters.
        members: of the largest cluster that this round changes.
    """

    candidates: int
    turns: int
    moves: int
    listed: int
    searched: int
    members: int


@dataclass(frozen=True)
class Form:
    """Blocks of the kernels of a round and of a seed; `changed` 0 where a round searches everything.

    Attributes:
        changed, again, every: clusters of the list per step; points at a time, and clusters per step, of a full search.
        scan: per step of the selection's walks over points, candidates and clusters.
        passes: of the selection over its candidates per turn, and after the last.
        find, shares, rows, norms: per step of the kernels that sum changed clusters.
        draw, trial: points per step of a seed's draw and of its trials.
    """

    changed: int
    again: int
    every: int
    scan: int
    passes: tuple[int, int]
    find: int
    shares: int
    rows: int
    norms: int
    draw: int
    trial: int

    def of_round(self, N: int, K: int, found: Round) -> dict[str, int]:
        """Dependent steps by kernel."""
        per_turn, at_end = self.passes
        walked = found.turns * per_turn + at_end
        search = _turns(K, self.every)
        if self.changed:
            search = _turns(found.listed, self.changed) + _turns(found.searched, self.again) * search
        return {
            "best moves": search,
            "selection": _turns(N, self.scan) + walked * _turns(found.candidates, self.scan) + _turns(K, self.scan),
            "members": _turns(N, self.find) + _turns(found.members, self.shares),
            "products": _turns(found.members, self.rows),
            "norms": _turns(found.members, self.norms),
        }

    def of_seed(self, N: int) -> int:
        """Draw, try, and bring the closest distances up to date."""
        return 2 * _turns(N, self.draw) + _turns(N, self.trial)


FIRST = Form(0, 0, 32, 1024, (4, 0), 1024, 128, 4, 128, 1024, 512)
BEFORE = Form(0, 0, 128, 1024, (4, 0), 1024, 128, 4, 128, 4096, 2048)


def _turns(length: int, step: int) -> int:
    return -(-length // step)


# --- rounds ----------------------------------------------------------------------------------------------------------


class _Walk:
    """Hartigan's method on points x (N, d) float64 from given labels, as the kernels go about it."""

    def __init__(self, x: Tensor, labels: Tensor, K: int, tile: int) -> None:
        self.gram = x @ x.mT
        self.norms_of_points = self.gram.diagonal()
        self.labels, self.K, self.tile = labels, K, tile
        self.at = torch.arange(len(x))
        self.counts = torch.bincount(labels, minlength=K).double()
        means = torch.zeros(K, len(x), dtype=torch.float64)
        means[labels, self.at] = 1 / self.counts[labels]
        self.products = means @ self.gram
        self.norms = (means * self.products).sum(1)
        self.target = torch.full_like(labels, -1)
        self.least = self.second = torch.full_like(self.norms_of_points, torch.inf)
        self.listed = torch.arange(K)

    def round(self) -> Round | None:
        """Make the moves of a round; None if there are none."""
        listed = len(self.listed)
        searched, here = self._search()
        alone = self.counts[self.labels] <= 1
        leave = self.counts[self.labels] / (self.counts[self.labels] - 1).clamp(min=1)
        gain = torch.where(alone, -1.0, leave * here - self.least)
        candidates = (gain > 1e-12 * self.norms_of_points).nonzero()[:, 0]
        if not len(candidates):
            return None
        moved, self.listed, turns = self._select(candidates, gain[candidates])
        self.labels[moved] = self.target[moved]
        for c in self.listed.tolist():
            members = (self.labels == c).nonzero()[:, 0]
            self.counts[c] = len(members)
            self.products[c] = self.gram[members].mean(0)
            self.norms[c] = self.products[c, members].mean()
        largest = int(self.counts[self.listed].max())
        return Round(len(candidates), turns, len(moved), listed, searched, largest)

    def _search(self) -> tuple[int, Tensor]:
        """Bring target, least and second up to date; most lost points of a tile, and distances (N,) to the own mean."""
        distance = self.norms_of_points + (self.norms[:, None] - 2 * self.products)
        here = distance[self.labels, self.at]
        cost = distance * (self.counts / (self.counts + 1))[:, None]
        cost[self.labels, self.at] = torch.inf
        listed = torch.zeros(self.K, dtype=torch.bool)
        listed[self.listed] = True
        gone = listed[self.target]
        lost = (self.target < 0) | (self.target == self.labels)
        lost |= gone & ~(cost[self.listed].min(0).values < self.second)
        known = torch.where(gone, torch.inf, self.least)[None]
        both = torch.cat([known, cost[self.listed]]).topk(2, 0, largest=False).values[1]
        afresh = cost.topk(2, 0, largest=False).values[1]
        self.second = torch.where(lost, afresh, torch.minimum(self.second, both))
        self.least, self.target = cost.min(0)
        tiles = torch.nn.functional.pad(lost.long(), (0, -len(lost) % self.tile)).view(-1, self.tile)
        return int(tiles.sum(1).max()), here

    def _select(self, candidates: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, int]:
        """The points that move, the clusters that change, and the turns that it took to find them."""
        source, target = self.labels[candidates], self.target[candidates]
        taken = torch.zeros(self.K, dtype=torch.bool)
        moves, turns = torch.zeros(len(gain), dtype=torch.bool), 0
        free = ~moves
        while bool(free.any()):
            turns += 1
            bids = torch.zeros(self.K, dtype=torch.float64)
            for clusters in (source, target):
                bids.scatter_reduce_(0, clusters[free], gain[free], "amax")
            best = free & (bids[source] == gain) & (bids[target] == gain)
            first = torch.full((self.K,), len(gain))
            place = torch.arange(len(gain))
            for clusters in (source, target):
                first.scatter_reduce_(0, clusters[best], place[best], "amin")
            # Of equal bids the first is a cluster's; a turn ends with at least one move.
            best &= (first[source] == place) & (first[target] == place)
            moves |= best
            taken[source[best]] = taken[target[best]] = True
            free &= ~(taken[source] | taken[target])
        return candidates[moves], taken.nonzero()[:, 0], turns


def rounds(N: int, K: int, tile: int) -> list[Round]:
    """Of N neuron-like points from where Lloyd's iteration ends; `tile` points are a program's."""
    x = neuron_like(N, 769).double()
    x -= x.mean(0)
    labels = kmeans(x, K, algorithm="lloyd").labels
    walk, found = _Walk(x, labels, K, tile), []
    while (one := walk.round()) is not None:
        found.append(one)
    return found


# --- the kernels -----------------------------------------------------------------------------------------------------


def launches(N: int, K: int) -> dict[str, Any]:
    """The launches of a float32 problem's seeds and rounds, by the kernel's name."""
    config = triton_heuristics.sweep_config(N, K, False)
    wanted: dict[str, dict[str, Any]] = {
        "_plus_plus_kernel": {},
        "_best_move_kernel": {},
        "_select_moves_kernel": {},
        "_members_kernel": {"TOL": False},
        "_products_kernel": {"U": config.moved_members, "BN": config.moved_columns},
        "_norms_kernel": {"TOL": False},
    }
    found: dict[str, Any] = {}
    # float32 comes first.
    for launch in triton_aot().kmeans_launches(N, K, 129, CAPABILITY).values():
        name = launch.kernel.__name__
        if name in wanted and all(launch.arguments[key] == value for key, value in wanted[name].items()):
            found.setdefault(name, launch)
    return {name: found[name] for name in wanted}


def form_of(found: dict[str, Any]) -> Form:
    """The blocks of these launches. The passes of the selection are how its source goes over the candidates."""
    best, select, members, products, norms, seed = (
        found[f"_{name}_kernel"].arguments
        for name in ("best_move", "select_moves", "members", "products", "norms", "plus_plus")
    )
    return Form(
        changed=best["BC"],
        again=best["BR"],
        every=best["BK"],
        scan=select["BLOCK"],
        passes=(3, 1),
        find=members["BLOCK"],
        shares=members["BM"],
        rows=products["U"],
        norms=norms["BLOCK"],
        draw=seed["BLOCK"],
        trial=seed["BT"],
    )


def summed(form: Form, N: int, K: int, found: list[Round]) -> dict[str, Any]:
    """Dependent steps of the rounds, and of a seed."""
    each = [form.of_round(N, K, one) for one in found]
    totals = [sum(steps.values()) for steps in each]
    return {
        "by kernel, mean": {name: round(mean(steps[name] for steps in each), 2) for name in each[0]},
        "mean": round(mean(totals), 2),
        "median": median(totals),
        "most": max(totals),
        "of a seed": form.of_seed(N),
        "form": asdict(form),
    }


def counted(found: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Barriers and fences in the machine code of every kernel."""
    codes = {name: triton_aot().machine_code(launch, CAPABILITY) for name, launch in found.items()}
    return {
        name: {what: len(re.findall(pattern, code)) for what, pattern in _CODE.items()} for name, code in codes.items()
    }


def main() -> None:
    """Count, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=3072)
    parser.add_argument("--clusters", type=int, default=768)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu-latency.json"))
    options = parser.parse_args()
    N, K = options.points, options.clusters
    own = launches(N, K)
    walked = rounds(N, K, own["_best_move_kernel"].arguments["BN"])
    forms = {"first": FIRST, "before": BEFORE, "now": form_of(own)}
    steps = {name: summed(form, N, K, walked) for name, form in forms.items()}
    sizes = {
        field.name: {"mean": round(mean(values), 2), "median": median(values), "most": max(values)}
        for field in fields(Round)
        for values in [[getattr(one, field.name) for one in walked]]
    }
    result = {
        "problem": {"points": N, "clusters": K, "dtype": "float32", "capability": CAPABILITY},
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rounds": {"number": len(walked), **sizes},
        "launches": {"of a round": len(own) - 1, "of all seeds": 1},
        "dependent steps": steps,
        "fewer than at first": {
            "in a round": round(steps["first"]["mean"] / steps["now"]["mean"], 2),
            "in a seed": round(steps["first"]["of a seed"] / steps["now"]["of a seed"], 2),
        },
        "code": {"first": FIRST_CODE, "now": counted(own)},
    }
    for name, found in steps.items():
        print(f"{name:7} {found['mean']:7.2f} steps a round (median {found['median']}), {found['of a seed']} a seed")
        print("        " + ", ".join(f"{kernel} {count}" for kernel, count in found["by kernel, mean"].items()))
    for name, code in result["code"]["now"].items():
        print(f"{name:22} {code['barriers']:3} barriers, {code['fences']} fences")
    print("fewer than at first:", json.dumps(result["fewer than at first"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
