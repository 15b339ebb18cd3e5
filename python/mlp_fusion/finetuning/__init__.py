"""Fine-tuning of fused models: data from files, distillation, and `transformers.Trainer` around them."""
