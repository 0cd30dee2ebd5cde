"""Recipes: going on from a checkpoint, whole-number generation settings, data without tags."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import foveate
from foveate.checkpoints import find_checkpoint
from foveate.data.samples import RegionSample
from foveate.errors import InputError, RecipeError
from foveate.methods.dynrefer.predictor import TASKS
from foveate.methods.dynrefer.processing import Vocabulary
from foveate.methods.dynrefer.recipe import RegionData, open_regions, score
from foveate.methods.dynrefer.results import Region
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train

RECIPE = "recipes/dynrefer/world.yaml"

SMALL = [
    "data.cache_views=null",
    "data.world={first_seed: 5, count: 4, size: 96, processes: 1}",
    "calibration=null",
    "training.max_steps=1",
    "training.batch_size=4",
    "training.save_every=0",
    "training.progress=false",
]
FRESH = ["model.qformer_width=32", "model.qformer_layers=1", "model.num_query_tokens=4", "model.head_size=16"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    settings = [f"data.root={folder / 'data'}", "model.generation={num_beams: 3, max_new_tokens: 5}"]
    return train("recipes/dynrefer/world.yaml", [*SMALL, *FRESH, *settings], out=folder / "run").checkpoint


def test_generation_settings_stay_whole_numbers(first: Path) -> None:
    describer: Any = foveate.load(str(first))
    assert describer.model.config.generation["num_beams"] == 3
    region = describer("docs/images/sample.png", boxes=[[10, 10, 60, 60]], tasks="caption")[0]
    assert region.caption is not None


def test_views_of_recipes_have_the_names_of_the_describer() -> None:
    """Names, t's, or both by task; whatever else is refused with the nearest name."""

    def views(value: str) -> Any:
        recipe: Any = load_recipe(RECIPE, [f"evaluation.views={value}"])
        return recipe.evaluation.views

    assert [views(name) for name in ("task", "auto", "official", "pairwise", "median", "null")] == [
        *("task", "auto", "official", "pairwise", "median"),
        None,
    ]
    assert views("{caption: [0.3, 0.5], tags: auto, category: task}") == {
        "caption": [0.3, 0.5],
        "tags": "auto",
        "category": "task",
    }
    policy: Any = load_recipe(RECIPE, ["model.view_policy={caption: pairwise, tags: [0.3, 0.4]}"])
    assert policy.model.view_policy == {"caption": "pairwise", "tags": [0.3, 0.4]}
    for override, message in (
        ("evaluation.views=offical", r"unknown views 'offical' \(did you mean 'official'\?\)"),
        ("evaluation.views={captions: auto}", r"names the task 'captions' \(did you mean 'caption'\?\)"),
        ("evaluation.views={caption: [2]}", "view_policy of caption: views are a list of t's"),
        ("model.view_policy={caption: task}", "unknown views 'task'"),
        ("model.view_policy=auto", "a mapping of tasks to t's is needed, not 'auto'"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(RECIPE, [override])


def test_a_checkpoint_does_not_say_where_its_parts_lay(first: Path) -> None:
    assert '_name_or_path": "/' not in (first / "config.json").read_text()


def test_training_goes_on_from_a_checkpoint_with_the_settings_given(first: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *FRESH, f"data.root={first.parents[1] / 'data'}", f"model.init_from={first}"]
    settings += ["training.learning_rate=0", "training.matrix_learning_rate=0", "model.tag_threshold=0.25"]
    second = train("recipes/dynrefer/world.yaml", settings, out=tmp_path / "run").checkpoint
    before: Any = foveate.load(str(first))
    after: Any = foveate.load(str(second))
    assert after.model.config.tag_threshold == 0.25
    assert after.processor.vocabulary == before.processor.vocabulary
    weights = after.model.state_dict()
    assert all(bool((weights[key] == value).all()) for key, value in before.model.state_dict().items())
    with pytest.raises(RecipeError, match=r"model\.head_size is 64, but the checkpoint .* has 16"):
        train("recipes/dynrefer/world.yaml", [*settings, "model.head_size=64"], out=tmp_path / "other")


def test_training_goes_on_from_half_precision(first: Path, tmp_path: Path) -> None:
    """As shipped weights are."""
    half = Path(shutil.copytree(first, tmp_path / "half"))
    foveate.load(str(first)).model.half().save_pretrained(half)
    settings = [*SMALL, *FRESH, f"data.root={first.parents[1] / 'data'}", f"model.init_from={half}"]
    second = train("recipes/dynrefer/world.yaml", settings, out=tmp_path / "run").checkpoint
    assert {tensor.dtype for tensor in load_file(second / "model.safetensors").values()} == {torch.float32}


def test_cached_views_need_the_training_process(first: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *FRESH, f"data.root={first.parents[1] / 'data'}", f"data.cache_views={tmp_path / 'views'}"]
    train("recipes/dynrefer/world.yaml", settings, out=tmp_path / "run")
    assert len(list((tmp_path / "views").iterdir())) == 1
    with pytest.raises(RecipeError, match=r"set training\.workers to 0"):
        train("recipes/dynrefer/world.yaml", [*settings, "training.workers=1"], out=tmp_path / "other")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.views=[5, 7]", r"data\.views: views are a list of t's between 0 .*, not \[5, 7\] \(or take random\)"),
        ("data.views=[.nan, 0.2]", "data.views: views are a list of t's"),
        ("data.views=rndom", "not 'rndom' \\(or take random\\)"),
        (
            "model.view_policy={colour: [0.1, 0.2]}",
            "model.view_policy: a view policy names the task 'colour'; tasks are",
        ),
        ("model.view_policy={tags: [0.1, 3]}", "view_policy of tags: views are a list of t's"),
        ("model.view_policy=[0.1]", r"model.view_policy: a mapping of tasks to t's is needed, not \[0.1\]"),
        ("model.generation={no_such_key: 1}", "model.generation: 'no_such_key' is not a generation setting; known are"),
        ("model.generation={num_beams: -1}", "model.generation: num_beams must be an integer from 1 to 64, got -1"),
        ("model.generation={num_beams: 2.5}", "got 2.5"),
        ("model.generation={repetition_penalty: .inf}", "repetition_penalty must be a number"),
        ("model.align_groups=0", "model.align_groups should be greater than 0"),
        ("model.qformer_width=-3", "model.qformer_width should be greater than 0"),
        ("model.qformer_heads=0", "model.qformer_heads should be greater than 0"),
        ("model.head_layers=1.5", "model.head_layers should be a valid integer"),
        ("model.image_size=100000", "model.image_size should be less than or equal to 4096"),
        (
            "evaluation.tasks=[captoin]",
            "should be 'caption', 'tags', 'attributes' or 'category', but it is \"captoin\"",
        ),
        ("evaluation.tasks=[]", "evaluation.tasks"),
        ("evaluation.views=wide", r"unknown views 'wide' .*; use task, auto, official"),
        ("evaluation.views=[0.5, 2]", "evaluation.views: views are a list of t's"),
        ("evaluation.num_beams=0", "evaluation.num_beams should be greater than 0"),
        ("evaluation.num_beams=65", "evaluation.num_beams should be less than or equal to 64"),
    ],
)
def test_settings_are_checked_with_the_recipe(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        load_recipe(RECIPE, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("views", ["auto", "task", "median", "[0.3, 0.5]", "[0, 0.3, 1]", "null"])
def test_views_that_evaluation_takes(views: str) -> None:
    recipe: Any = load_recipe(RECIPE, [f"evaluation.views={views}", "data.views=[0, 1]"])
    assert recipe.data.views == [0, 1]
    assert recipe.evaluation.views == yaml.safe_load(views)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "model.align_groups=7",
            "do not fit together: the tower's width 128 is not divisible by align_groups 7; change",
        ),
        ("model.qformer_heads=5", "do not fit together: The hidden size .* is not a multiple"),
        ("model.vision_layer=99", "do not fit together: vision_layer must be"),
        ("model.image_size=61", "do not fit together: image_size 61 is not a multiple of the tower's patch size 10"),
        ("model.view_policy={tags: [0.1]}", "do not fit together: view_policy gives 1 t's for tags"),
    ],
)
def test_sizes_that_do_not_fit_are_said_before_anything_is_rendered(
    tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        train(RECIPE, [*SMALL, f"data.root={tmp_path / 'data'}", override], out=tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_models_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a 'clip' model, not a DynRefer"):
        evaluate(RECIPE, find_checkpoint("clip-world"), out=tmp_path / "run")
    with pytest.raises(InputError, match="is a 't5' model, not a DynRefer"):
        train(RECIPE, [*SMALL, "model.init_from=t5-world"], out=tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_what_is_needed_after_training_is_looked_for_before(first: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *FRESH, f"data.root={first.parents[1] / 'data'}"]
    for override, sentence in (
        (
            "calibration={root: nowhere}",
            r"calibration\.root: there is no folder nowhere; put the dataset there, or give",
        ),
        ("evaluation.data={root: nowhere}", r"evaluation\.data\.root: there is no folder nowhere"),
        (f"calibration={{root: {first.parents[1] / 'data'}, split: zebra}}", "zebra"),
    ):
        with pytest.raises((RecipeError, InputError), match=sentence):
            train(RECIPE, [*settings, override], out=tmp_path / "run")
        assert not any(tmp_path.iterdir())


def test_a_limited_number_of_regions(first: Path) -> None:
    """Training draws them by its seed; what measures a model always takes the same."""
    data = RegionData.model_validate({"root": first.parents[1] / "data", "regions": 4})
    drawn = [open_regions(data, seed)[1] for seed in (3, 3, 4)]
    assert len(drawn[0]) == 4
    assert drawn[0] == drawn[1] != drawn[2]
    assert open_regions(data)[1] == open_regions(data)[1]


def test_a_manifest_that_is_damaged(first: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(first.parents[1] / "data", tmp_path / "data"))
    (data / "dataset.json").write_text("[1]")
    with pytest.raises(InputError, match=r"dataset\.json"):
        train(RECIPE, [*SMALL, *FRESH, f"data.root={data}"], out=tmp_path / "run")


def test_scenes_that_another_recipe_rendered_are_refused(first: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *FRESH, f"data.root={first.parents[1] / 'data'}"]
    with pytest.raises(RecipeError, match=r"was rendered with count 4, but the recipe asks for 5; remove that folder"):
        train(RECIPE, [*settings, "data.world={first_seed: 5, count: 5, size: 96}"], out=tmp_path / "run")


# ---------------------------------------------------------------- figures


def test_figures_of_four_regions_counted_by_hand() -> None:
    vocabulary = Vocabulary.from_words(["left"], ["red", "blue"], ["cat", "dog"], "test")
    truth = [
        RegionSample(
            region_id=k,
            box=(0, 0, 9, 9),
            captions=(caption, "an animal"),
            category=category,
            attributes=(caption.split()[1],),
            negative_attributes=("blue" if caption.startswith("a red") else "red",),
            tags=("left",) if "left" in caption else (),
        )
        for k, (caption, category) in enumerate(
            [
                ("a red cat to the left of a blue dog", "cat"),
                ("a red dog in front of a blue cat", "dog"),
                ("a blue dog behind a red cat", "dog"),
                ("a blue cat", "cat"),
            ]
        )
    ]
    answers = [
        ("a red cat to the left of a green dog", 0.9, 0.8, 0.7),  # relation right
        ("a red dog behind a blue cat", 0.4, 0.3, 0.6),  # relation wrong
        ("a red dog", 0.2, 0.4, 0.8),  # colour wrong, relation left out
        ("a blue cat", 0.4, 0.1, 0.1),  # category wrong
    ]
    said = [
        Region(
            box=(0, 0, 9, 9),
            caption=caption,
            category_scores={"cat": cat, "dog": 1 - cat},
            tag_scores={"left": left},
            attribute_scores={"red": red, "blue": 1 - red},
        )
        for caption, cat, left, red in answers
    ]
    metrics = score(truth, said, vocabulary, TASKS)
    assert metrics["category_accuracy"] == 0.75
    assert metrics["per_category"] == {"cat": 0.5, "dog": 1.0}
    # By score: red is region 2 (0.8, wrong), 0 and 1 (right); blue is region 3 (right), 1 and 0 (wrong), 2 (right).
    assert metrics["attribute_map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + (1 + 2 / 4) / 2) / 2)
    assert metrics["tag_map"] == 1.0
    assert metrics["exact_caption"] == 0.25
    assert metrics["colour_word_accuracy"] == 0.75
    assert metrics["regions_with_relation"] == 3
    assert metrics["relation_word_accuracy"] == pytest.approx(1 / 3)
    assert metrics["per_relation"] == {"to the left of": 1.0, "in front of": 0.0, "behind": 0.0}
