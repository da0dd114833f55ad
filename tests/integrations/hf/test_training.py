"""The Trainer trains, resumes, accumulates and recomputes as it does with any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modelcard import TASK_MAPPING

import sma
from sma.errors import ConfigError
from sma_models.integrations.hf import SMAByteTokenizer, SMAForCausalLM, SMAForSequenceClassification, from_model
from tests.models.tiny import inputs_of, tiny

TEXT = b"the quick brown fox jumps over the lazy dog. " * 20
WINDOWS = [{"input_ids": list(TEXT[start : start + 20 + start % 13])} for start in range(0, 600, 7)]
SMALL = ("d_model=16", "n_layers=2", "blocks[0].activate.module={type: gau, d_qk: 8, d_v: 32, window: 16}")


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments of a short run."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_steps": 6,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(common | options))


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    """Of a language model on windows of different lengths."""
    tokenizer = SMAByteTokenizer()
    return Trainer(
        model,
        arguments(folder, **options),
        train_dataset=WINDOWS,
        eval_dataset=WINDOWS[:5],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def language_model() -> SMAForCausalLM:
    """The same fresh model every time."""
    torch.manual_seed(0)
    model = from_model(sma.build("seqboat_small_lm", *SMALL))
    assert isinstance(model, SMAForCausalLM)
    return model.train()


def test_a_language_model_learns_and_goes_on(tmp_path: Path) -> None:
    whole = trainer(language_model(), tmp_path, eval_strategy="steps", eval_steps=6)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
    assert all("eval_loss" in entry for entry in whole.state.log_history if "eval_runtime" in entry)
    resumed = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6"), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert again.generation_config.pad_token_id == again.config.pad_token_id == 256
    assert again.generate(torch.tensor([list(b"the qu")]), max_new_tokens=5, do_sample=False).shape == (1, 11)


def test_accumulated_parts_are_one_batch(tmp_path: Path) -> None:
    def after(parts: int) -> torch.Tensor:
        torch.manual_seed(0)
        rate_loss = "blocks[0].activate.rate_loss={target: 0.1, weight: 1.0}"
        model = from_model(sma.build("seqboat_small_lm", *SMALL, "blocks[0].activate.controller=null", rate_loss))
        one = trainer(
            model.train(),
            tmp_path / str(parts),
            max_steps=1,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            max_grad_norm=0.0,
        )
        one.train()
        return torch.cat([parameter.detach().flatten() for parameter in one.model.parameters()])

    # The rate loss is quadratic in the rate of a batch, so that parts are not quite the whole; a loss that is counted
    # as often as there are parts would be off by its own size.
    whole, parts = after(1), after(4)
    untrained = torch.cat([parameter.detach().flatten() for parameter in language_model().parameters()])
    assert float((whole - parts).norm()) < 0.1 * float((whole - untrained).norm())


class Renamed(SMAForCausalLM):
    """A subclass, of which no list of Transformers knows the name."""


@pytest.mark.parametrize("kind", ["plain", "subclass", "fully_shard", "adapter"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft asks
def test_smoothed_labels_are_shifted(kind: str, tmp_path: Path) -> None:
    model = language_model().eval()
    if kind == "subclass":
        model = Renamed(model.config, model.model)
    elif kind == "fully_shard":  # derives a class of its own
        model.__class__ = type("FSDPSMAForCausalLM", (SMAForCausalLM,), {})
    elif kind == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.randint(256, (2, 20))
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    smoothed = trainer(model, tmp_path, label_smoothing_factor=0.1)
    loss = smoothed.compute_loss(model, {"input_ids": tokens, "labels": labels})
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    plain = trainer(model, tmp_path).compute_loss(model, {"input_ids": tokens, "labels": labels})
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels[:, 1:].flatten()))


def test_a_language_model_learns_with_smoothed_labels(tmp_path: Path) -> None:
    smoothed = trainer(language_model(), tmp_path, label_smoothing_factor=0.1, max_steps=60)
    smoothed.train()
    text = torch.tensor([list(TEXT[:60])])
    logits = smoothed.model.eval()(text).logits
    assert float((logits[0, :-1].argmax(-1) == text[0, 1:]).float().mean()) > 0.3, "the next byte"
    assert float((logits[0].argmax(-1) == text[0]).float().mean()) < 0.3, "not the same one"


def test_smoothed_classes_are_not_shifted(tmp_path: Path) -> None:
    model = from_model(tiny("seqboat_listops"))
    inputs, labels = inputs_of(model.model), torch.tensor([0, 9, 3])
    smoothed = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    loss = smoothed.compute_loss(model, {"input_ids": inputs, "labels": labels})
    torch.testing.assert_close(loss, F.cross_entropy(model(inputs).logits, labels, label_smoothing=0.1))


def test_transformers_knows_the_classes_by_name() -> None:
    """Wherever the name of a class of its own is listed: the Trainer, pipelines, the model card, the losses."""
    for task, kind, name in (
        ("text-generation", SMAForCausalLM, "seqboat_small_lm"),
        ("text-classification", SMAForSequenceClassification, "seqboat_text"),
    ):
        assert TASK_MAPPING[task]["sma"] == kind.__name__
        model = from_model(tiny(name))
        assert model.loss_function is LOSS_MAPPING[kind.__name__.removeprefix("SMA")]
        renamed = type("Renamed", (kind,), {})(model.config, model.model)
        assert renamed.loss_function is model.loss_function
    assert AutoModelForCausalLM.from_config(language_model().config).__class__ is SMAForCausalLM


def test_a_classifier_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = from_model(sma.build("seqboat_text", "d_model=16", "n_layers=1", "dropout=0", "head_dropout=0")).train()
    tokenizer = SMAByteTokenizer()
    texts = [(word * count, label) for count in range(2, 22) for label, word in enumerate(("ab ", "xyz "))]
    data = [{**tokenizer(text), "labels": label} for text, label in texts]
    training = Trainer(
        model,
        arguments(tmp_path, max_steps=30, num_train_epochs=9),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda out: {"right": float((out.predictions.argmax(-1) == out.label_ids).mean())},
    )
    training.train()
    assert training.evaluate()["eval_right"] > 0.9
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-30")
    assert loaded(torch.tensor([tokenizer("xyz xyz ").input_ids])).logits.argmax() == 1


def test_activation_checkpointing() -> None:
    tokens = inputs_of(tiny("three_module_lm"))
    gradients = []
    for checkpointed in (False, True):
        model = from_model(tiny("three_module_lm")).train()
        assert not model.is_activation_checkpointing
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert model.is_activation_checkpointing
            assert model.model.stack.checkpoint
        torch.manual_seed(1)
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.activation_checkpointing_disable()
        assert not model.model.stack.checkpoint
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert from_model(tiny("seqboat_small_lm", checkpoint=True)).is_activation_checkpointing


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing_kwargs": {"preserve_rng_state": False}},
        {"offload": True},
        {"every_n_layers": 2},
    ],
    ids=str,
)
def test_other_ways_of_checkpointing_are_refused(options: dict[str, Any]) -> None:
    model = language_model()
    with pytest.raises(ConfigError, match=r"activation checkpointing: must be|every_n_layers: must be 1, got 2"):
        model.activation_checkpointing_enable(**options)
    assert not model.model.stack.checkpoint


def test_the_trainer_recomputes(tmp_path: Path) -> None:
    weights = []
    for checkpointed in (False, True):
        one = trainer(
            language_model(), tmp_path / str(checkpointed), max_steps=2, activation_checkpointing=checkpointed
        )
        one.train()
        weights.append(one.model.model.embedding.weight)
    torch.testing.assert_close(weights[0], weights[1])
