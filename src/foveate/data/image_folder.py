"""Folders of labelled images: a folder for each class, or ImageNet's own layout (spec 3.1 of vision_gru)."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

from PIL import Image

from foveate.data.records import BadRecord, RecordLog
from foveate.errors import InputError
from foveate.vision.images import load_image

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
_IMAGES, _BOXES = Path("Data/CLS-LOC"), Path("Annotations/CLS-LOC")


class LabelledFile(NamedTuple):
    """An image file and the index of its class."""

    path: Path
    label: int


def images_in(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted; hidden files are none.

    Raises:
        InputError: there are none, or the folder cannot be read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read ({error.strerror}); check the path.") from None
    found = [folder / name for name in names if Path(name).suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"the folder {folder} has no image in it; give one with {', '.join(sorted(SUFFIXES))} files.")
    return found


class ImageFolder(Sequence[LabelledFile]):
    """Image files with their classes. The index of a class is its rank among the sorted names.

    Args:
        root: a folder with `split/CLASS/*.jpg`, or ImageNet's `ILSVRC` with `Data/CLS-LOC/train/WNID/*.JPEG` and, for
            the split "val", `Data/CLS-LOC/val/*.JPEG` with the class in `Annotations/CLS-LOC/val/*.xml`.
        split: "train", "val", ...; "" where the classes stand in `root` itself.
        classes: names that the labels are to index, those of a trained model say; by default those of the split.
        skip_bad: decode every image once and leave out those that cannot be read, counted in `skipped` and logged in
            one line. Otherwise an image is first opened when it is asked for.

    Raises:
        InputError: there is no such folder, it has no classes, a class has no images, or one is not among `classes`.
    """

    def __init__(
        self, root: Path | str, split: str = "train", *, classes: Sequence[str] | None = None, skip_bad: bool = False
    ) -> None:
        self.root, self.split = Path(root), split
        self._log = RecordLog(skip_bad)
        official = (self.root / _IMAGES / split).is_dir()
        self.folder = self.root / _IMAGES / split if official else self.root / split
        if not self.folder.is_dir():
            raise InputError(
                f"there is no folder {self.folder}; give the root of an ImageFolder and one of its splits."
            )
        self._files: list[LabelledFile] = []
        if official and (self.root / _BOXES / split).is_dir() and not self._class_folders(self.folder):
            self.classes = list(classes or self._class_folders(self.root / _IMAGES / "train"))
            self._read_annotated()
        else:
            self._read_class_folders(classes)
        if skip_bad:
            self._files = [item for item in self._files if self._can_be_read(item)]
        if not self._files:
            raise InputError(f"{self.folder} has no image that can be read; give a folder with a folder a class.")
        self._log.report(f"ImageFolder {self.folder}")

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> number of images left out by `skip_bad`."""
        return dict(self._log.skipped)

    @staticmethod
    def _class_folders(folder: Path) -> list[str]:
        if not folder.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))

    def _read_class_folders(self, classes: Sequence[str] | None) -> None:
        names = self._class_folders(self.folder)
        if not names:
            raise InputError(
                f"{self.folder} has no class folders; the layout is {self.folder / 'CLASS' / 'image.jpg'}."
            )
        self.classes = list(classes or names)
        index = {name: label for label, name in enumerate(self.classes)}
        for name in names:
            if name not in index:
                raise InputError(
                    f"{self.folder / name} is a class that the model does not know; it knows {len(index)} classes, "
                    f"such as {self.classes[0]!r}."
                )
            self._files += [LabelledFile(path, index[name]) for path in images_in(self.folder / name)]

    def _read_annotated(self) -> None:
        index = {name: label for label, name in enumerate(self.classes)}
        for path in images_in(self.folder):
            annotation = self.root / _BOXES / self.split / f"{path.stem}.xml"
            try:
                name = ElementTree.parse(annotation).findtext("object/name")
            except (OSError, ElementTree.ParseError) as error:
                self._log.bad(annotation, path.name, BadRecord("the annotation cannot be read", str(error)))
                continue
            if name not in index:
                self._log.bad(annotation, path.name, BadRecord("object/name is no class of the training set", name))
                continue
            self._files.append(LabelledFile(path, index[name]))

    def _can_be_read(self, item: LabelledFile) -> bool:
        try:
            load_image(item.path)
        except InputError as error:
            self._log.bad(item.path, "image", BadRecord(str(error)))
            return False
        return True

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> LabelledFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[LabelledFile]: ...
    def __getitem__(self, index: int | slice) -> LabelledFile | list[LabelledFile]:
        return self._files[index]

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The decoded RGB image and its class.

        Raises:
            InputError: the image is corrupt; the sentence names its file and how to leave it out.
        """
        path, label = self._files[index]
        try:
            return load_image(path), label
        except InputError as error:
            raise InputError(f"{str(error).rstrip('.')}; or leave such images out with skip_bad=True.") from None
