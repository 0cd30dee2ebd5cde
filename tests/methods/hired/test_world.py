"""The shipped LLaVA-NeXT on scenes that no part was trained on: what HiRED keeps tells more than what chance keeps."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

import foveate
from foveate import cli
from foveate.checkpoints import shipped_models
from foveate.world.scenes import Scene, SceneQuestion, render_scene

MODEL = "llava-next-world"
pytestmark = pytest.mark.skipif(MODEL not in shipped_models(), reason="these weights are not in this installation")


@pytest.fixture(scope="module")
def model() -> Any:
    with pytest.warns(UserWarning, match="knows the rendered world only"):
        return foveate.load(MODEL, device="cpu")


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, SceneQuestion]]:
    scenes = [render_scene(seed, size=256) for seed in range(9_700_000, 9_700_024)]
    return [(scene, each) for scene in scenes for each in scene.all_questions if each.kind == "colour"]


def right(model: Any, asked: list[tuple[Scene, SceneQuestion]]) -> float:
    pictures = {id(scene): Image.fromarray(scene.image) for scene, _ in asked}
    said = model.ask([pictures[id(scene)] for scene, _ in asked], [each.question for _, each in asked], batch_size=32)
    return sum(answer.text == each.answer for answer, (_, each) in zip(said, asked, strict=True)) / len(asked)


def test_colours_are_found_in_a_fifth_of_the_tokens(model: Any, asked: list[tuple[Scene, SceneQuestion]]) -> None:
    assert len(asked) > 80
    whole = right(model, asked)
    with foveate.drop_visual_tokens(model, 0.2):
        chosen = right(model, asked)
    with foveate.drop_visual_tokens(model, 0.2, "random", seed=0):
        chance = right(model, asked)
    assert whole > 0.5
    assert chosen > 0.8 * whole
    assert chosen > chance


def test_ask_needs_no_boxes(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A shipped model that is no MG-LLaVA has no proposer, and boxes given to it are a mistake."""
    scene = render_scene(9_700_001, size=256)
    path = tmp_path / "scene.png"
    Image.fromarray(scene.image).save(path)
    question = next(each for each in scene.all_questions if each.kind == "count")
    overlay = tmp_path / "kept.png"
    arguments = ["ask", str(path), question.question, "--model", MODEL]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--keep", "0.4", "--show-tokens", str(overlay)])
    assert ended.value.code in (0, None)
    said = capsys.readouterr()
    assert said.out.strip()
    assert "no boxes" not in said.err
    assert overlay.stat().st_size > 1000
    for extra in (["--boxes", "proposer-world"], ["--box", "0,0,20,20"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, *extra])
        assert ended.value.code == 2
        assert "looks at no object by itself" in capsys.readouterr().err
