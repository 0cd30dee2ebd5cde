"""Conversations about pictures as recipes name them, and how right the answers to their questions are.

Shared by what learns from such conversations: MG-LLaVA and the stand-in of LLaVA-NeXT.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from foveate.data import open_conversations
from foveate.data.llava import Conversations
from foveate.data.samples import ConversationSample
from foveate.errors import InputError, RecipeError
from foveate.files import atomic_write
from foveate.language.templates import PLACEHOLDERS
from foveate.metrics.vqa import normalise_answer
from foveate.training.recipes import RecipePath, RecipeSection
from foveate.training.world_data import WorldScenes, ensure_rendered

log = logging.getLogger(__name__)

SIZES = ("small", "medium", "large")
"""Of what a question is about, in the order of the table."""


class ConversationData(RecipeSection):
    """Conversations about pictures: LLaVA's JSON files and MG-LLaVA's box files."""

    root: RecipePath
    annotations: tuple[str, ...] = Field(("train.json",), min_length=1, description="files, from `root`")
    boxes: tuple[str, ...] = Field((), description="box files, from `root`; without any the model sees no objects")
    images: str = Field("images", description="folder of images and videos, from `root`")
    world: WorldScenes | None = Field(None, description="render the dataset first if `root` does not exist")
    samples: int | None = Field(
        None,
        gt=0,
        description="use only so many: for training those that `seed` draws, elsewhere always the same ones",
    )
    skip_bad: bool = Field(False, description="leave broken records and images out, count and log them")


def open_samples(data: ConversationData, seed: int = 0) -> tuple[Conversations, list[int]]:
    """The conversations and the places of those to use; rendered first if the recipe says so.

    Raises:
        InputError, RecipeError: a file is not there or damaged.
    """
    ensure_rendered(data.root, "llava", data.world)
    samples = open_conversations(
        [data.root / name for name in data.annotations],
        data.root / data.images,
        [data.root / name for name in data.boxes],
        skip_bad=data.skip_bad,
    )
    index = list(range(len(samples)))
    if data.samples is not None and data.samples < len(index):
        index = sorted(np.random.default_rng(seed).choice(len(index), size=data.samples, replace=False).tolist())
    return samples, index


def check_root(data: ConversationData, section: str) -> None:
    """Whether there is something that `open_samples` can open or render, without doing so.

    Raises:
        RecipeError: there is not.
    """
    if not data.root.exists() and data.world is None:
        raise RecipeError(
            f"{section}.root: there is no folder {data.root}; put the dataset there, or give {section}.world"
        )


def present_samples(samples: Conversations, index: list[int], skip_bad: bool) -> list[int]:
    """The samples whose picture is there: a forgotten folder is noticed at once, not in the middle of an epoch.

    Raises:
        InputError: pictures are missing, and `skip_bad` is off or nothing is left.
    """
    paths = {place: sample.image or sample.video for place in index for sample in [samples[place]]}
    gone = {path for path in set(paths.values()) if path is not None and not path.exists()}
    if not gone:
        return index
    first = next(path for path in paths.values() if path in gone)
    what = f"{len(gone)} pictures of the training data are missing, the first is {first}"
    left = [place for place in index if paths[place] not in gone]
    if not skip_bad or not left:
        raise InputError(f"{what}; put them there, or set data.skip_bad to train without them.")
    log.warning("%s; %d of %d samples are left out", what, len(index) - len(left), len(index))
    return left


def turns(sample: ConversationSample) -> list[tuple[str, str, str | None, str | None]]:
    """(question, answer, kind, size) of each question that is answered, questions in a row as one."""
    found = []
    asked: list[str] = []
    kind = size = None
    for message in sample.messages:
        if message.speaker == "human":
            asked.append(message.text)
            kind, size = message.kind, message.size
        elif asked:
            found.append(("\n".join(asked), message.text, kind, size))
            asked = []
    return found


def plain_question(text: str) -> str:
    """A question without its placeholder."""
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, "")
    return text.strip()


# -------------------------------------------------------------------- questions and answers


@dataclass(frozen=True)
class AskedQuestion:
    """A question of the evaluation data with its right answer."""

    sample: ConversationSample
    question: str
    answer: str
    kind: str
    size: str | None


def open_questions(data: ConversationData) -> list[AskedQuestion]:
    """Every question by itself, whatever else is said in its conversation."""
    samples, index = open_samples(data)
    return [
        AskedQuestion(samples[place], plain_question(asked), answer, kind or "any", size)
        for place in index
        for asked, answer, kind, size in turns(samples[place])
    ]


def accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers: of all, by kind, by size, and by both."""

    def by(*keys: str) -> dict[str, float]:
        groups: dict[str, list[bool]] = defaultdict(list)
        for row in rows:
            if all(row[key] is not None for key in keys):
                groups[" ".join(row[key] for key in keys)].append(row["right"])
        return {name: float(np.mean(groups[name])) for name in sorted(groups)}

    return {
        "questions": len(rows),
        "accuracy": float(np.mean([row["right"] for row in rows])) if rows else float("nan"),
        "by_kind": by("kind"),
        "by_size": by("size"),
        "by_kind_and_size": by("kind", "size"),
    }


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a kind, a column a size, "accuracy (questions)" in each cell."""

    def cell(chosen: Sequence[dict[str, Any]]) -> str:
        return f"{100 * np.mean([row['right'] for row in chosen]):.1f} % ({len(chosen)})" if chosen else "-"

    lines = [["question about", *SIZES, "all"], ["---", *["---:"] * (len(SIZES) + 1)]]
    for kind in [*sorted({row["kind"] for row in rows}), "all"]:
        own = [row for row in rows if kind in (row["kind"], "all")]
        lines.append([kind, *(cell([row for row in own if row["size"] == size]) for size in SIZES), cell(own)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_answers(output: Path, questions: Sequence[AskedQuestion], said: Sequence[str]) -> dict[str, Any]:
    """Writes every answer to OUTPUT/answers.jsonl and the table to OUTPUT/accuracy.md; gives `accuracies`.

    An answer is right if it is the expected one after VQA's normalisation.
    """
    rows = [
        {
            "id": question.sample.sample_id,
            "image": None if (path := question.sample.image or question.sample.video) is None else path.name,
            "question": question.question,
            "kind": question.kind,
            "size": question.size,
            "answer": question.answer,
            "said": answer,
            "right": normalise_answer(answer) == normalise_answer(question.answer),
        }
        for question, answer in zip(questions, said, strict=True)
    ]
    with atomic_write(output / "answers.jsonl") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_write(output / "accuracy.md") as file:
        file.write(accuracy_table(rows))
    return accuracies(rows)
