"""Official DynRefer weights -> ours (spec 6). Nothing is silently dropped and nothing may be missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from foveate.errors import CheckpointError

# Constants that the official model recomputes from its word lists at every start; we compute them from the vocabulary.
DERIVED = ("clip_embeds", "att_embeds", "ov_embeds", "Qformer.bert.embeddings.position_ids", "text.logit_scale")

_RENAMES = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.encoder\.(layer\.\d+)\.attention\.self\.", r"qformer.encoder.\1.attention.attention."),
    (r"^Qformer\.bert\.encoder\.(layer\.\d+)\.crossattention\.self\.", r"qformer.encoder.\1.crossattention.attention."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^t5_model\.", "language_model."),
    (r"^ln_vision\.", "vision_tower.model.post_layernorm."),
    (r"^text\.token_embedding\.", "text_encoder.text_model.embeddings.token_embedding."),
    (r"^text\.positional_embedding$", "text_encoder.text_model.embeddings.position_embedding.weight"),
    (r"^text\.ln_final\.", "text_encoder.text_model.final_layer_norm."),
    (r"^text\.transformer\.resblocks\.(\d+)\.ln_1\.", r"text_encoder.text_model.encoder.layers.\1.layer_norm1."),
    (r"^text\.transformer\.resblocks\.(\d+)\.ln_2\.", r"text_encoder.text_model.encoder.layers.\1.layer_norm2."),
    (
        r"^text\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.",
        r"text_encoder.text_model.encoder.layers.\1.self_attn.out_proj.",
    ),
    (r"^text\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"text_encoder.text_model.encoder.layers.\1.mlp.fc1."),
    (r"^text\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"text_encoder.text_model.encoder.layers.\1.mlp.fc2."),
)
_SAME = re.compile(
    r"^(cvem_align|cvem_mlp|tag_head|attr_head|(tag|attr)_(vision_proj|text_proj|fc)|t5_proj)\."
    r"|^(cem_memory|attr_t|attr_b|query_tokens)$"
)
_IN_PROJECTION = re.compile(r"^text\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and transpose the official tensors of any part of the model.

    Args:
        official: keys as in the released files: `cvem_*`, `Qformer.*`, `tag_*`, `attr_*`, `t5_*`, `text.*`, ...
    Returns:
        The same values under the keys of `DynReferModel`; `DERIVED` constants are left out.
    Raises:
        CheckpointError: keys that belong to no part of DynRefer, all listed.
    """
    converted: dict[str, Tensor] = {}
    unexpected = []
    for key, value in official.items():
        projection = _IN_PROJECTION.match(key)
        if key in DERIVED:
            continue
        if projection:
            layer, kind = projection.groups()
            for name, third in zip("qkv", value.chunk(3), strict=True):
                target = f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{name}_proj.{kind}"
                converted[target] = third.clone()
        elif key == "text.text_projection":
            converted["text_encoder.text_projection.weight"] = value.T.contiguous()
        elif _SAME.match(key):
            converted[key] = value
        else:
            renamed = key
            for pattern, replacement in _RENAMES:
                renamed, count = re.subn(pattern, replacement, renamed)
                if count:
                    converted[renamed] = value
                    break
            else:
                unexpected.append(key)
    if unexpected:
        raise CheckpointError(f"{len(unexpected)} keys are not DynRefer's: {', '.join(sorted(unexpected))}")
    return converted


def load_converted(model: torch.nn.Module, state: Mapping[str, Tensor], *, allow_missing: Iterable[str] = ()) -> None:
    """Load converted weights; every key that is missing (outside the given prefixes) or unexpected is an error.

    A T5's output layer gets its own weights first: transformers ties it to the embedding when a model is freshly built.
    """
    from foveate.language.lm import untie_lm_head

    language_model = getattr(model, "language_model", None)
    if language_model is not None and "language_model.lm_head.weight" in state:
        untie_lm_head(language_model)
        embedding = state.get("language_model.shared.weight")
        if embedding is not None:
            # The official file holds the embedding once; encoder and decoder refer to it.
            state = dict(state)
            for part in ("encoder", "decoder"):
                state.setdefault(f"language_model.{part}.embed_tokens.weight", embedding)
    try:
        result = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise CheckpointError(f"the checkpoint does not fit this configuration: {error}") from error
    missing = sorted(key for key in result.missing_keys if not key.startswith(tuple(allow_missing)))
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors ({', '.join(missing)}) "
            f"and has {len(result.unexpected_keys)} unknown ones ({', '.join(sorted(result.unexpected_keys))})"
        )
