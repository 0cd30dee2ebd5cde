"""The registry of methods: one line a method, imported when used.

A method is a folder of this package, its room. Every room has the same few files, and in them the same names behind
the method's prefix: `configuration.<Prefix>Config`, `modeling.<Prefix>Model`, `processing.<Prefix>Processor`,
`predictor.<Prefix>Predictor`, `recipe.RECIPE`, `conversion.convert_state_dict`. A room leaves out a file that it does
not need. This module imports none of them, so it is as light as the command line needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from foveate.checkpoints import find_checkpoint, read_config, shipped_models, suggestion
from foveate.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Method:
    """Where a method lives.

    Attributes:
        package: import path of its room.
        prefix: what its class names start with.
        model_type: the `model_type` in the `config.json` of its checkpoints.
    """

    package: str
    prefix: str
    model_type: str

    def has(self, part: str) -> bool:
        """Whether the room has the file `part` ("configuration", "modeling", "recipe", ...)."""
        return importlib.util.find_spec(f"{self.package}.{part}") is not None

    def module(self, part: str) -> ModuleType:
        """The module `part` of the room."""
        return importlib.import_module(f"{self.package}.{part}")

    @property
    def config(self) -> type[Any]:
        """The configuration class."""
        return getattr(self.module("configuration"), f"{self.prefix}Config")

    @property
    def model(self) -> type[Any]:
        """The model class."""
        return getattr(self.module("modeling"), f"{self.prefix}Model")

    @property
    def processor(self) -> type[Any]:
        """The processor class: files, PIL images and arrays <-> tensors."""
        return getattr(self.module("processing"), f"{self.prefix}Processor")

    @property
    def predictor(self) -> type[Any]:
        """The class of the object that users hold; it has `from_pretrained(folder, device=, dtype=)`,
        with `proposer=` where it can find regions by itself and `quantize=` where it can run in int8."""
        return getattr(self.module("predictor"), f"{self.prefix}Predictor")


METHODS: dict[str, Method] = {
    "dynrefer": Method("foveate.methods.dynrefer", "DynRefer", "foveate_dynrefer"),
    "mg_llava": Method("foveate.methods.mg_llava", "MGLlava", "foveate_mg_llava"),
    "vision_gru": Method("foveate.methods.vision_gru", "VisionGRU", "foveate_vision_gru"),
}


STAND_INS: dict[str, str] = {
    "clip-world": "foveate.training.standins.clip",
    "t5-world": "foveate.training.standins.t5",
    "proposer-world": "foveate.training.standins.proposer",
    "llama-world": "foveate.training.standins.llama",
    "convnext-world": "foveate.training.standins.convnext",
    "llava-next-world": "foveate.training.standins.llava_next",
}
"""Pre-trained parts that methods build on: they have recipes, but no verb of their own."""


HOSTS: dict[str, tuple[str, str]] = {
    "llava": ("foveate.methods.hired.predictor", "LlavaPredictor"),
    "llava_next": ("foveate.methods.hired.predictor", "LlavaPredictor"),
    "upernet": ("foveate.methods.vision_gru.segmenter", "VisionGRUSegmenter"),
}
"""`model_type` of models of transformers that are loaded as they are -> module and class of their predictor."""


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none; the sentence suggests the nearest name.
    """
    if name not in METHODS:
        raise InputError(
            f"there is no method {name!r}{suggestion(str(name), METHODS)}; choose one of: {', '.join(METHODS)}."
        )
    return METHODS[name]


