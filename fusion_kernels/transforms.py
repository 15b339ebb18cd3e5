"""Whether a call is being differentiated in a way that an operator's own backward does not serve."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether `torch.func` transforms or forward-mode AD are on: then plain torch operations have to run.

    The levels of forward-mode AD are not visible to a compiler, which does not support them either.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
