"""Build entry point: the compiled library, where it can be built. Metadata lives in pyproject.toml.

`MLP_FUSION_BUILD` says what to build:
    auto (default)  the CPU library if torch is importable and a C++ compiler is there, else nothing, with a message;
                    the CUDA library too if torch has CUDA and an nvcc that fits is found
    cpu             the CPU library, or fail
    cuda            the CPU and CUDA libraries, or fail
    0               nothing

Torch is not a build requirement: an isolated build has none and makes a wheel of Python code only. To compile, install
with `--no-build-isolation` into an environment that has torch and setuptools. The library uses the LibTorch stable ABI
and no Python API, so that one build serves every later torch and every supported Python.

Sources compile side by side, as many as there are processors for this process, or `build_ext --parallel` of them.

nvcc is that of `CUDA_HOME`, or the first on the PATH. It compiles for compute capabilities 8.0 and 9.0, and to PTX for
later ones. The CUDA library links with libcudart and libtorch_cuda, which torch has loaded when it is used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODES = ("0", "auto", "cpu", "cuda")
#: The first torch whose stable ABI the library needs, and the macro that keeps it from using more.
TORCH = (2, 10)
TARGET = "0x020a000000000000"
#: -isystem: warnings in torch's headers are not ours. -Wno-psabi: vectors never cross a call.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]  # fmt: skip


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


def find_nvcc() -> str | None:
    """nvcc of `CUDA_HOME`, or the first on the PATH, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def cuda_obstacle() -> str | None:
    """Why the CUDA library cannot be compiled here, where the CPU's can, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of it"
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc in CUDA_HOME or on the PATH: install the CUDA toolkit or set CUDA_HOME"
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        release = "unknown" if found is None else found[1]
        return f"{nvcc} is of CUDA {release}, torch of CUDA {torch.version.cuda}: set CUDA_HOME to a toolkit that fits"
    return None


def toolkit(nvcc: str) -> Path:
    """The folder that nvcc belongs to, which need not be where the command was found."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    if top is None:
        sys.exit(f"{nvcc} --dryrun does not say where its toolkit is: set CUDA_HOME")
    return Path(top[1].strip()).resolve()


def relative(paths: list[Path]) -> list[str]:
    """What setuptools takes: paths from here."""
    return [str(path.relative_to(ROOT)) for path in sorted(paths)]


def library(name: str, sources: list[Path], *, optional: bool, libraries: list[str], **more: list[str]) -> Extension:
    """Operators compiled against torch; `optional` turns a failing compiler into a warning."""
    import torch

    folder = Path(torch.__file__).parent
    includes = [folder / "include", *map(Path, more.pop("includes", []))]
    return Extension(
        f"fusion_kernels.{name}",
        sources=relative(sources),
        depends=relative([path for ending in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{ending}")]),
        define_macros=[("TORCH_TARGET_VERSION", TARGET)],
        extra_compile_args=[*FLAGS, *(flag for path in includes for flag in ("-isystem", str(path)))],
        library_dirs=[str(folder / "lib"), *more.pop("library_dirs", [])],
        libraries=[*libraries, "torch", "torch_cpu", "c10"],
        language="c++",
        py_limited_api=True,
        optional=optional,
        **more,
    )


def cpu_library(*, optional: bool) -> Extension:
    """The compiled operators, as `fusion_kernels/_C.abi3.so`."""
    sources = [path for folder in ("csrc", "csrc/cpu") for path in (ROOT / folder).glob("*.cpp")]
    return library("_C", sources, optional=optional, libraries=[])


def cuda_library(nvcc: str, *, optional: bool) -> Extension:
    """The operators for NVIDIA GPUs, as `fusion_kernels/_cuda.abi3.so`."""
    root = toolkit(nvcc)
    extension = library(
        "_cuda",
        list((ROOT / "csrc" / "cuda").glob("*.cpp")),
        optional=optional,
        libraries=["torch_cuda", "cudart"],
        includes=[str(root / "include")],
        library_dirs=[str(root / folder) for folder in ("lib64", "lib") if (root / folder).is_dir()],
    )
    extension.kernels = relative(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    extension.depends += extension.kernels  # or the library would not be linked again after a change to one of them
    return extension


def processors() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def side_by_side(compile_all: Callable[..., list[str]], jobs: int) -> Callable[..., list[str]]:
    """A compiler's `compile`, which takes one source after the other, for `jobs` sources at a time."""

    def compile_sources(sources: list[str], **options: object) -> list[str]:
        with ThreadPoolExecutor(jobs) as pool:
            parts = pool.map(lambda source: compile_all([source], **options), sources)
            return [compiled for part in parts for compiled in part]

    return compile_sources


class build_libraries(build_ext):  # noqa: N801 - a command of setuptools
    """`build_ext`, with sources side by side, and with nvcc for the kernels of an extension."""

    def build_extensions(self) -> None:
        """Compile and link them, one extension after the other: it is their sources that share the processors."""
        jobs, self.parallel = (self.parallel if type(self.parallel) is int else processors()), None
        self.compiler.compile = side_by_side(self.compiler.compile, jobs)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        nvcc = find_nvcc()
        for source in getattr(ext, "kernels", []):
            target = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([nvcc, *NVCC_FLAGS, "-c", source, "-o", str(target)])
            ext.extra_objects.append(str(target))
        super().build_extension(ext)


def extensions(mode: str) -> list[Extension]:
    """What `MLP_FUSION_BUILD=mode` builds here."""
    if mode not in MODES:
        sys.exit(f"MLP_FUSION_BUILD is {mode!r}: use one of {', '.join(MODES)}")
    if mode == "0":
        return []
    reason = obstacle()
    if reason is not None:
        message = f"the compiled library is not built: {reason}"
        if mode != "auto":
            sys.exit(f"MLP_FUSION_BUILD={mode}: {message}")
        print(f"mlp-fusion: {message}", file=sys.stderr)
        return []
    libraries = [cpu_library(optional=mode == "auto")]
    if mode == "cpu":
        return libraries
    reason = cuda_obstacle()
    if reason is None:
        libraries.append(cuda_library(find_nvcc(), optional=mode == "auto"))
    elif mode == "cuda":
        sys.exit(f"MLP_FUSION_BUILD=cuda: the CUDA library is not built: {reason}")
    return libraries


built = extensions(os.environ.get("MLP_FUSION_BUILD", "auto"))
setup(
    ext_modules=built,
    cmdclass={"build_ext": build_libraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if built else {},
)
