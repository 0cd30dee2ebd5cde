"""The published evaluations of models that answer questions, on the benchmarks' own files (spec 5, docs/protocols.md).

| protocol | asks | score |
| --- | --- | --- |
| mmbench, seedbench, mmstar, scienceqa, ai2d | for an option's letter | accuracy; circular files: all rows right |
| textvqa | LLaVA's prompt | VQA soft accuracy |
| docvqa | for a word or phrase | ANLS |
| vqav2 | LLaVA's prompt | a file for the server; VQA soft accuracy where people's answers are given |
| msvd, msrvtt | the question | exact and normalised match, and a file for the GPT judge, which is not asked here |

Any predictor with `ask(images, questions, boxes=..., batch_size=...)` can be evaluated.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from foveate.data.benchmarks import AnswerTable, Benchmark, ChoiceTable, QuestionLines, VideoQuestions, question_ids
from foveate.data.samples import BenchmarkQuestion
from foveate.data.tables import write_xlsx
from foveate.errors import InputError
from foveate.files import ResumableLines, atomic_write, file_states
from foveate.metrics.vqa import (
    MAIN_ROWS,
    anls,
    circular_accuracy,
    exact_match,
    extract_letters,
    normalise_answer,
    normalised_match,
    vqa_accuracy,
)
from foveate.training.recipes import RecipePath, RecipeSection
from foveate.vision.images import load_image

LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
LETTER_REQUEST_CHINESE = "请直接回答选项字母。"
SHORT_REQUEST = "Answer the question using a single word or phrase."
NO_LIMIT = 10**9
"""Of boxes, where there is none."""
RULES = ("strict", "robust")

_CHINESE = re.compile("[\u4e00-\u9fff]")
_JUDGE = "exact and normalised match, not comparable with published figures, which a GPT judges"

Name = Literal["mmbench", "seedbench", "mmstar", "scienceqa", "ai2d", "textvqa", "docvqa", "vqav2", "msvd", "msrvtt"]


Score = Callable[[str, BenchmarkQuestion], float]
"""Of what was said to a question, 0 to 1."""


@dataclass(frozen=True)
class _Protocol:
    """What a protocol reads and how an answer is scored.

    Attributes:
        reads: "choice", "answers", "lines" or "videos".
        scores: names of the figures of an answer -> their functions of the answer and the question.
        server: whether answers go to a server where the file does not say what is right.
    """

    reads: str
    scores: Mapping[str, Score]
    server: bool = False


def letter(said: str, question: BenchmarkQuestion, rule: str) -> str:
    """The option's letter in an answer, "" for none."""
    return extract_letters(said, rule=rule, options="".join(name for name, _ in question.options))


def _by_letter(rule: str) -> Score:
    return lambda said, question: float(letter(said, question, rule) in question.answers)


def _by_answers(score: Callable[[str, Sequence[str]], float]) -> Score:
    return lambda said, question: float(score(said, question.answers))


_LETTERS = {rule: _by_letter(rule) for rule in RULES}
_SOFT = {"accuracy": _by_answers(vqa_accuracy)}
_MATCHES = {"exact": _by_answers(exact_match), "normalised": _by_answers(normalised_match)}
PROTOCOLS: dict[str, _Protocol] = {
    "mmbench": _Protocol("choice", _LETTERS, server=True),
    **dict.fromkeys(("seedbench", "mmstar", "scienceqa", "ai2d"), _Protocol("choice", _LETTERS)),
    "textvqa": _Protocol("lines", _SOFT),
    "docvqa": _Protocol("answers", {"anls": _by_answers(anls)}),
    "vqav2": _Protocol("lines", _SOFT, server=True),
    **dict.fromkeys(("msvd", "msrvtt"), _Protocol("videos", _MATCHES)),
}

# Which settings a protocol has beyond those that all have.
_OWN: dict[str, tuple[str, ...]] = {
    "choice": ("split", "letters"),
    "answers": ("split",),
    "lines": ("annotations", "images", "upload_questions"),
    "videos": ("annotations", "images"),
}


