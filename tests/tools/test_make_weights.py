"""`make weights`: runs recipes in order, ships their checkpoints in float16, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from foveate.errors import CheckpointError, InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(load_program: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/make_weights.py with one tiny recipe and a folder of its own for the weights."""
    module = load_program("tools/make_weights.py")
    recipe = {
        "method": "t5-world",
        "output": str(tmp_path / "out"),
        "data": {"first_seed": 0, "count": 4, "processes": 1},
        "model": {"width": 16, "layers": 1, "heads": 2, "head_width": 8, "feed_forward": 16},
        "evaluation": {"first_seed": 10, "count": 1},
        "training": {"max_steps": 2, "batch_size": 4, "save_every": 0, "progress": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    weights = tmp_path / "weights"
    monkeypatch.setattr(module, "RECIPES", {"t5-world": (path,)})
    monkeypatch.setattr(module, "WEIGHTS", weights)
    return module


def checkpoint(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "t5", "dtype": "float32"}')
    return folder


def test_a_recipe_is_trained_once_and_shipped(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from foveate.language.lm import load_language_model

    assert tool.main([]) == 0
    shipped, trained = tmp_path / "weights/t5-world", tmp_path / "out/checkpoint"
    assert json.loads((shipped / "config.json").read_text())["dtype"] == "float16"
    tensors, originals = load_file(shipped / "model.safetensors"), load_file(trained / "model.safetensors")
    assert tensors.keys() == originals.keys()
    assert all(torch.equal(tensors[key], originals[key].half()) for key in tensors)
    size = sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file())
    assert f"t5-world: {size / 1e6:.2f} MB" in capsys.readouterr().out
    load_language_model(shipped, dtype=torch.float32)

    finished = (tmp_path / "out/training.json").stat().st_mtime_ns
    assert tool.main(["--only", "t5-world"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "out/training.json").stat().st_mtime_ns == finished
    assert tool.main(["--fresh"]) == 0
    assert (tmp_path / "out/training.json").stat().st_mtime_ns > finished


def test_weights_are_rounded_and_integers_are_kept(tool: ModuleType, tmp_path: Path) -> None:
    tensors = {"weight": torch.tensor([1.0, 1 / 3]), "ids": torch.tensor([70000])}
    tool.publish(checkpoint(tmp_path / "c", **tensors), "x", tmp_path / "weights")
    shipped = load_file(tmp_path / "weights/x/model.safetensors")
    assert shipped["weight"].tolist() == [1.0, 0.333251953125]
    assert shipped["ids"].tolist() == [70000]


def test_too_large_models_and_numbers_are_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    good = checkpoint(tmp_path / "good", weight=torch.ones(1000))
    size = tool.publish(good, "x", weights)
    assert size > 2000
    with pytest.raises(CheckpointError, match="weight is not finite in float16"):
        tool.publish(checkpoint(tmp_path / "huge", weight=torch.tensor([1e6])), "x", weights)
    monkeypatch.setattr(tool, "MAX_BYTES", size)
    with pytest.raises(InputError, match=f"more than {size}"):
        tool.publish(checkpoint(tmp_path / "big", weight=torch.zeros(1200)), "x", weights)
    monkeypatch.setattr(tool, "MAX_BYTES_TOGETHER", 2 * size - 1)
    tool.publish(good, "x", weights)
    with pytest.raises(InputError, match=f"with y the shipped models have {2 * size} bytes"):
        tool.publish(good, "y", weights)
    assert sorted(path.name for path in weights.iterdir()) == ["x"], "nothing partial stays"
    assert load_file(weights / "x/model.safetensors")["weight"].tolist() == [1.0] * 1000


def test_every_recipe_exists_and_names_its_model(load_program: Callable[[str], ModuleType]) -> None:
    module = load_program("tools/make_weights.py")
    for name, paths in module.RECIPES.items():
        recipes = [yaml.safe_load((ROOT / path).read_text(encoding="utf-8")) for path in paths]
        assert f"out/{name}" in {recipe["output"] for recipe in recipes}
        assert len({recipe["output"] for recipe in recipes}) == len(recipes)
        for before, after in pairwise(recipes):
            assert after["model"]["init_from"] == f"{before['output']}/checkpoint"
    order = list(module.RECIPES)
    assert all(order.index(base) < order.index(name) for name, bases in module.BUILT_ON.items() for base in bases)
