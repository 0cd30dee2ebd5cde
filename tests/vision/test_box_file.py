"""A detector's boxes in a JSON file: which image has which, their scores, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.errors import InputError
from foveate.vision.box_file import BoxFile

IMAGE = Image.new("RGB", (40, 30))


def write(folder: Path, content: Any) -> BoxFile:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return BoxFile(path)


def test_images_go_by_path_name_or_stem(tmp_path: Path) -> None:
    file = write(tmp_path, {"a/0.png": [[1, 2, 3, 4]], "1.png": [], "2": {"boxes": [[5, 6, 7, 8]], "scores": [0.25]}})
    found = [propose(IMAGE) for propose in file.proposers([Path("a/0.png"), "b/1.png", Path("c/2.jpg")])]
    assert [boxes.tolist() for boxes, _ in found] == [[[1, 2, 3, 4]], [], [[5, 6, 7, 8]]]
    assert [scores.tolist() for _, scores in found] == [[1.0], [], [0.25]]


def test_a_bare_list_is_for_one_image_of_any_kind(tmp_path: Path) -> None:
    file = write(tmp_path, [[1, 2, 3, 4], [5, 6, 7, 8]])
    [propose] = file.proposers([IMAGE])
    assert propose(IMAGE)[1].tolist() == [1, 1]
    with pytest.raises(InputError, match="is a list, which is for one image, but 2 are given"):
        file.proposers(["a.png", "b.png"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        (5, "holds a int"),
        ('{"x.png": [], "x.png": []}', "has 'x.png' twice"),
        ({"y.png": []}, r"has no boxes for x\.png \(did you mean 'y\.png'\?\)"),
        ({"x.png": 5}, "got a int"),
        ({"x.png": [[1, 2, 3]]}, r"boxes\.json: boxes must have the shape \(R, 4\)"),
        ({"x.png": [[1, 2, 41, 20]]}, r"boxes\.json: box 0 is .*leaves the image, 40 wide"),
        ('{"x.png": [[1, 2, NaN, 4]]}', r"boxes\.json: box 0 is .*finite"),
        ({"x.png": {"boxes": []}}, r"must have \"boxes\" and \"scores\", this has \['boxes'\]"),
        ({"x.png": {"boxes": [], "scores": 0.5}}, r"scores of .*boxes\.json must be a list of numbers"),
        ({"x.png": {"boxes": [[1, 2, 3, 4]], "scores": ["a"]}}, "must be a list of numbers, not"),
        ({"x.png": {"boxes": [[1, 2, 3, 4]], "scores": [80]}}, "must be from 0 to 1, and one is 80"),
        ('{"x.png": {"boxes": [[1, 2, 3, 4]], "scores": [NaN]}}', "must be from 0 to 1, and one is nan"),
    ],
)
def test_bad_files(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        write(tmp_path, content).proposers(["x.png"])[0](IMAGE)
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be_told(tmp_path: Path) -> None:
    file = write(tmp_path, {"x.png": []})
    with pytest.raises(InputError, match="so give paths, not a Image"):
        file.proposers([IMAGE])
    with pytest.raises(InputError, match=r"'x\.png' fits both a/x\.png and b/x\.png"):
        file.proposers(["a/x.png", "b/x.png"])
    with pytest.raises(InputError, match="there is no file"):
        BoxFile(tmp_path / "none.json")


def test_the_layout_of_mg_llava(tmp_path: Path) -> None:
    found = {"boxes": [[1, 2, 3, 4]], "scores": [0.5], "labels": ["cat"]}
    frames = {"id": 9, "video": "clips/v.mp4", "frames": [found, found]}
    file = write(tmp_path, [{"id": 17, "image": "sub/a.png", **found}, {"id": "b", **found}, frames])
    names = ["x/b.png", "sub/a.png", "other/a.png", "17.jpg", "v.mp4"]
    by_id, by_path, by_name, by_number, video = (file.entries([name])[0] for name in names)
    assert by_id["labels"] == ["cat"]
    assert by_path == by_name == by_number == {"id": 17, "image": "sub/a.png", **found}
    assert video["frames"] == [found, found]
    [propose] = file.proposers(["b.png"])
    assert propose(IMAGE)[1].tolist() == [0.5]
    with pytest.raises(InputError, match=r"has no boxes for c\.png"):
        file.entries(["c.png"])
    # Two pictures of one name are told by their paths only, and of two records of an id the last counts.
    again = write(tmp_path, [{"id": k, "image": f"{k}/a.png", **found, "scores": [k / 4]} for k in (1, 2, 1)])
    assert again.entries(["2/a.png"])[0]["scores"] == [0.5]
    with pytest.raises(InputError, match="has no boxes for"):
        again.entries(["3/a.png"])
    with pytest.raises(InputError, match='a record must be an object with an "id"'):
        write(tmp_path, [found])
