"""Every shipped spec: it is what the paper says, and a small model of its shape obeys what the whole one has to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import sma
from sma.errors import ConfigError, StreamingError
from sma.interfaces import Model
from sma.routing import Routing
from sma.statistics import all_active
from sma_models.language_model import LanguageModel
from sma_models.retrieval import Retrieval
from tests.models.tiny import SPECS, call, inputs_of, loss_of, shrink, tiny

LANGUAGE = [name for name in SPECS if name.endswith("_lm")]
WHOLE = [name for name in SPECS if not name.endswith("_lm")]
LENGTHS = [24, 15, 7]

every_spec = pytest.mark.parametrize("name", SPECS)
every_language_model = pytest.mark.parametrize("name", LANGUAGE)

# (all parameters, those without the tables of position biases); the paper gives 39M and 293K.
PARAMETERS = {
    "ema_moe_lm": (25_393_688, 25_393_688),
    "mega_chunk_text": (959_108, 958_088),
    "mega_lm": (39_160_320, 39_160_320),
    "mega_text": (990_100, 958_088),
    "mixture_of_depths_lm": (37_966_860, 37_966_860),
    "seqboat_image": (1_810_001, 1_793_625),
    "seqboat_listops": (408_036, 384_018),
    "seqboat_lm": (39_104_058, 39_104_058),
    "seqboat_pathfinder": (892_301, 880_019),
    "seqboat_pathx": (1_076_621, 880_019),
    "seqboat_retrieval": (1_057_194, 1_009_176),
    "seqboat_small_lm": (564_236, 564_236),
    "seqboat_speech": (298_840, 292_704),
    "seqboat_text": (632_460, 629_392),
    "seqboat_text_full": (660_368, 628_356),
    "three_module_lm": (15_249_828, 15_249_828),
    "transformer_lm": (37_960_704, 37_960_704),
    "transformer_text": (3_357_953, 3_357_953),
}
# Layers, D, h, z, norm, prenorm, attention, window, positions, init_temp, dropout, truncation: appendix of the paper.
PAPER: dict[str, tuple[Any, ...]] = {
    "seqboat_listops": (6, 80, 160, 64, "layernorm", False, "softmax", 128, "simple", 0.3, 0.1, 1024),
    "seqboat_text": (4, 128, 256, 64, "scalenorm", False, "softmax", 128, "local", 0.3, 0.1, 1024),
    "seqboat_retrieval": (6, 128, 256, 64, "scalenorm", False, "softmax", 128, "simple", 0.3, 0.1, 1024),
    "seqboat_image": (8, 160, 320, 96, "batchnorm", True, "relu2", 128, "simple", 0.4, 0.0, 1024),
    "seqboat_pathfinder": (6, 128, 256, 64, "batchnorm", True, "relu2", 128, "simple", 1.0, 0.0, 1024),
    "seqboat_pathx": (6, 128, 256, 64, "syncbatchnorm", True, "relu2", 256, "simple", 1.0, 0.0, 16384),
    "seqboat_speech": (8, 60, 120, 30, "batchnorm", True, "relu2", 128, "local", 1.0, 0.0, 4000),
    "seqboat_lm": (14, 616, 1232, 128, "layernorm", True, "softmax", 1024, "rotary", 1.0, 0.15, 2048),
}


def test_every_spec_is_counted() -> None:
    assert list(PARAMETERS) == SPECS
    assert {name for name in sma.plugins.registry().names("spec") if name in PARAMETERS} == set(SPECS)


@every_spec
def test_the_whole_model_has_its_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = sma.build(name, kind="model")
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    tables = sum(size for key, size in sizes.items() if key.endswith("position_bias"))
    total = sum(sizes.values())
    assert (total, total - tables) == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER)
def test_the_sizes_are_the_papers(name: str) -> None:
    spec = sma.dump_spec(sma.load_spec(name))
    (block,) = spec["blocks"]
    gau, configurator = block["activate"]["module"], block["activate"]["configurator"]
    found = (
        *(spec["n_layers"], spec["d_model"], gau["d_v"], gau["d_qk"]),
        *(block["norm"]["type"], block["prenorm"], gau["activation"], gau["window"], gau["positions"]),
        *(configurator["init_temp"], block["dropout"], block["mixer"]["truncation"]),
    )
    assert found == PAPER[name]
    assert (block["type"], block["mixer"]["n_state"]) == ("seqboat", 16)
    assert spec["dropout"] == block["dropout"]
    assert (spec["final_norm"] is not None) == block["prenorm"]


@every_spec
def test_a_spec_survives_dumping_and_loading(name: str) -> None:
    config = sma.load_spec(name, kind="model")
    assert sma.load_spec(sma.dump_spec(config)) == config
    assert sma.spec.loads(sma.spec.to_yaml(config)) == config
    small = shrink(config)
    assert sma.load_spec(sma.dump_spec(small)) == small != config


@every_spec
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = tiny(name).train()
    out = call(model, inputs_of(model))
    loss = loss_of(out)
    assert bool(loss.isfinite())
    loss.backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []
    broken = [key for key, p in model.named_parameters() if not bool(p.grad.isfinite().all())]  # type: ignore[union-attr]
    assert broken == []


@every_spec
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    losses = []
    for _ in range(2):
        model = tiny(name).train()
        torch.manual_seed(3)
        losses.append(loss_of(call(model, inputs_of(model))))
    assert torch.equal(*losses)


@every_spec
def test_recomputing_activations_changes_nothing(name: str) -> None:
    results = []
    for checkpoint in (False, True):
        model = tiny(name, checkpoint=checkpoint).train()
        torch.manual_seed(3)
        out = call(model, inputs_of(model))
        loss = loss_of(out)
        loss.backward()
        results.append((model, loss))
    (plain, plain_loss), (recomputed, recomputed_loss) = results
    assert torch.equal(plain_loss, recomputed_loss)
    for (key, expected), (_, found) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda text, key=key: f"{key}: {text}")
    for (key, expected), (_, found) in zip(plain.named_buffers(), recomputed.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, key=key: f"{key}: {text}")


def masks(side: str) -> Tensor:
    """Rows of ``LENGTHS`` real tokens."""
    column = torch.arange(max(LENGTHS))
    right = column < torch.tensor(LENGTHS)[:, None]
    if side == "both":
        middle = [(max(LENGTHS) - length) // 2 for length in LENGTHS]
        return torch.stack([row.roll(shift) for row, shift in zip(right, middle, strict=True)])
    return right if side == "right" else right.flip(1)


@pytest.mark.parametrize("side", ["right", "left", "both"])
@every_spec
def test_padding_and_batch_mates_change_nothing(name: str, side: str) -> None:
    model = tiny(name)
    inputs, valid = inputs_of(model), masks(side)
    per_token = isinstance(model, LanguageModel)
    together = call(model, inputs, valid).logits
    for row in range(len(LENGTHS)):
        own = valid[row]
        alone = call(model, inputs[row : row + 1, own]).logits[0]
        torch.testing.assert_close(together[row, own] if per_token else together[row], alone, atol=1e-5, rtol=1e-4)


@every_spec
def test_a_decision_can_be_replayed(name: str) -> None:
    model = tiny(name)
    inputs, valid = inputs_of(model), masks("left")
    out = call(model, inputs, valid)
    again = call(model, inputs, valid, replay=out.routings)
    assert torch.equal(out.logits, again.logits)
    if out.routings and name != "seqboat_text_full":  # there everything is active anyway
        replay = {key: all_active(routing) for key, routing in out.routings.items()}
        full = call(model, inputs, valid, replay=replay)
        assert all(torch.equal(r.active[..., 0], r.valid) for r in full.routings.values())
        assert not torch.allclose(full.logits, out.logits)


@every_language_model
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [9, 1, 0, 11, 3]], ids=["one chunk", "steps", "chunks"])
def test_a_language_model_streams(name: str, chunks: list[int]) -> None:
    model = tiny(name)
    tokens, valid = inputs_of(model), masks("left")
    with torch.no_grad():
        parallel = model(tokens, valid=valid)
        state = model.initial_state(len(LENGTHS))
        size = state.nbytes
        parts: list[Tensor] = []
        active: list[dict[str, Routing]] = []
        for columns in torch.arange(24).split(chunks):
            out = model(tokens[:, columns], state, valid=valid[:, columns])
            state = out.state
            assert state.nbytes <= size
            parts.append(out.logits)
            active.append(out.routings)
    torch.testing.assert_close(torch.cat(parts, 1)[valid], parallel.logits[valid], atol=1e-4, rtol=1e-4)
    for key, routing in parallel.routings.items():
        assert torch.equal(torch.cat([each[key].active for each in active], 1), routing.active), key


@every_language_model
def test_a_language_model_does_not_see_the_future(name: str) -> None:
    model = tiny(name)
    tokens = inputs_of(model)
    changed = tokens.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % model.vocab_size
    torch.testing.assert_close(model(changed).logits[:, :13], model(tokens).logits[:, :13], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(changed).logits[:, 13:], model(tokens).logits[:, 13:], atol=1e-3)


@pytest.mark.parametrize("name", WHOLE)
def test_what_reads_whole_sequences_says_so(name: str) -> None:
    with pytest.raises(StreamingError, match="reads whole sequences, it does not stream"):
        tiny(name).initial_state(2)


def test_always_active_is_seqboat_full() -> None:
    """The paper's SeqBoat-full is SeqBoat with every token active, with confidence 1, and an unbounded window."""
    full = tiny("seqboat_text_full")
    config = sma.load_spec(
        "seqboat_text",
        "blocks[0].activate.module.window=null",
        "blocks[0].activate.module.positions=simple",
        "blocks[0].activate.module.max_positions=10",
    )
    sparse: Model = shrink(config).build().eval()
    weights = copy.deepcopy(full.state_dict())
    for key, value in sparse.state_dict().items():
        if key.endswith("skip_proj.weight"):  # two rows more, the logits, in front
            weights[key] = torch.cat([torch.zeros(2, value.shape[1]), weights[key]])
        elif key.endswith("skip_proj.bias"):
            weights[key] = torch.cat([torch.tensor([-100.0, 100.0]), weights[key]])
        else:
            weights.setdefault(key, value)
    sparse.load_state_dict(weights)
    inputs = inputs_of(full)
    for valid in (None, masks("right"), masks("left")):
        torch.testing.assert_close(call(sparse, inputs, valid).logits, call(full, inputs, valid).logits)


