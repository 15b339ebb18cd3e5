"""The command line: what it prints where, its exit codes, and its one-line errors."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors
import torch
import transformers

import checkpoints as ck
import fusion_kernels
import mlp_fusion
from commands import Run, run_for_real
from families import WIDTH
from mlp_fusion import InputError
from mlp_fusion import cli as cli_module
from mlp_fusion.verbs import compress as compress_module
from mlp_fusion.verbs.env import lines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ck.save_tiny(tmp_path_factory.mktemp("source") / "bert")


@pytest.fixture(scope="module")
def fused(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "bert-fused"
    mlp_fusion.compress(source, out, 16)
    return out


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_prints_a_table(run: Run, source: Path) -> None:
    done = run("plan", source, "--width", "16", "--layers", "0-1")
    assert (done.code, done.err) == (0, "")
    assert done.out == mlp_fusion.plan(source, 16, "0-1").table() + "\n"
    assert f"{WIDTH} → 16" in done.out


def test_plan_prints_json(run: Run, source: Path) -> None:
    done = run("plan", source, "--width", "0.5", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == json.loads(json.dumps(mlp_fusion.plan(source, 0.5).to_dict()))
    assert [row["neurons_after"] for row in done.json["ffns"]] == [32, 32, 32]


def test_width_is_a_count_or_a_share(run: Run, source: Path) -> None:
    kept = [run("plan", source, "--json", "--width", width).json["ffns"][0]["neurons_after"] for width in ("8", "0.25")]
    assert kept == [8, 16]


@pytest.mark.parametrize(
    ("text", "width"), [("768", 768), ("0.25", 0.25), (".5", 0.5), ("-8", -8), ("0", 0), ("1.0", 1.0), ("1e-1", 0.1)]
)
def test_parse_width(text: str, width: float) -> None:
    parsed = cli_module.parse_width(text)
    assert parsed == width
    assert type(parsed) is type(width)


@pytest.mark.parametrize("text", ["", "half", "25%", "0,25", "0x10", "1/4", "16 neurons"])
def test_parse_width_refuses(text: str) -> None:
    with pytest.raises(InputError, match="give a count such as 768 or a share") as caught:
        cli_module.parse_width(text)
    assert repr(text) in str(caught.value)


# --- compress and verify ---------------------------------------------------------------------------------------------


def test_compress_prints_a_table(run: Run, source: Path, fused: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compress", source, out, "--width", "0.25", "--device", "cpu")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[-1] == f"written: {out}"
    assert sum(f"{WIDTH} → 16" in line for line in lines) == 3
    assert any(line.startswith("parameters: ") for line in lines)
    assert (out / ck.WEIGHTS).read_bytes() == (fused / ck.WEIGHTS).read_bytes()


def test_compress_prints_json(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compress", source, out, "--width", "24", "--layers", "last:1", "--optimizer", "sgd", "--seed", "7",
               "--method", "fusion", "--json")  # fmt: skip
    assert done.code == 0
    report = done.json
    assert report == json.loads((out / "mlp_fusion" / "report.json").read_text())
    assert [(row["layer"], row["neurons_after"]) for row in report["rows"]] == [(2, 24)]
    assert (report["settings"]["optimizer"], report["parameterization"], report["settings"]["seed"]) == (
        "sgd",
        "split",
        7,
    )
    mlp_fusion.compress(source, tmp_path / "same", 24, [2], optimizer="sgd", seed=7)
    assert (out / ck.WEIGHTS).read_bytes() == (tmp_path / "same" / ck.WEIGHTS).read_bytes()


def test_compress_for_inference(run: Run, source: Path, tmp_path: Path) -> None:
    done = run("compress", source, tmp_path / "out", "--width", "8", "--optimizer", "none", "--json")
    assert done.code == 0
    assert done.json["settings"]["optimizer"] is None
    assert done.json["parameterization"] == "folded"
    assert not (tmp_path / "out" / ck.SCALE).exists()


def test_compress_passes_the_text_on(run: Run, source: Path, tmp_path: Path) -> None:
    done = run("compress", source, tmp_path / "out", "--width", "8", "--text", tmp_path / "absent.txt")
    assert done.code == 2
    assert done.error.startswith(f"mlp-fusion: {tmp_path / 'absent.txt'}: no such file")
    assert not (tmp_path / "out").exists()


def test_compress_runs_in_another_dtype(run: Run, source: Path, tmp_path: Path) -> None:
    done = run("compress", source, tmp_path / "out", "--width", "16", "--dtype", "float64")
    assert done.code == 0, done.err
    assert {tensor.dtype for tensor in ck.tensors(tmp_path / "out").values()} == {torch.float32}
    assert run("verify", tmp_path / "out").code == 0
    done = run("compress", source, tmp_path / "other", "--width", "16", "--dtype", "float16")
    assert (done.code, "would round the checkpoint's weights" in done.error) == (2, True)


def test_verify_prints_a_table(run: Run, fused: Path) -> None:
    done = run("verify", fused)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == str(fused)
    assert [line.split()[:2] for line in done.out.splitlines()[-5:]] == [
        ["shapes", "ok"], ["finite", "ok"], ["loads", "ok"], ["outputs", "ok"], ["scale", "ok"]
    ]  # fmt: skip


def test_verify_prints_json(run: Run, fused: Path) -> None:
    done = run("verify", fused, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["passed"] is True
    assert done.json["checkpoint"] == str(fused)
    assert [check["passed"] for check in done.json["checks"]] == [True] * 5


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_verify_that_fails(value: float, run: Run, fused: Path, tmp_path: Path) -> None:
    folder = ck.copy(fused, tmp_path / "broken")
    ck.replace_tensor(folder, "classifier.weight", lambda weight: weight * value)
    done = run("verify", folder, "--json")
    assert (done.code, done.err) == (1, "")
    assert done.json["passed"] is False
    table = run("verify", folder)
    assert table.code == 1
    assert table.out.count("FAILED") == sum(not check["passed"] for check in done.json["checks"])


# --- finetune --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sentences(fused: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A fused model with a tokenizer, and labelled sentences."""
    model = ck.add_tokenizer(ck.copy(fused, tmp_path / "model"), pad_token="<pad>")
    rows = [f"{'the cat sat' if n % 3 else 'a the'}\t{int(n % 3 > 0)}" for n in range(12)]
    (tmp_path / "train.tsv").write_text("\n".join(rows), encoding="utf-8")
    return model, tmp_path / "train.tsv"