class ProtocolSettings(RecipeSection):
    """Which protocol on which files. `dataset` is the name that the report prints."""

    name: Name
    dataset: str = Field(min_length=1, description="what the data is called in tables: TextVQA val, MMBench dev, ...")
    root: RecipePath
    file: str = Field(min_length=1, description="the questions, from `root`: .tsv, .parquet, .jsonl or .json")
    annotations: str | None = Field(None, description="textvqa, vqav2, msvd, msrvtt: the right answers, from `root`")
    images: str = Field("images", description="textvqa, vqav2, msvd, msrvtt: folder of pictures or videos, from `root`")
    split: str | None = Field(None, description="of a table: only rows whose column `split` says so")
    questions: int | None = Field(None, gt=0, description="only the first so many questions, for a quick look")
    skip_bad: bool = Field(False, description="leave broken rows and pictures out and count them")
    letters: Literal["strict", "robust"] = Field(
        "strict", description="how an option's letter is read; strict is the published rule. Both are reported"
    )
    boxes: Literal["none", "proposer"] | RecipePath = Field(
        "none", description="the proposer's, or a box file in MG-LLaVA's layout"
    )
    proposer: str | None = Field(None, description="name or folder of the proposer, where `boxes` is proposer")
    box_limit: int | None = Field(100, gt=0, description="boxes of a picture before the limit rule; null: no limit")
    upload_questions: str | None = Field(
        None, description="vqav2: file of all prompts that the server wants an answer for (test2015), from `root`"
    )

    @model_validator(mode="after")
    def _fits(self) -> ProtocolSettings:
        reads = PROTOCOLS[self.name].reads
        for field in sorted({name for names in _OWN.values() for name in names} - set(_OWN[reads])):
            if field in self.model_fields_set and getattr(self, field) is not None:
                raise ValueError(f"{field} is not for {self.name}; remove it")
        if self.upload_questions is not None and self.name != "vqav2":
            raise ValueError(f"upload_questions is not for {self.name}; remove it")
        if self.name in ("textvqa", "msvd", "msrvtt") and self.annotations is None:
            raise ValueError(f"{self.name} needs annotations, the file of right answers")
        if (self.boxes == "proposer") != (self.proposer is not None):
            raise ValueError("give proposer, its name, where boxes is proposer, and nowhere else")
        return self


