"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; the best one by default.")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default what suits.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="int8", help="Linear layers in int8, on a CPU; pays where they are wide."),
]

ModelName = Annotated[str, typer.Option("--model", help="Folder of the model, or the name of a shipped one.")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Folder to write; the recipe's `output` by default.")]

SECONDS_BETWEEN_LOG_LINES = 5.0


class Progress(Protocol):
    """What long work calls: `done` of `total` units are finished."""

    def __call__(self, done: int, total: int) -> None: ...


def one_line(sentence: str) -> str:
    """One line whatever the sentence quotes, and no control characters of a hostile file name on the terminal."""
    line = " ".join(sentence.split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar on a terminal; a log line every few seconds otherwise; both on stderr, for stdout is the result."""
    if not sys.stderr.isatty():
        yield _LogLines(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


class _LogLines:
    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LOG_LINES:
            self._last = now
            line = f"{time.strftime('%H:%M:%S')} {self._what}: {done} of {total} ({now - self._started:.0f} s)"
            print(line, file=sys.stderr, flush=True)
