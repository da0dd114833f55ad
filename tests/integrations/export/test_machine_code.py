"""Folders that AOTInductor compiled, in several dtypes, on the CPU and on CUDA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sma.errors import ConfigError, ExportError
from sma.ops import using
from sma_models.integrations.export import Runner, export, export_forward, export_step, load, save
from sma_models.language_model import LanguageModel
from sma_modules.ops.ema import convolution
from tests.integrations.export.conftest import TEXT
from tests.integrations.export.parts import GAU, activated, model_of
from tests.integrations.export.places import FLOATS, Place, at, check
from tests.integrations.export.test_places import whole, whole_inputs
from tests.integrations.export.texts import PROMPTS, expected, written, written_alone

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler; g++ is not there"
)
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}
"""So that the C++ compiler takes less time."""
EVERYWHERE = [*at("cpu", torch.float32, torch.bfloat16), *at("cuda", *FLOATS)]
IN_16_BITS = [*at("cpu", torch.bfloat16), *at("cuda", torch.bfloat16)]
Compiled = Callable[[Place], tuple[LanguageModel, Path]]


@pytest.fixture(scope="module")
def compiled(trained: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The trained model at a place, and as a folder for that place, which is compiled once."""
    done: dict[Place, tuple[LanguageModel, Path]] = {}

    def of(place: Place) -> tuple[LanguageModel, Path]:
        if place not in done:
            model, folder = place.of(trained), tmp_path_factory.mktemp("compiled")
            with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(QUICK):
                patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
                done[place] = model, export(model, folder / "x", format="aoti", chunk=20)
        return done[place]

    return of


def there(value: Tensor, place: Place) -> bool:
    return (value.device.type, value.dtype) == place


@pytest.mark.parametrize("place", EVERYWHERE)
def test_it_writes_what_the_model_writes(compiled: Compiled, place: Place) -> None:
    model, folder = compiled(place)
    texts = written(load(folder), PROMPTS, 200)
    assert texts == expected(model, PROMPTS, 200)
    assert len(set(texts[0])) > 8, "it says nothing, so everything would be the same"


@pytest.mark.parametrize("place", EVERYWHERE)
def test_its_numbers_are_those_of_the_model(compiled: Compiled, place: Place) -> None:
    """After prompts of 5 to 50 bytes of the text, and after each of the 20 that follow."""
    model, folder = compiled(place)
    runner = load(folder)
    rows = [list(TEXT[start : start + length]) for start, length in ((0, 25), (333, 32), (1234, 57), (2000, 70))]
    logits, state = runner.prefill([row[:-20] for row in rows])
    found = [logits]
    for i in range(20):
        logits, state = runner.step([row[i - 20] for row in rows], state)
        found.append(logits)
    mine = torch.stack(found, 1)
    assert there(mine, place)

    def own(model: LanguageModel) -> list[Tensor]:
        device = model.embedding.weight.device
        with torch.no_grad():
            return [model(torch.tensor([row], device=device)).logits[0, -21:] for row in rows]

    with using("eager"):
        plain = own(model)
    check([mine], plain, own(Place("cpu", torch.float64).of(model)))


@pytest.mark.parametrize("place", IN_16_BITS)
def test_a_state_is_on_the_device_in_its_dtypes(compiled: Compiled, place: Place) -> None:
    model, folder = compiled(place)
    runner = load(folder)
    own = model.initial_state(2).named_tensors()
    _, after = runner.prefill(PROMPTS[:2])
    for state in (runner.initial_state(2), after):
        assert {name: (each.dtype, each.device) for name, each in state.items()} == {
            f"state.{name}": (each.dtype, each.device) for name, each in own.items()
        }
    for name, each in runner.initial_state(2).items():
        assert torch.equal(each, own[name.removeprefix("state.")])


