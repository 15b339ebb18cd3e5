"""The rows of `llm.py`: which methods, in which form, at which widths; and how one is carried out."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import mlp_fusion
from mlp_fusion.calibration import collect, refit
from mlp_fusion.choices import AUTOMATIC_STEPS, KEEP_WIDTH, METHODS
from mlp_fusion.families.exchange import install
from mlp_fusion.methods import get_method
from mlp_fusion.methods.fusion import importance
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.chosen import ChosenFFNs
from mlp_fusion.reducing.every import reduce_chosen
from mlp_fusion.reducing.learning import learn
from mlp_fusion.running.batches import Batch
from mlp_fusion.settings import FuseSettings

SHARES = (0.75, 0.625, 0.5)
#: What widths by layer are a multiple of.
MULTIPLE = 8
#: Tokens that the model writes itself, where there is no text: as many as there are of text otherwise.
SYNTHETIC = 16_384
#: Refit and sequential calibration: as it is, each alone, and both.
PLAIN, REFIT, SEQUENTIAL, BOTH = (False, False), (True, False), (False, True), (True, True)


@dataclass(frozen=True)
class Recipe:
    """A method, and the forms that are measured.

    Attributes:
        method: as `fuse` calls it.
        forms: of `PLAIN`, `REFIT`, `SEQUENTIAL` and `BOTH`.
        options: others of `fuse`.
        widths: `even`; `flap`, by FLAP's standardised scores; or `auto`, by this project's own.
        bias: FFNs without output bias get one that makes up for what is dropped, as FLAP does it: `PLAIN` only.
        streamed: from disk to disk, by `compress`, with the calibration as text.
        text: it learns from the blocks, or does without.
    """

    method: str
    forms: tuple[tuple[bool, bool], ...]
    options: dict[str, Any] = field(default_factory=dict)
    widths: str = "even"
    bias: bool = False
    streamed: bool = False
    text: bool = True


#: Label -> recipe. Methods that fit their output weights themselves have a sequential form without the refit, too.
RECIPES = {
    "random": Recipe("random", (PLAIN, REFIT, BOTH)),
    "magnitude": Recipe("magnitude", (PLAIN, REFIT, BOTH)),
    "published": Recipe("published", (PLAIN, REFIT, BOTH)),
    "svd": Recipe("svd", (PLAIN, REFIT)),
    "slice": Recipe("slice", (PLAIN, REFIT)),
    "wanda": Recipe("wanda", (PLAIN, REFIT, BOTH)),
    "2ssp": Recipe("twossp", (PLAIN, REFIT, BOTH)),
    "flap": Recipe("prune", (PLAIN,), bias=True),
    "flap by layer": Recipe("prune", (PLAIN,), widths="flap", bias=True),
    "prune": Recipe("prune", (PLAIN, REFIT, BOTH)),
    "prune by layer": Recipe("prune", (BOTH,), widths="auto"),
    "prune trained": Recipe("prune", (BOTH,), {"tune_steps": AUTOMATIC_STEPS}),
    "2ssp by layer": Recipe("twossp", (BOTH,), widths="auto"),
    "2ssp trained": Recipe("twossp", (BOTH,), {"tune_steps": AUTOMATIC_STEPS}),
    "fasp": Recipe("fasp", (PLAIN, REFIT, SEQUENTIAL, BOTH)),
    "obs": Recipe("obs", (PLAIN, REFIT, SEQUENTIAL, BOTH)),
    "osscar": Recipe("osscar", (PLAIN, REFIT, SEQUENTIAL, BOTH)),
    "select": Recipe("select", (PLAIN, REFIT, SEQUENTIAL, BOTH)),
    "fusion": Recipe("fusion", (PLAIN, REFIT, BOTH)),
    "merge": Recipe("merge", (REFIT, BOTH)),
    "auto": Recipe("auto", (BOTH,)),
    "auto tuned": Recipe("auto", (BOTH,), {"tune_steps": 400}),
    "auto by layer": Recipe("auto", (BOTH,), widths="auto"),
    "auto streamed": Recipe("auto", (BOTH,), streamed=True),
    "auto by layer streamed": Recipe("auto", (BOTH,), widths="auto", streamed=True),
    "fusion streamed": Recipe("fusion", (REFIT,), streamed=True),
    "auto without text": Recipe("auto", (PLAIN,), text=False),
    "auto synthetic": Recipe("auto", (BOTH,), {"synthetic": SYNTHETIC}, text=False),
    "prune synthetic": Recipe("prune", (BOTH,), {"synthetic": SYNTHETIC}, text=False),
    "2ssp synthetic": Recipe("twossp", (BOTH,), {"synthetic": SYNTHETIC}, text=False),
}


@dataclass(frozen=True)
class Row:
    """One way to shrink the model.

    Attributes:
        label: the method as tables call it.
        recipe: of `RECIPES`; None for the full model.
        share: of the FFNs' parameters.
        refit, sequential: options of `fuse`.
        seed: of the method, and of the blocks that are calibrated on.
    """

    label: str
    recipe: Recipe | None
    share: float = 1.0
    refit: bool = False
    sequential: bool = False
    seed: int = 0

    @property
    def form(self) -> str:
        """What it is, whatever the seed."""
        if self.recipe is None:
            return self.label
        parts = [f"{self.share:g}", self.label]
        parts += [word for word, said in (("refit", self.refit), ("sequential", self.sequential)) if said]
        return " ".join(parts)

    @property
    def name(self) -> str:
        """What `--rows` matches, and what a row is recognised by."""
        return self.form if self.recipe is None else f"{self.form} seed {self.seed}"


def all_rows(seeds: int) -> list[Row]:
    """The full model, and at each width every recipe in every form, for each seed."""
    shrunk = [
        Row(label, recipe, share, refitted, sequential, seed)
        for share in SHARES
        for seed in range(seeds)
        for label, recipe in RECIPES.items()
        for refitted, sequential in recipe.forms
    ]
    return [Row("full", None), *shrunk]


def shrink(model: nn.Module, row: Row, calibration: Sequence[Batch]) -> list[int]:
    """Do to `model` what `row` says; the neurons that each FFN keeps, or is as large as."""
    recipe = row.recipe
    assert recipe is not None
    if recipe.method in KEEP_WIDTH or recipe.bias:
        return _in_place(model, row, recipe, calibration)
    options = {"refit": row.refit, "sequential": row.sequential, "seed": row.seed, "optimizer": None, **recipe.options}
    if recipe.widths == "flap":
        return _by_scores(model, row, recipe.method, calibration, options)
    width: dict[str, Any] = {"width": _count(model, row.share)}
    if recipe.widths == "auto":
        width = {"width": "auto", "budget": row.share}
    if recipe.streamed:
        return _from_disk(model, recipe.method, calibration, {**width, **options})
    # Time and memory are those of the method: what needs no text does not run over it.
    blind = not recipe.text or (not row.refit and METHODS[recipe.method].text == "unused")
    known = None if blind else list(calibration)
    mlp_fusion.fuse(model, method=recipe.method, calibration=known, **width, **options)
    return _widths(model)


def _from_disk(model: Any, method: str, calibration: Sequence[Batch], options: dict[str, Any]) -> list[int]:
    """As `shrink`, by `compress`, which reads files: of the blocks as text, that is."""
    folder = Path(model.name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(block) for batch in calibration for block in batch["input_ids"]]
    with tempfile.TemporaryDirectory() as place:
        out, file = Path(place) / "out", Path(place) / "text.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        mlp_fusion.compress(folder, out, method=method, calibration=file, stream=True, **options)
        made = type(model).from_pretrained(out)
    for name, child in made.named_children():
        setattr(model, name, child)
    return _widths(model)


def _widths(model: nn.Module) -> list[int]:
    """The neurons of every FFN of a model of the Llama shape, also of those that a budget has left whole."""
    return [p.shape[0] for name, p in model.named_parameters() if name.endswith("up_proj.weight")]


def _count(model: Any, share: float) -> int:
    """Neurons: `fuse` rounds shares to a coarser grid."""
    return round(share * model.config.intermediate_size)


def _in_place(model: nn.Module, row: Row, recipe: Recipe, calibration: Sequence[Batch]) -> list[int]:
    """What `fuse` has no place for: the width kept, whose parameters are those of narrower FFNs, or a bias added."""
    ffns = ChosenFFNs.find(model, None)
    known = collect(model, ffns.architecture, ffns.sites, list(calibration), seed=row.seed)
    widths = [_count(model, row.share)] * len(ffns.sites)
    if recipe.widths == "flap":
        widths = standardised_widths(importance(NeuronBundle.stack(ffns.originals), known), row.share)
    method = get_method(recipe.method)
    for site, bundle, statistics, width in zip(ffns.sites, ffns.originals, known, widths, strict=True):
        if recipe.bias and bundle.b_out is None:
            bundle = dataclasses.replace(bundle, b_out=torch.zeros_like(bundle.w_out[:, 0]))
        bundle = method(bundle, width, seed=row.seed, statistics=[statistics]).bundle
        bundle = refit(bundle, statistics).bundle if row.refit else bundle
        fused: Any = install(site, dataclasses.replace(bundle, b_out=None) if recipe.bias else bundle, "folded")
        if recipe.bias:  # a projection of the model's own kind has no place for it until now
            fused.projection("w_out").bias = nn.Parameter(bundle.b_out[0])
    return widths


def _by_scores(
    model: nn.Module, row: Row, method: str, calibration: Sequence[Batch], options: dict[str, Any]
) -> list[int]:
    """As `fuse` does, with the widths of :func:`standardised_widths`."""
    asked = FuseSettings(width=_count(model, row.share), method=method, layers=None, **options)
    ffns = ChosenFFNs.find(model, None)
    settings = asked.resolved([site.index for site in ffns.sites], calibrated=True)
    known = collect(model, ffns.architecture, ffns.sites, list(calibration), seed=row.seed)
    widths = standardised_widths(importance(NeuronBundle.stack(ffns.originals), known), row.share)
    del known  # it is gathered again, and would stand beside itself
    learnt = learn(ffns, settings, list(calibration), None)
    ffns.install(reduce_chosen(ffns, settings, widths, learnt), settings)
    return widths


def standardised_widths(scores: Tensor, share: float, multiple: int = MULTIPLE) -> list[int]:
    """Widths by layer as FLAP has them: one threshold for all scores, each less the mean of its layer, in deviations.

    Args:
        scores: `(L, N)` of the neurons of L FFNs.
        share: of all neurons that are kept.
        multiple: what each width is to be a multiple of. Widths are rounded down, one of it at least; what is left of
            the budget goes to those that lost most by that.

    Returns:
        L widths, `share * L * N` together or less by less than `multiple`.

    Source: FLAP (arXiv 2312.11983), adaptive structure search, over FFNs alone.
    """
    L, N = scores.shape
    wide = scores.double()
    deviation = wide.std(dim=1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    standard = (wide - wide.mean(dim=1, keepdim=True)) / deviation
    kept = standard.flatten().topk(math.floor(share * L * N)).indices
    wanted = torch.bincount(kept // N, minlength=L).tolist()
    widths = [max(multiple, count // multiple * multiple) for count in wanted]
    left = math.floor(share * L * N) - sum(widths)
    for n in sorted(range(L), key=lambda n: widths[n] - wanted[n]):
        if left >= multiple and widths[n] + multiple <= N:
            widths[n] += multiple
            left -= multiple
    while left < 0:  # layers that would have nothing got the least there is
        widths[widths.index(max(widths))] -= multiple
        left += multiple
    return widths
