"""How boxes are found: options of `boxes` and `ask`, and the pipeline that they make."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.outputs import parse_box, save_picture
from foveate.errors import InputError

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


@dataclass(frozen=True)
class BoxChoice:
    """Where the boxes of pictures come from.

    Attributes:
        file: of boxes.
        detector: what finds them.
        drawn: xyxy boxes of every picture.
    """

    file: Path | None = None
    detector: str | None = None
    drawn: tuple[Sequence[float], ...] = ()

    @classmethod
    def of(cls, model: str, boxes: str | None, drawn: Sequence[Sequence[float]]) -> BoxChoice:
        """What --boxes and --box of `ask` say; where they do not, a shipped model has its proposer.

        Raises:
            InputError: there are boxes, for a model of transformers, which has no tokens of objects.
        """
        from foveate.checkpoints import find_checkpoint, shipped_models
        from foveate.methods import looks_at_objects

        if not looks_at_objects(find_checkpoint(model)):
            if drawn or boxes not in (None, "none"):
                raise InputError(
                    f"{model} looks at no object by itself; leave --boxes and --box out, or ask an MG-LLaVA."
                )
            return cls()
        if drawn or boxes == "none":
            return cls(drawn=tuple(drawn))
        if boxes is None and model in shipped_models():
            return cls(detector="proposer-world")
        if boxes is None:
            print(
                "note: no boxes, so no object is looked at by itself; --boxes FILE.json, or what finds them.",
                file=sys.stderr,
            )
            return cls()
        return cls(file=Path(boxes)) if boxes.lower().endswith(".json") else cls(detector=boxes)

    def records(self, pictures: Sequence[Path]) -> list[Any]:
        """The boxes of each picture as a predictor takes them: None where it has to find them."""
        if self.file is not None:
            return _records(self.file, pictures)
        return [None if self.detector is not None else list(self.drawn)] * len(pictures)

    def said(self, text: str, picture: Path) -> Any:
        """The boxes that the command /boxes names."""
        if text == "none":
            return []
        if text == "found":
            if self.detector is None:
                raise InputError("nothing that finds boxes is loaded; start with --boxes and its name.")
            return None
        if text.lower().endswith(".json"):
            return _records(Path(text).expanduser(), [picture])[0]
        return [parse_box(part) for part in text.split()]

    def proposer(self, **options: Any) -> BoxPipeline | None:
        """What finds the boxes, with the options of `open_pipeline`."""
        if self.detector is not None:
            return open_pipeline(self.detector, **options)
        for name in ("tagger", "vocabulary", "labels"):
            if options.get(name) is not None:
                raise InputError(f"--{name} belongs to what finds boxes; give that by --boxes, or leave --{name} out.")
        return None


def _records(file: Path, pictures: Sequence[Path]) -> list[Any]:
    from foveate.vision.box_file import BoxFile

    entries = BoxFile(file).entries(pictures)
    return [entry["frames"] if isinstance(entry, dict) and "frames" in entry else entry for entry in entries]


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
