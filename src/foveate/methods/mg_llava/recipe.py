"""Two-stage training of MG-LLaVA from a recipe, and its accuracy on questions about pictures (spec 3, 10)."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator

from foveate.checkpoints import find_checkpoint
from foveate.data.llava import Conversations
from foveate.data.samples import BoxSet, ConversationSample
from foveate.errors import FoveateError, InputError, RecipeError
from foveate.language.decoding import Sampling
from foveate.language.lm import check_tokenizer, load_config, load_tokenizer
from foveate.language.pretrained import first_line, load_complete
from foveate.language.templates import IGNORED, PLACEHOLDERS
from foveate.methods import load
from foveate.training.conversations import (
    AskedQuestion,
    ConversationData,
    check_root,
    open_questions,
    open_samples,
    plain_question,
    present_samples,
    turns,
    write_answers,
)
from foveate.training.recipes import LARGEST, Recipe, RecipePath, RecipeSection, TrainingSettings
from foveate.training.sampling import SampleLengths, SampleRandom, SeededDataset
from foveate.training.trainer import TrainingTask, split_by
from foveate.vision.towers import VisionTower, load_tower
from foveate.vision.video import load_video

from .adapters import Adapters, LoraSettings, check_quantisation, quantisation
from .configuration import MGLlavaConfig, find_mg_llava
from .conversion import load_trunk
from .feature_cache import Entry, FeatureCache
from .modeling import MGLlavaModel, TowerFeatures
from .predictor import MGLlavaPredictor
from .processing import MGLlavaProcessor, Picture, stack_pictures
from .protocols import ProtocolSettings, evaluate_protocol

log = logging.getLogger(__name__)

MOST_BAD_IN_A_ROW = 100
"""Samples that cannot be learnt from, one after the other; more are no accident."""


class TrainingData(ConversationData):
    group_by_length: bool = Field(
        False, description="batches of similar lengths, with pictures or without (the sampler of the second stage)"
    )
    shuffle_turns: bool = Field(
        False, description="draw the order of a conversation's questions anew, where none refers to another"
    )
    kinds: tuple[str, ...] = Field(
        (), description="learn only from questions of these kinds, the extra key of a message; without any, from all"
    )
    most_turns: int | None = Field(
        None, gt=0, description="questions of a conversation, drawn anew each epoch where turns are shuffled"
    )
    cache_features: RecipePath | None = Field(
        None, description="folder that keeps what the frozen towers see of each picture, computed once for all runs"
    )


def _check_generation(value: dict[str, Any] | None) -> dict[str, Any] | None:
    try:
        Sampling.of(value or {})
    except InputError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return value


class ModelSettings(RecipeSection):
    """What is built or started from; a field means what it means in `MGLlavaConfig`."""

    base_models: dict[Literal["vision", "high_res", "language"], str] = Field(
        default_factory=dict, description="CLIP, ConvNeXt and language model; not needed with `init_from`"
    )
    init_from: str | None = Field(None, description="start from this MG-LLaVA, such as that of the first stage")
    keep_towers: bool = Field(
        True, description="save the frozen towers too; false: only their names, as base_models gave them"
    )
    frozen_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen parts in training")
    gradient_checkpointing: bool = Field(False, description="compute the language model's layers twice, to save memory")
    lora: LoraSettings | None = Field(None, description="second stage: adapters in place of the whole language model")
    vision_layer: int = -2
    high_res_size: int | None = Field(None, gt=0, le=4096, description="null: what gives the grid of the vision tower")
    fusion: str = "conv_gate"
    patch_info_stages: str = "all"
    resampler_heads: int = Field(8, gt=0, le=256)
    objects: str = "concat"
    object_levels: str = "all"
    object_bins: int | None = Field(None, gt=0, le=1024)
    unfused_keys: bool = False
    legacy_tower_train_mode: bool = False
    template: str = "vicuna"
    pad_to_square: bool = True
    box_iou: float = Field(0.2, ge=0, le=1)
    box_limit: int = Field(100, gt=0, le=100_000)
    box_limit_mode: str = "per_category"
    hard_cap: bool = False
    num_frames: int = Field(8, gt=0, le=1024)
    max_text_length: int = Field(1472, gt=0, le=LARGEST)
    generation: Annotated[dict[str, int | float] | None, AfterValidator(_check_generation)] = None

    @model_validator(mode="after")
    def _one_start(self) -> ModelSettings:
        if self.init_from is None:
            missing = {"vision", "high_res", "language"} - set(self.base_models)
            if missing:
                raise ValueError(f"base_models must name {', '.join(sorted(missing))} too, or give init_from")
        elif self.base_models:
            raise ValueError("init_from brings all parts; remove base_models")
        return self


_LEFT_OUT: Any = None
"""The default of sections that a recipe may leave out only if another one is there; a validator sees to it."""


class EvaluationSettings(RecipeSection):
    data: ConversationData = Field(_LEFT_OUT)
    protocol: ProtocolSettings | None = Field(
        None, description="a published protocol on its own data, in place of `data`"
    )
    boxes: Literal["given", "none", "shuffled"] = Field(
        "given", description="controls: no boxes at all, or those of another picture"
    )
    batch_size: int = Field(16, gt=0, le=LARGEST)
    max_new_tokens: int = Field(32, gt=0, le=100_000)

    @model_validator(mode="after")
    def _one_of_two(self) -> EvaluationSettings:
        if (self.data is None) == (self.protocol is None):
            raise ValueError("give either data or protocol")
        if self.protocol is not None and "boxes" in self.model_fields_set:
            raise ValueError("boxes is for data; set protocol.boxes")
        return self


class MGLlavaRecipe(Recipe):
    """A recipe of a published protocol may leave out `stage`, `data`, `model` and `training`, all four: it only
    evaluates."""

    stage: Literal["pretrain", "sft"] = Field(
        _LEFT_OUT, description="pretrain: fusion and projectors learn; sft: the language model too (spec 3.2)"
    )
    data: TrainingData = Field(_LEFT_OUT)
    model: ModelSettings = Field(_LEFT_OUT)
    training: TrainingSettings = Field(_LEFT_OUT)
    evaluation: EvaluationSettings

    @model_validator(mode="after")
    def _can_train(self) -> MGLlavaRecipe:
        missing = [name for name in ("stage", "data", "model", "training") if getattr(self, name) is None]
        if missing and (self.evaluation.protocol is None or len(missing) < 4):
            raise ValueError(f"the key {missing[0]!r} is missing; add it")
        return self

    @model_validator(mode="after")
    def _adapters_in_the_second_stage(self) -> MGLlavaRecipe:
        if self.model is not None and self.stage == "pretrain" and self.model.lora is not None:
            raise ValueError("model.lora adapts the language model, which the stage pretrain leaves alone; remove it")
        return self


RECIPE = MGLlavaRecipe

# -------------------------------------------------------------------- data


def box_record(boxes: BoxSet) -> dict[str, Any]:
    """As `BoxRecord.parse` takes it."""
    return {"boxes": [list(box) for box in boxes.boxes], "scores": list(boxes.scores), "labels": list(boxes.labels)}


class ConversationDataset(SeededDataset):
    """A conversation a sample: ids, labels (answers only), and its picture or frames with their boxes.

    A sample without a label left, because its first answer begins beyond the longest text, is no sample (spec 3.3): the
    next one takes its place, as for a picture that cannot be read where `data.skip_bad` is on.

    Attributes:
        replaced: how often another sample took the place of one, by the reason.
    """

    def __init__(
        self, samples: Conversations, index: Sequence[int], processor: MGLlavaProcessor, data: TrainingData
    ) -> None:
        self.samples, self.index, self.processor, self.data = samples, list(index), processor, data
        self.replaced: Counter[str] = Counter()
        self.cache: FeatureCache | None = None
        self._entries: dict[int, int] = {}  # of each place of `samples`, its number in the cache

    def __len__(self) -> int:
        return len(self.index)

    def keep_features(self, folder: Path, model: MGLlavaModel) -> None:
        """Have the towers see every picture now, as far as `folder` does not know it; samples then have features in
        the place of pictures.

        Raises:
            InputError, RecipeError: as `FeatureCache`.
        """
        entries: dict[Any, int] = {}
        listed: list[Entry] = []
        for place in self.index:
            sample = self.samples[place]
            path = sample.video or sample.image
            if path is None:
                continue
            records = tuple(box_record(boxes) for boxes in sample.boxes)
            key = (path, json.dumps(records))
            if key not in entries:
                entries[key] = len(listed)
                listed.append(Entry(path, sample.video is not None, records))
            self._entries[place] = entries[key]
        self.cache = FeatureCache(folder, listed, model, self.processor)

    def leave_out_other_kinds(self) -> None:
        """Keep the conversations that have a question of the recipe's kinds.

        Raises:
            RecipeError: none has.
        """
        wanted = set(self.data.kinds)
        self.index = [place for place in self.index if any(turn[2] in wanted for turn in turns(self.samples[place]))]
        if not self.index:
            raise RecipeError(f"no conversation of data has a question of the kinds {', '.join(self.data.kinds)}")

    def lengths(self) -> SampleLengths:
        """Words of each conversation; kinds: 0 text only, 1 an image, 2 a video. Visual tokens are as many for each."""
        lengths, kinds = [], []
        for place in self.index:
            sample = self.samples[place]
            lengths.append(self._words(sample))
            kinds.append(2 if sample.video is not None else int(sample.image is not None))
        return SampleLengths(lengths, kinds)

    def _words(self, sample: ConversationSample) -> int:
        if not self.data.kinds and self.data.most_turns is None:
            return sum(len(message.text.split()) for message in sample.messages)
        kept = [turn for turn in turns(sample) if not self.data.kinds or turn[2] in self.data.kinds]
        return sum(len(f"{asked} {answer}".split()) for asked, answer, _, _ in kept[: self.data.most_turns])

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        reason = ""
        for bad in range(MOST_BAD_IN_A_ROW):
            place = self.index[(index + bad) % len(self)]
            sample = self.samples[place]
            try:
                ids, labels = self.processor.encode(self.messages(sample, random))
                if any(label != IGNORED for label in labels):
                    learnt = {"input_ids": ids, "labels": labels}
                    if self.cache is None:
                        return learnt | {"pictures": self._pictures(sample, len(ids))}
                    entry = self._entries.get(place)
                    return learnt | {"features": None if entry is None else self.cache.read(entry, len(ids))}
                reason = f"the sample {sample.sample_id} has no answer among its first {len(ids)} tokens"
                kind = "no answer left"
            except InputError as error:
                reason, kind = str(error).rstrip("."), "broken"
                if not self.data.skip_bad:
                    raise InputError(
                        f"the sample {sample.sample_id}: {reason}. Or set data.skip_bad to train without it."
                    ) from error
            self.replaced[kind] += 1
            total = self.replaced.total()
            log.warning("%s; the next sample is taken in its place (%d so far in this process)", reason, total)
        raise InputError(f"{MOST_BAD_IN_A_ROW} samples in a row cannot be learnt from, the last because {reason}.")

    def messages(self, sample: ConversationSample, random: SampleRandom) -> list[dict[str, str]]:
        """The conversation in LLaVA's form, its turns in an order of their own where the recipe says so."""
        spoken = [(message.speaker, message.text) for message in sample.messages]
        data = self.data
        if data.shuffle_turns or data.kinds or data.most_turns is not None:
            kept = [turn for turn in turns(sample) if not data.kinds or turn[2] in data.kinds]
            pairs = [(plain_question(asked), answer) for asked, answer, _, _ in kept]
            seen = next((name for _, text in spoken for name in PLACEHOLDERS if name in text), None)
            if data.shuffle_turns:
                random.numpy.shuffle(pairs)
            pairs = pairs[: data.most_turns]
            spoken = [line for asked, answer in pairs for line in (("human", asked), ("gpt", answer))]
            if seen is not None:
                spoken[0] = ("human", f"{seen}\n{spoken[0][1]}")
        return [{"from": speaker, "value": text} for speaker, text in spoken]

    def _pictures(self, sample: ConversationSample, text_length: int) -> list[list[Picture]]:
        records = [box_record(boxes) for boxes in sample.boxes]
        if sample.video is not None:
            frames = load_video(sample.video, self.processor.config.num_frames).frames
            return [self.processor.video(frames, records or None)]
        if sample.image is None:
            return []
        boxes = records[0] if records else None
        return [[self.processor.picture(sample.image, boxes, text_length=text_length)]]


