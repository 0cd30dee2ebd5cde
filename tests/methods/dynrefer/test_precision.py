"""Half precision: what may run in which, and that an overflow is an error and never a caption (spec 8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import foveate
from foveate.errors import CheckpointError, InputError
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.predictor import DynReferPredictor, default_dtype
from foveate.methods.dynrefer.processing import DynReferProcessor

Build = Callable[..., DynReferModel]


def feed_forwards(model: DynReferModel) -> list[Any]:
    return [layer.layer[-1].DenseReluDense for layer in model.language_layers()]  # type: ignore[index, union-attr]


def saved(model: DynReferModel, processor: DynReferProcessor, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_t5_that_overflows_is_an_error_and_no_caption(
    make_model: Build, processor: DynReferProcessor, photo: Image.Image, tmp_path: Path
) -> None:
    """One factor of the gated layers outgrows 65504, float16's largest number, where the other is small: captions
    "ssss" with score nan in the original code, and a caption wherever the range suffices."""
    model = make_model()
    with torch.no_grad():
        for layer in feed_forwards(model):
            layer.wi_0.weight.mul_(3000)
            layer.wi_1.weight.mul_(3000)
            layer.wo.weight.mul_(1e-6)
    folder = saved(model, processor, tmp_path / "large")
    box = [[20, 10, 50, 30]]
    for dtype in ("float32", "bfloat16"):
        region = foveate.load(folder, device="cpu", dtype=dtype)(photo, boxes=box, tasks="caption")[0]
        assert np.isfinite(region.caption_score)
        assert region.caption
    halved = AutoModel.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"non-finite logits \(T5\w+ in float16 on cpu\); load it in bf16"):
        DynReferPredictor(halved, processor)(photo, boxes=box, tasks="caption")
    with pytest.raises(InputError, match="T5 overflows in float16"):
        foveate.load(folder, device="cpu", dtype="float16")


@torch.no_grad()
def test_what_float16_would_break_stays_in_float32(
    make_model: Build, processor: DynReferProcessor, tmp_path: Path
) -> None:
    """transformers' list of it, `wo` of T5: with what the file holds, not with what float16 would have left."""
    model = make_model()
    for layer in feed_forwards(model):
        layer.wo.weight.mul_(1e5)  # far beyond 65504
    folder = saved(model, processor, tmp_path / "whole")
    halved = DynReferModel.from_pretrained(folder, dtype=torch.float16)
    kept = {name for name, parameter in halved.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if ".wo." in name}
    assert len(kept) == len(model.language_layers())
    assert all(torch.equal(halved.get_parameter(name), model.get_parameter(name)) for name in kept)

    queries = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    control, caption = processor.language_ids(["red,car|", "|"]), processor.language_ids(["red car", "a dog"])
    expected = model.caption_loss(queries, *control, *caption)
    torch.testing.assert_close(halved.caption_loss(queries.half(), *control, *caption), expected, rtol=0.02, atol=0.02)

    # bfloat16 has float32's range: nothing is kept there.
    assert {p.dtype for p in DynReferModel.from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_a_base_model_is_rounded_once(make_model: Build, processor: DynReferProcessor, tmp_path: Path) -> None:
    source = make_model(seed=7)
    source.language_model.save_pretrained(tmp_path / "t5")
    processor.language_tokenizer.save_pretrained(tmp_path / "t5")
    model = make_model(base_models={"language": str(tmp_path / "t5")}).load_base_models()
    model.save_pretrained(tmp_path / "saved")
    halved = DynReferModel.from_pretrained(tmp_path / "saved", dtype=torch.float16)
    for name, parameter in source.language_model.named_parameters():
        found = halved.language_model.get_parameter(name)
        assert torch.equal(found, parameter if ".wo." in name else parameter.half()), name


@pytest.mark.parametrize(
    ("device", "computes", "expected"),
    [("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float32)],
)
def test_default_precision(monkeypatch: pytest.MonkeyPatch, device: str, computes: bool, expected: torch.dtype) -> None:
    """A GPU that only emulates bfloat16 would be slower with it than in float32."""
    asked: list[bool] = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation) or computes
    )
    assert default_dtype(torch.device(device)) == expected
    assert asked == ([] if device == "cpu" else [False])


@pytest.mark.gpu
def test_a_gpu_describes_in_bfloat16(checkpoint: Path, photo: Image.Image) -> None:
    describer = foveate.load(checkpoint)
    assert describer.model.device.type == "cuda"
    assert {parameter.dtype for parameter in describer.model.parameters()} == {torch.bfloat16}
    regions = describer(photo, boxes=[[20, 10, 50, 30], [50, 40, 95, 75]])
    assert all(np.isfinite(region.caption_score) for region in regions)
