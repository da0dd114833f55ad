"""What a server gives its clients, with more and more of them: ``python -m benchmarks.serving``.

``sma serve`` runs in a process of its own, the clients in this one. Each asks for a text, reads it as a stream to its
end, and asks for the next; prompts are random bytes of 64 to 512. Every text must have the length that was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sma
from benchmarks.results import environment
from benchmarks.tables import serving_cells, text_table
from sma.weights import save

ROOT = Path(__file__).parent.parent
PROMPTS = (64, 512)
HEAD = ("clients", "requests/s", "tokens/s", "first token ms", "", "next token ms", "", "whole s", "")
UNDER = ("", "", "", "p50", "p99", "p50", "p99", "p50", "p99")


@dataclass(frozen=True)
class Heard:
    """One request: seconds to the first token, between tokens, and to the end."""

    first: float
    between: list[float]
    whole: float


@contextlib.contextmanager
def serving(run: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """``sma serve`` on a port that is free, in a process of its own: host and port."""
    command = [sys.executable, "-m", "sma_models.cli", "serve", run, "--port", "0", *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        if not said.startswith("serving "):
            raise RuntimeError(f"sma serve: {said or 'ended without a word'}")
        host, _, port = said.split()[-1].removeprefix("http://").rpartition(":")
        yield host, int(port)
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()


async def ask(place: tuple[str, int], prompt: list[int], tokens: int) -> Heard:
    """One request on a connection of its own, read line by line: a real client would take more time than the server.

    Raises:
        RuntimeError: the answer is an error, or is not whole.
    """
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True, "logprobs": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(*place)
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    times: list[float] = []
    done = False
    async for line in reader:
        if line.startswith(b"data: {"):  # with log-probabilities there is an object for every token
            times.append(time.perf_counter())
        done = done or line == b"data: [DONE]\n"
        last = line
    writer.close()
    if not done or len(times) != tokens:
        raise RuntimeError(f"a request for {tokens} tokens got {len(times)}, and at the end {last!r}")
    return Heard(times[0] - begun, [b - a for a, b in itertools.pairwise(times)], times[-1] - begun)


async def load(place: tuple[str, int], clients: int, requests: int, tokens: int) -> dict[str, Any]:
    """So many clients, until so many requests are answered."""
    draw = random.Random(clients)
    prompts = [[draw.randrange(256) for _ in range(draw.randint(*PROMPTS))] for _ in range(requests)]
    heard: list[Heard] = []

    async def client() -> None:
        while prompts:
            heard.append(await ask(place, prompts.pop(), tokens))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return {
        "clients": clients,
        "requests": requests,
        "tokens": tokens,
        "requests_per_s": requests / seconds,
        "tokens_per_s": requests * tokens / seconds,
        "first_token_ms": quantiles([1e3 * each.first for each in heard]),
        "next_token_ms": quantiles([1e3 * gap for each in heard for gap in each.between]),
        "whole_s": quantiles([each.whole for each in heard]),
    }


def quantiles(values: list[float]) -> list[float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.5, 0.99)]


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write it down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("run", nargs="?", help="a run or weights; by default random weights of --spec")
    parser.add_argument(
        "--spec", default="seqboat_small_lm", help="its name, and changes to it: 'seqboat_lm n_layers=4'"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--requests", type=int, default=4, help="for each client")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    about = environment(torch.device(options.device), getattr(torch, dtype), "full")
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    with tempfile.TemporaryDirectory() as folder:
        run = options.run
        if run is None:
            torch.manual_seed(0)
            run = f"{folder}/random.safetensors"
            save(sma.build(*options.spec.split()), run)
        given = ["--device", options.device, "--dtype", dtype, "--slots", str(options.slots)]
        given += ["--queue", str(2 * max(options.clients))]
        rows = []
        with serving(run, given) as place:
            asyncio.run(load(place, 1, 2, options.tokens))  # once, to warm up
            for clients in options.clients:
                rows.append(asyncio.run(load(place, clients, clients * options.requests, options.tokens)))
    print(text_table(HEAD, [list(UNDER), *map(serving_cells, rows)]))
    if options.json is not None:
        what = {"model": options.run or options.spec, "slots": options.slots, "prompt_bytes": PROMPTS}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": about, **what, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
