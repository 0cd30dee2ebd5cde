"""`foveate world scenes`: write rendered scenes in the layout of a real data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Debug, progress_bar
from foveate.errors import InputError

app = typer.Typer(
    help="Render data with exact ground truth, in the layouts of real data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _world() -> None:
    # With a callback, typer keeps `scenes` a verb of its own although it is the only one.
    pass


@app.command()
def scenes(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must be new or empty.")],
    layout: Annotated[
        str, typer.Option("--format", help="visual-genome, refcocog, coco, llava, textvqa, mmbench or ade20k.")
    ] = "visual-genome",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first scene; the next has the next number.")] = 0,
    count: Annotated[int, typer.Option("--count", help="How many scenes.")] = 100,
    size: Annotated[int, typer.Option("--size", help="Width and height in pixels.")] = 256,
    objects: Annotated[str, typer.Option("--objects", help="Fewest-most objects in a scene.")] = "4-8",
    val_fraction: Annotated[float, typer.Option("--val-fraction", help="Share of the validation split, 0 to 1.")] = 0.1,
    processes: Annotated[int, typer.Option("--processes", help="Processes that draw.")] = 1,
    debug: Debug = False,
) -> None:
    """Render scenes: objects with attributes and relations, masks, boxes, captions, questions.

    The same seed gives the same scene, on any machine and with any number of processes.
    """
    from foveate.world.export import export_scenes

    fewest, most = _range(objects)
    with progress_bar("scenes") as progress:
        export_scenes(
            out,
            layout,
            first_seed=seed,
            count=count,
            size=size,
            objects=(fewest, most),
            val_fraction=val_fraction,
            processes=processes,
            progress=progress,
        )
    print(f"{count} scenes in the layout of {layout}: {out}")


def _range(text: str) -> tuple[int, int]:
    """'4-8' -> (4, 8), '5' -> (5, 5)."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise InputError(f"--objects {text!r} is not a number or a range; write it as 4-8.")
    return int(first), int(last or first)
