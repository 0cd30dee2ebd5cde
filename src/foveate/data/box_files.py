"""MG-LLaVA's box files (spec 2.8, 3.1): which pictures need boxes, boxes that were published, and the files themselves.

`foveate.data.llava` reads these files with the conversations that they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.data.image_folder import images_in
from foveate.data.llava import open_box_records
from foveate.data.samples import BoxSet
from foveate.errors import InputError


@dataclass(frozen=True)
class BoxedPicture:
    """A picture that has, or will have, a record in a box file.

    Attributes:
        record_id: what the record is joined by.
        path: of the image or video.
        name: the path as the conversations have it; None where the picture belongs to none.
        video: whether it is one.
    """

    record_id: str
    path: Path
    name: str | None = None
    video: bool = False

    def record(self, found: dict[str, Any]) -> dict[str, Any]:
        """The record of a box file, of what was found: `boxes`, `scores` and `labels`, or `frames` of these."""
        named = {} if self.name is None else {"video" if self.video else "image": self.name}
        return {"id": self.record_id, **named, **found}


def pictures_of_files(paths: Sequence[Path]) -> list[BoxedPicture]:
    """Images and videos by their file names without the ending, as the published files have them; a folder stands for
    the images in it.

    Raises:
        InputError: two have the same name, or a folder has no image.
    """
    files = [file for path in paths for file in (images_in(path) if path.is_dir() else [path])]
    taken: dict[str, Path] = {}
    for file in files:
        if taken.setdefault(file.stem, file) is not file:
            raise InputError(
                f"{taken[file.stem]} and {file} would both have the id {file.stem!r}; write their boxes into files of "
                "their own, or name the conversations that they belong to."
            )
    return [BoxedPicture(file.stem, file) for file in files]


def pictures_of_conversations(annotations: Sequence[Path], images: Path) -> list[BoxedPicture]:
    """The pictures of conversations in LLaVA's form, each id and picture once; texts have none.

    Args:
        annotations: JSON lists, as `foveate.data.open_conversations` reads them.
        images: folder that their paths start from.

    Raises:
        InputError: a file is missing or damaged, or there is no picture.
    """
    from foveate.data import open_conversations

    found: dict[BoxedPicture, None] = {}
    for sample in open_conversations(annotations, images):
        path = sample.image or sample.video
        if path is not None:
            name = path.relative_to(images).as_posix()
            found[BoxedPicture(sample.sample_id, path, name, sample.video is not None)] = None
    if not found:
        raise InputError(f"{', '.join(map(str, annotations))}: no conversation is about a picture.")
    return list(found)


def published_boxes(paths: Sequence[Path], pictures: Sequence[BoxedPicture]) -> list[tuple[BoxSet, ...] | None]:
    """For each picture its boxes in box files, one set a frame; None where there are none.

    Records are joined by id, and by picture where they name one, as conversations are with their boxes; without
    conversations, by file name.

    Raises:
        InputError: a file is missing or damaged, or fits none of the pictures.
    """
    wanted: dict[str, list[int]] = {}
    for index, picture in enumerate(pictures):
        for name in {picture.record_id, *([picture.path.name] if picture.name is None else [])}:
            wanted.setdefault(name, []).append(index)
    found: list[tuple[BoxSet, ...] | None] = [None] * len(pictures)
    for path in paths:
        met = 0
        for record_id, name, boxes in open_box_records(path):
            for index in wanted.get(record_id, ()):
                own = pictures[index].name
                if own is None or name is None or own == name:
                    found[index] = boxes
                    met += 1
        if not met:
            raise InputError(
                f"{path} has boxes of none of the {len(pictures)} pictures (the first is "
                f"{pictures[0].record_id!r}); give the file that belongs to them, and the conversations whose ids "
                "it has."
            )
    return found
