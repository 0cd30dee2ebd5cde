"""`foveate classify IMAGE...`: the likeliest classes of whole images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Debug, Device, DType
from foveate.errors import InputError
from foveate.files import atomic_write
from foveate.processes import hide_weight_bars, keep_freed_memory


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    model: Annotated[str, typer.Option("--model", help="Folder of the model, or owner/name of the Hugging Face hub.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to name.")] = 5,
    size: Annotated[
        str, typer.Option("--size", help="Side in pixels of the centre crop; 'full' for whole images as they are.")
    ] = "default",
    style: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="File for the result instead of the terminal.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of one forward pass.")] = 16,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Name the likeliest classes of images, with a model such as VisionGRU."""
    if style not in ("text", "json"):
        raise InputError(f"there is no format {style!r}; use text or json.")
    if size not in ("default", "full") and not size.isdecimal():
        raise InputError(f"--size is {size!r}; give a number of pixels, or full.")
    from foveate.data.image_folder import images_in
    from foveate.methods import load

    files = [file for path in images for file in (images_in(path) if path.is_dir() else [path])]
    hide_weight_bars()
    keep_freed_memory()
    classifier = load(model, device=device, dtype=dtype)
    if not hasattr(classifier, "probabilities"):
        raise InputError(f"{model} does not classify whole images; give a classifier, such as a VisionGRU.")
    side = {"default": "default", "full": None}.get(size, int(size) if size.isdecimal() else None)
    found = classifier(files, top=top, size=side, batch_size=batch_size)
    if style == "json":
        text = json.dumps([{"image": os.fspath(f), **c.to_dict()} for f, c in zip(files, found, strict=True)], indent=2)
    else:
        lines = []
        for file, classes in zip(files, found, strict=True):
            named = ", ".join(f"{n} {s:.3f}" for n, s in zip(classes.labels, classes.scores, strict=True))
            lines.append(f"{file}  {named}")
        text = "\n".join(lines)
    if out is None:
        print(text)
        return
    with atomic_write(out) as file:
        file.write(text + "\n")
