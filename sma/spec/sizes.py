"""How much memory a configuration asks for, counted on the device ``meta``, where tensors hold no numbers."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from sma.configurable import BaseConfig
from sma.errors import SizeError, SMAError
from sma.spec.tree import Path, show

_OBJECT = 4096
"""Least memory of a module as a Python object."""
_CANNOT_BE = 2**40
"""An integer above it is to blame for an error in building: no tensor has a dimension of that size."""
_SIGNS = ("overflow", "too big", "too large", "negative dimension")
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_planned: ContextVar[torch.device | None] = ContextVar("planned", default=None)
"""The device of the module whose blueprint is being built."""


@dataclass(frozen=True)
class Size:
    """What modules hold, tied tensors counted once.

    Attributes:
        parameters: numbers to train.
        buffers: numbers that are kept beside them.
        nbytes: memory of both.
    """

    parameters: int
    buffers: int
    nbytes: int

    @classmethod
    def of(cls, *modules: nn.Module) -> Size:
        """The size of modules; a parameter whose shape is not known yet counts nothing."""
        parameters = _distinct(each for module in modules for each in module.parameters())
        buffers = _distinct(each for module in modules for each in module.buffers())
        return cls(
            sum(each.numel() for each in parameters),
            sum(each.numel() for each in buffers),
            sum(each.numel() * each.element_size() for each in (*parameters, *buffers)),
        )


def blueprint(config: BaseConfig, *, most_tensors: int | None = None, **context: Any) -> nn.Module | None:
    """What ``config`` describes, without memory for it, after a check that there would be enough.

    Args:
        config: of a module.
        most_tensors: how many parameters it may have at most; None means any number.
        **context: what :meth:`~sma.configurable.BaseConfig.build` takes.

    Returns:
        The module on the device ``meta``; None where it cannot be built there, as with a part that reads a tensor.

    Raises:
        SizeError: it is larger than the machine or an integer of 64 bits allows, or has too many parameters.
        SMAError: the configuration is not valid; as when it is built.
    """
    device = torch.get_default_device()
    token = _planned.set(device)
    try:
        with torch.device("meta"), _at_most(most_tensors):
            module = config.build(**context)
        size = Size.of(module) if isinstance(module, nn.Module) else None
    except SMAError:
        raise
    except Exception as error:
        path, value = _largest(config, context)
        if (
            abs(value) > _CANNOT_BE
            or isinstance(error, OverflowError)
            or any(sign in str(error).lower() for sign in _SIGNS)
        ):
            reason = str(error).partition("\n")[0]
            raise SizeError(f"{show(path)}: must give sizes from 0 to 2**63 - 1, got {value} ({reason})") from error
        return None  # building it in earnest tells what is wrong, if anything is
    finally:
        _planned.reset(token)
    if size is None:
        return None
    path, value = _largest(config, context)
    _refuse(size.nbytes, _memory(device), show(path), value)
    assert isinstance(module, nn.Module)
    return module


def check_repeated(modules: Sequence[nn.Module], times: int, field: str) -> None:
    """Refuse a module that repeats others more often than the machine can hold, before the first repetition.

    Args:
        modules: one of each, on any device.
        times: how often all of them are repeated.
        field: what the error calls ``times``.

    Raises:
        SizeError: there is not enough memory, be it for the modules as Python objects.
    """
    objects = _OBJECT * sum(1 for module in modules for _ in module.modules())
    _refuse(objects * times, _memory(torch.device("cpu")), field, times)
    device = _planned.get() or torch.get_default_device()
    _refuse((objects + Size.of(*modules).nbytes) * times, _memory(device), field, times)


def _refuse(needed: int, memory: int | None, field: str, value: int) -> None:
    if memory is not None and needed > memory:
        raise SizeError(
            f"{field}: must fit the memory of the device, {memory / 2**30:.1f} GiB, got {value}: "
            f"that takes {needed / 2**30:,.1f} GiB"
        )


def _memory(device: torch.device) -> int | None:
    """Bytes that the device has in all; None where this is not known, or where tensors take none."""
    if type(torch.empty(0)) is not Tensor:  # a mode makes tensors that hold nothing
        return None
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        return None
    for name in _CGROUP:  # of a container
        try:
            limits.append(int(File(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such limit, or the word max
            continue
    return min(limits)


@contextmanager
def _at_most(tensors: int | None) -> Iterator[None]:
    """Stop the building of modules in this thread once they registered more parameters than that.

    Modules may register some and drop them again, so a multiple of the number is allowed.
    """
    if tensors is None:
        yield
        return
    thread, count, most = threading.get_ident(), 0, 4 * tensors + 1000

    def registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise SizeError(f"parameters: must be at most {tensors}, got more than {most}")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _largest(config: BaseConfig, context: Mapping[str, Any]) -> tuple[Path, int]:
    """Path and value of the largest integer, which is the likely one to blame."""
    found = _integers({**context, "": config}, ())
    return max(found, key=lambda each: abs(each[1]), default=((), 0))


def _integers(value: Any, path: Path) -> Iterator[tuple[Path, int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _integers(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _integers(each, (*path, key) if key else path)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _integers(each, (*path, index))


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [each for each in {id(tensor): tensor for tensor in tensors}.values() if not is_lazy(each)]