class Collate:
    """Samples -> the keywords of `MGLlavaModel.forward`.

    Where parameters are split between processes, each has to run the same modules: a batch of texts gets a picture that
    belongs to no text (spec 2.4: zeros with a box of 100 pixels).
    """

    def __init__(self, processor: MGLlavaProcessor) -> None:
        self.processor = processor
        self.always_sees = split_by() is not None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.processor.collate(samples)
        seen = [features for sample in samples if (features := sample.get("features")) is not None]
        if seen:
            batch["tower_features"] = TowerFeatures.join(seen).tensors()
            batch["visual_counts"] = torch.tensor([len(features.low) for features in seen])
            return batch
        if self.always_sees and "pixel_values" not in batch:
            config = self.processor.config
            low, high = (torch.zeros(3, side, side) for side in (config.low_res_size, config.high_res_size))
            batch |= stack_pictures([Picture(low, high, torch.tensor([[0.0, 0.0, 100.0, 100.0]]), ())])
            batch["visual_counts"] = torch.zeros(0, dtype=torch.long)
        return batch


# -------------------------------------------------------------------- model

CHANGEABLE = frozenset(
    {"template", "pad_to_square", "box_iou", "box_limit", "box_limit_mode", "hard_cap"}
    | {"num_frames", "max_text_length", "generation"}
)
"""Settings of the recipe that a checkpoint can be given; the others are what its weights were made for."""
_OWN = {"base_models", "init_from", "keep_towers", "frozen_dtype", "gradient_checkpointing", "lora"}


