"""The echo task: what its pictures show, what each variant can see, how it is measured, and the benchmark around it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.methods.vision_gru.echo import (
    CANVAS,
    CLASSES,
    COLOURS,
    GLYPH,
    RECTANGLE,
    Accuracy,
    EchoModel,
    EchoResult,
    draw_corners,
    draw_echoes,
    farthest,
    gaps,
    measure,
    reach,
    train,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def benchmark(load_program: Callable[[str], ModuleType]) -> ModuleType:
    return load_program("benchmarks/vision_gru_echo.py")


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("glyph", "rectangle", "gap"),
    [
        ((0, 0), (8, 0), 0),  # side by side
        ((0, 0), (44, 44), 36),  # the farthest corners
        ((30, 0), (20, 11), 3),  # above: 11 - 8
        ((50, 40), (10, 30), 20),  # beside: 50 - 30
        ((10, 10), (5, 5), 0),  # inside
    ],
)
def test_gap_by_hand(glyph: tuple[int, int], rectangle: tuple[int, int], gap: int) -> None:
    assert gaps(np.array([glyph]), np.array([rectangle])).tolist() == [gap]


@given(st.integers(0, 36), st.integers(0, 36), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_corners_have_the_gap_that_was_asked_for(low: int, high: int, seed: int) -> None:
    low, high = min(low, high), max(low, high)
    glyphs, rectangles = draw_corners(np.random.default_rng(seed), 20, low, high)
    assert len(glyphs) == len(rectangles) == 20
    assert np.all((glyphs >= 0) & (glyphs <= CANVAS - GLYPH))
    assert np.all((rectangles >= 0) & (rectangles <= CANVAS - RECTANGLE))
    found = gaps(glyphs, rectangles)
    assert np.all((found >= low) & (found <= high))


@pytest.mark.parametrize(("low", "high"), [(37, 64), (5, 4), (-3, -1)])
def test_gaps_that_no_picture_has_are_refused(low: int, high: int) -> None:
    with pytest.raises(InputError, match="pixels apart"):
        draw_echoes(np.random.default_rng(0), 1, low, high)


def test_pictures() -> None:
    echoes = draw_echoes(np.random.default_rng(3), 40)
    assert echoes.pixel_values.shape == (40, 3, CANVAS, CANVAS)
    assert echoes.rectangle.sum((1, 2)).tolist() == [RECTANGLE**2] * 40
    assert int(echoes.gap.min()) >= 1
    grey = echoes.pixel_values.permute(0, 2, 3, 1)
    assert not grey[echoes.rectangle].any()  # no evidence in place
    for k in range(40):
        glyph = (echoes.labels[k] > 0) & ~echoes.rectangle[k]
        assert int(glyph.sum()) == GLYPH**2
        (label,) = set(echoes.labels[k][glyph | echoes.rectangle[k]].tolist())
        colour = grey[k][glyph] * 0.25 + 0.5
        assert torch.equal(colour, torch.from_numpy(COLOURS[label - 1]).expand(GLYPH**2, 3))
        rows, other = glyph.nonzero()[:, 0], echoes.rectangle[k].nonzero()[:, 0]
        assert int(echoes.below[k]) == int(rows.min() > other.max()) - int(rows.max() < other.min())
    noise = grey[echoes.labels == 0] * 0.25 + 0.5
    assert 0.4 <= float(noise.min()) < 0.41 < 0.59 < float(noise.max()) <= 0.6


# --------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("variant", "parameters"), [("both", 75_037), ("forward", 75_037), ("local", 75_541), ("attention", 52_285)]
)
def test_parameters_are_the_specification_s(variant: str, parameters: int) -> None:
    model = EchoModel(variant)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 20, 33)).shape == (2, CLASSES, 20, 33)


def test_what_each_variant_sees() -> None:
    # 32 pixels is what convolutions and up-sampling see, so that a gap of 33 is out of their reach.
    assert farthest("local", side=96) == 32
    assert farthest("both", side=96) >= 48
    seen = reach(EchoModel("forward"), (48, 48), 96)
    assert seen[:10, 90:].all()  # what the run met before
    assert not seen[48 + 33 :].any()  # rows that it meets later
    assert reach(EchoModel("both"), (48, 48), 96)[48 + 33 :].all()
    assert reach(EchoModel("attention"), (8, 8)).all()


def test_training_learns_and_repeats() -> None:
    _, losses = train("both", seed=1, steps=12, batch_size=4)
    model, again = train("both", seed=1, steps=12, batch_size=4)
    assert losses == again
    assert losses[-1] < losses[0]
    assert not model.training


# ------------------------------------------------------------------------------------------------------------- measure


class Oracle(nn.Module):
    """Names all pixels by the only colour of the picture."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.flatten(2) * 0.25 + 0.5
        off = (pixels.unsqueeze(1) - torch.from_numpy(COLOURS)[None, :, :, None]).abs().amax(2).amin(2)
        logits = torch.cat([torch.full((len(off), 1), -9.0), -off], 1)
        return logits[:, :, None, None].expand(-1, -1, *pixel_values.shape[2:])


class LooksUp(Oracle):
    """Knows the colour of the upper half only, and says 0 where there is none."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        half = pixel_values.clone()
        half[:, :, 28:] = 0
        logits = super().forward(half).clone()
        logits[:, 0] = -0.2
        return logits


def test_accuracy_counts_the_rectangles() -> None:
    assert measure(Oracle(), count=40) == Accuracy(1.0, 1.0, 1.0, 1.0)
    some = measure(LooksUp(), count=60)
    # Few far pictures are far along x, where "above" may begin below the middle.
    assert some.far_above > 0.9
    assert some.far_below < 0.1
    assert some.far_below < some.far < some.far_above


# ----------------------------------------------------------------------------------------------------------- benchmark


def made_up(variant: str, far: float, above: float, below: float, near: float) -> EchoResult:
    return EchoResult(variant, 0, 1, Accuracy(far, above, below, near), (1.0, 0.5), 1.0)


def test_criteria(benchmark: ModuleType) -> None:
    good = [
        made_up("both", 0.97, 0.97, 0.97, 0.97),
        made_up("forward", 0.7, 0.95, 0.3, 0.9),
        made_up("local", 0.25, 0.25, 0.25, 0.8),
    ]
    assert [verdict["met"] for verdict in benchmark.verdicts(good).values()] == [True] * 4
    bad = [
        made_up("both", 0.94, 1, 1, 1),
        made_up("forward", 0.7, 0.6, 0.3, 0.9),
        made_up("local", 0.36, 0.3, 0.3, 0.7),
    ]
    assert [verdict["met"] for verdict in benchmark.verdicts(bad).values()] == [False] * 4
    assert benchmark.verdicts([made_up("attention", 1, 1, 1, 1)]) == {}


def test_benchmark_writes_what_it_measured(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["foveate.methods.vision_gru.echo"], "measure", lambda *_: Accuracy(0.5, 1, 0, 0.25))
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(["--only", "local", "--seeds", "1", "--steps", "2", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "no scan" in capsys.readouterr().out
    with (tmp_path / "vision_gru_echo.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["variant"], row["parameters"], row["far"], row["near"]) == ("local", "75541", "0.5000", "0.2500")
    content = json.loads((tmp_path / "vision_gru_echo.json").read_text())
    assert content["models"][0]["accuracy"]["far_above"] == 1
    assert (tmp_path / "vision_gru_echo.png").stat().st_size > 1000
