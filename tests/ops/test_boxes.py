from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops import batched_nms, box_area, box_convert, box_giou, box_iou, clip_boxes, validate_boxes

coordinate = st.floats(-50, 150, width=32)
side = st.floats(0.125, 80, width=32)
box = st.tuples(coordinate, coordinate, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
boxes = st.lists(box, min_size=0, max_size=12).map(lambda b: torch.tensor(b, dtype=torch.float64).reshape(-1, 4))
formats = st.sampled_from(["xyxy", "xywh", "cxcywh"])


def slow_iou(a, b) -> float:
    inner = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / union


def slow_nms(rows, scores, classes, threshold) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -scores[i]):
        if all(classes[i] != classes[k] or slow_iou(rows[i], rows[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def test_iou_and_giou_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 2.0, 2.0]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[1 / 7, 0.0, 1.0], [0.0, 0.0, 1 / 4]]))
    # Hulls: 9, 6, 4 and 9, 3, 4; unions: 7, 5, 4 and 5, 2, 4.
    expected = [[1 / 7 - 2 / 9, -1 / 6, 1.0], [-4 / 9, -1 / 3, 1 / 4]]
    torch.testing.assert_close(box_giou(a, b), torch.tensor(expected))
    torch.testing.assert_close(box_iou(a, b[[2, 1]], elementwise=True), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(box_giou(a, b[[0, 1]], elementwise=True), torch.tensor([1 / 7 - 2 / 9, -1 / 3]))


def test_overlap_of_nothing():
    a = torch.tensor([[3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    for overlap in (box_iou, box_giou):
        value = overlap(a, a)
        assert value.item() == 0.0
        value.sum().backward()
        assert a.grad is not None
        assert a.grad.isfinite().all()
        assert overlap(torch.empty(0, 4), torch.ones(3, 4)).shape == (0, 3)


@given(a=boxes, b=boxes)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_iou_properties(a, b):
    iou, giou = box_iou(a, b), box_giou(a, b)
    assert iou.shape == (len(a), len(b))
    assert ((iou >= 0) & (iou <= 1 + 1e-9)).all()
    assert ((giou >= -1 - 1e-9) & (giou <= iou + 1e-9)).all()
    torch.testing.assert_close(iou, box_iou(b, a).T)
    torch.testing.assert_close(box_giou(a + 7, b + 7), giou, atol=1e-8, rtol=0)
    torch.testing.assert_close(box_iou(a, a).diagonal(), torch.ones(len(a), dtype=torch.float64))
    slow = torch.tensor([[slow_iou(x, y) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
    torch.testing.assert_close(iou, slow.reshape(len(a), len(b)), atol=1e-9, rtol=0)


def test_leading_axes_gradient_and_half_precision():
    low = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = torch.cat((low, low + 0.6), -1)
    torch.testing.assert_close(box_giou(a, a[:, :2])[1], box_giou(a[1], a[1, :2]))
    first, second = a[0].clone().requires_grad_(), a[1, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(box_giou, (first, second))
    large = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]], dtype=torch.float16)
    assert box_area(large).item() == 1e6
    assert box_iou(large, large).item() == 1.0


def test_area_and_clip_by_hand():
    rows = torch.tensor([[-2.0, 1.0, 4.0, 3.0], [5.0, 5.0, 4.0, 9.0], [20.0, 20.0, 30.0, 30.0]])
    assert box_area(rows).tolist() == [12.0, 0.0, 100.0]
    assert clip_boxes(rows, (2, 10)).tolist() == [[0, 1, 4, 2], [5, 2, 4, 2], [10, 2, 10, 2]]
    assert box_area(torch.tensor([[0, 0, 3, 2]])).tolist() == [6.0]


def test_convert_by_hand():
    xyxy = torch.tensor([[1.0, 2.0, 5.0, 10.0]])
    assert box_convert(xyxy, "xyxy", "xywh").tolist() == [[1, 2, 4, 8]]
    assert box_convert(xyxy, "xyxy", "cxcywh").tolist() == [[3, 6, 4, 8]]
    assert box_convert(torch.tensor([[3.0, 6.0, 4.0, 8.0]]), "cxcywh", "xywh").tolist() == [[1, 2, 4, 8]]


@given(
    rows=boxes, source=st.sampled_from(["xyxy", "xywh", "cxcywh"]), target=st.sampled_from(["xyxy", "xywh", "cxcywh"])
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_convert_round_trip(rows, source, target):
    there = box_convert(rows, source, target)
    torch.testing.assert_close(box_convert(there, target, source), rows, atol=1e-9, rtol=0)


@given(data=st.data(), threshold=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_nms_equals_the_greedy_loop(data, threshold):
    rows = data.draw(boxes)
    scores = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)))
    classes = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    ours = batched_nms(rows, torch.tensor(scores, dtype=torch.float32), torch.tensor(classes), threshold)
    assert ours.tolist() == slow_nms(rows.tolist(), scores, classes, threshold)


def test_nms_over_many_blocks(monkeypatch):
    monkeypatch.setattr("foveate.ops.boxes._NMS_BLOCK", 37)
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(400, 2, generator=generator, dtype=torch.float64) * 60
    rows = torch.cat((low, low + 10 + torch.rand(400, 2, generator=generator, dtype=torch.float64) * 20), -1)
    scores, classes = torch.rand(400, generator=generator), torch.randint(0, 2, (400,), generator=generator)
    ours = batched_nms(rows, scores, classes, 0.3).tolist()
    assert ours == slow_nms(rows.tolist(), scores.tolist(), classes.tolist(), 0.3)
    assert 2 < len(ours) < 200


def test_nms_by_hand():
    """A chain: the first beats the second, which would have beaten the third. IoU of neighbours is exactly 1/3."""
    rows = torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 1.0], [2.0, 0.0, 4.0, 1.0]])
    scores, same = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64)
    assert batched_nms(rows, scores, same, 0.3).tolist() == [0, 2]
    assert batched_nms(rows, scores.flip(0), same, 0.3).tolist() == [2, 0]
    assert batched_nms(rows, scores, torch.tensor([0, 1, 1]), 0.3).tolist() == [0, 1]
    halves = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert batched_nms(halves, scores[:2], same[:2], 0.5).tolist() == [0, 1]  # not above the threshold
    assert batched_nms(rows[:0], scores[:0], same[:0], 0.5).tolist() == []


