"""DynRefer's claim in miniature: whole image, crop, fixed pairs and stochastic views, detail against context.

    python benchmarks/dynrefer_miniature.py             # 500 steps a model, about four minutes on one core
    python benchmarks/dynrefer_miniature.py --long      # 1,500 steps too
    python benchmarks/dynrefer_miniature.py --quick     # 60 steps: shows that it runs; no model has learnt by then

Writes dynrefer_miniature.json, .csv and .png into --out. The data, the encoder and the model are described in
foveate.methods.dynrefer.miniature.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from foveate.errors import FoveateError
from foveate.files import atomic_write
from foveate.methods.dynrefer.configuration import CANDIDATE_VIEWS
from foveate.methods.dynrefer.miniature import (
    CHANCE_LOSS,
    MiniatureRecipe,
    VariantResult,
    encode_pictures,
    run_variant,
    summarise,
)
from foveate.training.recipes import load_recipe
from foveate.vision.plots import line_chart

RECIPE = Path("recipes/dynrefer/miniature.yaml")
QUICK = ["training.max_steps=60", "training.warmup_steps=10", "data.train=640", "data.test=200", "output=out/miniature"]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def named(views: Sequence[float]) -> str:
    return f"({', '.join(f'{t:g}' for t in views)})"


def results_table(results: Sequence[VariantResult], steps: int) -> Table:
    """A row per model, and per choice of views for models of three: accuracies in percent, chance 25."""
    table = Table(
        title=f"{steps} steps a model; accuracy in %, chance 25",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    table.add_column("best views", no_wrap=True)
    for name in ("detail", "context"):
        table.add_column(name, justify="right", no_wrap=True)
    for t in CANDIDATE_VIEWS:
        table.add_column(f"{'t2=' if t == CANDIDATE_VIEWS[0] else ''}{t:g}", justify="right", no_wrap=True)
    for name in ("mean", "context loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        loss = f"{result.context_loss:.3f}{' *' if result.on_plateau else ''}"
        pair = result.variant.count == 2
        curve = [percent(m.context) for m in result.measurements] if pair else [""] * len(CANDIDATE_VIEWS)
        mean = percent(result.mean_context) if pair else ""
        shown = result.measurements if result.variant.count > 2 else (result.best,)
        for row, measured in enumerate(shown):
            cells = (result.variant.name if row == 0 else "", named(measured.views))
            scores = (percent(measured.detail), percent(measured.context))
            table.add_row(*cells, *scores, *curve, mean, loss if row == 0 else "")
    table.caption = (
        f"t2 columns and mean: context accuracy over the second view. context loss: of the last 50 steps; "
        f"{CHANCE_LOSS:.3f} knows nothing, * has not left that plateau."
    )
    table.caption_justify = "left"
    return table


def conclusions(summary: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences; nothing about models that were not run."""
    lines = []
    stochastic, baseline, fixed = summary["stochastic"], summary["strongest_baseline"], summary["best_fixed_pair"]
    if stochastic and baseline:
        lines.append(
            f"(detail + context) / 2: stochastic views {stochastic['score']:.1f} at {named(stochastic['views'])}, "
            f"best of whole image, crop and fixed pair (0, 1) {baseline['score']:.1f} ({baseline['name']}): "
            f"{summary['margin']:+.1f} points."
        )
    if stochastic and fixed:
        means = {name: f"{value:.1f}" for name, value in summary["mean_context"].items()}
        lines.append("Context accuracy, mean over all t2: " + "; ".join(f"{k} {v}" for k, v in means.items()) + ".")
        gap = stochastic["score"] - fixed["score"]
        verdict = "ties with" if abs(gap) <= 1 else f"is {abs(gap):.1f} points {'behind' if gap > 0 else 'ahead of'}"
        lines.append(
            f"The best of all fixed pairs, {fixed['name']}, {verdict} stochastic views if the right t is known in "
            f"advance ({fixed['score']:.1f} at {named(fixed['views'])} against {stochastic['score']:.1f}); its context "
            f"accuracy over all t2 is {fixed['mean_context']:.1f} against {stochastic['mean_context']:.1f}."
        )
    if summary["on_plateau"]:
        names = ", ".join(summary["on_plateau"])
        lines.append(f"Still on the plateau of the context loss, so more steps could change them: {names}.")
    return lines


