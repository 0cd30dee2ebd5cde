"""The readers of benchmarks on miniatures of the published files."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data import open_dataset
from foveate.data.benchmarks import (
    AnswerTable,
    ChoiceTable,
    QuestionLines,
    VideoQuestions,
    plain_question,
    question_ids,
)
from foveate.data.samples import BenchmarkQuestion, BoxSet
from foveate.errors import InputError


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def coded(grey: int) -> str:
    return base64.b64encode(png(grey)).decode()


HEADING = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"
ROWS = {
    1: f"1\tWhat?\tLook.\tcat\tdog\tcow\then\tB\tanimals\t{coded(10)}\ts\tliving\t\tdev",
    2: f"2\tIs it?\t\tyes\tno\t\t\tA\tlogic\t{coded(20)}\ts\tdead\t\tdev",
    3: "1000001\tWhat?\tLook.\tdog\tcow\then\tcat\tA\tanimals\t1\ts\tliving\t\tdev",
    4: f"3\tElse?\t\tyes\tno\t\t\tA\tlogic\t{coded(10)}\ts\tdead\t\ttest",
}


def write(folder: Path, rows: dict[int, str] | None = None, heading: str = HEADING, name: str = "bench.tsv") -> Path:
    path = folder / name
    path.write_text("\n".join([heading, *(rows or ROWS).values()]) + "\n", encoding="utf-8")
    return path


def test_a_circular_table(tmp_path: Path) -> None:
    data = ChoiceTable(write(tmp_path), split="dev")
    assert (len(data), data.answered, data.dropped) == (3, True, {"rows of another split": 1})
    first = data[0]
    assert first == BenchmarkQuestion(
        row=1,
        name="row 1 (line 2)",
        question_id=1,
        question="What?",
        picture=first.picture,
        hint="Look.",
        options=(("A", "cat"), ("B", "dog"), ("C", "cow"), ("D", "hen")),
        answers=("B",),
        category="animals",
        l2_category="living",
        split="dev",
    )
    assert data[1].options == (("A", "yes"), ("B", "no"))
    # The turned row has the picture of the row that it names; equal pictures are known as one.
    assert data.source(2) == data.source(0) == png(10)
    assert data.source(1) == png(20)
    assert data[2].picture == first.picture != data[1].picture
    everything = ChoiceTable(tmp_path / "bench.tsv")
    assert everything[3].picture == first.picture
    assert [one.question_id for one in everything] == [1, 2, 1000001, 3]


def test_boxes_are_found_by_index(tmp_path: Path) -> None:
    boxes = [
        {"id": 1, "boxes": [[1, 2, 3, 4]], "scores": [0.5], "labels": ["cat"]},
        {"id": "2", "boxes": [], "scores": [], "labels": []},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    data = ChoiceTable(write(tmp_path), split="dev", boxes=[tmp_path / "boxes.json"])
    one = (BoxSet(((1, 2, 3, 4),), (0.5,), ("cat",)),)
    assert [question.boxes for question in data] == [one, (BoxSet((), (), ()),), one]
    with pytest.raises(InputError, match=r"row 4 \(line 5\): has no record in the box file \('3'\)"):
        ChoiceTable(tmp_path / "bench.tsv", boxes=[tmp_path / "boxes.json"])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (ROWS[2].replace(coded(20), "x" * 70), '"image" is not base64'),
        (ROWS[2].replace(coded(20), coded(20)[:-3]), '"image" is not base64'),
        (ROWS[2].replace(coded(20), "7"), "the index of a row that has no picture"),
        (ROWS[2].replace(coded(20), ""), '"image" is neither a picture nor the index of a row'),
        (ROWS[2].replace("2\t", "two\t", 1), '"index" is not a whole number'),
        (ROWS[2].replace("2\t", "1\t", 1), "the index comes a second time"),
        (ROWS[2].replace("\tA\t", "\tC\t"), r"\"answer\" is none of the options A, B \('C'\)"),
        (ROWS[2].replace("\tA\t", "\t\t"), "has no answer, while others have"),
        (ROWS[2].replace("Is it?", " "), "has no question"),
        (ROWS[2].replace("\tyes\tno", "\t\t"), "has no options"),
        (ROWS[2].replace("Is it?", '"Is it?'), "a quote is opened and not closed"),
        (ROWS[2].removesuffix("\tdev"), "has another number of cells"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: str, fault: str) -> None:
    path = write(tmp_path, ROWS | {2: row})
    with pytest.raises(InputError, match=rf"bench\.tsv: row 2 \(line 3\): .*{fault}.*skip_bad"):
        ChoiceTable(path)
    data = ChoiceTable(path, skip_bad=True)
    assert [one.question_id for one in data] == [1, 1000001, 3]
    assert data.skipped.total() == 1


def test_a_table_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no row of the split 'val'; its splits are dev, test\."):
        ChoiceTable(write(tmp_path), split="val")
    with pytest.raises(InputError, match="has no column 'question', its columns are index, image"):
        ChoiceTable(write(tmp_path, {1: f"1\t{coded(1)}"}, "index\timage"))
    with pytest.raises(InputError, match="has no column 'split'"):
        ChoiceTable(write(tmp_path, {1: f"1\t{coded(1)}\tq"}, "index\timage\tquestion"), split="dev")
    with pytest.raises(InputError, match=r"use foveate\.data\.benchmarks\.ChoiceTable"):
        open_dataset("mmbench", tmp_path, "dev")
    path = write(tmp_path)
    data = ChoiceTable(path)
    path.write_text(path.read_text().replace(coded(20), coded(30)))
    with pytest.raises(InputError, match="has been changed"):
        data.source(1)


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    rows = {number: row.replace("\tA\t", "\t\t").replace("\tB\t", "\t\t") for number, row in ROWS.items()}
    data = ChoiceTable(write(tmp_path, rows))
    assert not data.answered
    assert {one.answers for one in data} == {()}


def test_open_answers(tmp_path: Path) -> None:
    rows = {
        1: f"""1\t{coded(1)}\tWho?\t"['Ann', ""Bob's""]\"""",
        2: f'2\t{coded(2)}\tWhen?\t"[""1990""]"',
        3: f"3\t{coded(3)}\tHow?\tby car",
    }
    data = AnswerTable(write(tmp_path, rows, "index\timage\tquestion\tanswer"))
    assert [one.answers for one in data] == [("Ann", "Bob's"), ("1990",), ("by car",)]
    for answer in ("[1990]", "['torn", "[]", "[__import__('os')]"):
        with pytest.raises(InputError, match=r"row 1 \(line 2\): \"answer\" is not a list of texts"):
            AnswerTable(write(tmp_path, {1: f"1\t{coded(1)}\tWho?\t{answer}"}, "index\timage\tquestion\tanswer"))


