"""The documentation's page of results, as Markdown, from the files in ``benchmarks/results``.

Of every workload the latest measurement at full size is shown, for each device, and also an earlier one that has other
models beside ours; of every sweep and profile the latest of all. What was found about a workload in words is kept
beside the numbers, in ``benchmarks/results/notes/<workload>.md``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.archive import RESULTS, STATIC, TEXT, figure_name, latest_streams, latest_sweeps, read, records_of
from benchmarks.tables import (
    EXACT_HEAD,
    GREEDY_HEAD,
    HEAD,
    PROFILE_HEAD,
    STREAM_HEAD,
    exact_cells,
    exact_title,
    greedy_cells,
    markdown_table,
    profile_cells,
    remarks,
    serving_about,
    serving_cells,
    stream_cells,
    workload_cells,
)

NOTHING = "Nothing has been measured yet: `python -m benchmarks --json benchmarks/results/NAME.json` does."


def streams(folder: Path = RESULTS) -> str:
    """The table of the latest stream, and its figure."""
    found = latest_streams(records_of(folder))
    if not found:
        return NOTHING
    parts = [f"{found[-1]['title']}. {_environment(found[-1]['environment'])}"]
    if (STATIC / figure_name("stream")).exists():
        parts.append(f"![Times and memory along a stream](../_static/{figure_name('stream')})")
    return "\n\n".join([*parts, markdown_table(STREAM_HEAD, stream_cells(found[-1]))])


def exactness(folder: Path = RESULTS) -> str:
    """For each device and dtype the latest: how far the ways of reading are apart, and how long greedy texts agree."""
    found: dict[tuple[str, str], str] = {}
    for record in records_of(folder):
        for result in record.get("exactness", []):
            environment = record["environment"]
            parts = [f"{exact_title(result)}. {_environment(environment)}"]
            parts.append(markdown_table(EXACT_HEAD, exact_cells(result)))
            parts.append(markdown_table(GREEDY_HEAD, greedy_cells(result)))
            found[environment["device"], result["dtype"]] = "\n\n".join(parts)
    return "\n\n".join(found.values()) or NOTHING


def workloads(folder: Path = RESULTS) -> str:
    """A section for every workload: what it is, the table, and what was found."""
    found: dict[str, list[str]] = {}
    shown: dict[tuple[str, str], set[str]] = {}
    for record in reversed(records_of(folder)):
        device = record["environment"]["device"]
        for name in dict.fromkeys(row["workload"] for row in record.get("rows", [])):
            models = {row["model"] for row in record["rows"] if row["workload"] == name}
            known = shown.setdefault((name, device), set())
            if not models <= known:  # a later one does not have them all
                found.setdefault(name, []).append(_section(name, record))
            known |= models
    notes = folder / "notes"
    parts = []
    for name, sections in sorted(found.items(), key=lambda item: _place(item[0])):
        note = notes / f"{name}.md"
        words = [note.read_text(encoding="utf-8").strip()] if note.exists() else []
        parts.append("\n\n".join([f"### {name}", *sections, *words]))
    return "\n\n".join(parts) or NOTHING


def _place(workload: str) -> int:
    """Where a workload stands in the list; those of earlier versions come last."""
    from benchmarks.workloads import WORKLOADS

    known = list(WORKLOADS)
    return known.index(workload) if workload in known else len(known)


def _section(name: str, record: dict[str, Any]) -> str:
    rows = [row for row in record["rows"] if row["workload"] == name]
    # Earlier files name no rows to compare with: their first row is ours, and there is no peer.
    about = record.get("workloads", {}).get(name, {"ours": rows[0]["model"], "peer": ""})
    timed = [row for row in rows if row.get("train_ms") or row.get("forward_ms")]
    what = [about["title"] + "."] if "title" in about else []
    if about.get("train"):
        what.append(f"Train: {about['train']}.")
    if about.get("peer"):
        what.append(f"Peer: {about['peer']}; ours: {about['ours']}.")
    what.append(_environment(record["environment"]))
    parts = [" ".join(what), markdown_table(HEAD, workload_cells(timed, about))]
    if remarks(rows):
        parts.append("Remarks: " + "; ".join(remarks(rows)) + ".")
    return "\n\n".join(parts)


def _environment(environment: dict[str, Any]) -> str:
    known = (("torch", "torch"), ("triton", "triton"), ("flash-linear-attention", "fla"), ("sma", "sma"))
    versions = [f"{short} {environment[name]}" for name, short in known if environment.get(name)]
    commit, date = environment.get("commit"), environment.get("date", "")[:10]
    parts = [environment["device"], environment["dtype"], *versions]
    parts += [f"commit {commit}"] if commit else []
    return ", ".join([*parts, *([date] if date else [])]) + "."


def sweeps(folder: Path = RESULTS) -> str:
    """The figures, and where sparse and dense cross."""
    found = latest_sweeps(records_of(folder))
    parts = []
    for name in dict.fromkeys(sweep["sweep"] for sweep in found):
        own = [sweep for sweep in found if sweep["sweep"] == name]
        if (STATIC / figure_name(name)).exists():
            parts.append(f"![Times over {own[0]['axis']}](../_static/{figure_name(name)})")
        parts.append("\n".join(f"- {_crossing(sweep)}" for sweep in own))
    return "\n\n".join(parts) or NOTHING


def _crossing(sweep: dict[str, Any]) -> str:
    where = sweep.get("crossover_train_ms")
    found = f"as fast as always-on at {sweep['axis']} {where:.3g}" if where else "no crossing in the range"
    return f"{sweep['title']}: {found} ({_environment(sweep['environment'])[:-1]})."


def profiles(folder: Path = RESULTS) -> str:
    """A table for every workload that was profiled."""
    found: dict[str, str] = {}
    for record in records_of(folder):
        for profile in record.get("profiles", []):
            limits = profile["ceilings"]
            title = (
                f"### Inside {profile['workload']}\n\nA training step at r {profile['share']:.2f} took "
                f"{profile['wall_ms']:.3g} ms. Measured in the same run: copies at {limits['bandwidth'] / 1e12:.2f} "
                f"TB/s, matrix products at {limits['arithmetic'] / 1e12:.0f} TFLOP/s. "
            )
            table = markdown_table(PROFILE_HEAD, profile_cells(profile))
            found[profile["workload"]] = f"{title}{_environment(record['environment'])}\n\n{table}"
    return "\n\n".join(found.values()) or NOTHING


PAPER = 0.8960
"""Accuracy on the Text task of Long Range Arena (arXiv 2306.11197, table 2)."""


def text_run(folder: Path = TEXT) -> str:
    """The Text task trained to its end: a line for each seed, and their mean."""
    head = ("seed", "steps", "test accuracy", "minutes", "ms a step", "MiB", "active per layer at the end", "device")
    lines, found = [], []
    for run in sorted(folder.iterdir()) if folder.exists() else []:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        test, seconds = summary["test"], summary["training_seconds"]
        rates = ", ".join(f"{100 * rate:.2g} %" for each in test["activation_rate"].values() for rate in each)
        found.append(test["accuracy"])
        minutes, each = f"{seconds / 60:.1f}", f"{1e3 * seconds / summary['steps']:.1f}"
        cells = [f"{summary['steps']:,}", f"{100 * test['accuracy']:.2f} %", minutes, each]
        memory = f"{summary['peak_memory_mib']:,}"
        lines.append([run.name.removeprefix("seed"), *cells, memory, rates, summary["device"]])
    if not lines:
        return NOTHING
    mean = sum(found) / len(found)
    words = f"Mean {100 * mean:.2f} % over {len(found)} run(s); the paper has {100 * PAPER:.2f} %."
    return f"{markdown_table(head, lines)}\n\n{words}"


def serving(folder: Path = RESULTS / "serving") -> str:
    """For every measurement the servers, and a table."""
    head = ("server", "clients", "requests/s", "tokens/s", "first token ms", "99 %", "next token ms", "99 %", "whole s")
    parts = []
    for file in sorted(folder.glob("*.json")):
        record = read(file)
        low, high = record["prompt_bytes"]
        title = f"Prompts of {low} to {high} bytes, {record['rows'][0]['tokens']} bytes written."
        servers = "\n".join(f"- {line}." for server in record["servers"] for line in serving_about(server))
        parts += [f"{title} {_environment(record['environment'])}", servers]
        parts.append(markdown_table((*head, "99 %"), serving_cells(record["rows"])))
    return "\n\n".join(parts) or NOTHING


PARTS = {
    "benchmark_serving": serving,
    "text_run": text_run,
    "benchmark_workloads": workloads,
    "benchmark_sweeps": sweeps,
    "benchmark_profiles": profiles,
    "benchmark_streams": streams,
    "benchmark_exactness": exactness,
}
"""What the documentation fills in, by the name of its mark."""