def test_finetune_trains_and_says_so(run: Run, sentences: tuple[Path, Path], tmp_path: Path) -> None:
    model, file = sentences
    options = ("--task", "classification", "--train", file, "--eval", file, "--epochs", "1", "--batch-size", "4")
    done = run("finetune", model, tmp_path / "one", *options)
    assert done.code == 0
    assert "accuracy" in done.out
    assert f"written: {tmp_path / 'one'}" in done.out
    report = run("finetune", model, tmp_path / "two", *options, "--json").json
    assert report == json.loads((tmp_path / "two/finetune.json").read_text(encoding="utf-8"))
    assert (report["settings"]["epochs"], report["settings"]["batch_size"], report["examples"]) == (1.0, 4, 12)


def test_an_interrupted_finetune_says_how_to_go_on(
    run: Run, sentences: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = sentences
    whole = mlp_fusion.finetune

    def cut(*arguments: Any, **options: Any) -> Any:
        def stop(stage: str, done: int, total: int, loss: float | None) -> None:
            if done == 2 and not options["resume"]:
                raise KeyboardInterrupt

        return whole(*arguments, **{**options, "progress": stop})

    monkeypatch.setattr(mlp_fusion, "finetune", cut)
    options = ("--task", "classification", "--train", file, "--epochs", "1", "--batch-size", "4")
    done = run("finetune", model, tmp_path / "out", *options)
    assert done.code == 130
    assert done.error == f"mlp-fusion: interrupted; --resume goes on from the last checkpoint in {tmp_path / 'out'}"
    assert run("finetune", model, tmp_path / "out", *options, "--resume").code == 0


def test_finetune_refuses_bad_input(run: Run, sentences: tuple[Path, Path], tmp_path: Path) -> None:
    model, file = sentences
    done = run("finetune", model, tmp_path / "out", "--task", "classification", "--train", tmp_path / "none.tsv")
    assert done.code == 2
    assert "none.tsv: no such file" in done.error
    done = run("finetune", model, tmp_path / "out", "--task", "sorting", "--train", file)
    assert done.code == 2
    assert "sorting" in done.error


# --- env -------------------------------------------------------------------------------------------------------------


def test_env_prints_json(run: Run) -> None:
    done = run("env", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json.keys() == {"versions", "devices", "backends", "gpu_kernels"}
    versions = done.json["versions"]
    assert versions["mlp-fusion"] == mlp_fusion.__version__
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    assert versions["safetensors"] == safetensors.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert done.json["devices"][0].startswith("cpu")
    assert len(done.json["devices"]) == 1 + torch.cuda.device_count()
    assert done.json["backends"] == json.loads(json.dumps(fusion_kernels.backends()))
    assert done.json["backends"]


def test_env_prints_a_list(run: Run) -> None:
    done = run("env")
    assert (done.code, done.err) == (0, "")
    for word in (torch.__version__, transformers.__version__, "cpu", *fusion_kernels.backends()):
        assert word in done.out
    known = {line.split()[0]: line for line in done.out.splitlines()}
    assert len({len(line) - len(line[len(name) :].lstrip()) for name, line in known.items() if name != "GPU"}) == 1


def test_env_names_a_reason_once() -> None:
    row = {"cpu": "loop", "triton unavailable": "no GPU", "cublas unavailable": "no GPU", "cpu declines": "float16"}
    report = {"versions": {"python": "3"}, "devices": [], "backends": {"mlp": row}, "gpu_kernels": []}
    assert lines(report) == ["python 3", "mlp    cpu: loop; triton, cublas unavailable: no GPU; cpu declines: float16"]


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "mlp_fusion", "--version"], capture_output=True, text=True, check=True)
    assert mlp_fusion.__version__ in done.stdout


