"""Caption metrics: CIDEr-D, exact match, and accuracies of colour, attribute and relation words.

CIDEr-D (Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, section 4 and the "-D"
changes of section 5) is computed in pure Python and equals `pycocoevalcap.cider.Cider` on the same tokens. Published
figures tokenise with the Penn Treebank tokenizer of Stanford CoreNLP (Java); `tokenize` here is not that tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from foveate.errors import InputError
from foveate.metrics._checks import string_sequence

CIDER_N = 4
CIDER_SIGMA = 6.0

_CONTRACTION = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b")
_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:]\d+)+|\w+(?:-\w+)*")

_Id = TypeVar("_Id", bound=Hashable)


def tokenize(caption: str) -> str:
    """Lower-cased words joined by single spaces, punctuation removed.

    Not the Penn Treebank (PTB) tokenizer of the official caption evaluation: on text of letters, digits and spaces it
    gives the same tokens, and it splits the common contractions ("don't" -> "do n't", "dog's" -> "dog 's") as PTB does,
    but symbols, abbreviations, "cannot", currency and dates differ. Scores of captions with such text are therefore
    not exactly comparable with published ones.

    Raises:
        InputError: `caption` is not a string.
    """
    if not isinstance(caption, str):
        raise InputError(f"A caption is {caption!r}; give a string.")
    text = caption.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return " ".join(_TOKEN.findall(_CONTRACTION.sub(r" \g<0>", text)))


@dataclass(frozen=True, slots=True)
class CiderResult:
    """`score`: mean over samples, 0 to 10 (papers print 100 x score). `per_sample`: `(N,)` float64."""

    score: float
    per_sample: np.ndarray


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CiderResult:
    """CIDEr-D with n = 1..4, sigma = 6 and document frequencies counted over the given references.

    Args:
        candidates: N captions, already tokenised (tokens separated by white space; see `tokenize`).
        references: for each candidate one or more tokenised references.

    The weight of an n-gram is tf * (ln N - ln max(1, df)), so an n-gram that occurs in the references of every sample
    weighs nothing; with N = 1 every score is therefore 0, as in pycocoevalcap. Like there, the length of the Gaussian
    penalty is the number of *bigrams*, and orders longer than the caption contribute 0: a score of 10 takes four words.

    Raises:
        InputError: lengths differ, a sample has no reference, there are no samples, or something is not a string.
    """
    candidates, references = caption_pairs(candidates, references)
    counted_references = [[_ngrams(reference) for reference in group] for group in references]
    document_frequency: Counter[tuple[str, ...]] = Counter()
    for group in counted_references:
        document_frequency.update({ngram for counts in group for ngram in counts})
    log_samples = float(np.log(float(len(candidates))))

    def vectors(counts: dict[tuple[str, ...], int]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(CIDER_N)]
        squares = [0.0] * CIDER_N
        bigrams = 0
        for ngram, count in counts.items():
            order = len(ngram) - 1
            # document_frequency is a Counter: unseen n-grams read 0 without being stored.
            weight = float(count) * (log_samples - math.log(max(1.0, document_frequency[ngram])))
            weights[order][ngram] = weight
            squares[order] += weight * weight
            if order == 1:
                bigrams += count
        return weights, [math.sqrt(square) for square in squares], bigrams

    scores = np.zeros(len(candidates))
    for index, (candidate, group) in enumerate(zip(candidates, counted_references, strict=True)):
        weights, norms, length = vectors(_ngrams(candidate))
        similarity = np.zeros(CIDER_N)
        for counts in group:
            reference_weights, reference_norms, reference_length = vectors(counts)
            penalty = math.e ** (-(float(length - reference_length) ** 2) / (2 * CIDER_SIGMA**2))
            for order in range(CIDER_N):
                theirs = reference_weights[order]
                dot = 0.0
                for ngram, weight in weights[order].items():
                    other = theirs.get(ngram, 0.0)
                    dot += min(weight, other) * other
                if norms[order] != 0 and reference_norms[order] != 0:
                    dot /= norms[order] * reference_norms[order]
                similarity[order] += dot * penalty
        scores[index] = similarity.mean() / len(group) * 10.0
    return CiderResult(float(scores.mean()), scores)


def exact_match_rate(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of candidates that equal one of their references after `tokenize`, 0 to 1.

    Raises:
        InputError: as `cider_d`.
    """
    candidates, references = caption_pairs(candidates, references)
    hits = sum(
        tokenize(candidate) in {tokenize(reference) for reference in group}
        for candidate, group in zip(candidates, references, strict=True)
    )
    return hits / len(candidates)


