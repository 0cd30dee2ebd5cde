"""Training and evaluation of DynRefer from a recipe (spec 3, 5)."""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPTextConfig

from foveate.checkpoints import find_checkpoint, read_config
from foveate.data import open_dataset
from foveate.data.dataset import SampleDataset
from foveate.data.records import read_json
from foveate.data.samples import ImageSample, RegionSample
from foveate.data.text import clean_caption
from foveate.errors import FoveateError, InputError, RecipeError
from foveate.language.generation import check_generation
from foveate.language.lm import load_config, load_tokenizer
from foveate.language.pretrained import first_line
from foveate.language.words import COCO_CLASSES, read_lines
from foveate.metrics.calibration import best_f1_threshold, expected_calibration_error, fit_platt
from foveate.metrics.captioning import caption_report, mentioned_words
from foveate.metrics.classification import class_breakdown, mean_average_precision
from foveate.training.recipes import LARGEST, Recipe, RecipePath, RecipeSection, TrainingSettings
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.trainer import TrainingTask
from foveate.training.world_data import WorldScenes, ensure_rendered
from foveate.vision.images import load_image
from foveate.world.vocabulary import (
    attribute_vocabulary,
    category_names,
    colour_names,
    relation_predicates,
    tag_vocabulary,
)

from .captioners import DecoderOnly, captioner_of, load_captioner
from .configuration import (
    CANDIDATE_VIEWS,
    DEFAULT_TAG_THRESHOLD,
    DynReferConfig,
    check_coefficients,
    check_tag_threshold,
    check_view_policy,
    check_views,
    find_dynrefer,
)
from .conversion import initialise_from_blip2, read_attributes
from .modeling import DynReferModel
from .predictor import TASKS, DynReferPredictor
from .processing import CLASS_TEMPLATE, DynReferProcessor, Vocabulary, control_text
from .protocols import ProtocolSettings, evaluate_protocol
from .results import Region
from .view_cache import ViewCache
from .views import (
    boxes_in_views,
    build_views,
    crop_view,
    interpolate_boxes,
    pixel_boxes,
    sample_coefficients,
)
from .words import TagList, control_pool

log = logging.getLogger(__name__)

MOST_BAD_IN_A_ROW = 100
"""Regions whose images cannot be read, one after the other, where `data.skip_bad` is on; more are no accident."""

IMAGE_CACHE_BYTES = 2 * 2**30
"""Decoded images that a process keeps in memory where `data.cache_images` is on; 2 GiB is 10,000 images of 256 px."""


def _checked(check: Callable[[Any], None], *words: str) -> BeforeValidator:
    """Has a value of a recipe refused in one sentence, where pydantic would say for each type that it is none of it.

    None and the `words` are not checked.
    """

    def validate(value: Any) -> Any:
        if value is not None and value not in words:
            try:
                check(value)
            except ValueError as error:
                raise ValueError(f"{error} (or take {', '.join(words)})" if words else str(error)) from None
        return value

    return BeforeValidator(validate)


class RegionData(RecipeSection):
    """One split of a dataset of described regions."""

    format: Literal["visual-genome", "refcocog", "coco", "controlcap"] = "visual-genome"
    root: RecipePath
    split: str = "train"
    world: WorldScenes | None = Field(None, description="render the dataset first if `root` does not exist")
    regions: int | None = Field(
        None,
        gt=0,
        description="use only so many regions: for training those that `seed` draws, elsewhere always the same ones",
    )
    skip_bad: bool = Field(False, description="leave broken records and images out, count and log them")


class CalibrationData(RegionData):
    """Held-out regions. A tag list of thousands makes a region's scores large: some thousand `regions` are enough."""

    tag_thresholds: bool = Field(False, description="give each tag the threshold of its best F1")
    min_positives: int = Field(
        10, gt=0, le=LARGEST, description="a tag of fewer regions keeps the threshold of model.tag_threshold"
    )


class TrainingData(RegionData):
    tags: RecipePath | None = Field(None, description="tag list, one a line (ram_tag_list.txt); null: the data's own")
    attributes: RecipePath | None = Field(None, description="OVAD's ovad2000.json; null: the data's own")
    classes: Literal["coco"] | RecipePath | None = Field(
        None, description="class list, one a line, or coco for its 80; null: the data's own"
    )
    each_caption: bool = Field(
        False, description="a sample for each caption, as DynRefer trains, and not for each region"
    )
    views: Annotated[Literal["random"] | list[float], _checked(check_coefficients, "random")] = Field(
        "random", description="context views: drawn anew for each region and epoch, or always these t's"
    )
    control_dropout: float = Field(0.5, ge=0, le=1, description="share of samples without any control word")
    canonical_caption: float = Field(0.5, ge=0, le=1, description="share of samples with the first reference")
    cache_images: bool = Field(True, description="keep decoded images in memory, up to 2 GiB in each process")
    cache_views: RecipePath | None = Field(
        None, description="folder that keeps the frozen tower's tokens of all views; for small datasets"
    )


