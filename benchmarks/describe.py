"""Speed, memory and start-up of `describe`: all regions in one call against a plain loop, with equal answers asserted.

    python benchmarks/describe.py
    python benchmarks/describe.py --model out/dynrefer-world/checkpoint --repeats 5 --out out/benchmarks/describe.json

Three ways to the same answers (captions, tags, attributes, categories), all on warm models:

- batched: one call with all regions of all images; distinct views are encoded once.
- a call a region: every region alone, all tasks in the call, so that tasks still share the region's views.
- plain loop: every region and every task alone, each of the task's views encoded anew.

The ways take turns and the best time of each is taken, so that other work on the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import foveate
from foveate.errors import FoveateError
from foveate.files import atomic_write
from foveate.world.scenes import render_scene

FIRST_SEED = 9_700_000  # no recipe trains on scenes from here on
TASKS = ("caption", "tags", "attributes", "category")
TOLERANCE = 1e-4
TARGET = 4.0  # times the plain loop's speed, at 64 regions of one image
CASES = ((1, 1), (8, 1), (64, 1), (64, 16))  # regions, images

Work = list[tuple[Image.Image, list[list[float]]]]
Way = Callable[[Any, Work], list[list[foveate.Region]]]


def make_work(regions: int, images: int, size: int) -> Work:
    """Rendered scenes with regions of all sizes, the same ones at every run."""
    draw = np.random.default_rng(regions * 100 + images)
    work: Work = []
    for number in range(images):
        image = Image.fromarray(render_scene(FIRST_SEED + number, size).image)
        sides = draw.uniform(0.1, 0.5, (regions // images, 2)) * size
        start = draw.uniform(0, 1, sides.shape) * (size - sides)
        work.append((image, np.concatenate([start, start + sides], axis=1).round(2).tolist()))
    return work


def batched(describer: Any, work: Work) -> list[list[foveate.Region]]:
    images, boxes = [image for image, _ in work], [boxes for _, boxes in work]
    return [list(regions) for regions in describer(images, boxes, tasks=TASKS)]


def call_a_region(describer: Any, work: Work) -> list[list[foveate.Region]]:
    return [[describer(image, [box], tasks=TASKS)[0] for box in boxes] for image, boxes in work]


def plain_loop(describer: Any, work: Work) -> list[list[foveate.Region]]:
    return [[_task_by_task(describer, image, box) for box in boxes] for image, boxes in work]


def _task_by_task(describer: Any, image: Image.Image, box: list[float]) -> foveate.Region:
    said = {task: describer(image, [box], tasks=[task])[0] for task in TASKS}
    return foveate.Region(
        box=said["caption"].box,
        caption=said["caption"].caption,
        caption_score=said["caption"].caption_score,
        tag_scores=said["tags"].tag_scores,
        attribute_scores=said["attributes"].attribute_scores,
        category=said["category"].category,
        category_score=said["category"].category_score,
        category_scores=said["category"].category_scores,
    )


WAYS: dict[str, Way] = {"batched": batched, "a call a region": call_a_region, "plain loop": plain_loop}


def largest_difference(ours: Sequence[Sequence[foveate.Region]], theirs: Sequence[Sequence[foveate.Region]]) -> float:
    """The largest difference of any probability; an AssertionError where it, a caption or a category differs."""
    worst = 0.0
    for a, b in zip((r for rs in ours for r in rs), (r for rs in theirs for r in rs), strict=True):
        assert a.box == b.box, f"{a.box} != {b.box}"
        assert a.caption == b.caption, f"{a.box}: {a.caption!r} != {b.caption!r}"
        for field in ("tag_scores", "attribute_scores", "category_scores"):
            mine, other = getattr(a, field), getattr(b, field)
            assert mine.keys() == other.keys()
            worst = max(worst, max((abs(mine[name] - other[name]) for name in mine), default=0.0))
        worst = max(worst, abs((a.caption_score or 0.0) - (b.caption_score or 0.0)))
        assert worst <= TOLERANCE, f"{a.box}: probabilities differ by {worst}"
    return worst


def measure_speed(describer: Any, regions: int, images: int, size: int, repeats: int) -> dict[str, Any]:
    """Best seconds of each way at one case, and how far their answers are apart."""
    work = make_work(regions, images, size)
    answers = {name: way(describer, work[:1]) for name, way in WAYS.items()}  # warm-up, not timed
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(repeats):
        for name, way in WAYS.items():
            start = time.perf_counter()
            answers[name] = way(describer, work)
            best[name] = min(best[name], time.perf_counter() - start)
    differences = [largest_difference(answers["batched"], answers[name]) for name in list(WAYS)[1:]]
    return {
        "regions": regions,
        "images": images,
        "seconds": best,
        "regions_per_second": {name: regions / seconds for name, seconds in best.items()},
        "ratio_to_plain_loop": best["plain loop"] / best["batched"],
        "ratio_to_a_call_a_region": best["a call a region"] / best["batched"],
        "largest_difference": max(differences),
    }


def peak_memory() -> int:
    """Bytes of the largest resident set of this process."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_worker(model: str, way: str, regions: int, size: int) -> None:
    """In a process of its own: prints the peaks before and after one way's work on one image."""
    describer = foveate.load(model)
    loaded = peak_memory()
    if way:
        WAYS[way](describer, make_work(regions, 1, size))
    print(json.dumps({"loaded": loaded, "peak": peak_memory()}))


