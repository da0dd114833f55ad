"""The speed of a server with more and more clients: ``python -m benchmarks.serving``.

``sma serve`` runs in a process of its own, the clients in this one. Each sends a request, reads the stream to its end,
and sends the next; prompts are random bytes of 64 to 512. Every sequence must have the requested length. With
``--peers`` the same clients ask :mod:`benchmarks.batching` for the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import sma
from benchmarks.batching import ATTENTIONS, BatchingSetting, batching
from benchmarks.results import environment
from benchmarks.tables import serving_about, serving_cells, text_table
from sma.weights import save

ROOT = Path(__file__).parent.parent
PROMPTS = (64, 512)
HEAD = ("server", "clients", "requests/s", "tokens/s", "first token ms", "", "next token ms", "", "whole s", "")
UNDER = ("", "", "", "", "p50", "p99", "p50", "p99", "p50", "p99")
LLAMA = (12, 512, 8, 2048)
"""Layers, width, heads and hidden values of the peer."""

Ask = Callable[[list[int], int], Awaitable[list[float]]]
"""From a prompt and a number of tokens to the times at which the tokens arrived."""


@contextlib.contextmanager
def serving(run: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """``sma serve`` on a port that is free, in a process of its own: host and port."""
    command = [sys.executable, "-m", "sma_models", "serve", run, "--port", "0", *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:  # there may be warnings before the expected line
            said.append(line)
            if line.startswith("serving "):
                break
        else:
            raise RuntimeError(f"sma serve: {''.join(said) or 'ended without a word'}")
        host, _, port = line.split()[-1].removeprefix("http://").rpartition(":")
        yield host, int(port)
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()


async def ask(place: tuple[str, int], prompt: list[int], tokens: int) -> list[float]:
    """One request on a connection of its own, read line by line: a real client would take more time than the server.

    Returns:
        When each of the tokens came, by :func:`time.perf_counter`.

    Raises:
        RuntimeError: the answer is an error, or is not whole.
    """
    wanted = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 0}
    body = json.dumps(wanted).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
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
    return times


async def load(asks: Ask, clients: int, requests: int, tokens: int) -> dict[str, Any]:
    """Run clients until all requests are answered; the prompts are the same for every server."""
    draw = random.Random(clients)
    prompts = [[draw.randrange(256) for _ in range(draw.randint(*PROMPTS))] for _ in range(requests)]
    first: list[float] = []
    between: list[float] = []
    whole: list[float] = []

    async def client() -> None:
        while prompts:
            prompt, asked = prompts.pop(), time.perf_counter()
            times = await asks(prompt, tokens)
            first.append(1e3 * (times[0] - asked))
            between.extend(1e3 * (b - a) for a, b in itertools.pairwise(times))
            whole.append(times[-1] - asked)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return {
        "clients": clients,
        "requests": requests,
        "tokens": tokens,
        "requests_per_s": requests / seconds,
        "tokens_per_s": requests * tokens / seconds,
        "first_token_ms": quantiles(first),
        "next_token_ms": quantiles(between),
        "whole_s": quantiles(whole),
    }


def quantiles(values: list[float]) -> list[float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.5, 0.99)]


def ours(options: argparse.Namespace, dtype: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The description of ``sma serve``, and the results of its clients."""
    about = {"server": "sma serve", "version": sma.__version__, "model": options.run or options.spec}
    about |= {"slots": options.slots, "how": "over HTTP, greedy, with the log-probability of each token"}
    given = ["--device", options.device, "--dtype", dtype, "--slots", str(options.slots)]
    given += ["--queue", str(2 * max(options.clients))]
    with tempfile.TemporaryDirectory() as folder:
        run = options.run
        if run is None:
            torch.manual_seed(0)
            model = sma.build(*options.spec.split())
            about["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            run = f"{folder}/random.safetensors"
            save(model, run)
        with serving(run, given) as place:
            return about, loads(functools.partial(ask, place), about, options)


def theirs(options: argparse.Namespace, dtype: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The description of the peer, and the results of its clients, with the first kind of attention that runs here."""
    step = options.peer_step or (2048 if options.device.startswith("cuda") else 512)
    setting = BatchingSetting(
        tuple(options.llama),
        torch.device(options.device),
        getattr(torch, dtype),
        options.peer_slots or options.slots,
        step,
        PROMPTS[1] + options.tokens,
    )
    failed: list[str] = []
    for attention in options.peers or (ATTENTIONS if options.device.startswith("cuda") else ["sdpa"]):
        try:
            with batching(setting, attention) as peer:
                rows = loads(peer.ask, peer.about, options)
                return peer.about | ({"failed": failed} if failed else {}), rows
        except RuntimeError as error:
            failed.append(f"{attention}: {error}")
    return {"server": "Transformers", "failed": failed}, []


def loads(asks: Ask, about: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of clients; before each, the same once without a clock."""
    rows = []
    for clients in options.clients:
        asyncio.run(load(asks, clients, clients * options.warm_up, options.tokens))
        row = asyncio.run(load(asks, clients, clients * options.requests, options.tokens))
        rows.append({"server": about["server"], "version": about["version"], **row})
    return rows


def arguments() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="a run or weights; by default random weights of --spec")
    add("--spec", default="seqboat_small_lm", help="its name, and changes to it: 'seqboat_lm n_layers=4'")
    add("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    add("--requests", type=int, default=4, help="for each client")
    add("--warm-up", type=int, default=1, help="requests for each client before those that count")
    add("--tokens", type=int, default=64)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default=None)
    add("--slots", type=int, default=16)
    add(
        "--peers",
        nargs="*",
        choices=ATTENTIONS,
        help="a Llama in Transformers as well; the first that runs of these ways to attend, by default the fastest",
    )
    add("--llama", type=int, nargs=4, default=LLAMA, metavar=("LAYERS", "WIDTH", "HEADS", "HIDDEN"))
    add("--peer-slots", type=int, help="by default as many as --slots")
    add("--peer-step", type=int, help="tokens that the peer takes in a step; by default 2048 on CUDA, otherwise 512")
    add("--json", type=Path, metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write the results."""
    options = arguments().parse_args(argv)
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    environ = environment(torch.device(options.device), getattr(torch, dtype), "full")
    print(", ".join(f"{key} {value}" for key, value in environ.items() if value is not None))
    record: dict[str, Any] = {"environment": environ, "prompt_bytes": PROMPTS, "servers": [], "rows": []}
    for measure in (ours,) if options.peers is None else (ours, theirs):
        about, rows = measure(options, dtype)
        record["servers"].append(about)
        record["rows"] += rows
        print("\n".join(serving_about(about)))
        if options.json is not None:  # after each, so that an interrupted run keeps what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(text_table(HEAD, [list(UNDER), *serving_cells(record["rows"])]))


if __name__ == "__main__":
    main()
