"""The published evaluations of region-level models, on the datasets' own files (spec 5, docs/protocols.md).

| protocol | data | metric |
| --- | --- | --- |
| region-captioning | RefCOCOg (GLaMM's captions file), Visual Genome (GLaMM's) | METEOR, CIDEr |
| dense-captioning | Visual Genome 1.0, 1.2, VG-COCO | mAP over IoU and METEOR |
| attributes | OVAD, box oracle | mAP over attributes |
| recognition | COCO | top-1 accuracy, mAP with ground-truth boxes |
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from foveate.data import open_dataset
from foveate.data.coco import COCO
from foveate.data.dataset import SampleDataset
from foveate.data.ovad import OVAD
from foveate.data.records import RecordLog
from foveate.data.region_file import annotation_record, read_scored_boxes
from foveate.data.samples import ImageSample, RegionSample
from foveate.data.visual_genome import VisualGenome
from foveate.errors import InputError
from foveate.files import ResumableLines, atomic_write, file_states
from foveate.metrics.classification import ovad_map
from foveate.metrics.detection import DenseCaptionImage, coco_recognition, dense_caption_map, match_dense_captions
from foveate.metrics.meteor import check_java, meteor_of, score_captions
from foveate.training.recipes import RecipePath, RecipeSection
from foveate.vision.images import load_image
from foveate.vision.proposer import RegionProposer

from .predictor import DynReferPredictor
from .processing import Attribute, attribute_prompts
from .results import Region

IMAGES_PER_CALL = 16
LITE = "METEOR lite and foveate's tokenizer, not comparable with published figures"

# Which formats a protocol reads, and what it asks of the model.
_READS: dict[str, tuple[str, ...]] = {
    "region-captioning": ("refcocog", "vg-captions", "visual-genome"),
    "dense-captioning": ("visual-genome",),
    "attributes": ("ovad",),
    "recognition": ("coco",),
}
_ASKS = {
    "region-captioning": "caption",
    "dense-captioning": "caption",
    "attributes": "attributes",
    "recognition": "category",
}

# A described region as a line of the JSONL file; the key is (image id, region id).
Predictions = Mapping[tuple[int, int], Mapping[str, Any]]


class ProtocolSettings(RecipeSection):
    """Which protocol on which files. `dataset` is the name that the report prints."""

    name: Literal["region-captioning", "dense-captioning", "attributes", "recognition"]
    dataset: str = Field(min_length=1, description="what the data is called in tables: RefCOCOg val, VG 1.2 test, ...")
    format: Literal["refcocog", "vg-captions", "visual-genome", "ovad", "coco"]
    root: RecipePath
    split: str
    images: int | None = Field(None, gt=0, description="only the first so many images, for a quick look")
    skip_bad: bool = Field(False, description="leave broken records and images out and count them")
    scorer: Literal["official", "lite"] = Field(
        "official", description="official: METEOR 1.5, PTB tokens (Java); lite: without Java, not comparable"
    )
    tag_threshold: float | None = Field(
        None, ge=0, le=1, description="of the tags that steer a caption; null: the model's"
    )
    boxes: Literal["ground-truth", "proposer"] | RecipePath = Field(
        "ground-truth", description="dense-captioning: or the model's own proposer, or a file such as test_grit.json"
    )
    strict_npos: bool = Field(False, description="dense-captioning: count the ground truth of images without a box too")
    only_coco: bool = Field(False, description="dense-captioning: the images that have a COCO id (VG-COCO)")

    @model_validator(mode="after")
    def _fits(self) -> ProtocolSettings:
        if self.format not in _READS[self.name]:
            raise ValueError(
                f"the protocol {self.name} reads the format {' or '.join(_READS[self.name])}, not {self.format}"
            )
        if self.name != "dense-captioning":
            given = self.model_fields_set & {"boxes", "strict_npos", "only_coco"}
            if given:
                raise ValueError(f"{sorted(given)[0]} is for dense-captioning, not for {self.name}; remove it")
        return self


def evaluate_protocol(
    settings: ProtocolSettings,
    predictor: DynReferPredictor,
    output: Path,
    *,
    model: Path,
    views: Any = None,
    num_beams: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Describe the regions of a benchmark and score them.

    Writes `predictions.jsonl` (a line a region; an interrupted evaluation goes on after its last line, if nothing that
    the lines depend on has changed) and `predictions.json` (the annotation file of DynRefer, the prediction under
    `extra_info.pred_result`) into `output`.

    Args:
        predictor: answers; its tag threshold is the settings' for the length of the call.
        model: the folder that it was loaded from; a change of its files starts the evaluation anew.
        views, num_beams, batch_size: as `DynReferPredictor.__call__`.

    Returns:
        What was measured (protocol, dataset, numbers of images and boxes, box source, metric version), then the
        figures, times 100 as papers print them, and what was left out.

    Raises:
        InputError: a file is missing or damaged (the sentence names file and record), an image is missing, or METEOR
            cannot run.
    """
    captions = _ASKS[settings.name] == "caption"
    # Said before hours of describing, not after.
    version = (check_java() if settings.scorer == "official" else LITE) if captions else None
    dataset = _open(settings)
    left_out = Counter(dataset.skipped)
    targets = [sample for sample in dataset[: settings.images] if sample.regions or settings.boxes != "ground-truth"]
    with ExitStack() as stack:
        if settings.tag_threshold is not None:
            config: Any = predictor.model.config
            stack.callback(setattr, config, "tag_threshold", config.tag_threshold)
            config.tag_threshold = settings.tag_threshold
        options: dict[str, Any] = {"tasks": (_ASKS[settings.name],), "views": views, "num_beams": num_beams}
        if isinstance(dataset, OVAD):
            predictor = _with_attributes(predictor, dataset)
        elif isinstance(dataset, COCO):
            options["classes"] = dataset.categories
        targets = _present(targets, settings.skip_bad, left_out)
        targets, jobs, source = _jobs(settings, targets, predictor, output, left_out)
        lines = _lines(output / "predictions.jsonl", settings, model, options, jobs)
        with lines:
            # Scored before the lines get their final name: if that fails, the next run still has them.
            said, bad = _describe(predictor, jobs, lines, settings.skip_bad, options | {"batch_size": batch_size})
            left_out.update(["image unreadable"] * len(bad))
            targets, jobs = _without(bad, targets), _without(bad, jobs)
            metrics = _score(settings, dataset, targets, jobs, said)
            _write_official(output / "predictions.json", settings, source, jobs, said)
    report: dict[str, Any] = {
        "protocol": settings.name,
        "dataset": settings.dataset,
        "files": f"{settings.format} {settings.root} {settings.split}",
        "images": len(targets),
        "boxes": len(said),
        "box_source": source,
    }
    if version is not None:
        report["metric_version"] = version
    if left_out:
        report["left_out"] = dict(left_out)
    return report | metrics | {"predictions": str(output / "predictions.json")}


