"""The claims of DynRefer in the rendered world: curves over the second view's t, ways to choose it, and ablations.

    python benchmarks/dynrefer_world.py curve       # sweeps t of the context views of a model, draws the picture
    python benchmarks/dynrefer_world.py selection   # task prior and searches against t's drawn at random, a table
    python benchmarks/dynrefer_world.py attention   # how much of the attention falls on the object, a table
    python benchmarks/dynrefer_world.py ablations   # trains the variants (minutes each on 2 cores), prints a table

Curve, selection and attention are those of the shipped model, or of --model. View 1 stays the region. In the curve
every other view is taken at one t, so that at t = 0 the model sees nothing but the region; then only the second view
moves. What t's drawn at random are worth is the mean of --draws draws, each for all regions. Attention is judged in the
region's own view, by the pixels of the object itself, against what they would get if all cells of the region were read
alike; what went to the views as wholes has no place and does not count. And by what it is good for: cells are
hidden from the Q-Former, those that the category's query read most, or least, or any, or all. A variant of the
ablations that was trained before is reused; delete its folder under --runs to train it again. Weights trained on the
rendered world say nothing about photographs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from foveate.checkpoints import find_checkpoint
from foveate.files import atomic_write
from foveate.methods.dynrefer.predictor import TASKS, DynReferPredictor
from foveate.methods.dynrefer.recipe import DynReferRecipe, open_regions
from foveate.methods.dynrefer.results import Region, Regions
from foveate.methods.dynrefer.tuning import SWEEP, measurer, sweep_views
from foveate.methods.dynrefer.views import sample_coefficients
from foveate.metrics.captioning import mentioned_words
from foveate.training.recipes import load_recipe
from foveate.training.runner import train
from foveate.vision.plots import line_chart
from foveate.world.scenes import render_scenes
from foveate.world.vocabulary import relation_predicates

RECIPE = Path("recipes/dynrefer/world.yaml")
RESULTS = Path("benchmarks/results")

# Two views throughout: the smallest setting in which a context view can matter. Same data, seed and steps for all.
VARIANTS: dict[str, list[str]] = {
    "random view (DynRefer)": [],
    "without align module": ["model.align=false"],
    "fixed view t = 0.3": ["data.views=[0.3]"],
    "region view only": ["model.num_views=1"],
    "caption task only": ["model.tag_loss_weight=0", "model.contrast_loss_weight=0", "model.prompt_loss_weight=0"],
}
METRICS = {
    "category_accuracy": "category",
    "attribute_map": "attributes",
    "colour_word_accuracy": "colour word",
    "relation_word_accuracy": "relation word",
    "cider": "CIDEr",
}
CHOICES = {
    "task": "the model's task prior",
    "official": "search, as the official code",
    "pairwise": "search, as the paper's text",
    "median": "search, median hash",
}
POLICY = "model.view_policy={attributes: [0.1], category: [0.1], tags: [0.3], caption: [0.3]}"


def variant_folder(runs: Path, name: str, steps: int) -> Path:
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
    return runs / f"{slug}-{steps}"


def overrides_of(name: str, steps: int) -> list[str]:
    """Overrides of the world recipe that make a variant."""
    changes = VARIANTS[name]
    policy = [] if "model.num_views=1" in changes else [POLICY]
    return ["model.num_views=2", *policy, f"training.max_steps={steps}", "training.save_every=0", *changes]


def train_variant(runs: Path, name: str, steps: int) -> Path:
    """The checkpoint folder of a variant, trained now if it is not there."""
    folder = variant_folder(runs, name, steps)
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        train(RECIPE, overrides_of(name, steps), out=folder)
    return checkpoint


def evaluation(regions: int) -> DynReferRecipe:
    """The world recipe on so many regions."""
    recipe = load_recipe(RECIPE, [f"evaluation.data.regions={regions}"])
    assert isinstance(recipe, DynReferRecipe)
    return recipe


def measure(checkpoint: Path, regions: int) -> Mapping[str, Any]:
    """Metrics with the model's own views."""
    predictor = DynReferPredictor.from_pretrained(checkpoint)
    # A model that was trained to write captions only has tag and contrast heads that know nothing.
    tasks = TASKS if predictor.model.config.tag_loss_weight else ("caption",)
    return measurer(predictor, evaluation(regions).evaluation, tasks)("task")


def ablations(runs: Path, steps: int, regions: int, console: Console) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in VARIANTS:
        checkpoint = train_variant(runs, name, steps)
        rows[name] = {metric: value for metric, value in measure(checkpoint, regions).items() if metric in METRICS}
    table = Table("variant", *METRICS.values(), title=f"Ablations, {steps} steps, {regions} unseen regions")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[metric]:.3f}" if metric in row else "-" for metric in METRICS))
    console.print(table)
    return {"steps": steps, "regions": regions, "variants": rows}


