"""Readers of the benchmarks that models which answer questions are compared by (MG-LLaVA spec 5.1).

| class | files | benchmarks |
| --- | --- | --- |
| `ChoiceTable` | VLMEvalKit's .tsv, or .parquet | MMBench, SEED-Bench, MMStar, ScienceQA, AI2D |
| `AnswerTable` | the same with open answers | DocVQA |
| `QuestionLines` | LLaVA's .jsonl of prompts beside the annotations of people's answers | TextVQA, VQAv2 |
| `VideoQuestions` | Video-ChatGPT's JSON of questions and JSON of answers | MSVD-QA, MSRVTT-QA |
"""

from __future__ import annotations

import ast
import hashlib
import json
import marshal
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from foveate.data.coco import top_level_list
from foveate.data.llava import BoxIndex, record_id, relative_path
from foveate.data.records import BadRecord, RecordLog, get_list, get_text, iterate_json_list, name_of, read_json
from foveate.data.samples import BenchmarkQuestion, BoxSet
from foveate.data.tables import LONGEST_REFERENCE, Row, Table, decode_picture, open_table, require_columns
from foveate.errors import InputError
from foveate.metrics.vqa import MAIN_ROWS
from foveate.vision.video import ANIMATIONS, CONTAINERS


class QuestionRecord(NamedTuple):
    """A `BenchmarkQuestion` in plain values; `image` and `video` are paths below the folder of pictures."""

    row: int
    name: str
    question_id: int | str
    question: str
    picture: str
    image: str | None = None
    video: str | None = None
    hint: str = ""
    options: tuple[tuple[str, str], ...] = ()
    answers: tuple[str, ...] = ()
    category: str = ""
    l2_category: str = ""
    split: str = ""
    boxes: tuple[Any, ...] = ()
    place: int = -1
    """Of the row of the table that has the picture."""


class Benchmark(Sequence[BenchmarkQuestion]):
    """The questions of a benchmark, by index. Its files are read and checked once; each question rests as one compact
    byte string, and pictures are read when they are asked for.

    Attributes:
        path: the file of questions.
        answered: whether the file, or the one beside it, says what is right.
        skipped: broken records that were left out because of `skip_bad`, by reason.
        dropped: records that the rules of the format leave out, by reason.
    """

    path: Path
    answered: bool

    def __init__(self, path: Path, images: Path, skip_bad: bool) -> None:
        self.path, self.images = path, images
        log = RecordLog(skip_bad)
        self._records = [marshal.dumps(_plain(record)) for record in self._read(log)]
        self.skipped: Counter[str] = log.skipped
        self.dropped: Counter[str] = log.dropped
        log.report(str(path))
        if not self._records:
            raise InputError(f"{path} has no usable question; is it the file of another benchmark?")

    @abstractmethod
    def _read(self, log: RecordLog) -> Iterator[QuestionRecord]:
        """The questions in their order, broken records told to `log`."""

    def source(self, index: int) -> Path | bytes:
        """What is looked at: a file, or the encoded picture.

        Raises:
            InputError: the table has been changed since it was opened.
        """
        question = self[index]
        found = question.image or question.video
        assert found is not None
        return found

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> BenchmarkQuestion: ...
    @overload
    def __getitem__(self, index: slice) -> list[BenchmarkQuestion]: ...
    def __getitem__(self, index: int | slice) -> BenchmarkQuestion | list[BenchmarkQuestion]:
        """The question at `index`, counted from the end if negative; a slice gives a list.

        Raises:
            IndexError: there is no such question.
        """
        if isinstance(index, slice):
            return [self._sample(record) for record in self._records[index]]
        return self._sample(self._records[index])

    def _sample(self, record: bytes) -> BenchmarkQuestion:
        values = QuestionRecord(*marshal.loads(record))._asdict()
        del values["place"]
        for kind in ("image", "video"):
            values[kind] = None if values[kind] is None else self.images / values[kind]
        values["boxes"] = tuple(BoxSet(*frame) for frame in values["boxes"])
        return BenchmarkQuestion(**values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}): {len(self)} questions"


def _plain(record: QuestionRecord) -> tuple[Any, ...]:
    return tuple(record)  # marshal takes exact tuples only, not named ones


