"""The web application: routes, keys, bodies, streams, and errors as OpenAI's clients know them."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from sma_models.inference.engine import Engine
from sma_models.inference.messages import EngineFull, EngineStopped, Event, GenerationRequest
from sma_models.serving.errors import RequestError, error_content, refusal
from sma_models.serving.limits import Limits
from sma_models.serving.requests import CompletionRequest, parse
from sma_models.serving.responses import Completion

_POLICY = "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; img-src data:"
_PAGE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
}
_NO_CHAT = (
    "the served model continues text and was not trained to chat, so there is no chat endpoint; use /v1/completions"
)
_DISCARDED_BODIES = 16
"""Factor on the largest body: up to this size it is read and discarded, so that the client receives the error."""


class Service:
    """The objects that the routes share.

    Args:
        engine: generates the sequences. Its limits may be :class:`~sma_models.serving.limits.Limits`; otherwise those
            of HTTP have their defaults.
        model: its name for clients.
        key: that clients must send, None if they need none.

    Attributes:
        limits: of the engine and of HTTP.
        created: when the service was made, in seconds since 1970.
    """

    def __init__(self, engine: Engine, model: str, key: str | None = None) -> None:
        self.engine, self.model, self.limits = engine, model, Limits.of(engine.limits)
        self.created = int(time.time())
        self._undelivered: deque[tuple[asyncio.Queue[list[Event]], list[Event]]] = deque()
        self._key = None if key is None else key.encode()

    def check_key(self, request: Request) -> None:
        """Check the key of a request, in a time that does not depend on the key.

        Raises:
            RequestError: 401, the key is missing or wrong.
        """
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise RequestError(
                401,
                "authorization: must be 'Bearer' and the key of this server",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def described(self) -> dict[str, Any]:
        """The model, as OpenAI lists it, with its limits and layers."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "sma",
            "max_prompt_tokens": self.limits.prompt_tokens,
            "max_tokens": self.limits.max_tokens,
            "layers": self.engine.channels,
        }

    async def body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            RequestError: 415, its content type is not JSON; 413, it is too large; 408, it takes too long; 400, the
                client has closed the connection before the end, so the answer cannot be sent.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # This also blocks pages of other origins: browsers send JSON across origins only where a server allows it.
            raise RequestError(415, f"content-type: must be application/json, got {kind[:80] or 'none'}")
        most, parts, size = self.limits.body_bytes, list[bytes](), 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif size > most * _DISCARDED_BODIES:
                        break
        except TimeoutError:
            message = f"body: must arrive within {self.limits.body_seconds} s"
            raise RequestError(408, message, headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise RequestError(400, "body: must be complete, got the end of the connection") from None
        if size > most:
            raise RequestError(413, f"body: must hold at most {most} bytes", headers={"Connection": "close"})
        return b"".join(parts)

    def _deliver(self) -> None:
        """Put the events that the engine has sent meanwhile into the queues of their requests."""
        while self._undelivered:
            queue, events = self._undelivered[0]
            queue.put_nowait(events)
            self._undelivered.popleft()

    def submit(self, request: CompletionRequest) -> tuple[GenerationRequest, asyncio.Queue[list[Event]]]:
        """Submit a request to the engine; its events come through the queue.

        Raises:
            RequestError: 429 or 503, the engine does not accept it.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[list[Event]] = asyncio.Queue()  # bounded by the limits of the request

        def on_events(events: list[Event]) -> None:
            self._undelivered.append((queue, events))
            if len(self._undelivered) == 1:  # one wake-up of the loop delivers all events up to then
                with contextlib.suppress(RuntimeError):  # the loop is closed, and the connection with it
                    loop.call_soon_threadsafe(self._deliver)

        submitted = GenerationRequest(request.options(), request.samplings(), on_events)
        try:
            self.engine.submit(submitted)
        except (EngineFull, EngineStopped) as error:
            raise refusal(error) from error
        return submitted, queue


class BoundedHeads:
    """Refuses requests whose head is too large.

    Uvicorn's own limit is for incomplete heads, and a head of some hundred kilobytes may arrive at once.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its head is small enough."""
        if scope["type"] == "http":
            size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
            size += sum(len(name) + len(value) for name, value in scope["headers"])
            if size > self._most:
                error = RequestError(431, f"head: must hold at most {self._most} bytes, got {size}")
                await JSONResponse(error.content(), error.status, {"Connection": "close"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class CompletionResponse(Response):
    """A completion, whole or as a stream of server-sent events.

    When the client disconnects, or does not read its answer in time, the request is cancelled.
    """

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self.status_code, self.background = 200, None
        self._service, self._request = service, request
        self._completion = Completion(request, service.model)
        self._submitted, self._events = service.submit(request)
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client disconnects."""
        work = asyncio.create_task(self._answer(scope, receive, send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({work, gone}, timeout=self._service.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not gone.done():
                await self._time_out(work, scope, receive, send)
        finally:
            self._service.engine.cancel(self._submitted)
            for task in (work, gone):
                task.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._request.stream:
                await self._stream(send)
            else:
                while not self._completion.finished:
                    self._completion.feed(await self._events.get())
                await JSONResponse(self._completion.whole())(scope, receive, send)
        except RequestError as error:
            await self._refuse(error, scope, receive, send)

    async def _stream(self, send: Send) -> None:
        while not self._completion.finished:
            rounds = [await self._events.get()]
            while not self._events.empty():  # events of several rounds go out in one write
                rounds.append(self._events.get_nowait())
            chunks: list[dict[str, Any]] = []
            try:
                for events in rounds:
                    self._completion.feed(events)
                    chunks += self._completion.chunks()
            finally:
                if chunks:
                    await self._send(send, *chunks)
        if self._completion.has_usage:
            await self._send(send, self._completion.usage_chunk())
        await self._end(send)

    async def _send(self, send: Send, *contents: object) -> None:
        """Send events in one write."""
        if not self._started:
            self._started = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            headers.append((b"x-accel-buffering", b"no"))  # proxies should not buffer it
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        lines = [json.dumps(content, separators=(",", ":"), allow_nan=False) for content in contents]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an error in place of the answer, or as the last event of a stream that has begun."""
        if not self._started:
            await JSONResponse(error.content(), error.status, error.headers)(scope, receive, send)
            return
        await self._send(send, error.content())
        await self._end(send)

    async def _time_out(self, work: asyncio.Task[None], scope: Scope, receive: Receive, send: Send) -> None:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        error = RequestError(
            504,
            f"request: must be answered within {self._service.limits.seconds} s; ask for fewer tokens",
            code="timeout",
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):  # a client that reads nothing does not read the error either
                await self._refuse(error, scope, receive, send)


def make_app(service: Service) -> FastAPI:
    """The application. It starts and stops the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    # FastAPI's pages of documentation load scripts from other servers.
    app = FastAPI(title="sma serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BoundedHeads, most=service.limits.head_bytes)
    _add_errors(app)
    _add_page(app)
    body = {"required": True, "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}}}

    @app.post("/v1/completions", response_model=None, openapi_extra={"requestBody": body})
    async def completions(request: Request) -> Response:
        service.check_key(request)
        return CompletionResponse(service, parse(await service.body(request), service.limits, service.model))

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.check_key(request)
        return {"object": "list", "data": [service.described()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        service.check_key(request)
        if model != service.model:
            message = f"model: must be {service.model!r}, got {json.dumps(model[:80])}"
            raise RequestError(404, message, param="model", code="model_not_found")
        return service.described()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> None:
        service.check_key(request)
        raise RequestError(404, _NO_CHAT, param="model", code="no_chat")

    @app.get("/health", response_model=None)
    async def health() -> Response:
        engine = service.engine
        content = {
            "status": "ok" if engine.alive else "failed",
            "running": engine.running,
            "sequences": engine.in_flight,
            "slots": service.limits.slots,
            "capacity": service.limits.capacity,
        }
        return JSONResponse(content, 200 if engine.alive else 503, {"Cache-Control": "no-store"})

    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return JSONResponse(error.content(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        place = f"{request.method[:16]} {json.dumps(request.url.path[:80])}"
        message = {404: f"{place}: no such path", 405: f"{place}: the path does not take this method"}
        return JSONResponse(
            error_content(error.status_code, message.get(error.status_code, str(error.detail))),
            error.status_code,
            error.headers,
        )

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # Uvicorn gets the error too, logs it and closes the connection.
        content = error_content(500, "internal error; the log of the server says which")
        return JSONResponse(content, 500, {"Connection": "close"})


def _add_page(app: FastAPI) -> None:
    folder = files("sma_models.serving").joinpath("page")
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    headers["Referrer-Policy"] = "no-referrer"

    def add(path: str, content: bytes, kind: str) -> None:
        @app.get(f"/{path}", include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers=headers)

    for path, (name, kind) in _PAGE.items():
        add(path, folder.joinpath(name).read_bytes(), kind)
