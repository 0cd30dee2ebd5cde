"""`foveate ask` from the files to the exit code, with a model whose weights are random and whose parts are all real."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mg_llava_parts import make_model, make_tokenizer  # pyright: ignore[reportMissingImports] (conftest.py)
from PIL import Image

import foveate
from foveate import cli
from foveate.methods.mg_llava.processing import MGLlavaProcessor
from foveate.world.scenes import render_scene

Run = Callable[..., tuple[int, str, str]]
BOXES = [[5, 5, 40, 30], [50, 10, 90, 60]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose answers depend on pictures and boxes, loudly; do not write into it."""
    model = make_model()
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
                part.weight.mul_(10)
    path = tmp_path_factory.mktemp("ask") / "tiny"
    model.save_pretrained(path)
    MGLlavaProcessor(make_tokenizer(), model.config).save_pretrained(path)
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pictures and a file of their boxes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("foveate.cli.options.SECONDS_BETWEEN_LOG_LINES", float("inf"))
    for number in range(2):
        Image.fromarray(render_scene(number, (100, 80)).image).save(f"{number}.png")
    record = {"boxes": BOXES, "scores": [0.5, 0.75], "labels": ["cat", "bus"]}
    Path("boxes.json").write_text(json.dumps([{"id": "0", **record}, {"id": "1", **record, "boxes": BOXES[::-1]}]))
    return tmp_path


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Any:
    return foveate.load(folder, device="cpu")


