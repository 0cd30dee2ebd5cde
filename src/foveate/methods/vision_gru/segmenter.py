"""UPerNet on VisionGRU as users hold it: images in, a class for each pixel out (spec 4.2)."""

from __future__ import annotations

import colorsys
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models.upernet.modeling_upernet import UperNetForSemanticSegmentation

from foveate.checkpoints import find_checkpoint, read_config, warn_of_the_world
from foveate.errors import CheckpointError, InputError
from foveate.language.pretrained import load_exactly
from foveate.metrics.segmentation import IGNORE
from foveate.vision.images import ImageSource, load_image

from .configuration import VisionGRUConfig
from .modeling import add_head_dropout
from .predictor import OnDevice
from .processing import VisionGRUSceneProcessor

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Ratios of the published multi-scale test, each with its mirror image."""

_GOLDEN = 0.618034


def class_colours(count: int) -> np.ndarray:
    """(count, 3) uint8: neighbouring classes get hues far apart."""
    colours = [colorsys.hsv_to_rgb(k * _GOLDEN % 1, 0.55 + 0.2 * (k % 3), 0.95 - 0.2 * (k % 2)) for k in range(count)]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def paint(image: Image.Image, classes: np.ndarray, count: int, opacity: float = 0.65) -> Image.Image:
    """The image under the colours of its classes (H, W); pixels of `IGNORE` are left as they are."""
    colours = np.concatenate([class_colours(count), np.zeros((IGNORE + 1 - count, 3), np.uint8)])[classes]
    pixels = np.asarray(image, np.float32)
    mixed = np.where((classes == IGNORE)[..., None], pixels, (1 - opacity) * pixels + opacity * colours)
    return Image.fromarray(mixed.round().astype(np.uint8))


@dataclass(frozen=True)
class Segmentation:
    """The classes of an image's pixels.

    Attributes:
        classes: (H, W) uint8, indices into `labels`.
        labels: names of all classes.
        image: the RGB image.
    """

    classes: np.ndarray
    labels: tuple[str, ...]
    image: Image.Image = field(repr=False)

    @property
    def shares(self) -> dict[str, float]:
        """Name -> share of the pixels, of the classes that occur, the largest first."""
        counts = np.bincount(self.classes.ravel(), minlength=len(self.labels)) / self.classes.size
        return {self.labels[k]: float(counts[k]) for k in np.argsort(-counts, kind="stable") if counts[k]}

    def mask(self, label: str) -> np.ndarray:
        """(H, W) bool of one class.

        Raises:
            InputError: there is no such class.
        """
        if label not in self.labels:
            raise InputError(f"there is no class {label!r}; the model knows {', '.join(self.labels)}.")
        return self.classes == self.labels.index(label)

    def plot(self) -> Image.Image:
        """The image under the colours of its classes."""
        return paint(self.image, self.classes, len(self.labels))


class VisionGRUSegmenter(OnDevice[UperNetForSemanticSegmentation, VisionGRUSceneProcessor]):
    """Says the class of each pixel. Calls change nothing in it, so that threads may share one.

    Example:
        >>> segment = VisionGRUSegmenter.from_pretrained("out/segmenter/checkpoint")
        >>> segment("street.png").shares
        {'street': 0.61, 'car': 0.24, 'tree': 0.15}
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> VisionGRUSegmenter:
        """Raises:
        InputError: there is no such model, or it is no UPerNet on a VisionGRU.
        CheckpointError: its weights or configuration are damaged.
        """
        from foveate.methods import register

        folder = find_checkpoint(name)
        config = read_config(folder)
        backbone = config.get("backbone_config")
        found = backbone.get("model_type") if isinstance(backbone, dict) else config.get("model_type")
        if config.get("model_type") != "upernet" or found != VisionGRUConfig.model_type:
            raise InputError(
                f"{os.fspath(name)} is no UPerNet on a VisionGRU (model_type {found!r}); give a folder that the stage "
                "segment of the method vision_gru wrote."
            )
        register()
        model: Any = load_exactly(
            UperNetForSemanticSegmentation.from_pretrained, folder, what="the segmenter checkpoint"
        )
        warn_of_the_world(folder, "train on ADE20K by recipes/vision_gru/ade20k.yaml")
        add_head_dropout(model)
        return cls(model, VisionGRUSceneProcessor.from_pretrained(folder), device=device, dtype=dtype)

    @overload
    def __call__(self, images: ImageSource, **options: Any) -> Segmentation: ...
    @overload
    def __call__(self, images: Sequence[ImageSource], **options: Any) -> list[Segmentation]: ...
    def __call__(
        self, images: ImageSource | Sequence[ImageSource], **options: Any
    ) -> Segmentation | list[Segmentation]:
        """The classes of one image's pixels, or a list of them for many.

        Args:
            images: paths, bytes, PIL images or uint8 arrays.
            options: `ratios`, `flip` and `batch_size` of `class_maps`.

        Raises:
            InputError: an image cannot be read.
            CheckpointError: the model gives numbers that are not finite.
        """
        single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | Image.Image)
        sources: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
        pictures = [load_image(source) for source in sources]
        labels = tuple(self.labels)
        found = [
            Segmentation(classes, labels, picture)
            for classes, picture in zip(self.class_maps(pictures, **options), pictures, strict=True)
        ]
        return found[0] if single else found

    @torch.inference_mode()
    def class_maps(
        self,
        images: Sequence[Image.Image],
        *,
        ratios: Sequence[float] = (1.0,),
        flip: bool = False,
        batch_size: int = 16,
    ) -> list[np.ndarray]:
        """The class of each pixel of each image, (H, W) uint8.

        Args:
            ratios: sizes to look at, 1 for the processor's own; probabilities are averaged over them.
            flip: look at the mirror image at each of them, too.
            batch_size: images of one forward pass; only images of one size go together (spec 4.5).
        """
        if not ratios or any(not 0 < ratio <= 16 for ratio in ratios):
            raise InputError(f"ratios must be numbers above 0 and up to 16, at least one, not {list(ratios)}.")
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.size].append(index)
        maps: list[np.ndarray] = [np.zeros((0, 0), np.uint8)] * len(images)
        for (width, height), indices in by_size.items():
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                chosen = [images[index] for index in part]
                looks = list(self._looks(chosen, ratios, flip, (height, width)))
                total = looks[0] if len(looks) == 1 else torch.stack([look.softmax(1) for look in looks]).mean(0)
                for index, classes in zip(part, total.argmax(1).to(torch.uint8).cpu().numpy(), strict=True):
                    maps[index] = classes
        return maps

    def _looks(
        self, images: Sequence[Image.Image], ratios: Sequence[float], flip: bool, size: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Logits (B, K, H, W) in the size of the images, for each ratio and mirror image."""
        for ratio in ratios:
            pixels = torch.stack([self.processor(image, ratio=ratio) for image in images])
            pixels = pixels.to(self.model.device, self.model.dtype)
            for mirrored in (False, True) if flip else (False,):
                logits = self.model(pixels.flip(3) if mirrored else pixels).logits.float()
                if not logits.isfinite().all():
                    raise CheckpointError("the model gives logits that are not finite; its weights are broken.")
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                yield logits.flip(3) if mirrored else logits
