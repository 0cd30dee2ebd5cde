"""From image files to named classes, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.cli import main
from foveate.errors import CheckpointError, InputError
from foveate.methods.vision_gru.configuration import VisionGRUConfig
from foveate.methods.vision_gru.modeling import VisionGRUBackbone, VisionGRUForImageClassification
from foveate.methods.vision_gru.predictor import VisionGRUPredictor
from foveate.methods.vision_gru.processing import VisionGRUProcessor, resized_sides

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = VisionGRUConfig(dim=8, depths=[1, 1, 1, 1], id2label=dict(enumerate(NAMES)))
    VisionGRUForImageClassification(config).save_pretrained(tmp_path / "model")
    VisionGRUProcessor(32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    draw = np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(40, 50, 3), (1, 1, 3), (33, 90, 3)]):
        paths.append(tmp_path / "images" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(paths[-1])
    return paths


def test_resizing_is_imagenets() -> None:
    assert resized_sides(500, 375, 256) == (341, 256)
    assert resized_sides(375, 500, 256) == (256, 341)
    processor = VisionGRUProcessor(224)
    ramp = np.tile(np.arange(512, dtype=np.uint8)[:, None, None] // 2, (1, 512, 3)).astype(np.uint8)
    found = processor(ramp)
    assert found.shape == (3, 224, 224)
    # Half the size, then the middle 224 of 256: bilinear and smoothed, as Pillow does it.
    wanted = np.asarray(Image.fromarray(ramp).resize((256, 256), Image.Resampling.BILINEAR))[16:240, 16:240]
    scaled = found * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    scaled = scaled + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    torch.testing.assert_close(scaled, torch.tensor(wanted / 255, dtype=torch.float32).permute(2, 0, 1))
    assert processor(ramp, image_size=None).shape == (3, 512, 512)


def test_classes_of_one_and_of_many(checkpoint: Path, images: list[Path]) -> None:
    classify = foveate.load(checkpoint, device="cpu")
    assert isinstance(classify, VisionGRUPredictor)
    for size in ("default", None, 48):
        many = classify(images, size=size, batch_size=2)
        for path, found in zip(images, many, strict=True):
            alone = classify(path, size=size)
            assert alone.labels == found.labels
            assert alone.scores == pytest.approx(found.scores, abs=1e-6)
            assert sum(found.scores) == pytest.approx(1, abs=1e-5)
            assert sorted(found.labels) == NAMES
    assert classify(images[0], top=1).labels == (classify(images[0]).label,)


def test_bad_requests(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    classify = foveate.load(checkpoint, device="cpu")
    with pytest.raises(InputError, match="top must be"):
        classify(images, top=0)
    with pytest.raises(InputError, match="image_size must be"):
        classify(images, size=0)
    with pytest.raises(InputError, match="does not exist"):
        classify(tmp_path / "none.png")
    VisionGRUBackbone(VisionGRUConfig(dim=8, depths=[1, 1, 1, 1])).save_pretrained(tmp_path / "backbone")
    with pytest.raises(InputError, match="VisionGRUBackbone, which has no classes"):
        foveate.load(tmp_path / "backbone")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load"):
        foveate.load(checkpoint)


def test_processor_round_trip(checkpoint: Path) -> None:
    assert VisionGRUProcessor.from_pretrained(checkpoint).image_size == 32
    path = checkpoint / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.485", "0.5"))
    with pytest.raises(CheckpointError, match="not ImageNet's"):
        VisionGRUProcessor.from_pretrained(checkpoint)
    path.write_text("[")
    with pytest.raises(CheckpointError, match="cannot be used"):
        VisionGRUProcessor.from_pretrained(checkpoint)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_command_line(checkpoint: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images[0].parent
    assert run("classify", str(folder), "--model", str(checkpoint), "--top", "2", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(path) for path in images]
    out = tmp_path / "found.json"
    assert run("classify", str(folder), "--model", str(checkpoint), "--format", "json", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert [entry["image"] for entry in found] == [str(path) for path in images]
    assert all(sorted(entry["labels"]) == NAMES for entry in found)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for arguments, sentence in (
        ((str(tmp_path / "empty"), "--model", str(checkpoint)), "has no image in it"),
        ((str(folder), "--model", "dynrefer-world"), "does not classify whole images"),
        ((str(folder), "--model", str(checkpoint), "--size", "big"), "give a number of pixels, or full"),
        ((str(folder), "--model", str(checkpoint), "--format", "xml"), "use text or json"),
    ):
        assert run("classify", *arguments) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_convert_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VisionGRUForImageClassification(VisionGRUConfig(dim=8, depths=[1, 1, 1, 1], num_labels=3))
    official = {key.removeprefix("vision_gru."): value for key, value in model.state_dict().items()}
    torch.save(official, tmp_path / "vig.pth")
    assert run("convert", "vision_gru", str(tmp_path / "vig.pth"), "--check") == 0
    assert "dim 8, depths 1, 1, 1, 1" in capsys.readouterr().out
    assert run("convert", "vision_gru", str(tmp_path / "vig.pth")) == 2
    assert run("convert", "vision_gru", str(tmp_path / "vig.pth"), "--out", str(tmp_path / "out")) == 0
    assert len(foveate.load(tmp_path / "out", device="cpu").labels) == 3


def test_int8_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="does not run in int8"):
        foveate.load(checkpoint, quantize="int8")
