"""Walsh-Hadamard transforms, Fastfood and the memory of SAID, beside what torch's operations make of them.

    python bench/hadamard.py [--only transforms fastfood memory] [--threads 1 2] [--rounds N] [--out FILE]

On a CPU, float32. `transforms`: one row of 2^10 to 2^24 entries by ours, by butterflies of whole tensors, by products
with two or three Kronecker factors of H, and by the dense H where it fits; ratios to the fastest of these, and to the
seconds that a copy takes, which is the floor of memory. `fastfood`: forward and backward of P theta for tensors of a
BERT, beside the published algorithm with B, Pi (64 bits) and G stored and a stage at a time. Variants are timed in
turn, in random order in every round; given are medians and quartiles.

`memory`: how far a training step raises the resident memory of a process of its own, for a BERT of 110 million random
parameters, with nothing but `--d` numbers trained: ours (SAID, DID), biases, as many of the smallest weights (PaFi),
all weights, and the published way. The allocator gives large blocks back at once there: what it would keep is not what
a step needs.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fused_mlp import in_turn
from measuring import peak_bytes
from published_said import Published, Stored, butterflies
from torch import Tensor

import mlp_fusion
from fusion_kernels import backends, fastfood, hadamard_transform

BITS = (10, 12, 14, 16, 18, 20, 22, 24)
#: Tensors of a BERT: a norm, a projection of the attention, one of the FFN.
SIZES, THETA = (768, 768 * 768, 768 * 3072), 20_000
#: The dense matrix takes no more than 64 MiB.
DENSE_BITS = 12
WAYS = ("said", "did", "biases", "pafi", "all weights", "published")
PARTS = ("transforms", "fastfood", "memory")


@functools.cache
def dense(bits: int) -> Tensor:
    """H."""
    return hadamard_transform(torch.eye(1 << bits))


def kronecker(x: Tensor, parts: int) -> Tensor:
    """H x as products with `parts` smaller matrices, whose Kronecker product H is."""
    bits = x.shape[-1].bit_length() - 1
    sizes = [bits // parts + (i < bits % parts) for i in range(parts)]
    y = x.reshape([1 << b for b in sizes])
    for axis, b in enumerate(sizes):
        y = torch.movedim(torch.tensordot(y, dense(b), ([axis], [0])), -1, axis)
    return y.reshape(x.shape)


def doubling(x: Tensor) -> Tensor:
    """H x by butterflies between two buffers."""
    L, y, other = x.shape[-1], x.clone(), torch.empty_like(x)
    half = 1
    while half < L:
        a, b = y.view(-1, 2, half).unbind(1)
        into = other.view(-1, 2, half)
        torch.add(a, b, out=into[:, 0])
        torch.sub(a, b, out=into[:, 1])
        y, other, half = other, y, half * 2
    return y


def transforms(threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each length."""
    torch.set_num_threads(threads)
    found = []
    for bits in options.bits:
        x = torch.randn(1 << bits)
        steps: dict[str, Callable[[], Tensor]] = {
            "ours": functools.partial(hadamard_transform, x),
            "butterflies, stacked": functools.partial(butterflies, x),
            "butterflies, two buffers": functools.partial(doubling, x),
            "two products": functools.partial(kronecker, x, 2),
            "three products": functools.partial(kronecker, x, 3),
            "copy": x.clone,
        }
        if bits <= DENSE_BITS:
            steps["dense product"] = functools.partial(torch.mv, dense(bits), x)
        wide = hadamard_transform(x.double())
        for name, step in steps.items():
            error = float((step().double() - wide).norm() / wide.norm())
            assert name == "copy" or error < 1e-5, f"{name} is off by {error:.1e}"
        rows = in_turn(steps, options.rounds, options.budget)
        peers = {name: row["median"] for name, row in rows.items() if name not in ("ours", "copy")}
        best, own = min(peers, key=lambda name: peers[name]), rows["ours"]["median"]
        row = {
            "bits": bits, "threads": threads, "seconds": rows, "best peer": best, "times faster": peers[best] / own,
            "times a copy": own / rows["copy"]["median"],
        }  # fmt: skip
        print(
            f"2^{bits} threads {threads}: {own * 1e6:.1f} us, {row['times faster']:.1f} times as fast as {best}, "
            f"{row['times a copy']:.1f} times a copy",
            flush=True,
        )
        found.append(row)
    return found


