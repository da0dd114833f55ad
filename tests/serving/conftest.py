"""A server of a tiny language model in a thread, and what clients send and receive."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from sma_models.inference.engine import Engine
from sma_models.language_model import LanguageModel
from sma_models.serving.app import Service
from sma_models.serving.limits import Limits
from sma_models.serving.server import Server, address_of, bind, make_server
from tests.inference.engines import byte_model, until

SMALL = Limits(slots=4, queue=60, quantum=5, prefill_chunk=16, max_tokens=5000, sequences=8)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return byte_model()


@dataclass
class Running:
    """A server in a thread."""

    server: Server
    service: Service
    url: str

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False, **options)

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether everything is forgotten and every slot free, soon."""
        engine = self.service.engine
        return until(lambda: not engine.in_flight and not engine.running, seconds)


@contextlib.contextmanager
def running(model: LanguageModel, limits: Limits = SMALL, key: str | None = None) -> Iterator[Running]:
    """A server of its own."""
    service = Service(Engine(model, limits), "tiny", key)
    server = make_server(service)
    listening = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    url = address_of(listening)
    thread.start()
    try:
        assert until(lambda: server.started)
        yield Running(server, service, url)
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(model: LanguageModel) -> Iterator[Running]:
    """A server that the tests of a file share."""
    with running(model) as one:
        yield one


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[httpx.Client]:
    with served.client() as one:
        yield one


# What clients say and hear.

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def complete(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, **body: Any) -> list[Any]:
    """The objects of a stream, which must end as it should."""
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-2])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def refused(response: httpx.Response, status: int, message: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    content: dict[str, Any] = response.json()
    assert list(content) == ["error"]
    assert list(content["error"]) == ["message", "type", "param", "code"]
    assert message in content["error"]["message"]
    return content["error"]


def raw(served: Running, data: bytes, seconds: float = 10.0) -> bytes:
    """What the server says to these bytes, until it closes the connection."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)
