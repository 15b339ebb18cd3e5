"""A checkpoint as a model, and the outputs by which `verify` knows it again."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.errors import InputError, named
from mlp_fusion.families import building
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.drawing import random_batch, random_text
from mlp_fusion.running.runner import Runner, not_finite, seeded
from mlp_fusion.store.quantised import forget, quantisation, reading_options
from mlp_fusion.store.weights import COMPUTING, TensorInfo, widest_dtype

#: Tokens of the random text whose outputs travel with the checkpoint for `verify`.
_REFERENCE_TOKENS = 16
#: What stands before the names of inputs that are not `input_ids` alone: outputs may have the same names.
_INPUT = "inputs."
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTING.values()}


def compute_dtype(ffns: Container[str], tensors: Mapping[str, TensorInfo], asked: str | None = None) -> torch.dtype:
    """The dtype that a checkpoint's model runs in: that of its tensors, whatever its config says, or a wider one.

    `ffns` are the names of tensors of FFNs.

    Of tensors in several dtypes the least that holds all matrices, and all of FFNs, which are written anew. Single
    vectors in a wider one (layer norms, old buffers of rotary frequencies) are not worth twice the memory.

    Raises:
        InputError: `asked` is no dtype that models run in, or cannot hold the tensors as they are.
    """
    least = widest_dtype({n: t for n, t in tensors.items() if len(t.shape) > 1 or n in ffns})
    if asked is None or asked == "auto":
        return least
    if asked not in _DTYPES:
        raise InputError(f"dtype {asked!r}: use auto, {', '.join(sorted(_DTYPES))}")
    if torch.promote_types(_DTYPES[asked], least) != _DTYPES[asked]:
        raise InputError(f"dtype {asked} would round the checkpoint's weights: use {str(least)[6:]} or a wider one")
    return _DTYPES[asked]


def wide_patterns(model: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """Patterns of the parameters that transformers keeps in float32 in a model of `dtype`."""
    strict = model._keep_in_fp32_modules_strict or () if dtype in (torch.float16, torch.bfloat16) else ()
    return (*sorted(strict), *sorted((model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()))


def stays_wide(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter is one of those."""
    return any(re.search(rf"(^|\.){words}(\.|$)", name) for words in patterns)


def load_checkpoint(folder: Path, config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model in `folder`, in evaluation mode and dequantised, and what transformers says of its tensors.

    What the checkpoint lacks, such as a head, is drawn, each time the same.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        with seeded(0):
            model, info = building.model_class(config).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True, **experts_options(dtype),
                **reading_options(config),
            )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # whatever a config of somebody else's makes of transformers' code
        raise InputError(f"{folder}: transformers cannot load it ({named(error, 300)})") from error
    if quantisation(config) is not None:
        forget(model)
    return model.eval(), info


def experts_options(dtype: torch.dtype) -> dict[str, str]:
    """What models of `dtype` have to be told to run their experts: torch's grouped products know no float64."""
    return {"experts_implementation": "eager"} if dtype == torch.float64 else {}


def reference_outputs(model: Any, seed: int, *, head: bool, text: bool = False) -> dict[str, Tensor]:
    """Random inputs of one sample, by the names that :func:`split_reference` knows, and the outputs for them.

    Args:
        model: it.
        seed: of the inputs.
        head: as of :func:`model_outputs`.
        text: text will do where nothing that the model takes besides can be guessed.

    Raises:
        InputError: there is no guess at what it takes, it cannot run on it, or its outputs are not finite.
    """
    try:
        inputs = random_batch(model, seed=seed, batch=1, length=_REFERENCE_TOKENS)
    except InputError:
        if not text:
            raise
        inputs = random_text(model, seed=seed, batch=1, length=_REFERENCE_TOKENS)
    if _is_text(inputs):
        inputs = {"input_ids": inputs["input_ids"]}
    outputs = model_outputs(model, inputs, head=head)
    for name, tensor in outputs.items():
        if not bool(tensor.isfinite().all()):
            raise not_finite(f"the model's {name.replace('_', ' ')}", model.dtype)
    if _is_text(inputs):
        return {**inputs, **outputs}
    return {**{f"{_INPUT}{name}": tensor for name, tensor in inputs.items()}, **outputs}


def split_reference(reference: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of a reference file by the model's own names, and the outputs: `input_ids` alone, or `inputs.NAME`."""
    inputs = {name.removeprefix(_INPUT): t for name, t in reference.items() if name.startswith(_INPUT)}
    if not inputs:
        inputs = {"input_ids": reference["input_ids"]}
        return inputs, {name: tensor for name, tensor in reference.items() if name != "input_ids"}
    return inputs, {name: tensor for name, tensor in reference.items() if not name.startswith(_INPUT)}


def _is_text(inputs: Mapping[str, Tensor]) -> bool:
    return inputs.keys() <= {"input_ids", "attention_mask"}


@torch.no_grad()
def model_outputs(model: Any, inputs: Tensor | Batch, *, head: bool) -> dict[str, Tensor]:
    """What `model` puts out for a batch, or for token ids alone; float32 on the CPU.

    Logits of any kind (`logits`, `start_logits`), `last_hidden_state` where there are none or `head` is False, or
    whatever tensors there are. A head that the checkpoint has no weights for is drawn anew on every load: there is
    nothing to compare.

    Raises:
        InputError: it cannot run on them.
    """
    batch = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if head and type(model).__name__.endswith("ForMultipleChoice"):
        batch = {name: tensor.unsqueeze(1) for name, tensor in batch.items()}  # a single choice
    with Runner(model, "token ids alone" if batch.keys() == {"input_ids"} else "random inputs") as runner:
        outputs = (runner.whole if head else runner.base)(batch)
    tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.ndim > 0}
    logits = [name for name in tensors if name.endswith("logits")]
    names = logits or [name for name in tensors if name == "last_hidden_state"] or list(tensors)
    if not names:
        raise InputError(f"{type(model).__name__} puts out no tensor to compare: load and fuse its base model")
    # Files hold no two views of one tensor (CLIP's logits of images and of texts).
    return {name: tensors[name].float().cpu().clone(memory_format=torch.contiguous_format) for name in names}
