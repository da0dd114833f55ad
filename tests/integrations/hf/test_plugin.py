"""A spec of parts that come from elsewhere works here as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sma
from sma.errors import SpecError
from sma.plugins import isolated_registry
from sma_models.inference.generation import generate
from sma_models.integrations.hf import SMAConfig, SMAForCausalLM, export
from sma_models.language_model import LanguageModel

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "examples" / "plugin_package" / "src"
SPEC = SOURCE / "sma_example_plugin" / "specs" / "short_conv_lm.yaml"


class Quiet(LanguageModel):
    """A model of another package: one that never writes token 0."""

    @dataclass(kw_only=True, frozen=True)
    class Config(LanguageModel.Config):
        strength: float = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.strength = config.strength

    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        out = super().forward(*args, **kwargs)  # type: ignore[arg-type]
        out.logits[..., 0] -= 1e9 * self.strength
        return out


@pytest.fixture
def _plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SOURCE))
    from sma_example_plugin import ShortConv, SinkSigmoid

    with isolated_registry() as registry:
        for name, part in (("short_conv", ShortConv), ("sink_sigmoid", SinkSigmoid), ("quiet", Quiet)):
            if not registry.kinds_of(name):
                sma.plugins.register(name, part)
        yield
    for name in [name for name in sys.modules if name.startswith("sma_example_plugin")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("_plugin")
@pytest.mark.parametrize("overrides", [[], ["type=quiet", "strength=0.5"]], ids=["module", "model"])
def test_a_plugin_needs_nothing_more(overrides: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = sma.load_spec(SPEC, "d_model=16", kind="model")
    tree = sma.dump_spec(spec)
    for override in overrides:
        key, _, value = override.partition("=")
        tree[key] = float(value) if key == "strength" else value
    model = SMAForCausalLM(SMAConfig(spec=tree)).eval()
    prompt = torch.tensor([list(b"to be or not")])
    written = model.generate(prompt, max_new_tokens=15, do_sample=False)
    assert torch.equal(written[:, 12:], generate(model.model, prompt, 15, temperature=0))
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, **beams, use_cache=False))
    loaded = AutoModelForCausalLM.from_pretrained(export(model.model, tmp_path / "model"))
    assert type(loaded.model) is (Quiet if overrides else LanguageModel)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=15, do_sample=False), written)


def test_where_the_plugin_is_missing_its_name_is_said() -> None:
    with pytest.raises(SpecError, match=r"short_conv|sink_sigmoid"):
        SMAConfig.of(SPEC)
