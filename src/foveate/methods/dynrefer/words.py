"""Tags and control words from captions (spec 3, "Tag targets" and "Control words in training").

Where a parser has been run (scene graph, parts of speech), `tag_sets` and `noun_phrases` are the rules applied to its
output. Where none has, `TagList.match` and `TagList.parts_of_speech` stand in for it, from the tag list alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from foveate.data.samples import RegionSample

# Words that are neither nouns nor adjectives: they end a phrase where no tagger says so.
_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any no each every all both another other its his her their our my your whose
    he she it they we you i him them us who which what there here something someone
    and or but nor so as than if while when where because
    of in on at to by from with without for into onto over under above below behind beside between near next against
    around across along through inside outside off up down out about toward towards among during before after like
    is are was were be been being am has have had having do does did doing can could will would may might must shall
    should not very too just also only still almost quite more most less least back away together
    """.split()  # noqa: SIM905 (two hundred lines less)
)
_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "teeth": "tooth"}
_IRREGULAR |= {"leaves": "leaf", "knives": "knife", "shelves": "shelf", "loaves": "loaf", "geese": "goose"}


class TagList:
    """A list of tags as training looks words up in it: in lower case, the first of equal entries (spec 3).

    Attributes:
        index: lower-cased tag -> its place in the list.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        self.index = {tag.lower(): k for k, tag in reversed(list(enumerate(tags)))}
        self.longest = max((tag.count(" ") + 1 for tag in tags), default=0)

    def places(self, words: Iterable[str]) -> list[int]:
        """Places of the words that are tags, in any case; sorted, each once."""
        return sorted({self.index[word.lower()] for word in words if word.lower() in self.index})

    def of(self, region: RegionSample, captions: Iterable[str]) -> list[int]:
        """Places of a region's tags: its own, those that its file was parsed into, or else those of `captions`."""
        if region.tags:
            return self.places(region.tags)
        if region.tag_places is not None:
            return list(region.tag_places)
        return sorted({place for caption in captions for place in self.match(caption)})

    def match(self, caption: str) -> list[int]:
        """Places of the tags that a caption names, for captions that no parser has seen (spec 3, the rule fallback).

        Of the runs of words that end at a word of the caption the longest one that is a tag counts. Its last word may
        be inflected: "two red hats" names "red hat", "wearing" names "wear".

        Args:
            caption: cleaned, in lower case (`foveate.data.text.clean_caption`).
        """
        words = caption.replace(",", " ").split()
        found = set()
        for end in range(1, len(words) + 1):
            for start in range(max(0, end - self.longest), end):
                head = words[start : end - 1]
                forms = (" ".join([*head, form]) for form in _base_forms(words[end - 1]))
                tag = next((form for form in forms if form in self.index), None)
                if tag is not None:
                    found.add(self.index[tag])
                    break
        return sorted(found)

    def parts_of_speech(self, caption: str) -> list[tuple[str, str]]:
        """(word, "NN" or "") of a caption for `noun_phrases`, where there is no tagger of parts of speech.

        Whatever is not a function word, nor ends in -ing without being a tag itself ("building" is one, "sitting" is
        not), counts as a noun, so that phrases run on over adjectives and nouns alike.
        """
        tagged = []
        for word in caption.replace(",", " , ").split():
            verb = word.endswith("ing") and word not in self.index
            other = verb or word in _FUNCTION_WORDS or not any(letter.isalpha() for letter in word)
            tagged.append((word, "" if other else "NN"))
        return tagged


def _base_forms(word: str) -> Iterator[str]:
    """The word, then what it may be a plural or a form of; most are no words, which a look-up in a list sorts out."""
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    for ending, others in (("ies", ("y",)), ("es", ("", "e")), ("s", ("",)), ("ing", ("", "e")), ("ed", ("", "e"))):
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 2:
            continue
        yield from (stem + other for other in others)
        if ending in ("ing", "ed") and stem[-1] == stem[-2]:
            yield stem[:-1]  # "sitting", "sit"


def tag_sets(graph: Mapping[str, Any], tags: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tags of a caption's scene graph: those of its subjects, and those of its relations and their objects.

    Args:
        graph: {"entities": [{"head", "lemma_span", "modifiers": [{"dep", "span"}]}], "relations": [{"subject",
            "object", "relation"}]}; relations refer to entities by index.
        tags: the vocabulary; words match its lower-cased entries exactly.
    Returns:
        Sorted indices into `tags` of set 1 (subjects) and set 2 (relations and objects).
    """
    index = TagList(tags).index
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
