"""`foveate describe`: arguments in, text, JSON, JSON lines and pictures out.

The describer here is a plain function that names each region after its box, so that every byte that the verb writes is
known; what a real model says is tested with the method.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate import cli
from foveate.errors import InputError
from foveate.methods.dynrefer.attention import Attention
from foveate.methods.dynrefer.results import Region, Regions, Report, View, ViewChoice
from foveate.vision.images import load_image


class Describer:
    """Describes by the numbers of the box; `calls` are the keyword arguments that it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.interrupt_at: str | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.proposed: dict[str, list[tuple[float, float, float, float]]] = {}
        self.searches = False
        self.report: Report | None = None

    def __call__(self, images: Any, boxes: Any = None, masks: Any = None, **options: Any) -> Any:
        self.calls.append({"boxes": boxes, "masks": masks, **options})
        if isinstance(images, list):
            found = [self.describe(path, None if boxes is None else boxes[i]) for i, path in enumerate(images)]
            return [attended(regions) for regions in found] if options.get("attention") else found
        return attended(self.describe(images, boxes)) if options.get("attention") else self.describe(images, boxes)

    def describe(self, path: Path, boxes: Any) -> Regions:
        if path.name == self.interrupt_at:
            raise self.error
        image = load_image(path)
        score = 0.5 if path.name in self.proposed else None
        boxes = self.proposed.get(path.name, [(0, 0, *image.size)]) if boxes is None else boxes
        choices = (ViewChoice(("tags",), (0.0, 0.4), "official", {0.1: 2.5, 0.4: 5.0}),) if self.searches else ()
        return Regions(
            image,
            [
                Region(
                    box=tuple(box),
                    caption=f"region at {box[0]:g}",
                    caption_score=0.75,
                    category="cat",
                    category_score=0.5,
                    attributes=("red",),
                    attribute_scores={"red": 0.875, "blue": 0.125},
                    tag_scores={"cat": 0.25},
                    score=score,
                    choices=choices,
                )
                for box in boxes
            ],
            self.report,
        )


def attended(regions: Regions) -> Regions:
    """The same regions, each read in the lower right quarter of the whole image."""
    whole = (0, 0, *regions.image.size)
    cells = np.array([[0, 0], [0, 0.75]], np.float32)
    patches = np.array([[0, 0, 2, 2]], np.float32)
    own = Attention(("tags",), "tag", "cat", cells, 0.25, (1.0,), (whole,), patches)
    views = (View(1.0, whole, ("tags",), regions.image),)
    return Regions(regions.image, [replace(region, views=views, attention=(own,)) for region in regions])


