"""Loading language models: class and tokenizer by the checkpoint's config, with the traps of T5 closed.

Sources: DynRefer spec sections 2.10 (activation, tied head) and 8 (numeric failure of T5 in fp16).
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from foveate.errors import CheckpointError, InputError
from foveate.language.pretrained import find_file, first_line, load_complete, read_model_type

# Encoder-decoders whose residual stream outgrows fp16's 65504: trained in bf16 with unscaled RMS-normed sums
T5_CLASS = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "t5gemma"})

BLIP2 = ("blip-2", "blip_2")
"""`model_type` of checkpoints with a language model inside."""


def load_language_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    feed_forward_activation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model and its tokenizer from a checkpoint folder or hub name, in evaluation mode.

    Args:
        path: checkpoint; its config decides between encoder-decoder and decoder-only. Of a whole BLIP-2 the language
            model is loaded.
        dtype: torch.float32, torch.bfloat16 or torch.float16; None keeps the stored one. T5-class models overflow in
            fp16 and give NaN scores, so fp16, asked for or stored, becomes fp32 with a warning.
        feed_forward_activation: T5-class only: name of the feed-forward activation, in place of the checkpoint's.
            BLIP-2 and DynRefer run Flan-T5 with exact "gelu" instead of its "gelu_new" (spec section 2.10).

    Raises:
        CheckpointError: missing, unreadable or incomplete checkpoint, or one without a tokenizer.
        InputError: another dtype, an unknown activation, or an activation for a model that is not T5-class.
    """
    path = os.fspath(path)
    _check_dtype(dtype)
    config = load_config(path)
    loading: dict[str, Any] = {}
    if config.model_type in BLIP2:  # transformers does not look inside a whole one unless told to
        config, loading = config.text_config, {"key_mapping": {r"^language_model\.": ""}}
    is_t5 = config.model_type in T5_CLASS
    if feed_forward_activation is not None:
        _override_activation(config, feed_forward_activation, is_t5=is_t5)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    loaded_dtype = torch.float32 if is_t5 and dtype is torch.float16 else dtype
    model = load_complete(auto_class, path, dtype=loaded_dtype, config=config, **loading)
    if is_t5 and torch.float16 in (dtype, model.dtype):
        model.float()
        warnings.warn(
            f"{config.model_type} overflows in fp16 (captions like 'ssss' with score nan), so {path!r} is loaded in "
            "fp32; ask for bf16 to save memory.",
            RuntimeWarning,
            stacklevel=2,
        )
    return model, load_tokenizer(path)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub name.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = os.fspath(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise CheckpointError(f"{path!r} has no usable tokenizer: {first_line(error)}") from error
    # from a folder without any tokenizer file transformers makes one that knows no word
    if not any(find_file(path, name) for name in {"tokenizer.json", *tokenizer.vocab_files_names.values()}):
        raise CheckpointError(f"{path!r} has no usable tokenizer: add the tokenizer.json that belongs to the model.")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, entries: int, what: str) -> None:
    """Refuses a tokenizer that gives ids beyond the `entries` of the embedding that reads them.

    Raises:
        CheckpointError: it does; the sentence begins with `what` it is ("the tokenizer of clip-world").
    """
    if len(tokenizer) > entries:
        raise CheckpointError(
            f"{what} has {len(tokenizer)} entries, but its model has {entries}; they are of different models, copy "
            "both again."
        )


def load_text_encoder(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> CLIPTextModelWithProjection:
    """Load the text tower of a CLIP checkpoint (whole or text part only) with its projection, in evaluation mode.

    Its `text_embeds` are not normalised (DynRefer spec section 2.8).

    Raises:
        CheckpointError: missing, unreadable or incomplete checkpoint.
        InputError: a dtype other than float32, bfloat16, float16 or None (the stored one).
    """
    _check_dtype(dtype)
    path = os.fspath(path)
    config = load_config(path)
    if config.model_type not in ("clip", "clip_text_model"):
        raise CheckpointError(f"{path!r} has model_type {config.model_type!r}; a text encoder needs a CLIP checkpoint.")
    text_config = config
    if config.model_type == "clip":  # of the two projection_dim of a whole CLIP, its own is the one that it uses
        text_config = config.text_config
        text_config.projection_dim = config.projection_dim
    return load_complete(CLIPTextModelWithProjection, path, dtype=dtype, config=text_config)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be torch.float32, torch.bfloat16, torch.float16 or None, got {dtype!r}.")


def load_config(path: str | os.PathLike[str]) -> Any:
    """The configuration of a checkpoint folder or hub name, of whichever class it is.

    Raises:
        CheckpointError: it is missing, unreadable, or of a kind or with values that transformers does not know.
    """
    path = os.fspath(path)
    read_model_type(path)
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # an unknown model_type, or fields that the config class refuses
        raise CheckpointError(f"The config of {path!r} cannot be used: {first_line(error)}") from error


def load_language_config(path: str | os.PathLike[str]) -> Any:
    """The configuration of what `load_language_model` loads from a checkpoint folder or hub name.

    Raises:
        CheckpointError: as `load_config`.
    """
    config = load_config(path)
    return config.text_config if config.model_type in BLIP2 else config


def untie_lm_head(model: PreTrainedModel) -> bool:
    """Give `lm_head.weight` storage of its own when it shares that of the input embedding; True when it did.

    transformers 5 builds every T5 with the two tied, whatever the checkpoint says; loading a state dict that holds both
    then lets the last key win, silently (DynRefer spec section 2.10). Call this before `load_state_dict` with such a
    state dict. Values are copied, so the model computes the same until something else is loaded.

    Raises:
        InputError: the model has no output embedding.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no lm_head to untie.")
    if head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    # else the next tie_weights(), which from_pretrained and resize_token_embeddings call, would tie them again
    model.config.tie_word_embeddings = False
    return True


def _override_activation(config: Any, activation: str, *, is_t5: bool) -> None:
    from transformers.activations import ACT2FN

    if not is_t5 or not hasattr(config, "dense_act_fn"):
        raise InputError(f"feed_forward_activation is for T5-class models only, this one is {config.model_type!r}.")
    if activation not in ACT2FN:
        raise InputError(f"feed_forward_activation {activation!r} is unknown; use one of transformers' such as 'gelu'.")
    config.dense_act_fn = activation
