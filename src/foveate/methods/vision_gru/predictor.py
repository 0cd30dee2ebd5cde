"""What `foveate.load` gives for a VisionGRU classifier: images in, classes with probabilities out."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from foveate.checkpoints import find_checkpoint, read_config, warn_of_the_world
from foveate.errors import CheckpointError, InputError
from foveate.language.pretrained import load_exactly
from foveate.vision.images import ImageSource

from .modeling import VisionGRUForImageClassification
from .processing import VisionGRUProcessor


@dataclass(frozen=True)
class Classification:
    """The likeliest classes of an image, likeliest first.

    Attributes:
        labels: names of the classes.
        scores: their probabilities.
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.labels[0]

    def to_dict(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "scores": [round(score, 6) for score in self.scores]}


Model = TypeVar("Model", bound=PreTrainedModel)
Processor = TypeVar("Processor")


class OnDevice(Generic[Model, Processor]):
    """A network of this room in evaluation mode, with its processor; on a GPU and in float32 unless told otherwise."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module: Any = model
        self.model: Model = module.to(device, dtype or torch.float32).eval()
        self.processor = processor

    @property
    def labels(self) -> list[str]:
        """Names of all classes, in the order of the logits."""
        config: Any = self.model.config
        return [(config.id2label or {}).get(index, f"class {index}") for index in range(config.num_labels)]


class VisionGRUPredictor(OnDevice[VisionGRUForImageClassification, VisionGRUProcessor]):
    """Classifies images. Calls change nothing in it, so that threads may share one.

    Example:
        >>> classify = foveate.load("out/vision-gru/checkpoint")
        >>> classify("street.png", top=3).labels
        ('car', 'truck', 'bus')
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> VisionGRUPredictor:
        """Raises:
        InputError: there is no such model, or it has no classes to choose from.
        CheckpointError: its weights or configuration are damaged.
        """
        folder = find_checkpoint(name)
        architectures = read_config(folder).get("architectures") or []
        if architectures and "VisionGRUForImageClassification" not in architectures:
            raise InputError(
                f"{os.fspath(name)} is a {architectures[0]}, which has no classes to choose from; give a classifier, "
                "or load it with transformers.AutoModel or AutoBackbone."
            )
        model = load_exactly(VisionGRUForImageClassification.from_pretrained, folder, what="the VisionGRU checkpoint")
        warn_of_the_world(folder, "convert the official VisionGRU weights or train on photographs by a recipe")
        return cls(model, VisionGRUProcessor.from_pretrained(folder), device=device, dtype=dtype)

    @overload
    def __call__(
        self, images: ImageSource, *, top: int = 5, size: int | str | None = "default", batch_size: int = 16
    ) -> Classification: ...
    @overload
    def __call__(
        self, images: Sequence[ImageSource], *, top: int = 5, size: int | str | None = "default", batch_size: int = 16
    ) -> list[Classification]: ...
    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        top: int = 5,
        size: int | str | None = "default",
        batch_size: int = 16,
    ) -> Classification | list[Classification]:
        """The `top` likeliest classes of one image, or a list of them for many.

        Args:
            images: paths, bytes, PIL images or uint8 arrays.
            top: how many classes; all of them where there are fewer.
            size: side in pixels of the centre crop that is looked at; None for whole images of their own size, of
                which those of the same size are computed together.
            batch_size: images of one forward pass.

        Raises:
            InputError: an image cannot be read, or a number is no count.
            CheckpointError: the model gives numbers that are not finite.
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number from 1, not {value!r}.")
        single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | Image.Image)
        sources: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
        probabilities = self.probabilities(sources, size=size, batch_size=batch_size)
        names = self.labels
        scores, indices = probabilities.topk(min(top, len(names)), dim=1)
        found = [
            Classification(tuple(names[k] for k in row), tuple(values))
            for row, values in zip(indices.tolist(), scores.tolist(), strict=True)
        ]
        return found[0] if single else found

    @torch.inference_mode()
    def probabilities(
        self, images: Sequence[ImageSource], *, size: int | str | None = "default", batch_size: int = 16
    ) -> Tensor:
        """Probabilities (B, K) of all classes, on the CPU in float32; arguments as in a call."""
        found = torch.zeros(len(images), len(self.labels))
        waiting: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)

        def compute(batch: list[tuple[int, Tensor]]) -> None:
            pixels = torch.stack([value for _, value in batch]).to(self.model.device, self.model.dtype)
            logits = self.model(pixels).logits.float()
            if not logits.isfinite().all():
                raise CheckpointError("the model gives logits that are not finite; its weights are broken.")
            found[[index for index, _ in batch]] = logits.softmax(1).cpu()
            batch.clear()

        # Padding would reach the state that runs backwards: only images of one size go together (spec 4.5).
        for index, image in enumerate(images):
            pixels = self.processor(image, image_size=size)  # type: ignore[arg-type]
            batch = waiting[pixels.shape]
            batch.append((index, pixels))
            if len(batch) == batch_size:
                compute(batch)
        for batch in waiting.values():
            if batch:
                compute(batch)
        return found
