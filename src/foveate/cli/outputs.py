"""Arguments and results that several verbs have: lists, boxes, annotated pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import InputError
from foveate.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from foveate.vision.kept_tokens import KeptTokens

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def split_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_box(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise InputError(
            f"--box {text!r} is not four numbers; write it as x0,y0,x1,y1 in pixels, such as 40,60,180,220."
        )
    return numbers


def free_name(path: Path) -> Path:
    """The path, with -2, -3, ... before its ending if there is such a file: nobody has asked for that one to go."""
    names = (path.with_stem(f"{path.stem}-{number}" if number > 1 else path.stem) for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def picture_files(path: Path | None, images: Sequence[Path], what: str, option: str) -> list[Path | None]:
    """The picture of each image: the file itself for one image, a file in the folder for each of several."""
    if path is None:
        return [None] * len(images)
    if len(images) == 1 and not path.is_dir():
        if path.suffix.lower() not in PICTURES:
            raise InputError(f"{option} {path} does not end in one of: {', '.join(PICTURES)}; give it such a name.")
        return [path]
    if path.is_file():
        raise InputError(f"{option} {path} is a file; several images are given, so give a folder.")
    pictures: dict[Path, None] = {}
    for image in images:
        picture = path / f"{image.stem}-{what}.png"
        if picture in pictures:
            raise InputError(f"two images would both be drawn as {picture}; describe them in runs of their own.")
        pictures[picture] = None
    return [*pictures]


def check_outputs(written: Sequence[Path], read: Sequence[Path]) -> None:
    """Says before the work what would go wrong after it."""
    inputs = {os.path.realpath(path) for path in read}
    outputs: set[str] = set()
    for path in written:
        place = os.path.realpath(path)
        if place in inputs:
            raise InputError(f"{path} is an input and would be overwritten; give another name.")
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file to write.")
        # A device takes any number of results.
        if place in outputs and (path.is_file() or not path.exists()):
            raise InputError(f"two results would be written to {path}; give each a name of its own.")
        outputs.add(place)
    for folder in {Path(place).parent for place in outputs}:
        for above in (folder, *folder.parents):
            if os.fspath(above) in outputs or above.is_file():
                raise InputError(f"{above} is a file, so nothing can be written in it; give another name.")


def save_picture(picture: Image.Image, path: Path) -> None:
    name = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
    with atomic_write(path, "wb") as file:
        picture.save(file, format=name)


def draw_kept(source: Path, kept: Sequence[KeptTokens], path: Path) -> None:
    """Writes an image with what the model did not read darkened; nothing is where no token was dropped."""
    from foveate.vision.images import load_image
    from foveate.vision.kept_tokens import plot_kept_tokens

    image = load_image(source)
    save_picture(plot_kept_tokens(image, kept[0]) if kept else image, path)
