"""Between the routes and the models: requests wait here, run, and give their events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from foveate.checkpoints import WEIGHTS, find_checkpoint, shipped_models
from foveate.errors import CheckpointError, InputError

from .errors import ApiError, bad_request
from .settings import VERBS, Settings


@dataclass(frozen=True)
class Served:
    """A model that answers a verb."""

    name: str
    folder: str
    world_only: bool

    @property
    def note(self) -> str | None:
        """What users should know of it."""
        if not self.world_only:
            return None
        return f"{self.name} knows the rendered world only, nothing of photographs."


class Ticket:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.cancelled = False

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        while True:
            event, data = await self.queue.get()
            if event == "error":
                raise data
            yield event, data
            if event == "done":
                return

    def cancel(self) -> None:
        self.cancelled = True


class Engine:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models: dict[str, Served] = {}
        for verb, default in VERBS.items():
            name = settings.models.get(verb, default)
            if verb not in settings.models and name not in shipped_models():
                continue
            folder = find_checkpoint(name)
            shown = folder.parent.name if folder.name == "checkpoint" else folder.name
            self.models[verb] = Served(shown, str(folder), folder.parent == WEIGHTS)
        self._loaded: set[str] = set()
        self._thread = ThreadPoolExecutor(1)
        self._models: Any = None

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        self._thread.shutdown(wait=True)

    def check_ready(self) -> None:
        pass

    def is_loaded(self, verb: str) -> bool:
        return verb in self._loaded

    def model(self, verb: str, name: str | None) -> str:
        """The name of the model of a verb.

        Raises:
            ApiError: 404: there is none, or another was asked for.
        """
        own = self.models.get(verb)
        if own is None:
            raise ApiError(
                404, f"this server has no model to {verb}; start it with --model {verb}=NAME.", "model_not_found"
            )
        if name is not None and name != own.name:
            raise ApiError(
                404,
                f"this server has no model {name[:80]!r} to {verb}; it has {own.name!r}.",
                "model_not_found",
                param="model",
            )
        return own.name

    def submit(self, verb: str, spec: dict[str, Any], picture: bytes, client: str) -> Ticket:
        ticket = Ticket()
        loop = asyncio.get_running_loop()

        def put(event: str, data: Any) -> None:
            loop.call_soon_threadsafe(ticket.queue.put_nowait, (event, data))

        def run() -> None:
            try:
                self._run(verb, spec, picture, ticket, put, accepted)
            except InputError as error:
                put("error", bad_request(str(error)))
            except (CheckpointError, Exception) as error:
                put("error", ApiError(500, str(error)))

        accepted = time.perf_counter()
        self._thread.submit(run)
        return ticket

    def _run(self, verb: str, spec: dict[str, Any], picture: bytes, ticket: Ticket, put: Any, accepted: float) -> None:
        from .models import Models

        started = time.perf_counter()
        if self._models is None:
            self._models = Models(
                {verb: own.folder for verb, own in self.models.items()}, dict(self.settings.proposers)
            )
        models = self._models
        name = uuid.uuid4().hex
        opened = models.open(name, spec, picture, self.settings.max_pixels)
        models.load(verb)
        self._loaded.add(verb)
        times = lambda: {  # noqa: E731
            "queue": round(1000 * (started - accepted), 1),
            "work": round(1000 * (time.perf_counter() - started), 1),
            "total": round(1000 * (time.perf_counter() - accepted), 1),
        }
        if verb == "ask":
            put("start", opened)
            models.ask(name, [name], lambda _, text: put("piece", {"text": text}))
            while (answers := models.step(name, 16)) is None:
                if ticket.cancelled:
                    models.close(name)
            answer = answers[name]
            answer["foveate"]["milliseconds"] |= times()
            put("done", answer)
            return
        rows = opened["rows"] if opened["rows"] is not None else models.propose(name)
        put("start", {"width": opened["width"], "height": opened["height"], "total": rows})
        count = 0
        for start in range(0, rows, 16):
            if ticket.cancelled:
                break
            for region in models.describe([(name, start, min(rows, start + 16))])[name]:
                count += 1
                put("region", region)
        put("done", {"regions": count, "milliseconds": times()})
        models.close(name)
