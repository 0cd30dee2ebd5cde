"""The golden runner: it passes on the reference arrays, reads all of them, and fails on any that is changed."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "mg_llava"
FLOW = ("flow_image.json", "flow_image.io.safetensors", "flow_image.weights.safetensors")
# One array of each kind, moved by more than its tolerance.
NUDGES = {
    ("flow_image.io.safetensors", "out.roi_pooled_0"): 1e-4,
    ("flow_image.io.safetensors", "out.gate_logit"): 1e-3,
    ("flow_image.io.safetensors", "out.loss"): 1e-3,
    ("flow_image.weights.safetensors", "fuse_module.slow_proj.bias"): 0.1,
    ("flow_image.weights.safetensors", "visual.trunk.stages.3.blocks.0.gamma"): 0.5,
}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TESTS.parent / "tools"))
    return importlib.import_module("check_golden")


@pytest.fixture
def some(tmp_path: Path) -> Callable[..., Path]:
    """A folder with only some of the files."""

    def copy(*names: str) -> Path:
        for name in names:
            shutil.copy(GOLDEN / name, tmp_path / name)
        return tmp_path

    return copy


def test_every_array_is_read_and_agrees(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["mg_llava", str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if line.endswith((" ok", "FAIL"))]
    assert lines[-1] == f"{len(compared)} arrays compared, 0 failed, 0 unread"
    names = {" ".join(line.split()[:2]) for line in compared}
    for flow in ("flow_image", "flow_video", "flow_with_text_only"):
        outputs = {key for key in load_file(GOLDEN / f"{flow}.io.safetensors") if key.startswith("out.")}
        assert {f"{flow} {key}" for key in outputs} <= names
    variants = {key for key in load_file(GOLDEN / "fuse_variants.safetensors") if key.endswith(".out")}
    assert len(variants) == 9
    assert {f"fuse_variants {key}" for key in variants} <= names


@pytest.mark.parametrize(("file", "key"), NUDGES)
def test_a_changed_array_fails(runner: Any, some: Callable[..., Path], file: str, key: str) -> None:
    folder = some(*FLOW)
    arrays = load_file(folder / file)
    arrays[key].view(-1)[0] += NUDGES[file, key]
    save_file(arrays, folder / file)
    assert runner.main(["mg_llava", str(folder)]) == 1


@pytest.mark.parametrize(
    ("files", "change"),
    [
        (("text_encoding.json",), lambda cases: cases[0]["labels"].__setitem__(30, 3)),
        (("text_encoding.json",), lambda cases: cases[5].update(more=1)),
        (("metrics.json",), lambda cases: cases["anls"][2].update(score=0.9)),
        (("preprocess.json", "preprocess.safetensors"), lambda cases: cases[1]["out_labels"].reverse()),
        (("preprocess.json", "preprocess.safetensors"), lambda cases: cases[0]["options"].update(iou=0.01)),
    ],
)
def test_a_changed_or_added_json_entry_fails(
    runner: Any, some: Callable[..., Path], files: tuple[str, ...], change: Callable[[Any], None]
) -> None:
    path = some(*files) / files[0]
    assert runner.main(["mg_llava", str(path.parent)]) == 0
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert runner.main(["mg_llava", str(path.parent)]) == 1


@pytest.mark.parametrize("key", ["in.more", "out.more"])
def test_an_unknown_array_fails(
    runner: Any, some: Callable[..., Path], capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = some(*FLOW) / FLOW[1]
    save_file(load_file(path) | {key: torch.zeros(2)}, path)
    assert runner.main(["mg_llava", str(path.parent)]) == 1
    assert f"FAIL: nothing read {path.name}: {key}" in capsys.readouterr().out