class ModelSettings(RecipeSection):
    """What is built; a field means what it means in `DynReferConfig`."""

    base_models: dict[Literal["vision", "text", "language"], str] = Field(
        default_factory=dict, description="checkpoints of the frozen parts; not needed with `init_from`"
    )
    init_from: str | None = Field(None, description="start from this DynRefer checkpoint instead of fresh modules")
    qformer_from: str | None = Field(
        None, description="BLIP-2 checkpoint whose Q-Former (its sizes too), query tokens and projection to start from"
    )
    frozen_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen parts in training")
    num_views: int = Field(3, ge=1, le=11)
    image_size: int = Field(224, gt=0, le=4096)
    vision_layer: int | Literal["last_hidden_state"] = "last_hidden_state"
    num_query_tokens: int = Field(32, gt=0, le=4096)
    qformer_width: int = Field(768, gt=0, le=8192)
    qformer_layers: int = Field(12, gt=0, le=128)
    qformer_heads: int = Field(12, gt=0, le=256)
    qformer_dropout: float = Field(0.1, ge=0, lt=1)
    align: bool = True
    align_groups: int = Field(4, gt=0, le=256)
    head_size: int = Field(256, gt=0, le=8192)
    head_layers: int = Field(2, gt=0, le=128)
    head_num_attention_heads: int = Field(4, gt=0, le=256)
    head_dropout: float = Field(0.1, ge=0, lt=1)
    tag_loss_weight: float = Field(0.01, ge=0, le=1e9)
    contrast_loss_weight: float = Field(0.5, ge=0, le=1e9)
    caption_loss_weight: float = Field(1.0, ge=0, le=1e9)
    prompt_loss_weight: float = Field(0.0, ge=0, le=1e9)
    tag_threshold: Annotated[float | dict[str, float], _checked(check_tag_threshold)] = Field(
        DEFAULT_TAG_THRESHOLD, description="one number, or a mapping of tags to theirs with '*' for all others"
    )
    view_policy: Annotated[dict[str, str | list[float]] | None, _checked(check_view_policy)] = None
    exact_box_rounding: bool = True
    proposer: str | None = Field(None, description="region proposer for describing everything")
    generation: Annotated[dict[str, int | float] | None, _checked(check_generation)] = None

    @model_validator(mode="after")
    def _one_start(self) -> ModelSettings:
        if self.init_from is not None and self.qformer_from is not None:
            raise ValueError("init_from brings a Q-Former; give either it or qformer_from")
        sizes = self.model_fields_set & {"qformer_width", "qformer_layers", "qformer_heads"}
        if self.qformer_from is not None and sizes:
            raise ValueError(f"qformer_from brings the sizes of the Q-Former; remove {sorted(sizes)[0]}")
        return self


TEXTS_AT_ONCE = 512

_LEFT_OUT: Any = None
"""The default of sections that a recipe may leave out only if another one is there; a validator sees to it."""


class EvaluationSettings(RecipeSection):
    data: RegionData = Field(_LEFT_OUT)
    protocol: ProtocolSettings | None = Field(
        None, description="a published protocol on its own data, in place of `data`"
    )
    views: Annotated[str | list[float] | dict[str, str | list[float]] | None, _checked(check_views)] = Field(
        None, description="null: the model's policy per task; the name of a search; t's; or one of these for each task"
    )
    tasks: tuple[Literal["caption", "tags", "attributes", "category"], ...] = Field(TASKS, min_length=1)
    num_beams: int | None = Field(None, gt=0, le=64)
    batch_size: int = Field(64, gt=0, le=LARGEST)

    @model_validator(mode="after")
    def _one_of_two(self) -> EvaluationSettings:
        if (self.data is None) == (self.protocol is None):
            raise ValueError("give either data or protocol")
        return self


class DynReferRecipe(Recipe):
    """A recipe of a published protocol may leave out `data`, `model` and `training`, all three: it only evaluates."""

    data: TrainingData = Field(_LEFT_OUT)
    model: ModelSettings = Field(_LEFT_OUT)
    training: TrainingSettings = Field(_LEFT_OUT)
    evaluation: EvaluationSettings
    calibration: CalibrationData | None = Field(
        None, description="held-out regions on which probabilities are calibrated"
    )

    @model_validator(mode="after")
    def _can_train(self) -> DynReferRecipe:
        missing = [name for name in ("data", "model", "training") if getattr(self, name) is None]
        if missing and (self.evaluation.protocol is None or len(missing) < 3):
            raise ValueError(f"the key {missing[0]!r} is missing; add it")
        return self


RECIPE = DynReferRecipe


# -------------------------------------------------------------------- data


def open_regions(data: RegionData, seed: int = 0) -> tuple[SampleDataset, list[tuple[int, int]]]:
    """The dataset and the (image, region) pairs of it that have a caption; rendered first if the recipe says so.

    Args:
        seed: draws which regions are used where `data.regions` limits them. What measures models keeps the default, so
            that the figures of runs with other seeds compare.

    Raises:
        InputError, RecipeError: the dataset is not there, is damaged, or has no such region.
    """
    ensure_rendered(data.root, data.format, data.world)
    dataset = open_dataset(data.format, data.root, data.split, skip_bad=data.skip_bad)
    index = [(i, k) for i, sample in enumerate(dataset) for k, region in enumerate(sample.regions) if region.captions]
    if not index:
        raise RecipeError(f"the dataset {data.root} has no region with a caption in its split {data.split!r}")
    if data.regions is not None and data.regions < len(index):
        chosen = np.random.default_rng(seed).choice(len(index), size=data.regions, replace=False)
        index = [index[k] for k in np.sort(chosen)]
    return dataset, index


