"""Speed of the rendered world: scenes a second on one core, at several sizes.

    python benchmarks/world.py
    python benchmarks/world.py --sizes 256 1024 --count 100 --out world.json

The first scenes are not timed: they read the vocabulary and fill caches.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

from foveate.errors import InputError
from foveate.world.scenes import render_scene

TARGET_SIZE, TARGET_RATE = 256, 50


def measure(size: int, count: int, objects: tuple[int, int], first_seed: int) -> dict[str, float | int]:
    """Renders `count` scenes one after the other; times are milliseconds of wall clock and of processor."""
    for seed in range(3):
        render_scene(seed, size, objects)
    times, instances = [], 0
    processor = time.process_time()
    for seed in range(first_seed, first_seed + count):
        start = time.perf_counter()
        scene = render_scene(seed, size, objects)
        times.append(time.perf_counter() - start)
        instances += len(scene.instances)
    processor = time.process_time() - processor
    return {
        "size": size,
        "scenes": count,
        "objects_per_scene": instances / count,
        "scenes_per_second": count / sum(times),
        "scenes_per_processor_second": count / processor,
        "median_ms": 1e3 * statistics.median(times),
        "slowest_ms": 1e3 * max(times),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Scenes a second that one core renders.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512], help="image sides in pixels")
    parser.add_argument("--count", type=int, default=100, help="scenes a size")
    parser.add_argument("--objects", type=int, nargs=2, default=(4, 8), metavar=("FEWEST", "MOST"))
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count {arguments.count} is too small: give 1 or more")
    objects = (arguments.objects[0], arguments.objects[1])
    rows = []
    print(f"{'size':>6} {'objects':>8} {'scenes/s':>9} {'per CPU s':>10} {'median ms':>10} {'slowest ms':>11}")
    for size in arguments.sizes:
        try:
            row = measure(size, arguments.count, objects, arguments.first_seed)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        rows.append(row)
        print(
            f"{size:>6} {row['objects_per_scene']:>8.1f} {row['scenes_per_second']:>9.1f}"
            f" {row['scenes_per_processor_second']:>10.1f} {row['median_ms']:>10.1f} {row['slowest_ms']:>11.1f}"
        )
    print(f"target: {TARGET_RATE} scenes/s on one core at {TARGET_SIZE} px")
    if arguments.out is not None:
        content = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "target": {"size": TARGET_SIZE, "scenes_per_second": TARGET_RATE},
            "results": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
