"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server; each has its own registry, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._make(Counter, "requests", "Answers.", ["route", "status"])
        self.seconds = self._make(Histogram, "request_seconds", "A request in whole.", ["route"], buckets=_SECONDS)
        self.jobs = self._make(Gauge, "jobs", "Accepted requests that wait or run.")
        self.waiting_regions = self._make(Gauge, "waiting_regions", "Regions, at most, that wait or run.")
        self.refused = self._make(Counter, "refused", "Requests that were not accepted.", ["code"])
        self.cancelled = self._make(Counter, "cancelled", "Accepted requests that got no answer.", ["why"])
        self.regions = self._make(Counter, "regions", "Regions described.")
        self.tokens = self._make(Counter, "tokens", "Tokens said.")
        self.batch_units = self._make(
            Histogram, "batch_size", "Regions or questions that ran together.", ["verb"], buckets=_SIZES
        )
        self.batch_jobs = self._make(
            Histogram, "batch_requests", "Requests that ran together.", ["verb"], buckets=_SIZES
        )
        self.model_seconds = self._make(Counter, "model_seconds", "Time in the models.", ["step"])
        self.worker_up = self._make(Gauge, "worker_up", "Whether the worker of a device is there.", ["device"])
        self.restarts = self._make(Counter, "worker_restarts", "Workers that ended unasked.", ["device"])

    def _make(self, kind: Any, name: str, what: str, labels: Sequence[str] = (), **options: Any) -> Any:
        return kind(f"foveate_{name}", what, labels, registry=self.registry, **options)

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
