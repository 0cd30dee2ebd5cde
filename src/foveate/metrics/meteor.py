"""METEOR 1.5 and the Penn Treebank tokenizer, as published caption figures use them; and a METEOR for without Java.

Both official programs are Java archives that the package pycocoevalcap (extra `caption`) brings: METEOR 1.5 (Denkowski
and Lavie, "Meteor Universal", WMT 2014) with its paraphrase table, called with `-l en -norm`, and the tokenizer of
Stanford CoreNLP 3.4.1. `meteor_lite` needs neither and is another metric.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from foveate.errors import InputError
from foveate.metrics.captioning import caption_pairs, cider_d, tokenize

METEOR_JAR = "meteor/meteor-1.5.jar"
METEOR_PARAPHRASES = "meteor/data/paraphrase-en.gz"
PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
# pycocoevalcap drops these tokens. After lower-casing brackets are "-lrb-" and so stay in the text, there as here.
PTB_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_OTHERWISE = "or take the scorer 'lite', whose figures are not comparable with published ones"


def check_java() -> str:
    """Whether METEOR 1.5 and the PTB tokenizer can run here, said before any long work.

    Returns:
        The version to print beside a score: "METEOR 1.5 and PTB tokenizer of pycocoevalcap 1.2".

    Raises:
        InputError: Java, the package, or one of its files is missing, or Java does not start.
    """
    java, _ = _java_and(METEOR_JAR, METEOR_PARAPHRASES, PTB_JAR)
    try:
        said = subprocess.run([java, "-version"], capture_output=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{java} does not run ({error}); install a Java runtime, {_OTHERWISE}.") from None
    if said.returncode:
        raise InputError(f"{java} does not run ({_last_line(said.stderr)}); install a Java runtime, {_OTHERWISE}.")
    version = ""
    with suppress(importlib.metadata.PackageNotFoundError):  # a copy on the path that pip does not know
        version = f" {importlib.metadata.version('pycocoevalcap')}"
    return f"METEOR 1.5 and PTB tokenizer of pycocoevalcap{version}"


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Captions as the official evaluation tokenises them: PTB tokens in lower case, joined by spaces, no punctuation.

    Args:
        captions: raw text; white space of any kind counts as one space.

    Raises:
        InputError: Java or the tokenizer is missing or fails.
    """
    if not captions:
        return []
    java, (jar,) = _java_and(PTB_JAR)
    command = [java, "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    # A caption is a line: a line break inside one would shift all that follow.
    text = "".join(f"{_one_line(caption)}\n" for caption in captions)
    said = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"],
        input=text.encode("utf-8", "replace"),
        capture_output=True,
        check=False,
    )
    lines = said.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if said.returncode or len(lines) != len(captions):
        raise InputError(
            f"the PTB tokenizer gave {len(lines)} lines for {len(captions)} captions ({_last_line(said.stderr)}); "
            f"check the Java runtime, {_OTHERWISE}."
        )
    return [" ".join(token for token in line.split() if token not in PTB_PUNCTUATION) for line in lines]


@dataclass(frozen=True, slots=True)
class MeteorResult:
    """Fractions, 0 to 1 (papers print 100 x). `score`: of the corpus. `per_sample`: `(N,)` float64."""

    score: float
    per_sample: np.ndarray