def evaluate_protocol(
    settings: ProtocolSettings,
    predictor: Any,
    output: Path,
    *,
    model: Path,
    batch_size: int = 8,
    max_new_tokens: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask the questions of a benchmark and score the answers.

    Writes into `output`: `predictions.jsonl`, a line a question as they come (an interrupted evaluation goes on after
    its last line, if nothing that the lines depend on has changed); `results.md`, the figures by category; and what
    goes to a server or a judge: `submission.xlsx` (mmbench), `upload.json` (vqav2), `pred.json` and `pred.jsonl`
    (msvd, msrvtt).

    Args:
        predictor: answers by `ask(images, questions, boxes=..., batch_size=...)`, greedily and with at most
            `max_new_tokens` tokens where it takes these options. With `settings.boxes` "proposer" it has that proposer.
            A limit of boxes in its model's configuration is the settings' for the length of the call.
        model: the folder that it was loaded from; a change of its files starts the evaluation anew.
        progress: called with (questions done, questions in all).

    Returns:
        What was measured (protocol, dataset, numbers of questions and pictures, box source, generation), then the
        figures, times 100 as papers print them, and what was left out.

    Raises:
        InputError: a file is missing or damaged (the sentence names file and row), a picture is missing or broken, or
            the file does not say what is right and no server does.
    """
    protocol = PROTOCOLS[settings.name]
    ask = _asking(predictor, batch_size, max_new_tokens, model)
    data = _open(settings)
    if not data.answered and not protocol.server:
        raise InputError(f"{data.path} does not say what is right, and no server does; give a split with answers.")
    left_out = Counter(data.skipped)
    jobs = _jobs(data, settings, left_out)
    wanted = _upload_ids(settings, data)
    with ExitStack() as stack:
        _limit_boxes(stack, predictor, settings.box_limit)
        # Scored before the lines get their final name: if that fails, the next run still has them.
        lines = stack.enter_context(_lines(output / "predictions.jsonl", settings, model, ask, data, jobs))
        said, bad = _ask_all(ask, data, jobs, lines, settings, progress)
        left_out.update(["question that could not be asked"] * len(bad))
        kept = _whole(protocol, data, sorted(said), bad, left_out)
        if not kept:
            raise InputError(f"no question of {data.path} could be asked; run without skip_bad to see why.")
        questions = [replace(data[index], boxes=()) for index in kept]
        texts = [said[index]["said"] for index in kept]
        groups = _groups(protocol, questions, texts) if data.answered else []
        files = _write_files(output, settings, questions, texts, groups, wanted)
        report = {
            "protocol": settings.name,
            "dataset": settings.dataset,
            "files": str(data.path),
            "questions": len(_mains(protocol, questions)),
            "rows": len(questions),
            "pictures": len({one.picture for one in questions}),
            "box_source": _box_source(settings),
            "box_limit": settings.box_limit or "none",
            "generation": ask.generation,
            "cut_off": sum(said[index].get("finish") == "length" for index in kept),
        }
        if left_out:
            report["left_out"] = dict(left_out)
        return report | _figures(settings, questions, texts, groups) | files


# -------------------------------------------------------------------- data


def _open(settings: ProtocolSettings) -> Benchmark:
    root, skip_bad = settings.root, settings.skip_bad
    boxes = [settings.boxes] if isinstance(settings.boxes, Path) else []
    path = root / settings.file
    reads = PROTOCOLS[settings.name].reads
    if reads in ("choice", "answers"):
        table = ChoiceTable if reads == "choice" else AnswerTable
        return table(path, split=settings.split, boxes=boxes, skip_bad=skip_bad)
    annotations = None if settings.annotations is None else root / settings.annotations
    files = QuestionLines if reads == "lines" else VideoQuestions
    return files(path, root / settings.images, annotations=annotations, boxes=boxes, skip_bad=skip_bad)


def _upload_ids(settings: ProtocolSettings, data: Benchmark) -> list[int | str]:
    """What the server of VQAv2 wants an answer for; known before hours of asking."""
    if settings.name != "vqav2":
        return []
    own = [data[place].question_id for place in range(len(data))]
    if settings.upload_questions is None:
        return own
    path = settings.root / settings.upload_questions
    wanted = question_ids(path)
    strange = set(own).difference(wanted)
    if strange:
        raise InputError(f"{path} lacks the question {next(iter(strange))!r}; give the file of all that are uploaded.")
    return wanted


def _jobs(data: Benchmark, settings: ProtocolSettings, left_out: Counter[str]) -> list[int]:
    """The places of the questions to ask, those about one picture behind each other: it is encoded once."""
    circular = PROTOCOLS[settings.name].reads == "choice"
    numbers: dict[int, int] = {}  # of questions, in their order
    pictures: dict[str, int] = {}
    missing: dict[Path, str] = {}
    mains: set[int] = set()
    places: list[tuple[int, int]] = []
    for place in range(len(data)):
        question = data[place]
        own = int(question.question_id) % MAIN_ROWS if circular else place
        if circular and own == question.question_id:
            mains.add(own)
        if numbers.setdefault(own, len(numbers)) >= (settings.questions or NO_LIMIT):
            continue
        rank = pictures.setdefault(question.picture, len(pictures))
        file = question.image or question.video
        if file is not None and (file in missing or not file.exists()):
            missing.setdefault(file, question.name)
            left_out["picture missing"] += 1
            continue
        places.append((rank, place))
    orphan = next((own for own in numbers if own not in mains), None) if circular else None
    if orphan is not None and not data.skipped:
        raise InputError(
            f"{data.path}: the question {orphan} has turned rows, but none with an index below {MAIN_ROWS}."
        )
    if missing and (not settings.skip_bad or not places):
        first = next(iter(missing))
        raise InputError(
            f"{len(missing)} of {len(pictures)} pictures are missing, the first is {first} ({data.path}: "
            f"{missing[first]}); put them there, or set skip_bad to evaluate without them."
        )
    return [place for _, place in sorted(places)]


def _whole(
    protocol: _Protocol, data: Benchmark, places: list[int], bad: Mapping[int, str], left_out: Counter[str]
) -> list[int]:
    """The places without those of circular questions of which a row is left out: a turn less is easier to pass."""
    if protocol.reads != "choice" or not (bad or data.skipped):
        return places
    own = {place: int(data[place].question_id) for place in places}
    if max(own.values(), default=0) < MAIN_ROWS:
        return places
    rows = Counter(index % MAIN_ROWS for index in own.values())
    broken = {int(data[place].question_id) % MAIN_ROWS for place in bad}
    if data.skipped:  # which row was broken is not known; a whole question has as many as it has options
        broken |= {own[place] % MAIN_ROWS for place in own if rows[own[place] % MAIN_ROWS] < len(data[place].options)}
    if lost := len(broken.intersection(rows)):
        left_out["circular question of which a row is left out"] += lost
    return [place for place in places if own[place] % MAIN_ROWS not in broken]


# -------------------------------------------------------------------- asking


def prompt(name: str, question: BenchmarkQuestion) -> str:
    """What a benchmark asks, without the placeholder of the picture (spec 5.1).

    Multiple choice: hint, question, a line an option, and the request for a letter, in Chinese where the rest is.
    DocVQA: the question and the request for a word or phrase. Others: as the file has it.
    """
    reads = PROTOCOLS[name].reads
    if reads == "answers":
        return f"{question.question}\n{SHORT_REQUEST}"
    if reads != "choice":
        return question.question
    hint = f"{question.hint}\n" if question.hint.strip() else ""
    options = "".join(f"{name}. {text}\n" for name, text in question.options)
    text = f"{hint}{question.question}\n{options}"
    return text + (LETTER_REQUEST_CHINESE if _CHINESE.search(text) else LETTER_REQUEST)


@dataclass(frozen=True)
class _Asking:
    """A predictor's `ask` with the options that it takes; `generation` says them."""

    call: Callable[..., Any]
    batch_size: int
    options: dict[str, Any]

    @property
    def generation(self) -> str:
        greedy = "greedy" if self.options.get("temperature") == 0.0 else "the model's own decoding"
        most = self.options.get("max_new_tokens")
        return greedy if most is None else f"{greedy}, at most {most} new tokens"


def _asking(predictor: Any, batch_size: int, max_new_tokens: int, model: Path) -> _Asking:
    call = getattr(predictor, "ask", None)
    if not callable(call):
        raise InputError(f"{model} answers no questions; give a model that `foveate.load` gives an `ask`.")
    taken = inspect.signature(call).parameters
    any_option = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    options = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
    return _Asking(call, batch_size, {name: value for name, value in options.items() if any_option or name in taken})


def _limit_boxes(stack: ExitStack, predictor: Any, limit: int | None) -> None:
    config: Any = getattr(getattr(predictor, "model", None), "config", None)
    if hasattr(config, "box_limit"):
        stack.callback(setattr, config, "box_limit", config.box_limit)
        config.box_limit = limit or NO_LIMIT


def _box_source(settings: ProtocolSettings) -> str:
    if settings.boxes == "proposer":
        return f"proposer {settings.proposer}"
    return settings.boxes if isinstance(settings.boxes, str) else settings.boxes.name


def _lines(
    path: Path, settings: ProtocolSettings, model: Path, ask: _Asking, data: Benchmark, jobs: Sequence[int]
) -> ResumableLines:
    """The file of predictions, with the finished lines of an interrupted evaluation of the same."""
    digest = hashlib.sha256()
    for place in jobs:
        question = data[place]
        digest.update(repr((question, prompt(settings.name, question))).encode("utf-8", "surrogatepass"))
    chosen = [settings.name, _box_source(settings), settings.box_limit, ask.options]
    return ResumableLines.go_on(path, key=json.dumps([*chosen, str(model), file_states(model), digest.hexdigest()]))


def _ask_all(
    ask: _Asking,
    data: Benchmark,
    jobs: Sequence[int],
    lines: ResumableLines,
    settings: ProtocolSettings,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """The lines of what was said, and the reasons why questions could not be asked, by place."""
    said = _finished(lines, data, jobs)
    bad: dict[int, str] = {}
    waiting = [place for place in jobs if place not in said]
    for start in range(0, len(waiting), ask.batch_size):
        for place, answer in _answers(ask, data, waiting[start : start + ask.batch_size], settings):
            question = data[place]
            line: dict[str, Any] = {"row": question.row, "id": question.question_id}
            if isinstance(answer, InputError):
                if not settings.skip_bad:
                    raise InputError(
                        f"{data.path}: {question.name}: {answer} Or set skip_bad to leave it out."
                    ) from answer
                bad[place] = line["error"] = str(answer)
            else:
                said[place] = line | _answer(settings.name, question, answer)
            lines.append(json.dumps(said.get(place, line), ensure_ascii=False, allow_nan=False))
        if progress is not None:
            progress(len(said) + len(bad), len(jobs))
    return said, bad


def _finished(lines: ResumableLines, data: Benchmark, jobs: Sequence[int]) -> dict[int, dict[str, Any]]:
    places = {data[place].row: place for place in jobs}
    said: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines.finished, 1):
        try:
            record = json.loads(line)
            if "error" not in record:
                said[places[record["row"]]] = record | {"said": str(record["said"])}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"line {number} of the interrupted evaluation {lines.partial} is damaged; delete the file."
            ) from error
    return said


