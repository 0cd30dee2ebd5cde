"""The stand-ins' data: crops with true labels, words with true captions, tokenizers that keep words whole."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.training.sampling import SampleKey
from foveate.training.standins.clip.recipe import ClipSizes, CropDataset, train_tokenizer
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
