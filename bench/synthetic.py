"""Checkpoints of Mixture-of-Experts models with their published layout on disk, random weights, and few layers.

    python bench/synthetic.py qwen3-30b-a3b --layers 2 --out DIR [--vocab 4096] [--set KEY=VALUE ...]
    python bench/synthetic.py deepseek-v3 --layers 2 --quantised --mtp --out DIR

Names, dtypes and shapes of tensors, their order within a shard, the names of the shards and the config are those of the
published checkpoint. There are as many layers as asked for, and the vocabulary may be small. `--set` changes any other
entry of the config. Of a few layers of deepseek-v3 all but the last may be dense: `--set first_k_dense_replace=N` says
how many. `--quantised` writes what deepseek-v3 (FP8 in blocks) and gpt-oss-20b (MXFP4) are published as; without, it is
bfloat16. `--mtp` adds DeepSeek's layer for multi-token prediction.

Every weight is drawn by itself, so that clustering finds no structure. Memory stays below some 200 MB, whatever the
size of a tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: Most bytes of a shard, and how many shards there are at least.
SHARD_BYTES, LEAST_SHARDS = 4_000_000_000, 3
#: Entries drawn at a time. Another number gives other weights.
_CHUNK = 1 << 24
#: Of all weights but norms; FP8 values are this, times what makes the most of their range.
_STD, _FP8_GAIN = 0.02, 4000.0
_FP8_BLOCK = 128
#: Name in a safetensors header and dtype of torch, in the order in which the library sorts tensors: widest first.
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        name, shape: as in the file.
        dtype: as a safetensors header says it.
        kind: how it is filled: `weight`, `norm`, `blocks` and `scales` (of MXFP4), or `factors` (of FP8).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    kind: str = "weight"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


#: What a checkpoint may be: the config, whether quantised, and whether with layers for multi-token prediction.
Tensors = Callable[[Mapping[str, Any]], Iterator[Stored]]


@dataclass(frozen=True)
class Layout:
    """A published checkpoint: its config, and the tensors that it then has, layer by layer.

    Attributes:
        config: as published, in bfloat16.
        tensors: of a config.
        quantisation: what the config says of the quantised form, or None if there is none.
    """

    config: dict[str, Any]
    tensors: Tensors
    quantisation: dict[str, Any] | None = None


def _around(config: Mapping[str, Any], layers: Iterable[Stored]) -> Iterator[Stored]:
    """The layers between the embeddings and the head."""
    vocabulary = (config["vocab_size"], config["hidden_size"])
    yield Stored("model.embed_tokens.weight", vocabulary)
    yield from layers
    yield Stored("model.norm.weight", (config["hidden_size"],), kind="norm")
    yield Stored("lm_head.weight", vocabulary)


def _norms(at: str, hidden: int) -> Iterator[Stored]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Stored(f"{at}.{name}.weight", (hidden,), kind="norm")


def _grouped_query(at: str, config: Mapping[str, Any], *, bias: bool = False) -> Iterator[Stored]:
    """Attention whose queries share keys and values."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    of_head = config.get("head_dim") or hidden // heads
    outputs = {"q": heads, "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    for name, count in outputs.items():
        yield Stored(f"{at}.{name}_proj.weight", (count * of_head, hidden))
        if bias:
            yield Stored(f"{at}.{name}_proj.bias", (count * of_head,))
    yield Stored(f"{at}.o_proj.weight", (hidden, heads * of_head))
    if bias:
        yield Stored(f"{at}.o_proj.bias", (hidden,))


def _gated(at: str, hidden: int, width: int, names: tuple[str, str, str]) -> Iterator[Stored]:
    """A gated FFN, with the names of its gate, up and down projections."""
    for name, shape in zip(names, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
        yield Stored(f"{at}.{name}.weight", shape)


_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def _qwen3_moe(config: Mapping[str, Any]) -> Iterator[Stored]:
    def layers() -> Iterator[Stored]:
        hidden, experts = config["hidden_size"], config["num_experts"]
        for n in range(config["num_hidden_layers"]):
            at = f"model.layers.{n}"
            yield from _grouped_query(f"{at}.self_attn", config)
            for name in ("q_norm", "k_norm"):
                yield Stored(f"{at}.self_attn.{name}.weight", (config["head_dim"],), kind="norm")
            yield Stored(f"{at}.mlp.gate.weight", (experts, hidden))
            for e in range(experts):
                yield from _gated(f"{at}.mlp.experts.{e}", hidden, config["moe_intermediate_size"], _GATE_UP_DOWN)
            yield from _norms(at, hidden)

    return _around(config, layers())


def _mixtral(config: Mapping[str, Any]) -> Iterator[Stored]:
    def layers() -> Iterator[Stored]:
        hidden, experts = config["hidden_size"], config["num_local_experts"]
        for n in range(config["num_hidden_layers"]):
            at = f"model.layers.{n}"
            yield from _grouped_query(f"{at}.self_attn", config)
            yield Stored(f"{at}.block_sparse_moe.gate.weight", (experts, hidden))
            for e in range(experts):
                expert = f"{at}.block_sparse_moe.experts.{e}"
                yield from _gated(expert, hidden, config["intermediate_size"], ("w1", "w3", "w2"))
            yield from _norms(at, hidden)

    return _around(config, layers())


def _latent(at: str, config: Mapping[str, Any]) -> Iterator[Stored]:
    """DeepSeek's attention, whose queries, keys and values come from short vectors."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    queries, keys, turned = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, values = config["qk_nope_head_dim"], config["v_head_dim"]
    yield Stored(f"{at}.q_a_proj.weight", (queries, hidden))
    yield Stored(f"{at}.q_a_layernorm.weight", (queries,), kind="norm")
    yield Stored(f"{at}.q_b_proj.weight", (heads * (plain + turned), queries))
    yield Stored(f"{at}.kv_a_proj_with_mqa.weight", (keys + turned, hidden))
    yield Stored(f"{at}.kv_a_layernorm.weight", (keys,), kind="norm")
    yield Stored(f"{at}.kv_b_proj.weight", (heads * (plain + values), keys))
    yield Stored(f"{at}.o_proj.weight", (hidden, heads * values))


def _deepseek_layer(at: str, config: Mapping[str, Any], *, dense: bool) -> Iterator[Stored]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield from _latent(f"{at}.self_attn", config)
    if dense:
        yield from _gated(f"{at}.mlp", hidden, config["intermediate_size"], _GATE_UP_DOWN)
    else:
        experts = config["n_routed_experts"]
        yield Stored(f"{at}.mlp.gate.weight", (experts, hidden))
        yield Stored(f"{at}.mlp.gate.e_score_correction_bias", (experts,), "F32")
        for e in range(experts):
            yield from _gated(f"{at}.mlp.experts.{e}", hidden, width, _GATE_UP_DOWN)
        yield from _gated(f"{at}.mlp.shared_experts", hidden, width * config["n_shared_experts"], _GATE_UP_DOWN)
    yield from _norms(at, hidden)


def _deepseek_v3(config: Mapping[str, Any]) -> Iterator[Stored]:
    """The layers for multi-token prediction come last, as in the published file, and repeat embeddings and head."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    dense = config["first_k_dense_replace"]
    yield from _around(
        config, (t for n in range(layers) for t in _deepseek_layer(f"model.layers.{n}", config, dense=n < dense))
    )
    for n in range(layers, layers + config["num_nextn_predict_layers"]):
        at = f"model.layers.{n}"
        yield Stored(f"{at}.embed_tokens.weight", (config["vocab_size"], hidden))
        for name in ("enorm", "hnorm"):
            yield Stored(f"{at}.{name}.weight", (hidden,), kind="norm")
        yield Stored(f"{at}.eh_proj.weight", (hidden, 2 * hidden))
        yield from _deepseek_layer(at, config, dense=False)
        yield Stored(f"{at}.shared_head.norm.weight", (hidden,), kind="norm")
        yield Stored(f"{at}.shared_head.head.weight", (config["vocab_size"], hidden))


def _gpt_oss(config: Mapping[str, Any]) -> Iterator[Stored]:
    """Experts in one tensor a projection, transposed; gate and up projection alternate, column by column."""

    def layers() -> Iterator[Stored]:
        hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
        for n in range(config["num_hidden_layers"]):
            at = f"model.layers.{n}"
            yield from _grouped_query(f"{at}.self_attn", config, bias=True)
            yield Stored(f"{at}.self_attn.sinks", (config["num_attention_heads"],))
            yield Stored(f"{at}.mlp.router.weight", (experts, hidden))
            yield Stored(f"{at}.mlp.router.bias", (experts,))
            for name, inputs, outputs in (("gate_up_proj", hidden, 2 * width), ("down_proj", width, hidden)):
                yield Stored(f"{at}.mlp.experts.{name}", (experts, inputs, outputs))
                yield Stored(f"{at}.mlp.experts.{name}_bias", (experts, outputs))
            yield from _norms(at, hidden)

    return _around(config, layers())


def _fp8(tensor: Stored, block: int) -> Iterator[Stored]:
    """What is published of a tensor of DeepSeek's: the projections of layers in FP8, each with a factor for a block."""
    kept = ("embed_tokens", "lm_head", ".head.", "eh_proj", ".gate.", "norm")
    if any(part in tensor.name for part in kept) or len(tensor.shape) != 2:
        yield tensor
        return
    yield Stored(tensor.name, tensor.shape, "F8_E4M3")
    blocks = (-(-tensor.shape[0] // block), -(-tensor.shape[1] // block))
    yield Stored(f"{tensor.name}_scale_inv", blocks, "F32", "factors")


def _mxfp4(tensor: Stored) -> Iterator[Stored]:
    """What is published of a tensor of gpt-oss: the experts in MXFP4, whose rows are those of the product."""
    if len(tensor.shape) != 3:
        yield tensor
        return
    experts, inputs, outputs = tensor.shape
    groups = (experts, outputs, inputs // 32)
    yield Stored(f"{tensor.name}_blocks", (*groups, 16), "U8", "blocks")
    yield Stored(f"{tensor.name}_scales", groups, "U8", "scales")


_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}

LAYOUTS: dict[str, Layout] = {
    "qwen3-30b-a3b": Layout(
        {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "decoder_sparse_step": 1,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
            "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        _qwen3_moe,
    ),
    "mixtral-8x7b": Layout(
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
            "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
            "vocab_size": 32000,
        },
        _mixtral,
    ),
    "deepseek-v3": Layout(
        {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
            "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
            "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
            "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
            "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {**_YARN, "type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
            "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
            "v_head_dim": 128, "vocab_size": 129280,
        },
        _deepseek_v3,
        {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
        },
    ),
    "gpt-oss-20b": Layout(
        {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
            "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
            "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
            "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-05,
            "rope_scaling": {**_YARN, "factor": 32.0, "truncate": False}, "rope_theta": 150000,
            "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 201088,
        },
        _gpt_oss,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    ),
}  # fmt: skip


def configured(
    layout: str, layers: int | None = None, changes: Mapping[str, Any] | None = None, *,
    quantised: bool = False, mtp: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The config of a checkpoint with so many layers, those of the published one by default.

    Args:
        changes: other entries of the config.
        quantised: as published, where that is quantised.
        mtp: with layers for multi-token prediction.

    Raises:
        ValueError: the layout has no such entry or form.
    """
    told, own = LAYOUTS[layout], dict(changes or {})
    config = dict(told.config)
    if unknown := sorted(set(own) - set(config) - {"layer_types"}):
        raise ValueError(f"the config of {layout} has no {', '.join(unknown)}: it has {', '.join(sorted(config))}")
    count = config["num_hidden_layers"] = config["num_hidden_layers"] if layers is None else layers
    if count < 1:
        raise ValueError(f"{count} layers: ask for at least one")
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = min(config["first_k_dense_replace"], count - 1)
    if config["model_type"] == "gpt_oss":
        config["layer_types"] = [("sliding_attention", "full_attention")[n % 2] for n in range(count)]
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = int(mtp)
    elif mtp:
        raise ValueError(f"{layout} has no layers for multi-token prediction: leave mtp out")
    config.update(own)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in config:  # an embedding of a small vocabulary does not take another's
            config[name] = min(config[name], config["vocab_size"] - 1)
    if quantised:
        if told.quantisation is None:
            raise ValueError(f"{layout} is published in bfloat16: leave quantised out")
        config["quantization_config"] = told.quantisation
    return config


def tensors_of(layout: str, config: Mapping[str, Any]) -> list[Stored]:
    """The tensors of a checkpoint with this config, as they are stored."""
    plain = LAYOUTS[layout].tensors(config)
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return list(plain)
    if quantisation["quant_method"] == "mxfp4":
        return [part for tensor in plain for part in _mxfp4(tensor)]
    return [part for tensor in plain for part in _fp8(tensor, quantisation["weight_block_size"][0])]


def sharded(tensors: Iterable[Stored], shard_bytes: int) -> list[list[Stored]]:
    """Tensors by shard, in the order of their data: a shard is full once the next tensor would exceed the bytes."""
    shards: list[list[Stored]] = []
    room = 0
    for tensor in tensors:
        if tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    order = list(_DTYPES)
    return [sorted(shard, key=lambda tensor: (order.index(tensor.dtype), tensor.name)) for shard in shards]


def _drawn(tensor: Stored, count: int, generator: torch.Generator) -> Tensor:
    """`count` entries."""
    dtype = _DTYPES[tensor.dtype]
    if tensor.kind == "norm":
        return torch.ones(count, dtype=dtype)
    if tensor.kind == "blocks":
        return torch.empty(count, dtype=dtype).random_(0, 256, generator=generator)
    if tensor.kind == "scales":  # exponents of 2, less 127: weights of some 0.02
        return torch.empty(count, dtype=dtype).random_(119, 122, generator=generator)
    if tensor.kind == "factors":
        return torch.empty(count).uniform_(0.8 / _FP8_GAIN, 1.25 / _FP8_GAIN, generator=generator)
    if tensor.dtype == "F8_E4M3":
        wide = torch.empty(count, dtype=torch.bfloat16).normal_(0, _STD * _FP8_GAIN, generator=generator)
        return wide.clamp_(-448, 448).to(dtype)
    return torch.empty(count, dtype=dtype).normal_(0, _STD, generator=generator)


def _fill(file: BinaryIO, tensor: Stored, seed: int) -> None:
    """Draw a tensor and write it, a chunk at a time; the same whatever shard it is in."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(tensor.name.encode()))
    total = math.prod(tensor.shape)
    for begin in range(0, total, _CHUNK):
        values = _drawn(tensor, min(_CHUNK, total - begin), generator)
        file.write(memoryview(values.view(torch.uint8).numpy()))


def _write_shard(path: Path, shard: list[Stored], seed: int) -> None:
    """One safetensors file: the length of the header, the header padded with spaces, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes],
        }  # fmt: skip
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            _fill(file, tensor, seed)


def _check_room(out: Path, needed: int) -> None:
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"{out} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: ask for fewer layers or a smaller "
            "vocabulary, or write elsewhere"
        )


def write_checkpoint(
    layout: str, out: Path, config: Mapping[str, Any], *, seed: int = 0, shard_bytes: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> int:  # fmt: skip
    """Write a checkpoint and return the bytes of its tensors.

    Args:
        layout: a name in :data:`LAYOUTS`.
        config: from :func:`configured`.
        shard_bytes: most bytes of a shard; one with a single tensor may have more. None: as published, or less, for
            several shards.

    Raises:
        FileExistsError: there is something in the folder.
        OSError: the disk has too little room. Nothing is written then.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name another folder")
    tensors = tensors_of(layout, config)
    total = sum(tensor.nbytes for tensor in tensors)
    shards = sharded(tensors, min(SHARD_BYTES, -(-total // LEAST_SHARDS)) if shard_bytes is None else shard_bytes)
    _check_room(out, total)
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(out / name, shard, seed)
        index.update({tensor.name: name for tensor in shard})
        progress(f"{name}: {sum(tensor.nbytes for tensor in shard) / 1e9:.2f} GB, {len(shard)} tensors")
    told = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    for file, content in (("model.safetensors.index.json", told), ("config.json", dict(config))):
        (out / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total


def _entry(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value in JSON."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r}: pass KEY=VALUE with a value in JSON") from None


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet, or empty")
    parser.add_argument("--layers", type=int, help="those of the published model by default")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary, that of the published model by default")
    parser.add_argument("--set", type=_entry, action="append", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--quantised", action="store_true", help="as published: FP8 in blocks, or MXFP4")
    parser.add_argument("--mtp", action="store_true", help="with DeepSeek's layer for multi-token prediction")
    parser.add_argument("--shard-bytes", type=int, help="as published by default, or less, for several shards")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    changes = dict(options.set) | ({} if options.vocab is None else {"vocab_size": options.vocab})
    try:
        config = configured(options.layout, options.layers, changes, quantised=options.quantised, mtp=options.mtp)
        total = write_checkpoint(
            options.layout, options.out, config, seed=options.seed, shard_bytes=options.shard_bytes, progress=print
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {options.out}, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
