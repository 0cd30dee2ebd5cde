"""Speed, memory and start-up of `describe`: against a plain loop, against its first version, speed-up by speed-up.

    python benchmarks/describe.py
    python benchmarks/describe.py --model out/dynrefer-world/checkpoint --repeats 5 --out out/benchmarks/describe.json
    OMP_NUM_THREADS=1 python benchmarks/describe.py --clock cpu --only speed-ups --loop-regions 8   # on a busy machine

Three ways to the same answers (captions, tags, attributes, categories), all on warm models:

- batched: one call with all regions of all images; distinct views are encoded once.
- a call a region: every region alone, all tasks in the call, so that tasks still share the region's views.
- plain loop: every region and every task alone, each of the task's views encoded anew.

Then, for the regions of one image, every speed-up by itself, on the model and on one with random weights in the
proportions of the paper's network, where the vision tower dominates (`paper_proportions`).

The ways take turns, so that other work on the machine falls on all of them; the median time of each is taken, and every
ratio is one of times of the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import foveate
from foveate.errors import FoveateError
from foveate.files import atomic_write
from foveate.processes import keep_freed_memory
from foveate.world.scenes import render_scene

sys.path.insert(0, str(Path(__file__).parent))
from first_version import first_version

FIRST_SEED = 9_700_000  # no recipe trains on scenes from here on
TASKS = ("caption", "tags", "attributes", "category")
TOLERANCE = 1e-4
TARGET = 8.0  # times the plain loop's speed, at 64 regions of one image with every speed-up on
TOWER_TARGET = 0.7  # share of the time that is the vision tower's, in the proportions of the paper
CASES = ((1, 1), (8, 1), (64, 1), (64, 16))  # regions, images
PARTS = ("cases", "speed-ups", "proportions", "linear", "memory", "start-up")
WIDTHS = (128, 256, 512, 1024, 2048, 4096)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

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


def some_regions(work: Work, count: int) -> Work:
    """The first regions of each image, `count` in all or what there is."""
    each = -(-count // len(work))
    return [(image, boxes[:each]) for image, boxes in work]


def take_turns(ways: dict[str, Callable[[], Any]], repeats: int, clock: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, which run in turns, and what each gave last."""
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Any] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = now()
            answers[name] = way()
            times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}, answers


