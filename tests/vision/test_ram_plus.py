"""RAM++: values are compared with the official modules in tests/methods/mg_llava/test_golden.py; here its structure."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import CheckpointError
from foveate.vision.ram_plus import RamPlus, Swin, SwinBlock, clean_keys


def make() -> RamPlus:
    torch.manual_seed(0)
    swin = Swin(48, 12, (2, 2), (2, 4), 6)
    model = RamPlus(swin, tags=5, descriptions=3, projected=16, hidden=24, heads=4)
    torch.nn.init.normal_(model.label_embed)
    return model.eval()


def test_the_released_size() -> None:
    with torch.device("meta"):
        model = RamPlus(Swin())
        assert tuple(model.image_embeds(torch.empty(1, 3, 384, 384)).shape) == (1, 145, 512)
    assert tuple(model.label_embed.shape) == (4585 * 51, 512)
    # Swin-L without its classifier has 195.0 million weights.
    assert sum(p.numel() for p in model.visual_encoder.parameters()) / 1e6 == pytest.approx(195.2, abs=0.3)


def test_shifted_windows_do_not_join_opposite_edges() -> None:
    block = SwinBlock(8, 2, grid=8, window=4, shifted=True)
    tokens = torch.randn(1, 64, 8, requires_grad=True)
    out = block(tokens)
    # The token of the upper left corner shares its shifted window with cells of the last rows only by the roll.
    out[0, 0].sum().backward()
    assert tokens.grad is not None
    # What is masked keeps a share of e^-100.
    reached = tokens.grad[0].abs().sum(-1).reshape(8, 8) > 1e-12
    assert reached[:2, :2].all()
    assert not reached[2:].any()
    assert not reached[:, 2:].any()


def test_a_tag_follows_its_likeliest_description() -> None:
    model = make()
    embeds = model.image_embeds(torch.randn(2, 3, 48, 48))
    with torch.no_grad():
        model.reweight_scale.fill_(20.0)  # as good as the maximum
        queries = model.label_queries(embeds)
        mean = torch.nn.functional.normalize(embeds[:, 0], dim=-1)
        best = (mean @ model.label_embed.T).unflatten(1, (5, 3)).argmax(-1)
        expected = model.label_embed.unflatten(0, (5, 3))[torch.arange(5), best]
    torch.testing.assert_close(queries, expected, atol=1e-4, rtol=1e-4)


def test_embeddings_may_stay_in_half_precision() -> None:
    model = make()
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model(pixels)
        model.label_embed.data = model.label_embed.data.half()
        torch.testing.assert_close(model(pixels), expected, atol=2e-2, rtol=2e-2)


def test_keys_of_files_old_and_new() -> None:
    model = make()
    state = {key.replace("tagging_head.", "vision_multi."): value for key, value in model.state_dict().items()}
    state["reweight_scale"] = state["reweight_scale"].reshape(1)
    state["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    state["visual_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1)
    cleaned, unused = clean_keys(state)
    assert len(unused) == 2
    model.load_state_dict(cleaned)
    with pytest.raises(CheckpointError, match="1 keys are not RAM\\+\\+'s: other"):
        clean_keys({**state, "other": torch.zeros(1)})