class Meteor:
    """METEOR 1.5, in one Java process for the length of a `with` block: its tables take seconds to load.

    Raises:
        InputError: on entering, Java or a file is missing; on scoring, the process ended.

    Example:
        >>> with Meteor() as meteor:
        ...     meteor.score(["a red car"], [["the red car", "a car"]]).score
        0.7714285714285715
    """

    def __enter__(self) -> Meteor:
        java, (jar, _) = _java_and(METEOR_JAR, METEOR_PARAPHRASES)
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            # The encoding is said because Java's default is the locale's, and "C" would break every accent.
            [java, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what a dead process did not read
                    pipe.close()
        # Nothing that it still does is wanted, and it may be in the middle of loading its tables.
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> MeteorResult:
        """METEOR of N captions, each against one or more references.

        The corpus score is not the mean of the others: METEOR adds up the counts of all captions first, as the
        official evaluation reports it.

        Raises:
            InputError: as `foveate.metrics.captioning.cider_d`; or the Java process ended.
        """
        candidates, references = caption_pairs(candidates, references)
        counts = [
            self._ask(" ||| ".join(["SCORE", *map(_one_line, group), _one_line(candidate)]))
            for candidate, group in zip(candidates, references, strict=True)
        ]
        self._write(" ||| ".join(["EVAL", *counts]))
        per_sample = [self._number() for _ in counts]
        return MeteorResult(self._number(), np.array(per_sample))

    def _ask(self, line: str) -> str:
        self._write(line)
        return self._read()

    def _write(self, line: str) -> None:
        stdin: IO[bytes] = self._process.stdin  # type: ignore[assignment]
        try:
            stdin.write(f"{line}\n".encode("utf-8", "replace"))
            stdin.flush()
        except OSError:
            raise self._ended() from None

    def _read(self) -> str:
        stdout: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        line = stdout.readline().decode("utf-8", "replace").strip()
        if not line:
            raise self._ended()
        return line

    def _number(self) -> float:
        line = self._read()
        try:
            return float(line)
        except ValueError:
            raise InputError(f"METEOR answered {line[:80]!r} instead of a score; check the Java runtime.") from None

    def _ended(self) -> InputError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)  # so that its last words are complete
        self._errors.seek(0)
        return InputError(
            f"the METEOR process ended early ({_last_line(self._errors.read())}); check that Java runs and that 2 GB "
            f"of memory are free, {_OTHERWISE}."
        )