@dataclass(frozen=True)
class Parts:
    """A model with its processor before a stage has been set."""

    model: MGLlavaModel
    processor: MGLlavaProcessor


def build_model(settings: ModelSettings, stage: str) -> Parts:
    """The model of a recipe; what the stage trains in float32, the rest in `frozen_dtype`.

    Raises:
        RecipeError: the sizes do not fit each other or the checkpoints, or what QLoRA needs is not here.
        InputError, CheckpointError: a checkpoint is missing or damaged.
    """
    frozen: torch.dtype = getattr(torch, settings.frozen_dtype)
    whole_language = stage == "sft" and settings.lora is None
    quantised = settings.lora is not None and settings.lora.quantise is not None
    if quantised:
        check_quantisation()
    dtype = torch.float32 if whole_language else torch.bfloat16 if quantised else frozen
    parts = (_continue_from if settings.init_from is not None else _assemble)(settings, dtype, quantised)
    model = parts.model
    model.vision_tower.to(frozen)
    if model.config.sees_high_res:
        model.high_res_tower.to(frozen)
    for parameter in model.bridge_parameters():
        parameter.data = parameter.data.float()
    model.set_stage(stage)
    if settings.gradient_checkpointing:
        language: Any = model.language_model
        # transformers 5.23 gave it another name.
        enable = getattr(language, "activation_checkpointing_enable", None) or language.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return parts


