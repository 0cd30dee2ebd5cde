"""Object features of many boxes: the separable form against RoIAlign on the upsampled map, with equal numbers asserted.

    python benchmarks/object_tokens.py
    python benchmarks/object_tokens.py --boxes 100 --size 768 --out out/benchmarks/object_tokens.json

Both ways pool the maps of a ConvNeXt-L of the released sizes (random values) for the boxes of one picture. Each runs in
a process of its own, which says its best processor time, which other work on the machine does not lengthen, and by how
much it raised the peak of its resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from foveate.files import atomic_write
from foveate.methods.mg_llava.objects import pool_objects

DIMS = (192, 384, 768, 1536)
BINS = 56
TOLERANCE = 1e-5
TARGETS = {"speed": 8.0, "memory": 50.0}
WAYS = ("separable", "dense")


def make_work(boxes: int, size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Stage maps of one picture and boxes of all sizes, the same ones at every run."""
    generator = torch.Generator().manual_seed(0)
    stages = [
        torch.randn(1, width, size // 2 ** (2 + k), size // 2 ** (2 + k), generator=generator)
        for k, width in enumerate(DIMS)
    ]
    corners = torch.rand(boxes, 2, 2, generator=generator).sort(dim=1).values * size
    return stages, [corners.flatten(1)]


def peak_memory() -> int:
    """Bytes: the highest resident memory of this process since the last `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory a process had at most")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(way: str, boxes: int, size: int, repeats: int, result: Path) -> dict[str, Any]:
    """Runs one way in this process, so many times: the memory of the first, the best time of all."""
    stages, own = make_work(boxes, size)
    pool_objects([stage[:, :1, :8, :8] for stage in stages[:1]], [own[0][:1]], canvas=size, bins=2)  # warm-up of torch
    reset_peak()
    before = peak_memory()
    memory, seconds = 0, float("inf")
    for number in range(repeats):
        start = time.process_time()
        pooled = pool_objects(stages, own, canvas=size, bins=BINS, pooling=way)[0]
        seconds = min(seconds, time.process_time() - start)
        if number == 0:
            memory = peak_memory() - before
            torch.save(pooled, result)
    return {"seconds": seconds, "bytes": memory}


def in_process(way: str, options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    result = folder / f"{way}.pt"
    command = [sys.executable, __file__, "--way", way, "--boxes", str(options.boxes), "--size", str(options.size)]
    command += ["--repeats", str(options.repeats), "--result", str(result)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return json.loads(done.stdout), torch.load(result, weights_only=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Separable against dense pooling of object features.")
    parser.add_argument("--boxes", type=int, default=100)
    parser.add_argument("--size", type=int, default=768, help="side of the high-resolution picture")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.boxes, options.size, options.repeats, options.result)))
        return 0
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        found = {way: in_process(way, options, Path(folder)) for way in WAYS}
    (fast, ours), (slow, reference) = found["separable"], found["dense"]
    difference = float((ours - reference).abs().max())
    assert difference <= TOLERANCE, f"the features differ by {difference}"
    ratios = {"speed": slow["seconds"] / fast["seconds"], "memory": slow["bytes"] / max(fast["bytes"], 1)}
    print(f"{options.boxes} boxes, picture of {options.size} px, {torch.get_num_threads()} threads")
    for way, (row, _) in found.items():
        print(f"{way:>10}: {row['seconds']:8.3f} s  {row['bytes'] / 2**20:8.1f} MiB")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f} times (target {TARGETS[name]:g})")
    print(f"largest difference {difference:.1e}")
    if options.out:
        with atomic_write(options.out) as file:
            json.dump(
                {"boxes": options.boxes, "size": options.size, **{w: r for w, (r, _) in found.items()}, **ratios}, file
            )
    return 0 if all(ratios[name] >= target for name, target in TARGETS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
