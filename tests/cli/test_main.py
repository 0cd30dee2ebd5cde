"""The contract of the command line: help at once, one sentence and exit code 2 for what the user can mend."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from foveate import cli
from foveate.errors import CheckpointError, InputError, RecipeError
from foveate.training.runner import EvaluationResult


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize("verb", ["describe", "world", "train", "evaluate", "tune-views"])
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
        (["descibe"], "Did you mean 'describe'?"),
        (["describe", "x.png", "--boxs", "b.json"], "--boxes"),
        (["describe"], "see `foveate describe --help`."),
        (["describe", "x.png", "--beams", "many"], "Invalid value for '--beams'"),
        (["describe", "x.png", "--box"], "'--box'"),
        (["evaluate", "recipe.yaml"], "Missing option '--model'; see `foveate evaluate --help`."),
        (["world", "scene"], "Did you mean 'scenes'?"),
        (["--modl"], "No such option: --modl"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("foveate: ")
    assert len(err.splitlines()) == 1
    assert sentence in err


@pytest.mark.parametrize("arguments", [[], ["world"]])
def test_nothing_asked_shows_the_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert "Usage: foveate" in out + err
    assert "--help" in out + err


ERRORS = [
    (InputError("the box is empty;\n give another."), "foveate: the box is empty; give another.\n"),
    (CheckpointError("the file is truncated."), "foveate: the file is truncated.\n"),
    (RecipeError("there is no key 'trainin'."), "foveate: there is no key 'trainin'.\n"),
    (InputError("\x1b[31mred.png\x07 is not an image."), "foveate: \ufffd[31mred.png\ufffd is not an image.\n"),
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "foveate: no space left on device; mend this and run the command again.\n",
    ),
    (
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/out.json"),
        "foveate: permission denied (/a/out.json); mend this and run the command again.\n",
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
    assert run(capsys, "evaluate", "recipe.yaml", "--model", "m") == (130, "", "foveate: interrupted.\n")


@pytest.mark.parametrize("failing", [ERRORS[0][0]], indirect=True)
def test_handlers_of_signals_are_put_back(capsys: pytest.CaptureFixture[str], failing: BaseException) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    assert run(capsys, "evaluate", "recipe.yaml", "--model", "m")[0] == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes under /proc")
@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM."),
        (signal.SIGHUP, 129, "ended by SIGHUP."),
        (signal.SIGINT, 130, "interrupted."),
    ],
)
def test_a_signal_leaves_neither_files_nor_processes(
    tmp_path: Path, number: signal.Signals, code: int, sentence: str
) -> None:
    arguments = ["world", "scenes", "--out", "made/out", "--count", "100000", "--size", "32", "--processes", "2"]
    script = f"from foveate.cli import main\nif __name__ == '__main__': main({arguments})"
    (tmp_path / "script.py").write_text(script)
    run = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        _end(run, tmp_path, number, code, sentence)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def _end(run: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, code: int, sentence: str) -> None:
    for _ in range(1200):
        if any(tmp_path.glob("made/.out.*/VG_100K/*.png")):
            break
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as a terminal does: the renderers must not answer for themselves
    else:
        run.send_signal(number)
        run.send_signal(number)  # as `timeout` does
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (code, f"foveate: {sentence}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
    for _ in range(300):
        if not any(of_group(run.pid)):
            return
        time.sleep(0.1)
    pytest.fail(f"{[*of_group(run.pid)]} still run")


def of_group(group: int) -> Iterator[str]:
    """Running processes of a group, without those that have ended and that nobody has waited for."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, its_group = rest.split()[:3]
            if int(its_group) == group and state != "Z":
                yield name


def test_progress_bars_of_weights_are_off_and_those_of_downloads_on(capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

    for verb in (["train", "none.yaml"], ["evaluate", "none.yaml", "--model", "clip-world"]):
        enable_progress_bar()
        assert run(capsys, *verb)[0] == 2
        assert not is_progress_bar_enabled()
        assert not are_progress_bars_disabled()


@pytest.mark.parametrize("failing", [ZeroDivisionError()], indirect=True)
def test_a_fault_of_ours_is_not_dressed_up(failing: BaseException) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", "recipe.yaml", "--model", "m"])


def test_quantized_metrics_stand_beside_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def evaluate(*arguments: Any, **options: Any) -> EvaluationResult:
        asked.append(options["quantize"])
        after = {"accuracy": 0.5, "per": {"cat": 0.25, "dog": float("nan")}, "regions": 64, "dataset": "d"}
        before = {"accuracy": 0.625, "per": {"cat": 0.25, "dog": 1.0}, "regions": 64, "dataset": "d"}
        return EvaluationResult("dynrefer", "m", after, 3.0, "int8", before, 2.0)

    monkeypatch.setattr("foveate.training.runner.evaluate", evaluate)
    code, out, _ = run(capsys, "evaluate", "recipe.yaml", "--model", "dynrefer-world", "--quantize", "int8")
    assert code == 0
    assert asked == ["int8"]
    assert "int8 3 s, unquantised 2 s" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["accuracy", "0.625", "0.5", "-0.12"],
        ["per.cat", "0.25", "0.25", ""],
        ["per.dog", "1", "nan", ""],
        ["regions", "64", "64", ""],
        ["dataset", "d", "", ""],
    ]
