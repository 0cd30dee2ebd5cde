"""The golden runner: it passes on the reference arrays, reads all of them, and fails on any that is changed."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "vision_gru"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TESTS.parent / "tools"))
    return importlib.import_module("check_golden")


def test_every_array_is_read_and_agrees(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["vision_gru", str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if line.endswith((" ok", "FAIL"))]
    assert lines[-1] == f"{len(compared)} arrays compared, 0 failed, 0 unread"
    rows = {" ".join(line.split()[:2]) for line in compared}
    inputs = ("sd.", "x", "r", "h0", "h", "w", "dim", "expansion_factor", "depths", "image", "target", "cls_total")
    inputs += ("cls_warmup", "cls_base_lr", "S0", "lengths", "num_classes")
    for path in GOLDEN.glob("*.npz"):
        with np.load(path) as arrays:
            for key in arrays.files:
                given = (
                    key in inputs or key.startswith("sd.") or key.endswith((".image", ".hidden", ".gate", ".r", ".hw"))
                )
                assert given or f"{path.stem} {key}" in rows, (path.stem, key)


@pytest.mark.parametrize(
    ("file", "key", "change"),
    [
        ("mingru_a", "y_f64", 1e-6),
        ("mingru_a", "grad_f64.to_out.weight", 1e-5),
        ("mingru_b", "h_last_from_h0", 1e-2),
        ("scan", "L1000.h_f64", 1e-6),
        ("scan", "L65.dgate_f64", 1e-5),
        ("block", "sd.dw_conv.bias", 1e-2),
        ("block", "grad.norm.weight", 1e-1),
        ("recipe", "ema_decay_at_update_n", 1e-6),
        ("backbone_tiny", "s2.out1", 1e-2),
        ("classifier_tiny", "kl_loss_f64", 1e-6),
    ],
)
def test_a_changed_array_fails(runner: Any, tmp_path: Path, file: str, key: str, change: float) -> None:
    arrays = dict(np.load(GOLDEN / f"{file}.npz"))
    arrays[key] = np.array(arrays[key])
    arrays[key].reshape(-1)[0] += change
    np.savez(tmp_path / f"{file}.npz", **arrays)
    assert runner.main(["vision_gru", str(tmp_path)]) == 1


def test_an_unknown_array_fails(runner: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(GOLDEN / "recipe.npz", tmp_path / "recipe.npz")
    assert runner.main(["vision_gru", str(tmp_path)]) == 0
    np.savez(tmp_path / "recipe.npz", **dict(np.load(GOLDEN / "recipe.npz")), foreign=np.zeros(3))
    assert runner.main(["vision_gru", str(tmp_path)]) == 1
    assert "nothing read recipe.npz: foreign" in capsys.readouterr().out
