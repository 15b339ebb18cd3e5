"""MiniALBERT: one ALBERT layer that a model passes through several times, with small adapters of each pass.

Nouriborji, Rohanian, Kouchaki and Clifton, MiniALBERT: Model Distillation via Parameter-Efficient Recursive
Transformers (EACL 2023, arXiv 2210.06425). `configuration.py` and `modeling.py` are ordinary classes of transformers,
which importing `mlp_fusion` enters into its Auto classes.
"""
