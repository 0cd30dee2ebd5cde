"""SAM as a proposer: its filters on logits made by hand, and a small random checkpoint against transformers itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam.modeling_sam import SamModel
from transformers.models.sam.processing_sam import SamProcessor

from foveate.errors import CheckpointError, InputError
from foveate.vision.images import decode_rle, mask_to_box
from foveate.vision.sam import SamProposer, SamSettings


class Painted(nn.Module):
    """In place of SAM: the mask logits and predicted IoUs of each point of the grid are given.

    Args:
        masks: (P, 3, 64, 64) logits at the resolution of the model's input.
        scores: (P, 3).
    """

    def __init__(self, masks: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.masks, self.scores = masks, scores
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=64))
        self.points: list[Tensor] = []

    def get_image_embeddings(self, pixel_values: Tensor) -> Tensor:
        assert pixel_values.shape == (1, 3, 64, 64)
        return torch.zeros(1, 4, 8, 8)

    def forward(self, input_points: Tensor, **_: Any) -> Any:
        start = sum(points.shape[1] for points in self.points)
        self.points.append(input_points)
        rows = slice(start, start + input_points.shape[1])
        return SimpleNamespace(pred_masks=self.masks[None, rows], iou_scores=self.scores[None, rows])


def block(box: tuple[int, int, int, int], inside: float = 8.0, outside: float = -8.0) -> Tensor:
    """(64, 64) logits of a rectangle."""
    logits = torch.full((64, 64), outside)
    x1, y1, x2, y2 = box
    logits[y1:y2, x1:x2] = inside
    return logits


def painted(masks: list[Tensor], scores: list[float], **settings: Any) -> SamProposer:
    """Four points; what is not given has nothing in it and is worth nothing."""
    logits, values = torch.full((12, 64, 64), -8.0), torch.zeros(12)
    for row, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        logits[row], values[row] = mask, score
    processor = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    model: Any = Painted(logits.view(4, 3, 64, 64), values.view(4, 3))
    return SamProposer(model, processor, SamSettings(points_per_side=2, **settings))


IMAGE = Image.new("RGB", (64, 64))
A, B, C = (2, 3, 20, 30), (40, 8, 60, 20), (10, 40, 30, 62)


def test_masks_become_boxes_scores_and_run_lengths() -> None:
    boxes, scores, masks = painted([block(A), block(B), block(C)], [0.9, 0.99, 0.95])(IMAGE)
    assert boxes.tolist() == [list(B), list(C), list(A)]  # half-open, the surest first
    assert boxes.dtype == np.float32
    assert scores.tolist() == pytest.approx([0.99, 0.95, 0.9])
    for box, mask in zip((B, C, A), masks, strict=True):
        assert isinstance(mask["counts"], str)  # compressed, ready for JSON
        assert mask_to_box(decode_rle(mask, size=(64, 64))) == box
        assert decode_rle(mask).sum() == (box[2] - box[0]) * (box[3] - box[1])


def test_predicted_iou_must_be_above_the_threshold() -> None:
    proposer = painted([block(A), block(B), block(C)], [0.75, 0.7500001, 0.5], iou_threshold=0.75)
    assert proposer(IMAGE)[0].tolist() == [list(B)]
    everything = painted([block(A), block(B), block(C)], [0.75, -0.5, 1.5], iou_threshold=0)
    boxes, scores, _ = everything(IMAGE)
    # A regression says more than 1 and less than 0; as a probability it is limited.
    assert boxes.tolist() == [list(C), list(A), list(B)]
    assert scores.tolist() == [1.0, 0.75, 0.0]


def test_stability_must_be_above_the_threshold() -> None:
    # 10 x 10 pixels are sure, and a rim makes them 10 x 20 where the cut is one lower: stability 0.5.
    shaky = block((5, 5, 15, 25), inside=0.5)
    shaky[5:15, 5:15] = 8.0
    masks = [block(B), shaky]
    assert len(painted(masks, [0.95, 0.95], stability_threshold=0.5)(IMAGE)[0]) == 1
    assert len(painted(masks, [0.95, 0.95], stability_threshold=0.49)(IMAGE)[0]) == 2
    assert len(painted(masks, [0.95, 0.95], stability_threshold=0.5, stability_offset=0.25)(IMAGE)[0]) == 2


def test_overlapping_boxes_and_small_masks_go() -> None:
    # The second is 9 of 10 columns of the first: IoU 0.9.
    masks = [block((10, 10, 20, 30)), block((10, 10, 19, 30)), block((40, 40, 44, 44))]
    first, second, small = [list(box) for box in ((10, 10, 20, 30), (10, 10, 19, 30), (40, 40, 44, 44))]
    scores = [0.95, 0.96, 0.9]
    assert painted(masks, scores)(IMAGE)[0].tolist() == [second, small]
    assert painted(masks, scores, nms_threshold=0.9)(IMAGE)[0].tolist() == [second, first, small]
    assert painted(masks, scores, min_area=16)(IMAGE)[0].tolist() == [second, small]
    assert painted(masks, scores, min_area=17)(IMAGE)[0].tolist() == [second]


def test_empty_masks_are_no_regions() -> None:
    proposer = painted([], [], iou_threshold=0, stability_threshold=0)
    boxes, scores, masks = proposer(IMAGE)
    assert (boxes.shape, scores.shape, masks) == ((0, 4), (0,), [])


def test_points_are_the_centres_of_a_grid_and_run_in_batches() -> None:
    proposer = painted([block(A)], [0.95], points_per_batch=3)
    assert proposer(Image.new("RGB", (128, 64)))[0].tolist() == [[4, 6, 40, 60]]  # twice as large, the rest is padding
    model: Any = proposer.model
    assert [points.shape for points in model.points] == [(1, 3, 1, 2), (1, 1, 1, 2)]
    # 64 x 32 pixels of the model's input, 2 x 2 points.
    assert torch.cat(model.points, dim=1)[0, :, 0].tolist() == [[16, 8], [48, 8], [16, 24], [48, 24]]


@pytest.mark.parametrize("where", ["masks", "scores"])
def test_non_finite_numbers_are_an_error(where: str) -> None:
    proposer = painted([block(A)], [0.95])
    getattr(proposer.model, where)[3] = float("nan")
    with pytest.raises(CheckpointError, match="SAM gives non-finite numbers"):
        proposer(IMAGE)


# ---------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def sam(sam_folder: Path) -> SamProposer:
    return SamProposer.from_pretrained(sam_folder)


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def test_prompts_give_what_transformers_gives(sam: SamProposer, sam_folder: Path, noise: Image.Image) -> None:
    """By its own processor, which scales the prompts, and its whole forward pass."""
    model = SamModel.from_pretrained(sam_folder).eval()
    processor: Any = SamProcessor(SamImageProcessorPil.from_pretrained(sam_folder))
    seen = sam.encode(noise)
    prompts = [({"input_points": [[[30.0, 20.0]]]}, seen.at_point(30, 20))]
    prompts.append(({"input_boxes": [[[3.0, 4.0, 50.0, 40.0]]]}, seen.in_box([3, 4, 50, 40])))
    for prompt, (mask, score) in prompts:
        inputs = processor(images=noise, return_tensors="pt", **prompt)
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs = {name: value.float() for name, value in inputs.items()}
        with torch.no_grad():
            output = model(**inputs, multimask_output=False)
        expected = processor.post_process_masks(output.pred_masks, *sizes)[0][0, 0].numpy()
        assert mask.shape == (60, 90)
        assert 0 < mask.sum() < mask.size, "the case must be one that can fail"
        np.testing.assert_array_equal(mask, expected)
        assert score == pytest.approx(float(output.iou_scores.clamp(0, 1)), abs=1e-6)


def test_everything_is_all_points_of_the_grid(sam: SamProposer, noise: Image.Image) -> None:
    """With every filter off, the masks are those of three masks at each point, asked for one by one."""
    settings = {"points_per_side": 3, "iou_threshold": 0, "stability_threshold": 0, "nms_threshold": 1.0}
    proposer = SamProposer(sam.model, sam.image_processor, SamSettings(**settings, points_per_batch=4))
    boxes, scores, masks = proposer(noise)
    seen, expected = sam.encode(noise), []
    for y in (1, 3, 5):
        for x in (1, 3, 5):
            points = torch.tensor([[[[x / 6 * seen.fitted[1], y / 6 * seen.fitted[0]]]]])
            with torch.no_grad():
                low, predicted = sam.predict(seen, input_points=points, input_labels=torch.ones(1, 1, 1).long())
            for mask, score in zip(sam.upscale(low[0], seen)[0] > 0, predicted[0, 0], strict=True):
                if mask.any():
                    expected.append((float(score.clamp(0, 1)), int(mask.sum())))
    found = [(score, int(decode_rle(mask).sum())) for score, mask in zip(scores.tolist(), masks, strict=True)]
    assert len(found) == len(expected) > 9
    assert [area for _, area in sorted(found)] == pytest.approx([area for _, area in sorted(expected)], abs=2)
    assert sorted(score for score, _ in found) == pytest.approx(sorted(score for score, _ in expected), abs=1e-5)
    for box, mask in zip(boxes.tolist(), masks, strict=True):
        assert mask_to_box(decode_rle(mask, size=(60, 90))) == tuple(box)


def test_crops_are_looked_at_too(sam: SamProposer, noise: Image.Image) -> None:
    settings = {"points_per_side": 3, "iou_threshold": 0, "stability_threshold": 0, "nms_threshold": 1.0}
    whole = SamProposer(sam.model, sam.image_processor, SamSettings(**settings))(noise)
    more = SamProposer(sam.model, sam.image_processor, SamSettings(**settings, crop_layers=1))(noise)
    assert {tuple(box) for box in whole[0].tolist()} <= {tuple(box) for box in more[0].tolist()}
    for box, mask in zip(more[0].tolist(), more[2], strict=True):  # masks of crops lie where they are in the image
        assert mask_to_box(decode_rle(mask, size=(60, 90))) == tuple(box)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"points_per_side": 0}, "points_per_side must be a whole number from 1 to 1024, not 0"),
        ({"points_per_batch": 2.5}, "points_per_batch must be a whole number from 1"),
        ({"crop_layers": 9}, "crop_layers must be a whole number from 0 to 4, not 9"),
        ({"iou_threshold": float("nan")}, "iou_threshold must be a number from 0 to 1, not nan"),
        ({"stability_offset": -1}, "stability_offset must be a number from 0 on, not -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SamSettings(**settings)


def test_bad_prompts(sam: SamProposer, noise: Image.Image) -> None:
    seen = sam.encode(noise)
    with pytest.raises(InputError, match=r"point \(90, 20\) is not in the image, 90 wide and 60 high"):
        seen.at_point(90, 20)
    with pytest.raises(InputError, match=r"point \(nan, 20\)"):
        seen.at_point(float("nan"), 20)
    with pytest.raises(InputError, match="it leaves the image"):
        seen.in_box([0, 0, 91, 20])
    with pytest.raises(InputError, match="200 x 1 pixels is too thin for SAM, which sees it with 64"):
        sam.encode(Image.new("RGB", (200, 1)))
    assert sam.encode(Image.new("RGB", (128, 1))).fitted == (1, 64)


def test_damaged_checkpoints(sam_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sam"
    shutil.copytree(sam_folder, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"image processor of .* cannot be loaded"):
        SamProposer.from_pretrained(folder)
    SamImageProcessorPil().save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"makes \[1024\] pixels a side, but the model sees 64"):
        SamProposer.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["mask_decoder.iou_token.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of SamModel .* mask_decoder\.iou_token\.weight"):
        SamProposer.from_pretrained(folder)
