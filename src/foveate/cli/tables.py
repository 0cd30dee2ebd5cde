"""What training and evaluation print."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.methods.dynrefer.tuning import Tuning
    from foveate.training.runner import EvaluationResult
    from foveate.training.trainer import TrainResult


def print_training(result: TrainResult) -> None:
    """The last logged losses, and where the model is."""
    last = result.history[-1] if result.history else {}
    _table(f"{result.steps} steps, {result.seconds:.0f} s", last)
    print(f"model: {result.checkpoint}")
    print(f"run:   {result.output}")


def print_evaluation(result: EvaluationResult, report: Path | None = None) -> None:
    """A row per metric; of a quantised model with the metrics of the unquantised one and the differences."""
    if result.quantize is None or result.unquantized is None:
        _table(f"{result.method}: {result.model} ({result.seconds:.0f} s)", result.metrics)
    else:
        title = f"{result.method}: {result.model} ({result.quantize} {result.seconds:.0f} s, "
        title += f"unquantised {result.unquantized_seconds:.0f} s)"
        before = dict(_flat(result.unquantized))
        rows = []
        for name, value in _flat(result.metrics):
            numbers = all(isinstance(v, int | float) for v in (before.get(name), value))
            difference = value - before[name] if numbers else 0.0
            changed = f"{difference:+.2g}" if difference and math.isfinite(difference) else ""
            same_words = not numbers and value == before.get(name)
            rows.append([name, _cell(before.get(name)), "" if same_words else _cell(value), changed])
        _rows(title, ["metric", "unquantised", result.quantize, "difference"], rows)
    if report is not None:
        print(f"report: {report}")


def print_tuning(result: Tuning) -> None:
    """For each task a row per t and a column per round, then what to compare it with and what came out best."""
    from foveate.methods.dynrefer.tuning import round_name

    print(f"{result.model}: {result.regions} regions of {result.dataset}")
    for task, tuning in result.tasks.items():
        names = [round_name(number, tuning) for number in range(len(tuning.rounds))]
        rows = [
            [f"{t:g}", *(f"{own.values[k]:.4g}" + " *" * (t == own.best) for own in tuning.rounds)]
            for k, t in enumerate(result.t)
        ]
        _rows(f"{task}: {tuning.figure}", ["t", *names], rows)
        best = tuning.views if isinstance(tuning.views, str) else [*tuning.views]
        print(f"the model's own views {tuning.policy:.4g}, official search {tuning.search:.4g}")
        print(f"best: {best} {tuning.value:.4g}")
    if result.left_out:
        print(f"without labels, so not tuned: {', '.join(result.left_out)}")


def _table(title: str, values: Mapping[str, Any]) -> None:
    _rows(title, ["metric", "value"], [[name, _cell(value)] for name, value in _flat(values)])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column holds names and whose others hold numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Into a file or a pipe no width is known, and rich would cut the names at 80.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics as dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
