"""What tests of several operators share."""

from __future__ import annotations

import os
import shutil

import pytest
from ntk_emulation import Emulation


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The CUDA library's functions, compiled for the host."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("there is no C++ compiler to build the emulation with")
    return Emulation(tmp_path_factory.mktemp("emulation"))
