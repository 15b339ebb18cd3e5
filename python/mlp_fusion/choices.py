"""What options may be called, known without importing what carries them out: the command line answers at once."""

from __future__ import annotations

#: Names of the compression methods, sorted; `methods` refuses to register another.
METHODS = ("cluster", "fusion", "mmd", "prune", "published", "select", "sketch", "svd")
#: Those that cannot run without calibration text, and those whose result is no narrower FFN.
NEED_TEXT = frozenset({"select"})
KEEP_WIDTH = frozenset({"svd"})
#: What a model is fine-tuned for.
TASKS = ("classification", "lm")
#: Optimisers that `finetune` trains with.
TRAINERS = ("adamw", "sgd")
#: Sentences of a file or a list that are calibrated on, by default.
CALIBRATION_SENTENCES = 512
#: Parameterization -> the tangent kernel that the steps of the optimiser it suits see.
OPTIMIZER_KERNELS = {"scaled": "sign", "split": "gd"}
