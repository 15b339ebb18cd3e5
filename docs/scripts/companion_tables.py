"""Tables of docs/results/companions.md: companions on SST-2, chains beside other ways, and students of MiniALBERT."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from results_tables import results, table


def companions(base: str, epochs: float) -> str:
    """Every method at its best learning rate, the most accurate first; and what the other rates gave."""
    by_rate: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for row in results("companions-cpu")["rows"]:
        name, _, method = row["row"].partition(" ")
        if name == base and row["epochs"] == epochs:
            by_rate.setdefault(method, {}).setdefault(row["learning_rate"], []).append(row)

    def mean(rows: list[dict[str, Any]]) -> float:
        return statistics.mean(row["accuracy"] for row in rows)

    lines = []
    for name, rates in by_rate.items():
        # The rate that was chosen is the one that further seeds were run with; else the best of one seed.
        best = max(rates, key=lambda rate: (len(rates[rate]), mean(rates[rate])))
        rows = rates[best]
        each = ", ".join(f"{row['accuracy']:.1%}" for row in rows)
        others = ", ".join(f"{rate:g}: {mean(rates[rate]):.1%}" for rate in sorted(rates) if rate != best)
        stored = f"{rows[0]['stored']:,}"
        line = [name, f"{rows[0]['trained']:,}", f"{best:g}", f"{mean(rows):.1%}", each, others, stored]
        lines.append((mean(rows), line))
    lines.sort(key=lambda line: -line[0])
    titles = ["", "trained numbers", "learning rate", "accuracy", "by seed", "at other rates", "stored bytes"]
    kept = [n for n in range(len(titles)) if n == 0 or any(line[n] for _, line in lines)]
    return table([titles[n] for n in kept], [[line[n] for n in kept] for _, line in lines])


def intrinsic() -> str:
    """Accuracy at every d, and the smallest d with nine tenths of that of all weights, by model and projections."""
    rows = results("intrinsic-cpu")["rows"]
    dimensions = sorted({row["d"] for row in rows if row["d"] is not None})
    lines = []
    for base in dict.fromkeys(row["base"] for row in rows):
        own = [row for row in rows if row["base"] == base]
        [full, head] = [next(r["accuracy"] for r in own if r["way"] == way) for way in ("full", "head")]
        for way in ("said", "did"):
            found = {row["d"]: row["accuracy"] for row in own if row["way"] == way}
            d90 = min((d for d, accuracy in found.items() if accuracy >= 0.9 * full), default=None)
            cells = [f"{found[d]:.1%}" if d in found else "" for d in dimensions]
            lines.append(
                [base, way.upper(), f"{full:.1%}", f"{head:.1%}", *cells, f"{d90:,}" if d90 else "not reached"]
            )
    titles = ["model", "", "all weights", "head alone", *(f"d = {d:,}" for d in dimensions), "d90"]
    return table(titles, lines)


def squeezing() -> str:
    """Accuracy at shares of the parameters: medians over seeds, with the least and the largest."""
    points: dict[tuple[str, int], list[dict[str, float]]] = {}
    for row in results("squeezing-cpu")["rows"]:
        for number, point in enumerate(row["points"]):
            points.setdefault((row["row"], number), []).append(point)
    rows = []
    for (name, _), seeds in points.items():
        found = sorted(point["accuracy"] for point in seeds)
        spread = f" ({found[0]:.1%} to {found[-1]:.1%})" if len(found) > 1 else ""
        size, share = (statistics.median(point[key] for point in seeds) for key in ("parameters", "share"))
        rows.append(
            [name, f"{size:,.0f}", f"{share:.1%}", f"{statistics.median(found):.1%}{spread}", str(len(found))]
        )  # fmt: skip
    return table(["", "parameters", "share", "accuracy", "seeds"], rows)


def students() -> str:
    """Losses for masked tokens on the way, and accuracy after fine-tuning: of several seeds, medians."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results("minialbert-cpu")["rows"]:
        if "accuracy" in row:
            asked = row.get("asked", {}).values()
            found.setdefault((row["row"], row.get("width"), *asked), []).append(row)
    rows = [_student(seeds) for seeds in found.values()]
    titles = [
        "teacher", "model", "adapters", "parameters", "rate", "weight of masked tokens", "fine-tuned at",
        "steps: loss for masked tokens", "SST-2", "processor seconds", "seeds",
    ]  # fmt: skip
    return table(titles, rows)


def _student(seeds: list[dict[str, Any]]) -> list[str]:
    first = seeds[0]
    teacher, model, *rest = first["row"].split()
    asked, curves = first.get("asked", {}), [row["curve"] for row in seeds if "curve" in row]
    steps = {point["step"]: statistics.median(curve[n]["mlm"] for curve in curves)
             for n, point in enumerate(first.get("curve", []))}  # fmt: skip
    losses = ", ".join(f"{step}: {loss:.2f}" for step, loss in steps.items())
    accuracies = sorted(row["accuracy"] for row in seeds)
    spread = f" ({accuracies[0]:.1%} to {accuracies[-1]:.1%})" if len(seeds) > 1 else ""
    seconds = [row["processor_seconds"] for row in seeds if "processor_seconds" in row]
    names = {"fusion": f"FFNs of {first.get('width', 0):g}", "itself": "itself"}
    adapters = ("without" if "bare" in rest else "with") if asked else ""
    rates = [f"{asked[name]:g}" if asked else "" for name in ("rate", "mlm_weight", "tuning_rate")]
    return [
        teacher, names.get(model, f"start: {model}"), adapters, f"{first['classifier_parameters']:,}", *rates,
        losses or (f"{first['mlm']:.2f}" if "mlm" in first else ""), f"{statistics.median(accuracies):.1%}{spread}",
        f"{statistics.median(seconds):.0f}" if seconds else "", str(len(seeds)),
    ]  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "companions-sst2": lambda: companions("full", 1),
    "companions-sst2-fused": lambda: companions("quarter", 1),
    "companions-sst2-fused-longer": lambda: companions("quarter", 3),
    "intrinsic": intrinsic,
    "squeezing": squeezing,
    "minialbert": students,
}
