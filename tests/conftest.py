"""What every test gets: one thread, quiet libraries, and uninitialised memory made visible."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from torch.utils import _device

BENCH = Path(__file__).parents[1] / "bench"

# Tiny tensors gain nothing from threads, and test processes run side by side.
torch.set_num_threads(1)
settings.register_profile("mlp_fusion", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("mlp_fusion")
# What `with torch.device("meta")` reaches is collected once: before `torch.empty` is replaced, not after.
_device._device_constructors()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def importable() -> Iterator[None]:
    """The benchmarks' scripts are imported as Python does when they are run."""
    sys.path.insert(0, str(BENCH))
    try:
        yield
    finally:
        sys.path.remove(str(BENCH))


def pytest_collection_finish() -> None:
    """What is imported by now stays: no garbage collection need walk through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns NaN (or the largest integer) in tests: reading memory before writing it must show."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = _original(*args, **kwargs)
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                return tensor
            if tensor.is_floating_point():
                # What a gradient is wanted of may be written in no other way.
                tensor.detach().fill_(float("nan"))
                return tensor
            return tensor if tensor.dtype == torch.bool or tensor.is_complex() else tensor.fill_(
                torch.iinfo(tensor.dtype).max
            )  # fmt: skip

        monkeypatch.setattr(torch, name, poisoned)
