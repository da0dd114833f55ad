"""Choice between the implementations of one operation.

An operation has a reference backend (the definition), an eager backend (vectorised PyTorch) and possibly others that
support only some inputs. :class:`Op` takes the first that applies, in order of priority, and keeps that choice for the
signature of the arguments; ``with using("reference"):`` forces one.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sma.errors import BackendError
from sma.transforms import transformed


class _Forced(threading.local):
    name: str | None = None


# Not a ContextVar: torch.compile cannot read one, while it guards on this and recompiles when it changes.
_forced = _Forced()
_ops: dict[str, Op] = {}


def _always(*args: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: by which it is forced.
        run: computes the result.
        applies: None when it can run these arguments, or the reason why it cannot.
        pays: None when it is worth choosing, or the reason why another one is better; not asked when it is forced.
        capabilities: what it can do beyond ``run``, by names that the operation defines: the function that does it, or
            ``run`` itself where that has the capability.
    """

    name: str
    run: Callable[..., Any]
    applies: Callable[..., str | None] = _always
    pays: Callable[..., str | None] = _always
    capabilities: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


@runtime_checkable
class Signature(Protocol):
    """All that the choice of a backend may look at. An operation defines its own: hashable, with at least a device."""

    @property
    def device(self) -> torch.device:
        """Of the arguments."""