def check_root(data: RegionData, section: str) -> None:
    """Whether there is something that `open_regions` can open or render, without doing so.

    Raises:
        RecipeError: there is not.
    """
    if not data.root.exists() and data.world is None:
        raise RecipeError(
            f"{section}.root: there is no folder {data.root}; put the dataset there, or give {section}.world"
        )


def dataset_vocabulary(dataset: SampleDataset, name: str) -> Vocabulary:
    """The rendered world's lists for its own datasets; for others the words that the annotations use."""
    manifest = dataset.root / "dataset.json"
    if manifest.is_file() and read_json(manifest, dict).get("source") == "foveate.world.scenes":
        return Vocabulary.from_words(tag_vocabulary(), attribute_vocabulary(), category_names(), "foveate.world")
    tags: set[str] = set()
    attributes: set[str] = set()
    classes: set[str] = set()
    for sample in dataset:
        for region in sample.regions:
            tags.update(region.tags)
            attributes.update(region.attributes)
            classes.update([region.category] if region.category else [])
    return Vocabulary.from_words(sorted(tags), sorted(attributes), sorted(classes), name)


def training_vocabulary(data: TrainingData, dataset: SampleDataset, start: Vocabulary | None = None) -> Vocabulary:
    """The lists that the recipe names; for the others those of `start`, or of the data (`dataset_vocabulary`).

    Raises:
        InputError: a list is missing or damaged.
    """
    given: dict[str, Any] = {}
    if data.tags is not None:
        given["tags"] = read_lines(data.tags, "tag")
    if data.attributes is not None:
        given["attributes"] = read_attributes(data.attributes)
    if data.classes is not None:
        given["classes"] = COCO_CLASSES if isinstance(data.classes, str) else read_lines(data.classes, "class")
    if start is None:  # looking through millions of regions takes minutes, so only where something is missing
        start = Vocabulary(source=str(data.root)) if len(given) == 3 else dataset_vocabulary(dataset, str(data.root))
    return replace(start, **given)


def _check_tags(dataset: Iterable[ImageSample], vocabulary: Vocabulary, config: Any, root: Path) -> None:
    """Whether the tag list belongs to the data and the settings.

    Raises:
        RecipeError: there is no tag to learn, or a threshold is of none.
        InputError: the data was parsed with a longer list.
    """
    count = len(vocabulary.tags)
    if not count and config.tag_loss_weight:
        raise RecipeError(
            f"{root} gives no tags to learn; name a tag list under data.tags, or set model.tag_loss_weight to 0"
        )
    if isinstance(config.tag_threshold, dict):
        unknown = sorted(set(config.tag_threshold) - {"*", *vocabulary.tags})
        if unknown:
            raise RecipeError(f"model.tag_threshold names {unknown[0]!r}, which is no tag of this model")
    for sample in dataset:
        for region in sample.regions:
            if region.tag_places and region.tag_places[-1] >= count:
                raise InputError(
                    f"region {region.region_id} of {root} has the tag number {region.tag_places[-1]}, but the tag list "
                    f"has {count} entries; give the list that its captions were parsed with under data.tags"
                )


def _present(dataset: SampleDataset, index: list[tuple[int, int]], skip_bad: bool) -> list[tuple[int, int]]:
    """The pairs whose image file is there: a forgotten folder is noticed at once, not in the middle of an epoch.

    Raises:
        InputError: images are missing, and `skip_bad` is off or no image is left.
    """
    paths = {image: dataset[image].path for image in sorted({image for image, _ in index})}
    missing = {image for image, path in paths.items() if not path.is_file()}
    if not missing:
        return index
    what = f"{len(missing)} of {len(paths)} training images are missing, the first is {paths[min(missing)]}"
    if not skip_bad or len(missing) == len(paths):
        raise InputError(f"{what}; put them there, or set data.skip_bad to train without them.")
    left = [pair for pair in index if pair[0] not in missing]
    log.warning("%s; %d of %d regions are left out", what, len(index) - len(left), len(index))
    return left


