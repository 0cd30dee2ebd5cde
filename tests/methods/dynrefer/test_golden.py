"""The golden runner: it passes on the reference arrays, reads all of them, and fails on any that is changed."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "dynrefer"
# One array of each file, moved by more than its tolerance.
NUDGES = {
    ("align.safetensors", "out.aligned"): 1e-3,
    ("refer.safetensors", "mid.rois_tokens"): 1e-3,
    ("decoders.safetensors", "out.asl_grad"): 1e-3,
    ("llm.safetensors", "sd.cem_memory"): 0.1,
    ("text_encoder.safetensors", "out.text_embeds"): 1e-3,
    ("decoders.safetensors", "in.query_output"): 0.1,
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
    assert runner.main(["dynrefer", str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if line.endswith((" ok", "FAIL"))]
    assert lines[-1] == f"{len(compared)} arrays compared, 0 failed, 0 unread"
    names = {" ".join(line.split()[:2]) for line in compared}
    arrays = {
        f"{file.stem} {key}"
        for file in GOLDEN.glob("*.safetensors")
        for key in load_file(file)
        if key.startswith(("out.", "mid."))
    }
    assert len(arrays) == 26
    assert arrays <= names
    views = np.load(GOLDEN / "views.npz").files
    assert {f"views {key}" for key in views if not key.startswith("image")} <= names
    for name in ("densecap ap_breakdown", "ovad per_class_ap", "text tag_parser", "chain loss"):
        assert any(line.startswith(name) for line in compared), name


@pytest.mark.parametrize(("file", "key"), NUDGES)
def test_a_changed_array_fails(runner: Any, tmp_path: Path, file: str, key: str) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "golden", ignore=shutil.ignore_patterns("*.npz", "[!m]*.json")))
    arrays = load_file(folder / file)
    arrays[key] = arrays[key].clone()
    arrays[key].view(-1)[0] += NUDGES[file, key]
    save_file(arrays, folder / file)
    assert runner.main(["dynrefer", str(folder)]) == 1


def test_a_changed_pixel_or_bit_fails(
    runner: Any, some: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = some("views.npz", "views.json")
    arrays = dict(np.load(folder / "views.npz"))
    arrays["hash1"][3, 4, 5] ^= 1
    np.savez(folder / "views.npz", **arrays)
    assert runner.main(["dynrefer", str(folder)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL")]
    assert len(failed) == 1
    assert failed[0].startswith("views hash1")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("text.json", lambda content: content["caption_clean"][1].update(out="two dogs")),
        ("text.json", lambda content: content["tag_parser"]["cases"][0].update(tag_set2=[1, 2])),
        ("densecap.json", lambda content: content["records"][0].update(ok=0)),
        ("densecap.json", lambda content: content["result"]["det_breakdown"].update({"iou_0.5": 0.5})),
        # Not a changed value but one that nothing reads.
        ("text.json", lambda content: content.update(more=1)),
        ("densecap.json", lambda content: content["images"][2].update(weights=[1])),
    ],
)
def test_a_changed_or_added_json_entry_fails(
    runner: Any, some: Callable[..., Path], file: str, change: Callable[[Any], None]
) -> None:
    path = some(file) / file
    assert runner.main(["dynrefer", str(path.parent)]) == 0
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert runner.main(["dynrefer", str(path.parent)]) == 1


@pytest.mark.parametrize("key", ["in.more", "out.more", "sd.cvem_align.more"])
def test_an_unknown_array_fails(
    runner: Any, some: Callable[..., Path], capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = some("align.safetensors", "model_config.json") / "align.safetensors"
    assert runner.main(["dynrefer", str(path.parent)]) == 0
    save_file(load_file(path) | {key: torch.zeros(2)}, path)
    assert runner.main(["dynrefer", str(path.parent)]) == 1
    assert key.removeprefix("sd.") in capsys.readouterr().out


def test_an_unknown_file_or_a_lacking_weight_fails(
    runner: Any, some: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = some("align.safetensors", "model_config.json")
    np.savez(folder / "more.npz", x=np.zeros(1))
    assert runner.main(["dynrefer", str(folder)]) == 1
    assert "nothing read more.npz: x" in capsys.readouterr().out
    (folder / "more.npz").unlink()
    arrays = load_file(folder / "align.safetensors")
    del arrays["sd.cvem_align.output_proj.bias"]
    save_file(arrays, folder / "align.safetensors")
    assert runner.main(["dynrefer", str(folder)]) == 1
    assert "lacks 1 tensors (cvem_align.output_proj.bias)" in capsys.readouterr().out


def test_no_such_method_or_folder(runner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "text.json").write_text("{")
    for arguments, message in (
        (["dynrefe", str(GOLDEN)], "no golden check for 'dynrefe' (did you mean 'dynrefer'?)"),
        (["dynrefer", str(tmp_path / "none")], "there is no folder"),
        (["dynrefer", str(GOLDEN / "text.json")], "there is no folder"),
        (["dynrefer", str(damaged)], "cannot read"),
    ):
        assert runner.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
