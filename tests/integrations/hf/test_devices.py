"""Models whose blocks lie on several devices, brought together by the hooks of accelerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sma.errors import ConfigError
from sma_models.integrations.hf import SMACache, from_model
from tests.integrations.hf.test_models import CLASSIFIERS, LANGUAGE_MODELS
from tests.models.tiny import inputs_of, tiny

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def parts_of(model: Any) -> list[str]:
    """What a device map may name: everything that is not inside a block."""
    stack = model.model.stack
    blocks = [f"model.stack.layers.{i}" for i in range(len(stack.layers))]
    inside = [f"model.stack.{name}" for name, _ in stack.named_children() if name != "layers"]
    return [f"model.{name}" for name, _ in model.model.named_children() if name != "stack"] + blocks + inside


def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens with padding on the left of the first row, and their mask."""
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return tokens, mask


@pytest.mark.parametrize("name", LANGUAGE_MODELS + CLASSIFIERS)
def test_hooks_change_nothing(name: str) -> None:
    model = from_model(tiny(name))
    hooked: Any = dispatch_model(copy.deepcopy(model), dict.fromkeys(parts_of(model), "cpu"), force_hooks=True)
    tokens, mask = padded(inputs_of(model.model))
    for given in ({}, {"attention_mask": mask}, {"output_hidden_states": True, "output_routings": True}):
        with torch.no_grad():
            one, other = model(tokens, **given), hooked(tokens, **given)
        assert type(one) is type(other)
        assert torch.equal(one.logits, other.logits)
        assert all(map(torch.equal, one.hidden_states or (), other.hidden_states or ()))
        assert (one.routings is None) == (other.routings is None)
    if name in LANGUAGE_MODELS:
        one, other = (each.generate(tokens, max_new_tokens=5, do_sample=False) for each in (model, hooked))
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_an_automatic_map_divides_no_block(name: str) -> None:
    model = from_model(tiny(name))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    found = infer_auto_device_map(
        model, {0: size * 2 // 3, 1: size, "cpu": size}, no_split_module_classes=model._no_split_modules
    )
    named = parts_of(model)
    assert len(set(found.values())) > 1
    assert all(part in named or any(each.startswith(part) for each in named) for part in found), found


def test_a_divided_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_model(tiny("seqboat_small_lm")).save_pretrained(tmp_path)
    # Nothing but a GPU is a second device that computes; so the check is told of one.
    monkeypatch.setattr("sma_models.integrations.hf.base.places_of", lambda block: ["cuda:0", "cuda:1"])
    with pytest.raises(ConfigError, match=r"device_map: must keep model\.stack\.layers\.0 on one device, got cuda:0, "):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@needs_two_gpus
@pytest.mark.parametrize("name", LANGUAGE_MODELS + CLASSIFIERS)
def test_two_gpus_give_what_one_gives(name: str, tmp_path: Path) -> None:
    plain = tiny(name)
    from_model(plain).save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if name in LANGUAGE_MODELS else AutoModelForSequenceClassification
    one = auto.from_pretrained(tmp_path, device_map={"": 0})
    parts = parts_of(one)
    for spread in (
        {part: i % 2 for i, part in enumerate(parts)},  # back and forth
        {part: (i + 1) % 2 for i, part in enumerate(parts)},  # the embedding on the second
        {part: int(part.startswith("model.stack")) for part in parts},
    ):
        two = auto.from_pretrained(tmp_path, device_map=spread)
        assert {parameter.device.index for parameter in two.parameters()} == {0, 1}
        tokens, mask = (each.to("cuda:0") for each in padded(inputs_of(plain)))
        for given in ({}, {"attention_mask": mask}, {"output_hidden_states": True, "output_routings": True}):
            with torch.no_grad():
                expected, found = one(tokens, **given), two(tokens, **given)
            torch.testing.assert_close(found.logits, expected.logits)
            assert found.logits.device == tokens.device
            for a, b in zip(expected.hidden_states or (), found.hidden_states or (), strict=True):
                torch.testing.assert_close(b.to(a.device), a)
        if name in LANGUAGE_MODELS:
            _texts_are_the_same(one, two, tokens, mask)


def _texts_are_the_same(one: Any, two: Any, tokens: Tensor, mask: Tensor) -> None:
    options: Any = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(one.generate(tokens, **options), two.generate(tokens, **options))
    assert torch.equal(one.generate(tokens, num_beams=2, **options), two.generate(tokens, num_beams=2, **options))
    with torch.no_grad():
        cache = two(tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=True).cache
        assert isinstance(cache, SMACache)
        assert cache.state is not None
        for layer, state in zip(two.model.stack.layers, cache.state.layers, strict=True):
            places = {parameter.device for parameter in layer.parameters()}
            assert state is None or {tensor.device for tensor in state.tensors()} <= places
        found = two(tokens[:, -1:], cache=copy.deepcopy(cache)).logits
        torch.testing.assert_close(found[:, -1], one(tokens, attention_mask=mask).logits[:, -1])


@needs_two_gpus
def test_training_on_two_gpus(tmp_path: Path) -> None:
    from_model(tiny("seqboat_small_lm")).save_pretrained(tmp_path)
    one = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}).train()
    two = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={part: i % 2 for i, part in enumerate(parts_of(one))}
    ).train()
    tokens = inputs_of(one.model).to("cuda:0")
    for model in (one, two):
        model(tokens, labels=tokens).loss.backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(b.grad.to(a.device), a.grad, msg=lambda text, name=name: f"{name}: {text}")


@needs_two_gpus
@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_automatic_maps_on_two_gpus(device_map: str, tmp_path: Path) -> None:
    plain = tiny("seqboat_small_lm")
    from_model(plain).save_pretrained(tmp_path)
    size = sum(parameter.numel() * parameter.element_size() for parameter in plain.parameters())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, max_memory={0: size * 2 // 3, 1: size}
    )
    assert set(model.hf_device_map.values()) == {0, 1}
    tokens = inputs_of(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens.cuda()).logits.cpu(), plain(tokens).logits, rtol=1e-4, atol=1e-4)


@needs_two_gpus
def test_a_block_on_two_gpus_is_refused(tmp_path: Path) -> None:
    from_model(tiny("seqboat_small_lm")).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    first = [f"model.stack.layers.0.{name}" for name, _ in whole.model.stack.layers[0].named_children()]
    spread = {part: 0 for part in [*parts_of(whole), *first] if part != "model.stack.layers.0"}
    spread["model.stack.layers.0.mixer"] = 1
    with pytest.raises(ConfigError, match=r"device_map: must keep model\.stack\.layers\.0 on one device, got cuda:0, "):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=spread)
