"""`foveate tune-views`: which views suit each task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Debug, ModelName, RunFolder, progress_bar
from foveate.cli.tables import print_tuning
from foveate.processes import hide_weight_bars, keep_freed_memory


def tune_views(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe whose evaluation.data is the labelled split to tune on.")],
    model: ModelName,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as evaluation.data.split=val.")
    ] = None,
    out: RunFolder = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="New folder for a copy of the model that uses the best views.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure which views suit each task: sweep t of the context views on a labelled split.

    Prints a table for each task and writes views.json, the curves views.png, and with --save a copy of the model. The
    figures are those of the split that was tuned on; measure the copy on another one.
    """
    from foveate.methods.dynrefer.tuning import tune_views as run

    hide_weight_bars()
    keep_freed_memory()
    with progress_bar("settings") as progress:
        result = run(recipe, model, overrides or [], out=out, save=save, progress=progress)
    print_tuning(result)
    if save is not None:
        print(f"model: {save}")