def relation_chance(regions: int) -> float:
    """The accuracy of saying the most frequent relation of the evaluated regions, whatever is seen."""
    dataset, index = open_regions(evaluation(regions).evaluation.data)
    captions = [dataset[image].regions[number].captions[0] for image, number in index]
    said = Counter(words for caption in captions if (words := mentioned_words(caption, relation_predicates())))
    return max(said.values()) / said.total()


def curve(model: str, regions: int, console: Console, picture: Path) -> dict[str, Any]:
    predictor = DynReferPredictor.from_pretrained(find_checkpoint(model))
    measured = measurer(predictor, evaluation(regions).evaluation, TASKS)
    sweep = track(SWEEP, "views", console=console)
    rows = sweep_views(measured, TASKS, predictor.model.config.num_views, coefficients=sweep)
    chance = relation_chance(regions)
    policy = predictor.model.config.view_policy
    further = {task: list(policy[task])[1:] for task in TASKS if not isinstance(policy.get(task, ""), str)}
    second = [
        measured({task: [t, *own] for task, own in further.items()})
        for t in track(SWEEP if any(further.values()) else (), "second view", console=console)
    ]
    for what, measurements in (("all context views at t", rows), ("second view at t, others the model's own", second)):
        if measurements:
            table = Table("t", *METRICS.values(), title=f"{model}: {what}, {regions} unseen regions")
            for t, row in zip(SWEEP, measurements, strict=True):
                table.add_row(f"{t:.1f}", *(f"{row[metric]:.3f}" for metric in METRICS))
            console.print(table)
    console.print(f"relation word by chance (always the most frequent one): {chance:.3f}")
    shown = [metric for metric in METRICS if metric != "cider"]
    lines = {METRICS[metric]: (SWEEP, [row[metric] for row in rows]) for metric in shown}
    if second:
        lines["relation word, only the second view at t"] = (SWEEP, [row["relation_word_accuracy"] for row in second])
    chart = line_chart(
        lines,
        title=f"{model}: the region and what surrounds it",
        x_label="t of the context views (0: the region itself, 1: the whole image)",
        y_label="accuracy / mAP",
        baselines={"relation word by chance": chance},
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    chart.save(picture)
    console.print(f"picture: {picture}")
    return {
        "model": model,
        "regions": regions,
        "t": SWEEP,
        "curves": {metric: [row[metric] for row in rows] for metric in METRICS},
        "second_view": {metric: [row[metric] for row in second] for metric in METRICS},
        "relation_chance": chance,
    }


def selection(model: str, regions: int, draws: int, console: Console) -> dict[str, Any]:
    """Information-based choice of views against a random one (the paper's ablation, rows 6 to 10)."""
    predictor = DynReferPredictor.from_pretrained(find_checkpoint(model))
    measured = measurer(predictor, evaluation(regions).evaluation, TASKS)
    generator = np.random.default_rng(0)
    context = predictor.model.config.num_views - 1
    drawn = [[float(t) for t in sample_coefficients(context, generator)] for _ in range(draws)]
    random = [measured(dict.fromkeys(TASKS, t)) for t in track(drawn, "random views", console=console)]
    rows = {CHOICES[views]: measured(views) for views in track(tuple(CHOICES), "choices", console=console)}
    spread = {metric: [row[metric] for row in random] for metric in METRICS}
    table = Table(
        "views", *METRICS.values(), title=f"{model}: how the context views are chosen, {regions} unseen regions"
    )
    table.add_row("random, mean", *(f"{np.mean(values):.3f}" for values in spread.values()))
    table.add_row(
        "random, lowest to highest", *(f"{min(values):.3f} to {max(values):.3f}" for values in spread.values())
    )
    for name, row in rows.items():
        table.add_row(name, *(f"{row[metric]:.3f}" for metric in METRICS))
    console.print(table)
    return {
        "model": model,
        "regions": regions,
        "random": {"t": drawn, **spread},
        "choices": {name: {metric: row[metric] for metric in METRICS} for name, row in rows.items()},
    }


def lead(logits: Mapping[str, float], name: str) -> float:
    """By how much a category's logit is above the best other one."""
    return logits[name] - max(value for other, value in logits.items() if other != name)


@contextmanager
def hidden(predictor: DynReferPredictor, cells: np.ndarray) -> Iterator[None]:
    """Within the block the Q-Former does not read cells (R, g*g) of the regions of a call, all of which run at once."""
    mask = torch.from_numpy(np.concatenate([np.ones((len(cells), 1)), ~cells], axis=1)).long()

    def hide(_module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return arguments, {**options, "encoder_attention_mask": mask.to(predictor.model.device)}

    handle = predictor.model.qformer.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def attention(model: str, scenes: int, console: Console) -> dict[str, Any]:
    """What share of the attention falls on the visible pixels of the object that the region is the box of."""
    predictor = DynReferPredictor.from_pretrained(find_checkpoint(model))
    first = evaluation(1).evaluation.data.world
    assert first is not None
    rows: dict[str, list[tuple[float, float, float]]] = {}
    areas: list[float] = []
    said: dict[str, list[tuple[bool, float]]] = {}
    generator = np.random.default_rng(0)
    rendered = list(render_scenes(first.first_seed, scenes, size=first.size))
    for start in track(range(0, scenes, 10), "tens of scenes", console=console):
        some = [
            (Image.fromarray(scene.image), [item for item in scene.instances if item.describable])
            for scene in rendered[start : start + 10]
        ]
        shown = [item for _, items in some for item in items]

        def describe(*tasks: str, attention: bool = False, some: Any = some, count: int = len(shown)) -> list[Region]:
            pictures, boxes = zip(*((picture, [item.box for item in items]) for picture, items in some), strict=True)
            found = predictor([*pictures], [*boxes], tasks=tasks, attention=attention, batch_size=count)
            return [region for regions in found for region in cast(Regions, regions)]

        regions = describe("tags", "category", attention=True)
        read = [own.cells.flatten() for region in regions for own in region.attention if own.query == "category"]
        places = np.argsort(-np.array(read), axis=1).argsort(axis=1)  # 0 for the cell that was read most
        count = places.shape[1]
        drawn = generator.permuted(places, axis=1)
        choices = {"most read quarter": places < count // 4, "any quarter": drawn < count // 4}
        choices |= {"least read quarter": places >= count - count // 4, "all": places < count}
        answers = {"none": regions}
        for name, cells in choices.items():
            with hidden(predictor, cells):
                answers[name] = describe("category")
        for name, answered in answers.items():
            said.setdefault(name, []).extend(
                (region.category == item.category, lead(region.category_logits, item.category))
                for item, region in zip(shown, answered, strict=True)
            )
        for item, region in zip(shown, regions, strict=True):
            left, top, right, bottom = map(int, item.box)
            mask = item.mask[top:bottom, left:right].astype(np.float32)
            areas.append(float(mask.mean()))
            for own in region.attention:
                side = len(own.cells)
                object_share = np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.BOX))
                alike = replace(own, cells=np.full_like(own.cells, 1 / own.cells.size)).in_view(0)
                there = own.in_view(0) / (1 - own.whole)
                found = (float((there * object_share).sum()), float((alike * object_share).sum()), own.whole)
                rows.setdefault(own.query if own.word else f"region, views of {', '.join(own.tasks)}", []).append(found)
    table = Table(
        "query",
        "on the object",
        "all cells alike",
        "regions with more",
        "to the views as wholes",
        title=f"{model}: attention of {len(areas)} regions of {scenes} unseen scenes; objects cover "
        f"{np.mean(areas):.3f} of their boxes",
    )
    results = {}
    for query, found in sorted(rows.items()):
        read, alike, whole = np.array(found).T
        results[query] = {
            "on_object": float(read.mean()),
            "alike": float(alike.mean()),
            "more": float((read > alike).mean()),
            "whole": float(whole.mean()),
        }
        table.add_row(query, *(f"{value:.3f}" for value in results[query].values()))
    console.print(table)
    hidings = {
        name: {"category_accuracy": float(right), "lead": float(ahead)}
        for name, (right, ahead) in ((name, np.mean(found, axis=0)) for name, found in said.items())
    }
    table = Table("cells hidden", "category right", "lead of the true one's logit")
    for name, row in hidings.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    console.print(table)
    counts = {"scenes": scenes, "regions": len(areas), "area": float(np.mean(areas))}
    return {"model": model, **counts, "queries": results, "hidden": hidings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ablations", "attention", "curve", "selection"))
    parser.add_argument("--model", default="dynrefer-world", help="the model of all but ablations")
    parser.add_argument("--draws", type=int, default=10, help="random choices of views in selection")
    parser.add_argument("--steps", type=int, default=700, help="training steps of each variant")
    parser.add_argument("--regions", type=int, default=500, help="regions of unseen scenes")
    parser.add_argument("--scenes", type=int, default=40, help="unseen scenes of attention")
    parser.add_argument("--runs", type=Path, default=Path("out/ablations"), help="where variants are trained")
    parser.add_argument("--out", type=Path, help="JSON (default benchmarks/results/dynrefer_<what>.json)")
    arguments = parser.parse_args()
    console = Console()
    out = arguments.out or RESULTS / f"dynrefer_{arguments.what}.json"
    if arguments.what == "ablations":
        result = ablations(arguments.runs, arguments.steps, arguments.regions, console)
    elif arguments.what == "attention":
        result = attention(arguments.model, arguments.scenes, console)
    elif arguments.what == "selection":
        result = selection(arguments.model, arguments.regions, arguments.draws, console)
    else:
        picture = out.with_suffix(".png")
        result = curve(arguments.model, arguments.regions, console, picture)
    with atomic_write(out) as file:
        json.dump(result, file, indent=1)
    console.print(f"figures: {out}")


if __name__ == "__main__":
    main()
