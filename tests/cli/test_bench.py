"""`foveate bench backbone`: what it prints and writes, goes on from, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import cli
from foveate.methods.vision_gru.cost import crossover, growth, predicted


def network(model: str, size: int, seconds: float) -> dict[str, Any]:
    return {"model": model, "size": size, "parameters": 10**6, "forward_s": seconds, "step_s": None, "peak_mib": 10.0}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Of a network that is linear in the pixels and of one that is quadratic; they cross at 362 = 256 * 2^(1/2)."""
    rows = [network("vision_gru", size, 4.0 * (size / 256) ** 2) for size in (256, 512, 1024)]
    rows += [network("vit_sdpa", size, 2.0 * (size / 256) ** 4) for size in (256, 512, 1024)]
    (tmp_path / "backbone.json").write_text(json.dumps({"threads": 1, "networks": rows}))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "backbone", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_it_goes_on_from_what_was_measured(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--part", "networks", "--sizes", "256,512,1024", "--models", "vision_gru,vit_sdpa", "--limit", "1")
    code, out, _ = run(capsys, *options, "--resume", "--out", measured)
    assert code == 0
    assert out.count("vision_gru") >= 3
    summary = json.loads((measured / "backbone.json").read_text())["summary"]
    assert summary["growth_exponent"] == pytest.approx({"vision_gru": 1.0, "vit_sdpa": 2.0})
    assert summary["crossover_px"]["vit_sdpa"] == pytest.approx(256 * 2**0.5)
    assert (measured / "backbone.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_size_is_measured_in_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--part", "networks", "--sizes", "32", "--models", "convnext", "--repeats", "1", "--train-size", "1")
    code, out, _ = run(capsys, *options, "--out", tmp_path)
    assert (code, "failed" in out) == (0, False)
    (row,) = json.loads((tmp_path / "backbone.json").read_text())["networks"]
    assert (row["model"], row["size"], row["step_s"]) == ("convnext", 32, None)
    assert 25e6 < row["parameters"] < 35e6
    assert 0 < row["forward_s"] < 60


def test_what_is_predicted_to_take_too_long_is_left_out(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((measured / "backbone.json").read_text())["networks"]
    assert predicted(rows, "vit_sdpa", 2048) == pytest.approx(2.0 * 8**4)
    assert growth(rows, "convnext") is None
    assert crossover(rows, "vit_sdpa", "vision_gru") is None
    options = ("--part", "networks", "--sizes", "2048", "--models", "vit_sdpa", "--resume", "--out", measured)
    code, out, _ = run(capsys, *options)
    assert (code, "left out: about 8192 s" in out) == (0, True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--sizes", "big"), "give pixels with commas"),
        (("--sizes", "0"), "sizes must be pixels from 1"),
        (("--models", "resnet"), "there is no model 'resnet'"),
        (("--part", "half"), "there is no part 'half'"),
        (("--repeats", "0"), "repeats must be a whole number from 1"),
        (("--threads", "2", "--resume"), "was measured with 1 threads, not 2"),
    ],
)
def test_bad_input(measured: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], sentence: str) -> None:
    code, _, err = run(capsys, *options, "--out", measured)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


def test_a_damaged_file_is_named(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", '{"networks": [{"model": "vision_gru"}]}', "[]"):
        (measured / "backbone.json").write_text(text)
        code, _, err = run(capsys, "--resume", "--out", measured)
        assert code == 2
        assert "cannot be gone on from" in err
