"""ADE20K's layout of scenes with a class for each pixel (`ADEChallengeData2016`, spec 3.2 of vision_gru)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from PIL import Image

from foveate.data.image_folder import images_in
from foveate.data.records import BadRecord, RecordLog, read_text
from foveate.errors import InputError
from foveate.metrics.segmentation import IGNORE
from foveate.vision.images import load_class_map, load_image

NAMES = "objectInfo150.txt"
OFFICIAL_CLASSES = 150


class AnnotatedFile(NamedTuple):
    """An image file and the PNG with the classes of its pixels."""

    image: Path
    annotation: Path


class ADE20K(Sequence[AnnotatedFile]):
    """Images with the class of each pixel.

    A PNG says 0 for pixels without a class and 1 to K for the classes; labels here are 0 to K - 1, and `IGNORE` for 0.

    Args:
        root: folder with `images/SPLIT/*.jpg` and `annotations/SPLIT/*.png`; `objectInfo150.txt` in it names the
            classes (tab-separated, number first, name last). Without it they are 150 that have no names.
        split: "training" or "validation".
        skip_bad: leave out images without an annotation file, counted in `skipped`, instead of raising.

    Attributes:
        classes: their names, in the order of the labels.

    Raises:
        InputError: there is no such folder, it has no images, an image has no annotation, or the names are damaged.
    """

    def __init__(self, root: Path | str, split: str = "training", *, skip_bad: bool = False) -> None:
        self.root, self.split = Path(root), split
        self._log = RecordLog(skip_bad)
        folder, truth = (self.root / kind / split for kind in ("images", "annotations"))
        for each in (folder, truth):
            if not each.is_dir():
                raise InputError(
                    f"there is no folder {each}; ADE20K's layout has images/SPLIT/*.jpg and annotations/SPLIT/*.png, "
                    "with the splits training and validation."
                )
        names = self.root / NAMES
        self.classes = read_names(names) if names.is_file() else [f"class {k}" for k in range(1, OFFICIAL_CLASSES + 1)]
        self._files: list[AnnotatedFile] = []
        for image in images_in(folder):
            annotation = truth / f"{image.stem}.png"
            if annotation.is_file():
                self._files.append(AnnotatedFile(image, annotation))
            else:
                self._log.bad(image, image.name, BadRecord(f"there is no {annotation.name} in {truth}"))
        if not self._files:
            raise InputError(f"no image of {folder} has an annotation in {truth}.")
        self._log.report(f"ADE20K {folder}")

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> number of images left out by `skip_bad`."""
        return dict(self._log.skipped)

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> AnnotatedFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[AnnotatedFile]: ...
    def __getitem__(self, index: int | slice) -> AnnotatedFile | list[AnnotatedFile]:
        return self._files[index]

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The decoded RGB image and its labels, (H, W) uint8.

        Raises:
            InputError: a file is corrupt, the two differ in size, or a pixel has a class that there is not.
        """
        files = self._files[index]
        image, numbers = load_image(files.image), load_class_map(files.annotation)
        if numbers.shape != (image.height, image.width):
            raise InputError(
                f"{files.annotation} has {numbers.shape[1]} x {numbers.shape[0]} pixels, but its image "
                f"{image.width} x {image.height}; get both files again."
            )
        if numbers.max() > len(self.classes):
            raise InputError(
                f"{files.annotation} has the class {numbers.max()}, but there are {len(self.classes)}; correct the "
                f"file, or name all classes in {self.root / NAMES}."
            )
        return image, reduce_zero_label(numbers)


def reduce_zero_label(numbers: np.ndarray) -> np.ndarray:
    """Numbers of classes as the files have them, 0 for none -> uint8 labels: k - 1, and `IGNORE` for 0."""
    return np.where(numbers == 0, IGNORE, numbers.astype(np.int64) - 1).astype(np.uint8)


def read_names(path: Path) -> list[str]:
    """Names of the classes 1, 2, ... of a file such as `objectInfo150.txt`, a line a class below a heading.

    Raises:
        InputError: the numbers are not 1, 2, ... in turn, a name is empty, or there are more classes than a PNG holds.
    """
    names: list[str] = []
    for line in read_text(path).splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if not line.strip() or (not names and not cells[0].isdecimal()):
            continue  # the heading
        if len(cells) < 2 or cells[0] != str(len(names) + 1) or not cells[-1]:
            raise InputError(
                f"{path}: the line {line[:80]!r} should be class {len(names) + 1}, its number first and its name last, "
                "with tabs between."
            )
        names.append(cells[-1])
    if not 1 <= len(names) < IGNORE:
        raise InputError(f"{path} names {len(names)} classes; there must be 1 to {IGNORE - 1}.")
    return names
