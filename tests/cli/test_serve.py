"""``sma serve``: what it refuses before it serves, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import sma
from sma.errors import ConfigError
from sma.weights import save
from sma_models.cli import main
from sma_models.cli.serve import load_model, read_key
from sma_models.language_model import LanguageModel
from sma_models.serving.server import address_of, bind
from sma_models.training.loop import Outcome
from sma_models.training.recipe import load_recipe
from sma_models.training.run import Run
from tests.inference.engines import byte_model, continued
from tests.models.tiny import tiny as tiny_model
from tests.serving.conftest import SMALL, running
from tests.training.conftest import run_recipe, tiny  # noqa: F401  # fixtures, used by their names

ROOT = Path(__file__).parents[2]
Runner = Callable[..., tuple[Run, Outcome]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights and spec."""
    save(byte_model().float(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0].removeprefix("error: ")


def test_mistakes(weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(weights)
    for arguments, message in (
        (["nowhere", "--port", "0"], "run: must be the folder of a training run, got 'nowhere'"),
        (["nowhere.safetensors", "--port", "0"], "nowhere.safetensors: no such file"),
        ([file, "--port", "70000"], "Invalid value for '--port'"),
        (
            [file, "--host", "no.such.host.invalid"],
            "host: must be an address of this machine, got 'no.such",
        ),
        ([file, "--host", "192.0.2.1", "--port", "0"], "port: must be free on 192.0.2.1"),
        ([file, "--slots", "0", "--port", "0"], "slots: must be at least 1, got 0"),
        ([file, "--max-seconds", "nan", "--port", "0"], "seconds: must be a positive number of seconds, got nan"),
        ([file, "--dtype", "int8", "--port", "0"], "dtype: must be float32, bfloat16 or float16, got 'int8'"),
        ([file, "--device", "abacus", "--port", "0"], "device: must be one that this machine has, got 'abacus'"),
        ([file, "--key-file", "/nowhere", "--port", "0"], "/nowhere"),
    ):
        assert message in refused(capsys, *arguments)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused(capsys, file, "--port", port)
        assert f"port: must be free on 127.0.0.1, got {port} (Address already in use); 0 takes any" in said
    monkeypatch.setenv("SMA_API_KEY", "")
    assert "SMA_API_KEY: must hold a key" in refused(capsys, file, "--port", "0")


def test_models_that_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, model in (("classifier", tiny_model("seqboat_text")), ("few", tiny_model("seqboat_lm"))):
        save(model, tmp_path / f"{name}.safetensors")
        said = refused(capsys, str(tmp_path / f"{name}.safetensors"), "--port", "0")
        assert "model: must be a language model of bytes (vocab_size 256), got" in said
    endless = {"module": {"type": "attention", "n_heads": 2}}  # attends to everything that was ever activated
    block = {"type": "hybrid", "sublayers": [{"activate": endless}]}
    spec = {"type": "language_model", "vocab_size": 256, "d_model": 8, "n_layers": 1, "blocks": [block]}
    save(sma.build(spec), tmp_path / "endless.safetensors")
    said = refused(capsys, str(tmp_path / "endless.safetensors"), "--port", "0")
    assert said == "SparselyActivated: cannot stream: Attention has no bounded memory"


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMA_API_KEY", raising=False)
    assert read_key(None) is None
    file = tmp_path / "key"
    file.write_text("  sk-1234\n")
    assert read_key(file) == "sk-1234"
    for content in (b"", b"two words", b"\xff\xfe", "é".encode()):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"key: must hold a key of printable ASCII") as error:
            read_key(file)
        assert "words" not in str(error.value)
    monkeypatch.setenv("SMA_API_KEY", "sk-5678")
    assert read_key(None) == "sk-5678"
    with pytest.raises(ConfigError, match="key: must be given once"):
        read_key(file)


def test_runs(tiny: str, tmp_path: Path, run_recipe: Runner, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    empty = Run.create(tmp_path / "runs", "tiny", load_recipe(tiny), "empty")
    assert "has no weights yet; go on with: sma train --resume" in refused(capsys, str(empty.path), "--port", "0")
    run, _ = run_recipe(tiny, "train.steps=2", "optimiser.warmup=0")
    capsys.readouterr()
    model, name = load_model(str(run.path), tmp_path, "cpu", "bfloat16")
    assert (name, next(model.parameters()).dtype, model.training) == ("tiny/run", torch.bfloat16, False)
    assert capsys.readouterr().err == ""
    run.summary.unlink()
    load_model("tiny/run", tmp_path / "runs", "auto", "float32")
    assert "is not finished: this is its last checkpoint" in capsys.readouterr().err


def test_addresses() -> None:
    with bind("127.0.0.1", 0) as one:
        assert address_of(one) == f"http://127.0.0.1:{one.getsockname()[1]}"
    if socket.has_ipv6:
        try:
            with bind("::1", 0) as six:
                assert address_of(six).startswith("http://[::1]:")
        except ConfigError as error:
            assert "::1" in str(error)  # noqa: PT017  # a machine without that address


@pytest.fixture
def process(weights: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and where it serves."""
    command = [sys.executable, "-m", "sma_models", "serve", str(weights), "--port", "0", "--drain-seconds", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SMA_API_KEY": "sk-1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said.startswith("serving small at http://127.0.0.1:"), said
    yield process, said.split()[-1]
    process.kill()
    process.wait()
    process.stderr.close()


def test_sigterm_lets_everyone_finish(process: tuple[subprocess.Popen[str], str]) -> None:
    server, url = process
    body = {"prompt": "def ", "max_tokens": 900, "temperature": 0, "stream": True}
    pieces: list[Any] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream(
            "POST",
            f"{url}/v1/completions",
            json=body,
            headers={"Authorization": "Bearer sk-1"},
            timeout=60,
            trust_env=False,
        ) as response:
            for line in response.iter_lines():
                pieces.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    server.send_signal(signal.SIGTERM)
    reader.join(60)
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in pieces if line.startswith("data: {"))
    model: LanguageModel = byte_model().float()
    assert text == continued(model, b"def ", 900).decode("utf-8", "replace")
    assert [line for line in pieces if line][-1] == "data: [DONE]"
    assert server.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(process: tuple[subprocess.Popen[str], str], second: signal.Signals) -> None:
    server, url = process
    body = {"prompt": "def ", "max_tokens": 4096, "n": 16, "stream": True}
    half = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    half.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-1\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with (
        half,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer sk-1"}, trust_env=False, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        threading.Event().wait(0.5)
        assert server.poll() is None
        server.send_signal(second)
        *_, error, done = [line for line in lines if line]
        assert (
            json.loads(error.removeprefix("data: "))["error"]["message"]
            == "the engine was stopped before the request was finished"
        )
        assert done == "data: [DONE]"
        assert server.wait(10) == 128 + second
    assert server.stderr is not None
    assert server.stderr.read() == ""


def test_a_second_signal_with_nothing_to_answer(process: tuple[subprocess.Popen[str], str]) -> None:
    server, url = process
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    server.send_signal(signal.SIGINT)
    threading.Event().wait(0.1)
    server.send_signal(signal.SIGINT)
    assert server.wait(10) in (0, -signal.SIGINT, 128 + signal.SIGINT)  # it may have been at its end already
    assert server.stderr is not None
    assert server.stderr.read() in ("", "interrupted\n")


def test_when_the_time_to_finish_is_over(caplog: pytest.LogCaptureFixture) -> None:
    with (
        running(byte_model(), replace(SMALL, drain_seconds=0.2)) as one,
        one.client() as client,
        client.stream("POST", "/v1/completions", json={"prompt": "def ", "max_tokens": 5000, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        one.server.should_exit = True
        *_, error, done = [line for line in lines if line]
    assert (
        json.loads(error.removeprefix("data: "))["error"]["message"]
        == "the engine was stopped before the request was finished"
    )
    assert done == "data: [DONE]"
    assert one.server.cut_off == 1
    assert caplog.records == []
