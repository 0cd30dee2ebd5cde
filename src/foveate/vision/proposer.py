"""Where there is something to describe: a small one-stage detector behind `foveate describe --everything`.

    image, longer side 256 -> convolutions at strides 2 ... 32 -> top-down sums to stride 4 -> three 1 x 1 heads

Each cell of the stride-4 map says whether the centre of an object lies in it (CenterNet: Zhou et al., "Objects as
Points", 2019), how far the four sides of that object's box are away (FCOS: Tian et al., ICCV 2019), and which of the
model's classes it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from foveate.checkpoints import find_checkpoint, read_config
from foveate.errors import CheckpointError, InputError
from foveate.language.pretrained import load_complete
from foveate.ops.boxes import batched_nms
from foveate.vision.images import ImageSource, load_image

STRIDE = 4
"""Pixels of the resized image per cell of the output maps."""

# exp of these, times the stride, are the shortest and longest distances that a side can have: 0.07 and 1614 pixels.
_LOG_DISTANCE = (-4.0, 6.0)
# Before training, a distance is e^2 cells (30 pixels), and one cell in a hundred claims to be a centre.
_FIRST_LOG_DISTANCE, _FIRST_OBJECTNESS = 2.0, -math.log(99)
# Peaks of the objectness of an image that enter non-maximum suppression.
_CANDIDATES = 300


class ProposerConfig(PreTrainedConfig):
    """Configuration of a `ProposerModel`; its classes are in `id2label`, as in other detectors of transformers.

    Args:
        image_size: side in pixels of the square that an image is resized into, its longer side first; a multiple of 32.
        widths: channels at the strides 2, 4, 8, 16 and 32.
        head_width: channels of the top-down path and the heads.
        score_threshold: a proposal needs at least this score.
        nms_threshold: of two proposals that overlap by a larger IoU, the better one stays.
    """

    model_type = "foveate_proposer"

    image_size: int = 256
    widths: list[int] | tuple[int, ...] = (16, 32, 64, 96, 128)
    head_width: int = 48
    score_threshold: float = 0.3
    nms_threshold: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.widths = list(self.widths)
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, not {self.image_size}")
        if len(self.widths) != 5 or min(self.widths) < 1 or self.head_width < 1:
            raise ValueError(f"a proposer has five widths and a head_width, got {self.widths} and {self.head_width}")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")

    @property
    def grid_size(self) -> int:
        """Cells along a side of the output maps."""
        return self.image_size // STRIDE

    @property
    def class_names(self) -> list[str]:
        """K names, in the order of the class logits."""
        return [name for _, name in sorted((self.id2label or {}).items())]


class ProposerOutput(NamedTuple):
    """Maps of g x g cells, float32.

    Attributes:
        objectness: (B, g, g) logits: the centre of an object is here.
        log_distances: (B, 4, g, g) logarithms of the distances to the left, top, right and bottom, in cells.
        classes: (B, K, g, g) class logits of the object whose centre is here.
    """

    objectness: Tensor
    log_distances: Tensor
    classes: Tensor


class ConvNorm(nn.Sequential):
    """Convolution and batch norm."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> None:
        padding = (size - 1) // 2
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(outputs)
        )


