"""`foveate convert dynrefer`: from the official files to a folder that answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate import cli
from foveate.language.words import COCO_CLASSES


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All source files of a tiny model; do not change them."""
    path = Path(__file__).parents[1] / "methods" / "dynrefer" / "official_files.py"
    spec = importlib.util.spec_from_file_location("foveate_official_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_official_files(tmp_path_factory.mktemp("official"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit code, stdout, stderr) of the command line in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def options(files: Any, *names: str) -> list[object]:
    return [part for name in names for part in (f"--{name.replace('_', '-')}", files.paths[name])]


def test_convert_then_describe(run: Any, files: Any, tmp_path: Path) -> None:
    every = options(files, *files.paths)
    code, out, err = run("convert", "dynrefer", files.official, *every, "--out", tmp_path / "out")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["part", "from", "tensors", "parameters", "dtype"]
    assert any(line.split()[:3] == ["fusion", "official", "4"] for line in lines)
    assert "not used of official: 2 tensors: Qformer.bert.embeddings.position_ids, clip_embeds" in lines
    assert "2 views of 56 px, 5 queries" in lines
    assert lines[-1] == f"model: {tmp_path / 'out'}"
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    code, out, err = run(
        "describe", tmp_path / "image.png", "--box", "5,5,40,40", "--model", tmp_path / "out", "--format", "json"
    )
    assert code == 0, err
    region = json.loads(out)[0]["regions"][0]
    assert region["category"] in COCO_CLASSES
    assert set(region["tags"]) <= {"car", "red", "Hat", "striped dog"}


def test_check_writes_nothing(run: Any, files: Any) -> None:
    before = sorted(files.folder.rglob("*"))
    code, out, _ = run("convert", "dynrefer", files.official, *options(files, "base", "text"), "--check")
    assert code == 0
    assert "language model" in out
    assert "model:" not in out
    assert sorted(files.folder.rglob("*")) == before


def test_bad_input_is_one_sentence(run: Any, files: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(files.official.read_bytes()[:1000])
    needed, out = options(files, "base", "text", "tags", "text_tokenizer"), ("--out", tmp_path / "out")
    for arguments, sentence in (
        ([damaged, *needed, *out], "damaged.pth is damaged, truncated or not a PyTorch file"),
        ([tmp_path / "none.pth", *needed, *out], "there is no file"),
        ([files.official, *needed], "--out is missing"),
        ([files.official, *options(files, "base", "text"), *out], "--tags is missing"),
        ([files.official, *needed, *out, "--dtype", "float8"], "there is no dtype 'float8'"),
        ([files.official, *needed, *out, "--base", tmp_path], "has no config.json"),
    ):
        code, printed, error = run("convert", "dynrefer", *arguments)
        assert (code, printed) == (2, "")
        assert sentence in error
        assert error.startswith("foveate: ")
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.pth"]


def test_help_names_the_verb(run: Any) -> None:
    assert "\n  convert  " in run("--help")[1]
    code, out, _ = run("convert", "dynrefer", "--help")
    assert code == 0
    assert "--attributes" in out
