"""Cost of VisionGRU: its scan beside other ways to compute it, and the network beside ViT and ConvNeXt of equal size.

    python benchmarks/backbone.py            # everything but sizes whose predicted time is beyond --limit
    python benchmarks/backbone.py --quick    # three sizes, small scans: about two minutes
    python benchmarks/backbone.py --part scan --out out/benchmarks

Times are processor seconds of one thread, medians. Scans take turns in one process, with a copy of memory among them:
its speed is the limit of what reads p and q and writes h (12 bytes an element; 36 with the backward pass). Networks
have a process for each model and size, so that memory is theirs alone: the highest resident size in a forward pass over
what was resident before it. ViT has 16-pixel patches and is shown with fused (SDPA) and with explicit attention, whose
memory for scores grows with the square of the pixels.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files import atomic_write
from foveate.ops import mingru_scan, use_scan_backend
from foveate.ops.scan import available_scan_backends
from foveate.ops.scan.reference import candidate

SIZES = (224, 384, 512, 768, 1024, 1536, 2048)
QUICK_SIZES = (224, 384, 512)
SHAPES = ((64, 56, 128), (8, 3136, 144), (1, 65536, 144))
QUICK_SHAPES = ((64, 56, 128), (1, 3136, 144))
MODELS = ("vision_gru", "vision_gru_plain", "vision_gru_logspace", "vit_sdpa", "vit_eager", "convnext")
FIT_FROM = 512  # pixels: below, what does not depend on the size weighs too much
LOOP_STEPS = 4096  # the plain loop is left out above
FORWARD_BYTES, STEP_BYTES = 12, 36

# ---------------------------------------------------------------- scans


def plain_loop(pq: Tensor) -> Tensor:
    """The recurrence as one would write it down, with autograd's own bookkeeping."""
    p, q = pq.chunk(2, 2)
    a, b = torch.sigmoid(-q), torch.sigmoid(q) * candidate(p)
    h, found = torch.zeros_like(p[:, 0]), []
    for t in range(p.shape[1]):
        h = a[:, t] * h + b[:, t]
        found.append(h)
    return torch.stack(found, 1)


def processor_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_scans(shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    """Nanoseconds an element of each way, forward and with backward, and the share of the memory's speed."""
    batch, length, channels = shape
    rows = []
    elements = batch * length * channels
    generator = torch.Generator().manual_seed(0)
    pq = torch.randn(batch, length, 2 * channels, generator=generator)
    upstream = torch.randn(batch, length, channels, generator=generator)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"logspace": lambda x: mingru_scan(x, backend="logspace")[0]}
    for name in ("torch", "numba"):
        if name in available_scan_backends():
            ways[name] = lambda x, name=name: mingru_scan(x, backend=name)[0]
    if length <= LOOP_STEPS:
        ways["loop"] = plain_loop
    leaf = pq.clone().requires_grad_()

    def step(way: Callable[[Tensor], Tensor], leaf: Tensor = leaf, upstream: Tensor = upstream) -> None:
        torch.autograd.grad(way(leaf), leaf, upstream)

    # As much as p, q and h are, and never less than what leaves the caches.
    source = torch.randn(max(elements, 1 << 24))
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            with torch.no_grad():
                forward = processor_seconds(lambda way=way, pq=pq: way(pq))
            both = processor_seconds(lambda way=way, step=step: step(way))
            if round_number:  # the first one compiles and fills caches
                times.setdefault(f"{name} forward", []).append(forward)
                times.setdefault(f"{name} step", []).append(both)
        times.setdefault("copy", []).append(processor_seconds(lambda a=target, b=source: a.copy_(b)))
    middle = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = 2 * source.numel() * 4 / middle["copy"]
    for name in ways:
        row: dict[str, Any] = {"shape": [batch, length, channels], "way": name, "copy_gb_per_s": bandwidth / 1e9}
        for kind, size in (("forward", FORWARD_BYTES), ("step", STEP_BYTES)):
            seconds = middle[f"{name} {kind}"]
            row[f"{kind}_ns"] = 1e9 * seconds / elements
            row[f"{kind}_times_faster_than_logspace"] = middle[f"logspace {kind}"] / seconds
            row[f"{kind}_share_of_bandwidth"] = size * elements / bandwidth / seconds
        rows.append(row)
    return rows


