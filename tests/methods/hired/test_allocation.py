"""Budgets, scores and layouts by hand, by property, and by transformers' own packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.methods.hired.allocation import (
    allocate,
    allocate_exactly,
    keep_highest,
    sub_image_scores,
    token_budget,
)
from foveate.methods.hired.configuration import PRESETS, HiredConfig
from foveate.methods.hired.partitions import NEWLINE, Partitions
from foveate.methods.hired.strategies import select_tokens

N = 576


@pytest.mark.parametrize(
    ("budget", "alpha", "caps", "scores", "counts"),
    [  # spec 2.6; the first is figure 4 of the paper
        (100, 0.5, [N] * 5, [0.32, 0.08, 0.58, 0.02], [50, 16, 4, 29, 1]),
        (20, 0.5, [N] * 4, [1, 1, 1], [10, 4, 3, 3]),
        (576, 0.5, [N] * 5, [0.32, 0.08, 0.58, 0.02], [288, 92, 23, 168, 5]),
        (1152, 0.5, [N] * 5, [0.02, 0.96, 0.01, 0.01], [576, 11, 555, 5, 5]),
        (1152, 1.0, [N] * 5, [1, 1, 1, 1], [576, 144, 144, 144, 144]),
        (576, 0.5, [576, 432, 432, 432, 432], [0.4, 0.4, 0.1, 0.1], [288, 116, 116, 28, 28]),
    ],
)
def test_an_exact_budget_is_divided_as_specified(
    budget: int, alpha: float, caps: list[int], scores: list[float], counts: list[int]
) -> None:
    assert allocate_exactly(scores, budget, alpha, caps) == counts


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 400),
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(0, 90), st.floats(0, 1e3)), min_size=2, max_size=6),
)
def test_an_exact_budget_is_used_up_within_the_caps(
    budget: int, alpha: float, partitions: list[tuple[int, float]]
) -> None:
    caps = [cap for cap, _ in partitions]
    counts = allocate_exactly([score for _, score in partitions[1:]], budget, alpha, caps)
    assert sum(counts) == min(budget, sum(caps))
    assert all(0 <= count <= cap for count, cap in zip(counts, caps, strict=True))
    assert counts[0] >= min(int(alpha * budget), caps[0])


@pytest.mark.parametrize(
    ("partitions", "rate", "counts"),
    [  # spec 2.3: T, and the halves that full picture and sub-images get
        (5, 0.1, (288, 144, 144)),
        (5, 0.2, (576, 288, 288)),
        (5, 0.4, (1152, 576, 576)),
        (4, 0.1, (230, 115, 115)),
        (4, 0.2, (460, 230, 230)),
        (3, 0.4, (691, 345, 346)),
    ],
)
def test_budgets_of_the_published_settings(partitions: int, rate: float, counts: tuple[int, int, int]) -> None:
    budget = token_budget(partitions * N, rate)
    assert budget == counts[0]
    only = torch.zeros(partitions - 1)
    only[0] = 1
    found = allocate(only, budget, 0.5, [N] * partitions)
    assert found == [counts[1], counts[2], *[0] * (partitions - 2)]


def test_the_official_budget_is_truncated_in_single_precision() -> None:
    assert token_budget(5 * N, 0.7) == 2015
    # 53 of 100 parts of 100 tokens: 0.53 in single precision is below 0.53.
    assert allocate(torch.tensor([53.0, 47.0]), 100, 0.0, [N] * 3) == [0, 52, 47]
    # What is cut off by a cap is lost, what alpha cannot use goes on to the sub-images, zeros count as even.
    assert allocate(torch.tensor([9.0, 1.0]), 1000, 0.0, [N] * 3) == [0, 576, 100]
    assert allocate(torch.tensor([1.0, 1.0]), 1152, 1.0, [N] * 3) == [576, 288, 288]
    assert allocate(torch.zeros(2), 100, 0.5, [N] * 3) == [50, 25, 25]


def test_scores_of_sub_images_by_hand() -> None:
    attention = torch.arange(16.0)  # a 4 x 4 map
    wide, square = Partitions(4, (1, 2), (10, 20), 8), Partitions(4, (2, 2), (10, 10), 8)
    left = sum(float(attention[4 * row + column]) for row in range(4) for column in (0, 1))
    assert sub_image_scores(attention, wide, "mass").tolist() == [left, 120 - left]
    assert sub_image_scores(attention, square, "mass").tolist() == [10, 18, 42, 50]
    assert sub_image_scores(attention, square, "count", top_cells=5).tolist() == [0, 0, 2, 3]
    # 100 of 576 is 3 of 16.
    assert sub_image_scores(attention, square, "count").tolist() == [0, 0, 1, 2]
    assert sub_image_scores(attention, square, "legacy_chunks", alpha=0.5).tolist() == [0, 0, 4, 4]
    assert sub_image_scores(attention, square, "even").tolist() == [1, 1, 1, 1]
    # Without padding the true regions are the equal blocks.
    torch.testing.assert_close(
        sub_image_scores(attention, square, "mass", geometry=True), torch.tensor([10.0, 18, 42, 50])
    )
    # 3 tiles on 4 cells: each tile has a cell and a third.
    three = sub_image_scores(torch.ones(16), Partitions(4, (1, 3), (8, 24), 8), "mass")
    torch.testing.assert_close(three, torch.full((3,), 16 / 3))


def test_geometry_follows_the_padding() -> None:
    # 300 x 600 on a canvas of 3 x 1 tiles would be odd; 3 tiles across, the picture 2.5 tiles wide, padded by 1/4 tile.
    layout = Partitions(4, (1, 3), (40, 100), 40)
    _, across = layout.weights()
    shares = (across.sum(dim=1) / 4).tolist()
    assert shares == pytest.approx([0.3, 0.4, 0.3])
    boxes = layout.regions()
    assert boxes[1:, 0].tolist() == pytest.approx([-10, 30, 70])
    assert boxes[1:, 2].tolist() == pytest.approx([30, 70, 110])
    assert boxes[0].tolist() == [0, 0, 100, 40]


@pytest.mark.parametrize(
    ("height", "width", "grid", "length"),
    [  # spec 2.1, measured
        (672, 672, (2, 2), 2928),
        (480, 640, (2, 2), 2340),
        (640, 480, (2, 2), 2352),
        (2200, 1700, (2, 2), 2448),
        (300, 1000, (1, 3), 2182),
        (1000, 300, (3, 1), 2232),
        (336, 336, (1, 2), 1176),
        (200, 900, (1, 3), 1744),
    ],
)
def test_lengths_of_whole_sequences(height: int, width: int, grid: tuple[int, int], length: int) -> None:
    layout = Partitions(24, grid, (height, width), newlines=True)
    assert layout.full_length == length
    everything = torch.ones(layout.count, N, dtype=torch.bool)
    numbers, places = layout.sequence(everything, "all")
    assert len(numbers) == length
    assert places.tolist() == list(range(length))
    assert int((numbers == NEWLINE).sum()) == layout.newline_count
    assert sorted(numbers[numbers != NEWLINE].tolist()) == layout.valid.flatten().nonzero()[:, 0].tolist()


def test_tokens_of_neighbouring_sub_images_interleave() -> None:
    layout = Partitions(2, (1, 2), (4, 8), 4)
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1, 1] = False
    numbers, _ = layout.sequence(keep)
    # The full picture, then the mosaic's first row (4 5 | 8 9) without 5, then its second.
    assert numbers.tolist() == [0, 1, 2, 3, 4, 8, 9, 6, 7, 10, 11]


def test_the_legacy_rounding_of_the_unpadded_mosaic() -> None:
    # 95 / 304 * 48 is 15, and a hair less in single precision.
    assert Partitions(24, (2, 2), (95, 304)).crop == (16, 32, 0, 48)
    assert Partitions(24, (2, 2), (95, 304), rounding="legacy").crop == (17, 31, 0, 48)


def test_the_highest_of_each_partition_stay() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.4, -torch.inf, 0.3, 0.2]])
    assert keep_highest(scores, [2, 4]).tolist() == [[False, True, True, False], [True, False, True, True]]
    assert keep_highest(scores, [0, 1]).tolist() == [[False] * 4, [True, False, False, False]]


def test_selection_needs_no_model() -> None:
    """All of the paper's algorithm by hand: four sub-images of 2 x 2 tokens, a budget of 10 of 20."""
    layout = Partitions(2, (2, 2), (4, 4), 2)
    early = torch.tensor([0.125, 0.0, 0.5, 0.375])
    late = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [9, 9, 9, 9], [5, 6, 7, 8], [1, 0, 3, 2]])
    keep = select_tokens(early, late, layout, HiredConfig.preset("paper", budget=0.5))
    # 5 for the full picture, cut to 4, no more of it is lost than the cap takes; shares of 6: .75, 0, 3, 2.25.
    assert keep.tolist() == [
        [True] * 4,
        [False] * 4,
        [False] * 4,
        [False, True, True, True],
        [False, False, True, True],
    ]
    exact = select_tokens(early, late, layout, HiredConfig.preset("exact", budget=0.5))
    # The one that truncation left goes by the largest share of it.
    assert exact.sum(dim=1).tolist() == [4, 0, 0, 4, 2]
    with pytest.raises(InputError, match=r"does not fit 5 partitions of 4 tokens"):
        select_tokens(early, late[:3], layout, HiredConfig())