def test_env_without_a_package(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = run("env", "--json").json["versions"]
    assert (versions["triton"], versions["numpy"]) == ("not installed", "1.2.3")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("json_option", [[], ["--json"]])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "7"], "width 7 is not a multiple of 8"),
        (["--width", "many"], "--width 'many': give a count"),
        (["--width", "1.5"], "strictly between 0 and 1"),
        (["--width", "nan"], "strictly between 0 and 1"),
        (["--width", "16", "--layers", "9"], "layers 9 out of range"),
        (["--width", "16", "--layers", "2-1"], "runs backwards"),
    ],
)
def test_bad_options(options: list[str], words: str, json_option: list[str], run: Run, source: Path) -> None:
    done = run("plan", source, *options, *json_option)
    assert done.code == 2
    assert done.error.startswith("mlp-fusion: ")
    assert words in done.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu"], "device 'tpu'"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--optimizer", "magic"], "unknown optimizer 'magic'"),
        (["--width", "64"], "not smaller than the FFN's 64"),
    ],
)
@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_bad_options_of_compress(
    options: list[str], words: str, json_option: list[str], run: Run, source: Path, tmp_path: Path
) -> None:
    done = run("compress", source, tmp_path / "out", "--width", "16", *options, *json_option)
    assert done.code == 2
    assert words in done.error
    assert os.listdir(tmp_path) == []


def test_a_dry_run_refuses_what_the_run_would(run: Run, source: Path, tmp_path: Path) -> None:
    done = run("compress", source, tmp_path / "out", "--width", "16", "--dry-run")
    assert (done.code, done.out) == (0, run("plan", source, "--width", "16").out)
    missing = tmp_path / "missing.txt"
    done = run("compress", source, tmp_path / "out", "--width", "16", "--dry-run", "--calibration", missing)
    assert (done.code, done.error) == (2, f"mlp-fusion: {missing}: no such file")
    assert "is not empty" in run("compress", source, source, "--width", "16", "--dry-run").error
    measured = ["--stream", "--text", __file__, "--dry-run"]
    assert run("compress", source, tmp_path / "out", "--width", "16", *measured).error == (
        "mlp-fusion: a streamed run has no whole model: leave out text, or stream"
    )
    assert os.listdir(tmp_path) == []


def test_bad_weights_found_in_the_middle(run: Run, source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    ck.replace_tensor(folder, "bert.encoder.layer.2.output.dense.weight", lambda weight: weight / 0)
    done = run("compress", folder, tmp_path / "out", "--width", "16")
    assert done.code == 2
    assert "bert.encoder.layer.2" in done.error
    assert os.listdir(tmp_path) == ["source"]


def test_bad_folders(run: Run, source: Path, tmp_path: Path) -> None:
    for command in (["plan", tmp_path, "--width", "8"], ["compress", tmp_path, tmp_path / "o", "--width", "8"],
                    ["verify", tmp_path]):  # fmt: skip
        done = run(*command)
        assert (done.code, done.error) == (
            2,
            f"mlp-fusion: {tmp_path / 'config.json'} is missing: not a Hugging Face checkpoint",
        )
    assert run("verify", source).code == 2
    assert run("verify", tmp_path / "nowhere").error == f"mlp-fusion: {tmp_path / 'nowhere'}: no such folder"
    assert "is not empty" in run("compress", source, source, "--width", "8").error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "MODEL"], "Missing option '--width'"),
        (["compress", "MODEL", "OUT"], "Missing option '--width'"),
        (["plan", "--width", "8"], "Missing argument 'MODEL'"),
        (["compress", "MODEL", "--width", "8"], "Missing argument 'OUT'"),
        (["verify"], "Missing argument 'OUT'"),
        (["plan", "MODEL", "--width", "8", "--size", "3"], "No such option"),
        (["compress", "MODEL", "OUT", "--width", "8", "--seed", "x"], "'x' is not a valid integer"),
        (["plan", "MODEL", "MORE", "--width", "8"], "unexpected extra argument"),
        (["shrink"], "No such command 'shrink'"),
        (["--quiet"], "No such option"),
    ],
)
def test_wrong_usage(
    arguments: list[str], words: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "Traceback" not in done.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["plan", "-h"], ["compress", "--help"], ["verify", "-h"]])
