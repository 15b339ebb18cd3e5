"""Every companion as a method of peft: it starts as the model, trains alone, is stored, merged, taken off."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import IDS, attached, classifier, logits
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForSequenceClassification, RobertaConfig

import mlp_fusion
from families import tiny_model, token_batch

CONFIGS = {
    "hiwi-bias": lambda: mlp_fusion.HiWiConfig(),
    "hiwi-weight": lambda: mlp_fusion.HiWiConfig(parameters="weight", r=3),
    "hiwi-both": lambda: mlp_fusion.HiWiConfig(parameters="both", r=2, act_fn="relu"),
    "pafi": lambda: mlp_fusion.PafiConfig(budget=0.05),
    "pafi-matrix": lambda: mlp_fusion.PafiConfig(budget=0.05, ranking="matrix", save_indices=False, embeddings=True),
    "said": lambda: mlp_fusion.SaidConfig(d=60),
    "did": lambda: mlp_fusion.SaidConfig(d=40, structure_aware=False),
    "said-two": lambda: mlp_fusion.SaidConfig(d=200, target_modules=["dense"], published_gradient=True),
    "pafi-two": lambda: mlp_fusion.PafiConfig(budget=40, target_modules=["dense"], biases=False),
    "mpo": lambda: mlp_fusion.MpoConfig(),
    "mpo-all": lambda: mlp_fusion.MpoConfig(train_central=True, embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]()


@pytest.fixture(scope="module", params=["plain", "fused"])
def model(request: pytest.FixtureRequest) -> Any:
    made = classifier()
    if request.param == "fused":
        mlp_fusion.fuse(made, 16)
    return made


def check_start(found: Tensor, expected: Tensor, config: Any) -> None:
    """A companion that has changed nothing yet: to the bit, or what multiplying chains out again rounds."""
    if isinstance(config, mlp_fusion.MpoConfig):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
    else:
        assert torch.equal(found, expected)


def test_it_starts_as_the_model_and_alone_requires_gradients(model: Any, config: Any) -> None:
    made = get_peft_model(copy.deepcopy(model), config).eval()
    check_start(logits(made), logits(model), config)
    trained = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(f".{made.base_model.prefix}" in name for name in trained)


def test_what_it_adds_goes_with_disable_adapter_and_comes_back(model: Any, config: Any) -> None:
    made = attached(model, config)
    with_it = logits(made)
    assert (with_it - logits(model)).abs().max() > 1e-4
    with made.disable_adapter():
        assert torch.equal(logits(made), logits(model))
    assert torch.equal(logits(made), with_it)


def test_it_trains_after_inference(model: Any, config: Any) -> None:
    gradients = []
    for inferred in (True, False):
        torch.manual_seed(0)
        one = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
        if inferred:
            with torch.inference_mode():
                logits(one)
        one(IDS).logits.square().sum().backward()
        gradients.append([p.grad for p in one.parameters() if p.requires_grad])
    assert any(bool(g.any()) for g in gradients[0])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("trains", [False, True])
def test_it_is_compiled_from_cold(config: Any, trains: bool) -> None:
    """What is found or made once is found while a compiler traces."""
    made, again = (get_peft_model(classifier(), copy.deepcopy(config)).eval() for _ in range(2))
    again.load_state_dict(made.state_dict())
    with torch.set_grad_enabled(trains):
        found = torch.compile(made, backend="eager")(IDS).logits
        wanted = again(IDS).logits
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("on_meta_first", [False, True])
def test_a_stored_one_is_loaded_to_the_same_bits(model: Any, config: Any, on_meta_first: bool, tmp_path: Path) -> None:
    made = attached(model, config)
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, low_cpu_mem_usage=on_meta_first).eval()
    assert torch.equal(logits(again), logits(made))


def test_one_config_serves_several_models(config: Any, tmp_path: Path) -> None:
    """Of other weights, and of other widths; each is stored with what loading it needs, after all are made."""
    bases = [classifier(), classifier(intermediate_size=40), classifier()]
    torch.nn.init.normal_(bases[2].bert.encoder.layer[0].output.dense.weight)
    as_given = config.to_dict()
    made = [attached(base, config) for base in bases]
    made[0].add_adapter("other", config)
    kept = {**config.to_dict(), "base_model_name_or_path": as_given["base_model_name_or_path"]}
    assert kept == as_given
    for n, (base, one) in enumerate(zip(bases, made, strict=True)):
        one.save_pretrained(tmp_path / str(n), selected_adapters=["default"])
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(n)).eval()
        assert torch.equal(logits(again), logits(one))
        # A config that is loaded stands for what is stored, wherever it is handed over, and more than once.
        loaded = type(config).from_pretrained(tmp_path / str(n))
        for given in (loaded, copy.deepcopy(loaded), loaded):
            again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(n), config=given).eval()
            assert torch.equal(logits(again), logits(one))
        again.load_adapter(tmp_path / str(n), "second")
        again.set_adapter("second")
        assert torch.equal(logits(again), logits(one))


def test_peft_loads_base_and_companion_by_their_folders(config: Any, tmp_path: Path) -> None:
    base = classifier()
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base").eval()
    config.task_type = "SEQ_CLS"  # the head trains, and is stored
    made = attached(loaded, config)
    made.save_pretrained(tmp_path / "companion")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "companion").eval()
    assert torch.equal(logits(again), logits(made))
    assert get_model_status(again).peft_types == {"default": config.peft_type.name}


def test_transformers_own_adapters_take_it_too(config: Any, tmp_path: Path) -> None:
    model, made, again = classifier(), classifier(), classifier()
    made.add_adapter(config)
    check_start(logits(made), logits(model), config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    made.save_pretrained(tmp_path)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(made))
    made.disable_adapters()
    assert torch.equal(logits(made), logits(model))


def test_the_same_options_make_the_same_file(model: Any, config: Any, tmp_path: Path) -> None:
    made = attached(model, config)
    for place in "ab":
        made.save_pretrained(tmp_path / place)
    texts = {(tmp_path / place / "adapter_config.json").read_text(encoding="utf-8") for place in "ab"}
    assert len(texts) == 1


def test_merged_it_computes_the_same_and_unmerging_brings_back_the_bits(model: Any, config: Any) -> None:
    made = attached(model, config)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with_it = logits(made)
    made.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(made), with_it, atol=1e-5)
    made.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    merged = made.merge_and_unload()
    assert torch.allclose(logits(merged), with_it, atol=1e-5)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert made is not merged


def test_heads_without_a_weight_of_their_own_are_merged_too(config: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = AutoModelForSequenceClassification.from_config(RobertaConfig(vocab_size=90, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.02)
    config.task_type = "SEQ_CLS"
    made = attached(model.eval(), config)
    with_it = logits(made)
    assert torch.allclose(logits(made.merge_and_unload()), with_it, atol=1e-5)


def test_a_broken_one_is_not_merged(model: Any, config: Any) -> None:
    made = attached(model, config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("inf"))
    with pytest.raises(mlp_fusion.InputError, match="infinite or NaN"):
        made.merge_adapter(safe_merge=True)


def test_unloading_leaves_the_model(model: Any, config: Any) -> None:
    made = attached(model, config)
    logits(made)
    left = made.unload()
    wanted = dict(model.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in left.named_parameters())


def test_importing_the_package_enters_the_methods_into_peft_once_that_is_imported() -> None:
    code = """if True:
        import sys, mlp_fusion
        assert not {"torch", "peft"} & sys.modules.keys()
        import peft
        assert "HIWI" in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["HIWI"] is mlp_fusion.HiWiConfig"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_may_be_asked_for_before_peft_is() -> None:
    code = "import mlp_fusion; mlp_fusion.HiWiConfig(); import peft; peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING['HIWI']"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("version", "message"), [("0.17.3", "need peft 0.21 or later, this is 0.17.3"), (None, "missing")]
)
def test_a_peft_that_is_old_or_missing_is_said_and_left_alone(
    version: str | None, message: str, tmp_path: Path
) -> None:
    broken = f"__version__ = {version!r}" if version else "raise ModuleNotFoundError"
    (tmp_path / "peft.py").write_text(broken, encoding="utf-8")
    importing = "import peft" if version else "pass"
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mlp_fusion
        {importing}
        try:
            mlp_fusion.HiWiConfig
        except mlp_fusion.InputError as error:
            print(error)"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert message in said
    assert said.count("\n") == 1


