"""Streams as the loop sends them: what came meanwhile goes out in one write, and an error behind it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sma_models.inference.engine import Engine
from sma_models.language_model import LanguageModel
from sma_models.serving.app import CompletionResponse, Service
from sma_models.serving.requests import parse
from tests.inference.engines import continued
from tests.serving.conftest import SMALL


async def bodies_of(service: Service, rounds: list[int], fail: bool = False, **content: Any) -> list[bytes]:
    """What a stream sends if the engine takes so many rounds before each time that the loop has time for it."""
    body = json.dumps({"prompt": "ab", "stream": True, "temperature": 0, **content}).encode()
    answer = CompletionResponse(service, parse(body, service.limits, service.model))
    sent: list[bytes] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    work = asyncio.create_task(answer({"type": "http"}, receive, send))  # type: ignore[arg-type]
    for count in rounds:
        await asyncio.sleep(0.01)
        for _ in range(count):
            service.engine.round()
        if fail:
            service.engine._fail_all("the server failed")
    await asyncio.wait_for(work, 10)
    return [each for each in sent if each]


def texts_of(body: bytes) -> list[str]:
    """Of the events of one write."""
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    return [json.loads(each)["choices"][0]["text"] for each in events if each != b"[DONE]"]


@pytest.fixture
def service(model: LanguageModel) -> Service:
    return Service(Engine(model, SMALL), "tiny")


def test_what_came_meanwhile_goes_out_in_one_write(service: Service, model: LanguageModel) -> None:
    sent = asyncio.run(bodies_of(service, [1, 3, 1, 4], max_tokens=6, logprobs=0))
    assert sent.pop() == b"data: [DONE]\n\n"
    written = continued(model, b"ab", 6)
    assert [len(texts_of(body)) for body in sent] == [1, 3, 1, 1]
    events = [json.loads(line.removeprefix(b"data: ")) for body in sent for line in body.split(b"\n\n") if line]
    assert [len(each["choices"][0]["logprobs"]["tokens"]) for each in events] == [1] * 6
    text = "".join(text for body in sent for text in texts_of(body))
    assert text == written.decode(errors="replace")


def test_what_was_written_before_an_error_goes_out(service: Service) -> None:
    sent = asyncio.run(bodies_of(service, [2], fail=True, max_tokens=50, logprobs=0))
    assert sent.pop() == b"data: [DONE]\n\n"
    assert json.loads(sent.pop().removeprefix(b"data: "))["error"]["message"] == "the server failed"
    assert [len(texts_of(body)) for body in sent] == [2]