# -------------------------------------------------------------------- data


def _open(settings: ProtocolSettings) -> SampleDataset:
    if settings.only_coco:
        return VisualGenome(settings.root, settings.split, skip_bad=settings.skip_bad, only_coco=True)
    return open_dataset(settings.format, settings.root, settings.split, skip_bad=settings.skip_bad)


def _present(samples: list[ImageSample], skip_bad: bool, left_out: Counter[str]) -> list[ImageSample]:
    """The samples whose image file is there: a forgotten folder is noticed at once, not at its first image."""
    present = [sample for sample in samples if sample.path.is_file()]
    missing = len(samples) - len(present)
    if missing and (not skip_bad or not present):
        first = next(sample for sample in samples if not sample.path.is_file())
        raise InputError(
            f"{missing} of {len(samples)} images are missing, the first is {first.path} (image {first.image_id}); put "
            "them there, or set skip_bad to evaluate without them."
        )
    if missing:
        left_out["image missing"] += missing
    return present


def _images(
    samples: Sequence[ImageSample], skip_bad: bool, bad: Callable[[ImageSample, str], None]
) -> Iterator[tuple[ImageSample, Image.Image]]:
    """The samples with their images; one that cannot be used is an error, or goes to `bad`."""
    for sample in samples:
        try:
            image = load_image(sample.path)
            if image.size != (sample.width, sample.height):
                width, height = image.size
                raise InputError(
                    f"{sample.path} has {width}x{height} pixels, but its annotations are of an image of "
                    f"{sample.width}x{sample.height}; is it another photograph?"
                )
        except InputError as error:
            if not skip_bad:
                raise InputError(f"image {sample.image_id}: {error} Or set skip_bad to leave it out.") from error
            bad(sample, str(error))
        else:
            yield sample, image


