from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from foveate.errors import InputError
from foveate.ops import deform_conv2d, deform_sample

GOLDEN = Path(__file__).parents[1] / "golden" / "dynrefer"


@pytest.fixture(params=["dense", "taps"], autouse=True)
def _path(request, monkeypatch):
    """Both ways to compute `deform_sample` are held to every test."""
    monkeypatch.setattr("foveate.ops.deform._DENSE_CELLS", 10**9 if request.param == "dense" else 0)


def bilinear_with_zero_padding(plane: list[list[float]], y: float, x: float) -> float:
    height, width = len(plane), len(plane[0])
    if not (-1 < y < height and -1 < x < width):
        return 0.0
    y_low, x_low = math.floor(y), math.floor(x)
    total = 0.0
    for j in (y_low, y_low + 1):
        for i in (x_low, x_low + 1):
            if 0 <= j < height and 0 <= i < width:
                total += plane[j][i] * (1 - abs(y - j)) * (1 - abs(x - i))
    return total


def slow_deform_sample(value, offset_mask, groups, kernel_size):
    batch, height, width, channels = value.shape
    taps, radius, depth = kernel_size**2, kernel_size // 2, channels // groups
    out = torch.zeros_like(value)
    for b in range(batch):
        for c in range(channels):
            plane, start = value[b, :, :, c].tolist(), 3 * taps * (c // depth)
            for y in range(height):
                for x in range(width):
                    numbers = offset_mask[b, y, x].tolist()[start : start + 3 * taps]
                    for i in range(kernel_size):
                        for j in range(kernel_size):
                            k = kernel_size * i + j
                            dx, dy, weight = numbers[2 * k], numbers[2 * k + 1], numbers[2 * taps + k]
                            at = y + j - radius + dy, x + i - radius + dx
                            out[b, y, x, c] += weight * bilinear_with_zero_padding(plane, *at)
    return out


def slow_deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation):
    batch, channels, _, _ = input.shape
    out_channels, per_group, kernel_h, kernel_w = weight.shape
    _, _, out_h, out_w = offset.shape
    offset_groups = offset.shape[1] // (2 * kernel_h * kernel_w)
    out = bias[None, :, None, None].expand(batch, -1, out_h, out_w).clone()
    for b in range(batch):
        planes = input[b].tolist()
        for o in range(out_channels):
            first = o // (out_channels // (channels // per_group)) * per_group
            for y in range(out_h):
                for x in range(out_w):
                    for c in range(first, first + per_group):
                        for k in range(kernel_h * kernel_w):
                            d = c // (channels // offset_groups) * kernel_h * kernel_w + k
                            j, i = divmod(k, kernel_w)
                            at_y = y * stride[0] - padding[0] + j * dilation[0] + offset[b, 2 * d, y, x].item()
                            at_x = x * stride[1] - padding[1] + i * dilation[1] + offset[b, 2 * d + 1, y, x].item()
                            sample = bilinear_with_zero_padding(planes[c], at_y, at_x) * mask[b, d, y, x]
                            out[b, o, y, x] += weight[o, c - first, j, i] * sample
    return out


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centre_tap(height: int, width: int, dx: float = 0.0, dy: float = 0.0) -> torch.Tensor:
    """Offsets and weights of one group that read one sample per cell, shifted by (dx, dy)."""
    offset_mask = torch.zeros(1, height, width, 27, dtype=torch.float64)
    offset_mask[..., 8], offset_mask[..., 9], offset_mask[..., 18 + 4] = dx, dy, 1.0
    return offset_mask


@pytest.mark.parametrize(("groups", "kernel_size"), [(1, 3), (2, 3), (2, 1), (1, 5)])
def test_equals_the_sample_by_sample_definition(groups, kernel_size):
    value = random(2, 4, 5, 4)
    offset_mask = random(2, 4, 5, 3 * groups * kernel_size**2 + 2, seed=1) * 1.5
    ours = deform_sample(value, offset_mask, groups, kernel_size)
    slow = slow_deform_sample(value, offset_mask, groups, kernel_size)
    torch.testing.assert_close(ours, slow, atol=1e-12, rtol=0)


