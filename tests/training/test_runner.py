from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from foveate.errors import InputError, RecipeError
from foveate.methods import METHODS, Method
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train

ROOM = """
import safetensors.torch
import torch
from foveate_tiny_run import NoisyLine, Regressor

from foveate.training.recipes import Recipe, RecipeSection
from foveate.training.trainer import TrainingTask


class Data(RecipeSection):
    length: int = 64


class TinyRecipe(Recipe):
    data: Data = Data()


RECIPE = TinyRecipe


def build(recipe):
    return TrainingTask(Regressor(), NoisyLine(recipe.data.length))


def evaluate(recipe, model_path):
    model = Regressor()
    safetensors.torch.load_model(model, model_path / "model.safetensors")
    model.eval()
    samples = [NoisyLine(recipe.data.length)[index] for index in range(recipe.data.length)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "y")}
    with torch.inference_mode():
        error = model(**batch).losses["error"].item()
    return {"error": error, "samples": len(samples), "parts": {"none": float("nan"), "all": [float("inf"), 0.5]}}
"""
RECIPE = """
method: tiny
seed: 5
data: {length: 96}
training: {max_steps: 30, batch_size: 8, learning_rate: 1e-2, precision: fp32, log_every: 10, progress: false}
"""


@pytest.fixture
def recipe(tiny, tmp_path, monkeypatch, one_thread):
    """A recipe of a small method that is plugged into the registry for one test."""
    room = tmp_path / "rooms" / "foveate_tiny_method"
    room.mkdir(parents=True)
    (room / "__init__.py").touch()
    (room / "recipe.py").write_text(ROOM)
    monkeypatch.syspath_prepend(room.parent)
    monkeypatch.setitem(METHODS, "tiny", Method("foveate_tiny_method", "Tiny", "tiny"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "world.yaml"
    path.write_text(RECIPE)
    yield path
    for name in ("foveate_tiny_method", "foveate_tiny_method.recipe"):
        sys.modules.pop(name, None)


def test_train_then_evaluate(recipe, tmp_path):
    result = train(recipe, ["training.max_steps=60"])
    assert result.steps == 60
    assert result.output.resolve() == tmp_path / "out"
    resolved = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert resolved.training.max_steps == 60
    assert resolved == load_recipe(recipe, ["training.max_steps=60"])

    trained = evaluate(recipe, result.checkpoint)
    untrained = evaluate(recipe, train(recipe, ["training.learning_rate=0"], out="zero").checkpoint)
    assert trained.metrics["samples"] == 96
    assert trained.metrics["error"] < 0.5 * untrained.metrics["error"]
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["metrics"].pop("parts") == {"none": None, "all": [None, 0.5]}, "JSON has neither NaN nor infinity"
    assert written["metrics"] == {name: untrained.metrics[name] for name in ("error", "samples")}
    assert written["method"] == "tiny"


def test_quantized_beside_the_model_as_it_is(recipe, tmp_path):
    """Both on the CPU, with files of their own; the numbers of the quantised one are the result."""
    checkpoint = train(recipe, ["training.max_steps=2"]).checkpoint
    with pytest.raises(InputError, match="a 'tiny' is not evaluated in int8; leave quantize out"):
        evaluate(recipe, checkpoint, quantize="int8")
    plain = evaluate(recipe, checkpoint)
    assert plain.quantize is None
    assert "unquantized" not in json.loads((tmp_path / "out" / "evaluation.json").read_text())

    module: Any = sys.modules["foveate_tiny_method.recipe"]
    exact, calls = module.evaluate, []

    def rounded(recipe, model_path, *, device=None, quantize=None):
        calls.append((recipe.output, device, quantize))
        metrics = exact(recipe, model_path)
        return metrics if quantize is None else metrics | {"error": round(metrics["error"], 2)}

    module.evaluate = rounded
    result = evaluate(recipe, checkpoint, quantize="int8")
    assert calls == [(plain_output() / "int8", "cpu", "int8"), (plain_output(), "cpu", None)]
    assert result.quantize == "int8"
    assert result.unquantized is not None
    assert result.unquantized["error"] == plain.metrics["error"]
    assert result.metrics["error"] == round(plain.metrics["error"], 2) != plain.metrics["error"]
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["metrics"]["error"] == result.metrics["error"]
    assert written["unquantized"]["error"] == plain.metrics["error"]


def plain_output():
    return load_recipe("world.yaml").output


def test_the_same_recipe_and_seed_give_the_same_model(recipe):
    first, second = train(recipe, out="a"), train(recipe, out="b")
    assert first.history == second.history
    other = train(recipe, ["seed=6"], out="c")
    assert other.history != first.history


def test_resume_through_the_recipe(recipe, tmp_path):
    whole = train(recipe, ["training.save_every=10"], out="whole")
    start = tmp_path / "whole" / "checkpoints" / "checkpoint-20"
    resumed = train(recipe, ["training.save_every=10"], resume=start, out="resumed")
    assert resumed.history == whole.history


def test_a_refused_run_leaves_the_recipe_of_the_unfinished_one(recipe, tmp_path):
    train(recipe, ["training.save_every=10"])
    (tmp_path / "out" / "training.json").unlink()
    before = (tmp_path / "out" / "recipe.yaml").read_bytes()
    with pytest.raises(RecipeError, match=r"unfinished run \(checkpoint-30\)"):
        train(recipe, ["training.max_steps=7"])
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == before


def test_mistakes(recipe):
    with pytest.raises(RecipeError, match=r"did you mean 'data\.length'"):
        train(recipe, ["data.lenght=3"])
    with pytest.raises(InputError, match="There is no model folder nowhere"):
        evaluate(recipe, "nowhere")
    with pytest.raises(RecipeError, match="should be greater than 0"):
        evaluate(recipe, "nowhere", ["training.max_steps=0"])
    with pytest.raises(RecipeError, match=r"output: .*world\.yaml is a file; give the name of a folder"):
        train(recipe, out=recipe)
