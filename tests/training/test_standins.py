"""The stand-ins' data: crops with true labels, words with true captions, tokenizers that keep words whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, T5Config, T5ForConditionalGeneration

from foveate.errors import CheckpointError, InputError, RecipeError
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train
from foveate.training.sampling import SampleKey
from foveate.training.standins.clip.recipe import (
    ClipSizes,
    CropDataset,
    _config,
    _next_on_each_side,
    train_tokenizer,
)
from foveate.training.standins.rendered import RenderedData, RenderedScenes
from foveate.training.standins.t5.recipe import WordsToCaption, build_tokenizer
from foveate.world.vocabulary import category_names, colour_names


@pytest.fixture(scope="module")
def scenes() -> RenderedScenes:
    return RenderedScenes.render(RenderedData(first_seed=5, count=6, size=128, processes=1))


def test_patch_labels_name_the_object_under_each_patch(scenes: RenderedScenes) -> None:
    dataset = CropDataset(scenes, ClipSizes.model_validate({}))
    seen = 0
    for index, (scene, number) in enumerate(dataset.index):
        sample = dataset[SampleKey(0, 0, index)]
        assert sample["pixels"].shape == (60, 60, 3)
        assert sample["labels"].shape == (6, 6)
        rows = set(sample["labels"].flatten().tolist()) - {0}
        own = int(dataset.offsets[scene]) + number + 1
        allowed = range(int(dataset.offsets[scene]) + 1, int(dataset.offsets[scene]) + len(scenes.instances[scene]) + 1)
        assert rows <= set(allowed)
        instance = scenes.instances[scene][number]
        assert category_names()[int(dataset.labels[own, 0]) - 1] == instance.category
        colour = dataset.labels[own, 1 : 1 + len(colour_names())]
        assert colour_names()[int(colour.argmax())] == instance.attributes["colour"]
        seen += own in rows
    assert seen > 0.6 * len(dataset)


def test_words_and_caption_agree(scenes: RenderedScenes) -> None:
    captions = [caption for scene in scenes.instances for item in scene for caption in item.captions]
    dataset = WordsToCaption(captions)
    for index in range(len(dataset)):
        sample = dataset[SampleKey(1, 0, index)]
        assert sample["source"].endswith("|")
        source = sample["source"].replace(",", " ").replace("|", " ").split()
        # Every word that is shown stands in the caption; an article may change with the word behind it.
        assert all(word in sample["caption"] for word in source if word not in ("a", "an"))


def test_the_language_tokenizer_keeps_words_whole_and_spells_the_unknown() -> None:
    tokenizer = build_tokenizer(["a red car to the left of a tree"])
    assert tokenizer.tokenize("red car") == ["▁red", "▁car"]
    assert tokenizer.tokenize("red,car|") == ["▁red", ",", "car", "|"]
    ids = tokenizer("a zqx car")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a zqx car"


def test_the_clip_tokenizer_ends_with_its_highest_id(scenes: RenderedScenes) -> None:
    captions = [caption for scene in scenes.instances for item in scene for caption in item.captions]
    tokenizer = train_tokenizer([*captions, *["a red car"] * 20], 700)  # often enough to be a token a word
    ids = tokenizer(["a red car", "an unseen wörd"])["input_ids"]
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert len(np.unique(ids[0])) == 5


def test_the_next_object_on_each_side() -> None:
    rows = torch.tensor([[[1, 0, 2], [1, 1, 0], [0, 3, 3]]])
    left, above, right, below = _next_on_each_side(rows)[0].tolist()
    assert left == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert above == [[0, 0, 0], [0, 0, 2], [1, 1, 2]]
    assert right == [[2, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert below == [[0, 1, 3], [0, 3, 3], [0, 0, 0]]


def test_crops_point_at_objects_and_at_what_they_relate_to(scenes: RenderedScenes) -> None:
    dataset = CropDataset(scenes, ClipSizes.model_validate({}))
    seen = 0
    for index, (scene, number) in enumerate(dataset.index):
        instances = scenes.instances[scene]
        sample = dataset[SampleKey(0, 3, index)]
        here = sample["labels"] == dataset.offsets[scene] + number + 1
        assert np.isnan(sample["boxes"][sample["labels"] == 0]).all()
        assert not sample["related"][sample["labels"] == 0].any()
        middles = np.stack(np.meshgrid((np.arange(6) + 0.5) / 6, (np.arange(6) + 0.5) / 6), axis=2)
        boxes = (sample["boxes"] + np.tile(middles, 4))[here]
        if len(boxes) == 0:
            continue
        assert np.abs(boxes[:, :4] - boxes[0, :4]).max() < 1e-6  # all patches of it agree on where it is
        relations = instances[number].relations
        if relations and sample["related"][here].all():
            other, own = np.array(instances[relations[0].object_index].box), np.array(instances[number].box)
            scale = (own[2:] - own[:2]) / (boxes[0, 2:4] - boxes[0, :2])  # image pixels a crop side
            np.testing.assert_allclose(boxes[0, 4:6] - boxes[0, :2], (other[:2] - own[:2]) / scale, atol=1e-4)
            seen += 1
    assert seen > 3


def test_pre_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    small = ["model.vision_width=32", "model.text_width=32", "model.projection=16", "model.vision_layers=2"]
    small += ["model.text_layers=1", "data.count=4", "data.size=128", "training.max_steps=2", "training.batch_size=4"]
    small += ["training.save_every=0", "training.progress=false", "data.processes=1"]
    first = train("recipes/standins/clip_world.yaml", small, out=tmp_path / "first").checkpoint
    go_on = [*small, f"model.init_from={first}"]
    second = train("recipes/standins/clip_world_2.yaml", [*go_on, "training.max_steps=1"], out=tmp_path / "second")
    before, after = (load_file(path / "model.safetensors") for path in (first, second.checkpoint))
    moved = [float((before[key].float() - after[key].float()).abs().max()) for key in before]
    assert before.keys() == after.keys()
    assert 0 < max(moved) < 0.1  # a step away from where the first run ended
    assert (first / "tokenizer.json").read_bytes() == (second.checkpoint / "tokenizer.json").read_bytes()
    with pytest.raises(RecipeError, match="hidden_size 32, the recipe asks for 64"):
        train("recipes/standins/clip_world_2.yaml", [*go_on, "model.vision_width=64"], out=tmp_path / "third")


# ---------------------------------------------------------------- models that are none, or damaged

CLIP_RECIPE, T5_RECIPE = "recipes/standins/clip_world.yaml", "recipes/standins/t5_world.yaml"


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe -> a small model of its kind with random weights."""
    captions = ["a red car to the left of a tree", "a small dog"]
    folders = {recipe: tmp_path_factory.mktemp("model") for recipe in (CLIP_RECIPE, T5_RECIPE)}
    torch.manual_seed(0)
    sizes = {"vision_width": 16, "vision_layers": 1, "text_width": 16, "text_layers": 1, "projection": 8}
    clip_tokenizer, t5_tokenizer = train_tokenizer(captions, 560), build_tokenizer(captions)
    clip = CLIPModel(_config(ClipSizes.model_validate({**sizes, "dense_layer": -1}), clip_tokenizer))
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
        )
    )
    t5.generation_config.decoder_start_token_id = 0
    for folder, model, tokenizer in ((CLIP_RECIPE, clip, clip_tokenizer), (T5_RECIPE, t5, t5_tokenizer)):
        model.save_pretrained(folders[folder])
        tokenizer.save_pretrained(folders[folder])
    return folders


