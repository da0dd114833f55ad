"""The benchmark of the server runs, counts what it got, and takes no answer that is not whole."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import serving


def test_a_server_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--spec", "seqboat_small_lm d_model=8 n_layers=1", "--tokens", "5", "--requests", "2", "--slots", "2"]
    file = tmp_path / "new" / "result.json"
    serving.main([*small, "--device", "cpu", "--clients", "1", "3", "--json", str(file)])
    said = capsys.readouterr().out
    assert "requests/s" in said
    written = json.loads(file.read_text())
    assert [(row["clients"], row["requests"], row["tokens"]) for row in written["rows"]] == [(1, 2, 5), (3, 6, 5)]
    for row in written["rows"]:
        assert row["tokens_per_s"] == pytest.approx(5 * row["requests_per_s"])
        assert 0 < row["first_token_ms"][0] <= row["first_token_ms"][1] <= 1e3 * row["whole_s"][1]


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