@pytest.mark.parametrize("place", IN_16_BITS)
def test_inputs_may_lie_anywhere(compiled: Compiled, place: Place) -> None:
    """Rows apart from each other, at odd addresses, on the CPU, as arrays and lists."""
    _, folder = compiled(place)
    runner = load(folder)
    _, state = runner.prefill(PROMPTS)
    tokens = torch.tensor([101, 102, 103, 104, 105])
    all_of, _ = runner.step(tokens, state)

    def close(logits: Tensor, rows: slice) -> None:  # sums over other numbers of rows may be in another order
        torch.testing.assert_close(logits, all_of[rows], rtol=0.05, atol=0.05)

    close(runner.step(tokens[::2], {name: each[::2] for name, each in state.items()})[0], slice(None, None, 2))
    close(runner.step(tokens.tolist()[1:], {name: each[1:] for name, each in state.items()})[0], slice(1, None))
    close(runner.step(tokens.numpy(), {name: each.cpu() for name, each in state.items()})[0], slice(None))
    live = np.array([True, False, True, True, False])
    _, after = runner.step(tokens, state, live)
    seen = [name for name in after if name.endswith(".seen")]
    assert [(after[name] - state[name]).tolist() for name in seen] == [[1, 0, 1, 1, 0]]
    on = {name: each.cpu() for name, each in runner.prefill([PROMPTS[1][:23]])[1].items()}
    torch.testing.assert_close(
        runner.prefill([PROMPTS[1][23:]], on)[0], runner.prefill(PROMPTS[1:2])[0], rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("place", IN_16_BITS)
def test_a_draw_depends_on_the_seed_only(compiled: Compiled, place: Place) -> None:
    _, folder = compiled(place)
    runner = load(folder)

    def drawn(seed: int) -> list[int]:
        stream = runner.stream(PROMPTS[:1], temperature=1.5, seed=seed)
        return [int(next(stream)[0]) for _ in range(30)]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("place", IN_16_BITS)
def test_the_copy_of_the_runner_needs_no_library(compiled: Compiled, place: Place, tmp_path: Path) -> None:
    model, folder = compiled(place)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    said = written_alone(
        moved, "line 7 is", "--tokens", "30", "--device", f"{place.device}:0", without=("sma", "sma_models")
    )
    assert said == "line 7 is" + bytes(expected(model, [PROMPTS[0]], 30)[0]).decode() + "\n"


@pytest.mark.parametrize("place", at("cuda", torch.bfloat16))
def test_it_runs_on_any_device_of_its_kind(compiled: Compiled, place: Place) -> None:
    """The last one: another one than it was compiled on where there are several."""
    model, folder = compiled(place)
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    runner = load(folder, device=str(last))
    assert runner.prefill(PROMPTS)[0].device == last
    assert written(runner, PROMPTS, 50) == expected(model, PROMPTS, 50)


@pytest.mark.parametrize("transforms", [False, True])
@pytest.mark.parametrize("place", IN_16_BITS)
def test_whole_sequences(place: Place, transforms: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages in both directions, experts, attention in chunks."""
    monkeypatch.setattr(convolution, "DIRECT", 0 if transforms else convolution.DIRECT)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    experts = activated(module={"type": "moe", "n_experts": 4, "top_k": 2, "d_hidden": 6})
    parts: list[dict[str, Any]] = [
        {"mixer": {"type": "ema", "n_state": 3}},
        experts,
        activated(module=GAU | {"chunk": 4, "window": None}),
    ]
    model = place.of(model_of(parts, n_classes=3))
    with torch._inductor.config.patch(QUICK):
        runner = load(save({"forward": export_forward(model, 2, 24)}, tmp_path / "x", format="aoti"))
    inputs, lengths = whole_inputs(model)
    mine = runner.forward(inputs=inputs, lengths=lengths)
    assert there(mine, place)
    with using("eager"):
        plain = whole(model)
    check([mine], plain, whole(model.cpu().double()))


def test_a_device_that_is_not_there_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    _, folder = compiled(Place("cpu", torch.bfloat16))
    with pytest.raises(ConfigError, match=r"device: must be cpu, for which the graphs were made, got cuda:1"):
        load(folder, device="cuda:1")
    about = json.loads((folder / "export.json").read_text())
    assert (about["format"], about["device"]) == ("aoti", "cpu")
    moved = shutil.copytree(folder, tmp_path / "x")
    (moved / "export.json").write_text(json.dumps(about | {"device": "cuda"}))
    with pytest.raises(ConfigError, match=r"device: must be one of \d+ that this PyTorch can use here, got cuda:99"):
        load(moved, device="cuda:99")
    with pytest.raises(ValueError, match=r"device: must be one of"):
        Runner(moved, device="cuda:99")


def broken(path: Path) -> str:
    """A C++ compiler that finds nothing."""
    path.write_text(
        "#!/bin/sh\necho 'model.cpp: In function f:'\necho 'fatal error: cuda.h: No such file' >&2\nexit 1\n"
    )
    path.chmod(0o755)
    return str(path)


def test_what_the_compiler_says_is_said(
    trained: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda *_: broken(tmp_path / "g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(
        ExportError, match=r"step: cannot be compiled by AOTInductor: fatal error: cuda.h: No such file"
    ):
        save({"step": export_step(trained, 1)}, tmp_path / "x", format="aoti")
    assert not (tmp_path / "x").exists()