def mentioned_words(caption: str, words: Iterable[str]) -> tuple[str, ...]:
    """The words and phrases of the list that `caption` mentions, tokenised, in order of mention, repeats kept.

    Phrases ("in front of") match whole tokens; at each position the longest one wins and its tokens are used up.

    Raises:
        InputError: `caption` or a word is not a string, or a word has no letters or digits.
    """
    return _mentions(caption, _phrases(words))


@dataclass(frozen=True, slots=True)
class WordAccuracy:
    """How well captions repeat the words of one list.

    Attributes:
        accuracy: share of the `count` samples whose caption mentions exactly the words of a reference; NaN if none.
        precision: of the list words that captions mention, in any sample, the share that a reference has; NaN if none.
        recall: of the list words of the references (the best-fitting one per sample), the share mentioned; NaN if none.
        count: samples with at least one reference that mentions a word of the list.
    """

    accuracy: float
    precision: float
    recall: float
    count: int


def word_accuracy(
    candidates: Sequence[str], references: Sequence[Sequence[str]], words: Iterable[str], *, ordered: bool
) -> WordAccuracy:
    """Accuracy, precision and recall of the words of a list.

    Args:
        candidates: N captions, raw or tokenised.
        references: one or more references for each.
        words: words or phrases, such as colours.
        ordered: compare mentions in order, so that "a red cup on a blue box" differs from "a blue cup on a red box";
            otherwise as multisets.

    Raises:
        InputError: as `cider_d`; `words` is empty or holds a word without letters or digits.
    """
    candidates, references = caption_pairs(candidates, references)
    phrases = _phrases(words)
    count = correct = said = wanted = hits = 0
    for candidate, group in zip(candidates, references, strict=True):
        mine = _mentions(candidate, phrases)
        said += len(mine)
        theirs = [mention for reference in group if (mention := _mentions(reference, phrases))]
        if not theirs:
            continue
        count += 1
        if ordered:
            correct += mine in theirs
        else:
            correct += sorted(mine) in [sorted(mention) for mention in theirs]
        overlaps = [(Counter(mine) & Counter(mention)).total() for mention in theirs]
        # The best-fitting reference: highest F1, which is 2 * overlap / (own mentions + its mentions).
        best = max(range(len(theirs)), key=lambda i: overlaps[i] / (len(mine) + len(theirs[i])))
        hits += overlaps[best]
        wanted += len(theirs[best])
    return WordAccuracy(_ratio(correct, count), _ratio(hits, said), _ratio(hits, wanted), count)


def group_by_image(
    image_ids: Sequence[_Id], candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[_Id], list[str], list[list[str]]]:
    """Samples grouped as the official caption evaluation does (DynRefer spec section 5): one per image id.

    The references of all regions of an image become the references of its one hypothesis, and document frequencies
    are then counted per image. Images keep the order of first occurrence.

    Raises:
        InputError: as `cider_d`; lengths differ; or an image id has two different hypotheses (the protocol allows one
            region per image id: give region ids as `image_ids` to score regions one by one).
    """
    candidates, references = caption_pairs(candidates, references)
    ids = list(image_ids)
    if len(ids) != len(candidates):
        raise InputError(f"image_ids has {len(ids)} entries for {len(candidates)} candidates; give one for each.")
    hypothesis: dict[_Id, str] = {}
    pooled: defaultdict[_Id, list[str]] = defaultdict(list)
    for image_id, candidate, group in zip(ids, candidates, references, strict=True):
        if hypothesis.setdefault(image_id, candidate) != candidate:
            raise InputError(
                f"Image id {image_id!r} has the hypotheses {hypothesis[image_id]!r} and {candidate!r}; grouping by "
                "image id allows one (use region ids to score each region on its own)."
            )
        pooled[image_id].extend(group)
    return list(hypothesis), list(hypothesis.values()), list(pooled.values())


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """`grouping` is "region" or "image"; `count` the number of scored hypotheses; `words` is by list name."""

    grouping: str
    count: int
    cider: float
    exact_match: float
    words: dict[str, WordAccuracy]


