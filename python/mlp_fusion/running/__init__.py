"""A model on its inputs: where batches come from, what passes through its FFNs, and its outputs."""
