"""Official checkpoints: keys, prefixes, averages, sizes from shapes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

import foveate
from foveate.errors import CheckpointError, InputError
from foveate.methods.vision_gru.configuration import VisionGRUConfig
from foveate.methods.vision_gru.conversion import (
    convert_checkpoint,
    convert_state_dict,
    convert_upernet_state_dict,
    derive_config,
    load_converted,
    name_averages,
)
from foveate.methods.vision_gru.modeling import VisionGRUForImageClassification, build_upernet

GOLDEN = Path(__file__).parents[2] / "golden" / "vision_gru"


@pytest.fixture
def arrays() -> dict[str, Any]:
    return dict(np.load(GOLDEN / "classifier_tiny.npz"))


@pytest.fixture
def official(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {key[3:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("sd.")}


def logits(folder: Path, arrays: dict[str, Any]) -> Tensor:
    foveate.register()
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(arrays["image"])).logits


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_released_file_becomes_a_folder(
    tmp_path: Path, official: dict[str, Tensor], arrays: dict[str, Any], prefix: str
) -> None:
    torch.save({prefix + key: value for key, value in official.items()}, tmp_path / "vig_model.pth")
    assert convert_checkpoint(tmp_path / "vig_model.pth").folder is None
    done = convert_checkpoint(tmp_path / "vig_model.pth", tmp_path / "out")
    assert (done.config.dim, done.config.depths, done.config.num_labels) == (8, [1, 1, 2, 1], 10)
    assert not done.averaged
    found = logits(tmp_path / "out", arrays)
    torch.testing.assert_close(found.double(), torch.from_numpy(arrays["logits_f64"]), rtol=0, atol=1e-5)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"] == sum(value.numel() for value in official.values())


def test_a_file_of_averages_is_named_by_its_order(
    tmp_path: Path, official: dict[str, Tensor], arrays: dict[str, Any]
) -> None:
    averages = [official[name] for name in arrays["param_order"].tolist()]
    content = {"decay": 0.9999, "num_updates": 7, "shadow_params": averages, "collected_params": None}
    torch.save(content, tmp_path / "vig_ema.pth")
    done = convert_checkpoint(tmp_path / "vig_ema.pth", tmp_path / "out")
    assert done.averaged
    found = logits(tmp_path / "out", arrays)
    torch.testing.assert_close(found.double(), torch.from_numpy(arrays["logits_f64"]), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="not the parameters of a VisionGRU in their order"):
        name_averages(averages[:-3])
    with pytest.raises(CheckpointError, match="not the parameters of a VisionGRU"):
        name_averages([torch.zeros(3)] * 5)
    with pytest.raises(CheckpointError, match="does not fit"):  # two tensors of the list exchanged
        model = VisionGRUForImageClassification(derive_config(official))
        load_converted(model, convert_state_dict(name_averages([averages[1], averages[0], *averages[2:]])))


def test_without_head_it_is_a_model(tmp_path: Path, official: dict[str, Tensor]) -> None:
    body = {f"backbone.vig.{key}": value for key, value in official.items() if not key.startswith("fc.")}
    torch.save(body, tmp_path / "body.pth")
    convert_checkpoint(tmp_path / "body.pth", tmp_path / "out")
    foveate.register()
    model = AutoModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.state_dict()["snake_gru.conv2.bias"], official["snake_gru.conv2.bias"])


def test_a_segmentor_of_mmseg_loads() -> None:
    model = build_upernet(
        VisionGRUConfig(dim=8, depths=[1, 1, 1, 1]), num_labels=3, hidden_size=8, auxiliary_channels=4
    )
    theirs = {}
    for key, value in model.state_dict().items():
        name = key.replace("backbone.vision_gru.", "backbone.vig.").replace(".batch_norm.", ".bn.")
        theirs[name.replace(".classifier.", ".conv_seg.")] = value + 1
    assert "decode_head.conv_seg.weight" in theirs
    load_converted(model, convert_upernet_state_dict(theirs))
    torch.testing.assert_close(model.state_dict()["decode_head.classifier.bias"], theirs["decode_head.conv_seg.bias"])


def test_all_missing_and_unknown_keys_are_one_error(tmp_path: Path, official: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"2 keys are not VisionGRU's: a\.b, head\.weight"):
        convert_state_dict({**official, "head.weight": torch.zeros(1), "a.b": torch.zeros(1)})
    lacking = dict(official)
    del lacking["snake_gru.norm2.bias"], lacking["tokenizer.conv1.bias"]
    lacking["snake_gru.layers.0.0.gate.weight"] = torch.zeros(1)
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match="lacks 2 tensors") as caught:
        convert_checkpoint(tmp_path / "lacking.pth")
    for name in ("snake_gru.norm2.bias", "tokenizer.conv1.bias", "gate.weight"):
        assert name in str(caught.value)


class _Payload:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "no named tensors"),
        ([torch.zeros(1)], "no named tensors"),
        ({"epoch": 3}, r"1 entries that are not named tensors \(epoch\)"),
        ({"shadow_params": [1, 2]}, "more than tensors"),
        ({"tokenizer.conv2.weight": torch.zeros(3)}, r"tokenizer.conv2.weight is of shape \(3,\)"),
        ({"x": torch.zeros(3)}, "tokenizer.conv2.weight is missing"),
        ({"x": _Payload()}, "was not opened"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, content: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=sentence):
        convert_checkpoint(tmp_path / "file.pth", tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_files(tmp_path: Path, official: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="there is no file"):
        convert_checkpoint(tmp_path / "nothing.pth")
    torch.save(official, tmp_path / "cut.pth")
    data = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        convert_checkpoint(tmp_path / "cut.pth")
    torch.save({**official, "fc.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"not finite in fc\.bias"):
        convert_checkpoint(tmp_path / "nan.pth", tmp_path / "out")
