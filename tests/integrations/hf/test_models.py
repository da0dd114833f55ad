"""Logits, losses and gradients are those of the plain model; what a model cannot do is refused."""

from __future__ import annotations

import copy
import threading
from inspect import signature
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from sma.errors import ConfigError, ShapeError, StreamingError
from sma_models.classifier import Classifier
from sma_models.integrations.hf import SMACache, SMAConfig, SMAForCausalLM, SMAForSequenceClassification, from_model
from sma_models.language_model import LanguageModel
from tests.models.tiny import SPECS, inputs_of, tiny

LANGUAGE_MODELS = [name for name in SPECS if name.endswith("_lm")]
CLASSIFIERS = [name for name in SPECS if isinstance(tiny(name), Classifier)]


@pytest.mark.parametrize("name", LANGUAGE_MODELS + CLASSIFIERS)
def test_logits_are_those_of_the_plain_model(name: str) -> None:
    plain = tiny(name)
    model = from_model(plain)
    assert model.model is plain
    assert not model.training
    inputs = inputs_of(plain)
    valid = torch.rand(inputs.shape) < 0.8
    assert torch.equal(model(inputs).logits, plain(inputs).logits)
    assert torch.equal(model(inputs, attention_mask=valid.long()).logits, plain(inputs, valid=valid).logits)
    out = model(inputs, output_routings=True)
    assert out.routings.keys() == plain(inputs).routings.keys()
    assert model(inputs).routings is None


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_with_a_cache_are_those_without(name: str) -> None:
    plain = tiny(name).double()
    model = from_model(plain)
    tokens = inputs_of(plain)
    whole = plain(tokens).logits
    out = model(tokens[:, :10], use_cache=True)
    parts = [out.logits, *(model(part, cache=out.cache).logits for part in tokens[:, 10:].split([1, 9, 4], 1))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    assert out.cache.get_seq_length() == tokens.shape[1]


def test_float32_logits_with_a_cache(model: SMAForCausalLM) -> None:
    tokens = inputs_of(model.model, length=100)
    logits = model(tokens, use_cache=True).logits
    assert torch.equal(logits, model.model(tokens, model.model.initial_state(3)).logits)
    torch.testing.assert_close(logits, model.model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("keep", [1, 3, 24, 99, torch.tensor([0, 5])])
def test_logits_to_keep(model: SMAForCausalLM, keep: Any, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.integrations.hf.modeling.PREFILL_CHUNK", 7)
    tokens = inputs_of(model.model)
    whole = model(tokens).logits
    expected = whole[:, keep] if isinstance(keep, torch.Tensor) else whole[:, -keep:]
    torch.testing.assert_close(model(tokens, logits_to_keep=keep, use_cache=cached).logits, expected, rtol=0, atol=1e-5)


def test_the_loss_of_a_language_model() -> None:
    plain = tiny("ema_moe_lm").train()
    for part in plain.modules():
        if hasattr(part, "p"):
            part.p = 0.0
    tokens = inputs_of(plain)
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    out = plain(tokens)
    auxiliary = sum(out.losses.values())
    assert float(auxiliary.detach()) > 0
    own = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    model = from_model(plain)
    torch.testing.assert_close(model(tokens, labels=labels).loss, own + auxiliary)
    # A part of a batch of 1000 labels, which the Trainer counts after the shift: each loss counts by its share.
    share = labels[:, 1:].ne(-100).sum() / 1000
    scaled = (own + auxiliary) * share
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=1000).loss, scaled)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_the_loss_of_a_batch_is_that_of_its_rows(model: SMAForCausalLM, side: str) -> None:
    rows = [torch.randint(256, (length,)) for length in (7, 12, 1, 20)]
    total = sum(float(model(row[None], labels=row[None]).loss) * (len(row) - 1) for row in rows if len(row) > 1)
    tokens, mask = torch.randint(256, (4, 20)), torch.zeros(4, 20, dtype=torch.int64)
    labels = torch.randint(256, (4, 20)) if side == "anywhere" else torch.full((4, 20), -100)  # never those of padding
    for i, row in enumerate(rows):
        columns = {
            "left": torch.arange(20 - len(row), 20),
            "right": torch.arange(len(row)),
            "anywhere": torch.randperm(20)[: len(row)].sort().values,
        }[side]
        tokens[i, columns], mask[i, columns], labels[i, columns] = row, 1, row
    # As the Trainer counts them: all labels of real tokens but those of column 0.
    count = int((labels.ne(-100) & mask.bool())[:, 1:].sum())
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    assert float(loss) * count == pytest.approx(total, rel=1e-5)
    part = model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(1000)).loss
    assert float(part) * 1000 == pytest.approx(total, rel=1e-5)
    if side != "anywhere":
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        assert torch.equal(model(tokens, attention_mask=mask, labels=labels, shift_labels=shifted).loss, loss)
    tokens = tokens.masked_fill(mask == 0, 256)  # padding beyond the vocabulary needs no mask
    torch.testing.assert_close(model(tokens, labels=labels).loss, loss)
    with pytest.raises(ShapeError, match=r"labels: must be \(B, L\) = \(4, 20\) like the logits, got \(4, 19\)"):
        model(tokens, labels=labels[:, 1:])


