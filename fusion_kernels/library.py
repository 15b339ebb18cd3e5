"""The operator registry: each operator's schema once, its backends, and which of them answers here.

An operator is declared with :func:`operator` (its `torch.library` schema and fake kernel) and gets one implementation
per backend with :meth:`Operator.register`. A public function asks :meth:`Operator.function` for what to run.

A backend that is not there says so with `why_not`, one that does not do all that an operator's options ask for with
`takes`. Either way `"auto"` goes on to the next, and asking for it by name raises with the reason. A backend with a
`proof` is taken by `"auto"` where that holds, and by name without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch

NAMESPACE = "fusion_kernels"

_Member = TypeVar("_Member", bound=Enum)
_Entry = TypeVar("_Entry")


def check_name(what: str, name: str, known: Collection[str]) -> None:
    """Raise ValueError unless `name` is one of those `known`: no function may take one name for another."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(known)}")


def member(what: str, name: _Member | str, kind: type[_Member]) -> _Member:
    """The member of `kind` that is, or whose value is, `name`.

    Raises:
        ValueError: it has none of that value.
    """
    if isinstance(name, kind):
        return name
    # Names are listed where one is wrong: torch.compile of torch 2.11 cannot walk through an enum.
    try:
        return kind(name)
    except ValueError:
        check_name(what, str(name), [str(known.value) for known in kind])
        raise


def by_member(table: Mapping[_Member, _Entry], asked: _Member) -> _Entry:
    """What `table` has for the member `asked`: an `else` would take a new member for another one.

    Raises:
        ValueError: it has nothing for it.
    """
    if asked not in table:
        names = ", ".join(repr(known.value) for known in table)
        raise ValueError(f"no {type(asked).__name__} {asked.value!r} here: use one of {names}")
    return table[asked]


class BackendUnavailableError(RuntimeError):
    """A backend cannot run here or does not do what the options ask for, or none does; the message says why.

    Examples:
        >>> x = torch.randn(100, 3)
        >>> try:
        ...     found = fusion_kernels.kmeans(x, 4, backend="triton")
        ... except fusion_kernels.BackendUnavailableError:
        ...     found = fusion_kernels.kmeans(x, 4)
        >>> found.centroids.shape
        torch.Size([4, 3])
    """


class Provable(Protocol):
    """What a backend's `proof` is: `fusion_kernels.proof.Proof`, or a stand-in."""

    @property
    def name(self) -> str:
        """What the verdict is kept under."""

    def __call__(self, device: torch.device) -> str | None:
        """In one line why the backend is not to be taken unasked on the device, or None; finds out if need be."""

    def reason(self, device: torch.device) -> str | None:
        """The same by what is known already."""

    def state(self, device: torch.device) -> str:
        """In one line what is known already, for people."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: what a caller passes as `backend=`.
        function: takes the operator's schema arguments.
        device_types: `torch.device.type` values it runs on.
        why_not: returns None when it can run on a device, or on any of this machine if None is given, else the reason
            in one line. Called when it is needed: asking for GPUs while the package is imported would keep a program
            from forking afterwards.
        takes: of the operator's options, returns None when it does what they ask for, else what it lacks in one line.
        proof: returns None when it has shown on a device that it is right there, else the reason in one line, for which
            `"auto"` passes it over. None for a backend that need not show it.
    """

    name: str
    function: Callable[..., Any]
    device_types: tuple[str, ...]
    why_not: Callable[[torch.device | None], str | None] = lambda _: None
    takes: Callable[[Any], str | None] = lambda _: None
    proof: Provable | None = None

    def refuses(self, device: torch.device, options: Any) -> str | None:
        """In one line why it does not run on tensors there with these options (None for any), or None."""
        here = device.type in self.device_types
        reason = self.why_not(device if here else None)
        if reason is not None:
            return reason
        if not here:
            return f"runs on {', '.join(self.device_types)}, the tensor is on {device.type}"
        return None if options is None else self.takes(options)

    def declines(self, device: torch.device, options: Any) -> str | None:
        """In one line why it is not taken unasked: it refuses, or is not proved there."""
        reason = self.refuses(device, options)
        return self.proof(device) if reason is None and self.proof is not None else reason


def _auto(*_: Any, **__: Any) -> str:
    return "auto"


def _no_options(*_: Any, **__: Any) -> None:
    return None


