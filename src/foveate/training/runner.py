"""Train and evaluate by recipe: what `foveate train` and `foveate evaluate` call."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import InputError, RecipeError
from foveate.files import atomic_write
from foveate.training.recipes import Recipe, load_recipe, recipe_module

if TYPE_CHECKING:
    from foveate.training.trainer import TrainResult


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a model on the evaluation data of a recipe, as written to `evaluation.json`.

    Attributes:
        quantize: "int8" where the metrics are those of the quantised model; then `unquantized` has those of the model
            as it is, on the same device.
    """

    method: str
    model: str
    metrics: dict[str, Any]
    seconds: float
    quantize: str | None = None
    unquantized: dict[str, Any] | None = None
    unquantized_seconds: float | None = None


def train(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    resume: bool | Path = False,
    out: str | Path | None = None,
) -> TrainResult:
    """Train by a recipe; the resolved recipe is written to `recipe.yaml` in the output folder.

    Args:
        recipe_path: YAML file.
        overrides: `section.key=value` each.
        resume: True goes on from the newest checkpoint in the output folder, a path from that checkpoint.
        out: output folder, in place of the recipe's `output`.

    Raises:
        RecipeError, CheckpointError: see `load_recipe` and `trainer.run`.
    """
    recipe = resolved_recipe(recipe_path, overrides, out)
    module = recipe_module(recipe.method)

    from transformers import set_seed

    from foveate.training.trainer import run

    set_seed(recipe.seed)  # before the model is built: a resumed run must start from the same frozen weights
    task = module.build(recipe)
    return run(task, recipe.training, recipe.output, recipe.seed, resume, on_start=recipe.save)


def evaluate(
    recipe_path: str | Path,
    model: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    quantize: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Evaluate a model folder on the recipe's evaluation data; the metrics are written to OUTPUT/evaluation.json.

    A metric that the data does not decide (the recall of small objects where there are none) is NaN in the result and
    null in the file.

    Args:
        quantize: "int8" evaluates the model twice on the CPU, quantised (files of its own go to OUTPUT/int8) and not.
        progress: called with (units done, units in all) by methods that say how far they are.

    Raises:
        RecipeError: see `load_recipe`.
        InputError: `model` is not a folder, or it cannot be quantised so.
    """
    recipe = resolved_recipe(recipe_path, overrides, out)
    if not Path(model).is_dir():
        raise InputError(
            f"There is no model folder {model}; give one that training wrote ({recipe.output}/checkpoint)."
        )

    run = recipe_module(recipe.method).evaluate
    if "progress" in inspect.signature(run).parameters:
        run = partial(run, progress=progress)
    if quantize is None:
        metrics, seconds = _timed(recipe, run, model)
        result = EvaluationResult(recipe.method, str(model), metrics, seconds)
    else:
        if "quantize" not in inspect.signature(run).parameters:
            raise InputError(f"a {recipe.method!r} is not evaluated in {quantize}; leave quantize out.")
        # The quantised model first: if it cannot run, that is said at once.
        own = recipe.model_copy(update={"output": recipe.output / quantize})
        metrics, seconds = _timed(own, run, model, device="cpu", quantize=quantize)
        plain, plain_seconds = _timed(recipe, run, model, device="cpu")
        result = EvaluationResult(recipe.method, str(model), metrics, seconds, quantize, plain, plain_seconds)
    written = {name: value for name, value in asdict(result).items() if value is not None}
    with atomic_write(recipe.output / "evaluation.json") as file:
        json.dump(json_ready(written), file, indent=1, allow_nan=False)
    return result


def _timed(recipe: Recipe, run: Callable[..., dict[str, Any]], model: str | Path, **options: Any) -> Any:
    """What an evaluation measures, and its seconds."""
    from transformers import set_seed

    set_seed(recipe.seed)
    started = time.perf_counter()
    metrics = run(recipe, Path(model), **options)
    return metrics, round(time.perf_counter() - started, 2)


def json_ready(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def resolved_recipe(recipe_path: str | Path, overrides: Sequence[str], out: str | Path | None) -> Recipe:
    """The recipe with its overrides, which writes into `out` in place of its own `output`.

    Raises:
        RecipeError: see `load_recipe`, or the output is a file.
    """
    extra = [] if out is None else [f"output={json.dumps(str(out))}"]
    recipe = load_recipe(recipe_path, [*overrides, *extra])
    if recipe.output.exists() and not recipe.output.is_dir():  # said now, not when there are results to write
        raise RecipeError(f"output: {recipe.output} is a file; give the name of a folder to write.")
    return recipe
