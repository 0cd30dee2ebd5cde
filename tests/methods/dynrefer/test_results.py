"""What a describer returns, as values and as pictures."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from PIL import Image

from foveate.methods.dynrefer.results import Region, Regions, View


@pytest.fixture
def regions(photo: Image.Image) -> Regions:
    views = (View(0.0, (20, 10, 50, 30), ("caption", "tags"), photo), View(0.3, (14, 7, 63, 45), ("caption",), photo))
    full = Region(
        box=(20.0, 10.123, 50.0, 30.0),
        caption="a red car with a very long caption that has to be broken into lines to fit beside the picture",
        caption_score=0.123456,
        tags=("car", "red"),
        tag_scores={"car": 0.9, "red": 0.8, "dog": 0.1},
        attributes=("red",),
        attribute_scores={"red": 0.77777, "small": 0.2},
        category="car",
        category_score=0.6,
        category_scores={"car": 0.6, "dog": 0.4},
        score=0.5,
        views=views,
    )
    return Regions(photo, [full, Region(box=(0.0, 0.0, 96.0, 80.0), category="dog", category_score=0.4)])


class TestValues:
    def test_to_dict_is_json(self, regions: Regions) -> None:
        plain = regions.to_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert (plain["width"], plain["height"]) == (96, 80)
        first, second = plain["regions"]
        assert first["box"] == [20.0, 10.12, 50.0, 30.0]
        assert first["caption_score"] == 0.1235
        assert first["tags"] == {"car": 0.9, "red": 0.8}
        assert first["attributes"] == {"red": 0.7778}
        assert (first["category"], first["score"]) == ("car", 0.5)
        assert first["views"][1] == {"t": 0.3, "box": [14, 7, 63, 45], "tasks": ["caption"]}
        # What was not asked for is not there.
        assert set(second) == {"box", "category", "category_score", "views"}

    def test_sequence(self, regions: Regions) -> None:
        assert len(regions) == 2
        assert regions[0].caption is not None
        assert regions[-1].category == "dog"
        assert isinstance(regions[:1], Regions)
        assert [region.category for region in regions] == ["car", "dog"]
        assert regions[:1].image is regions.image
        with pytest.raises(IndexError):
            regions[2]
        assert "96x80" in repr(regions)
        with pytest.raises(FrozenInstanceError):
            regions[0].caption = "other"  # pyright: ignore[reportAttributeAccessIssue]

    def test_views_are_crops_of_the_image(self, regions: Regions, photo: Image.Image) -> None:
        view = regions[0].views[0]
        assert view.image.size == (30, 20)
        np.testing.assert_array_equal(np.asarray(view.image), np.asarray(photo)[10:30, 20:50])


class TestPictures:
    def test_plot(self, regions: Regions) -> None:
        picture = regions.plot()
        width, height = 640, round(80 * 640 / 96)
        assert picture.size[0] == width + max(420, width * 3 // 4)
        assert picture.size[1] >= height
        # The frame of the first region has its colour, and the words beside the picture are not white.
        x, y = round(20 * 640 / 96), round(20 * 640 / 96)
        assert picture.getpixel((x, y)) == (214, 39, 40)
        legend = np.asarray(picture)[:, width:]
        assert (legend < 128).any(axis=-1).sum() > 200

    def test_large_images_are_not_shrunk(self) -> None:
        picture = Regions(Image.new("RGB", (900, 300)), [Region(box=(10.0, 10.0, 200.0, 100.0))]).plot()
        assert picture.size == (900 + 675, 300)

    def test_a_region_in_each_corner(self) -> None:
        boxes = [(0.0, 0.0, 1.0, 1.0), (95.0, 79.0, 96.0, 80.0), (0.0, 79.5, 0.2, 80.0), (0.0, 0.0, 96.0, 80.0)]
        regions = Regions(Image.new("RGB", (96, 80)), [Region(box=box, caption="x") for box in boxes])
        assert regions.plot(side=96).width == 96 + 420

    def test_plot_views(self, regions: Regions) -> None:
        picture = regions.plot_views(side=100)
        # Two columns and two rows, gaps of 8, 34 pixels of text above each crop.
        assert picture.size == (2 * 108 + 8, 2 * 142 + 8)
        crop = np.asarray(regions[0].views[0].image.resize((100, 100)))
        np.testing.assert_array_equal(np.asarray(picture)[8 + 34 : 8 + 134, 8:108], crop)
        # The second region has no views: its row is white.
        assert np.asarray(picture)[8 + 142 + 34 :].min() == 255

    def test_nothing_to_show(self, photo: Image.Image) -> None:
        empty = Regions(photo, [])
        assert empty.plot(side=96).size[0] == 96 + 420
        assert empty.plot_views().size == (128 + 16, 128 + 34 + 16)
        assert empty.to_dict()["regions"] == []

    @pytest.mark.parametrize("count", [1, 5000])
    def test_pictures_of_many_regions_fit_every_format(self, photo: Image.Image, count: int) -> None:
        view = View(0.0, (20, 10, 50, 30), ("caption",), photo)
        region = Region(box=(20.0, 10.0, 50.0, 30.0), caption="a red car", caption_score=0.5, views=(view,))
        regions = Regions(photo, [region] * count)
        for picture in (regions.plot(), regions.plot_views()):
            assert max(picture.size) <= 16_383
            assert (picture.height > 16_000) == (count > 1)
            # Down to the last lines there are words, which say how many regions have no room.
            assert np.asarray(picture)[-60:].min() < 128 or count == 1

    @pytest.mark.parametrize("size", [(20_000, 40), (40, 20_000), (40_000, 1)])
    def test_large_images_are_reduced_to_what_every_format_holds(self, size: tuple[int, int]) -> None:
        picture = Regions(
            Image.new("RGB", size), [Region(box=(0.0, 0.0, 1.0, 1.0), category="car", category_score=1.0)]
        )
        assert 16_000 < max(picture.plot().size) <= 16_383
