"""Prompt templates of chat models, and conversations as token ids with labels (MG-LLaVA spec 3.3).

Every piece of a turn is tokenised by itself, without special tokens: the joint encoding of the whole string would merge
tokens across the border of question and answer, and give other ids than those that a model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.checkpoints import suggestion
from foveate.errors import InputError

IMAGE, VIDEO = "<image>", "<video>"
IMAGE_ID, VIDEO_ID = -200, -201
"""Ids that stand for pictures and videos in a text until their tokens take the place."""
PLACEHOLDERS: Mapping[str, int] = {IMAGE: IMAGE_ID, VIDEO: VIDEO_ID}
IGNORED = -100
"""Label of what is not learnt."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a language model expects a turn.

    Attributes:
        name: key in `TEMPLATES`.
        user: the user's turn and the start of the answer, with `{input}`.
        suffix: what ends an answer, learnt with it; empty where the end token does.
        adds_eos: whether the tokenizer's end token follows the answer, learnt with it.
        separator: text between turns, not learnt.
        stops: strings at which generation ends, besides the end token.
    """

    name: str
    user: str
    suffix: str
    adds_eos: bool
    separator: str
    stops: tuple[str, ...]

    def render(self, question: str, answer: str | None = None) -> Turn:
        """The texts of a turn; without an answer one that is to be answered."""
        # Not str.format: a question may hold braces.
        prompt = self.user.replace("{input}", question)
        return Turn(prompt, None if answer is None else answer + self.suffix, self.adds_eos, self.separator)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question in its template, and its answer with suffix, or None where it is yet to be answered."""

    input: str
    output: str | None
    adds_eos: bool
    separator: str


_CHATML = "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
_LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("vicuna", "USER: {input} ASSISTANT:", "", True, "\n", ()),
        ChatTemplate("phi3_chat", "<|user|>{input}<|end|>\n<|assistant|>\n", "<|end|>", False, "\n", ("<|end|>",)),
        ChatTemplate("llama3_chat", _LLAMA3, "<|eot_id|>", False, "", ("<|eot_id|>",)),
        ChatTemplate("qwen_chat", _CHATML, "<|im_end|>", False, "\n", ("<|im_end|>", "<|endoftext|>")),
    )
}
"""By name; "qwen_chat" is also Yi-1.5's. None has a system prompt (spec 3.3)."""


def find_template(name: str) -> ChatTemplate:
    """The template of this name.

    Raises:
        InputError: there is none; the sentence suggests the nearest.
    """
    if name not in TEMPLATES:
        raise InputError(
            f"there is no template {name!r}{suggestion(str(name), TEMPLATES)}; use one of: {', '.join(TEMPLATES)}."
        )
    return TEMPLATES[name]


def with_placeholder_first(text: str) -> str:
    """A question whose `<image>` or `<video>`, wherever it stands, becomes its first line."""
    for placeholder in PLACEHOLDERS:
        if placeholder in text:
            return f"{placeholder}\n{text.replace(placeholder, '').strip()}".strip()
    return text


def render_conversation(messages: Sequence[Mapping[str, Any]], template: ChatTemplate) -> list[Turn]:
    """A conversation in LLaVA's form as turns.

    What the model says before it is asked is left out, questions in a row are one, and a question at the end without
    an answer is left out.

    Args:
        messages: `{"from": "human" or "gpt", "value": text}`.

    Raises:
        InputError: a message of another form.
    """
    turns: list[Turn] = []
    question = ""
    asked = False
    for number, message in enumerate(messages):
        who, text = (message.get("from"), message.get("value")) if isinstance(message, Mapping) else (None, None)
        if who not in ("human", "gpt") or not isinstance(text, str):
            raise InputError(
                f'message {number} of a conversation must be {{"from": "human" or "gpt", "value": text}}, '
                f"not {message!r:.80}."
            )
        if who == "human":
            question += with_placeholder_first(text)
            asked = True
        elif asked or turns:
            turns.append(template.render(question, text))
            question, asked = "", False
    return turns


def encode_turns(turns: Sequence[Turn], tokenizer: Any, *, first: bool = True) -> tuple[list[int], list[int]]:
    """Token ids of turns, and which of them are learnt.

    The start token precedes the first turn, and every turn that follows an end token. Answers, with their suffix or
    end token, have their ids as labels; all else has `IGNORED`.

    Args:
        tokenizer: of the language model; one without a start or end token gets none.
        first: whether nothing precedes; otherwise the turns continue a conversation whose last turn ended as the
            template does.

    Returns:
        ids and labels, of one length; `PLACEHOLDERS` stand for pictures and videos.
    """
    ids: list[int] = []
    labels: list[int] = []
    needs_start = first or bool(turns and turns[0].adds_eos)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for turn in turns:
        prompt = encode_text(turn.input, tokenizer)
        if needs_start and start is not None:
            prompt.insert(0, start)
        ids += prompt
        labels += [IGNORED] * len(prompt)
        needs_start = False
        if turn.output is None:
            continue
        answer = tokenizer.encode(turn.output, add_special_tokens=False)
        if turn.adds_eos:
            needs_start = True
            if end is not None:
                answer = [*answer, end]
        ids += answer
        labels += answer
        between = separator_ids(turn.separator, tokenizer)
        ids += between
        labels += [IGNORED] * len(between)
    return ids, labels


def separator_ids(separator: str, tokenizer: Any) -> list[int]:
    """Ids of what stands between turns, none for an empty separator."""
    return tokenizer.encode(separator, add_special_tokens=False) if separator else []


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text, piece by piece between its placeholders, without special tokens."""
    for placeholder, stand_in in PLACEHOLDERS.items():
        if placeholder in text:
            pieces = [encode_text(piece, tokenizer) for piece in text.split(placeholder)]
            return [*pieces[0], *(token for piece in pieces[1:] for token in (stand_in, *piece))]
    return tokenizer.encode(text, add_special_tokens=False) if text else []