def _answer(name: str, question: BenchmarkQuestion, answer: Any) -> dict[str, Any]:
    """The fields of a line: what was asked, what is right, what was said and what that scores."""
    text = str(answer)
    line: dict[str, Any] = {
        "question": prompt(name, question),
        "category": question.category,
        "answers": list(question.answers),
        "said": text,
    }
    finish = getattr(answer, "finish", None)
    if finish is not None:
        line["finish"] = finish
    if PROTOCOLS[name].reads == "choice":
        line["letters"] = {rule: letter(text, question, rule) for rule in RULES}
    if question.answers:
        scores = PROTOCOLS[name].scores
        line["scores"] = {figure: round(score(text, question), 6) for figure, score in scores.items()}
    return line


def _answers(
    ask: _Asking, data: Benchmark, places: Sequence[int], settings: ProtocolSettings
) -> Iterator[tuple[int, Any]]:
    """The answer of each question, or the error that says why there is none."""
    sources: dict[str, Any] = {}  # the same object for the same picture, so that a predictor sees that it is
    records: dict[Any, Any] = {}
    ready: list[tuple[int, str, Any, Any]] = []
    for place in places:
        question = data[place]
        try:
            if question.picture not in sources:
                source = data.source(place)
                sources[question.picture] = load_image(source) if isinstance(source, bytes) else source
        except InputError as error:
            yield place, error
            continue
        boxes = None
        if isinstance(settings.boxes, Path):
            found = [{"boxes": one.boxes, "scores": one.scores, "labels": one.labels} for one in question.boxes]
            boxes = records.setdefault(
                (question.picture, question.boxes), found if question.video is not None else found[0]
            )
        ready.append((place, prompt(settings.name, question), sources[question.picture], boxes))
    try:
        yield from _call(ask, ready, settings)
    except InputError as error:
        if len(ready) == 1:
            yield ready[0][0], error
            return
        for one in ready:  # one of them is at fault; the others are answered
            try:
                yield from _call(ask, [one], settings)
            except InputError as own:
                yield one[0], own


