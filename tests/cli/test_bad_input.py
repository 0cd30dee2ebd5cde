"""`foveate describe` from the file to the exit code: what is odd works, what is broken gets one sentence and code 2.

The model is real but random: its words mean nothing, and every part of the way to them runs.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from foveate import cli
from foveate.world.scenes import render_scene

Run = Callable[..., tuple[int, str, str]]
BOX = "10,20,60,70"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `scene.png` of 96 x 80 pixels."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Image.fromarray(render_scene(3, (96, 80)).image).save(folder / "scene.png")
    return folder


@pytest.fixture
def run(tiny_describer: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `foveate describe ...` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object, model: object = tiny_describer) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["describe", *map(str, arguments), "--model", str(model)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The sentence on stderr of a command that failed as it should."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("foveate: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    return err


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def regions(result: tuple[int, str, str]) -> list[dict[str, Any]]:
    code, out, err = result
    assert (code, err) == (0, "")
    return json.loads(out)[0]["regions"]


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels and whose data is one compressed row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty (0 bytes)"),
        ("truncated", "is truncated or corrupt"),
        ("headless", "is not an image in a known format"),
        (b"not an image at all", "is not an image in a known format"),
        (png(30_000, 30_000), "has more pixels than the limit of 64000000"),
        (png(0, 5), "foveate: "),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "foveate: "),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image in a known format"),
    ],
    ids=["empty", "truncated", "header cut off", "text", "bomb", "no pixels", "zeros", "svg"],
)
def test_broken_images(run: Run, folder: Path, content: bytes | str, sentence: str) -> None:
    whole = Path("scene.png").read_bytes()
    cut = {"truncated": whole[: len(whole) // 2], "headless": whole[:12]}
    Path("broken.png").write_bytes(content if isinstance(content, bytes) else cut[content])
    before = files(folder)
    for style in (["--format", "json", "--out", "o.json"], ["--format", "jsonl", "--out", "o.jsonl"], []):
        assert sentence in refused(run("broken.png", *style))
        assert files(folder) == before
    assert "broken.png" in refused(run("scene.png", "broken.png", "--format", "jsonl", "--out", "o", "--picture", "p"))
    assert files(folder) == before, "images that come before the broken one leave nothing either"


def test_a_folder_a_url_and_no_file(run: Run) -> None:
    Path("folder.png").mkdir()
    assert "'folder.png' is a folder; give the path of an image file" in refused(run("folder.png"))
    assert "is a URL; download it first" in refused(run("https://example.org/a.png"))
    for name in ("none.png", r"a\x1bb.png"):
        assert f"Image file '{name}' does not exist" in refused(run(name.replace(r"\x1b", "\x1b")))


def test_odd_images_are_described_as_their_rgb_version(run: Run) -> None:
    scene = Image.open("scene.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    variants: dict[str, tuple[Image.Image, Image.Image]] = {
        "palette.png": (scene.quantize(32), scene.quantize(32).convert("RGB")),
        "cmyk.tif": (scene.convert("CMYK"), scene.convert("CMYK").convert("RGB")),
        "grey.png": (scene.convert("L"), scene.convert("L").convert("RGB")),
        "sixteen.png": (
            Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257),
            scene.convert("L").convert("RGB"),
        ),
        "turned.png": (scene.transpose(Image.Transpose.ROTATE_90), scene),
    }
    options = ("--box", BOX, "--box", "0,0,96,80", "--format", "json")
    seen = set()
    for name, (stored, upright) in variants.items():
        stored.save(name, exif=exif if name == "turned.png" else Image.Exif())
        upright.save("rgb.png")
        described = regions(run(name, *options))
        assert described == regions(run("rgb.png", *options)), name
        assert [region["box"] for region in described] == [[10, 20, 60, 70], [0, 0, 96, 80]]
        seen.add(json.dumps(described))
    assert Image.open("sixteen.png").mode == "I;16"
    assert len(seen) > 2, "the model does see the pixels"


def test_one_pixel(run: Run) -> None:
    Image.new("RGB", (1, 1), "red").save("pixel.png")
    [region] = regions(run("pixel.png", "--format", "json"))
    assert region["box"] == [0, 0, 1, 1]
    assert {tuple(view["box"]) for view in region["views"]} == {(0, 0, 1, 1)}


# ---------------------------------------------------------------- boxes, masks, options


@pytest.mark.parametrize(
    "box",
    ["200,200,300,300", "-50,-50,-10,-10", "60,70,10,20", "10,20,10,70", "10,20,60,20", "nan,20,60,70", "10,20,inf,70"],
    ids=["outside", "outside left", "inverted", "no width", "no height", "nan", "infinite"],
)
def test_broken_boxes(run: Run, folder: Path, box: str) -> None:
    before = files(folder)
    sentence = refused(run("scene.png", "--box", BOX, "--box", box, "--out", "o.txt", "--picture", "p.png"))
    assert "box" in sentence.lower()
    assert any(number in sentence for number in (box.split(",")[0], box.split(",")[2])), "the offending value is named"
    assert files(folder) == before


@pytest.mark.parametrize(
    "boxes",
    [
        "[[1, 2, 3]]",
        '[["a", 2, 3, 4]]',
        "[[true, 2, 30, 40]]",
        "[1, 2, 3, 4]",
        "[[NaN, 2, 30, 40]]",
        "[[1, 2, 1e400, 4]]",
        "[null]",
        "{}",
    ],
)
def test_broken_box_files(run: Run, folder: Path, boxes: str) -> None:
    Path("boxes.json").write_text(boxes)
    before = files(folder)
    refused(run("scene.png", "--boxes", "boxes.json", "--format", "jsonl", "--out", "o.jsonl"))
    assert files(folder) == before


def test_an_error_of_one_image_of_many_names_it(run: Run, folder: Path) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy("scene.png", name)
    Path("boxes.json").write_text('{"a": [[1, 2, 30, 40]], "b": [[1, 2, 30, 400]]}')
    before = files(folder)
    sentence = refused(run("a.png", "b.png", "--boxes", "boxes.json", "--out", "o"))
    assert sentence.startswith("foveate: b.png: box 0 is [1.0, 2.0, 30.0, 400.0]: it leaves the image")
    assert "unknown task 'none'" in refused(run("a.png", "b.png", "--tasks", "none")), "the fault of no image"
    assert files(folder) == before


def test_bad_images_are_skipped(run: Run) -> None:
    for name in ("a.png", "b.png", "far.png"):
        shutil.copy("scene.png", name)
    Path("broken.png").write_text("text")
    boxes = {"a": [[1, 2, 30, 40]], "broken": [], "none": [], "far": [[1, 2, 30, 400]], "b": [[5, 5, 9, 9]]}
    Path("boxes.json").write_text(json.dumps(boxes))
    arguments = [*(f"{name}.png" for name in boxes), "--boxes", "boxes.json", "--tasks", "category", "--skip-bad"]
    code, out, err = run(*arguments, "--format", "jsonl", "--picture", "pictures")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [entry["image"] for entry in found] == arguments[:5]
    assert [("error" in entry, "regions" in entry) for entry in found] == [
        (name not in "ab", name in "ab") for name in boxes
    ]
    assert "is not an image" in found[1]["error"]
    assert "does not exist" in found[2]["error"]
    assert found[3]["error"].startswith("far.png: box 0 is")
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["skipped"] * 3 + ["written"] * 2 + ["3 of 5 images skipped."]
    assert {path.name for path in Path("pictures").iterdir()} == {"a-described.png", "b-described.png"}
    code, out, err = run(*arguments)
    assert code == 0
    assert "none.png  skipped: Image file 'none.png' does not exist" in out
    assert "unknown task 'none'" in refused(run("a.png", "b.png", "--tasks", "none", "--skip-bad"))


@pytest.mark.slow
def test_five_thousand_boxes(run: Run) -> None:
    starts = np.random.default_rng(0).uniform(0, 60, (5000, 2)).round(1)
    Path("boxes.json").write_text(json.dumps(np.concatenate([starts, starts + 18], axis=1).tolist()))
    pictures = ["--picture", "p.jpg", "--show-views", "v.webp"]
    code, out, _ = run("scene.png", "--boxes", "boxes.json", "--tasks", "category", "--format", "json", *pictures)
    assert code == 0
    assert max(*Image.open("p.jpg").size, *Image.open("v.webp").size) <= 16_383
    described = json.loads(out)[0]["regions"]
    assert len(described) == 5000
    assert described[4321]["box"] == pytest.approx([*starts[4321], *(starts[4321] + 18)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "captoin"], "unknown task 'captoin', did you mean 'caption'?"),
        (["--tasks", ","], "no task given"),
        (["--views", "wide"], "unknown views 'wide'"),
        (["--views", "0,0.5,2"], "views must be t's between 0"),
        (["--views", "0.1,0.2,0.3,0.4"], "this model looks at 3 views"),
        (["--beams", "0"], "num_beams must be a whole number from 1"),
        (["--batch-size", "0"], "batch_size must be a whole number of at least 1"),
        (["--classes", ","], "the class list is empty"),
        (["--device", "tpu"], "there is no device 'tpu' here"),
        (["--dtype", "float8"], "there is no dtype 'float8'"),
        (["--dtype", "float16"], "use bfloat16 or float32"),
        (["--mask", "small.png"], "a mask has shape (8, 8), but the image is 80 x 96"),
        (["--mask", "black.png"], "the mask has no pixel set"),
    ],
)
def test_wrong_options(run: Run, folder: Path, options: list[str], sentence: str) -> None:
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (96, 80)).save("black.png")
    before = files(folder)
    assert sentence in refused(run("scene.png", *options, "--out", "o.txt"))
    assert files(folder) == before


def test_a_misspelt_option(run: Run, folder: Path) -> None:
    before = files(folder)
    code, out, err = run("scene.png", "--boxs", "b.json")
    assert "--boxes" in refused((code, out, err))
    assert "No such option: --boxs" in err
    assert files(folder) == before


# ---------------------------------------------------------------- models


def test_an_unknown_model_suggests_the_nearest(
    run: Run, tiny_describer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_describer, tmp_path / "weights/dynrefer-world")
    monkeypatch.setattr("foveate.checkpoints.WEIGHTS", tmp_path / "weights")
    Path("out").mkdir()
    assert "did you mean 'dynrefer-world'?" in refused(run("scene.png", model="dynrefr-world"))
    assert "there is no folder out/none" in refused(run("scene.png", model="out/none"))
    assert "is a file" in refused(run("scene.png", model="scene.png"))
    assert run("scene.png", "--no-picture", "--tasks", "category", model="dynrefer-world")[0] == 0


def _truncate(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def _overwrite(path: Path) -> None:
    with path.open("rb+") as file:
        file.write(b"\xff" * 64)


def _nan(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, path, {"format": "pt"})


def _drop(path: Path) -> None:
    tensors = load_file(path)
    del tensors["query_tokens"]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [_truncate, _overwrite, Path.unlink, _nan, _drop])
def test_damaged_weights(run: Run, tiny_describer: Path, folder: Path, damage: Callable[[Path], None]) -> None:
    shutil.copytree(tiny_describer, folder / "model")
    damage(folder / "model/model.safetensors")
    before = files(folder)
    sentence = refused(run("scene.png", "--out", "o.txt", "--picture", "p.png", model="model"))
    assert "finite" in sentence if damage is _nan else "model" in sentence
    assert files(folder) == before


@pytest.mark.parametrize(
    "name", ["config.json", "vocabulary.json", "processor_config.json", "text_tokenizer/tokenizer.json"]
)
def test_damaged_files_beside_the_weights(run: Run, tiny_describer: Path, folder: Path, name: str) -> None:
    for damage in (_truncate, Path.unlink):
        shutil.copytree(tiny_describer, folder / "model", dirs_exist_ok=True)
        damage(folder / "model" / name)
        before = files(folder)
        refused(run("scene.png", "--out", "o.txt", model="model"))
        assert files(folder) == before


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("style", ["text", "json", "jsonl"])
def test_a_full_disk(run: Run, folder: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("o").write_text("old")
    before = files(folder)
    monkeypatch.setattr("os.fsync", fsync)
    result = run("scene.png", "--format", style, "--out", "o", *(["--no-picture"] if style == "text" else []))
    sentence = result[2].splitlines()[-1]
    assert result[0] == 2
    assert "no space left on device" in sentence
    assert Path("o").read_text() == "old"
    kept = files(folder) - before
    # Finished lines of jsonl are kept on purpose, and the sentence before says where.
    assert all(name in result[2] for name in kept) if style == "jsonl" else not kept


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
def test_a_file_that_may_not_grow(tiny_describer: Path, folder: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    before = files(folder)
    command = [sys.executable, "-c", "from foveate.cli import main; main()", "describe", "scene.png"]
    done = subprocess.run(
        [*command, "--picture", "p.png", "--tasks", "category", "--model", str(tiny_describer)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=240,
        check=False,
    )
    assert "file too large" in refused((done.returncode, done.stdout, done.stderr))
    assert files(folder) == before