def measure_speed(describer: Any, regions: int, images: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way at one case, and how far their answers are apart."""
    work = make_work(regions, images, arguments.size)
    part = some_regions(work, min(regions, arguments.loop_regions))
    for way in WAYS.values():
        way(describer, some_regions(work[:1], 1))  # warm-up
    ways: dict[str, Callable[[], Any]] = {
        "batched": lambda: batched(describer, work),
        "a call a region": lambda: call_a_region(describer, part),
        "plain loop": lambda: plain_loop(describer, part),
    }
    seconds, answers = take_turns(ways, arguments.repeats, arguments.clock)
    scale = regions / sum(len(boxes) for _, boxes in part)
    for name in ("a call a region", "plain loop"):
        seconds[name] *= scale
    same = [answers["batched"][k][: len(boxes)] for k, (_, boxes) in enumerate(part)]
    return {
        "regions": regions,
        "images": images,
        "seconds": seconds,
        "regions_per_second": {name: regions / value for name, value in seconds.items()},
        "ratio_to_plain_loop": seconds["plain loop"] / seconds["batched"],
        "ratio_to_a_call_a_region": seconds["a call a region"] / seconds["batched"],
        "largest_difference": max(largest_difference(same, answers[name]) for name in list(ways)[1:]),
    }


# ---------------------------------------------------------------- speed-up by speed-up


def paper_proportions(describer: Any) -> Any:
    """A describer with random weights in the proportions of the paper's network, a thousandth of its size.

    The paper's tower does 90 % of the multiply-adds of a region (`multiply_adds`; EVA ViT-g of 39 blocks and width
    1408 on 257 tokens, Flan-T5-XL of 24 + 24 layers and width 2048). Here widths are divided by 5.5 or 8, depths by 4
    or 5, views have 65 tokens, tags and prompts are fewer; 88 % are the tower's.
    """
    import torch

    from foveate.methods.dynrefer.configuration import DynReferConfig
    from foveate.methods.dynrefer.modeling import DynReferModel
    from foveate.methods.dynrefer.predictor import DynReferPredictor

    shipped = describer.model.config
    config = DynReferConfig(
        vision_config={
            "model_type": "blip_2_vision_model",
            "hidden_size": 256,
            "intermediate_size": 1116,
            "num_hidden_layers": 10,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
        },
        text_config=shipped.text_config.to_dict(),
        qformer_config={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
        },
        language_config={
            **shipped.language_config.to_dict(),
            "d_model": 256,
            "d_kv": 64,
            "d_ff": 640,
            "num_layers": 5,
            "num_decoder_layers": 5,
        },
        image_size=112,
        num_query_tokens=8,
        head_size=48,
        # The paper's, so that every caption has 20 tokens: with random weights the end is as likely as any word.
        generation={"num_beams": 2, "max_new_tokens": 20, "repetition_penalty": 1.5},
    )
    torch.manual_seed(0)
    return DynReferPredictor(DynReferModel(config), describer.processor, name="in the paper's proportions")


def multiply_adds(config: Any, texts: int, *, crops: int = 5, groups: int = 2, control: int = 12) -> dict[str, float]:
    """Millions of multiply-adds of one region by stage: `crops` distinct views, `groups` passes of the region encoder,
    `texts` tags and prompts. Norms, softmax and activations are left out."""
    vision, q, text = config.vision_config, config.qformer_config, config.language_config
    width, cells, views = vision.hidden_size, config.grid_size**2, config.num_views
    tokens, queries, head = 1 + cells, config.num_query_tokens, config.head_size
    layers = vision.num_hidden_layers
    if isinstance(config.vision_layer, int) and config.vision_layer < 0:
        layers += 1 + config.vision_layer
    block = tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * tokens**2 * width
    align = (views - 1) * cells * (2 * width**2 + 130 * width + cells * width) * config.align
    fuse = tokens * (views + 1) * width**2
    own = queries * (4 * q.hidden_size**2 + 2 * q.hidden_size * q.intermediate_size + 2 * queries * q.hidden_size)
    cross = 2 * q.hidden_size * (queries * q.hidden_size + tokens * width + queries * tokens)
    former = q.num_hidden_layers * (own + cross / q.cross_attention_frequency)
    inner, length = text.num_heads * text.d_kv, queries + control
    written = config.generation["num_beams"] * config.generation["max_new_tokens"]
    feed = 3 * text.d_model * text.d_ff
    encoder = text.num_layers * length * (4 * text.d_model * inner + feed + 2 * length * inner)
    decoder = written * (6 * text.d_model * inner + feed + 2 * length * inner) + 2 * length * text.d_model * inner
    stages = {
        "tower": crops * (layers * block + 3 * vision.patch_size**2 * width * cells),
        "fusion": groups * (align + fuse + former),
        "heads": texts * config.head_layers * (10 * head**2 + 2 * queries * head),
        "captions": encoder + text.num_decoder_layers * decoder + written * text.d_model * text.vocab_size,
    }
    return {name: value / 1e6 for name, value in stages.items()}


def measure_speed_ups(describer: Any, regions: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every way to describe the regions of one image: seconds, ratios, what share of them is the tower's."""
    from foveate.methods.dynrefer.int8 import quantize_linears
    from foveate.methods.dynrefer.predictor import DynReferPredictor

    work = make_work(regions, 1, arguments.size)
    (image, all_boxes), boxes = work[0], []
    part = some_regions(work, min(regions, arguments.loop_regions))
    quantized = DynReferPredictor(copy.deepcopy(describer.model), describer.processor)
    layers = quantize_linears(quantized.model)

    def at_first() -> Any:
        with first_version():
            return describer(image, boxes, tasks=TASKS)

    ways: dict[str, Callable[[], Any]] = {
        "plain loop": lambda: plain_loop(describer, part),
        "a call a region": lambda: call_a_region(describer, part),
        "first version": at_first,
        "batched": lambda: describer(image, boxes, tasks=TASKS),
        "batched, 1 beam": lambda: describer(image, boxes, tasks=TASKS, num_beams=1),
        "batched, int8": lambda: quantized(image, boxes, tasks=TASKS),
        "batched, int8, 1 beam": lambda: quantized(image, boxes, tasks=TASKS, num_beams=1),
    }
    if arguments.compile:
        ways["batched, compiled tower"] = compiled_tower(describer, image, boxes)
    boxes += all_boxes[:4]
    for name in list(ways)[2:]:
        ways[name]()  # warm-up
    boxes[:] = all_boxes
    seconds, answers = take_turns(ways, arguments.repeats, arguments.clock)
    for name in list(ways)[:2]:
        seconds[name] *= regions / len(part[0][1])
    reports = {name: said.report.milliseconds for name, said in answers.items() if not isinstance(said, list)}
    captions = {name: [r.caption for r in said] for name, said in answers.items() if name in reports}
    alike = sum(a == b for a, b in zip(captions["batched"], captions["batched, int8"], strict=True))
    config = describer.model.config
    vocabulary = describer.processor.vocabulary
    work_by_stage = multiply_adds(config, len(vocabulary.tags + vocabulary.classes) + len(vocabulary.prompts))
    return {
        "model": describer.name,
        "regions": regions,
        "seconds": seconds,
        "ratio_to_plain_loop": {name: seconds["plain loop"] / value for name, value in seconds.items()},
        "ratio_to_first_version": {name: seconds["first version"] / value for name, value in seconds.items()},
        "stages": {name: {stage: ms / sum(own.values()) for stage, ms in own.items()} for name, own in reports.items()},
        "tower_share_of_multiply_adds": work_by_stage["tower"] / sum(work_by_stage.values()),
        "millions_of_multiply_adds": work_by_stage,
        "int8_layers": layers,
        "int8_captions_alike": alike / regions,
        "first_version_captions_alike": captions["first version"] == captions["batched"],
    }


