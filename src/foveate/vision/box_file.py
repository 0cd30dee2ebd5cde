"""A detector's boxes in a JSON file. Nothing here needs torch before boxes are asked for, so that a wrong file is said
at once."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.checkpoints import suggestion
from foveate.errors import InputError

_EXTRA = ("labels", "id", "image")
"""What the entry of an image may have besides boxes and scores."""


class BoxFile:
    """Boxes of images in a JSON file: `{"image name": [[x0, y0, x1, y1], ...]}`, or the list alone for one image.

    An image is named by its path as given, its file name, or its file name without the ending. With a detector's
    scores, an entry is `{"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}`, as many scores as boxes, 0 to 1; boxes
    without scores count as 1. It may have "labels", too.

    MG-LLaVA's box files, `[{"id": ..., "boxes": [...], "scores": [...], "labels": [...]}, ...]`, name images by their
    ids or, where a record has it, by "image" or "video". Of several records of an id the last counts (spec 3.1).

    Raises:
        InputError: there is no such file, it is no JSON, or it names an image twice.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._listed = _by_name(_read_json(self.path), self.path)

    def entries(self, images: Sequence[str | os.PathLike[str]]) -> list[Any]:
        """What the file has for each image, unchecked: a list of boxes, or boxes with scores.

        Raises:
            InputError: an image has no entry or two images the same, or the file is a bare list and there are several.
        """
        if isinstance(self._listed, list):
            if len(images) > 1:
                raise InputError(
                    f"{self.path} is a list, which is for one image, but {len(images)} are given; "
                    'write {"image name": [[x0, y0, x1, y1], ...], ...}.'
                )
            return [self._listed]
        taken: dict[str, Path] = {}
        found = []
        for image in map(Path, images):
            name = next((name for name in (os.fspath(image), image.name, image.stem) if name in self._listed), None)
            if name is None:
                raise InputError(
                    f"{self.path} has no boxes for {image.name}{suggestion(image.name, self._listed)}; add it, or an "
                    "empty list."
                )
            if taken.setdefault(name, image) != image:
                raise InputError(
                    f"{self.path}: {name!r} fits both {taken[name]} and {image}; name each by its path as you give it."
                )
            found.append(self._listed[name])
        return found

    def proposers(self, images: Sequence[Any]) -> list[Callable[[Image.Image], tuple[np.ndarray, np.ndarray]]]:
        """A proposer for each image, which says what the file has for it.

        Args:
            images: paths; another image can only be the one of a file with a bare list.

        Raises:
            InputError: as `entries`, or an image has no name.
        """
        for image in images if isinstance(self._listed, dict) else ():
            if not isinstance(image, str | os.PathLike):
                raise InputError(
                    f"{self.path} names images by their files, so give paths, not a {type(image).__name__}."
                )
        return [self._proposer(entry) for entry in self.entries(images)]

    def _proposer(self, entry: Any) -> Callable[[Image.Image], tuple[np.ndarray, np.ndarray]]:
        boxes, scores = entry, None
        if isinstance(entry, dict):
            if not {"boxes", "scores"} <= set(entry) <= {"boxes", "scores", *_EXTRA}:
                raise InputError(f'{self.path}: an entry must have "boxes" and "scores", this has {sorted(entry)}.')
            boxes, scores = entry["boxes"], entry["scores"]

        def propose(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
            from foveate.ops.boxes import validate_boxes

            try:
                checked = validate_boxes(boxes, (image.height, image.width)).numpy()
            except InputError as error:
                raise InputError(f"{self.path}: {error}") from None
            return checked, np.ones(len(checked)) if scores is None else check_scores(scores, str(self.path))

        return propose


def _by_name(listed: Any, path: Path) -> Any:
    """Records of MG-LLaVA's layout by everything that an image may be called; another content as it is."""
    if not isinstance(listed, list) or not any(isinstance(record, dict) for record in listed):
        return listed
    named: dict[str, Any] = {}
    for record in listed:
        if not isinstance(record, dict) or not isinstance(record.get("id"), str | int):
            raise InputError(f'{path}: a record must be an object with an "id", this is {record!r:.60}.')
        names = [str(record["id"]), *(record[key] for key in ("image", "video") if isinstance(record.get(key), str))]
        named |= dict.fromkeys(names, record)
    # Files of one name in different folders are told by their paths only.
    counts = Counter(Path(name).name for name in named)
    named |= {Path(name).name: own for name, own in named.items() if counts[Path(name).name] == 1}
    return named


def _read_json(path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        for name in names if len(names) < len(pairs) else ():
            if sum(other == name for other, _ in pairs) > 1:
                raise InputError(f"{path} has {name!r} twice; put all boxes of an image into one list.")
        return names

    try:
        # As a plain dictionary, the second list of an image would replace the first in silence.
        listed = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; give a JSON file of xyxy boxes.") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); give a JSON file of xyxy boxes.") from None
    if not isinstance(listed, list | dict):
        raise InputError(f'{path} holds a {type(listed).__name__}; write {{"image name": [[x0, y0, x1, y1], ...]}}.')
    return listed


def check_scores(values: Any, whose: str) -> np.ndarray:
    """R scores as (R,) float64.

    Raises:
        InputError: they are no list of numbers from 0 to 1; the sentence says `whose` they are.
    """
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"the scores of {whose} must be a list of numbers, not {values!r:.60}.") from None
    if scores.ndim != 1:
        raise InputError(f"the scores of {whose} must be a list of numbers, not of shape {scores.shape}.")
    wrong = ~((scores >= 0) & (scores <= 1))  # NaN, too
    if wrong.any():
        raise InputError(f"the scores of {whose} must be from 0 to 1, and one is {scores[wrong][0]:g}.")
    return scores
