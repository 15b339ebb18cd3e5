"""Checkpoints of any size, compressed from disk to disk: no model is built, and few tensors are in memory at a time."""