def _assemble(settings: ModelSettings, dtype: torch.dtype, quantised: bool) -> Parts:
    """Fresh fusion and projectors between the base models."""
    folders = {part: find_checkpoint(name) for part, name in settings.base_models.items()}
    tower = load_tower(folders["vision"], dtype=torch.float32)
    trunk, trunk_weights = load_trunk(folders["high_res"])
    language_config = load_config(folders["language"])
    if getattr(language_config, "is_encoder_decoder", False):
        raise RecipeError(
            f"model.base_models.language must be a causal language model, not a {language_config.model_type!r}"
        )
    chosen = settings.model_dump(exclude=_OWN)
    tower_config: Any = tower.model.config
    if chosen["high_res_size"] is None:
        stride = trunk.patch_size * 2 ** (len(trunk.hidden_sizes) - 1)
        chosen["high_res_size"] = tower_config.image_size // tower_config.patch_size * stride
    try:
        config = MGLlavaConfig(
            vision_config=_plain(tower_config),
            high_res_config=_plain(trunk),
            language_config=_plain(language_config),
            **chosen,
        )
        if not settings.keep_towers:
            towers = ("vision", "high_res") if config.sees_high_res else ("vision",)
            config.base_models = {part: settings.base_models[part] for part in towers}
        model = MGLlavaModel(config, _load_language(folders["language"], dtype, quantised))
    except FoveateError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # of transformers' models, on their sizes
        raise RecipeError(
            f"the settings of model do not fit together: {first_line(error).rstrip('.')}; change one of them."
        ) from None
    model.vision_tower.load_state_dict(tower.state_dict())
    if config.sees_high_res:
        model.high_res_tower.model.load_state_dict(trunk_weights)
    return Parts(model, _processor(load_tokenizer(folders["language"]), model, tower, folders["language"]))


