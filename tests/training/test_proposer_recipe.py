"""The training of the region proposer: targets by hand, losses, samples, and a small run that learns its scenes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import RecipeError
from foveate.ops.boxes import box_iou
from foveate.training.recipes import load_recipe
from foveate.training.sampling import SampleKey
from foveate.training.standins.proposer.recipe import (
    CropDataset,
    ProposerRecipe,
    ProposerSizes,
    ProposerTraining,
    assign_targets,
    choose_threshold,
    collate,
    objectness_loss,
)
from foveate.training.standins.rendered import RenderedData, RenderedScenes
from foveate.vision.proposer import (
    ProposerConfig,
    ProposerModel,
    ProposerOutput,
    RegionProposer,
    cell_centres,
    encode_boxes,
    fit_image,
)
from foveate.world.vocabulary import category_names

RECIPE = Path(__file__).parents[2] / "recipes/standins/proposer_world.yaml"
NOTHING = torch.zeros(0, 4)


@pytest.fixture(scope="module")
def scenes() -> RenderedScenes:
    return RenderedScenes.render(RenderedData(first_seed=40, count=6, size=128, processes=1))


# ---------------------------------------------------------------- targets


def test_gaussian_by_hand() -> None:
    # 48 x 16 pixels are 12 x 4 cells: radii int(0.54 * 12 / 2) = 3 and int(0.54 * 4 / 2) = 1, deviations 7/6 and 3/6.
    # The centre (40, 24) lies in the cell of row 6, column 10.
    targets = assign_targets(torch.tensor([[16.0, 16.0, 64.0, 32.0]]), NOTHING, 16)
    assert targets.heat[6, 10] == 1
    assert targets.heat[6, 12] == pytest.approx(math.exp(-(2**2) / (2 * (7 / 6) ** 2)))
    assert targets.heat[5, 10] == pytest.approx(math.exp(-1 / (2 * 0.25)))
    assert targets.heat[7, 9] == pytest.approx(math.exp(-1 / (2 * (7 / 6) ** 2) - 2))
    rows, columns = targets.heat.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 7, 7, 13)
    assert targets.known.all()
    assert ((targets.owner == 0) == (targets.heat > 0)).all()
    assert (targets.owner == -1).sum() == 256 - 3 * 7
    assert targets.weight.sum() == pytest.approx(1)
    assert targets.weight[6, 12] / targets.weight[6, 10] == pytest.approx(float(targets.heat[6, 12]))


def test_a_small_object_has_one_cell() -> None:
    targets = assign_targets(torch.tensor([[20.0, 8.0, 28.0, 12.0]]), NOTHING, 16)
    assert targets.heat.nonzero().tolist() == [[2, 6]]
    assert targets.weight[2, 6] == 1


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_smaller_box_owns_shared_cells(order: list[int]) -> None:
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [24.0, 24.0, 44.0, 44.0]])[order]
    targets = assign_targets(boxes, NOTHING, 16)
    small, large = order.index(1), order.index(0)
    # The small centre (34, 34) and the large one (32, 32) share the cell (8, 8); radii are 1 and 4.
    assert targets.owner[8, 8] == small
    assert targets.owner[7:10, 7:10].eq(small).all()
    assert targets.owner[8, 11] == large
    assert targets.heat[8, 10] == pytest.approx(math.exp(-(2**2) / (2 * 1.5**2)))
    assert targets.weight[targets.owner == small].sum() == pytest.approx(1)
    assert 0 < targets.weight[targets.owner == large].sum() < 1


def test_nothing_is_said_about_ignored_boxes() -> None:
    # Cells have their centres at 2, 6, 10, ...: the box covers columns 1 and 2 of rows 0 to 3.
    ignored = torch.tensor([[4.0, 0.0, 12.0, 16.0]])
    empty = assign_targets(NOTHING, ignored, 8)
    assert (~empty.known).nonzero().tolist() == [[row, column] for row in range(4) for column in (1, 2)]
    assert not empty.heat.any()
    assert (empty.owner == -1).all()
    # An object's own cells stay known.
    beside = assign_targets(torch.tensor([[4.0, 4.0, 8.0, 8.0]]), ignored, 8)
    assert beside.known[1, 1]
    assert not beside.known[1, 2]


def test_objects_of_a_batch_are_numbered_through(scenes: RenderedScenes) -> None:
    dataset = CropDataset(scenes, 128)
    samples = [dataset[index] for index in range(3)]
    batch = collate(samples, 128)
    assert batch["pixel_values"].shape == (3, 3, 128, 128)
    assert len(batch["boxes"]) == len(batch["labels"]) == sum(len(sample["boxes"]) for sample in samples)
    first = 0
    for number, sample in enumerate(samples):
        image, row, column = (batch["owner"] == first).nonzero()[0]
        first += len(sample["boxes"])
        assert image == number
        box = sample["boxes"][0]
        assert box[0] < (column + 1) * 4
        assert box[2] > column * 4
        assert box[1] < (row + 1) * 4
        assert box[3] > row * 4


# ---------------------------------------------------------------- samples


def test_samples_show_the_scene_and_box_its_objects(scenes: RenderedScenes) -> None:
    dataset = CropDataset(scenes, 64)
    shapes = set()
    for epoch in range(12):
        for index in range(len(dataset)):
            sample = dataset[SampleKey(0, epoch, index)]
            height, width = sample["pixels"].shape[:2]
            shapes.add((height, width))
            assert max(height, width) == 64
            assert len(sample["boxes"]) == len(sample["labels"])
            for box in (*sample["boxes"], *sample["ignored"]):
                assert (box[2:] > box[:2]).all()
                assert (box >= 0).all()
                assert (box[2:] <= torch.tensor([width, height]) + 1e-4).all()
            longer = (sample["boxes"][:, 2:] - sample["boxes"][:, :2]).amax(1)
            assert (longer >= 8).all()
    assert len(shapes) > 10


def test_an_uncropped_sample_has_the_boxes_of_the_scene(scenes: RenderedScenes) -> None:
    dataset = CropDataset(scenes, 128)
    for epoch in range(50):
        sample = dataset[SampleKey(0, epoch, 0)]
        if np.array_equal(sample["pixels"], scenes.images[0]):
            break
    else:
        pytest.fail("no sample of 50 was the whole scene, unmirrored")
    wanted = [
        item
        for item in scenes.instances[0]
        if item.visible_fraction >= 0.3 and max(item.box[2] - item.box[0], item.box[3] - item.box[1]) >= 8
    ]
    assert sample["boxes"].tolist() == [list(item.box) for item in wanted]
    assert [category_names()[label] for label in sample["labels"]] == [item.category for item in wanted]
    assert len(sample["ignored"]) == len(scenes.instances[0]) - len(wanted)


def test_samples_depend_on_their_key_alone(scenes: RenderedScenes) -> None:
    first, second = CropDataset(scenes, 64), CropDataset(scenes, 64)
    second[3]
    key = SampleKey(7, 2, 1)
    assert np.array_equal(first[key]["pixels"], second[key]["pixels"])
    assert torch.equal(first[key]["boxes"], second[key]["boxes"])


# ---------------------------------------------------------------- losses


def test_focal_loss_by_hand() -> None:
    heat = torch.tensor([[[1.0, 0.5, 0.0, 0.0]]])
    known = torch.tensor([[[True, True, True, False]]])
    p = 0.25
    logits = torch.full((1, 1, 4), math.log(p / (1 - p)))
    by_hand = -((1 - p) ** 2) * math.log(p) - (0.5**4 + 1) * p**2 * math.log(1 - p)
    assert objectness_loss(logits, heat, known) == pytest.approx(by_hand)
    # Without any centre the sum is not divided; extreme logits stay finite.
    assert objectness_loss(logits, heat / 2, known) == pytest.approx(-((0.5**4 + 0.75**4 + 1) * p**2 * math.log(1 - p)))
    assert torch.isfinite(objectness_loss(logits * 1000, heat, known))


class Perfect(torch.nn.Module):
    """In place of the network: maps that say exactly what the targets say."""

    def __init__(self, batch: dict[str, Tensor], shift: float = 0.0) -> None:
        super().__init__()
        owner, boxes = batch["owner"], batch["boxes"] + shift
        centres = cell_centres(owner.shape[-1]).expand(*owner.shape, 2)
        self.output = ProposerOutput(
            torch.where(batch["heat"] == 1, 20.0, -20.0),
            encode_boxes(boxes[owner.clamp(min=0)], centres).permute(0, 3, 1, 2),
            torch.nn.functional.one_hot(batch["labels"][owner.clamp(min=0)], 46).permute(0, 3, 1, 2) * 50.0,
        )

    def forward(self, pixel_values: Tensor) -> ProposerOutput:
        return self.output


def test_losses_vanish_for_perfect_maps_only(scenes: RenderedScenes) -> None:
    dataset = CropDataset(scenes, 128)
    batch = collate([dataset[index] for index in range(4)], 128)
    sizes = ProposerSizes(image_size=128)  # pyright: ignore[reportCallIssue]
    losses = ProposerTraining(Perfect(batch), sizes)(**batch)["losses"]  # pyright: ignore[reportArgumentType]
    for name, value in losses.items():
        # The centre of a cell can lie beside a thin box, whose sides cannot all be reached from there.
        assert float(value) == pytest.approx(0, abs=5e-3 if name == "box" else 1e-4), name
    shifted = ProposerTraining(Perfect(batch, shift=2.0), sizes)(**batch)["losses"]  # pyright: ignore[reportArgumentType]
    assert shifted["box"] > 0.05
    other = Perfect({**batch, "labels": (batch["labels"] + 1) % 46})
    assert ProposerTraining(other, sizes)(**batch)["losses"]["class"] > 5  # pyright: ignore[reportArgumentType]


def test_a_batch_without_objects_has_a_loss() -> None:
    empty = {
        "pixels": np.zeros((32, 64, 3), np.uint8),
        "boxes": NOTHING,
        "labels": torch.zeros(0, dtype=torch.long),
        "ignored": NOTHING,
    }
    config = ProposerConfig(image_size=64, id2label=dict(enumerate(category_names())))
    result = ProposerTraining(ProposerModel(config), ProposerSizes())(**collate([empty, empty], 64))  # pyright: ignore[reportCallIssue]
    assert torch.isfinite(result["loss"])
    assert result["losses"]["box"] == 0
    result["loss"].backward()


# ---------------------------------------------------------------- the recipe


def test_the_shipped_recipe_is_valid() -> None:
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe, ProposerRecipe)
    seeds = [
        range(part.first_seed, part.first_seed + part.count)
        for part in (recipe.data, recipe.calibration, recipe.evaluation)
    ]
    for one in seeds:
        assert all(one is other or one[-1] < other[0] or other[-1] < one[0] for other in seeds)
    with pytest.raises(RecipeError, match="calibration"):
        load_recipe(RECIPE, ["calibrashun={first_seed: 1, count: 1}"])


def test_a_small_run_finds_every_object_of_its_scenes(scenes: RenderedScenes) -> None:
    torch.manual_seed(0)
    config = ProposerConfig(
        image_size=128, widths=[16, 32, 64, 64, 64], head_width=32, id2label=dict(enumerate(category_names()))
    )
    sizes = ProposerSizes(image_size=128)  # pyright: ignore[reportCallIssue]
    training = ProposerTraining(ProposerModel(config), sizes)
    wanted = [[item for item in items if item.describable] for items in scenes.instances[:4]]
    samples = [
        {
            "pixels": fit_image(Image.fromarray(scenes.images[k]), 128),
            "boxes": torch.tensor([item.box for item in items]),
            "labels": torch.tensor([category_names().index(item.category) for item in items]),
            "ignored": NOTHING,
        }
        for k, items in enumerate(wanted)
    ]
    batch = collate(samples, 128)
    optimizer = torch.optim.AdamW(training.parameters())
    training.train()
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 10, (80 - step) / 30)
        optimizer.zero_grad()
        training(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(training.parameters(), 5.0)
        optimizer.step()
    training.eval()
    with torch.no_grad():  # batch statistics of the trained network
        for module in training.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        training.train()
        training(**batch)
    proposer = RegionProposer(training.proposer)
    for k, items in enumerate(wanted):
        found = proposer.propose([scenes.images[k]])[0]
        overlap = box_iou(torch.tensor([item.box for item in items]), torch.from_numpy(found.boxes))
        best, which = overlap.max(1)
        assert (best >= 0.5).all()
        assert [found.labels[index] for index in which] == [item.category for item in items]
    threshold = choose_threshold(proposer, scenes)
    assert 0.05 <= threshold <= 0.9
    assert proposer.model.config.score_threshold == 0.3  # as it was
