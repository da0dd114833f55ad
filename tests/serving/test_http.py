"""The server on a port: what OpenAI's clients expect, what is refused, and that nothing else suffers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from sma_models.language_model import LanguageModel
from tests.inference.engines import continued, until
from tests.serving.conftest import HEAD, SMALL, Running, complete, raw, refused, running, stream


@pytest.fixture(autouse=True)
def _nothing_is_left(served: Running) -> Iterator[None]:
    yield
    assert served.idle()


# What OpenAI's clients expect.


def test_a_completion(client: httpx.Client, model: LanguageModel) -> None:
    said = complete(client, model="tiny", prompt="def ", max_tokens=12, temperature=0)
    assert said["object"] == "text_completion"
    assert said["id"].startswith("cmpl-")
    assert abs(said["created"] - time.time()) < 60
    assert said["model"] == "tiny"
    text = continued(model, b"def ", 12).decode("utf-8", "replace")
    assert said["choices"] == [{"text": text, "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert said["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}


def test_a_stream_says_the_same(client: httpx.Client) -> None:
    body = {"prompt": ["def ", "class "], "n": 2, "max_tokens": 30, "temperature": 1.0, "seed": 7, "logprobs": 1}
    whole = complete(client, **body)
    pieces = stream(client, **body, stream_options={"include_usage": True})
    assert len({piece["id"] for piece in pieces}) == 1
    last = pieces.pop()
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len(pieces) > 30
    for choice in whole["choices"]:
        own = [c for piece in pieces for c in piece["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
        for key, value in choice["logprobs"].items():
            assert [each for c in own for each in c["logprobs"][key]] == value
    assert all(piece["usage"] is None for piece in pieces)
    assert len({choice["text"] for choice in whole["choices"]}) == 4


def test_texts_come_while_they_are_written(client: httpx.Client, served: Running) -> None:
    body = {"prompt": "a", "max_tokens": 5000, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: the stream is closed with it
        next(lines)
        assert served.service.engine.running == 1  # the sequence is not complete yet


def test_token_numbers_echo_and_stop(client: httpx.Client, model: LanguageModel) -> None:
    text = continued(model, b"def ", 20)
    printable = next(i for i, byte in enumerate(text) if 32 < byte < 127 and i > 2)
    stop = chr(text[printable])
    said = complete(client, prompt=[[100, 101, 102, 32]], max_tokens=20, temperature=0, stop=[stop], echo=True)
    [choice] = said["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == "def " + text[: text.index(stop.encode())].decode("utf-8", "replace")
    assert said["usage"]["completion_tokens"] == text.index(stop.encode()) + 1


def test_the_likelihood_of_a_prompt(client: httpx.Client) -> None:
    said = complete(client, prompt="def", max_tokens=0, echo=True, logprobs=0)
    [choice] = said["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("def", "length")
    told = choice["logprobs"]
    assert told["tokens"] == ["d", "e", "f"]
    assert told["token_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert told["top_logprobs"] is None
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


def test_activations(client: httpx.Client) -> None:
    [choice] = complete(client, prompt="def", max_tokens=5, activations=True, temperature=0)["choices"]
    layers = client.get("/v1/models").json()["data"][0]["layers"]
    assert [entry["position"] for entry in choice["activations"]] == list(range(8))
    assert bytes(entry["token"] for entry in choice["activations"][:3]) == b"def"
    assert {len(entry[key]) for entry in choice["activations"] for key in ("active", "confidence")} == {len(layers)}


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(each["id"], each["object"], each["owned_by"]) for each in listed["data"]] == [("tiny", "model", "sma")]
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    assert refused(client.get("/v1/models/a/b"), 404, "model: must be 'tiny', got \"a/b\"")["code"] == "model_not_found"


def test_health(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok", "running": 0, "sequences": 0, "slots": 4, "capacity": 64}


def test_what_is_not_there(client: httpx.Client) -> None:
    chat = client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
    assert refused(chat, 404, "there is no chat endpoint; use /v1/completions")["code"] == "no_chat"
    for path in ("/v1/embeddings", "/v1", "/docs", "/page", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/%00"):
        refused(client.get(path), 404, "no such path")
    refused(client.get("/v1/completions"), 405, "the path does not take this method")
    assert "requestBody" in client.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]


def test_the_page_comes_alone(client: httpx.Client) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        assert "//" not in response.text.replace("// ", "")  # nothing from elsewhere, no address at all


# What is refused.


def test_a_request_that_is_wrong(client: httpx.Client) -> None:
    error = refused(client.post("/v1/completions", json={"prompt": "a", "n": -1}), 400, "n: ")
    assert (error["param"], error["type"]) == ("n", "invalid_request_error")
    deep = client.post("/v1/completions", content=b"[" * 100_000, headers={"content-type": "application/json"})
    refused(deep, 400, "nested")
    surrogates = b'{"prompt": "a", "\\ud800": 1}'
    refused(client.post("/v1/completions", content=surrogates, headers={"content-type": "application/json"}), 400, "")


def test_other_types_of_content(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "x" * 500):
        response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
        refused(response, 415, "content-type: must be application/json")
    own = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/completions", content=b'{"prompt": "a"}', headers=own).status_code == 200


def test_bodies_that_are_too_large(client: httpx.Client, served: Running) -> None:
    for size in (SMALL.body_bytes + 1, 3 * SMALL.body_bytes):
        body = b'{"prompt": "' + b"a" * size + b'"}'
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        refused(response, 413, f"body: must hold at most {SMALL.body_bytes} bytes")

    def endless() -> Iterator[bytes]:
        for _ in range(2 * 17):
            yield b" " * (SMALL.body_bytes // 2)

    response = client.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
    refused(response, 413, "body: must hold at most")
    assert complete(client, prompt="a", max_tokens=1)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Bomb: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: 1\r\n" * 50_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Transfer-Encoding: nothing\r\n\r\n",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_heads_that_are_refused(served: Running, data: bytes) -> None:
    said = raw(served, data)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.split(b" ")[1][:1] == b"4", head
    assert list(json.loads(body)["error"]) == ["message", "type", "param", "code"]


def test_a_body_that_is_no_body(served: Running) -> None:
    said = raw(served, HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert b'"error"' in said or said == b""  # the answer has not begun, or it cannot be given any more
    with served.client() as client:
        assert complete(client, prompt="a", max_tokens=1)


def test_a_key(model: LanguageModel) -> None:
    with running(model, key="secret-of-9") as own, own.client() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-of-9"}):
            response = client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
            error = refused(response, 401, "authorization: must be 'Bearer' and the key of this server")
            assert error["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "secret" not in response.text
        for path in ("/v1/models", "/v1/models/tiny"):
            refused(client.get(path), 401, "authorization")
        refused(client.get("/v1/models", headers=[(b"Authorization", b"Bearer \xff\xe9")]), 401, "authorization")
        refused(client.post("/v1/completions", content=b"x" * 5000), 401, "")  # before anything is read
        good = {"Authorization": "bearer secret-of-9"}
        assert client.post("/v1/completions", json={"prompt": "a"}, headers=good).status_code == 200
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_a_mistake_of_the_server(
    client: httpx.Client, served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("inside knowledge")

    monkeypatch.setattr(served.service, "submit", broken)
    response = client.post("/v1/completions", json={"prompt": "a"})
    error = refused(response, 500, "internal error; the log of the server says which")
    assert error["type"] == "server_error"
    assert "inside" not in response.text
    assert until(lambda: "inside knowledge" in caplog.text)
    monkeypatch.undo()
    assert complete(client, prompt="a", max_tokens=1)


def test_a_prompt_that_cannot_be_read(
    client: httpx.Client, served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served.service.engine._prefiller, "prefill", broken)
    refused(client.post("/v1/completions", json={"prompt": "a"}), 500, "the prompt could not be prefilled")
    refused(
        client.post("/v1/completions", json={"prompt": "a", "stream": True}), 500, "the prompt could not be prefilled"
    )