def lazy(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at its first call, for instance because it imports Triton."""
    found: list[Callable[..., Any]] = []

    def load() -> None:
        if not found:
            found.append(getattr(importlib.import_module(module), name))

    # The compiler cannot trace an import by name, and runs this instead. torch.compiler.assume_constant_result sets the
    # same, but imports the compiler, and with it Triton: seconds that a program without a compiler need not spend.
    load._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not found:  # the list must not be read before the import
            load()
        return found[0](*args)

    return run


class Op:
    """A named operation with several backends.

    Args:
        name: of the operation.
        signature: from the arguments to all that the backends' ``applies`` and ``pays`` may look at, hashable: devices,
            dtypes, widths. They are given that alone, so a choice holds for as long as the signature is the same, and
            is kept. Without one they are given the arguments, and are asked at every call.

    Example:
        >>> half = Op("half_of_an_even_number")
        >>> half.register("shift", lambda n: n >> 1, priority=10, applies=lambda n: f"{n} is odd" if n % 2 else None)
        >>> half.register("floor", lambda n: n // 2)
        >>> half.choose(4).name, half.choose(5).name, half.explain(5)["shift"]
        ('shift', 'floor', '5 is odd')
        >>> forget(half)
    """

    def __init__(self, name: str, signature: Callable[..., Signature] | None = None) -> None:
        self.name = name
        self.signature = signature
        self._backends: dict[str, Backend] = {}
        self._priority: dict[str, int] = {}
        self._kept: dict[tuple[str | None, Signature], Backend] = {}
        _ops[name] = self

    @property
    def backends(self) -> Mapping[str, Backend]:
        """By name, in the order in which they are tried."""
        return MappingProxyType(self._backends)

    def register(
        self,
        name: str,
        run: Callable[..., Any],
        *,
        priority: int = 50,
        applies: Callable[..., str | None] = _always,
        pays: Callable[..., str | None] = _always,
        capabilities: Mapping[str, Callable[..., Any]] | Iterable[str] = (),
    ) -> None:
        """Add a backend, see :class:`Backend`. They are tried in ascending ``priority``: by convention triton is 10,
        eager 50, torch_scatter 60, reference 90.
        """
        more = capabilities if isinstance(capabilities, Mapping) else dict.fromkeys(capabilities, run)
        self._priority[name] = priority
        backends = {**self._backends, name: Backend(name, run, applies, pays, more)}
        self._replace(dict(sorted(backends.items(), key=lambda item: self._priority[item[0]])))

    def backend(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """:meth:`register` as a decorator."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.register(name, run, **options)
            return run

        return register

    def remove(self, name: str) -> None:
        """Remove a backend."""
        rest = dict(self._backends)
        del rest[name]
        self._replace(rest)

    def _replace(self, backends: dict[str, Backend]) -> None:
        # In this order: a thread that chooses at the same time keeps its choice in the old dictionary.
        self._backends = backends
        self._kept = {}

    def __call__(self, *args: Any) -> Any:
        if self.signature is None:
            return self._first(args).run(*args)
        return self.run(self.signature(*args), *args)

    def run(self, signature: Signature, *args: Any) -> Any:
        """Run the backend for a signature, with autocast off: an operation decides itself in which dtype it computes.

        Raises:
            BackendError: as for :meth:`choose`.
        """
        kept = None if torch.compiler.is_compiling() else self._kept.get((_forced.name, signature))
        run = (self.chosen(signature) if kept is None else kept).run
        if transformed():
            run = self._differentiable(signature).run
        if torch.is_autocast_enabled(signature.device.type):
            with torch.autocast(signature.device.type, enabled=False):
                return run(*args)
        return run(*args)

    def _differentiable(self, signature: Signature) -> Backend:
        """The backend under ``torch.func`` and in forward mode, which cannot look into a kernel."""
        chosen = self.chosen(signature)
        return self._backends.get("eager", chosen) if chosen.name == "triton" and _forced.name is None else chosen

    def choose(self, *args: Any) -> Backend:
        """The backend that would run these arguments.

        Raises:
            BackendError: a backend is forced that this operation has but that cannot run the arguments, or none
                applies.
        """
        return self._first(args) if self.signature is None else self.chosen(self.signature(*args))

    def chosen(self, signature: Signature) -> Backend:
        """The backend for arguments of a signature, from the last time it was chosen if there was one.

        Raises:
            BackendError: as for :meth:`choose`.
        """
        if torch.compiler.is_compiling():  # a graph holds sizes that have no hash
            return self._first((signature,))
        choices, key = self._kept, (_forced.name, signature)
        kept = choices.get(key)
        if kept is None:
            kept = choices[key] = self._first((signature,))
        return kept

    def _first(self, asked: tuple[Any, ...]) -> Backend:
        forced = self._backends.get(_forced.name or "")
        if forced is not None:
            reason = forced.applies(*asked)
            if reason is not None:
                raise BackendError(f"{self.name}: backend {forced.name!r} was forced and cannot run: {reason}")
            return forced
        for backend in self._backends.values():
            if backend.applies(*asked) is None and backend.pays(*asked) is None:
                return backend
        raise BackendError(f"{self.name}: no backend applies: {self._reasons(asked)}")

    def explain(self, *args: Any) -> dict[str, str | None]:
        """For every backend None when it may be chosen for these arguments, or the reason why not."""
        if self.signature is None:
            return self._reasons(args)
        return self._reasons((self.signature(*args),))

    def _reasons(self, asked: tuple[Any, ...]) -> dict[str, str | None]:
        forced, reasons = _forced.name, dict[str, str | None]()
        for name, backend in self._backends.items():
            reason = backend.applies(*asked)
            reasons[name] = backend.pays(*asked) if reason is None and name != forced else reason
        return reasons


def forget(op: Op) -> None:
    """Remove an operation from :func:`operations`."""
    del _ops[op.name]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A ``with`` block in which autocast is off."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force every operation that has a backend ``name`` onto it inside the ``with`` block; the others are not affected.

    Raises:
        BackendError: no loaded operation has a backend of that name.
    """
    known = sorted({backend for op in _ops.values() for backend in op.backends})
    if name not in known:
        raise BackendError(f"using({name!r}): no operation has such a backend; there are {', '.join(known)}")
    before = _forced.name
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


def torch_scatter() -> Any:
    """The optional package torch-scatter.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import torch_scatter  # type: ignore[import-not-found,unused-ignore]  # an optional extra
    except ImportError as error:
        raise BackendError(f"torch_scatter: the extra 'scatter' is not installed ({error})") from error
    return torch_scatter


def why_not_scatter(device: torch.device, dtype: torch.dtype, fixed: bool = False) -> str | None:
    """Why torch-scatter cannot run on tensors of a device and dtype, or with a ``fixed`` capacity, or None."""
    if fixed:
        return "torch-scatter does not support a fixed capacity"
    if importlib.util.find_spec("torch_scatter") is None:
        return "torch-scatter is not installed (extra 'scatter')"
    if dtype in (torch.bfloat16, torch.bool):
        return f"torch-scatter has no kernels for {dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"torch-scatter has no kernels for device {device.type}"
    return None


def concrete(tensor: Tensor) -> bool:
    """True where reading a value neither synchronises with a device nor breaks a compiled or exported graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def wider(x: Tensor) -> torch.dtype:
    """The dtype in which to sum many values of ``x``: one step wider, where its device has one."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return torch.float64 if x.dtype == torch.float32 and x.device.type != "mps" else x.dtype


def operations() -> dict[str, Op]:
    """Every operation that has been loaded, by name."""
    return dict(_ops)
