"""The conversation of `foveate ask` without a question: lines in, streamed answers out."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from foveate.cli.box_options import BoxChoice, draw_found
from foveate.cli.options import one_line
from foveate.cli.outputs import draw_kept, free_name
from foveate.errors import FoveateError, InputError


def chat(predictor: Any, picture: Path, boxes: Any, choice: BoxChoice, generation: dict[str, Any]) -> None:
    """Answers lines of standard input until it ends, or `/quit`.

    Args:
        predictor: an MG-LLaVA.
        picture: what is talked about first.
        boxes: its boxes, as the predictor takes them.
        choice: where the boxes of other pictures come from.
        generation: settings of every answer.

    Raises:
        FoveateError: the first picture cannot be used. What is wrong later is said, and the conversation goes on.
    """
    talk = _Chat(predictor, choice, generation)
    talk.look_at(picture, boxes)
    for line in _lines():
        try:
            if not talk.answer(line):
                return
        except FoveateError as error:
            print(f"foveate: {one_line(str(error))}", file=sys.stderr, flush=True)


class _Chat:
    def __init__(self, predictor: Any, choice: BoxChoice, generation: dict[str, Any]) -> None:
        self.predictor = predictor
        self.choice = choice
        self.generation = generation
        self.picture = Path()
        self.boxes: Any = None
        self.talk: Any = None
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "image": ("FILE", "talk about another image or video", self._image),
            "boxes": (
                "[FILE.json | found | none | X0,Y0,X1,Y1 ...]",
                "show the boxes and draw them, or look at others",
                self._boxes,
            ),
            "keep": ("[SHARE | all]", "read so much of a picture, 0.2 for a fifth; show what is kept", self._keep),
            "reset": ("", "forget what was said", self._reset),
            "help": ("", "this list", self._help),
            "quit": ("", "leave, as the end of the input does", self._help),
        }

    def answer(self, line: str) -> bool:
        """Does what a line says; whether the conversation goes on."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self._say(text)
            return True
        name, _, argument = text[1:].partition(" ")
        if name == "quit":
            return False
        if name not in self.commands:
            from foveate.checkpoints import suggestion

            raise InputError(f"there is no command /{name}{suggestion(name, self.commands)}; /help lists them.")
        self.commands[name][2](argument.strip())
        return True

    def look_at(self, picture: Path, boxes: Any) -> None:
        """Starts anew, with this picture. It is encoded here, once."""
        seen = self.predictor.see(picture, boxes)
        self.picture, self.boxes = picture, boxes
        self.talk = self.predictor.conversation(seen, **self.generation)
        total = sum(map(len, seen.boxes))
        frames = f"{len(seen.boxes)} frames, " if len(seen.boxes) > 1 else ""
        _note(
            f"{one_line(str(picture))}: {frames}{total} box{'es' * (total != 1)}. /help lists commands, /quit leaves."
        )

    def _say(self, question: str) -> None:
        begun = False
        try:
            with _stopping() as stopped, closing(self.talk.stream(question)) as stream:
                for piece in stream:
                    piece = piece if begun else piece.lstrip()
                    begun = begun or bool(piece)
                    print(piece, end="", flush=True)
                    if stopped():
                        break
        except KeyboardInterrupt:
            print(flush=True)
            _note("interrupted; the question does not count.")
            return
        print(flush=True)
        if stopped():
            _note("stopped here.")
        elif self.talk.turns[-1][1].finish == "length":
            _note("the answer ends at the limit of tokens; --max-new-tokens N lets it go on.")

    def _image(self, argument: str) -> None:
        if not argument:
            raise InputError("/image needs the path of an image or a video.")
        picture = Path(argument).expanduser()
        self.look_at(picture, self.choice.records([picture])[0])

    def _boxes(self, argument: str) -> None:
        if argument:
            self.look_at(self.picture, self.choice.said(argument, self.picture))
            return
        seen = self.talk.seen
        for number, (boxes, labels) in enumerate(zip(seen.boxes, seen.labels, strict=True), start=1):
            if len(seen.boxes) > 1:
                print(f"frame {number}")
            for row, (box, label) in enumerate(zip(boxes, labels, strict=True), start=1):
                print(f"{row:>3}  [{', '.join(f'{value:g}' for value in box)}]{'  ' * bool(label)}{label}")
            if not boxes:
                print("no boxes")
        path = free_name(Path(f"{self.picture.stem}-boxes.png"))
        draw_found(self.picture, [(own, names, None) for own, names in zip(seen.boxes, seen.labels, strict=True)], path)
        print(f"written: {path}", flush=True)

    def _keep(self, argument: str) -> None:
        from foveate import drop_visual_tokens
        from foveate.methods.hired.configuration import check_budget
        from foveate.methods.hired.dropping import active_dropping

        dropping = active_dropping(self.predictor.model)
        if not argument:
            if dropping is None:
                _note("all of a picture is read; /keep 0.2 reads a fifth of it.")
                return
            for kept in self.talk.seen.kept:
                print(f"{kept.count} of {kept.total} tokens are kept")
            if len(self.talk.seen.kept) == 1:
                path = free_name(Path(f"{self.picture.stem}-tokens.png"))
                draw_kept(self.picture, self.talk.seen.kept, path)
                print(f"written: {path}", flush=True)
            return
        share = 1.0
        if argument != "all":
            try:
                share = float(argument)
            except ValueError:
                raise InputError(f"/keep takes a share such as 0.2, or all, not {argument!r}.") from None
            check_budget(share)
        if dropping is not None:
            dropping.remove()
        if share < 1:
            drop_visual_tokens(self.predictor, share)
        self.look_at(self.picture, self.boxes)

    def _reset(self, argument: str) -> None:
        self.talk = self.predictor.conversation(self.talk.seen, **self.generation)
        _note("what was said is forgotten.")

    def _help(self, argument: str) -> None:
        for name, (usage, what, _) in self.commands.items():
            print(f"/{name} {usage}".rstrip().ljust(52) + what)
        print("anything else".ljust(52) + "a question; Ctrl-C ends its answer", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Lines of standard input; at a terminal with a prompt, and Ctrl-C empties the line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is the predictor's to refuse
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history and keys to edit with)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _note("/quit or Ctrl-D leaves.")


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; a second one is raised as usual.

    An answer is ended between two tokens, so that what was said stays said.
    """
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press) if threading.current_thread() is threading.main_thread() else None
    try:
        yield lambda: pressed
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