PROMPT = "What brand?\nReference OCR token: DAKOTA, DIGITAL\nAnswer the question using a single word or phrase."


def lines(folder: Path, *records: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return path


def test_textvqa_joins_by_image_and_question(tmp_path: Path) -> None:
    annotations = [
        {"image_id": "a1", "question": "what brand?", "question_id": 34602, "answers": ["dakota"] * 10},
        {"image_id": "a1", "question": "What Year?", "question_id": 34603, "answers": ["1990"] * 9 + ["90"]},
        {"image_id": "b2", "question": "what brand?", "question_id": 34604, "answers": ["none"] * 10},
    ]
    (tmp_path / "answers.json").write_text(json.dumps({"dataset_type": "val", "data": annotations}))
    path = lines(
        tmp_path,
        {"question_id": "a1", "image": "a1.jpg", "text": PROMPT, "category": "default"},
        {"question_id": "a1", "image": "a1.jpg", "text": "what year?\nAnswer briefly."},
    )
    data = QuestionLines(path, tmp_path / "images", annotations=tmp_path / "answers.json")
    assert [(one.row, one.name, one.question_id) for one in data] == [(1, "line 1", "a1"), (2, "line 2", "a1")]
    assert (data[0].question, data[0].answers[0], data[0].category) == (PROMPT, "dakota", "default")
    assert data[1].answers[-1] == "90"
    assert data.source(1) == tmp_path / "images/a1.jpg"
    assert plain_question("Reference OCR token: A\nWhat?\nAnswer.") == "what?"
    lines(tmp_path, {"question_id": "c3", "image": "c3.jpg", "text": PROMPT})
    with pytest.raises(InputError, match=r"prompts\.jsonl: line 1: the annotation file has no such question"):
        QuestionLines(path, tmp_path, annotations=tmp_path / "answers.json")


def test_vqa_joins_by_id(tmp_path: Path) -> None:
    content = {"annotations": [{"question_id": 7, "answers": [{"answer": "red", "answer_id": k} for k in range(10)]}]}
    (tmp_path / "answers.json").write_text(json.dumps(content))
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"id": 7, "image": "x/b.jpg", "boxes": [[0, 0, 4, 4]], "scores": [1], "labels": ["bus"]}])
    )
    good = {"question_id": 7, "image": "x/b.jpg", "text": "What colour?"}
    extra: dict[str, Any] = {"annotations": tmp_path / "answers.json", "boxes": [tmp_path / "boxes.json"]}
    data = QuestionLines(lines(tmp_path, good), tmp_path, **extra)
    assert (data[0].answers, data[0].boxes[0].labels) == (("red",) * 10, ("bus",))
    assert question_ids(tmp_path / "prompts.jsonl") == [7]
    for record, fault in (
        ("{torn", "is not JSON"),
        (good | {"image": "../b.jpg"}, "is not a path below the folder of images"),
        (good | {"image": "y/b.jpg"}, "the box file has this id for another picture only"),
        (good | {"text": ""}, '"text" is empty'),
        (good | {"question_id": 8}, "the annotation file has no such question"),
        ({"question_id": 7, "text": "a"}, 'has no key "image"'),
        ([], "is not an object"),
    ):
        path = lines(tmp_path, good, record)
        with pytest.raises(InputError, match=rf"prompts\.jsonl: line 2: .*{fault}"):
            QuestionLines(path, tmp_path, **extra)
        assert len(QuestionLines(path, tmp_path, **extra, skip_bad=True)) == 1
    # `foveate boxes` names pictures by their files.
    (tmp_path / "boxes.json").write_text(json.dumps([{"id": "b", "boxes": [], "scores": [], "labels": []}]))
    assert QuestionLines(lines(tmp_path, good), tmp_path, **extra)[0].boxes == (BoxSet((), (), ()),)
    (tmp_path / "answers.json").write_text(json.dumps({"questions": []}))
    with pytest.raises(InputError, match='has neither "data"'):
        QuestionLines(lines(tmp_path, good), tmp_path, annotations=tmp_path / "answers.json")


