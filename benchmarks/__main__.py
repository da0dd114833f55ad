"""Measure the library against its peers.

    python -m benchmarks                                    # every workload of this device, at full size
    python -m benchmarks run text-4k lm-8k --json FILE      # some, written to a file after each
    python -m benchmarks run --rows ours,flash --rounds 9   # rows whose labels hold one of these words
    python -m benchmarks run text-4k --without "(fla)"      # or without them: some take minutes to compile
    python -m benchmarks run --device cpu --scale small     # everything in moments, to see that it runs
    python -m benchmarks sweep rate width --json FILE       # activation rates, lengths, widths
    python -m benchmarks profile text-4k --json FILE        # where the time of a training step goes
    python -m benchmarks stream --json FILE                 # ten million tokens prefilled, decoding at points
    python -m benchmarks exact RUN --json FILE              # one sequence in every way: how the logits differ
    python -m benchmarks draw                               # figures of the documentation, from benchmarks/results

A row is timed only if a small case of it is right. All rows of a workload take turns, round after round, so the ratios
between them are more reliable than the milliseconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import measure
from benchmarks.results import ROOT, Record, environment
from benchmarks.subjects import Setting
from benchmarks.tables import HEAD, remarks, text_table, workload_cells
from benchmarks.timing import Clock
from benchmarks.workloads import WORKLOADS

COMMANDS = ("run", "sweep", "profile", "stream", "exact", "draw")


def main(arguments: list[str] | None = None) -> None:
    """The command line; without a command it is ``run``."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] not in (*COMMANDS, "-h", "--help"):
        given = ["run", *given]
    options = _parser().parse_args(given)
    options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name, command, meaning in (
        ("run", run, "time the workloads"),
        ("sweep", sweep, "time modules over a range of rates, lengths or widths"),
        ("profile", profile, "split a training step into its parts, against what the device could do"),
        ("stream", stream, "read a long stream and decode at points along it; NAME is a number of tokens"),
    ):
        each = commands.add_parser(name, help=meaning)
        each.set_defaults(command=command)
        each.add_argument("names", nargs="*", metavar="NAME", help="of workloads (or sweeps); all by default")
        each.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
        _add_common(each)
        each.add_argument("--scale", choices=("full", "small"), default="full", help="small: to see that it runs")
        each.add_argument("--rounds", type=int, default=5)
        each.add_argument("--rows", default="", metavar="WORDS", help="only rows with one of these words, by commas")
        each.add_argument("--without", default="", metavar="WORDS", help="no rows with one of these words")
        each.add_argument("--reference", type=Path, metavar="PATH", help="the published standalone SeqBoat")
    _add_exact(commands)
    draw = commands.add_parser("draw", help="figures from the results of sweeps")
    draw.set_defaults(command=draw_figures)
    draw.add_argument("files", nargs="*", type=Path, help="by default all of benchmarks/results")
    draw.add_argument("--out", type=Path, default=ROOT / "docs" / "_static")
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--json", type=Path, metavar="FILE")


def _add_exact(commands: Any) -> None:
    exact = commands.add_parser("exact", help="one sequence, processed in every way: how far the logits are apart")
    exact.set_defaults(command=exactness, scale="full")
    exact.add_argument("run", metavar="RUN", help="a run, weights and spec in a .safetensors, or a Transformers folder")
    exact.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER")
    exact.add_argument("--tokens", type=int, default=100_000)
    exact.add_argument("--text", type=Path, metavar="FILE", help="by default Python that lm_stdlib does not train on")
    exact.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="float32")
    _add_common(exact)


