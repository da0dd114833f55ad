"""Activation checkpointing that keeps the routing: a decision is saved, never taken a second time.

Recomputing a decision can flip it (a different kernel, noise), and then the recomputed activations have other shapes
than the saved gradients. :func:`checkpoint` saves the few bits of every decision and recomputes everything else. What a
module counts as it runs, such as the running averages of a batch norm, is counted once.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint


@torch.library.custom_op("sma::decision", mutates_args=())
def mark_decision(active: Tensor) -> Tensor:
    """The identity on a decision; its place in the graph is what :func:`checkpoint` saves."""
    return active.clone()


@mark_decision.register_fake
def _(active: Tensor) -> Tensor:
    return torch.empty_like(active)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.sma.decision.default else CheckpointPolicy.PREFER_RECOMPUTE


def _modules_of(function: Any) -> Iterator[nn.Module]:
    """The modules that a callable shows: itself, the owner of a method, what a function refers to by name."""
    if isinstance(function, partial):
        yield from _modules_of(function.func)
        yield from (each for each in (*function.args, *function.keywords.values()) if isinstance(each, nn.Module))
    elif isinstance(owner := getattr(function, "__self__", function), nn.Module):
        yield owner
    elif inspect.isfunction(function):
        seen = inspect.getclosurevars(function)
        named = (*seen.nonlocals.values(), *seen.globals.values())
        yield from (each for each in named if isinstance(each, nn.Module))


@contextmanager
def _copies_of_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """The modules work on copies of their buffers, which are thrown away afterwards."""
    owners = {part: dict(part._buffers) for module in modules for part in module.modules() if part._buffers}
    for part, buffers in owners.items():
        part._buffers.update({name: None if each is None else each.clone() for name, each in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in owners.items():
            part._buffers.update(buffers)


class _Depth(threading.local):
    value: int = 0


DEPTH = _Depth()
"""``DEPTH.value`` is how many calls of :func:`checkpoint` this thread is in, in the first or the second run."""


@contextmanager
def _inside(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    DEPTH.value += 1
    try:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield
    finally:
        DEPTH.value -= 1


class _Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the decisions that are taken inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.sma.decision.default:
            self.kept.append(out.clone())  # the caller may change what it got
        return out


class _SameDecisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives the decisions that were kept, in their order, in place of those that are taken inside."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._next = iter(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.sma.decision.default:
            return func(*args, **(kwargs or {}))
        decision = next(self._next, None)
        if decision is None:
            raise RuntimeError(
                "sma.checkpoint: must take as many decisions when it recomputes as before, got one more; "
                "the function must do the same at every call"
            )
        return decision.clone()


class _Anew(AbstractContextManager[None]):
    """A context that is made at every entry: a graph that is kept is recomputed once for each backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


def _contexts(modules: list[nn.Module]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    now = _Decisions()
    return _inside(now), _Anew(lambda: _inside(_copies_of_buffers(modules), _SameDecisions(now.kept)))


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``function`` now and again in the backward pass, but with the routing decisions of now.

    Args:
        function: a module, a method of one, or any callable; sparsely activated layers may lie anywhere inside. Buffers
            keep what the first run made of them, for the modules that a function refers to directly.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        What ``function`` returns. Its graph may be used more than once (``retain_graph=True``); each backward pass
        recomputes it.

    Example:
        >>> import torch, sma
        >>> layer, x = sma.SparselyActivated(torch.nn.Linear(4, 4)), torch.randn(2, 5, 4, requires_grad=True)
        >>> checkpoint(layer, x).output.sum().backward()
        >>> x.grad.shape
        torch.Size([2, 5, 4])
    """
    if torch.compiler.is_compiling():  # the compiler sees one graph, in which a buffer changes once
        contexts = partial(create_selective_checkpoint_contexts, _policy)
    else:
        contexts = partial(_contexts, list(_modules_of(function)))
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)
