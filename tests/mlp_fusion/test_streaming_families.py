"""Mixture-of-Experts models of every layout from disk to disk: the bits of a run in memory, loadable anywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MOE_MODELS, moe_model
from safetensors.torch import load_file

import checkpoints as ck
import mlp_fusion

pytestmark = pytest.mark.slow

#: Loads what it is told by its lines, and writes logits; another process, which knows nothing of this package.
_PLAIN = """
import sys, torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    folder, inputs, outputs = line.split()
    auto = transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if auto else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(inputs)).logits, outputs)
    print(*(key for key, found in info.items() if found), *(n for n in sys.modules if n.startswith("mlp_fusion")))
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    """Has a checkpoint run by transformers alone: what loading it complains of, and logits."""
    process = subprocess.Popen([sys.executable, "-c", _PLAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def run(folder: Path, batch: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        torch.save(batch, folder.parent / "inputs")
        print(folder, folder.parent / "inputs", folder.parent / "logits", file=process.stdin, flush=True)
        line = process.stdout.readline()  # type: ignore[union-attr]
        assert line, "the process has ended"
        return line.strip(), torch.load(folder.parent / "logits")

    yield run
    process.communicate()


@pytest.mark.parametrize("name", MOE_MODELS)
def test_the_bits_of_a_run_in_memory_and_loaded_without_this_package(name: str, plain: Any, tmp_path: Path) -> None:
    model = moe_model(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    for stream in (False, True):
        mlp_fusion.compress(tmp_path / "source", tmp_path / str(stream), 0.5, stream=stream, unmeasured=True)
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert memory.keys() == streamed.keys()
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    scales = [load_file(tmp_path / folder / ck.SCALE) for folder in ("False", "True")]
    assert scales[0].keys() == scales[1].keys()
    assert all(torch.equal(scales[0][key], scales[1][key]) for key in scales[0])

    ids = torch.arange(3, 19).reshape(2, 8)
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        before = model(**batch).logits
        mlp_fusion.fuse(model, 0.5, unmeasured=True)
        fused = model(**batch).logits
    complaints, found = plain(tmp_path / "True", batch)
    assert complaints == ""
    torch.testing.assert_close(found, fused, rtol=1e-4, atol=1e-4 * float(fused.abs().max()))
    assert float((found - before).abs().max()) > 0.01 * float(before.abs().max())  # narrower, and seen in the outputs
