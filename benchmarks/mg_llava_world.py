"""What each grain of MG-LLaVA adds in the rendered world, and what it costs.

    python benchmarks/mg_llava_world.py grains     # trains four variants alike, asks each of them, table and picture
    python benchmarks/mg_llava_world.py overhead   # time and parameters of the grains at the sizes of the shipped model

A variant goes through both stages of the world recipes with the same data, seed and steps, and is then asked about
scenes that it has not seen; two controls ask the whole model with no boxes, and with those of another picture. What was
trained or asked before is reused; delete its folder under --runs to do it again. Weights trained on the rendered world
say nothing about photographs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from foveate.checkpoints import find_checkpoint
from foveate.files import atomic_write
from foveate.language.templates import IMAGE
from foveate.methods.mg_llava.modeling import MGLlavaModel
from foveate.methods.mg_llava.predictor import MGLlavaPredictor
from foveate.training.conversations import SIZES
from foveate.training.runner import evaluate, train
from foveate.vision.plots import line_chart

RECIPES = {"pretrain": Path("recipes/mg_llava/world_pretrain.yaml"), "sft": Path("recipes/mg_llava/world.yaml")}
RESULTS = Path("benchmarks/results")
VARIANTS: dict[str, list[str]] = {
    "three grains": [],
    "no object tokens": ["model.objects=none"],
    "no high resolution": ["model.fusion=none"],
    "low resolution only": ["model.fusion=none", "model.objects=none"],
}
WHOLE = "three grains"
CONTROLS = {"asked without boxes": "none", "asked with boxes of another picture": "shuffled"}
"""Of the whole model, as trained."""
KINDS = ("what", "colour", "count", "where", "text")


def slug(name: str) -> str:
    return name.replace(" ", "-")


def trained(name: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a variant, trained now as far as it is not there."""
    folder = options.runs / slug(name)
    for stage, steps in (("pretrain", options.pretrain_steps), ("sft", options.steps)):
        out = folder / f"{stage}-{steps}"
        if not (out / "checkpoint" / "config.json").is_file():
            changes = [f"training.max_steps={steps}", f"training.batch_size={options.batch_size}"]
            if stage == "pretrain":
                changes += VARIANTS[name]
            else:
                changes.append(f"model.init_from={folder / f'pretrain-{options.pretrain_steps}' / 'checkpoint'}")
            train(RECIPES[stage], changes, out=out, resume=(out / "checkpoints").is_dir())
    return folder / f"sft-{options.steps}" / "checkpoint"


def asked(checkpoint: Path, out: Path, *changes: str) -> dict[str, Any]:
    """What a checkpoint answers; kept beside its answers, for as long as it is that checkpoint."""
    kept, trained_on = out / "metrics.json", (checkpoint / "model.safetensors").stat().st_mtime
    if not kept.is_file() or kept.stat().st_mtime < trained_on:
        changes = ("evaluation.batch_size=64", *changes)
        metrics = dict(evaluate(RECIPES["sft"], checkpoint, list(changes), out=out).metrics)
        with atomic_write(kept) as file:
            json.dump(metrics, file, indent=1)
    return json.loads(kept.read_text(encoding="utf-8"))


