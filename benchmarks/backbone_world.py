"""VisionGRU, a ViT and a ConvNeXt of about as many parameters, trained alike on the rendered world's classes.

    python benchmarks/backbone_world.py                         # all variants, 4,000 steps each: hours on two cores
    python benchmarks/backbone_world.py --steps 1000 --only vision-gru --only vit
    python benchmarks/backbone_world.py --resume                # goes on with a variant that was cut off

Data, augmentation, optimiser, schedule, steps and seed are those of recipes/vision_gru/world.yaml; a variant changes
`model` alone. The ablations of VisionGRU (spec 10) have its parameters, too: one run from the first pixel on in place
of the two, and a feed-forward in place of both, which leaves nothing but the 3 x 3 convolutions to look around. A
variant that was trained before is reused; delete its folder under --runs to train it again. Weights trained on the
rendered world say nothing about photographs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from foveate.errors import FoveateError, RecipeError
from foveate.files import atomic_write
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, resolved_recipe, train
from foveate.vision.plots import line_chart

RECIPE = Path("recipes/vision_gru/world.yaml")
RESULTS = Path("benchmarks/results")

# A variant -> overrides of the recipe. The ViT has six layers of width 128 on an 8 x 8 grid of patches.
VARIANTS: dict[str, list[str]] = {
    "vision-gru": [],
    "vit": ["model.kind=vit", "model.dim=128", "model.depths=[1, 1, 3, 1]", "model.patch_size=8"],
    "convnext": ["model.kind=convnext", "model.dim=24", "model.depths=[2, 2, 6, 2]"],
    "vision-gru, forward only": ["model.mixer=forward"],
    "vision-gru, no scan": ["model.mixer=local"],
}


def train_variant(name: str, arguments: argparse.Namespace) -> tuple[Path, list[str], Path]:
    """The run folder of a variant, its overrides, and its checkpoint, trained now if it is not there."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name).replace("--", "-")
    folder = arguments.runs / f"{slug}-{arguments.steps}-{arguments.seed}"
    overrides = [*VARIANTS[name], f"training.max_steps={arguments.steps}", f"seed={arguments.seed}"]
    overrides += [f"evaluation.world.count={arguments.scenes}", *arguments.settings]
    if (folder / "recipe.yaml").is_file() and load_recipe(folder / "recipe.yaml") != resolved_recipe(
        arguments.recipe, overrides, folder
    ):
        raise RecipeError(f"{folder} was trained with other settings; delete it, or give another --runs.")
    if not (folder / "training.json").is_file():
        train(arguments.recipe, overrides, resume=arguments.resume, out=folder)
    return folder, overrides, folder / "checkpoint"


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    folder, overrides, checkpoint = train_variant(name, arguments)
    result = evaluate(arguments.recipe, checkpoint, overrides, out=folder)
    run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        parameters = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 - the file is no mapping
    return {
        "overrides": overrides,
        "parameters": parameters,
        "top1": result.metrics["top1"],
        "top5": result.metrics["top5"],
        "images": result.metrics["images"],
        "evaluation_seconds": result.seconds,
        "steps": run["steps"],
        # Of the call that ended the training: of a resumed one, its own part.
        "training_seconds": run["seconds"],
        "loss": [[entry["step"], entry["loss"]] for entry in run["history"]],
    }


def show(rows: dict[str, Any], console: Console, steps: int) -> None:
    table = Table("variant", "M parameters", "top-1", "top-5", "last loss", title=f"{steps} steps of the same recipe")
    for name, row in rows.items():
        last = statistics.fmean(loss for _, loss in row["loss"][-5:]) if row["loss"] else float("nan")
        cells = (row["parameters"] / 1e6, row["top1"], row["top5"], last)
        table.add_row(name, *(f"{value:.3f}" for value in cells))
    console.print(table)


def draw(rows: dict[str, Any], path: Path, steps: int) -> None:
    """Loss curves of about 25 points, each the mean of the losses that were logged around it."""
    series = {}
    for name, row in rows.items():
        width = max(1, len(row["loss"]) // 25)
        groups = [row["loss"][start : start + width] for start in range(0, len(row["loss"]), width)]
        if groups:
            points = [[statistics.fmean(column) for column in zip(*group, strict=True)] for group in groups]
            series[f"{name} (top-1 {row['top1']:.3f})"] = ([step for step, _ in points], [loss for _, loss in points])
    if series:
        chart = line_chart(series, title=f"Rendered world, {steps} steps", x_label="step", y_label="training loss")
        with atomic_write(path, "wb") as file:
            chart.save(file, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="overrides of the recipe for all variants, section.key=value")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="this variant; may be repeated")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each variant")
    parser.add_argument("--scenes", type=int, default=400, help="unseen scenes to measure on")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of an unfinished run")
    parser.add_argument("--runs", type=Path, default=Path("out/backbones"), help="where variants are trained")
    parser.add_argument("--out", type=Path, default=RESULTS / "backbone_world.json", help="figures; .png beside it")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.scenes < 1:
        parser.error("--steps and --scenes must be 1 or more")
    console = Console()
    rows: dict[str, Any] = {}
    for name in arguments.only or VARIANTS:
        try:
            rows[name] = measure(name, arguments)
        except FoveateError as error:
            parser.error(str(error))
        result = {"recipe": str(arguments.recipe), "steps": arguments.steps, "seed": arguments.seed, "variants": rows}
        with atomic_write(arguments.out) as file:
            json.dump(result | {"threads": torch.get_num_threads()}, file, indent=1)
    show(rows, console, arguments.steps)
    draw(rows, arguments.out.with_suffix(".png"), arguments.steps)
    console.print(f"figures: {arguments.out}")


if __name__ == "__main__":
    main()
