"""The kept results of benchmarks: where they are, the latest of each kind, and the names of their figures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STATIC = Path(__file__).parent.parent / "docs" / "_static"
TEXT = RESULTS / "text"


def read(file: Path) -> dict[str, Any]:
    """A file of results, also of earlier versions; empty for any other JSON."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) and "environment" in content else {}


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Every file of results at full size, the latest last."""
    records = [record for file in sorted(folder.glob("*.json")) if (record := read(file))]
    full = [record for record in records if record["environment"].get("scale", "full") == "full"]
    return sorted(full, key=_order)


def _order(record: dict[str, Any]) -> tuple[bool, str]:
    """Later ones replace earlier ones, and those of a GPU those of a CPU."""
    environment = record["environment"]
    return environment.get("kind") == "cuda", environment.get("date", "")


def latest_sweeps(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sweeps of all files; of the same one the latest."""
    found = {}
    for record in sorted(filter(None, records), key=_order):
        for sweep in record.get("sweeps", []):
            found[sweep["sweep"], sweep["title"]] = sweep | {"environment": record["environment"]}
    return list(found.values())


def latest_streams(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The streams of all files, the latest last."""
    known = sorted(filter(None, records), key=_order)
    return [stream | {"environment": record["environment"]} for record in known for stream in record.get("streams", [])]


def figure_name(sweep: str) -> str:
    """The file of one sweep's figure."""
    return f"speed_{re.sub(r'[^a-z0-9]+', '_', sweep.lower())}.svg"
