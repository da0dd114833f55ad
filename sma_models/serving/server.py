"""Running the application on a port, from the first connection to the last answer."""

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
"""Seconds in which a client that was turned away may finish sending, to nobody, or hears that its answer is cut off."""
_TICK = 0.05
"""Seconds between looks at whether a second signal came."""


class Protocol(H11Protocol):
    """Connections that are refused, too slow or no HTTP hear so in the format of all other errors."""

    most: int
    head_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience: asyncio.TimerHandle | None = None
        self._turned_away = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._turn_away(503, f"the server has {self.most} connections already; try again later")
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        if self._turned_away:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_more()  # the head is complete; what follows has its own limits
        elif self._patience is None and not self._turned_away and not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._turn_away(400, f"head: must be that of an HTTP/1.1 request of bounded size ({msg})")

    def _wait(self) -> None:
        self._patience = self.loop.call_later(self.head_seconds, self._lose_patience)

    def _wait_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _lose_patience(self) -> None:
        self._patience = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and not self.transport.is_closing():
            self._turn_away(408, f"head: must arrive within {self.head_seconds} s")

    def _turn_away(self, status: int, message: str) -> None:
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
        except h11.LocalProtocolError:  # in the middle of another answer: nothing can be said any more
            self.transport.close()
            return
        # Closing now would reset the connection if the client still sends, and it might not hear what was said.
        self._turned_away = True
        self.transport.write_eof()
        self._wait_no_more()
        self._patience = self.loop.call_later(_LINGER, self.transport.abort)


class Server(uvicorn.Server):
    """Ends as it should after a signal: everything that was there is answered first, or is told why not.

    Attributes:
        signalled: the last signal that came, None if none did.
        cut_off: answers that the end of the server broke off.
    """

    signalled: int | None = None
    cut_off = 0
    _hurried = False

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signalled = sig
        self._hurried = self.should_exit  # a second signal, of either kind, is meant
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        breaking_off = asyncio.create_task(self._break_off())
        try:
            await super().shutdown(sockets)  # waits until every answer has come to its end
        finally:
            breaking_off.cancel()

    async def _break_off(self) -> None:
        """End the answers that are left when the time is over or a second signal comes.

        None of them is cancelled, which would be logged as a failure of the application: the engine stops, which they
        hear, and connections that are still there are closed.
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
        ConfigError: it cannot be had, for instance because the port is in use.
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
    """Where clients find it, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(service: Service) -> Server:
    """A server that is not running yet; ``server.run(sockets=[...])`` runs it until a signal or ``should_exit``."""
    limits = service.limits
    bounded = type("Protocol", (Protocol,), {"most": limits.connections, "head_seconds": limits.head_seconds})
    config = uvicorn.Config(
        make_app(service),
        http=bounded,
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
    """Serve until SIGTERM or SIGINT, and answer what was asked before that.

    Returns:
        0 when everything was answered, 128 + n when signal n cut answers off.
    """
    server = make_server(service)
    try:
        server.run(sockets=[listening])
    finally:
        service.engine.stop()  # where the server failed; no thread may outlive this one
    return 128 + server.signalled if server.cut_off and server.signalled is not None else 0
