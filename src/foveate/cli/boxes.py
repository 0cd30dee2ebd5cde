"""`foveate boxes`: the boxes of pictures, in MG-LLaVA's file format."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.box_options import Cache, Labels, NoCache, Tagger, Threshold, Vocabulary, draw_found, open_pipeline
from foveate.cli.options import Debug, Device, one_line, progress_bar
from foveate.cli.outputs import check_outputs, picture_files
from foveate.errors import InputError
from foveate.files import atomic_write
from foveate.processes import hide_weight_bars

if TYPE_CHECKING:
    from foveate.vision.box_pipeline import FoundBoxes


def boxes(
    images: Annotated[list[Path], typer.Argument(help="Images, videos, or folders of images.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="File of all boxes, in MG-LLaVA's layout.")
    ] = None,
    annotations: Annotated[
        list[Path] | None,
        typer.Option(
            "--annotations",
            metavar="FILE.json",
            help="Conversations in LLaVA's form: the boxes of their pictures, under their ids; the one folder given is "
            "where their paths start. May be repeated.",
        ),
    ] = None,
    published: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            metavar="FILE.json",
            help="Box file whose boxes are taken, and kept for these settings, instead of being found; those of other "
            "pictures are found. May be repeated.",
        ),
    ] = None,
    detector: Annotated[
        str,
        typer.Option(
            "--detector", help="What finds the boxes of tags: an OWLv2 (folder or hub name), proposer-world, or a SAM."
        ),
    ] = "proposer-world",
    tagger: Tagger = None,
    vocabulary: Vocabulary = None,
    labels: Labels = None,
    threshold: Threshold = 0.2,
    pad_value: Annotated[
        int | None, typer.Option("--pad-value", help="With OWLv2: grey around a picture, 0 to 255; 128 as published.")
    ] = None,
    legacy_empty_query: Annotated[
        bool, typer.Option("--legacy-empty-query", help="With OWLv2: pictures without tags as in the official code.")
    ] = False,
    frames: Annotated[int, typer.Option("--frames", help="Frames of a video that are looked at.")] = 8,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Annotated picture to write or replace; a folder when several are given."),
    ] = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on after a picture that cannot be read; it has no record.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures that run together.")] = 8,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Find the objects of pictures: tags, then the boxes that they name.

    Boxes are xyxy in pixels. They rest in a cache by the content of each picture, so that a run that was interrupted
    goes on where it was.
    """
    from foveate.data.box_files import pictures_of_conversations, pictures_of_files, published_boxes

    if annotations:
        if len(images) != 1 or not images[0].is_dir():
            raise InputError("--annotations needs one folder, where the paths of its images start; give that.")
        listed = pictures_of_conversations(annotations, images[0])
    else:
        listed = pictures_of_files(images)
    paths = [one.path for one in listed]
    annotated = picture_files(picture, paths, "boxes", "--picture")
    written = [path for path in (out, *annotated) if path is not None]
    check_outputs(written, [*paths, *(annotations or []), *(published or [])])
    known = published_boxes(published, listed) if published else None
    hide_weight_bars()
    pipeline = open_pipeline(
        detector,
        tagger,
        vocabulary,
        cache=cache,
        no_cache=no_cache,
        labels=labels,
        threshold=threshold,
        pad_value=pad_value,
        legacy_empty_query=legacy_empty_query,
        device=device,
    )
    tally: Counter[str] = Counter()
    milliseconds: Counter[str] = Counter()
    lines: list[str] = []
    not_drawn = set()
    with progress_bar("pictures") as progress:
        found = pipeline.find(
            paths, known=known, batch_size=batch_size, frames=frames, skip_bad=skip_bad, progress=progress
        )
        for one, own, drawing in zip(listed, found, annotated, strict=True):
            if isinstance(own, InputError):
                print(f"skipped: {one_line(str(own))}", file=sys.stderr)
                tally["skipped"] += 1
                not_drawn.add(drawing)
                continue
            for frame in own.frames:
                tally[frame.source] += 1
                milliseconds.update(frame.milliseconds)
            if drawing is not None:
                sets = [frame.boxes for frame in own.frames]
                draw_found(one.path, [(boxes.boxes, boxes.labels, boxes.scores) for boxes in sets], drawing)
            if out is None:
                print(_line(one.path, own), flush=True)
            else:
                lines.append(json.dumps(one.record(own.record()), ensure_ascii=False))
    if out is not None:
        with atomic_write(out) as file:
            file.write("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
    _summary(tally, milliseconds)
    for path in written:
        if path not in not_drawn:
            print(f"written: {path}", file=sys.stdout if out is None else sys.stderr)


def _line(path: Path, found: FoundBoxes) -> str:
    parts = []
    for frame in found.frames:
        counts = Counter(frame.boxes.labels)
        named = ", ".join(label if count == 1 else f"{label} {count}" for label, count in counts.most_common())
        total = len(frame.boxes.boxes)
        parts.append(f"{total} box{'es' * (total != 1)}{': ' * bool(named)}{named}")
    return f"{one_line(str(path))}  {' | '.join(parts)}"


def _summary(tally: Counter[str], milliseconds: Counter[str]) -> None:
    """How many pictures were looked at, and what that took."""
    words = {"found": "looked at", "cache": "from the cache", "import": "imported", "skipped": "skipped"}
    counts = ", ".join(f"{tally[name]} {word}" for name, word in words.items() if tally[name])
    new = tally["found"]
    times = ", ".join(f"{name} {value / new:.0f} ms" for name, value in milliseconds.items()) if new else ""
    print(f"pictures: {counts}{f' ({times} each)' if times else ''}", file=sys.stderr)
