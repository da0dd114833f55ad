"""Right-padded batches: lengths instead of a mask, the same results, and no synchronisation with the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.errors import ShapeError
from sma.interfaces import BlockOutput
from sma.padding import valid_of
from sma_models.classifier import Classifier
from sma_models.language_model import LanguageModel
from sma_models.retrieval import Retrieval
from tests.models.tiny import inputs_of, loss_of, tiny

LENGTHS = torch.tensor([24, 7, 0, 16])
SPECS = ["seqboat_text", "seqboat_small_lm", "seqboat_retrieval", "seqboat_pathfinder", "transformer_text", "mega_lm"]


def run(model: Any, inputs: Tensor, **padding: Any) -> Any:
    if isinstance(model, Retrieval):
        return model(inputs, inputs.flip(1), **{name: (each, each) for name, each in padding.items()})
    return model(inputs, **padding)


@pytest.mark.parametrize("name", SPECS)
def test_lengths_and_masks_give_the_same(name: str) -> None:
    model, inputs = tiny(name), inputs_of(tiny(name), batch=4)
    results = []
    for padding in ({"valid": valid_of(LENGTHS, inputs)}, {"lengths": LENGTHS}):
        model.zero_grad()
        out = run(model, inputs, **padding)
        loss_of(out).backward()
        results.append([out.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_pooling_by_lengths(pool: str) -> None:
    model = tiny("seqboat_text", pool=pool)
    inputs = inputs_of(model, batch=4)
    whole = model(inputs, lengths=LENGTHS).logits
    assert torch.equal(whole, model(inputs, valid=valid_of(LENGTHS, inputs)).logits)
    one = model(inputs[1:2, :7]).logits
    torch.testing.assert_close(whole[1:2], one)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([3, 4]), r"lengths: must lie in 0..3, got 4"),
        (torch.tensor([-1, 3]), r"lengths: must lie in 0..3, got -1"),
        (torch.tensor([3]), r"lengths: must be int64 of shape \(2,\), got torch.int64 \(1,\)"),
        (torch.tensor([3.0, 1.0]), r"lengths: must be int64 of shape \(2,\), got torch.float32 \(2,\)"),
        ([3, 1], r"lengths: must be an int64 tensor of shape \(2,\), got list"),
        (torch.tensor([3, 1], device="meta"), r"lengths: must be on the device of the input, cpu, got meta"),
    ],
)
@pytest.mark.parametrize("name", ["seqboat_text", "seqboat_small_lm"])
def test_lengths_that_do_not_fit_are_refused(lengths: Any, message: str, name: str) -> None:
    with pytest.raises(ShapeError, match=message):
        tiny(name)(torch.zeros(2, 3, dtype=torch.int64), lengths=lengths)


def test_one_of_the_two() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    valid = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ShapeError, match="lengths: must not be given together with valid"):
        tiny("seqboat_text")(tokens, valid=valid, lengths=torch.tensor([3, 3]))
    with pytest.raises(ShapeError, match=r"lengths must be a pair, .* got Tensor"):
        tiny("seqboat_retrieval")(tokens, tokens, lengths=torch.tensor([3, 3]))


class _Pass(nn.Module):
    """A block that does nothing, so that only what is around the blocks is seen."""

    def forward(
        self, x: Tensor, state: Any = None, *, lengths: Tensor | None = None, replay: Any = None
    ) -> BlockOutput:
        return BlockOutput(x if lengths is None else x.masked_fill(~valid_of(lengths, x)[..., None], 0), None, {}, {})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seqboat_text", {"pool": "mean"}),
        ("seqboat_text", {"pool": "first", "positions": "sinusoidal"}),
        ("seqboat_retrieval", {}),
        ("seqboat_small_lm", {}),
    ],
)
def test_with_lengths_nothing_is_waited_for(
    name: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on the device "meta" has no values: to read one is an error, as it is a wait on a real device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know "meta"
    model = tiny(name, **options)
    inputs = inputs_of(model, batch=4).to("meta")
    model.stack.layers, model.stack.final_norm = nn.ModuleList([_Pass(), _Pass()]), None
    model.train().to("meta")
    run(model, inputs, lengths=LENGTHS.to("meta")).logits.float().sum().backward()
    assert isinstance(model, Classifier | LanguageModel | Retrieval)
    with pytest.raises(RuntimeError, match="meta"):
        run(model, inputs, valid=torch.ones(4, 24, dtype=torch.bool, device="meta"))
