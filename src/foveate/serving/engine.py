"""Between the routes and the models: requests wait here in fairness, run together, and give their events.

A lane is a device with its worker process. A job is a request that was accepted; it belongs to one lane. Its picture is
sent to the worker ("opened") when there is room for it there, and it runs in slices, so that nobody waits for the whole
of a large one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from foveate.checkpoints import WEIGHTS, find_checkpoint, shipped_models
from foveate.methods import looks_at_objects

from .errors import ApiError, bad_request
from .fairness import Turns
from .metrics import Metrics
from .process import CallFailed, WorkerGone, WorkerProcess
from .settings import VERBS, Settings

logger = logging.getLogger("foveate.serving")

TOKENS_OF_A_STEP = 16
"""Of each answer of a group, before others have their turn."""
GROUPS_AT_ONCE = 4
"""Of questions that are being answered: each holds a cache of keys and values."""
TURNS_OF_A_BATCH = 4
"""A job takes at most a quarter of a batch at a turn, so that the regions of several are in it."""
_DELAYS_FOR_PICTURES = 10
_OPEN_JOBS = 128
_OPEN_PIXELS = 128_000_000
_SECONDS_OF_LOADING = 1800.0
_SECONDS_BETWEEN_SWEEPS = 0.1
_LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Served:
    """A model that answers a verb.

    Attributes:
        name: as clients see it.
        folder: where it is.
        world_only: whether it is one of those that ship, which know the rendered world only.
    """

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
    """What a client holds of its job: the events, and the right to give it up."""

    def __init__(self, job: Job, lane: Lane) -> None:
        self._job = job
        self._lane = lane

    async def next(self) -> tuple[str, Any]:
        """The next event: "start", then "region" or "piece" as often as there are, then "done".

        Raises:
            ApiError: the job failed; nothing more comes.
        """
        event, data = await self._job.events.get()
        if event == "error":
            raise data
        return event, data

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """All events that are left. Raises as `next`."""
        while True:
            event, data = await self.next()
            yield event, data
            if event == "done":
                return

    def cancel(self) -> None:
        """Nobody wants it any more. Of a job that is complete, nothing."""
        self._lane.drop(self._job, ApiError(499, "the client went away.", "cancelled"), "client")


@dataclass(eq=False)
class Job:
    """An accepted request.

    Attributes:
        units: regions that it will have at most, or 1 for a question: its weight in the queue.
        batch: what must be equal in jobs that run together.
        state: "waiting" (for room in the worker), "opening", "proposing" (to be asked for its regions), "ready", "said"
            (in a group that is being answered), "over".
        rows, done: regions in all and described.
        count: regions given out.
    """

    name: str
    verb: str
    client: str
    spec: dict[str, Any]
    picture: bytes
    units: int
    batch: str
    deadline: float
    state: str = "waiting"
    pixels: int = 0
    rows: int = 0
    done: int = 0
    count: int = 0
    size: tuple[int | None, int | None] = (None, None)
    accepted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    events: asyncio.Queue[tuple[str, Any]] = field(default_factory=asyncio.Queue)

    @property
    def over(self) -> bool:
        return self.state == "over"

    def milliseconds(self) -> dict[str, float]:
        """Where the time went."""
        now = time.perf_counter()
        started = now if self.started is None else self.started
        parts = {"queue": started - self.accepted, "work": now - started, "total": now - self.accepted}
        return {name: round(1000 * seconds, 1) for name, seconds in parts.items()}


@dataclass(eq=False)
class _Group:
    name: str
    jobs: list[Job]


class Engine:
    """The models of a server, on all of its devices.

    Raises:
        InputError: a model does not exist.
        CheckpointError: its folder holds none.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.models: dict[str, Served] = {}
        proposers = {verb: _place(name) for verb, name in settings.proposers.items() if name != "none"}
        for verb, default in VERBS.items():
            name = settings.models.get(verb, default)
            if verb not in settings.models and name not in shipped_models():
                continue
            folder = find_checkpoint(name)
            shown = folder.parent.name if folder.name == "checkpoint" else folder.name
            own = self.models[verb] = Served(shown, str(folder), folder.parent == WEIGHTS)
            if verb == "ask" and own.world_only and verb not in settings.proposers and looks_at_objects(folder):
                proposers[verb] = "proposer-world"
        setup = {
            "names": {verb: own.folder for verb, own in self.models.items()},
            "proposers": proposers,
            "dtype": settings.dtype,
            "max_pixels": settings.max_pixels,
        }
        self.lanes = [Lane(self, {**setup, "device": device}) for device in settings.devices or (None,)]
        self.stopping = False
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the workers; they are ready some seconds later."""
        for lane in self.lanes:
            lane.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Ends the workers. Jobs that are not complete fail."""
        self.stopping = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*(lane.stop() for lane in self.lanes))

    def check_ready(self) -> None:
        """Whether a request would be taken now.

        Raises:
            ApiError: 503: no worker is up, or the queue is full.
        """
        if self.stopping or not any(lane.up for lane in self.lanes):
            raise ApiError(503, "no worker is up yet; try again soon.", "not_ready", headers={"Retry-After": "1"})
        if self._count() >= self.settings.max_queue:
            raise ApiError(503, "the queue is full; try again soon.", "queue_full", headers={"Retry-After": "1"})

    def is_loaded(self, verb: str) -> bool:
        """Whether the model of a verb is in memory."""
        return any(verb in lane.loaded for lane in self.lanes)

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
        """Accepts a request.

        Args:
            verb: "describe" or "ask".
            spec: as `requests` makes it.
            picture: encoded, or nothing.
            client: who shares the model's time with others.

        Raises:
            ApiError: 429: too much waits already.
        """
        units = _units(spec)
        self._check_room(units, client)
        shared = {key: spec.get(key) for key in _SHARED[verb]}
        name = f"j{next(_NUMBERS)}"
        # Drawn tokens depend on what is drawn beside them; alone, a seed gives the same answer again.
        alone = verb == "ask" and spec["generation"].get("temperature", 0) > 0
        batch = json.dumps([verb, shared, name if alone else ""], sort_keys=True)
        lane = min(self.lanes, key=lambda own: own.units)
        job = Job(name, verb, client, spec, picture, units, batch, time.monotonic() + self.settings.request_timeout)
        lane.add(job)
        self.count_jobs()
        return Ticket(job, lane)

    def count_jobs(self) -> None:
        """Tells the metrics what waits."""
        self.metrics.jobs.set(self._count())
        self.metrics.waiting_regions.set(sum(lane.units for lane in self.lanes))

    def _count(self) -> int:
        return sum(len(lane.jobs) for lane in self.lanes)

    def _check_room(self, units: int, client: str) -> None:
        settings = self.settings
        count, waiting = self._count(), sum(lane.units for lane in self.lanes)
        own = sum(lane.turns.count(client) for lane in self.lanes)
        if count >= settings.max_queue or (waiting and waiting + units > settings.max_queue_regions):
            code, what = "queue_full", f"{count} requests with {waiting} regions wait already"
        elif not settings.local_only and own >= max(1, settings.max_queue * 3 // 4):
            code, what = "client_queue_full", f"{own} requests of yours wait already, and others want their turn"
        else:
            return
        self.metrics.refused.labels(code).inc()
        seconds = sum(lane.units * lane.unit_seconds for lane in self.lanes) / len(self.lanes)
        wait = str(min(60, max(1, math.ceil(seconds))))
        raise ApiError(429, f"{what}; send this again in {wait} s.", code, headers={"Retry-After": wait})

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_SWEEPS)
            now = time.monotonic()
            for lane in self.lanes:
                if lane.loading:
                    continue
                for job in [job for job in lane.jobs.values() if now > job.deadline]:
                    limit = self.settings.request_timeout
                    late = ApiError(504, f"the answer took longer than {limit:g} s; ask for less at a time.", "timeout")
                    lane.drop(job, late, "timeout")


