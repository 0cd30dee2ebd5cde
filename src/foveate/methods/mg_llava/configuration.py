"""Hyper-parameters of MG-LLaVA, validated; the defaults are the released image models' (spec 2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.convnext.configuration_convnext import ConvNextConfig

from foveate.checkpoints import find_checkpoint, read_config, suggestion
from foveate.errors import CheckpointError, InputError
from foveate.language.pretrained import check_base_models, first_line
from foveate.language.templates import TEMPLATES

FUSIONS = (
    "conv_gate",
    "gate_concat",
    "conv_concat",
    "channel_concat",
    "resampler",
    "patch_info_mining",
    "none",
)
"""How the high-resolution map reaches the image tokens (spec 2.3, 2.6)."""
OBJECTS = ("concat", "f_to_b", "b_to_f", "none")
"""How object features reach the language model (spec 2.6)."""
OBJECT_LEVELS = ("all", "multi_level", "last")
"""Of which ConvNeXt stages an object's features are pooled (spec 2.4, 2.6)."""
POOLINGS = ("separable", "dense")
LIMIT_MODES = ("per_category", "per_image")
SAME_GRID = ("conv_gate", "gate_concat", "conv_concat", "channel_concat", "resampler")
"""Fusions of token maps, which need the same grid at both resolutions."""


