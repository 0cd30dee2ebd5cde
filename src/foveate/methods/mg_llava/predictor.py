"""`foveate.load(DIR)` of an MG-LLaVA: pictures or videos and questions in, answers out (spec 4).

What a picture looks like to the model depends on no question. It is computed once, for a conversation and for all
questions of a call about the same picture; a conversation also keeps what the language model has read and said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.checkpoints import warn_of_the_world
from foveate.errors import InputError
from foveate.language.chat import ChatPredictor, read_sampling, with_placeholder
from foveate.language.decoding import Sampling, TextStream
from foveate.language.lm import check_tokenizer
from foveate.language.templates import (
    IMAGE,
    VIDEO,
    encode_turns,
    separator_ids,
)
from foveate.vision.box_file import BoxFile
from foveate.vision.images import load_image
from foveate.vision.kept_tokens import KeptTokens, square_region
from foveate.vision.proposals import find_regions, load_proposer
from foveate.vision.video import is_video, load_video

from .configuration import find_mg_llava
from .modeling import MGLlavaModel, VisualTokens
from .processing import BoxRecord, MGLlavaProcessor, Picture, stack_pictures

Box = tuple[float, float, float, float]
BoxSource = Callable[[Image.Image], Any]
"""Gives the boxes of a picture, as `BoxRecord.parse` takes them."""


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        finish: "stop" at an end token or stop string, "length" where the limit of new tokens cut it off.
        tokens: number of tokens generated.
        boxes: of each picture (of each frame of a video) the boxes that the model saw, xyxy in pixels of the picture as
            it was given; empty where there were none.
        labels: of each of these boxes the word that came with it; "" for boxes that a person drew.
        gate: tanh of the fusion's gate for each picture, how much of the high resolution is let in; () without a gate.
        milliseconds: where the time went: "boxes", "pictures", "towers", "answer".
        kept: of each picture or frame, which of its image tokens the model read; empty where none are dropped.
    """

    text: str
    finish: str
    tokens: int
    boxes: tuple[tuple[Box, ...], ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()
    gate: tuple[float, ...] = field(default=(), compare=False)
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)
    kept: tuple[KeptTokens, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Boxes and labels are those of the image, or a list a frame of a video."""
        listed = [list(map(list, own)) for own in self.boxes], [list(own) for own in self.labels]
        boxes, labels = (own[0] if len(own) == 1 else own for own in listed)
        return {
            "answer": self.text,
            "finish": self.finish,
            "tokens": self.tokens,
            "boxes": boxes,
            "labels": labels,
            "gate": [round(value, 4) for value in self.gate],
            "milliseconds": {stage: round(value, 1) for stage, value in self.milliseconds.items()},
            "kept": [own.to_dict() for own in self.kept],
        }


@dataclass(frozen=True)
class Seen:
    """A picture or video as the language model takes it, computed once.

    Attributes:
        tokens: image and object tokens of its pictures.
        kind: `<image>` or `<video>`.
        boxes, labels, milliseconds: as in `Answer`.
        kept: as in `Answer`.
    """

    tokens: VisualTokens
    kind: str
    boxes: tuple[tuple[Box, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    milliseconds: dict[str, float]
    kept: tuple[KeptTokens, ...] = ()

    @property
    def gate(self) -> tuple[float, ...]:
        return () if self.tokens.gate is None else tuple(self.tokens.gate.flatten().tolist())


@dataclass(frozen=True)
class _Prepared:
    pictures: list[Picture]
    kind: str
    boxes: tuple[tuple[Box, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    milliseconds: dict[str, float]
    regions: list[np.ndarray]  # (1, 4) of each picture, the part of it that the image tokens show


class MGLlavaPredictor(ChatPredictor):
    """Answers questions about pictures and videos. Thread-safe to call: nothing is changed by a call.

    Args:
        model: in eval mode, on its device.
        processor: saved beside it.
        proposer: gives the boxes of pictures that come without: any function of a PIL image that gives what
            `BoxRecord.parse` takes, or boxes and scores as the proposers of `foveate.vision.proposals` do; or the name
            of such a proposer; None for no boxes.
    """

    seen_type = Seen

    def __init__(
        self,
        model: MGLlavaModel,
        processor: MGLlavaProcessor,
        *,
        proposer: str | Path | BoxSource | None = None,
        name: str = "",
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.proposer = _load_proposer(proposer)
        self.name = name

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        proposer: str | Path | BoxSource | None = None,
    ) -> MGLlavaPredictor:
        """Load a folder written by training or conversion.

        Args:
            device: default CUDA if there is one, else CPU.
            dtype: default bfloat16 on CUDA, float32 on CPU.
            proposer: as the class takes it.

        Raises:
            InputError: there is no such model, or it is of another kind.
            CheckpointError: a file of it is damaged or does not fit the others; the sentence names the file.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = find_mg_llava(folder)
        model = MGLlavaModel.from_pretrained(folder, dtype=dtype).to(device)
        processor = MGLlavaProcessor.from_pretrained(folder, config=model.config)
        check_tokenizer(processor.tokenizer, model.config.language_config.vocab_size, f"the tokenizer of {folder}")
        warn_of_the_world(folder, "convert the official MG-LLaVA weights")
        return cls(model, processor, proposer=proposer, name=folder.name)

    # ---------------------------------------------------------------- public calls

    @torch.inference_mode()
    def see_all(self, sources: Sequence[Any], boxes: Sequence[Any]) -> list[Seen | None]:
        """As `see`, several that are encoded together."""
        prepared = [self._prepare(source, own) for source, own in zip(sources, boxes, strict=True)]
        shown = [one for one in prepared if one is not None]
        if not shown:
            return [None] * len(prepared)
        started = time.perf_counter()
        tokens = self._encode([picture for one in shown for picture in one.pictures])
        took = self._milliseconds(started) / len(shown)
        seen: list[Seen | None] = []
        first = 0
        for one in prepared:
            if one is None:
                seen.append(None)
                continue
            own = tokens.take(range(first, first + len(one.pictures)))
            first += len(one.pictures)
            times = {**one.milliseconds, "towers": took}
            seen.append(Seen(own, one.kind, one.boxes, one.labels, times, _kept(own, one.regions)))
        return seen

    # ---------------------------------------------------------------- inside

    def _prepare(self, source: Any, boxes: Any) -> _Prepared | None:
        if source is None:
            if boxes is not None:
                raise InputError("boxes are given without a picture; give the picture that they belong to.")
            return None
        started = time.perf_counter()
        video = is_video(source)
        frames = load_video(source, self.model.config.num_frames).frames if video else (source,)
        images = [load_image(frame) for frame in frames]
        records = [boxes]
        if video:
            if isinstance(boxes, list | tuple) and not boxes:
                boxes = [[]] * len(images)
            if boxes is not None and (isinstance(boxes, dict) or len(boxes) != len(images)):
                raise InputError(
                    f"a video needs boxes for each of the {len(images)} frames that are seen: a list with an entry a "
                    "frame, each a list of boxes or None."
                )
            records = [None] * len(images) if boxes is None else list(boxes)
        found = time.perf_counter()
        proposing = 0.0
        if self.proposer is not None and self.model.config.objects != "none":
            records = [self._propose(image) if own is None else own for image, own in zip(images, records, strict=True)]
            proposing = self._milliseconds(found)
        processor = self.processor
        pictures = processor.video(images, records) if video else [processor.picture(images[0], records[0])]
        parsed = [BoxRecord.parse(own, size=image.size) for own, image in zip(records, images, strict=True)]
        shown = [(own, list(picture.box_sources)) for own, picture in zip(parsed, pictures, strict=True)]
        used = tuple(tuple(map(tuple, own.boxes[rows].tolist())) for own, rows in shown)
        # Boxes without words were numbered when they were parsed.
        labels = tuple(tuple(own.labels[k] if own.labels[k] != f"#{k}" else "" for k in rows) for own, rows in shown)
        times = {"boxes": proposing, "pictures": self._milliseconds(started) - proposing}
        padded = self.model.config.pad_to_square and not video
        regions = [square_region(*image.size, padded=padded) for image in images]
        return _Prepared(pictures, VIDEO if video else IMAGE, used, labels, times, regions)

    def _propose(self, image: Image.Image) -> Any:
        assert self.proposer is not None
        answer = self.proposer(image)
        if not isinstance(answer, tuple):
            return answer
        found = find_regions(lambda _: answer, image, max_regions=self.model.config.box_limit)
        # Without labels each is a thing of its own; those that are the same thing have been thinned out.
        labels = [f"#{number}" for number in range(len(found.boxes))]
        return {"boxes": found.boxes, "scores": found.scores.tolist(), "labels": labels}

    def _encode(self, pictures: Sequence[Picture]) -> VisualTokens:
        device = self.model.device
        batch = stack_pictures(pictures)
        high = batch["pixel_values_aux"].to(device) if self.model.config.sees_high_res else None
        return self.model.encode(batch["pixel_values"].to(device), high, [picture.boxes for picture in pictures])

    def _kind(self, source: Any) -> str | None:
        return None if source is None else VIDEO if is_video(source) else IMAGE

    def _sampling(self, generation: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        sampling, stops = read_sampling(generation, self.model.config.generation)
        return sampling, (*self.processor.template.stops, *stops)

    def _prompt(self, question: str, kind: str | None, turns: Sequence[Any] = ()) -> list[int]:
        """Ids of a question in its template, with a placeholder where a picture belongs to it.

        Raises:
            InputError: no text, too long, or with more or other placeholders than pictures.
        """
        question = with_placeholder(question, kind)
        first = not turns
        ids, _ = encode_turns([self.processor.template.render(question)], self.processor.tokenizer, first=first)
        most = self.model.config.max_text_length
        if len(ids) > most:
            raise InputError(
                f"the question is {len(ids)} tokens long with its template, and at most {most} are read; shorten it."
            )
        return ids

    def _after(self, text: TextStream) -> list[int]:
        """Ids of what ends a turn."""
        template, tokenizer = self.processor.template, self.processor.tokenizer
        ending = tokenizer.encode(template.suffix, add_special_tokens=False) if template.suffix else []
        if template.adds_eos and tokenizer.eos_token_id is not None:
            ending.append(tokenizer.eos_token_id)
        return [*ending, *separator_ids(template.separator, tokenizer)]

    def _visual(self, seen: Seen | None) -> list[Tensor]:
        return [] if seen is None else [seen.tokens.sequence(0, len(seen.tokens))]

    @property
    def _context(self) -> int | None:
        """Tokens of the longest text that the language model has seen, where that is known."""
        return getattr(self.model.config.language_config, "max_position_embeddings", None)

    @property
    def _speaker(self) -> tuple[Any, Any]:
        """The language model and its tokenizer."""
        return self.model.language_model, self.processor.tokenizer

    def _embed(self, prompts: Sequence[list[int]], seen: Sequence[Seen | None]) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of prompts with their pictures, padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        visuals = [tokens for one in seen for tokens in self._visual(one)]
        inputs = self.model.assemble(ids, mask, visuals, left_padding=True)
        return inputs.inputs_embeds, inputs.attention_mask

    def _finished(self, text: TextStream, seen: Seen | None, milliseconds: float) -> Answer:
        return _answer(text, seen, milliseconds)


def _answer(text: TextStream, seen: Seen | None, milliseconds: float) -> Answer:
    answer = Answer(text.text.strip(), "stop" if text.stopped else "length", len(text.ids))
    if seen is None:
        return replace(answer, milliseconds={"answer": milliseconds})
    answer = replace(answer, kept=seen.kept)
    times = {**seen.milliseconds, "answer": milliseconds}
    return replace(answer, boxes=seen.boxes, labels=seen.labels, gate=seen.gate, milliseconds=times)


def _kept(tokens: VisualTokens, regions: Sequence[np.ndarray]) -> tuple[KeptTokens, ...]:
    if tokens.kept is None:
        return ()
    counts = [len(own) for own in tokens.image]
    return tuple(
        KeptTokens(keep[None], region, len(keep), count)
        for keep, region, count in zip(tokens.kept.cpu().numpy(), regions, counts, strict=True)
    )


def _load_proposer(proposer: str | Path | BoxSource | None) -> BoxSource | None:
    loaded: Any = load_proposer(proposer) if isinstance(proposer, str | Path) else proposer
    if isinstance(loaded, BoxFile):
        raise InputError(f"{loaded.path} is a file of boxes; give each picture's with `boxes`.")
    return loaded