def _call(
    ask: _Asking, ready: Sequence[tuple[int, str, Any, Any]], settings: ProtocolSettings
) -> list[tuple[int, Any]]:
    if not ready:
        return []
    boxes = [one[3] for one in ready] if isinstance(settings.boxes, Path) else None
    answers = ask.call(
        [one[2] for one in ready],
        [one[1] for one in ready],
        boxes=boxes,
        batch_size=ask.batch_size,
        **ask.options,
    )
    return list(zip((one[0] for one in ready), answers, strict=True))


# -------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Group:
    """Figures, 0 to 1, of all questions or of a category of them."""

    kind: Literal["all", "category", "l2_category"]
    name: str
    questions: int
    figures: dict[str, float]


def _mains(protocol: _Protocol, questions: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """One of each question: the main row, where there are turned ones."""
    if protocol.reads != "choice":
        return list(questions)
    return [question for question in questions if int(question.question_id) < MAIN_ROWS]


def _groups(protocol: _Protocol, questions: Sequence[BenchmarkQuestion], texts: Sequence[str]) -> list[Group]:
    """The figures of all, and of each category where there are several."""
    columns = {
        figure: [score(text, question) for question, text in zip(questions, texts, strict=True)]
        for figure, score in protocol.scores.items()
    }
    groups: list[Group] = []
    for kind in ("all", "category", "l2_category"):
        names = ["all" if kind == "all" else getattr(question, kind) for question in questions]
        counts = Counter("all" if kind == "all" else getattr(one, kind) for one in _mains(protocol, questions))
        if kind != "all" and len(counts) < 2:
            continue
        figures = {figure: _means(protocol, questions, column, names) for figure, column in columns.items()}
        groups += [
            Group(kind, name, counts[name], {figure: means[name] for figure, means in figures.items()})
            for name in sorted(counts)
        ]
    return groups


def _means(
    protocol: _Protocol, questions: Sequence[BenchmarkQuestion], scores: Sequence[float], names: Sequence[str]
) -> dict[str, float]:
    if protocol.reads == "choice":
        indices = [int(question.question_id) for question in questions]
        return circular_accuracy(indices, [score == 1 for score in scores], names).per_category
    gathered: dict[str, list[float]] = {}
    for name, score in zip(names, scores, strict=True):
        gathered.setdefault(name, []).append(score)
    return {name: float(np.mean(values)) for name, values in gathered.items()}


def _figures(
    settings: ProtocolSettings, questions: Sequence[BenchmarkQuestion], texts: Sequence[str], groups: Sequence[Group]
) -> dict[str, Any]:
    """As the report prints them, times 100."""
    protocol = PROTOCOLS[settings.name]
    figures: dict[str, Any] = {}
    if protocol.reads == "choice":
        beyond = sum(any(name > "D" for name, _ in one.options) for one in _mains(protocol, questions))
        figures["letters"] = settings.letters
        pairs = zip(texts, questions, strict=True)
        figures["without_letter"] = sum(not letter(text, question, settings.letters) for text, question in pairs)
        if beyond:
            figures["options_beyond_d"] = beyond
    if protocol.reads == "videos":
        figures["judge"] = _JUDGE
    if not groups:
        figures["scored"] = "no, the file does not say what is right; the server does"
        return figures
    whole = {figure: 100 * value for figure, value in groups[0].figures.items()}
    if protocol.reads == "choice":
        whole = {"accuracy": whole[settings.letters]} | {f"accuracy_{rule}": whole[rule] for rule in RULES}
    main = settings.letters if protocol.reads == "choice" else next(iter(protocol.scores))
    figures |= whole
    for kind in ("category", "l2_category"):
        own = {group.name: 100 * group.figures[main] for group in groups if group.kind == kind}
        if own:
            figures[f"per_{kind}"] = own
    return figures


def results_table(settings: ProtocolSettings, groups: Sequence[Group]) -> str:
    """Markdown: a row for all questions and for each category, a column a figure, times 100."""
    names = list(groups[0].figures)
    lines = [
        [settings.dataset, "questions", *names],
        ["---", *["---:"] * (len(names) + 1)],
        *(
            [_words(group), str(group.questions), *(f"{100 * group.figures[name]:.1f}" for name in names)]
            for group in groups
        ),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _words(group: Group) -> str:
    name = " ".join(group.name.split()).replace("|", "/") or "(none)"
    return name if group.kind == "all" else f"{group.kind.replace('_', '-')}: {name}"


# -------------------------------------------------------------------- files


def _write_files(
    output: Path,
    settings: ProtocolSettings,
    questions: Sequence[BenchmarkQuestion],
    texts: Sequence[str],
    groups: Sequence[Group],
    wanted: Sequence[int | str],
) -> dict[str, str]:
    """The table, and what goes to a server or a judge."""
    files = {"predictions": output / "predictions.jsonl"}
    if groups:
        files["table"] = output / "results.md"
        _write_text(files["table"], results_table(settings, groups))
    if settings.name == "mmbench":
        files["submission"] = output / "submission.xlsx"
        _write_submission(files["submission"], questions, texts)
    if settings.name == "vqav2":
        files["upload"] = output / "upload.json"
        normal = map(normalise_answer, texts)
        answers = dict(zip((question.question_id for question in questions), normal, strict=True))
        rows = [{"question_id": number, "answer": answers.get(number, "")} for number in wanted]
        _write_text(files["upload"], json.dumps(rows, ensure_ascii=False))
    if PROTOCOLS[settings.name].reads == "videos":
        rows = [
            {
                "id": question.question_id,
                "question": question.question,
                "answer": question.answers[0],
                "pred": text,
            }
            for question, text in zip(questions, texts, strict=True)
        ]
        files |= {"pred": output / "pred.json", "pred_lines": output / "pred.jsonl"}
        _write_text(files["pred"], json.dumps(rows, ensure_ascii=False))
        _write_text(files["pred_lines"], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {name: str(path) for name, path in files.items()}


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)


def _write_submission(path: Path, questions: Sequence[BenchmarkQuestion], texts: Sequence[str]) -> None:
    """MMBench's workbook: what was asked and said in every row, the turned ones too."""
    letters = sorted({letter for question in questions for letter, _ in question.options})
    rest = ("category", "l2-category", "split", "answer")
    rows = (
        [
            int(question.question_id),
            question.question,
            *(dict(question.options).get(letter) for letter in letters),
            text,
            question.category,
            question.l2_category,
            question.split,
            next(iter(question.answers), None),
        ]
        for question, text in zip(questions, texts, strict=True)
    )
    write_xlsx(path, ["index", "question", *letters, "prediction", *rest], rows)
