"""What a describer returns, as values and as pictures."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from PIL import Image

from foveate.methods.dynrefer.results import Region, Regions, Report, View, ViewChoice
from foveate.methods.dynrefer.views import search_views
from foveate.vision.drawing import PALETTE


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

    def test_plot_dense_is_legible_for_fifty_regions(self) -> None:
        boxes = [(x, y, x + 54.0, y + 60.0) for y in range(10, 410, 80) for x in range(10, 610, 60)]
        regions = Regions(
            Image.new("RGB", (640, 480), "white"),
            [Region(box=box, caption=f"thing {k}", score=0.5) for k, box in enumerate(boxes)],
        )
        assert len(regions) == 50
        picture = np.asarray(regions.plot_dense())
        below = round(480 * 1.6)  # the image is enlarged to 1024 pixels
        assert picture.shape[1] == 1024
        # Two columns of 25 lines, each with enough height for its letters.
        assert picture.shape[0] - below >= 25 * 20
        colours = set()
        for k, (x0, y0, _, y1) in enumerate(boxes):
            # Half-way up the left side of the box.
            colour = tuple(picture[round((y0 + y1) / 2 * 1.6), round(x0 * 1.6)].tolist())
            colours.add(colour)
            own = (picture == colour).all(axis=-1)
            assert own[:below].sum() > 500, "the box and the ground of its number"
            assert own[below:].sum() > 100, "the ground of the same number below"
            # White on it has the contrast that is asked of text (WCAG 2: 3 for large letters, 4.5 for small).
            linear = [(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
            luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
            assert 1.05 / (luminance + 0.05) > 4, (k, colour)
        assert len(colours) == 50
        words = (picture[below:].max(axis=-1) < 60).reshape(picture.shape[0] - below, 2, 512)
        assert (words.sum(axis=(0, 2)) > 1000).all(), "captions in both columns"

    def test_numbers_of_one_place_do_not_cover_each_other(self) -> None:
        box = (40.0, 40.0, 60.0, 60.0)
        image = Image.new("RGB", (100, 100), "white")
        one = Regions(image, [Region(box=box)]).plot_dense()
        six = Regions(image, [Region(box=box)] * 6).plot_dense()
        colours = [six.getpixel((14 + 2, 1024 + 14 + 2 + 20 * row)) for row in range(3)]
        ground = np.asarray(one)[:1024]
        patch = (ground == np.array(one.getpixel((16, 1024 + 16)))).all(axis=-1).sum()
        for colour in colours:
            found = (np.asarray(six)[:1024] == np.array(colour)).all(axis=-1).sum()
            # A number's ground, of which the box's frame (drawn once for all six) is not a part.
            assert found > 150, (colour, found, patch)

    def test_plot_dense_of_nothing_and_of_too_many(self, photo: Image.Image) -> None:
        empty = Regions(photo, []).plot_dense(side=96)
        assert (np.asarray(empty)[80:] < 128).any(), "it says so"
        region = Region(box=(20.0, 10.0, 50.0, 30.0), caption="a red car", score=0.5)
        many = Regions(photo, [region] * 1800).plot_dense(side=96)
        assert 16_000 < many.height <= 16_383
        assert (np.asarray(many)[-60:] < 128).any(), "how many have no room"
        for size in ((20_000, 40), (40, 20_000), (40_000, 1)):
            assert max(Regions(Image.new("RGB", size), [region]).plot_dense().size) <= 16_383

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


class TestExplanation:
    def explained(self, photo: Image.Image, selection: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """Picture with crops of 40 pixels of a searched region, and the t's that were chosen."""
        box = (20.0, 10.0, 50.0, 30.0)
        [search] = search_views([photo], [np.array([box])], 2, selection=selection)
        t = tuple(search.coefficients[0].tolist())
        distances = dict(zip([k / 10 for k in range(1, 11)], search.distances[0].tolist(), strict=True))
        region = Region(box=box, choices=(ViewChoice(("tags",), t, selection, distances),))
        return np.asarray(Regions(photo, [region]).plot_views(side=40, explain=True)), t

    @pytest.mark.parametrize("selection", ["official", "pairwise", "median"])
    def test_every_candidate_is_there_and_the_chosen_are_framed(self, photo: Image.Image, selection: str) -> None:
        picture, t = self.explained(photo, selection)
        left = picture.shape[1] - 11 * 48
        framed = [
            place
            for column in range(11)
            for place in range(3)
            if tuple(picture[80, left + column * 48 - 2]) == PALETTE[place]
        ]
        columns = [round(10 * value) for value in t]
        expected = [place for _, place in sorted(zip(columns, range(3), strict=True))]
        assert framed == expected
        # The crop of the whole image stands last, unframed or not, pixel by pixel.
        whole = np.asarray(photo.resize((40, 40)))
        np.testing.assert_array_equal(picture[62 + 4 : 62 + 36, left + 484 : left + 516], whole[4:36, 4:36])

    def test_bars_are_as_high_as_the_distances(self, photo: Image.Image) -> None:
        picture, t = self.explained(photo, "official")
        [search] = search_views([photo], [np.array([[20, 10, 50, 30]])], 2)
        left, distances = picture.shape[1] - 11 * 48, search.distances[0]
        heights = []
        for column in range(1, 11):
            middle = picture[62 + 40 + 18 : 62 + 40 + 72, left + column * 48 + 20]
            heights.append(int((middle.min(axis=1) < 255).sum()))
        np.testing.assert_allclose(heights, 54 * distances / distances.max(), atol=2.5)
        assert heights[round(10 * t[1]) - 1] == max(heights)

    def test_views_that_were_not_searched(self, photo: Image.Image) -> None:
        """A t that is no candidate gets a column of its own; without any choice the candidates alone are shown."""
        box = (20.0, 10.0, 50.0, 30.0)
        fixed = Regions(photo, [Region(box=box, choices=(ViewChoice(("tags",), (0.0, 0.35, 1.0)),))])
        plain = Regions(photo, [Region(box=box)])
        assert fixed.plot_views(side=40, explain=True).width == plain.plot_views(side=40, explain=True).width + 48
        assert not fixed.searched

    def test_flat_and_empty(self) -> None:
        flat = Image.new("RGB", (30, 500), "teal")
        assert Regions(flat, [Region(box=(0.0, 0.0, 30.0, 500.0))]).plot_views(explain=True).height > 128
        assert Regions(flat, []).plot_views(explain=True).size == (1, 1)

    def test_many_blocks_fit_every_format(self, photo: Image.Image) -> None:
        picture = Regions(photo, [Region(box=(1.0, 1.0, 9.0, 9.0))] * 200).plot_views(explain=True)
        assert 15_000 < picture.height <= 16_383
        assert np.asarray(picture)[-30:].min() < 128


class TestReport:
    def test_reports_add_up(self) -> None:
        one = Report(1, 2, 12, 7, 3, 22, {"tower": 3.0, "other": 1.0})
        two = Report(1, 1, 6, 4, 2, 11, {"tower": 1.0, "heads": 3.0})
        both = one + two
        assert both == Report(2, 3, 18, 11, 5, 33, {"tower": 4.0, "other": 1.0, "heads": 3.0})
        assert both.extra_crops == 6
        assert both.to_dict()["extra_crops"] == 6
        assert json.loads(json.dumps(both.to_dict()))["milliseconds"]["heads"] == 3.0
        lines = str(both).splitlines()
        assert lines[0] == "3 regions of 2 images in 8.0 ms"
        assert "11 crops encoded for 18 views; 6 more than the cheapest choice of views (5)" in lines[1]
        assert lines[3].split() == ["tower", "4.0", "ms", "50%"]
        assert str(Report()).startswith("0 regions")
