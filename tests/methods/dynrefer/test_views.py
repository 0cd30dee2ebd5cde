"""Nested views: boxes, rounding, crops, and the choice of t."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from foveate.errors import InputError
from foveate.methods.dynrefer.configuration import CANDIDATE_VIEWS, DEFAULT_VIEW_POLICY
from foveate.methods.dynrefer.views import (
    boxes_in_views,
    build_views,
    crop_view,
    interpolate_boxes,
    pixel_boxes,
    region_from_mask,
    region_from_polygons,
    resolve_policy,
    sample_coefficients,
    search_coefficients,
    search_views,
)
from foveate.ops.phash import perceptual_hash


@st.composite
def regions(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """A region inside an image: (1, 4) xyxy, width, height."""
    width, height = draw(st.integers(2, 400)), draw(st.integers(2, 400))
    x = sorted(draw(st.tuples(st.floats(0, width), st.floats(0, width))))
    y = sorted(draw(st.tuples(st.floats(0, height), st.floats(0, height))))
    return np.array([[x[0], y[0], x[1], y[1]]], dtype=np.float32), width, height


class TestBoxes:
    def test_interpolation_by_hand(self) -> None:
        boxes = interpolate_boxes(np.array([[10, 20, 30, 40], [0, 0, 8, 8]]), np.array([0, 0.5, 1]), 100, 80)
        assert boxes.dtype == np.float32
        assert boxes[0].tolist() == [[10, 20, 30, 40], [5, 10, 65, 60], [0, 0, 100, 80]]
        assert boxes[1].tolist() == [[0, 0, 8, 8], [0, 0, 54, 44], [0, 0, 100, 80]]
        # A row of t's for each region.
        boxes = interpolate_boxes(np.array([[10, 20, 30, 40], [0, 0, 8, 8]]), np.array([[0.5], [1]]), 100, 80)
        assert boxes.tolist() == [[[5, 10, 65, 60]], [[0, 0, 100, 80]]]

    def test_interpolation_is_in_float32(self) -> None:
        """25 + 0.6 (0 - 25) is 10 in float64 and just below in float32: the crop begins at 9, as officially."""
        box = interpolate_boxes(np.array([[25.0, 0, 53, 10]]), np.array([0.6]), 97, 10)
        assert pixel_boxes(box, 97, 10)[0, 0].tolist() == [9, 0, 79, 10]

    @given(regions(), st.floats(0, 1), st.floats(0, 1))
    def test_views_are_nested(self, case: tuple[np.ndarray, int, int], a: float, b: float) -> None:
        region, width, height = case
        small, large = interpolate_boxes(region, np.array(sorted((a, b))), width, height)[0]
        assert (large[:2] <= small[:2] + 1e-3).all()
        assert (large[2:] >= small[2:] - 1e-3).all()
        first, last = interpolate_boxes(region, np.array([0.0, 1.0]), width, height)[0]
        assert first.tolist() == region[0].tolist()
        np.testing.assert_allclose(last, [0, 0, width, height], atol=1e-4)

    def test_pixels_by_hand(self) -> None:
        boxes = np.array([[-3, 1.9, 10.99, 200], [5.2, 5.1, 5.9, 9.0], [100, 0, 100, 3], [0, 0, 0.4, 0.4]])
        assert pixel_boxes(boxes, 100, 80).tolist() == [[0, 1, 10, 80], [5, 5, 6, 9], [99, 0, 100, 3], [0, 0, 1, 1]]

    @given(regions(), st.floats(0, 1))
    def test_pixels_are_inside_and_never_empty(self, case: tuple[np.ndarray, int, int], t: float) -> None:
        region, width, height = case
        x1, y1, x2, y2 = pixel_boxes(interpolate_boxes(region, np.array([t]), width, height), width, height)[0, 0]
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height

    def test_rounding_of_the_official_code(self) -> None:
        """float32 gives 223.99998 for some crop widths, which it truncates: 208 of the widths up to 2000."""
        widths = np.arange(1, 2001)
        region = np.stack([0 * widths, 0 * widths, widths, widths], axis=1)
        exact = boxes_in_views(region, region[:, None], 224)
        assert set(exact[:, 0, 2].tolist()) == {223, 224}
        short = widths[exact[:, 0, 2] == 223]
        assert len(short) == 208
        assert short[:5].tolist() == [23, 46, 83, 92, 97]
        kept = boxes_in_views(region, region[:, None], 224, exact=False)
        np.testing.assert_allclose(kept[:, 0, 2:], 224, atol=1e-4)

    def test_region_inside_a_view_by_hand(self) -> None:
        # A view of 40 x 20 pixels at (10, 20), shown 80 x 80: x doubles, y is four times as long.
        region, views = np.array([[20, 25, 35, 40]]), np.array([[[20, 25, 35, 40], [10, 20, 50, 40]]])
        assert boxes_in_views(region, views, 80)[0].tolist() == [[0, 0, 80, 80], [20, 20, 50, 80]]
        third = boxes_in_views(region, np.array([[[10, 20, 40, 50]]]), 80)[0, 0]
        assert third.tolist() == [26, 13, 66, 53]
        kept = boxes_in_views(region, np.array([[[10, 20, 40, 50]]]), 80, exact=False)[0, 0]
        np.testing.assert_allclose(kept, [80 / 3, 40 / 3, 200 / 3, 160 / 3], rtol=1e-6)

    @given(regions(), st.floats(0, 1))
    def test_region_lies_inside_its_views(self, case: tuple[np.ndarray, int, int], t: float) -> None:
        region, width, height = case
        views = pixel_boxes(interpolate_boxes(region, np.array([0, t]), width, height), width, height)
        boxes = boxes_in_views(pixel_boxes(region, width, height), views, 56)[0]
        # Truncation of both may leave a region of one pixel a pixel outside of its view.
        if (views[0, 1, :2] <= views[0, 0, :2]).all() and (views[0, 1, 2:] >= views[0, 0, 2:]).all():
            assert (boxes >= 0).all()
            assert (boxes <= 56).all()
        assert boxes[0].tolist() in [[0, 0, x, y] for x in (55, 56) for y in (55, 56)]

    def test_polygons(self) -> None:
        assert region_from_polygons([[1, 2, 5, 2, 5, 9], [0.5, 3, 2, 4]]).tolist() == [0.5, 2, 5, 9]
        # A side of at most one pixel is widened to one, towards zero where there is room.
        assert region_from_polygons([[4, 2, 4.3, 2, 4, 8]]).tolist() == [pytest.approx(3.3), 2, 4.3, 8]
        assert region_from_polygons([[0, 3, 0, 3, 0, 3]]).tolist() == [0, 2, 1, 3]

    def test_masks(self) -> None:
        mask = np.zeros((6, 8), dtype=bool)
        mask[2:5, 3:7] = True
        assert region_from_mask(mask).tolist() == [3, 2, 6, 4]
        with pytest.raises(InputError, match="no pixel set"):
            region_from_mask(np.zeros((4, 4)))
        with pytest.raises(InputError, match=r"shape \(2, 4, 4\)"):
            region_from_mask(np.zeros((2, 4, 4)))


class TestCrops:
    def test_shared_crops_are_cut_once(self, photo: Image.Image) -> None:
        boxes = np.array([[20, 10, 50, 30], [50, 40, 95, 75], [20.5, 10.5, 50.2, 30.9]])
        batch = build_views(photo, boxes, np.array([0, 0.3, 1]), 56)
        # Whole image once for all; the third region truncates to the pixels of the first, view by view.
        assert len(batch.crops) == len(batch.crop_boxes) == 5
        assert len(set(batch.view_index[:, 2])) == 1
        assert batch.view_index[0, 0] == batch.view_index[2, 0] != batch.view_index[1, 0]
        assert batch.coefficients.tolist() == [[0, 0.3, 1]] * 3
        views = pixel_boxes(interpolate_boxes(boxes, np.array([0, 0.3, 1]), 96, 80), 96, 80)
        for row in range(3):
            for column in range(3):
                index = batch.view_index[row, column]
                assert batch.crop_boxes[index].tolist() == views[row, column].tolist()
                np.testing.assert_array_equal(batch.crops[index], crop_view(photo, views[row, column], 56))

    def test_threads_cut_the_same_crops(self, photo: Image.Image) -> None:
        boxes = np.array([[x, x / 2, x + 20, x / 2 + 25] for x in range(0, 70, 3)])
        alone = build_views(photo, boxes, np.array([0, 0.3, 1]), 24)
        together = build_views(photo, boxes, np.array([0, 0.3, 1]), 24, threads=3)
        assert len(alone.crops) == 2 * len(boxes) + 1
        np.testing.assert_array_equal(together.crops, alone.crops)
        for crop, box in zip(together.crops, together.crop_boxes, strict=True):
            np.testing.assert_array_equal(crop, crop_view(photo, box, 24))

    def test_each_region_its_own_coefficients(self, photo: Image.Image) -> None:
        boxes, t = np.array([[20, 10, 50, 30]] * 2), np.array([[0, 0.2], [0, 1]])
        batch = build_views(photo, boxes, t, 28)
        assert batch.crop_boxes[batch.view_index[1, 1]].tolist() == [0, 0, 96, 80]
        assert batch.crop_boxes[batch.view_index[0, 1]].tolist() == [16, 8, 59, 40]
        # 28 / 43 of 4 and 34 pixels, 28 / 32 of 2 and 22 pixels, truncated.
        assert batch.region_boxes[0, 1].tolist() == [2, 1, 22, 19]

    def test_no_regions(self, photo: Image.Image) -> None:
        batch = build_views(photo, np.zeros((0, 4)), np.array([0, 0.5]), 28)
        assert batch.crops.shape == (0, 28, 28, 3)
        assert batch.view_index.shape == (0, 2)

    def test_resize_is_antialiased(self) -> None:
        """A fine checkerboard shrinks to its mean; without antialiasing pixels of it survive."""
        board = (np.indices((112, 112)).sum(axis=0) % 2 * 255).astype(np.uint8)
        small = crop_view(Image.fromarray(np.stack([board] * 3, axis=-1)), (0, 0, 112, 112), 14)
        assert abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 2

    def test_aspect_ratio_is_not_kept(self) -> None:
        pixels = np.zeros((20, 40, 3), np.uint8)
        pixels[:, 20:] = 255
        small = crop_view(Image.fromarray(pixels), (0, 0, 40, 20), 16)
        assert small.shape == (16, 16, 3)
        assert small[:, :6].max() == 0
        assert small[:, 10:].min() == 255


class TestSampling:
    def test_ten_thousand_draws(self) -> None:
        generator = np.random.default_rng(0)
        draws = np.array([sample_coefficients(3, generator) for _ in range(10_000)])
        assert (draws[:, 0] == 0).all()
        views = draws[:, 1:]
        assert views.min() == 0.1
        assert views.max() == 1.0
        assert set(np.unique(views)) == set(CANDIDATE_VIEWS)
        assert all(len(set(row)) == 3 for row in views.tolist())
        # Uniform at every place, so the order is random as well: chi-square of 9 degrees beyond 33 has p < 1e-4.
        for column in range(3):
            counts = np.array([(views[:, column] == t).sum() for t in CANDIDATE_VIEWS])
            assert ((counts - 1000) ** 2 / 1000).sum() < 33
        assert 0.45 < (views[:, 0] < views[:, 1]).mean() < 0.55

    def test_the_generator_decides(self) -> None:
        first, again, other = (sample_coefficients(9, np.random.default_rng(seed)) for seed in (3, 3, 4))
        assert first.tolist() == again.tolist() != other.tolist()
        assert sample_coefficients(0, np.random.default_rng(0)).tolist() == [0]


def reference_search(image: Image.Image, box: np.ndarray, count: int, selection: str) -> list[float]:
    """The search of spec 4.2 as written there: one crop, one 224 x 224 resize, one transform at a time."""
    rgb = np.asarray(image).astype(np.int64)
    grey = ((9798 * rgb[..., 0] + 19235 * rgb[..., 1] + 3735 * rgb[..., 2] + 16384) >> 15).astype(np.float64)
    height, width = grey.shape
    bits = []
    for t in (0.0, *CANDIDATE_VIEWS):
        x1, y1, x2, y2 = (np.float32(b) + np.float32(t) * np.float32(i - b) for b, i in zip(box, (0, 0, width, height)))  # noqa: B905
        crop = torch.from_numpy(grey[int(y1) : int(y2), int(x1) : int(x2)])
        resized = F.interpolate(crop[None, None], size=(224, 224), mode="bilinear", align_corners=False)
        block = np.asarray(dctn(resized[0, 0].numpy(), norm="ortho"))[:8, :8].flatten()
        bits.append(block > (np.median(block[1:]) if selection == "median" else block.mean()))
    chosen: list[int] = []
    if selection == "pairwise":
        for _ in range(count):
            scores = [
                -1.0 if j in chosen else sum(int((bits[s] ^ bits[j]).sum()) for s in (0, *chosen)) / (j / 10)
                for j in range(1, 11)
            ]
            chosen.append(1 + int(np.argmax(scores)))
    else:
        scores = [int((bits[0] ^ bits[j]).sum()) / (j / 10) for j in range(1, 11)]
        for _ in range(count):
            chosen.append(1 + int(np.argmax(scores)))
            scores[chosen[-1] - 1] = 0
    return [0, *(j / 10 for j in chosen)]


class TestSearch:
    @pytest.fixture
    def noisy(self, photo: Image.Image) -> Image.Image:
        """Structure at several scales, so that the hashes differ."""
        generator = np.random.default_rng(5)
        pixels = np.asarray(photo).astype(int)
        for size in (3, 9, 27):
            noise = generator.integers(-60, 60, (-(-80 // size), -(-96 // size), 3))
            pixels = pixels + noise.repeat(size, axis=0).repeat(size, axis=1)[:80, :96]
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    @pytest.mark.parametrize("selection", ["official", "pairwise", "median"])
    def test_equals_the_rule_as_written(self, noisy: Image.Image, selection: str) -> None:
        boxes = np.array([[20, 10, 50, 30], [50, 40, 95, 75], [3, 3, 14, 12], [0, 30, 60, 79], [70, 5, 90, 60.0]])
        found = search_coefficients(noisy, boxes, 4, selection=selection)
        expected = [reference_search(noisy, box, 4, selection) for box in boxes]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert len({tuple(row) for row in found.tolist()}) > 1

    def test_selections_are_not_the_same(self, noisy: Image.Image) -> None:
        boxes = np.array([[x, y, x + 20, y + 15] for x in range(0, 76, 10) for y in range(0, 64, 10)], dtype=float)
        official, pairwise, median = (
            search_coefficients(noisy, boxes, 4, selection=name) for name in ("official", "pairwise", "median")
        )
        assert (official != pairwise).any()
        assert (official != median).any()
        # All begin with the view most unlike the region; pairwise differs only from the second on.
        np.testing.assert_array_equal(official[:, 1], pairwise[:, 1])

    @pytest.mark.parametrize(
        ("selection", "expected"),
        [("official", [0, 0.1, 0.1, 0.1]), ("median", [0, 0.1, 0.1, 0.1]), ("pairwise", [0, 0.1, 0.2, 0.3])],
    )
    def test_whole_image(self, photo: Image.Image, selection: str, expected: list[float]) -> None:
        """All distances are 0: the official search returns the first t again and again, pairwise never repeats."""
        found = search_coefficients(photo, np.array([[0, 0, 96, 80.0]]), 3, selection=selection)
        assert found.tolist() == [expected]

    def test_flat_region(self) -> None:
        flat = Image.new("RGB", (60, 50), (90, 120, 10))
        assert search_coefficients(flat, np.array([[10, 10, 30, 30]]), 2).tolist() == [[0, 0.1, 0.1]]

    def test_many_at_once_equals_one_at_a_time(self, noisy: Image.Image) -> None:
        boxes = np.array([[20, 10, 50, 30], [50, 40, 95, 75], [3, 3, 14, 12]])
        together = search_coefficients(noisy, boxes, 2)
        alone = np.concatenate([search_coefficients(np.asarray(noisy), box[None], 2) for box in boxes])
        np.testing.assert_array_equal(together, alone)
        assert search_coefficients(noisy, np.zeros((0, 4)), 2).shape == (0, 3)
        assert search_coefficients(noisy, boxes, 0).tolist() == [[0]] * 3

    @settings(deadline=None, max_examples=20)
    @given(st.data(), st.sampled_from(["official", "pairwise", "median"]))
    def test_images_together_equal_one_by_one(self, data: st.DataObject, selection: str) -> None:
        """Images of many sizes, flat ones among them, with any number of regions: the same hashes and the same t's."""
        images, boxes = [], []
        for _ in range(data.draw(st.integers(1, 6))):
            width, height = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120))
            random = np.random.default_rng(data.draw(st.integers(0, 99)))
            flat = data.draw(st.booleans())
            cells = random.integers(0, 256, (1, 1, 3) if flat else (-(-height // 7), -(-width // 7), 3))
            pixels = cells.repeat(height if flat else 7, axis=0).repeat(width if flat else 7, axis=1)
            images.append(pixels[:height, :width].astype(np.uint8))
            corners = random.random((data.draw(st.integers(0, 5)), 2, 2)) * (width, height)
            boxes.append(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1))
        together = search_views(images, boxes, 3, selection=selection)
        for image, own, found in zip(images, boxes, together, strict=True):
            [alone] = search_views([image], [own], 3, selection=selection)
            np.testing.assert_array_equal(found.coefficients, alone.coefficients)
            np.testing.assert_array_equal(found.distances, alone.distances)
            assert found.distances.shape == (len(own), 10)
            for row, box in enumerate(own):
                [single] = search_views([image], [box[None]], 3, selection=selection)
                np.testing.assert_array_equal(found.coefficients[row], single.coefficients[0])

    def test_distances_by_hand(self) -> None:
        """Left half black, right half white; the region is black, so its hash is empty."""
        pixels = np.zeros((100, 100, 3), np.uint8)
        pixels[:, 50:] = 255
        box = np.array([[0, 0, 10, 10.0]])
        [found] = search_views([pixels], [box], 2)
        grey = torch.from_numpy(pixels[..., 0])
        crops = pixel_boxes(interpolate_boxes(box, np.array(CANDIDATE_VIEWS), 100, 100), 100, 100)[0]
        bits = perceptual_hash(grey, torch.from_numpy(crops)).sum(-1)
        assert not perceptual_hash(grey, torch.from_numpy(box)).any()
        assert bits[:4].tolist() == [0, 0, 0, 0]  # t = 0.4 ends at 46 pixels, still in the black
        np.testing.assert_allclose(found.distances[0], bits.numpy() / np.array(CANDIDATE_VIEWS))
        assert found.coefficients[0, 1] == CANDIDATE_VIEWS[int(found.distances[0].argmax())]

    def test_unknown_selection(self, photo: Image.Image) -> None:
        with pytest.raises(InputError, match=r"'greedy'; use one of official, pairwise, median"):
            search_coefficients(photo, np.array([[0, 0, 5, 5]]), 2, selection="greedy")


class TestPolicy:
    def test_what_views_may_be(self) -> None:
        policy = DEFAULT_VIEW_POLICY
        for views in (None, "task"):
            found = resolve_policy(views, "caption", 3, policy)
            assert isinstance(found, np.ndarray)
            assert found.tolist() == [0, *policy["caption"]]
            assert resolve_policy(views, "something else", 3, policy) == "official"
        assert resolve_policy("auto", "caption", 3, policy) == "official"
        assert resolve_policy("pairwise", "caption", 3, policy) == "pairwise"
        for views in ([0.9, 0.2], (0, 0.9, 0.2), np.array([0.9, 0.2])):
            found = resolve_policy(views, "caption", 3, policy)
            assert isinstance(found, np.ndarray)
            assert found.tolist() == [0, 0.9, 0.2]  # the order is kept: it is that of the channels
        assert resolve_policy([], "caption", 1, policy).tolist() == [0]  # pyright: ignore[reportAttributeAccessIssue]

    def test_a_mapping_gives_each_task_its_own(self) -> None:
        views = {"caption": [0.9, 0.2], "tags": "median", "category": "task"}
        found = {task: resolve_policy(views, task, 3, DEFAULT_VIEW_POLICY) for task in DEFAULT_VIEW_POLICY}
        assert {task: own if isinstance(own, str) else own.tolist() for task, own in found.items()} == {
            "attributes": [0, 0.1, 0.2],  # missing: the model's own
            "category": [0, 0.1, 0.2],
            "tags": "median",
            "caption": [0, 0.9, 0.2],
        }

    def test_a_policy_may_name_a_search(self) -> None:
        policy = {"caption": "auto", "tags": "pairwise"}
        assert resolve_policy(None, "caption", 3, policy) == "official"
        assert resolve_policy("task", "tags", 3, policy) == "pairwise"

    @pytest.mark.parametrize(
        ("views", "message"),
        [
            ("wide", "unknown views 'wide' .*; use task, auto, official, pairwise, median, or a list"),
            ("pairwize", r"'pairwize' \(did you mean 'pairwise'\?\)"),
            ({"captions": "auto"}, r"names the task 'captions' \(did you mean 'caption'\?\); tasks are"),
            ({"caption": "offical"}, r"'offical' \(did you mean 'official'\?\)"),
            ({"caption": [0.5]}, "give 2 t's for the context views, not 1"),
            ({"caption": {"tags": "auto"}}, "list of numbers"),
            ([0.5], "looks at 3 views, so give 2 t's for the context views, not 1"),
            ([0, 0.1, 0.2, 0.3], "not 4"),
            ([0.5, 1.5], "between 0 .* and 1"),
            ([-0.1, 0.5], "between 0"),
            ([0.1, 0.2, 0.3], "the first 0"),
            ([0.1, float("nan")], "between 0"),
            (["a", "b"], "list of numbers"),
            ([[0.1], [0.2, 0.3]], "list of numbers"),
            (object(), "list of numbers"),
        ],
    )
    def test_errors(self, views: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            resolve_policy(views, "caption", 3, DEFAULT_VIEW_POLICY)