def test_the_losses_of_a_classifier() -> None:
    model = from_model(tiny("seqboat_listops"))
    inputs = inputs_of(model.model)
    labels = torch.tensor([0, 9, 3])
    logits = model.model(inputs).logits
    torch.testing.assert_close(model(inputs, labels=labels).loss, F.cross_entropy(logits, labels))
    model.config.problem_type = "multi_label_classification"
    several = torch.rand(3, 10).round()
    torch.testing.assert_close(model(inputs, labels=several).loss, F.binary_cross_entropy_with_logits(logits, several))


def test_auto_classes_build_from_a_configuration() -> None:
    config = SMAConfig.of("seqboat_small_lm", "n_layers=1", "d_model=16")
    assert isinstance(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), SMAForCausalLM)
    built = AutoModelForSequenceClassification.from_config(SMAConfig.of("seqboat_text", "n_layers=1", "d_model=16"))
    assert isinstance(built, SMAForSequenceClassification)


def test_other_outputs(model: SMAForCausalLM) -> None:
    tokens = inputs_of(model.model)
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(logits, model(tokens).logits)
    assert loss.shape == ()
    assert model(tokens).cache is None


@pytest.mark.parametrize("name", ["seqboat_small_lm", "three_module_lm", "seqboat_text"])
def test_hidden_states(name: str) -> None:
    plain = tiny(name)
    model = from_model(plain)
    inputs = inputs_of(plain)
    valid = torch.rand(inputs.shape) < 0.8
    out = model(inputs, attention_mask=valid.long(), output_hidden_states=True)
    assert torch.equal(out.logits, plain(inputs, valid=valid).logits)
    assert len(out.hidden_states) == len(plain.stack.layers) + 1
    assert all(each.shape == (3, 24, plain.stack.d_model) for each in out.hidden_states)
    assert all(float(each.detach()[~valid].abs().max()) == 0 for each in out.hidden_states)
    # Each block and the norm, run by themselves on one row, make the next of it.
    row = valid[0]
    before = out.hidden_states[-2][0][row][None]
    after = plain.stack.layers[-1](before).x
    after = after if plain.stack.final_norm is None else plain.stack.final_norm(after)
    torch.testing.assert_close(after[0], out.hidden_states[-1][0][row], rtol=0, atol=1e-5)
    assert model(inputs).hidden_states is None
    assert not plain.stack._forward_hooks, "nothing is left behind"
    model.config.output_hidden_states = True
    assert len(model(inputs).hidden_states) == len(out.hidden_states)


@pytest.mark.parametrize("name", ["seqboat_small_lm", "seqboat_text"])
def test_hidden_states_in_threads(name: str) -> None:
    """Each call has its own, also while others run the same model with or without them."""
    model = from_model(tiny(name))
    inputs = [inputs_of(model.model, length=length, seed=length) for length in (5, 9, 14, 24)]
    expected = [model(each, output_hidden_states=True).hidden_states for each in inputs]
    wrong: list[str] = []

    def ask(i: int) -> None:
        for turn in range(10):
            found = model(inputs[i], output_hidden_states=turn % 3 > 0).hidden_states
            same = found is None if turn % 3 == 0 else len(found) == 3 and all(map(torch.equal, found, expected[i]))
            wrong.extend([] if same else [f"thread {i}, turn {turn}"])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_hidden_states_survive_what_copies_arguments(model: SMAForCausalLM) -> None:
    """Accelerate and fully_shard bring what a part is called with to its device, and copy lists for that."""
    tokens = inputs_of(model.model)
    expected = model(tokens, output_hidden_states=True).hidden_states
    add_hook_to_module(model.model, AlignDevicesHook("cpu", io_same_device=True))
    model.model.stack.register_forward_pre_hook(
        lambda _, given, options: tree_map(lambda each: each, (given, options)), with_kwargs=True
    )
    assert all(map(torch.equal, model(tokens, output_hidden_states=True).hidden_states, expected))


