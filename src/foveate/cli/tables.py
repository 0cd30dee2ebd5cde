"""What training and evaluation print."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.training.runner import EvaluationResult
    from foveate.training.trainer import TrainResult


def print_training(result: TrainResult) -> None:
    """The last logged losses, and where the model is."""
    last = result.history[-1] if result.history else {}
    _table(f"{result.steps} steps, {result.seconds:.0f} s", last)
    print(f"model: {result.checkpoint}")
    print(f"run:   {result.output}")


def print_evaluation(result: EvaluationResult, report: Path | None = None) -> None:
    """A row per metric."""
    _table(f"{result.method}: {result.model} ({result.seconds:.0f} s)", result.metrics)
    if report is not None:
        print(f"report: {report}")


def _table(title: str, values: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in _flat(values):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    # Into a file or a pipe no width is known, and rich would cut the names at 80.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics as dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