def test_validate_accepts():
    assert validate_boxes([[0, 0, 4, 3.5]], (4, 4)).tolist() == [[0, 0, 4, 3.5]]
    assert validate_boxes(np.array([[1, 2, 3, 4]], dtype=np.int16)).dtype == torch.float32
    assert validate_boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)).dtype == torch.float64
    assert validate_boxes([]).shape == (0, 4)
    assert validate_boxes(torch.empty(0, 4), (10, 10)).shape == (0, 4)
    assert validate_boxes([[0.0, 0.0, 10.000001, 10.0]], (10, 10)).shape == (1, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("0,0,1,1", "got a str"),
        (None, "NoneType"),
        ([0.0, 0.0, 1.0, 1.0], r"\(R, 4\)"),
        ([[0, 0, 1]], r"\(R, 4\)"),
        ([[0, 0, 1, 1], [0, 0, 1]], "four numbers"),
        ([[0, 0, "a", 1]], "four numbers"),
        ([["0", "0", "1", "1"]], "four numbers"),
        ([[0, 0, None, 1]], "four numbers"),
        ([[0, 0, 10**400, 1]], "four numbers"),
        ([[True, False, True, True]], "four numbers.*box 0 holds True"),
        ([[0, 0, 5, 5], [0, False, 5, 5]], "four numbers.*box 1 holds False, which is not a number"),
        (torch.ones(1, 4, dtype=torch.complex64), "complex64"),
        ([[0, 0, 1, 1], [0, 0, float("nan"), 1]], "box 1 .*finite"),
        ([[0, 0, 1e39, 1]], "box 0 .*finite"),
        ([[0, 0, 1, 1], [5, 0, 5, 1]], r"box 1 is \[5.0, 0.0, 5.0, 1.0\].*x2 > x1"),
        ([[0, 3, 1, 1]], "y2 > y1"),
        ([[0, 0, 11, 1]], "leaves the image, 10 wide and 8 high"),
        ([[0, 0, 1, 9]], "leaves the image"),
        ([[-1, 0, 1, 1]], "leaves the image"),
    ],
)
def test_validate_refuses(wrong, message):
    with pytest.raises(InputError, match=message):
        validate_boxes(wrong, (8, 10))


def test_bad_arguments():
    rows = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    zero = torch.zeros(1)
    with pytest.raises(InputError, match="unknown box format 'yxyx'"):
        box_convert(rows, "xyxy", "yxyx")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"\(\.\.\., 4\)"):
        box_area(torch.zeros(2, 5))
    with pytest.raises(InputError, match="cannot be compared"):
        box_iou(torch.zeros(2, 4), torch.zeros(3, 4), elementwise=True)
    with pytest.raises(InputError, match="pairwise"):
        box_iou(rows[0], rows)
    with pytest.raises(InputError, match=r"image_size .*\(-1, 4\)"):
        clip_boxes(rows, (-1, 4))
    with pytest.raises(InputError, match=r"\(2,\)"):
        batched_nms(rows, torch.zeros(2), zero, 0.5)
    with pytest.raises(InputError, match="iou_threshold"):
        batched_nms(rows, zero, zero, 1.5)
    with pytest.raises(InputError, match="NaN"):
        batched_nms(rows, zero * float("nan"), zero, 0.5)