def test_hidden_states_with_a_cache(model: SMAForCausalLM) -> None:
    tokens = inputs_of(model.model)
    whole = model(tokens, output_hidden_states=True).hidden_states
    cache = SMACache()
    cache.activate_past_recording()
    model(tokens[:, :10], cache=cache)
    cache.crop(-3)
    part = model(tokens[:, 7:], cache=cache, output_hidden_states=True, logits_to_keep=2)
    assert part.logits.shape[1] == 2
    for expected, found in zip(whole, part.hidden_states, strict=True):
        torch.testing.assert_close(found, expected[:, 7:], rtol=0, atol=1e-5)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "do_sample": False}
    written = model.generate(tokens, max_new_tokens=3, **options)
    assert [step[-1].shape[1] for step in written.hidden_states] == [24, 1, 1]


def test_embeddings_grow_with_the_vocabulary() -> None:
    for tied in (True, False):
        model = from_model(tiny("seqboat_small_lm", tie_embeddings=tied))
        before = model(inputs_of(model.model)).logits
        model.resize_token_embeddings(20)
        assert model.config.vocab_size == model.model.vocab_size == model.config.typed.vocab_size == 20
        assert (model.get_output_embeddings() is None) == tied
        after = model(inputs_of(model.model)).logits
        assert after.shape[-1] == 20
        assert torch.equal(after[..., :16], before)
        assert model(torch.tensor([[19]])).logits.isfinite().all()
        model.resize_token_embeddings(10)
        assert model.config.vocab_size == model(torch.tensor([[9]])).logits.shape[-1] == 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 8)}, ConfigError, "SMAForCausalLM: has no inputs_embeds, got Tensor"),
        ({"output_attentions": True}, ConfigError, "has no output_attentions"),
        ({"past_key_values": DynamicCache()}, ConfigError, "has no past_key_values"),
        ({"cache": DynamicCache()}, StreamingError, "cache: must be an SMACache, got DynamicCache"),
        ({"input_ids": None}, ShapeError, "input_ids: must be a tensor"),
        ({"input_ids": torch.tensor([[256]])}, ShapeError, "tokens must lie in 0..255, got 256"),
        ({"attention_mask": torch.ones(1, 2)}, ShapeError, r"attention_mask: must be \(B, L\).* got \(1, 2\)"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, ShapeError, "attention_mask: must be"),
        ({"attention_mask": torch.ones(2, 3)}, ShapeError, "valid: must be bool of shape"),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str, plain: LanguageModel) -> None:
    model = SMAForCausalLM(SMAConfig(spec=plain.config), plain)  # without a number for padding
    with pytest.raises(error, match=message):
        model(**{"input_ids": torch.tensor([[1, 2, 3]])} | arguments)


def test_a_model_that_cannot_stream_says_why() -> None:
    model = SMAForCausalLM(SMAConfig.of("seqboat_small_lm", "n_layers=1", "blocks[0].activate.module.window=null"))
    tokens = torch.tensor([[1, 2, 3]])
    assert model(tokens).logits.shape == (1, 3, 256)
    with pytest.raises(StreamingError, match="has no bounded memory"):
        model(tokens, use_cache=True)
    with pytest.raises(StreamingError, match="has no bounded memory"):
        model.generate(tokens, max_new_tokens=2)
    assert model.generate(tokens, max_new_tokens=2, use_cache=False).shape == (1, 5)


def test_from_model_takes_what_it_can_wrap() -> None:
    with pytest.raises(ConfigError, match="model: must be a LanguageModel or a Classifier, got Retrieval"):
        from_model(tiny("seqboat_retrieval"))


def test_what_tools_look_for(model: SMAForCausalLM) -> None:
    parameters = list(signature(model.forward).parameters)
    assert parameters[:2] == ["input_ids", "attention_mask"]
    assert model.main_input_name == "input_ids"
    assert model.can_generate()
    assert not SMAForSequenceClassification.can_generate()
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.model.parameters())
    assert model.get_input_embeddings() is model.model.embedding
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    copied = copy.deepcopy(model)
    tokens = inputs_of(model.model)
    assert torch.equal(copied(tokens).logits, model(tokens).logits)
    rows = torch.cat([model(row[None]).logits for row in tokens])
    torch.testing.assert_close(model(tokens).logits, rows, rtol=0, atol=1e-5)
