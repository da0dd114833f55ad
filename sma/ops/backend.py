"""Choice between the implementations of one operation.

An operation has a reference backend (the definition), an eager backend (vectorised PyTorch) and possibly others that
apply only to some inputs. :class:`Op` tries them in order and takes the first that applies; ``with
using("reference"):`` forces one.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sma.errors import BackendError

# Not a ContextVar: torch.compile cannot read one, while it guards on this and recompiles when it changes.
_forced = threading.local()
_ops: dict[str, Op] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation: ``applies`` returns None, or the reason why it cannot run these arguments."""

    name: str
    run: Callable[..., Any]
    applies: Callable[..., str | None]


def _always(*args: Any, **kwargs: Any) -> str | None:
    return None


class Op:
    """A named operation with several backends, tried in ascending ``priority`` (the default order of preference)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backends: dict[str, Backend] = {}
        self._priority: dict[str, int] = {}
        _ops[name] = self

    def backend(
        self, name: str, *, priority: int = 50, applies: Callable[..., str | None] = _always
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation. By convention triton is 10, eager 50, torch_scatter 60, reference 90."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(name, run, applies)
            self._priority[name] = priority
            self.backends = dict(sorted(self.backends.items(), key=lambda item: self._priority[item[0]]))
            return run

        return register

    def choose(self, *args: Any, **kwargs: Any) -> Backend:
        """The backend that would run these arguments.

        Raises:
            BackendError: a backend is forced that this operation has but that cannot run the arguments, or none
                applies.
        """
        forced = self.backends.get(getattr(_forced, "name", None) or "")
        if forced is not None:
            reason = forced.applies(*args, **kwargs)
            if reason is not None:
                raise BackendError(f"{self.name}: backend {forced.name!r} was forced and cannot run: {reason}")
            return forced
        for backend in self.backends.values():
            if backend.applies(*args, **kwargs) is None:
                return backend
        raise BackendError(f"{self.name}: no backend applies: {self.explain(*args, **kwargs)}")

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, str | None]:
        """For every backend None when it can run these arguments, or the reason why it cannot."""
        return {name: backend.applies(*args, **kwargs) for name, backend in self.backends.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.choose(*args, **kwargs).run(*args, **kwargs)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A ``with`` block in which autocast does nothing; where it is off already this costs nothing."""
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
    before = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


def forced_backend() -> str | None:
    """The name that :func:`using` forces at present, or None."""
    name: str | None = getattr(_forced, "name", None)
    return name


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


def scatter_applies(x: Tensor, fixed: bool = False) -> str | None:
    """Why torch-scatter cannot work on ``x`` (in rows of a ``fixed`` number), or None."""
    if fixed:
        return "torch-scatter has no rows without a token"
    if importlib.util.find_spec("torch_scatter") is None:
        return "torch-scatter is not installed (extra 'scatter')"
    if x.dtype in (torch.bfloat16, torch.bool):
        return f"torch-scatter has no kernels for {x.dtype}"
    if x.device.type not in ("cpu", "cuda"):
        return f"torch-scatter has no kernels for device {x.device.type}"
    return None


def concrete(tensor: Tensor) -> bool:
    """True where looking at a value costs no wait for a device and breaks no compiled or exported graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def wider(x: Tensor) -> torch.dtype:
    """The dtype in which to add up many values of ``x``: one step wider, where its device has one."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return torch.float64 if x.dtype == torch.float32 and x.device.type != "mps" else x.dtype


def operations() -> dict[str, Op]:
    """Every operation that has been loaded, by name."""
    return dict(_ops)
