"""Official VisionGRU weights -> ours (spec 6). Our modules have the official names, so keys only get a prefix; sizes
are read off the shapes, and nothing is dropped or missing silently."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate import __version__
from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_folder, atomic_write
from foveate.language.pretrained import first_line

from .configuration import STAGES, VisionGRUConfig
from .modeling import VisionGRUForImageClassification, VisionGRUModel

MANIFEST_FILE = "manifest.json"

_WRAPPERS = ("_orig_mod.", "module.")
"""What `torch.compile` and data parallelism put in front of keys, in any order and number."""
_SEGMENTOR = "backbone.vig."
_BLOCK = (
    "min_gru_1.to_hidden_and_gate.weight",
    "min_gru_1.to_out.weight",
    "min_gru_2.to_hidden_and_gate.weight",
    "min_gru_2.to_out.weight",
    "projection1.weight",
    "projection1.bias",
    "projection2.weight",
    "projection2.bias",
    "norm2.weight",
    "norm2.bias",
    "norm.weight",
    "norm.bias",
    "dw_conv.weight",
    "dw_conv.bias",
)
_UPERNET = (
    (re.compile(r"^backbone\.vig\."), "backbone.vision_gru."),
    (re.compile(r"^(decode_head|auxiliary_head)\.conv_seg\."), r"\1.classifier."),
    (re.compile(r"^((?:decode_head|auxiliary_head)\..*)\.bn\."), r"\1.batch_norm."),
)


@dataclass(frozen=True)
class Conversion:
    """What a conversion found.

    Attributes:
        config: of the model, derived from the shapes.
        parameters: number of them.
        averaged: whether the file held the moving average of the weights.
        folder: what was written; None if the file was only compared.
    """

    config: VisionGRUConfig
    parameters: int
    averaged: bool
    folder: Path | None = None


def parameter_order(depths: Sequence[int], *, head: bool) -> list[str]:
    """Official names in the order of the official `parameters()`, which a file of averages follows."""
    order = [f"tokenizer.{name}.{kind}" for name in ("conv1", "conv2", "norm1", "norm2") for kind in ("weight", "bias")]
    for stage, depth in enumerate(depths):
        order += [f"snake_gru.layers.{stage}.{block}.{name}" for block in range(depth) for name in _BLOCK]
    order += [
        f"snake_gru.{name}{i}.{kind}" for name in ("norm", "conv") for i in (1, 2, 3) for kind in ("weight", "bias")
    ]
    return [*order, "fc.weight", "fc.bias"] if head else order


def name_averages(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The nameless list of a file of averages (`shadow_params`) as a state dict of official names.

    Raises:
        CheckpointError: the shapes are not those of a VisionGRU's parameters in their order.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    dim = shapes[2][0] if len(shapes) > 2 and len(shapes[2]) == 4 else 0
    position, depths = 8, [0] * STAGES
    for stage in range(STAGES):
        # A block begins with the candidates and gates of its first unit, whose second dimension is its width.
        while position < len(shapes) and len(shapes[position]) == 2 and shapes[position][1] == dim * 2**stage:
            depths[stage] += 1
            position += len(_BLOCK)
    rest = len(shapes) - position
    if dim and all(depths) and rest in (12, 14):
        return dict(zip(parameter_order(depths, head=rest == 14), tensors, strict=True))
    raise CheckpointError(
        f"the {len(tensors)} averaged tensors are not the parameters of a VisionGRU in their order; give the file of "
        "the model instead."
    )


def clean_keys(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official keys without what wrappers and a segmentor put in front of them."""
    cleaned: dict[str, Tensor] = {}
    for key, value in official.items():
        name = key
        while name.startswith(_WRAPPERS):
            name = name.removeprefix(next(prefix for prefix in _WRAPPERS if name.startswith(prefix)))
        name = name.removeprefix(_SEGMENTOR)
        if name in cleaned:
            raise CheckpointError(f"two keys of the checkpoint mean {name!r}, {key!r} is one; give one model a file.")
        cleaned[name] = value
    return cleaned


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under the keys of `VisionGRUForImageClassification`, or of `VisionGRUBackbone` without a head.

    Raises:
        CheckpointError: keys that are no VisionGRU's, all listed.
    """
    cleaned = clean_keys(official)
    unknown = sorted(key for key in cleaned if not key.startswith(("tokenizer.", "snake_gru.", "fc.")))
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are not VisionGRU's: {', '.join(unknown)}")
    return {key if key.startswith("fc.") else f"vision_gru.{key}": value for key, value in cleaned.items()}


def convert_upernet_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A segmentor's tensors (mmseg's names) under the keys of `UperNetForSemanticSegmentation` with our backbone."""
    converted = {}
    for key, value in official.items():
        for pattern, ours in _UPERNET:
            key = pattern.sub(ours, key)
        converted[key] = value
    return converted