def picture(results: Sequence[VariantResult], steps: int) -> Image.Image:
    """Context accuracy over t of the second view."""
    return line_chart(
        {
            result.variant.name: (CANDIDATE_VIEWS, [100 * measured.context for measured in result.measurements])
            for result in results
            if result.variant.count == 2
        },
        title=f"Context accuracy over the second view, {steps:,} steps",
        x_label="t of the second view (0: the region itself, 1: the whole image); chance 25",
        y_label="context accuracy, %",
        baselines={r.variant.name: 100 * r.best.context for r in results if r.variant.count == 1},
    )


def as_json(results: Sequence[VariantResult], steps: int, summary: dict[str, Any]) -> dict[str, Any]:
    models = [
        {
            "name": result.variant.name,
            "measurements": [asdict(measured) for measured in result.measurements],
            "best_views": result.best.views,
            "context_loss": result.context_loss,
            "on_plateau": result.on_plateau,
            "seconds": round(result.seconds, 1),
        }
        for result in results
    ]
    return {"steps": steps, "summary": summary, "models": models}


def write(runs: Sequence[tuple[int, Sequence[VariantResult]]], recipe: MiniatureRecipe, folder: Path) -> list[Path]:
    """JSON of everything, CSV with a row per measurement, and the picture of the longest run."""
    paths = [folder / f"dynrefer_miniature.{suffix}" for suffix in ("json", "csv", "png")]
    with atomic_write(paths[0]) as file:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        content = [as_json(results, steps, summarise(results)) for steps, results in runs]
        settings = recipe.model_dump(mode="json", exclude={"output", "variants"})
        json.dump({"environment": environment, "recipe": settings, "runs": content}, file, indent=1)
    with atomic_write(paths[1]) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["steps", "model", "views", "detail_accuracy", "context_accuracy"])
        for steps, results in runs:
            for result in results:
                for measured in result.measurements:
                    views = " ".join(f"{t:g}" for t in measured.views)
                    rows.writerow(
                        [steps, result.variant.name, views, f"{measured.detail:.4f}", f"{measured.context:.4f}"]
                    )
    steps, results = runs[-1]
    if any(result.variant.count == 2 for result in results):
        with atomic_write(paths[2], "wb") as file:
            picture(results, steps).save(file, format="PNG", optimize=True)
    else:
        paths.pop()
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--quick", action="store_true", help="60 steps on little data, into out/miniature")
    parser.add_argument("--long", action="store_true", help="a second comparison with the recipe's long_steps")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the recipe's output)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of the recipe")
    options = parser.parse_args(arguments)
    # One thread: what a model costs is then the same everywhere, and its numbers are reproducible.
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        overrides = [*(QUICK if options.quick else []), *options.overrides]
        recipe = load_recipe(options.recipe, overrides, MiniatureRecipe)
        assert isinstance(recipe, MiniatureRecipe)
        runs = compare(recipe, long=options.long, console=console)
        for path in write(runs, recipe, options.out or recipe.output):
            console.print(f"written: {path}")
    except FoveateError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def compare(recipe: MiniatureRecipe, *, long: bool, console: Console) -> list[tuple[int, list[VariantResult]]]:
    """Train and measure every variant, at one or two lengths of training, and print a table for each."""
    console.print(f"encoding {recipe.data.train} + {recipe.data.test} pictures in 11 views each ...")
    train = encode_pictures(recipe.data.train, 2 * recipe.seed, recipe.model.channels)
    test = encode_pictures(recipe.data.test, 2 * recipe.seed + 1, recipe.model.channels)
    assert recipe.training.max_steps is not None
    runs = []
    for steps in (recipe.training.max_steps, *((recipe.long_steps,) if long else ())):
        now = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": steps})})
        results = []
        for variant in recipe.variants:
            result = run_variant(variant, train, test, now)
            best = f"{percent(result.best.detail)} / {percent(result.best.context)} at {named(result.best.views)}"
            console.print(f"{variant.name}: {result.seconds:.0f} s, detail / context {best}")
            results.append(result)
        console.print(results_table(results, steps))
        for line in conclusions(summarise(results)):
            console.print(line, soft_wrap=True)
        runs.append((steps, results))
    return runs


if __name__ == "__main__":
    sys.exit(main())