class RegionDataset(SeededDataset):
    """One described region a sample: its views, boxes, caption, control words and targets.

    `views="random"` draws n - 1 different t's for each region anew (stochastic multi-view embedding, paper 3.1). With
    `each_caption` a region is as many samples as it has captions.

    Where the data gives no tags they come from the caption (`TagList`), and control words are its tags and its phrases
    of nouns and adjectives (spec 3); regions with tags of their own are controlled by those alone.

    Attributes:
        bad: paths of images that could not be read in this process, with how often another region took the place of
            one of theirs (`data.skip_bad`).
    """

    def __init__(
        self,
        dataset: SampleDataset,
        index: list[tuple[int, int]],
        config: DynReferConfig,
        vocabulary: Vocabulary,
        data: TrainingData,
        cache: ViewCache | None = None,
    ) -> None:
        self.dataset, self.index, self.config, self.data, self.cache = dataset, index, config, data, cache
        self.tags, self.tag_list = vocabulary.tags, TagList(vocabulary.tags)
        self.attributes = {attribute.name: k for k, attribute in enumerate(vocabulary.attributes)}
        self.classes = {name: k for k, name in enumerate(vocabulary.classes)}
        self.repeats = torch.tensor(vocabulary.group_sizes, dtype=torch.long)
        self._images: OrderedDict[int, Image.Image] = OrderedDict()  # the one used last at the end
        self._image_bytes = 0
        self.bad: Counter[str] = Counter()
        # A place in `index`, and the caption to take, or None to draw one.
        self._samples: list[tuple[int, int | None]] = (
            [(row, k) for row, (i, r) in enumerate(index) for k in range(len(dataset[i].regions[r].captions))]
            if data.each_caption
            else [(row, None) for row in range(len(index))]
        )
        if data.views != "random" and len(data.views) != config.num_views - 1:
            raise RecipeError(
                f"data.views gives {len(data.views)} t's, but num_views {config.num_views} needs one less"
            )
        if data.views == "random" and config.num_views - 1 > len(CANDIDATE_VIEWS):
            raise RecipeError(f"num_views can be at most {len(CANDIDATE_VIEWS) + 1} with random views")

    def __len__(self) -> int:
        return len(self._samples)

    def _image(self, index: int) -> Image.Image:
        if index in self._images:
            self._images.move_to_end(index)
            return self._images[index]
        image = load_image(self.dataset[index].path)
        if self.data.cache_images:
            self._images[index] = image
            self._image_bytes += _bytes_of(image)
            while self._image_bytes > IMAGE_CACHE_BYTES:
                self._image_bytes -= _bytes_of(self._images.popitem(last=False)[1])
        return image

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        path = ""
        for bad in range(MOST_BAD_IN_A_ROW):
            row, caption_number = self._samples[(index + bad) % len(self)]
            try:
                return self._sample(row, caption_number, random.numpy)
            except InputError as error:
                path = str(self.dataset[self.index[row][0]].path)
                if not self.data.skip_bad:
                    raise InputError(f"{error} Or set data.skip_bad to train without it.") from error
                self.bad[path] += 1
                count = self.bad.total()
                log.warning("%s The next region is taken in its place (%d so far in this process).", error, count)
        raise InputError(f"{MOST_BAD_IN_A_ROW} regions in a row have images that cannot be read, the last is {path}.")

    def _sample(self, index: int, caption_number: int | None, draw: np.random.Generator) -> dict[str, Any]:
        image_index, number = self.index[index]
        region = self.dataset[image_index].regions[number]
        count = self.config.num_views - 1
        t = sample_coefficients(count, draw) if self.data.views == "random" else np.array([0.0, *self.data.views])
        views = self._views(index, t)
        if caption_number is None:
            first = draw.random() < self.data.canonical_caption
            caption_number = 0 if first else int(draw.integers(len(region.captions)))
        caption = clean_caption(region.captions[caption_number])
        places = self.tag_list.of(region, [caption])
        targets = torch.zeros(len(self.tags))
        targets[places] = 1
        return {
            **views,
            "caption": caption,
            "control": control_text(self._controls(region, caption, places, draw)),
            "tags": targets,
            "prompts": self.prompt_labels(region),
        }

    def _views(self, index: int, coefficients: np.ndarray) -> dict[str, np.ndarray]:
        """The region in each view, and the crops: with a cache, of those views only whose tokens are not known."""
        image_index, number = self.index[index]
        box = np.array([self.dataset[image_index].regions[number].box])
        size, exact = self.config.image_size, self.config.exact_box_rounding
        if self.cache is None:
            batch = build_views(self._image(image_index), box, coefficients[None], size, exact=exact)
            return {"crops": batch.crops[batch.view_index[0]], "region_boxes": batch.region_boxes[0]}
        columns = self.cache.columns(coefficients)
        unknown = ~self.cache.known(index, columns)
        image = self._image(image_index)
        view_boxes = pixel_boxes(interpolate_boxes(box, coefficients, *image.size), *image.size)
        region_boxes = boxes_in_views(pixel_boxes(box, *image.size), view_boxes, size, exact=exact)[0]
        crops = [crop_view(image, view, size) for view in view_boxes[0][unknown]]
        return {
            "region_boxes": region_boxes,
            "row": np.array(index),
            "columns": columns,
            "unknown": unknown,
            "crops": np.stack(crops) if crops else np.zeros((0, size, size, 3), np.uint8),
        }

    def _controls(
        self, region: RegionSample, caption: str, places: Sequence[int], draw: np.random.Generator
    ) -> list[str]:
        """Control words in training (spec 3): none for half of the samples, else each word with probability a half."""
        if draw.random() < self.data.control_dropout:
            return []
        pool = dict.fromkeys(region.tags) or control_pool(
            self.tag_list.parts_of_speech(caption), [self.tags[place] for place in places]
        )
        kept = [word for word in pool if draw.random() < 0.5]
        draw.shuffle(kept)
        return kept

    def prompt_labels(self, region: RegionSample) -> Tensor:
        """1, 0 or -1 (unknown) for each attribute prompt, then for each class."""
        known = torch.full((len(self.attributes),), -1.0)
        known[[self.attributes[name] for name in region.negative_attributes if name in self.attributes]] = 0
        known[[self.attributes[name] for name in region.attributes if name in self.attributes]] = 1
        classes = torch.full((len(self.classes),), -1.0)
        if region.category in self.classes:
            classes[:] = 0
            classes[self.classes[region.category]] = 1
        return torch.cat([known.repeat_interleave(self.repeats), classes])


