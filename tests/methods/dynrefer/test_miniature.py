"""The miniature experiment: what its pictures show at which size, the frozen encoder, training, and the figures."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from foveate.errors import RecipeError
from foveate.methods.dynrefer.configuration import CANDIDATE_VIEWS
from foveate.methods.dynrefer.miniature import (
    CANVAS,
    CHANCE_LOSS,
    COLOURS,
    DIRECTIONS,
    GRID,
    MARKER,
    VIEW,
    VIEWS,
    Measurement,
    MiniatureModel,
    MiniatureModelSettings,
    MiniatureRecipe,
    Regions,
    StandInEncoder,
    Variant,
    VariantResult,
    accuracy,
    encode_pictures,
    measured_views,
    render_picture,
    summarise,
    train_variant,
)
from foveate.methods.dynrefer.views import build_views, crop_view
from foveate.training.recipes import TrainingSettings, load_recipe

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "dynrefer" / "miniature.yaml"
SMALL = MiniatureModelSettings(channels=16, width=32, num_query_tokens=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings_for(**values: Any) -> TrainingSettings:
    return TrainingSettings.model_validate(values)


@pytest.fixture(scope="module")
def regions() -> Regions:
    return encode_pictures(320, seed=5, channels=32)


@pytest.fixture(scope="module")
def benchmark(load_program: Callable[[str], ModuleType]) -> ModuleType:
    return load_program("benchmarks/dynrefer_miniature.py")


def stripes_seen(pixels: np.ndarray) -> int:
    """The direction in which brightness changes most, from the structure tensor of (H, W, 3) pixels."""
    grey = pixels.mean(axis=-1)
    dy, dx = np.gradient(grey)
    angle = 0.5 * math.atan2(2 * (dx * dy).mean(), (dx**2 - dy**2).mean())
    return round(angle / (math.pi / DIRECTIONS)) % DIRECTIONS


def markers_seen(pixels: np.ndarray) -> np.ndarray:
    """(H, W) row of `COLOURS` at each coloured pixel, -1 where it is grey."""
    distance = np.abs(pixels[:, :, None].astype(int) - COLOURS).max(axis=-1)
    return np.where(distance.min(axis=-1) == 0, distance.argmin(axis=-1), -1)


class TestPictures:
    def test_same_seed_same_picture_and_others_differ(self) -> None:
        one, again, other = render_picture(3, 7), render_picture(3, 7), render_picture(4, 7)
        assert one.image.tobytes() == again.image.tobytes()
        assert (one.detail, one.context) == (again.detail, again.context)
        assert np.array_equal(one.box, again.box)
        assert one.image.tobytes() != other.image.tobytes()

    def test_layout_is_the_one_of_the_specification(self) -> None:
        gaps = []
        for index in range(60):
            picture = render_picture(0, index)
            x1, y1, x2, y2 = picture.box.astype(int)
            assert picture.image.size == (CANVAS, CANVAS)
            assert x2 - x1 == y2 - y1
            assert 20 <= x2 - x1 <= 28
            seen = markers_seen(np.asarray(picture.image))
            assert (seen[y1:y2, x1:x2] == -1).all(), "no marker lies on the region"
            rows, columns = np.nonzero(seen >= 0)
            outside = np.maximum.reduce([x1 - columns - 1, columns - x2, y1 - rows - 1, rows - y2])
            near = outside < 19  # a distractor's centre is at least 24 px away, its border 19
            assert near.sum() == MARKER * MARKER
            assert set(seen[rows, columns][near]) == {picture.context}
            gaps.append(outside.min())
            assert (~near).sum() > 6 * MARKER * MARKER, "fourteen distractors, some on top of others"
        assert min(gaps) == 3
        assert max(gaps) == 8

    def test_labels_are_balanced_and_independent(self) -> None:
        labels = np.array([(p.detail, p.context) for p in (render_picture(1, index) for index in range(400))])
        joint = np.zeros((DIRECTIONS, len(COLOURS)))
        np.add.at(joint, tuple(labels.T), 1)
        expected = 400 / joint.size
        assert ((joint - expected) ** 2 / expected).sum() < 37.7  # chi squared, 15 degrees of freedom, p = 0.001

    def test_detail_is_plain_in_the_crop_and_gone_in_the_whole_image(self) -> None:
        right = {0.0: 0, 0.1: 0, 1.0: 0}
        for index in range(200):
            picture = render_picture(2, index)
            views = build_views(picture.image, picture.box, np.array(list(right)), VIEW, exact=False)
            for view, t in enumerate(right):
                x1, y1, x2, y2 = views.region_boxes[0, view].round().astype(int)
                pixels = views.crops[views.view_index[0, view]][y1:y2, x1:x2]
                right[t] += stripes_seen(pixels) == picture.detail
        assert right[0.0] >= 198
        assert right[0.1] >= 198
        assert right[1.0] < 0.25 * 200 + 4 * math.sqrt(200 * 0.25 * 0.75), "within four standard deviations of chance"

    def test_crop_hides_the_marker_and_wider_views_add_misleading_ones(self) -> None:
        colours = {t: 0.0 for t in (0.0, 0.3, 1.0)}
        for index in range(40):
            picture = render_picture(6, index)
            for t in colours:
                box = picture.box + np.float32(t) * (np.array([0, 0, CANVAS, CANVAS]) - picture.box)
                x1, y1, x2, y2 = box.astype(int)
                seen = markers_seen(np.asarray(picture.image)[y1:y2, x1:x2])
                colours[t] += len(set(seen[seen >= 0])) / 40
        assert colours[0.0] == 0
        assert 0.95 <= colours[0.3] < 2
        assert colours[1.0] > 3.5


class TestEncoder:
    def test_is_frozen_deterministic_and_does_not_touch_the_global_generator(self) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, VIEW, VIEW, 3), dtype=np.uint8))
        one, other = StandInEncoder(32), StandInEncoder(32)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one(crops), other(crops))
        assert list(one.parameters()) == []
        assert one(crops).shape == (3, 1 + GRID * GRID, 32)
        assert torch.allclose(one(crops)[1:2], one(crops[1:2]), atol=1e-6)

    def test_measurements_of_a_view_painted_by_hand(self) -> None:
        pixels = np.full((VIEW, VIEW, 3), 128, dtype=np.uint8)
        pixels[8:12, 4:8] = COLOURS[2]  # cell of row 2, column 1
        pixels[:, 16:20] += np.array([0, 40, 40, 0], dtype=np.uint8)[:, None]  # a bar in cell column 4
        measured = StandInEncoder(32).measure(torch.from_numpy(pixels)[None])[0].unflatten(0, (GRID, GRID))
        assert torch.equal(measured[2, 1, 7:].argsort(descending=True)[:1], torch.tensor([2]))
        assert (measured[2, 1, 7:] > 0).sum() == 1
        assert torch.count_nonzero(measured[..., 7:]) == 1, "grey has no colour"
        assert measured[6, 4, 3:7].argmax() == 0
        assert measured[6, 4, 5] == pytest.approx(0, abs=1e-6), "no change from top to bottom"
        assert measured[6, 4, 3] == pytest.approx(8 * 40 / 255 * math.sqrt(0.5), abs=1e-4), "2 of 4 differences are 40"
        assert measured[6, 6].abs().max() < 0.02

    @pytest.mark.parametrize("direction", range(DIRECTIONS))
    def test_each_direction_has_its_own_gradient(self, direction: int) -> None:
        rows, columns = np.mgrid[:VIEW, :VIEW]
        angle = direction * math.pi / DIRECTIONS
        wave = 128 + 60 * np.sin(2 * math.pi * (columns * math.cos(angle) + rows * math.sin(angle)) / 6)
        pixels = np.repeat(wave[..., None], 3, axis=2).astype(np.uint8)
        measured = StandInEncoder(32).measure(torch.from_numpy(pixels)[None])[0]
        assert measured[:, 3:7].mean(dim=0).argmax() == direction

    def test_cls_is_the_maximum_over_cells_without_position(self) -> None:
        crops = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, VIEW, VIEW, 3), dtype=np.uint8))
        encoder = StandInEncoder(32)
        expected = encoder.measure(crops).amax(dim=1) @ encoder.projection
        assert torch.allclose(encoder(crops)[:, 0], expected)
        assert len({tuple(code.tolist()) for code in encoder.positions}) == GRID * GRID

    def test_regions_hold_every_view_once(self, regions: Regions) -> None:
        assert regions.features.shape == (320, len(VIEWS), 32, GRID, GRID)
        assert regions.cls.shape == (320, len(VIEWS), 32)
        assert torch.equal(regions.targets.sum(dim=1), torch.full((320,), 2.0))
        assert torch.equal(regions.targets[:, :DIRECTIONS].argmax(dim=1), regions.detail)
        assert torch.equal(regions.targets[:, DIRECTIONS:].argmax(dim=1), regions.context)
        picture = render_picture(5, 201)
        whole = crop_view(picture.image, (0, 0, CANVAS, CANVAS), VIEW)
        cls = StandInEncoder(32)(torch.from_numpy(whole.copy())[None])[0, 0]
        assert torch.allclose(regions.cls[201, -1], cls, atol=1e-6)
        assert (regions.detail[201], regions.context[201]) == (picture.detail, picture.context)


class TestVariants:
    def test_random_views_are_drawn_for_each_region_anew(self) -> None:
        drawn = Variant(name="n = 3", views="random", num_views=3).sample(2000, np.random.default_rng(0))
        assert drawn.shape == (2000, 3)
        assert (drawn[:, 0] == 0).all()
        assert (drawn[:, 1] != drawn[:, 2]).all()
        counts = np.bincount(np.rint(10 * drawn[:, 1:]).astype(int).ravel(), minlength=11)
        assert counts[0] == 0
        assert counts[1:] == pytest.approx(400, abs=4 * math.sqrt(400))
        assert len(np.unique(drawn[:64], axis=0)) > 30

    def test_fixed_views_are_the_same_for_all(self) -> None:
        variant = Variant(name="pair", views=(0.0, 0.3))
        assert variant.count == 2
        assert np.array_equal(variant.sample(3, np.random.default_rng(0)), [[0, 0.3]] * 3)

    def test_measured_views(self) -> None:
        triples = [(0.0, 0.3, 1.0)]
        assert measured_views(Variant(name="a", views=(1.0,)), triples) == [(1.0,)]
        assert measured_views(Variant(name="b", views="random"), triples) == [(0.0, t) for t in CANDIDATE_VIEWS]
        assert measured_views(Variant(name="c", views="random", num_views=3), triples) == triples


class TestRecipe:
    def test_shipped_recipe_is_the_one_of_the_specification(self) -> None:
        recipe = load_recipe(RECIPE, schema=MiniatureRecipe)
        assert isinstance(recipe, MiniatureRecipe)
        views = {variant.views for variant in recipe.variants}
        assert views >= {(1.0,), (0.0,), (0.0, 1.0), (0.0, 0.1), (0.0, 0.3), "random"}
        assert {v.count for v in recipe.variants} == {1, 2, 3}
        assert (recipe.data.train, recipe.data.test) == (3000, 600)
        assert (recipe.training.max_steps, recipe.long_steps, recipe.training.batch_size) == (500, 1500, 64)

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("training.precision=bf16", "training.precision has no effect in this experiment"),
            ("training={epochs: 3}", "training.epochs has no effect"),
            ("variants=[{name: odd, views: [0, 0.25]}]", r"views \[0.0, 0.25\]; each t must be one of"),
            ("variants=[{name: none, views: []}]", "each t must be one of"),
            ("data.trian=3", "did you mean 'data.train'"),
            ("model.channels=12", "multiple of 8"),
        ],
    )
    def test_mistakes_are_named(self, override: str, sentence: str) -> None:
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(RECIPE, [override], MiniatureRecipe)


class TestModel:
    def test_context_starts_with_its_cls_token_only(self) -> None:
        """Zero offsets and weights: the align module hides the context view's cells until it has learnt (spec 2.4)."""
        torch.manual_seed(0)
        model = MiniatureModel(SMALL, 2).eval()
        features, cls = torch.randn(3, 2, 16, GRID, GRID), torch.randn(3, 2, 16)
        cells, tokens = features.clone(), cls.clone()
        cells[:, 1] += 1
        tokens[:, 1] += 1
        assert torch.allclose(model(features, cls), model(cells, cls), atol=1e-6)
        assert not torch.allclose(model(features, cls), model(features, tokens), atol=1e-4)
        plain = MiniatureModel(SMALL, 2, align=False).eval()
        assert not torch.allclose(plain(features, cls), plain(cells, cls), atol=1e-4)

    def test_order_of_context_views_matters(self) -> None:
        torch.manual_seed(0)
        model = MiniatureModel(SMALL, 3).eval()
        features, cls = torch.randn(3, 3, 16, GRID, GRID), torch.randn(3, 3, 16)
        order = [0, 2, 1]
        assert not torch.allclose(model(features, cls), model(features[:, order], cls[:, order]), atol=1e-4)

    def test_thirty_steps_lower_the_loss_reproducibly(self, regions: Regions) -> None:
        training = settings_for(max_steps=30, batch_size=32, learning_rate=2e-3, warmup_steps=5)
        variant = Variant(name="stochastic", views="random", num_views=2)
        settings = MiniatureModelSettings(channels=32, width=32)
        state = torch.get_rng_state()
        first, again = (train_variant(variant, regions, settings, training, seed=1) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert first.losses[-10:].mean() < 0.9 * first.losses[:3].mean()
        assert np.array_equal(first.losses, again.losses)
        assert first.context_losses.shape == (30,)
        weights = first.model.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in again.model.state_dict().items())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in first.model.cvem_align.parameters())  # pyright: ignore
        other = train_variant(variant, regions, settings, training.model_copy(update={"max_steps": 3}), seed=2)
        assert not np.array_equal(first.losses[:3], other.losses)

    def test_crop_teaches_the_detail_and_not_the_context(self, regions: Regions) -> None:
        training = settings_for(max_steps=110, batch_size=64, learning_rate=5e-3, warmup_steps=5)
        trained = train_variant(Variant(name="crop", views=(0.0,)), regions, MiniatureModelSettings(), training, seed=0)
        test = encode_pictures(200, seed=8, channels=32)
        detail, context = accuracy(trained.model, test, (0.0,))
        assert detail > 0.95
        assert context < 0.25 + 4 * math.sqrt(0.25 * 0.75 / 200)
        assert trained.losses[-10:].mean() < 0.35
        assert trained.context_loss == pytest.approx(CHANCE_LOSS, abs=0.03)

    def test_accuracy_counts_the_right_ones(self) -> None:
        class Knowing(torch.nn.Module):
            """Gives away the labels that the features carry: the detail always, the context of the last view."""

            def forward(self, features: torch.Tensor, cls: torch.Tensor) -> torch.Tensor:
                return torch.cat([cls[:, 0, :4], cls[:, -1, 4:8]], dim=1)

        detail, context = torch.arange(10) % 4, torch.arange(10) // 3
        targets = torch.cat([F.one_hot(detail, 4), F.one_hot(context, 4)], dim=1).float()
        cls = targets[:, None].repeat(1, len(VIEWS), 1)
        cls[:4, 5, 4:8] = F.one_hot((context[:4] + 1) % 4, 4).float()  # at t = 0.5 four contexts are wrong
        regions = Regions(torch.zeros(10, len(VIEWS), 8, 1, 1), cls, detail, context, targets)
        model = Knowing()
        assert accuracy(model, regions, (0.0, 0.4)) == pytest.approx((1.0, 1.0))  # pyright: ignore[reportArgumentType]
        assert accuracy(model, regions, (0.0, 0.5)) == pytest.approx((1.0, 0.6))  # pyright: ignore[reportArgumentType]
        guess = F.binary_cross_entropy(torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0]))
        assert guess.item() == pytest.approx(CHANCE_LOSS, abs=1e-6)


