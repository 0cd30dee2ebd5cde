"""Segment Anything as a proposer: all masks of an image, or the one of a point or a box (Kirillov et al., ICCV 2023,
arXiv 2304.02643; DynRefer spec section 8).

transformers' own steps are used (point grid, crops, upscaling, filters by predicted IoU and stability) but for its last
one, non-maximum suppression, which needs torchvision there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam.modeling_sam import SamModel

from foveate.checkpoints import find_checkpoint, read_config
from foveate.errors import CheckpointError, InputError
from foveate.language.pretrained import first_line, load_complete
from foveate.ops.boxes import batched_nms, validate_boxes
from foveate.vision.images import ImageSource, decode_rle, encode_rle, load_image
from foveate.vision.proposals import Rle, check_fraction

# Pixels of masks that are upscaled together: 128 MiB as float32, at full size and at the model's.
_PIXELS_TOGETHER = 2**25


@dataclass(frozen=True)
class SamSettings:
    """How all masks of an image are made; the defaults are those of the official automatic mask generator.

    Args:
        points_per_side: points of the grid along each side of the image (or crop); each asks for three masks.
        points_per_batch: points that run together.
        crop_layers: looks again at 2^i x 2^i overlapping crops for i = 1 ... crop_layers, for small things.
        iou_threshold: a mask needs a predicted IoU above it; 0 is off.
        stability_threshold: a mask needs a stability above it: the IoU of the masks at `stability_offset` above and
            below the cut; 0 is off.
        stability_offset: in logits.
        nms_threshold: of two masks whose boxes overlap by a larger IoU, the one of higher predicted IoU stays.
        min_area: a mask needs so many pixels, and at least one. The official generator mends small holes and islands
            instead.

    Raises:
        InputError: a value is out of range.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    crop_layers: int = 0
    iou_threshold: float = 0.88
    stability_threshold: float = 0.95
    stability_offset: float = 1.0
    nms_threshold: float = 0.7
    min_area: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("points_per_side", 1, 1024),
            ("points_per_batch", 1, 2**20),
            ("crop_layers", 0, 4),
            ("min_area", 0, 2**31),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
        for name in ("iou_threshold", "stability_threshold", "nms_threshold"):
            check_fraction(getattr(self, name), name)
        if not 0 <= self.stability_offset < float("inf"):
            raise InputError(f"stability_offset must be a number from 0 on, not {self.stability_offset!r}.")


