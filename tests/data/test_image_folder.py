"""Folders of labelled images: a folder a class, ImageNet's layout, and everything that may be wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.data.image_folder import ImageFolder, images_in
from foveate.errors import InputError


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("cat", 2), ("ant", 1)):
        for number in range(count):
            picture(tmp_path / "train" / name / f"{number}.png", 10 * number)
    return tmp_path


def test_classes_are_sorted_names(folder: Path) -> None:
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    data = ImageFolder(folder)
    assert data.classes == ["ant", "cat"]
    assert [(item.path.name, item.label) for item in data] == [("0.png", 0), ("0.png", 1), ("1.png", 1)]
    image, label = data.load(2)
    assert (image.size, image.getpixel((0, 0)), label) == ((5, 4), (10, 10, 10), 1)
    assert ImageFolder(folder / "train", "").classes == data.classes
    assert [item.label for item in ImageFolder(folder, classes=["dog", "cat", "ant"])] == [2, 1, 1]


def test_imagenet_layout(tmp_path: Path) -> None:
    for wnid in ("n02", "n01"):
        picture(tmp_path / "Data/CLS-LOC/train" / wnid / f"{wnid}_1.JPEG")
    labels = {"val_1": "n02", "val_2": "n01"}
    for name, wnid in labels.items():
        picture(tmp_path / "Data/CLS-LOC/val" / f"{name}.JPEG")
        annotation = tmp_path / "Annotations/CLS-LOC/val" / f"{name}.xml"
        annotation.parent.mkdir(parents=True, exist_ok=True)
        annotation.write_text(f"<annotation><object><name>{wnid}</name></object></annotation>")
    assert ImageFolder(tmp_path, "train").classes == ["n01", "n02"]
    assert [(item.path.stem, item.label) for item in ImageFolder(tmp_path, "val")] == [("val_1", 1), ("val_2", 0)]
    (tmp_path / "Annotations/CLS-LOC/val/val_1.xml").write_text("<annotation><object><name>n99</name>")
    with pytest.raises(InputError, match=r"val_1\.JPEG: the annotation cannot be read"):
        ImageFolder(tmp_path, "val")
    (tmp_path / "Annotations/CLS-LOC/val/val_1.xml").write_text("<a><object><name>n99</name></object></a>")
    with pytest.raises(InputError, match=r"no class of the training set \('n99'\)"):
        ImageFolder(tmp_path, "val")
    assert len(ImageFolder(tmp_path, "val", skip_bad=True)) == 1


def test_a_corrupt_image(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (folder / "train/cat/1.png").read_bytes()
    (folder / "train/cat/1.png").write_bytes(whole[: len(whole) // 2])
    data = ImageFolder(folder)
    assert len(data) == 3
    with pytest.raises(InputError, match=r"1\.png.*skip_bad=True"):
        data.load(2)
    kept = ImageFolder(folder, skip_bad=True)
    assert [item.path.parent.name for item in kept] == ["ant", "cat"]
    assert sum(kept.skipped.values()) == 1
    assert "1 broken records skipped" in caplog.text
    (folder / "train/cat/0.png").write_bytes(b"")
    (folder / "train/ant/0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no image that can be read"):
        ImageFolder(folder, skip_bad=True)


def test_empty_and_missing_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*val"):
        ImageFolder(folder, "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        ImageFolder(tmp_path, "val")
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(InputError, match="cat has no image in it"):
        ImageFolder(tmp_path, "val")
    with pytest.raises(InputError, match="cat is a class that the model does not know"):
        picture(tmp_path / "val" / "cat" / "x.png")
        ImageFolder(tmp_path, "val", classes=["dog"])
    with pytest.raises(InputError, match="cannot be read"):
        images_in(tmp_path / "nowhere")
