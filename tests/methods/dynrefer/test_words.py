"""Tags and control words (the reference cases are run by the golden runner)."""

from __future__ import annotations

import pytest

from foveate.data.samples import RegionSample
from foveate.methods.dynrefer.words import TagList, control_pool, control_words, noun_phrases, tag_sets

TAGS = ["red hat", "hat", "man", "wear", "tall", "Big Ben", "a"]


def entity(head: str, span: str, *modifiers: tuple[str, str]) -> dict[str, object]:
    return {"head": head, "lemma_span": span, "modifiers": [{"dep": dep, "span": word} for dep, word in modifiers]}


class TestTagSets:
    def test_subjects_and_objects(self) -> None:
        graph = {
            "entities": [
                entity("man", "a tall man", ("det", "a"), ("amod", "tall")),
                entity("hat", "red hat", ("amod", "red")),
            ],
            "relations": [{"subject": 0, "object": 1, "relation": "wear"}],
        }
        # "a" is a determiner and "a tall man" no tag; of the object: its head and its span.
        assert tag_sets(graph, TAGS) == ([2, 4], [0, 1, 3])

    def test_suffixes_of_the_span_but_no_prefixes(self) -> None:
        graph = {"entities": [entity("x", "hat red hat")], "relations": []}
        assert tag_sets(graph, ["hat red", "red hat", "hat", "red"]) == ([1, 2], [])

    def test_membership_is_tested_before_lower_casing(self) -> None:
        graph = {"entities": [entity("Hat", "big ben")], "relations": [{"subject": 0, "object": 5, "relation": "WEAR"}]}
        assert tag_sets(graph, TAGS) == ([5], [])

    def test_an_entity_of_both_kinds_counts_as_object(self) -> None:
        graph = {
            "entities": [entity("man", "man"), entity("hat", "hat")],
            "relations": [
                {"subject": 0, "object": 1, "relation": "wear"},
                {"subject": 1, "object": 0, "relation": "on"},
            ],
        }
        assert tag_sets(graph, TAGS) == ([], [1, 2, 3])

    def test_nothing(self) -> None:
        assert tag_sets({"entities": [], "relations": []}, TAGS) == ([], [])


class TestControlWords:
    def test_phrases_run_over_the_nouns_that_follow(self) -> None:
        tagged = [("a", "DT"), ("young", "JJ"), ("baseball", "NN"), ("player", "NNS"), ("runs", "VBZ"), ("fast", "RB")]
        assert noun_phrases(tagged) == ["young baseball player", "baseball player", "player"]

    def test_a_repeated_word_takes_its_first_place(self) -> None:
        """ "dogs and big dogs": the second "dogs" is looked up at the first (spec 3)."""
        tagged = [("dogs", "NNS"), ("house", "NN"), ("and", "CC"), ("big", "JJ"), ("dogs", "NNS")]
        assert noun_phrases(tagged) == ["dogs house", "house", "big dogs", "dogs house"]

    def test_pool_is_unique_and_begins_with_the_tags(self) -> None:
        assert control_pool([("red", "JJ"), ("car", "NN")], ["car", "road", "car"]) == ["car", "road", "red car"]
        assert control_pool([("running", "VBG")], ["car"]) == ["car", ""]
        assert control_pool([], []) == [""]

    def test_at_inference_the_callers_words_come_first(self) -> None:
        assert control_words(["blue", "car"], ["car", "dog"]) == ["blue", "car", "dog"]
        assert control_words([], ["dog", "car"]) == ["dog", "car"]
        assert control_words([], []) == []


class TestCaptionsWithoutAParser:
    """Tags and phrases read off a caption by rules, from the tag list alone."""

    TAGS = ("hat", "red hat", "man", "wear", "Bus", "bus stop", "building", "umbrella", "bus", "hold", "sit", "cherry")

    @pytest.mark.parametrize(
        ("caption", "named"),
        [
            ("a man in a red hat", {"man", "red hat"}),  # the longest run that ends at "hat", and not "hat" too
            ("a hat and a red hat", {"hat", "red hat"}),
            ("two men wearing red hats", {"man", "wear", "red hat"}),
            ("umbrellas held, holding cherries", {"umbrella", "hold", "cherry"}),
            ("people sitting", {"sit"}),
            ("a bus stop", {"Bus", "bus stop"}),  # each word ends a run of its own; of equal entries the first counts
            ("a building", {"building"}),
            ("hatred", set()),
            ("", set()),
        ],
    )
    def test_tags_of_a_caption(self, caption: str, named: set[str]) -> None:
        assert {self.TAGS[place] for place in TagList(self.TAGS).match(caption)} == named

    def test_a_regions_own_tags_come_first_then_those_of_its_file(self) -> None:
        tags = TagList(self.TAGS)
        box = (0.0, 0.0, 9.0, 9.0)
        captions = ["a man", "a hat"]
        assert tags.of(RegionSample(1, box, tags=("HAT", "zebra")), captions) == [0]
        assert tags.of(RegionSample(1, box, tag_places=(3, 5)), captions) == [3, 5]
        assert tags.of(RegionSample(1, box, tag_places=()), captions) == []
        assert tags.of(RegionSample(1, box), captions) == [0, 2]

    def test_phrases_without_a_tagger(self) -> None:
        tagged = TagList(self.TAGS).parts_of_speech("two men sitting near a tall building, red 7")
        assert [word for word, kind in tagged if kind] == ["two", "men", "tall", "building", "red"]
        assert control_pool(tagged, ["man"]) == ["man", "two men", "men", "tall building", "building", "red"]
