"""Hyper-parameters of DynRefer, validated; the defaults are the released model's (spec 2)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.clip.configuration_clip import CLIPTextConfig

CANDIDATE_VIEWS: tuple[float, ...] = tuple(round(0.1 * k, 1) for k in range(1, 11))
"""The interpolation coefficients that a context view may take (paper section 3.1, spec 2.1)."""


class DynReferConfig(PreTrainedConfig):
    """Configuration of a `DynReferModel`.

    Args:
        vision_config: the frozen vision tower (any model that `foveate.vision.towers` knows).
        text_config: the frozen text encoder of the contrast head (`CLIPTextConfig` with a projection).
        qformer_config: the Q-Former (`Blip2QFormerConfig`); its encoder width is the tower's.
        language_config: the frozen encoder-decoder language model.
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
        tag_threshold: a tag is reported above this probability (spec 4.1: 0.7).
        attribute_threshold: an attribute is listed above this probability.
        view_policy: task -> the t's of its n - 1 context views, used by `views="task"` (spec 4.3).
        calibration: task -> [scale, bias] fitted on held-out regions: probability = sigmoid(scale * logit + bias), or
            softmax(scale * logits) for "category". Missing tasks use the training logits.
        exact_box_rounding: truncate region boxes inside a view as the official code does (spec 2.1).
        base_models: part ("vision", "text", "language") -> name of the checkpoint that holds its frozen weights. A
            part named here is neither saved with the model nor looked for in its file.
        proposer: checkpoint of the region proposer that `everything=True` uses; None if there is none.
        max_text_tokens: limit for control words and captions.
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
    tag_threshold: float = 0.7
    attribute_threshold: float = 0.5
    view_policy: Any = None
    calibration: Any = None
    exact_box_rounding: bool = True
    base_models: Any = None
    proposer: str | None = None
    max_text_tokens: int = 32
    generation: Any = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.is_encoder_decoder = False
        if not self.view_policy:  # with more views than the default has t's for, tasks search for theirs
            context = self.num_views - 1
            fits = all(len(t) >= context for t in DEFAULT_VIEW_POLICY.values())
            self.view_policy = {task: t[:context] for task, t in DEFAULT_VIEW_POLICY.items()} if fits else {}
        self.calibration = self.calibration or {}
        self.base_models = self.base_models or {}
        self.generation = {**DEFAULT_GENERATION, **(self.generation or {})}
        self._check()

    def _check(self) -> None:
        width = self.vision_config.hidden_size
        if self.num_views < 1:
            raise ValueError(f"num_views must be at least 1, not {self.num_views}")
        if self.image_size % self.vision_config.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the tower's patch size "
                f"{self.vision_config.patch_size}"
            )
        if width % self.align_groups:
            raise ValueError(f"the tower's width {width} is not divisible by align_groups {self.align_groups}")
        if self.head_size % self.head_num_attention_heads:
            raise ValueError(f"head_size {self.head_size} is not divisible by {self.head_num_attention_heads} heads")
        for task, coefficients in self.view_policy.items():
            if len(coefficients) not in (self.num_views - 1, self.num_views):
                raise ValueError(
                    f"view_policy gives {len(coefficients)} t's for {task}, but {self.num_views} views need "
                    f"{self.num_views - 1}"
                )
        unknown = set(self.base_models) - {"vision", "text", "language"}
        if unknown:
            raise ValueError(f"base_models names unknown parts: {', '.join(sorted(unknown))}")

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
