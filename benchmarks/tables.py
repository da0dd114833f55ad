"""From results to tables, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.timing import Spread, times_as_fast

HEAD = ("model", "r", "train ms", "min..max", "x peer", "x ours", "forward ms", "x peer", "MiB", "waits")


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def factor(value: float | None) -> str:
    """How many times as fast."""
    return "-" if value is None else f"{value:.2f}"


def workload_cells(rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> list[list[str]]:
    """One line of cells for each row of a workload, under :data:`HEAD`.

    Args:
        rows: results.
        about: the labels of the rows ``ours`` and ``peer``.
    """
    named = {row["model"]: row for row in rows}
    ours, peer = (named.get(about.get(key, ""), {}) for key in ("ours", "peer"))
    lines = []
    for row in rows:
        # Rows without a training step are compared by their forward passes.
        main = "train_ms" if row.get("train_ms") else "forward_ms"
        spread, train, forward = (Spread.of(row.get(key)) for key in (main, "train_ms", "forward_ms"))
        share, memory, waits = row.get("share"), row.get("train_mib"), row.get("waits")
        lines.append(
            [
                row["model"],
                "-" if share is None else f"{share:.2f}",
                milliseconds(train.median) if train else "-",
                f"{milliseconds(spread.low)}..{milliseconds(spread.high)}" if spread else "-",
                factor(times_as_fast(row.get("train_ms"), peer.get("train_ms"))),
                factor(times_as_fast(row.get(main), ours.get(main))),
                milliseconds(forward.median) if forward else "-",
                factor(times_as_fast(row.get("forward_ms"), peer.get("forward_ms"))),
                "-" if memory is None else f"{memory:,.0f}",
                "-" if waits is None else str(waits),
            ]
        )
    return lines


PROFILE_HEAD = ("part", "calls", "ms", "share", "floor ms", "x floor")


def profile_cells(profile: Mapping[str, Any]) -> list[list[str]]:
    """One line of cells for each group, the longest first, and one for the step."""
    busy = sum(group["ms"] for group in profile["groups"])
    lines = []
    for group in sorted(profile["groups"], key=lambda group: -group["ms"]):
        floor, spent = group["floor_ms"], group["ms"]
        over = f"{spent / floor:.1f}" if floor and spent else "-"
        floor_cell = milliseconds(floor) if floor else "-"
        share = f"{spent / busy:.0%}" if busy else "-"
        lines.append([group["group"], f"{group['calls']:.0f}", milliseconds(spent), share, floor_cell, over])
    floors = sum(group["floor_ms"] or 0.0 for group in profile["groups"])
    calls = sum(group["calls"] for group in profile["groups"])
    lines.append(
        ["all of it", f"{calls:.0f}", milliseconds(busy), "100%", milliseconds(floors), f"{busy / floors:.1f}"]
    )
    idle = max(profile["wall_ms"] - busy, 0.0)
    lines.append(["the device waits", "-", milliseconds(idle), "-", "-", "-"])
    return lines


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why rows, or parts of them, were not measured, and what else has to be known about them."""
    failed = [f"{row['model']}: {row['error']}" for row in rows if row.get("error")]
    return failed + [
        f"{row['model']}: {row['overflow']} tokens dropped for lack of capacity" for row in rows if row.get("overflow")
    ]


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal."""
    cells = [list(head), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    rows = []
    for line in cells:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        rows.append("  ".join([line[0].ljust(widths[0]), *numbers]))
    return "\n".join(rows)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of the documentation."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows)


STREAM_HEAD = ("tokens", "read, ms per 1,000", "step ms", "min..max", "state MiB", "allocated MiB")


def stream_cells(stream: Mapping[str, Any]) -> list[list[str]]:
    """A line for each point of a stream."""
    lines = []
    for point in stream["points"]:
        step, allocated = Spread.of(point["step_ms"]), point["allocated_mib"]
        lines.append(
            [
                f"{point['tokens']:,}",
                milliseconds(point["read_ms"]),
                milliseconds(step.median) if step else "-",
                f"{milliseconds(step.low)}..{milliseconds(step.high)}" if step else "-",
                f"{point['state_mib']:.2f}",
                "-" if allocated is None else f"{allocated:,.0f}",
            ]
        )
    return lines


EXACT_HEAD = ("read", "logits off by", "in the first 1,000", "in the first 10,000", "relative", "decisions that differ")


def exact_title(result: Mapping[str, Any]) -> str:
    """The sequence and the model of a measurement."""
    return (
        f"{result['tokens']:,} bytes of text, {result['layers']} layers of width {result['width']}, trained to "
        f"{result['bits_a_byte']:.2f} bits a byte, {result['dtype']}; logits up to {result['largest_logit']:.1f}"
    )


def exact_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each way of reading, against the parallel pass."""
    lines = []
    for row in result["rows"]:
        decisions = "-" if row["decisions"] is None else f"{row['decisions']:,}"
        along = [f"{apart:.1e}" for apart in row["along"]]
        along += ["-"] * (2 - len(along))  # the sequence was shorter
        lines.append([row["way"], f"{row['logits']:.1e}", *along, f"{row['relative']:.1e}", decisions])
    return lines


GREEDY_HEAD = ("greedy after", "tokens", "again", "Transformers", "served", "parallel")


def greedy_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each point: tokens that are the same, from the first one on."""
    return [
        [f"{point['after']:,}", str(point["tokens"]), *(str(point["same"][way]) for way in GREEDY_HEAD[2:])]
        for point in result["greedy"]
    ]


def serving_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each row of servers, those with as many clients side by side: medians, and 99th percentiles."""
    lines = []
    for row in sorted(rows, key=lambda row: row["clients"]):
        numbers = [f"{row['clients']}", f"{row['requests_per_s']:.1f}", f"{row['tokens_per_s']:.0f}"]
        numbers += [f"{value:.1f}" for key in ("first_token_ms", "next_token_ms") for value in row[key]]
        lines.append([row["server"], *numbers, *(f"{value:.2f}" for value in row["whole_s"])])
    return lines


def serving_about(server: Mapping[str, Any]) -> list[str]:
    """The description of a server in a line, and a line for each part that was not measured, with the reason."""
    failed = [f"{server['server']}, not measured: {reason}" for reason in server.get("failed", [])]
    if "version" not in server:
        return failed
    what = [f"{server['server']} {server['version']}: {server['model']}"]
    what += [f"{server['parameters']:,} parameters"] if "parameters" in server else []
    what += [f"{server['slots']} slots", server["how"]]
    if "attention" in server:
        what += [f"attention {server['attention']}", f"at most {server['tokens_a_step']:,} tokens a step"]
        what += ["CUDA graphs"] if server["cuda_graphs"] else []
        what += ["the next step prepared meanwhile"] if server["asynchronous"] else []
    return [", ".join(what), *failed]
