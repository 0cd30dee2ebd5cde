from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from foveate.errors import InputError
from foveate.ops import roi_align

GOLDEN = Path(__file__).parents[1] / "golden" / "dynrefer"


def bilinear_with_clamped_border(plane: list[list[float]], y: float, x: float) -> float:
    height, width = len(plane), len(plane[0])
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    y_low, x_low = int(y), int(x)
    if y_low >= height - 1:
        y_low = y_high = height - 1
        y = float(y_low)
    else:
        y_high = y_low + 1
    if x_low >= width - 1:
        x_low = x_high = width - 1
        x = float(x_low)
    else:
        x_high = x_low + 1
    fy, fx = y - y_low, x - x_low
    top = plane[y_low][x_low] * (1 - fx) + plane[y_low][x_high] * fx
    bottom = plane[y_high][x_low] * (1 - fx) + plane[y_high][x_high] * fx
    return top * (1 - fy) + bottom * fy


def slow_roi_align(features, boxes, batch_index, size, scale, ratio, aligned):
    """Mask R-CNN's RoIAlign, sample by sample."""
    rows, columns = size
    out = torch.zeros(len(boxes), features.shape[1], rows, columns, dtype=features.dtype)
    for r, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        shift = 0.5 if aligned else 0.0
        left, top = x1 * scale - shift, y1 * scale - shift
        width, height = x2 * scale - shift - left, y2 * scale - shift - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_h, bin_w = height / rows, width / columns
        grid_h = ratio if ratio > 0 else math.ceil(bin_h)
        grid_w = ratio if ratio > 0 else math.ceil(bin_w)
        for c in range(features.shape[1]):
            plane = features[batch_index[r], c].tolist()
            for p in range(rows):
                for q in range(columns):
                    total = 0.0
                    for i in range(grid_h):
                        for j in range(grid_w):
                            y = top + p * bin_h + (i + 0.5) * bin_h / grid_h
                            x = left + q * bin_w + (j + 0.5) * bin_w / grid_w
                            total += bilinear_with_clamped_border(plane, y, x)
                    out[r, c, p, q] = total / max(grid_h * grid_w, 1)
    return out


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 3])
def test_equals_the_sample_by_sample_definition(ratio, aligned):
    generator = torch.Generator().manual_seed(10 * (ratio + 1) + aligned)
    features = torch.randn(3, 2, 7, 9, generator=generator, dtype=torch.float64)
    centres = torch.rand(14, 2, generator=generator, dtype=torch.float64) * torch.tensor([18.0, 14.0])
    sizes = torch.rand(14, 2, generator=generator, dtype=torch.float64) * 22
    boxes = torch.cat((centres - sizes / 2, centres + sizes / 2), -1)  # many overhang the 18 x 14 pixels of the map
    boxes[0] = torch.tensor([5.0, 5.0, 5.0, 5.0])  # empty
    boxes[1] = torch.tensor([9.0, 8.0, 4.0, 3.0])  # inside out
    boxes[2] = torch.tensor([-90.0, -90.0, -50.0, -50.0])  # far outside
    batch_index = torch.randint(0, 3, (14,), generator=generator)
    ours = roi_align(features, boxes, (3, 4), 0.5, ratio, aligned, batch_index=batch_index)
    slow = slow_roi_align(features, boxes, batch_index.tolist(), (3, 4), 0.5, ratio, aligned)
    torch.testing.assert_close(ours, slow, atol=1e-12, rtol=0)


def test_hand_computed():
    features = torch.arange(16, dtype=torch.float32).view(1, 1, 4, 4)  # f(x, y) = x + 4 y
    whole = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    # One sample per bin at (0.5, 0.5), (1.5, ...), ...; the last, at 3.5, is clamped to the border cell 3.
    cells = torch.tensor([0.5, 1.5, 2.5, 3.0])
    torch.testing.assert_close(roi_align(features, whole, 4, 0.5, 1)[0, 0], cells + 4 * cells[:, None])
    # With `aligned` the same box is the identity.
    torch.testing.assert_close(roi_align(features, whole, 4, 0.5, 1, True), features)
    # A region without extent is one cell wide, unless aligned: samples at 1.5, or at 2 - 0.5.
    point = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    assert roi_align(features, point, 1, 0.5, 1).item() == pytest.approx(1.5 + 4 * 1.5)
    assert roi_align(features, point, 1, 0.5, 1, True).item() == pytest.approx(0.5 + 4 * 0.5)


@pytest.mark.parametrize(
    ("x", "expected"),
    [(-1.5, 0.0), (-1.0, 1.0), (-0.5, 1.0), (0.0, 1.0), (0.25, 1.25), (2.9, 3.0), (3.0, 3.0), (3.25, 0.0)],
)
def test_samples_outside_the_map(x, expected):
    features = torch.tensor([1.0, 2.0, 3.0]).expand(1, 1, 2, 3)
    box = torch.tensor([[x - 0.5, 0.0, x + 0.5, 1.0]])  # one bin of one cell has its one sample at x
    assert roi_align(features, box, 1, 1.0, 1).item() == pytest.approx(expected)


