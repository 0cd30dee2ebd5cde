"""The work of a server: predictors that are loaded on first use, and jobs that are run in pieces.

This side needs torch; it lives in the worker's process. A job is a picture with what is wanted of it. Regions of
several jobs run together, and so do questions; what a job has is kept until it is closed.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from foveate.errors import InputError
from foveate.vision.images import load_image, rle_to_box

logger = logging.getLogger(__name__)

VIEW_SIDE = 224
"""Pixels of the longer side of a view that is shown; the models look at no more."""

Emit = Callable[[str, str], None]
"""Called with a job and what is new of its answer."""


@dataclass
class Job:
    """A picture with what is wanted of it.

    Attributes:
        spec: the request, as `schemas` has it, checked.
        image: upright RGB, or None for a question about nothing.
        boxes: (R, 4) float32 xyxy, those of "everything" once they are proposed; None of a question without.
        scores, masks: of proposals.
        said: rows of the proposals that stay, and their captions.
    """

    spec: dict[str, Any]
    image: Image.Image | None
    boxes: np.ndarray | None
    scores: np.ndarray | None = None
    masks: Sequence[dict[str, Any]] | None = None
    said: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class _Group:
    """Questions that are answered together."""

    steps: Iterator[None]
    answers: dict[str, dict[str, Any]]  # once there are no more steps


class Models:
    """Predictors by verb, and the jobs at hand. Jobs may be opened from any thread; all else is for one thread.

    Args:
        names: verb -> model.
        proposers: verb -> what finds its regions or objects, where it is not the model's own.
        device, dtype: as `foveate.load` takes them.
    """

    def __init__(
        self, names: dict[str, str], proposers: dict[str, str], device: str | None = None, dtype: str | None = None
    ) -> None:
        self.names = names
        self.proposers = proposers
        self.device = device
        self.dtype = dtype
        self._predictors: dict[str, Any] = {}
        self._jobs: dict[str, Job] = {}
        self._groups: dict[str, _Group] = {}

    # ---------------------------------------------------------------- jobs

    def open(self, name: str, spec: dict[str, Any], picture: bytes, max_pixels: int) -> dict[str, Any]:
        """Reads the picture and checks boxes and masks.

        Returns:
            width and height (None without a picture), rows (regions; None where they are still to be proposed).

        Raises:
            InputError: the picture, a box or a mask is wrong.
        """
        image = load_image(picture, max_pixels=max_pixels) if picture else None
        boxes = None
        if image is None:
            if spec.get("boxes"):
                raise InputError("boxes are given without a picture; give the picture that they belong to.")
        elif spec["kind"] == "regions" or spec.get("boxes") is not None:
            boxes = _boxes(image, spec.get("boxes"), spec.get("masks"))
        self._jobs[name] = Job(spec, image, boxes)
        width, height = (None, None) if image is None else image.size
        rows = None if boxes is None or spec["kind"] != "regions" else len(boxes)
        return {"width": width, "height": height, "rows": rows}

    def close(self, name: str) -> None:
        """Forgets a job; its answer ends with the next step."""
        self._jobs.pop(name, None)

    # ---------------------------------------------------------------- models

    def load(self, verb: str) -> None:
        """Loads the model of a verb, if it is not loaded yet.

        Raises:
            FoveateError: it cannot be loaded, or does not suit the verb.
        """
        if verb in self._predictors:
            return
        from foveate.methods import load
        from foveate.vision.box_pipeline import load_box_pipeline

        name, proposer = self.names[verb], self.proposers.get(verb)
        options: dict[str, Any] = {}
        if proposer is not None:
            options["proposer"] = load_box_pipeline(proposer, device=self.device) if verb == "ask" else proposer
        predictor = load(name, device=self.device, dtype=self.dtype, **options)
        wanted, verb_says = (
            ("propose", "describes regions") if verb == "describe" else ("conversation", "answers questions")
        )
        if not hasattr(predictor, wanted):
            raise InputError(f"{name} is no model that {verb_says}; give another with --model {verb}=NAME.")
        self._predictors[verb] = predictor

    # ---------------------------------------------------------------- describing

    def propose(self, name: str) -> int:
        """Finds the regions of a job of "everything"; how many there are, none of a job that was closed meanwhile.

        Raises:
            InputError: the model has no proposer, or an option is wrong.
        """
        job = self._jobs.get(name)
        if job is None:
            return 0
        assert job.image is not None
        limits = {key: job.spec[key] for key in ("max_regions", "min_score", "box_iou")}
        found = self._predictors["describe"].propose(job.image, **limits)
        job.boxes, job.scores, job.masks = found.boxes, found.scores, found.masks
        return len(found.boxes)

    def describe(self, slices: Sequence[tuple[str, int, int]]) -> dict[str, list[dict[str, Any]]]:
        """Describes rows [start, stop) of jobs that want the same of their regions, together.

        Returns:
            job -> its regions as JSON has them; of proposals without those whose caption is said already. Jobs that
            were closed meanwhile are not among them.

        Raises:
            FoveateError: what is wanted is wrong, or the model gives numbers that are not finite.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        at_hand = [(self._jobs.get(name), name, start, stop) for name, start, stop in slices]
        slices = [(name, start, stop) for job, name, start, stop in at_hand if job is not None]
        jobs = [job for job, *_ in at_hand if job is not None]
        if not jobs:
            return found
        spec = jobs[0].spec
        boxes = [
            job.boxes[start:stop] for job, (_, start, stop) in zip(jobs, slices, strict=True) if job.boxes is not None
        ]
        described = self._predictors["describe"](
            [job.image for job in jobs],
            boxes,
            tasks=spec["tasks"],
            views=spec["view_policy"],
            classes=spec["classes"],
            controls=spec["controls"],
            num_beams=spec["num_beams"],
            batch_size=max(1, sum(map(len, boxes))),
            attention=any(job.spec["attention"] for job in jobs),  # which changes nothing for the others
        )
        for (name, start, _), job, regions in zip(slices, jobs, described, strict=True):
            rows = range(start, start + len(regions))
            kept = found.setdefault(name, [])
            stays = _unsaid(job, rows, [region.caption for region in regions])
            kept += [_region(job, row, region) for row, region in zip(rows, regions, strict=True) if row in stays]
        return found

    # ---------------------------------------------------------------- asking

    def ask(self, group: str, names: Sequence[str], emit: Emit) -> None:
        """Begins to answer jobs that want the same sampling and share of tokens, together; `step` goes on.

        Raises:
            FoveateError: a question or option is wrong.
        """
        from foveate.language.chat import reply_in_steps

        predictor = self._predictors["ask"]
        at_hand = [(name, self._jobs.get(name)) for name in names]
        names = [name for name, job in at_hand if job is not None]
        jobs = [job for _, job in at_hand if job is not None]
        if not jobs:
            self._groups[group] = _Group(iter(()), {})
            return
        spec = jobs[0].spec
        generation = dict(spec["generation"])
        model = getattr(predictor, "model", None)
        dropping: Any = nullcontext()
        if spec["keep"] is not None and spec["keep"] < 1:
            from foveate import drop_visual_tokens

            dropping = drop_visual_tokens(model, spec["keep"])
        prompts = [
            predictor.prompt_ids(
                job.spec["question"], None if job.image is None else predictor.kind(job.image), job.spec["turns"]
            )
            for job in jobs
        ]
        with dropping:
            seen = predictor.see_all(
                [job.image for job in jobs], [None if job.boxes is None else job.boxes.tolist() for job in jobs]
            )
        alive = lambda row: names[row] in self._jobs  # noqa: E731
        steps = reply_in_steps(predictor, prompts, seen, generation, lambda row, text: emit(names[row], text), alive)
        answers: dict[str, dict[str, Any]] = {}

        def run() -> Iterator[None]:
            replies = yield from steps
            answers.update((name, _answer(job, reply)) for name, job, reply in zip(names, jobs, replies, strict=True))

        self._groups[group] = _Group(run(), answers)

    def step(self, group: str, tokens: int) -> dict[str, dict[str, Any]] | None:
        """Says up to so many tokens more of each answer of a group.

        Returns:
            job -> its answer once all are complete; None before.
        """
        own = self._groups.pop(group)
        for _ in range(tokens):
            try:
                next(own.steps)
            except StopIteration:
                return own.answers
        self._groups[group] = own
        return None


