"""`from_pretrained` as towers and language models need it: complete or refused, and quiet about parts not asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from foveate.errors import CheckpointError


def load_complete(
    model_class: Any, path: str, *, dtype: torch.dtype | None, may_lack: tuple[str, ...] = (), **kwargs: Any
) -> Any:
    """`model_class.from_pretrained(path)` in evaluation mode, refused where transformers would draw random weights.

    Weights in the checkpoint that the class does not have are other parts of a whole model and are passed over.

    Args:
        dtype: of the weights; None keeps the stored one.
        may_lack: prefixes of weights that the caller never uses.

    Raises:
        CheckpointError: unreadable weights, or weights missing or of another shape.
    """
    try:
        with quiet_load_report():
            model, info = model_class.from_pretrained(
                path, dtype="auto" if dtype is None else dtype, output_loading_info=True, **kwargs
            )
    except (
        Exception
    ) as error:  # safetensors, json, torch and transformers each raise their own; the sentence is the same
        raise CheckpointError(f"The model in {path!r} cannot be loaded: {first_line(error)}") from error
    missing = [key for key in info["missing_keys"] if not key.startswith(may_lack)]
    wrong = sorted(map(str, [*missing, *info["mismatched_keys"]]))
    if wrong:
        raise CheckpointError(
            f"The checkpoint {path!r} lacks {len(wrong)} tensors of {type(model).__name__} (or has them in another "
            f"shape), the first is {wrong[0]}; it is incomplete or of another architecture."
        )
    return model.eval()


def load_exactly(load: Callable[..., Any], path: Any, *args: Any, what: str, **kwargs: Any) -> Any:
    """`load(path)`, a `from_pretrained`, in evaluation mode, refused unless checkpoint and model have the same weights.

    Args:
        load: the method of transformers' class, which takes `output_loading_info`.
        what: what is loaded, for the sentence of an error: "the ... checkpoint".

    Raises:
        CheckpointError: a file that cannot be read, or weights that are missing, unexpected, of another shape or not
            finite; all are listed.
    """
    want_info = kwargs.pop("output_loading_info", False)
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # listed below, with all the rest
    try:
        with quiet_load_report():
            model, info = load(path, *args, **kwargs)
    except Exception as error:  # safetensors, json, torch and transformers each raise their own
        raise CheckpointError(f"cannot load {what} {str(path)!r}: {first_line(error)}") from error
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(map(str, info["mismatched_keys"])),
    }
    if not any(problems.values()):
        broken = [key for key, value in model.named_parameters() if not value.is_meta and not value.isfinite().all()]
        problems["with values that are not finite"] = broken
    bad = [f"{len(keys)} {kind} ({', '.join(keys)})" for kind, keys in problems.items() if keys]
    if bad:
        raise CheckpointError(f"{what} {str(path)!r} does not fit, weights are wrong: {'; '.join(bad)}")
    model.eval()
    return (model, info) if want_info else model


def read_model_type(path: str) -> str:
    """`model_type` of a checkpoint's config.json.

    Raises:
        CheckpointError: no config.json, or it cannot be read.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path!r} is not a checkpoint folder: it has no config.json.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
        return str(config.get("model_type"))
    except Exception as error:
        raise CheckpointError(f"The config of {path!r} cannot be read: {first_line(error)}") from error


def find_file(path: str, name: str) -> Path | None:
    """A file of a checkpoint folder or of a hub name's cache, or None where it has none."""
    found = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def first_line(error: Exception) -> str:
    """The first line of an error's message, with the next one where it ends in a colon; its type where it has none."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """transformers prints a table of every weight it did not use; what matters of it the caller checks."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
