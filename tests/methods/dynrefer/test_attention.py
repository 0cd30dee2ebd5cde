"""Where the model read: cross-attention as shares of cells, and of the patches of each view."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import InputError
from foveate.methods.dynrefer.attention import Attention, tap_qformer
from foveate.methods.dynrefer.modeling import DynReferModel, RecognitionHead
from foveate.methods.dynrefer.predictor import DynReferPredictor
from foveate.methods.dynrefer.processing import CLASS_TEMPLATE, DynReferProcessor
from foveate.methods.dynrefer.results import Regions
from foveate.methods.dynrefer.views import build_views

BOXES = [[20, 10, 50, 30], [50, 40, 95, 75], [5.5, 6.25, 18, 70], [0, 0, 96, 80]]


@pytest.fixture(scope="module")
def regions(predictor: DynReferPredictor, photo: Image.Image) -> Regions:
    return described(predictor, photo, boxes=BOXES, attention=True)


def described(predictor: DynReferPredictor, image: Image.Image, **options: Any) -> Regions:
    found = predictor(image, **options)
    assert isinstance(found, Regions)
    return found


def describer(model: DynReferModel, processor: DynReferProcessor) -> Any:
    """Of any type, because what a call gives depends on what it is given."""
    return DynReferPredictor(model, processor)


def made(cells: list[list[float]], in_patches: list[float], whole: float = 0.0) -> Attention:
    """Of one view."""
    return Attention(
        tasks=("tags",),
        query="region",
        word=None,
        cells=np.array(cells, np.float32),
        whole=whole,
        coefficients=(0.0,),
        boxes=((0, 0, 8, 8),),
        _in_patches=np.array([in_patches], np.float32),
    )


class TestMaps:
    def test_a_cell_goes_to_the_patches_that_it_was_sampled_from(self) -> None:
        # Samples of the first bin lie at 0.25 and 0.75 of patches whose values stand at 0 and 1: half and half. Those
        # of the second at 1.25 and 1.75, beyond the last value: all of it.
        whole_view = [0.0, 0.0, 2.0, 2.0]
        np.testing.assert_allclose(made([[1, 0], [0, 0]], whole_view).in_view(0), np.full((2, 2), 0.25))
        np.testing.assert_allclose(made([[0, 1], [0, 0]], whole_view).in_view(0), [[0, 0.5], [0, 0.5]])
        np.testing.assert_allclose(made([[0, 0], [0, 0.5]], whole_view, 0.5).in_view(0), [[0, 0], [0, 0.5]])
        # A region one patch wide, the third of four, one patch high, the first: samples at 2.125 .. 2.875 and at
        # 0.125 .. 0.875 of four bins.
        cells = np.zeros((4, 4), np.float32)
        cells[0, 0] = 1
        along = np.array([1 - (0.0625 + 0.1875) / 2, (0.0625 + 0.1875) / 2])
        expected = np.zeros((4, 4))
        expected[:2, 2:] = np.outer(along, along)
        found = made(cells.tolist(), [2.0, 0.0, 3.0, 1.0]).in_view(0)
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_heat_is_opaque_where_most_was_read(self) -> None:
        heat = np.asarray(made([[0, 0.6], [0, 0.2]], [0.0, 0.0, 2.0, 2.0], 0.2).heat(0))
        # Rows: half of 0.6, and the other half with 0.2.
        assert heat[..., 3].tolist() == [[0, round(255 * 0.3 / 0.5)], [0, 255]]
        assert heat[1, 1, :3].tolist() == [255, 0, 0]
        assert np.asarray(made([[0, 0], [0, 0]], [0.0, 0.0, 2.0, 2.0], 1.0).heat(0)).max(axis=(0, 1))[3] == 0

    def test_shares_add_up_to_one(self, regions: Regions) -> None:
        for region in regions:
            for own in region.attention:
                assert own.cells.min() >= 0
                assert own.cells.sum() + own.whole == pytest.approx(1, abs=1e-5)
                for view in range(3):
                    assert own.in_view(view).sum() == pytest.approx(1 - own.whole, abs=1e-5)


class TestQueries:
    def test_by_hand_in_a_head_of_one_layer(self) -> None:
        """Two heads of one number each: q = (1, 2), keys (0, 0) and (ln 3, 0)."""
        head = RecognitionHead(2, 1, 2)
        attention = head.encoder["layer"][0].crossattention  # pyright: ignore[reportIndexIssue]
        with torch.no_grad():
            for name in ("query", "key"):
                attention.self[name].weight.copy_(torch.eye(2))
                attention.self[name].bias.zero_()
        memory = torch.tensor([[[0.0, 0.0], [float(np.log(3)), 0.0]]])
        with torch.no_grad():
            found = head.attention(torch.tensor([[1.0, 2.0]]), memory)
        # The first head weighs 1 : 3, the second cannot tell them apart.
        torch.testing.assert_close(found, torch.tensor([[(0.25 + 0.5) / 2, (0.75 + 0.5) / 2]]))

    def test_equal_keys_are_read_alike(
        self, tiny_model: DynReferModel, processor: DynReferProcessor, photo: Image.Image
    ) -> None:
        model = copy.deepcopy(tiny_model)
        for name, module in model.qformer.named_modules():
            if name.endswith("crossattention.attention"):
                torch.nn.init.zeros_(module.key.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        region = described(DynReferPredictor(model, processor), photo, boxes=BOXES[:1], attention=True)[0]
        for own in region.attention:
            assert own.whole == pytest.approx(1 / 17)
            np.testing.assert_allclose(own.cells, np.full((4, 4), 1 / 17), rtol=1e-5)

    def test_equals_eager_attention_of_the_whole_model(
        self, make_model: Callable[..., DynReferModel], processor: DynReferProcessor, photo: Image.Image
    ) -> None:
        """transformers' own attention weights of two layers with cross-attention, and those of the head written out."""
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        model = make_model(qformer_config=sizes)
        region = described(DynReferPredictor(model, processor), photo, boxes=BOXES[1:2], attention=True)[0]
        eager = copy.deepcopy(model)
        eager.qformer.set_attn_implementation("eager")
        kept: list[Tensor] = []

        def keep(_module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            kept.append(output[1].mean(dim=1))

        for name, module in eager.qformer.named_modules():
            if name.endswith("crossattention.attention"):
                module.register_forward_hook(keep)
        category = region.category
        assert category is not None
        wanted = {own.query: own for own in region.attention if "category" in own.tasks}
        batch = build_views(photo, np.array(BOXES[1:2]), np.array(wanted["category"].coefficients), 56)
        with torch.no_grad():
            tokens = eager.encode_views(processor.pixel_values(batch.crops[batch.view_index[0]]))
            queries = eager.encode_regions(tokens, torch.from_numpy(batch.region_boxes))
            assert len(kept) == 2  # the first layer and the third
            read = (kept[0][0] + kept[1][0]) / 2
            memory = eager.attr_vision_proj(queries)
            hidden = eager.attr_text_proj(
                eager.encode_text(*processor.text_ids([CLASS_TEMPLATE.format(category.lower())]))
            )
            heads = []
            for layer in eager.attr_head.encoder["layer"]:  # pyright: ignore[reportGeneralTypeIssues]
                projections = layer.crossattention.self
                q, k = projections["query"](hidden[None])[0, 0], projections["key"](memory)[0]
                for head in range(4):
                    part = slice(4 * head, 4 * head + 4)
                    heads.append(torch.softmax(k[:, part] @ q[part] / 2, dim=0))
                hidden = layer(hidden[None], memory, 0.0)[0]
        assert len(heads) == 8
        expected = {"region": read.mean(dim=0), "category": torch.stack(heads).mean(dim=0) @ read}
        assert not torch.allclose(expected["region"], expected["category"], atol=1e-4)
        for query, shares in expected.items():
            assert wanted[query].whole == pytest.approx(float(shares[0]), abs=1e-5)
            np.testing.assert_allclose(wanted[query].cells.flatten(), shares[1:].numpy(), atol=1e-5)
        assert wanted["category"].word == category

    def test_words_and_views_are_those_of_the_region(self, regions: Regions) -> None:
        for region in regions:
            queries = [(own.query, own.word) for own in region.attention]
            best = region.tags[0] if region.tags else max(region.tag_scores, key=region.tag_scores.__getitem__)
            assert sorted(queries, key=str) == sorted(
                [("region", None), ("category", region.category), ("region", None), ("tag", best)], key=str
            )
            seen = {(view.t, view.box): view for view in region.views}
            for own in region.attention:
                assert len(own.boxes) == 3
                for t, box in zip(own.coefficients, own.boxes, strict=True):
                    assert set(own.tasks) <= set(seen[t, box].tasks)

    def test_only_what_was_asked_has_a_query(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        region = described(
            predictor, photo, boxes=BOXES[:1], tasks=["caption", "attributes"], views=[0.3, 0.5], attention=True
        )[0]
        assert [(own.query, own.tasks) for own in region.attention] == [("region", ("caption", "attributes"))]


class TestCalls:
    def test_nothing_else_changes(self, regions: Regions, predictor: DynReferPredictor, photo: Image.Image) -> None:
        plain = described(predictor, photo, boxes=BOXES)
        assert plain.regions == regions.regions  # every number to the last bit
        assert all(region.attention == () for region in plain)
        assert not any(module._forward_hooks for module in predictor.model.modules())

    def test_many_regions_are_as_one_by_one(
        self, regions: Regions, predictor: Any, photo: Image.Image, wide_photo: Image.Image
    ) -> None:
        several = predictor([photo, wide_photo], [BOXES[:3], [[10, 5, 60, 60]]], attention=True, batch_size=2)
        alone = described(predictor, wide_photo, boxes=[[10, 5, 60, 60]], attention=True)
        assert isinstance(several, list)
        for found, expected in zip([*several[0], *several[1]], [*regions[:3], *alone], strict=True):
            for one, other in zip(found.attention, expected.attention, strict=True):
                assert (one.query, one.word, one.boxes) == (other.query, other.word, other.boxes)
                assert one.whole == pytest.approx(other.whole, abs=1e-5)
                for view in range(3):
                    np.testing.assert_allclose(one.in_view(view), other.in_view(view), atol=1e-5)

    def test_another_threads_regions_are_not_read(self, tiny_model: DynReferModel) -> None:
        fused = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))

        def run(rows: Tensor) -> None:
            with torch.no_grad():
                queries = tiny_model.query_tokens.expand(len(rows), -1, -1)
                tiny_model.qformer(query_embeds=queries, encoder_hidden_states=rows)

        with tap_qformer(tiny_model.qformer) as alone:
            run(fused[:1])
        with tap_qformer(tiny_model.qformer) as beside:
            run(fused[:1])
            other = threading.Thread(target=run, args=(fused,))
            other.start()
            other.join()
        torch.testing.assert_close(beside.take(), alone.take(), rtol=0, atol=0)

    def test_one_view_and_no_align_module(
        self, make_model: Callable[..., DynReferModel], processor: DynReferProcessor, photo: Image.Image
    ) -> None:
        predictor = DynReferPredictor(make_model(num_views=1, align=False), processor)
        [own, *_] = described(predictor, photo, boxes=BOXES[:1], attention=True)[0].attention
        assert own.boxes == ((20, 10, 50, 30),)
        assert own.in_view(0).sum() == pytest.approx(1 - own.whole, abs=1e-5)


class TestPictures:
    def test_a_row_for_each_query(self, regions: Regions) -> None:
        picture = regions[:2].plot_attention(side=40)
        assert picture.size == (8 + 3 * 48, 8 + 8 * (40 + 36 + 8))
        red = np.asarray(picture).astype(int)
        assert ((red[..., 0] - red[..., 2]) > 100).sum() > 1000

    def test_regions_without_attention(self, predictor: Any, photo: Image.Image) -> None:
        with pytest.raises(InputError, match="region 1 has no attention"):
            described(predictor, photo, boxes=BOXES[:1], tasks=["category"]).plot_attention()
