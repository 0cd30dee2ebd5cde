"""`foveate boxes` from the files to the exit code, with the models that ship."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import cli
from foveate.data import open_conversations
from foveate.world.scenes import render_scene

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with three scenes and a cache of its own."""
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for number in range(3):
        Image.fromarray(render_scene(9_000_010 + number, (120, 90)).image).save(f"{number}.png")
    return folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["boxes", *map(str, arguments)])
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


def test_boxes_are_written_read_drawn_and_kept(run: Run, tmp_path: Path) -> None:
    code, out, err = run("0.png", "1.png", "--out", "boxes.json", "--picture", "drawn")
    assert (code, out) == (0, "")
    assert "note: proposer-world knows the rendered world only, nothing of photographs" in err
    assert "pictures: 2 looked at (tagger " in err
    assert "written: boxes.json" in err
    records = json.loads(Path("boxes.json").read_text())
    assert [record["id"] for record in records] == ["0", "1"]
    assert all(set(record) == {"id", "boxes", "scores", "labels"} for record in records)
    assert sum(len(record["boxes"]) for record in records) > 2
    assert all(score > 0.2 for record in records for score in record["scores"])
    assert Image.open("drawn/1-boxes.png").width == 1024
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    Path("talk.json").write_text(json.dumps([{"id": k, "image": f"{k}.png", "conversations": talk} for k in range(3)]))
    read = open_conversations("talk.json", ".", "boxes.json", skip_bad=True)
    assert [len(sample.boxes[0].boxes) for sample in read] == [len(record["boxes"]) for record in records]

    code, out, err = run(".", "--threshold", 0.2)
    assert code == 0
    assert "pictures: 1 looked at, 2 from the cache" in err
    line = out.splitlines()[0]
    assert line.startswith(f"0.png  {len(records[0]['boxes'])} box")
    assert records[0]["labels"][0] in line
    assert "1 looked at" in run("0.png", "--threshold", 0.5)[2], "another threshold is another entry"
    assert len(list((tmp_path / "cache" / "boxes").rglob("*.json"))) == 4

    code, out, err = run(".", "--annotations", "talk.json", "--import", "boxes.json", "--out", "all.json")
    assert code == 0
    assert "pictures: 1 from the cache, 2 imported" in err
    named = json.loads(Path("all.json").read_text())
    assert [record["image"] for record in named] == ["0.png", "1.png", "2.png"]
    assert [record["boxes"] for record in named[:2]] == [record["boxes"] for record in records]
    assert len(open_conversations("talk.json", ".", "all.json")) == 3


def test_words_and_videos(run: Run, folder: Path) -> None:
    (folder / "clip").mkdir()
    frames = [Image.open(f"{number}.png") for number in (0, 1)]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
    options = ["--frames", 2, "--out", "boxes.json", "--picture", "clip.png", "--cache", "own"]
    code, _, err = run("clip.gif", *options)
    assert len(list(Path("own").rglob("*.json"))) == 2
    assert (code, "pictures: 2 looked at" in err) == (0, True)
    [record] = json.loads(Path("boxes.json").read_text())
    assert record["id"] == "clip"
    assert [set(frame) for frame in record["frames"]] == [{"boxes", "scores", "labels"}] * 2
    assert Image.open("clip.png").width > 900, "two frames side by side"
    label = next(label for frame in record["frames"] for label in frame["labels"])
    code, out, _ = run("0.png", "1.png", "--tagger", "clip-world", "--vocabulary", f"{label}, red", "--no-cache")
    assert code == 0
    assert not (folder.parent / "cache").exists()
    assert label in out
    assert not {"banana", "chair", "cat", "dog"} - {label} & set(out.replace(",", " ").split())


def test_a_broken_picture_is_skipped_where_that_is_asked(run: Run) -> None:
    Path("1.png").write_bytes(b"no picture")
    assert "1.png" in refused(run("0.png", "1.png", "2.png", "--out", "boxes.json"))
    assert not Path("boxes.json").exists()
    code, _, err = run("0.png", "1.png", "2.png", "--out", "boxes.json", "--skip-bad", "--picture", "drawn")
    assert code == 0
    assert "skipped: Image file '1.png' is not an image" in err
    assert "1 skipped" in err
    assert "1-boxes.png" not in err
    assert [record["id"] for record in json.loads(Path("boxes.json").read_text())] == ["0", "2"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.png"], "does not exist"),
        (["0.png", "--out", "0.png"], "0.png is an input and would be overwritten"),
        (["0.png", "sub/0.png"], "would both have the id '0'"),
        (["0.png", "--vocabulary", ","], "the vocabulary has no word"),
        (["0.png", "--vocabulary", "none.txt"], "none.txt does not exist"),
        (["0.png", "--vocabulary", "zebra"], "proposer-world knows none of the words zebra"),
        (["0.png", "--tagger", "proposer-world"], "which names no tags"),
        (["0.png", "--detector", "dynrefer-world"], "finds no boxes of tags"),
        (["0.png", "--threshold", "2"], "threshold must be a number from 0 to 1"),
        (["0.png", "--batch-size", "0"], "batch_size must be a whole number"),
        (["0.png", "--cache", "c", "--no-cache"], "contradict each other"),
        (["0.png", "--annotations", "0.png"], "--annotations needs one folder"),
        (["0.png", "--import", "none.json"], "none.json"),
        (["0.png", "--pad-value", "3"], "are of OWLv2"),
        (["0.png", "--device", "gpu"], "there is no device 'gpu'"),
    ],
)
def test_bad_input(run: Run, arguments: list[str], sentence: str) -> None:
    shutil.copytree(".", "../sub")
    Path("../sub").rename("sub")
    assert sentence in refused(run(*arguments))


def test_an_owlv2_with_its_tags(run: Run, owlv2_folder: Path) -> None:
    assert "give a tagger, or a vocabulary" in refused(run("0.png", "--detector", owlv2_folder))
    options: list[Any] = ["--detector", owlv2_folder, "--vocabulary", "cat,dog", "--threshold", 0]
    code, out, _ = run("0.png", *options)
    assert code == 0
    assert out.startswith("0.png  16 boxes: ")
    assert run("0.png", *options, "--pad-value", 0)[1] != "", "black around it"