def measure_memory(model: str, regions: int, size: int) -> dict[str, dict[str, int]]:
    out = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--model", model, "--size", str(size), "--memory-of", way, str(regions)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        out[way] = json.loads(done.stdout.splitlines()[-1])
    return out


def measure_start_up(model: str, repeats: int, size: int) -> dict[str, float]:
    """Best seconds from the command to its end: help, and one region of one image."""
    with TemporaryDirectory() as folder:
        image = Path(folder) / "scene.png"
        Image.fromarray(render_scene(FIRST_SEED, size).image).save(image)
        foveate_command = [sys.executable, "-c", "from foveate.cli import main; main()"]
        commands = {
            "foveate --help": ["--help"],
            "foveate describe, one region": [
                "describe",
                str(image),
                "--box",
                "10,10,90,90",
                "--no-picture",
                "--model",
                model,
            ],
        }
        best = {}
        for name, arguments in commands.items():
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                subprocess.run([*foveate_command, *arguments], capture_output=True, check=True)
                times.append(time.perf_counter() - start)
            best[name] = min(times)
    return best


def show(results: dict[str, Any]) -> None:
    # Into a pipe no width is known, and rich would fold the columns at 80.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=f"{results['model']}: regions a second ({results['threads']} threads)", title_justify="left")
    for column in ("regions", "images", *WAYS, "batched / plain loop", "batched / a call a region", "differ by"):
        table.add_column(column, justify="right")
    for row in results["speed"]:
        table.add_row(
            str(row["regions"]),
            str(row["images"]),
            *(f"{row['regions_per_second'][way]:.1f}" for way in WAYS),
            f"{row['ratio_to_plain_loop']:.2f}",
            f"{row['ratio_to_a_call_a_region']:.2f}",
            f"{row['largest_difference']:.1e}",
        )
    console.print(table)
    table = Table(title="peak memory (resident set, MiB), 64 regions of one image", title_justify="left")
    for column in ("way", "model loaded", "peak", "added by the work"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, row in results["memory"].items():
        table.add_row(
            way, *(f"{value / 2**20:.0f}" for value in (row["loaded"], row["peak"], row["peak"] - row["loaded"]))
        )
    console.print(table)
    for name, seconds in results["start_up"].items():
        console.print(f"{name}: {seconds:.2f} s")
    ratio = next(row["ratio_to_plain_loop"] for row in results["speed"] if (row["regions"], row["images"]) == (64, 1))
    console.print(f"target at 64 regions of one image: {TARGET:g} times the plain loop; measured {ratio:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed, memory and start-up time of `foveate describe`.")
    parser.add_argument("--model", default="dynrefer-world", help="shipped model, folder, or owner/name of the hub")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="times that each way is timed; the best one counts")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", nargs=2, metavar=("WAY", "REGIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} is too small: give 1 or more")
    try:
        if arguments.memory_of:
            way, regions = arguments.memory_of
            memory_worker(arguments.model, way, int(regions), arguments.size)
            return 0
        describer = foveate.load(arguments.model)
        import torch

        results: dict[str, Any] = {
            "model": arguments.model,
            "device": str(describer.model.device),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "image_size": arguments.size,
            "repeats": arguments.repeats,
            "tasks": TASKS,
            "target_ratio": TARGET,
            "speed": [
                measure_speed(describer, regions, images, arguments.size, arguments.repeats)
                for regions, images in CASES
            ],
            "memory": measure_memory(arguments.model, 64, arguments.size),
            "start_up": measure_start_up(arguments.model, arguments.repeats, arguments.size),
        }
    except FoveateError as error:
        print(error, file=sys.stderr)
        return 2
    show(results)
    if arguments.out is not None:
        with atomic_write(arguments.out) as file:
            file.write(json.dumps(results, indent=2) + "\n")
        print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