def compiled_tower(describer: Any, image: Image.Image, boxes: Any) -> Callable[[], Any]:
    """The batched way with the tower under torch.compile, which needs minutes and a C++ compiler for it."""
    import torch

    if not shutil.which(os.environ.get("CXX", "g++")):
        raise SystemExit("--compile needs a C++ compiler: install g++, or name another one in CXX")
    compiled = torch.compile(describer.model.encode_views)

    def describe() -> Any:
        with patch.object(describer.model, "encode_views", compiled):
            return describer(image, boxes, tasks=TASKS)

    return describe


def measure_linear(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """One square linear layer on 512 rows, in float32 and in int8."""
    import torch

    from foveate.methods.dynrefer.int8 import Int8Linear

    rows = []
    with torch.inference_mode():
        for width in WIDTHS:
            linear = torch.nn.Linear(width, width)
            quantized, x = Int8Linear(linear), torch.randn(512, width)
            ways = {"float32": lambda f=linear, x=x: f(x), "int8": lambda f=quantized, x=x: f(x)}
            take_turns(ways, 1, arguments.clock)
            seconds, answers = take_turns(ways, 5 * arguments.repeats, arguments.clock)
            error = (answers["int8"] - answers["float32"]).norm() / answers["float32"].norm()
            rows.append({"width": width, "ratio": seconds["float32"] / seconds["int8"], "error": float(error)})
    return rows


# ---------------------------------------------------------------- memory and start-up


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
    if "speed" in results:
        table = Table(title=f"{results['model']}: regions a second ({results['threads']} threads)")
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
    for own in (results[name] for name in ("speed_ups", "proportions") if name in results):
        table = Table(title=f"{own['model']}: {own['regions']} regions of one image")
        for column in ("way", "seconds", "times the plain loop", "times the first version", "tower's share of time"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for name, seconds in own["seconds"].items():
            table.add_row(
                name,
                f"{seconds:.2f}",
                f"{own['ratio_to_plain_loop'][name]:.2f}",
                f"{own['ratio_to_first_version'][name]:.2f}",
                f"{own['stages'][name]['tower']:.0%}" if name in own["stages"] else "",
            )
        console.print(table)
        stages = ", ".join(
            f"{stage} {share:.0%}" for stage, share in own["stages"]["batched"].items() if share >= 0.005
        )
        console.print(
            f"batched: {stages}; of the multiply-adds {own['tower_share_of_multiply_adds']:.0%} are the tower's"
        )
        console.print(f"int8: {own['int8_layers']} layers; {own['int8_captions_alike']:.0%} of the captions unchanged")
    if "linear" in results:
        table = Table(title="int8 linear layer, 512 rows")
        for column in ("width", "times float32", "relative error"):
            table.add_column(column, justify="right")
        for row in results["linear"]:
            table.add_row(str(row["width"]), f"{row['ratio']:.2f}", f"{row['error']:.3f}")
        console.print(table)
    if "memory" in results:
        table = Table(title="peak memory (resident set, MiB), 64 regions of one image")
        for column in ("way", "model loaded", "peak", "added by the work"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for way, row in results["memory"].items():
            numbers = (row["loaded"], row["peak"], row["peak"] - row["loaded"])
            table.add_row(way, *(f"{value / 2**20:.0f}" for value in numbers))
        console.print(table)
    for name, seconds in results.get("start_up", {}).items():
        console.print(f"{name}: {seconds:.2f} s")
    if "speed_ups" in results:
        ratios = results["speed_ups"]["ratio_to_plain_loop"]
        best = max(ratios, key=ratios.__getitem__)
        console.print(f"target: {TARGET:g} times the plain loop; measured {ratios[best]:.2f} ({best})")
    if "proportions" in results:
        share = results["proportions"]["stages"]["batched"]["tower"]
        console.print(f"target: {TOWER_TARGET:.0%} of the time in the tower of the paper's proportions; {share:.0%}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed, memory and start-up time of `foveate describe`.")
    parser.add_argument("--model", default="dynrefer-world", help="shipped model, folder, or owner/name of the hub")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="times that each way is timed; the median counts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--regions", type=int, default=64, help="of one image, for the speed-ups")
    parser.add_argument(
        "--loop-regions", type=int, default=64, help="the loops describe so many of the regions, and are scaled up"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts this process alone; for one thread (OMP_NUM_THREADS=1)",
    )
    parser.add_argument("--compile", action="store_true", help="a row for the tower under torch.compile, too")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", nargs=2, metavar=("WAY", "REGIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("repeats", "regions", "loop_regions"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)} is too small: give 1 or more")
    try:
        if arguments.memory_of:
            way, regions = arguments.memory_of
            memory_worker(arguments.model, way, int(regions), arguments.size)
            return 0
        results = measure(arguments)
    except FoveateError as error:
        print(error, file=sys.stderr)
        return 2
    show(results)
    if arguments.out is not None:
        with atomic_write(arguments.out) as file:
            file.write(json.dumps(results, indent=2) + "\n")
        print(f"written: {arguments.out}")
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    keep_freed_memory()  # as the command line does
    describer = foveate.load(arguments.model, device="cpu")
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
        "clock": arguments.clock,
        "tasks": TASKS,
        "target_ratio": TARGET,
        "target_tower_share": TOWER_TARGET,
    }
    if "cases" in arguments.only:
        results["speed"] = [measure_speed(describer, regions, images, arguments) for regions, images in CASES]
    if "speed-ups" in arguments.only:
        results["speed_ups"] = measure_speed_ups(describer, arguments.regions, arguments)
    if "proportions" in arguments.only:
        results["proportions"] = measure_speed_ups(paper_proportions(describer), arguments.regions, arguments)
    if "linear" in arguments.only:
        results["linear"] = measure_linear(arguments)
    if "memory" in arguments.only:
        results["memory"] = measure_memory(arguments.model, 64, arguments.size)
    if "start-up" in arguments.only:
        results["start_up"] = measure_start_up(arguments.model, arguments.repeats, arguments.size)
    return results


if __name__ == "__main__":
    sys.exit(main())
