"""What a fusion records for its report: cluster sizes and spectra of the tangent kernels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from bundles import random_bundle
from families import tiny_model
from mlp_fusion import FusionReport
from mlp_fusion.measure import ffn_errors
from mlp_fusion.measure.errors import SPECTRUM_SIZE, ffn_parts
from mlp_fusion.neurons import NeuronBundle


def naive_kernel(bundle: NeuronBundle, x: Tensor, *, sign: bool) -> Tensor:
    """`J J^T`, or `J sign(J)^T`, summed over outputs, from one backward pass per row and output."""
    names = [name for part in ffn_parts(bundle).values() for name in part]
    leaves = {name: getattr(bundle, name).clone().requires_grad_() for name in names}
    fields = {name: getattr(bundle, name) for name in bundle.__dataclass_fields__}
    y = NeuronBundle(**{**fields, **leaves}).forward(x)[0]
    rows = []
    for row in y:
        grads = [torch.autograd.grad(o, list(leaves.values()), retain_graph=True) for o in row]
        rows.append(torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]))
    jacobian = torch.stack(rows)
    return torch.einsum("iop,jop->ij", jacobian, jacobian.sign() if sign else jacobian)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_spectra_are_shares_of_the_original_trace(gated: bool, rows: int) -> None:
    original = random_bundle(width=9, gated=gated)
    fused = original.reduce(torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3, 3]])).parameterized("scaled")
    x = torch.randn(rows, 5, dtype=torch.float64)
    spectrum = ffn_errors(original, fused, x).spectrum
    assert set(spectrum) == {"gd", "sign"}
    for kernel, found in spectrum.items():
        before, after = (naive_kernel(b, x, sign=kernel == "sign") for b in (original, fused))
        for name, matrix in (("before", before), ("after", after)):
            values = torch.linalg.eigvals((matrix + matrix.T) / 2).real.sort(descending=True).values
            expected = values[:SPECTRUM_SIZE] / before.trace()
            torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
        if rows <= SPECTRUM_SIZE:
            assert sum(found["before"]) == pytest.approx(1)


def test_a_kernel_without_a_trace_has_no_spectrum() -> None:
    bundle = random_bundle(width=4, bias=False)
    x = torch.randn(6, 5, dtype=torch.float64)
    assert ffn_errors(bundle, bundle, 0 * x).spectrum == {}
    overflowing = ffn_errors(bundle, bundle, 1e200 * x)
    assert not math.isfinite(overflowing.ntk["gd"]["total"])
    assert "gd" not in overflowing.spectrum


def test_fuse_records_sizes_and_spectra() -> None:
    report = mlp_fusion.fuse(tiny_model("bert"), 16)
    for row in report.rows:
        assert row.cluster_sizes is not None
        sizes = [size for size, _ in row.cluster_sizes]
        assert sizes == sorted(set(sizes))
        assert sum(count for _, count in row.cluster_sizes) == row.neurons_after
        assert sum(size * count for size, count in row.cluster_sizes) == row.neurons_before
        assert sizes[-1] == row.largest_cluster
        assert dict(row.cluster_sizes).get(1, 0) == row.singletons
        assert row.ntk_spectrum is not None
        assert len(row.ntk_spectrum["gd"]["before"]) == SPECTRUM_SIZE
    assert FusionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_methods_without_clusters_have_no_sizes() -> None:
    report = mlp_fusion.fuse(tiny_model("bert"), 16, method="prune")
    assert [row.cluster_sizes for row in report.rows] == [None] * 3
    assert all(row.ntk_spectrum for row in report.rows)


def test_reports_of_earlier_versions_are_read(tmp_path: Path) -> None:
    mlp_fusion.compress(ck.save_tiny(tmp_path / "bert"), tmp_path / "out", 16, device="cpu")
    data = json.loads((tmp_path / "out" / "mlp_fusion" / "report.json").read_text())
    assert data["rows"][0]["cluster_sizes"]
    for row in data["rows"]:
        del row["cluster_sizes"], row["ntk_spectrum"]
    report = FusionReport.from_dict(data)
    assert [row.cluster_sizes for row in report.rows] == [row.ntk_spectrum for row in report.rows] == [None] * 3
