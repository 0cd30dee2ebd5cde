"""Words that a caller gives, and lists of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.errors import InputError

COCO_CLASSES: tuple[str, ...] = tuple(
    name.strip()
    for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush
    """.split(",")  # noqa: SIM905 (eighty lines less)
)
"""The 80 categories of COCO."""


def check_words(words: Any, what: str) -> tuple[str, ...]:
    """The words as a tuple, if they are a list of texts that a tokenizer can read.

    Raises:
        InputError: something else; the sentence says `what` and shows it.
    """
    if not isinstance(words, Sequence) or isinstance(words, str | bytes):
        raise InputError(f"{what} must be a list of words, not {words!r}")
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"{what} must be a list of words, and {word!r} is none")
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            # Bytes of a command line or a file that are not UTF-8 arrive as halves of surrogate pairs.
            raise InputError(f"{what} must be words in Unicode, and {word!r} is not; give it in UTF-8") from None
    return tuple(words)


def read_vocabulary(text: str) -> tuple[str, ...]:
    """Words by commas, the lines of a text file, or "coco" for COCO's 80.

    Raises:
        InputError: there is no word, or the file cannot be read.
    """
    if text == "coco":
        return COCO_CLASSES
    if text.endswith(".txt"):
        return read_lines(text, "word")
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise InputError("the vocabulary has no word; give words by commas, a .txt file with a word a line, or coco.")
    return words


def read_lines(path: str | os.PathLike[str], what: str) -> tuple[str, ...]:
    """The lines of a word list such as `ram_tag_list.txt`, stripped.

    Raises:
        InputError: the file is missing or no text, has no line or an empty one; `what` says what a line holds.
    """
    name = os.fspath(path)
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; give a text file with a {what} a line.") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}); give a text file with a {what} a line.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); get the file again.") from None
    blank = next((number for number, line in enumerate(lines, 1) if not line), None)
    if not lines or blank is not None:
        where = "is empty" if not lines else f"has an empty line {blank}"
        raise InputError(f"{name} {where}; give a text file with a {what} a line.")
    return tuple(lines)
