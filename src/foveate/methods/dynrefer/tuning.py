"""`foveate tune-views`: which views suit each task, measured on a labelled split of the user's (spec 4.3).

The paper's task prior (attributes look close, captions look wide) names no t's. This finds them for a model and its
data: one context view after the other is swept over t, each at its best before the next one moves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.checkpoints import read_config
from foveate.errors import InputError, RecipeError
from foveate.files import ResumableLines, atomic_folder, atomic_write, file_states
from foveate.training.runner import json_ready, resolved_recipe
from foveate.vision.plots import line_chart

from .configuration import CANDIDATE_VIEWS, find_dynrefer
from .predictor import DynReferPredictor
from .recipe import DynReferRecipe, EvaluationSettings, describe_index, open_regions, score

SWEEP = (0.0, *CANDIDATE_VIEWS)
"""The t's that are tried; at 0 a context view shows nothing but the region."""

FIGURES = {"caption": "cider", "tags": "tag_map", "attributes": "attribute_map", "category": "category_accuracy"}
"""What each task is judged by; more is better."""

Views = str | dict[str, list[float]]
Measure = Callable[[Views], Mapping[str, Any]]

_MOST_LINES = 8  # of a chart, beside the two baselines


@dataclass(frozen=True)
class Round:
    """One sweep for one task.

    Attributes:
        fixed: t's of the context views that earlier rounds decided.
        values: the figure with all further context views at each t of `SWEEP`.
    """

    fixed: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def best(self) -> float:
        """The t of the highest figure, the smallest on ties."""
        return SWEEP[self.values.index(max(self.values))]


@dataclass(frozen=True)
class TaskTuning:
    """What was measured for a task.

    Attributes:
        figure: name of what it was judged by.
        rounds: one for each context view.
        policy, search: the figure with the model's own views and with the official search.
        views: the best of all: the model's own, "official", or the t's of the context views.
        value: its figure.
    """

    figure: str
    rounds: tuple[Round, ...]
    policy: float
    search: float
    views: str | tuple[float, ...]
    value: float


@dataclass(frozen=True)
class Tuning:
    """Result of `tune_views`, as written to `views.json`."""

    model: str
    dataset: str
    regions: int
    tasks: dict[str, TaskTuning]
    left_out: list[str] = field(default_factory=list)
    t: tuple[float, ...] = SWEEP

    def plot(self) -> Image.Image:
        """The curves over t, a chart for each task."""
        charts = [_chart(task, tuning) for task, tuning in self.tasks.items()]
        picture = Image.new("RGB", (charts[0].width, sum(chart.height for chart in charts)), "white")
        for row, chart in enumerate(charts):
            picture.paste(chart, (0, row * chart.height))
        return picture


def measurer(predictor: DynReferPredictor, settings: EvaluationSettings, tasks: Sequence[str]) -> Measure:
    """A function that measures views on the regions of `evaluation.data`, which is opened once.

    Raises:
        InputError, RecipeError: see `open_regions`.
    """
    dataset, index = open_regions(settings.data)

    def measure(views: Views) -> Mapping[str, Any]:
        truth, said, _ = describe_index(
            predictor,
            dataset,
            index,
            tasks=tasks,
            views=views,
            num_beams=settings.num_beams,
            batch_size=settings.batch_size,
        )
        return score(truth, said, predictor.processor.vocabulary, tasks)

    return measure


def sweep_views(
    measure: Measure,
    tasks: Sequence[str],
    num_views: int,
    *,
    fixed: Mapping[str, Sequence[float]] | None = None,
    coefficients: Iterable[float] = SWEEP,
) -> list[Mapping[str, Any]]:
    """The metrics at each t.

    Args:
        measure: gives the metrics of views.
        num_views: n of the model, at least 2.
        fixed: task -> t's of its first context views; only those after them move, all to the same t.
        coefficients: the t's.
    """
    rows = []
    for t in coefficients:
        first = {task: list((fixed or {}).get(task, ())) for task in tasks}
        rows.append(measure({task: own + [t] * (num_views - 1 - len(own)) for task, own in first.items()}))
    return rows


