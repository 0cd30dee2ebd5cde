"""Cleaning of the captions of real datasets, as the methods trained on them saw them."""

from __future__ import annotations

import re
import string

MAX_CAPTION_WORDS = 50

# DynRefer spec section 3, "VG preparation": letters and signs that Visual Genome's annotators typed. An em dash becomes
# a hyphen, which is punctuation and goes with the rest.
_PHRASE_TABLE = str.maketrans(
    dict.fromkeys(string.punctuation, "")
    | {"½": "half", "—": "", "™": "", "¢": "cent", "ç": "c", "û": "u", "é": "e", "è": "e", "°": " degree", "…": ""}
)
_CAPTION_SIGNS = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def clean_phrase(phrase: str) -> str:
    """A Visual Genome phrase in lower case, without punctuation (DynRefer spec section 3, "VG preparation").

    Example:
        >>> clean_phrase("A man's café, 90° — half-open")
        'a mans cafe 90 degree  halfopen'
    """
    return phrase.translate(_PHRASE_TABLE).lower()


def clean_caption(caption: str) -> str:
    """A caption as it is cleaned when a dataset is loaded (DynRefer spec section 3, caption cleaning at load).

    Lower case; the signs . ! " ( ) * # : ; ~ become spaces; runs of white space become one space; at most 50 words.

    Example:
        >>> clean_caption("A man, in a (Blue) shirt!")
        'a man, in a blue shirt'
    """
    caption = _SPACES.sub(" ", _CAPTION_SIGNS.sub(" ", caption.lower())).rstrip("\n").strip(" ")
    words = caption.split(" ")
    return caption if len(words) <= MAX_CAPTION_WORDS else " ".join(words[:MAX_CAPTION_WORDS])
