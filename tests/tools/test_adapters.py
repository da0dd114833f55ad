"""LoRA of peft on every projection: it learns, it counts in every way of running a part, and it can be merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sma_models.integrations.hf import from_model
from sma_models.language_model import LanguageModel
from tests.models.tiny import VOCABULARY, inputs_of, loss_of, tiny
from tests.tools.parts import PARTS, Part, trained, ways_of
from tests.tools.tools import linears

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # read by peft
WITH_LINEARS = [part for part in PARTS if linears(part.build())]


def adapted(module: Any) -> Any:
    """A model of peft around ``module``, with adapters that make a difference."""
    torch.manual_seed(2)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=list(linears(module)), init_lora_weights=False)
    return get_peft_model(module, config)


@pytest.mark.parametrize("part", WITH_LINEARS, ids=str)
def test_lora(part: Part) -> None:
    plain, module = part.build(), part.build()
    peft = adapted(module).eval()  # the adapters are put into the module itself
    merged = adapted(part.build()).merge_and_unload().eval()  # the same adapters, by the seed
    wrong = []
    for name, way in ways_of(part, plain).items():
        try:
            actual = way(part, module)
            torch.testing.assert_close(actual, way(part, merged), rtol=1e-9, atol=1e-9)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        if name == "whole" and torch.equal(actual, way(part, plain)):
            wrong.append("whole: the adapters make no difference")
    assert not wrong, "\n".join(wrong)
    trained(part, module)
    trained(part, merged)
    assert not without_gradient(module, merged)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in peft.named_parameters())


def without_gradient(module: nn.Module, merged: nn.Module) -> list[str]:
    """Adapters without a gradient, on projections whose weights have one."""
    used = {
        name for name, linear in linears(merged).items() if linear.weight.grad is not None and linear.weight.grad.any()
    }
    return [
        name
        for name, parameter in module.named_parameters()
        if "lora_" in name
        and name.partition(".lora_")[0] in used
        and (parameter.grad is None or not parameter.grad.any())
    ]


@pytest.mark.parametrize("name", ["seqboat_small_lm", "mega_lm", "three_module_lm", "transformer_lm"])
def test_lora_on_the_model_of_transformers(name: str) -> None:
    wrapped = from_model(tiny(name))
    assert isinstance(wrapped.model, LanguageModel)
    tokens = inputs_of(wrapped.model)
    peft = adapted(wrapped)
    out = peft.train()(input_ids=tokens, labels=tokens)
    out.loss.backward()
    adapters = {key: p.grad for key, p in peft.named_parameters() if "lora_" in key}
    assert adapters
    assert [key for key, grad in adapters.items() if grad is None] == []
    peft.eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    drawn, logits = peft.generate(input_ids=tokens, **options), peft(input_ids=tokens).logits
    merged = peft.merge_and_unload().eval()
    torch.testing.assert_close(merged(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(input_ids=tokens, **options), drawn)
    assert int(drawn.max()) < VOCABULARY


@pytest.mark.parametrize("name", ["seqboat_small_lm", "three_module_lm"])
def test_adapters_learn(name: str) -> None:
    model = tiny(name)
    peft = adapted(model).train()
    tokens = inputs_of(model)
    optimiser = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    before = [p.detach().clone() for p in peft.parameters()]
    loss_of(peft(tokens)).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    moved = {name for (name, p), old in zip(peft.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    assert moved
    assert all("lora_" in name for name in moved)
