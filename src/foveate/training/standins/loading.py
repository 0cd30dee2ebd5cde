"""A stand-in from its folder: to be measured, or trained further."""

from __future__ import annotations

import os
from typing import Any

import torch

from foveate.checkpoints import find_checkpoint, read_config
from foveate.errors import CheckpointError, InputError
from foveate.language.lm import check_tokenizer, load_tokenizer
from foveate.language.pretrained import load_complete


def load_stand_in(model_class: Any, name: str | os.PathLike[str]) -> tuple[Any, Any]:
    """A model of this class of transformers, as `load_stand_in_model` gives it, and its tokenizer.

    Raises:
        InputError: there is no such model, or it is one of another kind.
        CheckpointError: it is damaged, incomplete, not finite, or its tokenizer is of another model.
    """
    model = load_stand_in_model(model_class, name)
    folder = find_checkpoint(name)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config.get_text_config().vocab_size, f"the tokenizer of {folder}")
    return model, tokenizer


def load_stand_in_model(model_class: Any, name: str | os.PathLike[str]) -> Any:
    """A model of this class of transformers, in float32 and evaluation mode.

    Args:
        name: a shipped model, a folder, or a repository of the Hugging Face hub.

    Raises:
        InputError: there is no such model, or it is one of another kind.
        CheckpointError: it is damaged, incomplete or not finite.
    """
    folder = find_checkpoint(name)
    wanted = model_class.config_class.model_type
    found = read_config(folder).get("model_type")
    if found != wanted:
        raise InputError(
            f"{os.fspath(name)} is a {found!r} model, but a {wanted!r} model is needed; give one of these."
        )
    model = load_complete(model_class, str(folder), dtype=torch.float32)
    broken = [key for key, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{folder} has weights that are not finite, such as {broken[0]}; copy it again.")
    return model
