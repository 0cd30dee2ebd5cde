"""Words that a caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.errors import InputError


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
