"""`foveate train`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Debug, RunFolder
from foveate.cli.tables import print_training
from foveate.processes import hide_weight_bars, keep_freed_memory


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, such as recipes/dynrefer/world.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as training.max_steps=200.")
    ] = None,
    out: RunFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Train a model by a recipe.

    A resumed run gives the same numbers as one that was never interrupted.
    """
    from foveate.training.runner import train as run

    hide_weight_bars()
    keep_freed_memory()
    print_training(run(recipe, overrides or [], resume=resume, out=out))
