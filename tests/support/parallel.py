"""One of two processes that train fused modules and models together: `python parallel.py RANK FOLDER`.

Each takes half of the batch; rank 0 writes the gradients that DDP and FSDP2 reduced to `FOLDER/KIND.pt`, and those of
fused models of each form, sharded, to `FOLDER/FORM.pt`. All in the same two processes, which take seconds to start.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from fused_forms import FORMS, fused_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bundles import random_bundle
from mlp_fusion import FusedMLP

KINDS = ("ddp", "fsdp2")
_kept: list[nn.Module] = []


def module_and_batch() -> tuple[FusedMLP, Tensor]:
    """The module, and a batch (16, 5), of which each process takes 8 rows."""
    module = FusedMLP.from_bundle(random_bundle(width=17, scale=True, dtype=torch.float32), "scaled")
    return module, torch.randn(16, 5, generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A mean, so that the mean over processes is the mean over the batch."""
    loss: Tensor = model(x).square().mean()
    return loss


def main() -> None:
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for kind in KINDS:
        train(kind, rank, folder)
    for form in FORMS:
        train_model(form, rank, folder)
    dist.barrier()
    # DDP's destructor may wait for ever on a process group that is gone: neither is destroyed.
    os._exit(0)


def train(kind: str, rank: int, folder: str) -> None:
    """One backward pass over this process's half."""
    module, x = module_and_batch()
    model: Any = module
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(module)
    else:
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a fused FFN holds")  # the fused operators must be taken
        loss_of(model, x[rank * 8 : rank * 8 + 8]).backward()
    gradients = {n: p.grad.full_tensor() if kind == "fsdp2" else p.grad for n, p in module.named_parameters()}
    if rank == 0:
        torch.save(gradients, f"{folder}/{kind}.pt")
    _kept.append(model)


def train_model(form: str, rank: int, folder: str) -> None:
    """The same with a fused model, sharded layer by layer."""
    model = fused_model(form)
    mesh = init_device_mesh("cpu", (2,))
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(tokens()[rank * 4 : rank * 4 + 4])[0].square().mean().backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(gradients, f"{folder}/{form}.pt")
    _kept.append(model)


if __name__ == "__main__":
    main()
