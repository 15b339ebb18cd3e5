"""`compress`: a checkpoint in, a fused checkpoint out."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlp_fusion.architectures import get_architecture
from mlp_fusion.checkpoint.metadata import FUSION_KEY, REFERENCE_FILE, REPORT_FILE, side_path
from mlp_fusion.checkpoint.plan import FusionPlan, plan
from mlp_fusion.checkpoint.source import companion_files, local_folder, read_config, weight_files
from mlp_fusion.checkpoint.text import compare_embeddings, embed, read_sentences, tokenize
from mlp_fusion.errors import InputError
from mlp_fusion.fusing import Progress, fuse
from mlp_fusion.measure import FusionReport, random_batch
from mlp_fusion.selection import Layers, Width, parameterization_for

#: Tokens of the random sequence whose outputs travel with the checkpoint for `verify`.
_REFERENCE_TOKENS = 16


def compress(
    path: str | Path,
    out: str | Path,
    width: Width,
    layers: Layers = None,
    method: str = "fusion",
    *,
    optimizer: str | None = "adamw",
    seed: int = 0,
    text: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> FusionReport:
    """Fuse a checkpoint's FFNs and write the result as a plain checkpoint.

    The output holds the same tensors as the input, narrower; the input's own config with its widths changed; the
    tokenizer and other small files; a model card; and, in the subfolder `mlp_fusion`, the scale that `restore` needs,
    the report, and the outputs that `verify` compares with. It appears under its name only when it is complete.

    Args:
        path: a local folder or a hub name.
        out: folder to make; must not exist, or be empty.
        width, layers, method, optimizer, seed: as in :func:`mlp_fusion.fuse`.
        text: file of sentences, one a line, that errors are measured on; None for the package's own.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for CUDA when there is one.
        progress: called as `progress(done, total)` while FFNs are worked on.

    Returns:
        The report of `fuse`, with the cosines of sentence embeddings where the model has a tokenizer.

    Raises:
        InputError: as `plan`, or the output folder is not empty, the text cannot be read, or there is no such device.
            Nothing is written.
    """
    out = Path(out)
    check_output(out)
    torch_device = resolve_device(device)
    sentences = read_sentences(None if text is None else Path(text))
    parameterization_for(optimizer)
    planned = plan(path, width, layers)
    folder = local_folder(path)
    config = read_config(folder)

    model, absent = _load(folder, config)
    model.to(torch_device)
    positions = getattr(config, "max_position_embeddings", None)
    batches = tokenize(folder, sentences, positions)
    originals = None if batches is None else embed(model, batches)
    chosen = [ffn.layer for ffn in planned.ffns if ffn.chosen]
    report = fuse(
        model, width, chosen, method, optimizer=optimizer, seed=seed, sample=batches, progress=progress
    )  # fmt: skip
    changes: dict[str, Any] = {}
    if batches is not None and originals is not None:
        changes["embeddings"] = compare_embeddings(embed(model, batches), originals)
        changes["sample"] = "the package's sentences" if text is None else Path(text).name
    report = FusionReport(**{**report.__dict__, **changes})

    with _appears_when_complete(out) as staging:
        # Weights that the loader made up, because the checkpoint has none, are not passed off as its own; those that
        # the model class passes over are carried along.
        state = {k: v for k, v in model.state_dict().items() if k not in absent}
        state.update(_passed_over(folder, set(state)))
        model.save_pretrained(staging, state_dict=state)
        _write_config(folder, staging, model.config)
        for file in companion_files(folder):
            target = staging / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)
        reference = {k: v.cpu().contiguous() for k, v in reference_outputs(model, seed).items()}
        save_file(reference, side_path(staging, REFERENCE_FILE))
        side_path(staging, REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        _write_card(staging, planned, report)
    return report


def check_output(out: Path) -> None:
    """Raise InputError unless `out` can be made, or is an empty folder."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty: choose another folder or empty it")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another folder")


def resolve_device(device: str) -> torch.device:
    """`auto` becomes CUDA where there is one.

    Raises:
        InputError: not a device, or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r}: use auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r}: use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def model_class(config: Any) -> Any:
    """The transformers class that the checkpoint was saved from, so that no head is lost."""
    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


@torch.no_grad()
def reference_outputs(model: Any, seed: int) -> dict[str, Tensor]:
    """Outputs of `model` on one random sequence: `input_ids` and `output` (logits, or the last hidden state)."""
    batch = random_batch(model, seed=seed, batch=1, length=_REFERENCE_TOKENS)
    return {"input_ids": batch["input_ids"], "output": model_output(model, batch["input_ids"])}


@torch.no_grad()
def model_output(model: Any, input_ids: Tensor) -> Tensor:
    """The logits of `model`, or its last hidden state where it has no head; float32 on the CPU."""
    training = model.training
    outputs = model.eval()(input_ids=input_ids.to(next(model.parameters()).device))
    model.train(training)
    tensor: Tensor = outputs.logits if "logits" in outputs else outputs[0]
    return tensor.float().cpu()


def _load(folder: Path, config: Any) -> tuple[Any, set[str]]:
    """The model in its own dtype, and the names of weights that the checkpoint lacks."""
    loaded = model_class(config).from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    model, info = loaded
    if info.get("mismatched_keys"):
        name, stored, stated = min(info["mismatched_keys"])
        raise InputError(f"{folder}: {name} is {tuple(stored)}, but config.json makes it {tuple(stated)}")
    return model.eval(), set(info["missing_keys"])


def _passed_over(folder: Path, loaded: set[str]) -> dict[str, Tensor]:
    """Tensors of the checkpoint that the model class has no place for."""
    extra: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                if name not in loaded:
                    extra[name] = handle.get_tensor(name)
    return extra


def _write_config(source: Path, target: Path, fused: Any) -> None:
    """The source's own config.json with the widths changed: rewriting it would rename keys that old readers need."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    described = fused.to_dict()
    architecture = get_architecture(fused.model_type)
    for key in (architecture.width_key, "per_layer_config", FUSION_KEY):
        if described.get(key) is not None:
            config[key] = described[key]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_card(folder: Path, planned: FusionPlan, report: FusionReport) -> None:
    data = ModelCardData(
        base_model=planned.name if "/" in planned.name and not Path(planned.name).exists() else None,
        library_name="transformers",
        tags=["mlp-fusion"],
    )
    body = (
        f"# Fused {planned.model_type}\n\nFeed-forward layers shrunk by `mlp-fusion` (method `{report.method}`, seed "
        f"{report.seed}). Fine-tune before use. Loads in {planned.loads_in}.\n\n```\n{report.table()}\n```\n\n"
        "To go on training with the parameterization that it was fused for: load it, then "
        "`mlp_fusion.restore(model, folder)`.\n"
    )
    (folder / "README.md").write_text(
        str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")), encoding="utf-8"
    )  # fmt: skip


@contextmanager
def _appears_when_complete(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or vanishes on any error or interrupt."""
    staging = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir(parents=True)
    try:
        yield staging
        # A rename replaces an empty folder in one step, and fails if the folder has been filled in the meantime.
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging)
        raise