class Block(nn.Module):
    """Looks around channel by channel (size x size), then mixes the channels; added to what was there."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.around = ConvNorm(width, width, size, groups=width)
        self.expand = ConvNorm(width, 2 * width, 1)
        self.project = ConvNorm(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu(self.expand(self.around(x))))


class ProposerModel(PreTrainedModel):
    """The detector's network; 0.4 million parameters at the default widths."""

    config_class = ProposerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ProposerConfig) -> None:
        super().__init__(config)
        widths, head = config.widths, config.head_width
        self.stem = ConvNorm(3, widths[0], 3, stride=2)
        self.down = nn.ModuleList(
            ConvNorm(before, after, 3 if before < 64 else 2, stride=2) for before, after in pairwise(widths)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, size) for _ in range(depth)))
            for width, depth, size in zip(widths[1:], (1, 2, 2, 2), (3, 5, 5, 5), strict=True)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, head, 1) for width in widths[1:])
        self.merge = nn.ModuleList(Block(head, size) for size in (5, 5, 3))
        self.neck = ConvNorm(head, head, 3)
        self.objectness = nn.Conv2d(head, 1, 1)
        self.log_distances = nn.Conv2d(head, 4, 1)
        self.classes = nn.Conv2d(head, len(config.class_names), 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, Block):
            nn.init.zeros_(cast(nn.BatchNorm2d, module.project[1]).weight)  # each block begins as the identity
        elif isinstance(module, ProposerModel):
            for head, first in ((self.objectness, _FIRST_OBJECTNESS), (self.log_distances, _FIRST_LOG_DISTANCE)):
                nn.init.normal_(head.weight, std=0.01)
                nn.init.constant_(cast(Tensor, head.bias), first)
            nn.init.normal_(self.classes.weight, std=0.01)

    def forward(self, pixel_values: Tensor) -> ProposerOutput:
        """(B, 3, S, S) pixels of `to_pixel_values` -> maps of S / 4 cells a side. S is a multiple of 32."""
        x = F.relu(self.stem(pixel_values))
        levels = []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(F.relu(down(x)))
            levels.append(x)
        top = self.lateral[-1](levels[-1])
        for level, lateral, merge in zip(levels[-2::-1], self.lateral[-2::-1], self.merge, strict=True):
            top = merge(lateral(level) + F.interpolate(top, scale_factor=2.0, mode="nearest"))
        top = F.relu(self.neck(top))
        return ProposerOutput(
            objectness=self.objectness(top)[:, 0].float(),
            log_distances=self.log_distances(top).float(),
            classes=self.classes(top).float(),
        )


# -------------------------------------------------------------------- boxes and cells


def cell_centres(grid: int, device: torch.device | None = None) -> Tensor:
    """(g, g, 2) x and y in pixels of the centres of the cells, row by row."""
    steps = (torch.arange(grid, device=device, dtype=torch.float32) + 0.5) * STRIDE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], dim=-1)


def encode_boxes(boxes: Tensor, centres: Tensor) -> Tensor:
    """Logarithms, in cells, of the distances from centres (..., 2) inside boxes (..., 4) to their four sides.

    Distances are limited to what the network can say, 0.07 to 1614 pixels.
    """
    distances = torch.cat([centres - boxes[..., :2], boxes[..., 2:] - centres], dim=-1) / STRIDE
    low, high = _LOG_DISTANCE
    return distances.clamp(math.exp(low), math.exp(high)).log()


def decode_boxes(log_distances: Tensor, centres: Tensor) -> Tensor:
    """The boxes (..., 4) xyxy pixels that have their sides so far from the centres (..., 2)."""
    distances = log_distances.clamp(*_LOG_DISTANCE).exp() * STRIDE
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


# -------------------------------------------------------------------- pixels


def fit_image(image: Image.Image, side: int) -> np.ndarray:
    """(h, w, 3) uint8 with the longer side `side` and the other in proportion, at least one pixel."""
    longer = max(image.size)
    size = (max(1, round(image.width * side / longer)), max(1, round(image.height * side / longer)))
    # Reducing by whole factors first costs a fraction and looks the same.
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0))


def to_pixel_values(pictures: Sequence[np.ndarray], side: int) -> Tensor:
    """(h, w, 3) uint8 pictures, h and w up to `side` -> (B, 3, side, side) float32 in [-2, 2].

    A picture lies in the upper left corner, the rest is 0 (mid-grey). Channels come last in memory.
    """
    canvas = np.full((len(pictures), side, side, 3), 127.5, np.float32)
    for row, picture in zip(canvas, pictures, strict=True):
        row[: picture.shape[0], : picture.shape[1]] = picture
    return (torch.from_numpy(canvas).permute(0, 3, 1, 2) - 127.5) / 63.75


# -------------------------------------------------------------------- what users hold


@dataclass(frozen=True)
class Proposals:
    """R regions of an image, the surest first.

    Attributes:
        boxes: (R, 4) float32 xyxy pixels, inside the image.
        scores: (R,) float32 probabilities that an object is there.
        label_scores: (R,) float32 probabilities of the labels, given an object.
        labels: R names of the most likely class.
        class_scores: (R, K) float32 probabilities of all classes, given an object.
    """

    boxes: np.ndarray
    scores: np.ndarray
    label_scores: np.ndarray
    labels: tuple[str, ...]
    class_scores: np.ndarray


