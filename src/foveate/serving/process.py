"""The worker's process, seen from the server's event loop."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .frames import pack, read_frame

logger = logging.getLogger("foveate.serving")

_SECONDS_TO_END = 5.0


class WorkerGone(Exception):
    """The process ended before it answered."""


class CallFailed(Exception):
    """The worker could not do what was asked.

    Attributes:
        kind: "input" (the caller's fault), "checkpoint", "memory" or "fault".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class WorkerProcess:
    """A running worker.

    Args:
        heard: called with each message that answers no call: a job opened or refused, a piece of an answer.

    Attributes:
        ready: done once it takes work; failed if it ended before.
        gone: set once it has ended.
    """

    def __init__(self, process: asyncio.subprocess.Process, heard: Callable[[dict[str, Any]], None]) -> None:
        self._process = process
        self._heard = heard
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, setup: dict[str, Any], heard: Callable[[dict[str, Any]], None]) -> WorkerProcess:
        """Starts a process; it is not ready yet."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "foveate.serving.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which lets it finish
        )
        worker = cls(process, heard)
        worker.post(setup)
        return worker

    def post(self, message: dict[str, Any], blob: bytes = b"") -> None:
        """Says something that has no answer. To a process that is gone, nothing."""
        assert self._process.stdin is not None
        with suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(pack(message, blob))

    async def call(self, message: dict[str, Any], limit: float) -> Any:
        """Asks for something; one that takes longer than `limit` seconds does not come back, and is killed.

        Raises:
            CallFailed: it could not be done.
            WorkerGone: the process ended.
        """
        if self.gone.is_set():
            raise WorkerGone
        self._count += 1
        number = self._count
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        self.post({**message, "call": number})
        try:
            async with asyncio.timeout(limit):
                return await future
        except TimeoutError:
            logger.error("the worker took longer than %.0f s for %s, and is started anew", limit, message["do"])
            self.kill()
            raise WorkerGone from None
        finally:
            self._calls.pop(number, None)

    def kill(self) -> None:
        """Ends the process at once."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self) -> None:
        """Closes the pipe, at which the process ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_SECONDS_TO_END):
                await self.gone.wait()
        except TimeoutError:
            self.kill()
            await self.gone.wait()

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                message, _ = await read_frame(self._process.stdout)
                self._take(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:  # what it says cannot be trusted any more
            logger.exception("the worker said something that is not understood")
            self.kill()
        finally:
            # Killing one that has ended already would take its exit code from asyncio, which warns of that.
            try:
                async with asyncio.timeout(_SECONDS_TO_END):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
                await self._process.wait()
            self.gone.set()
            if not self.ready.done():
                self.ready.set_exception(WorkerGone("its process ended"))
                self.ready.exception()  # which nobody may be waiting for
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(WorkerGone())

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["is"]
        if kind == "ready":
            self.ready.set_result(None)
        elif kind in ("done", "failed"):
            future = self._calls.get(message["call"])
            if future is None or future.done():
                return
            if kind == "done":
                future.set_result(message["result"])
            else:
                error = message["error"]
                future.set_exception(CallFailed(error["kind"], error["message"]))
        else:
            self._heard(message)
