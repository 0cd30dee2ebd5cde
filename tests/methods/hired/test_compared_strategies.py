"""VisionZip, VisPruner and DivPrune, each on a case that is computed by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.methods.hired.partitions import Partitions
from foveate.methods.hired.strategies import PictureTokens, TowerFacts, make_strategy
from foveate.methods.hired.strategies.divprune import farthest_tokens
from foveate.methods.hired.strategies.visionzip import contextual_tokens, split_budget
from foveate.methods.hired.strategies.vispruner import diverse_tokens
from foveate.vision.attention_taps import AttentionTap

TOWER = TowerFacts(num_layers=4, feature_layer=2, has_cls=True)


def directions(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def picture(
    attention: Sequence[Sequence[float]],
    features: Tensor,
    layout: Partitions,
    *,
    classes: Tensor | None = None,
    project: Tensor | None = None,
) -> PictureTokens:
    """A picture whose class rows rise with `attention`, which is also the first number of each key."""
    rows = torch.tensor(attention)
    keys = torch.stack([rows, torch.ones_like(rows)], dim=-1)
    keys = torch.cat([torch.zeros(len(rows), 1, 2), keys], dim=1)
    tap = AttentionTap(torch.tensor([[1.0, 0.0]]).expand(len(rows), -1), keys, num_heads=1, scale=1.0)
    return PictureTokens(
        features,
        TOWER,
        layout,
        {TOWER.feature_layer: tap},
        classes,
        None if project is None else lambda tokens: tokens * project,
    )


def test_visionzip_splits_budgets_as_published() -> None:
    assert [split_budget(tokens) for tokens in (192, 128, 64)] == [(162, 30), (108, 20), (54, 10)]
    assert [split_budget(tokens) for tokens in (1, 2, 10)] == [(1, 0), (1, 1), (8, 2)]


def test_contextual_tokens_take_in_the_mean_of_what_is_like_them() -> None:
    features = torch.tensor([[1.0], [10.0], [2.0], [20.0], [30.0]])
    # Centres are every second token, two of them; 1 and 3 point as the first does, 4 as the second.
    centres, merged = contextual_tokens(features, directions(0, 10, 90, 20, 80), 2)
    assert centres.tolist() == [0, 2]
    assert merged.tolist() == [[1 + (10 + 20) / 2], [2 + 30]]
    assert contextual_tokens(features, directions(0, 0, 0, 0, 0), 0)[1].shape == (0, 1)


def test_visionzip_keeps_class_token_dominant_and_contextual_tokens_in_its_order() -> None:
    layout = Partitions(2, (1, 2), (2, 4), 2)
    attention = [[0, 0, 5, 0], [0, 0, 0, 5], [5, 0, 0, 0]]
    features = torch.tensor([[1.0, 2, 4, 8], [10, 20, 40, 80], [100, 200, 400, 800]])[..., None]
    seen = picture(attention, features, layout, classes=torch.tensor([[-1.0], [-2], [-3]]))
    chosen = make_strategy("visionzip", 9 / 12).select(seen)
    assert chosen.features is not None
    # Of each partition 3: the class token, the dominant one, and the first of the rest with the mean of the other two.
    # The second sub-image's dominant token stands in the mosaic's upper row, before the first one's.
    expected = [-1, 4, 1 + (2 + 8) / 2, 100, 80, -2, -3, 10 + (20 + 40) / 2, 200 + (400 + 800) / 2]
    assert chosen.features.flatten().tolist() == expected
    assert chosen.keep.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    # Without class tokens, as many tokens: another dominant one stands in.
    bare = make_strategy("visionzip", 9 / 12).select(picture(attention, features, layout))
    assert bare.features is not None
    assert len(bare.features) == 9
    with pytest.raises(InputError, match="less than a token for each of the 3 partitions"):
        make_strategy("visionzip", 2 / 12).select(seen)


def test_diverse_tokens_are_what_pruning_leaves() -> None:
    tokens = directions(0, 10, 90, 95, 200, 300)
    # 0 is close to 1 and 2 to 3; 4 is close to no token of an odd place.
    assert diverse_tokens(tokens, 4).tolist() == [1, 3, 4, 5]
    assert diverse_tokens(tokens, 5).tolist() == [0, 1, 3, 4, 5]
    # A round removes no more than there are even places: all of 0, 2, 4, then 1 and 5.
    assert diverse_tokens(tokens, 1).tolist() == [3]
    assert diverse_tokens(tokens, 0).tolist() == []
    assert len(diverse_tokens(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), 31)) == 31


def test_vispruner_takes_half_by_attention_and_half_by_difference_in_each_partition() -> None:
    # A wide picture in a square grid of one: its upper and lower rows are padding and are never chosen.
    layout = Partitions(3, (1, 1), (1, 3), 3)
    assert layout.valid.tolist()[1] == [False] * 3 + [True] * 3 + [False] * 3
    attention = [[1.0, 2, 3, 4, 5, 9, 8, 7, 6], [9.0] * 3 + [1, 3, 2] + [9] * 3]
    angles = torch.stack([directions(0, 40, 90, 95, 50, 180, 5, 270, 210), directions(*[0] * 9)])
    chosen = make_strategy("vispruner", 6 / 18).select(picture(attention, angles, layout))
    # The first partition gets 3: one by attention (5), then two of 6 7 8 4 3 2 1 0, at 5 270 210 50 95 90 40 0 degrees.
    # Even places 6, 8, 3, 1 are close to odd 0, 7, 2, 4 by 5, 60, 5, 10 degrees: all four go. Of 7, 4, 2, 0 at 270, 50,
    # 90, 0 degrees the even places 7 and 2 go.
    assert chosen.keep[0].nonzero()[:, 0].tolist() == [0, 4, 5]
    assert chosen.keep[1].nonzero()[:, 0].tolist() == [3, 4, 5]
    one = make_strategy("vispruner", 6 / 18, important=1).select(picture(attention, angles, layout))
    assert one.keep[0].nonzero()[:, 0].tolist() == [5, 6, 7]


def test_divprune_takes_the_farthest_again_and_again() -> None:
    assert farthest_tokens(directions(0, 10, 90, 180), 3).tolist() == [3, 0, 2]
    assert farthest_tokens(directions(5), 1).tolist() == [0]
    # Equal tokens are each taken once.
    assert sorted(farthest_tokens(directions(0, 0, 0), 3).tolist()) == [0, 1, 2]


def test_divprune_looks_at_what_the_language_model_reads_of_all_partitions() -> None:
    layout = Partitions(2, (1, 1), (1, 1), 2)
    features = torch.stack([directions(0, 10, 20, 85), directions(30, 60, 170, 80)])
    seen = picture([[0.0] * 4] * 2, features, layout)
    # 170 degrees is farthest from its neighbour, 85, and 0 is farthest from 170.
    assert make_strategy("divprune", 2 / 8).select(seen).keep.flatten().nonzero()[:, 0].tolist() == [0, 6]
    # A projector that drops the second number leaves two directions, of which 170 degrees is alone on its side.
    flat = picture([[0.0] * 4] * 2, features, layout, project=torch.tensor([1.0, 0.0]))
    chosen = make_strategy("divprune", 2 / 8).select(flat).keep.flatten().nonzero()[:, 0].tolist()
    assert chosen == [0, 6]


def test_every_strategy_keeps_the_same_number_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = Partitions(4, (2, 2), (5, 5), 4)
    attention = torch.randn(5, 16, generator=generator).tolist()
    seen = picture(attention, torch.randn(5, 16, 6, generator=generator), layout)
    for name in ("random", "spatial", "visionzip", "vispruner", "divprune"):
        chosen = make_strategy(name, 0.3).select(seen)
        assert int(chosen.keep.sum()) == int(80 * 0.3), name
        if chosen.features is not None:
            assert len(chosen.features) == 24
