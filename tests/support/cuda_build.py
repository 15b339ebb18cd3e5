"""Build the CUDA library alone, as setup.py builds it, with a torch that need not have CUDA: `cuda_build.py FOLDER`.

Of libtorch_cuda only the functions of the stable ABI that know streams are needed; where torch has none, FOLDER holds a
stand-in of that name, to link with and to load beside the result.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
import torch

STAND_IN = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
extern "C" void torch_c10_cuda_free_error_msg(char*) {}
"""


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
