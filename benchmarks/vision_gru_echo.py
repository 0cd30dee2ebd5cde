"""What carries a colour across a picture: VisionGRU's two runs, one of them, none, or attention (spec 10, "Echo").

    python benchmarks/vision_gru_echo.py                          # 4 variants, 3 seeds, 800 steps: a quarter of an hour
    python benchmarks/vision_gru_echo.py --only both --seeds 1    # one model
    python benchmarks/vision_gru_echo.py --quick                  # 40 steps: shows that it runs; nothing is learnt

Writes vision_gru_echo.json and .png into --out, and a .csv of all models. The task and the models are described in
foveate.methods.vision_gru.echo.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from foveate.errors import FoveateError
from foveate.files import atomic_write
from foveate.methods.vision_gru.echo import VARIANTS, Accuracy, EchoResult, farthest, run
from foveate.ops.scan import scan_backend_in_use
from foveate.vision.plots import line_chart

MEASURES = [field.name for field in fields(Accuracy)]


def results_table(results: Sequence[EchoResult], steps: int) -> Table:
    table = Table(
        title=f"{steps} steps a model; accuracy of the rectangle's pixels, chance 0.25",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("variant", "parameters", "reach, px"):
        table.add_column(name, no_wrap=True)
    for name in MEASURES:
        table.add_column(name.replace("_", ", "), justify="right", no_wrap=True)
    for variant in dict.fromkeys(result.variant for result in results):
        mine = [result for result in results if result.variant == variant]
        cells = (" / ".join(f"{getattr(result.accuracy, name):.3f}" for result in mine) for name in MEASURES)
        table.add_row(VARIANTS[variant], f"{mine[0].parameters:,}", sees(variant), *cells)
    table.caption = "Seeds side by side. Reach: how far off a pixel can be that the logits of another depend on."
    table.caption_justify = "left"
    return table


def sees(variant: Any) -> str:
    distance = farthest(variant, side=160)
    return "all" if distance >= 80 else str(distance)


def verdicts(results: Sequence[EchoResult]) -> dict[str, dict[str, Any]]:
    """The specification's criteria, of means over the seeds, where their variant was run."""

    def mean(variant: str, name: str) -> float | None:
        values = [getattr(result.accuracy, name) for result in results if result.variant == variant]
        return statistics.fmean(values) if values else None

    found: dict[str, dict[str, Any]] = {}
    far, lone, near = mean("both", "far"), mean("local", "far"), mean("local", "near")
    above, below = mean("forward", "far_above"), mean("forward", "far_below")
    if far is not None:
        found["both runs reach far (>= 0.95)"] = {"value": far, "met": far >= 0.95}
    if lone is not None and near is not None:
        found["without a scan nothing does (far <= 0.35)"] = {"value": lone, "met": lone <= 0.35}
        found["though the near part is learnt (near >= 0.75)"] = {"value": near, "met": near >= 0.75}
    if above is not None and below is not None:
        found["one run knows what came before only (above - below >= 0.4)"] = {
            "value": above - below,
            "met": above - below >= 0.4,
        }
    return found


def write(results: Sequence[EchoResult], steps: int, folder: Path) -> list[Path]:
    paths = [folder / f"vision_gru_echo.{suffix}" for suffix in ("json", "csv", "png")]
    environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    environment["scan"] = scan_backend_in_use()
    with atomic_write(paths[0]) as file:
        models = [asdict(result) | {"losses": [round(loss, 4) for loss in result.losses[::10]]} for result in results]
        content = {"environment": environment, "steps": steps, "criteria": verdicts(results), "models": models}
        json.dump(content, file, indent=1)
    with atomic_write(paths[1]) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["variant", "seed", "parameters", *MEASURES, "processor_seconds"])
        for result in results:
            cells = [f"{getattr(result.accuracy, name):.4f}" for name in MEASURES]
            rows.writerow([result.variant, result.seed, result.parameters, *cells, f"{result.processor_seconds:.1f}"])
    with atomic_write(paths[2], "wb") as file:
        curves(results, steps).save(file, format="PNG", optimize=True)
    return paths


def curves(results: Sequence[EchoResult], steps: int) -> Any:
    """Training loss of each variant's first seed, means of 20 steps; what a variant cannot reach stays as loss."""
    series = {}
    for variant, title in VARIANTS.items():
        first = next((result for result in results if result.variant == variant), None)
        if first is not None:
            starts = range(0, len(first.losses), 20)
            means = [statistics.fmean(first.losses[start : start + 20]) for start in starts]
            series[f"{title} (far {first.accuracy.far:.2f})"] = ([start + 10 for start in starts], means)
    return line_chart(series, title=f"Echo, {steps} steps", x_label="step", y_label="training loss")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="this variant; may be repeated")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--quick", action="store_true", help="40 steps and one seed, into out/echo")
    parser.add_argument("--out", type=Path, help="folder to write to (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seeds < 1:
        parser.error("--steps and --seeds must be 1 or more")
    steps, seeds = (40, 1) if options.quick else (options.steps, options.seeds)
    folder = options.out or Path("out/echo" if options.quick else "benchmarks/results")
    # One thread: the seconds are then the same everywhere, and the figures reproducible.
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    results = []
    try:
        for variant in (name for name in VARIANTS if not options.only or name in options.only):
            for seed in range(seeds):
                with console.status(f"{VARIANTS[variant]}, seed {seed}") as status:

                    def report(step: int, loss: float, variant: str = variant, seed: int = seed) -> None:
                        status.update(f"{variant}, seed {seed}: step {step}/{steps}, loss {loss:.3f}")

                    results.append(run(variant, seed, steps, report))
                last = results[-1]
                console.print(
                    f"{VARIANTS[variant]}, seed {seed}: far {last.accuracy.far:.3f}, near {last.accuracy.near:.3f}, "
                    f"{last.processor_seconds:.0f} processor seconds"
                )
        console.print(results_table(results, steps))
        for name, verdict in verdicts(results).items():
            console.print(f"{'yes' if verdict['met'] else 'NO '}  {verdict['value']:.3f}  {name}")
        for path in write(results, steps, folder):
            console.print(f"written: {path}")
    except FoveateError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