def projections(threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each size of a tensor: forward and backward of P theta."""
    torch.set_num_threads(threads)
    found = []
    theta = torch.randn(THETA, requires_grad=True)
    for size in options.sizes:
        dy, stored = torch.randn(size), Stored(size)

        def step(project: Callable[[Tensor], Tensor], dy: Tensor = dy) -> Tensor:
            (gradient,) = torch.autograd.grad(project(theta), theta, dy)
            return gradient

        steps = {
            "ours": functools.partial(step, lambda t, size=size: fastfood(t, size, 0)),
            "published": functools.partial(step, stored),
        }
        rows = in_turn(steps, options.rounds, options.budget)
        ratio = rows["published"]["median"] / rows["ours"]["median"]
        kept = sum(buffer.numel() * buffer.element_size() for buffer in stored.buffers())
        found.append(
            {"size": size, "theta": THETA, "threads": threads, "seconds": rows, "times faster": ratio,
             "bytes kept": {"ours": 0, "published": kept}}
        )  # fmt: skip
        print(f"{size} threads {threads}: {rows['ours']['median'] * 1e3:.2f} ms, {ratio:.1f} times as fast", flush=True)
    return found


def trained(way: str, d: int, layers: int) -> torch.nn.Module:
    """A BERT of random weights, of which d numbers train."""
    from peft import get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).train()
    if way in ("said", "did"):
        return get_peft_model(model, mlp_fusion.SaidConfig(d=d, structure_aware=way == "said"))
    if way == "pafi":
        return get_peft_model(model, mlp_fusion.PafiConfig(budget=d, ranking="matrix", embeddings=True))
    if way == "published":
        return Published(model, d)
    if way == "biases":
        left = d
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 1 and parameter.numel() <= left)
            left -= parameter.numel() if parameter.requires_grad else 0
    return model


def step_memory(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a step's tensors and of all parameters and buffers, in this process."""
    model = trained(way, options.d, options.layers)
    ids = torch.randint(5, 30_000, (options.batch, 128), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(options.batch, dtype=torch.long)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-4)

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # what is allocated once
    held = [*model.parameters(), *model.buffers(), *(v for s in optimizer.state.values() for v in s.values())]
    frozen = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*held, *frozen]}
    return {"trained": sum(p.numel() for p in own), "held": sum(storages.values()), "step": peak_bytes(step)}


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, from a process of its own."""
    found = []
    for way in options.ways:
        limits = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
        sizes = ["--d", str(options.d), "--batch", str(options.batch), "--layers", str(options.layers)]
        command = [sys.executable, __file__, "--step", way, *sizes]
        done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{way}: {done.stderr}")
        row = {"way": way, "batch": options.batch, "d": options.d, **json.loads(done.stdout.splitlines()[-1])}
        found.append(row)
        whole = math.nan if row["step"] is None else (row["held"] + row["step"]) / 2**20
        print(f"{way}: {whole:.0f} MiB, of which {row['held'] / 2**20:.0f} are held between steps", flush=True)
    return found


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--bits", nargs="+", type=int, default=BITS, help="of the transforms' lengths")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of P theta")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40, help="at most, of each comparison")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for the rounds of a comparison")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of training, for the memory")
    parser.add_argument("--d", type=int, default=10_000, help="numbers that train")
    parser.add_argument("--batch", type=int, default=16, help="texts of 128 tokens in a step")
    parser.add_argument("--layers", type=int, default=12, help="of the BERT")
    parser.add_argument("--step", choices=WAYS, help="print what a step of one way takes, in this process")
    parser.add_argument("--out", type=Path, default=Path("build/hadamard.json"))
    options = parser.parse_args()
    if options.step is not None:
        print(json.dumps(step_memory(options.step, options)))
        return
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    result: dict[str, Any] = {
        **known,
        "machine": {"processor": platform.machine()},
        "load average": os.getloadavg(),
        "versions": {"torch": torch.__version__},
        "backends": {name: row for name, row in backends().items() if name in ("hadamard", "fastfood")},
    }
    for part, measure in (("transforms", transforms), ("fastfood", projections)):
        if part in options.only:
            result[part] = [row for threads in options.threads for row in measure(threads, options)]
    if "memory" in options.only:
        result["memory"] = memory(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