class RegionProposer:
    """Finds the objects of images of any size. Thread-safe to call.

    Args:
        model: is put into evaluation mode; stays on its device.
    """

    def __init__(self, model: ProposerModel) -> None:
        self.model = model.eval()

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, device: str | torch.device | None = None
    ) -> RegionProposer:
        """Load a shipped proposer ("proposer-world"), a folder, or a repository of the Hugging Face hub, in float32.

        Raises:
            InputError: there is no such model, or it is a model of another kind.
            CheckpointError: it is damaged or incomplete.
        """
        folder = find_checkpoint(name)
        model_type = read_config(folder).get("model_type")
        if model_type != ProposerConfig.model_type:
            raise InputError(f"{os.fspath(name)} is a {model_type!r} model, not a region proposer; try proposer-world.")
        model = load_complete(ProposerModel, str(folder), dtype=torch.float32)
        return cls(model.to(device=device, memory_format=torch.channels_last))

    def __call__(self, image: ImageSource) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (R, 4) float32 xyxy pixels inside the image, and their scores (R,), highest first.

        Raises:
            InputError: the image is none.
            CheckpointError: the model gives non-finite numbers.
        """
        found = self.propose([image])[0]
        return found.boxes, found.scores

    def propose(self, images: Sequence[ImageSource], *, batch_size: int = 32) -> list[Proposals]:
        """The regions of each image, and what is in them.

        Args:
            images: paths, bytes, PIL images or uint8 arrays.
            batch_size: images that run together.

        Raises:
            InputError: an image is none, or the arguments are not what they should be.
            CheckpointError: the model gives non-finite numbers.
        """
        if not isinstance(images, list | tuple):
            raise InputError(f"propose takes a list of images, not a {type(images).__name__}; put it into a list.")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")
        side, found = self.model.config.image_size, []
        for start in range(0, len(images), batch_size):
            sizes, pictures = [], []
            for source in images[start : start + batch_size]:
                image = load_image(source)
                sizes.append(image.size)
                pictures.append(fit_image(image, side))
            found.extend(self._propose(pictures, sizes))
        return found

    @torch.inference_mode()
    def _propose(self, pictures: list[np.ndarray], sizes: list[tuple[int, int]]) -> list[Proposals]:
        config, device = self.model.config, self.model.device
        output = self.model(to_pixel_values(pictures, config.image_size).to(device))
        if not all(torch.isfinite(part).all() for part in (output.objectness, output.log_distances, output.classes)):
            raise CheckpointError("the region proposer gives non-finite numbers; copy its checkpoint again.")
        grid = config.grid_size
        centres = cell_centres(grid, device).flatten(0, 1)
        fitted = torch.tensor([picture.shape[1::-1] for picture in pictures], dtype=torch.float32, device=device)
        inside = (centres < fitted[:, None]).all(-1).view(-1, grid, grid)
        heat = output.objectness.sigmoid().masked_fill(~inside, 0)
        peaks = heat.where(heat == F.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0], 0)
        scores, cells = peaks.flatten(1).topk(min(_CANDIDATES, grid * grid))
        chosen = (scores > 0) & (scores >= config.score_threshold)
        log_distances = output.log_distances.flatten(2).gather(2, cells[:, None].expand(-1, 4, -1)).mT
        boxes = torch.minimum(decode_boxes(log_distances, centres[cells]).clamp(min=0), fitted[:, None].repeat(1, 1, 2))
        # Back to the image's own pixels, each axis by its own factor: the sides were rounded.
        real = torch.tensor(sizes, dtype=torch.float32, device=device)
        boxes = torch.minimum(boxes * (real / fitted)[:, None].repeat(1, 1, 2), real[:, None].repeat(1, 1, 2))
        found = []
        for k in range(len(pictures)):
            own_boxes, own_scores, own_cells = (part[k, chosen[k]] for part in (boxes, scores, cells))
            kept = batched_nms(own_boxes, own_scores, torch.zeros_like(own_cells), config.nms_threshold)
            class_scores = output.classes[k].flatten(1)[:, own_cells[kept]].softmax(0).T
            label_scores, labels = class_scores.max(1)
            names = tuple(config.class_names[label] for label in labels.tolist())
            arrays = [part.cpu().numpy() for part in (own_boxes[kept], own_scores[kept], label_scores, class_scores)]
            found.append(Proposals(arrays[0], arrays[1], arrays[2], names, arrays[3]))
        return found
