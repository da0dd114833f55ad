"""Language models and classifiers of this library with the interface of Transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import GenerationMode, StoppingCriteriaList
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput, can_return_tuple

from sma.errors import ConfigError, StreamingError
from sma.interfaces import Model
from sma.routing import Routing
from sma_models.classifier import Classifier
from sma_models.integrations.hf.base import SMAPreTrainedModel, check_options
from sma_models.integrations.hf.cache import SMACache
from sma_models.integrations.hf.configuration import SMAConfig
from sma_models.integrations.hf.loss import Targets, with_auxiliary
from sma_models.integrations.hf.shared_decoder import SharedDecoder
from sma_models.integrations.hf.token_batch import TokenBatch
from sma_models.integrations.hf.tokenization import SMAByteTokenizer, StopBytes
from sma_models.language_model import LanguageModel

PREFILL_CHUNK = 2048
"""A prompt is read in chunks of this many tokens, as by :func:`sma_models.inference.generation.stream`."""
OF_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments that ``generate`` needs for itself, and passes on to the model nevertheless."""


@dataclass
class SMACausalLMOutput(ModelOutput):
    """What :class:`SMAForCausalLM` returns.

    Attributes:
        loss: scalar, auxiliary losses included; None without labels.
        logits: ``(B, L, V)``, or of the last columns only.
        cache: the state after the last token; None unless it was asked for.
        hidden_states: ``(B, L, D)`` before every block and after the last norm; None unless they were asked for.
        routings: who was active, by the name of the layer; None unless it was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: SMACache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routings: Mapping[str, Routing] | None = None


@dataclass
class SMASequenceClassifierOutput(ModelOutput):
    """What :class:`SMAForSequenceClassification` returns.

    Attributes:
        loss: scalar, auxiliary losses included; None without labels.
        logits: ``(B, num_labels)``.
        hidden_states: ``(B, L, D)`` before every block and after the last norm; None unless they were asked for.
        routings: who was active, by the name of the layer; None unless it was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routings: Mapping[str, Routing] | None = None


