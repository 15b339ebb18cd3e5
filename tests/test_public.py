"""The promised names: they exist, are documented, and take the promised arguments."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

import fusion_kernels
import mlp_fusion

#: Every public function, and how modules are made: all parameters, in their order.
SIGNATURES: dict[Any, str] = {
    fusion_kernels.kmeans: (
        "x n_clusters sample_weight init n_init algorithm max_iter tol seed metric backend workspace_bytes"
    ),
    fusion_kernels.kmeans_assign: "x centroids metric backend",
    fusion_kernels.fused_mlp: "x w1 b1 w2 b2 scale activation checkpoint_level backend",
    fusion_kernels.fused_glu_mlp: (
        "x w_gate w_up w_down b_gate b_up b_down scale activation checkpoint_level gating backend"
    ),
    fusion_kernels.split_gate_up: "weight layout",
    fusion_kernels.mlp_backend: "name",
    fusion_kernels.fused_experts: (
        "x top_k_index top_k_weights w_in w_out w_gate b_in b_out b_gate scale activation gating checkpoint_level "
        "backend"
    ),
    fusion_kernels.experts_backend: "name",
    fusion_kernels.ntk_gram: "block x1 x2 reduce params metric kernel precision block_size out backend",
    fusion_kernels.ntk_vp: "block x v params metric kernel backend",
    fusion_kernels.trace_ntk_vp: "block x v reduce params metric kernel backend",
    fusion_kernels.ntk_operator: "block x reduce params metric kernel shift",
    fusion_kernels.jvp: "block x tangents backend",
    fusion_kernels.vjp: "block x cotangent params backend",
    fusion_kernels.gradient_gram: "block x cotangents params metric form backend",
    fusion_kernels.gradient_norms: "block x cotangents params metric form backend",
    fusion_kernels.gradient_dots: "block x cotangents direction backend",
    fusion_kernels.ntk_compare: "a b x reduce params metrics kernel columns eigenvalues seed block_size backend",
    fusion_kernels.sampled_product: "g x rows columns backend",
    fusion_kernels.hadamard_transform: "x backend",
    fusion_kernels.fastfood: "theta size seed backend",
    fusion_kernels.fastfood_transposed: "y length seed backend",
    fusion_kernels.backends: "",
    mlp_fusion.fuse: (
        "model width layers method budget only multiple optimizer seed calibration_sentences synthetic "
        "calibration_rows refit match tune_steps sequential unmeasured sample calibration progress"
    ),
    mlp_fusion.plan: "model_or_path width layers budget only multiple",
    mlp_fusion.compress: (
        "path out width layers method budget only multiple optimizer seed calibration_sentences synthetic "
        "calibration_rows refit match tune_steps sequential unmeasured text calibration device dtype stream engine "
        "resume force progress"
    ),
    mlp_fusion.verify: "out against",
    mlp_fusion.restore: "model path optimizer",
    mlp_fusion.state_form: "form",
    mlp_fusion.finetune: (
        "model out train evaluation task layerwise_epochs layerwise_learning_rate distill_weight temperature "
        "optimizer peft peft_options adapters learning_rate weight_decay warmup epochs batch_size accumulation "
        "max_length "
        "checkpoint_steps "
        "seed device resume teacher original columns tokenizer progress"
    ),
    mlp_fusion.distill: (
        "teacher out text evaluation recursions embedding_size intermediate_size adapter_size start mlm_weight "
        "attention_weight hidden_weight output_weight mask_share epochs learning_rate weight_decay warmup batch_size "
        "accumulation max_length checkpoint_steps seed device resume columns tokenizer progress"
    ),
    mlp_fusion.FusedMLP.from_mlp: "fc1 fc2 activation scale parameterization checkpoint_level",
    mlp_fusion.FusedGLU.from_mlp: "gate up down activation scale parameterization checkpoint_level gating",
    mlp_fusion.FusedExperts.from_experts: "experts scale parameterization checkpoint_level",
    mlp_fusion.FusedMLP.from_bundle: "bundle parameterization names kind dropout checkpoint_level",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: getattr(f, "__qualname__", type(f).__qualname__))
def test_signatures_are_those_promised(function: Any) -> None:
    assert list(inspect.signature(function).parameters) == SIGNATURES[function].split()


@pytest.mark.parametrize("package", [fusion_kernels, mlp_fusion], ids=lambda p: p.__name__)
def test_every_public_function_is_promised(package: ModuleType) -> None:
    public = {name: getattr(package, name) for name in package.__all__}
    functions = {name for name, value in public.items() if callable(value) and not inspect.isclass(value)}
    assert {name for name in functions if public[name] not in SIGNATURES} == set()


@pytest.mark.parametrize("package", [fusion_kernels, mlp_fusion], ids=lambda p: p.__name__)
def test_every_public_name_is_documented(package: object) -> None:
    names = vars(package)["__all__"]
    assert sorted(names, key=str.lower) == sorted(set(names), key=str.lower)
    for name in names:
        documentation = inspect.getdoc(getattr(package, name))
        assert documentation, name
        assert len(documentation) > 40, name


def test_public_methods_are_documented() -> None:
    for cls in (mlp_fusion.FusedMLP, mlp_fusion.FusedGLU, mlp_fusion.NeuronBundle, mlp_fusion.FusionReport):
        for name, member in vars(cls).items():
            if callable(member) and not name.startswith("_") and name != "forward":
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"
