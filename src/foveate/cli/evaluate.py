"""`foveate evaluate`: measure a model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Debug, ModelName, RunFolder, progress_bar
from foveate.cli.tables import print_evaluation
from foveate.processes import hide_weight_bars, keep_freed_memory


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, such as recipes/dynrefer/world.yaml.")],
    model: ModelName,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as evaluation.data.regions=100.")
    ] = None,
    out: RunFolder = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="int8",
            help="Evaluate on the CPU with linear layers in int8, and without, and print what that changes.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Evaluate a model on the data and by the protocol of a recipe."""
    from foveate.checkpoints import find_checkpoint
    from foveate.training.runner import evaluate as run

    hide_weight_bars()
    keep_freed_memory()
    with progress_bar("evaluation") as progress:
        result = run(recipe, find_checkpoint(model), overrides or [], out=out, quantize=quantize, progress=progress)
    print_evaluation(result)