def _boxes(image: Image.Image, boxes: Any, masks: Any) -> np.ndarray:
    """(R, 4) float32: boxes, then those of masks; the whole image where there are neither."""
    from foveate.ops.boxes import validate_boxes

    width, height = image.size
    if boxes is None and masks is None:
        return np.array([[0, 0, width, height]], dtype=np.float32)
    parts = [np.zeros((0, 4), np.float32)]
    if boxes is not None:
        parts.append(validate_boxes(boxes, image_size=(height, width)).numpy().astype(np.float32))
    if masks:
        drawn = [rle_to_box(mask, size=(height, width)) for mask in masks]
        parts.append(np.array(drawn, dtype=np.float32))
    return np.concatenate(parts)


def _unsaid(job: Job, rows: range, captions: Sequence[str | None]) -> set[int]:
    """The rows whose caption is not said already of the same place. Proposals come surest first, so that what comes
    later changes nothing about what stays."""
    limit = job.spec.get("caption_iou")
    if limit is None or job.scores is None or job.boxes is None or None in captions:
        return set(rows)
    from foveate.vision.proposals import drop_repeated_captions

    told = job.said + [(row, caption or "") for row, caption in zip(rows, captions, strict=True)]
    numbers = [row for row, _ in told]
    stay = drop_repeated_captions(job.boxes[numbers], job.scores[numbers].tolist(), [text for _, text in told], limit)
    job.said = [told[k] for k in sorted(stay)]
    return {row for row, _ in job.said}


