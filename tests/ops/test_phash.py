from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn

from foveate.errors import InputError
from foveate.ops import dct_block, hamming, perceptual_hash, to_grey

GOLDEN = Path(__file__).parents[1] / "golden" / "dynrefer"


@pytest.fixture(scope="module")
def views():
    with np.load(GOLDEN / "views.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def slow_block(grey: torch.Tensor, box) -> np.ndarray:
    """Crop, resize, full 224 x 224 DCT, as the hash is defined."""
    x1, y1, x2, y2 = (int(v) for v in box)
    crop = grey[y1:y2, x1:x2].double()[None, None]
    resized = F.interpolate(crop, (224, 224), mode="bilinear", align_corners=False, antialias=False)
    return np.asarray(dctn(resized[0, 0].numpy(), type=2, norm="ortho"))[:8, :8]


@pytest.mark.parametrize("k", [0, 1])
def test_golden_dynrefer(views, k):
    grey = to_grey(views[f"image{k}"])
    assert torch.equal(grey, views[f"gray{k}"])
    boxes = views[f"cand_boxes{k}"]
    torch.testing.assert_close(dct_block(grey, boxes), views[f"dct{k}"].double(), atol=0.02, rtol=0)
    bits = perceptual_hash(grey, boxes)
    assert bits.dtype == torch.bool
    assert torch.equal(bits, views[f"hash{k}"].bool())
    assert torch.equal(hamming(bits[:, :1], bits), (views[f"hash{k}"][:, :1] != views[f"hash{k}"]).sum(-1))


@pytest.mark.parametrize(
    "box",
    [(0, 0, 90, 60), (3, 5, 4, 6), (10, 2, 11, 59), (0, 0, 2, 2), (20, 10, 31, 57), (5.9, 7.9, 60.2, 30.99)],
)
@pytest.mark.parametrize("scale", [1, 7])
def test_equals_crop_resize_and_full_dct(box, scale):
    """Boxes smaller and larger than the 224 pixels they are resized to, down to one pixel."""
    grey = picture(60 * scale, 90 * scale)
    scaled = tuple(scale * v for v in box)
    ours = dct_block(grey, torch.tensor([scaled], dtype=torch.float64))[0]
    np.testing.assert_allclose(ours.numpy(), slow_block(grey, scaled), atol=1e-3)


def test_constant_image_has_only_the_constant_coefficient():
    grey = torch.full((40, 50), 3, dtype=torch.uint8)
    block = dct_block(grey, torch.tensor([[0.0, 0.0, 50.0, 40.0], [7.0, 8.0, 9.0, 30.0]]))
    expected = torch.zeros(2, 8, 8, dtype=torch.float64)
    expected[:, 0, 0] = 3 * 224
    torch.testing.assert_close(block, expected, atol=1e-9, rtol=0)
    bits = perceptual_hash(grey, torch.tensor([[0.0, 0.0, 50.0, 40.0]]))
    assert bits[0].nonzero().tolist() == [[0]]
    assert not perceptual_hash(torch.zeros(9, 9), torch.tensor([[0.0, 0.0, 9.0, 9.0]])).any()


def test_vertical_frequency_comes_first():
    stripes = torch.zeros(64, 64)
    stripes[:32] = 200.0  # changes from top to bottom only
    block = dct_block(stripes, torch.tensor([0.0, 0.0, 64.0, 64.0]))
    assert block.shape == (8, 8)
    assert block[1, 0] > 1000
    assert block[:, 1:].abs().max() < 1e-9


def test_threshold_is_the_mean_with_the_constant_coefficient():
    grey, box = picture(50, 50), torch.tensor([2.0, 3.0, 40.0, 44.0])
    block = dct_block(grey, box).flatten()
    bits = perceptual_hash(grey, box)
    assert torch.equal(bits, block > block.mean())
    assert not torch.equal(bits, block > block.median())
    assert not torch.equal(bits, block > block[1:].mean())


def test_batch_equals_one_by_one_and_padding_is_never_read(monkeypatch):
    small, large = picture(30, 40, 1), picture(50, 60, 2)
    padded = torch.stack((F.pad(small, (0, 20, 0, 20), value=255), large))
    generator = torch.Generator().manual_seed(3)
    low = torch.rand(2, 3, 4, 2, generator=generator) * 20
    boxes = torch.cat((low, low + 2 + torch.rand(2, 3, 4, 2, generator=generator) * 8), -1)
    together = dct_block(padded, boxes)
    assert together.shape == (2, 3, 4, 8, 8)
    for image, own, block in zip((small, large), boxes, together, strict=True):
        for i in range(3):
            for j in range(4):
                torch.testing.assert_close(block[i, j], dct_block(image, own[i, j]), atol=1e-9, rtol=0)
    monkeypatch.setattr("foveate.ops.phash._CHUNK", 5)
    torch.testing.assert_close(dct_block(padded, boxes), together, atol=1e-9, rtol=0)


def test_no_boxes():
    grey = picture(10, 10)
    assert perceptual_hash(grey, torch.empty(0, 4)).shape == (0, 64)
    assert perceptual_hash(grey, torch.empty(0, 11, 4)).shape == (0, 11, 64)
    assert perceptual_hash(grey[None].expand(2, 10, 10), torch.empty(2, 0, 4)).shape == (2, 0, 64)


def test_hamming_by_hand():
    a = torch.tensor([[True, False, True], [False, False, False]])
    b = torch.tensor([True, True, True])
    assert hamming(a, b).tolist() == [1, 3]
    assert hamming(a[:, None], a).tolist() == [[0, 2], [2, 0]]


def test_grey_by_hand():
    colours = torch.tensor([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]], dtype=torch.uint8)
    assert to_grey(colours).tolist() == [[76, 150, 29, 255, 0]]


@pytest.mark.parametrize(
    ("grey", "boxes", "message"),
    [
        (torch.zeros(8, 10), torch.tensor([[0.0, 0.0, 11.0, 5.0]]), r"box \[0.0, 0.0, 11.0, 5.0\] of an image 10 wide"),
        (torch.zeros(8, 10), torch.tensor([[0.0, 0.0, 4.0, 5.0], [-1.0, 0.0, 4.0, 5.0]]), r"box \[-1.0"),
        (torch.zeros(8, 10), torch.tensor([[2.1, 0.0, 2.9, 5.0]]), "at least one pixel"),
        (torch.zeros(8, 10), torch.tensor([[0.0, 0.0, float("nan"), 5.0]]), "nan"),
        (torch.zeros(8, 10, 3, 1), torch.tensor([[0.0, 0.0, 4.0, 5.0]]), r"\(H, W\)"),
        (torch.zeros(2, 8, 10), torch.tensor([[0.0, 0.0, 4.0, 5.0]]), "2 grey images"),
        (torch.zeros(8, 10), torch.zeros(3), r"\(\.\.\., 4\)"),
    ],
)
def test_bad_input(grey, boxes, message):
    with pytest.raises(InputError, match=message):
        perceptual_hash(grey, boxes)


def test_bad_images_and_hashes():
    with pytest.raises(InputError, match="uint8 RGB"):
        to_grey(torch.zeros(4, 4, 3))
    with pytest.raises(InputError, match="uint8 RGB"):
        to_grey(torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="bool hashes"):
        hamming(torch.zeros(64), torch.zeros(64))
