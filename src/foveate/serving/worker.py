"""`python -m foveate.serving.worker`: the process that has the models of one device.

It reads frames from its standard input and writes frames to its standard output; it ends when its input does. Pictures
are read by threads of their own while the model works.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from foveate.errors import FoveateError, InputError

from .frames import pack, read_frame_from
from .models import Models

logger = logging.getLogger("foveate.serving.worker")

_READERS = 2


def main() -> None:
    """Runs until the server closes the pipe."""
    source, sink = _take_pipes()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the server decides when its worker ends, by closing the pipe
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s:     %(message)s", level=logging.WARNING)
    warnings.showwarning = lambda message, *rest: logger.warning("%s", message)
    first = read_frame_from(source)
    if first is None:
        return
    worker = Worker(first[0], sink)
    threading.Thread(target=worker.listen, args=(source,), daemon=True).start()
    worker.work()


class Worker:
    """Reads what is to be done, does it, and says what came of it.

    Args:
        setup: the arguments of `Models`, and max_pixels.
        sink: where frames go.
    """

    def __init__(self, setup: dict[str, Any], sink: BinaryIO) -> None:
        self._max_pixels = setup.pop("max_pixels")
        self.models = Models(**setup)
        self._sink = sink
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(_READERS, "pictures")

    def work(self) -> None:
        """Runs the models; returns never."""
        import torch  # noqa: F401  (seconds, before anybody waits for them)
        import transformers  # noqa: F401

        from foveate.processes import hide_weight_bars, keep_freed_memory

        hide_weight_bars()
        keep_freed_memory()
        self.say({"is": "ready"})
        actions: dict[str, Callable[..., Any]] = {
            "load": self.models.load,
            "propose": self.models.propose,
            "describe": self.models.describe,
            "ask": self._ask,
            "step": self.models.step,
        }
        while True:
            call = self._calls.get()
            number, action = call.pop("call"), actions[call.pop("do")]
            try:
                self.say({"is": "done", "call": number, "result": action(**call)})
            except BaseException as error:
                self.say({"is": "failed", "call": number, "error": explain(error)})

    def listen(self, source: BinaryIO) -> None:
        """Takes frames until there are no more, which ends the process."""
        try:
            while (frame := read_frame_from(source)) is not None:
                message, blob = frame
                if message["do"] == "open":
                    self._pool.submit(self._open, message["job"], message["spec"], blob)
                elif message["do"] == "close":
                    self.models.close(message["job"])
                else:
                    self._calls.put(message)
        finally:
            os._exit(0)  # a model in the middle of its work is not waited for: nobody is left who would read it

    def say(self, message: dict[str, Any]) -> None:
        """Writes a frame, from whatever thread."""
        frame = pack(message)
        with self._lock:
            self._sink.write(frame)
            self._sink.flush()

    def _open(self, job: str, spec: dict[str, Any], picture: bytes) -> None:
        try:
            self.say({"is": "opened", "job": job, **self.models.open(job, spec, picture, self._max_pixels)})
        except BaseException as error:
            self.say({"is": "refused", "job": job, "error": explain(error)})

    def _ask(self, group: str, names: list[str]) -> None:
        self.models.ask(group, names, lambda job, text: self.say({"is": "piece", "job": job, "text": text}))


def explain(error: BaseException) -> dict[str, str]:
    """An error as the server is told of it: whose fault it is, and the sentence."""
    if isinstance(error, InputError):
        return {"kind": "input", "message": str(error)}
    if isinstance(error, FoveateError):
        return {"kind": "checkpoint", "message": str(error)}
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return {"kind": "memory", "message": "the memory of the server is not enough for this request; ask for less."}
    logger.error("a request failed", exc_info=error)
    return {"kind": "fault", "message": "the server failed at this request, by a fault of its own; its log says more."}


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, for frames alone: what libraries print goes to standard error."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return source, sink


if __name__ == "__main__":
    main()
