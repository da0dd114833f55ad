"""Shapes and dtypes that annotations promise (jaxtyping) are checked at every call in the tests."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
import torch

_jaxtyped = jaxtyping.jaxtyped


def check_annotated_shapes(*packages: str) -> None:
    """Check every annotated call in ``packages`` from now on. Has to run before their first import."""
    # The import hook puts `@jaxtyping.jaxtyped(...)` above every function, and so finds the decorator below.
    jaxtyping.jaxtyped = _tactful  # type: ignore[assignment]
    jaxtyping.install_import_hook(list(packages), "beartype.beartype")


def _tactful(*, typechecker: Any) -> Callable[[Any], Any]:
    """``jaxtyped``, which lets the compiler through, and the library's own errors before those of the checker."""

    def decorate(function: Any) -> Any:
        if "triton_kernel" in function.__module__.split("."):  # its functions are source for a compiler
            return function
        if isinstance(function, type):  # of a dataclass it checks the fields, in place
            plain = function.__init__
            checked = _jaxtyped(typechecker=typechecker)(function)
            if checked.__init__ is not plain:
                checked.__init__ = _unless_compiling(plain, checked.__init__)
            return checked
        checked = _jaxtyped(typechecker=typechecker)(function)
        if not inspect.isfunction(function):
            return checked

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # it cannot trace the checker
                return function(*args, **kwargs)
            try:
                return checked(*args, **kwargs)
            except jaxtyping.TypeCheckError:
                function(*args, **kwargs)  # raises, where the function refuses such input by itself
                raise

        return call

    return decorate


def _unless_compiling(plain: Callable[..., None], checked: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def init(*args: Any, **kwargs: Any) -> None:
        (plain if torch.compiler.is_compiling() else checked)(*args, **kwargs)

    return init