def test_tap_order_is_column_major():
    value = random(1, 4, 4, 1)
    offset_mask = torch.zeros(1, 4, 4, 27, dtype=torch.float64)
    offset_mask[..., 18 + 1] = 1.0  # k = 1: column -1, row 0
    shifted = F.pad(value, (0, 0, 1, 0))[:, :, :-1]
    torch.testing.assert_close(deform_sample(value, offset_mask, 1), shifted)


def test_offsets_are_x_before_y_and_zero_outside():
    value = random(1, 4, 6, 2)
    ours = deform_sample(value, centre_tap(4, 6, dx=2.0, dy=-1.0), 1)
    expected = torch.zeros_like(value)
    expected[:, 1:, :-2] = value[:, :-1, 2:]
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    assert (deform_sample(value, centre_tap(4, 6, dx=6.0), 1) == 0).all()
    assert (deform_sample(value, centre_tap(4, 6, dy=float("inf")), 1) == 0).all()


def test_constant_map_sums_the_weights_and_a_ramp_is_sampled_exactly():
    weights = random(1, 3, 3, 9)
    offset_mask = torch.cat((torch.zeros(1, 3, 3, 18, dtype=torch.float64), weights), -1)
    ones = torch.ones(1, 3, 3, 1, dtype=torch.float64)
    centre = deform_sample(ones, offset_mask, 1)[0, 1, 1, 0]
    torch.testing.assert_close(centre, weights[0, 1, 1].sum())  # unnormalised
    grid = torch.arange(6, dtype=torch.float64)
    ramp = (2 * grid[None, :] - 3 * grid[:, None])[None, :, :, None]
    ours = deform_sample(ramp, centre_tap(6, 6, dx=0.3, dy=0.6), 1)
    torch.testing.assert_close(ours[:, :5, :5], (ramp + 2 * 0.3 - 3 * 0.6)[:, :5, :5])


def test_zero_weights_give_zero():
    offset_mask = random(2, 3, 4, 54)
    offset_mask[..., 18:27] = offset_mask[..., 45:54] = 0
    assert (deform_sample(random(2, 3, 4, 4), offset_mask, 2) == 0).all()


def test_gradient():
    value = random(2, 3, 4, 2).requires_grad_()
    offset_mask = random(2, 3, 4, 54, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, o: deform_sample(v, o, 2), (value, offset_mask))


def test_offsets_learn_from_zero():
    """On cell centres, where training starts, the slope is that of the next cell and not zero."""
    value = torch.tensor([1.0, 2.0, 5.0, 3.0], dtype=torch.float64).view(1, 1, 4, 1)
    offset_mask = centre_tap(1, 4).requires_grad_()
    deform_sample(value, offset_mask, 1).sum().backward()
    assert offset_mask.grad is not None
    torch.testing.assert_close(offset_mask.grad[0, 0, :, 8], torch.tensor([1.0, 3.0, -2.0, -3.0], dtype=torch.float64))


def test_batch_equals_one_by_one_and_may_be_empty():
    value, offset_mask = random(3, 4, 4, 4), random(3, 4, 4, 108, seed=3)
    together = deform_sample(value, offset_mask, 4)
    for b in range(3):
        torch.testing.assert_close(together[b : b + 1], deform_sample(value[b : b + 1], offset_mask[b : b + 1], 4))
    assert deform_sample(value[:0], offset_mask[:0], 4).shape == (0, 4, 4, 4)


def test_half_precision_keeps_its_dtype_and_float32_coordinates():
    value = torch.zeros(1, 1, 24, 1, dtype=torch.bfloat16)
    value[0, 0, 21] = 1.0
    offset_mask = centre_tap(1, 24, dx=0.9375).float()  # 20 + 0.9375 is not a bfloat16
    out = deform_sample(value, offset_mask, 1)
    assert out.dtype == torch.bfloat16
    assert out[0, 0, 20, 0].item() == 0.9375
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deform_sample(value.float(), offset_mask, 1).dtype == torch.float32


