"""Weights and spec of a model in one safetensors file. Nothing is ever unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sma.errors import CheckpointError, ConfigError, SizeError, SpecError
from sma.interfaces import Model

if TYPE_CHECKING:
    from collections.abc import Iterable

SPEC_KEY = "sma_spec"


def save(model: Model, path: str | PathLike[str]) -> None:
    """Write a model's weights and its spec; the file appears complete or not at all.

    Args:
        model: any registered model.
        path: the file to write, by custom ``*.safetensors``.
    """
    from sma.spec import to_yaml

    write_tensors(model.state_dict(), path, {SPEC_KEY: to_yaml(model.config)})


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file atomically: a temporary file beside it, synced to disk, then renamed.

    Raises:
        CheckpointError: the file cannot be written; what was there before is still there.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()  # with the mode that the umask gives; safetensors makes files of mode 0600
        mode = temporary.stat().st_mode
        save_file(_apart(tensors), str(temporary), metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, of which no two share memory: tied weights are written under each of their
    names.
    """
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        written[name] = own.clone() if storage in seen else own
        seen.add(storage)
    return written


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def load(path: str | PathLike[str]) -> Model:
    """Build the model that :func:`save` wrote, with its weights, in evaluation mode.

    Raises:
        CheckpointError: the file is broken, holds no spec, or its weights do not fit the spec.
        SpecError: the spec in the file is not valid, or names what is not registered here.
    """
    from sma.spec import loads
    from sma.spec.sizes import blueprint

    tensors, metadata = read_tensors(path)
    if SPEC_KEY not in metadata:
        raise CheckpointError(f"{path}: holds no spec; build the model and use load_into")
    try:
        config = loads(metadata[SPEC_KEY], name=str(path), kind="model")
        sketch = blueprint(config, most_tensors=len(tensors))
        if sketch is not None:  # before there is memory for weights that do not fit
            check_keys(sketch, tensors, str(path))
        model: Model = config.build()
    except SizeError as error:
        raise CheckpointError(f"{path}: its spec cannot be built here ({error})") from error
    except ConfigError as error:
        raise SpecError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes beyond the memory of this machine
        raise CheckpointError(f"{path}: its spec cannot be built here ({error})") from error
    _assign(model, tensors, str(path))
    return model.eval()


def load_into(model: nn.Module, path: str | PathLike[str]) -> None:
    """Load weights into a model that stands already; every key and shape must match.

    Raises:
        CheckpointError: keys are missing or unexpected, or a shape differs; the message lists them. The model is not
            changed.
    """
    tensors, _ = read_tensors(path)
    _assign(model, tensors, str(path))


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    check_keys(model, tensors, place)
    model.load_state_dict(dict(tensors))


def check_keys(model: nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuse weights whose names or shapes are not the model's.

    Raises:
        CheckpointError: listing what is missing, unexpected, of another shape and of another kind of numbers.
    """
    own = model.state_dict()
    problems = [
        _listed("missing", sorted(own.keys() - tensors.keys())),
        _listed("unexpected", sorted(tensors.keys() - own.keys())),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
                for name in sorted(own.keys() & tensors.keys())
                if not is_lazy(own[name]) and own[name].shape != tensors[name].shape
            ],
        ),
        _listed(
            "of another kind of numbers",
            [
                f"{name} {tensors[name].dtype} instead of {own[name].dtype}"
                for name in sorted(own.keys() & tensors.keys())
                if _kind(own[name]) != _kind(tensors[name])
            ],
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise CheckpointError(f"{place}: does not fit the model: {'; '.join(found)}")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Floating point or integer, complex or real: within a kind, weights may be of another precision."""
    return tensor.is_floating_point(), tensor.is_complex()


def _listed(what: str, names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{more}" if names else ""
