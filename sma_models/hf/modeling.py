"""Language models and classifiers of this library with the interface of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput, can_return_tuple

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.interfaces import Model
from sma.routing import Routing
from sma_models.heads import Classifier, LanguageModel
from sma_models.hf.cache import SMACache, Tokens
from sma_models.hf.configuration import SMAConfig
from sma_models.hf.loader import Loadable
from sma_models.stack import StackConfig

PREFILL_CHUNK = 2048
"""A prompt is read in chunks of this many tokens, as by :func:`sma_models.generation.stream`."""

_OF_THE_LOSS = ("num_items_in_batch", "shift_labels")
"""Arguments that the Trainer passes on to the loss."""


@dataclass
class SMACausalLMOutput(ModelOutput):
    """What :class:`SMAForCausalLM` returns.

    Attributes:
        loss: scalar, auxiliary losses included; None without labels.
        logits: ``(B, L, V)``, or of the last columns only.
        cache: the state after the last token; None unless it was asked for.
        routings: who was active, by the name of the layer; None unless it was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: SMACache | None = None
    routings: Mapping[str, Routing] | None = None


@dataclass
class SMASequenceClassifierOutput(ModelOutput):
    """What :class:`SMAForSequenceClassification` returns.

    Attributes:
        loss: scalar, auxiliary losses included; None without labels.
        logits: ``(B, num_labels)``.
        routings: who was active, by the name of the layer; None unless it was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    routings: Mapping[str, Routing] | None = None


class SMAPreTrainedModel(Loadable, PreTrainedModel):
    """What both have in common: ``model`` is the model of the spec, with its weights under the same names."""

    config: SMAConfig
    config_class = SMAConfig
    supports_gradient_checkpointing = True
    expects: ClassVar[type[Model]] = Model
    """The kind of model that the spec has to describe."""
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
        self.gradient_checkpointing = bool(self.model.stack.checkpoint)
        self._no_split_modules = [type(self.model).__name__]  # weights are used by more than their own module
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of every model of Transformers; ``device_map`` must put all of the model on one device.

        Raises:
            ConfigError: it does not.
            SpecError: the spec in ``config.json`` is not valid, or names what is not registered here.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if len(devices) > 1 or "disk" in devices:
            raise ConfigError(f"device_map: must put the model on one device, got {', '.join(sorted(devices))}")
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
        """Blocks are recomputed by :func:`sma.checkpointing.checkpoint`, which keeps their decisions.

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

    def _columns(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tokens:
        """The tokens and which of them are real.

        Raises:
            ShapeError: there are none, or the mask is not one of columns.
        """
        if not isinstance(input_ids, Tensor):
            raise ShapeError(f"input_ids: must be a tensor (B, L), got {type(input_ids).__name__}")
        pad = self.config.pad_token_id
        if pad is None and self.can_generate():
            pad = self.generation_config.pad_token_id
        # The byte tokenizer pads with a number that a language model of bytes does not know.
        beyond = isinstance(pad, int) and self.config.vocab_size is not None and pad >= self.config.vocab_size
        real = input_ids.ne(pad) if beyond else None  # type: ignore[arg-type]
        if attention_mask is None:
            return Tokens(input_ids, real)
        if attention_mask.dim() != 2 or input_ids.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
            raise ShapeError(
                f"attention_mask: must be (B, L) for input_ids {tuple(input_ids.shape)}, or longer by what the cache "
                f"has read, got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :] != 0
        return Tokens(input_ids, mask if real is None else mask & real)


def _build(typed: StackConfig) -> Model:
    try:
        model: Model = typed.build()
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes beyond the memory of this machine
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


class SMAForCausalLM(SMAPreTrainedModel, GenerationMixin):
    """A language model (:class:`~sma_models.heads.LanguageModel`) for ``generate``, the Trainer, and whatever else
    takes a causal language model of Transformers.

    Args:
        config: holds the spec.
        model: of this very spec, to be used as it is; by default one is built.

    Raises:
        ConfigError: the spec is that of another kind of model.

    Example:
        >>> model = SMAForCausalLM(SMAConfig.of("seqboat_small_lm", "d_model=16", "n_layers=2")).eval()
        >>> prompt = torch.tensor([[72, 101]])
        >>> model.generate(prompt, max_new_tokens=5, do_sample=False).shape
        torch.Size([1, 7])
    """

    expects = LanguageModel

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where the embedding is its own head."""
        head: nn.Module | None = self.model.head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: SMACache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routings: bool = False,
        **kwargs: Any,
    ) -> SMACausalLMOutput:
        """Logits of the next token.

        Args:
            input_ids: ``(B, L)``; padding may lie anywhere and hold anything.
            attention_mask: ``(B, L)``, not 0 on real tokens; or longer, with the columns that the cache has read in
                front.
            cache: to go on from; it is changed.
            labels: ``(B, L)``, the same tokens, -100 where there is nothing to learn.
            use_cache: return a cache. Without one, whole sequences run in the way that is fastest.
            logits_to_keep: how many of the last columns to return logits of, 0 for all, or which ones. With a cache and
                a number, a long prompt is read in chunks, so that memory does not grow with it.
            output_routings: return who was active in the columns that this call has read.
            **kwargs: what the Trainer passes on to the loss.

        Raises:
            ShapeError: tokens or mask of the wrong shape, dtype or range.
            StreamingError: a cache is asked for and the model cannot stream, with the reason; or the one given is of
                another kind, model or batch.
            ConfigError: an argument that the model does not have.
        """
        check_options(type(self).__name__, kwargs)
        tokens = self._columns(input_ids, attention_mask)
        if cache is None and not use_cache:
            out = self.model(tokens.ids, valid=tokens.valid)
            logits = out.logits
        else:
            cache = SMACache() if cache is None else cache
            whole = output_routings or not isinstance(logits_to_keep, int) or logits_to_keep == 0
            out, logits = self._read(cache, tokens, tokens.length if whole else int(logits_to_keep), whole)
        logits = slice_logits_to_keep(logits, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
            loss = loss + _auxiliary(out.losses, labels, kwargs.get("num_items_in_batch"))
        return SMACausalLMOutput(loss, logits, cache, dict(out.routings) if output_routings else None)

    def _read(self, cache: SMACache, tokens: Tokens, keep: int, whole: bool) -> tuple[Any, Tensor]:
        """Go on from a cache: the output of the last call, and logits ``(B, keep, V)`` of the last columns."""
        if not isinstance(cache, SMACache):
            raise StreamingError(f"cache: must be an SMACache, got {type(cache).__name__}")
        layer = cache.layer
        if layer.ahead is not None:
            tokens = layer.ahead.then(tokens)
        before = state = self.model.initial_state(tokens.ids.shape[0]) if layer.state is None else layer.state
        logits: Tensor | None = None
        for chunk in tokens.split(max(tokens.length, 1) if whole else PREFILL_CHUNK):
            out = self.model(chunk.ids, state, valid=chunk.valid)
            state = out.state
            last = out.logits[:, max(chunk.length - keep, 0) :]
            logits = last if logits is None else torch.cat([logits, last], 1)[:, -keep:]
        layer.read(before, tokens, state)
        assert logits is not None
        return out, logits

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """``generate`` gets a state in place of keys and values.

        Raises:
            ConfigError: a cache of another kind is asked for.
        """
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ConfigError(
                    "cache_implementation: must be None, for the state is the one cache there is, "
                    f"got {generation_config.cache_implementation!r}"
                )
            model_kwargs["cache"] = SMACache()
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class SMAForSequenceClassification(SMAPreTrainedModel):
    """A classifier of whole sequences (:class:`~sma_models.heads.Classifier`), for the Trainer.

    Args:
        config: holds the spec; its number of classes follows ``num_labels``.
        model: of this very spec, to be used as it is; by default one is built.

    Raises:
        ConfigError: the spec is that of another kind of model.
    """

    expects = Classifier

    def __init__(self, config: SMAConfig, model: Model | None = None) -> None:
        super().__init__(config, model)
        config.spec = {**(config.spec or {}), "n_classes": config.num_labels}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_routings: bool = False,
        **kwargs: Any,
    ) -> SMASequenceClassifierOutput:
        """Logits ``(B, num_labels)``.

        Args:
            input_ids: ``(B, L)`` tokens, or real numbers for a model without a vocabulary; padding may lie anywhere.
            attention_mask: ``(B, L)``, not 0 on real tokens.
            labels: ``(B,)`` classes; ``(B, num_labels)`` floats for several classes at once, see ``problem_type``.
            output_routings: return who was active.
            **kwargs: what the Trainer passes on to the loss.

        Raises:
            ShapeError: inputs or mask of the wrong shape, dtype or range.
            ConfigError: an argument that the model does not have.
        """
        check_options(type(self).__name__, kwargs)
        tokens = self._columns(input_ids, attention_mask)
        out = self.model(tokens.ids, valid=tokens.valid)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=out.logits, config=self.config, **kwargs)
            loss = loss + _auxiliary(out.losses, labels, kwargs.get("num_items_in_batch"))
        return SMASequenceClassifierOutput(loss, out.logits, dict(out.routings) if output_routings else None)


def _auxiliary(losses: Mapping[str, Tensor], labels: Tensor, num_items: Tensor | int | None) -> Tensor | float:
    """The sum of the auxiliary losses, means over a batch like the loss itself.

    The Trainer accumulates gradients over ``num_items`` labels in parts, and divides the loss of a part by all of them;
    so an auxiliary loss counts by the share of the part.
    """
    total = sum(losses.values(), start=0.0)
    return total if num_items is None else total * (labels.ne(-100).sum() / num_items)
