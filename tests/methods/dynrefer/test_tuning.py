"""The sweep over views: what is tried, what is chosen, what is written, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate import cli
from foveate.errors import InputError, RecipeError
from foveate.methods.dynrefer import tuning
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.predictor import TASKS, DynReferPredictor
from foveate.methods.dynrefer.processing import DynReferProcessor
from foveate.methods.dynrefer.recipe import DynReferRecipe, evaluate
from foveate.methods.dynrefer.tuning import (
    SWEEP,
    TaskTuning,
    Tuning,
    measurer,
    save_with_policy,
    sweep_views,
    tune_views,
)
from foveate.training.recipes import load_recipe
from foveate.world.export import export_scenes

RECIPE = "recipes/dynrefer/world.yaml"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    export_scenes(root, "visual-genome", first_seed=5, count=2, size=96, val_fraction=0.0, processes=1)
    return root


def settings(scenes: Path) -> list[str]:
    data = f"{{root: {scenes}, split: train, regions: 3}}"
    return [f"evaluation.data={data}", "evaluation.num_beams=1"]


class Bowl:
    """Stands in for measuring: the caption is best at t = (0.4, 0.7), the category anywhere, tags have no labels."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.stop_after: int | None = None

    def __call__(self, *_: Any) -> Callable[[Any], dict[str, Any]]:
        return self.measure

    def measure(self, views: Any) -> dict[str, Any]:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(views)
        t = views["caption"] if isinstance(views, dict) else {"task": [0.3, 0.5], "official": [1.0, 1.0]}[views]
        cider = 3 - abs(t[0] - 0.4) - abs(t[1] - 0.7)
        return {"regions": 7, "cider": cider, "category_accuracy": 0.5, "tag_map": float("nan")}


@pytest.fixture
def bowl(monkeypatch: pytest.MonkeyPatch) -> Bowl:
    bowl = Bowl()
    monkeypatch.setattr(tuning, "measurer", bowl)
    return bowl


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def test_sweep_moves_what_is_not_fixed() -> None:
    asked: list[Any] = []
    rows = sweep_views(
        lambda views: asked.append(views) or {"n": len(asked)}, ["tags", "caption"], 4, fixed={"tags": [0.9]}
    )  # pyright: ignore
    assert [row["n"] for row in rows] == list(range(1, 12))
    assert asked[3] == {"tags": [0.9, 0.3, 0.3], "caption": [0.3, 0.3, 0.3]}
    assert [views["caption"][0] for views in asked] == list(SWEEP)


def test_each_view_at_its_best_before_the_next(bowl: Bowl, checkpoint: Path, scenes: Path, tmp_path: Path) -> None:
    before = digest(checkpoint)
    seen: list[tuple[int, int]] = []
    result = tune_views(
        RECIPE,
        checkpoint,
        settings(scenes),
        out=tmp_path / "out",
        save=tmp_path / "copy",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(k, 24) for k in range(1, 25)]
    caption = result.tasks["caption"]
    # Both at one t: anything from 0.4 to 0.7 is 0.3 away in sum, so the smallest; then the last one alone.
    assert [round_.fixed for round_ in caption.rounds] == [(), (0.4,)]
    assert caption.views == (0.4, 0.7)
    assert caption.value == pytest.approx(3)
    assert caption.policy == pytest.approx(2.7)
    assert caption.search == pytest.approx(2.1)
    # Nothing is better than the model's own views, so they stay.
    assert result.tasks["category"].views == (0.1, 0.2)
    assert "tags" in result.left_out
    assert result.regions == 7
    assert bowl.asked[2] == {"caption": [0.0, 0.0], "category": [0.0, 0.0]}

    written = json.loads((tmp_path / "out" / "views.json").read_text())
    assert written["tasks"]["caption"]["views"] == [0.4, 0.7]
    assert written["t"] == list(SWEEP)
    assert len((tmp_path / "out" / "views.jsonl").read_text().splitlines()) == 24
    assert Image.open(tmp_path / "out" / "views.png").size == (800, 840)
    assert digest(checkpoint) == before
    after = digest(tmp_path / "copy")
    assert {name for name in before if after[name] != before[name]} == {"config.json"}
    policy = DynReferPredictor.from_pretrained(tmp_path / "copy").model.config.view_policy
    assert policy == {"attributes": [0.1, 0.2], "category": [0.1, 0.2], "tags": [0.3, 0.5], "caption": [0.4, 0.7]}


