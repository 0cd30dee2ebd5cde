"""The reader of LLaVA's conversations and MG-LLaVA's box files, on miniatures of the published ones."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from foveate.data import open_conversations, open_dataset
from foveate.data.samples import BoxSet, ConversationSample, Message
from foveate.errors import InputError


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


SEEN: dict[str, Any] = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": talk("<image>\nWhat colour is the bus?", "White and red.", "And the sign?", "Blue."),
}
BOXES: dict[str, Any] = {
    "id": "000000033471",
    "boxes": [[1, 2, 30, 40], [-3, 0, 12, 700]],
    "scores": [0.91, 0.2],
    "labels": ["bus", "sign"],
}


def write(folder: Path, content: Any, name: str = "mix.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def opened(folder: Path, *samples: Any, boxes: Any = None, **options: Any):
    box_file = [] if boxes is None else [write(folder, boxes, "boxes.json")]
    return open_conversations(write(folder, list(samples)), folder / "images", box_file, **options)


def test_an_image_a_video_and_a_text_with_their_boxes(tmp_path: Path) -> None:
    frame = {"boxes": [[0, 0, 4, 5]], "scores": [0.5], "labels": ["dog"]}
    video = {"id": 7, "video": "clips/a.mp4", "conversations": talk("What happens?\n<image>", "A dog runs.")}
    text = {
        "id": "sharegpt_1",
        "model": "gpt4",
        "conversations": [
            {"from": "system", "value": "You are helpful."},
            {"from": "gpt", "value": "Hello."},
            {"from": "user", "value": "Two and two?"},
            {"from": "chatgpt", "value": "Four."},
        ],
    }
    boxes = [BOXES, {"id": "7", "video": "clips/a.mp4", "frames": [frame, {"boxes": [], "scores": [], "labels": []}]}]
    data = opened(tmp_path, SEEN, video, text, boxes=boxes)
    assert len(data) == 3
    assert data[0] == ConversationSample(
        "000000033471",
        tuple(Message(m["from"], m["value"]) for m in SEEN["conversations"]),
        image=tmp_path / "images/coco/train2017/000000033471.jpg",
        boxes=(BoxSet(((1, 2, 30, 40), (-3, 0, 12, 700)), (0.91, 0.2), ("bus", "sign")),),
    )
    assert data[1].video == tmp_path / "images/clips/a.mp4"
    assert data[1].messages[0].text == "What happens?\n<video>"
    assert data[1].boxes == (BoxSet(((0, 0, 4, 5),), (0.5,), ("dog",)), BoxSet((), (), ()))
    assert data[2].image is None
    assert data[2].video is None
    assert data[2].boxes == ()
    assert [(m.speaker, m.text) for m in data[2].messages] == [
        ("gpt", "Hello."),
        ("human", "Two and two?"),
        ("gpt", "Four."),
    ]
    assert data.dropped == {"system prompts": 1}
    assert data[-1] == data[2]
    assert data[:2] == [data[0], data[1]]
    assert pickle.loads(pickle.dumps(data))[0] == data[0]  # data-loading processes get it so


def test_kind_and_size_of_a_question(tmp_path: Path) -> None:
    marked = [
        {"from": "human", "value": "<image>\nq", "kind": "colour", "size": "small"},
        {"from": "gpt", "value": "a"},
    ]
    data = opened(tmp_path, SEEN | {"conversations": marked})
    assert data[0].messages == (Message("human", "<image>\nq", "colour", "small"), Message("gpt", "a"))


def test_boxes_join_by_id_and_by_image_where_it_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    later = BOXES | {"boxes": [[5, 5, 9, 9]], "scores": [1], "labels": ["cat"]}
    assert opened(tmp_path, SEEN, boxes=[BOXES, later])[0].boxes[0].labels == ("cat",)  # the last of an id wins
    assert opened(tmp_path, SEEN, boxes={SEEN["id"]: {k: v for k, v in BOXES.items() if k != "id"}})[0].boxes
    # A record that names the image comes before one that does not, and never goes to another image.
    mine = later | {"image": SEEN["image"]}
    assert opened(tmp_path, SEEN, boxes=[mine, BOXES])[0].boxes[0].labels == ("cat",)
    with pytest.raises(InputError, match=r"mix.json: sample '000000033471' .*for another picture only"):
        opened(tmp_path, SEEN, boxes=[later | {"image": "other.jpg"}])
    with pytest.raises(InputError, match=r"has no record in the box file .'coco/train2017/000000033471.jpg'"):
        opened(tmp_path, SEEN, boxes=[BOXES | {"id": "1"}])
    # Two images under one id get the same boxes, which is said.
    with caplog.at_level(logging.INFO):
        opened(tmp_path, SEEN, SEEN | {"image": "gqa/33471.jpg"}, boxes=[BOXES])
    assert "an id names several images" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": None}, '"id" is neither a string nor a whole number'),
        ({"image": "/etc/passwd"}, "is not a path below the folder of images .'/etc/passwd'"),
        ({"image": "a/../../b.png"}, "is not a path below the folder of images"),
        ({"image": 5}, '"image" is not a string .5'),
        ({"image": None}, "has a placeholder, but no image"),
        ({"video": "a.mp4"}, 'has both "image" and "video"'),
        ({"conversations": []}, "has no messages"),
        ({"conversations": "hello"}, '"conversations" is not a list'),
        ({"conversations": talk("no placeholder", "yes")}, "needs one <image> in its questions .0"),
        ({"conversations": talk("<image><image>", "yes")}, "needs one <image> in its questions .2"),
        ({"conversations": talk("<video>", "yes")}, "placeholder of a video"),
        ({"conversations": [{"from": "cat", "value": "miaow"}]}, "neither human nor gpt .'cat'"),
        ({"conversations": [{"from": "human"}]}, 'has no key "value"'),
        ({"conversations": [{"from": "human", "value": "q", "kind": 3}]}, '"kind" is not a string'),
    ],
)
def test_broken_samples_are_named_or_counted(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=rf"mix.json: sample .*number 1.*{reason}"):
        opened(tmp_path, SEEN, SEEN | change)
    data = opened(tmp_path, SEEN, SEEN | change, SEEN, skip_bad=True)
    assert len(data) == 2
    assert data.skipped.total() == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": ["bus"]}, "not as many scores and labels as boxes .*2, 2, 1"),
        ({"boxes": [[1, 2, 3], [1, 2, 3, 4]]}, "a box is not four finite numbers .*1, 2, 3"),
        ({"boxes": [[1, 2, 3, float("nan")], [1, 2, 3, 4]]}, "a box is not four finite numbers"),
        ({"scores": [0.1, 7]}, "a score is not a number from 0 to 1 .7"),
        ({"labels": ["bus", None]}, "a label is not a string"),
        ({"boxes": None}, '"boxes" is not a list'),
        ({"frames": 1}, '"frames" is not a list'),
    ],
)
def test_broken_box_records_are_named_or_counted(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=rf"boxes.json: box record '000000033471': .*{reason}"):
        opened(tmp_path, SEEN, boxes=[BOXES | change])
    other = SEEN | {"id": "2"}
    data = opened(tmp_path, SEEN, other, boxes=[BOXES | change, BOXES | {"id": 2}], skip_bad=True)
    assert [sample.sample_id for sample in data] == ["2"]
    assert data.skipped.total() == 2  # the record, and the sample that is left without one


def test_a_video_needs_frames_and_an_image_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its box record is not of an image"):
        opened(tmp_path, SEEN, boxes=[{"id": SEEN["id"], "frames": []}])
    video = {"id": SEEN["id"], "video": "a.mp4", "conversations": talk("<video>\nq", "a")}
    with pytest.raises(InputError, match="its box record is not of a video"):
        opened(tmp_path, video, boxes=[BOXES])


def test_what_has_no_answer_is_left_out_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    unanswered = SEEN | {"conversations": talk("<image>\nWhat?")}
    data = opened(tmp_path, SEEN, unanswered)
    assert len(data) == 1
    assert data.dropped == {"conversations without an answer": 1}
    with pytest.raises(InputError, match="no usable conversation"):
        opened(tmp_path, unanswered)


def test_files_that_are_no_such_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json does not exist"):
        open_conversations(tmp_path / "none.json", tmp_path)
    with pytest.raises(InputError, match=r"mix.json holds an object"):
        open_conversations(write(tmp_path, SEEN), tmp_path)
    path = write(tmp_path, [SEEN])
    with pytest.raises(InputError, match=r"gone.json does not exist"):
        open_conversations(path, tmp_path, tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text(json.dumps([BOXES])[:-5])
    with pytest.raises(InputError, match=r"cut.json is not JSON"):
        open_conversations(path, tmp_path, tmp_path / "cut.json")
    with pytest.raises(InputError, match="no annotation file"):
        open_conversations([], tmp_path)
    with pytest.raises(InputError, match="holds conversations"):
        open_dataset("llava", tmp_path, "train")
