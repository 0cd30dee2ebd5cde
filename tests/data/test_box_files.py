"""Which pictures need boxes, and which have published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.data.box_files import (
    BoxedPicture,
    pictures_of_conversations,
    pictures_of_files,
    published_boxes,
)
from foveate.errors import InputError


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def record(number: int, **names: Any) -> dict[str, Any]:
    return {**names, "boxes": [[number, 0, 9, 9]], "scores": [0.5], "labels": ["cat"]}


def talk(sample_id: Any, **picture: str) -> dict[str, Any]:
    mark = "<video>" if "video" in picture else "<image>" if picture else ""
    turns = [{"from": "human", "value": f"{mark}What?"}, {"from": "gpt", "value": "That."}]
    return {"id": sample_id, **picture, "conversations": turns}


def test_files_go_by_their_names(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = pictures_of_files([tmp_path / "c", tmp_path / "b.png", tmp_path / "film.mp4"])
    assert [(one.record_id, one.path) for one in found] == [
        ("d", tmp_path / "c" / "d.png"),
        ("b", tmp_path / "b.png"),
        ("film", tmp_path / "film.mp4"),
    ]
    assert found[1].record(record(1)) == {"id": "b", **record(1)}
    with pytest.raises(InputError, match="would both have the id 'b'"):
        pictures_of_files([tmp_path / "b.png", tmp_path / "c" / "b.png"])


def test_conversations_name_their_pictures_once(tmp_path: Path) -> None:
    samples = [talk(7, image="x/a.png"), talk("t"), talk(7, image="x/a.png"), talk(7, image="y/a.png")]
    file = write(tmp_path / "talk.json", [*samples, talk("v", video="clip.mp4")])
    found = pictures_of_conversations([file], tmp_path)
    assert found == [
        BoxedPicture("7", tmp_path / "x" / "a.png", "x/a.png"),
        BoxedPicture("7", tmp_path / "y" / "a.png", "y/a.png"),
        BoxedPicture("v", tmp_path / "clip.mp4", "clip.mp4", True),
    ]
    assert found[0].record(record(1)) == {"id": "7", "image": "x/a.png", **record(1)}
    assert "video" in found[2].record({"frames": []})
    with pytest.raises(InputError, match="no conversation is about a picture"):
        pictures_of_conversations([write(tmp_path / "texts.json", [talk("t")])], tmp_path)


def test_published_boxes_are_joined_by_id_and_picture(tmp_path: Path) -> None:
    pictures = [BoxedPicture("7", Path("x/a.png"), "x/a.png"), BoxedPicture("7", Path("y/a.png"), "y/a.png")]
    pictures += [BoxedPicture("8", Path("b.png")), BoxedPicture("9", Path("c.png"))]
    file = write(
        tmp_path / "boxes.json",
        [record(1, id=7, image="x/a.png"), record(2, id=7, image="y/a.png"), record(3, id="b.png"), record(4, id="8")],
    )
    found = published_boxes([file], pictures)
    assert [None if own is None else own[0].boxes[0][0] for own in found] == [1, 2, 4, None]
    # Without a name all pictures of the id have the same boxes, and of several records the last counts.
    same = write(tmp_path / "same.json", [record(1, id=7), record(5, id=7)])
    assert [None if own is None else own[0].boxes[0][0] for own in published_boxes([same], pictures)] == [
        5,
        5,
        None,
        None,
    ]
    video = write(tmp_path / "video.json", {"9": {"frames": [record(1), record(2)]}})
    assert [len(own or ()) for own in published_boxes([video], pictures)] == [0, 0, 0, 2]
    with pytest.raises(InputError, match=r"has boxes of none of the 4 pictures \(the first is '7'\)"):
        published_boxes([write(tmp_path / "other.json", [record(1, id="z")])], pictures)
    with pytest.raises(InputError, match="a score is not a number from 0 to 1"):
        published_boxes([write(tmp_path / "broken.json", [{**record(1, id=7), "scores": [5]}])], pictures)
