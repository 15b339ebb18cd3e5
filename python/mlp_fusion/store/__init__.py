"""Checkpoints: plan from headers, compress, verify, and what makes a fused model save and load as a plain one."""
