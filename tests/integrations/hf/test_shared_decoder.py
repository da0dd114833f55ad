"""Tokens that come one at a time are decoded in place, which does not change the results."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.errors import ShapeError
from sma_models.integrations.hf import SMACache, SMAForCausalLM, from_model
from sma_models.integrations.hf.shared_decoder import SharedDecoder
from tests.integrations.hf.test_generation import GREEDY, PROMPT
from tests.models.tiny import tiny


@pytest.fixture
def model() -> SMAForCausalLM:
    """In double precision, in which rounding decides nothing."""
    wrapped = from_model(tiny("seqboat_small_lm", vocab_size=256).double())
    assert isinstance(wrapped, SMAForCausalLM)
    return wrapped


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the steps in place."""
    counts: list[int] = []
    plain = SharedDecoder.step

    def step(self: SharedDecoder, layer: object, tokens: object) -> Tensor:
        logits = plain(self, layer, tokens)  # type: ignore[arg-type]
        counts.append(logits.shape[0])
        return logits

    monkeypatch.setattr(SharedDecoder, "step", step)
    return counts


def read(model: SMAForCausalLM, tokens: Tensor) -> SMACache:
    with torch.no_grad():
        cache = model(tokens, use_cache=True).cache
    assert cache is not None
    return cache


@torch.no_grad()
def next_logits(model: SMAForCausalLM, cache: SMACache, tokens: list[int]) -> Tensor:
    """Logits after one more column."""
    logits: Tensor = model(torch.tensor(tokens)[:, None], cache=cache).logits[:, -1]
    return logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_generate_steps_in_place(model: SMAForCausalLM, counted: list[int]) -> None:
    model.generate(PROMPT, **GREEDY)
    assert counted == [1] * 19  # the first token follows from the prompt
    model.generate(PROMPT, **GREEDY, num_beams=3)
    assert counted[19:] == [3] * 19


def test_the_state_is_a_value_whenever_somebody_looks(model: SMAForCausalLM) -> None:
    tokens = torch.randint(256, (2, 40))
    cache = read(model, tokens[:, :30])
    for t in range(30, 40):
        close(next_logits(model, cache, tokens[:, t].tolist()), model(tokens[:, : t + 1]).logits[:, -1])
    assert cache.get_seq_length() == 40
    expected = read(model, tokens).state
    assert cache.state is not None
    assert expected is not None
    kept = copy.deepcopy(cache.state)
    assert kept.named_tensors().keys() == expected.named_tensors().keys()
    for name, tensor in expected.named_tensors().items():
        torch.testing.assert_close(kept.named_tensors()[name], tensor, rtol=0, atol=1e-10, msg=name)
    next_logits(model, cache, [1, 2])  # goes on in place, and what was read out stays
    assert cache.nbytes == kept.nbytes


def test_texts_that_take_turns(model: SMAForCausalLM) -> None:
    """One memory, several caches."""
    tokens = torch.randint(256, (3, 24))
    caches = [read(model, row[None, :12]) for row in tokens]
    for t in range(12, 24):
        for row, cache in zip(tokens, caches, strict=True):
            close(next_logits(model, cache, [int(row[t])])[0], model(row[None, : t + 1]).logits[0, -1])


def test_a_copy_goes_its_own_way(model: SMAForCausalLM) -> None:
    cache = read(model, PROMPT)
    next_logits(model, cache, [65])
    other = copy.deepcopy(cache)
    next_logits(model, cache, [66])
    close(next_logits(model, other, [67])[0], model(torch.cat([PROMPT, torch.tensor([[65, 67]])], 1)).logits[0, -1])
    close(next_logits(model, cache, [68])[0], model(torch.cat([PROMPT, torch.tensor([[65, 66, 68]])], 1)).logits[0, -1])


def test_padding_is_no_step(model: SMAForCausalLM) -> None:
    """Where a sequence is finished, its row is padded while the others go on."""
    cache = read(model, PROMPT.repeat(2, 1))
    next_logits(model, cache, [65, 256])
    next_logits(model, cache, [66, 70])
    logits = next_logits(model, cache, [67, 71])
    close(logits[0], model(torch.cat([PROMPT, torch.tensor([[65, 66, 67]])], 1)).logits[0, -1])
    close(logits[1], model(torch.cat([PROMPT, torch.tensor([[70, 71]])], 1)).logits[0, -1])


@pytest.mark.parametrize("change", ["data", "parameter"])
def test_weights_may_change_between_texts(model: SMAForCausalLM, change: str) -> None:
    model.generate(PROMPT, **GREEDY)
    for name, parameter in model.model.named_parameters():
        if name.endswith("mixer.alpha") and change == "data":
            parameter.data += 0.5
        elif change == "parameter":
            parameter.data = parameter.data.roll(1, 0).clone()
    plain = model.generate(PROMPT, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(PROMPT, **GREEDY), plain)


@torch.no_grad()
def called(model: SMAForCausalLM, tokens: list[int], state: Any) -> Any:
    """What the model itself makes of one more column."""
    return model.model(torch.tensor(tokens)[:, None], state)


def changed_weights(model: SMAForCausalLM, change: str) -> None:
    """Other weights, in one of the ways in which users change them."""
    torch.manual_seed(7)
    new = {name: each + 0.3 * torch.randn_like(each) for name, each in model.state_dict().items()}
    if change == "load_state_dict":
        model.load_state_dict(new)
    elif change == "assign":
        model.load_state_dict(new, assign=True)
    elif change == "in place":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    elif change == "optimiser":
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(model.parameters(), 0.1).step()
    elif change == "data":
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
    elif change == "inference mode":
        with torch.inference_mode():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    elif change == "another block":
        model.model.stack.layers[0] = copy.deepcopy(model.model.stack.layers[1])
    elif change == "buffers":
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.1)


