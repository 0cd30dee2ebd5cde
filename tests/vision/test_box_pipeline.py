"""Boxes of pictures that come without: batches, the cache by content, what happens after a kill, videos, imports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data import open_conversations
from foveate.data.samples import BoxSet
from foveate.errors import InputError
from foveate.vision.box_pipeline import BoxPipeline, FoundBoxes, load_box_pipeline
from foveate.vision.taggers import VocabularyTagger
from foveate.vision.video import Video
from foveate.world.scenes import render_scene


class Brightest:
    """Finds the pixels above a limit and calls them by the first tag: a whole detector, and every number is known.

    Attributes:
        seen: pictures that it was given.
        breaks_at: number of the picture that it is interrupted at.
    """

    names = None

    def __init__(self, limit: int = 200) -> None:
        self.limit = limit
        self.seen = 0
        self.breaks_at: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"detector": "brightest", "limit": self.limit}

    def __call__(self, images: Sequence[Image.Image], tags: Sequence[Sequence[str]]) -> list[BoxSet]:
        found = []
        for image, own in zip(images, tags, strict=True):
            if self.seen == self.breaks_at:
                raise KeyboardInterrupt
            self.seen += 1
            y, x = np.nonzero(np.asarray(image.convert("L")) > self.limit)
            box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
            found.append(BoxSet((box,), (0.1234567890123,), (own[0],)))
        return found


def spot(left: int, top: int = 3, size: tuple[int, int] = (40, 30)) -> Image.Image:
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (left, top, left + 5, top + 4))
    return image


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        spot(number).save(path)
    return paths


def pipeline(folder: Path, detector: Any, words: Sequence[str] = ("dot",)) -> BoxPipeline:
    return BoxPipeline(detector, VocabularyTagger(words), cache=folder / "cache")


def first_box(found: Any) -> Any:
    assert isinstance(found, FoundBoxes)
    return found.frames[0].boxes.boxes[0]


def test_a_run_that_was_killed_goes_on(files: list[Path], tmp_path: Path) -> None:
    detector = Brightest()
    detector.breaks_at = 5
    done: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        for _ in pipeline(tmp_path, detector).find(files, batch_size=2, progress=lambda *now: done.append(now)):
            pass
    assert done == [(2, 7), (4, 7)]
    again = Brightest()
    found = list(pipeline(tmp_path, again).find(files, batch_size=3))
    assert again.seen == 3, "four of the seven were kept"
    assert [first_box(own) for own in found] == [(k, 3, k + 5, 7) for k in range(7)]
    sources = [own.frames[0].source for own in found if isinstance(own, FoundBoxes)]
    assert sources == ["cache"] * 4 + ["found"] * 3
    # What comes out of the cache is what went in, to the last digit.
    fresh = list(BoxPipeline(Brightest(), VocabularyTagger(["dot"])).find(files))
    for one, other in zip(found, fresh, strict=True):
        assert isinstance(one, FoundBoxes)
        assert isinstance(other, FoundBoxes)
        assert one.frames[0].boxes == other.frames[0].boxes
        assert one.frames[0].tags == other.frames[0].tags == {"dot": 1.0}
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_content_and_settings_decide(files: list[Path], tmp_path: Path) -> None:
    first = Brightest()
    list(pipeline(tmp_path, first).find(files[:1]))
    same = tmp_path / "other name.bmp"
    Image.open(files[0]).save(same)
    for source in (same, np.asarray(Image.open(files[0])), Image.open(files[0])):
        assert first_box(next(iter(pipeline(tmp_path, first).find([source])))) == (0, 3, 5, 7)
    assert first.seen == 1
    list(pipeline(tmp_path, first, ["other"]).find(files[:1]))
    assert first.seen == 2, "another vocabulary"
    limit = Brightest(limit=100)
    list(pipeline(tmp_path, limit).find(files[:1]))
    assert limit.seen == 1, "another threshold"
    # The same bytes in another shape are another picture.
    wide, high = spot(0, 0, (40, 30)), spot(0, 0, (30, 40))
    blank = [Image.new("RGB", image.size, (255, 255, 255)) for image in (wide, high)]
    found = [first_box(own) for own in pipeline(tmp_path, first).find(blank)]
    assert found == [(0, 0, 40, 30), (0, 0, 30, 40)]


def test_an_entry_names_its_settings_and_a_damaged_one_is_found_anew(files: list[Path], tmp_path: Path) -> None:
    detector = Brightest()
    own = pipeline(tmp_path, detector)
    list(own.find(files[:1]))
    [entry] = (tmp_path / "cache").rglob("*.json")
    content = json.loads(entry.read_text())
    assert content["settings"] == own.settings
    assert content["boxes"] == [[0, 3, 5, 7]]
    assert content["tags"] == {"dot": 1.0}
    entry.write_text("{")
    with pytest.warns(UserWarning, match="so its boxes are found anew"):
        assert first_box(next(iter(own.find(files[:1])))) == (0, 3, 5, 7)
    assert detector.seen == 2
    assert json.loads(entry.read_text()) == content
    entry.write_text(json.dumps({**content, "settings": {}}))
    list(own.find(files[:1]))
    assert detector.seen == 3


def test_known_boxes_are_taken_and_kept(files: list[Path], tmp_path: Path) -> None:
    detector = Brightest()
    published = (BoxSet(((1, 1, 2, 2),), (0.5,), ("cat",)),)
    found = list(pipeline(tmp_path, detector).find(files[:2], known=[published, None]))
    assert [first_box(own) for own in found] == [(1, 1, 2, 2), (1, 3, 6, 7)]
    assert detector.seen == 1
    assert [first_box(own) for own in pipeline(tmp_path, detector).find(files[:2])] == [(1, 1, 2, 2), (1, 3, 6, 7)]
    assert detector.seen == 1
    with pytest.raises(InputError, match=r"boxes of 2 pictures, but is 1"):
        list(pipeline(tmp_path, detector).find(files[:1], known=[published * 2]))


def test_videos_have_a_set_a_frame(tmp_path: Path) -> None:
    video = Video(tuple(spot(number) for number in range(9)))
    detector = Brightest()
    found = list(pipeline(tmp_path, detector).find([spot(20), video, spot(30)], frames=3, batch_size=2))
    boxes = [[frame.boxes.boxes[0][0] for frame in own.frames] for own in found if isinstance(own, FoundBoxes)]
    assert boxes == [[20], [0, 4, 8], [30]]
    record = found[1].record() if isinstance(found[1], FoundBoxes) else {}
    assert record == {
        "frames": [{"boxes": [[k, 3, k + 5, 7]], "scores": [0.123457], "labels": ["dot"]} for k in (0, 4, 8)]
    }


def test_records_are_read_with_their_conversations(files: list[Path], tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}]
    (tmp_path / "talk.json").write_text(json.dumps([{"id": 4, "image": "4.png", "conversations": talk}]))
    [found] = pipeline(tmp_path, Brightest()).find([files[4]])
    assert isinstance(found, FoundBoxes)
    (tmp_path / "boxes.json").write_text(json.dumps([{"id": 4, **found.record()}]))
    [sample] = open_conversations(tmp_path / "talk.json", files[0].parent, tmp_path / "boxes.json")
    assert sample.boxes == (BoxSet(((4, 3, 9, 7),), (0.123457,), ("dot",)),)


def test_bad_pictures(files: list[Path], tmp_path: Path) -> None:
    files[1].write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png"):
        list(pipeline(tmp_path, Brightest()).find(files))
    found = list(pipeline(tmp_path, Brightest()).find(files[:3], skip_bad=True))
    assert [isinstance(own, InputError) for own in found] == [False, True, False]
    assert first_box(found[2]) == (2, 3, 7, 7)
    with pytest.raises(InputError, match="batch_size must be a whole number"):
        list(pipeline(tmp_path, Brightest()).find(files, batch_size=0))
    with pytest.raises(InputError, match="frames must be a whole number"):
        list(pipeline(tmp_path, Brightest()).find(files, frames=0))
    with pytest.raises(InputError, match="give a tagger, or a vocabulary"):
        BoxPipeline(Brightest())


def test_the_shipped_pipeline_as_a_proposer(tmp_path: Path) -> None:
    scene = render_scene(9_000_001, size=160)
    image = Image.fromarray(scene.image)
    with pytest.warns(UserWarning, match="proposer-world knows the rendered world only"):
        found = load_box_pipeline(cache=tmp_path / "cache", device="cpu")
    record = found(image)
    assert len(record["boxes"]) == len(record["scores"]) == len(record["labels"])
    assert set(record["labels"]) & {thing.category for thing in scene.instances}
    assert found(np.asarray(image)) == record
    with pytest.warns(UserWarning, match="rendered world"):
        named = load_box_pipeline(vocabulary=[record["labels"][0]], device="cpu")(image)
    assert set(named["labels"]) == {record["labels"][0]}
    with (
        pytest.warns(UserWarning, match="rendered world"),
        pytest.raises(InputError, match=r"proposer-world knows none of the words chair\? \(did you mean 'chair'\?\)"),
    ):
        load_box_pipeline(vocabulary=["chair?"])
    with pytest.raises(InputError, match="there is no device 'gpu'"):
        load_box_pipeline(device="gpu")
