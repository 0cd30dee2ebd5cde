"""METEOR: the Java programs where Java is, a stand-in that speaks METEOR's lines, and the metric without Java."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from foveate.errors import InputError
from foveate.metrics.captioning import cider_d
from foveate.metrics.meteor import Meteor, check_java, meteor_lite, meteor_of, ptb_tokenize, score_captions

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")

# Answers SCORE with the hypothesis' number of words, EVAL with these and 100 for the corpus, in METEOR's protocol.
FAKE_JAVA = f"""#!{sys.executable}
import sys
if "-version" in sys.argv or "-cp" in sys.argv:
    sys.exit(BROKEN)
log = open("LOG", "a")
for line in sys.stdin:
    parts = [part.strip() for part in line.rstrip("\\n").split("|||")]
    print(line.rstrip("\\n"), file=log, flush=True)
    if parts[0] == "SCORE":
        if parts[-1] == "die":
            print("out of memory", file=sys.stderr)
            sys.exit(1)
        print("what" if parts[-1] == "babble" else float(len(parts[-1].split())), flush=True)
    else:
        print("\\n".join([*parts[1:], "100.0"]), flush=True)
print("closed", file=log, flush=True)
"""


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    program = tmp_path / "java"
    program.write_text(FAKE_JAVA.replace("LOG", str(tmp_path / "log")).replace("BROKEN", "0"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "log"


def test_lite_by_hand() -> None:
    """P = 2/3, R = 2/2 matched in one chunk: F = P R / (.85 P + .15 R), penalty .6 (1/2)^.2."""
    fmean = (2 / 3) / (0.85 * 2 / 3 + 0.15)
    expected = fmean * (1 - 0.6 * 0.5**0.2)
    assert meteor_lite(["a red car"], [["red car"]]).score == pytest.approx(expected, rel=1e-12)
    # Two chunks of the same three words; the best reference counts; a stem match weighs .6.
    swapped = meteor_lite(["car a red"], [["nothing", "a red car"]])
    assert swapped.score == pytest.approx(1 - 0.6 * (2 / 3) ** 0.2, rel=1e-12)
    stem = meteor_lite(["cars"], [["car"]])
    assert stem.score == pytest.approx(0.6, rel=1e-12)


def test_lite_of_equal_and_of_foreign_captions() -> None:
    result = meteor_lite(["A red car.", "dog", ""], [["a red car"], ["cat"], ["cat"]])
    np.testing.assert_array_equal(result.per_sample, [1.0, 0.0, 0.0])
    assert result.score == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("word", "same"),
    [("hopping", "hop"), ("riding", "ride"), ("caresses", "caress"), ("ponies", "pony"), ("striped", "stripe")],
)
def test_lite_knows_endings(word: str, same: str) -> None:
    assert meteor_lite([word], [[same]]).score == pytest.approx(0.6)
    assert meteor_lite(["sing"], [["s"]]).score == 0.0


def test_without_java_everything_but_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    monkeypatch.setenv("PATH", "")
    for call in (check_java, lambda: ptb_tokenize(["a"]), lambda: meteor_of(["a"], [["a"]])):
        with pytest.raises(
            InputError, match=r"no 'java' on the PATH; install a Java runtime, or take the scorer 'lite'"
        ):
            call()
    captions, references = ["a red car", "a dog"], [["a red car!"], ["the dog"]]
    scores = score_captions(captions, references, official=False)
    assert scores.meteor == meteor_lite(captions, references).score
    assert scores.cider == cider_d(["a red car", "a dog"], [["a red car"], ["the dog"]]).score > 0


def test_missing_package_and_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("foveate.metrics.meteor.METEOR_JAR", "meteor/none.jar")
    package = tmp_path / "pycocoevalcap"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("pycocoevalcap", None)
    with pytest.raises(InputError, match=r"none\.jar is missing from the installed pycocoevalcap; pip install"):
        check_java()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pycocoevalcap, which is not installed; pip install 'foveate\[caption\]'"):
        check_java()


def test_one_process_answers_in_order_and_is_closed(fake_java: Path) -> None:
    assert check_java().startswith("METEOR 1.5 and PTB tokenizer of pycocoevalcap")
    with Meteor() as meteor:
        first = meteor.score(["a b", "c ||| d\n\u2028 e"], [["x", "y\nz"], ["w"]])
        second = meteor.score(["f"], [["v"]])
        process = meteor._process
    assert (first.per_sample.tolist(), first.score, second.per_sample.tolist()) == ([2.0, 3.0], 100.0, [1.0])
    assert process.poll() is not None
    assert fake_java.read_text().splitlines()[:4] == [
        "SCORE ||| x ||| y z ||| a b",
        "SCORE ||| w ||| c d e",
        "EVAL ||| 2.0 ||| 3.0",
        "SCORE ||| v ||| f",
    ]


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("die", r"the METEOR process ended early \(out of memory\); check that Java runs"),
        ("babble", "METEOR answered 'what' instead of a score"),
    ],
)
def test_a_process_that_fails(fake_java: Path, caption: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence), Meteor() as meteor:
        meteor.score([caption], [["a"]])


def test_a_java_that_does_not_run(fake_java: Path) -> None:
    program = fake_java.with_name("java")
    program.write_text(program.read_text().replace("sys.exit(0)", "sys.exit('no runtime is installed')"))
    with pytest.raises(InputError, match=r"java does not run \(no runtime is installed\)"):
        check_java()
    with pytest.raises(InputError, match="the PTB tokenizer gave 0 lines for 1 captions"):
        ptb_tokenize(["a"])


@needs_java
def test_ptb_tokens() -> None:
    """Hand-checked against the tokenizer's own rules: contractions split, punctuation gone, brackets kept."""
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    captions = ["A man's dog, don't!", "", "caf\u00e9 \u2028 (x) -- e.g.\r\ntwo", "cannot", ""]
    tokens = ["a man 's dog do n't", "", "caf\u00e9 -lrb- x -rrb- e.g. two", "can not", ""]
    assert ptb_tokenize(captions) == tokens
    assert ptb_tokenize([]) == []


@needs_java
@pytest.mark.slow
def test_meteor_of_the_jar() -> None:
    """Equal to pycocoevalcap's own call; a corpus score is of the summed counts, not a mean."""
    wrapper = pytest.importorskip("pycocoevalcap.meteor.meteor").Meteor()
    candidates = ["a red car", "a red car", "a dog runs", "", "caf\u00e9"]
    references = [["the red car", "a car"], ["a red car"], ["the puppy is running", "a cat"], ["a car"], ["caf\u00e9"]]
    with Meteor() as meteor:
        ours = meteor.score(candidates, references)
    score, per_sample = wrapper.compute_score(dict(enumerate(references)), {k: [c] for k, c in enumerate(candidates)})
    np.testing.assert_allclose(ours.per_sample, per_sample, rtol=1e-12)
    assert ours.score == pytest.approx(score, rel=1e-12)
    assert ours.per_sample[1] == 1.0
    assert not math.isclose(ours.score, ours.per_sample.mean())