@dataclass
class Operator:
    """A `torch.library` operator with a preference-ordered list of backends.

    Attributes:
        choose: names a backend from the operator's arguments.
        options: the record that `Backend.takes` is asked about, from the operator's arguments; None where every backend
            does all that can be asked for. It raises ValueError where the arguments ask for what there is not.
        variants: options that a caller may give, for which :func:`backends` says who declines.
    """

    name: str
    schema: str
    choose: Callable[..., str] = _auto
    options: Callable[..., Any] = _no_options
    variants: Collection[Any] = ()
    backends: list[Backend] = field(default_factory=list)

    @property
    def overload(self) -> Any:
        """The dispatched operator, `torch.ops.fusion_kernels.<name>.default`."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def direct(self, *args: Any) -> Any:
        """What the dispatched operator does, without the dispatcher: for calls from inside another implementation."""
        return self.chosen(*args).function(*args)

    def chosen(self, *args: Any, **kwargs: Any) -> Backend:
        """The backend that the dispatched operator runs on these arguments."""
        return self._select_for(self.choose(*args, **kwargs), args, kwargs)

    def function(self, backend: str, *args: Any) -> Callable[..., Any]:
        """What a public function calls on `args`: the operator for `"auto"`, which a compiler sees as one call, or
        the backend of that name.

        Raises:
            ValueError, BackendUnavailableError: as :meth:`select` does.
        """
        return self.overload if backend == "auto" else self._select_for(backend, args, {}).function

    def _select_for(self, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Backend:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return self.select(backend, device, self.options(*args, **kwargs))

    def register(self, backend: Backend) -> None:
        """Add `backend` behind those already there: earlier ones are preferred by `backend="auto"`."""
        self.backends.append(backend)

    def select(self, backend: str, device: torch.device, options: Any = None) -> Backend:
        """Return the backend for tensors on `device`.

        Args:
            backend: a backend's name, or `"auto"` for the first that is available on `device`, takes the options and
                is proved there if it has to be.
            options: what `Backend.takes` is asked about; None if no backend is to be asked.

        Raises:
            ValueError: no backend has that name.
            BackendUnavailableError: the backend exists but cannot run here or on `device`, or does not take the
                options; for `"auto"`, this holds for all.
        """
        if backend == "auto":
            return self.first(device, lambda candidate: candidate.declines(device, options))
        candidate = self.backend(backend)
        reason = candidate.refuses(device, options)
        if reason is None:
            return candidate
        raise BackendUnavailableError(f"{self.name}: backend {backend!r}: {reason}")

    def backend(self, name: str) -> Backend:
        """The backend of that name.

        Raises:
            ValueError: there is none.
        """
        for candidate in self.backends:
            if candidate.name == name:
                return candidate
        names = ", ".join(["auto", *(b.name for b in self.backends)])
        raise ValueError(f"{self.name}: unknown backend {name!r}: use one of {names}")

    def first(self, device: torch.device, declines: Callable[[Backend], str | None]) -> Backend:
        """The first backend on the device of which `declines` is None.

        Raises:
            BackendUnavailableError: there is none.
        """
        refusals: list[str] = []
        for candidate in self.backends:
            reason = declines(candidate)
            if reason is None:
                return candidate
            if device.type in candidate.device_types:
                refusals.append(f"{candidate.name}: {reason}")
        why = f" here with these options: {'; '.join(refusals)}" if refusals else ""
        raise BackendUnavailableError(f"{self.name}: no backend runs on device type {device.type!r}{why}")

    def expected(self, device: torch.device) -> Backend:
        """What `"auto"` takes on the device by what is known already: nothing is proved for it."""

        def declines(candidate: Backend) -> str | None:
            reason = candidate.refuses(device, None)
            proof = candidate.proof
            return reason if reason is not None or proof is None else proof.reason(device)

        return self.first(device, declines)


_OPERATORS: dict[str, Operator] = {}


def operator(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    choose: Callable[..., str] = _auto,
    *,
    options: Callable[..., Any] = _no_options,
    variants: Collection[Any] = (),
) -> Operator:
    """Declare `fusion_kernels::<name>` with `schema` (argument list and returns) and its fake kernel.

    The dispatched operator runs the backend that `choose` names from the operator's arguments: by default the first
    that is available on its first tensor's device and takes `options` of the arguments; see :class:`Operator`. Tensors
    in the result are new: no operator aliases its inputs, or mutates any but those that its schema marks.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    op = Operator(name, schema, choose, options, variants)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return op.chosen(*args, **kwargs).function(*args, **kwargs)

    torch.library.impl(qualified, "CompositeExplicitAutograd", dispatch)
    torch.library.register_fake(qualified, fake)
    _OPERATORS[name] = op
    return op


def backends() -> dict[str, dict[str, str]]:
    """Which backend answers for each operator here, by device type, and why the others do not.

    Returns:
        `{operator: {"cpu": backend, "cuda": backend, "<backend> unavailable": reason, "<backend> declines": reasons,
        "<backend> proof": state}}`; `"cuda"` and the states of proofs on the current device are present only when CUDA
        is. A backend that declines answers, if it is there, for all options but those that the reasons name; for these,
        the next one does. Nothing is proved for the answer.

    Examples:
        >>> fusion_kernels.backends()["kmeans"]["cpu"] in ("cpu", "reference")
        True
    """
    report: dict[str, dict[str, str]] = {}
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for name, op in sorted(_OPERATORS.items()):
        row = {device.type: op.expected(device).name for device in devices}
        for backend in op.backends:
            reason = backend.why_not(None)
            if reason is not None:
                row[f"{backend.name} unavailable"] = reason
            elif backend.proof is not None:
                row |= {f"{backend.name} proof": backend.proof.state(device) for device in devices[1:]}
            declined = dict.fromkeys(filter(None, map(backend.takes, op.variants)))
            if declined:
                row[f"{backend.name} declines"] = "; ".join(declined)
        report[name] = row
    return report


def proofs(device: torch.device) -> dict[str, Provable]:
    """By name, the proofs of all backends that can run on the device."""
    found: dict[str, Provable] = {}
    for op in _OPERATORS.values():
        for backend in op.backends:
            if backend.proof is not None and backend.refuses(device, None) is None:
                found[backend.proof.name] = backend.proof
    return dict(sorted(found.items()))
