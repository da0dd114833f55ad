"""The table of tools and parts in the documentation: a row for each tool, a column for each kind of part.

The tests of this folder try every cell on every registered part of the kind; ``test_table.py`` holds the table to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("model", "block", "mixer", "module", "norm", "configurator")
"""The columns: the kinds of part that are registered. A sparsely activated layer is tried with the configurators."""


@dataclass(frozen=True)
class Row:
    """One tool.

    Attributes:
        tool: its name, in Markdown.
        what: what a part does with it.
        tests: the functions that try it, ``file.function``.
        nothing: why it has nothing to do with some kinds of part, by kind.
        refused: why some kinds of part refuse it, by kind: a regular expression that the error matches.
    """

    tool: str
    what: str
    tests: tuple[str, ...]
    nothing: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def cell(self, kind: str) -> str:
        """``works``, ``refused: why``, or why there is nothing to do."""
        if kind in self.refused:
            return f"refused: {self.refused[kind]}"
        return self.nothing.get(kind, "works")


NO_LINEAR = {"norm": "has no `nn.Linear`"}
WEIGHTS = ("test_weights.test_weights_of_a_tool_count",)
HOOKS = ("test_hooks.test_hooks_fire", "test_hooks.test_hooks_fire_in_training")

ROWS = (
    Row(
        "forward hooks and pre-hooks",
        "fire on every submodule that computes; what they change counts",
        (
            *HOOKS,
            "test_hooks.test_hooks_fire_in_a_decoder_that_was_there_before",
            "test_hooks.test_a_hook_changes_the_result",
            "test_hooks.test_a_hook_that_changes_nothing_changes_nothing",
        ),
    ),
    Row("full backward hooks and pre-hooks", "fire where a gradient comes back", HOOKS[1:]),
    Row("`register_module_forward_hook` and the other global hooks", "fire on every submodule that computes", HOOKS),
    Row("`torch.nn.utils.prune`", "masked weights, before and after `prune.remove`", WEIGHTS, NO_LINEAR),
    Row("`torch.nn.utils.weight_norm`, `spectral_norm`", "the normalised weights", WEIGHTS, NO_LINEAR),
    Row("`torch.nn.utils.parametrizations`", "the parametrised weights", WEIGHTS, NO_LINEAR),
    Row("`parametrize.register_parametrization` of any parameter", "the parametrised values", WEIGHTS),
    Row("a replaced `nn.Linear`, or another `forward` on it", "is called everywhere", WEIGHTS, NO_LINEAR),
    Row(
        "`peft` LoRA",
        "adapters learn, count in every step, and merge; also on `SMAForCausalLM`",
        (
            "test_adapters.test_lora",
            "test_adapters.test_lora_on_the_model_of_transformers",
            "test_adapters.test_adapters_learn",
        ),
        NO_LINEAR,
    ),
    Row(
        "`torch.ao.quantization.quantize_dynamic`, torchao `Int8WeightOnlyConfig`",
        "every projection is quantised, the output stays close",
        ("test_quantised.test_quantised_models", "test_quantised.test_quantised_parts"),
        NO_LINEAR,
    ),
    Row(
        "`fully_shard` of a single part",
        "loss and gradients of one process; then decodes",
        ("test_sharded.test_fully_shard",),
    ),
    Row("`torch.compile(part)`, `part.compile()`", "trains and decodes as without", ("test_wrapped.test_compiled",)),
    Row(
        "`checkpoint_wrapper(part)`",
        "trains and decodes as without; a batch norm inside counts each batch twice, as PyTorch's own does there",
        ("test_wrapped.test_checkpoint_wrapper",),
    ),
)


def markdown() -> str:
    """The table."""
    head = ["tool", *KINDS, "what is tried"]
    rows = [[row.tool, *map(row.cell, KINDS), row.what] for row in ROWS]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