class MGLlavaConfig(PreTrainedConfig):
    """Configuration of an `MGLlavaModel`.

    Args:
        vision_config: the frozen low-resolution tower (CLIP, or any that `foveate.vision.towers` knows).
        high_res_config: the frozen high-resolution trunk (`ConvNextConfig`).
        language_config: any causal language model of transformers.
        vision_layer: which of the tower's hidden states are the image tokens; its class token is dropped.
        high_res_size: S, side in pixels of the high-resolution picture.
        box_canvas: side of the square that box coordinates refer to; S by default.
        fusion: one of `FUSIONS`; "none" leaves the low-resolution tokens alone.
        patch_info_stages: "all" or "last", the map that patch info mining looks at.
        resampler_heads: attention heads of the resampler.
        objects: one of `OBJECTS`; "none" gives the language model no object tokens.
        object_levels: one of `OBJECT_LEVELS`.
        object_bins: bins per side of RoIAlign, 56 in released models, 7 of the "last" level.
        object_pooling: "separable" (exact, native resolution) or "dense" (upsample, RoIAlign, mean: the reference).
        unfused_keys: of "b_to_f": attend to the tokens before fusion, as the compiled official module does.
        legacy_tower_train_mode: leave the trunk's drop-path on in training, as the official code does (spec 7.7).
        template: prompt template, one of `foveate.language.templates.TEMPLATES`.
        pad_to_square: pad pictures to a square before they are resized.
        box_iou: of boxes with the same label that overlap by a larger IoU, the best stays.
        box_limit: boxes beyond which the limit applies.
        box_limit_mode: "per_category" (may leave more than the limit, spec 7.2) or "per_image".
        hard_cap: never more than `box_limit` boxes, whatever the mode.
        num_frames: frames that a video is sampled to.
        max_text_length: most text tokens of a conversation (spec 3.2: 2048 - 576).
        base_models: frozen tower ("vision", "high_res") -> name of the checkpoint that holds its weights (shipped
            weights, a folder, a hub id). A tower that is not named here is saved in the model's own folder.
        generation: decoding defaults: max_new_tokens, temperature (0 is greedy), top_p, top_k, repetition_penalty.
    """

    model_type = "foveate_mg_llava"
    sub_configs_defaults: ClassVar[Any] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "high_res_config": ConvNextConfig,
        "language_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    # Mappings become configurations when transformers reads them; Any, because which class is known at run time only.
    vision_config: Any = None
    high_res_config: Any = None
    language_config: Any = None
    vision_layer: int = -2
    high_res_size: int = 768
    box_canvas: int | None = None
    fusion: str = "conv_gate"
    patch_info_stages: str = "all"
    resampler_heads: int = 8
    objects: str = "concat"
    object_levels: str = "all"
    object_bins: int | None = None
    object_pooling: str = "separable"
    unfused_keys: bool = False
    legacy_tower_train_mode: bool = False
    template: str = "vicuna"
    pad_to_square: bool = True
    box_iou: float = 0.2
    box_limit: int = 100
    box_limit_mode: str = "per_category"
    hard_cap: bool = False
    num_frames: int = 8
    max_text_length: int = 1472
    base_models: Any = None
    generation: Any = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        # The released towers, where none are given: transformers' own defaults are smaller models.
        self.vision_config = self.vision_config or CLIPVisionConfig(**CLIP_L_336)
        self.high_res_config = self.high_res_config or ConvNextConfig(**CONVNEXT_L)
        super().__post_init__(**kwargs)
        self.box_canvas = self.high_res_size if self.box_canvas is None else self.box_canvas
        if self.object_bins is None:
            self.object_bins = 7 if self.object_levels == "last" else 56
        if self.generation is None or isinstance(self.generation, dict):
            self.generation = {**DEFAULT_GENERATION, **(self.generation or {})}
        self.base_models = {} if self.base_models is None else self.base_models
        self.is_encoder_decoder = False
        self.check()

    def check(self) -> None:
        """Whether the values are in range and fit together; to be called again where they are changed.

        Raises:
            ValueError: the sentence names the value.
        """
        for name in _SIZES:
            value = getattr(self, name)
            if not is_whole(value) or not 1 <= value <= 1_000_000:
                raise ValueError(f"{name} must be a whole number from 1 to 1000000, not {value!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = suggestion(str(value), choices)
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}{near}")
        for name in ("unfused_keys", "legacy_tower_train_mode", "pad_to_square", "hard_cap"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not is_number(self.box_iou, 0, 1):
            raise ValueError(f"box_iou must be a number from 0 to 1, not {self.box_iou!r}")
        if not isinstance(self.base_models, dict):
            raise ValueError(f"base_models must be an object, part to name of a checkpoint, not {self.base_models!r}")
        check_base_models(self.base_models, ("vision", "high_res") if self.sees_high_res else ("vision",))
        layers = self.vision_config.num_hidden_layers
        if not is_whole(self.vision_layer) or not -layers - 1 <= self.vision_layer <= layers:
            raise ValueError(
                f"vision_layer must be one of the tower's {-layers - 1} to {layers}, not {self.vision_layer!r}"
            )
        if self.low_res_size % self.vision_config.patch_size:
            raise ValueError(
                f"image_size {self.low_res_size} is not a multiple of the patch size {self.vision_config.patch_size}"
            )
        if not self.sees_high_res:
            return
        if self.high_res_size % self.high_res_stride:
            raise ValueError(
                f"high_res_size {self.high_res_size} is not a multiple of the trunk's stride {self.high_res_stride}"
            )
        if self.fusion in SAME_GRID and self.high_res_size // self.high_res_stride != self.grid_size:
            raise ValueError(
                f"the low-resolution tower sees {self.grid_size} patches a side and the high-resolution trunk "
                f"{self.high_res_size // self.high_res_stride}; image_size / patch_size must equal high_res_size / "
                f"{self.high_res_stride}"
            )
        if self.fusion == "patch_info_mining":
            stride = self.high_res_stride if self.patch_info_stages == "last" else self.high_res_config.patch_size
            if self.high_res_size // stride % self.grid_size:
                raise ValueError(
                    f"patch_info_mining cuts a map of {self.high_res_size // stride} cells a side into "
                    f"{self.grid_size} patches a side, which do not fit"
                )
        if self.fusion == "resampler":
            width = self.language_config.hidden_size
            if width % self.resampler_heads or width % 4:
                raise ValueError(f"the language model's width {width} does not split into {self.resampler_heads} heads")

    @property
    def low_res_size(self) -> int:
        """s, side in pixels of the low-resolution picture."""
        return self.vision_config.image_size

    @property
    def grid_size(self) -> int:
        """g, image tokens per side."""
        return self.low_res_size // self.vision_config.patch_size

    @property
    def num_image_tokens(self) -> int:
        """N = g * g, image tokens of a picture."""
        return self.grid_size**2

    @property
    def high_res_stride(self) -> int:
        """Pixels per cell of the trunk's last stage."""
        return self.high_res_config.patch_size * 2 ** (len(self.high_res_config.hidden_sizes) - 1)

    @property
    def sees_high_res(self) -> bool:
        """Whether any part looks at the high-resolution picture; without one there is no trunk."""
        return self.fusion != "none" or self.objects != "none"

    @property
    def has_object_tokens(self) -> bool:
        """Whether object tokens reach the language model."""
        return self.objects in ("concat", "b_to_f")

    @property
    def image_width(self) -> int:
        """Channels of an image token after fusion, before its projector."""
        low, high = self.vision_config.hidden_size, self.high_res_config.hidden_sizes[-1]
        return {"gate_concat": 2 * low, "conv_concat": 2 * low, "channel_concat": low + high}.get(self.fusion, low)

    @property
    def object_width(self) -> int:
        """Channels of an object's features, before the box projector."""
        dims = self.high_res_config.hidden_sizes
        return {"all": sum(dims), "multi_level": self.vision_config.hidden_size, "last": dims[-1]}[self.object_levels]


CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""openai/clip-vit-large-patch14-336 (spec 2.1)."""
CONVNEXT_L: dict[str, Any] = {
    "hidden_sizes": [192, 384, 768, 1536],
    "depths": [3, 3, 27, 3],
    "num_channels": 3,
    "patch_size": 4,
    "hidden_act": "gelu",
}
"""The trunk of laion/CLIP-convnext_large_d_320 (spec 2.7)."""

DEFAULT_GENERATION: dict[str, Any] = {"max_new_tokens": 100, "temperature": 0.0}
"""Spec 4: evaluation is greedy with at most 100 tokens."""

_SIZES = ("high_res_size", "box_canvas", "object_bins", "resampler_heads", "box_limit", "num_frames", "max_text_length")
_CHOICES: dict[str, tuple[str, ...]] = {
    "fusion": FUSIONS,
    "patch_info_stages": ("all", "last"),
    "objects": OBJECTS,
    "object_levels": OBJECT_LEVELS,
    "object_pooling": POOLINGS,
    "box_limit_mode": LIMIT_MODES,
    "template": tuple(TEMPLATES),
}


def find_mg_llava(name: str | os.PathLike[str]) -> Path:
    """The folder of an MG-LLaVA checkpoint, with a `config.json` that has been checked.

    Raises:
        InputError: there is no such model, or it is one of another kind.
        CheckpointError: its `config.json` cannot be used; the sentence names the value.
    """
    folder = find_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    if model_type != MGLlavaConfig.model_type:
        raise InputError(f"{os.fspath(name)} is a {model_type!r} model, not an MG-LLaVA; convert one first.")
    try:
        MGLlavaConfig.from_pretrained(folder)
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
