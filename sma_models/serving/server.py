"""The application on a port, from the first connection to the last answer."""

from __future__ import annotations

import asyncio
import json
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sma.errors import ConfigError
from sma_models.serving.app import Service, make_app
from sma_models.serving.errors import error_content

_LINGER = 1.0
"""Seconds for a refused client to finish sending (what it sends is discarded), or to receive a last error."""
_TICK = 0.05
"""Seconds between checks for a second signal."""


class BoundedProtocol(H11Protocol):
    """HTTP with bounds: connections that are too many, too slow or not HTTP get an error in the usual format.

    Attributes:
        max_connections: at a time.
        head_seconds: time for the head of a request.
    """

    max_connections: int
    head_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeout: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, f"connections: must be at most {self.max_connections}; try again later")
        else:
            self._start_timeout()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_timeout()  # the head is complete; the body has its own limits
        elif self._timeout is None and not self._refused and not self.transport.is_closing():
            self._start_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timeout()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, f"head: must be that of an HTTP/1.1 request of bounded size ({msg})")

    def _start_timeout(self) -> None:
        self._timeout = self.loop.call_later(self.head_seconds, self._time_out)

    def _cancel_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _time_out(self) -> None:
        self._timeout = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and not self.transport.is_closing():
            self._refuse(408, f"head: must arrive within {self.head_seconds} s")

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(error_content(status, message)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
            ("retry-after", "1"),
        ]
        try:
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # in the middle of another answer: no error can be sent any more
            self.transport.close()
            return
        # Closing now would reset the connection if the client still sends, and it might not receive the error.
        self._refused = True
        self.transport.write_eof()
        self._cancel_timeout()
        self._timeout = self.loop.call_later(_LINGER, self.transport.abort)


class Server(uvicorn.Server):
    """After a signal, answers all requests that it has accepted, or sends an error, before it ends.

    Attributes:
        signalled: the last signal that came, None if none did.
        cut_off: answers that were unfinished at the end.
    """

    signalled: int | None = None
    cut_off = 0
    _hurried = False

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signalled = sig
        self._hurried = self.should_exit  # a second signal, of either kind, ends it at once
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_unfinished())
        try:
            await super().shutdown(sockets)  # waits for the end of every answer
        finally:
            ending.cancel()

    async def _end_unfinished(self) -> None:
        """End unfinished answers when the time is over or a second signal comes.

        They are not cancelled, which would be logged as a failure of the application. The engine stops, so their
        requests fail, and open connections are closed.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._service.limits.drain_seconds
        while not self._hurried and loop.time() < end:
            await asyncio.sleep(_TICK)
        left = list(self.server_state.tasks)
        self.cut_off = len(left)
        await asyncio.to_thread(self._service.engine.stop)
        if left:
            await asyncio.wait(left, timeout=_LINGER)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address is not of this machine, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(f"host: must be an address of this machine, got {host!r} ({error})") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ConfigError(f"port: must be free on {host}, got {port} ({error.strerror}); 0 takes any") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(service: Service) -> Server:
    """A server that is not running yet; ``server.run(sockets=[...])`` runs it until a signal or ``should_exit``."""
    limits = service.limits
    bounds = {"max_connections": limits.connections, "head_seconds": limits.head_seconds}
    config = uvicorn.Config(
        make_app(service),
        http=type("BoundedProtocol", (BoundedProtocol,), bounds),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=max(1, round(limits.head_seconds)),
    )
    return Server(config, service)


def serve(service: Service, listening: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT, and answer the requests that came before it.

    Returns:
        0 when all were answered, 128 + n when signal n cut answers off.
    """
    server = make_server(service)
    try:
        server.run(sockets=[listening])
    finally:
        service.engine.stop()  # where the server failed: the engine's thread must not outlive it
    return 128 + server.signalled if server.cut_off and server.signalled is not None else 0