def method_module(name: str, part: str) -> ModuleType:
    """The module `part` ("recipe", "conversion", ...) of the method `name`.

    Raises:
        InputError: there is no such method, or it has no such part.
    """
    if name in STAND_INS:
        return importlib.import_module(f"{STAND_INS[name]}.{part}")
    method = get_method(name)
    if not method.has(part):
        raise InputError(f"the method {name!r} has no {part}.")
    return method.module(part)


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    proposer: Any = None,
    keep_tokens: float | None = None,
) -> Any:
    """Loads a predictor.

    Args:
        name: a shipped model ("dynrefer-world"), a folder written by `save_pretrained` or by `foveate train`, or a
            Hugging Face repository "owner/name".
        device: "cpu", "cuda", "cuda:1", "mps"; by default the best one there is.
        dtype: "float32", "bfloat16", "float16" or torch's own; by default bfloat16 on a GPU that computes in it, else
            float32.
        quantize: "int8" for linear layers in int8 on a CPU; `foveate evaluate --quantize int8` says what it changes.
        proposer: for methods that find regions by themselves (`everything=True`): the name of a proposer, or what
            `foveate.vision.proposals.load_proposer` gives; by default the model's own.
        keep_tokens: for models that answer questions: the share of a picture's tokens that reaches the language model,
            0.2 for a fifth, chosen by HiRED; `foveate.drop_visual_tokens` of the predictor does the same later.

    Returns:
        The predictor of the checkpoint's method, for instance `foveate.methods.dynrefer.predictor.DynReferPredictor`.

    Raises:
        InputError: there is no such model, device, dtype or quantisation, or it is not a model that a verb of foveate
            runs.
        CheckpointError: the checkpoint is truncated, corrupt or of another layout.
    """
    where, precision = find_device(device), find_dtype(dtype)
    if keep_tokens is not None:  # before weights are read
        importlib.import_module("foveate.methods.hired.configuration").check_budget(keep_tokens)
    folder = find_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    for method in METHODS.values():
        if method.model_type == model_type:
            register()
            options = {"quantize": quantize, "proposer": proposer}
            options = {name: value for name, value in options.items() if value is not None}
            door = method.predictor.from_pretrained
            if quantize is not None and "quantize" not in inspect.signature(door).parameters:
                raise InputError(f"{os.fspath(name)} does not run in {quantize}; leave quantize out.")
            return _dropping(door(folder, device=where, dtype=precision, **options), keep_tokens)
    if model_type in HOSTS:
        for option, value in (("quantize", quantize), ("proposer", proposer)):
            if value is not None:
                raise InputError(f"{os.fspath(name)} is a {model_type}, which takes no {option}; leave it out.")
        module, predictor = HOSTS[model_type]
        door = getattr(importlib.import_module(module), predictor).from_pretrained
        return _dropping(door(folder, device=where, dtype=precision), keep_tokens)
    if not isinstance(model_type, str):
        raise CheckpointError(f"{folder / 'config.json'} does not say its model_type; copy the checkpoint again.")
    ready = [model for model in shipped_models() if _is_method(model)]
    raise InputError(
        f"{os.fspath(name)} is a {model_type!r} model, a part that methods build on and not a method itself; "
        f"load it with transformers, or give a model of: {', '.join(ready) or ', '.join(METHODS)}."
    )


def looks_at_objects(folder: Path) -> bool:
    """Whether a model that answers questions has tokens of single objects, for which it wants boxes."""
    return read_config(folder).get("model_type") not in HOSTS


def _dropping(predictor: Any, keep_tokens: float | None) -> Any:
    """The predictor, dropping visual tokens where a share is given."""
    if keep_tokens is not None:
        importlib.import_module("foveate.methods.hired.dropping").drop_visual_tokens(predictor, keep_tokens)
    return predictor


def register() -> None:
    """Makes `transformers.AutoConfig`, `AutoModel` and `AutoProcessor` know every method's checkpoints.

    `import foveate` arranges for this to run at the first use of these classes, so that nobody has to call it; it
    imports torch and transformers. Calling it again does nothing.
    """
    import transformers
    from transformers import AutoConfig, AutoModel, AutoProcessor

    for method in METHODS.values():
        AutoConfig.register(method.model_type, method.config, exist_ok=True)
        AutoModel.register(method.config, method.model, exist_ok=True)
        for name, model in getattr(method.module("modeling"), "AUTO_CLASSES", {}).items():
            getattr(transformers, name).register(method.config, model, exist_ok=True)
        if method.has("processing"):
            AutoProcessor.register(method.config, method.processor, exist_ok=True)


def find_device(name: str | torch.device | None) -> torch.device | None:
    """The device of this name, if there is one here; None stays None.

    Raises:
        InputError: there is none.
    """
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("tensors without values")
        torch.empty(0, device=device)
    except Exception:  # each backend that torch was built without says so with an exception of another type
        usable = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise InputError(f"there is no device {str(name)!r} here; use one of: {', '.join(usable)}.") from None
    return device


def find_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of this name; None stays None.

    Raises:
        InputError: it is none of float32, bfloat16 and float16.
    """
    if name is None:
        return None
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known = str(name).removeprefix("torch.") if isinstance(name, torch.dtype) else name
    if not isinstance(known, str) or known not in dtypes:
        raise InputError(f"there is no dtype {name!r}{suggestion(str(name), dtypes)}; use one of: {', '.join(dtypes)}.")
    return dtypes[known]


def _is_method(model: str) -> bool:
    model_type = read_config(find_checkpoint(model)).get("model_type")
    return any(method.model_type == model_type for method in METHODS.values())
