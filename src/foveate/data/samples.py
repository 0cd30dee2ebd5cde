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
