"""The shipped model through the published protocols, on rendered scenes in the benchmarks' own layouts."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate import cli
from foveate.checkpoints import find_checkpoint
from foveate.errors import InputError, RecipeError
from foveate.methods.dynrefer.predictor import DynReferPredictor
from foveate.methods.dynrefer.protocols import ProtocolSettings, evaluate_protocol
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train
from foveate.world.export import export_scenes

ROOT = Path(__file__).parents[3]
MODEL = find_checkpoint("dynrefer-world")


@pytest.fixture(scope="module")
def describer() -> DynReferPredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DynReferPredictor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes for "val" in each layout, of seeds that no shipped weight was trained on."""
    root = tmp_path_factory.mktemp("world")
    for layout in ("visual-genome", "refcocog", "coco"):
        export_scenes(root / layout, layout, first_seed=9_500_000, count=3, val_fraction=0.67)
    return root


@pytest.fixture
def ovad_layout(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("ovad_layout")


def run(describer: DynReferPredictor, out: Path, **settings: Any) -> dict[str, Any]:
    checked = ProtocolSettings(dataset="rendered", scorer="lite", **settings)
    return evaluate_protocol(checked, describer, out, model=MODEL)


def test_region_captions(describer: DynReferPredictor, world: Path, tmp_path: Path) -> None:
    root = world / "refcocog"
    report = run(describer, tmp_path, name="region-captioning", format="refcocog", root=root, split="val_captions")
    assert report["images"] == 2
    assert report["cider"] > 100
    assert report["meteor_lite"] > 40
    entries = json.loads((root / "finetune_refcocog_val_captions.json").read_text())["images"]
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["id"] for entry in written["images"]] == sorted(entry["id"] for entry in entries)


def test_dense_captions(describer: DynReferPredictor, world: Path, tmp_path: Path) -> None:
    where = {"name": "dense-captioning", "format": "visual-genome", "root": world / "visual-genome", "split": "val"}
    given = run(describer, tmp_path / "given", **where)
    assert (given["box_source"], given["det_map"]) == ("ground truth", pytest.approx(100.0))
    assert given["map_lite"] > 60
    proposed = run(describer, tmp_path / "proposed", boxes="proposer", **where)
    assert proposed["box_source"] == "proposer proposer-world"
    assert proposed["det_map"] > 40
    boxes = json.loads((tmp_path / "proposed/proposals.json").read_text())["annotations"]
    scores = [box["extra_info"]["grit_result"]["score"] for box in boxes]
    assert len(scores) == proposed["boxes"]
    # The file is one of the layout that a detector's boxes come in, and gives the same figures as such.
    read = run(describer, tmp_path / "read", boxes=tmp_path / "proposed/proposals.json", **where)
    assert read["map_lite"] == proposed["map_lite"]


def test_attributes(describer: DynReferPredictor, world: Path, tmp_path: Path, ovad_layout: Any) -> None:
    assert ovad_layout.main([str(world / "coco"), "val", str(tmp_path / "ovad")]) == 0
    report = run(describer, tmp_path / "out", name="attributes", format="ovad", root=tmp_path / "ovad", split="2000")
    assert {"all", "head", "medium", "tail", "colour", "single", "multiple"} <= set(report["map"])
    assert report["map"]["all"] > 75
    assert report["boxes"] == len(json.loads((tmp_path / "ovad/ovad2000.json").read_text())["annotations"])
    # The benchmark's attributes were asked, and the model still has its own.
    assert describer.processor.vocabulary.attributes[0].name == "black"
    with pytest.raises(InputError, match="not empty"):
        ovad_layout.convert(world / "coco", "val", tmp_path / "ovad")


def test_recognition(describer: DynReferPredictor, world: Path, tmp_path: Path) -> None:
    report = run(describer, tmp_path, name="recognition", format="coco", root=world / "coco", split="val")
    annotations = json.loads((world / "coco/annotations/instances_val.json").read_text())["annotations"]
    assert report["boxes"] == len(annotations)
    assert report["accuracy"] > 80
    assert report["map"] > 80
    # What ranks the boxes is the raw score of which the probability is the softmax.
    described: Any = describer(str(ROOT / "docs/images/sample.png"), boxes=[[10, 10, 60, 60]], tasks="category")
    region = described[0]
    logits = np.array(list(region.category_logits.values()))
    exponentials = np.exp(describer.model.config.calibration["category"][0] * logits)
    np.testing.assert_allclose(exponentials / exponentials.sum(), list(region.category_scores.values()), rtol=1e-4)
    assert abs(logits.sum() - 1) > 1


def test_command_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe of the benchmark, on other files: the table says what was measured."""
    settings = [f"root={world / 'coco'}", "split=val", "dataset=rendered", "images=1"]
    arguments = ["evaluate", "recipes/dynrefer/coco_recognition.yaml", "--model", "dynrefer-world"]
    arguments += ["--out", str(tmp_path / "out"), *(f"evaluation.protocol.{setting}" for setting in settings)]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    table = capsys.readouterr().out
    for words in ("recognition", "rendered", "ground truth", "accuracy", "boxes", "predictions.json"):
        assert words in table
    metrics = json.loads((tmp_path / "out/evaluation.json").read_text())["metrics"]
    assert (metrics["images"], metrics["box_source"]) == (1, "ground truth")
    assert f"{metrics['accuracy']:.4g}" in table


RECIPES = sorted(
    path.name
    for path in (ROOT / "recipes/dynrefer").glob("*.yaml")
    if "protocol:" in path.read_text() and "\ntraining:" not in path.read_text()
)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_protocols_only_evaluate(name: str, tmp_path: Path) -> None:
    recipe = ROOT / "recipes/dynrefer" / name
    with pytest.raises(InputError, match=r"(is not a folder|does not exist|not installed|no 'java')"):
        evaluate(recipe, MODEL, [f"evaluation.protocol.root={tmp_path / 'none'}"], out=tmp_path / "out")
    with pytest.raises(RecipeError, match="evaluates by a published protocol and has nothing to train"):
        train(recipe, out=tmp_path / "out")


def test_five_recipes_and_their_sections() -> None:
    assert len(RECIPES) == 5
    recipe = ROOT / "recipes/dynrefer/ovad.yaml"
    for override, sentence in (
        ("evaluation.protocol=null", "give either data or protocol"),
        ("training.max_steps=3", "the key 'data' is missing; add it"),
        ("evaluation.protocol.format=coco", "the protocol attributes reads the format ovad, not coco"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(recipe, [override])
