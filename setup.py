"""Build entry point: the compiled library, where it can be built. Metadata lives in pyproject.toml.

`MLP_FUSION_BUILD` says what to build:
    auto (default)  the CPU library if torch is importable and a C++ compiler is there, else nothing, with a message
    cpu             the CPU library, or fail
    cuda            the CPU and CUDA libraries, or fail
    0               nothing

Torch is not a build requirement: an isolated build has none and makes a wheel of Python code only. To compile, install
with `--no-build-isolation` into an environment that has torch and setuptools. The library uses the LibTorch stable ABI
and no Python API, so that one build serves every later torch and every supported Python.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
MODES = ("0", "auto", "cpu", "cuda")
#: The first torch whose stable ABI the library needs, and the macro that keeps it from using more.
TORCH = (2, 10)
TARGET = "0x020a000000000000"


def obstacle() -> str | None:
    """Why the library cannot be compiled here, or None."""
    if sys.platform == "win32":
        return "Windows is not supported by its sources"
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}): install it and build with --no-build-isolation"
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or tuple(map(int, release.groups())) < TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH))}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}: install one or set CXX"
    return None


def cpu_library(*, optional: bool) -> Extension:
    """The compiled operators, as `fusion_kernels/_C.abi3.so`; `optional` turns a failing compiler into a warning."""
    import torch

    folder = Path(torch.__file__).parent
    sources = [path for folder in ("csrc", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))]
    headers = sorted((ROOT / "csrc" / "cpu").glob("*.h"))
    return Extension(
        "fusion_kernels._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in headers],
        define_macros=[("TORCH_TARGET_VERSION", TARGET)],
        # -isystem: warnings in torch's headers are not ours. -Wno-psabi: vectors never cross a call.
        extra_compile_args=[
            "-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
            "-isystem", str(folder / "include"),
        ],
        library_dirs=[str(folder / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        language="c++",
        py_limited_api=True,
        optional=optional,
    )  # fmt: skip


def extensions(mode: str) -> list[Extension]:
    """What `MLP_FUSION_BUILD=mode` builds here."""
    if mode not in MODES:
        sys.exit(f"MLP_FUSION_BUILD is {mode!r}: use one of {', '.join(MODES)}")
    if mode == "cuda" and not list((ROOT / "csrc").glob("cuda/*.cu")):
        sys.exit("MLP_FUSION_BUILD=cuda: there are no CUDA sources in csrc/cuda yet: use cpu")
    reason = None if mode == "0" else obstacle()
    if reason is not None:
        message = f"the compiled library is not built: {reason}"
        if mode != "auto":
            sys.exit(f"MLP_FUSION_BUILD={mode}: {message}")
        print(f"mlp-fusion: {message}", file=sys.stderr)
    return [] if mode == "0" or reason is not None else [cpu_library(optional=mode == "auto")]


built = extensions(os.environ.get("MLP_FUSION_BUILD", "auto"))
setup(ext_modules=built, options={"bdist_wheel": {"py_limited_api": "cp310"}} if built else {})
