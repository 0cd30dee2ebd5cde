"""The region proposer: boxes and cells, images of every shape, saved and loaded, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from foveate.errors import CheckpointError, InputError
from foveate.metrics.proposals import ProposalImage, evaluate_proposals
from foveate.ops.boxes import box_iou
from foveate.vision.proposer import (
    ProposerConfig,
    ProposerModel,
    ProposerOutput,
    RegionProposer,
    cell_centres,
    decode_boxes,
    encode_boxes,
    fit_image,
    to_pixel_values,
)
from foveate.world.scenes import render_scene

NAMES = ["cat", "dog", "cup"]


def small_config(**changes: Any) -> ProposerConfig:
    return ProposerConfig(
        image_size=64, widths=[4, 8, 8, 16, 16], head_width=8, id2label=dict(enumerate(NAMES)), **changes
    )


@pytest.fixture(scope="module")
def random_proposer() -> RegionProposer:
    """Untrained, yet sure of something nearly everywhere."""
    torch.manual_seed(0)
    model = ProposerModel(small_config(score_threshold=0.2))
    nn.init.normal_(model.objectness.weight, std=0.003)
    nn.init.normal_(model.log_distances.weight, std=0.003)
    nn.init.zeros_(model.objectness.bias)  # pyright: ignore[reportArgumentType]
    return RegionProposer(model)


class Painted(nn.Module):
    """In place of the network: one object whose cell, distances and class are given."""

    def __init__(self, config: ProposerConfig, cell: tuple[int, int], distances: list[float], scores: list[float]):
        super().__init__()
        self.config, self.cell, self.distances, self.scores = config, cell, distances, scores
        self.device = torch.device("cpu")

    def forward(self, pixel_values: Tensor) -> ProposerOutput:
        grid = self.config.grid_size
        objectness = torch.full((len(pixel_values), grid, grid), -20.0)
        row, column = self.cell
        for step, score in enumerate(self.scores):  # to the right of the peak
            objectness[:, row, column + step] = math.log(score / (1 - score))
        log_distances = (
            torch.tensor(self.distances).div(4).log()[None, :, None, None].expand(len(pixel_values), 4, grid, grid)
        )
        classes = torch.zeros(len(pixel_values), 3, grid, grid)
        classes[:, 1, row, column] = math.log(6)  # 6 of 8 parts
        return ProposerOutput(objectness, log_distances, classes)


def painted(cell: tuple[int, int], distances: list[float], scores: list[float], **config: float) -> RegionProposer:
    return RegionProposer(Painted(small_config(**config), cell, distances, scores))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- boxes and cells


def test_centres_of_cells() -> None:
    centres = cell_centres(3)
    assert centres[0, 0].tolist() == [2, 2]
    assert centres[1, 2].tolist() == [10, 6]  # row 1, column 2


def test_distances_by_hand() -> None:
    # 4, 8, 16 and 2 pixels are 1, 2, 4 and 0.5 cells.
    logs = encode_boxes(torch.tensor([[6.0, 2.0, 26.0, 12.0]]), torch.tensor([[10.0, 10.0]]))
    assert torch.allclose(logs.exp(), torch.tensor([[1.0, 2.0, 4.0, 0.5]]))


@settings(deadline=None)
@given(
    st.tuples(*[st.floats(0.1, 1500.0)] * 4),
    st.tuples(*[st.floats(0.0, 256.0)] * 2),
)
def test_decoding_inverts_encoding(distances: tuple[float, ...], centre: tuple[float, float]) -> None:
    x, y = centre
    left, top, right, bottom = distances
    box = torch.tensor([[x - left, y - top, x + right, y + bottom]], dtype=torch.float64)
    centres = torch.tensor([[x, y]], dtype=torch.float64)
    assert torch.allclose(decode_boxes(encode_boxes(box, centres), centres), box, atol=1e-6, rtol=0)


def test_decoded_boxes_are_never_empty_or_infinite() -> None:
    extreme = torch.tensor([[-1e9, -1e9, -1e9, -1e9], [1e9, 1e9, 1e9, 1e9]])
    boxes = decode_boxes(extreme, torch.full((2, 2), 130.0))
    assert torch.isfinite(boxes).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    ("size", "shape"),
    [((1, 1), (64, 64)), ((1000, 300), (19, 64)), ((300, 1000), (64, 19)), ((9000, 1), (1, 64)), ((64, 64), (64, 64))],
)
def test_images_are_fitted_by_their_longer_side(size: tuple[int, int], shape: tuple[int, int]) -> None:
    assert fit_image(Image.new("RGB", size), 64).shape == (*shape, 3)


def test_pixel_values() -> None:
    white, black = np.full((2, 4, 3), 255, np.uint8), np.zeros((4, 1, 3), np.uint8)
    values = to_pixel_values([white, black], 4)
    assert values.shape == (2, 3, 4, 4)
    assert (values[0, :, :2] == 2).all()
    assert (values[0, :, 2:] == 0).all()  # the padding
    assert (values[1, :, :, 0] == -2).all()
    assert (values[1, :, :, 1:] == 0).all()


# ---------------------------------------------------------------- from maps to boxes


def test_a_peak_becomes_a_box_of_the_image() -> None:
    # Cell (row 2, column 4) has its centre at (18, 10) of 64 pixels; the image is twice as large.
    proposer = painted((2, 4), [8.0, 4.0, 12.0, 6.0], [0.9])
    found = proposer.propose([Image.new("RGB", (128, 128))])[0]
    assert np.allclose(found.boxes, [[20, 12, 60, 32]], atol=1e-4)
    assert found.scores == pytest.approx([0.9])
    assert found.labels == ("dog",)
    assert found.label_scores == pytest.approx([0.75])
    assert found.boxes.dtype == found.scores.dtype == np.float32


def test_boxes_are_cut_at_the_image_and_not_at_the_padding() -> None:
    # 128 x 32 is fitted as 64 x 16 pixels; the box would reach from -2 to 30 and from -10 to 40.
    proposer = painted((2, 4), [20.0, 20.0, 12.0, 30.0], [0.9])
    boxes, _ = proposer(Image.new("RGB", (128, 32)))
    assert np.allclose(boxes, [[0, 0, 60, 32]], atol=1e-4)


def test_nothing_is_proposed_in_the_padding() -> None:
    proposer = painted((10, 4), [8.0, 8.0, 8.0, 8.0], [0.9])
    assert len(proposer(Image.new("RGB", (64, 64)))[0]) == 1
    boxes, scores = proposer(Image.new("RGB", (64, 16)))
    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)


def test_threshold_peaks_and_suppression() -> None:
    box = [20.0, 20.0, 20.0, 20.0]
    image = Image.new("RGB", (64, 64))
    # Two peaks two cells (8 pixels) apart: IoU 32 / 48.
    peaks = [0.9, 0.1, 0.8]
    assert len(painted((8, 6), box, peaks, nms_threshold=0.5)(image)[0]) == 1
    kept = painted((8, 6), box, peaks, nms_threshold=0.7)(image)[1]
    assert kept == pytest.approx([0.9, 0.8])  # the highest first
    assert len(painted((8, 6), box, peaks, nms_threshold=0.7, score_threshold=0.85)(image)[0]) == 1
    # Side by side, the lesser one is no peak.
    assert len(painted((8, 6), box, [0.9, 0.8], nms_threshold=1.0)(image)[0]) == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (20, 200), (1000, 300), (300, 1000), (257, 255)])
def test_any_image_gives_boxes_inside_it(random_proposer: RegionProposer, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    boxes, scores = random_proposer(pixels)
    assert boxes.dtype == np.float32
    assert boxes.shape == (len(scores), 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= size).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (np.diff(scores) <= 0).all()
    assert len(scores)
    overlap = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).fill_diagonal_(0)
    assert (overlap <= random_proposer.model.config.nms_threshold + 1e-3).all()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4), st.integers(1, 3))
def test_a_batch_gives_what_its_images_give_alone(
    random_proposer: RegionProposer, sizes: list[tuple[int, int]], batch_size: int
) -> None:
    draw = np.random.default_rng(len(sizes))
    images = [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    for image, found in zip(images, random_proposer.propose(images, batch_size=batch_size), strict=True):
        boxes, scores = random_proposer(image)
        assert np.allclose(found.boxes, boxes, atol=1e-3)
        assert np.allclose(found.scores, scores, atol=1e-5)


def test_an_image_thinner_than_a_cell_has_no_regions(random_proposer: RegionProposer) -> None:
    assert len(random_proposer(np.zeros((200, 3, 3), np.uint8))[0]) == 0


def test_no_images_no_proposals(random_proposer: RegionProposer) -> None:
    assert random_proposer.propose([]) == []


# ---------------------------------------------------------------- saving and loading


def test_save_and_load(random_proposer: RegionProposer, tmp_path: Path) -> None:
    random_proposer.model.save_pretrained(tmp_path)
    loaded = RegionProposer.from_pretrained(tmp_path)
    pixels = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    before, after = random_proposer.propose([pixels])[0], loaded.propose([pixels])[0]
    assert len(before.boxes)
    assert np.array_equal(before.boxes, after.boxes)
    assert before.labels == after.labels
    assert loaded.model.config.class_names == NAMES
    assert loaded.model.config.score_threshold == 0.2


def test_half_precision_files_are_used_in_float32(random_proposer: RegionProposer, tmp_path: Path) -> None:
    model = ProposerModel(cast(Any, random_proposer.model.config))
    model.load_state_dict(random_proposer.model.state_dict())
    model.half().save_pretrained(tmp_path)
    loaded = RegionProposer.from_pretrained(tmp_path)
    assert loaded.model.dtype == torch.float32
    pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, stored = random_proposer.model(pixel_values), loaded.model(pixel_values)
    for one, other in zip(exact, stored, strict=True):
        assert torch.allclose(one, other, atol=3e-2 * float(one.std()))


def test_the_shipped_size_fits_its_file() -> None:
    model = ProposerModel(ProposerConfig(id2label={k: str(k) for k in range(46)}))
    assert 2 * sum(tensor.numel() for tensor in model.state_dict().values()) < 2_000_000
    output = model(torch.zeros(1, 3, 256, 256))
    assert output.objectness.shape == (1, 64, 64)
    assert output.log_distances.shape == (1, 4, 64, 64)
    assert output.classes.shape == (1, 46, 64, 64)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"image_size": 100}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"widths": [8, 8]}, "widths"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"nms_threshold": float("nan")}, "nms_threshold"),
    ],
)
def test_wrong_configurations(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ProposerConfig(**changes)  # pyright: ignore[reportArgumentType]


def test_bad_images_and_arguments(random_proposer: RegionProposer) -> None:
    with pytest.raises(InputError, match="empty"):
        random_proposer(b"")
    with pytest.raises(InputError, match="uint8"):
        random_proposer(np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match="takes a list"):
        random_proposer.propose(Image.new("RGB", (4, 4)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="batch_size"):
        random_proposer.propose([], batch_size=0)


def test_bad_checkpoints(random_proposer: RegionProposer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        RegionProposer.from_pretrained("proposer-wurld")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="'clip' model"):
        RegionProposer.from_pretrained(other)
    folder = tmp_path / "cut"
    random_proposer.model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        RegionProposer.from_pretrained(folder)


def test_non_finite_numbers_are_an_error() -> None:
    model = ProposerModel(small_config())
    nn.init.constant_(model.classes.weight, math.nan)
    with pytest.raises(CheckpointError, match="non-finite"):
        RegionProposer(model)(Image.new("RGB", (8, 8)))


# ---------------------------------------------------------------- the shipped weights


def test_shipped_weights_find_the_objects_of_unseen_scenes() -> None:
    proposer = RegionProposer.from_pretrained("proposer-world")
    scenes = [render_scene(seed) for seed in range(9_500_000, 9_500_012)]
    proposals = proposer.propose([scene.image for scene in scenes])
    images = []
    for found, scene in zip(proposals, scenes, strict=True):
        boxes, counted = [item.box for item in scene.instances], [item.describable for item in scene.instances]
        images.append(ProposalImage(found.boxes, found.scores, boxes, counted))
    result = evaluate_proposals(images)
    assert result.recall > 0.85
    assert result.precision > 0.85


def test_shipped_weights_find_the_same_at_another_size() -> None:
    proposer = RegionProposer.from_pretrained("proposer-world")
    overlaps = []
    for seed in range(9_500_000, 9_500_012):
        image = Image.fromarray(render_scene(seed).image)
        boxes, _ = proposer(image)
        larger, _ = proposer(image.resize((640, 640), Image.Resampling.BICUBIC))
        overlaps.append(box_iou(torch.from_numpy(boxes), torch.from_numpy(larger) * (256 / 640)).amax(1))
    best = torch.cat(overlaps)
    # A box whose score lies at the threshold may be listed at one size only.
    assert (best > 0.5).float().mean() > 0.8
    assert best.median() > 0.85
