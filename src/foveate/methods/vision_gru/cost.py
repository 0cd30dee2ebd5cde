"""What VisionGRU costs: its scan beside other ways to compute it, and the network beside ViT and ConvNeXt of equal size
(spec 5). `foveate bench backbone` runs it.

Times are processor seconds of one thread, medians. Scans take turns in one process, with a copy of memory among them:
its speed is the limit of what reads p and q and writes h (12 bytes an element; 36 with the backward pass). Networks
have a process for each model and size, so that memory is theirs alone: the highest resident size in a forward pass over
what was resident before it. ViT has 16-pixel patches and is shown with fused (SDPA) and with explicit attention, whose
memory for scores grows with the square of the pixels.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.files import atomic_write
from foveate.ops import mingru_scan, use_scan_backend
from foveate.ops.scan import available_scan_backends
from foveate.ops.scan.reference import candidate

SIZES = (224, 384, 512, 768, 1024, 1536, 2048)
QUICK_SIZES = (224, 384, 512)
SHAPES = ((64, 56, 128), (8, 3136, 144), (1, 65536, 144))
QUICK_SHAPES = ((64, 56, 128), (1, 3136, 144))
PARTS = ("all", "scan", "networks")
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


def scan_line(row: dict[str, Any]) -> str:
    shape = ", ".join(str(side) for side in row["shape"])
    ratio = f"{row['forward_times_faster_than_logspace']:.1f} / {row['step_times_faster_than_logspace']:.1f}"
    share = f"{row['forward_share_of_bandwidth']:.2f} / {row['step_share_of_bandwidth']:.2f}"
    return f"{shape:<18} {row['way']:<9} {row['forward_ns']:>11.2f} {row['step_ns']:>17.2f} {ratio:>16} {share:>17}"


# ---------------------------------------------------------------- networks


def build(name: str) -> nn.Module:
    """A network of about 30 million parameters without a head, with random weights."""
    torch.manual_seed(0)
    if name.startswith("vision_gru"):
        from .configuration import VisionGRUConfig
        from .modeling import VisionGRUModel

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


@dataclass(frozen=True)
class CostSettings:
    """What is measured, and how often.

    Attributes:
        part: "scan", "networks" or "all".
        quick: smaller scans, and three sizes where `sizes` is empty.
        sizes: sides of the images in pixels; empty for the usual ones.
        models: of `MODELS`.
        repeats: runs of each; the median counts.
        limit: processor seconds that one run may take; sizes whose predicted time is beyond it are left out.
        train_size: training steps are measured up to this size.
        threads: of torch.
    """

    part: str = "all"
    quick: bool = False
    sizes: tuple[int, ...] = ()
    models: tuple[str, ...] = MODELS
    repeats: int = 3
    limit: float = 60.0
    train_size: int = 224
    threads: int = 1

    def check(self) -> None:
        """Raises:
        InputError: a value is none that can be measured.
        """
        if self.part not in PARTS:
            raise InputError(f"there is no part {self.part!r}; take one of {', '.join(PARTS)}.")
        for model in self.models:
            if model not in MODELS:
                raise InputError(f"there is no model {model!r} to measure; take some of {', '.join(MODELS)}.")
        for name in ("repeats", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be a whole number from 1, not {getattr(self, name)}.")
        if any(not 1 <= size <= 16384 for size in self.sizes):
            raise InputError(f"sizes must be pixels from 1 to 16384, not {', '.join(map(str, self.sizes))}.")


def measure_cost(
    out: Path, settings: CostSettings, *, resume: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Measures, and writes `backbone.json` (after each result) and `backbone.png` into a folder.

    Args:
        out: folder of the two files.
        resume: keep what `backbone.json` has already.
        say: called with each line of the tables.

    Returns:
        Path of `backbone.json`.

    Raises:
        InputError: a setting is none that can be measured, or the file to go on from is damaged or of another number of
            threads.
    """
    settings.check()
    path = out / "backbone.json"
    result: dict[str, Any] = _measured_before(path, settings) if resume and path.is_file() else {}
    result |= {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": settings.threads,
        "scan_backends": available_scan_backends(),
    }

    def keep() -> None:
        with atomic_write(path) as file:
            json.dump(result, file, indent=1)

    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        if settings.part != "networks":
            _measure_scans(result.setdefault("scans", []), settings, keep, say)
    finally:
        torch.set_num_threads(before)
    if settings.part != "scan":
        networks = result.setdefault("networks", [])
        _measure_networks(networks, settings, keep, say)
        result["summary"] = summary(networks)
        say(json.dumps(result["summary"], indent=2))
        if networks:
            draw(networks, out / "backbone.png")
    keep()
    return path