def test_retrieval_takes_two_texts_of_any_lengths() -> None:
    model = tiny("seqboat_retrieval")
    assert isinstance(model, Retrieval)
    first, second = inputs_of(model, length=9), inputs_of(model, length=20, seed=5)
    out = model(first, second)
    assert out.logits.shape == (3, 2)
    swapped = model(second, first)
    for key, routing in out.routings.items():
        side, rest = key.split(".", 1)
        other = swapped.routings[("second." if side == "first" else "first.") + rest]
        assert torch.equal(routing.active, other.active)
    valid = masks("right")[:, :20]
    one_sided = model(first, second, valid=(None, valid))
    both = model(first, second, valid=(torch.ones(3, 9, dtype=torch.bool), valid))
    torch.testing.assert_close(one_sided.logits, both.logits)


def test_a_configurator_that_looks_ahead_is_refused_in_a_language_model() -> None:
    with pytest.raises(ConfigError, match="looks ahead, it is refused in a causal layer"):
        sma.build("seqboat_small_lm", "blocks[0].activate.configurator=expert_choice")


def test_routers_of_the_small_models_decide_token_by_token() -> None:
    """The tests above say little where everything or nothing is active."""
    for name in SPECS:
        model = tiny(name)
        for key, routing in call(model, inputs_of(model)).routings.items():
            rate = float(routing.rate().mean())
            assert 0.1 < rate < 0.9 or name == "seqboat_text_full", (name, key, rate)
