"""Compressing from disk to disk: what `fuse` writes, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from discovered_models import ADAM_ONLY, auto, logits, model_of, tied
from safetensors.torch import load_file, save_file
from streams import StoppedError, files, stop_after

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.streaming import engines, estimate, tasks
from mlp_fusion.streaming.journal import Journal

pytestmark = pytest.mark.slow

_SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    **_SMALL, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip
_MIXTRAL: dict[str, Any] = {**_SMALL, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}


def saved(config: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A new small model of a config, on disk."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in tensors of their own, in several shards."""
    folder = tmp_path_factory.mktemp("mixtral") / "source"
    return saved(transformers.MixtralConfig(**_MIXTRAL), folder, max_shard_size="100KB")


def in_small_tasks(monkeypatch: pytest.MonkeyPatch, size: int = 60_000) -> None:
    monkeypatch.setattr(tasks, "TASK_BYTES", size)


# --- what is written -------------------------------------------------------------------------------------------------


_LAYOUTS = ("OPTConfig", "Phi3Config", "GPTJConfig", "EsmConfig", "T5Config", "BloomConfig", "Qwen3MoeConfig",
            "GptOssConfig")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in _LAYOUTS for dtype in (torch.float32, torch.bfloat16)),
        # As bfloat16 but for the rounding: one dense layout, and one with experts.
        ("Phi3Config", torch.float16),
        ("Qwen3MoeConfig", torch.float16),
    ],
)
def test_the_same_bits_as_in_memory(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_tasks(monkeypatch)
    optimizer = "adamw" if name in ADAM_ONLY or dtype == torch.float32 else "sgd"
    model_of(name).to(dtype).save_pretrained(tmp_path / "source")
    for stream in (False, True):
        report = mlp_fusion.compress(
            tmp_path / "source", tmp_path / str(stream), 0.5, optimizer=optimizer, stream=stream, unmeasured=True
        )
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert memory.keys() == streamed.keys()
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    assert all(memory[key].dtype == streamed[key].dtype for key in memory)
    scales = [load_file(tmp_path / folder / ck.SCALE) for folder in ("False", "True")]
    assert scales[0].keys() == scales[1].keys()
    assert all(torch.equal(scales[0][key], scales[1][key]) for key in scales[0])
    assert ck.read_config(tmp_path / "False") == ck.read_config(tmp_path / "True")
    assert all(2 * row.neurons_after == row.neurons_before for row in report.rows)
    assert report.parameters_after == sum(
        t.numel() for key, t in streamed.items() if not key.endswith("inv_freq")
    )  # fmt: skip


@pytest.mark.parametrize("name", ["Phi3Config", "Qwen3MoeConfig", "GptOssConfig"])
def test_equal_neurons_merge_and_are_restored(name: str, tmp_path: Path) -> None:
    source = tied(name)
    source.save_pretrained(tmp_path / "source")
    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 0.5, stream=True)
    loaded = auto(name).from_pretrained(tmp_path / "out").eval()
    for _ in range(2):
        torch.testing.assert_close(logits(loaded), logits(source), rtol=1e-4, atol=2e-5)
        if "mlp_fusion.modules" not in str({type(module).__module__ for module in loaded.modules()}):
            mlp_fusion.restore(loaded, tmp_path / "out")