def _measured_before(path: Path, settings: CostSettings) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        threads = result.get("threads", settings.threads)
        for row in result.get("networks", []):
            MODELS.index(row["model"])
            network_line(row)
        for row in result.get("scans", []):
            scan_line(row)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be gone on from ({error!r}); remove it, or measure without resume.") from None
    if threads != settings.threads:
        raise InputError(
            f"{path} was measured with {threads} threads, not {settings.threads}; give as many, or another folder."
        )
    return result


def _measure_scans(
    rows: list[dict[str, Any]], settings: CostSettings, keep: Callable[[], None], say: Callable[[str], None]
) -> None:
    heading = ("scan (N, L, C)", "way", "ns forward", "ns with backward", "x logspace", "of bandwidth")
    say("{:<18} {:<9} {:>11} {:>17} {:>16} {:>17}".format(*heading))
    for shape in QUICK_SHAPES if settings.quick else SHAPES:
        if not any(row["shape"] == list(shape) for row in rows):
            rows += measure_scans(shape, settings.repeats)
            keep()
        for row in rows:
            if row["shape"] == list(shape):
                say(scan_line(row))


def _measure_networks(
    rows: list[dict[str, Any]], settings: CostSettings, keep: Callable[[], None], say: Callable[[str], None]
) -> None:
    """A process for each; sizes outside and models inside, so that slow hours of the machine fall on all models.

    Adds to `rows` what they lack, and calls `keep` after each.
    """
    heading = ("model", "px", "M parameters", "forward s", "step s", "peak MiB")
    say("{:<20} {:>5} {:>13} {:>10} {:>8} {:>9}".format(*heading))
    for size in sorted(settings.sizes or (QUICK_SIZES if settings.quick else SIZES)):
        for name in settings.models:
            row = next((row for row in rows if (row["model"], row["size"]) == (name, size)), None)
            if row is None:
                if (expected := predicted(rows, name, size)) > settings.limit:
                    say(f"{name} at {size} px left out: about {expected:.0f} s, more than the limit")
                    continue
                row = _measure_in_a_process(name, size, settings)
                if "failed" in row:
                    say(f"{name} at {size} px failed: {row['failed']}")
                    continue
                rows.append(row)
                rows.sort(key=lambda row: (row["size"], MODELS.index(row["model"])))
                keep()
            say(network_line(row))


def _measure_in_a_process(name: str, size: int, settings: CostSettings) -> dict[str, Any]:
    order = {
        "name": name,
        "size": size,
        "repeats": settings.repeats,
        "seconds": settings.limit,
        "train": size <= settings.train_size,
        "threads": settings.threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(order)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def network_line(row: dict[str, Any]) -> str:
    step = "-" if row["step_s"] is None else f"{row['step_s']:.2f}"
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    parameters = row["parameters"] / 1e6
    return f"{row['model']:<20} {row['size']:>5} {parameters:>13.1f} {row['forward_s']:>10.3f} {step:>8} {peak:>9}"


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


def _child(order: str) -> None:
    """What the process for one model and size does."""
    options = json.loads(order)
    torch.set_num_threads(options.pop("threads"))
    print(json.dumps(measure_network(**options)))


if __name__ == "__main__":
    _child(sys.argv[1])
