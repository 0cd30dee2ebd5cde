"""The golden runner: it passes on the reference arrays, reads all of them, and fails on any that is changed."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "hired"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TESTS.parent / "tools"))
    return importlib.import_module("check_golden")


def test_every_array_is_read_and_agrees(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["hired", str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if line.endswith((" ok", "FAIL"))]
    assert lines[-1] == f"{len(compared)} arrays compared, 0 failed, 0 unread"
    rows = {line.split()[0] for line in compared}
    given = ("pixel_u8", "image_size_hw", "input_ids", "confs_rate_alpha_spatial", "rates")
    for path in GOLDEN.glob("*.npz"):
        with np.load(path) as arrays:
            assert {key for key in arrays.files if not key.endswith(given)} <= rows, path.name


def test_a_changed_array_fails(runner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in GOLDEN.glob("llava15*"):
        shutil.copyfile(path, tmp_path / path.name)
    arrays = dict(np.load(GOLDEN / "llava15_cases.npz"))
    changed = ["case0.cls_attn_l22_headsum", "case1.rate0.features", "case2.rate3.logits_last"]
    for key in changed:
        arrays[key] = np.array(arrays[key])
        arrays[key].reshape(-1)[0] += 1e-4
    np.savez(tmp_path / "llava15_cases.npz", **arrays, foreign=np.zeros(2))
    assert runner.main(["hired", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("FAIL")] == changed
    assert "FAIL: nothing read llava15_cases.npz: foreign" in lines