def grains(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in options.variants or VARIANTS:
        checkpoint = trained(name, options)
        rows[name] = asked(checkpoint, options.runs / slug(name) / "answers")
        if name == WHOLE:
            for control, boxes in CONTROLS.items():
                out = options.runs / slug(control)
                rows[control] = asked(checkpoint, out, f"evaluation.boxes={boxes}")
    questions = next(iter(rows.values()))["questions"]
    columns = {**{kind: ("by_kind", kind) for kind in KINDS}, **{size: ("by_size", size) for size in SIZES}}
    title = f"{questions} questions about unseen scenes; {options.pretrain_steps} + {options.steps} steps each"
    table = Table("model", "all", *columns, title=title)
    for name, row in rows.items():
        cells = (row[group].get(key) for group, key in columns.values())
        shown = ("-" if value is None else f"{100 * value:.1f}" for value in cells)
        table.add_row(name, f"{100 * row['accuracy']:.1f}", *shown)
    console.print(table)
    names = [f"{kind}, {size}" for kind in KINDS for size in SIZES]
    cells = [f"{kind} {size}" for kind in KINDS for size in SIZES]
    series = {}
    for name, row in rows.items():
        found = [(place, row["by_kind_and_size"][cell]) for place, cell in enumerate(cells)]
        series[name] = ([float(place) for place, _ in found], [value for _, value in found])
    picture = line_chart(
        series,
        title=title,
        x_label="question about, size of the object",
        y_label="share of right answers",
        x_names=names,
        size=(1500, 560),
    )
    path = options.out.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    console.print(f"picture: {path}")
    return {"pretrain_steps": options.pretrain_steps, "steps": options.steps, "rows": rows}


def best(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@torch.inference_mode()
def overhead(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """A model's own weights in all variants: parts are left away, none is trained."""
    predictor = MGLlavaPredictor.from_pretrained(find_checkpoint(options.model))
    whole = predictor.model
    processor = predictor.processor
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 256, 3), generator=draw, dtype=torch.uint8).numpy()
    corners = torch.rand(options.boxes, 2, 2, generator=draw).sort(dim=1).values * 256
    picture = processor.picture(Image.fromarray(pixels), corners.flatten(1).numpy())
    ids = predictor.prompt_ids("what colour is the car?", IMAGE)
    rows: dict[str, Any] = {}
    for name, changes in VARIANTS.items():
        config = type(whole.config)(**whole.config.to_dict())
        for change in changes:
            key, value = change.removeprefix("model.").split("=")
            setattr(config, key, value)
        model = MGLlavaModel(config).eval()
        model.load_state_dict(whole.state_dict(), strict=False)
        high = picture.pixel_values_aux[None] if config.sees_high_res else None
        see = lambda m=model, h=high: m.encode(picture.pixel_values[None], h, [picture.boxes])  # noqa: E731
        seen = see()
        inputs = model.assemble(torch.tensor([ids]), None, [seen.sequence(0)])
        read = lambda m=model, i=inputs: m.language_model(inputs_embeds=i.inputs_embeds, use_cache=True)  # noqa: E731
        cache = read().past_key_values

        def say(m: Any = model, c: Any = cache) -> None:
            m.language_model(input_ids=torch.tensor([[5]]), past_key_values=c, use_cache=True)
            c.crop(-1)

        rows[name] = {
            "tokens": inputs.inputs_embeds.shape[1],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seeing": best(see, options.repeats),
            "prefill": best(read, options.repeats),
            "per_token": best(say, options.repeats * 4),
        }
    plain = rows["low resolution only"]
    table = Table("model", "tokens", "parameters", "seeing", "prefill", "per token", title=f"{options.boxes} boxes")
    for name, row in rows.items():
        times = (
            f"{1000 * row[key]:.1f} ms ({row[key] / plain[key]:.2f}x)" for key in ("seeing", "prefill", "per_token")
        )
        share = f"{row['parameters'] / 1e6:.2f} M ({row['parameters'] / plain['parameters']:.2f}x)"
        table.add_row(name, str(row["tokens"]), share, *times)
    console.print(table)
    return {"model": options.model, "boxes": options.boxes, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="What each grain of MG-LLaVA adds in the rendered world, and costs.")
    parser.add_argument("what", choices=("grains", "overhead"))
    parser.add_argument("--pretrain-steps", type=int, default=500, help="of the first stage, each variant")
    parser.add_argument("--steps", type=int, default=1500, help="of the second stage, each variant")
    parser.add_argument("--batch-size", type=int, default=16, help="conversations of a step")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="train and ask these only")
    parser.add_argument("--runs", type=Path, default=Path("out/grains"), help="where variants are trained")
    parser.add_argument("--model", default="mg-llava-world", help="the model of overhead")
    parser.add_argument("--boxes", type=int, default=20, help="boxes of the picture of overhead")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--out", type=Path, help="JSON (default benchmarks/results/mg_llava_<what>.json); grains: .png beside it"
    )
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"mg_llava_{options.what}.json"
    console = Console()
    result = (grains if options.what == "grains" else overhead)(options, console)
    with atomic_write(options.out) as file:
        json.dump(result, file, indent=1)
    console.print(f"figures: {options.out}")


if __name__ == "__main__":
    main()