SMALL_EVALUATION = ["evaluation={first_seed: 7, count: 2, processes: 1}"]


@pytest.mark.parametrize(
    ("recipe", "metric"), [(CLIP_RECIPE, "zero_shot_category_accuracy"), (T5_RECIPE, "exact")], ids=["clip", "t5"]
)
def test_a_random_model_is_measured(random_models: dict[str, Path], tmp_path: Path, recipe: str, metric: str) -> None:
    metrics = evaluate(recipe, random_models[recipe], SMALL_EVALUATION, out=tmp_path).metrics
    assert 0 <= metrics[metric] < 0.5


def _lack_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _break_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[max(tensors)].view(-1)[0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _give_a_longer_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = max([token["id"] for token in tokenizer["added_tokens"]] + [900])
    for number in range(3):
        token = {"id": first + number + 1, "content": f"<more{number}>", "special": True}
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokenizer["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("recipe", [CLIP_RECIPE, T5_RECIPE], ids=["clip", "t5"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_lack_a_tensor, "lacks 1 tensors"),
        (_truncate, "cannot be loaded"),
        (_break_a_number, "weights that are not finite"),
        (_give_a_longer_tokenizer, "entries, but its model has"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    ],
    ids=["incomplete", "truncated", "nan", "other tokenizer", "no tokenizer", "config"],
)
def test_a_damaged_model_is_not_measured(
    random_models: dict[str, Path], tmp_path: Path, recipe: str, damage: Callable[[Path], object], sentence: str
) -> None:
    folder = Path(shutil.copytree(random_models[recipe], tmp_path / "model"))
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence):
        evaluate(recipe, folder, SMALL_EVALUATION, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_not_measured_nor_trained_further(
    random_models: dict[str, Path], tmp_path: Path
) -> None:
    for recipe, other in ((CLIP_RECIPE, T5_RECIPE), (T5_RECIPE, CLIP_RECIPE)):
        with pytest.raises(InputError, match=r"is a '(t5|clip)' model, but a '(clip|t5)' model is needed"):
            evaluate(recipe, random_models[other], SMALL_EVALUATION, out=tmp_path / "out")
    small = ["data.count=1", "data.size=64", "data.processes=1"]
    with pytest.raises(InputError, match="is a 't5' model, but a 'clip' model is needed"):
        train(CLIP_RECIPE, [*small, f"model.init_from={random_models[T5_RECIPE]}"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "override", "sentence"),
    [
        (CLIP_RECIPE, "model.vision_width=0", "model.vision_width should be greater than 0"),
        (CLIP_RECIPE, "model.vision_width=130", "model.vision_width should be a multiple of 4"),
        (CLIP_RECIPE, "model.vision_heads=3", "vision_width 128 is not a multiple of vision_heads 3"),
        (CLIP_RECIPE, "model.text_heads=5", "text_width 128 is not a multiple of text_heads 5"),
        (CLIP_RECIPE, "model.image_size=65", "image_size 65 is not a multiple of patch_size 10"),
        (CLIP_RECIPE, "model.dense_layer=8", "dense_layer is 8, but 7 layers have hidden states from -8 to 7"),
        (CLIP_RECIPE, "data.count=1000000000000", "data.count should be less than or equal to 1000000"),
        (T5_RECIPE, "model.layers=0", "model.layers should be greater than 0"),
        (T5_RECIPE, "model.width=-1", "model.width should be greater than 0"),
        ("recipes/standins/proposer_world.yaml", "model.image_size=50", "should be a multiple of 32"),
        (
            "recipes/standins/proposer_world.yaml",
            "model.widths=[8, 8]",
            "model.widths List should have at least 5 items",
        ),
        ("recipes/standins/proposer_world.yaml", "model.widths=[8, 8, 8, 8, 0]", "should be greater than 0"),
    ],
)
def test_sizes_are_checked_before_anything_is_rendered(recipe: str, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(recipe, [override])
