"""Two hundred clients at once, and among them some that mean no good: none is lost."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import httpx

from sma_models.language_model import LanguageModel
from sma_models.serving.limits import Limits
from tests.inference.engines import continued
from tests.serving.conftest import Running, running

CLIENTS = 200
TOKENS = 24
LIMITS = Limits(slots=16, queue=CLIENTS, quantum=8, prefill_chunk=64, max_tokens=5000)


@dataclass
class Heard:
    """What one client got, and when."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    done: bool = False


async def read(client: httpx.AsyncClient, prompt: str, heard: Heard) -> None:
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            heard.done = line == "data: [DONE]" or heard.done
            if line.startswith("data: {"):
                heard.text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                heard.times.append(time.monotonic())


async def leave(client: httpx.AsyncClient, prompt: str) -> None:
    """Ask for much and go in the middle of it."""
    body = {"prompt": prompt, "max_tokens": 5000, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_lines():
            break


async def annoy(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


async def all_at_once(served: Running, prompts: list[str]) -> list[Heard]:
    heard = [Heard() for _ in prompts]
    limits = httpx.Limits(max_connections=None)
    options = {"base_url": served.url, "timeout": 120, "trust_env": False, "verify": False, "limits": limits}
    async with httpx.AsyncClient(**options) as client:  # type: ignore[arg-type]
        await asyncio.gather(
            *(read(client, prompt, each) for prompt, each in zip(prompts, heard, strict=True)),
            *(leave(client, f"leaves {i}") for i in range(10)),
            *(annoy(client, body) for body in (b"[" * 50_000, b'{"prompt": NaN}', b"\xff", b'{"prompt": ""}') * 5),
        )
    return heard


def test_two_hundred_clients(model: LanguageModel) -> None:
    # Two have long prompts: they read for many rounds while the others write.
    prompts = [f"client {i} " + "and more " * (i % 5) for i in range(CLIENTS - 2)]
    prompts += ["a long prompt " * 500, "another long one " * 500]
    with running(model, LIMITS) as served:
        heard = asyncio.run(all_at_once(served, prompts))
        assert served.idle()
        assert served.service.engine._decoder.free == LIMITS.slots
    assert all(each.done for each in heard), "none is lost"
    for prompt, each in zip(prompts[::9], heard[::9], strict=True):
        assert each.text == continued(model, prompt.encode(), TOKENS, 64).decode("utf-8", "replace")
    # Those who ask for little do not wait until a long prompt was read.
    first = [each.times[0] for each in heard]
    assert sorted(first[:-2])[CLIENTS // 2] < min(first[-2:])
