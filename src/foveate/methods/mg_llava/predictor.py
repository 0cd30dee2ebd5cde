"""`foveate.load(DIR)` of an MG-LLaVA: pictures or videos and questions in, answers out (spec 4).

What a picture looks like to the model depends on no question. It is computed once, for a conversation and for all
questions of a call about the same picture; a conversation also keeps what the language model has read and said.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from foveate.checkpoints import WEIGHTS
from foveate.errors import InputError
from foveate.language.decoding import (
    Sampling,
    TextStream,
    TokenStream,
    crop_cache,
    end_tokens,
    generate_texts,
)
from foveate.language.lm import check_tokenizer
from foveate.language.templates import (
    IMAGE,
    PLACEHOLDERS,
    VIDEO,
    encode_turns,
    separator_ids,
)
from foveate.vision.box_file import BoxFile
from foveate.vision.images import load_image
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
    """

    text: str
    finish: str
    tokens: int
    boxes: tuple[tuple[Box, ...], ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()
    gate: tuple[float, ...] = field(default=(), compare=False)
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)

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
        }


@dataclass(frozen=True)
class Seen:
    """A picture or video as the language model takes it, computed once.

    Attributes:
        tokens: image and object tokens of its pictures.
        kind: `<image>` or `<video>`.
        boxes, labels, milliseconds: as in `Answer`.
    """

    tokens: VisualTokens
    kind: str
    boxes: tuple[tuple[Box, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    milliseconds: dict[str, float]

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


class MGLlavaPredictor:
    """Answers questions about pictures and videos. Thread-safe to call: nothing is changed by a call.

    Args:
        model: in eval mode, on its device.
        processor: saved beside it.
        proposer: gives the boxes of pictures that come without: any function of a PIL image that gives what
            `BoxRecord.parse` takes, or boxes and scores as the proposers of `foveate.vision.proposals` do; or the name
            of such a proposer; None for no boxes.
    """

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
        if folder.parent == WEIGHTS:
            warnings.warn(
                f"{folder.name} knows the rendered world only, nothing of photographs; for those, convert the "
                "official MG-LLaVA weights",
                stacklevel=2,
            )
        return cls(model, processor, proposer=proposer, name=folder.name)

    # ---------------------------------------------------------------- public calls

    def ask(
        self,
        images: Any,
        questions: str | Sequence[str],
        *,
        boxes: Any = None,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **generation: Any,
    ) -> Any:
        """Answers of questions about pictures, each by itself.

        Args:
            images: what `foveate.vision.images.load_image` takes, or a video: a `Video`, a file or a folder of frames;
                None for a question about nothing; or a list of these, one for each question.
            questions: one, or a list: of one picture, or one for each picture of a list. `<image>` may stand in them;
                otherwise the picture comes first.
            boxes: of each picture: None for those of the proposer, [] for none, (K, 4) xyxy pixels, or a record of a
                box file; of a video a list with an entry a frame, or [] for none.
            batch_size: questions that run together.
            progress: called with (questions done, questions in all).
            generation: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stops.
        Returns:
            An `Answer`, or a list of them where a list was given.
        Raises:
            InputError: a picture, box, question or option is wrong; the sentence says which.
            CheckpointError: the model gives non-finite numbers.
        """
        if not isinstance(questions, str | list | tuple):
            raise InputError(f"a question must be a text, or a list of them, not {questions!r:.80}.")
        single = isinstance(questions, str) and not isinstance(images, list)
        asked = [questions] if isinstance(questions, str) else list(questions)
        many = isinstance(images, list)
        sources = list(images) if many else [images]
        records = list(boxes) if many and boxes is not None else [boxes] * len(sources)
        if many and len(asked) == 1:
            asked *= len(sources)
        if many and not len(sources) == len(asked) == len(records):
            raise InputError(
                f"{len(sources)} pictures, {len(asked)} questions and {len(records)} entries of boxes are given; a "
                "list of pictures needs as many of each."
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")
        sampling, stops = self._sampling(generation)
        # Questions are looked at before pictures are: a mistake in the last must not cost the time of all the others.
        prompts = [self._prompt(question, _kind(sources[i if many else 0])) for i, question in enumerate(asked)]
        keys = [_key(sources[i if many else 0], records[i if many else 0]) for i in range(len(asked))]
        answers: list[Answer] = []
        known: dict[Any, Seen | None] = {}
        for start in range(0, len(asked), batch_size):
            rows = range(start, min(start + batch_size, len(asked)))
            # Pictures that are not asked about again need not be kept.
            known = {key: seen for key, seen in known.items() if key in keys[start:]}
            new = {keys[row]: row if many else 0 for row in rows if keys[row] not in known}
            seen = self.see_all([sources[i] for i in new.values()], [records[i] for i in new.values()])
            known |= dict(zip(new, seen, strict=True))
            answers += self._answer([prompts[row] for row in rows], [known[keys[row]] for row in rows], sampling, stops)
            if progress is not None:
                progress(len(answers), len(asked))
        return answers[0] if single else answers

    def conversation(self, image: Any = None, *, boxes: Any = None, **generation: Any) -> Conversation:
        """A conversation about a picture or a video, which is encoded once.

        Args:
            image, boxes: as `ask` takes one of them; or what `see` gave, which is not encoded again.
            generation: defaults of every answer.
        """
        self._sampling(generation)
        seen = image if isinstance(image, Seen) else self.see(image, boxes)
        return Conversation(self, seen, generation)

    def see(self, source: Any, boxes: Any = None) -> Seen | None:
        """A picture or video as the language model takes it; None of None.

        Raises:
            InputError: it cannot be read, or the boxes do not fit it.
        """
        return self.see_all([source], [boxes])[0]

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
            seen.append(Seen(own, one.kind, one.boxes, one.labels, {**one.milliseconds, "towers": took}))
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
        return _Prepared(pictures, VIDEO if video else IMAGE, used, labels, times)

    def _propose(self, image: Image.Image) -> Any:
        assert self.proposer is not None
        answer = self.proposer(image)
        if not isinstance(answer, tuple):
            return answer
        found = find_regions(lambda _: answer, image, max_regions=self.model.config.box_limit)
        # Without labels each is a thing of its own; those that are the same thing have been thinned out.
        labels = [f"#{number}" for number in range(len(found.boxes))]
        return {"boxes": found.boxes, "scores": found.scores.tolist(), "labels": labels}

    def _milliseconds(self, started: float) -> float:
        if self.model.device.type == "cuda":  # which works behind the program
            torch.cuda.synchronize(self.model.device)
        return 1000 * (time.perf_counter() - started)

    def _encode(self, pictures: Sequence[Picture]) -> VisualTokens:
        device = self.model.device
        batch = stack_pictures(pictures)
        high = batch["pixel_values_aux"].to(device) if self.model.config.sees_high_res else None
        return self.model.encode(batch["pixel_values"].to(device), high, [picture.boxes for picture in pictures])

    def _sampling(self, generation: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        given = dict(generation)
        stops = given.pop("stops", ())
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError(f"stops must be a list of texts, not {stops!r}.")
        sampling = Sampling.of({**self.model.config.generation, **given})
        return sampling, (*self.processor.template.stops, *stops)

    def _prompt(self, question: str, kind: str | None, *, first: bool = True) -> list[int]:
        """Ids of a question in its template, with a placeholder where a picture belongs to it.

        Raises:
            InputError: no text, too long, or with more or other placeholders than pictures.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"a question must be a text, not {question!r}.")
        try:
            question.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"a question must be Unicode, and {question!r:.80} is not; give it in UTF-8.") from None
        written = [placeholder for placeholder in PLACEHOLDERS for _ in range(question.count(placeholder))]
        if kind is None and written:
            raise InputError(f"the question has {written[0]}, but there is no picture that it could stand for.")
        if written and written != [kind]:
            raise InputError(f"the question may hold {kind} once, and has {', '.join(written)}.")
        if kind is not None and not written:
            question = f"{kind}\n{question}"
        ids, _ = encode_turns([self.processor.template.render(question)], self.processor.tokenizer, first=first)
        most = self.model.config.max_text_length
        if len(ids) > most:
            raise InputError(
                f"the question is {len(ids)} tokens long with its template, and at most {most} are read; shorten it."
            )
        return ids

    def _visual(self, seen: Seen | None) -> list[Tensor]:
        return [] if seen is None else [seen.tokens.sequence(0, len(seen.tokens))]

    def _check_context(self, tokens: int) -> None:
        """Warns where the language model has seen no text of this length (spec 3.4)."""
        longest = getattr(self.model.config.language_config, "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            warnings.warn(
                f"{tokens} tokens of pictures, text and answer are more than the {longest} that the language model was "
                "made for; answers may be poor: give fewer boxes or frames, or set its rope_scaling",
                stacklevel=4,
            )

    @torch.inference_mode()
    def _answer(
        self, prompts: Sequence[list[int]], seen: Sequence[Seen | None], sampling: Sampling, stops: Sequence[str]
    ) -> list[Answer]:
        started = time.perf_counter()
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        visuals = [tokens for one in seen for tokens in self._visual(one)]
        inputs = self.model.assemble(ids, mask, visuals, left_padding=True)
        self._check_context(inputs.inputs_embeds.shape[1] + sampling.max_new_tokens)
        texts = generate_texts(
            self.model.language_model,
            self.processor.tokenizer,
            inputs.inputs_embeds,
            inputs.attention_mask,
            sampling,
            stops=stops,
        )
        took = 1000 * (time.perf_counter() - started) / len(prompts)
        return [_answer(text, one, took) for text, one in zip(texts, seen, strict=True)]


class Conversation:
    """Questions about one picture, each with the ones before in mind. Safe to use from several threads, one turn after
    the other.

    The picture and everything said so far stay in the language model's cache; a turn reads only what is new. Between
    turns stand the tokens of training: the end of an answer, the separator, the start token (spec 3.3, 4).

    Attributes:
        turns: (question, answer) of each turn so far.
    """

    def __init__(self, predictor: MGLlavaPredictor, seen: Seen | None, generation: dict[str, Any]) -> None:
        self.predictor = predictor
        self.seen = seen
        self.turns: list[tuple[str, Answer]] = []
        self._generation = generation
        self._cache: Any = DynamicCache()
        self._unread: list[int] = []  # ids that the next turn reads before its question
        self._lock = threading.Lock()
        self._speaker: int | None = None  # the thread whose answer is being given

    def ask(self, question: str, **generation: Any) -> Answer:
        """The answer of the next question. Arguments and errors as `MGLlavaPredictor.ask`."""
        for _ in self.stream(question, **generation):
            pass
        return self.turns[-1][1]

    def stream(self, question: str, **generation: Any) -> Generator[str, None, None]:
        """The answer piece by piece; the turn is done when the last has been taken.

        A stream that is given up early ends the answer there; what was said stays said.
        """
        sampling, stops = self.predictor._sampling({**self._generation, **generation})
        return self._stream(question, sampling, stops)

    def _stream(self, question: str, sampling: Sampling, stops: Sequence[str]) -> Generator[str, None, None]:
        if self._speaker == threading.get_ident():
            raise InputError("the answer before is still being streamed; take the rest of it, or close it.")
        with self._lock:
            self._speaker = threading.get_ident()
            try:
                first = not self.turns
                if not first:
                    self._refuse_placeholders(question)
                kind = self.seen.kind if self.seen is not None and first else None
                prompt = self.predictor._prompt(question, kind, first=first)
                yield from self._run(question, prompt, first, sampling, stops)
            finally:
                self._speaker = None

    def _refuse_placeholders(self, question: Any) -> None:
        for placeholder in PLACEHOLDERS:
            if isinstance(question, str) and placeholder in question:
                raise InputError(f"{placeholder} may stand in the first question only; start another conversation.")

    def _run(
        self, question: str, prompt: list[int], first: bool, sampling: Sampling, stops: Sequence[str]
    ) -> Iterator[str]:
        predictor, model, tokenizer = self.predictor, self.predictor.model, self.predictor.processor.tokenizer
        started = time.perf_counter()
        read = self._cache.get_seq_length()
        with torch.inference_mode():
            ids = torch.tensor([self._unread + prompt])
            inputs = model.assemble(ids, None, predictor._visual(self.seen) if first else [])
        length = inputs.inputs_embeds.shape[1]
        predictor._check_context(read + length + sampling.max_new_tokens)
        ends = sorted(end_tokens(model.language_model, tokenizer, stops))
        text = TextStream(tokenizer, stops=stops, ends=ends)
        stream = TokenStream(model.language_model, sampling, self._cache)
        try:
            for token in stream.run(inputs.inputs_embeds):
                if new := text.push(int(token)):
                    yield new
                if text.finished:
                    break
            if rest := text.close():
                yield rest
        except GeneratorExit:  # given up early, between two tokens
            self._settle(question, text, read + length, started)
            raise
        except BaseException:
            # As if the question had not been asked; a step that was broken off may have reached some layers only.
            crop_cache(self._cache, read)
            raise
        self._settle(question, text, read + length, started)

    def _settle(self, question: str, text: TextStream, prompt_end: int, started: float) -> None:
        """Notes the turn, leaves the cache at the answer's last token, and what ends a turn to be read with the next
        question."""
        tokenizer, template = self.predictor.processor.tokenizer, self.predictor.processor.template
        crop_cache(self._cache, prompt_end + len(text.ids))
        kept = max(0, self._cache.get_seq_length() - prompt_end)  # tokens of the answer that have been read
        ending = tokenizer.encode(template.suffix, add_special_tokens=False) if template.suffix else []
        if template.adds_eos and tokenizer.eos_token_id is not None:
            ending.append(tokenizer.eos_token_id)
        self._unread = [*text.ids[kept:], *ending, *separator_ids(template.separator, tokenizer)]
        self.turns.append((question, _answer(text, self.seen, 1000 * (time.perf_counter() - started))))


def _answer(text: TextStream, seen: Seen | None, milliseconds: float) -> Answer:
    answer = Answer(text.text.strip(), "stop" if text.stopped else "length", len(text.ids))
    if seen is None:
        return replace(answer, milliseconds={"answer": milliseconds})
    times = {**seen.milliseconds, "answer": milliseconds}
    return replace(answer, boxes=seen.boxes, labels=seen.labels, gate=seen.gate, milliseconds=times)


def _load_proposer(proposer: str | Path | BoxSource | None) -> BoxSource | None:
    loaded: Any = load_proposer(proposer) if isinstance(proposer, str | Path) else proposer
    if isinstance(loaded, BoxFile):
        raise InputError(f"{loaded.path} is a file of boxes; give each picture's with `boxes`.")
    return loaded


def _kind(source: Any) -> str | None:
    return None if source is None else VIDEO if is_video(source) else IMAGE


def _key(source: Any, boxes: Any) -> Any:
    """The same for the same picture with the same boxes."""
    return str(source) if isinstance(source, str | Path) else id(source), id(boxes)
