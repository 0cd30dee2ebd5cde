"""How boxes are found: options of `boxes` and `ask`, and the pipeline that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.outputs import save_picture

if TYPE_CHECKING:
    from foveate.vision.box_pipeline import BoxPipeline

Tagger = Annotated[
    str | None,
    typer.Option(
        "--tagger",
        help="What names the tags of a picture, which the detector then looks for: a CLIP, a RAM++ that was converted, "
        "a DynRefer (dynrefer-world). By default the detector looks for --vocabulary, or for all that it knows.",
    ),
]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        "--vocabulary", metavar="WORDS", help="Words by commas, a .txt file with a word a line, or coco for COCO's 80."
    ),
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", help="CLIP that labels the boxes of a SAM or a proposer; of proposer-world clip-world."),
]
Threshold = Annotated[float, typer.Option("--threshold", help="A box needs a score above it, 0 to 1.")]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Folder of the boxes found before; ~/.cache/foveate/boxes by default."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Find boxes anew, and keep none.")]


def open_pipeline(
    detector: str,
    tagger: str | None,
    vocabulary: str | None,
    *,
    cache: Path | None,
    no_cache: bool,
    **options: Any,
) -> BoxPipeline:
    """The pipeline that the options ask for."""
    from foveate.errors import InputError
    from foveate.files import cache_folder
    from foveate.language.words import read_vocabulary
    from foveate.vision.box_pipeline import load_box_pipeline

    if cache is not None and no_cache:
        raise InputError("--cache and --no-cache contradict each other; leave one out.")
    return load_box_pipeline(
        detector,
        tagger,
        vocabulary=None if vocabulary is None else read_vocabulary(vocabulary),
        cache=None if no_cache else cache or cache_folder("boxes"),
        **options,
    )


def draw_found(
    source: Any, frames: Sequence[tuple[Sequence[Any], Sequence[str], Sequence[float] | None]], path: Path
) -> None:
    """Writes an image, or the frames of a video, with numbered boxes and their words.

    Args:
        frames: boxes, labels and scores of each.
    """
    from foveate.vision.drawing import draw_boxes, tile
    from foveate.vision.images import load_image
    from foveate.vision.video import is_video, load_video

    if not is_video(source):
        boxes, labels, scores = frames[0]
        save_picture(draw_boxes(load_image(source), boxes, labels, scores), path)
        return
    seen = load_video(source, len(frames)).frames
    drawn = [draw_boxes(load_image(frame), *own, side=480) for frame, own in zip(seen, frames, strict=True)]
    save_picture(tile(drawn), path)