def _bytes_of(image: Image.Image) -> int:
    return 3 * image.width * image.height


class Collate:
    """Samples -> the keywords of `DynReferModel.forward`."""

    def __init__(
        self,
        processor: DynReferProcessor,
        tag_embeds: Tensor,
        prompt_embeds: Tensor | None,
        cache: ViewCache | None = None,
        model: DynReferModel | None = None,
    ) -> None:
        self.processor, self.tag_embeds, self.prompt_embeds = processor, tag_embeds, prompt_embeds
        self.cache, self.model = cache, model

    def _views(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = self.processor.pixel_values(np.concatenate([sample["crops"] for sample in samples]))
        if self.cache is None or self.model is None:
            return {"pixel_values": pixels}
        rows = np.repeat([sample["row"] for sample in samples], [len(sample["columns"]) for sample in samples])
        columns = np.concatenate([sample["columns"] for sample in samples])
        unknown = np.concatenate([sample["unknown"] for sample in samples])
        if unknown.any():
            weight = next(self.model.vision_tower.parameters())
            with torch.no_grad():
                tokens = self.model.encode_views(pixels.to(weight.device, weight.dtype))
            self.cache.tokens[rows[unknown], columns[unknown]] = tokens.half().cpu().numpy()
        return {"view_tokens": torch.from_numpy(self.cache.tokens[rows, columns]).float()}

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        captions = [sample["caption"] for sample in samples]
        text_ids, text_mask = self.processor.text_ids(captions)
        caption_ids, caption_mask = self.processor.language_ids(captions, caption=True)
        control_ids, control_mask = self.processor.language_ids([sample["control"] for sample in samples])
        prompts = {}
        if self.prompt_embeds is not None:
            prompts["prompt_embeds"] = self.prompt_embeds
            prompts["prompt_labels"] = torch.stack([sample["prompts"] for sample in samples])
        return {
            **self._views(samples),
            **prompts,
            "region_boxes": torch.from_numpy(np.stack([sample["region_boxes"] for sample in samples])),
            "tag_embeds": self.tag_embeds,
            "tag_targets": torch.stack([sample["tags"] for sample in samples]),
            "caption_text_ids": text_ids,
            "caption_text_mask": text_mask,
            "caption_ids": caption_ids,
            "caption_mask": caption_mask,
            "control_ids": control_ids,
            "control_mask": control_mask,
        }


# -------------------------------------------------------------------- model


def build_model(settings: ModelSettings) -> DynReferModel:
    """The model of a recipe with its frozen parts loaded, in `settings.frozen_dtype`.

    Raises:
        RecipeError: the sizes do not fit each other or the base models.
        InputError, CheckpointError: a base model, or the model to start from, is missing or damaged.
    """
    dtype: torch.dtype = getattr(torch, settings.frozen_dtype)
    if settings.init_from is not None:
        return _continue_from(settings, settings.init_from).cast_frozen(dtype)
    folders = {part: find_checkpoint(name) for part, name in settings.base_models.items()}
    missing = {"vision", "text", "language"} - set(folders)
    if missing:
        raise RecipeError(f"model.base_models must name {', '.join(sorted(missing))} too")
    chosen = settings.model_dump(
        exclude={"init_from", "qformer_from", "frozen_dtype"}
        | {"qformer_width", "qformer_layers", "qformer_heads", "qformer_dropout"}
    )
    # The loaded one knows whether its output layer is tied; its file may not.
    language_config = _language_config(folders["language"], dtype)
    vision_config = load_config(folders["vision"])
    text_config = vision_config if folders["text"] == folders["vision"] else load_config(folders["text"])
    text = getattr(text_config, "text_config", text_config)
    if not isinstance(text, CLIPTextConfig):
        raise RecipeError(f"the text base model must be a CLIP, not {read_config(folders['text']).get('model_type')!r}")
    if vision_config.model_type == "clip" and text is not text_config:
        text.projection_dim = text_config.projection_dim  # a whole CLIP projects to the size that it names at the top
    try:
        config = DynReferConfig(
            vision_config=getattr(vision_config, "vision_config", vision_config).to_dict(),
            text_config=text.to_dict(),
            qformer_config=_qformer_config(settings),
            # Where the parts lay on the machine that trained is nobody's business; `base_models` has their names.
            language_config=language_config.to_dict() | {"_name_or_path": ""},
            **chosen,
        )
        model = DynReferModel(config)
    except FoveateError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # of transformers' models, on their sizes
        raise _unfit(error) from None
    model.cast_frozen(dtype).load_base_models(dtype=dtype)
    return model if settings.qformer_from is None else initialise_from_blip2(model, settings.qformer_from)


def _language_config(folder: Path, dtype: torch.dtype) -> Any:
    model, tokenizer = load_captioner(folder, dtype)
    captioner = captioner_of(model.config)
    captioner.prepare_config(model.config, captioner.prepare_tokenizer(tokenizer))
    return model.config


def _qformer_config(settings: ModelSettings) -> dict[str, Any]:
    dropout = {
        "hidden_dropout_prob": settings.qformer_dropout,
        "attention_probs_dropout_prob": settings.qformer_dropout,
    }
    if settings.qformer_from is not None:
        blip2 = load_config(find_checkpoint(settings.qformer_from))
        if hasattr(blip2, "qformer_config"):  # else `initialise_from_blip2` says what it is
            return blip2.qformer_config.to_dict() | dropout | {"use_qformer_text_input": False}
    return dropout | {
        "hidden_size": settings.qformer_width,
        "num_hidden_layers": settings.qformer_layers,
        "num_attention_heads": settings.qformer_heads,
        "intermediate_size": 4 * settings.qformer_width,
    }


def _unfit(error: Exception) -> RecipeError:
    return RecipeError(
        f"the settings of model do not fit together: {first_line(error).rstrip('.')}; change one of them."
    )


CHANGEABLE = frozenset(
    {"tag_loss_weight", "contrast_loss_weight", "caption_loss_weight", "prompt_loss_weight"}
    | {"tag_threshold", "view_policy", "exact_box_rounding", "proposer", "generation"}
)
"""Settings of the recipe that a checkpoint can be given; the others are what its weights were made for."""


def _continue_from(settings: ModelSettings, name: str) -> DynReferModel:
    """The model of a checkpoint with the recipe's own settings, where it gives any.

    Raises:
        RecipeError: the recipe says a size that is not the checkpoint's.
    """
    model = DynReferModel.from_pretrained(find_dynrefer(name)).float()  # shipped weights are float16
    config = model.config
    for field in settings.model_fields_set - {"init_from", "qformer_from", "frozen_dtype", "base_models"}:
        wanted = getattr(settings, field)
        if field in CHANGEABLE:
            if wanted is not None:
                setattr(config, field, {**config.generation, **wanted} if field == "generation" else wanted)
            continue
        part, _, key = field.partition("_")
        if part == "qformer":
            names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
            found = getattr(config.qformer_config, names.get(key, "hidden_dropout_prob"))
        else:
            found = getattr(config, field)
        if found != wanted:
            raise RecipeError(f"model.{field} is {wanted}, but the checkpoint {name} of model.init_from has {found}")
    try:
        config.check()
    except ValueError as error:
        raise _unfit(error) from None
    return model


def build(recipe: DynReferRecipe) -> TrainingTask:
    """Data, model, collation, and the calibration that follows training."""
    if recipe.data is None:
        raise RecipeError("this recipe evaluates by a published protocol and has nothing to train; give another one")
    # What is needed after hours of training is looked for before.
    if recipe.evaluation.protocol is None:
        check_root(recipe.evaluation.data, "evaluation.data")
    if recipe.calibration is not None:
        check_root(recipe.calibration, "calibration")
    model = build_model(recipe.model)
    dataset, index = open_regions(recipe.data, recipe.seed)
    index = _present(dataset, index, recipe.data.skip_bad)
    if recipe.calibration is not None:
        open_regions(recipe.calibration)
    config: Any = model.config
    if recipe.model.init_from is not None:
        folder = find_dynrefer(recipe.model.init_from)
        processor = DynReferProcessor.from_pretrained(folder, base_models=config.base_models)
        processor.vocabulary = training_vocabulary(recipe.data, dataset, processor.vocabulary)
    else:
        processor = DynReferProcessor(
            training_vocabulary(recipe.data, dataset),
            load_tokenizer(find_checkpoint(recipe.model.base_models["text"])),
            load_tokenizer(find_checkpoint(recipe.model.base_models["language"])),
            image_mean=model.vision_tower.mean,
            image_std=model.vision_tower.std,
            max_text_tokens=config.max_text_tokens,
            decoder_only=config.captioner is DecoderOnly,
        )
    vocabulary = processor.vocabulary
    _check_tags(dataset if recipe.data.format == "controlcap" else (), vocabulary, config, recipe.data.root)
    tag_embeds = _text_embeds(model, processor, vocabulary.tags)
    prompt_embeds = None
    if config.prompt_loss_weight:
        prompts = [*vocabulary.prompts, *(CLASS_TEMPLATE.format(name.lower()) for name in vocabulary.classes)]
        prompt_embeds = _text_embeds(model, processor, prompts)

    cache = None
    if recipe.data.cache_views is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError("data.cache_views is for one process; set it to null to train in several")
        if recipe.training.workers:
            raise RecipeError("data.cache_views works in the training process itself; set training.workers to 0")
        if recipe.data.views != "random":
            ViewCache.columns(np.array(recipe.data.views))
        cache = ViewCache.open(recipe.data.cache_views, dataset, index, model)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder, base_models=config.base_models)

    def after_training(_: Any, output: Path) -> None:
        if recipe.calibration is not None:
            calibrate(DynReferPredictor(model, processor), recipe.calibration)

    return TrainingTask(
        model=model,
        train_dataset=RegionDataset(dataset, index, config, vocabulary, recipe.data, cache),
        collate=Collate(processor, tag_embeds, prompt_embeds, cache, model),
        save=save,
        after_training=after_training,
        save_frozen=False,
        # What a checkpoint holds itself must be whole to be saved.
        shard=model.language_layers() if "language" in config.base_models else (),
    )


