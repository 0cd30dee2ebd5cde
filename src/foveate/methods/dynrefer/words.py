"""Tags and control words from captions (spec 3, "Tag targets" and "Control words in training").

Parsing itself (scene graph, parts of speech) is done by whatever parser the user has; these are the rules applied to
its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def tag_sets(graph: Mapping[str, Any], tags: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tags of a caption's scene graph: those of its subjects, and those of its relations and their objects.

    Args:
        graph: {"entities": [{"head", "lemma_span", "modifiers": [{"dep", "span"}]}], "relations": [{"subject",
            "object", "relation"}]}; relations refer to entities by index.
        tags: the vocabulary; words match its lower-cased entries exactly.
    Returns:
        Sorted indices into `tags` of set 1 (subjects) and set 2 (relations and objects).
    """
    index = {tag.lower(): k for k, tag in reversed(list(enumerate(tags)))}
    objects = {relation["object"] for relation in graph["relations"]}
    first: set[str] = set()
    second: set[str] = {relation["relation"] for relation in graph["relations"]}
    for number, entity in enumerate(graph["entities"]):
        words = entity["lemma_span"].split(" ")
        found = {entity["head"], *(" ".join(words[start:]) for start in range(len(words)))}
        found |= {modifier["span"] for modifier in entity["modifiers"] if modifier["dep"] != "det"}
        (second if number in objects else first).update(found)
    # Membership is tested before lower-casing, as the official code does: "Hat" is no tag, "hat" is (spec 3).
    return tuple(sorted({index[word] for word in words if word in index}) for words in (first, second))  # pyright: ignore[reportReturnType]


def noun_phrases(tagged: Sequence[tuple[str, str]]) -> list[str]:
    """For each noun or adjective: the phrase from its first occurrence through the nouns that follow directly.

    Args:
        tagged: (word, Penn part-of-speech tag) pairs.
    """
    words = [word for word, _ in tagged]
    phrases = []
    for word, kind in tagged:
        if kind.startswith(("NN", "JJ")):
            start = words.index(word)
            stop = start + 1
            while stop < len(tagged) and tagged[stop][1].startswith("NN"):
                stop += 1
            phrases.append(" ".join(words[start:stop]))
    return phrases


def control_pool(tagged: Sequence[tuple[str, str]], tag_names: Iterable[str]) -> list[str]:
    """Unique words that training may give as control: tags of both sets, then noun phrases of the caption.

    A caption without a noun or adjective gives the empty phrase, as in the official code.
    """
    return list(dict.fromkeys([*tag_names, *(noun_phrases(tagged) or [""])]))


def control_words(controls: Sequence[str], predicted: Sequence[str]) -> list[str]:
    """Control words at inference: the caller's first, then predicted tags, each once (spec 4.1 step 7)."""
    return list(dict.fromkeys([*controls, *predicted]))
