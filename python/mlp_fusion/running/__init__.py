"""A model on text: where batches come from, what passes through its FFNs, and its outputs."""
