"""DistilBERT: one `ffn` module per block; the list of blocks builds them without their index."""

from mlp_fusion.families.base import Architecture

ENTRIES = (
    Architecture(
        model_types=("distilbert",),
        base="distilbert",
        layers="transformer.layer",
        module="ffn",
        projections={"w_in": "ffn.lin1", "w_out": "ffn.lin2"},
        layer_class="transformers.models.distilbert.modeling_distilbert:Transformer",
        layer_class_builds_list=True,
        width_key="hidden_dim",
        activation_key="activation",
        dropout="ffn.dropout",
    ),
)
