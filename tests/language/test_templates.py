from __future__ import annotations

from typing import Any

import pytest

from foveate.errors import InputError
from foveate.language.templates import (
    IGNORED,
    IMAGE_ID,
    TEMPLATES,
    VIDEO_ID,
    encode_text,
    encode_turns,
    find_template,
    render_conversation,
    with_placeholder_first,
)


class Bytes:
    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        assert not add_special_tokens
        return [byte + 3 for byte in text.encode()]


def ids(text: str) -> list[int]:
    return Bytes().encode(text)


def say(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


def test_vicuna_by_hand() -> None:
    turns = render_conversation(say("What <image>is it?", "Cat", "Sure?", "Yes"), TEMPLATES["vicuna"])
    found, labels = encode_turns(turns, Bytes())
    first = [1, *ids("USER: "), IMAGE_ID, *ids("\nWhat is it? ASSISTANT:")]
    second = [1, *ids("USER: Sure? ASSISTANT:")]
    newline = ids("\n")
    assert found == [*first, *ids("Cat"), 2, *newline, *second, *ids("Yes"), 2, *newline]
    masked = [IGNORED] * len(first), [IGNORED] * (len(newline) + len(second))
    assert labels == [*masked[0], *ids("Cat"), 2, *masked[1], *ids("Yes"), 2, IGNORED]


def test_templates_whose_suffix_ends_the_answer_have_one_start_token() -> None:
    for name in ("phi3_chat", "llama3_chat", "qwen_chat"):
        template = TEMPLATES[name]
        found, labels = encode_turns(render_conversation(say("a", "b", "c", "d"), template), Bytes())
        assert found.count(1) == 1
        assert 2 not in found
        learnt = [token for token in labels if token != IGNORED]
        assert learnt == ids(f"b{template.suffix}d{template.suffix}")


def test_continuing_a_conversation_is_encoding_it_whole() -> None:
    for template in TEMPLATES.values():
        turns = render_conversation(say("a", "b", "c", "d"), template)
        whole, _ = encode_turns(turns, Bytes())
        parts = encode_turns(turns[:1], Bytes())[0] + encode_turns(turns[1:], Bytes(), first=False)[0]
        assert parts == whole


def test_pieces_are_encoded_apart() -> None:
    asked: list[str] = []

    class Listening(Bytes):
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            asked.append(text)
            return super().encode(text)

    turn = TEMPLATES["vicuna"].render("<image>\nWhat?", "Cat")
    encode_turns([turn], Listening())
    assert asked == ["USER: ", "\nWhat? ASSISTANT:", "Cat", "\n"]
    assert encode_text("<image>", Listening()) == [IMAGE_ID]
    assert encode_text("a<video>b<image>", Listening()) == [*ids("a"), VIDEO_ID, *ids("b"), IMAGE_ID]


def test_what_stands_where() -> None:
    assert with_placeholder_first(" What?\n<image> ") == "<image>\nWhat?"
    assert with_placeholder_first("<video>") == "<video>"
    assert with_placeholder_first(" plain ") == " plain "
    # Answers before any question, and a question without an answer, are left out; questions in a row are one.
    messages = [*say("x", "hello")[1:], *say("a", "b")[:1], *say("c", "d"), *say("e")]
    (turn,) = render_conversation(messages, TEMPLATES["vicuna"])
    assert turn.input == "USER: ac ASSISTANT:"
    assert turn.output == "d"
    braces = TEMPLATES["qwen_chat"].render("{input} {0} %s").input
    assert "{input} {0} %s" in braces


@pytest.mark.parametrize(
    "message", [{"from": "system", "value": "x"}, {"value": "x"}, {"from": "gpt", "value": 3}, "x"]
)
def test_other_messages_are_refused(message: Any) -> None:
    with pytest.raises(InputError, match="message 0 of a conversation"):
        render_conversation([message], TEMPLATES["vicuna"])


def test_unknown_templates_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'phi3_chat'"):
        find_template("phi3chat")
