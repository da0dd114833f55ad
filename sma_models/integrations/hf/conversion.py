"""Models of this library as folders that Transformers loads."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import torch

from sma.errors import ConfigError
from sma.interfaces import Model
from sma_models.classifier import Classifier
from sma_models.integrations.hf.configuration import SMAConfig
from sma_models.integrations.hf.modeling import SMAForCausalLM, SMAForSequenceClassification
from sma_models.integrations.hf.tokenization import N_BYTES, PAD, SMAByteTokenizer
from sma_models.language_model import LanguageModel

START = 10
"""Where ``sma train`` begins a text: after a line feed."""


def from_model(model: Model) -> SMAForCausalLM | SMAForSequenceClassification:
    """The model with the interface of Transformers; it is the same model, with the same weights.

    Args:
        model: a language model or a classifier, in the mode it is in.

    Raises:
        ConfigError: it is something else.

    Example:
        >>> import sma
        >>> from_model(sma.build("seqboat_small_lm", "n_layers=2")).config.num_hidden_layers
        2
    """
    of_bytes = getattr(model, "vocab_size", None) == N_BYTES
    kind: type[SMAForCausalLM] | type[SMAForSequenceClassification]
    if isinstance(model, LanguageModel):
        kind, config = SMAForCausalLM, SMAConfig(spec=model.config, bos_token_id=START if of_bytes else None)
    elif isinstance(model, Classifier):
        kind, config = SMAForSequenceClassification, SMAConfig(spec=model.config)
    else:
        raise ConfigError(f"model: must be a LanguageModel or a Classifier, got {type(model).__name__}")
    training = model.training
    wrapped: SMAForCausalLM | SMAForSequenceClassification = kind(config, model)
    if isinstance(wrapped, SMAForCausalLM) and of_bytes:
        wrapped.generation_config.pad_token_id = PAD
    wrapped.train(training)
    return wrapped


def export(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> Path:
    """Write a folder for ``from_pretrained``: weights, spec, and the tokenizer of bytes where the model reads these.

    A new folder appears complete or not at all.

    Args:
        model: a language model or a classifier; it is left as it is.
        folder: the folder to write.
        dtype: of the weights in the folder; None keeps that of the model.
        max_shard_size: of one file of weights, in bytes or as ``"5GB"``.
        force: write into a folder that has something in it.

    Raises:
        ConfigError: the model is something else, the dtype is not of floating point, or the folder is not empty.

    Example:
        >>> import sma, tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(sma.build("seqboat_small_lm", "n_layers=2"), folder).name == Path(folder).name
        ...     AutoModelForCausalLM.from_pretrained(folder).config.model_type
        True
        'sma'
    """
    target = Path(folder)
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype: must be of floating point, got {dtype}")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"folder: must be a folder, got the file {target}")
    new = not target.is_dir() or not any(target.iterdir())
    if not new and not force:
        raise ConfigError(f"folder: must be new or empty, got {target}, which holds something; force overwrites it")
    wrapped = from_model(model if dtype is None else copy.deepcopy(model).to(dtype))
    place = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.tmp") if new else target
    try:
        wrapped.save_pretrained(place, max_shard_size=max_shard_size)
        if wrapped.config.vocab_size in (N_BYTES, N_BYTES + 1):
            SMAByteTokenizer().save_pretrained(place)
        if new:
            place.replace(target)
    finally:
        if new:
            shutil.rmtree(place, ignore_errors=True)
    return target
