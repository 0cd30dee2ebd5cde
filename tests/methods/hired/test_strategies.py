"""Strategies beside HiRED, each on a case worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.errors import InputError
from foveate.methods.hired.partitions import Partitions
from foveate.methods.hired.strategies import PictureTokens, TowerFacts, make_strategy
from foveate.methods.hired.strategies.prumerge import merge, outlier_ratio, outliers
from foveate.vision.attention_taps import AttentionTap

TOWER = TowerFacts(num_layers=3, feature_layer=1, has_cls=True)


def picture_of(layout: Partitions, *, width: int = 4, taps: Any = None) -> PictureTokens:
    torch.manual_seed(0)
    return PictureTokens(torch.randn(layout.count, layout.cells, width), TOWER, layout, taps or {})


def test_random_tokens_are_as_many_as_the_budget_and_none_of_padding() -> None:
    layout = Partitions(6, (2, 2), (30, 60), 24)
    keep = make_strategy("random", 0.3).select(picture_of(layout)).keep
    assert int(keep.sum()) == int(180 * 0.3)
    assert not (keep & ~layout.valid).any()
    assert torch.equal(keep, make_strategy("random", 0.3).select(picture_of(layout)).keep)
    assert not torch.equal(keep, make_strategy("random", 0.3, seed=1).select(picture_of(layout)).keep)


def test_spatial_tokens_are_evenly_spaced() -> None:
    single = Partitions(4)
    keep = make_strategy("spatial", 0.25).select(picture_of(single)).keep
    assert keep.flatten().nonzero()[:, 0].tolist() == [2, 6, 10, 14]
    # The official form: int(576 * .2) = 115, a stride of 5, which overshoots where it rounds down.
    official = make_strategy("spatial", 0.2, form="stride").select(picture_of(Partitions(24))).keep
    assert official.flatten().nonzero()[:, 0].tolist() == list(range(0, 575, 5))
    assert len(make_strategy("spatial", 0.2, form="stride").select(picture_of(Partitions(24))).keep[0].nonzero()) == 115


def test_prumerge_by_hand() -> None:
    row = torch.tensor([0.01, 0.5, 0.01, 0.02, 0.3, 0.01, 0.02, 0.01])
    # Quartiles by linear interpolation of the sorted row: .01 and .09; outliers lie above .09 + 1.5 * .08 = .21.
    assert outlier_ratio(row) == 2 / 8
    assert outliers(row).tolist() == [1, 4]
    # Every int(int(1 / .25) / 3) = 1st of the first seven besides.
    assert sorted(outliers(row, plus=True).tolist()) == list(range(7))
    features = torch.eye(8)
    merged = merge(features, row, torch.randn(8, 3), torch.tensor([1, 4]))
    # With fewer than 32 others all of them are neighbours.
    wanted = row.clone()
    wanted[1] = 1.0
    torch.testing.assert_close(merged[0], wanted)
    rest = row.clone()
    rest[[1, 4]] = 0
    torch.testing.assert_close(merged[2], rest)
    assert outliers(torch.ones(8)).shape == (1,)  # no outlier


@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
def test_prumerge_keeps_to_the_budget(name: str) -> None:
    layout = Partitions(6, (1, 2), (24, 48), 24)
    torch.manual_seed(1)
    tap = AttentionTap(torch.randn(3, 8), torch.randn(3, 37, 8), 2, 0.5)
    strategy = make_strategy(name, 0.3)
    assert strategy.layers(TOWER) == (2,)
    selection = strategy.select(picture_of(layout, taps={2: tap}))
    assert selection.features is not None
    assert len(selection.features) == int(108 * 0.3) == 32
    # One token of each partition is of those that were not kept.
    assert int(selection.keep.sum()) == 32 - 3
    with pytest.raises(InputError, match="needs at least 2"):
        make_strategy(name, 0.03).select(picture_of(layout, taps={2: tap}))
    with pytest.raises(InputError, match="no original positions"):
        make_strategy(name, 0.3, positions="original")
