"""`finetune` with a method of peft: what it trains, writes and refuses, that it resumes, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import checkpoints as ck
import mlp_fusion
from commands import Run
from families import token_batch
from mlp_fusion import InputError
from mlp_fusion.choices import PEFT_RATES
from mlp_fusion.companions.making import attach, make_config

pytestmark = pytest.mark.slow

BATCH = token_batch()
ROWS = [{"text": ("the cat sat a cat", "a the")[n % 2], "label": n % 2} for n in range(40)]
OPTIONS: dict[str, Any] = {"task": "classification", "epochs": 2.0, "batch_size": 8, "max_length": 8, "seed": 3}
METHODS: dict[str, dict[str, Any]] = {
    "hiwi": {"r": 2, "parameters": "both"},
    "pafi": {"budget": 60},
    "lora": {"r": 2, "target_modules": ["query"]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "bert"
    model = ck.tiny_model("bert", task="Model")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.02)
    model.save_pretrained(folder)
    return ck.add_tokenizer(folder, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def fused(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "bert"
    mlp_fusion.compress(source, out, 16, [0, 2])
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**BATCH).logits
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_and_the_adapter_compute_the_same(method: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = mlp_fusion.finetune(source, out, ROWS, ROWS, peft=method, peft_options=METHODS[method], **OPTIONS)
    assert report.final is not None
    assert report.settings["peft"] == method
    assert report.settings["learning_rate"] == PEFT_RATES[method]
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    base = AutoModelForSequenceClassification.from_pretrained(source)
    again = PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(logits(again), logits(merged), rtol=1e-4, atol=1e-6)
    assert not (out / "checkpoints").exists()
    before, after = ck.tensors(source), ck.tensors(out)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[f"bert.{name}"])}
    assert moved
    if method != "pafi":
        parts = ("intermediate.dense", "output.dense") if method == "hiwi" else ("query.weight",)
        assert all(any(part in name for part in parts) for name in moved)
    adapter = ck.tensors(out / "adapter")
    assert any("classifier" in name for name in adapter)


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(method: str, source: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "peft": method, "peft_options": METHODS[method], "checkpoint_steps": 3}
    whole = mlp_fusion.finetune(source, tmp_path / "whole", ROWS, ROWS, **options)

    def stop(stage: str, done: int, total: int, loss: float | None) -> None:
        if done == 8:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        mlp_fusion.finetune(source, tmp_path / "cut", ROWS, ROWS, progress=stop, **options)
    (checkpoint,) = (tmp_path / "cut/checkpoints/train").glob("checkpoint-*")
    assert not (checkpoint / "model.safetensors").exists()  # what trains, and no more
    with pytest.raises(InputError, match="had peft_options"):
        mlp_fusion.finetune(
            source, tmp_path / "cut", ROWS, ROWS, resume=True, **{**options, "peft_options": {"modules_to_save": None}}
        )
    resumed = mlp_fusion.finetune(source, tmp_path / "cut", ROWS, ROWS, resume=True, **options)
    for folder in ("", "adapter"):
        one, other = (ck.tensors(tmp_path / name / folder) for name in ("cut", "whole"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert {**resumed.to_dict(), "seconds": 0.0} == {**whole.to_dict(), "seconds": 0.0}


def test_a_fused_model_keeps_its_scale(fused: Path, tmp_path: Path) -> None:
    mlp_fusion.finetune(fused, tmp_path / "out", ROWS, peft="pafi", peft_options={"budget": 0.05}, **OPTIONS)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    folded = logits(merged)
    mlp_fusion.restore(merged, tmp_path / "out")
    torch.testing.assert_close(logits(merged), folded, rtol=1e-4, atol=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(fused)
    mlp_fusion.restore(base, fused)
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(again), folded, rtol=1e-3, atol=1e-5)


def test_a_language_model_trains_without_a_new_head(tmp_path: Path) -> None:
    source = ck.add_tokenizer(
        ck.save_tiny(tmp_path / "gpt2", "gpt2", task="CausalLM"), pad_token="<pad>", eos_token="</s>"
    )
    text = tmp_path / "text.txt"
    text.write_text("the cat sat a cat\n" * 40, encoding="utf-8")
    options = {"task": "lm", "epochs": 1.0, "batch_size": 4, "max_length": 8}
    mlp_fusion.finetune(source, tmp_path / "out", text, peft="pafi", peft_options={"budget": 0.1}, **options)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all("pafi_" in name for name in ck.tensors(tmp_path / "out" / "adapter"))


def test_what_is_deprecated_in_transformers_is_no_users_concern(recwarn: pytest.WarningsRecorder) -> None:
    attach(ck.tiny_model("bert"), "pafi", {"budget": 10}, "classification", [])
    assert not [warning for warning in recwarn if warning.category is FutureWarning]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft": "adapter"}, "peft 'adapter': use hiwi, lora"),
    ({"peft_options": {"r": 2}}, "peft_options are options of a method: choose one with peft"),
    ({"peft": "hiwi", "peft_options": ["r"]}, r"peft_options \['r'\]: give a dictionary"),
    ({"peft": "hiwi", "peft_options": {"rank": 2}}, "hiwi has no option 'rank'"),
    ({"peft": "hiwi", "peft_options": {"r": "0"}}, "r is 0: HiWi needs a rank of 1 or more"),
    ({"peft": "hiwi", "peft_options": {"r": "two"}}, "r 'two': give an integer"),
    ({"peft": "pafi", "peft_options": {"budget": "1e9"}}, "budget is 1000000000.0: give a count"),
    ({"peft": "pafi", "peft_options": {"budget": "100000000"}}, "budget 100000000 is 100,000,000 values"),
    ({"peft": "lora", "peft_options": {"target_modules": "nonsense"}}, "lora cannot be put into Bert"),
    ({"peft": "pafi", "original": "elsewhere"}, "original fits the fused layers' own weights"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_a_line(
    options: dict[str, Any], message: str, source: Path, fused: Path, tmp_path: Path
) -> None:
    known = {**OPTIONS, **options, **({"original": source} if "original" in options else {})}
    with pytest.raises(InputError, match=message) as caught:
        mlp_fusion.finetune(fused, tmp_path / "out", ROWS, **known)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_words_become_what_the_options_take() -> None:
    words = {"r": "8", "target_modules": "query,key", "lora_dropout": "0", "use_rslora": "true", "bias": "none"}
    config = make_config("lora", words)
    assert (config.r, config.target_modules, config.use_rslora, config.bias) == (8, {"query", "key"}, True, "none")
    assert make_config("pafi", {"budget": "0.25", "biases": "false"}).biases is False
    assert make_config("pafi", {"budget": "12"}).budget == 12
    assert make_config("hiwi", {"target_modules": "fc1"}).target_modules == {"fc1"}
    assert make_config("hiwi", {"target_modules": r".*\.fc1"}).target_modules == r".*\.fc1"
    assert make_config("lora", {"target_modules": "all-linear"}).target_modules == "all-linear"


def test_the_command_line_takes_options_of_the_method(run: Run, source: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.tsv"
    data.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS), encoding="utf-8")
    said = run(
        "finetune", source, tmp_path / "out", "--task", "classification", "--train", data, "--epochs", 1, "--peft",
        "hiwi", "--peft-options", "r=2", "--peft-options", "parameters=weight", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert '"parameters": "weight"' in said.out
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    for word, message in (("r", "peft_options 'r': give name=value"), ("r=2", "choose one with peft")):
        refused = run(
            "finetune", source, tmp_path / "no", "--task", "classification", "--train", data, "--peft-options", word
        )
        assert refused.code == 2
        assert message in refused.err


SCRIPT = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from peft import get_peft_model
import mlp_fusion
from companion_models import classifier
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
ids = torch.arange(48).reshape(8, 6)
for config in (mlp_fusion.PafiConfig(budget=0.05), mlp_fusion.HiWiConfig(parameters="both", r=2, scaling=50.0)):
    torch.manual_seed(0)
    made = get_peft_model(classifier(), config).eval()
    for p in made.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    trained = [p for p in made.parameters() if p.requires_grad]
    made(ids).logits.square().mean().backward()
    wanted = [p.grad.clone() for p in trained]
    made.zero_grad()
    shared = DistributedDataParallel(made)
    shared(ids[4 * rank : 4 * rank + 4]).logits.square().mean().backward()
    for p, grad in zip(trained, wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-9)
torch.distributed.barrier()  # no process goes while another is at its last sum
torch.distributed.destroy_process_group()
print("same")
"""


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    file = tmp_path / "main.py"
    file.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", file],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-9000:]
    assert done.stdout.count("same") == 2
