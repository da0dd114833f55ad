"""Clients that hang up, that are slow, or that are too many: they lose their requests, and no other client does."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from sma_models.language_model import LanguageModel
from sma_models.serving.limits import Limits
from tests.inference.engines import until
from tests.serving.conftest import HEAD, Running, complete, raw, refused, running, stream


@pytest.mark.parametrize("streamed", [True, False])
def test_who_hangs_up_frees_the_slot(served: Running, streamed: bool) -> None:
    engine = served.service.engine
    body = json.dumps({"prompt": "a", "n": 4, "max_tokens": 5000, "stream": streamed}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(request)
    assert until(lambda: engine.running == 4)
    begun = time.monotonic()
    connection.close()
    assert served.idle(5.0)
    assert time.monotonic() - begun < 5.0  # 5000 rounds would take longer
    with served.client() as client:
        assert complete(client, prompt="a", max_tokens=1)


def test_who_waits_in_the_queue_may_go_too(served: Running) -> None:
    engine = served.service.engine
    with (
        served.client() as other,
        served.client() as client,
        client.stream(
            "POST", "/v1/completions", json={"prompt": "a", "n": 4, "max_tokens": 5000, "stream": True}
        ) as first,
    ):
        lines = first.iter_lines()  # kept: the stream is closed with it
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            other.post("/v1/completions", json={"prompt": "b", "n": 8, "max_tokens": 5000}, timeout=0.2)
        assert until(lambda: engine.in_flight <= 4)


SLOW = Limits(slots=2, queue=2, head_seconds=0.4, body_seconds=0.4, seconds=2.0, max_tokens=10**6, connections=12)


@pytest.fixture(scope="module")
def impatient(model: LanguageModel) -> Iterator[Running]:
    with running(model, SLOW) as one:
        yield one


@pytest.mark.parametrize("data", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_heads_that_take_too_long(impatient: Running, data: bytes) -> None:
    said = raw(impatient, data, 5.0)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"head: must arrive within 0.4 s" in said


def test_heads_that_trickle(impatient: Running) -> None:
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        begun = time.monotonic()
        connection.settimeout(0.05)
        said = None
        while said is None and time.monotonic() < begun + 4:
            connection.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                said = connection.recv(65536)
        assert said is not None
        assert said.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begun < 3


def test_bodies_that_take_too_long(impatient: Running) -> None:
    said = raw(impatient, HEAD + b'Content-Length: 100\r\n\r\n{"prompt"', 5.0)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"body: must arrive within 0.4 s" in said


def test_answers_that_take_too_long(impatient: Running) -> None:
    with impatient.client() as client:
        body = {"prompt": "a", "max_tokens": 10**6}
        error = refused(client.post("/v1/completions", json=body), 504, "request: must be answered within 2.0 s")
        assert error["code"] == "timeout"
        pieces = stream(client, **body)
        assert "must be answered within" in pieces[-1]["error"]["message"]
        assert "choices" in pieces[0]
    assert impatient.idle()


def test_who_does_not_listen(impatient: Running) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 16_000, "stream": True, "activations": True}).encode()
    host, port = impatient.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert until(lambda: impatient.service.engine.running == 1)
    assert impatient.idle(10.0)
    assert until(lambda: not impatient.server.server_state.tasks, 6.0)
    connection.close()


def test_a_full_queue(impatient: Running) -> None:
    body = {"prompt": "a", "n": 4, "max_tokens": 10**6, "stream": True}
    with impatient.client() as client, impatient.client() as other:
        with client.stream("POST", "/v1/completions", json=body) as first:
            lines = first.iter_lines()  # kept: the stream is closed with it
            next(lines)
            response = other.post("/v1/completions", json={"prompt": "b"})
        error = refused(response, 429, "engine: must hold at most 4 sequences, holds 4, got 1 more")
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert response.headers["retry-after"] == "1"
        refused(other.post("/v1/completions", json={"prompt": "b", "n": 5}), 400, "must be at most 4, got 5")
    assert impatient.idle()


def test_too_many_connections(impatient: Running) -> None:
    assert until(lambda: not impatient.server.server_state.connections)
    host, port = impatient.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW.connections):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        said = raw(impatient, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"connections: must be at most 12" in said
    assert until(lambda: not impatient.server.server_state.connections)
    with impatient.client() as client:
        assert client.get("/health").status_code == 200
