"""Official MG-LLaVA weights -> a folder of ours (spec 6, 2.7). Nothing is silently dropped and nothing may be missing.

A released file holds what was trained: fusion, projectors and the language model. The towers come from where the
authors took them: CLIP from its Hugging Face checkpoint, ConvNeXt from a file in open_clip's or timm's layout; the
configuration and the tokenizer of the language model from its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from foveate.errors import CheckpointError

WRAPPER = "_checkpoint_wrapped_module."
"""What gradient checkpointing leaves inside names."""

TRUNK = "visual.trunk."

# Key prefixes, theirs and ours; # is a number. The first that fits counts.
_OFFICIAL = (
    ("visual_encoder.vision_model.", "vision_tower.model."),
    ("visual_encoder.", "vision_tower.model."),
    ("projector.model.", "image_projector."),
    ("bbox_projector.model.", "box_projector."),
    ("fuse_module.vlm_uni_query_projector.", "fusion.query."),
    ("fuse_module.vlm_uni_aux_projector.", "fusion.key."),
    ("fuse_module.vlm_uni_key_projector.", "fusion.key."),
    ("fuse_module.vlm_uni_val_projector.", "fusion.value."),
    ("fuse_module.", "fusion."),
    ("llm.", "language_model."),
)
_CONVNEXT = (
    ("stem.0.", "embeddings.patch_embeddings."),
    ("stem.1.", "embeddings.layernorm."),
    ("stages.#.downsample.", "encoder.stages.#.downsampling_layer."),
    ("stages.#.blocks.#.conv_dw.", "encoder.stages.#.layers.#.dwconv."),
    ("stages.#.blocks.#.norm.", "encoder.stages.#.layers.#.layernorm."),
    ("stages.#.blocks.#.mlp.fc1.", "encoder.stages.#.layers.#.pwconv1."),
    ("stages.#.blocks.#.mlp.fc2.", "encoder.stages.#.layers.#.pwconv2."),
    ("stages.#.blocks.#.gamma", "encoder.stages.#.layers.#.layer_scale_parameter"),
)
_POSITION_IDS = re.compile(r"^visual_encoder\.(vision_model\.)?embeddings\.position_ids$")
"""A constant that older files of CLIP repeat."""
_HEADS = re.compile(r"^(visual\.trunk\.(head|norm)\.|visual\.head\.|head\.|norm\.|norm_pre\.)")
"""What comes after the last stage: the norm and head of a classifier or of CLIP's embedding."""
_TEXT = re.compile(
    r"^(transformer|token_embedding|ln_final|text)\.|^(positional_embedding|text_projection|logit_scale)$"
)
"""The text tower of a whole open_clip model."""


def _compiled(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for theirs, ours in pairs:
        pieces = ours.split("#")
        numbered = "".join(f"{piece}\\{n}" for n, piece in enumerate(pieces[:-1], 1)) + pieces[-1]
        rules.append((re.compile("^" + re.escape(theirs).replace(r"\#", r"(\d+)")), numbered))
    return rules


_FROM_OFFICIAL, _FROM_CONVNEXT = _compiled(_OFFICIAL), _compiled(_CONVNEXT)


def _renamed(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, key)
        if count:
            return renamed
    return None


def translate(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[str], list[str]]:
    """Official tensors under our keys.

    Returns:
        Tensors; our key -> the official one; official keys that the model has no use for; and those that are not known.
    """
    converted: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unused, unknown = [], []
    for key, value in official.items():
        plain = key.replace(WRAPPER, "")
        if plain.startswith("visual.") or plain.startswith(("stem.", "stages.")):
            if _HEADS.match(plain):
                unused.append(key)
                continue
            inner = _renamed(plain.removeprefix(TRUNK), _FROM_CONVNEXT)
            renamed = None if inner is None else f"high_res_tower.model.{inner}"
            if renamed is not None and ".pwconv" in renamed and value.ndim == 4:
                value = value.flatten(1)  # some files store the pointwise layers as 1x1 convolutions
        elif _HEADS.match(plain) or _TEXT.match(plain) or _POSITION_IDS.match(plain):
            unused.append(key)
            continue
        else:
            renamed = _renamed(plain, _FROM_OFFICIAL)
        if renamed is None or renamed in converted:
            unknown.append(key)
        else:
            converted[renamed], names[renamed] = value, key
    return converted, names, unused, unknown


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official tensors of any part of the model.

    Args:
        official: keys as in the released files (`llm.*`, `projector.*`, `bbox_projector.*`, `fuse_module.*`), of CLIP
            (`visual_encoder.*`), of open_clip (`visual.trunk.*`) and of timm (`stem.*`, `stages.*`).
    Returns:
        The same values under the keys of `MGLlavaModel`; heads and text towers are left out.
    Raises:
        CheckpointError: keys that belong to no part of MG-LLaVA, all listed.
    """
    converted, _, _, unknown = translate(official)
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are not MG-LLaVA's: {', '.join(sorted(unknown))}")
    return converted
