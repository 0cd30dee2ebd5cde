"""Hyper-parameters of DynRefer, validated; the defaults are the released model's (spec 2)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.clip.configuration_clip import CLIPTextConfig

from foveate.checkpoints import find_checkpoint, read_config, suggestion
from foveate.errors import CheckpointError, InputError
from foveate.language.generation import check_generation
from foveate.language.pretrained import check_base_models, first_line

from .captioners import Captioner, captioner_of

CANDIDATE_VIEWS: tuple[float, ...] = tuple(round(0.1 * k, 1) for k in range(1, 11))
"""The interpolation coefficients that a context view may take (paper section 3.1, spec 2.1)."""

SELECTIONS = ("official", "pairwise", "median")
"""The searches for views by perceptual hash (spec 4.2)."""
SEARCH_NAMES = ("auto", *SELECTIONS)
VIEW_NAMES = ("task", *SEARCH_NAMES)
"""Names that `views` has in Python, recipes and on the command line; "auto" is "official". A `view_policy` takes all
but "task", which stands for it."""
DEFAULT_TAG_THRESHOLD = 0.7
"""Spec 4.1."""


class DynReferConfig(PreTrainedConfig):
    """Configuration of a `DynReferModel`.

    Args:
        vision_config: the frozen vision tower (any model that `foveate.vision.towers` knows).
        text_config: the frozen text encoder of the contrast head (`CLIPTextConfig` with a projection).
        qformer_config: the Q-Former (`Blip2QFormerConfig`); its encoder width is the tower's.
        language_config: the frozen language model: an encoder-decoder (T5) or a decoder-only one (Llama's layout).
        num_views: n, the number of views a region is seen in; the first is always the region itself (t = 0).
        image_size: side in pixels to which every view is resized.
        vision_layer: which hidden states of the tower are used: "last_hidden_state" (after its final norm) or an index.
        num_query_tokens: number of region tokens.
        align: switch of the align module; without it the RoI features of the context views are fused as they are.
        align_groups: groups of channels that share their sampling offsets.
        head_size / head_layers / head_num_attention_heads / head_dropout: of the tag and contrast heads.
        tag_loss_weight / contrast_loss_weight / caption_loss_weight: the factors of the three objectives (0 removes
            a task; spec 3: 0.01, 0.5, 1).
        prompt_loss_weight: factor of the supervised sigmoid loss on attribute and class prompts; 0 (off) in the paper.
        tag_threshold: a tag is reported above this probability (spec 4.1: 0.7); or a mapping of tags to theirs, in
            which "*" is that of all others (0.7 without it). It is compared with the raw probability, before
            `calibration`.
        attribute_threshold: an attribute is listed above this probability.
        view_policy: task -> the t's of its n - 1 context views, or the name of a search; used by `views="task"` (spec
            4.3). A task that it does not name searches.
        calibration: task -> [scale, bias] fitted on held-out regions: probability = sigmoid(scale * logit + bias), or
            softmax(scale * logits) for "category". Missing tasks use the training logits.
        exact_box_rounding: truncate region boxes inside a view as the official code does (spec 2.1).
        base_models: part ("vision", "text", "language") -> name of the checkpoint that holds its frozen weights. A
            part named here is neither saved with the model nor looked for in its file.
        proposer: checkpoint of the region proposer that `everything=True` uses; None if there is none.
        max_text_tokens: limit for control words and captions; None for that of the official class, 32 with an
            encoder-decoder and 256 with a decoder-only model (spec 2.10, 2.11).
        generation: decoding defaults (spec 4.1).
    """

    model_type = "foveate_dynrefer"
    sub_configs_defaults: ClassVar[Any] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_vision_model"),
        "text_config": CLIPTextConfig,
        "qformer_config": Blip2QFormerConfig,
        "language_config": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
    }

    # Mappings become configurations when transformers reads them; Any, because which class is known at run time only.
    vision_config: Any = None
    text_config: Any = None
    qformer_config: Any = None
    language_config: Any = None
    num_views: int = 3
    image_size: int = 224
    vision_layer: int | str = "last_hidden_state"
    num_query_tokens: int = 32
    align: bool = True
    align_groups: int = 4
    head_size: int = 256
    head_layers: int = 2
    head_num_attention_heads: int = 4
    head_dropout: float = 0.1
    tag_loss_weight: float = 0.01
    contrast_loss_weight: float = 0.5
    caption_loss_weight: float = 1.0
    prompt_loss_weight: float = 0.0
    tag_threshold: Any = DEFAULT_TAG_THRESHOLD
    attribute_threshold: float = 0.5
    view_policy: Any = None
    calibration: Any = None
    exact_box_rounding: bool = True
    base_models: Any = None
    proposer: str | None = None
    max_text_tokens: int | None = None
    generation: Any = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.max_text_tokens is None:
            self.max_text_tokens = self.captioner.text_tokens
        self._check_values()
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.is_encoder_decoder = False
        if not self.view_policy:  # with more views than the default has t's for, tasks search for theirs
            context = self.num_views - 1
            fits = all(len(t) >= context for t in DEFAULT_VIEW_POLICY.values())
            self.view_policy = {task: t[:context] for task, t in DEFAULT_VIEW_POLICY.items()} if fits else {}
        self.calibration = self.calibration or {}
        self.base_models = self.base_models or {}
        self.generation = {**DEFAULT_GENERATION, **(self.generation or {})}
        self.check()

    def _check_values(self) -> None:
        """Each value by itself: a file that can be read as JSON may still hold anything."""
        for name in _SIZES:
            if not is_whole(getattr(self, name)) or not 1 <= getattr(self, name) <= 65536:
                raise ValueError(f"{name} must be a whole number from 1 to 65536, not {getattr(self, name)!r}")
        for name, high in _NUMBERS.items():
            if not is_number(getattr(self, name), 0, high):
                raise ValueError(f"{name} must be a number from 0 to {high:g}, not {getattr(self, name)!r}")
        check_tag_threshold(self.tag_threshold)
        for name in ("align", "exact_box_rounding"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("view_policy", "calibration", "base_models", "generation"):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} must be a mapping, not {getattr(self, name)!r}")
        if not isinstance(self.proposer, str | None):
            raise ValueError(f"proposer must be the name of a checkpoint, not {self.proposer!r}")

    def check(self) -> None:
        """Whether the values fit together; to be called again where they are changed.

        Raises:
            ValueError: the sentence names the value.
        """
        width = self.vision_config.hidden_size
        if self.image_size % self.vision_config.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the tower's patch size "
                f"{self.vision_config.patch_size}"
            )
        layers = self.vision_config.num_hidden_layers
        inner = is_whole(self.vision_layer) and -layers - 1 <= self.vision_layer <= layers
        if self.vision_layer != "last_hidden_state" and not inner:
            raise ValueError(
                f"vision_layer must be 'last_hidden_state' or one of the tower's {-layers - 1} to {layers}, "
                f"not {self.vision_layer!r}"
            )
        if width % self.align_groups:
            raise ValueError(f"the tower's width {width} is not divisible by align_groups {self.align_groups}")
        if self.head_size % self.head_num_attention_heads:
            raise ValueError(f"head_size {self.head_size} is not divisible by {self.head_num_attention_heads} heads")
        check_view_policy(self.view_policy)
        for task, coefficients in self.view_policy.items():
            if isinstance(coefficients, str):
                continue
            if len(coefficients) not in (self.num_views - 1, self.num_views):
                raise ValueError(
                    f"view_policy gives {len(coefficients)} t's for {task}, but {self.num_views} views need "
                    f"{self.num_views - 1}"
                )
            if len(coefficients) == self.num_views and coefficients[0] != 0:
                raise ValueError(f"view_policy gives all t's of {task}, so that the first must be 0: {coefficients}")
        for task, numbers in self.calibration.items():
            wanted = {"tags": 2, "attributes": 2, "category": 1}.get(task)
            if wanted is None:
                raise ValueError(f"calibration names {task!r}; it has tags, attributes and category")
            finite = isinstance(numbers, list | tuple) and all(is_number(value, -1e30, 1e30) for value in numbers)
            if not finite or len(numbers) != wanted or (task == "category" and numbers[0] <= 0):
                what = "one number above 0" if wanted == 1 else "two finite numbers, scale and bias"
                raise ValueError(f"calibration of {task} must be a list of {what}, not {numbers!r}")
        check_base_models(self.base_models, ("vision", "text", "language"))
        check_generation(self.generation)

    @property
    def captioner(self) -> type[Captioner]:
        """The kind of the language model."""
        return captioner_of(self.language_config)

    @property
    def grid_size(self) -> int:
        """Side of the RoI grid: one cell for each patch of a view."""
        return self.image_size // self.vision_config.patch_size


DEFAULT_VIEW_POLICY: dict[str, list[float]] = {
    "attributes": [0.1, 0.2],
    "category": [0.1, 0.2],
    "tags": [0.3, 0.5],
    "caption": [0.3, 0.5],
}
"""Spec 4.3: attributes look close, captions look wide. Tags feed the caption, so they share its views."""

DEFAULT_GENERATION: dict[str, Any] = {
    "num_beams": 2,
    "max_new_tokens": 20,
    "min_length": 1,
    "length_penalty": 0.0,
    "repetition_penalty": 1.5,
}
"""Spec 4.1 step 7."""

_SIZES = ("num_views", "image_size", "num_query_tokens", "align_groups", "head_size", "head_layers")
_SIZES += ("head_num_attention_heads", "max_text_tokens")
_NUMBERS = dict.fromkeys(("head_dropout", "attribute_threshold", "initializer_range"), 1.0)
_NUMBERS |= dict.fromkeys(("tag_loss_weight", "contrast_loss_weight", "caption_loss_weight", "prompt_loss_weight"), 1e9)
"""The highest value that a number may have; the lowest is 0."""


def check_tag_threshold(threshold: Any) -> None:
    """Whether it is one threshold of tags or a mapping of tags to theirs.

    Raises:
        ValueError: no number from 0 to 1, or a mapping with something else in it; the sentence names the tag.
    """
    if isinstance(threshold, dict):
        for tag, value in threshold.items():
            if not isinstance(tag, str) or not is_number(value, 0, 1):
                raise ValueError(f"tag_threshold of {tag!r} must be a number from 0 to 1, not {value!r}")
    elif not is_number(threshold, 0, 1):
        raise ValueError(f"tag_threshold must be a number from 0 to 1, not {threshold!r}, or a mapping of tags to such")


def tag_thresholds(threshold: float | Mapping[str, float], tags: Sequence[str]) -> list[float]:
    """The threshold of each tag of a list, from `DynReferConfig.tag_threshold`."""
    if not isinstance(threshold, Mapping):
        return [threshold] * len(tags)
    others = threshold.get("*", DEFAULT_TAG_THRESHOLD)
    return [threshold.get(tag, others) for tag in tags]


def check_coefficients(coefficients: Any) -> None:
    """Whether these are t's of views, in a recipe or a checkpoint.

    Raises:
        ValueError: no list of numbers from 0 to 1.
    """
    if not isinstance(coefficients, list | tuple) or not all(is_number(t, 0, 1) for t in coefficients):
        raise ValueError(
            f"views are a list of t's between 0 (the region) and 1 (the whole image), such as [0.3, 0.5], "
            f"not {coefficients!r}"
        )


def check_view_names(views: str, names: Sequence[str] = VIEW_NAMES) -> None:
    """Whether this is one of the names that views have.

    Raises:
        ValueError: it is not; the sentence suggests the nearest name.
    """
    if views not in names:
        raise ValueError(
            f"unknown views {views!r}{suggestion(views, names)}; use {', '.join(names)}, or a list of t's from 0 "
            "(the region) to 1 (the whole image)"
        )


def check_view_policy(policy: Any, names: Sequence[str] = SEARCH_NAMES) -> None:
    """Whether this maps tasks to their t's or to one of the names.

    Raises:
        ValueError: it does not; the sentence names the task.
    """
    if not isinstance(policy, Mapping):
        raise ValueError(f"a mapping of tasks to t's is needed, not {policy!r}")
    for task, views in policy.items():
        if task not in DEFAULT_VIEW_POLICY:
            near = suggestion(str(task), DEFAULT_VIEW_POLICY)
            raise ValueError(f"a view policy names the task {task!r}{near}; tasks are {', '.join(DEFAULT_VIEW_POLICY)}")
        try:
            if isinstance(views, str):
                check_view_names(views, names)
            else:
                check_coefficients(views)
        except ValueError as error:
            raise ValueError(f"view_policy of {task}: {error}") from None


def check_views(views: Any) -> None:
    """Whether a recipe's `views` are a name, t's, or one of both for each task.

    Raises:
        ValueError: they are not.
    """
    if isinstance(views, str):
        check_view_names(views)
    elif isinstance(views, Mapping):
        check_view_policy(views, VIEW_NAMES)
    else:
        check_coefficients(views)


def find_dynrefer(name: str | os.PathLike[str]) -> Path:
    """The folder of a DynRefer checkpoint, with a `config.json` that has been checked.

    Raises:
        InputError: there is no such model, or it is one of another kind.
        CheckpointError: its `config.json` cannot be used; the sentence names the value.
    """
    folder = find_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    if model_type != DynReferConfig.model_type:
        raise InputError(f"{os.fspath(name)} is a {model_type!r} model, not a DynRefer; try dynrefer-world.")
    try:
        DynReferConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types on values that it did not expect
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be used: {first_line(error).rstrip('.')}; mend it or copy it again."
        ) from None
    return folder


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; JSON's true and Python's True are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether it is a number of this range, in which NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