def _java_and(*files: str) -> tuple[str, list[Path]]:
    """The Java program and the named files of pycocoevalcap."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "METEOR 1.5 and the PTB tokenizer come with the package pycocoevalcap, which is not installed; "
            f"pip install 'foveate[caption]', {_OTHERWISE}."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    paths = [folder / file for file in files]
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"{path} is missing from the installed pycocoevalcap; "
                f"pip install --force-reinstall pycocoevalcap, {_OTHERWISE}."
            )
    java = shutil.which("java")
    if java is None:
        raise InputError(
            "METEOR 1.5 and the PTB tokenizer are Java programs, and there is no 'java' on the PATH; "
            f"install a Java runtime, {_OTHERWISE}."
        )
    return java, paths


def _one_line(caption: str) -> str:
    return " ".join(caption.replace("|||", " ").split())


def _last_line(said: bytes) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


# -------------------------------------------------------------------- captions of regions


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """`meteor` 0 to 1 and `cider` (CIDEr-D) 0 to 10 of a set of captions; papers print 100 x either."""

    meteor: float
    cider: float


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, official: bool = True
) -> CaptionScores:
    """METEOR and CIDEr-D of raw captions, as `pycocoevalcap.eval.COCOEvalCap` computes them.

    Args:
        candidates, references: N captions and one or more references for each.
        official: PTB tokens and METEOR 1.5; otherwise `captioning.tokenize` and `meteor_lite`, without Java.

    Raises:
        InputError: as `captioning.cider_d`; Java or a file is missing.
    """
    candidates, references = caption_pairs(candidates, references)
    texts = [*candidates, *itertools.chain.from_iterable(references)]
    tokens = iter(ptb_tokenize(texts) if official else map(tokenize, texts))
    candidates = list(itertools.islice(tokens, len(candidates)))
    references = [list(itertools.islice(tokens, len(group))) for group in references]
    return CaptionScores(
        meteor_of(candidates, references, official=official).score, cider_d(candidates, references).score
    )


def meteor_of(candidates: Sequence[str], references: Sequence[Sequence[str]], *, official: bool = True) -> MeteorResult:
    """`Meteor` in a process of its own, or `meteor_lite`.

    Raises:
        InputError: as they do.
    """
    if not official:
        return meteor_lite(candidates, references)
    with Meteor() as meteor:
        return meteor.score(candidates, references)


# -------------------------------------------------------------------- without Java

_ALPHA, _BETA, _GAMMA = 0.85, 0.2, 0.6  # of METEOR 1.5 for English
_STEM_WEIGHT = 0.6


def meteor_lite(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> MeteorResult:
    """A METEOR of exact and stem matches only. **Not METEOR 1.5**: never set it beside published figures.

    Formula and parameters are METEOR 1.5's (precision and recall of matched words, weighted 1 exact and 0.6 stem,
    harmonic mean with alpha 0.85, fragmentation penalty 0.6 * (chunks / matches) ** 0.2). What is missing are synonyms,
    paraphrases and the discount of function words; the stems are those of step 1 of Porter's algorithm; the alignment
    is greedy, longest run first; the corpus score is the mean. Tokens are those of `captioning.tokenize`.

    Raises:
        InputError: as `foveate.metrics.captioning.cider_d`.
    """
    candidates, references = caption_pairs(candidates, references)
    stems: dict[str, str] = {}

    def words(caption: str) -> list[tuple[str, str]]:
        return [(word, stems.setdefault(word, _stem(word))) for word in tokenize(caption).split()]

    per_sample = np.array(
        [
            max(_lite_score(words(candidate), words(reference)) for reference in group)
            for candidate, group in zip(candidates, references, strict=True)
        ]
    )
    return MeteorResult(float(per_sample.mean()), per_sample)


def _lite_score(candidate: list[tuple[str, str]], reference: list[tuple[str, str]]) -> float:
    pairs = _align([stem for _, stem in candidate], [stem for _, stem in reference])
    if not pairs:
        return 0.0
    weight = sum(1.0 if candidate[i][0] == reference[j][0] else _STEM_WEIGHT for i, j in pairs)
    precision, recall = weight / len(candidate), weight / len(reference)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    chunks = 1 + sum(after != (i + 1, j + 1) for (i, j), after in itertools.pairwise(pairs))
    whole = chunks == 1 and len(pairs) == len(candidate) == len(reference)
    return mean * (1 - (0.0 if whole else _GAMMA * (chunks / len(pairs)) ** _BETA))


def _align(candidate: list[str], reference: list[str]) -> list[tuple[int, int]]:
    """Pairs of equal entries, each used once, taken by the longest run of both lists first; in candidate order."""
    free_i, free_j = set(range(len(candidate))), set(range(len(reference)))
    pairs: list[tuple[int, int]] = []
    while True:
        best: list[tuple[int, int]] = []
        for i in sorted(free_i):
            for j in sorted(free_j):
                length = 0
                while i + length in free_i and j + length in free_j and candidate[i + length] == reference[j + length]:
                    length += 1
                if length > len(best):
                    best = [(i + k, j + k) for k in range(length)]
        if not best:
            return sorted(pairs)
        pairs += best
        free_i.difference_update(i for i, _ in best)
        free_j.difference_update(j for _, j in best)


_VOWEL = re.compile(r"[aeiou]|(?<=[^aeiou])y")
_SHORT = re.compile(r"(?:[^aeiou]*)[aeiouy][^aeiouwxy]")


def _stem(word: str) -> str:
    """Step 1 of Porter's algorithm (1980): plurals, -ed and -ing, final y."""
    for ending, other in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending):
            word = word.removesuffix(ending) + other
            break
    if not word.endswith("eed"):
        for ending in ("ed", "ing"):
            stem = word.removesuffix(ending)
            if stem != word and _VOWEL.search(stem):
                word = _mended(stem)
                break
    if word.endswith("y") and _VOWEL.search(word[:-1]):
        word = word[:-1] + "i"
    return word


def _mended(stem: str) -> str:
    """What -ed and -ing left: "hopp" -> "hop", "rid" -> "ride", "locat" -> "locate"."""
    if stem.endswith(("at", "bl", "iz")) or _SHORT.fullmatch(stem):
        return stem + "e"
    if len(stem) > 1 and stem[-1] == stem[-2] and stem[-1] not in "aeioulsz":
        return stem[:-1]
    return stem