def run(options: argparse.Namespace) -> None:
    """Time workloads."""
    setting, record, clock = _start(options)
    natural = [n for n, w in WORKLOADS.items() if w.device == setting.device.type or options.scale == "small"]
    for name in _chosen(options.names, natural, list(WORKLOADS)):
        workload = WORKLOADS[name]
        rows = [row for row in workload.rows if _wanted(row.label, options)]
        size = _sized(setting, workload.batch, workload.length, options.scale)
        results = measure(name, rows, size, options.rounds, clock)
        about = {"title": workload.title, "ours": workload.ours, "peer": workload.peer, "train": workload.train}
        record.workloads[name] = about
        record.rows.extend(results)
        record.write(options.json)
        print(f"\n{name}: {workload.title}; train: {workload.train}")
        written = [vars(result) for result in results]
        print("\n".join([*remarks(written), text_table(HEAD, workload_cells(written, about))]), flush=True)


def sweep(options: argparse.Namespace) -> None:
    """Time modules over a range."""
    from benchmarks.sweeps import SWEEPS, show, sweep_over

    setting, record, clock = _start(options)
    for name in _chosen(options.names, list(SWEEPS), list(SWEEPS)):
        for result in sweep_over(name, setting, options.scale == "small", options.rounds, clock):
            record.sweeps.append(result)
            record.write(options.json)
            print(show(result), flush=True)


def profile(options: argparse.Namespace) -> None:
    """Split training steps into their parts."""
    from benchmarks.profiles import PROFILED, ceilings, profile_of, show

    setting, record, _ = _start(options)
    limits = ceilings(setting)
    print(f"measured: copy {limits.bandwidth / 1e12:.3f} TB/s, matrix product {limits.arithmetic / 1e12:.3f} TFLOP/s")
    for name in _chosen(options.names, list(PROFILED), list(PROFILED)):
        workload = WORKLOADS[name]
        size = _sized(setting, workload.batch, workload.length, options.scale)
        record.profiles.append(profile_of(name, size, limits))
        record.write(options.json)
        print(show(record.profiles[-1]), flush=True)


def stream(options: argparse.Namespace) -> None:
    """Read a long stream."""
    from benchmarks.streaming import TOKENS, show, stream

    if not all(name.isdecimal() and int(name) for name in options.names):
        sys.exit(f"a stream is as long as a number says, got {' '.join(options.names)}")
    setting, record, clock = _start(options)
    small = options.scale == "small"
    for tokens in [int(name) for name in options.names] or [1000 if small else TOKENS]:
        result = stream(setting.small() if small else setting, tokens, options.rounds, clock)
        record.streams.append(result)
        record.write(options.json)
        print(show(result), flush=True)


def exactness(options: argparse.Namespace) -> None:
    """Process a sequence in every way."""
    from benchmarks.exactness import exactness, read_model, read_text, show

    setting, record, _ = _start(options)
    model = read_model(options.run, options.runs, setting.device, setting.dtype)
    record.exactness.append(exactness(model, read_text(options.text, options.tokens)))
    record.write(options.json)
    print(show(record.exactness[-1]))


def draw_figures(options: argparse.Namespace) -> None:
    """Draw what sweeps measured."""
    from benchmarks.figures import draw, draw_text_run

    for path in draw(options.files or sorted((ROOT / "benchmarks" / "results").glob("*.json")), options.out):
        print(path)
    if not options.files:
        print(draw_text_run(options.out))


def _start(options: argparse.Namespace) -> tuple[Setting, Record, Clock]:
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    about = environment(device, dtype, options.scale)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    return Setting(device, dtype, reference=getattr(options, "reference", None)), Record(about), Clock(device)


def _sized(setting: Setting, batch: int, length: int, scale: str) -> Setting:
    sized = setting.of(batch, length)
    return sized.small() if scale == "small" else sized


def _chosen(names: list[str], default: list[str], known: list[str]) -> list[str]:
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"nothing is named {', '.join(unknown)}; there are {', '.join(known)}")
    return names or default


def _wanted(label: str, options: argparse.Namespace) -> bool:
    def holds(words: str) -> bool:
        return any(word.strip() in label for word in words.split(","))

    return (not options.rows or holds(options.rows)) and not (options.without and holds(options.without))


if __name__ == "__main__":
    main()
