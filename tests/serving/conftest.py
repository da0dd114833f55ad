"""A tiny language model of bytes, engines whose rounds a test runs by hand, and a server in a thread."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from sma_models.inference.engine import Engine
from sma_models.inference.generation import generate
from sma_models.inference.sampling import Sampling
from sma_models.inference.sequences import Event, Failed, Finished, Ticket, Wish, Written
from sma_models.language_model import LanguageModel
from sma_models.serving.app import Service
from sma_models.serving.limits import Limits
from sma_models.serving.server import Server, address_of, bind, make_server
from tests.models.tiny import tiny

SMALL = Limits(slots=4, queue=60, quantum=5, prefill_chunk=16, max_tokens=5000, sequences=8)


def byte_model(name: str = "seqboat_small_lm") -> LanguageModel:
    """A tiny model that activates some tokens and not others, in double precision: rounding decides nothing.

    Its head is one of its own: with the embedding as its head, an untrained model repeats itself.
    """
    model: LanguageModel = tiny(name, vocab_size=256, tie_embeddings=False).double()
    return model


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return byte_model()


def continued(model: LanguageModel, prompt: bytes, count: int, chunk: int = SMALL.prefill_chunk) -> bytes:
    """What the library itself writes after a prompt, taking the most likely byte."""
    tokens = generate(model, torch.tensor([list(prompt)]), count, temperature=0, prefill_chunk=chunk)
    return bytes(tokens[0].tolist())


@dataclass
class Asked:
    """A request at an engine, and what was told of it."""

    ticket: Ticket
    events: list[Event] = field(default_factory=list)

    def written(self, number: int = 0) -> bytes:
        return bytes(e.token for e in self.events if isinstance(e, Written) and e.sequence == number)

    @property
    def finished(self) -> int:
        return sum(isinstance(e, Finished) for e in self.events)

    @property
    def failed(self) -> str | None:
        return next((e.message for e in self.events if isinstance(e, Failed)), None)


def ask(
    engine: Engine,
    prompt: bytes,
    max_tokens: int = 8,
    *,
    n: int = 1,
    temperature: float = 0.0,
    others: Sequence[bytes] = (),
    **wish: Any,
) -> Asked:
    """Submit a request for ``n`` texts after a prompt, and as many after each of the ``others``."""
    asked: list[Asked] = []
    drawn = [Sampling(temperature, 1.0, Random(f"{prompt!r}/{i}")) for i in range(n)]
    ticket = Ticket(
        Wish(max_tokens=max_tokens, **wish),
        [(each, drawn) for each in (prompt, *others)],
        lambda events: asked[0].events.extend(events),
    )
    asked.append(Asked(ticket))
    engine.submit(ticket)
    return asked[0]


def rounds(engine: Engine, most: int = 5000) -> int:
    """Work until nothing is left."""
    for count in range(most):
        if not engine.in_flight:
            return count
        engine.round()
    raise AssertionError(f"not done after {most} rounds")


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


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something becomes true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


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


def tokens_of(*texts: bytes) -> Tensor:
    return torch.tensor([list(text) for text in texts])


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
