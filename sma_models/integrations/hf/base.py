"""What the models of this package have in common: building, loading, recomputing, and looking at the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import PreTrainedModel

from sma.errors import ConfigError, ShapeError, SizeError
from sma.interfaces import Model
from sma.spec.sizes import blueprint
from sma_models.integrations.hf.configuration import SMAConfig
from sma_models.integrations.hf.loader import Loadable
from sma_models.integrations.hf.token_batch import TokenBatch
from sma_models.stack import HiddenStates, StackConfig, StackState

_OF_THE_LOSS = ("num_items_in_batch", "shift_labels")
"""Arguments that the Trainer passes on to the loss."""


class SMAPreTrainedModel(Loadable, PreTrainedModel):
    """What both have in common: ``model`` is the model of the spec, with its weights under the same names."""

    config: SMAConfig
    config_class = SMAConfig
    supports_gradient_checkpointing = True
    expects: ClassVar[type[Model]] = Model
    """The kind of model that the spec has to describe."""
    listed_as: ClassVar[str]
    """The name by which Transformers knows the class, also a subclass and one that ``fully_shard`` makes."""
    model: Any

    def __init__(self, config: SMAConfig, model: Model | None = None) -> None:
        super().__init__(config)
        if model is None:
            typed = config.typed
            if not issubclass(typed.owner, self.expects):
                raise ConfigError(
                    f"{type(self).__name__}: the spec must be that of a {self.expects.__name__}, "
                    f"got {typed.owner.__name__}"
                )
            # Loading begins on the device `meta`, but a part may look at its own numbers as it is built, and what no
            # file holds (a table that is not saved, a new head) must have them.
            with torch.device("cpu" if torch.get_default_device().type == "meta" else torch.get_default_device()):
                model = _build(typed)
        self.model = model
        self.loss_type = self.listed_as.removeprefix("SMA")
        self.gradient_checkpointing = bool(self.model.stack.checkpoint)
        # Within a block, weights are used by more than their own module.
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.model.stack.layers})
        self.post_init()

    def _get_name(self) -> str:
        """By which the Trainer finds out whether labels are shifted."""
        return self.listed_as

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of every model of Transformers; ``device_map`` may put blocks on several devices.

        Raises:
            ConfigError: it divides a block, or leaves a part on the disk, or on the CPU for another device.
            SpecError: the spec in ``config.json`` is not valid, or names what is not registered here.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                places = ", ".join(sorted({str(device) for device in model.hf_device_map.values()}))
                raise ConfigError(f"device_map: must leave nothing where it does not compute, got {places} for {name}")
        for i, layer in enumerate(model.model.stack.layers):
            devices = places_of(layer)
            if len(devices) > 1:
                name = f"model.stack.layers.{i}"
                raise ConfigError(f"device_map: must keep {name} on one device, got {', '.join(devices)}")
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves as they are built."""

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
        """What no file holds keeps the numbers that it was built with, on the device where it belongs."""
        built = {name: self.get_parameter_or_buffer(name).detach() for name in missing_keys}
        built.update(self.named_non_persistent_buffers())
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)
        with torch.no_grad():
            for name, numbers in built.items():
                self.get_parameter_or_buffer(name).copy_(numbers)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Blocks are recomputed by :func:`sma.runtime.checkpointing.checkpoint`, which keeps their decisions.

        Raises:
            ConfigError: another way of recomputing is asked for.
        """
        func = gradient_checkpointing_func
        if enable and func is not None:
            given = func.keywords if isinstance(func, partial) and func.func is torch_checkpoint else None
            if given is None or given.items() - {("use_reentrant", False)}:
                got = "another function" if given is None else given
                raise ConfigError(f"activation checkpointing: must be use_reentrant=False without offload, got {got}")
        if every_n_layers != 1:
            raise ConfigError(f"every_n_layers: must be 1, got {every_n_layers}")
        self.gradient_checkpointing = self.model.stack.checkpoint = enable

    def get_input_embeddings(self) -> Any:
        """The embedding of tokens."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.model.embedding = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of every model of Transformers; the spec follows."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.vocab_size = embedding.num_embeddings
        self.model.config = replace(self.model.config, vocab_size=embedding.num_embeddings)
        return embedding

    def _columns(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> TokenBatch:
        """The tokens and which of them are real.

        Raises:
            ShapeError: there are none, or the mask is not one of columns.
        """
        if not isinstance(input_ids, Tensor):
            raise ShapeError(f"input_ids: must be a tensor (B, L), got {type(input_ids).__name__}")
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:  # accelerate may have brought them elsewhere
            place = self.model.embedding.weight.device
            input_ids = input_ids.to(place)
            attention_mask = None if attention_mask is None else attention_mask.to(place)
        pad = self.config.pad_token_id
        if pad is None and self.can_generate():
            pad = self.generation_config.pad_token_id
        # The byte tokenizer pads with a number that a language model of bytes does not know.
        beyond = isinstance(pad, int) and self.config.vocab_size is not None and pad >= self.config.vocab_size
        real = input_ids.ne(pad) if beyond else None  # type: ignore[arg-type]
        if attention_mask is None:
            return TokenBatch(input_ids, real)
        if attention_mask.dim() != 2 or input_ids.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
            raise ShapeError(
                f"attention_mask: must be (B, L) for input_ids {tuple(input_ids.shape)}, or longer by what the cache "
                f"has read, got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :] != 0
        return TokenBatch(input_ids, mask if real is None else mask & real)

    def _call(
        self, tokens: TokenBatch, *state: StackState | None, hidden: bool
    ) -> tuple[Any, tuple[Tensor, ...] | None]:
        """The output of the model; and ``(B, L, D)`` before every block and after the last norm, with 0 at padding."""
        if not hidden:
            return self.model(tokens.ids, *state, valid=tokens.valid), None
        seen = HiddenStates()
        out = self.model(tokens.ids, *state, valid=tokens.valid, hidden=seen)
        return out, tuple(seen.tensors)


def places_of(block: nn.Module) -> list[str]:
    """The devices that the numbers of a block are on."""
    return sorted({str(each.device) for each in (*block.parameters(), *block.buffers())})


def _build(typed: StackConfig) -> Model:
    try:
        blueprint(typed)
        model: Model = typed.build()
    except (SizeError, RuntimeError, MemoryError, OverflowError) as error:  # sizes beyond the memory of this machine
        raise ConfigError(f"spec: cannot be built here ({error})") from error
    return model


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse arguments of ``forward`` that would have no effect.

    Raises:
        ConfigError: one of them is neither None nor False.
    """
    for option, value in options.items():
        if option not in _OF_THE_LOSS and value is not None and value is not False:
            raise ConfigError(f"{name}: has no {option}, got {type(value).__name__}")
