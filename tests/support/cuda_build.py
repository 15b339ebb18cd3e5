"""Build the CUDA library alone, as setup.py builds it, with a torch that need not have CUDA: `cuda_build.py FOLDER`.

Of libtorch_cuda only the functions of the stable ABI that know streams are needed; where torch has none, FOLDER holds a
stand-in of that name, to link with and to load beside the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
import torch

ROOT = Path(__file__).parents[2]
#: In the folder of a build that has come to its end: what the compilers said.
SAID = "said.txt"
STAND_IN = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
extern "C" void torch_c10_cuda_free_error_msg(char*) {}
"""


def kept(nvcc: str) -> Path:
    """The folder of a build of the sources as they are: under `build`, for all processes, made where there is none."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    assert release is not None, version
    made_of = hashlib.sha256(f"{version} {torch.__version__} {sys.version}".encode())
    for source in (*sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()), ROOT / "setup.py", __file__):
        made_of.update(Path(source).read_bytes())
    folder = ROOT / "build" / "cuda-tests" / made_of.hexdigest()[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / SAID).is_file():
            for old in folder.parent.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            folder.mkdir()
            done = subprocess.run(
                [sys.executable, __file__, str(folder), release[1]], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / SAID).write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


def main() -> None:
    """Leave `_cuda.abi3.so` in the folder; what the compilers say goes to the output."""
    folder = Path(sys.argv[1])
    if torch.version.cuda is None:
        source = folder / "torch_cuda.cpp"
        source.write_text(STAND_IN, encoding="utf-8")
        command = ["c++", "-shared", "-fPIC", str(source), "-o", str(folder / "libtorch_cuda.so")]
        subprocess.run(command, check=True)
        torch.version.cuda = sys.argv[2]
        os.environ["LIBRARY_PATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("LIBRARY_PATH")])])
    os.environ["MLP_FUSION_BUILD"] = "cuda"
    # What is not in a library that is linked with fails here, and not when it is loaded.
    os.environ["LDFLAGS"] = "-Wl,-z,defs"
    os.environ["NVCC_APPEND_FLAGS"] = "-Xptxas=-v"
    setup = setuptools.setup

    def only_cuda(ext_modules: list[Any], **options: Any) -> None:
        libraries = [extension for extension in ext_modules if extension.name.endswith("._cuda")]
        setup(ext_modules=libraries, **options)

    setuptools.setup = only_cuda
    sys.argv = ["setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    runpy.run_path("setup.py")


if __name__ == "__main__":
    main()