class Lane:
    """A device: its worker, which is started anew when it ends, and the jobs that are its.

    Attributes:
        jobs: by name, all that are not over.
        turns: who is next.
        loaded: verbs whose models are in the worker's memory.
        loading: whether one is being loaded, which takes as long as it takes.
        up: whether the worker takes work.
        unit_seconds: what a region takes, lately.
    """

    def __init__(self, engine: Engine, setup: dict[str, Any]) -> None:
        self.engine = engine
        self.settings = engine.settings
        self.jobs: dict[str, Job] = {}
        self.turns: Turns[Job] = Turns()
        self.loaded: set[str] = set()
        self.loading = False
        self.unit_seconds = 0.05
        self._setup = setup
        self._device = setup["device"] or "default"
        self._groups: dict[str, _Group] = {}
        self._given_up: dict[str, int] = {}  # pixels of pictures that the worker still reads for nobody
        self._worker: WorkerProcess | None = None
        self._wake = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def units(self) -> int:
        """Regions, at most, that wait or run."""
        return sum(max(0, job.units - job.done) for job in self.jobs.values())

    @property
    def up(self) -> bool:
        return self._worker is not None and self._worker.ready.done() and not self._worker.gone.is_set()

    # ---------------------------------------------------------------- the worker

    def start(self) -> None:
        """Starts the worker and keeps it running."""
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Ends the worker, and what is not complete."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        for job in list(self.jobs.values()):
            self.drop(job, ApiError(503, "the server is going down; send this again later.", "shutdown"), "shutdown")
        if self._worker is not None:
            await self._worker.stop()
            self._worker = None

    async def _keep(self) -> None:
        pause = 0.0
        while True:
            await asyncio.sleep(pause)
            started = time.monotonic()
            try:
                worker = self._worker = await WorkerProcess.start(self._setup, self._heard)
                await worker.ready
                self.engine.metrics.worker_up.labels(self._device).set(1)
                self._open_more()
                work = asyncio.create_task(self._work(worker))
                try:
                    await worker.gone.wait()
                finally:
                    work.cancel()
                    with suppress(asyncio.CancelledError):
                        await work
                logger.error("the worker of device %s ended; another is started", self._device)
            except (WorkerGone, OSError) as error:
                logger.error("the worker of device %s does not start: %s", self._device, error)
            self._lost()
            # One that ends as soon as it has started is not started all the time.
            short = time.monotonic() - started < 60
            pause = min(_LONGEST_PAUSE, 2 * pause + 0.1) if short else 0.0

    def _lost(self) -> None:
        """The worker ended: what it had is lost, what was not sent yet waits for the next."""
        self.engine.metrics.worker_up.labels(self._device).set(0)
        self.engine.metrics.restarts.labels(self._device).inc()
        self.loaded.clear()
        self.loading = False
        self._groups.clear()
        for job in [job for job in self.jobs.values() if job.state != "waiting"]:
            lost = ApiError(
                503,
                "the model's process ended while it worked on this request; send it again.",
                "worker_lost",
                headers={"Retry-After": "1"},
            )
            self.drop(job, lost, "worker")
        self._given_up.clear()

    def _heard(self, message: dict[str, Any]) -> None:
        job = self.jobs.get(message["job"])
        kind = message["is"]
        if kind in ("opened", "refused") and job is None:  # given up meanwhile
            self._given_up.pop(message["job"], None)
            self._post_close(message["job"])
            self._open_more()
        elif kind == "opened" and job is not None:
            self._opened(job, message)
        elif kind == "refused" and job is not None:
            job.state = "ready"  # the worker is done with its picture
            self.drop(job, _api_error(CallFailed(**message["error"])), "input")
        elif kind == "piece" and job is not None:
            job.events.put_nowait(("piece", {"text": message["text"]}))

    # ---------------------------------------------------------------- jobs

    def add(self, job: Job) -> None:
        """A job comes."""
        self.jobs[job.name] = job
        self.turns.add(job, job.client)
        self._open_more()

    def drop(self, job: Job, error: ApiError, why: str) -> None:
        """A job ends with an error. Of one that is over, nothing."""
        if not job.over:
            self.engine.metrics.cancelled.labels(why).inc()
            self._end(job, ("error", error))

    def _end(self, job: Job, event: tuple[str, Any]) -> None:
        if job.state == "opening":  # it is closed when it is open, and takes room in the worker until then
            self._given_up[job.name] = job.pixels
        elif job.state != "waiting":
            self._post_close(job.name)
        job.state = "over"
        job.picture = b""
        self.jobs.pop(job.name, None)
        self.turns.remove(job)
        job.events.put_nowait(event)
        self.engine.count_jobs()
        self._open_more()
        self._wake.set()

    def _post_close(self, name: str) -> None:
        if self._worker is not None:
            self._worker.post({"do": "close", "job": name})

    def _open_more(self) -> None:
        """Sends pictures to the worker, as long as it has room for them."""
        if self._worker is None or not self.up:
            return
        opened = [job for job in self.jobs.values() if job.state != "waiting"]
        waiting = [job for job in self.jobs.values() if job.state == "waiting"]
        pixels = sum(job.pixels for job in opened) + sum(self._given_up.values())
        count = len(opened) + len(self._given_up)
        while waiting and count < _OPEN_JOBS and (not count or pixels + self.settings.max_pixels <= _OPEN_PIXELS):
            job = self.turns.first(waiting)
            assert job is not None
            waiting.remove(job)
            job.state = "opening"
            job.pixels = self.settings.max_pixels if job.picture else 0  # until it is known
            self._worker.post({"do": "open", "job": job.name, "spec": job.spec}, job.picture)
            job.picture = b""
            count, pixels = count + 1, pixels + job.pixels

    def _opened(self, job: Job, message: dict[str, Any]) -> None:
        job.size = (message["width"], message["height"])
        job.pixels = (job.size[0] or 0) * (job.size[1] or 0)
        if job.spec["kind"] == "everything":
            job.state = "proposing"
        else:
            job.state = "ready"
            if job.verb == "describe":
                self._start_regions(job, message["rows"])
        self._open_more()
        self._wake.set()

    def _start_regions(self, job: Job, rows: int) -> None:
        job.state = "ready"
        job.rows = job.units = rows
        if not rows:
            self._describe_next(job, 0, [])

    def _describe_next(self, job: Job, units: int, regions: list[dict[str, Any]]) -> None:
        """Gives out what was said of the next regions of a job. Before the first an error is an answer of its own, so
        that the start is said only now."""
        if not job.done:
            job.events.put_nowait(("start", {"width": job.size[0], "height": job.size[1], "total": job.rows}))
        for region in regions:
            job.events.put_nowait(("region", region))
        job.done += units
        job.count += len(regions)
        if job.done >= job.rows:
            self._end(job, ("done", {"regions": job.count, "milliseconds": job.milliseconds()}))

    # ---------------------------------------------------------------- work

    async def _work(self, worker: WorkerProcess) -> None:
        """Runs what can run, whose turn it is first, until the worker is gone."""
        while True:
            leader = self._leader()
            left = [group for group in self._groups.values() if all(job.over for job in group.jobs)]
            if leader is None and not left:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                if left or leader is None:  # which end with their next step, as nobody waits for them
                    await self._step(worker, left[0])
                elif leader.verb not in self.loaded:
                    await self._load(worker, leader.verb)
                elif leader.state == "proposing":
                    await self._propose(worker, leader)
                elif leader.state == "said":
                    await self._step(worker, next(own for own in self._groups.values() if leader in own.jobs))
                elif leader.verb == "describe":
                    await self._describe(worker, leader)
                else:
                    await self._ask(worker, leader)
            except WorkerGone:
                return
            except Exception:  # by which nothing would run any more, and nobody would say so
                logger.exception("the work of device %s failed by a fault of the server", self._device)
                worker.kill()
                return

    def _leader(self) -> Job | None:
        """Whose turn it is, of the jobs that can go on."""
        states = {"ready", "proposing", "said"}
        runnable = [job for job in self.jobs.values() if job.state in states]
        if len(self._groups) >= GROUPS_AT_ONCE:
            runnable = [job for job in runnable if job.verb != "ask" or job.state == "said"]
        return self.turns.first(runnable)

    def _together(self, leader: Job) -> list[Job]:
        """The jobs that can run with a job, itself among them."""
        return [job for job in self.jobs.values() if job.state == "ready" and job.batch == leader.batch]

    async def _gather(self, enough: Callable[[], bool]) -> None:
        """Waits for others that are on their way, and some more for those whose pictures are being read."""
        delay = self.settings.batch_delay
        if not delay or enough():
            return
        await asyncio.sleep(delay)
        for _ in range(_DELAYS_FOR_PICTURES):
            if enough() or all(job.state != "opening" for job in self.jobs.values()):
                return
            await asyncio.sleep(delay)

    async def _load(self, worker: WorkerProcess, verb: str) -> None:
        self.loading = True
        try:
            await worker.call({"do": "load", "verb": verb}, _SECONDS_OF_LOADING)
        except CallFailed as error:
            logger.error("the model to %s cannot be loaded: %s", verb, error)
            for job in [job for job in self.jobs.values() if job.verb == verb]:
                name = self.engine.models[verb].name
                said = f"the model {name!r} of this server cannot be loaded; the server's log says why."
                self.drop(job, ApiError(500, said, "model_broken"), "fault")
            return
        finally:
            self.loading = False
        self.loaded.add(verb)
        now = time.monotonic()
        for job in self.jobs.values():  # which have waited for what is not their fault
            job.deadline = now + self.settings.request_timeout

    async def _propose(self, worker: WorkerProcess, job: Job) -> None:
        try:
            rows = await self._timed(worker, {"do": "propose", "name": job.name}, [(job, 1)])
        except CallFailed as error:
            self.drop(job, _api_error(error), "input")
            return
        if not job.over:
            self._start_regions(job, rows)

    async def _describe(self, worker: WorkerProcess, leader: Job) -> None:
        size = self.settings.batch_size
        await self._gather(lambda: sum(job.rows - job.done for job in self._together(leader)) >= size)
        batch = self.turns.fill(
            self._together(leader),
            lambda job: job.rows - job.done,
            size,
            max(1, size // TURNS_OF_A_BATCH),
            self.unit_seconds,
        )
        if batch:
            await self._describe_batch(worker, batch)

    async def _describe_batch(self, worker: WorkerProcess, batch: list[tuple[Job, int]]) -> None:
        slices = [(job.name, job.done, job.done + units) for job, units in batch]
        started = time.perf_counter()
        try:
            found = await self._timed(worker, {"do": "describe", "slices": slices}, batch)
        except CallFailed as error:
            await self._find_fault(worker, batch, error)
            return
        count = sum(units for _, units in batch)
        self.unit_seconds += 0.2 * ((time.perf_counter() - started) / count - self.unit_seconds)
        self.engine.metrics.regions.inc(count)
        for job, units in batch:
            if not job.over:
                self._describe_next(job, units, found[job.name])
        self.engine.count_jobs()

    async def _find_fault(self, worker: WorkerProcess, batch: list[tuple[Job, int]], error: CallFailed) -> None:
        """A batch failed: each job runs by itself, so that only those fail whose fault it is."""
        if len(batch) == 1:
            self.drop(batch[0][0], _api_error(error), "input")
            return
        for job, units in batch:
            if not job.over:
                await self._describe_batch(worker, [(job, units)])

    async def _ask(self, worker: WorkerProcess, leader: Job) -> None:
        await self._gather(lambda: len(self._together(leader)) >= self.settings.batch_questions)
        chosen = self.turns.fill(self._together(leader), lambda _: 1, self.settings.batch_questions, 1, 0.0)
        await self._ask_together(worker, [job for job, _ in chosen])

    async def _ask_together(self, worker: WorkerProcess, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.over]
        if not jobs:
            return
        group = _Group(f"g{next(_NUMBERS)}", jobs)
        message = {"do": "ask", "group": group.name, "names": [job.name for job in jobs]}
        try:
            await self._timed(worker, message, [(job, 1) for job in jobs])
        except CallFailed as error:
            if len(jobs) == 1:
                self.drop(jobs[0], _api_error(error), "input")
                return
            for job in jobs:
                await self._ask_together(worker, [job])
            return
        self._groups[group.name] = group
        for job in jobs:
            if not job.over:
                job.state = "said"
                job.events.put_nowait(("start", {}))

    async def _step(self, worker: WorkerProcess, group: _Group) -> None:
        left = [job for job in group.jobs if not job.over]
        try:
            message = {"do": "step", "group": group.name, "tokens": TOKENS_OF_A_STEP}
            answers = await self._timed(worker, message, [(job, 1) for job in left])
        except CallFailed as error:
            del self._groups[group.name]
            for job in left:
                self.drop(job, _api_error(error), "fault")
            return
        if answers is None:
            return
        del self._groups[group.name]
        for job in left:
            if job.over:
                continue
            answer = answers[job.name]
            self.engine.metrics.tokens.inc(answer["completion_tokens"])
            answer["foveate"]["milliseconds"] |= job.milliseconds()
            self._end(job, ("done", answer))

    async def _timed(self, worker: WorkerProcess, message: dict[str, Any], shares: list[tuple[Job, int]]) -> Any:
        """Calls the worker and charges the time to those who it was for."""
        started = time.perf_counter()
        for job, _ in shares:
            job.started = started if job.started is None else job.started
        metrics, verb = self.engine.metrics, shares[0][0].verb if shares else "ask"
        units = sum(own for _, own in shares)
        if message["do"] in ("describe", "ask"):
            metrics.batch_units.labels(verb).observe(units)
            metrics.batch_jobs.labels(verb).observe(len(shares))
        try:
            return await worker.call(message, 2 * self.settings.request_timeout)
        finally:
            took = time.perf_counter() - started
            metrics.model_seconds.labels(message["do"]).inc(took)
            for job, own in shares:
                self.turns.charge(job, took * own / units)


_NUMBERS = itertools.count(1)
_SHARED = {
    "describe": ("tasks", "view_policy", "classes", "controls", "num_beams"),
    "ask": ("keep", "generation"),
}


def _place(name: str) -> str:
    """What a worker loads: a shipped model by its name, others, which are found here, by their folder."""
    return name if name in shipped_models() else str(find_checkpoint(name))


def _units(spec: dict[str, Any]) -> int:
    if spec["kind"] == "chat":
        return 1
    if spec["kind"] == "everything":
        return spec["max_regions"]
    return max(1, len(spec["boxes"] or ()) + len(spec["masks"] or ()))


def _api_error(error: CallFailed) -> ApiError:
    if error.kind == "input":
        return bad_request(str(error))
    if error.kind == "memory":
        return ApiError(503, str(error), "out_of_memory", headers={"Retry-After": "5"})
    return ApiError(500, str(error), "model_fault")
