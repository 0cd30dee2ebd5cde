from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.metrics.captioning import (
    caption_report,
    cider_d,
    exact_match_rate,
    group_by_image,
    mentioned_words,
    tokenize,
    word_accuracy,
)

COLOURS = ["red", "blue", "green", "dark blue"]
RELATIONS = ["on", "left of", "in front of", "in"]
WORDS = st.sampled_from(list("abcdef"))
CAPTIONS = st.lists(WORDS, min_size=0, max_size=8).map(" ".join)
LONG_CAPTIONS = st.lists(WORDS, min_size=4, max_size=8).map(" ".join)


def test_cider_d_of_two_samples_computed_by_hand():
    # df: a 2, everything else 1, so a weighs ln 2 - ln 2 = 0 and every other known or unknown n-gram weighs w = ln 2.
    # Sample 0 is perfect: cosine 1 for n = 1, 2 and 0 for n = 3, 4 (too short) -> 10 * 2/4 = 5.
    # Sample 1: unigrams c (w), e (w) against a (0), e (w): cosine 1/sqrt(2); no common bigram -> 10/4/sqrt(2).
    result = cider_d(["a b", "c e"], [["a b"], ["a e"]])
    np.testing.assert_allclose(result.per_sample, [5.0, 2.5 / math.sqrt(2)], rtol=1e-12)
    assert result.score == pytest.approx((5.0 + 2.5 / math.sqrt(2)) / 2, rel=1e-12)


def test_cider_d_clips_repeats_and_penalises_the_difference_in_bigrams():
    # Candidate b has weight 3w, the reference w: min(3w, w) * w / (3w * w) = 1/3. Bigrams 2 against 0.
    result = cider_d(["b b b", "c"], [["b"], ["c"]])
    np.testing.assert_allclose(result.per_sample, [2.5 / 3 * math.exp(-4 / 72), 2.5], rtol=1e-12)


def test_cider_d_averages_over_references():
    # Sample 0 matches one of two references in its unigram (2.5) and the other in nothing.
    np.testing.assert_allclose(cider_d(["b", "c"], [["b", "d"], ["c"]]).per_sample, [1.25, 2.5], rtol=1e-12)


def test_cider_d_of_a_single_sample_is_zero_as_every_idf_is():
    assert cider_d(["a b c d"], [["a b c d"]]).score == 0.0


@given(st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_cider_d_equals_pycocoevalcap(pairs):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    if not any(caption for _, group in pairs for caption in group):
        return  # pycocoevalcap takes the maximum of no document frequencies and fails.
    gts = {index: group for index, (_, group) in enumerate(pairs)}
    res = {index: [candidate] for index, (candidate, _) in enumerate(pairs)}
    score, per_sample = cider.Cider().compute_score(gts, res)
    ours = cider_d([candidate for candidate, _ in pairs], [group for _, group in pairs])
    np.testing.assert_allclose(ours.per_sample, per_sample, rtol=1e-12, atol=1e-13)
    assert ours.score == pytest.approx(score, rel=1e-12, abs=1e-13)


def test_cider_d_equals_pycocoevalcap_on_many_longer_captions():
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rng = random.Random(3)
    vocabulary = [f"w{i}" for i in range(40)]
    weights = [1 / (i + 1) for i in range(40)]
    draw = lambda: " ".join(rng.choices(vocabulary, weights, k=rng.randint(1, 14)))  # noqa: E731
    references = [[draw() for _ in range(rng.randint(1, 5))] for _ in range(300)]
    candidates = [rng.choice(group) if rng.random() < 0.3 else draw() for group in references]
    score, per_sample = cider.Cider().compute_score(
        dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)}
    )
    ours = cider_d(candidates, references)
    assert score > 1
    np.testing.assert_allclose(ours.per_sample, per_sample, rtol=1e-12, atol=1e-13)
    assert ours.score == pytest.approx(score, rel=1e-12)