class _TableBenchmark(Benchmark):
    """Questions of a table whose column "image" has the pictures, in base64 or as the index of the row that has it.

    Args:
        path: .tsv or, where pyarrow is installed, .parquet.
        split: only the rows whose column "split" says so; None for all.
        boxes: box files; records are found by a row's index, or that of its main row (index modulo 1,000,000).
        skip_bad: count broken rows in `skipped` instead of raising.

    Raises:
        InputError: the file is missing or damaged, a column is missing, there is no such split, or a row is broken and
            `skip_bad` is off (names file and row).
    """

    def __init__(
        self, path: Path | str, *, split: str | None = None, boxes: Sequence[Path] = (), skip_bad: bool = False
    ) -> None:
        self.split, self._box_files = split, tuple(boxes)
        path = Path(path)
        super().__init__(path, path.parent, skip_bad)

    def source(self, index: int) -> bytes:
        record = QuestionRecord(*marshal.loads(self._records[index]))
        content = decode_picture(self._table.row(record.place).cells["image"])
        if _digest(content) != record.picture:
            raise InputError(
                f"{self.path}: {record.name}: the picture has been changed while it was read; start again."
            )
        return content

    def _read(self, log: RecordLog) -> Iterator[QuestionRecord]:
        self._table: Table = open_table(self.path, log)
        require_columns(self._table, ("index", "image", "question", *(["split"] * (self.split is not None))))
        known = BoxIndex(self._box_files, log) if self._box_files else None
        rows: list[tuple[QuestionRecord, int | None]] = []  # with the index that the picture is found under
        pictures: dict[int, tuple[int, str]] = {}  # index -> place of the row that has the picture, and its digest
        taken: set[int] = set()
        splits: set[str] = set()
        for row in self._table.rows():
            try:
                index = _index(row)
                if index in taken:
                    raise BadRecord("the index comes a second time", index)
                taken.add(index)
                reference = self._picture(row, index, pictures)
                splits.add(row.cells.get("split", ""))
                if self.split is not None and row.cells["split"] != self.split:
                    log.dropped["rows of another split"] += 1
                    continue
                rows.append((self._record(row, index, known), reference))
            except BadRecord as error:
                log.bad(self.path, row.name, error)
        if self.split is not None and not rows and taken:
            raise InputError(
                f"{self.path} has no row of the split {self.split!r}; its splits are {', '.join(sorted(splits))}."
            )
        self.answered = any(record.answers for record, _ in rows)
        for record, reference in rows:
            try:
                if self.answered and not record.answers:
                    raise BadRecord("has no answer, while others have")
                found = pictures.get(int(record.question_id) if reference is None else reference)
                if found is None:
                    raise BadRecord('"image" is the index of a row that has no picture', reference)
                yield record._replace(place=found[0], picture=found[1])
            except BadRecord as error:
                log.bad(self.path, record.name, error)

    @staticmethod
    def _picture(row: Row, index: int, pictures: dict[int, tuple[int, str]]) -> int | None:
        """Notes the row's picture, or gives the index of the row that has it."""
        cell = row.cells["image"]
        if isinstance(cell, str) and len(cell) <= LONGEST_REFERENCE:
            if not cell.strip().isdecimal():
                raise BadRecord('"image" is neither a picture nor the index of a row', cell)
            return int(cell)
        pictures[index] = (row.place, _digest(decode_picture(cell)))
        return None

    def _record(self, row: Row, index: int, known: BoxIndex | None) -> QuestionRecord:
        question = row.cells["question"]
        if not question.strip():
            raise BadRecord("has no question")
        options, answers = self._answers(row)
        return QuestionRecord(
            row=row.number,
            name=row.name,
            question_id=index,
            question=question,
            picture="",
            hint=row.cells.get("hint", ""),
            options=options,
            answers=answers,
            category=row.cells.get("category", ""),
            l2_category=row.cells.get("l2-category", ""),
            split=row.cells.get("split", ""),
            boxes=() if known is None else _boxes_of_row(known, index),
        )

    @abstractmethod
    def _answers(self, row: Row) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        """Options and right answers."""


class ChoiceTable(_TableBenchmark):
    """Multiple-choice questions: columns index, image, question, a column for each option (A, B, ...), and, where there
    are any, hint, answer, category, l2-category, split.

    In circular files the options of a question are turned round in further rows, whose index is larger by multiples of
    1,000,000.
    """

    def _answers(self, row: Row) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        letters = [name for name in self._table.columns if len(name) == 1 and name in string.ascii_uppercase]
        options = tuple((letter, row.cells[letter]) for letter in sorted(letters) if row.cells[letter].strip())
        if letters and not options:
            raise BadRecord("has no options")
        answer = row.cells.get("answer", "").strip()
        if not answer:
            return options, ()
        allowed = [letter for letter, _ in options] or list(string.ascii_uppercase)
        if answer not in allowed:
            raise BadRecord(f'"answer" is none of the options {", ".join(allowed)}', answer)
        return options, (answer,)