def print_scans(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        shape = ", ".join(str(side) for side in row["shape"])
        ratio = f"{row['forward_times_faster_than_logspace']:.1f} / {row['step_times_faster_than_logspace']:.1f}"
        share = f"{row['forward_share_of_bandwidth']:.2f} / {row['step_share_of_bandwidth']:.2f}"
        print(f"{shape:<18} {row['way']:<9} {row['forward_ns']:>11.2f} {row['step_ns']:>17.2f} {ratio:>16} {share:>17}")


# ---------------------------------------------------------------- networks


def build(name: str) -> nn.Module:
    """A network of about 30 million parameters without a head, with random weights."""
    torch.manual_seed(0)
    if name.startswith("vision_gru"):
        from foveate.methods.vision_gru.configuration import VisionGRUConfig
        from foveate.methods.vision_gru.modeling import VisionGRUModel

        sliced = {} if name == "vision_gru" else {"stream_above": 1 << 40}
        return VisionGRUModel(VisionGRUConfig(**sliced))
    if name.startswith("vit"):
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(hidden_size=448, num_attention_heads=7, intermediate_size=1792)
        config._attn_implementation = name.removeprefix("vit_")
        return ViTModel(config, add_pooling_layer=False)
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(depths=[3, 3, 10, 3]))


