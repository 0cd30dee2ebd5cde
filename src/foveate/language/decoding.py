"""Token by token: answers that stream, stop at strings, run in batches, and leave their cache for the next question.

transformers' `generate` starts anew at every call; a conversation that keeps its key-value cache needs a loop that it
can leave and enter again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.errors import InputError
from foveate.language.generation import FiniteLogits

_RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 100_000),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1_000_000),
    "repetition_penalty": (0.01, 100.0),
    "seed": (0, 2**63 - 1),
}
_COLDEST = 1e-5
"""Temperature below which answers are greedy but for ties, and logits divided by it would overflow."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        top_p: the likeliest tokens whose probabilities reach this sum may be drawn; 1 for all.
        top_k: so many of the likeliest tokens may be drawn; 0 for all.
        repetition_penalty: > 1 makes tokens of the answer so far less likely.
        seed: of the draws; the same seed gives the same answer.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Sampling:
        """From settings by name, each checked.

        Raises:
            InputError: an unknown name, or a value out of range.
        """
        for name, value in settings.items():
            if name not in _RANGES:
                raise InputError(f"{name!r} is not a generation setting; known are {', '.join(_RANGES)}.")
            low, high = _RANGES[name]
            whole = isinstance(low, int)
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not right or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise InputError(f"{name} must be {kind} from {low} to {high}, got {value!r}.")
        return cls(**settings)