CHANGES = [
    "load_state_dict",
    "assign",
    "in place",
    "optimiser",
    "data",
    "inference mode",
    "another block",
    "buffers",
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["seqboat_small_lm", "three_module_lm", "ema_moe_lm"])
def test_weights_change_between_two_steps_of_one_cache(name: str, change: str) -> None:
    """The next step runs with the new weights, from the state that the old ones left."""
    model = from_model(tiny(name).double())
    cache = read(model, torch.randint(16, (2, 12)))
    state = copy.deepcopy(cache.state)
    for tokens in ([1, 2], [3, 4]):
        next_logits(model, cache, tokens)
        state = called(model, tokens, state).state
    for tokens in ([5, 6], [7, 8]):  # also a second time
        changed_weights(model, change)
        out = called(model, tokens, state)
        close(next_logits(model, cache, tokens), out.logits[:, -1])
        state = out.state


def test_a_model_changes_its_dtype_between_two_steps_of_one_cache(model: SMAForCausalLM) -> None:
    cache = read(model, PROMPT)
    state = called(model, [65], copy.deepcopy(cache.state)).state
    next_logits(model, cache, [65])
    model.float()
    single = state.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    out = next_logits(model, cache, [66])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, called(model, [66], single).logits[:, -1], rtol=0, atol=1e-5)


def test_training_in_the_middle_of_a_text(model: SMAForCausalLM) -> None:
    """The rest of the sequence is that of the trained weights, after the state of those before."""
    cache = read(model, PROMPT)
    next_logits(model, cache, [65])  # the state lies in memory that changes in place
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.eval()
        expected = model.model(torch.tensor([[66]]), cache.state).logits[:, -1]
    close(next_logits(model, cache, [66]), expected)


class Adapted(nn.Module):
    """Adds something to a layer, as an adapter does."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.base(x, **options) + x.roll(1, -1)
        return out


@pytest.mark.parametrize("change", ["another layer", "a hook", "another call"])
def test_what_steps_do_not_know_is_not_left_out(model: SMAForCausalLM, change: str, counted: list[int]) -> None:
    norm = model.model.stack.final_norm
    if change == "another layer":
        model.model.stack.final_norm = Adapted(norm)
    elif change == "a hook":
        norm.register_forward_hook(lambda part, given, out: out * 3 - out.mean(-1, keepdim=True))
    else:
        plain = norm.forward
        norm.forward = lambda x, **options: plain(x, **options).flip(-1)
    written = model.generate(PROMPT, **GREEDY)
    assert torch.equal(written, model.generate(PROMPT, **GREEDY, use_cache=False))
    assert not counted


def test_a_model_in_training_takes_gradients(model: SMAForCausalLM, counted: list[int]) -> None:
    cache = read(model, PROMPT)
    out = model(torch.tensor([[65]]), cache=cache)
    assert out.logits.requires_grad
    model.train()
    with torch.no_grad():
        model(torch.tensor([[65]]), cache=cache)
    assert not counted


def test_a_model_can_be_copied_and_pickled(model: SMAForCausalLM) -> None:
    written = model.generate(PROMPT, **GREEDY)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embedding.weight.mul_(0.5)
    twin.generate(PROMPT, **GREEDY)
    assert torch.equal(model.generate(PROMPT, **GREEDY), written)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).generate(PROMPT, **GREEDY), written)


def test_several_threads(model: SMAForCausalLM) -> None:
    prompts = [torch.randint(256, (1, 20)) for _ in range(4)]
    expected = [model.generate(each, **GREEDY) for each in prompts]
    found: dict[int, Tensor] = {}

    def write(i: int) -> None:
        found[i] = model.generate(prompts[i], **GREEDY)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


@pytest.mark.parametrize("padding", [0, 3])
def test_whole_chunks_of_prompts_are_read_apart(
    model: SMAForCausalLM, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others by the model itself; the results do not change."""
    monkeypatch.setattr("sma_models.integrations.hf.modeling.PREFILL_CHUNK", 8)
    lengths: list[int] = []
    plain = SharedDecoder.prefill

    def read(self: SharedDecoder, chunk: Any, *arguments: Any) -> Any:
        lengths.append(chunk.length)
        return plain(self, chunk, *arguments)

    monkeypatch.setattr(SharedDecoder, "prefill", read)
    tokens = torch.randint(256, (2, 27))
    mask = torch.ones(2, 27, dtype=torch.int64)
    mask[0, :padding] = 0
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=10)
        expected = model(tokens, attention_mask=mask).logits[:, -10:]
    close(out.logits, expected)
    assert lengths == [8, 8, 8]
    close(
        next_logits(model, out.cache, [65, 66])[1],
        model(torch.cat([tokens, torch.tensor([[65], [66]])], 1)).logits[1, -1],
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.01
    with torch.no_grad():
        changed = model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=1).logits
        close(changed, model(tokens, attention_mask=mask).logits[:, -1:])
    assert lengths == [8] * 6
    with pytest.raises(ShapeError, match=r"tokens must lie in 0\.\.255, got 300"), torch.no_grad():
        model(torch.full((1, 8), 300), use_cache=True, logits_to_keep=1)
    model(tokens, use_cache=True, logits_to_keep=1)  # with gradients
    with torch.no_grad():
        model(tokens, use_cache=True, logits_to_keep=1, labels=tokens[:, -1:])
        model(tokens, use_cache=True, logits_to_keep=1, output_routings=True)
    assert lengths == [8] * 7
    with torch.no_grad():
        alone = model(tokens[1:], use_cache=True, logits_to_keep=1).logits
        close(alone, model(tokens[1:]).logits[:, -1:])
    assert lengths[7:] == [8, 8, 8, 3], "all of a single prompt"