def resident(what: str) -> float:
    """A figure of this process's memory in MiB: VmRSS now, VmHWM the highest since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    return math.nan


def measure_network(name: str, size: int, repeats: int, seconds: float, train: bool) -> dict[str, Any]:
    """One model at one size, in this process."""
    model = build(name).eval()
    options = {"interpolate_pos_encoding": True} if name.startswith("vit") else {}

    def forward(pixels: Tensor) -> Tensor:
        return model(pixels, **options).last_hidden_state

    def step(pixels: Tensor) -> None:
        model.zero_grad()
        forward(pixels).square().mean().backward()

    with use_scan_backend("logspace" if name.endswith("logspace") else None):
        small, pixels = torch.randn(1, 3, 64, 64), torch.randn(1, 3, size, size)
        with torch.no_grad():
            forward(small)
        gc.collect()
        memory = None
        reset = Path("/proc/self/clear_refs")
        times = []
        with torch.no_grad():
            while len(times) < repeats and (not times or sum(times) + times[-1] < seconds):
                if not times and reset.exists():
                    reset.write_text("5")
                    before = resident("VmRSS")
                    times.append(processor_seconds(lambda: forward(pixels)))
                    memory = resident("VmHWM") - before
                else:
                    times.append(processor_seconds(lambda: forward(pixels)))
        steps: list[float] = []
        if train:
            step(small)
            while len(steps) < repeats and (not steps or sum(steps) + steps[-1] < seconds):
                steps.append(processor_seconds(lambda: step(pixels)))
    return {
        "model": name,
        "size": size,
        "parameters": sum(value.numel() for value in model.parameters()),
        "forward_s": statistics.median(times),
        "forward_runs_s": times,
        "step_s": statistics.median(steps) if steps else None,
        "step_runs_s": steps,
        "peak_mib": memory,
    }


def predicted(rows: Sequence[dict[str, Any]], name: str, size: int) -> float:
    """Seconds that a model will take at a larger size, at least: from the growth between the last two."""
    known = [(row["size"], row["forward_s"]) for row in rows if row["model"] == name and row["size"] < size]
    if not known:
        return 0.0
    last_size, last = known[-1]
    growth = 1.0
    if len(known) > 1:
        growth = max(1.0, math.log(last / known[-2][1]) / (2 * math.log(last_size / known[-2][0])))
    return last * (size / last_size) ** (2 * growth)


def measure_networks(
    arguments: argparse.Namespace, sizes: Sequence[int], rows: list[dict[str, Any]], keep: Callable[[], None]
) -> None:
    """A process for each; sizes outside and models inside, so that slow hours of the machine fall on all models.

    Adds to `rows` what they lack, and calls `keep` after each.
    """
    for size in sizes:
        for name in arguments.models:
            if any((row["model"], row["size"]) == (name, size) for row in rows):
                continue
            if (expected := predicted(rows, name, size)) > arguments.limit:
                print(f"{name} at {size} px left out: about {expected:.0f} s, more than --limit", file=sys.stderr)
                continue
            command = [sys.executable, __file__, "--child", name, str(size), "--repeats", str(arguments.repeats)]
            command += ["--limit", str(arguments.limit), "--threads", str(arguments.threads)]
            command += ["--train-size", str(arguments.train_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
                print(f"{name} at {size} px failed: {why[0]}", file=sys.stderr)
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            rows.sort(key=lambda row: (row["size"], MODELS.index(row["model"])))
            keep()
            print_network(next(row for row in rows if (row["model"], row["size"]) == (name, size)))


def print_network(row: dict[str, Any] | None = None) -> None:
    if row is None:
        print(
            f"{'model':<20} {'px':>5} {'M parameters':>13} {'forward s':>10} {'step s':>8} {'peak MiB':>9}", flush=True
        )
        return
    step = "-" if row["step_s"] is None else f"{row['step_s']:.2f}"
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    print(
        f"{row['model']:<20} {row['size']:>5} {row['parameters'] / 1e6:>13.1f} {row['forward_s']:>10.3f} {step:>8} "
        f"{peak:>9}",
        flush=True,
    )


def growth(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """The exponent e of seconds = c pixels^e by least squares in logarithms, over sizes from `FIT_FROM`."""
    points = [(2 * math.log(row["size"]), math.log(row["forward_s"])) for row in rows if row["model"] == name]
    kept = [point for point in points if point[0] >= 2 * math.log(FIT_FROM) - 1e-9]
    points = kept if len(kept) > 1 else points
    if len(points) < 2:
        return None
    x, y = (statistics.fmean(values) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def crossover(rows: Sequence[dict[str, Any]], ours: str, theirs: str) -> float | None:
    """The size from which on ours is faster, by interpolation of the logarithm of the ratio; None if at no size."""
    times = {(row["model"], row["size"]): row["forward_s"] for row in rows}
    sizes = sorted({size for _, size in times if (ours, size) in times and (theirs, size) in times})
    ratio = {size: math.log(times[ours, size] / times[theirs, size]) for size in sizes}
    slow = [size for size in sizes if ratio[size] > 0]
    if not sizes or (slow and slow[-1] == sizes[-1]):
        return None
    if not slow:
        return float(sizes[0])
    low = slow[-1]
    high = sizes[sizes.index(low) + 1]
    share = ratio[low] / (ratio[low] - ratio[high])
    return math.exp(math.log(low) + share * math.log(high / low))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Exponents, crossover sizes and ratios, as far as the rows have them."""
    by = {(row["model"], row["size"]): row for row in rows}
    found: dict[str, Any] = {
        "growth_exponent": {name: growth(rows, name) for name in dict.fromkeys(r["model"] for r in rows)}
    }
    found["crossover_px"] = {
        other: crossover(rows, "vision_gru", other) for other in ("vit_sdpa", "vit_eager", "convnext")
    }
    if ("vision_gru", 224) in by and ("vision_gru_logspace", 224) in by:
        ratio = by["vision_gru_logspace", 224]["forward_s"] / by["vision_gru", 224]["forward_s"]
        found["logspace_over_vision_gru_at_224"] = ratio
    found["peak_memory_over_vision_gru"] = {
        f"{name} at {size}": row["peak_mib"] / by["vision_gru", size]["peak_mib"]
        for (name, size), row in by.items()
        if size in (1024, 2048) and name != "vision_gru" and by.get(("vision_gru", size), {}).get("peak_mib")
    }
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from foveate.vision.plots import line_chart

    series = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        points = [(row["size"], row["forward_s"]) for row in rows if row["model"] == name]
        series[name] = ([size**2 / 1e6 for size, _ in points], [seconds for _, seconds in points])
    chart = line_chart(
        series,
        title="Forward pass of one image, one thread",
        x_label="megapixels",
        y_label="processor seconds",
    )
    with atomic_write(path, "wb") as file:
        chart.save(file, format="PNG")


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of VisionGRU: scan and network.")
    parser.add_argument("--part", choices=("all", "scan", "networks"), default="all")
    parser.add_argument("--quick", action="store_true", help=f"sizes {QUICK_SIZES} and small scans")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the image in pixels")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--limit", type=float, default=60, help="processor seconds that one run may take")
    parser.add_argument("--train-size", type=int, default=224, help="training steps are measured up to this size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder of backbone.json and .png")
    parser.add_argument("--resume", action="store_true", help="keep what backbone.json in that folder has already")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.threads < 1 or min(arguments.sizes or [1]) < 1:
        parser.error("--repeats, --threads and --sizes must be 1 or more")
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        name, size = arguments.child[0], int(arguments.child[1])
        train = size <= arguments.train_size
        print(json.dumps(measure_network(name, size, arguments.repeats, arguments.limit, train)))
        return 0
    path = arguments.out / "backbone.json"
    result: dict[str, Any] = json.loads(path.read_text()) if arguments.resume and path.is_file() else {}
    result |= {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "scan_backends": available_scan_backends(),
    }

    def keep() -> None:
        with atomic_write(path) as file:
            json.dump(result, file, indent=1)

    if arguments.part != "networks":
        heading = ("scan (N, L, C)", "way", "ns forward", "ns with backward", "x logspace", "of bandwidth")
        print("{:<18} {:<9} {:>11} {:>17} {:>16} {:>17}".format(*heading), flush=True)
        scans = result.setdefault("scans", [])
        for shape in QUICK_SHAPES if arguments.quick else SHAPES:
            if not any(row["shape"] == list(shape) for row in scans):
                rows = measure_scans(shape, arguments.repeats)
                print_scans(rows)
                scans += rows
                keep()
    if arguments.part != "scan":
        sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)
        networks = result.setdefault("networks", [])
        print_network()
        measure_networks(arguments, sorted(sizes), networks, keep)
        result["summary"] = summary(networks)
        keep()
        print(json.dumps(result["summary"], indent=2))
        if networks:
            draw(networks, arguments.out / "backbone.png")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
