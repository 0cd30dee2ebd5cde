"""The command line: one file per verb, no logic beyond arguments and printing.

Everything heavy is imported inside the verbs, so that `foveate --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from foveate.cli import ask, bench, boxes, classify, convert, describe, evaluate, serve, train, tune_views, world
from foveate.cli.options import one_line
from foveate.errors import FoveateError

# Plain help and errors: they can be searched, piped and read by a screen reader, and rich is not imported for them.
app = typer.Typer(
    name="foveate",
    help="Fine-grained vision-language work: describe any region of an image.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("describe")(describe.describe)
app.command("ask")(ask.ask)
app.command("boxes")(boxes.boxes)
app.command("classify")(classify.classify)
app.add_typer(world.app, name="world")
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("serve")(serve.serve)
app.command("tune-views")(tune_views.tune_views)
app.add_typer(convert.app, name="convert")
app.add_typer(bench.app, name="bench")

# typer carries a copy of click from some version on, so the error is found through one that it gives out.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        print(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits.

    The exit code is 0 if all went well, 2 for anything that the user can mend (one sentence on stderr says what), 130
    after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. A fault of foveate itself keeps its traceback, which `--debug`
    shows for the others too.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # transformers' own notes and bars would stand between the lines of a result.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A file name that is not valid in the terminal's encoding is shown escaped rather than being an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    code = 0
    try:
        with _ending_cleanly(), _warnings_as_notes():
            # Not standalone: typer would print a usage error in three lines, and nothing after Ctrl-C.
            code = typer.main.get_command(app).main(args=arguments, prog_name="foveate", standalone_mode=False) or 0
    except _UsageError as error:
        _fail_usage(error)
    except FoveateError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:
        if debug:
            raise
        _fail(_os_sentence(error))
    except MemoryError:
        if debug:
            raise
        _fail("the memory of this machine is not enough; give a smaller --batch-size or fewer regions at a time.")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except _Ended as ended:
        _fail(f"ended by {signal.Signals(ended.number).name}.", code=128 + ended.number)
    if code == 130:
        _fail("interrupted.", code)
    sys.exit(code)


class _Ended(SystemExit):
    """A signal asked the program to end. Like any exception it lets everything clean up on its way."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise `_Ended`, so that no half-written file and no process is left."""

    def end(number: int, _: FrameType | None) -> None:
        # `timeout` and others send it twice, and the second must not break off the cleaning up.
        signal.signal(number, signal.SIG_IGN)
        raise _Ended(number)

    numbers: list[int] = []
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        # What the caller handles, or ignores as `nohup` does, stays so.
        numbers = [number for number in known if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Within the block, what is worth a user's attention is one line on stderr, without the place in the code."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"note: {one_line(str(message))}", file=sys.stderr)
        else:
            standard(message, category, filename, lineno, *rest)

    with warnings.catch_warnings():
        standard, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("default", UserWarning)  # once a place
        yield


def _fail_usage(error: Any) -> NoReturn:
    """A misspelt verb or option, a missing or wrong value: click's sentence, and where to look."""
    message = error.format_message()
    if "\n" in message:  # nothing was asked for, and the message is the help
        error.show()
        sys.exit(error.exit_code)
    if not message.endswith("?"):  # "Did you mean ...?" says already what to do
        command = error.ctx.command_path if error.ctx is not None else "foveate"
        message = f"{message.rstrip('.')}; see `{command} --help`."
    _fail(message)


def _fail(sentence: str, code: int = 2) -> NoReturn:
    print(f"foveate: {one_line(sentence)}", file=sys.stderr)
    sys.exit(code)


def _os_sentence(error: OSError) -> str:
    """What the operating system refused, as one sentence."""
    reason = error.strerror or str(error) or type(error).__name__
    what = f" ({error.filename})" if error.filename is not None else ""
    return f"{reason[:1].lower()}{reason[1:]}{what}; mend this and run the command again."