class SamProposer:
    """Masks of everything, and masks of points and boxes. Thread-safe to call.

    Args:
        model: is put into evaluation mode; stays on its device.
        image_processor: saved beside it.
        settings: for calls, which mask everything.
    """

    def __init__(
        self, model: SamModel, image_processor: SamImageProcessorPil, settings: SamSettings | None = None
    ) -> None:
        self.model: Any = model.eval()  # transformers annotates parts of its configuration as what they are not
        self.image_processor = image_processor
        self.settings = settings or SamSettings()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        settings: SamSettings | None = None,
    ) -> SamProposer:
        """Load a folder or a repository such as "facebook/sam-vit-base", in float32.

        Raises:
            InputError: there is no such model, or it is of another kind.
            CheckpointError: it is damaged or incomplete, or its image processor is that of a model of another size.
        """
        folder = find_checkpoint(name)
        model_type = read_config(folder).get("model_type")
        if model_type != "sam":
            raise InputError(f"{os.fspath(name)} is a {model_type!r} model, not a SAM; try facebook/sam-vit-base.")
        model = load_complete(SamModel, str(folder), dtype=torch.float32)
        try:
            image_processor = SamImageProcessorPil.from_pretrained(folder)
            sides = {image_processor.size["longest_edge"], *(image_processor.pad_size[n] for n in ("height", "width"))}
        except Exception as error:  # transformers raises many types on a missing or damaged file
            raise CheckpointError(f"the image processor of {folder} cannot be loaded: {first_line(error)}") from None
        if sides != {model.config.vision_config.image_size}:
            raise CheckpointError(
                f"the image processor of {folder} makes {sorted(sides)} pixels a side, but the model sees "
                f"{model.config.vision_config.image_size}; they are of different models, copy the checkpoint again."
            )
        return cls(model.to(device), image_processor, settings)

    @torch.inference_mode()
    def encode(self, image: ImageSource) -> SamImage:
        """Look at an image once, to ask for masks of many points and boxes.

        Raises:
            InputError: the image is none, or so thin that nothing of it would be left at the model's size.
            CheckpointError: the model gives non-finite numbers.
        """
        return self._encode(load_image(image))

    def _encode(self, picture: Image.Image) -> SamImage:
        side = self.image_processor.size["longest_edge"]
        if min(picture.size) * side < max(picture.size) / 2:
            raise InputError(
                f"an image of {picture.width} x {picture.height} pixels is too thin for SAM, which sees it with "
                f"{side} pixels along the longer side; cut it into parts."
            )
        inputs = self.image_processor(images=[picture], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        height, width = (int(value) for value in inputs["reshaped_input_sizes"][0])
        return SamImage((picture.height, picture.width), (height, width), self.model.get_image_embeddings(pixels), self)

    @torch.inference_mode()
    def __call__(self, image: ImageSource) -> tuple[np.ndarray, np.ndarray, list[Rle]]:
        """All masks of an image.

        Returns:
            Boxes (R, 4) float32 xyxy pixels, half-open, tight around the masks; scores (R,) float64, the predicted IoUs
            limited to [0, 1], highest first; the masks as compressed COCO run lengths of the image's size.

        Raises:
            InputError: the image is none, or too thin.
            CheckpointError: the model gives non-finite numbers.
        """
        picture, settings = load_image(image), self.settings
        grid: Any = self.image_processor.generate_crop_boxes(
            picture,
            self.image_processor.size["longest_edge"],
            crop_n_layers=settings.crop_layers,
            points_per_crop=settings.points_per_side,
        )
        crops, points, _, labels = grid
        masks: list[Rle] = []
        scores, boxes = [torch.zeros(0)], [torch.zeros(0, 4)]
        for number, crop in enumerate(crops.int().tolist()):
            seen = self._encode(picture.crop(tuple(crop)))
            for start in range(0, points.shape[1], settings.points_per_batch):
                part = slice(start, start + settings.points_per_batch)
                low, predicted = self.predict(
                    seen, input_points=points[:, part, None, number], input_labels=labels[:, part, None, number]
                )
                for found in self._filtered(low[0].flatten(0, 1), predicted[0].flatten(), seen, crop, picture):
                    masks += found[0]
                    scores.append(found[1])
                    boxes.append(found[2])
        all_scores, all_boxes = torch.cat(scores), torch.cat(boxes)
        # Of a run-length encoding, every second run is of the mask. Boxes of transformers end at the last pixel.
        area = torch.tensor([sum(mask["counts"][1::2]) for mask in masks], dtype=torch.int64)
        large = (area >= max(1, settings.min_area)).nonzero()[:, 0]
        all_boxes = all_boxes + torch.tensor([0, 0, 1, 1])
        order = batched_nms(all_boxes[large], all_scores[large], torch.zeros(len(large)), settings.nms_threshold)
        kept = large[order]
        return (
            all_boxes[kept].numpy(),
            all_scores[kept].double().clamp(0, 1).numpy(),
            [encode_rle(decode_rle(masks[row])) for row in kept.tolist()],
        )

    def predict(self, seen: SamImage, *, multimask: bool = True, **prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits and predicted IoUs, on the model's device.

        Args:
            seen: from `encode`.
            multimask: three masks of each prompt (whole, part, sub-part) instead of one.
            prompts: of P prompts, in pixels of the model's input: "input_points" (1, P, N, 2) with "input_labels"
                (1, P, N), or "input_boxes" (1, P, 4).

        Returns:
            (1, P, M, h, w) logits at the decoder's resolution and (1, P, M).

        Raises:
            CheckpointError: they are not finite.
        """
        device, dtype = self.model.device, self.model.dtype
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in prompts.items()
        }
        output = self.model(image_embeddings=seen.embeddings, multimask_output=multimask, **moved)
        low, predicted = output.pred_masks.float(), output.iou_scores.float()
        if not (low.isfinite().all() and predicted.isfinite().all()):
            raise CheckpointError("SAM gives non-finite numbers; copy its checkpoint again.")
        return low, predicted

    def _filtered(
        self, low: Tensor, predicted: Tensor, seen: SamImage, crop: list[int], picture: Image.Image
    ) -> list[tuple[list[Rle], Tensor, Tensor]]:
        """(K, h, w) logits and (K,) predicted IoUs -> run lengths, scores and boxes of what passes, on the CPU."""
        settings = self.settings
        # Most fail already here, before they take the memory of masks as large as the image.
        sure = predicted > settings.iou_threshold if settings.iou_threshold > 0 else torch.ones_like(predicted).bool()
        low, predicted = low[sure], predicted[sure]
        together = max(1, _PIXELS_TOGETHER // max(seen.size[0] * seen.size[1], self._padded_pixels))
        found = []
        for start in range(0, len(low), together):
            part = slice(start, start + together)
            masks, scores, boxes = self.image_processor.filter_masks(
                self.upscale(low[part, None], seen),
                predicted[part, None],
                (picture.height, picture.width),
                crop,
                pred_iou_thresh=0.0,
                stability_score_thresh=settings.stability_threshold,
                stability_score_offset=settings.stability_offset,  # pyright: ignore[reportArgumentType]
            )
            found.append((masks, scores.cpu(), boxes.cpu()))
        return found

    @property
    def _padded_pixels(self) -> int:
        return self.model.config.vision_config.image_size**2

    def upscale(self, low: Tensor, seen: SamImage) -> Tensor:
        """(P, M, h, w) logits of the decoder -> (P, M, H, W) logits of the image's pixels."""
        return self.image_processor.post_process_masks([low], [seen.size], [seen.fitted], binarize=False)[0]


@dataclass(frozen=True)
class SamImage:
    """An image that SAM has looked at.

    Attributes:
        size: (height, width) in pixels.
        fitted: (height, width) in pixels of the model's input.
        embeddings: (1, C, g, g), on the model's device.
    """

    size: tuple[int, int]
    fitted: tuple[int, int]
    embeddings: Tensor = field(repr=False)
    _sam: SamProposer = field(repr=False)

    def at_point(self, x: float, y: float) -> tuple[np.ndarray, float]:
        """The mask of what is at a point in pixels (one foreground click, one mask; spec section 8, mode "point").

        Returns:
            bool (H, W), which can be empty, and its predicted IoU, limited to [0, 1].

        Raises:
            InputError: the point is not in the image.
            CheckpointError: the model gives non-finite numbers.
        """
        height, width = self.size
        if not (0 <= x < width and 0 <= y < height):  # NaN, too
            raise InputError(f"the point ({x:g}, {y:g}) is not in the image, {width} wide and {height} high.")
        points = torch.tensor([[[[x, y]]]], dtype=torch.float32) * self._scale
        return self._segment(input_points=points, input_labels=torch.ones(1, 1, 1, dtype=torch.int64))

    def in_box(self, box: Any) -> tuple[np.ndarray, float]:
        """The mask of what is in a box xyxy in pixels (spec section 8, mode "box"); the rest as `at_point`."""
        corners = validate_boxes([box], self.size).reshape(1, 1, 2, 2)
        return self._segment(input_boxes=(corners * self._scale).reshape(1, 1, 4))

    @property
    def _scale(self) -> Tensor:
        """Pixels of the model's input per pixel of the image, x and y."""
        return torch.tensor([self.fitted[1] / self.size[1], self.fitted[0] / self.size[0]])

    @torch.inference_mode()
    def _segment(self, **prompts: Tensor) -> tuple[np.ndarray, float]:
        low, predicted = self._sam.predict(self, multimask=False, **prompts)
        mask = self._sam.upscale(low[0], self)[0, 0] > 0
        return mask.cpu().numpy(), float(predicted[0, 0, 0].clamp(0, 1))
