"""What options may be called, known without importing what carries them out: the command line answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MethodEntry:
    """What is known of a compression method before its file is imported.

    Attributes:
        file: the module in `methods/` that holds it: a function of the method's name, a `methods.Reducer`.
        does: what it does, in a few words, for the documentation.
        text: calibration text is `unused`, `helps`, or is `needed`.
        narrows: the result has fewer neurons. Otherwise it keeps them all and spends the same number of parameters in
            another way, so that it can be measured but not put into a model.
        scales: its neurons have a scale, the number of neurons that each stands for.
        computes: it computes what neurons put out, so that their function must be one of the kernels'.
        weighs_outputs: it asks what errors of the outputs do to the model, where there are gradients that tell.
        takes_bfloat16: without statistics it takes bfloat16 weights as they are, and gives float32; others get float32.
    """

    file: str
    does: str
    text: Literal["unused", "helps", "needed"] = "unused"
    narrows: bool = True
    scales: bool = False
    computes: bool = False
    weighs_outputs: bool = False
    takes_bfloat16: bool = False


#: The compression methods by name, sorted. A method is its file and its line here.
METHODS = {
    "cluster": MethodEntry("fusion", "the function of `published` with the scale folded"),
    "fasp": MethodEntry(
        "fasp", "the choice of `wanda`, with output weights fitted to the text", text="needed", computes=True
    ),
    "fusion": MethodEntry(
        "fusion",
        "clusters of neurons, each fused into one; the default without text",
        text="helps",
        scales=True,
        takes_bfloat16=True,
    ),
    "magnitude": MethodEntry("magnitude", "keeps neurons by the norms of their weights; never looks at text"),
    "merge": MethodEntry(
        "merge",
        "neurons merged into those that stand for them, by what the model's predictions lose; the default with text",
        text="needed",
        computes=True,
        weighs_outputs=True,
    ),
    "mmd": MethodEntry("mmd", "neurons whose distribution is like the original's", scales=True),
    "obs": MethodEntry(
        "obs", "drops the neuron that costs least, fits the others, and again", text="needed", computes=True
    ),
    "osscar": MethodEntry(
        "osscar", "the neurons of `obs`, then swaps while the fitted error falls", text="needed", computes=True
    ),
    "prune": MethodEntry("prune", "keeps neurons by joint importance", text="helps"),
    "published": MethodEntry("fusion", "the paper's clustering", scales=True),
    "random": MethodEntry("subset", "keeps neurons drawn at random: what every other method should beat"),
    "select": MethodEntry(
        "select", "keeps neurons by greedy choice of what they do on the text", text="needed", computes=True
    ),
    "sketch": MethodEntry("sketch", "a random projection of the neurons"),
    "slice": MethodEntry(
        "slice",
        "principal components of inputs and outputs; to measure only, since it keeps the width",
        text="needed",
        computes=True,
        narrows=False,
    ),
    "svd": MethodEntry("svd", "low-rank projections; to measure only, since it keeps the width", narrows=False),
    "twossp": MethodEntry("twossp", "keeps neurons that are most active on the text", text="needed", computes=True),
    "wanda": MethodEntry("wanda", "keeps neurons by activity times their output weights", text="needed"),
}
#: The name for what is measured to be best: `AUTOMATIC_METHOD` with some tuning, and sequential without experts, where
#: there is calibration text; `PLAIN_METHOD` where there is none, and for experts in streamed runs.
AUTOMATIC = "auto"
AUTOMATIC_METHOD, PLAIN_METHOD, AUTOMATIC_STEPS = "merge", "fusion", 80
#: Those that cannot run without calibration text, and those whose result is no narrower FFN.
NEED_TEXT = frozenset(name for name, entry in METHODS.items() if entry.text == "needed")
KEEP_WIDTH = frozenset(name for name, entry in METHODS.items() if not entry.narrows)
#: What a model is fine-tuned for.
TASKS = ("classification", "lm")
#: Companion methods, each a file in `companions/` that registers itself with peft; and the peft that they need.
COMPANIONS = ("hiwi", "mpo", "pafi", "said")
PEFT_NEEDED = (0, 21)
#: What `finetune` may train in place of all weights; and learning rates by default of these, of adapters, and of all
#: weights. Those of companions were measured on 2,000 rows of SST-2 (docs/guide/companions.md); PaFi was best at 3e-2
#: in that short run, and gets less here for longer ones.
PEFT_METHODS = tuple(sorted(("lora", *COMPANIONS)))
PEFT_RATES = {"hiwi": 1e-3, "lora": 1e-3, "mpo": 3e-4, "pafi": 1e-2, "said": 3e-3}
ADAPTER_RATE, FULL_RATE = 1e-3, 5e-5
#: Optimisers that `finetune` trains with.
TRAINERS = ("adamw", "sgd")
#: Sentences of a file or a list that are calibrated on, by default.
CALIBRATION_SENTENCES = 512
#: Parameterization -> the tangent kernel that the steps of the optimiser it suits see.
OPTIMIZER_KERNELS = {"scaled": "sign", "split": "gd"}
