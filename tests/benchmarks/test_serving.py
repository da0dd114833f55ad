"""The benchmark of the server runs, counts what it got, and takes no answer that is not whole."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from benchmarks import pages, serving

SMALL = ["--spec", "seqboat_small_lm d_model=8 n_layers=1", "--tokens", "5", "--requests", "2", "--slots", "2"]
PEERS = ["--llama", "1", "16", "2", "24", "--peer-slots", "2", "--peer-step", "128"]


def test_a_server_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "result.json"
    serving.main([*SMALL, "--device", "cpu", "--clients", "1", "3", "--json", str(file)])
    said = capsys.readouterr().out
    assert "requests/s" in said
    written = json.loads(file.read_text())
    assert [server["server"] for server in written["servers"]] == ["sma serve"]
    assert [(row["clients"], row["requests"], row["tokens"]) for row in written["rows"]] == [(1, 2, 5), (3, 6, 5)]
    for row in written["rows"]:
        assert row["tokens_per_s"] == pytest.approx(5 * row["requests_per_s"])
        assert 0 < row["first_token_ms"][0] <= row["first_token_ms"][1] <= 1e3 * row["whole_s"][1]


def test_the_peer_beside_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peers.json"
    flash = ["--peers", "flash", "sdpa"]  # flash attention needs a GPU: the other is taken, and the reason kept
    serving.main([*SMALL, *flash, *PEERS, "--device", "cpu", "--clients", "1", "3", "--json", str(file)])
    said = capfd.readouterr().out
    written = json.loads(file.read_text())
    ours, peer = written["servers"]
    assert [ours["slots"], peer["slots"], peer["attention"], peer["cuda_graphs"]] == [2, 2, "sdpa", False]
    assert peer["parameters"] == 256 * 16 + 4 * 16**2 + 3 * 16 * 24 + 3 * 16
    assert len(peer["failed"]) == 1
    assert peer["failed"][0].startswith("flash: a request for 8 tokens got 0")
    measured = [(row["server"], row["version"], row["clients"], row["requests"]) for row in written["rows"]]
    assert measured == [(each["server"], each["version"], n, 2 * n) for each in (ours, peer) for n in (1, 3)]
    assert "Transformers, not measured: flash: a request" in said
    page = pages.serving(tmp_path).splitlines()
    assert [line.split(" | ")[:2] for line in page if line.startswith("| ")][2:] == [
        [f"| {name}", clients] for clients in "13" for name in ("sma serve", "Transformers")
    ]
    assert sum(line.startswith(("- sma serve 0", "- Transformers")) for line in page) == 3


def test_everybody_is_asked_the_same() -> None:
    """So many clients at a time, each with one request after the other."""
    heard: list[list[list[int]]] = [[], []]
    most = 0

    async def load(prompts: list[list[int]]) -> None:
        open_ = 0

        async def answer(prompt: list[int], tokens: int) -> list[float]:
            nonlocal open_, most
            open_ += 1
            most = max(most, open_)
            prompts.append(prompt)
            await asyncio.sleep(0)
            open_ -= 1
            return [time.perf_counter()] * tokens

        await serving.load(answer, clients=3, requests=9, tokens=2)

    for prompts in heard:
        asyncio.run(load(prompts))
    assert heard[0] == heard[1]
    assert len(heard[0]) == 9
    assert most == 3
    assert all(64 <= len(prompt) <= 512 and max(prompt) < 256 for prompt in heard[0])


def test_answers_that_are_not_whole_are_not_timed() -> None:
    async def cut() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            await serving.ask(server.sockets[0].getsockname()[:2], [65], 3)

    with pytest.raises(RuntimeError, match="a request for 3 tokens got 1"):
        asyncio.run(cut())


def test_a_server_that_does_not_start() -> None:
    with (
        pytest.raises(RuntimeError, match="sma serve: error: run: must be the folder"),
        serving.serving("nowhere", []),
    ):
        pass
