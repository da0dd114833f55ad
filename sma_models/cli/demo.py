"""``sma demo``: train a small language model in minutes, and show that it learned and what it activates."""

from __future__ import annotations

from typing import Annotated

import typer

from sma_models.cli.common import RUNS, RunsOption, extra, notes, out

PROMPT = "def "


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe lm_stdlib.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; by default the time.")] = None,
    runs: RunsOption = RUNS,
) -> int:
    """Train a small language model of Python source on the CPU, in about three minutes, and look inside."""
    with extra("train"):
        from sma_models.cli.report import report
        from sma_models.cli.training import train
        from sma_models.training.loop import open_task
        from sma_models.training.run import find_run
    from sma_models import reports

    screen = out()
    screen.print("The recipe lm_stdlib: a SeqBoat language model on the source files of the Python standard library.")
    code = train(["lm_stdlib", "train.device=cpu", *(overrides or [])], name=name, resume=None, runs=runs)
    if code:
        return code
    run = find_run(f"lm_stdlib/{name}" if name else "lm_stdlib", runs)
    recipe = run.recipe()
    task, model, summary = open_task(recipe), run.model(), run.read_summary()
    assert task.text is not None
    held_out = task.text("test")
    notes().print(f"comparing on the {len(held_out):,} held-out bytes")
    results = {"this model": summary["test"]["bits_per_byte"], **reports.baselines(task.text("train"), held_out)}
    screen.print(reports.compression_table(results))
    count = report(run, model, task, recipe.train, screen)
    _sample(model)
    run.write_summary(
        {**summary, "baselines": results} | ({"operations_saved": count.saved} if count is not None else {})
    )
    screen.print(f"everything is in {run.path}; next: sma inspect {run.path}", soft_wrap=True)
    return 0


def _sample(model: object) -> None:
    from sma_models.cli.inspection import byte_model, generated_text

    typer.echo("\nA sample:\n")
    typer.echo(PROMPT + "".join(generated_text(byte_model(model), PROMPT.encode(), 400, seed=0, temperature=0.7)))  # type: ignore[arg-type]
    typer.echo()