def _jobs(
    settings: ProtocolSettings,
    targets: list[ImageSample],
    predictor: DynReferPredictor,
    output: Path,
    left_out: Counter[str],
) -> tuple[list[ImageSample], list[ImageSample], str]:
    """The images with their ground truth, the same with the regions to describe, and where those boxes come from."""
    if settings.boxes == "ground-truth":
        return targets, targets, "ground truth"
    if settings.boxes == "proposer":
        name = predictor.model.config.proposer
        if name is None:
            raise InputError("this model has no region proposer; set boxes to ground-truth or to a file of boxes.")
        path, source = output / "proposals.json", f"proposer {name}"
        proposer = RegionProposer.from_pretrained(name, device=predictor.model.device)
        bad = _write_proposals(path, settings, targets, proposer)
        left_out.update(["image unreadable"] * len(bad))
        targets = _without(bad, targets)
    else:
        path = settings.boxes
        source = f"{path.name}, score of the detector"
    log = RecordLog(settings.skip_bad)
    sizes = {sample.image_id: (sample.width, sample.height) for sample in targets}
    found = read_scored_boxes(path, sizes, log)
    log.report(str(path))
    left_out.update(log.skipped)
    jobs = []
    for sample in targets:
        records = found.get(sample.image_id, ())
        regions = tuple(RegionSample(record.region_id, record.box, score=record.score) for record in records)
        jobs.append(replace(sample, regions=regions))
    return targets, jobs, source


def _without(bad: Collection[int], samples: list[ImageSample]) -> list[ImageSample]:
    return [sample for sample in samples if sample.image_id not in bad]


def _write_proposals(
    path: Path, settings: ProtocolSettings, samples: list[ImageSample], proposer: RegionProposer
) -> set[int]:
    """The proposer's boxes in the layout of GRiT's file, so that they are read, and can be looked at, like those.

    Returns:
        Ids of the images that could not be used.
    """
    annotations: list[dict[str, Any]] = []
    bad: set[int] = set()
    for sample, image in _images(samples, settings.skip_bad, lambda sample, _: bad.add(sample.image_id)):
        boxes, scores = proposer(image)
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
            extra = {"grit_result": {"score": score}}
            annotations.append(annotation_record(len(annotations), sample.image_id, tuple(box), None, extra))
    images = _image_list(_without(bad, samples))
    _write_json(path, _file_head(settings, "proposer") | {"images": images, "annotations": annotations})
    return bad


def _with_attributes(predictor: DynReferPredictor, dataset: OVAD) -> DynReferPredictor:
    """The predictor with the benchmark's attributes and prompts for its own (spec 2.9)."""
    processor = copy.copy(predictor.processor)
    attributes = tuple(
        Attribute(entry["name"], tuple(attribute_prompts(entry["name"], entry["is_has_att"])))
        for entry in dataset.attributes
    )
    processor.vocabulary = replace(processor.vocabulary, attributes=attributes)
    return DynReferPredictor(predictor.model, processor, name=predictor.name)


# -------------------------------------------------------------------- describing


def _lines(
    path: Path, settings: ProtocolSettings, model: Path, options: Mapping[str, Any], jobs: list[ImageSample]
) -> ResumableLines:
    """The file of predictions, with the finished lines of an interrupted evaluation of the same."""
    digest = hashlib.sha256()
    for sample in jobs:
        digest.update(repr((sample.image_id, str(sample.path), sample.regions)).encode())
    key = json.dumps(
        [settings.name, settings.tag_threshold, options, str(model), file_states(model), digest.hexdigest()]
    )
    return ResumableLines.go_on(path, key=key)


