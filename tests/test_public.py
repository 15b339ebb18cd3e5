"""The promised names: they exist, are documented, and take the promised arguments."""

from __future__ import annotations

import inspect

import pytest

import fusion_kernels
import mlp_fusion

SIGNATURES = {
    fusion_kernels.kmeans: "x n_clusters sample_weight init n_init algorithm max_iter tol seed backend",
    fusion_kernels.kmeans_assign: "x centroids backend",
    fusion_kernels.fused_mlp: "x w1 b1 w2 b2 scale activation checkpoint_level backend",
    fusion_kernels.fused_glu_mlp: ("x w_gate w_up w_down b_gate b_up b_down scale activation checkpoint_level backend"),
    fusion_kernels.fused_experts: (
        "x top_k_index top_k_weights w_in w_out w_gate b_in b_out b_gate scale activation checkpoint_level backend"
    ),
    fusion_kernels.ntk_gram: "block x1 x2 reduce params metric kernel precision block_size out backend",
    fusion_kernels.ntk_vp: "block x v params metric kernel",
    fusion_kernels.trace_ntk_vp: "block x v reduce params metric kernel",
    fusion_kernels.ntk_operator: "block x reduce params metric kernel shift",
    fusion_kernels.jvp: "block x tangents",
    fusion_kernels.vjp: "block x cotangent params",
    fusion_kernels.gradient_gram: "block x cotangents params metric form",
    fusion_kernels.gradient_norms: "block x cotangents params metric form",
    fusion_kernels.gradient_dots: "block x cotangents direction",
    fusion_kernels.ntk_compare: "a b x reduce params metrics kernel columns eigenvalues seed block_size backend",
    fusion_kernels.backends: "",
    mlp_fusion.fuse: "model width layers method optimizer seed sample progress",
    mlp_fusion.plan: "model_or_path width layers",
    mlp_fusion.compress: "path out width layers method optimizer seed text device progress",
    mlp_fusion.verify: "out against",
    mlp_fusion.restore: "model path optimizer",
    mlp_fusion.FusedMLP.from_mlp: "fc1 fc2 activation scale parameterization checkpoint_level",
    mlp_fusion.FusedGLU.from_mlp: "gate up down activation scale parameterization checkpoint_level",
    mlp_fusion.FusedExperts.from_experts: "experts scale parameterization checkpoint_level",
    mlp_fusion.FusedMLP.from_bundle: "bundle parameterization names kind dropout",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures_hold_what_is_promised(function: object) -> None:
    assert callable(function)
    found = list(inspect.signature(function).parameters)
    promised = SIGNATURES[function].split()
    assert [name for name in found if name in promised] == promised


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