def tune_views(
    recipe_path: str | Path,
    model: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    save: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Find the views of each task on `evaluation.data` of a recipe.

    Writes `views.json`, the curves `views.png` and the metrics of every setting `views.jsonl` into the recipe's output;
    an interrupted run goes on after the last setting that it measured.

    Args:
        model: folder or name of a DynRefer checkpoint; it is not changed.
        overrides: `section.key=value` each.
        out: folder to write, in place of the recipe's `output`.
        save: new folder for a copy of the model with the best views as its `view_policy`.
        progress: called with (settings measured, settings in all).

    Raises:
        InputError: no such model, one with a single view, or a folder `save` that is in use.
        RecipeError: the recipe has no `evaluation.data`, or its regions have no labels of any task.
    """
    recipe = resolved_recipe(recipe_path, overrides, out)
    if not isinstance(recipe, DynReferRecipe) or recipe.evaluation.protocol is not None:
        raise RecipeError(
            f"{recipe_path} has no evaluation.data of described regions to tune on; give a DynRefer recipe like "
            "recipes/dynrefer/world.yaml, with your own split as evaluation.data"
        )
    folder, settings = find_dynrefer(model), recipe.evaluation
    if save is not None:
        _check_copy(folder, Path(save))
    predictor = DynReferPredictor.from_pretrained(folder)
    num_views = predictor.model.config.num_views
    if num_views == 1:
        raise InputError(f"{model} looks at the region alone, so it has no context views to tune; give another model")
    key = json.dumps([str(folder), file_states(folder), settings.model_dump(mode="json", exclude={"views"})])
    with ResumableLines.go_on(recipe.output / "views.jsonl", key=key) as lines:
        finished = iter([json.loads(line)["metrics"] for line in lines.finished])
        total, done = 2 + len(SWEEP) * (num_views - 1), 0
        measure_now = measurer(predictor, settings, settings.tasks)

        def measure(views: Views) -> Mapping[str, Any]:
            """Settings come in the same order in every run, so finished lines stand for the first of them."""
            nonlocal done
            metrics = next(finished, None)
            if metrics is None:
                metrics = json_ready(measure_now(views))
                lines.append(json.dumps({"views": views, "metrics": metrics}, allow_nan=False))
            done += 1
            if progress is not None:
                progress(done, total)
            return metrics

        own = measure("task")
        tasks = [task for task in settings.tasks if own.get(FIGURES[task]) is not None]
        if not tasks:
            raise RecipeError(
                f"the regions of {settings.data.root} have no labels for {', '.join(settings.tasks)}; give a labelled "
                "split as evaluation.data"
            )
        if len(tasks) < len(settings.tasks):
            measure_now = measurer(predictor, settings, tasks)
        searched = measure("official")
        rounds: dict[str, list[Round]] = {task: [] for task in tasks}
        fixed: dict[str, tuple[float, ...]] = dict.fromkeys(tasks, ())
        for _ in range(num_views - 1):
            rows = sweep_views(measure, tasks, num_views, fixed=fixed)
            for task in tasks:
                rounds[task].append(Round(fixed[task], tuple(row[FIGURES[task]] for row in rows)))
                fixed[task] = (*fixed[task], rounds[task][-1].best)
    policy = predictor.model.config.view_policy
    tunings = {}
    for task in tasks:
        figure = FIGURES[task]
        # The model's own views stay where nothing is better. Each round tries what the one before decided, so the last
        # one has the best of all.
        candidates = [(own[figure], policy.get(task, "official")), (searched[figure], "official")]
        candidates.append((max(rounds[task][-1].values), fixed[task]))
        value, views = max(candidates, key=lambda candidate: candidate[0])
        views = views if isinstance(views, str) else tuple(views)
        tunings[task] = TaskTuning(figure, tuple(rounds[task]), own[figure], searched[figure], views, value)
    result = Tuning(
        model=str(model),
        dataset=f"{settings.data.format} {settings.data.root} {settings.data.split}",
        regions=own["regions"],
        tasks=tunings,
        left_out=[task for task in settings.tasks if task not in tasks],
    )
    with atomic_write(recipe.output / "views.json") as file:
        json.dump(asdict(result), file, indent=1, allow_nan=False)
    with atomic_write(recipe.output / "views.png", "wb") as file:
        result.plot().save(file, format="PNG")
    if save is not None:
        best = {task: tuning.views for task, tuning in tunings.items()}
        save_with_policy(folder, Path(save), {**policy, **best})
    return result


def save_with_policy(model: Path, folder: Path, policy: Mapping[str, str | Sequence[float]]) -> None:
    """Copy a checkpoint, with another `view_policy` in its `config.json`.

    Raises:
        InputError: `folder` is in use, or lies in the checkpoint.
    """
    _check_copy(model, folder)
    with atomic_folder(folder) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)
        views = {task: own if isinstance(own, str) else list(own) for task, own in policy.items()}
        config = read_config(partial) | {"view_policy": views}
        with atomic_write(partial / "config.json") as file:
            json.dump(config, file, indent=2)


def _check_copy(model: Path, folder: Path) -> None:
    """Said before the sweep, not after it."""
    if folder.resolve().is_relative_to(model.resolve()):
        raise InputError(f"{folder} is the model itself or lies in it; give a new folder for the copy.")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} is in use; give a new folder for the copy of the model.")


def _chart(task: str, tuning: TaskTuning) -> Image.Image:
    series = {round_name(number, tuning): (SWEEP, own.values) for number, own in enumerate(tuning.rounds)}
    return line_chart(
        dict(list(series.items())[:_MOST_LINES]),
        title=task,
        x_label="t of the context views (0: the region itself, 1: the whole image)",
        y_label=tuning.figure.replace("_", " "),
        baselines={"the model's own views": tuning.policy, "official search": tuning.search},
        size=(800, 420),
    )


def round_name(number: int, tuning: TaskTuning) -> str:
    """What moves in a round, and what stands still: "views 2 to 3", then "view 3 (2 at 0.3)"."""
    first, last = number + 2, len(tuning.rounds) + 1
    moving = f"views {first} to {last}" if first < last else f"view {last}"
    standing = ", ".join(f"{place} at {t:g}" for place, t in enumerate(tuning.rounds[number].fixed, 2))
    return f"{moving} ({standing})" if standing else moving
