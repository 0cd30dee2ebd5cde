"""The describer on a tiny random model: what goes in, in which order it comes out, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import foveate
from foveate.errors import CheckpointError, InputError
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.predictor import STAGES, TASKS, DynReferPredictor
from foveate.methods.dynrefer.processing import DynReferProcessor, Vocabulary, control_text
from foveate.methods.dynrefer.results import Region, Regions, Report
from foveate.methods.dynrefer.views import build_views, search_views
from foveate.vision.images import encode_rle

BOXES = [[20, 10, 50, 30], [50, 40, 95, 75], [5.5, 6.25, 18, 70], [0, 0, 96, 80]]
WIDE_BOXES = [[10, 5, 60, 60]]


def numbers(region: Region) -> np.ndarray:
    values = [region.caption_score, *region.tag_scores.values(), *region.attribute_scores.values()]
    return np.array([*values, *region.category_scores.values()], dtype=float)


def assert_same(found: Region, expected: Region, tolerance: float = 1e-4) -> None:
    assert found.box == expected.box
    assert found.caption == expected.caption
    np.testing.assert_allclose(numbers(found), numbers(expected), atol=tolerance)
    assert found.views == expected.views
    assert found.category == expected.category


class TestAnswers:
    def test_everything_of_a_region(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        regions = predictor(photo, boxes=BOXES)
        assert isinstance(regions, Regions)
        assert [region.box for region in regions] == [tuple(map(float, box)) for box in BOXES]
        vocabulary = predictor.processor.vocabulary
        for region in regions:
            assert region.caption
            assert region.caption_score is not None
            assert 0 < region.caption_score <= 1
            assert tuple(region.tag_scores) == vocabulary.tags
            assert tuple(region.attribute_scores) == tuple(item.name for item in vocabulary.attributes)
            assert tuple(region.category_scores) == vocabulary.classes
            assert sum(region.category_scores.values()) == pytest.approx(1, abs=1e-5)
            assert region.category is not None
            assert region.category == max(region.category_scores, key=region.category_scores.__getitem__)
            assert region.category_score == region.category_scores[region.category]
            assert all(0 <= value <= 1 for value in numbers(region))
            above = [tag for tag in vocabulary.tags if region.tag_scores[tag] > predictor.model.config.tag_threshold]
            assert list(region.tags) == sorted(above, key=lambda tag, scores=region.tag_scores: -scores[tag])
            assert region.score is None
        assert len({region.caption for region in regions}) > 1
        json.dumps(regions.to_dict())

    def test_equals_the_model_step_by_step(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        """One region by hand: crops, region tokens, heads, and a caption steered by the tags found."""
        model, processor = predictor.model, predictor.processor
        region = predictor(photo, boxes=BOXES[:1], views=[0.3, 0.5])[0]
        assert isinstance(region, Region)
        batch = build_views(photo, np.array(BOXES[:1]), np.array([0, 0.3, 0.5]), 56)
        with torch.no_grad():
            tokens = model.encode_views(processor.pixel_values(batch.crops[batch.view_index[0]]))
            queries = model.encode_regions(tokens, torch.from_numpy(batch.region_boxes))
            tags = torch.sigmoid(
                model.tag_logits(queries, model.encode_text(*processor.text_ids(list(region.tag_scores))))
            )
            prompts = model.encode_text(*processor.text_ids([f"the {name.lower()}" for name in region.category_scores]))
            scaled = model.attr_t.exp() * model.text_logits(queries, prompts) + model.attr_b
            control = processor.language_ids([control_text(region.tags)])
            generated = model.generate(queries, *control)
        np.testing.assert_allclose(list(region.tag_scores.values()), tags[0], atol=1e-5)
        np.testing.assert_allclose(list(region.category_scores.values()), scaled.softmax(dim=1)[0], atol=1e-5)
        assert region.caption == processor.decode(generated.sequences)[0]
        assert region.caption_score == pytest.approx(generated.scores.item(), abs=1e-6)

    def test_views_by_task(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        """By default attributes and classes look close, tags and captions wide; the region itself serves all."""
        views = predictor(photo, boxes=BOXES[:1])[0].views  # pyright: ignore[reportAttributeAccessIssue]
        assert {view.t: set(view.tasks) for view in views} == {
            0.0: set(TASKS),
            0.1: {"attributes", "category"},
            0.2: {"attributes", "category"},
            0.3: {"caption", "tags"},
            0.5: {"caption", "tags"},
        }
        assert views[0].box == (20, 10, 50, 30)
        assert views[-1].box == (10, 5, 73, 55)

    def test_grouping_does_not_change_the_answers(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        """All tasks at once, through their own views, give what each gives alone."""
        together = predictor(photo, boxes=BOXES)
        for task, field in (
            ("tags", "tag_scores"),
            ("attributes", "attribute_scores"),
            ("category", "category_scores"),
        ):
            alone = predictor(photo, boxes=BOXES, tasks=task)
            for one, other in zip(together, alone, strict=True):
                assert isinstance(one, Region)
                assert isinstance(other, Region)
                found, expected = getattr(one, field), getattr(other, field)
                assert found == pytest.approx(expected, abs=1e-5)
                assert other.caption is None
        captions = predictor(photo, boxes=BOXES, tasks="captions")
        assert [region.caption for region in captions] == [region.caption for region in together]  # pyright: ignore
        assert all(not region.tags for region in captions)  # pyright: ignore[reportAttributeAccessIssue]

    def test_what_runs_together_does_not_change_the_answers(
        self, predictor: DynReferPredictor, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Region tokens of all groups of tasks at once or one by one, texts at once or by twos."""
        passes: list[int] = []
        model = predictor.model
        original = model.encode_regions
        monkeypatch.setattr(model, "encode_regions", lambda *a: passes.append(len(a[1])) or original(*a))
        together = predictor(photo, boxes=BOXES)
        assert passes == [8]  # four regions for two groups of tasks
        monkeypatch.setattr("foveate.methods.dynrefer.predictor._FEW_REGIONS", 7)
        monkeypatch.setattr("foveate.methods.dynrefer.predictor._TEXTS_AT_ONCE", 2)
        fresh = DynReferPredictor(model, predictor.processor)
        for one, other in zip(fresh(photo, boxes=BOXES), together, strict=True):
            assert_same(one, other, 1e-5)  # pyright: ignore[reportArgumentType]
        assert passes == [8, 4, 4]

    def test_attributes_and_category_share_a_pass(
        self, predictor: DynReferPredictor, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts: list[int] = []
        model = predictor.model
        original = model.text_logits
        monkeypatch.setattr(model, "text_logits", lambda *a: texts.append(len(a[1])) or original(*a))
        predictor(photo, boxes=BOXES)
        vocabulary = predictor.processor.vocabulary
        assert texts == [len(vocabulary.prompts) + len(vocabulary.classes)]

    def test_views(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        def seen(views: Any) -> list[tuple[float, ...]]:
            regions = predictor(photo, boxes=BOXES, views=views, tasks="tags")
            return [tuple(view.t for view in region.views) for region in regions]  # pyright: ignore

        assert seen([0.3, 0.9]) == [(0.0, 0.3, 0.9)] * 4
        assert seen(np.array([0, 0.3, 0.9])) == [(0.0, 0.3, 0.9)] * 4
        # The whole image: the official search gives t = 0.1 twice, one view to show.
        assert seen("auto")[-1] == (0.0, 0.1)
        assert seen("auto") == seen("official")
        assert seen("pairwise")[-1] == (0.0, 0.1, 0.2)
        first, second = (predictor(photo, boxes=BOXES[:1], views=v, tasks="tags")[0] for v in ([0.3, 0.9], [0.9, 0.3]))
        assert isinstance(first, Region)
        assert isinstance(second, Region)
        assert first.tag_scores != pytest.approx(second.tag_scores, abs=1e-5)

    def test_views_of_each_task(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        """A mapping gives each task its own views; what each says is what it says alone with them."""
        views = {"caption": [0.3, 0.9], "tags": "pairwise", "attributes": [0.3, 0.9]}
        together = predictor(photo, boxes=BOXES, views=views)
        assert [choice.tasks for choice in together[0].choices] == [("caption", "attributes"), ("tags",), ("category",)]  # pyright: ignore
        assert [choice.selection for choice in together[0].choices] == ["fixed", "pairwise", "fixed"]  # pyright: ignore
        assert together[0].choices[2].coefficients == (0.0, 0.1, 0.2)  # pyright: ignore[reportAttributeAccessIssue]
        tags = predictor(photo, boxes=BOXES, views="pairwise", tasks="tags")
        attributes = predictor(photo, boxes=BOXES, views=[0.3, 0.9], tasks="attributes")
        for region, by_tags, by_attributes in zip(together, tags, attributes, strict=True):
            assert region.tag_scores == pytest.approx(by_tags.tag_scores, abs=1e-5)  # pyright: ignore
            assert region.attribute_scores == pytest.approx(by_attributes.attribute_scores, abs=1e-5)  # pyright: ignore
        with pytest.raises(InputError, match=r"the task 'captions' \(did you mean 'caption'\?\)"):
            predictor(photo, views={"captions": "auto"})

    def test_search_over_images_is_that_of_each(
        self, predictor: DynReferPredictor, photo: Image.Image, wide_photo: Image.Image
    ) -> None:
        together = predictor([photo, wide_photo], boxes=[BOXES, WIDE_BOXES], views="auto", tasks="tags")
        for image, boxes, regions in zip((photo, wide_photo), (BOXES, WIDE_BOXES), together, strict=True):
            [search] = search_views([image], [np.array(boxes)], 2)
            for row, region in enumerate(regions):  # pyright: ignore[reportArgumentType]
                [choice] = region.choices
                assert choice.coefficients == tuple(search.coefficients[row])
                assert list(choice.distances.values()) == search.distances[row].tolist()
                assert choice.tasks == ("tags",)

    def test_report(self, predictor: DynReferPredictor, photo: Image.Image, wide_photo: Image.Image) -> None:
        def report(**options: Any) -> Report:
            first, second = predictor([photo, wide_photo], boxes=[BOXES[:2], WIDE_BOXES], **options)
            assert first.report is second.report  # pyright: ignore[reportAttributeAccessIssue]
            assert first[:1].report is first.report  # pyright: ignore
            return first.report  # pyright: ignore

        # Two groups of three views each; the regions themselves are shared: 3 + 3 x 2 x 2 crops against 3 + 2.
        by_task = report()
        assert (by_task.images, by_task.regions, by_task.views) == (2, 3, 18)
        assert (by_task.crops, by_task.least_crops, by_task.extra_crops, by_task.hashes) == (15, 5, 10, 0)
        assert set(by_task.milliseconds) == {*STAGES, "other"}
        assert by_task.milliseconds["proposals"] == 0
        assert all(value > 0 for stage, value in by_task.milliseconds.items() if stage != "proposals")
        # The whole image as the only context is the cheapest choice; run region by region, nothing is shared.
        cheapest = report(views=[1.0, 1.0], tasks="tags")
        assert (cheapest.views, cheapest.crops, cheapest.extra_crops) == (9, 5, 0)
        assert cheapest.milliseconds["captions"] == 0
        assert report(views=[1.0, 1.0], tasks="tags", batch_size=1).extra_crops == 1
        assert report(views="auto").hashes == 3 * 11
        assert report(views={"caption": "auto", "tags": "median"}).hashes == 2 * 3 * 11
        described: Any = predictor(photo, boxes=[], tasks="tags")
        nothing = described.report
        assert (nothing.regions, nothing.crops, nothing.extra_crops) == (0, 0, 0)

    def test_classes(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        own = predictor(photo, boxes=BOXES, tasks="category")
        swapped = predictor(photo, boxes=BOXES, tasks="category", classes=["tree", "small dog", "car"])
        for one, other in zip(own, swapped, strict=True):
            assert tuple(other.category_scores) == ("tree", "small dog", "car")  # pyright: ignore
            ratio = other.category_scores["tree"] / other.category_scores["car"]  # pyright: ignore
            assert ratio == pytest.approx(one.category_scores["tree"] / one.category_scores["car"], rel=1e-3)  # pyright: ignore
        only = predictor(photo, boxes=BOXES[:1], tasks="category", classes=["zebra"])[0]
        assert (only.category, only.category_score) == ("zebra", 1.0)  # pyright: ignore[reportAttributeAccessIssue]

    def test_controls_stand_before_the_tags_whatever_else_is_asked(
        self,
        tiny_model: DynReferModel,
        processor: DynReferProcessor,
        photo: Image.Image,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        predictor = DynReferPredictor(tiny_model, processor)
        asked: list[list[str]] = []
        ids = processor.language_ids
        monkeypatch.setattr(processor, "language_ids", lambda texts: asked.append(list(texts)) or ids(texts))
        plain = predictor(photo, boxes=BOXES[:2], tasks="caption")
        steered = predictor(photo, boxes=BOXES[:2], tasks="caption", controls=["blue", "left of", "blue"])
        both = predictor(photo, boxes=BOXES[:1], tasks=("caption", "tags"), controls=["blue", "red"])
        tags = both[0].tags  # pyright: ignore[reportAttributeAccessIssue]
        assert asked[1][0] == ",".join(dict.fromkeys(("blue", "left of", *tags))) + "|"
        assert asked[2] == [",".join(dict.fromkeys(("blue", "red", *tags))) + "|"]
        assert asked[0][0] == ",".join(tags) + "|"
        assert [r.caption_score for r in plain] != [r.caption_score for r in steered]  # pyright: ignore

    def test_without_tags_the_bar_stands_alone(
        self,
        tiny_model: DynReferModel,
        processor: DynReferProcessor,
        photo: Image.Image,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model = copy.deepcopy(tiny_model)
        model.config.tag_threshold = 1.0
        asked: list[str] = []
        ids = processor.language_ids
        monkeypatch.setattr(processor, "language_ids", lambda texts: asked.extend(texts) or ids(texts))
        DynReferPredictor(model, processor)(photo, tasks="caption")
        assert asked == ["|"]

    def test_a_threshold_for_each_tag(
        self, tiny_model: DynReferModel, processor: DynReferProcessor, photo: Image.Image
    ) -> None:
        model: Any = copy.deepcopy(tiny_model)

        def described(threshold: Any) -> Any:
            model.config.tag_threshold = threshold
            regions: Any = DynReferPredictor(model, processor)(photo, boxes=BOXES[:1], tasks="tags")
            return regions[0]

        raw = described(0.5).tag_scores
        low, high = min(raw, key=raw.__getitem__), max(raw, key=raw.__getitem__)
        assert described({"*": 1.0, low: 0.0}).tags == (low,)
        assert described({"*": 1.0, low: 0.0}).tag_scores == raw
        assert described({tag: 1.0 for tag in raw if tag != high} | {high: raw[high] - 1e-3}).tags == (high,)
        # The others keep the default.
        assert described({low: 1.0}).tags == tuple(tag for tag in described(0.7).tags if tag != low)

    def test_calibration_changes_probabilities_and_no_order(
        self, tiny_model: DynReferModel, processor: DynReferProcessor, predictor: DynReferPredictor, photo: Image.Image
    ) -> None:
        model = copy.deepcopy(tiny_model)
        model.config.calibration = {"tags": [0.5, -1.0], "attributes": [2.0, 1.0], "category": [3.0]}
        raw = predictor(photo, boxes=BOXES[:1])[0]
        fitted = DynReferPredictor(model, processor)(photo, boxes=BOXES[:1])[0]
        assert isinstance(raw, Region)
        assert isinstance(fitted, Region)

        def logit(p: float) -> float:
            return math.log(p / (1 - p))

        for tag, p in raw.tag_scores.items():
            assert logit(fitted.tag_scores[tag]) == pytest.approx(0.5 * logit(p) - 1, abs=1e-3)
        for name, p in raw.attribute_scores.items():
            assert logit(fitted.attribute_scores[name]) == pytest.approx(2 * logit(p) + 1, rel=1e-3)
        ratio = {name: math.log(p / raw.category_scores["car"]) for name, p in raw.category_scores.items()}
        for name, p in fitted.category_scores.items():
            assert math.log(p / fitted.category_scores["car"]) == pytest.approx(3 * ratio[name], abs=1e-3)
        # Which tags are reported, and so the caption, is decided on the raw scores.
        assert (fitted.tags, fitted.caption) == (raw.tags, raw.caption)

    def test_greedy(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        greedy = predictor(photo, boxes=BOXES[:1], tasks="caption", num_beams=1)[0]
        wide = predictor(photo, boxes=BOXES[:1], tasks="caption", num_beams=6)[0]
        assert isinstance(greedy, Region)
        assert isinstance(wide, Region)
        assert greedy.caption_score is not None
        assert wide.caption_score is not None
        assert wide.caption_score >= greedy.caption_score


class TestRegions:
    def test_neither_boxes_nor_masks_is_the_whole_image(
        self, predictor: DynReferPredictor, photo: Image.Image, wide_photo: Image.Image
    ) -> None:
        first, second = predictor([photo, wide_photo], tasks="tags")
        assert first[0].box == (0, 0, 96, 80)  # pyright: ignore
        assert second[0].box == (0, 0, 120, 64)  # pyright: ignore

    def test_sources_of_an_image(self, predictor: DynReferPredictor, photo: Image.Image, tmp_path: Path) -> None:
        photo.save(tmp_path / "photo.png")
        data = io.BytesIO()
        photo.save(data, "PNG")
        expected = predictor(photo, boxes=BOXES[:1])[0]
        for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), data.getvalue(), np.asarray(photo)):
            assert_same(predictor(source, boxes=BOXES[:1])[0], expected)  # pyright: ignore[reportArgumentType]

    def test_masks(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        mask = np.zeros((80, 96), dtype=bool)
        mask[10:30, 20:50] = True
        mask[12, 22] = False
        dot = np.zeros((80, 96), dtype=np.uint8)
        dot[79, 95] = 1
        by_mask = predictor(photo, masks=[mask, encode_rle(mask), dot])
        assert [region.box for region in by_mask] == [(20, 10, 50, 30)] * 2 + [(95, 79, 96, 80)]  # pyright: ignore
        by_box = predictor(photo, boxes=BOXES[:1])
        assert_same(by_mask[0], by_box[0])  # pyright: ignore[reportArgumentType]
        for masks in (mask, encode_rle(mask), mask[None], torch.from_numpy(mask).numpy()):
            assert len(predictor(photo, masks=masks, tasks="tags")) == 1
        both = predictor(photo, boxes=BOXES[1:2], masks=[mask], tasks="tags")
        assert [region.box for region in both] == [(50, 40, 95, 75), (20, 10, 50, 30)]  # pyright: ignore

    def test_tensors(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        expected = predictor(photo, boxes=BOXES[:2], tasks="tags")
        tensor = torch.tensor(BOXES[:2], dtype=torch.float32)
        rows: Any = [row.numpy() for row in tensor]
        for boxes in (tensor, tensor.clone().requires_grad_(), tensor.bfloat16(), tensor.double(), rows):
            for one, other in zip(predictor(photo, boxes=boxes, tasks="tags"), expected, strict=True):
                assert one.box == other.box  # pyright: ignore[reportAttributeAccessIssue]
        mask = torch.zeros(80, 96, dtype=torch.bool)
        mask[10:30, 20:50] = True
        for masks in (mask, mask[None], [mask], [mask.to(torch.uint8)]):
            [region] = predictor(photo, masks=masks, tasks="tags")
            assert region.box == (20, 10, 50, 30)  # pyright: ignore[reportAttributeAccessIssue]

    def test_no_regions(self, predictor: DynReferPredictor, photo: Image.Image, wide_photo: Image.Image) -> None:
        assert len(predictor(photo, boxes=[])) == 0
        assert predictor([]) == []
        empty, one, none = predictor([photo, wide_photo, photo], boxes=[[], WIDE_BOXES, np.zeros((0, 4))], tasks="tags")
        assert [len(empty), len(one), len(none)] == [0, 1, 0]  # pyright: ignore[reportArgumentType]

    def test_tiny_regions(self, predictor: DynReferPredictor, photo: Image.Image) -> None:
        regions = predictor(photo, boxes=[[10, 10, 10.3, 10.4], [95.5, 79.5, 96, 80]])
        assert [region.views[0].box for region in regions] == [(10, 10, 11, 11), (95, 79, 96, 80)]  # pyright: ignore

    def test_proposals(self, tiny_model: DynReferModel, processor: DynReferProcessor, photo: Image.Image) -> None:
        def propose(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
            assert image.size == (96, 80)
            return np.array(BOXES[:2], dtype=np.float32), np.array([0.75, 0.25])

        predictor = DynReferPredictor(tiny_model, processor, proposer=propose)
        regions = predictor(photo, everything=True, tasks="tags")
        assert [(region.score, list(region.box)) for region in regions] == list(zip((0.75, 0.25), BOXES, strict=False))  # pyright: ignore


class TestBatches:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
    def test_order_is_kept_over_images_and_chunks(
        self, predictor: DynReferPredictor, photo: Image.Image, wide_photo: Image.Image, batch_size: int
    ) -> None:
        images, boxes = [photo, wide_photo, photo], [BOXES[:3], WIDE_BOXES, BOXES[3:]]
        done: list[tuple[int, int]] = []
        results = predictor(images, boxes=boxes, batch_size=batch_size, progress=lambda *at: done.append(at))
        assert [len(regions) for regions in results] == [3, 1, 1]  # pyright: ignore[reportArgumentType]
        assert done[-1] == (5, 5)
        assert [at[0] for at in done] == [*range(batch_size, 5, batch_size), 5]
        for image, given, regions in zip(images, boxes, results, strict=True):
            for box, region in zip(given, regions, strict=True):  # pyright: ignore[reportArgumentType]
                alone = predictor(image, boxes=[box])[0]
                assert_same(region, alone)  # pyright: ignore[reportArgumentType]

    def test_many_threads(self, tiny_model: DynReferModel, processor: DynReferProcessor, photo: Image.Image) -> None:
        predictor = DynReferPredictor(tiny_model, processor)
        calls: list[Callable[[], Any]] = [
            lambda: predictor(photo, boxes=BOXES),
            lambda: predictor(photo, boxes=BOXES[:2], classes=["dog", "tree"], controls=["red"]),
            lambda: predictor(photo, boxes=BOXES[2:], views="auto", num_beams=1),
            lambda: predictor(photo, boxes=BOXES[1:], views=[0.9, 1], batch_size=1),
        ]
        expected = [call().to_dict() for call in calls]
        fresh = DynReferPredictor(tiny_model, processor)  # its cache of text embeddings is empty
        predictor = fresh
        with ThreadPoolExecutor(4) as pool:
            found = [future.result().to_dict() for future in [pool.submit(call) for call in calls * 2]]
        for one, other in zip(found, expected * 2, strict=True):
            captions = [[region["caption"] for region in regions["regions"]] for regions in (one, other)]
            assert captions[0] == captions[1]
            for left, right in zip(one["regions"], other["regions"], strict=True):
                assert left["category_score"] == pytest.approx(right["category_score"], abs=1e-3)
                assert left["views"] == right["views"]

    def test_text_embeddings_are_kept_and_bounded(
        self,
        tiny_model: DynReferModel,
        processor: DynReferProcessor,
        photo: Image.Image,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        predictor = DynReferPredictor(tiny_model, processor)
        count = 0
        encode = tiny_model.encode_text

        def counted(*args: Any) -> torch.Tensor:
            nonlocal count
            count += 1
            return encode(*args)

        monkeypatch.setattr(tiny_model, "encode_text", counted)
        for _ in range(3):
            predictor(photo, boxes=BOXES[:1], tasks=("tags", "category"))
        assert count == 2
        for number in range(70):
            predictor._text_embeds((f"word {number}",))
        assert len(predictor._embeds) == 64


class TestLoading:
    def test_round_trip(self, checkpoint: Path, predictor: DynReferPredictor, photo: Image.Image) -> None:
        loaded = DynReferPredictor.from_pretrained(checkpoint, device="cpu")
        assert loaded.name == "tiny"
        for one, other in zip(loaded(photo, boxes=BOXES), predictor(photo, boxes=BOXES), strict=True):
            assert_same(one, other, 1e-6)  # pyright: ignore[reportArgumentType]

    def test_bfloat16(self, checkpoint: Path, photo: Image.Image) -> None:
        loaded = DynReferPredictor.from_pretrained(checkpoint, device="cpu", dtype=torch.bfloat16)
        region = loaded(photo, boxes=BOXES[:1])[0]
        assert isinstance(region, Region)
        assert np.isfinite(numbers(region)).all()
        assert region.caption is not None

    def test_missing_and_of_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there is no folder"):
            DynReferPredictor.from_pretrained(tmp_path / "none")
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        with pytest.raises(InputError, match="is a 'clip' model, not a DynRefer; try dynrefer-world"):
            DynReferPredictor.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"calibration": {"category": [math.nan]}}, "calibration of category must be"),
            ({"calibration": {"tags": "ab"}}, "calibration of tags must be"),
            ({"generation": {"num_beams": "2"}}, "num_beams must be an integer"),
            ({"tag_threshold": "0.5"}, "tag_threshold must be a number"),
            ({"image_size": 56.5}, "image_size must be a whole number"),
            ({"qformer_config": {"hidden_size": "x"}}, "hidden_size"),
            ({"vision_config": 5}, "'int' object"),
        ],
    )
    def test_a_config_with_wrong_values(
        self, checkpoint: Path, tmp_path: Path, change: dict[str, Any], sentence: str
    ) -> None:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=rf"config\.json cannot be used: .*{sentence}") as caught:
            foveate.load(folder)
        assert "\n" not in str(caught.value)

    def test_a_tokenizer_of_another_model(self, checkpoint: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
        tokenizer.add_tokens([f"more{number}" for number in range(20)])
        tokenizer.save_pretrained(folder / "text_tokenizer")
        entries = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
        sentence = f"text tokenizer of .* has {len(tokenizer)} entries, but its model has {entries}"
        with pytest.raises(CheckpointError, match=sentence):
            foveate.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": [[20, 10, 50]]}, r"shape \(R, 4\), rows of \[x1, y1, x2, y2\], got \(1, 3\)"),
        ({"boxes": [20, 10, 50, 30]}, r"got \(4,\)"),
        ({"boxes": [BOXES]}, r"got \(1, 4, 4\)"),
        ({"boxes": "20,10,50,30"}, "got a str"),
        ({"boxes": [[0, 0, 97, 30]]}, "box 0 is .*97.*leaves the image, 96 wide and 80 high"),
        ({"boxes": [BOXES[0], [50, 10, 20, 30]]}, "box 1 is .*x2 > x1"),
        ({"boxes": [[math.nan, 0, 9, 9]]}, "finite"),
        ({"boxes": [[0, 0, 1e30, 9]]}, "leaves the image"),
        ({"masks": np.zeros((80, 96), bool)}, "no pixel set"),
        ({"masks": [np.ones((80, 95), bool)]}, r"shape \(80, 95\), but the image is 80 x 96"),
        ({"masks": [np.ones((80, 96))]}, "bools or whole numbers, not float64"),
        ({"masks": [{"size": [80, 96], "counts": [5]}]}, "add up to 5"),
        ({"masks": [{"size": [9, 9], "counts": [0, 81]}]}, "9x9 .* 80x96"),
        ({"masks": 5}, "masks must be a list .*, not int"),
        ({"masks": [[[1, 0], [1]]]}, "a mask cannot be read .* give H rows of W values"),
        ({"masks": torch.ones(1, 80, 96, device="meta")}, "a mask cannot be read"),
        ({"masks": [torch.ones(80, 96).to_sparse()]}, "a mask cannot be read"),
        ({"boxes": torch.tensor(BOXES).to("meta")}, "boxes cannot be read .* give numbers, an array or a dense tensor"),
        ({"boxes": torch.tensor(BOXES).to_sparse()}, "boxes cannot be read"),
        ({"boxes": torch.tensor(BOXES) > 0}, "boxes must be a tensor"),
        ({"tasks": []}, "no task given"),
        ({"tasks": "captoin"}, "unknown task 'captoin', did you mean 'caption'"),
        ({"tasks": ["caption", "zzz"]}, "unknown task 'zzz'; use caption, tags"),
        ({"tasks": None}, "tasks must be a list of words, not None"),
        ({"tasks": [5]}, "tasks must be a list of words, and 5 is none"),
        ({"classes": []}, "class list is empty"),
        ({"classes": "car"}, "classes must be a list of words, not 'car'"),
        ({"classes": ["car", ""]}, "and '' is none"),
        ({"classes": ["car", "dog", "car"]}, "'car' twice"),
        ({"controls": "red"}, "controls must be a list of words, not 'red'"),
        ({"controls": [None]}, "and None is none"),
        ({"controls": ["caf\udce9"]}, r"controls must be words in Unicode, and 'caf\\udce9' is not; give it in UTF-8"),
        ({"classes": ["car", "\ud800"]}, "classes must be words in Unicode"),
        ({"controls": ["red " * 20]}, "the controls: 22 tokens are more than the 12 that this model reads"),
        ({"classes": ["car", "red " * 20]}, "the class 'red red .*: 23 tokens are more than the 16"),
        ({"views": torch.ones(2, device="meta")}, "views must be a list of numbers"),
        ({"views": [10**400, 1]}, "views must be a list of numbers"),
        ({"views": [0.5]}, "looks at 3 views, so give 2"),
        ({"views": [0.5, 2]}, "between 0"),
        ({"views": "wide"}, "unknown views 'wide'"),
        ({"num_beams": 0}, "num_beams must be a whole number from 1 to 64, not 0"),
        ({"num_beams": 65}, "not 65"),
        ({"num_beams": 2.0}, "not 2.0"),
        ({"num_beams": True}, "not True"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": "8"}, "not '8'"),
        ({"everything": True}, "no region proposer"),
        ({"everything": True, "boxes": BOXES}, "leave out boxes and masks"),
    ],
)
def test_bad_input_is_one_sentence(
    predictor: DynReferPredictor, photo: Image.Image, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        predictor(photo, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ("none.png", {}, "does not exist"),
        (b"no image", {}, "not an image"),
        (None, {}, "got NoneType"),
        ([np.zeros((8, 8, 3), np.uint8)] * 2, {"boxes": [[[0, 0, 4, 4]]]}, "2 images need 2 lists of boxes, .* not 1"),
        ([np.zeros((8, 8, 3), np.uint8)] * 2, {"masks": np.ones((8, 8), bool)}, "lists of masks, .* not ndarray"),
        ([np.zeros((8, 8, 3), np.uint8), 5], {}, "got int"),
    ],
)
def test_bad_images(predictor: DynReferPredictor, images: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predictor(images, **arguments)


def test_a_vocabulary_without_words(
    tiny_model: DynReferModel, processor: DynReferProcessor, photo: Image.Image
) -> None:
    bare = DynReferProcessor(Vocabulary(), processor.text_tokenizer, processor.language_tokenizer)
    predictor = DynReferPredictor(tiny_model, bare)
    for task in ("tags", "attributes"):
        with pytest.raises(InputError, match=f"no list of words for '{task}'; leave '{task}' out of tasks"):
            predictor(photo, tasks=task)
    with pytest.raises(InputError, match="no list of words for 'category'; give classes"):
        predictor(photo, tasks="category")
    assert predictor(photo, tasks="category", classes=["car"])[0].category == "car"  # pyright: ignore
    assert predictor(photo, tasks="caption")[0].caption is not None  # pyright: ignore
