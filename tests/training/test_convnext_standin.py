"""convnext-world: cells and boxes with true labels, signs that are drawn in, pooling as MG-LLaVA pools."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ConvNextConfig, ConvNextModel

from foveate.errors import CheckpointError, InputError, RecipeError
from foveate.ops.roi_align import roi_align
from foveate.training.recipes import load_recipe
from foveate.training.runner import evaluate, train
from foveate.training.sampling import SampleKey
from foveate.training.standins.convnext.recipe import (
    LETTERS,
    MOST_LETTERS,
    ConvNextPretraining,
    ConvNextSizes,
    PictureDataset,
    collate,
    draw_sign,
    letters_of,
    paint_sign,
    pool_boxes,
    smallest_in_blocks,
    stage_maps,
)
from foveate.training.standins.rendered import RenderedData, RenderedScenes
from foveate.world.vocabulary import category_names, raw_vocabulary

RECIPE = "recipes/standins/convnext_world.yaml"
SMALL = ["model.widths=[8, 8, 16, 16]", "model.depths=[1, 1, 1, 1]", "model.image_size=64"]
FEW = ["probe={first_seed: 7, count: 24, size: 64, processes: 1}"]
FEW += ["evaluation={first_seed: 50, count: 12, size: 64, processes: 1}"]


@pytest.fixture(scope="module")
def scenes() -> RenderedScenes:
    return RenderedScenes.render(RenderedData(first_seed=5, count=6, size=128, processes=1))


def sizes(**changes: object) -> ConvNextSizes:
    return ConvNextSizes.model_validate({"image_size": 128, **changes})


def test_the_smallest_object_stands_for_a_block() -> None:
    cells = np.array([[1, 1, 1, 0], [1, 2, 0, 0], [3, 3, 1, 1], [3, 0, 1, 1]])
    assert smallest_in_blocks(cells, 2).tolist() == [[2, 1], [3, 1]]
    assert smallest_in_blocks(cells, 4).tolist() == [[2]]
    assert smallest_in_blocks(cells, 1).tolist() == cells.tolist()
    assert smallest_in_blocks(np.zeros((2, 2), int), 2).tolist() == [[0]]


def test_letters_are_their_places_in_the_alphabet() -> None:
    assert letters_of("CAB").tolist() == [3, 1, 2, 0, 0]
    assert letters_of(None).tolist() == [-1] * 5
    assert all(len(letters_of(word)) == MOST_LETTERS for word in raw_vocabulary()["sign_words"])


def test_whole_scenes_have_the_labels_of_their_objects(scenes: RenderedScenes) -> None:
    dataset = PictureDataset(scenes, sizes(whole=1.0, signs=0.0))
    for index, instances in enumerate(scenes.instances):
        sample = dataset[SampleKey(0, 0, index)]
        assert np.array_equal(sample["pixels"], scenes.images[index])
        assert [one.shape for one in sample["cells"]] == [(32, 32), (16, 16), (8, 8), (4, 4)]
        assert np.array_equal(sample["cells"][0], scenes.instance_maps[index][2::4, 2::4])
        names = [category_names()[row - 1] for row in sample["labels"][1:, 0]]
        assert names == [item.category for item in instances]
        assert len(sample["rows"]) > 0
        for row, box, share in zip(sample["rows"], sample["boxes"], sample["shares"], strict=True):
            item = instances[row - 1]
            assert box.tolist() == list(item.box)
            assert share == max(box[2] - box[0], box[3] - box[1]) / 128
            assert item.visible_fraction >= 0.3
        for row, item in enumerate(instances, 1):
            assert sample["labels"][row, -5:].tolist() == letters_of(item.text).tolist()


def test_a_part_of_a_scene_has_the_boxes_of_what_is_in_it(scenes: RenderedScenes) -> None:
    dataset = PictureDataset(scenes, sizes(whole=0.0, signs=2.0))
    signs = 0
    for key in range(18):
        sample = dataset[SampleKey(3, key, key % 6)]
        rows, finest = sample["labels"], sample["cells"][0]
        assert sample["pixels"].shape == (128, 128, 3)
        assert (sample["boxes"] >= 0).all()
        assert (sample["boxes"] <= 128).all()
        for row, box in zip(sample["rows"], sample["boxes"], strict=True):
            y, x = np.nonzero(finest == row)
            # Centres of the object's cells lie in its box.
            assert ((4 * x + 2 >= box[0] - 2) & (4 * x + 2 <= box[2] + 2)).all()
            assert ((4 * y + 2 >= box[1] - 2) & (4 * y + 2 <= box[3] + 2)).all()
        drawn = rows[len(scenes.instances[key % 6]) + 1 :]
        assert (drawn[:, 0] == category_names().index("sign") + 1).all()
        assert (drawn[:, -5] > 0).all()
        signs += len(drawn)
        for one, coarse in zip(sample["cells"][1:], (2, 4, 8), strict=True):
            blocks = finest.reshape(len(one), coarse, len(one), coarse).transpose(0, 2, 1, 3).reshape(*one.shape, -1)
            assert (blocks == one[..., None]).any(-1).all(), "what stands for a block is in it"
            assert ((one == 0) == (blocks == 0).all(-1)).all()
    assert 20 < signs < 60


def test_signs_say_what_their_labels_say_and_hide_what_is_behind() -> None:
    draw = np.random.default_rng(0)
    words = []
    for _ in range(40):
        image, ids = np.full((100, 100, 3), 9, np.uint8), np.ones((100, 100), int)
        sign = draw_sign(draw, (20, 30, 60), 0.5)
        count = paint_sign(image, ids, sign, 2)
        words.append(sign.instance.text)
        x0, y0, x1, y1 = (int(value) for value in sign.instance.box)
        assert 20 <= x0 < x1 <= 80
        assert 30 <= y0 < y1 <= 90
        assert 0.06 * 60 <= max(x1 - x0, y1 - y0) <= 0.34 * 60
        inside = np.zeros((100, 100), bool)
        inside[y0:y1, x0:x1] = True
        assert (ids[~inside] == 1).all()
        assert (ids == 2).sum() == count > 0
        assert (image[ids == 2] != 9).any(-1).mean() > 0.9
        assert (image[~inside] == 9).all()
        assert sign.instance.attributes["colour"] in sign.instance.positive_attributes
        assert "size" not in sign.instance.attributes
    known = [word in raw_vocabulary()["sign_words"] for word in words]
    assert 8 < sum(known) < 32
    assert all(set(word) <= set(LETTERS) and 2 <= len(word) <= 5 for word in words if word)


def test_pooling_is_mg_llavas_up_to_its_sampling() -> None:
    # On maps that are the x and y of the centres of their cells, in pixels, both must give the middle of the box, half
    # a cell of the finest map to the lower right.
    maps = []
    for stride in (4, 8, 16, 32):
        centres = (torch.arange(192 // stride) + 0.5) * stride
        maps.append(torch.stack([centres.expand(len(centres), -1), centres[:, None].expand(-1, len(centres))])[None])
    boxes = torch.tensor([[40.0, 50.0, 90.0, 120.0], [64.0, 30.0, 76.0, 42.0]])
    pictures = torch.zeros(2, dtype=torch.long)
    wanted = torch.tensor([[67.0, 87.0], [72.0, 38.0]]).repeat(1, 4)
    assert (pool_boxes(maps, boxes, pictures) - wanted).abs().max() < 1e-3
    upsampled = [F.interpolate(one, 48, mode="bilinear", align_corners=False) for one in maps]
    dense = roi_align(torch.cat(upsampled, 1), boxes, 56, 48 / 192, batch_index=pictures).mean((2, 3))
    assert (dense - wanted).abs().max() < 1e-3


def test_every_stage_learns_from_cells_and_from_objects(scenes: RenderedScenes) -> None:
    torch.manual_seed(0)
    small = sizes(image_size=64, widths=[8, 8, 8, 8], depths=[1, 1, 1, 1], signs=3.0)
    trunk = ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, layer_scale_init_value=0.5))
    dataset = PictureDataset(scenes, small)
    batch = collate([dataset[k] for k in range(4)])
    for weights in ({"object_weight": 0.0}, {"cell_weight": 0.0}):
        model = ConvNextPretraining(trunk, small.model_copy(update=weights))
        output = model(**batch)
        assert float(output["loss"]) == pytest.approx(sum(float(loss) for loss in output["losses"].values()))
        trunk.zero_grad()
        output["loss"].backward()
        for stage in range(4):
            gradient = trunk.get_parameter(f"encoder.stages.{stage}.layers.0.dwconv.weight").grad
            assert gradient is not None
            assert float(gradient.abs().max()) > 0
    assert set(ConvNextPretraining(trunk, small)(**batch)["losses"]) == {
        *("category", "attributes", "letters", "contents"),
        *("object_category", "object_attributes", "object_letters"),
    }


def test_losses_of_two_objects_by_hand(scenes: RenderedScenes) -> None:
    small = sizes(image_size=64, widths=[8] * 4, depths=[1] * 4, cell_weight=0.0)
    trunk = ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    model = ConvNextPretraining(trunk, small)
    for parameter in model.object_head.parameters():
        torch.nn.init.zeros_(parameter)
    dataset = PictureDataset(scenes, small.model_copy(update={"whole": 1.0, "signs": 4.0}))
    batch = collate([dataset[k] for k in range(3)])
    losses = model(**batch)["losses"]
    # Heads that know nothing: as uncertain as there are choices.
    assert float(losses["object_category"]) == pytest.approx(np.log(len(category_names()) + 1), rel=1e-4)
    assert float(losses["object_attributes"]) == pytest.approx(6 * np.log(2), rel=1e-4)
    assert float(losses["object_letters"]) == pytest.approx(np.log(27), rel=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convnext")
    settings = ["data={first_seed: 3, count: 8, size: 64, processes: 1}", "training.max_steps=2"]
    settings += ["training.batch_size=4", "training.save_every=0", "training.progress=false"]
    return train(RECIPE, [*SMALL, *settings], out=out).checkpoint


def test_a_trained_tower_is_a_plain_convnext_that_is_measured(trained: Path, tmp_path: Path) -> None:
    loaded: Any = ConvNextModel.from_pretrained(trained, output_loading_info=True)
    trunk, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    maps = stage_maps(trunk.float(), torch.zeros(1, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)]
    assert (trained / "preprocessor_config.json").is_file()
    metrics = evaluate(RECIPE, trained, [*SMALL, *FEW], out=tmp_path).metrics
    assert metrics["objects"] > metrics["small_objects"] > 0
    # A tower that has learnt next to nothing still lets a probe read colours off its patches.
    assert 1 / 11 < metrics["colour_accuracy"] <= 1
    assert all(0 <= metrics[f"{name}_accuracy"] <= 1 for name in ("category", "pattern", "text"))


def test_the_last_map_has_the_grid_of_clip_world() -> None:
    clip: Any = load_recipe("recipes/standins/clip_world.yaml")
    convnext: Any = load_recipe(RECIPE)
    assert clip.model.image_size / clip.model.patch_size == convnext.model.image_size / 32


def test_damaged_models_and_others_are_not_measured(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a 't5' model, but a 'convnext' model is needed"):
        evaluate(RECIPE, Path("src/foveate/weights/t5-world"), [*SMALL, *FEW], out=tmp_path / "out")
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.patch_embeddings.bias"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="weights that are not finite"):
        evaluate(RECIPE, folder, [*SMALL, *FEW], out=tmp_path / "out")
    with pytest.raises(RecipeError, match="do not have enough objects to measure the text"):
        evaluate(RECIPE, trained, [*SMALL, *FEW, "model.signs=0", "probe.count=1"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.image_size=100", "model.image_size should be a multiple of 32"),
        ("model.widths=[8, 8, 8]", "model.widths List should have at least 4 items"),
        ("model.depths=[1, 1, 0, 1]", "should be greater than 0"),
        ("model={cell_weight: 0, object_weight: 0}", "cell_weight and object_weight are both 0"),
        ("model.signs=9", "model.signs should be less than or equal to 8"),
    ],
)
def test_sizes_are_checked(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(RECIPE, [override])
