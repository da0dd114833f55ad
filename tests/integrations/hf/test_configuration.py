"""The configuration holds a spec that was checked, says where one is wrong, and opens no file."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import sma
from sma.errors import ConfigError, MissingExtraError, SpecError
from sma_models.integrations.hf import SMAConfig, SMAForCausalLM, SMAForSequenceClassification
from tests.models.tiny import SPECS


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_is_held_saved_and_loaded(name: str, tmp_path: Path) -> None:
    config = SMAConfig.of(name)
    assert config.typed == sma.load_spec(name)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SMAConfig)
    assert loaded.typed == config.typed
    assert json.loads((tmp_path / "config.json").read_text())["spec"] == sma.dump_spec(sma.load_spec(name))


def test_what_transformers_asks_of_a_configuration() -> None:
    config = SMAConfig.of("seqboat_small_lm", "n_layers=3")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (256, 128, 3)
    assert SMAConfig.of("seqboat_listops").num_labels == 10
    assert SMAConfig.of("seqboat_image").vocab_size is None
    assert config.get_text_config(decoder=True) is config
    empty = SMAConfig()
    assert (empty.spec, empty.vocab_size, empty.hidden_size, empty.num_hidden_layers) == (None, None, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, r"unknown key 'n_layer'; did you mean 'n_layers'\?"),
        ({"d_model": "wide"}, "d_model"),
        (
            {"blocks": [{"type": "seqboat", "mixer": {"type": "ema", "n_stat": 1}}]},
            r"blocks\[0\]\.mixer \(ema\): .*n_stat",
        ),
        ({"blocks": [{"type": "nonsense"}]}, r"blocks\[0\].*nonsense"),
        ({"type": "ema"}, "spec: 'ema' is a mixer, not a model"),
        ({"extends": "/etc/passwd.yaml"}, "may extend registered specs only"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_place(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec = {"type": "language_model", "vocab_size": 256, "d_model": 8, "n_layers": 1, "blocks": [{"type": "seqboat"}]}
    with pytest.raises(SpecError, match=message):
        SMAConfig(spec=spec | change)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sma", "spec": spec | change}))
    with pytest.raises(SpecError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_names_and_files_are_for_people_only() -> None:
    with pytest.raises(SpecError, match="spec: must be a mapping, got str"):
        SMAConfig(spec="seqboat_small_lm")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sma_models.integrations.hf")
    with pytest.raises(MissingExtraError, match=r"transformers is not installed; it comes with the extra 'hf'"):
        import_module("sma_models.integrations.hf")


def test_the_model_must_be_of_the_kind() -> None:
    with pytest.raises(ConfigError, match="SMAForCausalLM: the spec must be that of a LanguageModel, got Classifier"):
        SMAForCausalLM(SMAConfig.of("seqboat_text"))
    with pytest.raises(ConfigError, match="must be that of a Classifier, got Retrieval"):
        SMAForSequenceClassification(SMAConfig.of("seqboat_retrieval"))
    with pytest.raises(ConfigError, match="spec: cannot be built here"):
        SMAForCausalLM(SMAConfig.of("seqboat_small_lm", "d_model=1000000000"))
    with pytest.raises(SpecError, match="spec: must be given, got None"):
        SMAForCausalLM(SMAConfig())
