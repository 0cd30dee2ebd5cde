"""Images -> normalised tensors of VisionGRU (spec 4.1); saved beside the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.checkpoints import find_checkpoint
from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_write
from foveate.vision.images import ImageSource, load_image

Processor = TypeVar("Processor")

PROCESSOR_FILE = "preprocessor_config.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of pixels scaled to [0, 1]."""
CROP_RATIO = 0.875
"""Side of the centre crop / short side of the resized image, as ImageNet's protocol has it."""


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> normalised (3, H, W)."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def resized_sides(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height with the shorter one at `short` pixels and the longer one in proportion, rounded down."""
    if width <= height:
        return short, max(1, int(short * height / width))
    return max(1, int(short * width / height)), short


def fitted_sides(width: int, height: int, short: float, long: float) -> tuple[int, int]:
    """Width and height in proportion, as large as fits: the shorter side at most `short`, the longer at most `long`."""
    factor = min(long / max(width, height), short / min(width, height))
    return max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))


class VisionGRUProcessor:
    """Args:
    image_size: side in pixels of the centre crop; the image's short side is brought to floor(side / 0.875) first.
        None leaves images as they are: the network takes any size.
    """

    def __init__(self, image_size: int | None = 224) -> None:
        whole = isinstance(image_size, int) and not isinstance(image_size, bool) and 1 <= image_size <= 16384
        if image_size is not None and not whole:
            raise InputError(f"image_size must be a whole number from 1 to 16384, or None, not {image_size!r}.")
        self.image_size = image_size

    def __call__(self, image: ImageSource, *, image_size: int | str | None = "default") -> Tensor:
        """One image -> (3, H, W).

        Args:
            image: path, bytes, `PIL.Image` or uint8 array.
            image_size: in place of the processor's own; None for no resizing.

        Raises:
            InputError: the image cannot be read, or the size is none.
        """
        side = self.image_size if image_size == "default" else VisionGRUProcessor(image_size).image_size  # type: ignore
        picture = load_image(image)
        if side is None:
            return to_pixels(picture)
        short = int(side / CROP_RATIO)
        # Pillow's filter widens with the scale, that is, it smooths before it takes fewer pixels.
        picture = picture.resize(resized_sides(*picture.size, short), Image.Resampling.BILINEAR)
        left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
        return to_pixels(picture.crop((left, top, left + side, top + side)))

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        _save(self, folder, {"image_size": self.image_size})

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **_: Any) -> VisionGRUProcessor:
        """Raises:
        InputError: there is no such model.
        CheckpointError: the file of the processor is damaged, or for other pixels than this network's.
        """
        return _restored(cls, name, {"image_size": 224})


class VisionGRUSceneProcessor:
    """Whole scenes for segmentation (spec 4.2): resized in proportion, as large as fits into the two sides.

    Args:
        short: pixels that the shorter side has at most.
        long: pixels that the longer side has at most.
    """

    def __init__(self, short: int = 512, long: int = 2048) -> None:
        for name, value in (("short", short), ("long", long)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 16384:
                raise InputError(f"{name} must be a whole number of pixels from 1 to 16384, not {value!r}.")
        if long < short:
            raise InputError(f"long must be at least short ({short}), not {long}.")
        self.short, self.long = short, long

    def __call__(self, image: ImageSource, *, ratio: float = 1.0) -> Tensor:
        """One image -> (3, H, W); `ratio` multiplies both sides.

        Raises:
            InputError: the image cannot be read.
        """
        picture = load_image(image)
        sides = fitted_sides(*picture.size, int(self.short * ratio), int(self.long * ratio))
        return to_pixels(picture.resize(sides, Image.Resampling.BILINEAR))

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        _save(self, folder, {"short": self.short, "long": self.long})

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **_: Any) -> VisionGRUSceneProcessor:
        """Raises:
        InputError: there is no such model.
        CheckpointError: the file of the processor is damaged, or for other pixels than this network's.
        """
        return _restored(cls, name, {"short": 512, "long": 2048})


def _save(processor: Any, folder: str | os.PathLike[str], settings: Mapping[str, int | None]) -> None:
    content = {
        "processor_class": type(processor).__name__,
        **settings,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    with atomic_write(Path(folder) / PROCESSOR_FILE) as file:
        json.dump(content, file, indent=2)


def _restored(kind: Callable[..., Processor], name: str | os.PathLike[str], defaults: Mapping[str, int]) -> Processor:
    """A processor with the settings of its file, as far as it has them; a fresh one where there is no file."""
    content, path = _read_processor(name)
    if content is None:
        return kind()
    try:
        return kind(**{key: content.get(key, value) for key, value in defaults.items()})
    except InputError as error:
        raise CheckpointError(f"{path} cannot be used ({error}); copy the checkpoint again.") from None


def _read_processor(name: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, Path]:
    """The content of the file of a processor, None where there is no such file, and its path."""
    path = find_checkpoint(name) / PROCESSOR_FILE
    if not path.is_file():
        return None, path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mean, std = content.get("image_mean", list(MEAN)), content.get("image_std", list(STD))
        if (tuple(mean), tuple(std)) != (MEAN, STD):
            raise ValueError(f"mean {mean} and deviation {std} are not ImageNet's")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}); copy the checkpoint again.") from None
    return content, path
