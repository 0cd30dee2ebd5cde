"""The stand-ins' data: crops with true labels, words with true captions, tokenizers that keep words whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foveate.errors import RecipeError
from foveate.training.runner import train
from foveate.training.sampling import SampleKey
from foveate.training.standins.clip.recipe import ClipSizes, CropDataset, _next_on_each_side, train_tokenizer
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
    tokenizer = train_tokenizer(captions, 700)
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
