"""Typed samples: what every dataset reader yields and every training recipe consumes.

Boxes are xyxy absolute pixels, float, half-open. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Relation:
    """`predicate` holds between the region it belongs to (subject) and the region `object_id` of the same image."""

    predicate: str
    object_id: int
    object_name: str


@dataclass(frozen=True, slots=True)
class RegionSample:
    """One region of an image and what is known about it.

    Attributes:
        region_id: unique within its dataset.
        box: xyxy pixels, half-open.
        captions: one or more references; the first is the canonical one.
        category: object class, or None if the dataset has none.
        attributes: attributes known to hold ("red", "striped", "open", ...).
        negative_attributes: attributes known *not* to hold; what is in neither tuple is unknown.
        tags: words that describe the region and the things it relates to.
        tag_places: the same as places in a tag list, where the file has been parsed with one; None where it has not.
        relations: relations of which this region is the subject.
        mask: COCO run-length encoding {"size": [H, W], "counts": ...}, or None.
        score: confidence where the box comes from a detector, else None.
        crowd: the box is drawn around many things of the category ("iscrowd" of COCO).
    """

    region_id: int
    box: tuple[float, float, float, float]
    captions: tuple[str, ...] = ()
    category: str | None = None
    attributes: tuple[str, ...] = ()
    negative_attributes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    relations: tuple[Relation, ...] = ()
    mask: dict[str, Any] | None = None
    score: float | None = None
    crowd: bool = False
    tag_places: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image; `kind` is "what", "colour", "count", "where" or "text"."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True)
class ImageSample:
    """One image with its regions. `path` is opened with `foveate.vision.images.load_image`."""

    image_id: int
    path: Path
    width: int
    height: int
    regions: tuple[RegionSample, ...] = ()
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class BoxSet:
    """Boxes that a detector found on a picture: xyxy pixels (they may overhang it), scores 0 to 1, a label each."""

    boxes: tuple[tuple[float, float, float, float], ...]
    scores: tuple[float, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody says in a conversation.

    Attributes:
        speaker: "human" or "gpt".
        text: a human's may hold `<image>` or `<video>` where the picture stands.
        kind: of a question of known kind: "what", "colour", "count", "where", "text"; else None.
        size: "small", "medium" or "large", how large the thing is that the question is about; None if not known.
    """

    speaker: str
    text: str
    kind: str | None = None
    size: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationSample:
    """A conversation about an image, a video, or nothing to look at.

    Attributes:
        sample_id: not unique in published files.
        messages: in their order; at least one answer follows a question.
        image, video: what is looked at; at most one of them.
        boxes: of the image, or of each frame of the video; () where no box file is read.
    """

    sample_id: str
    messages: tuple[Message, ...]
    image: Path | None = None
    video: Path | None = None
    boxes: tuple[BoxSet, ...] = ()


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """A question of a benchmark about a picture or a video.

    Attributes:
        row: number in the benchmark's file, from 1; unique.
        name: as an error calls it: "row 3 (line 4)".
        question_id: as the file has it; not unique in every benchmark.
        question: as the file has it, a hint and the options apart.
        picture: the same for questions about the same picture.
        image, video: the file that is looked at; both None where the picture is in the benchmark's own table.
        options: of a multiple-choice question, (letter, text) in their order.
        answers: what is right, a letter for a multiple-choice question; () where the file does not say.
        category, l2_category: groups that figures are given for; "" where the file has none.
        boxes: of the image, or of each frame of the video; () where no box file is read.
    """

    row: int
    name: str
    question_id: int | str
    question: str
    picture: str
    image: Path | None = None
    video: Path | None = None
    hint: str = ""
    options: tuple[tuple[str, str], ...] = ()
    answers: tuple[str, ...] = ()
    category: str = ""
    l2_category: str = ""
    split: str = ""
    boxes: tuple[BoxSet, ...] = ()