@given(st.lists(LONG_CAPTIONS, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_cider_d_ignores_the_order_of_samples_and_tops_at_ten(captions, rng):
    references = [[caption] for caption in captions]
    perfect = cider_d(captions, references)
    assert (perfect.per_sample <= 10 + 1e-9).all()
    shuffled = list(range(len(captions)))
    rng.shuffle(shuffled)
    candidates = captions[1:] + captions[:1]
    straight = cider_d(candidates, references).per_sample
    moved = cider_d([candidates[i] for i in shuffled], [references[i] for i in shuffled]).per_sample
    np.testing.assert_allclose(moved, straight[shuffled], rtol=1e-9, atol=1e-12)


def test_perfect_captions_of_four_distinct_words_score_ten():
    captions = ["red cup on table", "blue dog near door"]
    np.testing.assert_allclose(cider_d(captions, [[caption] for caption in captions]).per_sample, 10.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A Red cup, left of the BLUE box.", "a red cup left of the blue box"),
        ("the man's dog doesn't bark -- yet!", "the man 's dog does n't bark yet"),
        ("a red-striped t-shirt", "a red-striped t-shirt"),
        ("3.5 m at 10:30", "3.5 m at 10:30"),
        ("  ... ", ""),
        ("caf\u00e9 \u732b", "caf\u00e9 \u732b"),
    ],
)
def test_tokenize(caption, tokens):
    assert tokenize(caption) == tokens


@given(st.lists(st.text("abcxyz0189", min_size=1, max_size=6), max_size=8))
def test_tokenize_keeps_plain_text(words):
    assert tokenize(" ".join(words)) == " ".join(words)


def test_exact_match_is_over_tokens_and_any_reference():
    assert exact_match_rate(["A cup.", "a dog", "x"], [["a mug", "a cup"], ["a cat"], ["x"]]) == pytest.approx(2 / 3)


def test_mentioned_words_prefers_the_longest_phrase_and_keeps_order():
    assert mentioned_words("A dark blue cup, in front of a red, red box", COLOURS) == ("dark blue", "red", "red")
    assert mentioned_words("a cup in front of a box in a room", RELATIONS) == ("in front of", "in")
    assert mentioned_words("a redder cup", COLOURS) == ()


def test_word_accuracy_ordered_and_unordered():
    candidates = ["a red cup on a blue box", "a blue cup", "a cup", "a green cup"]
    references = [["a blue cup on a red box"], ["a blue mug"], ["a red cup"], ["a cup"]]
    ordered = word_accuracy(candidates, references, COLOURS, ordered=True)
    # Sample 3 has no colour to find: it counts for precision only. Mentions: 4 said, 4 wanted, 3 common.
    assert (ordered.accuracy, ordered.count) == (pytest.approx(1 / 3), 3)
    assert (ordered.precision, ordered.recall) == (pytest.approx(3 / 4), pytest.approx(3 / 4))
    assert word_accuracy(candidates, references, COLOURS, ordered=False).accuracy == pytest.approx(2 / 3)


def test_word_accuracy_uses_the_best_fitting_reference():
    result = word_accuracy(["a red cup"], [["a blue green cup", "a red mug", "a cup"]], COLOURS, ordered=True)
    assert (result.accuracy, result.precision, result.recall) == (1.0, 1.0, 1.0)


def test_word_accuracy_without_any_mention_is_nan():
    result = word_accuracy(["a cup"], [["a cup"]], COLOURS, ordered=True)
    assert result.count == 0
    assert math.isnan(result.accuracy)
    assert math.isnan(result.precision)
    assert math.isnan(result.recall)


def test_group_by_image_pools_references_and_allows_one_hypothesis():
    grouped = group_by_image([7, 3, 7], ["a", "b", "a"], [["x"], ["y"], ["z", "w"]])
    assert grouped == ([7, 3], ["a", "b"], [["x", "z", "w"], ["y"]])
    with pytest.raises(InputError, match="Image id 7 has the hypotheses 'a' and 'c'"):
        group_by_image([7, 7], ["a", "c"], [["x"], ["y"]])


def test_caption_report_by_region_and_by_image():
    candidates = ["A red cup left of a box!", "a blue striped dog", "a blue striped dog"]
    references = [["a red cup left of a box"], ["a striped blue dog"], ["a green dog"]]
    lists = {"colours": COLOURS, "attributes": ["striped", "blue", "red", "green"], "relations": RELATIONS}
    by_region = caption_report(candidates, references, **lists)
    assert (by_region.grouping, by_region.count) == ("region", 3)
    assert by_region.exact_match == pytest.approx(1 / 3)
    assert by_region.words["colour"].accuracy == pytest.approx(2 / 3)
    assert by_region.words["attribute"].accuracy == pytest.approx(2 / 3)
    assert by_region.words["relation"].accuracy == 1.0
    tokens = [tokenize(candidate) for candidate in candidates]
    assert by_region.cider == cider_d(tokens, references).score
    by_image = caption_report(candidates, references, image_ids=["p", "q", "q"])
    assert (by_image.grouping, by_image.count, by_image.words) == ("image", 2, {})
    assert by_image.exact_match == 0.5
    assert by_image.cider == cider_d(tokens[:2], [references[0], references[1] + references[2]]).score


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "no captions"),
        (["a"], [], "1 candidates but 0"),
        (["a"], [[]], "at least one reference"),
        (["a"], ["a"], r"references\[0\] must be a sequence of strings"),
        (["a"], "a", "list of strings per candidate"),
        ("ab", [["a"], ["b"]], "candidates must be a sequence of strings"),
        ([None], [["a"]], "candidates holds None at index 0"),
        (["a"], [[3]], "holds 3"),
    ],
)
@pytest.mark.parametrize("metric", [cider_d, exact_match_rate, caption_report])
def test_bad_captions_are_refused(metric, candidates, references, message):
    with pytest.raises(InputError, match=message):
        metric(candidates, references)


@pytest.mark.parametrize("words", ["red", [], ["!"], [1]])
def test_bad_word_lists_are_refused(words):
    with pytest.raises(InputError):
        mentioned_words("a red cup", words)


def test_image_ids_must_fit():
    with pytest.raises(InputError, match="image_ids has 1 entries for 2"):
        group_by_image([1], ["a", "b"], [["a"], ["b"]])
