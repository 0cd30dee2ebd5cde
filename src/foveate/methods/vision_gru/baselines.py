"""A ViT and a ConvNeXt of transformers, trained and measured by the same recipe, to compare VisionGRU with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from foveate.errors import InputError
from foveate.language.pretrained import load_exactly

from .configuration import VisionGRUConfig
from .predictor import VisionGRUPredictor
from .processing import VisionGRUProcessor

_HEAD_WIDTH = 32
_CONVNEXT_STRIDE = 32
_KINDS = (ViTForImageClassification, ConvNextForImageClassification)


def build_baseline(kind: str, sizes: VisionGRUConfig, patch_size: int, classes: dict[str, Any]) -> PreTrainedModel:
    """A classifier of another kind.

    Args:
        kind: "convnext" with the widths and depths of `sizes`, or "vit" with `dim` in all layers, of which there are as
            many as the four depths together.
        patch_size: of a ViT, in pixels.
        classes: `id2label` and `label2id`.

    Raises:
        InputError: the sizes do not fit such a network.
    """
    if kind == "convnext":
        if sizes.image_size < _CONVNEXT_STRIDE:
            raise InputError(
                f"a ConvNeXt needs images of {_CONVNEXT_STRIDE} pixels or more, not {sizes.image_size}; change "
                "model.image_size."
            )
        return ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=sizes.widths, depths=list(sizes.depths), image_size=sizes.image_size, **classes)
        )
    heads = max(1, sizes.dim // _HEAD_WIDTH)
    if sizes.dim % heads or sizes.image_size % patch_size:
        raise InputError(
            f"a ViT's width must be a multiple of {_HEAD_WIDTH} and its images of its patches, but dim is {sizes.dim}, "
            f"image_size {sizes.image_size} and patch_size {patch_size}; change model."
        )
    config = ViTConfig(
        hidden_size=sizes.dim,
        num_hidden_layers=sum(sizes.depths),
        num_attention_heads=heads,
        intermediate_size=4 * sizes.dim,
        image_size=sizes.image_size,
        patch_size=patch_size,
        **classes,
    )
    return ViTForImageClassification(config)


def load_baseline(folder: Path) -> VisionGRUPredictor:
    """The same predictor around such a classifier.

    Raises:
        CheckpointError: it is damaged.
        InputError: it is of another kind.
    """
    model: Any = load_exactly(AutoModelForImageClassification.from_pretrained, folder, what="the classifier checkpoint")
    if not isinstance(model, _KINDS):
        raise InputError(f"{folder} is a {type(model).__name__}; the recipe's model.kind is another.")
    return VisionGRUPredictor(cast(Any, model), VisionGRUProcessor.from_pretrained(folder))
