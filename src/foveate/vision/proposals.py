"""Where there is something to describe: one small interface over everything that proposes regions of an image.

A proposer is any function of an image (a `PIL.Image`, upright RGB) that gives boxes (R, 4) xyxy pixels and scores (R,)
from 0 to 1, and as a third value, if it has them, R masks as COCO run-length encodings. `load_proposer` makes one of a
checkpoint (the small proposer of the rendered world, SAM, OWLv2); `BoxFile` is a detector's file. `find_regions` asks
one and checks, orders and thins out what it says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from foveate.checkpoints import find_checkpoint, read_config
from foveate.errors import InputError
from foveate.ops.boxes import batched_nms, validate_boxes
from foveate.vision.box_file import BoxFile, check_scores
from foveate.vision.images import decode_rle

Rle = dict[str, Any]
Proposer = Callable[
    [Image.Image], tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, Sequence[Rle]]  # masks or none
]


@dataclass(frozen=True)
class FoundRegions:
    """R checked proposals of an image, the surest first.

    Attributes:
        boxes: (R, 4) float32 xyxy pixels, inside the image.
        scores: (R,) float64 in [0, 1].
        masks: R COCO run-length encodings of the image's size, or None where the proposer gives boxes only.
    """

    boxes: np.ndarray
    scores: np.ndarray
    masks: tuple[Rle, ...] | None = None

    def take(self, rows: Sequence[int]) -> FoundRegions:
        """The proposals of these rows, in their order."""
        rows = list(rows)
        masks = None if self.masks is None else tuple(self.masks[row] for row in rows)
        return FoundRegions(self.boxes[rows], self.scores[rows], masks)

    def smallest_at(self, x: float, y: float) -> int | None:
        """The row of the smallest region under the cursor at (x, y) in pixels, None where there is none.

        This is how a click chooses among all masks (DynRefer spec section 8, mode "everything"). A region is its mask,
        or its box where there are no masks.
        """
        best: tuple[float, int] | None = None
        for row, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            if not (x1 <= x < x2 and y1 <= y < y2):
                continue
            area = (x2 - x1) * (y2 - y1)
            if self.masks is not None:
                mask = decode_rle(self.masks[row])
                if not mask[int(y), int(x)]:
                    continue
                area = float(mask.sum())
            best = min(best or (area, row), (area, row))
        return None if best is None else best[1]


def find_regions(
    proposer: Proposer,
    image: Image.Image,
    *,
    min_score: float = 0.0,
    box_iou: float | None = 0.7,
    max_regions: int | None = None,
) -> FoundRegions:
    """Ask a proposer, check what it says, and leave out what is too unsure or proposed twice.

    Args:
        image: upright RGB.
        min_score: proposals below it are left out, on top of the proposer's own threshold.
        box_iou: of two proposals that overlap by a larger IoU, the one of higher score stays; None keeps both.
        max_regions: so many of the surest stay; None keeps all.

    Raises:
        InputError: an option is out of range, or the proposer gives boxes outside the image, numbers that are not
            finite, scores outside [0, 1], or not as many scores or masks as boxes.
        CheckpointError: raised by proposers whose model gives non-finite numbers.
    """
    check_fraction(min_score, "min_score")
    check_fraction(box_iou, "box_iou", optional=True)
    if max_regions is not None and (isinstance(max_regions, bool) or not isinstance(max_regions, int)):
        raise InputError(f"max_regions must be a whole number of at least 1, not {max_regions!r}.")
    if max_regions is not None and max_regions < 1:
        raise InputError(f"max_regions must be a whole number of at least 1, not {max_regions}.")
    found = _checked(proposer(image), image)
    rows = np.argsort(-found.scores, kind="stable")
    rows = rows[found.scores[rows] >= min_score]
    if box_iou is not None:
        boxes, scores = torch.from_numpy(found.boxes[rows]), torch.from_numpy(found.scores[rows])
        rows = rows[batched_nms(boxes, scores, torch.zeros(len(rows)), box_iou).numpy()]
    return found.take(rows[:max_regions].tolist())


def drop_repeated_captions(
    boxes: np.ndarray, scores: Sequence[float], captions: Sequence[str], iou_threshold: float
) -> list[int]:
    """Non-maximum suppression among regions of the same caption.

    By descending score, a region stays unless one with the same words (case and spaces aside) stays already whose box
    overlaps it by an IoU above `iou_threshold`. Two things that look alike but stand apart both stay.

    Args:
        boxes: (R, 4) xyxy pixels.
        scores: R numbers.
        captions: R texts.
        iou_threshold: in [0, 1].

    Returns:
        Rows that stay, by descending score.

    Raises:
        InputError: the threshold is out of range, or a score is NaN.
    """
    classes: dict[str, int] = {}
    same = [classes.setdefault(" ".join(caption.lower().split()), len(classes)) for caption in captions]
    return batched_nms(
        torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(list(scores), dtype=torch.float64),
        torch.tensor(same, dtype=torch.int64),
        iou_threshold,
    ).tolist()


def check_fraction(value: Any, name: str, *, optional: bool = False) -> None:
    """Whether an option is a number from 0 to 1, or None if `optional`.

    Raises:
        InputError: it is not; the sentence says its name.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name} must be a number from 0 to 1{' or None' * optional}, not {value!r}.")