def result(
    name: str, views: tuple[float, ...] | str, scores: list[tuple[float, float]], loss: float = 0.1
) -> VariantResult:
    variant = Variant(name=name, views=views)  # pyright: ignore[reportArgumentType]
    at = measured_views(variant, ())
    scores = scores if len(scores) == len(at) else [scores[0]] * len(at)
    return VariantResult(variant, tuple(Measurement(v, *s) for v, s in zip(at, scores, strict=True)), loss, 1.5)


@pytest.fixture
def results() -> list[VariantResult]:
    peak = [(1.0, 0.5)] * 10
    peak[2] = (1.0, 0.9)
    return [
        result("whole image", (1.0,), [(0.24, 0.66)]),
        result("crop", (0.0,), [(1.0, 0.26)], loss=0.562),
        result("fixed pair (0, 1)", (0.0, 1.0), [(1.0, 0.3)], loss=0.56),
        result("fixed pair (0, 0.3)", (0.0, 0.3), [(1.0, 0.3), (1.0, 0.3), (1.0, 0.9), *[(1.0, 0.3)] * 7]),
        result("stochastic", "random", peak),
    ]


class TestFigures:
    def test_summary_by_hand(self, results: list[VariantResult]) -> None:
        summary = summarise(results)
        assert summary["stochastic"]["views"] == [0.0, 0.3]
        assert summary["stochastic"]["score"] == pytest.approx(95)
        assert summary["stochastic"]["mean_context"] == pytest.approx(54)
        assert summary["strongest_baseline"]["name"] == "fixed pair (0, 1)"
        assert summary["margin"] == pytest.approx(95 - 65)
        assert summary["best_fixed_pair"]["name"] == "fixed pair (0, 0.3)"
        assert summary["mean_context"] == pytest.approx(
            {"fixed pair (0, 1)": 30.0, "fixed pair (0, 0.3)": 36.0, "stochastic": 54.0}
        )
        assert summary["on_plateau"] == ["fixed pair (0, 1)"], "the crop cannot leave it"

    def test_of_equal_fixed_pairs_the_steadier_counts(self, results: list[VariantResult]) -> None:
        steady = result("fixed pair (0, 0.1)", (0.0, 0.1), [(1.0, 0.4), (1.0, 0.4), (1.0, 0.9), *[(1.0, 0.4)] * 7])
        assert summarise([*results, steady])["best_fixed_pair"]["name"] == "fixed pair (0, 0.1)"
        assert summarise([steady, *results])["best_fixed_pair"]["mean_context"] == pytest.approx(45)

    def test_summary_of_part_of_the_models(self, results: list[VariantResult]) -> None:
        summary = summarise(results[:2])
        assert summary["margin"] is None
        assert summary["stochastic"] is None
        assert summary["strongest_baseline"]["name"] == "crop"

    def test_sentences_admit_the_tie(self, benchmark: ModuleType, results: list[VariantResult]) -> None:
        text = " ".join(benchmark.conclusions(summarise(results)))
        assert "stochastic views 95.0 at (0, 0.3)" in text
        assert "+30.0 points" in text
        assert "ties with stochastic views if the right t is known" in text
        assert "36.0 against 54.0" in text
        assert "plateau of the context loss, so more steps could change them: fixed pair (0, 1)." in text
        assert benchmark.conclusions(summarise([])) == []

    def test_table_shows_every_model_and_number(self, benchmark: ModuleType, results: list[VariantResult]) -> None:
        console = Console(width=180, record=True, quiet=False, file=None, highlight=False)
        with console.capture() as captured:
            console.print(benchmark.results_table(results, 500))
        lines = captured.get().splitlines()
        row = next(line for line in lines if "stochastic" in line)
        cells = re.split(r"\s{2,}", row.strip())
        assert cells == [
            "stochastic",
            "(0, 0.3)",
            "100.0",
            "90.0",
            "50.0",
            "50.0",
            "90.0",
            *["50.0"] * 7,
            "54.0",
            "0.100",
        ]
        whole = next(line for line in lines if "whole image" in line)
        assert "24.0" in whole
        assert "66.0" in whole
        assert "0.560 *" in next(line for line in lines if "fixed pair (0, 1)" in line)
        assert all(any(r.variant.name in line for line in lines) for r in results)

    def test_files_hold_the_figures(self, benchmark: ModuleType, results: list[VariantResult], tmp_path: Path) -> None:
        recipe = load_recipe(RECIPE, schema=MiniatureRecipe)
        paths = benchmark.write([(500, results)], recipe, tmp_path)
        assert [path.name for path in paths] == [f"dynrefer_miniature.{kind}" for kind in ("json", "csv", "png")]
        content = json.loads(paths[0].read_text(encoding="utf-8"))
        assert content["runs"][0]["summary"]["margin"] == pytest.approx(30)
        assert content["runs"][0]["models"][4]["measurements"][2] == {
            "views": [0.0, 0.3],
            "detail": 1.0,
            "context": 0.9,
        }
        assert content["recipe"]["training"]["max_steps"] == 500
        with paths[1].open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2 + 3 * 10
        assert rows[-8] == {
            "steps": "500",
            "model": "stochastic",
            "views": "0 0.3",
            "detail_accuracy": "1.0000",
            "context_accuracy": "0.9000",
        }
        with Image.open(paths[2]) as picture:
            assert picture.size == (800, 500)

    def test_command_runs_from_recipe_to_files(
        self, benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        variants = "variants=[{name: whole, views: [1.0]}, {name: three, views: random, num_views: 3}]"
        small = [
            "training.max_steps=3",
            "training.batch_size=8",
            "training.warmup_steps=1",
            "data.train=24",
            "data.test=12",
        ]
        code = benchmark.main(
            ["--recipe", str(RECIPE), "--long", "long_steps=4", *small, variants, "--out", str(tmp_path)]
        )
        printed = capsys.readouterr().out
        assert code == 0
        assert "3 steps a model" in printed
        assert "4 steps a model" in printed
        assert "(0, 0.3, 0.5)" in printed
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json"], (
            "no model of two views, no curve"
        )

    def test_command_refuses_a_wrong_recipe(self, benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        assert benchmark.main(["--recipe", "no-such.yaml"]) == 2
        assert "There is no recipe no-such.yaml" in capsys.readouterr().err
