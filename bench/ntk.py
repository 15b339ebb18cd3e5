"""Tangent kernels on the CPU beside torch, torch.func and neural-tangents: seconds, errors, memory and growth.

    python bench/ntk.py [--threads 1] [--large] [--neural-tangents PYTHON] [--out bench/results/ntk-cpu.json]

The real peer is the same closed form composed from torch calls, three matrix products and pointwise passes: written as
one expression, and in place. Ratios are medians of runs that alternate in this process. torch.func contracts Jacobians,
or multiplies by them, at the sizes it survives. `--neural-tangents` names an interpreter of an environment of its own
(jax==0.4.20 jaxlib==0.4.20 tf2jax==0.3.6 "numpy<2" "scipy<1.12" neural-tangents), which computes the same kernel by
structured derivatives on as many threads. `--large` compares two blocks on 65,536 inputs. Elapsed and processor seconds
are both there: on a machine shared with others, only the latter of one thread are comparable. The run fails if a kernel
is further than the bars from float64, or from a peer's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import peak_bytes
from support import Bundle, forward, make_bundle
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels import backends, gradient_gram, ntk_compare, ntk_gram, ntk_vp, trace_ntk_vp

#: d, h and outputs: a fused FFN of all-MiniLM-L6-v2's kind, at a quarter of 768.
D, H, O = 768, 192, 768  # noqa: E741
#: The largest relative difference (Frobenius) of a kernel from the same in float64.
BARS = {torch.float32: 1e-5, torch.float64: 1e-12}
STRUCTURED = """
import json, sys, time
import jax, numpy as np
import neural_tangents as nt
from neural_tangents import stax
if sys.argv[2] == "float64":
    jax.config.update("jax_enable_x64", True)
data = np.load(sys.argv[1])
dense = lambda width: stax.Dense(width, parameterization="standard", b_std=1.0)
init, apply, _ = stax.serial(dense(data["w_in"].shape[0]), stax.Gelu(), dense(data["w_out"].shape[1]))
shapes = jax.eval_shape(lambda key: init(key, data["x"].shape)[1], jax.random.PRNGKey(0))
given = [data["w_in"].T, data["b_in"], data["w_out"], data["b_out"]]
leaves, tree = jax.tree_util.tree_flatten(shapes)
params = jax.tree_util.tree_unflatten(tree, [np.reshape(a, leaf.shape) for a, leaf in zip(given, leaves)])
ntk = jax.jit(nt.empirical_ntk_fn(apply, trace_axes=(-1,), vmap_axes=0,
                                  implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES))
seconds, processor = [], []
for _ in range(6):
    started, used = time.perf_counter(), time.process_time()
    kernel = ntk(data["x"], None, params).block_until_ready()
    seconds.append(time.perf_counter() - started)
    processor.append(time.process_time() - used)
np.save(sys.argv[3], np.asarray(kernel) * data["w_out"].shape[1])
versions = {"jax": jax.__version__, "neural-tangents": nt.__version__}
print(json.dumps({"seconds": seconds[1:], "processor seconds": processor[1:], "versions": versions}))
"""


def alternated(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median elapsed and processor seconds of each, run in turns after one run of each that does not count."""
    elapsed: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(repeats + 1):
        for name, call in work.items():
            started, used = time.perf_counter(), time.process_time()
            call()
            if round_:
                elapsed[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - used)
    return {
        name: {"seconds": statistics.median(elapsed[name]), "processor seconds": statistics.median(processor[name])}
        for name in work
    }


def ratio(found: dict[str, dict[str, float]], peer: str, own: str = "ours") -> float:
    """How many times more processor time the peer takes."""
    return found[peer]["processor seconds"] / found[own]["processor seconds"]