def _text_embeds(model: DynReferModel, processor: DynReferProcessor, texts: Sequence[str]) -> Tensor:
    """(V, D) embeddings, some hundred texts at a time: all tags at once would need gigabytes."""
    pieces = [
        model.encode_text(*processor.text_ids(texts[start : start + TEXTS_AT_ONCE]))
        for start in range(0, len(texts), TEXTS_AT_ONCE)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, model.config.text_config.projection_dim)


# -------------------------------------------------------------------- evaluation


def _targets(regions: list[RegionSample], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Labels of tags (R, V) and attributes (R, A; -1 unknown), and class indices (R,; -1 none)."""
    tags = TagList(vocabulary.tags)
    attributes = {attribute.name: k for k, attribute in enumerate(vocabulary.attributes)}
    classes = {name: k for k, name in enumerate(vocabulary.classes)}
    tag_labels = np.zeros((len(regions), len(vocabulary.tags)), int)
    attribute_labels = np.full((len(regions), len(attributes)), -1)
    for row, region in enumerate(regions):
        tag_labels[row, tags.of(region, map(clean_caption, region.captions))] = 1
        attribute_labels[row, [attributes[a] for a in region.negative_attributes if a in attributes]] = 0
        attribute_labels[row, [attributes[a] for a in region.attributes if a in attributes]] = 1
    category = np.array([classes.get(region.category or "", -1) for region in regions])
    return {"tags": tag_labels, "attributes": attribute_labels, "category": category}


def describe_all(
    predictor: DynReferPredictor, data: RegionData, **options: Any
) -> tuple[list[RegionSample], list[Region], list[int]]:
    """Run a predictor over the regions of a dataset: their truth, what was said, and their image ids."""
    return describe_index(predictor, *open_regions(data), **options)


def describe_index(
    predictor: DynReferPredictor, dataset: SampleDataset, index: list[tuple[int, int]], **options: Any
) -> tuple[list[RegionSample], list[Region], list[int]]:
    """`describe_all` of the (image, region) pairs of a dataset that `open_regions` gave."""
    by_image: dict[int, list[int]] = {}
    for image, number in index:
        by_image.setdefault(image, []).append(number)
    truth: list[RegionSample] = []
    said: list[Region] = []
    image_ids: list[int] = []
    images = list(by_image.items())
    for start in range(0, len(images), 16):
        samples = [(dataset[image], numbers) for image, numbers in images[start : start + 16]]
        boxes = [[sample.regions[number].box for number in numbers] for sample, numbers in samples]
        results: Any = predictor([str(sample.path) for sample, _ in samples], boxes=boxes, **options)
        for (sample, numbers), regions in zip(samples, results, strict=True):
            truth.extend(sample.regions[number] for number in numbers)
            image_ids.extend([sample.image_id] * len(numbers))
            said.extend(list(regions))
    return truth, said, image_ids


def calibrate(predictor: DynReferPredictor, data: CalibrationData) -> None:
    """Set the model's `calibration`, and with `data.tag_thresholds` its `tag_threshold`, from held-out regions.

    Fits probability = sigmoid(scale * logit + bias) of tags and attributes, and the temperature of the classes.
    """
    model, vocabulary = predictor.model, predictor.processor.vocabulary
    model.config.calibration = {}
    model.eval()
    lists = {"tags": vocabulary.tags, "attributes": vocabulary.attributes, "category": vocabulary.classes}
    tasks = tuple(task for task, words in lists.items() if words)
    truth, said, _ = describe_all(predictor, data, tasks=tasks)
    targets = _targets(truth, vocabulary)
    fitted: dict[str, list[float]] = {}
    for task, field in (("tags", "tag_scores"), ("attributes", "attribute_scores")):
        if task not in tasks:
            continue
        scores = np.array([list(getattr(region, field).values()) for region in said])
        logits = _logit(scores)
        if task == "tags" and data.tag_thresholds:
            # Nothing is calibrated yet, so these are the raw probabilities that thresholds are compared with.
            thresholds = pick_thresholds(scores, targets["tags"], vocabulary.tags, data.min_positives)
            others = model.config.tag_threshold
            model.config.tag_threshold = {**(others if isinstance(others, dict) else {"*": others}), **thresholds}
        if (targets[task] == 1).any() and (targets[task] == 0).any():
            scaling = fit_platt(logits, targets[task])
            fitted[task] = [scaling.scale, scaling.bias]
    known = targets["category"] >= 0
    if "category" in tasks and known.any():
        scores = np.array([list(region.category_scores.values()) for region in said])[known]
        fitted["category"] = [
            _temperature(torch.from_numpy(scores).clamp_min(1e-12).log(), torch.from_numpy(targets["category"][known]))
        ]
    model.config.calibration = fitted


def pick_thresholds(
    scores: np.ndarray, labels: np.ndarray, tags: Sequence[str], min_positives: int
) -> dict[str, float]:
    """The threshold of the best F1 of each tag that has enough regions to tell.

    Args:
        scores, labels: (R, V) raw probabilities, and 0 or 1.
        tags: the V names.
        min_positives: a tag of fewer regions has no entry.
    """
    return {
        tag: best_f1_threshold(scores[:, k], labels[:, k]).threshold
        for k, tag in enumerate(tags)
        if labels[:, k].sum() >= min_positives
    }


def _logit(probability: np.ndarray) -> np.ndarray:
    clipped = np.clip(probability.astype(np.float64), 1e-9, 1 - 1e-9)
    return np.log(clipped / (1 - clipped))


def _temperature(log_scores: Tensor, labels: Tensor) -> float:
    """The scale of softmax(scale * logits) with the least cross-entropy, by a fine search over its logarithm."""
    scales = torch.logspace(-1.5, 1.5, 301, dtype=torch.float64)
    losses = [torch.nn.functional.cross_entropy(scale * log_scores, labels) for scale in scales]
    return float(scales[int(torch.stack(losses).argmin())])


def evaluate(
    recipe: DynReferRecipe, model_path: Path, *, device: str | None = None, quantize: str | None = None
) -> dict[str, Any]:
    """Metrics of the main job on regions with given boxes, or those of a published protocol (spec 5).

    Args:
        device, quantize: as `DynReferPredictor.from_pretrained`.
    """
    predictor = DynReferPredictor.from_pretrained(model_path, device=device, quantize=quantize)
    settings = recipe.evaluation
    options: dict[str, Any] = {"num_beams": settings.num_beams, "batch_size": settings.batch_size}
    if settings.protocol is not None:
        return evaluate_protocol(
            settings.protocol, predictor, recipe.output, model=model_path, views=settings.views, **options
        )
    truth, said, image_ids = describe_all(
        predictor, settings.data, tasks=settings.tasks, views=settings.views, **options
    )
    return score(truth, said, predictor.processor.vocabulary, settings.tasks) | {
        "images": len(set(image_ids)),
        "dataset": f"{settings.data.format} {settings.data.root} {settings.data.split}",
        "boxes": "ground truth",
    }


def score(
    truth: list[RegionSample], said: list[Region], vocabulary: Vocabulary, tasks: Sequence[str]
) -> dict[str, Any]:
    """Category accuracy, attribute and tag mAP, caption metrics and calibration errors of described regions."""
    targets = _targets(truth, vocabulary)
    metrics: dict[str, Any] = {"regions": len(truth)}
    if "category" in tasks and (targets["category"] >= 0).any():
        known = targets["category"] >= 0
        scores = np.array([list(region.category_scores.values()) for region in said])[known]
        labels = targets["category"][known]
        breakdown = class_breakdown(scores, labels)
        metrics["category_accuracy"] = breakdown.accuracy
        metrics["category_ece"] = expected_calibration_error(scores.max(axis=1), scores.argmax(axis=1) == labels)
        metrics["per_category"] = {
            name: round(float(value), 4)
            for name, value in zip(vocabulary.classes, breakdown.per_class, strict=True)
            if np.isfinite(value)
        }
    for task, field in (("attributes", "attribute_scores"), ("tags", "tag_scores")):
        if task in tasks and (targets[task] == 1).any():
            scores = np.array([list(getattr(region, field).values()) for region in said])
            result = mean_average_precision(scores, targets[task])
            known = targets[task] >= 0
            name = task.removesuffix("s")
            metrics[f"{name}_map"] = result.mean
            metrics[f"{name}_ece"] = expected_calibration_error(scores[known], targets[task][known] == 1)
            if task == "attributes":
                names = [attribute.name for attribute in vocabulary.attributes]
                metrics["per_attribute"] = {
                    name: round(float(value), 4)
                    for name, value in zip(names, result.per_class, strict=True)
                    if np.isfinite(value)
                }
    if "caption" in tasks:
        captions = [region.caption or "" for region in said]
        references = [[clean_caption(text) for text in region.captions] for region in truth]
        canonical = [group[:1] for group in references]
        colours, relations = colour_names(), relation_predicates()
        report = caption_report(captions, references, colours=colours, attributes=attribute_vocabulary())
        metrics["cider"] = report.cider
        metrics["exact_caption"] = report.exact_match
        # Colour and relation are judged against the canonical caption: paraphrases may leave them out.
        first = [_first_word(caption, colours) for caption in captions]
        wanted = [_first_word(group[0], colours) for group in canonical]
        metrics["colour_word_accuracy"] = _share(first, wanted)
        metrics["attribute_word_accuracy"] = report.words["attribute"].accuracy
        relation = caption_report(captions, canonical, relations=relations).words["relation"]
        metrics["relation_word_accuracy"] = relation.accuracy
        metrics["regions_with_relation"] = relation.count
        metrics["per_relation"] = _per_relation(captions, [group[0] for group in canonical], relations)
    return metrics


def _per_relation(captions: list[str], canonical: list[str], relations: list[str]) -> dict[str, float]:
    """The share of right captions for each relation that canonical captions name first."""
    right: dict[str, list[bool]] = {relation: [] for relation in relations}
    for caption, reference in zip(captions, canonical, strict=True):
        wanted = mentioned_words(reference, relations)
        if wanted:
            right[wanted[0]].append(mentioned_words(caption, relations) == wanted)
    return {relation: round(float(np.mean(values)), 4) for relation, values in right.items() if values}


def _first_word(caption: str, words: list[str]) -> str | None:
    return next((word for word in caption.split() if word in words), None)


def _share(said: list[str | None], wanted: list[str | None]) -> float:
    pairs = [(a, b) for a, b in zip(said, wanted, strict=True) if b is not None]
    return float(np.mean([a == b for a, b in pairs])) if pairs else float("nan")
