"""The contract of the command line: help at once, one sentence and exit code 2 for what the user can mend."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate import cli
from foveate.errors import CheckpointError, InputError, RecipeError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize("verb", ["describe", "world", "train", "evaluate"])
def test_help_names_every_verb(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert f"\n  {verb}  " in out
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"foveate {verb}" in out


def test_help_and_wrong_options_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom foveate.cli import main\n"
        "for arguments in (['describe', '--help'], ['describe', 'x', '--bx', '1']):\n"
        "    try: main(arguments)\n    except SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("set()")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from foveate import __version__

    assert run(capsys, "--version") == (0, f"foveate {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["descibe"], "Did you mean 'describe'"),
        (["describe", "x.png", "--boxs", "b.json"], "--boxes"),
        (["describe"], "Missing argument"),
        (["describe", "x.png", "--beams", "many"], "Invalid value for '--beams'"),
        (["evaluate", "recipe.yaml"], "Missing option '--model'"),
        (["world", "scene"], "Did you mean 'scenes'"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err


ERRORS = [
    (InputError("the box is empty;\n give another."), "foveate: the box is empty; give another.\n"),
    (CheckpointError("the file is truncated."), "foveate: the file is truncated.\n"),
    (RecipeError("there is no key 'trainin'."), "foveate: there is no key 'trainin'.\n"),
    (InputError("\x1b[31mred.png\x07 is not an image."), "foveate: \ufffd[31mred.png\ufffd is not an image.\n"),
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "foveate: no space left on device; the output was not written, mend this and run the command again.\n",
    ),
    (
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/out.json"),
        "foveate: permission denied (/a/out.json); the output was not written, mend this and run the command again.\n",
    ),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> BaseException:
    """Evaluation ends in an error as soon as it looks for its model."""

    def find_checkpoint(_: object) -> Path:
        raise request.param

    monkeypatch.setattr("foveate.checkpoints.find_checkpoint", find_checkpoint)
    return request.param


@pytest.mark.parametrize(("failing", "sentence"), ERRORS, indirect=["failing"])
def test_an_error_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], failing: BaseException, sentence: str
) -> None:
    assert run(capsys, "evaluate", "recipe.yaml", "--model", "m") == (2, "", sentence)


@pytest.mark.parametrize("failing", [ERRORS[0][0], ERRORS[-1][0]], indirect=True)
def test_debug_shows_the_traceback(failing: BaseException) -> None:
    with pytest.raises(type(failing)):
        cli.main(["evaluate", "recipe.yaml", "--model", "m", "--debug"])


@pytest.mark.parametrize("failing", [KeyboardInterrupt()], indirect=True)
def test_interruption(capsys: pytest.CaptureFixture[str], failing: BaseException) -> None:
    assert run(capsys, "evaluate", "recipe.yaml", "--model", "m")[0] == 130


@pytest.mark.parametrize("failing", [ZeroDivisionError()], indirect=True)
def test_a_fault_of_ours_is_not_dressed_up(failing: BaseException) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", "recipe.yaml", "--model", "m"])