def derive_config(official: Mapping[str, Tensor]) -> VisionGRUConfig:
    """Width, depths, expansion and number of classes as the shapes of official tensors show them.

    Raises:
        CheckpointError: tensors that this needs are missing or of another kind.
    """
    state = clean_keys(official)

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in state or state[key].ndim != dimensions:
            found = "missing" if key not in state else f"of shape {tuple(state[key].shape)}"
            raise CheckpointError(f"{key} is {found}, so this is no VisionGRU; give its checkpoint.")
        return state[key].shape

    dim, _, *_ = shape("tokenizer.conv2.weight", 4)
    numbers: list[set[int]] = [set() for _ in range(STAGES)]
    for key in state:
        if found := re.match(r"snake_gru\.layers\.([0-3])\.(\d+)\.", key):
            numbers[int(found[1])].add(int(found[2]))
    first = "snake_gru.layers.0.0"
    gates = shape(f"{first}.min_gru_1.to_hidden_and_gate.weight", 2)[0]
    hidden = shape(f"{first}.projection1.weight", 2)[0]
    head = {"num_labels": shape("fc.weight", 2)[0]} if "fc.weight" in state else {}
    try:
        return VisionGRUConfig(
            dim=dim,
            depths=[max(found, default=-1) + 1 for found in numbers],
            num_channels=shape("tokenizer.conv1.weight", 4)[1],
            expansion=gates / 2 / dim,
            mlp_ratio=hidden / dim,
            **head,
        )
    except ValueError as error:
        raise CheckpointError(f"the checkpoint is no VisionGRU: {first_line(error)}") from None


def load_converted(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads converted weights; all keys that are missing or unexpected are one error, other shapes another."""
    try:
        result = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit this configuration: {first_line(error)}") from error
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint lacks {len(result.missing_keys)} tensors ({', '.join(sorted(result.missing_keys))}) "
            f"and has {len(result.unexpected_keys)} unknown ones ({', '.join(sorted(result.unexpected_keys))})"
        )


def read_official(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], bool]:
    """The tensors of an official file under their names, and whether they are averages.

    Args:
        path: `*_model_path.pth`, a flat state dict, or `*_ema_path.pth`, a mapping with `shadow_params`. Only tensors
            and plain values are read; code in the file does not run.

    Raises:
        InputError: there is no such file.
        CheckpointError: it is damaged, holds more than tensors, or none of the two.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}; give the downloaded checkpoint.")
    with path.open("rb"):  # what the operating system refuses is not damage
        pass
    try:
        with warnings.catch_warnings(action="ignore"):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, or is damaged, so it was not opened "
            f"({first_line(error)}); get the file from its authors."
        ) from None
    except Exception as error:  # zip, pickle and torch each raise their own
        raise CheckpointError(
            f"{path} is damaged or not a PyTorch file ({first_line(error)}); copy it again."
        ) from None
    if isinstance(content, dict) and isinstance(content.get("shadow_params"), list | tuple):
        averages = content["shadow_params"]
        if not all(isinstance(value, Tensor) for value in averages):
            raise CheckpointError(f"shadow_params of {path} holds more than tensors; copy the file again.")
        return name_averages(averages), True
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no named tensors; give the file of the model or of its averages.")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(
            f"{path} holds {len(others)} entries that are not named tensors ({', '.join(others[:10])}); give the file "
            "of the model or of its averages."
        )
    return content, False


def convert_checkpoint(official: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Conversion:
    """Writes a folder that `transformers.AutoModelForImageClassification` reads, whole or not at all.

    Args:
        official: the released file, see `read_official`.
        out: folder to write, new or empty; None only compares keys and shapes.

    Raises:
        InputError: there is no such file, or `out` is not empty.
        CheckpointError: the file is damaged, or its keys or shapes are not those of a VisionGRU.
    """
    tensors, averaged = read_official(official)
    config = derive_config(tensors)
    state = convert_state_dict(tensors)
    headed = "fc.weight" in state
    if not headed:
        state = {key.removeprefix("vision_gru."): value for key, value in state.items()}
    model = (VisionGRUForImageClassification if headed else VisionGRUModel)(config)
    load_converted(model, {key: value.float() for key, value in state.items()})
    broken = sorted(name for name, value in model.named_parameters() if not value.isfinite().all())
    if broken:
        raise CheckpointError(f"{official} has values that are not finite in {', '.join(broken)}; download it again.")
    parameters = sum(value.numel() for value in model.parameters())
    if out is None:
        return Conversion(config, parameters, averaged)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        with Path(official).expanduser().open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest = {
            "foveate": __version__,
            "method": "vision_gru",
            "source": {Path(official).name: digest},
            "averaged": averaged,
            "parameters": parameters,
        }
        with atomic_write(folder / MANIFEST_FILE) as file:
            json.dump(manifest, file, indent=1)
    return Conversion(config, parameters, averaged, Path(out))
