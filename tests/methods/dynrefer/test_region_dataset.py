"""Training samples: views, control words and targets are drawn anew for every region."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data.samples import ImageSample, RegionSample
from foveate.errors import InputError, RecipeError
from foveate.methods.dynrefer import recipe
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.processing import DynReferProcessor
from foveate.methods.dynrefer.recipe import RegionDataset, TrainingData
from foveate.methods.dynrefer.views import build_views
from foveate.training.sampling import SampleKey

BOX = (20.0, 10.0, 50.0, 30.0)
COUNT = 400


@pytest.fixture
def make_dataset(
    photo: Image.Image, tmp_path: Path, tiny_model: DynReferModel, processor: DynReferProcessor
) -> Callable[..., RegionDataset]:
    """The same region many times over, so that whatever differs was drawn."""
    photo.save(tmp_path / "photo.png")
    region = RegionSample(
        1,
        BOX,
        captions=("A red car!", "a car"),
        category="car",
        attributes=("red",),
        negative_attributes=("small",),
        tags=("car", "RED", "unheard of"),
    )
    image: Any = [ImageSample(1, tmp_path / "photo.png", 96, 80, (region,))]

    config: Any = tiny_model.config

    def build(**settings: Any) -> RegionDataset:
        data = TrainingData(root=tmp_path, **settings)
        return RegionDataset(image, [(0, 0)] * COUNT, config, processor.vocabulary, data)

    return build


def test_every_sample_draws_its_own_views(make_dataset: Callable[..., RegionDataset]) -> None:
    dataset = make_dataset()
    samples = [dataset[k] for k in range(32)]
    boxes = [tuple(sample["region_boxes"].flatten()) for sample in samples]
    assert len(set(boxes)) > 20  # of 90 ordered pairs, in one batch
    again, later = dataset[SampleKey(0, 0, 5)], dataset[SampleKey(0, 1, 5)]
    np.testing.assert_array_equal(again["crops"], samples[5]["crops"])
    np.testing.assert_array_equal(again["region_boxes"], samples[5]["region_boxes"])
    assert any((dataset[SampleKey(0, 1, k)]["region_boxes"] != samples[k]["region_boxes"]).any() for k in range(3))
    assert later["crops"].shape == (3, 56, 56, 3)
    for sample in samples:
        np.testing.assert_array_equal(sample["crops"][0], samples[0]["crops"][0])


def test_fixed_views(make_dataset: Callable[..., RegionDataset], photo: Image.Image) -> None:
    sample = make_dataset(views=[0.9, 0.2])[7]
    batch = build_views(photo, np.array([BOX]), np.array([0, 0.9, 0.2]), 56)
    np.testing.assert_array_equal(sample["crops"], batch.crops[batch.view_index[0]])
    np.testing.assert_array_equal(sample["region_boxes"], batch.region_boxes[0])
    with pytest.raises(RecipeError, match="gives 1 t's, but num_views 3"):
        make_dataset(views=[0.9])


def test_control_words(make_dataset: Callable[..., RegionDataset]) -> None:
    """None for half of the samples, and each word with probability a half for the rest (spec 3)."""
    dataset = make_dataset()
    controls = [dataset[k]["control"] for k in range(COUNT)]
    bare = sum(control == "|" for control in controls) / COUNT
    assert 0.48 < bare < 0.65  # 0.5 + 0.5 / 8
    assert all(control.endswith("|") for control in controls)
    given = [control.removesuffix("|").split(",") for control in controls if control != "|"]
    assert {word for words in given for word in words} == {"car", "RED", "unheard of"}
    assert {("car", "RED"), ("RED", "car")} <= {tuple(words) for words in given}  # shuffled
    assert {dataset[k]["control"] for k in range(20)} > {"|"}
    none = make_dataset(control_dropout=1.0)
    assert {none[k]["control"] for k in range(50)} == {"|"}


def test_captions_and_targets(make_dataset: Callable[..., RegionDataset]) -> None:
    dataset = make_dataset()
    samples = [dataset[k] for k in range(COUNT)]
    captions = [sample["caption"] for sample in samples]
    assert set(captions) == {"a red car", "a car"}  # cleaned
    assert 0.65 < captions.count("a red car") / COUNT < 0.85  # half of the time first, else either
    assert {
        dataset_sample["caption"] for dataset_sample in map(make_dataset(canonical_caption=1.0).__getitem__, range(20))
    } == {"a red car"}
    # car, red, dog, striped, left of, Hat, small: tags match without case, what is not in the list is no target.
    assert samples[0]["tags"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    # red, striped, small with two prompts each, then car, dog, Hat, tree.
    expected = [1, 1, -1, -1, 0, 0, 1, 0, 0, 0]
    assert torch.equal(samples[0]["prompts"], torch.tensor(expected, dtype=torch.float32))


def test_the_cache_of_images_is_bounded_and_changes_nothing(
    photo: Image.Image,
    tmp_path: Path,
    tiny_model: DynReferModel,
    processor: DynReferProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images: Any = []
    for number in range(3):
        photo.rotate(180 * number).save(tmp_path / f"{number}.png")
        region = RegionSample(1, BOX, captions=("a red car",))
        images.append(ImageSample(number, tmp_path / f"{number}.png", 96, 80, (region,)))
    config: Any = tiny_model.config
    kept, anew = (
        RegionDataset(
            images,
            [(k, 0) for k in range(3)],
            config,
            processor.vocabulary,
            TrainingData.model_validate({"root": tmp_path, "cache_images": cache}),
        )
        for cache in (True, False)
    )
    read: list[str] = []
    load_image = recipe.load_image
    monkeypatch.setattr(recipe, "load_image", lambda path: read.append(Path(path).name) or load_image(path))
    monkeypatch.setattr(recipe, "IMAGE_CACHE_BYTES", 2 * 3 * 96 * 80)
    order = [0, 1, 0, 2, 0, 1]
    cached = [kept[index]["crops"] for index in order]
    assert read == ["0.png", "1.png", "2.png", "1.png"], "of two places, the image used longest ago gives up its own"
    for index, crops in zip(order, cached, strict=True):
        np.testing.assert_array_equal(crops, anew[index]["crops"])
    assert len(read) == 4 + len(order)


CAPTIONS = ("a striped dog", "left of a car")


@pytest.fixture
def plain_dataset(
    photo: Image.Image, tmp_path: Path, tiny_model: DynReferModel, processor: DynReferProcessor
) -> Callable[..., RegionDataset]:
    """Three images of a region each, without tags; the second file is no image."""
    config: Any = tiny_model.config

    def build(**settings: Any) -> RegionDataset:
        images: Any = []
        for number in range(3):
            path = tmp_path / f"{number}.png"
            path.write_bytes(b"no image") if number == 1 else photo.save(path)
            images.append(ImageSample(number, path, 96, 80, (RegionSample(number, BOX, captions=CAPTIONS),)))
        data = TrainingData(root=tmp_path, **settings)
        return RegionDataset(images, [(k, 0) for k in range(3)], config, processor.vocabulary, data)

    return build


def test_tags_and_control_words_of_a_caption(plain_dataset: Callable[..., RegionDataset]) -> None:
    """Where the data gives none: TAGS are car, red, dog, striped, left of, Hat, small."""
    dataset = plain_dataset(each_caption=True)
    assert len(dataset) == 6
    first, second = dataset[0], dataset[1]
    assert (first["caption"], first["tags"].tolist()) == (CAPTIONS[0], [0, 0, 1, 1, 0, 0, 0])
    assert (second["caption"], second["tags"].tolist()) == (CAPTIONS[1], [1, 0, 0, 0, 1, 0, 0])
    controls = [dataset[SampleKey(0, epoch, 0)]["control"] for epoch in range(60)]
    words = {word for control in controls for word in control.removesuffix("|").split(",") if word}
    assert words == {"dog", "striped", "striped dog"}  # both tags, and the phrase


def test_an_image_that_cannot_be_read_is_counted_and_said(
    plain_dataset: Callable[..., RegionDataset], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match=r"1\.png.*set data\.skip_bad to train without it"):
        plain_dataset()[1]
    dataset = plain_dataset(skip_bad=True, views=[0.2, 0.3])
    taken = dataset[1]
    np.testing.assert_array_equal(taken["crops"], dataset[2]["crops"])
    dataset[SampleKey(0, 1, 1)]
    assert [Path(path).name for path in dataset.bad] == ["1.png"]
    assert dataset.bad.total() == 2
    assert "(2 so far in this process)" in caplog.text


def test_only_images_that_cannot_be_read(
    plain_dataset: Callable[..., RegionDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = plain_dataset(skip_bad=True)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    monkeypatch.setattr(recipe, "MOST_BAD_IN_A_ROW", 5)
    with pytest.raises(InputError, match="5 regions in a row have images that cannot be read"):
        dataset[0]