class TokenStream:
    """Generates the next token of B rows, again and again.

    Args:
        model: a causal language model of transformers.
        sampling: how tokens are chosen.
        cache: of the tokens before, or None; it grows by what is read and said.

    Attributes:
        cache: keys and values of every token read so far; the last token given out is not among them yet.
    """

    def __init__(self, model: Any, sampling: Sampling, cache: DynamicCache | None = None) -> None:
        self.model = model
        self.sampling = sampling
        # Without the model's configuration: layers of a sliding window could not be cropped.
        self.cache = DynamicCache() if cache is None else cache
        self._finite = FiniteLogits(model)
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @torch.inference_mode()
    def run(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Reads a prompt, then yields (B,) token ids until the caller stops asking or `max_new_tokens` are out.

        Args:
            inputs_embeds: (B, T, C), rows padded on the left.
            attention_mask: (B, T), 0 where padded; None for no padding, which a filled cache asks for.

        Raises:
            CheckpointError: non-finite logits.
        """
        past = self.cache.get_seq_length()
        batch, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        if attention_mask is None:
            mask = torch.ones(batch, past + length, dtype=torch.long, device=device)
        elif past:
            raise ValueError("a filled cache takes no padded prompt")
        else:
            mask = attention_mask.to(device).long()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        given = torch.empty(batch, 0, dtype=torch.long, device=device)
        inputs: dict[str, Tensor] = {"inputs_embeds": inputs_embeds}
        for _ in range(self.sampling.max_new_tokens):
            logits = self.model(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            token = self._choose(self._finite(given, logits.float()), given)
            given = torch.cat([given, token[:, None]], dim=1)
            yield token
            inputs = {"input_ids": token[:, None]}
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)

    def _choose(self, logits: Tensor, given: Tensor) -> Tensor:
        """(B, V) logits and (B, t) tokens so far -> (B,) next tokens."""
        how = self.sampling
        if how.repetition_penalty != 1.0 and given.shape[1]:
            seen = logits.gather(1, given)
            penalised = torch.where(seen < 0, seen * how.repetition_penalty, seen / how.repetition_penalty)
            logits = logits.scatter(1, given, penalised)
        if how.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / max(how.temperature, _COLDEST)
        if 0 < how.top_k < logits.shape[-1]:
            least = logits.topk(how.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if how.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token stays while what comes before it has not reached the sum, so that one always does.
            left_out = ordered.cumsum(dim=-1) - ordered >= how.top_p
            left_out[:, 0] = False
            probabilities = probabilities.masked_fill(left_out.scatter(1, order, left_out), 0.0)
        # On the CPU, so that a seed gives the same draws on every device.
        return torch.multinomial(probabilities.cpu(), 1, generator=self._generator)[:, 0].to(logits.device)


class TextStream:
    """Turns the tokens of one answer into text that can be shown as it comes, up to a stop string or end token.

    Args:
        tokenizer: of the model.
        stops: texts at which the answer ends; none of them is part of it.
        ends: ids at which it ends.

    Attributes:
        ids: the tokens of the answer, without an end token.
        text: all that may be shown so far.
        finished: whether the answer has ended.
        stopped: whether it ended by itself, at an end token or a stop.
    """

    def __init__(self, tokenizer: Any, *, stops: Sequence[str] = (), ends: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stop for stop in stops if stop)
        self.ends = frozenset(ends)
        self.ids: list[int] = []
        self.text = ""
        self.finished = self.stopped = False

    def push(self, token: int) -> str:
        """Takes the next token and gives the text that is new and sure: none that may be the beginning of a stop."""
        if self.finished:
            return ""
        if token in self.ends:
            self.stopped = True
            return self.close()
        self.ids.append(token)
        whole = self._decode(self.ids)
        found = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._cut(min(found))
            return self._show(whole[: min(found)], finished=True)
        sure = len(whole)
        if whole.endswith(_REPLACEMENT):  # a character of several tokens is not complete yet
            sure = len(whole.rstrip(_REPLACEMENT))
        for stop in self.stops:
            for length in range(min(len(stop) - 1, sure), 0, -1):
                if whole[:sure].endswith(stop[:length]):
                    sure -= length
                    break
        return self._show(whole[:sure])

    def close(self) -> str:
        """Ends the answer and gives what was held back."""
        return "" if self.finished else self._show(self._decode(self.ids), finished=True)

    def _show(self, text: str, *, finished: bool = False) -> str:
        self.finished = finished
        new = text[len(self.text) :]
        self.text = max(text, self.text, key=len)
        return new

    def _cut(self, length: int) -> None:
        """Leaves out the tokens that the stop string consists of."""
        kept = self.ids
        while kept and len(self._decode(kept)) > length:
            kept = kept[:-1]
        self.ids = kept

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def crop_cache(cache: Any, length: int) -> None:
    """Leaves the first `length` tokens in a cache, also where a step was broken off between two layers."""
    for layer in cache.layers:
        excess = layer.get_seq_length() - length
        if excess > 0:
            layer.crop(-excess)


def end_tokens(model: Any, tokenizer: Any, stops: Sequence[str]) -> set[int]:
    """Ids that end an answer: the tokenizer's and the model's end tokens, and stop strings that are one token."""
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends |= set(configured if isinstance(configured, list) else [configured] if configured is not None else [])
    for stop in stops:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) == 1:
            ends.add(ids[0])
    return ends


def generate_texts(
    model: Any,
    tokenizer: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    *,
    stops: Sequence[str] = (),
    show: Callable[[int, str], None] | None = None,
) -> list[TextStream]:
    """Answers of B prompts, each up to its own end.

    Args:
        inputs_embeds, attention_mask: (B, T, C) and (B, T), padded on the left.
        stops: texts at which an answer ends.
        show: called with (row, new text) as it comes.

    Raises:
        CheckpointError: non-finite logits.
    """
    texts = start_texts(model, tokenizer, len(inputs_embeds), stops)
    for _ in text_steps(model, inputs_embeds, attention_mask, sampling, texts, show):
        pass
    return texts


def start_texts(model: Any, tokenizer: Any, count: int, stops: Sequence[str] = ()) -> list[TextStream]:
    """Empty answers, which end at the end tokens of model and tokenizer and at stop strings."""
    ends = sorted(end_tokens(model, tokenizer, stops))
    return [TextStream(tokenizer, stops=stops, ends=ends) for _ in range(count)]


def text_steps(
    model: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    texts: Sequence[TextStream],
    show: Callable[[int, str], None] | None = None,
) -> Iterator[int]:
    """Goes on with B answers until all have ended, and yields after each token the number of those that go on.

    Args:
        inputs_embeds, attention_mask, show: as `generate_texts` takes them.
        texts: B answers, as `start_texts` gives them; one that is closed from outside ends there.

    Raises:
        CheckpointError: non-finite logits.
    """
    for tokens in TokenStream(model, sampling).run(inputs_embeds, attention_mask):
        for row, (text, token) in enumerate(zip(texts, tokens.tolist(), strict=True)):
            new = text.push(token)
            if show is not None and new:
                show(row, new)
        left = sum(not text.finished for text in texts)
        if not left:
            break
        yield left
    for row, text in enumerate(texts):
        rest = text.close()
        if show is not None and rest:
            show(row, rest)