def test_everything_but_ffns_is_copied_bit_for_bit(mixtral: Path, tmp_path: Path) -> None:
    (mixtral / "tokenizer.json").write_text("{}")
    mlp_fusion.compress(mixtral, tmp_path / "out", 0.5, stream=True)
    before, after = ck.tensors(mixtral), ck.tensors(tmp_path / "out")
    assert list(before) == list(after)
    other = [key for key in before if ".experts." not in key]
    assert all(torch.equal(before[key], after[key]) for key in other)
    assert after["model.layers.0.block_sparse_moe.experts.3.w2.weight"].shape == (64, 32)
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    assert names == {path.name for path in mixtral.glob("*.safetensors*")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert index["weight_map"].keys() == after.keys()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    (mixtral / "tokenizer.json").unlink()
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_layers_that_transformers_does_not_load_are_narrowed_too(tmp_path: Path) -> None:
    """A layer for multi-token prediction: its experts as the others', its own projection as it was."""
    source = saved(transformers.DeepseekV3Config(**_DEEPSEEK), tmp_path / "source")
    held = load_file(source / ck.WEIGHTS)
    extra = {key.replace("layers.2.", "layers.3."): t.clone() for key, t in held.items() if "layers.2." in key}
    extra["model.layers.3.eh_proj.weight"] = torch.randn(64, 128).to(torch.bfloat16)
    save_file(held | extra, source / ck.WEIGHTS, metadata={"format": "pt"})
    planned = mlp_fusion.plan(source, 0.5)
    dropped = [ffn.path for ffn in planned.ffns if not ffn.loaded]
    assert dropped == ["model.layers.3.mlp.experts", "model.layers.3.mlp.shared_experts"]
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.experts is of a layer that transformers does not"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=False)
    report = mlp_fusion.compress(source, tmp_path / "out", 0.5)  # without being asked to
    written = load_file(tmp_path / "out" / ck.WEIGHTS)
    for key, tensor in written.items():
        twin = written[key.replace("layers.3.", "layers.2.")] if key != "model.layers.3.eh_proj.weight" else extra[key]
        assert torch.equal(tensor, twin) or "layers.3." not in key, key
    buffers = sum(t.numel() for key, t in written.items() if key.endswith("e_score_correction_bias"))
    assert report.parameters_after == sum(t.numel() for t in written.values()) - buffers // 3 * 2
    assert report.parameters_after == planned.parameters_after
    assert report.bytes_after == sum(t.nbytes for t in written.values())
    # One of its experts is of another shape: it is like nothing that is known.
    held_back = "model.layers.3.mlp.experts.5.up_proj.weight"
    save_file(held | {**extra, held_back: extra[held_back][1:].clone()}, source / ck.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"looks like part of an FFN.* has no place for it"):
        mlp_fusion.plan(source, 0.5)


def test_a_plan_estimates_what_a_run_takes(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_speed", lambda: 1e11)  # a busy machine is as slow as it likes
    half, last = mlp_fusion.plan(mixtral, 0.5), mlp_fusion.plan(mixtral, 0.5, layers="last:1")
    assert half.operations == 3 * 4 * 64 * 3 * 64 * 64  # layers, experts, neurons, and parameters of an expert
    assert last.operations == half.operations // 3
    assert half.seconds > 0
    assert half.peak_bytes == last.peak_bytes > 500 * 2**20
    assert "streamed: about 1 s and " in half.table()


@pytest.mark.parametrize("method", ["prune", "cluster", "mmd"])
def test_other_methods(method: str, mixtral: Path, tmp_path: Path) -> None:
    for stream in (False, True):
        options: dict[str, Any] = {"method": method, "stream": stream, "unmeasured": True}
        mlp_fusion.compress(mixtral, tmp_path / str(stream), 0.5, "last:1", **options)
    assert (tmp_path / "True" / ck.SCALE).exists() is (method == "mmd") is (tmp_path / "False" / ck.SCALE).exists()
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)


def test_chosen_layers(mixtral: Path, tmp_path: Path) -> None:
    mlp_fusion.compress(mixtral, tmp_path / "out", 0.5, layers="last:1", stream=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    widths = [layer.mlp.experts.down_proj.shape[-1] for layer in loaded.model.layers]
    assert widths == [64, 64, 32]
    mlp_fusion.restore(loaded, tmp_path / "out")


# --- what interrupts it ----------------------------------------------------------------------------------------------


@pytest.fixture
def whole(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What a run that nothing interrupts writes."""
    in_small_tasks(monkeypatch)
    mlp_fusion.compress(mixtral, tmp_path / "whole", 0.5, stream=True)
    return files(tmp_path / "whole")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("tasks_done", [1, 4])
def test_a_run_that_was_stopped_goes_on(
    tasks_done: int, existing: bool, mixtral: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with pytest.raises(StoppedError):
        mlp_fusion.compress(mixtral, out, 0.5, stream=True, progress=stop_after(tasks_done))
    assert not (out / "config.json").exists()
    with pytest.raises(InputError, match=r"an unfinished run has left .*: go on with --resume, or start again with"):
        mlp_fusion.compress(mixtral, out, 0.5, stream=True)
    seen: list[tuple[int, int]] = []
    report = mlp_fusion.compress(
        mixtral, out, 0.5, stream=True, resume=True, progress=lambda *counts: seen.append(counts)
    )
    assert files(out) == whole
    assert seen[0][0] > tasks_done
    assert {total for _, total in seen} == {12}
    assert [row.neurons_after for row in report.rows] == [32] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    with pytest.raises(InputError, match="exists and is not empty"):
        mlp_fusion.compress(mixtral, out, 0.5, stream=True, resume=True)


def test_another_run_is_not_gone_on_with(
    mixtral: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ck.copy(mixtral, tmp_path / "source")
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        mlp_fusion.compress(source, out, 0.5, stream=True, progress=stop_after(2))
    again: dict[str, Any] = {"stream": True, "resume": True}
    with pytest.raises(InputError, match="the unfinished run had another recipe"):
        mlp_fusion.compress(source, out, 0.5, seed=1, **again)
    with pytest.raises(InputError, match="the unfinished run had another recipe"):
        mlp_fusion.compress(source, out, 0.25, **again)
    shard = sorted(source.glob("*.safetensors"))[1]
    times = shard.stat()
    os.utime(shard, ns=(1, 1))
    with pytest.raises(InputError, match="the unfinished run had another source"):
        mlp_fusion.compress(source, out, 0.5, **again)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr(mlp_fusion, "__version__", "99")
        with pytest.raises(InputError, match="the unfinished run had another version"):
            mlp_fusion.compress(source, out, 0.5, **again)
    mlp_fusion.compress(source, out, 0.5, stream=True, force=True)
    assert {key: value for key, value in files(out).items() if key.endswith(".safetensors")} == {
        key: value for key, value in whole.items() if key.endswith(".safetensors")
    }


def test_a_journal_that_was_cut_short_counts_as_far_as_it_goes(
    mixtral: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        mlp_fusion.compress(mixtral, out, 0.5, stream=True, progress=stop_after(4))
    journal = tmp_path / ".out.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    # What no line speaks of may hold anything.
    for shard in (tmp_path / ".out.partial").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        if shard.name.startswith("model-00004"):
            data[-64:] = b"\xff" * 64
            shard.write_bytes(data)
    mlp_fusion.compress(mixtral, out, 0.5, stream=True, resume=True)
    assert files(out) == whole
    journal.write_bytes(b"no json\n")
    shutil.rmtree(out)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(InputError, match="is damaged, or no journal of this program: move it elsewhere"):
            mlp_fusion.compress(mixtral, out, 0.5, stream=True, **options)
    assert journal.read_bytes() == b"no json\n"


def test_a_run_that_had_only_to_get_its_name(
    mixtral: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Journal.close

    def stopped(self: Journal) -> None:
        close(self)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", stopped)
        with pytest.raises(StoppedError):
            mlp_fusion.compress(mixtral, tmp_path / "out", 0.5, stream=True)
    monkeypatch.setitem(engines.ENGINES, "local", None)  # type: ignore[arg-type]
    report = mlp_fusion.compress(mixtral, tmp_path / "out", 0.5, stream=True, resume=True)
    assert files(tmp_path / "out") == whole
    assert len(report.rows) == 3


def test_a_run_that_has_its_name_and_had_only_to_clear_up(
    mixtral: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Path, missing_ok: bool = False) -> None:
        if self.name == ".out.journal" and self.exists():
            raise StoppedError
        unlink(self, missing_ok=missing_ok)

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", stopped)
    with pytest.raises(StoppedError):
        mlp_fusion.compress(mixtral, tmp_path / "out", 0.5, stream=True)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert (tmp_path / ".out.journal").exists()
    report = mlp_fusion.compress(mixtral, tmp_path / "out", 0.5, stream=True, resume=True)
    assert files(tmp_path / "out") == whole
    assert [row.neurons_after for row in report.rows] == [32] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_that_replaces_a_checkpoint_goes_on_with_that(
    mixtral: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mlp_fusion.compress(mixtral, out, 0.25, stream=True)
    before = files(out)
    with pytest.raises(StoppedError):
        mlp_fusion.compress(mixtral, out, 0.5, stream=True, force=True, progress=stop_after(3))
    assert files(out) == before
    mlp_fusion.compress(mixtral, out, 0.5, stream=True, resume=True)
    assert files(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_only_checkpoints_of_this_program_are_replaced(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mlp_fusion.compress(mixtral, out, 0.5, stream=True)
    before = files(out)
    mlp_fusion.compress(mixtral, out, 0.25, stream=True, force=True)
    assert ck.read_config(out)["intermediate_size"] == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # In memory, too; and nothing is lost when it fails.
    mlp_fusion.compress(mixtral, out, 0.5, force=True)
    assert {k: v for k, v in files(out).items() if k in before and "config" not in k}.keys() >= {ck.SCALE}
    with pytest.raises(InputError, match="not smaller than the FFN's 64"):
        mlp_fusion.compress(mixtral, out, 64, stream=True, force=True)
    assert ck.read_config(out)["intermediate_size"] == 32
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is no checkpoint that was fused by this program: it is not replaced"):
        mlp_fusion.compress(mixtral, tmp_path / "theirs", 0.5, stream=True, force=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": True, "text": "x.txt"}, "a streamed run has no whole model"),
        ({"stream": True, "engine": "ray", "calibration": "x.txt"}, "engine ray carries no hidden states"),
        ({"resume": True, "force": True}, "resume goes on with a run and force starts it again"),
        ({"engine": "ray"}, "engine ray does streamed runs"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a sentence\n")
    options = {key: tmp_path / value if value == "x.txt" else value for key, value in options.items()}
    with pytest.raises(InputError, match=message):
        mlp_fusion.compress(mixtral, tmp_path / "out", **{"width": 0.5, **options})
    assert not (tmp_path / "out").exists()