@pytest.fixture
def run(
    folder: Path, work: Path, predictor: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    load = foveate.load

    def load_once(name: str, *, proposer: Any, **options: Any) -> Any:
        """The model is read from its files once where no option asks for another."""
        if proposer is None and all(value is None for value in options.values()):
            return predictor
        return load(name, proposer=proposer, **options)

    monkeypatch.setattr("foveate.methods.load", load_once)

    def run(*arguments: object, said: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        with pytest.raises(SystemExit) as caught:
            cli.main(["ask", *map(str, arguments), "--model", str(folder)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The sentence on stderr of a command that failed as it should."""
    code, out, err = result
    assert (code, out) == (2, "")
    [sentence] = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert sentence.startswith("foveate: ")
    return sentence


# ---------------------------------------------------------------- questions


def test_one_question(run: Run, predictor: Any) -> None:
    expected = predictor.ask("0.png", "What is it?")
    assert run("0.png", "What is it?", "--boxes", "none")[:2] == (0, f"{expected.text}\n")
    code, out, err = run("0.png", "What is it?", "--max-new-tokens", 3)
    assert (code, out) == (0, f"{predictor.ask('0.png', 'What is it?', max_new_tokens=3).text}\n")
    assert "note: no boxes, so no object is looked at by itself" in err
    assert "1 of 1 answers end at 3 tokens" in err


def test_settings_of_generation_reach_the_model(run: Run, predictor: Any) -> None:
    options = ["--boxes", "none", "--temperature", 1.5, "--seed"]
    said = [run("0.png", "What is it?", *options, seed)[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert said[0].strip() == predictor.ask("0.png", "What is it?", temperature=1.5, seed=1).text


def test_boxes_of_a_file_are_used_and_drawn(run: Run, predictor: Any) -> None:
    code, out, err = run("0.png", "What?", "--boxes", "boxes.json", "--json", "--picture", "seen.png")
    assert (code, "written: seen.png" in err) == (0, True)
    [said] = json.loads(out)
    record = {"boxes": BOXES, "scores": [0.5, 0.75], "labels": ["cat", "bus"]}
    expected = predictor.ask("0.png", "What?", boxes=record)
    assert said["answer"] == expected.text != predictor.ask("0.png", "What?", boxes=[]).text
    # By score, as the model takes them.
    assert (said["boxes"], said["labels"]) == (BOXES[::-1], ["bus", "cat"])
    assert said["picture"] == "0.png"
    assert said["question"] == "What?"
    assert len(said["gate"]) == 1
    assert set(said["milliseconds"]) == {"boxes", "pictures", "towers", "answer"}
    drawn = Image.open("seen.png").convert("RGB")
    scale = 1024 / 100
    # The number of the first box stands in a patch of its colour at the box's upper left corner.
    colour, other = (drawn.getpixel((round(x * scale) + 1, round(y * scale) + 20)) for x, y in ((50, 10), (5, 5)))
    assert colour != other
    code, out, _ = run("0.png", "What?", "--box", "5,5,40,30", "--json")
    [said] = json.loads(out)
    assert (said["boxes"], said["labels"]) == ([BOXES[0]], [""])


def test_every_question_about_every_picture(run: Run, predictor: Any) -> None:
    questions = ["What?", "How many?"]
    options = [part for question in questions for part in ("--question", question)]
    code, out, err = run("0.png", "1.png", *options, "--boxes", "boxes.json", "--batch-size", 3, "--picture", "seen")
    assert code == 0
    lines = out.splitlines()
    assert [line for line in lines if line.endswith(("?",)) and line.startswith(("0.png", "1.png"))] == [
        f"{name}  {question}" for name in ("0.png", "1.png") for question in questions
    ]
    assert "written: seen/0-boxes.png" in err
    assert "written: seen/1-boxes.png" in err
    code, out, _ = run("0.png", "1.png", "What?", "--boxes", "boxes.json", "--json")
    alone = [json.loads(run(name, "What?", "--boxes", "boxes.json", "--json")[1])[0] for name in ("0.png", "1.png")]
    assert [one["answer"] for one in json.loads(out)] == [one["answer"] for one in alone]


def test_what_finds_boxes(run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(work / "cache"))
    code, out, err = run("0.png", "What?", "--boxes", "proposer-world", "--json")
    assert (code, "proposer-world knows the rendered world only" in err) == (0, True)
    [said] = json.loads(out)
    assert {thing.category for thing in render_scene(0, (100, 80)).instances} & set(said["labels"])
    assert len(list((work / "cache" / "boxes").rglob("*.json"))) == 1
    assert json.loads(run("0.png", "What?", "--boxes", "proposer-world", "--json")[1])[0]["boxes"] == said["boxes"]


def test_a_share_of_the_tokens_is_read_and_shown(run: Run, folder: Path) -> None:
    code, out, _ = run("0.png", "what?", "--box", "5,5,40,30", "--keep", 0.5, "--show-tokens", "kept.png", "--json")
    assert code == 0
    (row,) = json.loads(out)
    (kept,) = row["kept"]
    assert (kept["kept"], kept["of"]) == (2, 4)
    expected = foveate.load(folder, device="cpu", keep_tokens=0.5).ask("0.png", "what?", boxes=[BOXES[0]])
    assert row["answer"] == expected.text
    assert kept["partitions"][0]["tokens"] == expected.kept[0].keep[0].nonzero()[0].tolist()
    picture, original = Image.open("kept.png"), Image.open("0.png").convert("RGB")
    size = (picture.width // 10, picture.height // 10)
    ratio = np.asarray(picture.resize(size), float).mean(2) / np.asarray(original.resize(size), float).mean(2)
    assert 0.2 < (ratio < 0.5).mean() < 0.8, "some of the picture is dark, and some is not"
    code, _, err = run("0.png", "what?", "--show-tokens", "kept.png")
    assert (code, "say --keep" in err) == (2, True)
    for budget in ("0", "1.5", "nan"):
        code, _, err = run("0.png", "what?", "--keep", budget)
        assert (code, "share above 0 and at most 1" in err) == (2, True)


def test_a_conversation_reads_less_and_all_again(run: Run, predictor: Any) -> None:
    whole = predictor.ask("0.png", "what?", boxes=[BOXES[0]]).text
    said = "/keep\n/keep 0.5\nwhat?\n/keep\n/keep 7\n/keep x\n/keep all\nwhat?\n"
    code, out, err = run("0.png", "--box", "5,5,40,30", said=said)
    assert code == 0
    lines = out.splitlines()
    with foveate.drop_visual_tokens(predictor, 0.5):
        less = predictor.ask("0.png", "what?", boxes=[BOXES[0]]).text
    assert less != whole
    assert lines[0].strip() == less.splitlines()[0]
    assert "2 of 4 tokens are kept" in lines
    assert Path("0-tokens.png").is_file()
    assert out.rstrip().endswith(whole.rstrip())
    assert "all of a picture is read" in err
    assert "not 7" in err
    assert "not 'x'" in err


def test_a_video(run: Run, predictor: Any) -> None:
    frames = [Image.open(f"{number % 2}.png") for number in range(5)]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
    found = {"boxes": BOXES, "scores": [0.5, 0.5], "labels": ["cat", "cat"]}
    Path("clip.json").write_text(
        json.dumps([{"id": "clip", "frames": [found, {**found, "boxes": BOXES[::-1]}, found]}])
    )
    code, out, _ = run("clip.gif", "What happens?", "--boxes", "clip.json", "--json", "--picture", "clip.png")
    assert code == 0
    [said] = json.loads(out)
    assert len(said["boxes"]) == len(said["labels"]) == len(said["gate"]) == 3
    assert said["answer"] == predictor.ask("clip.gif", "What happens?", boxes=[found] * 3).text
    assert Image.open("clip.png").width > 3 * 480
    none = predictor.ask("clip.gif", "What happens?")
    assert run("clip.gif", "What happens?", "--boxes", "none")[1] == f"{none.text}\n"


# ---------------------------------------------------------------- bad input


def test_no_boxes_are_no_error(run: Run, predictor: Any) -> None:
    Path("none.json").write_text("[]")
    code, out, _ = run("0.png", "What?", "--boxes", "none.json", "--json")
    assert code == 0
    assert json.loads(out)[0]["boxes"] == []
    assert json.loads(out)[0]["answer"] == predictor.ask("0.png", "What?", boxes=[]).text


def test_101_boxes(run: Run) -> None:
    drawn = [[k % 50, k // 50, k % 50 + 9, k // 50 + 9] for k in range(101)]
    Path("many.json").write_text(json.dumps(drawn))
    assert "101 boxes are given and at most 100 are used" in refused(run("0.png", "What?", "--boxes", "many.json"))
    Path("many.json").write_text(json.dumps(drawn[:100]))
    code, out, _ = run("0.png", "What?", "--boxes", "many.json", "--json")
    assert (code, len(json.loads(out)[0]["boxes"])) == (0, 100)
    # Those of a detector are chosen from: the 20 best of each label where they are more than 100.
    spread = [[5 * (k % 20), 5 * (k // 20), 5 * (k % 20) + 4, 5 * (k // 20) + 4] for k in range(101)]
    found = {"boxes": spread, "scores": [0.5] * 101, "labels": ["cat"] * 101}
    Path("many.json").write_text(json.dumps([{"id": "0", **found}]))
    assert len(json.loads(run("0.png", "What?", "--boxes", "many.json", "--json")[1])[0]["boxes"]) == 20


def test_boxes_of_another_image(run: Run) -> None:
    Path("2.png").write_bytes(Path("0.png").read_bytes())
    assert "boxes.json has no boxes for 2.png" in refused(run("2.png", "What?", "--boxes", "boxes.json"))
    record = {"boxes": [[300, 200, 400, 300]], "scores": [0.5], "labels": ["cat"]}
    Path("far.json").write_text(json.dumps([{"id": "0", **record}]))
    assert "lies outside the picture of 100x80 pixels; the record is of another image" in refused(
        run("0.png", "What?", "--boxes", "far.json")
    )
    assert "leaves the image, 100 wide" in refused(run("0.png", "What?", "--box", "0,0,101,20"))


def test_a_question_of_ten_thousand_words(run: Run) -> None:
    sentence = refused(run("0.png", "why " * 10_000 + "?", "--boxes", "none"))
    assert "tokens long with its template, and at most 400 are read; shorten it" in sentence
    assert len(sentence) < 200


def test_a_video_that_does_not_decode(run: Run) -> None:
    Path("clip.mp4").write_bytes(b"no video")
    assert "clip.mp4" in refused(run("clip.mp4", "What happens?"))
    assert "does not exist" in refused(run("none.mp4", "What happens?"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.png", "What?"], "does not exist"),
        (["0.png", "1.png"], "1.png is a file, so there is no question"),
        (["0.png", "--json"], "--json, --picture and --show-tokens belong to questions"),
        (["0.png", "What?", "--boxes", "none", "--box", "0,0,1,1"], "--boxes and --box contradict each other"),
        (["0.png", "What?", "--box", "1,2,3"], "is not four numbers"),
        (["0.png", "What?", "--boxes", "none.json"], "there is no file none.json"),
        (["0.png", "What?", "--boxes", "none", "--tagger", "clip-world"], "--tagger belongs to what finds boxes"),
        (["0.png", "What?", "--picture", "0.png"], "is an input and would be overwritten"),
        (["0.png", "What?", "--boxes", "none", "--max-new-tokens", "0"], "max_new_tokens must be a whole number"),
        (["0.png", " ", "--boxes", "none"], "a question must be a text"),
        (["0.png", "What?", "--quantize", "int8"], "does not run in int8"),
    ],
)
def test_more_bad_input(run: Run, arguments: list[str], sentence: str) -> None:
    assert sentence in refused(run(*arguments))


def test_models_that_do_not_answer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, sentence in (
        ("dynrefer-world", "does not answer questions"),
        ("mg-lava", "there is no model 'mg-lava'"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["ask", "0.png", "What?", "--model", model, "--boxes", "none"])
        assert caught.value.code == 2
        assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------- conversations


def test_a_conversation_says_what_the_predictor_says(run: Run, predictor: Any) -> None:
    record = {"boxes": BOXES, "scores": [0.5, 0.75], "labels": ["cat", "bus"]}
    talk = predictor.conversation("0.png", boxes=record)
    first, second = talk.ask("What?").text, talk.ask("Why?").text
    code, out, err = run("0.png", "--boxes", "boxes.json", said="What?\n\n  Why?\n/reset\nWhat?\n/quit\nWho?\n")
    assert code == 0
    assert out == f"{first}\n{second}\n{first}\n"
    assert "0.png: 2 boxes. /help lists commands, /quit leaves." in err
    assert "what was said is forgotten" in err
    # Without /quit the end of the input ends it, and a last line needs no line end.
    assert run("0.png", "--boxes", "boxes.json", said="What?")[:2] == (0, f"{first}\n")


def test_other_pictures_and_other_boxes(run: Run, predictor: Any) -> None:
    def alone(picture: str, boxes: Any) -> str:
        return predictor.conversation(picture, boxes=boxes).ask("What?").text + "\n"

    of_file = {"boxes": BOXES[::-1], "scores": [0.5, 0.75], "labels": ["cat", "bus"]}
    commands = ["/image 1.png", "What?", "/boxes none", "What?", "/boxes 5,5,40,30 50,10,90,60", "What?", "/boxes"]
    code, out, err = run("0.png", "--boxes", "boxes.json", said="\n".join([*commands, "/boxes boxes.json", "What?"]))
    assert code == 0
    said = [alone("1.png", of_file), alone("1.png", []), alone("1.png", BOXES)]
    shown = "  1  [5, 5, 40, 30]\n  2  [50, 10, 90, 60]\nwritten: 1-boxes.png\n"
    assert out == "".join([*said, shown, said[0]])
    assert said[0] == said[2] != said[1], "the drawn boxes are those of the file"
    assert "1.png: 0 boxes" in err
    assert Image.open("1-boxes.png").width == 1024
    run("1.png", "--boxes", "none", said="/boxes")
    assert Path("1-boxes-2.png").is_file(), "nobody asked for the first one to go"


def test_mistakes_do_not_end_a_conversation(run: Run, predictor: Any) -> None:
    mistakes = {
        "/imag 1.png": "there is no command /imag (did you mean 'image'?)",
        "/image": "/image needs the path",
        "/image none.png": "does not exist",
        "/boxes found": "nothing that finds boxes is loaded",
        "/boxes 1,2": "is not four numbers",
        "/boxes 0,0,500,5": "leaves the image",
        "/boxes none.json": "there is no file none.json",
        "<image> what?": None,
        "<video> what?": "<video> may stand in the first question only",
        "why " * 200: "tokens long with its template",
        "\udcff?": "must be Unicode",
    }
    code, out, err = run("0.png", "--boxes", "none", said="\n".join([*mistakes, "/help"]))
    assert code == 0
    for sentence in mistakes.values():
        assert sentence is None or f"{sentence}" in err, sentence
    assert out.startswith(predictor.ask("0.png", "<image> what?").text), "the one that is no mistake"
    assert "/boxes [FILE.json | found | none | X0,Y0,X1,Y1 ...]" in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal(
    folder: Path, work: Path, predictor: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C empties the line, Ctrl-D leaves."""
    typed = iter(["What?", KeyboardInterrupt(), "Why?", EOFError()])

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(SystemExit) as caught:
        cli.main(["ask", "0.png", "--boxes", "none", "--model", str(folder)])
    out, err = capsys.readouterr()
    talk = predictor.conversation("0.png", boxes=[])
    assert caught.value.code == 0
    assert out == f"{talk.ask('What?').text}\n\n{talk.ask('Why?').text}\n\n"
    assert "/quit or Ctrl-D leaves" in err


def test_ctrl_c_ends_an_answer_and_what_was_said_stays_said(
    run: Run, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.language import chat as module

    stream = module.Conversation.stream
    presses: list[int] = []
    handler = signal.getsignal(signal.SIGINT)  # which a shell's background has ignored

    def pressed(self: Any, question: str, **generation: Any) -> Any:
        for piece in stream(self, question, **generation):
            if question == "What?":  # while the first piece is on its way
                presses.append(1)
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(module.Conversation, "stream", pressed)
    talk = predictor.conversation("0.png", boxes=[])
    given_up = stream(talk, "What?")
    first = next(given_up)
    given_up.close()
    rest = "".join(stream(talk, "Why?"))
    code, out, err = run("0.png", "--boxes", "none", said="What?\nWhy?\n")
    assert (code, presses) == (0, [1])
    assert out == f"{first.lstrip()}\n{rest.lstrip()}\n"
    assert "stopped here" in err
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_takes_the_question_back(run: Run, predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.methods.mg_llava.modeling import MGLlavaModel

    assemble = MGLlavaModel.assemble
    asked: list[int] = []

    def pressed(self: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(1)
        if len(asked) == 1:  # before the first token
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return assemble(self, *arguments, **options)

    expected = predictor.conversation("0.png", boxes=[]).ask("Why?").text
    monkeypatch.setattr(MGLlavaModel, "assemble", pressed)
    code, out, err = run("0.png", "--boxes", "none", said="What?\nWhy?\n")
    assert code == 0
    assert out == f"\n{expected}\n"
    assert "interrupted; the question does not count" in err
