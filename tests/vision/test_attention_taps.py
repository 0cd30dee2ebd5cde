"""Taps of the class row: against transformers' own attention maps, on every tower that has separate projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.errors import InputError
from foveate.vision.attention_taps import AttentionTap, tap_attention
from foveate.vision.towers import VisionTower, build_tower

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}


def make_tower(kind: str) -> VisionTower:
    from transformers import AutoConfig

    torch.manual_seed(0)
    tower = build_tower(AutoConfig.for_model(kind, **SIZES))
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return tower


@pytest.mark.parametrize("kind", ["clip_vision_model", "vit", "dinov2"])
def test_rows_are_those_of_the_whole_maps(kind: str) -> None:
    tower = make_tower(kind)
    model: Any = tower.model
    values = torch.randn(2, 3, 16, 16)
    with tap_attention(tower, (0, 2)) as taps:
        before = tower(values, layers=(3,)).hidden_states
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(values, output_attentions=True).attentions
    for layer in (0, 2):
        torch.testing.assert_close(taps[layer].rows(), maps[layer][:, :, 0, 1:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(taps[layer].head_sum(), maps[layer][:, :, 0, 1:].sum(1), atol=1e-5, rtol=1e-4)
    # What is tapped changes nothing.
    model.set_attn_implementation("sdpa")
    assert torch.equal(tower(values, layers=(3,)).hidden_states, before)


def test_a_row_by_hand() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    tap = AttentionTap(query[:, 0], keys, 2, 0.5)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.view(2, 5, 2, 4), keys.view(2, 5, 2, 4)) / 2
    whole = scores.softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(tap.rows(), whole)
    torch.testing.assert_close(tap[1:].head_sum(), whole[1:].sum(1))
    # One softmax for all heads together, scaled by the whole width.
    full = (query[:, :1] @ keys.mT / 8**0.5).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(tap.full_width_row(), full)
    assert torch.equal(tap.patch_keys, keys[:, 1:])


def test_what_cannot_be_tapped_gets_a_sentence() -> None:
    tower = make_tower("clip_vision_model")
    values = torch.randn(1, 3, 16, 16)
    for layer in (3, -1, True):
        with pytest.raises(InputError, match="to tap; the tower has layers 0 to 2"), tap_attention(tower, (layer,)):
            pass
    with pytest.raises(InputError, match="did not run layer 2"), tap_attention(tower, (2,)):
        tower(values, layers=(2,))
    with pytest.raises(InputError, match="has no class token"), tap_attention(make_tower("siglip_vision_model"), (0,)):
        pass
    with pytest.raises(InputError, match="does not project queries and keys apart"):
        from transformers import Blip2VisionConfig

        with tap_attention(build_tower(Blip2VisionConfig(**SIZES)), (0,)):
            pass
    with pytest.raises(RuntimeError, match="broken"), tap_attention(tower, (0,)):
        raise RuntimeError("broken")
    assert not any(module._forward_hooks for module in tower.modules())
