"""Methods and corrections over all FFNs of a model."""