def test_videos_are_found_by_name(tmp_path: Path) -> None:
    asked = [
        {"video_name": "clip1", "question": "what runs?", "question_id": "v_1_0"},
        {"video_name": "frames", "question": "who?", "question_id": "v_2_0"},
        {"video_name": "gone", "question": "where?", "question_id": "v_3_0"},
    ]
    told = [{"answer": word, "type": 3, "question_id": f"v_{k}_0"} for k, word in ((3, "here"), (1, "dog"), (2, "man"))]
    (tmp_path / "q.json").write_text(json.dumps(asked))
    (tmp_path / "a.json").write_text(json.dumps(told))
    (tmp_path / "videos/frames").mkdir(parents=True)
    (tmp_path / "videos/clip1.avi").write_bytes(b"")
    (tmp_path / "videos/clip1.txt").write_bytes(b"")
    frame = {"boxes": [[0, 0, 2, 2]], "scores": [0.5], "labels": ["a"]}
    boxes = [{"video": f"{name}.mp4", "frames": [frame] * 8} for name in ("clip1", "frames")]
    boxes.append({"id": "gone", "frames": [frame] * 8})
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    data = VideoQuestions(
        tmp_path / "q.json",
        tmp_path / "videos",
        annotations=tmp_path / "a.json",
        boxes=[tmp_path / "boxes.json"],
    )
    # By id, whatever the order of the answers; a video that is not there keeps its name.
    assert [one.answers for one in data] == [("dog",), ("man",), ("here",)]
    assert [data.source(k) for k in range(3)] == [
        tmp_path / "videos" / name for name in ("clip1.avi", "frames", "gone")
    ]
    assert len(data[0].boxes) == 8
    (tmp_path / "a.json").write_text(json.dumps(told[1:]))
    with pytest.raises(InputError, match=r"q\.json: question 'v_3_0' \(number 2\): the annotation file has no such"):
        VideoQuestions(tmp_path / "q.json", tmp_path / "videos", annotations=tmp_path / "a.json")