class AnswerTable(_TableBenchmark):
    """Open questions: columns index, image, question and answer, a list of texts as Python or JSON writes it, or one
    text."""

    def _answers(self, row: Row) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        cell = row.cells.get("answer", "")
        if not cell.strip():
            return (), ()
        if not cell.lstrip().startswith("["):
            return (), (cell,)
        try:
            listed = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            listed = None
        if not isinstance(listed, list) or not listed or not all(isinstance(answer, str) for answer in listed):
            raise BadRecord('"answer" is not a list of texts', cell)
        return (), tuple(listed)


def _index(row: Row) -> int:
    text = row.cells["index"].strip()
    if not text.isdecimal() or len(text) > 18:
        raise BadRecord('"index" is not a whole number', text)
    return int(text)


def _digest(picture: bytes) -> str:
    return hashlib.blake2b(picture, digest_size=16).hexdigest()


def _boxes_of_row(known: BoxIndex, index: int) -> tuple[Any, ...]:
    try:
        found = known.of(str(index))
    except BadRecord:
        if index < MAIN_ROWS:
            raise
        found = known.of(str(index % MAIN_ROWS))  # a turned row has the picture of its main row
    return _boxes(found, "boxes")


def _boxes_of_line(known: BoxIndex, question_id: str, image: str) -> tuple[Any, ...]:
    try:
        return _boxes(known.of(question_id, image), "boxes")
    except BadRecord as error:
        try:
            return _boxes(known.of(Path(image).stem, image), "boxes")
        except BadRecord:
            raise error from None


def _boxes(found: tuple[str, tuple[Any, ...]], wanted: str) -> tuple[Any, ...]:
    if found[0] != wanted:
        raise BadRecord(f"its box record is not of {'a video' if wanted == 'frames' else 'an image'}", found[0])
    return found[1]


# -------------------------------------------------------------------- lines


class _ListBenchmark(Benchmark):
    """Questions of a JSON file whose answers and pictures are in files beside it."""

    def __init__(
        self,
        path: Path | str,
        images: Path | str,
        *,
        annotations: Path | None = None,
        boxes: Sequence[Path] = (),
        skip_bad: bool = False,
    ) -> None:
        self._annotations, self._box_files = annotations, tuple(boxes)
        self.answered = annotations is not None
        super().__init__(Path(path), Path(images), skip_bad)


class QuestionLines(_ListBenchmark):
    """LLaVA's file of prompts, `{"question_id", "image", "text"}` a line, and people's answers beside it.

    Args:
        path: .jsonl; "category" of a line counts where it is there.
        images: folder of the images.
        annotations: TextVQA's `{"data": [{"image_id", "question", "answers"}]}`, joined by image and question as
            LLaVA does, or VQA's `{"annotations": [{"question_id", "answers": [{"answer"}]}]}`, joined by id; None
            where there are none.
        boxes: box files; records are found by question id, or by the image's name without its ending.
        skip_bad: count broken lines in `skipped` instead of raising.

    Raises:
        InputError: a file is missing or damaged, or a line is broken and `skip_bad` is off (names file and line).
    """

    def _read(self, log: RecordLog) -> Iterator[QuestionRecord]:
        known = BoxIndex(self._box_files, log) if self._box_files else None
        answers = None if self._annotations is None else _AnswerIndex(self._annotations, log)
        for number, record in enumerate(_lines(self.path)):
            name = f"line {number + 1}"
            try:
                if isinstance(record, ValueError):
                    raise BadRecord(f"is not JSON ({record})")
                key, image = record_id(record, "question_id"), relative_path(record, "image")
                text = get_text(record, "text")
                if image is None:
                    raise BadRecord('has no key "image"')
                if not text.strip():
                    raise BadRecord('"text" is empty')
                yield QuestionRecord(
                    row=number + 1,
                    name=name,
                    question_id=record["question_id"],
                    question=text,
                    picture=image,
                    image=image,
                    answers=() if answers is None else answers.of(record["question_id"], text),
                    category=record.get("category") if isinstance(record.get("category"), str) else "",
                    boxes=() if known is None else _boxes_of_line(known, key, image),
                )
            except BadRecord as error:
                log.bad(self.path, name, error)


def question_ids(path: Path) -> list[int | str]:
    """The ids of a file of prompts, in their order.

    Raises:
        InputError: the file is missing or damaged; names the line.
    """
    found: list[int | str] = []
    for number, record in enumerate(_lines(path)):
        try:
            if isinstance(record, ValueError):
                raise BadRecord(f"is not JSON ({record})")
            record_id(record, "question_id")
            found.append(record["question_id"])
        except BadRecord as error:
            raise InputError(f"{path}: line {number + 1}: {error}; get the file again.") from error
    return found


