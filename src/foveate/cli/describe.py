"""`foveate describe`: what is in these regions."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.options import Debug, Device, DType, Progress, progress_bar
from foveate.errors import InputError
from foveate.files import ResumableLines, atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from foveate import Regions

FORMATS = ("text", "json", "jsonl")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
IMAGES_PER_CALL = 16  # so many images are in memory at once, and so often finished lines reach the file


def describe(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    box: Annotated[
        list[str] | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="A region, xyxy pixels; may be repeated; for all images."),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            "--boxes",
            metavar="FILE.json",
            help='Regions, xyxy pixels (not x, y, width, height): {"image name": [[x0, y0, x1, y1], ...]}, or the list '
            "alone when one image is given.",
        ),
    ] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option("--mask", metavar="FILE.png", help="A region as a mask of the image's size; may be repeated."),
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Propose the regions, then describe them.")] = False,
    tasks: Annotated[str, typer.Option("--tasks", help="What to say, by commas.")] = "caption,tags,attributes,category",
    views: Annotated[
        str,
        typer.Option(
            "--views",
            help="How much context to look at: task (what suits each task), auto (searched for each region), or the "
            "views' coefficients from 0 (the region) to 1 (the image), such as 0,0.3,0.5.",
        ),
    ] = "task",
    model: Annotated[
        str, typer.Option("--model", help="A shipped model, a folder, or owner/name of the Hugging Face hub.")
    ] = "dynrefer-world",
    classes: Annotated[str | None, typer.Option("--classes", help="Categories to choose from, by commas.")] = None,
    style: Annotated[str, typer.Option("--format", help="text, json, or jsonl (a line per image).")] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="File for the result instead of the terminal.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run that wrote jsonl to --out.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            help="Annotated picture to write; a folder when several images are given. By default, the text of one "
            "image comes with IMAGE-described.png in the current folder.",
        ),
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write no annotated picture.")] = False,
    show_views: Annotated[
        Path | None,
        typer.Option("--show-views", help="Picture of the crops looked at; a folder when several images are given."),
    ] = None,
    beams: Annotated[int | None, typer.Option("--beams", help="Beam width of the captions; 1 is greedy.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Regions that run together.")] = 64,
    device: Device = None,
    dtype: DType = None,
    debug: Debug = False,
) -> None:
    """Describe regions of images: caption, tags, attributes and category, each with its probability.

    Without --box, --boxes, --mask or --everything, the whole image is described.
    """
    for image in images:
        if not image.is_file():
            raise InputError(f"there is no image file {image}; check the name.")
    if style not in FORMATS:
        from foveate.checkpoints import suggestion

        raise InputError(f"there is no format {style!r}{suggestion(style, FORMATS)}; use one of: {', '.join(FORMATS)}.")
    if resume and (style != "jsonl" or out is None):
        raise InputError("--resume continues a run with --format jsonl and --out FILE; give both.")
    if no_picture and picture is not None:
        raise InputError("--picture and --no-picture contradict each other; leave one out.")
    if picture is None and not no_picture and style == "text" and len(images) == 1:
        picture = Path(f"{images[0].stem}-described.png")
    annotated = _pictures(picture, images, "described", "--picture")
    looked_at = _pictures(show_views, images, "views", "--show-views")
    written = [path for path in (out, *annotated, *looked_at) if path is not None]
    _refuse_to_overwrite(written, [*images, *(mask or []), *([boxes] if boxes else [])])
    regions = _regions(images, box or [], boxes, mask or [])

    options = {
        "tasks": _words(tasks),
        "views": _views(views),
        "classes": None if classes is None else _words(classes),
        "num_beams": beams,
        "everything": everything,
    }
    pending = list(zip(images, regions, annotated, looked_at, strict=True))
    if style == "jsonl" and out is not None:
        key = json.dumps([[os.fspath(image) for image in images], _digest(regions), options, model, dtype])
        lines = ResumableLines(out, key=key, resume=resume)
        pending = pending[len(lines.finished) :]
    else:
        lines = None
    masks = [_load_mask(path) for path in mask or []]

    from transformers.utils.logging import disable_progress_bar

    from foveate.checkpoints import find_checkpoint
    from foveate.methods import load

    folder = find_checkpoint(model)
    disable_progress_bar()  # a bar for each file of weights; that of a download, one line up, is worth showing
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        describer = load(folder, device=device, dtype=dtype)
    for note in notes:
        print(f"note: {note.message}", file=sys.stderr)
    with progress_bar("regions" if len(images) == 1 else "images") as progress:
        described = _describe(describer, pending, masks, progress, {**options, "batch_size": batch_size})
        if lines is not None:
            _write_lines(lines, described)
        elif out is not None:
            with atomic_write(out) as file:
                file.write("".join(_rendered(described, style)))
        elif style == "json":
            print("".join(_rendered(described, style)), end="")
        else:
            for part in _rendered(described, style):
                print(part, end="", flush=True)
    # What was asked for may be piped on; where it went is news for the person.
    news = sys.stdout if style == "text" else sys.stderr
    for path in written:
        print(f"written: {path}", file=news)


# ---------------------------------------------------------------- arguments


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _views(text: str) -> str | list[float]:
    """A number list, or the name of a policy, which the describer checks."""
    if not any(character.isdigit() for character in text):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--views {text!r} is not task, auto or numbers with commas, such as 0,0.3,0.5.") from None


def _box(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise InputError(
            f"--box {text!r} is not four numbers; write it as x0,y0,x1,y1 in pixels, such as 40,60,180,220."
        )
    return numbers


def _regions(images: Sequence[Path], box: list[str], boxes: Path | None, masks: list[Path]) -> list[Any]:
    """Boxes of each image, or None where the describer looks at the whole image, at masks or at proposals."""
    if masks and len(images) > 1:
        raise InputError(f"--mask belongs to one image, but {len(images)} are given; describe them one by one.")
    common = [_box(text) for text in box]
    if boxes is None:
        return [common or None] * len(images)
    listed = _read_boxes(boxes)
    if isinstance(listed, list):
        if len(images) > 1:
            raise InputError(
                f"{boxes} is a list, which is for one image, but {len(images)} are given; "
                'write {"image name": [[x0, y0, x1, y1], ...], ...}.'
            )
        return [common + listed]
    return [common + _boxes_of(image, listed, boxes) for image in images]


def _read_boxes(path: Path) -> Any:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; --boxes takes a JSON file of xyxy boxes.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); --boxes takes a JSON file of xyxy boxes.") from None
    if not isinstance(listed, list | dict):
        raise InputError(f'{path} holds a {type(listed).__name__}; write {{"image name": [[x0, y0, x1, y1], ...]}}.')
    return listed


def _boxes_of(image: Path, listed: dict[str, Any], file: Path) -> list[Any]:
    for name in (os.fspath(image), image.name, image.stem):
        if name in listed:
            if not isinstance(listed[name], list):
                raise InputError(f"{file}: the boxes of {name!r} are not a list; write [[x0, y0, x1, y1], ...].")
            return listed[name]
    from foveate.checkpoints import suggestion

    raise InputError(f"{file} has no boxes for {image.name}{suggestion(image.name, listed)}; add it, or an empty list.")


def _load_mask(path: Path) -> Any:
    """(H, W) bool: whatever is not black."""
    import numpy as np

    from foveate.vision.images import load_image

    return np.asarray(load_image(path)).any(axis=-1)


def _pictures(path: Path | None, images: Sequence[Path], what: str, option: str) -> list[Path | None]:
    """The picture of each image: the file itself for one image, a file in the folder for each of several."""
    if path is None:
        return [None] * len(images)
    if len(images) == 1 and not path.is_dir():
        if path.suffix.lower() not in PICTURES:
            raise InputError(f"{option} {path} does not end in one of: {', '.join(PICTURES)}; give it such a name.")
        return [path]
    pictures = [path / f"{image.stem}-{what}.png" for image in images]
    for index, picture in enumerate(pictures):
        if picture in pictures[:index]:
            raise InputError(f"two images would both be drawn as {picture}; describe them in runs of their own.")
    return [*pictures]


def _refuse_to_overwrite(written: Sequence[Path], read: Sequence[Path]) -> None:
    inputs = {path.resolve() for path in read}
    for path in written:
        if path.resolve() in inputs:
            raise InputError(f"{path} is an input and would be overwritten; give another name.")
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file to write.")


def _digest(regions: Any) -> str:
    return hashlib.sha256(json.dumps(regions).encode()).hexdigest()


# ---------------------------------------------------------------- work and results


def _describe(
    describer: Any,
    pending: Sequence[tuple[Path, Any, Path | None, Path | None]],
    masks: list[Any],
    progress: Progress,
    options: dict[str, Any],
) -> Iterator[tuple[Path, Regions]]:
    """Describes a few images at a time, writes their pictures, and gives them on."""
    if len(pending) == 1:
        [(image, boxes, annotated, looked_at)] = pending
        regions = describer(image, boxes, masks or None, progress=progress, **options)
        _draw(regions, annotated, looked_at)
        yield image, regions
        return
    for start in range(0, len(pending), IMAGES_PER_CALL):
        part = pending[start : start + IMAGES_PER_CALL]
        boxes = [entry[1] for entry in part]
        listed = describer([entry[0] for entry in part], None if boxes[0] is None else boxes, **options)
        for (image, _, annotated, looked_at), regions in zip(part, listed, strict=True):
            _draw(regions, annotated, looked_at)
            yield image, regions
        progress(start + len(part), len(pending))


def _draw(regions: Regions, annotated: Path | None, looked_at: Path | None) -> None:
    if annotated is not None:
        _save(regions.plot(), annotated)
    if looked_at is not None:
        _save(regions.plot_views(), looked_at)


def _save(picture: Image.Image, path: Path) -> None:
    name = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
    with atomic_write(path, "wb") as file:
        picture.save(file, format=name)


def _write_lines(lines: ResumableLines, described: Iterator[tuple[Path, Regions]]) -> None:
    try:
        with lines:
            for image, regions in described:
                lines.append(json.dumps(_record(image, regions)))
    finally:
        if lines.partial.exists():
            print(f"finished lines are kept in {lines.partial}; --resume continues from there.", file=sys.stderr)


def _rendered(described: Iterator[tuple[Path, Regions]], style: str) -> Iterator[str]:
    if style == "json":
        yield json.dumps([_record(image, regions) for image, regions in described], indent=2) + "\n"
    for image, regions in described:
        yield json.dumps(_record(image, regions)) + "\n" if style == "jsonl" else _text(image, regions)


def _record(image: Path, regions: Regions) -> dict[str, Any]:
    return {"image": os.fspath(image), **regions.to_dict()}


def _text(image: Path, regions: Regions) -> str:
    lines = [f"{image}  {len(regions)} region{'s' * (len(regions) != 1)}"]
    for number, region in enumerate(regions, start=1):
        box = ", ".join(f"{value:g}" for value in region.box)
        caption = "" if region.caption is None else f"  {region.caption}  ({region.caption_score:.2f})"
        lines.append(f"{number:>3}  [{box}]{caption}")
        if region.category is not None:
            lines.append(f"     category    {region.category} {region.category_score:.2f}")
        for name, words, scores in (
            ("attributes", region.attributes, region.attribute_scores),
            ("tags", region.tags, region.tag_scores),
        ):
            if scores:
                listed = ", ".join(f"{word} {scores[word]:.2f}" for word in words) or "none is likely enough"
                lines.append(f"     {name:<12}{listed}")
    return "\n".join(lines) + "\n"