def test_help(arguments: list[str], run: Run) -> None:
    done = run(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: ")


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.code, done.err) == (0, "")
    assert mlp_fusion.__version__ in done.out


def test_other_errors(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("two\n  lines")

    monkeypatch.setattr(compress_module, "fuse", fail)
    arguments = ("compress", source, tmp_path / "out", "--width", "16")
    for option in ([], ["--json"]):
        done = run(*arguments, *option)
        assert done.code == 1
        assert done.error == "mlp-fusion: RuntimeError: two lines (--debug shows where)"
    debugged = run("--debug", *arguments)
    assert debugged.code == 1
    assert "Traceback" in debugged.err
    assert 'raise RuntimeError("two' in debugged.err
    assert os.listdir(tmp_path) == []


def test_debug_shows_where_bad_input_was_met(run: Run, source: Path) -> None:
    done = run("--debug", "plan", source, "--width", "7")
    assert done.code == 2
    assert "Traceback" in done.err
    assert "in resolve_width" in done.err
    assert "InputError: width 7" in done.err
    assert done.out == ""
    assert done.err.splitlines()[-1].startswith("mlp-fusion: width 7 is not a multiple of 8")


def test_interrupt(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "_write_card", interrupt)
    done = run("compress", source, tmp_path / "out", "--width", "16")
    assert done.code == 130
    # click ends the terminal's line with the ^C first
    assert done.err.strip() == "mlp-fusion: interrupted; nothing was written"
    assert os.listdir(tmp_path) == []


def test_what_is_asked_wrongly_is_answered_without_torch() -> None:
    """All in one process, which is slow to start enough: no module that takes long to import is needed."""
    script = """
import sys
from mlp_fusion.cli import main
for arguments in ARGUMENTS:
    sys.argv = ["mlp-fusion", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == (0 if {"-h", "--version"} & set(arguments) else 2), arguments
slow = {"torch", "transformers", "numpy", "rich", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not slow, slow
"""
    wrong = [
        *([command, "-h"] for command in ("plan", "compress", "verify", "finetune", "report", "env")),
        ["-h"], ["--version"], ["shrink"], ["--quiet"], ["plan", "m"], ["compress", "m", "o", "--width", "wide"],
        *(["compress", "m", "o", "--width", "8", *more] for more in (
            ["--method", "magic"], ["--method", "svd"], ["--method", "select"], ["--optimizer", "magic"],
            ["--seed", "x"], ["--budget", "0.5"], ["--match", "gd"], ["--tune", "3"], ["--sequential"], ["--refit"],
            ["--tune", "-1"],
        )),
        *(["finetune", "m", "o", "--task", "lm", "--train", "t", *more] for more in (
            ["--epochs", "0"], ["--optimizer", "lion"], ["--batch-size", "3", "--accumulation", "2"], ["--warmup", "2"],
        )),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script.replace("ARGUMENTS", repr(wrong))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_plan_imports_the_modelling_code_of_its_model_alone(source: Path) -> None:
    script = f"""
import sys
import mlp_fusion
assert not {{"torch", "transformers"}} & set(sys.modules)
mlp_fusion.plan({str(source)!r}, 16)
assert not {{"transformers.trainer", "peft", "matplotlib"}} & set(sys.modules)
modelling = [name.split(".") for name in sys.modules if "transformers.models." in name and ".modeling_" in name]
models = {{parts[2] for parts in modelling}}
assert models == {{"auto", "bert"}}, models  # a table of names, and what is built on the meta device
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the installed program -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_program_compresses(source: Path, fused: Path, tmp_path: Path) -> None:
    done = run_for_real("compress", source, tmp_path / "out", "--width", "0.25", "--json")
    assert done.code == 0, done.err
    assert done.json["rows"][0]["neurons_after"] == 16
    assert "Loading weights" not in done.err  # transformers' own bars and reports
    assert "LOAD REPORT" not in done.err
    assert (tmp_path / "out" / ck.WEIGHTS).read_bytes() == (fused / ck.WEIGHTS).read_bytes()


@pytest.mark.slow
def test_program_meets_a_name_that_is_no_folder() -> None:
    done = run_for_real("plan", "no-such-organisation/no-such-model", "--width", "0.25")
    assert done.code == 2
    assert done.error.startswith("mlp-fusion: no-such-organisation/no-such-model: ")