def caption_report(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    image_ids: Sequence[Hashable] | None = None,
    colours: Iterable[str] | None = None,
    attributes: Iterable[str] | None = None,
    relations: Iterable[str] | None = None,
) -> CaptionReport:
    """All caption metrics of raw (untokenised) captions.

    Args:
        candidates, references: N captions and one or more references for each.
        image_ids: if given, CIDEr-D and exact match are computed per image id (`group_by_image`), else per region.
        colours, attributes, relations: word lists; each adds an entry "colour", "attribute" or "relation" to `words`.
            Colours and relations are compared in order of mention, attributes in any order. Always per region.

    Raises:
        InputError: as `cider_d`, `word_accuracy` and `group_by_image`.
    """
    candidates, references = caption_pairs(candidates, references)
    lists = (("colour", colours, True), ("attribute", attributes, False), ("relation", relations, True))
    words = {
        name: word_accuracy(candidates, references, vocabulary, ordered=ordered)
        for name, vocabulary, ordered in lists
        if vocabulary is not None
    }
    if image_ids is not None:
        _, candidates, references = group_by_image(image_ids, candidates, references)
    tokens = [tokenize(candidate) for candidate in candidates]
    reference_tokens = [[tokenize(reference) for reference in group] for group in references]
    return CaptionReport(
        grouping="region" if image_ids is None else "image",
        count=len(candidates),
        cider=cider_d(tokens, reference_tokens).score,
        exact_match=exact_match_rate(candidates, references),
        words=words,
    )


def _ngrams(caption: str) -> dict[tuple[str, ...], int]:
    words = caption.split()
    counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for n in range(1, CIDER_N + 1):
        for start in range(len(words) - n + 1):
            counts[tuple(words[start : start + n])] += 1
    return counts


def caption_pairs(candidates: Any, references: Any) -> tuple[list[str], list[list[str]]]:
    """N candidates and their N lists of references, checked.

    Raises:
        InputError: lengths differ, there are none, a sample has no reference, or something is not a string.
    """
    candidates = string_sequence(candidates, "candidates")
    if isinstance(references, str | bytes) or not isinstance(references, Sequence):
        raise InputError(f"references must be a sequence with a list of strings per candidate, not {references!r}.")
    if not candidates:
        raise InputError("There are no captions to score: candidates is empty; give at least one caption.")
    if len(candidates) != len(references):
        raise InputError(
            f"There are {len(candidates)} candidates but {len(references)} lists of references; give one list for each."
        )
    groups = [string_sequence(group, f"references[{index}]") for index, group in enumerate(references)]
    for index, group in enumerate(groups):
        if not group:
            raise InputError(
                f"references[{index}] is empty; candidate {candidates[index]!r} needs at least one reference."
            )
    return candidates, groups


def _phrases(words: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """Tokenised phrases by first token, longest first."""
    if isinstance(words, str):
        raise InputError(f"words is the string {words!r}; give a list of words.")
    by_first: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for word in words:
        tokens = tuple(tokenize(word).split())
        if not tokens:
            raise InputError(f"The word list holds {word!r}, which has no letters or digits; remove it.")
        by_first[tokens[0]].add(tokens)
    if not by_first:
        raise InputError("The word list is empty; give at least one word.")
    return {first: sorted(phrases, key=lambda phrase: (-len(phrase), phrase)) for first, phrases in by_first.items()}


def _mentions(caption: str, phrases: dict[str, list[tuple[str, ...]]]) -> tuple[str, ...]:
    tokens = tuple(tokenize(caption).split())
    found: list[str] = []
    position = 0
    while position < len(tokens):
        for phrase in phrases.get(tokens[position], ()):
            if tokens[position : position + len(phrase)] == phrase:
                found.append(" ".join(phrase))
                position += len(phrase)
                break
        else:
            position += 1
    return tuple(found)


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