def _describe(
    predictor: DynReferPredictor,
    jobs: list[ImageSample],
    lines: ResumableLines,
    skip_bad: bool,
    options: dict[str, Any],
) -> tuple[dict[tuple[int, int], dict[str, Any]], set[int]]:
    """What is said of every region, by (image id, region id); and the ids of the images that could not be used."""
    said: dict[tuple[int, int], dict[str, Any]] = {}
    bad: set[int] = set()
    for number, line in enumerate(lines.finished, 1):
        try:
            record = json.loads(line)
            if "error" not in record:
                said[record["image_id"], record["region_id"]] = record
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"line {number} of the interrupted evaluation {lines.partial} is damaged; delete the file."
            ) from error

    def leave_out(sample: ImageSample, reason: str) -> None:
        lines.append(json.dumps({"image_id": sample.image_id, "error": reason}))
        bad.add(sample.image_id)

    waiting = [s for s in jobs if any((s.image_id, region.region_id) not in said for region in s.regions)]
    for start in range(0, len(waiting), IMAGES_PER_CALL):
        chunk = list(_images(waiting[start : start + IMAGES_PER_CALL], skip_bad, leave_out))
        if not chunk:
            continue
        boxes = [[region.box for region in sample.regions] for sample, _ in chunk]
        results: Any = predictor([image for _, image in chunk], boxes=boxes, **options)
        for (sample, _), answers in zip(chunk, results, strict=True):
            for region, answer in zip(sample.regions, answers, strict=True):
                key = (sample.image_id, region.region_id)
                if key not in said:
                    said[key] = {"image_id": key[0], "region_id": key[1], "box": region.box, **_answer(answer)}
                    lines.append(json.dumps(said[key], allow_nan=False))
    return said, bad


def _answer(region: Region) -> dict[str, Any]:
    """The fields of the official `pred_result` that were asked for."""
    answer: dict[str, Any] = {}
    if region.caption is not None:
        answer |= {"caption": region.caption, "score": region.caption_score}
    if region.attribute_scores:
        answer["attr"] = list(region.attribute_scores.values())
    if region.category_logits:
        answer["cls"] = list(region.category_logits.values())
    return answer


def _write_official(
    path: Path, settings: ProtocolSettings, source: str, jobs: list[ImageSample], said: Predictions
) -> None:
    """The annotation file of DynRefer with what the model says under `extra_info.pred_result`."""
    images, annotations = _image_list(jobs), []
    if settings.name == "region-captioning":
        # The official caption evaluation groups by image id and has one hypothesis for each, so here a region is one.
        images = [
            entry | {"id": region.region_id}
            for sample, entry in zip(jobs, images, strict=True)
            for region in sample.regions
        ]
    for sample in jobs:
        for region in sample.regions:
            answer = said[sample.image_id, region.region_id]
            result = {name: value for name, value in answer.items() if name not in ("image_id", "region_id", "box")}
            extra: dict[str, Any] = {"pred_result": result}
            if region.score is not None:
                extra["grit_result"] = {"score": region.score}
            image_id = region.region_id if settings.name == "region-captioning" else sample.image_id
            caption = region.captions[0] if region.captions else None
            annotations.append(annotation_record(region.region_id, image_id, region.box, caption, extra))
    _write_json(path, _file_head(settings, source) | {"images": images, "annotations": annotations})


def _file_head(settings: ProtocolSettings, source: str) -> dict[str, Any]:
    return {
        "dataset": {
            "description": settings.dataset,
            "image_root": str(settings.root),
            "extra_info": {"protocol": settings.name, "box_source": source},
        }
    }


def _image_list(samples: list[ImageSample]) -> list[dict[str, Any]]:
    return [
        {"id": sample.image_id, "file_name": sample.path.name, "height": sample.height, "width": sample.width}
        for sample in samples
    ]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, allow_nan=False)


# -------------------------------------------------------------------- scoring


def _score(
    settings: ProtocolSettings,
    dataset: SampleDataset,
    targets: list[ImageSample],
    jobs: list[ImageSample],
    said: Predictions,
) -> dict[str, Any]:
    official = settings.scorer == "official"
    if settings.name == "region-captioning":
        return score_region_captions(targets, said, official=official)
    if settings.name == "dense-captioning":
        return score_dense_captions(targets, jobs, said, official=official, strict_npos=settings.strict_npos)
    if isinstance(dataset, OVAD):
        return score_attributes(targets, said, dataset.attributes)
    assert isinstance(dataset, COCO)
    return score_recognition(targets, said, dataset.categories)


def score_region_captions(targets: list[ImageSample], said: Predictions, *, official: bool) -> dict[str, float]:
    """METEOR and CIDEr x 100 of one hypothesis a region against its references."""
    pairs = [(_said(said, sample, region)["caption"], region) for sample in targets for region in sample.regions]
    candidates = [caption for caption, region in pairs if region.captions]
    scores = score_captions(candidates, [region.captions for _, region in pairs if region.captions], official=official)
    return {_meteor_name(official): 100 * scores.meteor, "cider": 100 * scores.cider}


