"""Run the experiments and read their results.

    python -m experiments status [DIR]                    # the runs of the queue, and which are done
    python -m experiments run --minutes 9 --out DIR       # the next runs; goes on from what lies in DIR
    python -m experiments collect DIR                     # take the results over into experiments/NAME/results
    python -m experiments table NAME                      # the table and the figures of an experiment

`run` ends within the minutes, and leaves `results.tar` and `checkpoints*.tar` (16 MiB each at most) in DIR, or in the
folder that `--pack` names. `--carried FOLDER` unpacks such files first.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from experiments import packing, plan, results
from experiments.runner import Limits, Runner, outstanding
from sma.errors import SMAError

RESERVE = 20.0
"""Seconds kept back for saving and packing."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (SMAError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=plan.ROOT, help="folder of the experiments and their queue.yaml")
    commands = parser.add_subparsers(required=True, metavar="status|run|collect|table")
    status = commands.add_parser("status", help="what is done and what is next")
    status.set_defaults(command=show_status)
    status.add_argument("out", nargs="?", type=Path, metavar="DIR", help="a working folder")
    run = commands.add_parser("run", help="work on the queue")
    run.set_defaults(command=run_queue)
    run.add_argument("--minutes", type=float, required=True, help="for everything, saving and packing included")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="working folder, to go on from as well")
    run.add_argument("--together", type=int, default=1, metavar="N", help="runs at a time")
    run.add_argument("--only", default="", metavar="WORDS", help="only runs whose names hold one of these words")
    run.add_argument("--carried", type=Path, metavar="FOLDER", help="tar files to unpack into DIR first")
    run.add_argument("--pack", type=Path, metavar="FOLDER", help="where the tar files go; DIR by default")
    run.add_argument("--retry", action="store_true", help="try again what failed")
    run.add_argument("--commit", help="written into the results, where there is no git")
    collect = commands.add_parser("collect", help="take results over into the project")
    collect.set_defaults(command=collect_results)
    collect.add_argument("sources", nargs="+", type=Path, metavar="DIR", help="working folders, or those of tar files")
    table = commands.add_parser("table", help="table and figures of an experiment")
    table.set_defaults(command=show_table)
    table.add_argument("name", help="of the experiment")
    return parser


def show_status(options: argparse.Namespace) -> int:
    """List the queue."""
    next_one = "->"
    for entry in plan.read_queue(options.root):
        record = results.best(entry, options.out, options.root)
        state = results.state(record)
        steps = f"{record['steps'] if record else 0:,} of {entry.steps:,} steps"
        reason = f": {record['failed']}" if record and state == "failed" else ""
        mark, next_one = ("", next_one) if state in ("done", "failed") else (next_one, "")
        print(f"{mark:2} {state:8} {entry.key:45} {steps}{reason}")
    return 0


def run_queue(options: argparse.Namespace, **limits: Any) -> int:
    """Work on the queue until the time is up."""
    deadline = time.monotonic() + 60 * options.minutes - RESERVE
    signal.signal(signal.SIGTERM, _leave)
    pack = options.pack or options.out
    options.out.mkdir(parents=True, exist_ok=True)
    if options.carried is not None and options.carried.is_dir():
        print(f"{packing.unpack(options.carried, options.out)} files from {options.carried}")
    words = [word for word in options.only.split(",") if word] or [""]
    entries = [each for each in plan.read_queue(options.root) if any(word in each.key for word in words)]
    runner = Runner(
        options.out.resolve(),
        results.environment(options.commit),
        Limits(**{"deadline": deadline, "together": options.together, **limits}),
        say=_Log(),
        root=options.root,
        finished=lambda: packing.pack_results(options.out, pack),
    )
    try:
        failures = runner.work(outstanding(entries, options.out, options.root, retry=options.retry))
    finally:
        _pack(runner, options, pack)
    left = outstanding(entries, options.out, options.root)
    print(f"{len(entries) - len(left)} of {len(entries)} runs done or failed; next: {left[0].key if left else 'none'}")
    return 1 if failures else 0


class _Log:
    """Prints with the seconds since the beginning."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", flush=True)


def _leave(signum: int, frame: Any) -> None:
    signal.signal(signum, signal.SIG_IGN)
    sys.exit(128 + signum)


def _pack(runner: Runner, options: argparse.Namespace, pack: Path) -> None:
    """Pack the working folder, also the runs that this call did not work on."""
    packing.pack_results(options.out, pack)
    unfinished = outstanding(plan.read_queue(options.root), options.out, options.root, retry=True)
    folders = [runner.run_folder(entry) for entry in unfinished]
    for run in packing.pack_checkpoints(runner.folder, [each for each in folders if each.is_dir()], pack):
        print(f"not packed: {run}, larger than {packing.LIMIT // 2**20} MiB or one too many")


def collect_results(options: argparse.Namespace) -> int:
    """Take results over into the project."""
    changed, strangers = results.collect(options.sources, options.root)
    for place in strangers:
        print(f"left out, as no run of the queue is defined like this: {place}", file=sys.stderr)
    print("\n".join(os.path.relpath(path) for path in changed) or "nothing new")
    return 0


def show_table(options: argparse.Namespace) -> int:
    """Print the table of an experiment and draw its figures."""
    from experiments.tables import draw, table

    print(table(options.name, options.root))
    for path in draw(options.name, options.root):
        print(os.path.relpath(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