class SMAForCausalLM(SMAPreTrainedModel, GenerationMixin):
    """A language model (:class:`~sma_models.language_model.LanguageModel`) for ``generate``, the Trainer, and all that
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
    listed_as = "SMAForCausalLM"

    def __init__(self, config: SMAConfig, model: Model | None = None) -> None:
        super().__init__(config, model)
        self._shared_decoder = SharedDecoder(self.model)

    def train(self, mode: bool = True) -> Self:
        """As of every module. Before weights change, what decodes with them is let go."""
        if mode:
            self._shared_decoder.release()
        super().train(mode)
        return self

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
        output_hidden_states: bool | None = None,
        output_routings: bool = False,
        **kwargs: Any,
    ) -> SMACausalLMOutput:
        """Logits of the next token.

        Args:
            input_ids: ``(B, L)``; padding may lie anywhere and hold anything.
            attention_mask: ``(B, L)``, not 0 on real tokens; or longer, with the columns that the cache has read in
                front.
            cache: to continue from; it is changed.
            labels: ``(B, L)``, the same tokens, -100 where there is nothing to learn. A real token predicts the label
                of the next real token of its row; padding predicts nothing. The loss is a mean over the labels as the
                Trainer counts them: all but those of column 0.
            use_cache: return a cache. Without one, whole sequences run in the way that is fastest.
            logits_to_keep: how many of the last columns to return logits of, 0 for all, or which ones. With a cache and
                a number, a long prompt is read in chunks, so that memory does not grow with it.
            output_hidden_states: return the features before every block and after the last norm; None takes what the
                configuration says.
            output_routings: return who was active in the columns that this call has read.
            **kwargs: what the Trainer passes on to the loss.

        Raises:
            ShapeError: tokens, mask or labels of the wrong shape, dtype or range.
            StreamingError: a cache is asked for and the model cannot stream, with the reason; or the one given is of
                another kind, model or batch.
            ConfigError: an argument that the model does not have.
        """
        check_options(type(self).__name__, kwargs)
        tokens = self._columns(input_ids, attention_mask)
        wants = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if cache is None and not use_cache:
            out, hidden = self._call(tokens, hidden=wants)
            logits = out.logits
        elif not (labels is not None or wants or output_routings) and self._steps(cache, tokens):
            logits = cache.layer.step(self._shared_decoder, tokens)
            return SMACausalLMOutput(None, slice_logits_to_keep(logits, logits_to_keep), cache)
        else:
            cache = SMACache() if cache is None else cache
            some = isinstance(logits_to_keep, int) and logits_to_keep > 0 and not (output_routings or wants)
            keep = int(logits_to_keep) if some else None
            out, logits, hidden = self._extend(cache, tokens, keep, wants, plain=labels is None)
        logits = slice_logits_to_keep(logits, logits_to_keep)
        loss = None
        if labels is not None:
            valid = tokens.valid
            valid = None if valid is None else slice_logits_to_keep(valid[..., None], logits_to_keep).squeeze(-1)
            loss = self._loss(out.losses, logits, labels, valid, kwargs)
        return SMACausalLMOutput(loss, logits, cache, hidden, dict(out.routings) if output_routings else None)

    def _loss(
        self,
        auxiliary: Mapping[str, Tensor],
        logits: Tensor,
        labels: Tensor,
        valid: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """The loss of ``logits (B, L, V)``, auxiliary losses included.

        Raises:
            ShapeError: the labels are not those of the columns that have logits.
        """
        num_items = options.get("num_items_in_batch")
        targets = Targets.of(labels, logits, valid, options.get("shift_labels"))
        if valid is not None:  # without padding the loss shifts the labels itself
            options = options | {
                "shift_labels": targets.labels,
                "num_items_in_batch": targets.n_labels if num_items is None else num_items,
            }
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        return with_auxiliary(loss, auxiliary, targets.n_labels, num_items)

    def _steps(self, cache: Any, tokens: TokenBatch) -> TypeGuard[SMACache]:
        """Whether this call can be one step of decoding."""
        return isinstance(cache, SMACache) and cache.layer.can_step(tokens) and self._shared_decoder.applies()

    def _extend(
        self, cache: SMACache, tokens: TokenBatch, keep: int | None, hidden: bool, *, plain: bool
    ) -> tuple[Any, Tensor, tuple[Tensor, ...] | None]:
        """Continue from a cache: the output of the last call of the model, logits and hidden states.

        With ``keep``, only the logits of the last columns are returned, and the tokens are processed in chunks. If
        nothing else is wanted (``plain``), the shared decoder prefills whole chunks, and the rest of a single prompt.
        """
        if not isinstance(cache, SMACache):
            raise StreamingError(f"cache: must be an SMACache, got {type(cache).__name__}")
        layer, length = cache.layer, tokens.length if keep is None else min(keep, tokens.length)
        if layer.ahead is not None:
            tokens = layer.ahead.then(tokens)
        before = state = self.model.initial_state(tokens.ids.shape[0]) if layer.state is None else layer.state
        logits: list[Tensor] = []
        out, features = None, None
        apart = plain and keep is not None and self._shared_decoder.applies()
        for chunk in tokens.split(max(tokens.length, 1) if keep is None else PREFILL_CHUNK):
            if apart and (chunk.length == PREFILL_CHUNK or (chunk.ids.shape[0] == 1 and chunk.length)):
                last, state = self._shared_decoder.prefill(chunk, state, length, PREFILL_CHUNK)
                logits = [_last([*logits, last], length)]
                continue
            out, features = self._call(chunk, state, hidden=hidden)
            state = out.state
            logits = [_last([*logits, _last([out.logits], length)], length)]
        layer.record(before, tokens, state)
        return out, logits[0], None if features is None else tuple(_last([each], length) for each in features)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """``generate`` gets a state in place of keys and values.

        Raises:
            ConfigError: a cache of another kind is asked for.
            StreamingError: speculative decoding is given a cache that has processed something: it reads all tokens.
        """
        given, assisted = model_kwargs.get("cache"), args and args[0] == GenerationMode.ASSISTED_GENERATION
        if assisted and isinstance(given, SMACache) and given.get_seq_length():
            raise StreamingError(
                "cache: must be empty for speculative decoding, which reads the whole prompt, got one that has read "
                f"{given.get_seq_length()} tokens; decode without drafts, or leave the cache out"
            )
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

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None
    ) -> StoppingCriteriaList:
        """As of every model; stop strings of the tokenizer of bytes are compared byte by byte."""
        strings = generation_config.stop_strings
        if strings is None or not isinstance(tokenizer, SMAByteTokenizer):
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer=tokenizer)
        plain = copy.copy(generation_config)
        plain.stop_strings = None
        criteria = super()._get_stopping_criteria(plain, stopping_criteria)
        criteria.append(StopBytes([strings] if isinstance(strings, str) else strings))
        return criteria

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """``generate`` reads the prompt, or what a cache has not read of it.

        Raises:
            StreamingError: the cache has read the whole prompt, so nothing is left that the next token follows from.
        """
        for name in OF_GENERATE:
            model_kwargs.pop(name, None)
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        known = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        read, length = cache.get_seq_length() if isinstance(cache, SMACache) else 0, input_ids.shape[1]
        if 0 < length <= read and known == length:
            raise StreamingError(
                f"cache: must have read less than the prompt of {length} tokens, got one that has read {read}; give "
                "the whole sequence and a cache of its beginning, or only new tokens and an attention_mask of all"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)


class SMAForSequenceClassification(SMAPreTrainedModel):
    """A classifier of whole sequences (:class:`~sma_models.classifier.Classifier`), for the Trainer.

    Args:
        config: holds the spec; its number of classes follows ``num_labels``.
        model: of this very spec, to be used as it is; by default one is built.

    Raises:
        ConfigError: the spec is that of another kind of model.
    """

    expects = Classifier
    listed_as = "SMAForSequenceClassification"

    def __init__(self, config: SMAConfig, model: Model | None = None) -> None:
        super().__init__(config, model)
        config.spec = {**(config.spec or {}), "n_classes": config.num_labels}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_routings: bool = False,
        **kwargs: Any,
    ) -> SMASequenceClassifierOutput:
        """Logits ``(B, num_labels)``.

        Args:
            input_ids: ``(B, L)`` tokens, or real numbers for a model without a vocabulary; padding may lie anywhere.
            attention_mask: ``(B, L)``, not 0 on real tokens.
            labels: ``(B,)`` classes; ``(B, num_labels)`` floats for several classes at once, see ``problem_type``.
            output_hidden_states: return the features before every block and after the last norm; None takes what the
                configuration says.
            output_routings: return who was active.
            **kwargs: what the Trainer passes on to the loss.

        Raises:
            ShapeError: inputs or mask of the wrong shape, dtype or range.
            ConfigError: an argument that the model does not have.
        """
        check_options(type(self).__name__, kwargs)
        tokens = self._columns(input_ids, attention_mask)
        wants = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        out, hidden = self._call(tokens, hidden=wants)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=out.logits, config=self.config, **kwargs)
            loss = with_auxiliary(loss, out.losses, labels.ne(-100).sum(), kwargs.get("num_items_in_batch"))
        return SMASequenceClassifierOutput(loss, out.logits, hidden, dict(out.routings) if output_routings else None)


def _last(parts: list[Tensor], length: int) -> Tensor:
    """The last columns of some tensors ``(B, L, ...)``, one after the other."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return whole[:, max(whole.shape[1] - length, 0) :]