@given(
    value=st.floats(-100, 100),
    slopes=st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
    corner=st.tuples(st.floats(0, 4), st.floats(0, 4)),
    size=st.tuples(st.floats(1, 5), st.floats(1, 5)),
    ratio=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_ramp_is_averaged_exactly_inside_the_map(value, slopes, corner, size, ratio):
    grid = torch.arange(12, dtype=torch.float64)
    ramp = value + slopes[0] * grid[None, :] + slopes[1] * grid[:, None]
    box = torch.tensor([[*corner, corner[0] + size[0], corner[1] + size[1]]], dtype=torch.float64)
    ours = roi_align(ramp[None, None], box, (2, 3), 1.0, ratio)[0, 0]
    x = corner[0] + size[0] * (torch.arange(3, dtype=torch.float64) + 0.5) / 3
    y = corner[1] + size[1] * (torch.arange(2, dtype=torch.float64) + 0.5) / 2
    torch.testing.assert_close(ours, value + slopes[0] * x[None, :] + slopes[1] * y[:, None], atol=1e-9, rtol=0)


def test_batch_equals_one_by_one_whatever_the_layout(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 6, 8, generator=generator)
    low = torch.rand(7, 2, generator=generator) * 40
    boxes = torch.cat((low, low + 5 + torch.rand(7, 2, generator=generator) * 60), -1)
    index = torch.tensor([2, 0, 0, 1, 2, 1, 0])
    together = roi_align(features, boxes, 3, 1 / 14, 2, batch_index=index)
    assert together.shape == (7, 5, 3, 3)
    for r in range(7):
        alone = roi_align(features[index[r]][None], boxes[r : r + 1], 3, 1 / 14, 2)
        torch.testing.assert_close(together[r : r + 1], alone)
    in_order = roi_align(features[index], boxes, 3, 1 / 14, 2)
    torch.testing.assert_close(together, in_order)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(together, roi_align(channels_last, boxes, 3, 1 / 14, 2, batch_index=index))
    monkeypatch.setattr(sys.modules["foveate.ops.roi_align"], "_CHUNK_ELEMENTS", 2 * 3 * 8 * 5)
    torch.testing.assert_close(together, roi_align(features, boxes, 3, 1 / 14, 2, batch_index=index))


@pytest.mark.parametrize("maps", [1, 3])
def test_gradient(maps):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(maps, 2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.3, 0.2, 4.1, 3.0], [-2.0, 1.0, 2.0, 9.0], [1.0, 1.0, 1.2, 1.1]], dtype=torch.float64)
    index = torch.tensor([0, maps - 1, 0])
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, 3, 1.0, 0, batch_index=index), (features,))


def test_no_boxes_still_trains():
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = roi_align(features, torch.empty(0, 4), (2, 5), batch_index=torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, 3, 2, 5)
    out.sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() == 0


def test_dtype_is_kept_also_under_autocast():
    features, box = torch.ones(1, 2, 4, 4), torch.tensor([[0.0, 0.0, 3.0, 3.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert roi_align(features, box, 2).dtype == torch.float32
    half = roi_align(features.bfloat16(), box, 2)
    assert half.dtype == torch.bfloat16
    assert (half == 1).all()


def test_golden_dynrefer():
    golden = load_file(GOLDEN / "refer.safetensors")
    features = golden["mid.ln_vision"][:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    boxes = golden["in.region_bboxes"].flatten(0, 1)
    ours = roi_align(features, boxes, 6, 1 / 14, 2, aligned=False)
    torch.testing.assert_close(ours, golden["mid.roi_align"], atol=2e-6, rtol=0)
    # The half-pixel shift of `aligned` is far outside the tolerance, so the golden array tells them apart.
    assert (roi_align(features, boxes, 6, 1 / 14, 2, aligned=True) - golden["mid.roi_align"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 3, 4)}, "B, C, H, W"),
        ({"input": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "int64"),
        ({"boxes": torch.zeros(2, 5)}, r"\(R, 4\)"),
        ({"boxes": torch.zeros(3, 4), "batch_index": None}, "3 boxes for 2 maps"),
        ({"output_size": 0}, "output_size"),
        ({"spatial_scale": -1.0}, "spatial_scale"),
        ({"batch_index": torch.tensor([0, 2])}, "0 to 2, but there are 2 maps"),
        ({"batch_index": torch.tensor([0.0, 1.0])}, "integers"),
        ({"boxes": torch.tensor([[0.0, 0, 1e9, 1e9], [0, 0, 1, 1]])}, "too large"),
        ({"boxes": torch.tensor([[0.0, 0, float("nan"), 1], [0, 0, 1, 1]])}, "nan"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "input": torch.zeros(2, 3, 4, 4),
        "boxes": torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]]),
        "output_size": 2,
        "batch_index": torch.tensor([0, 1]),
    }
    with pytest.raises(InputError, match=message):
        roi_align(**(arguments | change))
