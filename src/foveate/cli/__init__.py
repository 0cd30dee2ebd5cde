"""The command line: one file per verb, no logic beyond arguments and printing.

Everything heavy is imported inside the verbs, so that `foveate --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from foveate.cli import describe, evaluate, train, world
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
app.add_typer(world.app, name="world")
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)


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
    after Ctrl-C. A fault of foveate itself keeps its traceback, which `--debug` shows for the others too.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # transformers' own notes and bars would stand between the lines of a result.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A file name that is not valid in the terminal's encoding is shown escaped rather than being an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    try:
        typer.main.get_command(app).main(args=arguments, prog_name="foveate")
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
    except KeyboardInterrupt:
        _fail("interrupted.", code=130)
    sys.exit(0)


def _fail(sentence: str, code: int = 2) -> NoReturn:
    # One line whatever the message quotes, and no control characters of a hostile file name on the terminal.
    line = " ".join(sentence.split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    print(f"foveate: {line}", file=sys.stderr)
    sys.exit(code)


def _os_sentence(error: OSError) -> str:
    """What the operating system refused, as one sentence."""
    reason = error.strerror or str(error) or type(error).__name__
    what = f" ({error.filename})" if error.filename is not None else ""
    return f"{reason[:1].lower()}{reason[1:]}{what}; the output was not written, mend this and run the command again."
