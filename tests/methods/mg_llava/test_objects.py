"""Object pooling: the separable form against the definition, written out sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import InputError
from foveate.methods.mg_llava.objects import pool_objects, upsampling_matrix


def one_axis(start: float, stop: float, scale: float, size: int, bins: int) -> list[list[tuple[int, float]]]:
    """Spec 2.4: per sample of all bins its cells and weights; a sample outside has none."""
    a = start * scale
    length = max(stop * scale - a, 1.0)
    step = length / bins
    samples = math.ceil(length / bins)
    found = []
    for p in range(bins):
        for i in range(samples):
            y = a + p * step + (i + 0.5) * step / samples
            if y < -1 or y > size:
                found.append([])
                continue
            y = max(y, 0.0)
            low = math.floor(y)
            if low >= size - 1:
                found.append([(size - 1, 1.0)])
            else:
                found.append([(low, 1 - (y - low)), (low + 1, y - low)])
    return found


def by_hand(features: Tensor, box: list[float], canvas: int, bins: int) -> Tensor:
    size = features.shape[-1]
    scale = size / canvas
    rows = one_axis(box[1], box[3], scale, size, bins)
    columns = one_axis(box[0], box[2], scale, size, bins)
    total = torch.zeros(features.shape[0], dtype=torch.float64)
    for row in rows:
        for column in columns:
            for r, weight_r in row:
                for q, weight_q in column:
                    total += weight_r * weight_q * features[:, r, q].double()
    return (total / (len(rows) * len(columns))).float()


def pyramid(seed: int = 0, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 24), (2, 12), (4, 6), (2, 3))
    return [torch.randn(batch, channels, side, side, generator=generator) for channels, side in shapes]


numbers = st.floats(-20, 120, width=32)


@settings(max_examples=40, deadline=None)
@given(st.tuples(numbers, numbers, numbers, numbers), st.sampled_from([1, 3, 7]))
def test_the_separable_form_is_the_definition(corners: tuple[float, ...], bins: int) -> None:
    x0, x1 = sorted((corners[0], corners[2]))
    y0, y1 = sorted((corners[1], corners[3]))
    box = [x0, y0, x1, y1]
    stages = pyramid()
    upsampled = torch.cat([F.interpolate(stage, 24, mode="bilinear", align_corners=False) for stage in stages], 1)[0]
    expected = by_hand(upsampled, box, canvas=96, bins=bins)
    boxes = [torch.tensor([box])]
    found = pool_objects(stages, boxes, canvas=96, bins=bins)[0][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    dense = pool_objects(stages, boxes, canvas=96, bins=bins, pooling="dense")[0][0]
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)


def test_pictures_with_different_numbers_of_boxes() -> None:
    stages = pyramid(batch=3)
    boxes = [torch.tensor([[0.0, 0.0, 50.0, 20.0]] * count) + count for count in (2, 0, 5)]
    found = pool_objects(stages, boxes, canvas=96, bins=7)
    assert [tuple(rows.shape) for rows in found] == [(2, 11), (0, 11), (5, 11)]
    alone = pool_objects([stage[2:] for stage in stages], boxes[2:], canvas=96, bins=7)[0]
    torch.testing.assert_close(found[2], alone)


def test_edges_of_the_canvas() -> None:
    stages = [torch.ones(1, 1, 24, 24)]
    boxes = [torch.tensor([[0.0, 0.0, 0.0, 0.0], [96.0, 0.0, 96.0, 50.0], [0.0, 0.0, 96.0, 96.0]])]
    empty, beyond, whole = pool_objects(stages, boxes, canvas=96)[0].flatten().tolist()
    # The dummy box still averages a window of a cell; one that begins at the right edge sees nothing (spec 2.4).
    assert empty == pytest.approx(1)
    assert beyond == 0
    assert whole == pytest.approx(1)


def test_a_whole_box_is_not_the_global_mean_and_boxes_are_placed_finely() -> None:
    stages = pyramid()
    boxes = [torch.tensor([[0.0, 0.0, 96.0, 96.0], [10.0, 10.0, 40.0, 40.0], [11.0, 10.0, 41.0, 40.0]])]
    whole, box, shifted = pool_objects(stages, boxes, canvas=96)[0]
    assert not torch.allclose(whole[:3], stages[0].mean((0, 2, 3)), atol=1e-4)
    assert not torch.allclose(box, shifted, atol=1e-4)


def test_gradients_stop_and_half_precision_is_pooled_in_single() -> None:
    stages = [stage.bfloat16().requires_grad_() for stage in pyramid()]
    boxes = [torch.tensor([[3.0, 5.0, 60.0, 70.0]])]
    found = pool_objects(stages, boxes, canvas=96)[0]
    assert found.dtype == torch.float32
    assert not found.requires_grad
    single = pool_objects([stage.detach().float() for stage in stages], boxes, canvas=96)[0]
    torch.testing.assert_close(found, single)


@pytest.mark.parametrize(("size", "target"), [(3, 12), (5, 7), (1, 4)])
def test_the_upsampling_matrix_is_the_resize(size: int, target: int) -> None:
    line = torch.randn(2, 1, size)
    resized = F.interpolate(line, target, mode="linear", align_corners=False)
    torch.testing.assert_close(line @ upsampling_matrix(size, target).T, resized)


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="square maps"):
        pool_objects([torch.ones(1, 2, 4, 5)], [torch.zeros(1, 4)], canvas=8)
    with pytest.raises(InputError, match="2 lists of boxes are given for 1"):
        pool_objects([torch.ones(1, 2, 4, 4)], [torch.zeros(1, 4)] * 2, canvas=8)
