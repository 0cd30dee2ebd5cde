"""Runs a server until it is told to end, and then finishes what was accepted."""

from __future__ import annotations

import asyncio
import copy
import logging
import signal
import socket
from contextlib import suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from foveate.errors import InputError

from .app import create_app
from .errors import ApiError
from .settings import Settings

logger = logging.getLogger("foveate.serving")

MAX_CONNECTIONS = 512
"""That are open at a time; more are closed at once."""


def serve(settings: Settings) -> None:
    """Listens and answers until SIGTERM or Ctrl-C; says on standard output where.

    Raises:
        InputError: a model does not exist, or the address cannot be listened on.
        CheckpointError: a model's folder holds none.
    """
    app = create_app(settings)
    sock = _listen(settings.host, settings.port)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol(settings.upload_timeout),
        ws="none",
        lifespan="on",
        log_config=_log_config(),
        server_header=False,
        timeout_graceful_shutdown=round(2 * settings.request_timeout + settings.upload_timeout),
    )
    host, port = sock.getsockname()[:2]
    print(f"foveate serves on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    Server(config).run(sockets=[sock])


class Server(uvicorn.Server):
    """Ends with success when it is told to end: signals are not raised again afterwards."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finishes what was accepted; a second Ctrl-C does not."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def protocol(patience: float) -> type[H11Protocol]:
    """A class of connections whose peers must send the head of a request within `patience` seconds, and go on reading
    answers as often.

    uvicorn waits for both as long as it takes, so that connections of which nothing comes would use all there are.
    """

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                logger.warning("%d connections are open; another is closed", MAX_CONNECTIONS)
                transport.abort()
                return
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_nothing()
            self._read_on()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:  # the rest of a head, or of a body nobody reads
                self._expect()
            else:
                self._expect_nothing()

        def pause_writing(self) -> None:
            super().pause_writing()
            # Nothing of an answer is read any more; what waits to be written is lost, or it would wait for ever.
            self._unread = self.loop.call_later(patience, self.transport.abort)

        def resume_writing(self) -> None:
            self._read_on()
            super().resume_writing()

        def _read_on(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def on_response_complete(self) -> None:
            self._expect_nothing()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, f"this is not HTTP ({msg.rstrip('.')}); send it anew.", "invalid_http"))

        def _expect(self) -> None:
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(patience, self._give_up)

        def _expect_nothing(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
                self._refuse(ApiError(408, f"the head of the request did not arrive within {patience:g} s.", "slow"))
            elif not self.transport.is_closing():
                self.transport.abort()

        def _refuse(self, error: ApiError) -> None:
            body = error.to_json()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            with suppress(h11.LocalProtocolError):  # an answer has begun already
                parts = [
                    h11.Response(status_code=error.status, headers=headers),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ]
                self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
            self.transport.close()

    return Patient


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{host}:{port} cannot be listened on ({reason}); give another --host or --port.") from None


def _log_config() -> dict[str, Any]:
    """uvicorn's, with everything on standard error."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["foveate.serving"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return config
