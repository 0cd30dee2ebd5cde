"""Vision towers: one small interface over the Hugging Face image transformers.

A tower turns `pixel_values` (B, 3, H, W) into patch tokens of whichever layers are asked for, runs no block past the
deepest of them, and, when frozen, stays frozen whatever the model around it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.vit.modeling_vit import ViTModel

from foveate.errors import CheckpointError, InputError
from foveate.language.pretrained import find_file, first_line, load_complete, read_model_type

Layer = int | Literal["last_hidden_state"]

# BLIP-2 was trained with `ln_vision` = nn.LayerNorm(width), eps 1e-5; transformers builds it with the blocks' 1e-6
# (DynRefer spec section 2.2).
BLIP2_POST_LAYERNORM_EPS = 1e-5

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)


def _encoder_layers(model: Any) -> nn.ModuleList:
    return model.encoder.layers


def _post_layernorm(model: Any) -> Any:
    return model.post_layernorm


def _layernorm(model: Any) -> nn.Module:
    return model.layernorm


@dataclass(frozen=True)
class _Family:
    """What differs between the supported architectures."""

    model_class: type[PreTrainedModel]
    blocks: Callable[[Any], nn.ModuleList]
    final_norm: Callable[[Any], nn.Module] | None  # None: `last_hidden_state` is the last block's output as it is
    pre_norm: Callable[[Any], nn.Module] | None = None
    has_cls: bool = True
    mean: tuple[float, float, float] = _CLIP_MEAN  # used where the checkpoint has no preprocessor_config.json
    std: tuple[float, float, float] = _CLIP_STD
    takes_interpolate: bool = True  # DINOv2 interpolates by itself and has no such argument
    block_args: tuple[Any, ...] = (None,)  # positional arguments after the hidden states: no attention mask
    load_kwargs: tuple[tuple[str, Any], ...] = ()


_CLIP = _Family(CLIPVisionModel, _encoder_layers, final_norm=None, pre_norm=lambda model: model.pre_layrnorm)
_SIGLIP = _Family(SiglipVisionModel, _encoder_layers, _post_layernorm, has_cls=False, mean=_HALF, std=_HALF)
_VIT = _Family(
    ViTModel,
    lambda model: model.layers,
    _layernorm,
    mean=_HALF,
    std=_HALF,
    load_kwargs=(("add_pooling_layer", False),),
)
_DINOV2 = _Family(
    Dinov2Model,
    lambda model: model.encoder.layer,
    _layernorm,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    takes_interpolate=False,
)
# transformers does not look for the vision model's weights inside a whole BLIP-2 checkpoint unless told to.
_BLIP2 = _Family(
    Blip2VisionModel,
    _encoder_layers,
    _post_layernorm,
    block_args=(),
    load_kwargs=(("key_mapping", {r"^vision_model\.": ""}),),
)

# `model_type` of config.json -> family. A whole CLIP, SigLIP or BLIP-2 checkpoint is loaded for its vision part.
_FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": _VIT,
    "dinov2": _DINOV2,
    "blip-2": _BLIP2,
    "blip_2": _BLIP2,
    "blip_2_vision_model": _BLIP2,
}
_SUPPORTED = "CLIP, SigLIP, ViT, DINOv2 or BLIP-2"


@dataclass(frozen=True, slots=True)
class TowerLayer:
    """The tokens of one layer.

    Attributes:
        hidden_states: (B, h*w, C), or (B, 1 + h*w, C) with the class token first where `has_cls`.
        has_cls: whether the first token is a class token.
    """

    hidden_states: Tensor
    has_cls: bool

    @property
    def patch_tokens(self) -> Tensor:
        """Tokens of the patches in row-major order, (B, h*w, C); a view."""
        return self.hidden_states[:, 1:] if self.has_cls else self.hidden_states

    @property
    def cls(self) -> Tensor | None:
        """Class token, (B, C), or None where the architecture has none (SigLIP); a view."""
        return self.hidden_states[:, 0] if self.has_cls else None


@dataclass(frozen=True)  # without slots: DeepSpeed looks at what a module returns with vars()
class TowerOutput:
    """What a tower returns.

    Attributes:
        layers: one entry per layer asked for, in the order asked.
        grid: (h, w), the number of patch rows and columns.
    """

    layers: tuple[TowerLayer, ...]
    grid: tuple[int, int]

    def _only(self) -> TowerLayer:
        if len(self.layers) != 1:
            raise InputError(
                f"The output holds {len(self.layers)} layers; take one with `output.layers[i]` instead of the shortcut."
            )
        return self.layers[0]

    @property
    def patch_tokens(self) -> Tensor:
        """(B, h*w, C) of the one layer asked for. Raises InputError when several were."""
        return self._only().patch_tokens

    @property
    def cls(self) -> Tensor | None:
        """(B, C) or None, of the one layer asked for. Raises InputError when several were."""
        return self._only().cls

    @property
    def hidden_states(self) -> Tensor:
        """Class token (where there is one) and patches of the one layer asked for, (B, [1 +] h*w, C).

        Raises InputError when several layers were asked for."""
        return self._only().hidden_states


class VisionTower(nn.Module):
    """A Hugging Face image transformer behind one interface; build it with `load_tower`.

    Attributes:
        model: the wrapped `CLIPVisionModel`, `SiglipVisionModel`, `ViTModel`, `Dinov2Model` or `Blip2VisionModel`.
        width: channels C of a token.
        num_layers: number of transformer blocks.
        patch_size: side of a patch in pixels.
        image_size: native side of the (square) input in pixels.
        has_cls: whether layers come with a class token.
        mean, std: per-channel normalisation of RGB values in [0, 1] that the checkpoint was trained with.
        frozen: True when the weights take no gradient, dropout stays off and no graph is recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        freeze: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        family = next((f for f in _FAMILIES.values() if isinstance(model, f.model_class)), None)
        if family is None:
            raise CheckpointError(f"{type(model).__name__} is not a vision tower; give a {_SUPPORTED} vision model.")
        config = model.config
        self.model = model
        self._family = family
        self.width = int(config.hidden_size)
        self.patch_size = _square_side(config.patch_size, "patch_size")
        self.image_size = _square_side(config.image_size, "image_size")
        self.num_layers = len(family.blocks(model))
        self.has_cls = family.has_cls
        self.mean = _three_floats(mean if mean is not None else family.mean, "image_mean")
        self.std = _three_floats(std if std is not None else family.std, "image_std")
        self.frozen = freeze
        if family is _BLIP2:
            _post_layernorm(model).eps = BLIP2_POST_LAYERNORM_EPS
        if freeze:
            self.requires_grad_(False)
            self.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in the order they run; the output of block i is `hidden_states[i + 1]`."""
        return self._family.blocks(self.model)

    def train(self, mode: bool = True) -> VisionTower:
        """As `nn.Module.train`, except that a frozen tower stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def grid(self, height: int, width: int, *, interpolate: bool = False) -> tuple[int, int]:
        """Patch rows and columns (h, w) of an input of `height` x `width` pixels.

        Raises:
            InputError: the size is not the native one and `interpolate` is off, or it is not a whole number of patches.
        """
        native = self.image_size
        if (height, width) != (native, native) and not interpolate:
            raise InputError(
                f"pixel_values are {height}x{width} (height x width) but this tower takes {native}x{native}; resize "
                "the image or pass interpolate=True to interpolate the position embeddings."
            )
        for name, side in (("height", height), ("width", width)):
            # the native side may have a remainder (so400m-patch14-384): the checkpoint was trained with it cut off
            if side < self.patch_size or (side % self.patch_size and side != native):
                raise InputError(
                    f"pixel_values have {name} {side}, which is not a whole number of {self.patch_size}-pixel patches; "
                    f"resize the image to a multiple of {self.patch_size}."
                )
        return height // self.patch_size, width // self.patch_size

    def forward(self, pixel_values: Tensor, layers: Sequence[Layer] = (-1,), interpolate: bool = False) -> TowerOutput:
        """Tokens of the layers asked for; blocks deeper than the deepest of them are not run.

        Args:
            pixel_values: (B, 3, H, W) float, RGB, normalised with `mean` and `std`; cast to the tower's dtype.
            layers: indices into Hugging Face's `hidden_states`: 0 is the embedding, i the output of block i, -1 that
                of the last block *before* any final norm; or "last_hidden_state", which is after the final norm where
                the architecture has one (all but CLIP).
            interpolate: interpolate the position embeddings (bicubic, as Hugging Face) when the size is not native.

        Returns:
            One `TowerLayer` per entry of `layers`, in order, and the patch grid.

        Raises:
            InputError: pixel_values of a wrong shape, dtype or size, or a layer that does not exist.
        """
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            given = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise InputError(f"pixel_values must be a tensor of shape (B, 3, H, W), got {given}.")
        if len(pixel_values) == 0:
            raise InputError("pixel_values hold no image (batch of 0); skip the call when there is nothing to encode.")
        if not pixel_values.is_floating_point():
            raise InputError(
                f"pixel_values must be float, normalised with the tower's mean and std, got {pixel_values.dtype}."
            )
        grid = self.grid(pixel_values.shape[-2], pixel_values.shape[-1], interpolate=interpolate)
        wanted = self._resolve(layers)
        with torch.no_grad() if self.frozen else nullcontext():
            found = self._run(pixel_values.to(self.dtype), wanted, interpolate)
        return TowerOutput(tuple(TowerLayer(found[index], self.has_cls) for index in wanted), grid)

    def _resolve(self, layers: Sequence[Layer]) -> list[Layer]:
        """Non-negative indices, with "last_hidden_state" left as it is."""
        if isinstance(layers, (str, int)) or len(layers) == 0:
            raise InputError(f"layers must be a non-empty sequence such as (-1,), got {layers!r}.")
        total = self.num_layers + 1
        resolved: list[Layer] = []
        for layer in layers:
            if layer == "last_hidden_state":
                resolved.append(layer)
            elif isinstance(layer, int) and not isinstance(layer, bool) and -total <= layer < total:
                resolved.append(layer % total)
            else:
                raise InputError(
                    f"layer {layer!r} does not exist: this tower has hidden states {-total}..{total - 1} "
                    'and "last_hidden_state".'
                )
        return resolved

    def _run(self, pixel_values: Tensor, wanted: Sequence[Layer], interpolate: bool) -> dict[Layer, Tensor]:
        family = self._family
        model: Any = self.model
        depth = max(self.num_layers if isinstance(layer, str) else layer for layer in wanted)
        embed_kwargs = {"interpolate_pos_encoding": interpolate} if family.takes_interpolate else {}
        hidden = model.embeddings(pixel_values, **embed_kwargs)
        if family.pre_norm is not None:
            hidden = family.pre_norm(model)(hidden)
        found: dict[Layer, Tensor] = {0: hidden}
        for index, block in enumerate(family.blocks(model)[:depth], start=1):
            hidden = block(hidden, *family.block_args)
            if index in wanted:
                found[index] = hidden
        if "last_hidden_state" in wanted:
            found["last_hidden_state"] = hidden if family.final_norm is None else family.final_norm(model)(hidden)
        return found


