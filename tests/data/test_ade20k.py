"""ADE20K's layout: labels from PNGs, names, and what is said about files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.data import open_dataset
from foveate.data.ade20k import ADE20K, IGNORE, read_names, reduce_zero_label
from foveate.errors import InputError

NUMBERS = np.array([[0, 1, 2], [3, 3, 0]], np.uint8)
NAMES = "Idx\tRatio\tStuff\tName\n1\t0.2\t1\twall\n2\t0.1\t1\tbuilding, edifice\n3\t0\t0\tdoor\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
    for number in (1, 2):
        name = f"ADE_train_{number:08d}"
        Image.fromarray(np.full((2, 3, 3), 40 * number, np.uint8)).save(tmp_path / f"images/training/{name}.jpg")
        Image.fromarray(NUMBERS).save(tmp_path / f"annotations/training/{name}.png")
    (tmp_path / "objectInfo150.txt").write_text(NAMES)
    return tmp_path


def annotation(root: Path) -> Path:
    return root / "annotations/training/ADE_train_00000001.png"


def test_reads_labels_and_names(root: Path) -> None:
    data = ADE20K(root)
    assert data.classes == ["wall", "building, edifice", "door"]
    assert len(data) == 2
    assert data[1].annotation.name == "ADE_train_00000002.png"
    image, labels = data.load(1)
    assert (image.size, image.getpixel((0, 0))) == ((3, 2), (80, 80, 80))
    assert labels.tolist() == [[255, 0, 1], [2, 2, 255]]
    assert labels.dtype == np.uint8
    (root / "objectInfo150.txt").unlink()
    assert len(ADE20K(root).classes) == 150


def test_a_palette_image_has_its_indices(root: Path) -> None:
    image = Image.fromarray(NUMBERS, "P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    image.save(annotation(root))
    assert ADE20K(root).load(0)[1].tolist() == [[255, 0, 1], [2, 2, 255]]


def test_class_255_is_no_class_but_254_is() -> None:
    assert reduce_zero_label(np.array([0, 1, 255])).tolist() == [IGNORE, 0, 254]


def test_what_does_not_fit(root: Path) -> None:
    Image.fromarray(NUMBERS + 1).save(annotation(root))
    with pytest.raises(InputError, match="has the class 4, but there are 3"):
        ADE20K(root).load(0)
    Image.fromarray(NUMBERS[:1]).save(annotation(root))
    with pytest.raises(InputError, match="has 3 x 1 pixels, but its image 3 x 2"):
        ADE20K(root).load(0)
    Image.new("RGB", (3, 2)).save(annotation(root))
    with pytest.raises(InputError, match="colours of RGB, not a class for each pixel"):
        ADE20K(root).load(0)
    annotation(root).write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"00000001\.png"):
        ADE20K(root).load(0)
    annotation(root).unlink()
    with pytest.raises(InputError, match=r"there is no ADE_train_00000001\.png.*skip_bad"):
        ADE20K(root)
    data = ADE20K(root, skip_bad=True)
    assert (len(data), sum(data.skipped.values())) == (1, 1)
    with pytest.raises(InputError, match=r"there is no folder .*validation"):
        ADE20K(root, "validation")
    with pytest.raises(InputError, match=r"use foveate\.data\.ade20k\.ADE20K"):
        open_dataset("ade20k", root, "training")


@pytest.mark.parametrize("text", ["", "Idx\tName\n", "Idx\tName\n2\twall\n", "1\twall\n1\tdoor\n", "1\t\n", "1 wall\n"])
def test_damaged_names(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"names\.txt"):
        read_names(path)