def test_padding_is_passed_over_where_it_is_known() -> None:
    layout = Partitions(6, (2, 2), (30, 60), 24)  # twice as wide as high: half of the mosaic's rows are padding
    late = torch.zeros(5, 36)
    late[:, :6] = 1.0  # the first row of each: padding in the upper sub-images
    early = torch.ones(36)
    aware = select_tokens(early, late, layout, HiredConfig.preset("exact", budget=0.2))
    assert not (aware & ~layout.valid).any()
    assert int(aware.sum()) == int(180 * 0.2)
    paper = select_tokens(early, late, layout, HiredConfig.preset("paper", budget=0.2))
    assert (paper & ~layout.valid).any()
    assert len(layout.sequence(paper)[0]) < int(180 * 0.2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(PRESETS)), st.floats(0.03, 0.99), st.floats(0, 1))
def test_a_budget_is_never_exceeded(seed: int, preset: str, budget: float, alpha: float) -> None:
    draw = np.random.default_rng(seed)
    rows, columns = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)][seed % 5]
    size = tuple(int(side) for side in draw.integers(20, 200, 2))
    config = HiredConfig.preset(preset, budget=budget, alpha=alpha)
    layout = Partitions(6, (rows, columns), size, 24, newlines=True)  # type: ignore[arg-type]
    early = torch.from_numpy(draw.exponential(size=36).astype(np.float32))
    late = torch.from_numpy(draw.exponential(size=(layout.count, 36)).astype(np.float32))
    keep = select_tokens(early, late, layout, config)
    most = token_budget(layout.candidates, budget)
    if config.exact_budget:
        assert int(keep.sum()) == min(most, int(layout.valid.sum()))
    else:
        assert int(keep.sum()) <= most
    # In each partition the kept ones are the highest.
    for own, scores, valid in zip(keep, late, layout.valid, strict=True):
        pool = scores[valid & ~own] if config.pad_aware else scores[~own]
        if own.any() and len(pool):
            assert float(scores[own].min()) >= float(pool.max())


def test_options_are_checked() -> None:
    assert HiredConfig.from_official({"token_budget_rate": 0.4}).alpha == 1.0
    assert HiredConfig.from_official({"token_budget_rate": 0.4, "alpha": 0.5}).allocation == "count"
    with pytest.raises(InputError, match="use the strategy 'spatial'"):
        HiredConfig.from_official({"spatial_budget": 0.2})
    for options, sentence in (
        ({"allocation": "masss"}, "did you mean 'mass'"),
        ({"top_cells": 0}, "at least 1, not 0"),
        ({"init_layer": None}, "at least 0, not None"),
        ({"pad_aware": 1}, "true or false, not 1"),
    ):
        with pytest.raises(InputError, match=sentence):
            HiredConfig.preset("exact", **options)
