"""Who is next: clients share the model's time, and so do the requests of each.

Start-time fair queueing over measured time (Goyal, Vin and Cheng, SIGCOMM 1996): who has used least is next, and who
comes, or comes back, begins where the one that has used least stands, so that nobody saves up time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

J = TypeVar("J", bound=Hashable)


@dataclass
class _Client(Generic[J]):
    used: float = 0.0
    jobs: dict[J, float] = field(default_factory=dict)  # job -> time it has used


class Turns(Generic[J]):
    """Time used by jobs and their clients."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client[J]] = {}
        self._owners: dict[J, str] = {}
        self._numbers: dict[J, int] = {}
        self._count = 0

    def add(self, job: J, client: str) -> None:
        """A job comes, of a client."""
        own = self._clients.get(client)
        if own is None:
            start = min((other.used for other in self._clients.values()), default=0.0)
            own = self._clients[client] = _Client(start)
        own.jobs[job] = min(own.jobs.values(), default=0.0)
        self._owners[job] = client
        self._count += 1
        self._numbers[job] = self._count

    def remove(self, job: J) -> None:
        """A job goes; one that is gone already may."""
        client = self._owners.pop(job, None)
        if client is None:
            return
        del self._numbers[job]
        own = self._clients[client]
        del own.jobs[job]
        if not own.jobs:
            del self._clients[client]

    def count(self, client: str) -> int:
        """Jobs of a client."""
        own = self._clients.get(client)
        return 0 if own is None else len(own.jobs)

    def charge(self, job: J, time: float) -> None:
        """A job has used time; one that is gone has not."""
        client = self._owners.get(job)
        if client is not None:
            own = self._clients[client]
            own.used += time
            own.jobs[job] += time

    def first(self, jobs: Iterable[J]) -> J | None:
        """Of these jobs the one whose turn it is; None of none."""
        return min(jobs, key=lambda job: self._place(job, {}, {}), default=None)

    def fill(
        self, jobs: Sequence[J], left: Callable[[J], int], size: int, turn: int, unit: float
    ) -> list[tuple[J, int]]:
        """Shares out a batch, turn by turn to whose turn it would be if the time were used already.

        Args:
            jobs: that may run together.
            left: units of work that a job has.
            size: units of a batch.
            turn: most units of one turn.
            unit: time that a unit takes.

        Returns:
            Jobs with their units, in the order of their first turns.
        """
        given: dict[J, int] = {}
        of_client: dict[str, float] = {}
        of_job: dict[J, float] = {}
        open_jobs = {job for job in jobs if left(job) > 0}
        room = size
        while room and open_jobs:
            job = min(open_jobs, key=lambda own: self._place(own, of_client, of_job))
            units = min(turn, room, left(job) - given.get(job, 0))
            given[job] = given.get(job, 0) + units
            room -= units
            client = self._owners[job]
            of_client[client] = of_client.get(client, 0.0) + units * unit
            of_job[job] = of_job.get(job, 0.0) + units * unit
            if given[job] == left(job):
                open_jobs.discard(job)
        return list(given.items())

    def _place(self, job: J, of_client: dict[str, float], of_job: dict[J, float]) -> tuple[float, float, int]:
        client = self._owners[job]
        own = self._clients[client]
        return (
            own.used + of_client.get(client, 0.0),
            own.jobs[job] + of_job.get(job, 0.0),
            self._numbers[job],
        )