def _region(job: Job, row: int, region: Any) -> dict[str, Any]:
    if job.scores is not None:
        region = replace(region, score=float(job.scores[row]))
    if job.masks is not None:
        region = replace(region, mask=job.masks[row])
    out = {"index": row, **region.to_dict()}
    if job.spec["scores"]:
        for name in ("tag_scores", "attribute_scores", "category_scores"):
            if scores := getattr(region, name):
                out[name] = {word: round(score, 4) for word, score in scores.items()}
    if job.spec["views"]:
        for listed, view in zip(out["views"], region.views, strict=True):
            listed["png"] = _png(view.image)
    if job.spec["attention"]:
        out["attention"] = [_attention(own) for own in region.attention]
    return out


def _attention(own: Any) -> dict[str, Any]:
    views = [
        {"t": t, "box": list(box), "most": round(float(own.in_view(number).max()), 4), "png": _png(own.heat(number))}
        for number, (t, box) in enumerate(zip(own.coefficients, own.boxes, strict=True))
    ]
    word = {} if own.word is None else {"word": own.word}
    return {"query": own.query, **word, "tasks": list(own.tasks), "whole": round(own.whole, 4), "views": views}


def _png(image: Image.Image) -> str:
    image.thumbnail((VIEW_SIDE, VIEW_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _answer(job: Job, reply: Any) -> dict[str, Any]:
    answer = reply.answer
    width, height = (None, None) if job.image is None else job.image.size
    return {
        "finish": answer.finish,
        "text": answer.text,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": answer.tokens,
        "foveate": {
            "width": width,
            "height": height,
            "boxes": [list(box) for box in answer.boxes[0]] if answer.boxes else [],
            "labels": list(answer.labels[0]) if answer.labels else [],
            "kept": answer.kept[0].to_dict() if answer.kept else None,
            "milliseconds": {stage: round(value, 1) for stage, value in answer.milliseconds.items()},
        },
    }
