"""Weights of the published SeqBoat code (github.com/renll/SeqBoat) under this library's names.

Its layers are called ``mega_layer`` (Long Range Arena, speech) or ``slag_layer`` (language model) and its EMA ``move``
or, in the standalone file, ``ssm``. Every tensor is taken over as it is; nothing is transposed or scaled.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sma.errors import CheckpointError
from sma.interfaces import Model
from sma.weights import check_keys, read_tensors

LAYER_RULES: tuple[tuple[str, str], ...] = (
    (r"norm\.norm\.scalar", "norm.weight"),
    (r"norm\.norm\.(.+)", r"norm.\1"),
    (r"(?:ssm|move)\.(.+)", r"mixer.\1"),
    (r"(gamma|beta|mx_proj\..+|h_proj\..+)", r"activate.module.\1"),
    (r"rel_pos_bias\.rel_pos_bias", "activate.module.position_bias"),
    (r"q_router\.temp", "activate.configurator.temp"),
    (r"hx_proj\.(.+)", r"skip_proj.\1"),
)
_MODEL = r"(?:encoder\.encoder|decoder)\."
MODEL_RULES: tuple[tuple[str, str], ...] = (
    (_MODEL + r"embed_tokens\.(?:embed\.)?(.+)", r"embedding.\1"),
    (_MODEL + r"pos_emb\.scale", "positions.scale"),
    (_MODEL + r"final_norm\.norm\.scalar", "stack.final_norm.weight"),
    (_MODEL + r"final_norm\.norm\.(.+)", r"stack.final_norm.\1"),
    (r"classifier\.0\.0\.(.+)", r"hidden.\1"),
    (r"sentence_projection_layer\.(.+)", r"head.\1"),
)
_LAYER = re.compile(_MODEL + r"layers\.(\d+)\.(?:mega_layer|slag_layer)\.(.+)")
DROPPED = re.compile(_MODEL + r"(?:version|_future_mask|pos_emb\.inv_freq|output_projection\.weight)")


# The errors of the restricted unpickler, whose input may be truncated or changed anywhere.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
    struct.error,
)


def translate(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    """Our name of a published weight, or None when no rule knows it."""
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def convert_layer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one published layer as the state dict of a :class:`~sma_models.seqboat.SeqBoat` block.

    The rate controller's ``balance``, which the published code does not have, is set to zero.

    Raises:
        CheckpointError: a name is unknown, or two are of one weight.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours = translate(name, LAYER_RULES)
        if ours is None:
            raise CheckpointError(f"{name}: not a weight of a published SeqBoat layer")
        if ours in converted:
            raise CheckpointError(f"{name}: {ours} is given twice, under two names")
        converted[ours] = tensor
    converted.setdefault("activate.configurator.balance", torch.zeros(1))
    return converted


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a published model as the state dict of a model of this library.

    An output projection that equals the embedding is tied to it and left out; another one becomes ``head.weight``.

    Args:
        weights: the ``model`` entry of a published checkpoint.

    Raises:
        CheckpointError: a name is unknown, or two are of one weight.
    """
    converted: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer = _LAYER.fullmatch(name)
        if layer:
            layers.setdefault(layer[1], {})[layer[2]] = tensor
            continue
        if DROPPED.fullmatch(name):
            continue
        ours = translate(name, MODEL_RULES)
        if ours is None:
            raise CheckpointError(f"{name}: not a weight of a published SeqBoat model")
        if ours in converted:
            raise CheckpointError(f"{name}: {ours} is given twice, under two names")
        converted[ours] = tensor
    for number, layer_weights in layers.items():
        converted.update(
            {f"stack.layers.{number}.{name}": tensor for name, tensor in convert_layer(layer_weights).items()}
        )
    projection = weights.get("decoder.output_projection.weight")
    embedding = weights.get("decoder.embed_tokens.weight")
    if projection is not None and (embedding is None or not torch.equal(projection, embedding)):
        converted["head.weight"] = projection
    return converted


def read_published(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The weights in a published checkpoint: a ``.pt`` file of tensors and training arguments, or a safetensors file.

    Unpickling is restricted to tensors, containers and ``argparse.Namespace``; anything else in the file is refused.

    Raises:
        CheckpointError: the file is missing, truncated, or holds something else.
    """
    if Path(path).suffix == ".safetensors":
        return read_tensors(path)[0]
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch about itself, on the way to some of its errors
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a complete checkpoint of tensors ({reason})") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: holds no weights; expected a dictionary of tensors, alone or under 'model'")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: must hold a dictionary of tensors by name, got {type(value).__name__} under {name!r:.60}"
            )
    return weights


def convert_into(model: Model, path: str | PathLike[str]) -> None:
    """Load a published checkpoint into ``model``, built from the spec of the same sizes.

    Raises:
        CheckpointError: the file is broken, or its sizes are not the model's; the message lists the differences.
    """
    converted = convert(read_published(path))
    check_keys(model, converted, str(path))
    model.load_state_dict(converted)
