"""Walsh-Hadamard transforms and Fastfood against dense matrices, on every backend of the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from rounding import Arithmetic, Rounded, assert_rounding
from scipy.linalg import hadamard as dense_hadamard
from torch import Tensor

from fusion_kernels import fastfood, fastfood_transposed, hadamard_transform, native
from fusion_kernels.hadamard import FASTFOOD, FASTFOOD_TRANSPOSED, HADAMARD, reference, scaling
from fusion_kernels.hadamard.gpu_cases import rounding
from fusion_kernels.hadamard.types import bits_of, keys_of

BACKENDS = ["reference", *([] if native.UNAVAILABLE else ["cpu"])]
DTYPES = [torch.float32, torch.float64]
#: Entries of theta and of P theta: theta shorter and longer than P theta, which is transformed in one block or in
#: several passes.
PAIRS = [(1, 1), (3, 2), (5, 4), (200, 30), (7, 768), (1500, 768), (70_000, 130), (300, 40_000), (33_000, 40_000)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 9, 11])
def test_products_with_the_dense_matrix(bits: int, dtype: torch.dtype, backend: str) -> None:
    L = 1 << bits
    x = draw(3, 5, L, dtype=dtype)
    y = hadamard_transform(x, backend=backend)
    exact = x.double() @ torch.tensor(dense_hadamard(L), dtype=torch.float64)
    # Every entry goes through one addition per bit; the dense product in float64, in this order or another, through L.
    u = torch.finfo(dtype).eps / 2
    allowed = (1.01 * bits * u + L * 2.0**-53) * x.double().abs().sum(-1, keepdim=True)
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "bits"),
    [*((rows, bits) for rows in (0, 1, 3, 17) for bits in range(9)), (3, 13), (2, 14), (3, 15), (1, 16), (1, 20)],
)
def test_compiled_transforms_have_the_bits_of_the_reference(rows: int, bits: int, dtype: torch.dtype) -> None:
    if native.UNAVAILABLE is not None:
        pytest.skip(native.UNAVAILABLE)
    x = draw(rows, 1 << bits, dtype=dtype)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(hadamard_transform(x, backend="cpu"), reference.hadamard(x))


@pytest.mark.slow
def test_more_passes_than_two_have_the_bits_of_the_reference() -> None:
    """2^24 entries, of which a pass over distant bits would need more than it may have."""
    x = draw(1 << 24, dtype=torch.float32)
    assert torch.equal(hadamard_transform(x), reference.hadamard(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_and_left_alone(backend: str) -> None:
    x = draw(8, 6, dtype=torch.float32).t()[::2]
    kept = x.clone()
    y = hadamard_transform(x, backend=backend)
    assert y.is_contiguous()
    assert torch.equal(y, reference.hadamard(kept))
    assert torch.equal(x, kept)
    one = torch.tensor([[3.0], [4.0]])
    assert hadamard_transform(one, backend=backend).data_ptr() != one.data_ptr()


def dense(d: int, size: int, seed: int) -> Tensor:
    """P (size, d) in float64, for d up to 2^bits: the product of its factors."""
    L = 1 << bits_of(size)
    H = torch.tensor(dense_hadamard(L), dtype=torch.float64)
    B = torch.diag(reference.signs(seed, L).double())
    Pi = torch.eye(L, dtype=torch.float64)[reference.permutation(seed, bits_of(L))]
    G = reference.gaussians(seed, L).double()
    product = H @ torch.diag(G) @ Pi @ H @ B
    return (product / math.sqrt(size * float(G.square().sum())))[:size, :d]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("d", "size"), [(1, 1), (2, 2), (3, 4), (60, 50), (64, 64), (9, 700), (800, 513)])
def test_p_is_the_product_of_its_factors(d: int, size: int, backend: str) -> None:
    P = dense(d, size, seed=3)
    theta, y = draw(2, d), draw(2, size)
    torch.testing.assert_close(fastfood(theta, size, 3, backend=backend), theta @ P.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(fastfood_transposed(y, d, 3, backend=backend), y @ P, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_theta_beyond_the_power_of_two_is_folded_with_signs_of_its_own(backend: str) -> None:
    d, size, L, seed = 150, 50, 64, 8
    theta, B = draw(d), reference.signs(8, d)
    # Entries j, j + 64 and j + 128 share a column, up to their signs.
    first = dense(L, size, seed) * B[:L]
    columns = torch.cat([first, first, first[:, : d - 2 * L]], 1) * B
    torch.testing.assert_close(fastfood(theta, size, seed, backend=backend), columns @ theta, rtol=1e-11, atol=1e-11)
    y = draw(size, seed=1)
    torch.testing.assert_close(fastfood_transposed(y, d, seed, backend=backend), y @ columns, rtol=1e-11, atol=1e-11)
    assert 20 < int((B[:L] == B[L : 2 * L]).sum()) < 44  # signs of their own indeed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "size"), PAIRS)
def test_compiled_projections_round_as_their_sums_allow(d: int, size: int, dtype: torch.dtype) -> None:
    if native.UNAVAILABLE is not None:
        pytest.skip(native.UNAVAILABLE)
    theta, y = draw(3, d, dtype=dtype), draw(3, size, dtype=dtype)
    results = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = {"y": fastfood(theta, size, 5, backend="cpu"), "theta": fastfood_transposed(y, d, 5, backend="cpu")}
        assert all(torch.equal(t, results.setdefault(name, t)) for name, t in found.items())
    exact = {"y": reference.fastfood(theta.double(), size, 5), "theta": reference.fastfood_transposed(y.double(), d, 5)}
    usual = {"y": reference.fastfood(theta, size, 5), "theta": reference.fastfood_transposed(y, d, 5)}
    by, given = Arithmetic(dtype), {"y": theta, "theta": y}
    bounds = {
        name: Rounded(value, rounding(given[name], d, size, 5).expand_as(value), by) for name, value in exact.items()
    }
    # In float64 the reference is its own exact value: then there is no usual error to compare with.
    assert_rounding(results, exact, bounds, *([usual] if dtype == torch.float32 else []))


def test_a_number_that_is_another_is_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    d, size = 200, 4000
    theta = draw(1, d, dtype=torch.float32)
    exact = reference.fastfood(theta.double(), size, 5)
    drawn = reference.permutation

    def swapped(seed: int, bits: int, device: torch.device | None = None) -> Tensor:
        found = drawn(seed, bits, device)
        found[[0, 1]] = found[[1, 0]]
        return found

    monkeypatch.setattr(reference, "permutation", swapped)
    error = (reference.fastfood(theta, size, 5) - exact).abs()
    assert bool((error > rounding(theta, d, size, 5)).any())


@pytest.mark.parametrize("bits", range(13))
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_permutation_is_one(bits: int, seed: int) -> None:
    assert torch.equal(reference.permutation(seed, bits).sort().values, torch.arange(1 << bits))


def test_draws_are_those_that_were_written_down() -> None:
    """A change would make every stored companion another one."""
    assert keys_of(0).signs == (0x7B1DCDAF, 0xE220A839)  # the first number of SplitMix64 from 0 is known
    assert reference.signs(1, 12).tolist() == [-1, -1, 1, 1, 1, -1, 1, 1, -1, 1, 1, 1]
    assert reference.permutation(1, 4).tolist() == [11, 3, 9, 5, 7, 10, 1, 4, 13, 8, 14, 6, 0, 12, 15, 2]
    assert reference.gaussians(1, 4).tolist() == [145678, 175587, 125364, -93782]
    assert reference.gaussians(1, 2, first=2).tolist() == [125364, -93782]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_draws_are_as_random_as_they_should_be(seed: int) -> None:
    n = 1 << 16
    signs, g = reference.signs(seed, n).double(), reference.gaussians(seed, n).double()
    z = g / math.sqrt(2.0**32 * (8 + 1 / 6))
    # Each of these is a sum over n of about unit variance: five standard deviations.
    for sums in (signs, z, z.square() - 1, signs[1:] * signs[:-1], z[1:] * z[:-1], signs * z):
        assert abs(float(sums.sum())) < 5 * math.sqrt(2 * n)
    ordered = z.sort().values
    normal = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    assert float((normal - (torch.arange(n) + 0.5) / n).abs().max()) < 0.002 + 2 / math.sqrt(n)
    other = reference.gaussians(seed + 1, n).double()
    assert abs(float((g * other).sum() / (g.norm() * other.norm()))) < 5 / math.sqrt(n)
    places = reference.permutation(seed, 16).double() / n
    assert abs(float(((places - 0.5) * (torch.arange(n) / n - 0.5)).sum())) * 12 < 5 * math.sqrt(n)
    assert 0 < int((reference.permutation(seed, 16) == torch.arange(n)).sum()) + 1 < 12  # about one stays in place


def test_the_compiled_sum_of_squares_is_exact() -> None:
    for bits in (0, 1, 10, 21):
        assert scaling._energy(7, bits) == reference.energy(7, bits)


@pytest.mark.parametrize(("d", "size"), [(50, 30_000), (500, 3000), (9000, 700)])
def test_norms_are_kept_on_average(d: int, size: int) -> None:
    theta = draw(20, d)
    ratios = torch.stack([fastfood(theta, size, seed).norm(dim=1) / theta.norm(dim=1) for seed in range(20)])
    assert abs(float(ratios.square().mean()) - 1) < 5 * math.sqrt(2 / (400 * min(d, size)))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_gradients(backend: str) -> None:
    x = draw(3, 8).requires_grad_()
    theta, y = draw(2, 11).requires_grad_(), draw(2, 20).requires_grad_()
    for function, given in (
        (lambda t: hadamard_transform(t, backend=backend), x),
        (lambda t: fastfood(t, 20, 1, backend=backend), theta),
        (lambda t: fastfood_transposed(t, 11, 1, backend=backend), y),
    ):
        assert torch.autograd.gradcheck(function, (given,))
        assert torch.autograd.gradgradcheck(function, (given,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_what_torch_asks_of_them(backend: str) -> None:
    x = draw(3, 8, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(HADAMARD.overload, (x, backend))
    torch.library.opcheck(FASTFOOD.overload, (x, 13, 1, backend))
    torch.library.opcheck(FASTFOOD_TRANSPOSED.overload, (x, 5, 1, backend))


def test_transforms_of_functions() -> None:
    x = draw(4, 8)
    H = hadamard_transform(torch.eye(8, dtype=torch.float64))
    assert torch.equal(torch.func.vmap(hadamard_transform)(x), hadamard_transform(x))
    torch.testing.assert_close(torch.func.jacrev(hadamard_transform)(x[0]), H)
    torch.testing.assert_close(torch.func.jacfwd(lambda t: fastfood(t, 6, 1))(x[0]), dense(8, 6, 1))
    P = torch.func.vmap(lambda t: fastfood_transposed(t, 8, 1))(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(P, dense(8, 6, 1))


def test_compilers_see_one_call() -> None:
    compiled = torch.compile(lambda t: fastfood(hadamard_transform(t), 9, 1), backend="aot_eager", fullgraph=True)
    x = draw(2, 4).requires_grad_()
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(fastfood(hadamard_transform(x), 9, 1).square().sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hadamard_transform(torch.ones(6)), "6 entries in its last axis: fill it up with zeros"),
        (lambda: hadamard_transform(torch.ones(2, 0)), r"x is \(2, 0\): its last axis must have 1 to 2\^30 entries"),
        (lambda: hadamard_transform(torch.tensor(1.0)), r"x is \(\): its last axis"),
        (lambda: hadamard_transform(torch.ones(4).half()), "x is torch.float16: convert it to torch.float32"),
        (lambda: fastfood(torch.ones(4), 0, 1), r"size is 0: use 1 to 2\^30"),
        (lambda: fastfood(torch.ones(4), (1 << 30) + 1, 1), "size is 1073741825"),
        (lambda: fastfood(torch.ones(4), 4, -1), r"seed is -1: use 0 to 2\^63 - 1"),
        (lambda: fastfood_transposed(torch.ones(4), 0, 1), "length is 0"),
        (lambda: fastfood_transposed(torch.ones(4, dtype=torch.int64), 3, 1), "y is torch.int64"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("call", ["hadamard", "fastfood", "fastfood_transposed"])
def test_compiled_steps_check_what_they_would_read(call: str) -> None:
    if native.UNAVAILABLE is not None:
        pytest.skip(native.UNAVAILABLE)
    steps, keys = native.operators(), keys_of(0).flat
    more = () if call == "hadamard" else (keys, 4, 1.0)
    with pytest.raises(RuntimeError, match="must be a matrix"):
        getattr(steps, call)(torch.ones(4), *more)
    with pytest.raises(RuntimeError, match="wrong device, dtype, shape or strides"):
        getattr(steps, call)(torch.ones(4, 4).t()[1:], *more)
    if call == "hadamard":
        with pytest.raises(RuntimeError, match="a power of two"):
            steps.hadamard(torch.ones(1, 6))
    else:
        with pytest.raises(RuntimeError, match="wrong number of keys"):
            getattr(steps, call)(torch.ones(1, 4), keys[1:], 4, 1.0)
        with pytest.raises(RuntimeError, match="2\\^30"):
            getattr(steps, call)(torch.ones(1, 4), keys, 0, 1.0)