def _processor(tokenizer: Any, model: MGLlavaModel, tower: VisionTower, source: Path) -> MGLlavaProcessor:
    config: Any = model.config
    check_tokenizer(tokenizer, config.language_config.vocab_size, f"the tokenizer of {source}")
    return MGLlavaProcessor(tokenizer, config, image_mean=tower.mean, image_std=tower.std)


def _load_language(folder: Path, dtype: torch.dtype, quantised: bool) -> Any:
    from transformers import AutoModelForCausalLM

    extra = {"quantization_config": quantisation()} if quantised else {}
    return load_complete(AutoModelForCausalLM, str(folder), dtype=dtype, **extra)


def _plain(config: Any) -> dict[str, Any]:
    """A part's configuration without what belongs to the checkpoint that it was in."""
    left_out = ("dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def _continue_from(settings: ModelSettings, dtype: torch.dtype, quantised: bool) -> Parts:
    """The model of a checkpoint with the recipe's own settings, where it gives any.

    Raises:
        RecipeError: the recipe says a size that is not the checkpoint's.
    """
    name = str(settings.init_from)
    folder = find_mg_llava(name)
    extra = {}
    if quantised:
        bridges = ["fusion", "image_projector", "box_projector", "level_projectors", "object_attention", "lm_head"]
        extra["quantization_config"] = quantisation(skip=["vision_tower", "high_res_tower", *bridges])
    model = MGLlavaModel.from_pretrained(folder, dtype=dtype, **extra)
    config = model.config
    for field in settings.model_fields_set - _OWN:
        wanted = getattr(settings, field)
        if field in CHANGEABLE:
            setattr(config, field, {**config.generation, **(wanted or {})} if field == "generation" else wanted)
        elif wanted is not None and getattr(config, field) != wanted:
            raise RecipeError(
                f"model.{field} is {wanted!r}, but the checkpoint {name} of model.init_from has "
                f"{getattr(config, field)!r}"
            )
    if settings.keep_towers and "keep_towers" in settings.model_fields_set:
        config.base_models = {}
    elif not settings.keep_towers and not config.base_models:
        raise RecipeError(
            f"model.keep_towers is false, but the checkpoint {name} does not say where its towers are from"
        )
    try:
        config.check()
    except ValueError as error:
        raise RecipeError(f"the settings of model do not fit the checkpoint {name}: {error}") from None
    processor = MGLlavaProcessor.from_pretrained(folder, config=config)
    check_tokenizer(processor.tokenizer, config.language_config.vocab_size, f"the tokenizer of {folder}")
    return Parts(model, processor)


def build(recipe: MGLlavaRecipe) -> TrainingTask:
    """Data, model, collation and what is saved."""
    if recipe.data is None:
        raise RecipeError("this recipe evaluates by a published protocol and has nothing to train; give another one")
    if recipe.evaluation.protocol is None:
        check_root(recipe.evaluation.data, "evaluation.data")  # what is needed after hours of training
    check_root(recipe.data, "data")
    parts = build_model(recipe.model, recipe.stage)
    model, processor = parts.model, parts.processor
    adapters = None
    if recipe.model.lora is not None:
        adapters = Adapters(model, recipe.model.lora)
    samples, index = open_samples(recipe.data, recipe.seed)
    index = present_samples(samples, index, recipe.data.skip_bad)
    dataset = ConversationDataset(samples, index, processor, recipe.data)
    if recipe.data.cache_features is not None:
        dataset.keep_features(recipe.data.cache_features, model)
    if recipe.data.kinds:  # after the features, which are of all pictures, for other recipes too
        dataset.leave_out_other_kinds()

    def save(folder: Path) -> None:
        trained: MGLlavaModel = model
        if adapters is not None:
            adapters.save(folder / "adapter")
            trained = adapters.merged(lambda: _whole_again(recipe))
        save_model(trained, processor, folder)

    def save_state(folder: Path, whole: dict[str, torch.Tensor]) -> None:
        save_model(model, processor, folder, whole)

    return TrainingTask(
        model=model,
        train_dataset=dataset,
        collate=Collate(processor),
        save=save,
        # What is adapted has to be whole to be merged, and is small enough not to be split.
        save_state=save_state if adapters is None else None,
        save_frozen=False,
        lengths=dataset.lengths() if recipe.data.group_by_length else None,
    )


def _whole_again(recipe: MGLlavaRecipe) -> MGLlavaModel:
    """The model that training started from, not quantised, to merge adapters into."""
    settings = recipe.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
    start: Callable[..., Parts] = _continue_from if settings.init_from is not None else _assemble
    return start(settings, torch.bfloat16, False).model


def save_model(
    model: MGLlavaModel, processor: MGLlavaProcessor, folder: Path, whole: dict[str, torch.Tensor] | None = None
) -> None:
    """A folder that `foveate.load` reads. Parts of different precision are loaded in the one that loses nothing.

    Args:
        whole: the model's weights, where this process has a part of them only.
    """
    kept = {tensor.dtype for tensor in (model.state_dict() if whole is None else whole).values()}
    model.config.dtype = kept.pop() if len(kept) == 1 else torch.float32
    model.save_pretrained(folder, state_dict=whole)
    processor.save_pretrained(folder)


# -------------------------------------------------------------------- evaluation


def evaluate(
    recipe: MGLlavaRecipe, model_path: Path, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Accuracy of greedy answers, by kind of question and size of what it is about; or a published protocol (spec 5),
    with any model that `foveate.load` gives an `ask`.

    An answer is right if it is the expected one after VQA's normalisation. OUTPUT/answers.jsonl has every answer,
    OUTPUT/accuracy.md the table.

    Args:
        progress: called with (questions done, questions in all).
    """
    settings = recipe.evaluation
    if settings.protocol is not None:
        return evaluate_protocol(
            settings.protocol,
            load(model_path, proposer=settings.protocol.proposer),
            recipe.output,
            model=model_path,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            progress=progress,
        )
    predictor = MGLlavaPredictor.from_pretrained(model_path)
    questions = open_questions(settings.data)
    boxes = boxes_of(questions, settings.boxes)
    said = predictor.ask(
        [question.sample.image or question.sample.video for question in questions],
        [question.question for question in questions],
        boxes=boxes,
        batch_size=settings.batch_size,
        temperature=0.0,
        max_new_tokens=settings.max_new_tokens,
        progress=progress,
    )
    metrics = write_answers(recipe.output, questions, [answer.text for answer in said])
    gates = [value for answer in said for value in answer.gate]
    return {
        **metrics,
        **({"gate": float(np.mean(gates))} if gates else {}),
        "boxes": settings.boxes if settings.data.boxes else "none",
        "dataset": f"{settings.data.root} {' '.join(settings.data.annotations)}",
    }


def boxes_of(questions: Sequence[AskedQuestion], how: str) -> list[Any]:
    """The boxes of each question's picture; "shuffled": those of the next other picture, the last has the first's."""
    records: dict[Any, Any] = {}
    for question in questions:
        sample = question.sample
        own = [box_record(boxes) for boxes in sample.boxes]
        records[_picture_key(sample)] = None if not own else own if sample.video is not None else own[0]
    if how == "none":
        records = dict.fromkeys(records)
    elif how == "shuffled":
        seen = [key for key, record in records.items() if record is not None]
        moved = {key: records[other] for key, other in zip(seen, [*seen[1:], *seen[:1]], strict=True)}
        records |= moved
    return [records[_picture_key(question.sample)] for question in questions]


def _picture_key(sample: ConversationSample) -> Any:
    return sample.sample_id, sample.image, sample.video
