"""The queue that ships names runs that there are, and a wrong one is refused with its place, the rule and the value."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.plan import read_queue
from sma.errors import ConfigError
from sma_models.training.recipe import load_recipe


def test_every_run_of_the_queue_is_a_recipe() -> None:
    entries = read_queue()
    assert len({entry.key for entry in entries}) == len(entries) > 0
    for entry in entries:
        recipe = load_recipe(*entry.arguments)
        assert (recipe.train.steps, recipe.train.seed) == (entry.steps, entry.seed)


def test_variants_of_attention_differ_in_who_is_active_only() -> None:
    entries = [each for each in read_queue() if (each.task, each.seed) == ("stdlib", 0)]
    layers = {each.variant: load_recipe(*each.arguments).model.blocks[0].activate for each in entries}  # type: ignore[attr-defined]
    assert list(layers) == ["never", "learned", "held_.05", "held_.15", "held_.30", "always"]
    assert layers["never"].configurator.rate == 0
    assert type(layers["always"].configurator).__qualname__.startswith("Always")
    held = [layers[name].controller for name in ("never", "learned", "always", "held_.05", "held_.15", "held_.30")]
    assert [each and each.target for each in held] == [None, None, None, 0.05, 0.15, 0.3]
    assert len({repr(layer.module) for layer in layers.values()}) == 1


def test_order_is_by_seed_then_variant(root: Path) -> None:
    (root / "queue.yaml").write_text("- {experiment: which, task: lines, variants: [always, never], seeds: [2, 0]}\n")
    keys = [entry.key.removeprefix("which.lines.") for entry in read_queue(root)]
    assert keys == ["always.s2", "never.s2", "always.s0", "never.s0"]


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        (
            "- {experiment: which, task: lines, variants: [never, alwais], seeds: [0]}",
            r"queue.yaml: \[0\].variants\[1\]: must be one of never, always, got 'alwais'; did you mean 'always'\?",
        ),
        ("- {experiment: witch, task: lines, seeds: [0]}", r"\[0\].experiment: must be one of which, got 'witch'"),
        ("- {experiment: which, task: words, seeds: [0]}", r"\[0\].task: must be one of lines, got 'words'"),
        (
            "- {experiment: which, task: lines, seeds: [-1]}",
            r"seeds: must be a list of numbers .*, got \[-1\]",
        ),
        ("- {experiment: which, task: lines}", r"\[0\].seeds: must be a list of numbers .*, got None"),
        ("- {experiment: which, task: lines, seed: [0]}", r"\[0\]: a key: must be one of .*, got 'seed'; did you mean"),
        ("- {experiment: which, task: lines, seeds: [0, 0]}", r"\[0\]: every run must be named once, got which.lines."),
        ("experiment: which", r"queue.yaml: must be a list of runs, got {'experiment': 'which'}"),
        ("- {", r"queue.yaml: must be YAML, got"),
    ],
)
def test_bad_queue(root: Path, queue: str, message: str) -> None:
    (root / "queue.yaml").write_text(queue)
    with pytest.raises(ConfigError, match=message):
        read_queue(root)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("steps: 300", "steps: many", r"which/experiment.yaml: tasks.lines.steps: must be a number .*, got 'many'"),
        ("  lines:", "  a b:", r"experiment.yaml: tasks: a name must be letters, digits, .*, got 'a b'"),
        ("[data.seq_len=20]", "data.seq_len=20", r"tasks.lines.overrides: must be a list of key=value, got 'data"),
        ("question:", "answer:", r"experiment.yaml: a key: must be one of question, tasks, variants, got 'answer'"),
    ],
)
def test_bad_experiment(root: Path, before: str, after: str, message: str) -> None:
    path = root / "which" / "experiment.yaml"
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(ConfigError, match=message):
        read_queue(root)
