"""What every request passes before a route sees it, and every answer on its way back. Plain ASGI, so that bodies are
counted while they arrive and streams are not held up."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .settings import Settings, is_loopback

logger = logging.getLogger("foveate.serving")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_BODIES_AT_ONCE = 8
"""So many of the largest bodies may be on their way together."""


class Guard:
    """Tokens, origins, sizes and times; headers, errors and counts.

    Args:
        app: what it guards.
        routes: paths that are counted by name; others are "other".
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.routes = routes
        self._tokens = [token.encode() for token in settings.tokens]
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        path = scope["path"]
        route = path if path in self.routes else "other"
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers["Cache-Control"] = "no-store" if _is_private(path) else "no-cache"
            await send(message)

        body = _Body(self, receive)
        try:
            try:
                headers = Headers(scope=scope)
                self._check_site(headers)
                if _is_private(path):
                    scope["foveate.client"] = self._check_token(headers)
                self._check_length(headers)
                await self.app(scope, body.receive, send_guarded)
            except ApiError as error:
                if status:
                    raise
                await JSONResponse(error.to_dict(), error.status, error.headers)(scope, receive, send_guarded)
            except ClientDisconnect:
                status = status or 499  # which nobody hears
            except Exception:  # of any kind: who asked gets a sentence, the log the traceback
                logger.exception("a request failed by a fault of the server")
                if status:
                    raise
                said = ApiError(500, "the server failed at this request; its log says more.", "fault")
                await JSONResponse(said.to_dict(), 500)(scope, receive, send_guarded)
        finally:
            self._arriving -= body.size
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _check_site(self, headers: Headers) -> None:
        """A page of another site must not use a server that trusts who can reach it, nor through a name of its own."""
        host = headers.get("host", "")
        if self.settings.local_only and not self._tokens and not is_loopback(_name(f"//{host}")):
            raise ApiError(
                403, f"the host is {host[:80]!r}, and this server is for this machine only; use localhost.", "host"
            )
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host:
            raise ApiError(403, f"requests of pages from {origin[:80]!r} are not answered.", "origin")

    def _check_token(self, headers: Headers) -> str | None:
        """Who asks, where tokens say so."""
        if not self._tokens:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        token = given.strip().encode()
        right = [hmac.compare_digest(token, known) for known in self._tokens]  # all, so that time tells nothing
        if kind.lower() != "bearer" or not any(right):
            self.metrics.refused.labels("token").inc()
            raise ApiError(
                401,
                "the bearer token is missing or wrong; send Authorization: Bearer TOKEN with one of the server's.",
                "token",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return "token " + hashlib.sha256(token).hexdigest()[:16]

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.settings.max_request_bytes:
            raise self._too_large(f"{length[:20]} bytes")

    def _too_large(self, what: str) -> ApiError:
        self.metrics.refused.labels("too_large").inc()
        return ApiError(
            413,
            f"the body has {what}, and this server takes {self.settings.max_request_bytes}; send a smaller picture.",
            "too_large",
        )


class _Body:
    """The body of a request as it arrives: counted, and in time.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard = guard
        self._receive = receive
        self._complete = False
        self._deadline = time.monotonic() + guard.settings.upload_timeout
        self.size = 0

    async def receive(self) -> Message:
        """The next part.

        Raises:
            ApiError: 408: it does not come; 413: it is too much; 429: too many are sending.
        """
        if self._complete:
            return await self._receive()
        guard, settings = self._guard, self._guard.settings
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            guard.metrics.refused.labels("slow").inc()
            raise ApiError(
                408, f"the body did not arrive within {settings.upload_timeout:g} s; send it faster.", "slow"
            ) from None
        count = len(message.get("body", b""))
        self.size += count
        guard._arriving += count
        if self.size > settings.max_request_bytes:
            raise guard._too_large(f"more than {settings.max_request_bytes} bytes")
        if guard._arriving > _BODIES_AT_ONCE * settings.max_request_bytes:
            guard.metrics.refused.labels("bodies").inc()
            said = "too many large requests are being sent; send this again in 1 s."
            raise ApiError(429, said, "bodies", headers={"Retry-After": "1"})
        self._complete = not message.get("more_body", False)
        return message


def _is_private(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/") or path == "/metrics"


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such as an IPv6 address that is none
        return ""


def _place(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None
