"""Parts of the documentation that are made when the pages are built, from the code or from results, so that they
cannot go out of date.

A page holds ``<!-- generated: NAME -->`` alone on a line; the function of that name below supplies the Markdown in its
place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING
from importlib.resources.abc import Traversable
from typing import Any

import typer

import sma
from benchmarks.pages import PARTS as BENCHMARKS
from sma_models.cli import app as command_line
from sma_models.cli.installed import count_parameters
from sma_models.training.recipe import load_recipe, recipe_names
from tests.tools.table import markdown as tools_and_parts

MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def fill_in(text: str) -> str:
    """``text`` with every mark replaced by what it stands for."""
    return MARK.sub(lambda mark: PARTS[mark[1]](), text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def specs() -> str:
    """Every shipped spec: what it says about itself, its size, its text."""
    registry = sma.plugins.registry()
    parts = [_spec_table(registry)]
    for name in registry.names("spec"):
        file: Traversable = registry.get("spec", name)
        text = file.read_text(encoding="utf-8")
        parts.append(f"## {name}\n\n{_comment(text)}\n\n{_size(name)}\n\n```yaml\n{_body(text)}```")
    return "\n\n".join(parts)


def _spec_table(registry: Any) -> str:
    rows = []
    for name in registry.names("spec"):
        config = sma.load_spec(name)
        kind = registry.name_of(config.owner)
        sizes = [f"{count_parameters(config):,}", str(config.n_layers), str(config.d_model)]
        rows.append([f"[`{name}`](#{name.replace('_', '-')})", f"`{kind}`", *sizes])
    return table(["spec", "model", "parameters", "layers", "width"], rows)


def _size(name: str) -> str:
    return f"{count_parameters(sma.load_spec(name)):,} parameters."


def _comment(text: str) -> str:
    """The comment lines at the top."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _body(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def recipes() -> str:
    """The shipped recipes and their numbers."""
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        o, t = recipe.optimiser, recipe.train
        registry = sma.plugins.registry()
        batch = f"{t.batch_size}" + (f" in {t.accumulate} parts" if t.accumulate > 1 else "")
        length = f" x {recipe.data.seq_len}" if hasattr(recipe.data, "seq_len") else ""
        rows.append(
            [
                f"`{name}`",
                f"`{registry.name_of(recipe.data.owner)}`",
                o.algorithm,
                f"{o.lr:g}",
                f"{o.weight_decay:g}",
                f"{o.clip:g}" if o.clip else "-",
                batch + length,
                f"{t.steps:,}",
                f"{o.warmup:,}" + (f" (power {o.power:g})" if o.power != 1 else ""),
            ]
        )
    return table(["recipe", "data", "optimiser", "lr", "weight decay", "clip", "batch", "steps", "warm-up"], rows)


def recipe_models() -> str:
    """The models of the recipes that are one block of SeqBoat over and over."""
    rows = []
    for name in recipe_names():
        model = load_recipe(name).model
        block = model.blocks[0]
        gau, norm = block.activate.module, sma.plugins.registry().name_of(block.norm.owner)
        rows.append(
            [
                f"`{name}`",
                str(model.n_layers),
                f"{model.d_model} / {gau.d_v} / {gau.d_qk}",
                f"{norm}, {'pre' if block.prenorm else 'post'}",
                gau.activation,
                str(gau.window),
                gau.positions + (" + sinusoidal" if getattr(model, "positions", "") == "sinusoidal" else ""),
                f"{block.activate.configurator.init_temp:g}",
                f"{model.dropout:g}",
                f"{block.mixer.truncation or '-'}",
                f"{count_parameters(model):,}",
            ]
        )
    head = [
        "recipe",
        "layers",
        "D / h / z",
        "norm",
        "attention",
        "window",
        "positions",
        "initial temperature",
        "dropout",
    ]
    return table([*head, "EMA truncation", "parameters"], rows)


def commands() -> str:
    """Every command of ``sma`` with its arguments and options."""
    group: Any = typer.main.get_command(command_line)
    parts = []
    for name, command in group.commands.items():
        arguments = [_argument(each) for each in command.params if each.param_type_name == "argument"]
        usage = " ".join(["sma", name, *arguments, "[OPTIONS]"])
        rows = [[f"`{_names(each)}`", _meaning(each)] for each in command.params if not each.hidden]
        parts.append(f"## sma {name}\n\n{command.help}\n\n```text\n{usage}\n```\n\n{table(['', 'meaning'], rows)}")
    return "\n\n".join(parts)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _names(parameter: Any) -> str:
    return ", ".join(parameter.opts) if parameter.param_type_name == "option" else _argument(parameter)


def _meaning(parameter: Any) -> str:
    text = parameter.help or ""
    if parameter.param_type_name != "option":
        return text
    default = parameter.default
    if parameter.required:
        text += " Required."
    elif default is not None and default is not False:
        text += f" Default: `{default}`." if str(default).strip() else " Default: a line break."
    return text + (f" Also from `{parameter.envvar}`." if parameter.envvar else "")


def summary_of(value: Any) -> str:
    """The first paragraph of the docstring, in Markdown."""
    summary = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", summary).replace("``", "`").removesuffix("::")


def default_of(field: Any) -> str:
    """The default of a field of a configuration, as a spec writes it."""
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        made = field.default_factory()
        owner = getattr(type(made), "owner", None)
        name = sma.plugins.registry().name_of(owner) if owner else None
        return f"`{name}`" if name else "its own defaults"
    else:
        return "required"
    value = list(value) if isinstance(value, tuple) else value
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown}`" if shown else "empty"


def names() -> str:
    """Everything that ``import sma`` gives."""
    rows = []
    for name in sorted(sma.__all__, key=str.lower):
        value = getattr(sma, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            role = "class" if inspect.isclass(value) else "func"
            path = f"{value.__module__}.{value.__qualname__}"
            rows.append([f"{{py:{role}}}`sma.{name} <{path}>`", summary_of(value)])
        elif inspect.ismodule(value):
            rows.append([f"`sma.{name}`", summary_of(value)])
    return table(["name", ""], rows)


PARTS: dict[str, Callable[[], str]] = {
    "specs": specs,
    "recipes": recipes,
    "recipe_models": recipe_models,
    "commands": commands,
    "names": names,
    "tools_and_parts": tools_and_parts,
    **BENCHMARKS,
}
