"""Installing: what `MLP_FUSION_BUILD` builds, the wheels with and without torch, and a missing compiled library."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from fusion_kernels import native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "fusion_kernels", "python", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
#: A module that stands in front of the real torch and cannot be imported.
NO_TORCH = "raise ImportError('torch is hidden')\n"

compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, without anything built in them."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder / name)
    return folder


def hide_torch(tmp_path: Path) -> str:
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "torch.py").write_text(NO_TORCH, encoding="utf-8")
    return str(folder)


def run(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("MLP_FUSION_BUILD", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def build_wheel(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel by the build backend, without the isolation that would need the network."""
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    return run(checkout, "-c", code, "dist", **environment)


def hasty_compiler(tmp_path: Path) -> str:
    """The compiler, made not to optimise, in a third of the time: what is tested is what becomes of its output."""
    script = tmp_path / "hasty"
    compiler = os.environ.get("CXX", "c++")
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def files_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_a_wheel_without_torch_holds_python_only(checkout: Path, tmp_path: Path) -> None:
    done = build_wheel(checkout, PYTHONPATH=hide_torch(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "the compiled library is not built: torch cannot be imported" in done.stderr
    names = files_of(wheel)
    assert "fusion_kernels/kmeans/cpu_backend.py" in names
    assert not [name for name in names if name.endswith(".so") or name.startswith("csrc")]


@compiler
def test_a_wheel_with_torch_holds_the_library_for_every_python(checkout: Path, tmp_path: Path) -> None:
    done = build_wheel(checkout, MLP_FUSION_BUILD="cpu", CXX=hasty_compiler(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert "-cp310-abi3-" in wheel.name
    assert "fusion_kernels/_C.abi3.so" in files_of(wheel)

    # What an installed wheel does: elsewhere than the checkout, with nothing but the wheel's own files.
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import torch, fusion_kernels as f; assert 'installed' in f.__file__, f.__file__; "
        "print(f.backends()['kmeans']['cpu'], f.kmeans(torch.randn(50, 4), 5, backend='cpu').status.item())"
    )
    done = run(tmp_path, "-c", code, PYTHONPATH=str(installed))
    assert done.stdout.split() == ["cpu", "0"], done.stderr


def test_a_source_distribution_holds_the_sources(checkout: Path) -> None:
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done = run(checkout, "-c", code, "dist", MLP_FUSION_BUILD="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").iterdir()
    shutil.unpack_archive(archive, checkout / "unpacked")
    (unpacked,) = (checkout / "unpacked").iterdir()
    for name in ("csrc/kmeans.cpp", "csrc/cpu/kmeans.h", "csrc/cpu/lloyd.cpp", "csrc/cuda/ntk_plain.cu", "setup.py"):
        assert (unpacked / name).is_file(), name


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("gpu", "MLP_FUSION_BUILD is 'gpu': use one of 0, auto, cpu, cuda"),
        ("cpu", "MLP_FUSION_BUILD=cpu: the compiled library is not built: torch cannot be imported"),
        ("cuda", "MLP_FUSION_BUILD=cuda: the compiled library is not built: torch cannot be imported"),
    ],
)
def test_a_build_that_cannot_be_done_says_why(checkout: Path, tmp_path: Path, mode: str, message: str) -> None:
    done = run(checkout, "setup.py", "--version", MLP_FUSION_BUILD=mode, PYTHONPATH=hide_torch(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_the_cuda_library_needs_a_torch_with_cuda(checkout: Path) -> None:
    done = run(checkout, "setup.py", "--version", MLP_FUSION_BUILD="cuda")
    assert done.returncode == 1
    message = f"MLP_FUSION_BUILD=cuda: the CUDA library is not built: torch {torch.__version__} is built without CUDA"
    assert done.stderr.strip().splitlines()[-1].startswith(message)


def test_without_a_compiler_nothing_is_built(checkout: Path) -> None:
    done = run(checkout, "setup.py", "build", CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "the compiled library is not built: there is no C++ compiler '/nowhere/c++'" in done.stderr
    assert not list(checkout.rglob("*.so"))


def test_a_missing_library_is_seen_and_not_fatal(checkout: Path) -> None:
    code = (
        "import torch, fusion_kernels as f\n"
        "assert 'checkout' in f.__file__, f.__file__\n"
        "row = f.backends()['kmeans']\n"
        "print(row['cpu'])\n"
        "print(row['cpu unavailable'])\n"
        "print(int(f.kmeans(torch.randn(50, 4), 5).status))\n"
        "try:\n"
        "    f.kmeans(torch.randn(50, 4), 5, backend='cpu')\n"
        "except f.BackendUnavailableError as error:\n"
        "    print(error)\n"
    )
    done = run(checkout, "-c", code)
    assert done.returncode == 0, done.stderr
    backend, reason, status, error = done.stdout.splitlines()
    assert (backend, status) == ("reference", "0")
    assert reason.startswith(f"the compiled library is not there ({checkout}/fusion_kernels/_C*.so)")
    assert error == f"kmeans: backend 'cpu': {reason}"


def test_a_library_that_does_not_load_is_seen(tmp_path: Path) -> None:
    assert "is not there" in str(native.load(tmp_path))
    (tmp_path / "_C.abi3.so").write_text("not a library", encoding="utf-8")
    reason = native.load(tmp_path)
    assert reason is not None
    assert reason.startswith(f"the compiled library {tmp_path}/_C.abi3.so does not load with torch")
    assert "\n" not in reason


def test_sources_compile_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--version"])
    monkeypatch.setenv("MLP_FUSION_BUILD", "0")
    monkeypatch.chdir(ROOT)
    side_by_side = runpy.run_path(str(ROOT / "setup.py"))["side_by_side"]
    meeting = threading.Barrier(2)

    def compile_all(sources: list[str], **options: object) -> list[str]:
        """One source after the other, each only while another one is compiled."""
        assert options == {"debug": False}
        for _ in sources:
            meeting.wait(timeout=60)
        return [f"{source}.o" for source in sources]

    assert side_by_side(compile_all, 2)(list("abcd"), debug=False) == ["a.o", "b.o", "c.o", "d.o"]

    def failing(sources: list[str]) -> list[str]:
        raise OSError("no such compiler")

    with pytest.raises(OSError, match="no such compiler"):
        side_by_side(failing, 2)(["a"])


#: What the sources name of torch, all of it in the headers of 2.10, the oldest that they are compiled for. Before a
#: name is added: it must be there, too.
NAMES_OF_TORCH = {
    "CPU", "Device", "DeviceGuard", "DeviceType", "Double", "Float", "STABLE_TORCH_LIBRARY",
    "STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "ScalarType", "TORCH_ABI_VERSION", "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK", "Tensor", "aoti_torch_cpu_addmm_out", "aoti_torch_cpu_mm_out",
    "aoti_torch_device_type_cpu", "aoti_torch_empty_strided", "aoti_torch_get_current_cuda_stream", "empty", "from",
    "from_blob", "get_num_threads", "new_empty", "parallel_for", "to", "torch_call_dispatcher",
}  # fmt: skip


def test_the_sources_name_nothing_that_the_oldest_torch_lacks() -> None:
    """Macros and functions came with later versions, and nothing says so where a later one is installed."""
    assert "\nTORCH = (2, 10)\n" in (ROOT / "setup.py").read_text(encoding="utf-8")
    named: set[str] = set()
    for file in sorted((ROOT / "csrc").rglob("*.*")):
        code = re.sub(r"#include[^\n]*|//[^\n]*|/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        named.update(re.findall(r"\b(?:STABLE|TORCH|torch|aoti)_\w+", code))
        named.update(re.findall(r"torch::(?:\w+::)*(\w+)", code))
    assert named == NAMES_OF_TORCH