def test_golden_dynrefer():
    golden = load_file(GOLDEN / "align.safetensors")
    sampled = deform_sample(golden["mid.value_proj"], golden["mid.offset_mask"], groups=4)
    weight, bias = golden["sd.cvem_align.output_proj.weight"], golden["sd.cvem_align.output_proj.bias"]
    aligned = F.linear(sampled, weight, bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(aligned, golden["out.aligned"], atol=2e-5, rtol=0)


def test_dcnv4_core_is_a_depthwise_deformable_convolution():
    """An independent reading of the same operator: identity weights, (dy, dx), row-major taps."""
    value, offset_mask = random(2, 4, 5, 4), random(2, 4, 5, 54, seed=4)
    per_group = offset_mask.unflatten(-1, (2, 27))
    offsets = per_group[..., :18].unflatten(-1, (3, 3, 2)).transpose(-3, -2).flip(-1)  # column, row -> row, column
    weights = per_group[..., 18:].unflatten(-1, (3, 3)).transpose(-2, -1)
    ours = deform_conv2d(
        value.permute(0, 3, 1, 2),
        offsets.flatten(3).permute(0, 3, 1, 2),
        torch.ones(4, 1, 3, 3, dtype=torch.float64),
        mask=weights.flatten(3).permute(0, 3, 1, 2),
        padding=1,
    )
    torch.testing.assert_close(deform_sample(value, offset_mask, 2).permute(0, 3, 1, 2), ours)


def test_deform_conv2d_equals_the_sample_by_sample_definition():
    stride, padding, dilation = (2, 1), (1, 2), (1, 2)
    input, weight, bias = random(2, 4, 6, 5), random(6, 2, 3, 2, seed=5), random(6, seed=6)
    offset, mask = random(2, 2 * 2 * 6, 3, 7, seed=7), random(2, 2 * 6, 3, 7, seed=8)
    ours = deform_conv2d(input, offset, weight, bias, mask=mask, stride=stride, padding=padding, dilation=dilation)
    slow = slow_deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation)
    torch.testing.assert_close(ours, slow, atol=1e-11, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_deform_conv2d_without_offsets_is_a_convolution(groups):
    input, weight, bias = random(2, 4, 7, 6), random(6, 4 // groups, 3, 3, seed=9), random(6, seed=10)
    plain = F.conv2d(input, weight, bias, stride=2, padding=1, dilation=2, groups=groups)
    offset = torch.zeros(2, 18, *plain.shape[2:], dtype=torch.float64)
    ours = deform_conv2d(input, offset, weight, bias, stride=2, padding=1, dilation=2)
    torch.testing.assert_close(ours, plain)


def test_deform_conv2d_gradient():
    tensors = [random(1, 2, 4, 4), random(1, 18, 4, 4, seed=1), random(2, 2, 3, 3, seed=2), random(1, 9, 4, 4, seed=3)]
    for t in tensors:
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, o, w, m: deform_conv2d(i, o, w, mask=m, padding=1), tensors)


@pytest.mark.parametrize(
    ("value", "offset_mask", "groups", "kernel_size", "message"),
    [
        (torch.zeros(1, 2, 2, 6), torch.zeros(1, 2, 2, 108), 4, 3, "divisible by 4"),
        (torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 107), 4, 3, "108"),
        (torch.zeros(1, 2, 2, 8), torch.zeros(1, 3, 2, 108), 4, 3, "offset_mask of shape"),
        (torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 108), 4, 2, "odd kernel_size"),
        (torch.zeros(2, 2, 8), torch.zeros(2, 2, 108), 4, 3, "B, H, W, C"),
    ],
)
def test_bad_input(value, offset_mask, groups, kernel_size, message):
    with pytest.raises(InputError, match=message):
        deform_sample(value, offset_mask, groups, kernel_size)


@pytest.mark.parametrize(
    "change",
    [
        {"input": torch.zeros(1, 3, 5, 5)},
        {"offset": torch.zeros(1, 18, 4, 5)},
        {"offset": torch.zeros(1, 17, 5, 5)},
        {"mask": torch.zeros(1, 18, 5, 5)},
        {"bias": torch.zeros(3)},
        {"stride": 0},
    ],
)
def test_deform_conv2d_bad_input(change):
    arguments = {
        "input": torch.zeros(1, 4, 5, 5),
        "offset": torch.zeros(1, 18, 5, 5),
        "weight": torch.zeros(2, 4, 3, 3),
        "padding": 1,
    }
    with pytest.raises(InputError, match="deform_conv2d"):
        deform_conv2d(**(arguments | change))
