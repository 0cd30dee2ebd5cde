"""What taps of the class row cost beside the vision tower, and what whole attention maps would.

    python benchmarks/attention_taps.py
    python benchmarks/attention_taps.py --pictures 5 --out out/benchmarks/attention_taps.json

A CLIP ViT of the sizes given (random weights, by default CLIP-L at 336 pixels) runs three ways, in turns, so that other
work on the machine meets all of them: as it is; with taps of the first layer and of the features' layer, rows summed
over heads; and with the attention maps of all layers, for which transformers leaves SDPA. Times are processor time on a
CPU and wall time behind a synchronisation on a GPU, of which the median counts; memory is that of the tensors kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.clip.configuration_clip import CLIPVisionConfig

from foveate.files import atomic_write
from foveate.vision.attention_taps import tap_attention
from foveate.vision.towers import build_tower

TARGET = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of attention taps beside the tower.")
    parser.add_argument("--pictures", type=int, default=5, help="partitions that run together")
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-maps", action="store_true", help="leave out the way with whole maps")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        image_size=options.image_size,
        patch_size=14,
    )
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    tower = build_tower(config).to(options.device, dtype)
    values = torch.randn(
        options.pictures, 3, options.image_size, options.image_size, device=options.device, dtype=dtype
    )
    state, tapped = options.layers - 1, (0, options.layers - 2)
    model: Any = tower.model

    def plain() -> Any:
        return tower(values, layers=(state,)).patch_tokens

    def taps() -> Any:
        with tap_attention(tower, tapped) as found:
            tokens = tower(values, layers=(state,)).patch_tokens
        return tokens, [tap.head_sum() for tap in found.values()]

    def maps() -> Any:
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                out = model(values, output_attentions=True, output_hidden_states=True)
        finally:
            model.set_attn_implementation("sdpa")
        return out.hidden_states[state], [out.attentions[layer][:, :, 0, 1:].sum(1) for layer in tapped], out.attentions

    ways: dict[str, Callable[[], Any]] = {"plain": plain, "taps": taps}
    if not options.no_maps:
        ways["maps"] = maps
        ours, theirs = taps()[1], maps()[1]
        difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        assert difference < (1e-4 if dtype == torch.float32 else 2e-2), f"the rows differ by {difference}"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.repeats + 1):
        for way, run in ways.items():
            took = timed(run, options.device)
            if number:  # the first is a warm-up
                seconds[way].append(took)
    medians = {way: statistics.median(all_) for way, all_ in seconds.items()}
    cells = (options.image_size // 14) ** 2 + 1
    item = values.element_size()
    kept = {"taps": 2 * options.pictures * (cells + 1) * options.width * item}
    kept["maps"] = options.layers * options.pictures * options.heads * cells**2 * item
    share = medians["taps"] / medians["plain"] - 1
    print(f"{options.pictures} partitions of {options.image_size} px, {options.layers} layers of {options.width}")
    for way, median in medians.items():
        memory = f"  {kept[way] / 2**20:9.1f} MiB kept" if way in kept else ""
        print(f"{way:>6}: {1000 * median:9.1f} ms  {median / medians['plain']:6.3f} of the tower{memory}")
    print(f"taps cost {100 * share:+.2f}% of the tower's time (target at most {100 * TARGET:g}%)")
    if options.out:
        content = {"settings": {**vars(options), "out": None}, "seconds": medians, "bytes": kept, "cost": share}
        with atomic_write(options.out) as file:
            json.dump(content, file, indent=1)
    return 0 if share <= TARGET else 1


def timed(run: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
