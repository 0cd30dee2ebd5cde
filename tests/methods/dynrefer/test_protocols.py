"""The published protocols: the golden arrays, miniatures counted by hand, and the plumbing around them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data.samples import ImageSample, RegionSample
from foveate.errors import InputError
from foveate.methods.dynrefer import protocols
from foveate.methods.dynrefer.predictor import DynReferPredictor
from foveate.methods.dynrefer.protocols import (
    ProtocolSettings,
    evaluate_protocol,
    score_attributes,
    score_dense_captions,
    score_recognition,
    score_region_captions,
)
from foveate.metrics.meteor import meteor_lite

GOLDEN = Path(__file__).parents[2] / "golden" / "dynrefer"
BOX = (0.0, 0.0, 10.0, 10.0)


def image(image_id: int, *regions: RegionSample) -> ImageSample:
    return ImageSample(image_id, Path(f"{image_id}.png"), 100, 100, regions)


# -------------------------------------------------------------------- the golden arrays


def test_dense_captions_golden() -> None:
    golden = json.loads((GOLDEN / "densecap.json").read_text())
    targets, jobs, said = [], [], {}
    for number, entry in enumerate(golden["images"]):
        truth = zip(entry["target_boxes"], entry["target_text"], strict=True)
        targets.append(image(number, *(RegionSample(k, tuple(b), (text,)) for k, (b, text) in enumerate(truth))))
        found = list(zip(entry["boxes"], entry["scores"], entry["text"], strict=True))
        jobs.append(
            image(number, *(RegionSample(k, tuple(box), score=score) for k, (box, score, _) in enumerate(found)))
        )
        said |= {(number, k): {"caption": text, "score": 0.5} for k, (_, _, text) in enumerate(found)}
    meteor = {
        (record["candidate"], *record["references"]): value
        for record, value in zip(golden["records"], golden["meteors_per_record"], strict=True)
    }

    def meteors(candidates: Any, references: Any) -> np.ndarray:
        return np.array([meteor[candidate, *group] for candidate, group in zip(candidates, references, strict=True)])

    result = score_dense_captions(targets, jobs, said, official=True, meteors=meteors)
    assert result["map"] == pytest.approx(100 * golden["result"]["map"], abs=1e-4)
    assert result["det_map"] == pytest.approx(100 * golden["result"]["detmap"], abs=1e-4)
    assert result["ground_truth"] == golden["npos"]
    assert result["det_ap_by_iou"]["iou_0.5"] == pytest.approx(
        100 * golden["result"]["det_breakdown"]["iou_0.5"], abs=1e-4
    )
    # The detector's score ranks where there is one: with the caption's for all, the figure is another.
    own = [replace(job, regions=tuple(replace(region, score=None) for region in job.regions)) for job in jobs]
    assert score_dense_captions(targets, own, said, official=True, meteors=meteors)["map"] != pytest.approx(
        result["map"]
    )


def test_attributes_golden() -> None:
    golden, arrays = json.loads((GOLDEN / "ovad.json").read_text()), np.load(GOLDEN / "ovad.npz")
    names = [entry["name"] for entry in golden["attributes"]]
    regions, said = [], {}
    for row, labels in enumerate(arrays["att_vec"].tolist()):
        holds, denied = ([n for n, label in zip(names, labels, strict=True) if label == k] for k in (1, 0))
        regions.append(RegionSample(row, BOX, attributes=tuple(holds), negative_attributes=tuple(denied)))
        said[1, row] = {"attr": arrays["pred"][row].tolist()}
    result = score_attributes([image(1, *regions)], said, golden["attributes"])["map"]
    percent = {name.split("/")[1]: value for name, value in golden["map_percent"].items()}
    assert len(percent) == 9
    assert result == pytest.approx(percent, abs=1e-9)


# -------------------------------------------------------------------- miniatures by hand


def test_region_captions_by_hand() -> None:
    """CIDEr as in the hand-computed case of the metric; a region without a reference is left out."""
    targets = [
        image(1, RegionSample(7, BOX, ("a b",)), RegionSample(8, BOX)),
        image(2, RegionSample(9, BOX, ("a e",))),
    ]
    said = {(1, 7): {"caption": "a b"}, (1, 8): {"caption": "z"}, (2, 9): {"caption": "c e"}}
    result = score_region_captions(targets, said, official=False)
    assert result["cider"] == pytest.approx(100 * (5 + 2.5 / 2**0.5) / 2, rel=1e-12)
    assert result["meteor_lite"] == pytest.approx(100 * meteor_lite(["a b", "c e"], [["a b"], ["a e"]]).score)
    assert "meteor" not in result


def test_dense_captions_by_hand() -> None:
    """Two things to find. The surest box is right, the second is right in place and wrong in words: over METEOR AP is
    that of recall 1/2 (50 of 100 points, 0..0.50 is 51), over IoU alone it is perfect."""
    far = (50.0, 50.0, 90.0, 90.0)
    targets = [image(1, RegionSample(1, BOX, ("a dog",)), RegionSample(2, far, ("a cat", "an animal")))]
    jobs = [
        image(1, RegionSample(5, BOX, score=0.9), RegionSample(6, far, score=0.8)),
    ]
    said = {(1, 5): {"caption": "a dog", "score": 0.1}, (1, 6): {"caption": "zzz", "score": 0.7}}
    result = score_dense_captions(targets, jobs, said, official=False)
    assert (result["map_lite"], result["det_map"]) == (pytest.approx(51.0), pytest.approx(100.0))
    assert result["ground_truth"] == 2
    # Ground truth of an image without any box counts only if asked: then recall ends at 1/4 and 2/4.
    targets.append(image(2, RegionSample(1, BOX, ("x",)), RegionSample(2, far, ("y",))))
    jobs.append(image(2))
    lenient = score_dense_captions(targets, jobs, said, official=False)
    strict = score_dense_captions(targets, jobs, said, official=False, strict_npos=True)
    assert (lenient["map_lite"], lenient["images_without_box"]) == (pytest.approx(51.0), 1)
    assert (strict["map_lite"], strict["det_map"]) == (pytest.approx(26.0), pytest.approx(51.0))


def test_recognition_by_hand() -> None:
    """The last box is a crowd: accuracy counts it (2 of 3 right), mAP does not (cat found, dog not: 1/2)."""
    targets = [
        image(1, RegionSample(1, BOX, category="cat"), RegionSample(2, (50, 50, 90, 90), category="dog")),
        image(2, RegionSample(3, BOX, category="dog", crowd=True)),
    ]
    said = {(1, 1): {"cls": [3.0, 1.0, 0.0]}, (1, 2): {"cls": [0.5, 0.1, 0.0]}, (2, 3): {"cls": [1.0, 9.0, 0.0]}}
    result = score_recognition(targets, said, ("cat", "dog", "never seen"))
    assert (result["accuracy"], result["crowds"]) == (pytest.approx(200 / 3), 1)
    assert result["map"] == pytest.approx(50.0)
    # Raw scores rank the boxes: a wrong "cat" of 5.0 comes first, though as a share of its own classes it is unsure.
    result = score_recognition(targets, said | {(1, 2): {"cls": [5.0, 4.9, 4.9]}}, ("cat", "dog", "never seen"))
    assert result["map"] == pytest.approx(25.0)


# -------------------------------------------------------------------- from files to files


class Stub:
    """A predictor that counts its calls, and fails before the call `fail_at`."""

    def __init__(self, predictor: DynReferPredictor, fail_at: int | None = None) -> None:
        self.model, self.processor, self._predictor = predictor.model, predictor.processor, predictor
        self.calls, self.fail_at = 0, fail_at
        self.thresholds: set[float] = set()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.thresholds.add(self.model.config.tag_threshold)
        return self._predictor(*arguments, **options)


def write_refcocog(root: Path, count: int = 3) -> Path:
    (root / "train2014").mkdir(parents=True)
    images, annotations = [], []
    for k in range(count):
        name = f"COCO_train2014_{k:012d}.png"
        Image.effect_noise((60, 50), 40 + k).convert("RGB").save(root / "train2014" / name)
        images.append({"id": 10 + k, "file_name": name, "width": 60, "height": 50, "original_id": k})
        annotations.append({"id": k, "image_id": 10 + k, "bbox": [5, 6, 30, 20], "caption": "A red car."})
    content = {"images": images, "annotations": annotations}
    (root / "finetune_refcocog_val_captions.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def refcocog(tmp_path: Path) -> ProtocolSettings:
    return ProtocolSettings.model_validate(
        {
            "name": "region-captioning",
            "dataset": "RefCOCOg miniature",
            "format": "refcocog",
            "root": write_refcocog(tmp_path / "refcocog"),
            "split": "val_captions",
            "scorer": "lite",
        }
    )


def run(settings: ProtocolSettings, predictor: Any, output: Path, checkpoint: Path) -> dict[str, Any]:
    return evaluate_protocol(settings, predictor, output, model=checkpoint)


def test_report_and_official_layout(
    refcocog: ProtocolSettings, predictor: DynReferPredictor, checkpoint: Path, tmp_path: Path
) -> None:
    stub = Stub(predictor)
    report = run(refcocog.model_copy(update={"tag_threshold": 0.25}), stub, tmp_path / "out", checkpoint)
    assert stub.thresholds == {0.25}
    assert predictor.model.config.tag_threshold == 0.5
    assert {key: report[key] for key in ("protocol", "dataset", "images", "boxes", "box_source")} == {
        "protocol": "region-captioning",
        "dataset": "RefCOCOg miniature",
        "images": 3,
        "boxes": 3,
        "box_source": "ground truth",
    }
    assert "not comparable" in report["metric_version"]
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [(line["image_id"], line["region_id"], line["box"]) for line in lines] == [
        (k, 10 + k, [5, 6, 35, 26]) for k in range(3)
    ]
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    # One hypothesis an image id, as the official evaluation counts.
    assert [entry["id"] for entry in written["images"]] == [10, 11, 12]
    first = written["annotations"][0]
    assert (first["image_id"], first["caption"], first["bbox"]) == (10, "A red car.", [5, 6, 35, 26])
    assert first["segmentation"] == [[5, 6, 5, 26, 35, 26, 35, 6]]
    assert first["extra_info"]["pred_result"] == {"caption": lines[0]["caption"], "score": lines[0]["score"]}
    assert not list((tmp_path / "out").glob("*.partial"))


def test_an_interrupted_evaluation_goes_on(
    refcocog: ProtocolSettings,
    predictor: DynReferPredictor,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocols, "IMAGES_PER_CALL", 1)
    whole = run(refcocog, Stub(predictor), tmp_path / "whole", checkpoint)
    with pytest.raises(KeyboardInterrupt):
        run(refcocog, Stub(predictor, fail_at=2), tmp_path / "out", checkpoint)
    assert not (tmp_path / "out/predictions.jsonl").exists()
    second = Stub(predictor)
    report = run(refcocog, second, tmp_path / "out", checkpoint)
    assert second.calls == 1
    assert report | {"predictions": ""} == whole | {"predictions": ""}
    for name in ("predictions.jsonl", "predictions.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Other settings have other predictions: nothing is taken over.
    with pytest.raises(KeyboardInterrupt):
        run(refcocog, Stub(predictor, fail_at=2), tmp_path / "out", checkpoint)
    third = Stub(predictor)
    run(refcocog.model_copy(update={"tag_threshold": 0.1}), third, tmp_path / "out", checkpoint)
    assert third.calls == 3


def test_predictions_outlive_a_failure_of_the_metric(
    refcocog: ProtocolSettings,
    predictor: DynReferPredictor,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise InputError("METEOR ended")

    monkeypatch.setattr(protocols, "score_captions", fail)
    with pytest.raises(InputError, match="METEOR ended"):
        run(refcocog, Stub(predictor), tmp_path / "out", checkpoint)
    monkeypatch.undo()
    stub = Stub(predictor)
    assert run(refcocog, stub, tmp_path / "out", checkpoint)["boxes"] == 3
    assert stub.calls == 0


def test_missing_and_wrong_images(
    refcocog: ProtocolSettings, predictor: DynReferPredictor, checkpoint: Path, tmp_path: Path
) -> None:
    images = sorted((refcocog.root / "train2014").iterdir())
    images[1].unlink()
    stub, lenient = Stub(predictor), refcocog.model_copy(update={"skip_bad": True})
    with pytest.raises(InputError, match=r"1 of 3 images are missing, the first is .*01\.png \(image 1\).*skip_bad"):
        run(refcocog, stub, tmp_path / "out", checkpoint)
    assert stub.calls == 0
    report = run(lenient, stub, tmp_path / "out", checkpoint)
    assert (report["images"], report["boxes"], report["left_out"]) == (2, 2, {"image missing": 1})
    images[1].write_bytes(b"no image")
    Image.new("RGB", (50, 60)).save(images[2])
    with pytest.raises(InputError, match=r"image 1: .*01\.png.*skip_bad"):
        run(refcocog, stub, tmp_path / "out", checkpoint)
    report = run(lenient, stub, tmp_path / "out", checkpoint)
    assert (report["images"], report["boxes"], report["left_out"]) == (1, 1, {"image unreadable": 2})
    errors = [
        json.loads(line).get("error", "") for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ]
    assert any("has 50x60 pixels, but its annotations are of an image of 60x50" in error for error in errors)
    for path in images:
        path.unlink()
    with pytest.raises(InputError, match="3 of 3 images are missing"):
        run(lenient, stub, tmp_path / "out", checkpoint)


def test_java_is_asked_for_before_any_work(
    refcocog: ProtocolSettings,
    predictor: DynReferPredictor,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    monkeypatch.setenv("PATH", "")
    stub = Stub(predictor)
    with pytest.raises(InputError, match="no 'java' on the PATH"):
        run(refcocog.model_copy(update={"scorer": "official"}), stub, tmp_path / "out", checkpoint)
    assert stub.calls == 0


def write_visual_genome(root: Path) -> Path:
    (root / "VG_100K").mkdir(parents=True)
    images, regions = [], []
    for k in (1, 2):
        Image.effect_noise((60, 50), 40 + k).convert("RGB").save(root / "VG_100K" / f"{k}.jpg")
        images.append({"image_id": k, "width": 60, "height": 50, "coco_id": 5 if k == 1 else None})
        phrase = {"region_id": k, "x": 5, "y": 6, "width": 30, "height": 20, "phrase": "a red car"}
        regions.append({"id": k, "regions": [phrase]})
    for name, content in (
        ("image_data", images),
        ("region_descriptions", regions),
        ("densecap_splits", {"train": [], "val": [], "test": [1, 2]}),
    ):
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def test_dense_captions_with_the_boxes_of_a_file(
    predictor: DynReferPredictor, checkpoint: Path, tmp_path: Path
) -> None:
    settings = ProtocolSettings.model_validate(
        {
            "name": "dense-captioning",
            "dataset": "VG",
            "format": "visual-genome",
            "root": write_visual_genome(tmp_path / "vg"),
            "split": "test",
            "scorer": "lite",
        }
    )
    own = run(settings, Stub(predictor), tmp_path / "own", checkpoint)
    assert (own["box_source"], own["boxes"], own["det_map"]) == ("ground truth", 2, pytest.approx(100.0))
    # The predictions are in the layout of the file of boxes: what one run wrote with scores, the next can read.
    boxes = json.loads((tmp_path / "own/predictions.json").read_text())
    boxes["annotations"] = [boxes["annotations"][0] | {"extra_info": {"grit_result": {"score": 0.75}}}]
    (tmp_path / "test_grit.json").write_text(json.dumps(boxes))
    given = settings.model_copy(update={"boxes": tmp_path / "test_grit.json"})
    report = run(given, Stub(predictor), tmp_path / "given", checkpoint)
    assert (report["box_source"], report["boxes"]) == ("test_grit.json, score of the detector", 1)
    assert (report["ground_truth"], report["images_without_box"], report["det_map"]) == (1, 1, pytest.approx(100.0))
    strict = run(given.model_copy(update={"strict_npos": True}), Stub(predictor), tmp_path / "strict", checkpoint)
    assert (strict["ground_truth"], strict["det_map"]) == (2, pytest.approx(51.0))
    coco = run(settings.model_copy(update={"only_coco": True}), Stub(predictor), tmp_path / "coco", checkpoint)
    assert coco["images"] == 1
    with pytest.raises(InputError, match="no region proposer; set boxes to ground-truth or to a file"):
        run(settings.model_copy(update={"boxes": "proposer"}), Stub(predictor), tmp_path / "out", checkpoint)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "coco"}, "region-captioning reads the format refcocog or vg-captions or visual-genome, not coco"),
        ({"strict_npos": True}, "strict_npos is for dense-captioning, not for region-captioning"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, Any], sentence: str) -> None:
    settings = {"name": "region-captioning", "dataset": "x", "format": "refcocog", "root": Path("x"), "split": "val"}
    with pytest.raises(ValueError, match=sentence):
        ProtocolSettings(**(settings | change))