def test_an_interrupted_sweep_goes_on(bowl: Bowl, checkpoint: Path, scenes: Path, tmp_path: Path) -> None:
    whole = tune_views(RECIPE, checkpoint, settings(scenes), out=tmp_path / "whole")
    bowl.asked, bowl.stop_after = [], 9
    with pytest.raises(KeyboardInterrupt):
        tune_views(RECIPE, checkpoint, settings(scenes), out=tmp_path / "out")
    bowl.stop_after = None
    assert tune_views(RECIPE, checkpoint, settings(scenes), out=tmp_path / "out") == whole
    assert len(bowl.asked) == 24
    assert (tmp_path / "out" / "views.jsonl").read_bytes() == (tmp_path / "whole" / "views.jsonl").read_bytes()


def test_measured_for_real(
    predictor: DynReferPredictor,
    scenes: Path,
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The metrics are those of `evaluate` with these views, and the verb prints and writes what was measured."""
    recipe = load_recipe(RECIPE, [*settings(scenes), "evaluation.views=[0.2, 0.2]", f"output={tmp_path / 'e'}"])
    assert isinstance(recipe, DynReferRecipe)
    expected = evaluate(recipe, checkpoint)
    found = measurer(predictor, recipe.evaluation, TASKS)({task: [0.2, 0.2] for task in TASKS})
    assert found["regions"] == 3
    for name in ("cider", "tag_map", "attribute_map", "category_accuracy"):
        assert name in expected or name not in found
        if name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)

    arguments = ["tune-views", RECIPE, "--model", str(checkpoint), *settings(scenes), "evaluation.tasks=[caption]"]
    arguments += ["--out", str(tmp_path / "out"), "--save", str(tmp_path / "copy")]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, _ = capsys.readouterr()
    assert not caught.value.code
    assert "3 regions of visual-genome" in out
    assert "caption: cider" in out
    assert "official search" in out
    assert f"model: {tmp_path / 'copy'}" in out
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_policy_may_name_a_search(checkpoint: Path, tmp_path: Path) -> None:
    save_with_policy(checkpoint, tmp_path / "copy", {"caption": "official", "tags": (0.5, 0.6)})
    config = DynReferPredictor.from_pretrained(tmp_path / "copy").model.config
    assert config.view_policy == {"caption": "official", "tags": [0.5, 0.6]}


def test_charts_of_many_views() -> None:
    """A chart has room for ten lines; further rounds are in the JSON."""
    rounds = tuple(tuning.Round((0.1,) * k, tuple(float(k) for _ in SWEEP)) for k in range(10))
    many = TaskTuning("cider", rounds, 0.5, 0.6, "official", 0.6)
    assert tuning.round_name(2, many) == "views 4 to 11 (2 at 0.1, 3 at 0.1)"
    assert Tuning("m", "d", 1, {"caption": many}).plot().size == (800, 420)


@pytest.fixture
def one_view(make_model: Callable[..., DynReferModel], processor: DynReferProcessor, tmp_path: Path) -> Path:
    make_model(num_views=1).save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def test_refusals(bowl: Bowl, checkpoint: Path, one_view: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match=r"refcocog\.yaml has no evaluation\.data of described regions"):
        tune_views("recipes/dynrefer/refcocog.yaml", checkpoint, out=out)
    with pytest.raises(RecipeError, match="give a DynRefer recipe"):
        tune_views("recipes/standins/t5_world.yaml", checkpoint, out=out)
    with pytest.raises(InputError, match="looks at the region alone"):
        tune_views(RECIPE, one_view, settings(scenes), out=out)
    for save, message in ((checkpoint, "is the model itself"), (checkpoint / "x", "lies in it"), (scenes, "is in use")):
        with pytest.raises(InputError, match=message):
            tune_views(RECIPE, checkpoint, settings(scenes), out=out, save=save)
    with pytest.raises(InputError, match="there is no model 'dynrefer-wrld'"):
        tune_views(RECIPE, "dynrefer-wrld", settings(scenes), out=out)
    assert not bowl.asked
    with pytest.raises(RecipeError, match="have no labels for tags"):
        tune_views(RECIPE, checkpoint, [*settings(scenes), "evaluation.tasks=[tags]"], out=out)
    assert not (out / "views.json").exists()
