"""`make demo`: its picture, its boxes and the command that the Makefile runs.

The picture is scene 9800999 at 512 pixels with 5 to 6 objects (`render_scene(9_800_999, 512, (5, 6))`), a seed from
which no recipe trains; the boxes are those of its objects.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from foveate import cli
from foveate.checkpoints import shipped_models

ROOT = Path(__file__).parents[2]
SAMPLE, BOXES = ROOT / "docs/images/sample.png", ROOT / "docs/images/sample-boxes.json"
CATEGORIES = ["cactus", "sign", "cat", "lamp", "bicycle", "rabbit"]  # in the order of the boxes


def demo_arguments(picture: Path, *options: str) -> list[str]:
    """What the Makefile's `demo` gives to `foveate`, with another picture to write."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    command = lines[next(row for row, line in enumerate(lines) if line.startswith("demo:")) + 1]
    words = shlex.split(command.strip())
    assert words[0] == "$(BIN)/foveate"
    words[words.index("--picture") + 1] = str(picture)
    return [*words[1:], *options]


def run(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_boxes_lie_in_the_picture() -> None:
    image, boxes = Image.open(SAMPLE), json.loads(BOXES.read_text())
    assert image.size == (512, 512)
    assert len(boxes) == len(CATEGORIES)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= 512
        assert 0 <= y0 < y1 <= 512
        assert (x1 - x0) * (y1 - y0) > 0.015 * 512 * 512, "large enough to be seen in the annotated picture"


def test_the_command_of_the_makefile_runs(
    tiny_describer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    picture = tmp_path / "demo" / "described.png"
    code, out, err = run(capsys, demo_arguments(picture, "--model", str(tiny_describer)))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "docs/images/sample.png  6 regions"
    assert lines[-1] == f"written: {picture}"
    assert sum(line.startswith("     category ") for line in lines) == 6
    assert Image.open(picture).width > 512, "the words stand beside the picture"


@pytest.mark.skipif("dynrefer-world" not in shipped_models(), reason="the shipped weights are not made yet")
def test_the_shipped_model_names_the_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, demo_arguments(tmp_path / "d.png", "--format", "json"))
    assert code == 0
    assert err.startswith("note: dynrefer-world knows the rendered world only, nothing of photographs"), "not a warning"
    assert ".py" not in err, "where in the code it was said is nothing to a user"
    regions = json.loads(out)[0]["regions"]
    assert [region["category"] for region in regions] == CATEGORIES
    assert "purple cat" in regions[2]["caption"]
    assert "pink bicycle" in regions[4]["caption"]
