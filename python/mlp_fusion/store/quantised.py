"""Quantised originals that transformers can read as plain weights: FP8 in blocks, and MXFP4.

They are read dequantised, reduced, and written in the model's dtype under the names of the unquantised original.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlp_fusion.errors import InputError

#: Method -> the class in transformers that reads it, and what quantised tensors' names end in: the values (which may be
#: nothing) and what they are multiplied with.
_READABLE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fp8": ("FineGrainedFP8Config", "", ("_scale_inv", ".activation_scale")),
    "mxfp4": ("Mxfp4Config", "_blocks", ("_scales",)),
}


def quantisation(config: Any) -> str | None:
    """The method by which the weights of a checkpoint are quantised, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found.quant_method
    return str(getattr(method, "value", method))


def check_readable(config: Any) -> None:
    """Raise InputError if the weights are quantised in a way that cannot be read as plain ones."""
    method = quantisation(config)
    if method is not None and method not in _READABLE:
        raise InputError(
            f"the weights are quantised ({method}): start from the unquantised checkpoint, or one in "
            f"{' or '.join(_READABLE)}"
        )


def reading_options(config: Any) -> dict[str, Any]:
    """What `from_pretrained` has to be told to read the weights as plain ones.

    Raises:
        InputError: accelerate, which transformers needs for it, is not installed.
    """
    method = quantisation(config)
    if method is None:
        return {}
    import transformers
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise InputError("quantised weights are read with accelerate: pip install accelerate")
    found = config.quantization_config
    said = dict(found) if isinstance(found, Mapping) else found.to_dict()
    size = {"weight_block_size": tuple(said["weight_block_size"])} if said.get("weight_block_size") else {}
    return {"quantization_config": getattr(transformers, _READABLE[method][0])(dequantize=True, **size)}


def forget(model: Any) -> None:
    """Make a model that was read dequantised a plain one, that is saved under the names of the unquantised original."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    # The conversions that it was read by have no way back; those of its class have.
    model._weight_conversions = get_model_conversion_mapping(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def plain_names(config: Any, names: Iterable[str]) -> dict[str, str]:
    """Name of a tensor on disk -> that of the unquantised one that it is a part of."""
    method = quantisation(config)
    names = list(names)
    if method is None:
        return {name: name for name in names}
    _, values, factors = _READABLE[method]
    return {name: _plain(name, values, factors) for name in names}


def _plain(name: str, values: str, factors: tuple[str, ...]) -> str:
    for ending in factors:
        if name.endswith(ending):
            found = name.removesuffix(ending)
            return f"{found}.weight" if ending.startswith(".") else found
    return name.removesuffix(values) if values else name


def unpacked(blocks: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor whose MXFP4 values, two in a byte, are `(..., rows, groups, 16)` bytes."""
    *before, rows, groups, packed = blocks
    return (*before, groups * packed * 2, rows)