def difference(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def block_and_rows(n: int, d: int, h: int, outputs: int, dtype: torch.dtype) -> tuple[Bundle, Tensor]:
    return make_bundle(d, h, outputs).to(dtype), torch.randn(n, d).to(dtype)


def torch_factors(bundle: Bundle, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden values, and slopes times the norms of the output weights, as torch code computes them."""
    assert bundle.b_in is not None
    z = F.linear(x, bundle.w_in[0], bundle.b_in[0])
    slope = 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return F.gelu(z), slope * bundle.w_out[0].norm(dim=1)


def torch_expression(bundle: Bundle, x: Tensor) -> Tensor:
    hidden, slopes = torch_factors(bundle, x)
    return (1 + x @ x.T) * (slopes @ slopes.T) + bundle.w_out.shape[2] * (1 + hidden @ hidden.T)


def torch_in_place(bundle: Bundle, x: Tensor) -> Tensor:
    outputs = bundle.w_out.shape[2]
    hidden, slopes = torch_factors(bundle, x)
    kernel = x @ x.T
    kernel += 1
    kernel *= slopes @ slopes.T
    kernel += outputs
    return kernel.addmm_(hidden, hidden.T, alpha=outputs)


def compositions(sizes: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    """The trace kernel at each N, beside its composition from torch calls."""
    rows = []
    for n in sizes:
        bundle, x = block_and_rows(n, D, H, O, dtype)
        work: dict[str, Callable[[], Tensor]] = {
            "ours": lambda b=bundle, x=x: ntk_gram(b, x, backend="cpu"),
            "torch expression": lambda b=bundle, x=x: torch_expression(b, x),
            "torch in place": lambda b=bundle, x=x: torch_in_place(b, x),
        }
        exact = ntk_gram(bundle.to(torch.float64), x.double(), backend="reference")
        errors = {name: difference(call(), exact) for name, call in work.items()}
        if errors["ours"] > BARS[dtype]:
            sys.exit(f"N = {n}, {dtype}: the kernel is {errors['ours']:.2g} from float64, more than {BARS[dtype]}")
        del exact
        found = alternated(work, 9 if n > 2048 else 30)
        out = torch.zeros(n, n, dtype=dtype)
        rows.append(
            {
                "N": n,
                "dtype": str(dtype),
                **found,
                "errors": errors,
                "times": {name: ratio(found, name) for name in work},
                "result bytes": out.numel() * out.element_size(),
                "peak bytes": {name: peak_bytes(call) for name, call in work.items()},
                "peak bytes beyond out": peak_bytes(lambda b=bundle, x=x, out=out: ntk_gram(b, x, out=out)),
            }
        )
    return rows


def jacobian_contraction(bundle: Bundle, x: Tensor) -> Tensor:
    """The trace kernel from Jacobians, N x outputs x parameters."""
    jacobians = torch.func.jacrev(lambda theta: forward(bundle, theta, x))(bundle.parts())
    return sum((j.flatten(1) @ j.flatten(1).T for j in jacobians.values()), torch.zeros(()))


def vector_products(bundle: Bundle, x: Tensor) -> Tensor:
    """The trace kernel from a vjp and a jvp per pair of inputs and output."""
    parts = bundle.parts()

    def pair(x1: Tensor, x2: Tensor) -> Tensor:
        def column(e: Tensor) -> Tensor:
            pulled = torch.func.vjp(lambda theta: forward(bundle, theta, x2[None])[0], parts)[1](e)
            return torch.func.jvp(lambda theta: forward(bundle, theta, x1[None])[0], (parts,), pulled)[1]

        return torch.func.vmap(column, chunk_size=64)(torch.eye(bundle.w_out.shape[2], dtype=x.dtype)).trace()

    return torch.stack([torch.stack([pair(one, other) for other in x]) for one in x])


def torch_func() -> list[dict[str, Any]]:
    """What torch.func makes of the same kernel, and of its product with a matrix."""
    rows = []
    for n, d, h, outputs in ((2, D, H, O), (16, 128, 64, 128)):
        bundle, x = block_and_rows(n, d, h, outputs, torch.float32)
        work: dict[str, Callable[[], Tensor]] = {
            "ours": lambda b=bundle, x=x: ntk_gram(b, x),
            "jacobian contraction": lambda b=bundle, x=x: jacobian_contraction(b, x),
            "ntk-vector products": lambda b=bundle, x=x: vector_products(b, x),
        }
        exact = ntk_gram(bundle.to(torch.float64), x.double(), backend="reference")
        found = alternated(work, 3)
        rows.append(
            {
                "kernel": "trace",
                "N": n,
                "d": d,
                "h": h,
                "outputs": outputs,
                **found,
                "errors": {name: difference(call(), exact) for name, call in work.items()},
                "times": {name: ratio(found, name) for name in work},
                "peak bytes": {name: peak_bytes(call) for name, call in work.items()},
            }
        )
    for n in (256, 1024, 4096):
        bundle, x = block_and_rows(n, D, H, O, torch.float32)
        v, parts = torch.randn(n, O), bundle.parts()

        def through_parameters(bundle: Bundle = bundle, x: Tensor = x, v: Tensor = v, parts: Any = parts) -> Tensor:
            function = lambda theta: forward(bundle, theta, x)  # noqa: E731
            return torch.func.jvp(function, (parts,), torch.func.vjp(function, parts)[1](v))[1]

        work = {"ours": lambda b=bundle, x=x, v=v: ntk_vp(b, x, v), "vjp and jvp": through_parameters}
        found = alternated(work, 10)
        error = difference(work["ours"](), through_parameters().double())
        rows.append({"kernel": "times a matrix", "N": n, **found, "difference": error,
                     "times": {"vjp and jvp": ratio(found, "vjp and jvp")}})  # fmt: skip
        if error > BARS[torch.float32]:
            sys.exit(f"ntk_vp, N = {n}: {error:.2g} from torch.func")
    return rows


def neural_tangents(python: str, threads: int) -> list[dict[str, Any]]:
    """Structured derivatives in a process of their own, on `threads` processors, from the same weights and inputs."""
    rows = []
    for n in (128, 256):
        bundle, x = block_and_rows(n, D, H, O, torch.float32)
        arrays = {name: t.numpy() for name, t in bundle.parts().items()}
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/block.npz", x=x.numpy(), **arrays)
            processors = sorted(os.sched_getaffinity(0))[:threads]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
            environment.pop("PYTHONPATH", None)
            answer = subprocess.run(
                [python, "-c", STRUCTURED, f"{folder}/block.npz", "float32", f"{folder}/kernel.npy"],
                env=environment,
                preexec_fn=lambda processors=processors: os.sched_setaffinity(0, processors),
                capture_output=True,
                text=True,
                check=True,
            )
            kernel = torch.from_numpy(np.load(f"{folder}/kernel.npy"))
        peer = json.loads(answer.stdout.splitlines()[-1])
        ours = alternated({"ours": lambda b=bundle, x=x: ntk_gram(b, x)}, 30)["ours"]
        apart = difference(ntk_gram(bundle, x), kernel.double())
        if apart > BARS[torch.float32]:
            sys.exit(f"N = {n}: {apart:.2g} from neural-tangents")
        structured = {name: statistics.median(peer[name]) for name in ("seconds", "processor seconds")}
        rows.append(
            {
                "N": n,
                "ours": ours,
                "structured derivatives": structured,
                "times": structured["processor seconds"] / ours["processor seconds"],
                "difference": apart,
                "versions": peer["versions"],
            }
        )
    return rows


def growth() -> dict[str, list[dict[str, float]]]:
    """Seconds while one size grows and the others stay."""
    base = {"N": 2048, "d": D, "h": H, "outputs": O}
    steps = {
        "N": (512, 1024, 2048, 4096, 8192),
        "d": (192, 384, 768, 1536),
        "h": (96, 192, 384, 768),
        "outputs": (1, 192, 768, 3072),
    }
    tables: dict[str, list[dict[str, float]]] = {}
    for name, values in steps.items():
        tables[name] = []
        for value in values:
            size = {**base, name: value}
            bundle, x = block_and_rows(size["N"], size["d"], size["h"], size["outputs"], torch.float32)
            v, w = torch.randn(size["N"], size["outputs"]), torch.randn(size["N"])
            work = {
                "ntk_gram": lambda b=bundle, x=x: ntk_gram(b, x),
                "ntk_vp": lambda b=bundle, x=x, v=v: ntk_vp(b, x, v),
                "trace_ntk_vp": lambda b=bundle, x=x, w=w: trace_ntk_vp(b, x, w),
            }
            found = alternated(work, 3)
            tables[name].append({name: value, **{k: row["processor seconds"] for k, row in found.items()}})
    return tables


def gradients() -> list[dict[str, Any]]:
    """The Gram matrix of per-sample gradients in both forms, at sequence lengths around the change."""
    rows = []
    for tokens in (4, 16, 64):
        bundle = make_bundle(D, H, O).to(torch.float32)
        x, c = torch.randn(32, tokens, D), torch.randn(32, tokens, O)
        work = {
            form: lambda form=form, b=bundle, x=x, c=c: gradient_gram(b, x, c, form=form)
            for form in ("auto", "ghost", "direct")
        }
        rows.append({"samples": 32, "tokens": tokens, **alternated(work, 3)})
    return rows


def comparison(n: int) -> dict[str, Any]:
    """A block of 768 neurons and one of 192 on n inputs, streamed."""
    a, x = block_and_rows(n, D, 768, O, torch.float32)
    b = make_bundle(D, H, O, scale=True, scale_exponent=0.5).to(torch.float32)
    found: dict[str, Any] = {"N": n, "neurons": [768, H]}

    def work() -> None:
        started, used = time.perf_counter(), time.process_time()
        result = ntk_compare(a, b, x)
        found.update(
            {
                "seconds": time.perf_counter() - started,
                "processor seconds": time.process_time() - used,
                "relative error": result.relative_error,
                "cosine": result.cosine,
                "alignment": result.alignment,
                "trace": result.trace,
                "eigenvalues": [values.tolist() for values in result.eigenvalues],
                "eigenvalue errors": [errors.tolist() for errors in result.eigenvalue_errors],
            }
        )

    found["peak bytes"] = peak_bytes(work)
    found["bytes of one kernel"] = 4 * n * n
    return found


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of everything that is measured")
    parser.add_argument("--large", action="store_true", help="also compare on 65,536 inputs")
    parser.add_argument("--neural-tangents", metavar="PYTHON", help="interpreter of its environment")
    parser.add_argument("--out", type=Path, default=Path("bench/results/ntk-cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": options.threads,
            "load average at the start": os.getloadavg()[0],
        },
        "versions": {"torch": torch.__version__},
        "backends": backends(),
        "shape": {"d": D, "h": H, "outputs": O},
    }
    steps: dict[str, Callable[[], Any]] = {
        "trace kernel, float32": lambda: compositions((256, 1024, 4096), torch.float32),
        "trace kernel, float64": lambda: compositions((1024,), torch.float64),
        "torch.func": torch_func,
        "growth": growth,
        "gradient Gram": gradients,
        "comparison": lambda: comparison(8192),
    }
    if options.neural_tangents:
        steps["neural-tangents"] = lambda: neural_tangents(options.neural_tangents, options.threads)
    if options.large:
        steps["large comparison"] = lambda: comparison(65536)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, step in steps.items():
        result[name] = step()
        print(f"\n{name}: {json.dumps(result[name], indent=1)}", flush=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