def load_proposer(
    name: str | os.PathLike[str],
    *,
    words: Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> Proposer | BoxFile:
    """The proposer behind a name.

    Args:
        name: a JSON file of a detector's boxes (`BoxFile`), or a shipped model, a folder or a repository of the
            Hugging Face hub. Its `config.json` decides which: "proposer-world", SAM such as "facebook/sam-vit-base",
            or OWLv2 such as "google/owlv2-base-patch16-ensemble".
        words: what OWLv2 looks for; the others take none.
        device: for the model; CPU by default.

    Raises:
        InputError: there is no such model or file, it is of another kind, or the words do not suit it.
        CheckpointError: it is damaged or incomplete.
    """
    if Path(name).suffix.lower() == ".json":
        _refuse_words(words, f"{os.fspath(name)} is a file of boxes")
        return BoxFile(name)
    folder = find_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    if model_type == "owlv2":
        from foveate.vision.owlv2 import Owlv2Proposer

        return Owlv2Proposer.from_pretrained(folder, words=words or (), device=device)
    _refuse_words(words, f"{os.fspath(name)} is a {model_type!r} model")
    if model_type == "sam":
        from foveate.vision.sam import SamProposer

        return SamProposer.from_pretrained(folder, device=device)
    if model_type == "foveate_proposer":
        from foveate.vision.proposer import RegionProposer

        return RegionProposer.from_pretrained(folder, device=device)
    raise InputError(
        f"{os.fspath(name)} is a {model_type!r} model, which proposes no regions; give proposer-world, a SAM or OWLv2 "
        "checkpoint, or a JSON file of boxes."
    )


def _checked(answer: Any, image: Image.Image) -> FoundRegions:
    """What a proposer said, if it is boxes of the image, a score of each, and perhaps a mask of each."""
    if not isinstance(answer, tuple) or len(answer) not in (2, 3):
        raise InputError(f"the proposer must give (boxes, scores) or (boxes, scores, masks), not {type(answer)}.")
    try:
        boxes = validate_boxes(answer[0], (image.height, image.width)).numpy().astype(np.float32)
    except InputError as error:
        raise InputError(f"the proposer gives wrong boxes: {error}") from None
    scores = check_scores(answer[1], "the proposer")
    if len(scores) != len(boxes):
        raise InputError(f"the proposer gives {len(boxes)} boxes but {len(scores)} scores; each box needs one.")
    if len(answer) == 2:
        return FoundRegions(boxes, scores)
    masks = tuple(answer[2])
    if len(masks) != len(boxes):
        raise InputError(f"the proposer gives {len(boxes)} boxes but {len(masks)} masks; each box needs one.")
    for mask in masks:
        if not isinstance(mask, dict) or list(mask.get("size", ())) != [image.height, image.width]:
            raise InputError("the proposer gives a mask that is no COCO run-length encoding of the image's size.")
    return FoundRegions(boxes, scores, masks)


def _refuse_words(words: Sequence[str] | None, what: str) -> None:
    if words:
        raise InputError(f"{what}, which looks for no words; leave the words out, or give an OWLv2 checkpoint.")
