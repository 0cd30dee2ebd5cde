"""Scores of answers to questions: ANLS, VQA soft accuracy, multiple choice (MG-LLaVA spec 5.1)."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from foveate.errors import InputError
from foveate.metrics._checks import string_sequence

ANLS_THRESHOLD = 0.5
"""Answers less similar than this score 0."""
MAIN_ROWS = 1_000_000
"""Rows of a circular file with the same index modulo this are one question with its options turned round."""

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official pattern means to spare full stops after a digit, but its look-behind is misspelt: every one goes that no
# digit follows. Its flag is given in the place of a count, so that it stops after 32.
_FULL_STOP, _FULL_STOPS = re.compile(r"\.(?!\d)"), 32
_CONTRACTIONS: dict[str, str] = {
    pair.partition(":")[0]: pair.partition(":")[2]
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
    itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've
    mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
    oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've
    shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd
    someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
    """.split()  # noqa: SIM905 (a hundred lines less)
}

_LETTERS = re.compile("[A-D]+")
_LONE_LETTER = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")
_NAMED_LETTER = re.compile(
    r"\b(?:answer|option|choice)\b[^A-Za-z]*(?:is\b)?[^A-Za-z]*([A-Z])(?![A-Za-z])", re.IGNORECASE
)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements of a character that turn a into b."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity of an answer (DocVQA), 0 to 1; a benchmark's score is the mean times 100.

    The distance is that of the lower-cased texts with white space collapsed, over the length of the longer text as it
    was given. The nearest of the answers counts; below a similarity of 0.5 the score is 0.

    Raises:
        InputError: there is no answer, or something is not a string.
    """
    answers = _checked(prediction, answers)
    best = 1.0
    for answer in answers:
        longest = max(len(answer), len(prediction))
        distance = edit_distance(_collapsed(answer), _collapsed(prediction))
        best = min(best, distance / longest if longest else 0.0)
    return 1.0 - best if 1.0 - best >= ANLS_THRESHOLD else 0.0


def normalise_answer(text: str) -> str:
    """An answer as the VQA evaluation of EvalAI compares it: lower case, without punctuation and articles, number words
    up to ten as digits, contractions with their apostrophes.

    Raises:
        InputError: not a string.
    """
    if not isinstance(text, str):
        raise InputError(f"an answer is {text!r}; give a string.")
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if at_an_edge else " ")
    cleaned = _FULL_STOP.sub("", cleaned, count=_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in cleaned.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of VQA and TextVQA, 0 to 1, of ten people's answers.

    The mean over the people of min(1, how many of the *others* gave this answer / 3), all texts normalised.

    Raises:
        InputError: there is no answer, or something is not a string.
    """
    answers = [normalise_answer(answer) for answer in _checked(prediction, answers)]
    given = normalise_answer(prediction)
    agreeing = answers.count(given)
    # A person who agrees is not among the others; one who does not, is.
    others = [agreeing - (answer == given) for answer in answers]
    return sum(min(1.0, count / 3) for count in others) / len(answers)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of `answers`, but for case, white space around it and full stops at its end (as GQA).

    Raises:
        InputError: there is no answer, or something is not a string.
    """
    answers = _checked(prediction, answers)
    return _bare(prediction) in map(_bare, answers)


def normalised_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of `answers` after `normalise_answer`.

    Raises:
        InputError: there is no answer, or something is not a string.
    """
    answers = _checked(prediction, answers)
    return normalise_answer(prediction) in map(normalise_answer, answers)


def extract_letters(prediction: str, *, rule: str = "strict", options: str = string.ascii_uppercase) -> str:
    """The option letter in an answer to a multiple-choice question, "" where there is none.

    Args:
        rule: "strict", the official rule: the first run of the capitals A to D, wherever it stands ("Both" gives "B",
            "AB" gives "AB"; E and beyond are never found). "robust": a letter of `options` that is named as the answer,
            or else the first that stands by itself as a capital.
        options: the letters that the question has; the strict rule does not ask.

    Raises:
        InputError: no string, or no such rule.
    """
    if not isinstance(prediction, str):
        raise InputError(f"an answer is {prediction!r}; give a string.")
    if rule == "strict":
        found = _LETTERS.search(prediction)
        return found.group() if found else ""
    if rule != "robust":
        raise InputError(f"there is no rule {rule!r} for option letters; use strict or robust.")
    candidates = chain(_NAMED_LETTER.finditer(prediction), _LONE_LETTER.finditer(prediction))
    # "I think it is B" has a lone capital that is no option.
    return next((letter for found in candidates if (letter := found.group(1).upper()) in options), "")


@dataclass(frozen=True, slots=True)
class ChoiceAccuracy:
    """`accuracy`: share of questions answered rightly, 0 to 1; `per_category`: the same of each; `count`: questions."""

    accuracy: float
    per_category: dict[str, float]
    count: int


def circular_accuracy(
    indices: Sequence[int], correct: Sequence[bool], categories: Sequence[str] | None = None
) -> ChoiceAccuracy:
    """Accuracy of MMBench's circular files: a question counts as right where all its rows are.

    Args:
        indices: of the rows; those with the same index modulo 1,000,000 are one question.
        correct: whether each row was answered rightly.
        categories: of the rows; that of the main row (index below 1,000,000) counts.

    Raises:
        InputError: lengths differ, there are no rows, or a question has no main row.
    """
    names = ["all"] * len(indices) if categories is None else list(categories)
    if not len(indices) == len(correct) == len(names) or not len(indices):
        raise InputError(
            f"{len(indices)} indices, {len(correct)} verdicts and {len(names)} categories are given; each row needs "
            "one of each, and there must be rows."
        )
    right: dict[int, bool] = {}
    category: dict[int, str] = {}
    for index, good, name in zip(indices, correct, names, strict=True):
        question = index % MAIN_ROWS
        right[question] = right.get(question, True) and bool(good)
        if index < MAIN_ROWS:
            category[question] = name
    orphans = sorted(set(right) - set(category))
    if orphans:
        raise InputError(f"the question {orphans[0]} has rows, but none with an index below {MAIN_ROWS}.")
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, name in category.items():
        groups[name].append(right[question])
    return ChoiceAccuracy(
        sum(right.values()) / len(right),
        {name: sum(verdicts) / len(verdicts) for name, verdicts in groups.items()},
        len(right),
    )


def _bare(text: str) -> str:
    return text.strip().rstrip(".").lower().strip()


def _collapsed(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _checked(prediction: str, answers: Sequence[str]) -> list[str]:
    if not isinstance(prediction, str):
        raise InputError(f"an answer is {prediction!r}; give a string.")
    checked = string_sequence(answers, "answers")
    if not checked:
        raise InputError("there is no reference answer; give at least one.")
    return checked
