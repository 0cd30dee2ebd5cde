"""Pictures, videos, boxes and conversations <-> tensors of MG-LLaVA (spec 2.2, 2.4, 3.3, 3.4)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_write
from foveate.language.lm import load_tokenizer
from foveate.language.templates import (
    IGNORED,
    ChatTemplate,
    encode_turns,
    find_template,
    render_conversation,
)
from foveate.ops.boxes import validate_boxes
from foveate.vision.images import ImageSource, load_image

from .boxes import CLOSE, PreparedBoxes, prepare_boxes, square_offset
from .configuration import MGLlavaConfig, is_number

PROCESSOR_FILE = "processor_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class BoxRecord:
    """Boxes of a picture in its own pixels, as a detector or a person gives them.

    Attributes:
        boxes: (K, 4) xyxy; they may reach beyond the picture.
        labels: K words; boxes of one label suppress each other where they overlap.
        scores: K numbers from 0 to 1.
    """

    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()

    @classmethod
    def parse(cls, value: Any, *, size: tuple[int, int] | None = None, limit: int | None = None) -> BoxRecord:
        """What a caller gives as boxes of a picture.

        Args:
            value: None for no boxes; (K, 4) xyxy pixels drawn by a person, each of which counts by itself; or a
                mapping with "boxes" and, where there are any, "scores" and "labels", as a box file has it.
            size: (width, height) of the picture, which drawn boxes must lie in.
            limit: most drawn boxes.

        Raises:
            InputError: it is none of these, or does not fit the picture.
        """
        if isinstance(value, BoxRecord):
            return value
        if value is None:
            return cls()
        if isinstance(value, Mapping):
            return cls._of_record(value, size)
        height_width = None if size is None else (size[1], size[0])
        boxes = validate_boxes(value, height_width).numpy().astype(np.float64)
        if limit is not None and len(boxes) > limit:
            raise InputError(
                f"{len(boxes)} boxes are given and at most {limit} are used; leave some out, or give a record with "
                "scores, of which the best stay."
            )
        # Drawn boxes are meant, every one: as many labels, so that none suppresses another.
        return cls(boxes, tuple(f"#{number}" for number in range(len(boxes))), (1.0,) * len(boxes))

    @classmethod
    def _of_record(cls, record: Mapping[str, Any], size: tuple[int, int] | None) -> BoxRecord:
        if "boxes" not in record:
            raise InputError(
                f'a box record needs "boxes", and may have "scores" and "labels"; this has {list(record)}.'
            )
        try:
            boxes = np.asarray(record["boxes"], dtype=np.float64).reshape(-1, 4)
            scores = tuple(float(score) for score in record.get("scores", [1.0] * len(boxes)))
        except (TypeError, ValueError):
            raise InputError(f"a box record must hold lists of numbers, not {record!r:.80}.") from None
        labels = record.get("labels", [f"#{number}" for number in range(len(boxes))])
        if not isinstance(labels, Sequence) or not all(isinstance(label, str) for label in labels):
            raise InputError(f"the labels of a box record must be a list of words, not {labels!r:.80}.")
        if not len(boxes) == len(labels) == len(scores):
            raise InputError(
                f"a box record has {len(boxes)} boxes, {len(labels)} labels and {len(scores)} scores; each box needs "
                "one of both."
            )
        if not np.isfinite(boxes).all() or not all(is_number(score, 0, 1) for score in scores):
            raise InputError("the boxes of a record must be finite numbers and its scores from 0 to 1.")
        if size is not None and len(boxes):
            beside = (boxes[:, 0] >= size[0]) | (boxes[:, 1] >= size[1]) | (boxes[:, 2] < 0) | (boxes[:, 3] < 0)
            if beside.any():
                box = boxes[beside][0].tolist()
                raise InputError(
                    f"the box {box} lies outside the picture of {size[0]}x{size[1]} pixels; the record is of another "
                    "image."
                )
        return cls(boxes, tuple(labels), scores)


@dataclass(frozen=True)
class Picture:
    """One picture, or one frame of a video, as the model takes it.

    Attributes:
        pixel_values: (3, s, s) float32.
        pixel_values_aux: (3, S, S) float32.
        boxes: (K, 4) float32 on the canvas, K >= 1.
        box_sources: index of each box among those given; none for the dummy.
    """

    pixel_values: Tensor
    pixel_values_aux: Tensor
    boxes: Tensor
    box_sources: tuple[int, ...]


class MGLlavaProcessor:
    """Turns pictures, boxes and conversations into what `MGLlavaModel` takes.

    Args:
        tokenizer: of the language model.
        config: of the model: sizes, box options, template, limits.
        image_mean, image_std: per channel, of pixel values in [0, 1].
    """

    def __init__(
        self,
        tokenizer: Any,
        config: MGLlavaConfig,
        *,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)

    @property
    def template(self) -> ChatTemplate:
        return find_template(self.config.template)

    # ---------------------------------------------------------------- pictures

    def picture(
        self, image: ImageSource, boxes: Any = None, *, text_length: int | None = None, pad: bool | None = None
    ) -> Picture:
        """One image with its boxes (spec 2.2, 2.4).

        Args:
            image: whatever `foveate.vision.images.load_image` takes.
            boxes: as `BoxRecord.parse` takes them.
            text_length: in training, the number of text tokens, which may leave room for few boxes.
            pad: pad to a square; as the configuration says by default.

        Raises:
            InputError: an image that cannot be read, or boxes that do not fit it.
        """
        picture = load_image(image)
        pad = self.config.pad_to_square if pad is None else pad
        aux = self.high_resolution(picture, pad)
        low = F.interpolate(aux[None], self.config.low_res_size, mode="bilinear", align_corners=False)[0]
        return self._with_boxes(picture, low, aux, boxes, text_length, pad)

    def _with_boxes(
        self, picture: Image.Image, low: Tensor, aux: Tensor, boxes: Any, text_length: int | None, pad: bool
    ) -> Picture:
        prepared = self.prepare_boxes(boxes, picture.size, text_length=text_length, pad=pad)
        return Picture(low, aux, torch.from_numpy(prepared.boxes), prepared.sources)

    def prepare_boxes(
        self, boxes: Any, size: tuple[int, int], *, text_length: int | None = None, pad: bool | None = None
    ) -> PreparedBoxes:
        """Boxes of a picture of (width, height) pixels on the canvas. Other arguments and errors as `picture`."""
        config = self.config
        record = BoxRecord.parse(boxes, size=size, limit=config.box_limit)
        return prepare_boxes(
            record.boxes,
            record.labels,
            record.scores,
            *size,
            canvas=config.box_canvas or config.high_res_size,
            pad_to_square=config.pad_to_square if pad is None else pad,
            iou=config.box_iou,
            limit=config.box_limit,
            mode=config.box_limit_mode,
            hard_cap=config.hard_cap,
            crowded=text_length is not None and text_length >= config.max_text_length - CLOSE,
        )

    def high_resolution(self, picture: Image.Image, pad: bool) -> Tensor:
        """(3, S, S) float32: padded to a square, the short side resized to S (PIL bicubic), the centre cropped."""
        size = self.config.high_res_size
        if pad and picture.width != picture.height:
            fill = tuple(int(mean * 255) for mean in self.image_mean)
            side = max(picture.size)
            square = Image.new("RGB", (side, side), fill)
            square.paste(picture, square_offset(*picture.size))
            picture = square
        short, long = sorted(picture.size)
        other = int(size * long / short)
        width, height = (size, other) if picture.width <= picture.height else (other, size)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return self._normalised(np.asarray(resized.crop((left, top, left + size, top + size))))

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> (3, H, W) float32."""
        values = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div_(255)
        mean, std = torch.tensor(self.image_mean)[:, None, None], torch.tensor(self.image_std)[:, None, None]
        return values.sub_(mean).div_(std).contiguous()

    def video(self, frames: Sequence[ImageSource], boxes: Sequence[Any] | None = None) -> list[Picture]:
        """Frames of a video, `num_frames` of them at even distances, each with its boxes (spec 3.4).

        Unlike a picture, a frame is not padded, and both its resolutions are resized from the frame itself.

        Args:
            frames: all of the video, or as many as are to be seen.
            boxes: for each frame that is seen, as `BoxRecord.parse` takes them.

        Raises:
            InputError: no frame, or not one entry of boxes for each frame that is seen.
        """
        if not frames:
            raise InputError("the video has no frame; give at least one.")
        chosen = [frames[index] for index in sample_frames(len(frames), self.config.num_frames)]
        if boxes is not None and len(boxes) != len(chosen):
            raise InputError(
                f"{len(boxes)} entries of boxes are given for the {len(chosen)} frames that are seen; each frame "
                "needs one, None or an empty list for no boxes."
            )
        pictures = []
        for number, source in enumerate(chosen):
            picture = load_image(source)
            values = self._normalised(np.asarray(picture))
            low, aux = (_short_side(values, side) for side in (self.config.low_res_size, self.config.high_res_size))
            own = None if boxes is None else boxes[number]
            pictures.append(self._with_boxes(picture, low, aux, own, None, pad=False))
        return pictures

    # ---------------------------------------------------------------- texts

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """A conversation in LLaVA's form -> ids and labels, cut at `max_text_length` (spec 3.3)."""
        ids, labels = encode_turns(render_conversation(messages, self.template), self.tokenizer)
        return ids[: self.config.max_text_length], labels[: self.config.max_text_length]

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples -> a batch for `MGLlavaModel.forward`, padded on the right.

        Args:
            samples: `input_ids`, `labels`, and `pictures`: a list with, for each placeholder in order, a list of
                `Picture` (one for an image, one a frame for a video).
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        padding = self.tokenizer.pad_token_id
        fill = {"input_ids": 0 if padding is None else padding, "labels": IGNORED}
        batch = {
            name: torch.tensor([[*sample[name], *[value] * (longest - len(sample[name]))] for sample in samples])
            for name, value in fill.items()
        }
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        groups = [group for sample in samples for group in sample.get("pictures", ())]
        pictures = [picture for group in groups for picture in group]
        if pictures:
            batch |= stack_pictures(pictures)
            batch["visual_counts"] = torch.tensor([len(group) for group in groups])
        return batch

    # ---------------------------------------------------------------- folders

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings and the tokenizer beside the model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "processor_class": type(self).__name__,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }
        with atomic_write(folder / PROCESSOR_FILE) as file:
            json.dump(settings, file, indent=1)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, config: MGLlavaConfig | None = None, **_: Any) -> MGLlavaProcessor:
        """Read what `save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        folder = Path(folder)
        path = folder / PROCESSOR_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            settings = {name: raw[name] for name in ("image_mean", "image_std")}
            for name, lowest in (("image_mean", -1e3), ("image_std", 1e-6)):
                three = isinstance(settings[name], list) and len(settings[name]) == 3
                if not three or not all(is_number(value, lowest, 1e3) for value in settings[name]):
                    raise ValueError(f"{name} must be three numbers, one per channel, not {settings[name]!r}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"cannot read {path}: {type(error).__name__} {error}") from error
        return cls(load_tokenizer(folder), config or MGLlavaConfig.from_pretrained(folder), **settings)


def stack_pictures(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """V pictures as `MGLlavaModel` takes them: pixel values, boxes (V, K, 4) padded with zeros, and their counts."""
    return {
        "pixel_values": torch.stack([picture.pixel_values for picture in pictures]),
        "pixel_values_aux": torch.stack([picture.pixel_values_aux for picture in pictures]),
        "boxes": torch.nn.utils.rnn.pad_sequence([picture.boxes for picture in pictures], batch_first=True),
        "box_counts": torch.tensor([len(picture.boxes) for picture in pictures]),
    }


def sample_frames(total: int, wanted: int) -> list[int]:
    """Indices of `wanted` frames at even distances, first and last included; frames of a short video repeat."""
    return np.linspace(0, total - 1, wanted).astype(int).tolist()


def _short_side(values: Tensor, side: int) -> Tensor:
    """(3, H, W) -> (3, side, side): the short side resized (bilinear, no antialiasing), the centre cropped."""
    height, width = values.shape[-2:]
    long = int(max(height, width) * side / min(height, width))
    size = (long, side) if width <= height else (side, long)
    resized = F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized[:, top : top + side, left : left + side].contiguous()
