"""Questions about pictures, in batches and in conversations: what predictors of chat models have in common.

What a picture looks like to the model depends on no question. It is computed once, for a conversation and for all
questions of a call about the same picture; a conversation also keeps what the language model has read and said.
"""

from __future__ import annotations

import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.errors import InputError
from foveate.language.decoding import (
    Sampling,
    TextStream,
    TokenStream,
    crop_cache,
    end_tokens,
    generate_texts,
    start_texts,
    text_steps,
)
from foveate.language.templates import PLACEHOLDERS


class ChatPredictor(ABC):
    """A model that answers questions about pictures. `ask_in_batches` and `Conversation` work with any of them.

    What a picture looks like to the model is a `seen`, of whatever type, with its `kind`: `<image>` or `<video>`. An
    answer is of whatever type, too, with its `text`.
    """

    model: Any
    seen_type: type
    """Of what `see` gives."""

    # ---------------------------------------------------------------- what a model has to offer

    @abstractmethod
    def see_all(self, sources: Sequence[Any], boxes: Sequence[Any]) -> list[Any]:
        """Pictures or videos as the language model takes them; None of None."""

    @abstractmethod
    def _kind(self, source: Any) -> str | None:
        """`<image>`, `<video>` or, of None, None."""

    @abstractmethod
    def _prompt(self, question: str, kind: str | None, turns: Sequence[tuple[str, Any]] = ()) -> list[int]:
        """Ids of a question in its template, that come after those of `turns` and of what `_after` gave."""

    @abstractmethod
    def _after(self, text: TextStream) -> list[int]:
        """Ids that end the turn of an answer, where `_prompt` does not bring them."""

    @abstractmethod
    def _embed(self, prompts: Sequence[list[int]], seen: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(B, T, C) embeddings of prompts with their pictures, padded on the left, and their mask (B, T)."""

    @abstractmethod
    def _finished(self, text: TextStream, seen: Any, milliseconds: float) -> Any:
        """The answer that a text is."""

    @property
    @abstractmethod
    def _speaker(self) -> tuple[Any, Any]:
        """The causal language model and its tokenizer."""

    @property
    @abstractmethod
    def _context(self) -> int | None:
        """Tokens of the longest text that the language model has seen, where that is known."""

    @abstractmethod
    def _sampling(self, generation: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        """How tokens are chosen, and stop strings, from a call's settings and the model's own."""

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
            images: what `foveate.vision.images.load_image` takes; where the model sees videos, a `Video`, a file or a
                folder of frames, too; None for a question about nothing; or a list of these, one for each question.
            questions: one, or a list: of one picture, or one for each picture of a list. `<image>` may stand in them;
                otherwise the picture comes first.
            boxes: of a model with tokens of objects, for each picture: None for those of the proposer, [] for none,
                (K, 4) xyxy pixels, or a record of a box file; of a video a list with an entry a frame, or [] for none.
            batch_size: questions that run together.
            progress: called with (questions done, questions in all).
            generation: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stops.

        Returns:
            An `Answer`, or a list of them where a list was given.

        Raises:
            InputError: a picture, box, question or option is wrong; the sentence says which.
            CheckpointError: the model gives non-finite numbers.
        """
        return ask_in_batches(self, images, questions, boxes, batch_size, progress, generation)

    def conversation(self, image: Any = None, *, boxes: Any = None, **generation: Any) -> Conversation:
        """A conversation about a picture or a video, which is encoded once.

        Args:
            image, boxes: as `ask` takes one of them; or what `see` gave, which is not encoded again.
            generation: defaults of every answer.
        """
        self._sampling(generation)
        return Conversation(self, image if isinstance(image, self.seen_type) else self.see(image, boxes), generation)

    def see(self, source: Any, boxes: Any = None) -> Any:
        """A picture or video as the language model takes it; None of None.

        Raises:
            InputError: it cannot be read, or the boxes do not fit it.
        """
        return self.see_all([source], [boxes])[0]

    def kind(self, source: Any) -> str | None:
        """What a picture is in a prompt: `<image>` or `<video>`; None of None."""
        return self._kind(source)

    def prompt_ids(self, question: str, kind: str | None, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids of a question with all that was said before it, as a `Conversation` that had said it would have read it.

        Args:
            question: what is asked now.
            kind: of the picture, which belongs to the first question; None without one.
            turns: (question, answer) of the turns before.

        Raises:
            InputError: a question is no text, too long, or has placeholders of other pictures.
        """
        _, tokenizer = self._speaker
        ids: list[int] = []
        said: list[tuple[str, Any]] = []
        for asked, answer in turns:
            ids += self._prompt(asked, None if said else kind, said)
            text = TextStream(tokenizer)
            for token in tokenizer.encode(refuse_placeholders(answer), add_special_tokens=False):
                text.push(token)
            text.close()
            ids += [*text.ids, *self._after(text)]
            said.append((asked, self._finished(text, None, 0.0)))
        if said:
            refuse_placeholders(question)
        return ids + self._prompt(question, None if said else kind, said)

    # ---------------------------------------------------------------- what follows from it

    def _check_context(self, tokens: int) -> None:
        """Warns where the language model has seen no text of this length."""
        if self._context is not None and tokens > self._context:
            warnings.warn(
                f"{tokens} tokens of pictures, text and answer are more than the {self._context} that the language "
                "model was made for; answers may be poor: give fewer boxes or frames, or set its rope_scaling",
                stacklevel=4,
            )

    def _milliseconds(self, started: float) -> float:
        if self.model.device.type == "cuda":  # which works behind the program
            torch.cuda.synchronize(self.model.device)
        return 1000 * (time.perf_counter() - started)

    @torch.inference_mode()
    def _answer(
        self, prompts: Sequence[list[int]], seen: Sequence[Any], sampling: Sampling, stops: Sequence[str]
    ) -> list[Any]:
        started = time.perf_counter()
        embeds, mask = self._embed(prompts, seen)
        self._check_context(embeds.shape[1] + sampling.max_new_tokens)
        speaker, tokenizer = self._speaker
        texts = generate_texts(speaker, tokenizer, embeds, mask, sampling, stops=stops)
        took = 1000 * (time.perf_counter() - started) / len(prompts)
        return [self._finished(text, one, took) for text, one in zip(texts, seen, strict=True)]


def read_sampling(generation: dict[str, Any], defaults: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """Settings of a call with `stops` among them.

    Raises:
        InputError: an unknown setting, or a value out of range.
    """
    given = dict(generation)
    stops = given.pop("stops", ())
    if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
        raise InputError(f"stops must be a list of texts, not {stops!r}.")
    return Sampling.of({**defaults, **given}), tuple(stops)


def with_placeholder(question: Any, kind: str | None) -> str:
    """A question with the placeholder of its picture, in front where it has none.

    Raises:
        InputError: no text, or more or other placeholders than pictures.
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
    return question if kind is None or written else f"{kind}\n{question}"


def ask_in_batches(
    predictor: ChatPredictor,
    images: Any,
    questions: str | Sequence[str],
    boxes: Any,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    generation: dict[str, Any],
) -> Any:
    """What `ask` of a predictor does: each question by itself, each picture encoded once.

    Args:
        images: a picture or a list of them, one for each question.
        questions: one, or a list.
        boxes: of each picture.
        progress: called with (questions done, questions in all).

    Returns:
        An answer, or a list of them where a list was given.

    Raises:
        InputError: a picture, box, question or option is wrong; the sentence says which.
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
    sampling, stops = predictor._sampling(generation)
    # Questions are looked at before pictures are: a mistake in the last must not cost the time of all the others.
    prompts = [
        predictor._prompt(question, predictor._kind(sources[i if many else 0])) for i, question in enumerate(asked)
    ]
    keys = [_key(sources[i if many else 0], records[i if many else 0]) for i in range(len(asked))]
    answers: list[Any] = []
    known: dict[Any, Any] = {}
    for start in range(0, len(asked), batch_size):
        rows = range(start, min(start + batch_size, len(asked)))
        # Pictures that are not asked about again need not be kept.
        known = {key: seen for key, seen in known.items() if key in keys[start:]}
        new = {keys[row]: row if many else 0 for row in rows if keys[row] not in known}
        seen = predictor.see_all([sources[i] for i in new.values()], [records[i] for i in new.values()])
        known |= dict(zip(new, seen, strict=True))
        answers += predictor._answer(
            [prompts[row] for row in rows], [known[keys[row]] for row in rows], sampling, stops
        )
        if progress is not None:
            progress(len(answers), len(asked))
    return answers[0] if single else answers


@dataclass(frozen=True)
class Reply:
    """An answer, and how many tokens were read for it.

    Attributes:
        answer: as the predictor's `ask` gives it.
        prompt_tokens: of pictures and text.
    """

    answer: Any
    prompt_tokens: int


def reply_in_steps(
    predictor: ChatPredictor,
    prompts: Sequence[list[int]],
    seen: Sequence[Any],
    generation: dict[str, Any],
    show: Callable[[int, str], None],
    alive: Callable[[int], bool] = lambda _: True,
) -> Generator[None, None, list[Reply]]:
    """Answers of B prompts, together and token by token, for who has other things to do between two tokens.

    Args:
        prompts: ids, as `prompt_ids` gives them.
        seen: their pictures, as `see_all` gives them.
        generation: as `ask` takes it, the same for all.
        show: called with (row, new text) as it comes.
        alive: whether somebody still waits for a row; rows that nobody waits for end.

    Returns:
        B replies. Each step yields once.

    Raises:
        InputError: a setting is wrong.
        CheckpointError: the model gives non-finite numbers.
    """
    sampling, stops = predictor._sampling(generation)
    started = time.perf_counter()
    with torch.inference_mode():
        embeds, mask = predictor._embed(prompts, seen)
    predictor._check_context(embeds.shape[1] + sampling.max_new_tokens)
    read = mask.sum(dim=1).tolist()
    speaker, tokenizer = predictor._speaker
    texts = start_texts(speaker, tokenizer, len(prompts), stops)
    steps = text_steps(speaker, embeds, mask, sampling, texts, show)
    busy = 0.0
    while True:
        for row, text in enumerate(texts):
            if not text.finished and not alive(row):
                text.close()
        more = next(steps, None) is not None
        busy += time.perf_counter() - started
        if not more:
            break
        yield
        started = time.perf_counter()
    took = 1000 * busy / len(prompts)
    return [
        Reply(predictor._finished(text, one, took), int(count))
        for text, one, count in zip(texts, seen, read, strict=True)
    ]


def refuse_placeholders(question: Any) -> Any:
    """A question that is not the first of a conversation, as it is.

    Raises:
        InputError: it has a placeholder.
    """
    for placeholder in PLACEHOLDERS:
        if isinstance(question, str) and placeholder in question:
            raise InputError(f"{placeholder} may stand in the first question only; start another conversation.")
    return question


def _key(source: Any, boxes: Any) -> Any:
    """The same for the same picture with the same boxes."""
    return str(source) if isinstance(source, str | Path) else id(source), id(boxes)


class Conversation:
    """Questions about one picture, each with the ones before in mind. Safe to use from several threads, one turn after
    the other.

    The picture and everything said so far stay in the language model's cache; a turn reads only what is new. Between
    turns stand the tokens of training: the end of an answer, the separator, the start token (spec 3.3, 4).

    Attributes:
        turns: (question, answer) of each turn so far.
    """

    def __init__(self, predictor: ChatPredictor, seen: Any, generation: dict[str, Any]) -> None:
        self.predictor = predictor
        self.seen = seen
        self.turns: list[tuple[str, Any]] = []
        self._generation = generation
        self._cache: Any = DynamicCache()
        self._unread: list[int] = []  # ids that the next turn reads before its question
        self._lock = threading.Lock()
        self._thread: int | None = None  # the thread whose answer is being given

    def ask(self, question: str, **generation: Any) -> Any:
        """The answer of the next question. Arguments and errors as the predictor's `ask`."""
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
        if self._thread == threading.get_ident():
            raise InputError("the answer before is still being streamed; take the rest of it, or close it.")
        with self._lock:
            self._thread = threading.get_ident()
            try:
                first = not self.turns
                if not first:
                    refuse_placeholders(question)
                kind = self.seen.kind if self.seen is not None and first else None
                prompt = self.predictor._prompt(question, kind, self.turns)
                yield from self._run(question, prompt, first, sampling, stops)
            finally:
                self._thread = None

    def _run(
        self, question: str, prompt: list[int], first: bool, sampling: Sampling, stops: Sequence[str]
    ) -> Iterator[str]:
        predictor = self.predictor
        speaker, tokenizer = predictor._speaker
        started = time.perf_counter()
        read = self._cache.get_seq_length()
        with torch.inference_mode():
            embeds, _ = predictor._embed([self._unread + prompt], [self.seen if first else None])
        length = embeds.shape[1]
        predictor._check_context(read + length + sampling.max_new_tokens)
        ends = sorted(end_tokens(speaker, tokenizer, stops))
        text = TextStream(tokenizer, stops=stops, ends=ends)
        stream = TokenStream(speaker, sampling, self._cache)
        try:
            for token in stream.run(embeds):
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
        crop_cache(self._cache, prompt_end + len(text.ids))
        kept = max(0, self._cache.get_seq_length() - prompt_end)  # tokens of the answer that have been read
        self._unread = [*text.ids[kept:], *self.predictor._after(text)]
        answer = self.predictor._finished(text, self.seen, 1000 * (time.perf_counter() - started))
        self.turns.append((question, answer))
