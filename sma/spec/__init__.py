"""Specs: YAML, mappings and OmegaConf nodes to typed configurations, and back. The only package that imports OmegaConf.

A spec is a mapping. Its ``type`` names a registered class; its other keys are the fields of that class's ``Config``,
children included::

    type: language_model
    d_model: 128
    norm: layernorm                     # short for {type: layernorm}
    blocks:
      - {type: seqboat, window: 32}
    hidden: ${d_model}                  # another value of the same spec

``extends: name`` (or a file, relative to the one that says so) takes over another spec, for the whole or for a child:
mappings merge, lists are replaced, and a child with another ``type`` starts afresh. A mapping without ``type`` changes
the default of its field. Where a child is expected, the name of a spec may stand for it.

A spec can do nothing but name what is registered: no Python paths, no resolvers, no tags, and limits on its size.
Errors name the path: ``layers[0].module (gau): unknown key 'widow'; did you mean 'window'?``

Example:
    >>> import sma
    >>> model = sma.build("seqboat_text", "d_model=32", "n_layers=2", "blocks[0].norm=rmsnorm")
    >>> type(model.stack.layers[1].norm).__name__
    'RMSNorm'
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import nn

from sma.configurable import BaseConfig
from sma.errors import ConfigError, SpecError
from sma.plugins import registry
from sma.spec.dumping import unload
from sma.spec.sizes import blueprint
from sma.spec.sources import Document, Reader
from sma.spec.text import render
from sma.spec.tree import override, resolve
from sma.spec.typed import Converter, plugin_of, shown

__all__ = ["build", "dump", "load", "load_as", "loads", "to_yaml"]

T = TypeVar("T")


def load(source: Any, *overrides: str, kind: str | None = None) -> BaseConfig:
    """The typed configuration that a spec describes.

    Args:
        source: a registered name, a path of a ``.yaml`` file, a mapping, an OmegaConf node, or a configuration.
        *overrides: ``key=value`` from left to right: ``n_layers=6``, ``blocks[0].norm.eps=1e-6``. Another ``type``
            for a child drops its other keys, so it comes before them.
        kind: what it has to be: ``model``, ``module``, ``mixer``, ... By default whatever ``type`` names, models first.

    Raises:
        SpecError: the spec is not valid; names the path, the rule and the value.
    """
    config = _load(source, overrides, kind)
    assert isinstance(config, BaseConfig)
    return config


def load_as(source: Any, cls: type[T], *overrides: str) -> T:
    """As :func:`load`, for a given class: the ``Config`` of a plugin, or any dataclass (which has no ``type`` key).

    Args:
        source: as for :func:`load`.
        cls: a dataclass.
        *overrides: as for :func:`load`.

    Raises:
        SpecError: the spec is not valid, or describes something else.
    """
    config = _load(source, overrides, cls)
    assert isinstance(config, cls)
    return config


def loads(text: str, *overrides: str, name: str = "text", kind: str | None = None) -> BaseConfig:
    """As :func:`load`, from YAML text (what :func:`to_yaml` wrote into a checkpoint, for instance).

    Text may come from an untrusted source, so it opens no file: it may extend registered specs only.

    Args:
        text: the YAML.
        *overrides: as for :func:`load`.
        name: what errors call it.
        kind: as for :func:`load`.

    Raises:
        SpecError: as for :func:`load`.
    """
    reader = Reader(registry())
    config = _convert(reader, reader.read_text(text, name), overrides, kind)
    assert isinstance(config, BaseConfig)
    return config


def build(source: Any, *overrides: str, kind: str | None = None, **context: Any) -> Any:
    """Load a spec and construct what it describes.

    Args:
        source: as for :func:`load`.
        *overrides: as for :func:`load`.
        kind: as for :func:`load`.
        **context: what the surroundings of the part decide: ``d_model``, ``causal``; a model takes none.

    Returns:
        The model (or module, mixer, ...).

    Raises:
        SpecError: the spec is not valid.
        ConfigError: the context does not fit, or the class refuses it.
        SizeError: the machine has not enough memory for it; nothing was allocated.
    """
    config = load(source, *overrides, kind=kind)
    plugin = plugin_of(type(config))
    if plugin is None:
        raise ConfigError(f"{type(config).__qualname__}: a configuration that belongs to no plugin builds nothing")
    try:
        inspect.signature(plugin).bind(config, **context)
    except TypeError as error:
        hint = "; changes of the spec are written as strings, as in 'n_layers=6'" if plugin.kind == "model" else ""
        raise ConfigError(f"{registry().name_of(plugin) or plugin.__name__} ({plugin.kind}): {error}{hint}") from error
    if issubclass(plugin, nn.Module):
        blueprint(config, **context)
    return config.build(**context)


def dump(config: BaseConfig) -> dict[str, Any]:
    """The mapping that describes ``config``, every field written out: ``load(dump(config)) == config``.

    Raises:
        SpecError: it holds a class that is not registered.
    """
    if not isinstance(config, BaseConfig):
        raise SpecError(f"only a configuration can be dumped, got {shown(config)}")
    tree: dict[str, Any] = unload(config, registry())
    return tree


def to_yaml(config: BaseConfig) -> str:
    """As :func:`dump`, as text: ``loads(to_yaml(config)) == config``."""
    return render(dump(config))


def _load(source: Any, overrides: tuple[str, ...], expect: Any) -> Any:
    names = registry()
    reader = Reader(names)
    if isinstance(source, BaseConfig):
        if not overrides:
            if isinstance(expect, type) and not isinstance(source, expect):
                raise SpecError(f"expected {expect.__qualname__}, got {type(source).__qualname__}")
            if isinstance(expect, str) and source.owner.kind != expect:
                raise SpecError(f"expected {expect}, got {source.owner.kind}")
            return source
        return _convert(reader, Document(unload(source, names), "configuration"), overrides, expect)
    return _convert(reader, reader.read(source), overrides, expect)


def _convert(reader: Reader, document: Document, overrides: tuple[str, ...], expect: Any) -> Any:
    tree = document.tree
    try:
        for each in overrides:
            tree = override(tree, each, reader.open_up)
        if overrides:
            tree = reader.expand(tree, document)
        return Converter(reader.registry, reader.named).root(resolve(tree, reader.budget), expect)
    except SpecError as error:
        if document.folder is None:
            raise
        raise SpecError(f"{error} [in {document.label}]") from error