def score_dense_captions(
    targets: list[ImageSample],
    jobs: list[ImageSample],
    said: Predictions,
    *,
    official: bool,
    strict_npos: bool = False,
    meteors: Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray] | None = None,
) -> dict[str, Any]:
    """mAP x 100 over IoU and METEOR thresholds, and over IoU alone.

    Args:
        targets: images with the ground truth; each caption of a region is one entry.
        jobs: the same images with the regions described. Their score counts, or the caption's where they have none.
        meteors: scores captions against references, 0 to 1; by default METEOR 1.5 or, not `official`, `meteor_lite`.
    """
    images = []
    for target, job in zip(targets, jobs, strict=True):
        answers = [_said(said, job, region) for region in job.regions]
        truth = [(region.box, caption) for region in target.regions for caption in region.captions]
        images.append(
            DenseCaptionImage(
                boxes=[region.box for region in job.regions],
                scores=[
                    answer["score"] if region.score is None else region.score
                    for region, answer in zip(job.regions, answers, strict=True)
                ],
                captions=[answer["caption"] for answer in answers],
                target_boxes=[box for box, _ in truth],
                target_captions=[caption for _, caption in truth],
            )
        )
    records = match_dense_captions(images)
    # A detection that touches nothing has no reference; what METEOR says of it does not matter.
    judged = [row for row, references in enumerate(records.references) if references]
    scores = np.zeros(len(records.references))
    if judged:
        score = meteors or (lambda said, wanted: meteor_of(said, wanted, official=official).per_sample)
        scores[judged] = score([records.candidates[k] for k in judged], [records.references[k] for k in judged])
    result = dense_caption_map(records, scores, strict_npos=strict_npos)
    by_iou: dict[str, list[float]] = {}
    for (iou, _), value in result.average_precisions.items():
        by_iou.setdefault(f"iou_{iou}", []).append(100 * value)
    return {
        "map" if official else "map_lite": 100 * result.map,
        "det_map": 100 * result.det_map,
        "ap_by_iou": {name: float(np.mean(values)) for name, values in by_iou.items()},
        "det_ap_by_iou": {f"iou_{iou}": 100 * value for iou, value in result.det_average_precisions.items()},
        "ground_truth": result.positives,
        "images_without_box": sum(not job.regions for job in jobs),
        "strict_npos": strict_npos,
    }


def score_attributes(
    targets: list[ImageSample], said: Predictions, attributes: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """mAP x 100 over attributes: all, by frequency, type and number of synonyms."""
    column = {attribute["name"]: k for k, attribute in enumerate(attributes)}
    regions = [(sample, region) for sample in targets for region in sample.regions]
    labels = np.full((len(regions), len(column)), -1)
    for row, (_, region) in enumerate(regions):
        labels[row, [column[name] for name in region.negative_attributes]] = 0
        labels[row, [column[name] for name in region.attributes]] = 1
    scores = np.array([_said(said, sample, region)["attr"] for sample, region in regions])
    result = ovad_map(scores, labels, attributes)
    return {"map": result.map_percent}


def score_recognition(targets: list[ImageSample], said: Predictions, categories: Sequence[str]) -> dict[str, float]:
    """Top-1 accuracy x 100 over all annotations, crowds too, and COCO mAP x 100 with ground-truth boxes."""
    index = {name: k for k, name in enumerate(categories)}
    regions = [(sample, region) for sample in targets for region in sample.regions]
    result = coco_recognition(
        boxes=[region.box for _, region in regions],
        labels=[index[region.category or ""] for _, region in regions],
        image_ids=[sample.image_id for sample, _ in regions],
        logits=[_said(said, sample, region)["cls"] for sample, region in regions],
        crowd=[int(region.crowd) for _, region in regions],
    )
    return {
        "accuracy": 100 * result.accuracy,
        "map": 100 * result.map,
        "map_50": 100 * result.map50,
        "map_75": 100 * result.map75,
        "crowds": sum(region.crowd for _, region in regions),
    }


def _said(said: Predictions, sample: ImageSample, region: RegionSample) -> Mapping[str, Any]:
    return said[sample.image_id, region.region_id]


def _meteor_name(official: bool) -> str:
    return "meteor" if official else "meteor_lite"
