"""The page about fused checkpoints and fine-tuning runs: results gathered, summarised, drawn. Loads no model."""
