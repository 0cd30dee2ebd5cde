"""Trains the shipped weights, in the order in which they build on each other: `make weights`.

    python tools/make_weights.py                      # all of them
    python tools/make_weights.py --only t5-world      # one of them
    python tools/make_weights.py --fresh              # also those that are finished

Each step runs a recipe and copies OUTPUT/checkpoint in float16 to src/foveate/weights/NAME, whole or not at all, where
the next recipes find it. It can be interrupted: finished steps are not trained again, an unfinished one goes on from
its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from foveate.checkpoints import WEIGHTS
from foveate.errors import CheckpointError, FoveateError, InputError
from foveate.files import atomic_folder, atomic_write

# Recipes run in order, each on the checkpoint of the one before; the last one's is shipped.
RECIPES = {
    "clip-world": ("recipes/standins/clip_world.yaml", "recipes/standins/clip_world_2.yaml"),
    "t5-world": ("recipes/standins/t5_world.yaml",),
    "proposer-world": ("recipes/standins/proposer_world.yaml",),
    "convnext-world": ("recipes/standins/convnext_world.yaml",),
    "llama-world": ("recipes/standins/llama_world.yaml", "recipes/standins/llama_world_2.yaml"),
    "llava-next-world": ("recipes/standins/llava_next_world.yaml",),
    "dynrefer-world": ("recipes/dynrefer/world.yaml",),
    "mg-llava-world": ("recipes/mg_llava/world_pretrain.yaml", "recipes/mg_llava/world.yaml"),
    "vision-gru-world": ("recipes/vision_gru/world.yaml",),
    "vision-gru-world-segment": ("recipes/vision_gru/world_segment.yaml",),
}
BUILT_ON = {
    "llava-next-world": ("clip-world", "llama-world"),
    "dynrefer-world": ("clip-world", "t5-world"),
    "mg-llava-world": ("clip-world", "convnext-world", "llama-world"),
    "vision-gru-world-segment": ("vision-gru-world",),
}
MAX_BYTES = 6 * 10**6
MAX_BYTES_TOGETHER = 40 * 10**6


def train_step(recipe_path: Path, anew: bool) -> tuple[Path, bool]:
    """The checkpoint folder of a recipe, trained where it is not finished yet, and whether it was trained now.

    Args:
        anew: train also what is finished, from the start.
    """
    from foveate.training.recipes import load_recipe
    from foveate.training.runner import train

    recipe = load_recipe(recipe_path)
    output = recipe.output
    if anew:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    elif (output / "recipe.yaml").is_file() and load_recipe(output / "recipe.yaml") == recipe:
        if (output / "training.json").is_file() and (output / "checkpoint").is_dir():
            print(f"{recipe_path}: finished before, {output / 'checkpoint'} is used")
            return output / "checkpoint", False
        return train(recipe_path, resume=True).checkpoint, True
    return train(recipe_path).checkpoint, True


def publish(checkpoint: Path, name: str, weights: Path) -> int:
    """Copies a checkpoint to `weights/name` in float16; returns its bytes.

    Raises:
        CheckpointError: a weight does not fit into float16.
        InputError: the model, or all models together, would be larger than what may ship.
    """
    with atomic_folder(weights / name, overwrite=True) as folder:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        for path in folder.rglob("*.safetensors"):
            _to_float16(path)
        _say_float16(folder / "config.json")
        size = _bytes_of(folder)
        if size > MAX_BYTES:
            raise InputError(f"{name} has {size} bytes in float16, more than {MAX_BYTES}; choose smaller sizes.")
        others = sum(_bytes_of(other) for other in weights.iterdir() if other.name not in (name, folder.name))
        if size + others > MAX_BYTES_TOGETHER:
            raise InputError(
                f"with {name} the shipped models have {size + others} bytes, more than {MAX_BYTES_TOGETHER}; "
                "choose smaller sizes."
            )
    return size


def _to_float16(path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[key] = tensor.half()
            if not torch.isfinite(tensors[key]).all():
                raise CheckpointError(f"{path.name}: {key} is not finite in float16; train again with weight decay.")
    with atomic_write(path, "wb") as file:
        file.write(save(tensors, metadata))


def _say_float16(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    with atomic_write(path) as file:
        file.write(json.dumps({**config, "dtype": "float16"}, indent=2, sort_keys=True) + "\n")


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the shipped weights by their recipes.")
    parser.add_argument("--only", choices=list(RECIPES), action="append", help="this step; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="train from the start what is finished, too")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parents[1]
    rows = []
    changed: set[str] = set()
    try:
        for name in options.only or RECIPES:
            started = time.perf_counter()
            shipped = _stamp(WEIGHTS / name)
            # What was trained on other stand-ins is no longer what its recipe makes.
            anew = options.fresh or not changed.isdisjoint(BUILT_ON.get(name, ()))
            for path in RECIPES[name]:
                checkpoint, trained = train_step(root / path, anew)
                anew = anew or trained
            size = publish(checkpoint, name, WEIGHTS)
            if _stamp(WEIGHTS / name) != shipped:
                changed.add(name)
            rows.append((name, size, time.perf_counter() - started))
            print(f"{name}: {size / 1e6:.2f} MB, {rows[-1][2]:.0f} s")
    except (FoveateError, OSError) as error:
        print(f"make_weights: {error}", file=sys.stderr)
        return 2
    print(f"{'model':<16} {'MB':>6} {'seconds':>8}")
    for name, size, seconds in rows:
        print(f"{name:<16} {size / 1e6:>6.2f} {seconds:>8.0f}")
    return 0


def _stamp(folder: Path) -> bytes:
    """The weights of a shipped model, to see whether they changed."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*.safetensors")))


if __name__ == "__main__":
    sys.exit(main())