@pytest.fixture
def describer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Describer:
    describer = Describer()
    monkeypatch.setattr("foveate.methods.load", lambda *_, **__: describer)
    monkeypatch.setattr("foveate.checkpoints.find_checkpoint", lambda _: tmp_path)
    return describer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with forty images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for number in range(40):
        Image.new("RGB", (32, 24), (number, 0, 0)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def run(describer: Describer, folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["describe", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def made(folder: Path) -> list[str]:
    """Names in the folder beside the images that were there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in IMAGES)


IMAGES = [f"{number:02}.png" for number in range(40)]
Run = Callable[..., tuple[int, str, str]]


def test_text(run: Run, folder: Path) -> None:
    code, out, err = run("00.png", "--box", "1,2,3.5,4", "--box", "5,6,7,8")
    assert (code, err) == (0, "")
    assert out == (
        "00.png  2 regions\n"
        "  1  [1, 2, 3.5, 4]  region at 1  (0.75)\n"
        "     category    cat 0.50\n"
        "     attributes  red 0.88\n"
        "     tags        none is likely enough\n"
        "  2  [5, 6, 7, 8]  region at 5  (0.75)\n"
        "     category    cat 0.50\n"
        "     attributes  red 0.88\n"
        "     tags        none is likely enough\n"
        "written: 00-described.png\n"
    )
    assert made(folder) == ["00-described.png"]
    assert Image.open("00-described.png").width > 32


def test_options_reach_the_describer(run: Run, describer: Describer) -> None:
    options = ["--tasks", "caption, tags", "--views", "0,0.3,0.5", "--classes", "cat,dog", "--beams", 3]
    assert run("00.png", *options, "--batch-size", 7, "--everything", "--no-picture")[0] == 0
    [call] = describer.calls
    assert callable(call.pop("progress"))
    assert call == {
        "boxes": None,
        "masks": None,
        "tasks": ["caption", "tags"],
        "views": [0.0, 0.3, 0.5],
        "classes": ["cat", "dog"],
        "num_beams": 3,
        "everything": True,
        "batch_size": 7,
    }


def test_options_of_everything_reach_the_describer(run: Run, describer: Describer) -> None:
    options = ["--proposer", "owl", "--proposer-words", "cat, dog", "--max-regions", 5, "--min-score", 0.25]
    assert run("00.png", "--everything", *options, "--box-iou", 0.5, "--caption-iou", 0.1)[0] == 0
    assert run("00.png", "--everything", "--keep-duplicates")[0] == 0
    wanted = ("proposer", "proposer_words", "max_regions", "min_score", "box_iou", "caption_iou")
    given = [{name: call[name] for name in wanted if name in call} for call in describer.calls]
    assert given[0] == {
        "proposer": "owl",
        "proposer_words": ["cat", "dog"],
        "max_regions": 5,
        "min_score": 0.25,
        "box_iou": 0.5,
        "caption_iou": 0.1,
    }
    assert given[1] == {"box_iou": None, "caption_iou": None}


def test_everything_says_the_scores_of_proposals_and_where_nothing_was_found(run: Run, describer: Describer) -> None:
    describer.proposed = {"00.png": [(1.0, 2.0, 3.0, 4.0)], "01.png": []}
    code, out, err = run("00.png", "01.png", "--everything", "--picture", "pictures")
    assert code == 0
    assert "  1  [1, 2, 3, 4]  region at 1  (0.75)\n     proposal    0.50, with the caption 0.38\n" in out
    assert "01.png  0 regions\n" in out
    assert err == "note: the proposer found nothing in 01.png.\n"
    assert Image.open("pictures/00-described.png").width == 1024, "the dense picture"
    assert Path("pictures/01-described.png").exists()
    entries = json.loads(run("00.png", "01.png", "--everything", "--format", "json")[1])
    [region] = entries[0]["regions"]
    assert (region["score"], region["caption_score"], region["joint_score"]) == (0.5, 0.75, 0.375)
    assert entries[1]["regions"] == []


def test_a_detectors_file_is_one_that_resume_depends_on(run: Run, describer: Describer) -> None:
    Path("found.json").write_text(json.dumps({name: [[1, 2, 3, 4]] for name in IMAGES}))
    describer.proposed = {name: [(1.0, 2.0, 3.0, 4.0)] for name in IMAGES}
    describer.interrupt_at = "35.png"
    command = [*IMAGES, "--everything", "--proposer", "found.json", "--format", "jsonl", "--out", "out.jsonl"]
    assert run(*command)[0] == 130
    describer.interrupt_at = None
    Path("found.json").write_text(json.dumps({name: [[1, 2, 3, 5]] for name in IMAGES}))
    assert "no interrupted run" in run(*command, "--resume")[2], "other boxes, other run"
    Path("found.json").write_text(json.dumps({name: [[1, 2, 3, 4]] for name in IMAGES}))
    assert run(*command, "--resume")[0] == 0
    assert [type(call["proposer"]).__name__ for call in describer.calls[-1:]] == ["BoxFile"]


def test_the_default_picture_replaces_no_file(run: Run, folder: Path) -> None:
    Path("00-described.png").write_text("mine")
    for name in ("00-described-2.png", "00-described-3.png"):
        assert run("00.png")[1].endswith(f"written: {name}\n")
    assert Path("00-described.png").read_text() == "mine"
    assert run("00.png", "--picture", "00-described.png")[0] == 0, "a name that is given is one to replace"
    assert Image.open("00-described.png").width > 32
    assert made(folder) == ["00-described-2.png", "00-described-3.png", "00-described.png"]


def test_a_file_name_that_is_no_text(run: Run, describer: Describer) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    Path("00.png").rename(name)
    Path("boxes.json").write_text(json.dumps({name: [[1, 2, 3, 4]]}))
    for style in ("text", "json", "jsonl"):
        options = ["--boxes", "boxes.json", "--format", style, "--out", f"o.{style}"]
        assert run(name, *options, "--picture", "p.png")[0] == 0
        assert Path(f"o.{style}").read_bytes().count(rb"caf\udce9.png") == 1
    assert json.loads(Path("o.jsonl").read_text())["image"] == name


def test_results_go_through_a_device(run: Run, folder: Path) -> None:
    # A terminal of the test's own: a mistake would replace /dev/null for everybody.
    main, terminal = os.openpty()
    name = os.ttyname(terminal)
    assert run("00.png", "--no-picture", "--out", name)[:2] == (0, f"written: {name}\n")
    assert os.read(main, 10_000).startswith(b"00.png  1 region")
    assert Path(name).is_char_device()
    code, _, err = run("00.png", "--format", "jsonl", "--out", name)
    assert code == 2
    assert f"{name} is not a regular file" in err
    assert made(folder) == []
    for descriptor in (main, terminal):
        os.close(descriptor)


def test_lines_of_skipped_images_are_resumed(run: Run, describer: Describer, folder: Path) -> None:
    for name in ("03.png", "36.png"):
        Path(name).write_text("text")
    describer.interrupt_at = "35.png"
    command = [*IMAGES, "--format", "jsonl", "--out", "out.jsonl", "--skip-bad"]
    assert run(*command)[0] == 130
    describer.interrupt_at = None
    code, _, err = run(*command, "--resume")
    assert code == 0
    assert err.splitlines()[-1] == "2 of 40 images skipped."
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [entry["image"] for entry in found] == IMAGES
    assert [entry["image"] for entry in found if "error" in entry] == ["03.png", "36.png"]
    assert made(folder) == ["out.jsonl"]


def test_masks(run: Run, describer: Describer) -> None:
    mask = Image.new("L", (32, 24))
    mask.paste(1, (4, 5, 8, 9))
    mask.save("mask.png")
    assert run("00.png", "--mask", "mask.png", "--no-picture")[0] == 0
    [given] = describer.calls[0]["masks"]
    assert given.shape == (24, 32)
    assert given.sum() == 16
    assert given[5:9, 4:8].all()


def test_json_keeps_stdout_clean(run: Run, folder: Path) -> None:
    code, out, err = run("00.png", "01.png", "--format", "json", "--picture", "pictures", "--show-views", "views")
    assert code == 0
    assert [entry["image"] for entry in json.loads(out)] == ["00.png", "01.png"]
    assert json.loads(out)[0] == {
        "image": "00.png",
        "width": 32,
        "height": 24,
        "regions": [
            {
                "box": [0, 0, 32, 24],
                "caption": "region at 0",
                "caption_score": 0.75,
                "tags": {},
                "attributes": {"red": 0.875},
                "category": "cat",
                "category_score": 0.5,
                "views": [],
            }
        ],
    }
    assert err.splitlines() == [
        f"written: {path}"
        for path in (
            "pictures/00-described.png",
            "pictures/01-described.png",
            "views/00-views.png",
            "views/01-views.png",
        )
    ]
    assert made(folder) == ["pictures", "views"]
    assert len(list((folder / "pictures").iterdir())) == len(list((folder / "views").iterdir())) == 2


def test_boxes_of_many_images(run: Run) -> None:
    boxes = {"00.png": [[1, 1, 5, 5]], "01": [[2, 2, 6, 6], [3, 3, 7, 7]], "02.png": [], "other.png": [[0, 0, 1, 1]]}
    Path("boxes.json").write_text(json.dumps(boxes))
    code, out, _ = run("00.png", "01.png", "02.png", "--boxes", "boxes.json", "--box", "9,9,10,10", "--format", "jsonl")
    assert code == 0
    found = [[region["box"] for region in json.loads(line)["regions"]] for line in out.splitlines()]
    assert found == [[[9, 9, 10, 10], [1, 1, 5, 5]], [[9, 9, 10, 10], [2, 2, 6, 6], [3, 3, 7, 7]], [[9, 9, 10, 10]]]


def test_a_bare_list_of_boxes_is_for_one_image(run: Run) -> None:
    Path("boxes.json").write_text("[[1, 1, 5, 5]]")
    assert "[1, 1, 5, 5]" in run("00.png", "--boxes", "boxes.json")[1]
    code, _, err = run("00.png", "01.png", "--boxes", "boxes.json")
    assert code == 2
    assert "is a list, which is for one image, but 2 are given" in err


def test_interrupted_lines_are_resumed(run: Run, describer: Describer, folder: Path) -> None:
    whole = run(*IMAGES, "--format", "jsonl")[1]
    describer.interrupt_at = "35.png"
    command = [*IMAGES, "--format", "jsonl", "--out", "out.jsonl"]
    code, out, err = run(*command)
    assert (code, out) == (130, "")
    assert "--resume continues from there" in err
    [partial] = made(folder)
    assert partial.startswith("out.jsonl.")
    assert len(Path(partial).read_text().splitlines()) == 32, "two batches of sixteen are finished"

    describer.interrupt_at = None
    describer.calls.clear()
    assert "no interrupted run" in run(*command, "--resume", "--views", "auto")[2], "other settings, other run"
    assert run(*command, "--resume")[0] == 0
    assert Path("out.jsonl").read_text() == whole
    assert made(folder) == ["out.jsonl"]
    assert len(describer.calls) == 1, "only what was missing is described again"


@pytest.mark.parametrize("style", ["text", "json", "jsonl"])
@pytest.mark.parametrize("error", [InputError("it is broken."), OSError(28, "No space left on device")])
def test_an_error_leaves_no_output(run: Run, describer: Describer, folder: Path, style: str, error: Exception) -> None:
    Path("out").write_text("old")
    describer.interrupt_at, describer.error = "00.png", error
    code, out, err = run("00.png", "--format", style, "--out", "out", "--picture", "p.png")
    assert (code, out) == (2, "")
    assert err.startswith("foveate: ")
    assert len(err.splitlines()) == 1
    assert made(folder) == ["out"]
    assert Path("out").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.png"], "Image file 'none.png' does not exist"),
        (["sub"], "'sub' is a folder"),
        (["00.png", "--out", ""], "is a folder"),
        (["00.png", "--out", "x.png", "--picture", "x.png"], "two results would be written to x.png"),
        (["00.png", "--picture", "x.png", "--show-views", "sub/../x.png"], "two results would be written to sub/../x"),
        (["00.png", "--out", "01.png/x"], "01.png is a file, so nothing can be written in it"),
        (["00.png", "01.png", "--out", "p", "--picture", "p"], "p is a file, so nothing can be written in it"),
        (["00.png", "01.png", "--picture", "02.png"], "--picture 02.png is a file; several images are given"),
        (["00.png", "sub/00.png", "--boxes", "bare.json"], "'00.png' fits both 00.png and sub/00.png; name each by"),
        (["00.png", "--boxes", "twice.json"], "twice.json has '00.png' twice"),
        (["00.png", "--box", "1,2,3"], "--box '1,2,3' is not four numbers"),
        (["00.png", "--box", "1,2,3,x"], "--box '1,2,3,x' is not four numbers"),
        (["00.png", "--views", "0,half.5"], "--views '0,half.5' is not task, auto or numbers"),
        (["00.png", "--format", "jsnl"], "(did you mean 'jsonl'?)"),
        (["00.png", "--resume"], "--resume continues a run with --format jsonl"),
        (["00.png", "--picture", "p.png", "--no-picture"], "contradict each other"),
        (["00.png", "--picture", "p.txt"], "does not end in one of: .png"),
        (["00.png", "--picture", "00.png"], "00.png is an input and would be overwritten"),
        (["00.png", "--out", "../photos/00.png"], "is an input and would be overwritten"),
        (["00.png", "--out", "."], "is a folder"),
        (["00.png", "01.png", "--mask", "02.png"], "--mask belongs to one image, but 2 are given"),
        (["00.png", "sub/00.png", "--picture", "p"], "two images would both be drawn as p/00-described.png"),
        (["00.png", "--max-regions", 3], "belong to --everything"),
        (["00.png", "--keep-duplicates"], "belong to --everything"),
        (["00.png", "--everything", "--keep-duplicates", "--box-iou", 0.5], "leaves nothing to --box-iou"),
        (["00.png", "--everything", "--proposer", "none.json"], "there is no file none.json"),
        (["00.png", "--everything", "--proposer", "other.json"], "other.json has no boxes for 00.png"),
        (["00.png", "--everything", "--proposer", "bare.json", "--out", "bare.json"], "would be overwritten"),
        (["00.png", "--boxes", "none.json"], "there is no file none.json"),
        (["00.png", "--boxes", "00.png"], "00.png is not valid JSON"),
        (["00.png", "--boxes", "number.json"], "number.json holds a int"),
        (["00.png", "--boxes", "other.json"], "other.json has no boxes for 00.png (did you mean '000.png'?)"),
        (["000.png", "--boxes", "other.json"], "the boxes of '000.png' are not a list"),
    ],
)
def test_bad_arguments(run: Run, folder: Path, arguments: list[str], sentence: str) -> None:
    (folder / "sub").mkdir()
    for copy in ("sub/00.png", "000.png"):
        Image.new("RGB", (8, 8)).save(copy)
    Path("number.json").write_text("3")
    Path("other.json").write_text('{"000.png": 4}')
    Path("bare.json").write_text('{"00": [], "00.png": [], "01.png": []}')
    Path("twice.json").write_text('{"00.png": [[1, 2, 3, 4]], "01.png": [], "00.png": []}')
    before = made(folder)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert made(folder) == before


def test_report_adds_up_the_calls(run: Run, describer: Describer) -> None:
    """Forty images are three calls of at most sixteen."""
    describer.report = Report(images=16, regions=16, views=48, crops=40, least_crops=32, milliseconds={"tower": 7.5})
    names = [f"{number:02}.png" for number in range(40)]
    _, out, err = run(*names, "--format", "jsonl", "--report")
    assert len(out.splitlines()) == 40, "the result stays what it is"
    assert "48 regions of 48 images in 22.5 ms" in err
    assert "120 crops encoded for 144 views; 24 more than the cheapest choice of views (96)" in err
    assert "tower           22.5 ms  100%" in err
    assert "crops encoded" not in "".join(run("00.png", "--no-picture")[1:])
    _, out, err = run("00.png", "--no-picture", "--report")
    assert "16 regions of 16 images" in out
    assert err == ""


def test_searched_views_are_explained(run: Run, describer: Describer, folder: Path) -> None:
    """One row of eleven candidates in place of the few crops looked at, and the distances in the result."""
    command = ("00.png", "--box", "1,2,9,9", "--views", "auto", "--format", "json", "--show-views", "v.png")
    assert "searches" not in json.loads(run(*command)[1])[0]["regions"][0]
    plain = Image.open(folder / "v.png").width
    describer.searches = True
    code, out, _ = run(*command)
    assert code == 0
    assert Image.open(folder / "v.png").width > 11 * 128 > plain
    assert json.loads(out)[0]["regions"][0]["searches"] == [
        {"selection": "official", "tasks": ["tags"], "t": [0.0, 0.4], "distances": {"0.1": 2.5, "0.4": 5.0}}
    ]


def test_attention_is_drawn_over_the_views(run: Run, describer: Describer, folder: Path) -> None:
    code, out, _ = run("00.png", "--box", "1,2,9,9", "--no-picture", "--show-attention", "a.png")
    assert (code, out.splitlines()[-1]) == (0, "written: a.png")
    assert made(folder) == ["a.png"]
    assert describer.calls[-1]["attention"] is True
    picture = np.asarray(Image.open(folder / "a.png").convert("RGB")).astype(int)
    red = (picture[..., 0] - picture[..., 2] > 150)[44:204, 8:168]
    assert red[82:, 82:].all()
    assert not red[:78].any()
    assert not red[:, :78].any()
    assert run("00.png", "01.png", "--no-picture", "--show-attention", "many")[0] == 0
    assert sorted(path.name for path in (folder / "many").iterdir()) == ["00-attention.png", "01-attention.png"]
    assert run("00.png", "--no-picture")[0] == 0
    assert "attention" not in describer.calls[-1]