def plain_question(prompt: str) -> str:
    """The question of one of LLaVA's prompts for TextVQA, by which its annotation is found: the first line that is no
    "Reference OCR token: ..."."""
    lines = prompt.strip().split("\n")
    rest = [line for line in lines if not line.startswith("Reference OCR token:")]
    return (rest or lines)[0].strip().lower()


class _AnswerIndex:
    """People's answers in the layout of TextVQA or of VQA."""

    def __init__(self, path: Path, log: RecordLog) -> None:
        content = read_json(path, dict)
        self._textvqa = "data" in content
        if not self._textvqa and "annotations" not in content:
            raise InputError(f'{path} has neither "data" (TextVQA) nor "annotations" (VQA); is it another file?')
        self._found: dict[Any, bytes] = {}
        for number, record in enumerate(top_level_list(path, content, "data" if self._textvqa else "annotations")):
            try:
                listed = get_list(record, "answers")
                if not self._textvqa:
                    listed = [get_text(answer, "answer") for answer in listed]
                if not listed or not all(isinstance(answer, str) for answer in listed):
                    raise BadRecord('"answers" is not a list of texts', listed)
                if self._textvqa:
                    key: Any = (record_id(record, "image_id"), get_text(record, "question").strip().lower())
                else:
                    key = record_id(record, "question_id")
                self._found[key] = marshal.dumps(tuple(listed))
            except BadRecord as error:
                log.bad(path, f"annotation {name_of(record, 'question_id')} (number {number})", error)

    def of(self, question_id: int | str, text: str) -> tuple[str, ...]:
        key: Any = (str(question_id), plain_question(text)) if self._textvqa else str(question_id)
        if key not in self._found:
            raise BadRecord("the annotation file has no such question", key)
        return marshal.loads(self._found[key])


def _lines(path: Path) -> Iterator[Any]:
    """The values of a .jsonl, one by one; a line that is not JSON as the error that it gives."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield ValueError(str(error))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; docs/datasets.md says which files a benchmark needs.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


# -------------------------------------------------------------------- videos


class VideoQuestions(_ListBenchmark):
    """Video-ChatGPT's and Video-LLaVA's form of MSVD-QA and MSRVTT-QA.

    Args:
        path: a JSON list of `{"video_name", "question", "question_id"}`.
        images: folder of the videos' files, or of folders of frames, found by name with any ending.
        annotations: a JSON list of `{"answer", "question_id"}`; None where there is none.
        boxes: box files of `{"video", "frames": [{boxes, scores, labels}, ...]}`, found by the name without its ending.
        skip_bad: count broken records in `skipped` instead of raising.

    Raises:
        InputError: a file is missing or damaged, or a record is broken and `skip_bad` is off (names file and record).
    """

    def _read(self, log: RecordLog) -> Iterator[QuestionRecord]:
        known = BoxIndex(self._box_files, log, by_stem=True) if self._box_files else None
        answers = {} if self._annotations is None else _short_answers(self._annotations, log)
        files = _files_by_name(self.images)
        for number, record in enumerate(iterate_json_list(self.path)):
            name = f"question {name_of(record, 'question_id')} (number {number})"
            try:
                key, question = record_id(record, "question_id"), get_text(record, "question")
                video = relative_path(record, "video_name")
                if video is None:
                    raise BadRecord('has no key "video_name"')
                if not question.strip():
                    raise BadRecord('"question" is empty')
                if self.answered and key not in answers:
                    raise BadRecord("the annotation file has no such question", key)
                # A video that is not there keeps its name, which the error says.
                video = files.get(video) or files.get(Path(video).stem) or video
                yield QuestionRecord(
                    row=number + 1,
                    name=name,
                    question_id=record["question_id"],
                    question=question,
                    picture=video,
                    video=video,
                    answers=(answers[key],) if self.answered else (),
                    boxes=() if known is None else _boxes(known.of(Path(video).stem), "frames"),
                )
            except BadRecord as error:
                log.bad(self.path, name, error)


def _short_answers(path: Path, log: RecordLog) -> dict[str, str]:
    found = {}
    for number, record in enumerate(iterate_json_list(path)):
        try:
            found[record_id(record, "question_id")] = get_text(record, "answer")
        except BadRecord as error:
            log.bad(path, f"answer {name_of(record, 'question_id')} (number {number})", error)
    return found


def _files_by_name(folder: Path) -> dict[str, str]:
    """Files and folders of frames by name, and by name without a video's ending."""
    if not folder.is_dir():
        return {}
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    stems = {Path(name).stem: name for name in names if Path(name).suffix.lower() in (*CONTAINERS, *ANIMATIONS)}
    return stems | {name: name for name in names}