def load_tower(
    path_or_model: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> VisionTower:
    """Load a vision tower from a checkpoint folder (or hub name), or wrap a model that is already loaded.

    Args:
        path_or_model: folder or hub name of a CLIP, SigLIP, ViT, DINOv2 or BLIP-2 checkpoint, whole or vision part
            only; or such a model (of a whole one the vision part is taken, not copied). BLIP-2's `post_layernorm`
            gets the eps 1e-5 it was trained with (DynRefer spec section 2.2).
        dtype: of the weights and the outputs; None keeps what the checkpoint or the model has.
        freeze: see `VisionTower.frozen`.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable, incomplete or of another architecture.
    """
    if isinstance(path_or_model, nn.Module):
        model = _vision_part(path_or_model)
        if dtype is not None:
            nn.Module.to(model, dtype)
        return VisionTower(model, freeze=freeze)
    if not isinstance(path_or_model, (str, os.PathLike)):
        raise InputError(
            f"A tower is loaded from a checkpoint folder or a transformers model, got {type(path_or_model).__name__}."
        )
    path = os.fspath(path_or_model)
    model_type = read_model_type(path)
    family = _FAMILIES.get(model_type)
    if family is None:
        raise CheckpointError(f"{path!r} has model_type {model_type!r}; a tower needs {_SUPPORTED}.")
    model = load_complete(
        family.model_class,
        path,
        dtype=dtype,
        may_lack=("head.",),  # SigLIP's pooling head never touches what a tower returns
        attn_implementation="sdpa",
        **dict(family.load_kwargs),
    )
    mean, std = _normalisation(path)
    return VisionTower(model, freeze=freeze, mean=mean, std=std)


def build_tower(config: Any, *, freeze: bool = True) -> VisionTower:
    """A tower with fresh weights from the configuration of a vision model.

    Raises:
        CheckpointError: the configuration is of another architecture.
    """
    family = _FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        raise CheckpointError(
            f"{type(config).__name__} is no configuration of a vision tower; a tower needs {_SUPPORTED}."
        )
    return VisionTower(family.model_class._from_config(config), freeze=freeze)


def _vision_part(model: nn.Module) -> PreTrainedModel:
    """The vision transformer of a whole model (CLIPModel, Blip2Model, ViTForImageClassification, ...)."""
    classes = tuple({family.model_class for family in _FAMILIES.values()})
    for candidate in (model, *(getattr(model, name, None) for name in ("vision_model", "vit", "dinov2"))):
        if isinstance(candidate, classes):
            return candidate
    raise CheckpointError(f"{type(model).__name__} has no vision tower; give a {_SUPPORTED} model.")


def _normalisation(path: str) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """image_mean and image_std of the checkpoint's image processor, or (None, None) where it ships none."""
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        file = find_file(path, name)
        if file is None:
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            content = content if section is None else content.get(section, {})
            mean, std = content.get("image_mean"), content.get("image_std")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{name} of {path!r} is not a valid processor file: {first_line(error)}") from error
        if mean is not None and std is not None:
            return mean, std
    return None, None


def _square_side(size: Any, name: str) -> int:
    sides = {int(side) for side in size} if isinstance(size, Sequence) else {int(size)}
    if len(sides) != 1:
        raise CheckpointError(f"The tower's {name} is {size}; only square ones are supported.")
    return sides.pop()


def _three_floats(values: Any, name: str) -> tuple[float, float, float]:
    values = [values] * 3 if isinstance(values, (int, float)) else values
    if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
        raise CheckpointError(f"{name} must be three numbers, got {values!r}.")
    return (float(values[0]), float(values[1]), float(values[2]))
