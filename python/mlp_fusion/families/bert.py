"""BERT, RoBERTa and XLM-RoBERTa: the FFN is split over two sibling modules, `intermediate` and `output`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mlp_fusion.families.base import Architecture, FFNSite, adopt
from mlp_fusion.modules.ffn import FusedFFN, FusedMLP
from mlp_fusion.neurons import NeuronBundle


class ResidualOutput(nn.Module):
    """What is left of the family's output module once the FFN has been computed: dropout, residual, LayerNorm.

    It keeps `dense` (the FFN's output projection, which the fused module in front of it calls), so that the
    parameter's name stays `output.dense.weight`.
    """

    def __init__(self, dense: nn.Module, layer_norm: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = layer_norm
        self.dropout = dropout

    def forward(self, ffn_output: Tensor, residual: Tensor) -> Tensor:
        """`LayerNorm(dropout(ffn_output) + residual)`; both `(..., d)`."""
        normed: Tensor = self.LayerNorm(self.dropout(ffn_output) + residual)
        return normed


@dataclass(frozen=True)
class SplitArchitecture(Architecture):
    """An FFN over `intermediate.dense` and `output.dense`: the fused module stands in `intermediate` and spans both."""

    def install(self, site: FFNSite, bundle: NeuronBundle, parameterization: str) -> FusedFFN:
        projections, scale = FusedMLP.split_bundle(bundle, parameterization)
        old = {role: self.projection(site, role) for role in self.projections}
        output = site.layer.get_submodule("output")
        if isinstance(output, ResidualOutput):
            output.dense = projections["w_out"]
        else:
            dropout, layer_norm = output.get_submodule("dropout"), output.get_submodule("LayerNorm")
            training = output.training
            output = ResidualOutput(projections["w_out"], layer_norm, dropout).train(training)
        fused = FusedMLP(
            projections,
            bundle.activation,
            scale=scale,
            parameterization=parameterization,
            names={"w_in": "dense", "w_out": "dense"},
            borrowed={"w_out": output},
        )
        adopt(fused, {role: (projections[role], old[role]) for role in old})
        site.layer.set_submodule("intermediate", fused)
        site.layer.set_submodule("output", output)
        return fused


def _entry(model_types: tuple[str, ...], base: str, layer_class: str) -> SplitArchitecture:
    return SplitArchitecture(
        model_types=model_types,
        base=base,
        layers="encoder.layer",
        module="intermediate",
        projections={"w_in": "intermediate.dense", "w_out": "output.dense"},
        layer_class=layer_class,
    )


ENTRIES = (
    _entry(("bert",), "bert", "transformers.models.bert.modeling_bert:BertLayer"),
    _entry(("roberta",), "roberta", "transformers.models.roberta.modeling_roberta:RobertaLayer"),
    _entry(("xlm-roberta",), "roberta", "transformers.models.xlm_roberta.modeling_xlm_roberta:XLMRobertaLayer"),
)
