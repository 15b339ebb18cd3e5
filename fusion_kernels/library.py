"""The operator registry: each operator's schema once, its backends, and which of them answers here.

An operator is declared with :func:`operator` (its `torch.library` schema and fake kernel) and gets one implementation
per backend with :meth:`Operator.register`. A public function asks :meth:`Operator.select` for the backend to run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "fusion_kernels"


def check_name(what: str, name: str, known: Collection[str]) -> None:
    """Raise ValueError unless `name` is one of those `known`: no function may take one name for another."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(known)}")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why.

    Examples:
        >>> x = torch.randn(100, 3)
        >>> try:
        ...     found = fusion_kernels.kmeans(x, 4, backend="triton")
        ... except fusion_kernels.BackendUnavailableError:
        ...     found = fusion_kernels.kmeans(x, 4)
        >>> found.centroids.shape
        torch.Size([4, 3])
    """


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: what a caller passes as `backend=`.
        function: takes the operator's schema arguments.
        device_types: `torch.device.type` values it runs on.
        why_not: returns None when it can run on this machine, else the reason in one line. Called when it is needed:
            asking for GPUs while the package is imported would keep a program from forking afterwards.
    """

    name: str
    function: Callable[..., Any]
    device_types: tuple[str, ...]
    why_not: Callable[[], str | None] = lambda: None


@dataclass
class Operator:
    """A `torch.library` operator with a preference-ordered list of backends; `choose` names one from its arguments."""

    name: str
    schema: str
    choose: Callable[..., str] = lambda *_, **__: "auto"
    backends: list[Backend] = field(default_factory=list)

    @property
    def overload(self) -> Any:
        """The dispatched operator, `torch.ops.fusion_kernels.<name>.default`."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def direct(self, *args: Any) -> Any:
        """What the dispatched operator does, without the dispatcher: for calls from inside another implementation."""
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        return self.select(self.choose(*args), device).function(*args)

    def register(self, backend: Backend) -> None:
        """Add `backend` behind those already there: earlier ones are preferred by `backend="auto"`."""
        self.backends.append(backend)

    def select(self, backend: str, device: torch.device) -> Backend:
        """Return the backend for tensors on `device`.

        Args:
            backend: a backend's name, or `"auto"` for the first that is available on `device`.

        Raises:
            ValueError: no backend has that name.
            BackendUnavailableError: the backend exists but cannot run here or on `device`.
        """
        if backend == "auto":
            for candidate in self.backends:
                if device.type in candidate.device_types and candidate.why_not() is None:
                    return candidate
            raise BackendUnavailableError(f"{self.name}: no backend runs on device type {device.type!r}")
        for candidate in self.backends:
            if candidate.name == backend:
                reason = candidate.why_not()
                if reason is not None:
                    raise BackendUnavailableError(f"{self.name}: backend {backend!r}: {reason}")
                if device.type not in candidate.device_types:
                    raise BackendUnavailableError(
                        f"{self.name}: backend {backend!r} runs on {', '.join(candidate.device_types)}, "
                        f"the tensor is on {device.type}"
                    )
                return candidate
        names = ", ".join(["auto", *(b.name for b in self.backends)])
        raise ValueError(f"{self.name}: unknown backend {backend!r}: use one of {names}")


_OPERATORS: dict[str, Operator] = {}


def operator(
    name: str, schema: str, fake: Callable[..., Any], choose: Callable[..., str] = lambda *_, **__: "auto"
) -> Operator:
    """Declare `fusion_kernels::<name>` with `schema` (argument list and returns) and its fake kernel.

    The dispatched operator runs the backend that `choose` names from the operator's arguments: by default the first
    that is available on its first tensor's device. Tensors in the result are new: no operator aliases its inputs, or
    mutates any but those that its schema marks.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    op = Operator(name, schema, choose)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return op.select(choose(*args, **kwargs), device).function(*args, **kwargs)

    torch.library.impl(qualified, "CompositeExplicitAutograd", dispatch)
    torch.library.register_fake(qualified, fake)
    _OPERATORS[name] = op
    return op


def backends() -> dict[str, dict[str, str]]:
    """Which backend answers for each operator here, by device type, and why the others do not.

    Returns:
        `{operator: {"cpu": backend, "cuda": backend, "<backend> unavailable": reason, ...}}`; `"cuda"` is present only
        when CUDA is.

    Examples:
        >>> fusion_kernels.backends()["kmeans"]["cpu"] in ("cpu", "reference")
        True
    """
    report: dict[str, dict[str, str]] = {}
    device_types = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, op in sorted(_OPERATORS.items()):
        row = {device: op.select("auto", torch.device(device)).name for device in device_types}
        reasons = {backend.name: backend.why_not() for backend in op.backends}
        row.update({f"{backend} unavailable": reason for backend, reason in reasons.items() if reason is not None})
        report[name] = row
    return report
