"""`from_pretrained` as towers and language models need it: complete or refused, and quiet about parts not asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from foveate.checkpoints import find_checkpoint
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

    The weights of a `PartsElsewhere` are those of its own checkpoint and of the ones that it names.

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
    shared = _with_parts_elsewhere(model)
    elsewhere = shared.prefixes_elsewhere() if shared else ()
    problems = {
        "missing": sorted(key for key in info["missing_keys"] if not key.startswith(elsewhere)),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(map(str, info["mismatched_keys"])),
    }
    if not any(problems.values()):
        if shared:
            shared.before_base_models()
            shared.load_base_models()
        broken = [key for key, value in model.named_parameters() if not value.is_meta and not value.isfinite().all()]
        problems["with values that are not finite"] = broken
    bad = [f"{len(keys)} {kind} ({', '.join(keys)})" for kind, keys in problems.items() if keys]
    if bad:
        raise CheckpointError(f"{what} {str(path)!r} does not fit, weights are wrong: {'; '.join(bad)}")
    model.eval()
    return (model, info) if want_info else model


class PartsElsewhere:
    """Of a `PreTrainedModel`: parts that were never trained may lie in checkpoints of their own, which
    `config.base_models` names, in place of once more in its own.

    `save_pretrained` leaves them out; `load_exactly` asks for no weights of them and fills them.
    """

    FROZEN_PARTS: ClassVar[Mapping[str, str]]
    """Part, as `base_models` calls it -> the module that it is."""

    def prefixes_elsewhere(self) -> tuple[str, ...]:
        """Prefixes of the parameters that live in the checkpoints of `config.base_models`."""
        model: Any = self
        return tuple(f"{self.FROZEN_PARTS[part]}." for part in model.config.base_models)

    def base_weights(self, part: str, path: Path, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        """The weights of a part, read from a checkpoint in `dtype`, by the names that they have in the part."""
        raise TypeError(f"{type(self).__name__} does not say how its {part} is read")

    def before_base_models(self) -> None:
        """Called where a checkpoint is loaded, when its own weights are there and those of others are not yet."""

    def load_base_models(self, names: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """Fill the frozen parts from their own checkpoints: folders, hub ids or the names of shipped weights.

        Args:
            names: part -> checkpoint; those of the configuration by default.
            dtype: in which the files are read; the parts keep the type that they have.

        Raises:
            CheckpointError: a checkpoint is missing, or does not have the sizes of this model's configuration.
        """
        model: Any = self
        for part, name in (model.config.base_models if names is None else names).items():
            weights = self.base_weights(part, find_checkpoint(name), dtype)
            try:
                model.get_submodule(self.FROZEN_PARTS[part]).load_state_dict(weights)
            except RuntimeError as error:
                raise CheckpointError(
                    f"the base model {name!r} does not fit this configuration: {first_line(error)}"
                ) from error
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in transformers, less the parts that `config.base_models` names."""
        model: Any = self
        weights = kwargs.pop("state_dict", None) or model.state_dict()
        elsewhere = self.prefixes_elsewhere()
        kept = {key: value for key, value in weights.items() if not (elsewhere and key.startswith(elsewhere))}
        inherited: Any = super()
        inherited.save_pretrained(save_directory, state_dict=kept, **kwargs)


def _with_parts_elsewhere(model: Any) -> PartsElsewhere | None:
    return model if isinstance(model, PartsElsewhere) else None


def check_base_models(base_models: Mapping[str, Any], parts: Collection[str]) -> None:
    """Whether a configuration's `base_models` is part -> name of a checkpoint.

    Raises:
        ValueError: it names a part that the model does not have, or no checkpoint.
    """
    unknown = set(base_models) - set(parts)
    if unknown:
        raise ValueError(f"base_models names unknown parts: {', '.join(sorted(unknown))}")
    for part, name in base_models.items():
        if not isinstance(name, str):
            raise ValueError(f"base_models of {part} must be the name of a checkpoint, not {name!r}")


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
