"""`ntk_gram`, and the operators behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.library import Backend, check_name, operator
from fusion_kernels.ntk import cpu_backend, cuda_backend, triton_backend
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk.block import all_finite, prepare
from fusion_kernels.ntk.operators import FFN_ARGUMENTS, exactly, of_ffn
from fusion_kernels.ntk.types import KERNELS, Block, Kernel, Precision, Reduce
from fusion_kernels.proof import Proof

_ARGUMENTS = (
    f"Tensor x1, Tensor? x2, {FFN_ARGUMENTS}, str[] params, str kernel, str reduce='trace', Tensor? direction=None, "
    "Tensor? metric=None, str precision='highest', int? block_size=None"
)


def _shape(x1: Tensor, x2: Tensor | None, w_out: Tensor, reduce: str) -> tuple[int, ...]:
    outputs = w_out.shape[1]
    axes = {"full": (outputs, outputs), "diagonal": (outputs,)}.get(reduce, ())
    return (x1.shape[0], (x1 if x2 is None else x2).shape[0], *axes)


def _fake(
    x1: Tensor, x2: Tensor | None, ffn: FFN, params: Sequence[str], kernel: str, reduce: str = "trace", *_: object
) -> Tensor:
    return x1.new_empty(_shape(x1, x2, ffn.w_out, reduce))


def _fake_out(out: Tensor, *_: object) -> None:
    return None


_NTK_GRAM = operator("ntk_gram", f"({_ARGUMENTS}) -> Tensor", of_ffn(_fake, 2))
# The same, into memory that is there: a kernel may be most of what fits.
_NTK_GRAM_OUT = operator("ntk_gram_out", f"(Tensor(a!) out, {_ARGUMENTS}) -> ()", _fake_out)
#: Of both operators of tangent kernels, and of the sums over two of them.
OF_TRITON = Proof("ntk triton", "fusion_kernels.ntk.gpu_cases:of_triton")
OF_CUDA = Proof("ntk cuda", "fusion_kernels.ntk.gpu_cases:of_cuda")


def _register(
    name: str,
    gram: Callable[..., Tensor],
    devices: tuple[str, ...],
    why_not: Callable[[torch.device | None], str | None],
    proof: Proof | None = None,
) -> None:
    def into(out: Tensor, *arguments: Any) -> None:
        gram(*arguments, out=out)

    _NTK_GRAM.register(Backend(name, of_ffn(exactly(gram), 2), devices, why_not, proof=proof))
    _NTK_GRAM_OUT.register(Backend(name, of_ffn(exactly(into), 3), devices, why_not, proof=proof))


_register("cpu", cpu_backend.ntk_gram, ("cpu",), cpu_backend.why_not)
_register("triton", triton_backend.ntk_gram, ("cuda",), triton_backend.why_not, OF_TRITON)
_register("reference", reference.ntk_gram, ("cpu", "cuda"), lambda _: None)
# Behind the reference, and so for those who ask by name: what it has over Triton's tiles, only a GPU shows.
_register("cuda", cuda_backend.ntk_gram, ("cuda",), cuda_backend.why_not, OF_CUDA)


def contraction_named(reduce: Reduce, outputs: int, like: Tensor) -> tuple[str, Tensor | None]:
    """The operators' `reduce` and `direction` for the public `reduce`.

    Raises:
        ValueError: an unknown name, or a vector that does not fit the outputs.
    """
    if isinstance(reduce, str):
        if reduce == "pseudo":
            return "vector", like.new_full((outputs,), max(outputs, 1) ** -0.5)
        if reduce not in ("trace", "full", "diagonal"):
            raise ValueError(
                f"unknown reduction {reduce!r}: use 'trace', 'full', 'diagonal', 'pseudo' or a vector of outputs"
            )
        return reduce, None
    direction = torch.as_tensor(reduce, device=like.device).detach().to(like.dtype)
    if tuple(direction.shape) != (outputs,):
        raise ValueError(f"a vector to reduce by must be ({outputs},) for this block, got {tuple(direction.shape)}")
    if not all_finite(direction):
        raise ValueError("the vector to reduce by has values that are not finite")
    return "vector", direction


def check_block_size(block_size: int | None) -> None:
    """Raise ValueError unless `block_size` is None or at least 1."""
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")


def precision_named(precision: Precision | None, backend: str, dtype: torch.dtype, reduce: str) -> str:
    """The operators' `precision` for the public one.

    Raises:
        ValueError: an unknown name, or one that this backend, dtype or reduction does not have.
    """
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(get_args(Precision))}")
    obstacle = None
    if backend not in ("triton", "cuda"):
        obstacle = f"backend {backend!r} computes in the dtype itself"
    elif dtype != torch.float32:
        obstacle = f"this kernel is {dtype}"
    elif reduce in ("full", "diagonal"):
        obstacle = f"reduce={reduce!r} has an axis of outputs"
    if precision is None:
        return "highest" if obstacle else "tf32x3"
    if precision != "highest" and obstacle:
        raise ValueError(
            f"precision {precision!r} is for float32 traces and vectors with backend 'triton' or 'cuda': {obstacle}, "
            "use 'highest'"
        )
    return precision


def _check_out(out: Tensor, shape: tuple[int, ...], like: Tensor, read: Iterable[Tensor | None]) -> None:
    if tuple(out.shape) != shape:
        raise ValueError(f"out must be {shape}, got {tuple(out.shape)}")
    if out.dtype != like.dtype or out.device != like.device:
        raise ValueError(f"out must be {like.dtype} on {like.device}, got {out.dtype} on {out.device}")
    if out.requires_grad:
        raise ValueError("out requires grad, and nothing can be differentiated through a kernel: detach it")
    if out.numel() and not (out[0].is_contiguous() and (len(out) == 1 or out.stride(0) >= out[0].numel())):
        raise ValueError(f"the rows of out must be contiguous and apart: its strides are {out.stride()}")
    storage = out.untyped_storage().data_ptr()
    if out.numel() and any(t is not None and t.numel() and t.untyped_storage().data_ptr() == storage for t in read):
        raise ValueError("out shares memory with a tensor that the kernel is computed from: give it memory of its own")


def ntk_gram(
    block: Block,
    x1: Tensor,
    x2: Tensor | None = None,
    reduce: Reduce = "trace",
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    kernel: Kernel = "gd",
    precision: Precision | None = None,
    block_size: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the empirical neural tangent kernel of a feed-forward block between two sets of inputs.

    With F_o the outputs, theta the parameters as the block stores them and m the metric of the neuron that theta
    belongs to (1 without a metric, and for the output bias),

        gd      K_op(x, x') = sum_theta m dF_o(x)/dtheta dF_p(x')/dtheta         what a step of gradient descent sees
        sign    K_op(x, x') = sum_theta m dF_o(x)/dtheta sign(dF_p(x')/dtheta)   what a step of sign descent or Adam
                                                                                 sees; sign(0) = 0; not symmetric

    both in closed form, never a Jacobian. The trace and the kernel along a vector cost three products of (N, d) and
    (N, neurons) matrices, taken tile by tile and combined where they are computed: the memory is that of the result, of
    a few (N, neurons) matrices and of a few tiles. The sign kernel is exact at every size: its closed form costs what
    gradient descent's does without the symmetry. The kernel is a sum over parts: the share of some is what `params`
    gives with only those. How it depends on where a fused block keeps its cluster sizes is the subject of MLP Fusion.

    Args:
        block: a `NeuronBundle`, a `FusedMLP` or whatever has `as_bundle()`; its batch dimension must be 1.
        x1: (N1, d) float16, bfloat16, float32 or float64; N1 may be 0. The product is computed in the widest dtype
            among the inputs and the block, at least float32.
        x2: (N2, d), or None for `x1`, which halves the work of `"gd"`.
        reduce: what becomes of the outputs.
            `"trace"`: summed (not averaged) over o = p.
            `"full"`: all pairs (o, p).
            `"diagonal"`: all o = p.
            `"pseudo"`: the kernel of the sum of the outputs divided by sqrt(outputs).
            a vector r (outputs,): the kernel of the function r.F; for `"gd"` that is `r^T K r`.
        params: the parts to differentiate by, one or several of `w_in`, `b_in`, `w_out`, `b_out`, and in a gated block
            `w_gate`, `b_gate` (`w_in`, `b_in` are then the up projection). By default the block's `trainable_parts()`,
            or all it has where it does not offer them. The scale is never one of them.
        metric: (neurons,), not negative: a diagonal preconditioner, or learning rates, by neuron. Every parameter of a
            neuron has that of its neuron; what has more than one per neuron is a sum of kernels by `params`.
        kernel: `"gd"` or `"sign"`.
        precision: `"highest"`, the products of the dtype itself. For a trace or a vector in float32 the backends
            `"triton"` and `"cuda"` also have, on tensor cores, `"tf32x3"` and `"bf16x3"`, three products of TF32 or
            bfloat16 that keep 22 or 16 significant bits of every value, and `"bf16"`, one product that keeps 8. None is
            `"tf32x3"` where there is such a choice, whose errors are float32's, else `"highest"`. For `"highest"` and
            float64 `"auto"` does not take Triton's tiles, which have no tensor cores then.
        block_size: edge of the tiles of the result, or rows at a time where it has an axis of outputs; None picks by
            the cache. It changes memory and time, and the result by rounding only.
        out: a tensor of the result's shape, dtype and device to write to, its rows contiguous; not in the memory of an
            input.
        backend: `"auto"`, or the name of one to insist on.

    Returns:
        (N1, N2) float32 or float64, on the inputs' device; (N1, N2, outputs, outputs) for `"full"`, the axes in the
        order of neural-tangents, and (N1, N2, outputs) for `"diagonal"`. For `"gd"` without `x2` it is exactly
        symmetric (in pairs (n, o), (m, p)), and positive semidefinite up to rounding. It is computed on detached
        tensors: nothing can be differentiated through it.

    Raises:
        TypeError: `block` has no `as_bundle()`.
        ValueError: a shape, dtype, device, part, kernel, reduction, precision, activation or backend that does not
            fit, a batch of blocks, an empty choice of parts, a negative metric, a negative scale whose exponent is not
            0, or a tensor with values that are not finite; the message names it.
        BackendUnavailableError: `backend` cannot run here.

    Sources: Jacot et al., "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", 2018, arXiv
    1806.07572; Novak et al., "Fast Finite Width Neural Tangent Kernel", 2022, arXiv 2206.08720; Mohamadi et al., "A
    Fast, Well-Founded Approximation to the Empirical Neural Tangent Kernel", 2023, arXiv 2206.12543, for `"pseudo"`;
    Wei et al., "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", 2023, arXiv 2307.08941.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x = torch.randn(5, 8)
        >>> gram = fusion_kernels.ntk_gram(block, x)
        >>> gradients = [torch.autograd.grad(y, list(block.parameters()), retain_graph=True) for y in block(x[0])]
        >>> trace = sum(part.square().sum() for output in gradients for part in output)
        >>> gram.shape, torch.allclose(gram[0, 0], trace, rtol=1e-4)
        (torch.Size([5, 5]), True)
    """
    check_name("kernel", kernel, KERNELS)
    check_block_size(block_size)
    op = _NTK_GRAM if out is None else _NTK_GRAM_OUT
    chosen = op.select(backend, x1.device)
    prepared = prepare(block, {"x1": x1, "x2": x2}, params, metric)
    first, second = prepared.rows["x1"], prepared.rows.get("x2")
    named, direction = contraction_named(reduce, prepared.outputs, first)
    how = precision_named(precision, chosen.name, prepared.dtype, named)
    if backend == "auto" and chosen.name == "triton" and how == "highest":
        # Plain multiply-adds, where the reference's products may have tensor cores for float64.
        backend, chosen = "reference", op.backend("reference")
    function = op.overload if backend == "auto" else chosen.function
    arguments = (
        *(first, second, *prepared.described(), prepared.parts, kernel),
        *(named, direction, prepared.metric, how, block_size),
    )
    if out is None:
        return function(*arguments)
    read = (first, second, *prepared.ffn.tensors, direction, prepared.metric)
    _check_out(out, _shape(first, second, prepared.ffn.w_out, named), first, read)
    function(out, *arguments)
    return out