def test_a_module_of_another_method_is_refused(config: Any) -> None:
    from peft import LoraConfig

    made = get_peft_model(classifier(), LoraConfig(target_modules=["dense"])).base_model.model
    config.target_modules = {"dense"}
    with pytest.raises(mlp_fusion.InputError, match="holds an adapter of another method"):
        get_peft_model(made, config)


def test_targets_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        get_peft_model(classifier(), mlp_fusion.HiWiConfig(target_modules=["nonsense"]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["pafi", "hiwi-weight"])
def test_in_this_projects_own_modules_it_runs_and_merges(family: str, kind: str, tmp_path: Path) -> None:
    """`FusedMLP` and `FusedGLU` then run through their projections; merged and saved, the checkpoint is right."""
    batch = token_batch()
    model = tiny_model(family, task="CausalLM").eval()
    mlp_fusion.fuse(model, 16)
    assert any(isinstance(m, (mlp_fusion.FusedMLP, mlp_fusion.FusedGLU)) for m in model.modules())
    made = get_peft_model(copy.deepcopy(model), CONFIGS[kind]()).eval()
    with torch.no_grad():
        torch.testing.assert_close(made(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
        for parameter in made.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        with_it = made(**batch).logits
        merged = made.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, with_it, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**batch).logits, with_it, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", *CONFIGS])
def test_transformers_own_adapters_are_stored_beside_a_fused_model(name: str, tmp_path: Path) -> None:
    """`add_adapter` and the model's `save_pretrained`: the adapter alone, without the scale, which is the base's."""
    lora = LoraConfig(target_modules=["intermediate.dense", "output.dense"], r=2, init_lora_weights=False)
    model = classifier()
    mlp_fusion.fuse(model, 16, method="fusion")
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    mlp_fusion.restore(base, tmp_path / "base")
    before = logits(base)
    base.add_adapter(lora if name == "lora" else CONFIGS[name]())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in base.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = logits(base)
    assert float((expected - before).abs().max()) > 1e-4
    base.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    mlp_fusion.restore(again, tmp_path / "base")
    again.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)
