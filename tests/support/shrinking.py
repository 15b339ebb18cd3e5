"""Small configs of any model type, made from its default config by rules about numbers, not by families.

A candidate is good where the model it describes has every kind of parameter that the full model has: names with their
numbers replaced. Whether a candidate runs is for the caller to see, who gets them best first.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlp_fusion.errors import InputError
from mlp_fusion.families import building
from mlp_fusion.families.catalogue import default_config

#: Entries of a model above which the next candidate is tried, and those that no candidate may have.
WANTED, MOST = 20_000_000, 100_000_000
#: Numbers of layers that are tried; the least that has every kind of parameter is taken.
_LAYERS = (2, 3, 4, 5, 6, 8, 12, None)

_LAYER = re.compile(
    r"(num_.*layers|n_layers?|num_layers|.*_layers|depth|n_blocks|num_blocks|num_hidden_groups|.*_depth)"
)
_NO_LAYER = re.compile(
    r".*(hash|dense|kv_shared|nextn|mtp|global_attn|hidden_layers_for|return|feature|_fc_|proj_|conv|connector|mlp_layers"
    r"|num_feature_levels|num_fc|adapter|freez|position|dropped).*"
)
_PLACES = re.compile(r".*(layers|indexes|layer_ids|index_list|layer_types|block_ids|idx|indices).*")
_FIRST = re.compile(r".*(first_k_dense|num_dense_layers|moe_layer_start|first_dense).*")
#: Numbers that are no sizes of hidden states.
_NO_SIZE = re.compile(
    r".*(vocab|head(?!_dim)|token|position|image_size|num_(?!filters)|_size_per|window|length|patch|layers?$|(?<!up)sample|rate|stride"
    r"|kernel|max_|codebook|n_fft|mel|bins|num$|(?<!upsample_)groups?$|rank_?limit|channels_in|in_channels|num_channels|time|context"
    r"|experts|topk|top_k|seq|chunk|period|factor|resolution|pool|embeddings$|downsample|queries|fps|frame|hop|n_group).*"
)
_SIZES = re.compile(r".*(dim|size|channels|width|hidden|section|planes|filters).*")
_NEURONS = re.compile(r".*(intermediate|ffn|mlp_dim|inner|d_ff).*")
_NEURONS_AT_MOST = 256
_EXPERTS = re.compile(r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|n_experts")
_CHOSEN = re.compile(
    r"num_experts_per_tok|moe_topk|top_k_experts|moe_k|moe_top_k|num_experts_per_token|num_selected_experts"
)
_GROUPS = ("n_group", "topk_group", "num_expert_group", "num_limited_groups")
_TOKEN = re.compile(r".*(token_ids?|token_index|_token|_id|begin_suppress_tokens|suppress_tokens)")
_VOCABULARY = re.compile(r".*vocab_size.*|.*_vocab|vocabulary_size|n_tokens|num_tokens")
_NO_SECTIONS = {"id2label", "label2id", "task_specific_params", "quantization_config"}
_ROPE = {"rope_parameters", "rope_scaling"}

_SECTIONS = {"rope_parameters.mrope_section": [1, 1, 2]}
_TIMM = {"vision_config.model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4}}
#: As small as maps of small images are.
_MAPS = [[32, 32], [16, 16], [8, 8]]
#: By `model_type`, also of parts of other models: values without which a small model does not run, by dotted keys.
EXTRA: dict[str, dict[str, Any]] = {
    # The default limit is None, and is used as a number.
    "dbrx": {"attn_config.clip_qkv": 8.0},
    # The sections of the rotary frequencies do not add up to those of a head: the factor that halves them is left out.
    "glm4v_text": _SECTIONS,
    "glm4v_moe_text": {"rope_parameters.mrope_section": [1, 1, 0], "head_dim": 8},
    "glm_image_text": _SECTIONS,
    "glmga_text": _SECTIONS,
    # The sections have no default.
    "hunyuan_vl_text": {**_SECTIONS, "head_dim": 8},
    # Patches of the default length are so few that an FFN over them has no half that is served.
    "patchtsmixer": {"context_length": 64, "num_patches": 8},
    # Sizes of the state-space part must fit each other, whatever they are divided by.
    "falcon_h1": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    # Sizes of timm's models are not in the config.
    "pe_video_encoder": _TIMM,
    "fast_vlm": {
        "vision_config.model_args": {
            "inference_mode": True,
            "layers": [1, 1, 1, 1, 1],
            "embed_dims": [16, 32, 64, 64, 64],
        },
        "vision_config.hidden_size": 128,
    },
    # Sparse layers come after more dense ones than a small model has.
    "dots3_note_vision_encoder": {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_local_experts": 4,
        "per_layer_config": {},
    },
    "pe_audio_video_encoder": {f"video_config.{key}": value for key, value in _TIMM.items()},
    # Large images take long in convolutions, and many of them too.
    "align_vision_model": {"image_size": 64},
    "clap_audio_model": {"spec_size": 256, "patch_embeds_hidden_size": 32, "hidden_size": 256},
    "seggpt": {"image_size": [128, 64], "pretrain_image_size": 64},
    "tvp": {"max_img_size": 64, "num_frames": 2},
    # Its class reads what the config lacks.
    "pix2struct_text_model": {"initializer_range": 0.02},
    # The token that stands for an image has no default.
    "blip-2": {"image_token_index": 500},
    "instructblip": {"image_token_index": 500},
    "instructblipvideo": {"video_token_index": 500},
    # As many patches, and parts of an image, as the small images have.
    "gemma3": {"mm_tokens_per_image": 16},
    "aria": {"projector_patch_to_query_dict": {49: 16}},
    # Some layers slide, by default over a window of no size.
    "step3p5": {"sliding_window": 8},
    # Its convolutions were worked out from the number of bins, which is no size to divide.
    "phi4_multimodal_audio": {"input_size": 80},
    # The sizes of images under another name: they are no sizes of hidden states.
    "layoutlmv3": {"input_size": 64, "patch_size": 16},
    # Training wants texts as long as the product of these.
    "reformer": {"axial_pos_shape": [4, 4], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    # A head for each channel would look like an FFN.
    "lw_detr_vit": {"num_attention_heads": 2},
    # Numbers of channels in must be those that come out before.
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 32, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 32, 32, 32],
        "hidden_sizes": [16, 32, 32, 32],
    },
    # Of many queries with almost the same score, rounding picks others.
    "pp_doclayout_v2": {"num_queries": 20, "class_thresholds": [0.0, 0.0], "class_order": [0, 1]},
    "pp_doclayout_v3": {"x4_feat_dim": 16, "num_queries": 20},
    "pp_formulanet_vision": {"output_channels": 16, "post_conv_in_channels": 16},
    # Its adapters are by language, and none is the default.
    "xmod": {"default_language": "en_XX"},
    # The default network is another one than that whose channels the default config states.
    "edgetam_vision_model": {"backbone_channel_list": [1024, 512, 256, 64], "backbone_feature_sizes": _MAPS},
    "sam2_vision_model": {"backbone_feature_sizes": _MAPS},
    # The number of layers is worked out from that of a stack, where it is not given.
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2},
}


@dataclass(frozen=True)
class Steps:
    """How far to shrink; None leaves the numbers as they are.

    Attributes:
        layers: of each stack.
        divisor: of sizes of hidden states.
        heads: divide numbers of heads too, and leave their size.
        experts: of each layer.
        words: in the vocabulary; ids of special tokens follow.
        images: make large images small.
    """

    layers: int | None
    divisor: int
    heads: bool
    experts: int | None
    words: int | None
    images: bool = False


def steps_of(record: dict[str, Any]) -> Steps:
    """The steps of what :meth:`Small.record` returned."""
    return Steps(**{name: value for name, value in record.items() if name != "parameters"})


@dataclass(frozen=True)
class Small:
    """A candidate.

    Attributes:
        config: it.
        steps: how it was made.
        parameters: entries of its model.
    """

    config: Any
    steps: Steps
    parameters: int

    def record(self) -> dict[str, Any]:
        """Plain JSON types, of which `steps_of` makes the steps again."""
        return {**asdict(self.steps), "parameters": self.parameters}


def small_configs(model_type: str) -> Iterator[Small]:
    """Candidates with all kinds of parameters that the default config's model has, the best first.

    Raises:
        InputError: the default config builds no model.
    """
    config = default_config(model_type)
    cls = building.model_class(config)
    wanted = _kinds(building.build(cls, config))
    layers = next((n for n in _LAYERS if _fits(config, cls, Steps(n, 1, False, None, None), wanted)), None)
    seen: set[str] = set()
    large: list[Small] = []
    for steps in _ladder(layers):
        try:
            small = small_config(config, steps)
            model = building.build(cls, small)
        except Exception:  # noqa: BLE001  (numbers that do not fit together, refused in whatever way)
            continue
        count = sum(p.numel() for p in model.parameters())
        text = small.to_json_string(use_diff=False)
        if _kinds(model) != wanted or count > MOST or text in seen:
            continue
        seen.add(text)
        if count > WANTED:
            large.append(Small(small, steps, count))
        else:
            yield Small(small, steps, count)
    yield from sorted(large, key=lambda candidate: candidate.parameters)


def small_config(config: Any, steps: Steps) -> Any:
    """`config` made small; a new one."""
    values = copy.deepcopy(config.to_dict())
    ids: dict[int, int] = {}
    for section in _sections(values):
        if steps.layers is not None:
            _fewer_layers(section, steps.layers)
        if steps.experts is not None:
            _fewer_experts(section, steps.experts)
        if steps.words is not None:
            _fewer_words(section, steps.words, ids)
        if steps.divisor > 1:
            _smaller(section, steps.divisor, steps.heads)
        if steps.images:
            _smaller_images(section)
    for section in _sections(values):
        for key, value in EXTRA.get(str(section.get("model_type")), {}).items():
            *outer, last = key.split(".")
            functools.reduce(lambda inner, name: inner[name], outer, section)[last] = value
    # What the encoder puts out and the decoder takes has one number of channels, under two names.
    taken, made = values.get("decoder_in_channels"), values.get("encoder_hidden_dim")
    if isinstance(taken, list) and type(made) is int:
        values["decoder_in_channels"] = [made] * len(taken)
    for section in _sections(values):
        _as_wide_as_words(section)
    return type(config).from_dict(values)


def _as_wide_as_words(section: dict[str, Any]) -> None:
    """What images lead to is as wide as words: defaults of parts need not fit together."""
    vision, text = section.get("vision_config"), section.get("text_config")
    if isinstance(vision, dict) and isinstance(text, dict):
        for key in ("out_hidden_size", "hidden_size") if "embed_dim" in vision else ("out_hidden_size",):
            if key in vision and "hidden_size" in text:
                vision[key] = text["hidden_size"]


def _ladder(layers: int | None) -> Iterator[Steps]:
    divisors = ((16, False), (8, False), (8, True), (4, False), (4, True), (2, False), (2, True), (1, False))
    for words, experts, (divisor, heads), images in itertools.product((512, None), (4, None), divisors, (True, False)):
        yield Steps(layers, divisor, heads, experts, words, images)


def _fits(config: Any, cls: Any, steps: Steps, wanted: set[str]) -> bool:
    try:
        return _kinds(building.build(cls, small_config(config, steps))) == wanted
    except Exception:  # noqa: BLE001  (as above)
        return False


def _kinds(model: Any) -> set[str]:
    return {building.pattern(name) for name in building.shapes(model)}


def _sections(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield values
    for key, value in list(values.items()):
        named = isinstance(value, dict) and all(isinstance(inner, str) for inner in value)
        if named and key not in _NO_SECTIONS:
            yield from _sections(value)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _fewer_layers(section: dict[str, Any], layers: int) -> None:
    stages = {len(value) for key, value in section.items() if _is_stages(key, value)}
    counts = {
        key: value
        for key, value in section.items()
        if _is_int(value)
        and value > layers
        and value not in stages
        and _LAYER.fullmatch(key)
        and not _NO_LAYER.fullmatch(key)
    }
    section.update(dict.fromkeys(counts, layers))
    for key, value in list(section.items()):
        if _is_int(value) and re.search("nextn|num_mtp", key):
            section[key] = 0
        if _is_stages(key, value):
            section[key] = [min(entry, layers) for entry in value]
        if not counts:
            continue
        if isinstance(value, (list, tuple)) and len(value) in counts.values() and len(value) > layers:
            section[key] = list(value)[:layers]
        elif isinstance(value, (list, tuple)) and value and all(map(_is_int, value)) and _PLACES.fullmatch(key):
            if len(value) != layers:
                section[key] = [entry for entry in value if 0 <= entry < layers] or [layers - 1]
        elif key == "per_layer_config" and isinstance(value, dict):
            section[key] = {index: part for index, part in value.items() if int(index) < layers}
        elif _is_int(value) and _FIRST.fullmatch(key) and value >= layers:
            section[key] = 1
        elif _is_int(value) and "num_kv_shared" in key and value >= layers:
            section[key] = max(layers - 2, 0)


def _is_stages(key: str, value: Any) -> bool:
    """Whether a list says how many layers each stage has."""
    return "depths" in key and isinstance(value, (list, tuple)) and all(map(_is_int, value))


def _fewer_experts(section: dict[str, Any], experts: int) -> None:
    for key, value in list(section.items()):
        most = experts if _EXPERTS.fullmatch(key) else 2 if _CHOSEN.fullmatch(key) else None
        if most is not None and _is_int(value):
            section[key] = min(value, most)
        elif most is not None and value is None and _CHOSEN.fullmatch(key):
            section[key] = most  # a default that builds, but does not run
        elif most is not None and isinstance(value, list):
            section[key] = [min(entry, most) for entry in value]
        elif key in _GROUPS and _is_int(value):
            section[key] = 1


def _fewer_words(section: dict[str, Any], words: int, ids: dict[int, int]) -> None:
    """Smaller vocabularies; ids of special tokens that fall out of them get others, the same ones everywhere."""

    def moved(number: Any) -> Any:
        if not _is_int(number) or number < words:
            return number
        return ids.setdefault(number, words - 1 - len(ids))

    for key, value in list(section.items()):
        if _is_int(value) and _VOCABULARY.fullmatch(key):
            section[key] = min(value, words)
        elif _TOKEN.fullmatch(key):
            section[key] = [moved(entry) for entry in value] if isinstance(value, list) else moved(value)
        elif key == "vocabulary_map" and isinstance(value, dict):
            section[key] = {word: moved(number) for word, number in value.items()}


def _smaller(section: dict[str, Any], divisor: int, heads: bool) -> None:
    whole = _heads_fit(section)
    _divide(section, divisor, heads)
    if whole and not _heads_fit(section):
        raise ValueError("the heads do not divide the hidden size")


def _heads_fit(section: dict[str, Any]) -> bool:
    size, heads = section.get("hidden_size"), section.get("num_attention_heads", section.get("num_heads"))
    return type(size) is int and type(heads) is int and heads > 0 and size % heads == 0


def _divide(section: dict[str, Any], divisor: int, heads: bool) -> None:
    for key, value in list(section.items()):
        if heads and re.search(r"head", key):
            if _is_int(value) and "dim" not in key and "size" not in key:
                section[key] = max(1, value // divisor)
            continue
        if heads and re.search(r"rope|rot|section", key):
            continue
        if _NO_SIZE.fullmatch(key) and not key.endswith("d_head"):
            continue
        if _is_int(value) and _NEURONS.fullmatch(key):
            section[key] = min(value, max(32, value // divisor // 16 * 16), _NEURONS_AT_MOST)
        elif _is_int(value) and value >= 32 and value % divisor == 0:
            section[key] = value // divisor
        elif isinstance(value, (list, tuple)) and _SIZES.fullmatch(key) and all(map(_is_int, value)):
            section[key] = _smaller_list(list(value), divisor, 1 if "section" in key else 32)


def _smaller_images(section: dict[str, Any]) -> None:
    """Images of few patches: their number, not their size, is what takes time."""
    size, patch = section.get("image_size"), section.get("patch_size")
    small = 8 * patch if type(patch) is int else 128
    if type(size) is int and size > small:
        section["image_size"] = small
        if type(section.get("image_embedding_size")) is int and type(patch) is int:
            section["image_embedding_size"] = small // patch


def _smaller_list(values: list[int], divisor: int, least: int) -> list[int]:
    if all(value >= least and value % divisor == 0 for value in values):
        return [value // divisor for value in values]
    return values


def only_candidate(model_type: str, steps: Steps) -> Small:
    """The candidate that was made by `steps`, without a search.

    Raises:
        InputError: they make no config.
    """
    config = default_config(model_type)
    try:
        small = small_config(config, steps)
        count = sum(p.numel() for p in building.build(building.model_class(config), small).parameters())
    except Exception as error:
        raise InputError(f"{model_type}: {steps} make no config: {error}") from error
    return Small(small, steps, count)
