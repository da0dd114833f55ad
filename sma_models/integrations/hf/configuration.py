"""The configuration of a model: its spec, every value written out."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from sma.configurable import BaseConfig
from sma.errors import SpecError
from sma.interfaces import Model
from sma.spec import dump, load, loads, to_yaml
from sma.spec.text import render
from sma_models.integrations.hf.loader import AUTO_MODELS, Loadable, write_loader
from sma_models.stack import StackConfig


class SMAConfig(Loadable, PreTrainedConfig):
    """Holds the spec of a model. ``config.json`` has it in full, so that nothing depends on later defaults.

    Args:
        spec: mapping as of :func:`sma.spec.dump`, or a typed configuration. It opens no file and names what is
            registered only, so a configuration from anywhere can be read; :meth:`of` takes names and files too.
        pad_token_id: token that stands for padding, or None.
        bos_token_id: token to start from when there is no prompt, or None.
        eos_token_id: token that ends a sequence, or None.
        **kwargs: what every configuration has: ``id2label``, ``problem_type``, ``dtype``, ...

    Raises:
        SpecError: the spec is not valid, or not that of a stack of blocks; names the path, the rule and the value.

    Example:
        >>> config = SMAConfig.of("seqboat_small_lm", "n_layers=2")
        >>> config.vocab_size, config.num_hidden_layers, config.spec["blocks"][0]["type"]
        (256, 2, 'seqboat')
    """

    model_type = "sma"
    keys_to_ignore_at_inference = ["cache", "hidden_states", "routings"]  # noqa: RUF012  # as every configuration has it

    spec: dict[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Transformers makes configurations without arguments, to see what the defaults are.
        typed = None if self.spec is None else _typed(self.spec)
        self.spec = None if typed is None else dump(typed)
        n_classes = getattr(typed, "n_classes", None)
        if n_classes is not None and self.id2label is None:
            kwargs.setdefault("num_labels", n_classes)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, source: Any, *overrides: str, **kwargs: Any) -> SMAConfig:
        """The configuration of a spec, wherever it comes from.

        Args:
            source: as for :func:`sma.spec.load`: a registered name, a file, a mapping, a typed configuration.
            *overrides: ``key=value``, see there.
            **kwargs: as for the constructor.

        Raises:
            SpecError: see the constructor.
        """
        return cls(spec=dump(load(source, *overrides, kind="model")), **kwargs)

    def validate_token_ids(self) -> None:
        """Nothing to warn of: padding may be a number beyond the vocabulary, for the model never reads it."""

    @property
    def typed(self) -> StackConfig:
        """The spec as the typed configuration that builds the model, with as many classes as there are labels.

        Raises:
            SpecError: there is none, or it was made invalid.
        """
        if self.spec is None:
            raise SpecError("spec: must be given, got None")
        typed = _typed(self.spec)
        n_classes = getattr(typed, "n_classes", None)
        return typed if n_classes in (None, self.num_labels) else replace(typed, n_classes=self.num_labels)  # type: ignore[call-arg]

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens; None for a model of real numbers. Setting it changes the spec."""
        return None if self.spec is None else self.spec.get("vocab_size")

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        assert self.spec is not None
        self.spec = {**self.spec, "vocab_size": size}

    @property
    def hidden_size(self) -> int | None:
        """Width of the model."""
        return None if self.spec is None else self.spec["d_model"]

    @property
    def num_hidden_layers(self) -> int | None:
        """Number of blocks."""
        return None if self.spec is None else self.spec["n_layers"]

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``config.json`` and the module by which ``trust_remote_code=True`` finds this package."""
        name = (self.architectures or [""])[0]
        if name in AUTO_MODELS:
            self.auto_map = write_loader(save_directory, AutoConfig=type(self).__name__, **{AUTO_MODELS[name]: name})
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _typed(spec: Any) -> StackConfig:
    """The typed configuration of a mapping; it is read as text is, which opens no file."""
    if isinstance(spec, BaseConfig):
        text = to_yaml(spec)
    elif isinstance(spec, dict):
        text = render(spec)
    else:
        raise SpecError(f"spec: must be a mapping, got {type(spec).__name__}; SMAConfig.of takes names and files")
    typed = loads(text, name="spec", kind="model")
    assert isinstance(typed, Model.Config)
    if not isinstance(typed, StackConfig):
        raise SpecError(f"spec: must be that of a stack of blocks, got {type(typed).__qualname__}")
    return typed
