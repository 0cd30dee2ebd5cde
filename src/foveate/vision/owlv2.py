"""Regions that answer to words: transformers' OWLv2, as a detector of the tags of each picture and as a proposer of
fixed words (Minderer et al., NeurIPS 2023, arXiv 2306.09683)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlv2.modeling_owlv2 import Owlv2ForObjectDetection, Owlv2ObjectDetectionOutput

from foveate.checkpoints import find_checkpoint, fingerprint, read_config
from foveate.data.samples import BoxSet
from foveate.errors import CheckpointError, InputError
from foveate.language.lm import load_tokenizer
from foveate.language.pretrained import first_line, load_complete
from foveate.language.words import check_words
from foveate.ops.boxes import batched_nms, clip_boxes
from foveate.vision.images import ImageSource, load_image
from foveate.vision.proposals import check_fraction

MAX_WORDS = 5_000
"""Most words at once: DynRefer's whole tag list has 4,585, and the scores of all boxes for more would fill memory."""
TEMPLATE = "a photo of {}"
PAD_VALUE = 128
"""Grey that the published boxes of MG-LLaVA were found with; transformers pads with black (spec 2.8)."""

_TEXTS_TOGETHER = 256
_LARGEST_INT = 2**53


class Owlv2Detector:
    """Finds what the tags of each picture name, as MG-LLaVA's boxes were found (spec 2.8). Thread-safe to call.

    Queries are "a photo of " and a tag, all tags of a picture at once. A candidate box goes to its best query and
    counts if its score is above the threshold. Boxes overhang the picture where the model says so, are cut to
    whole numbers towards zero, and are not thinned out: who reads them does that.

    Args:
        model: is put into evaluation mode; stays on its device.
        tokenizer, image_processor: saved beside it.
        threshold: a box needs a score above it.
        pad_value: what is around a picture on its square, 0 to 255; None for what the image processor does.
        legacy_empty_query: ask a picture without tags for "a photo of ", as the official code does; otherwise it has no
            boxes.
        template: what is said to the text encoder of each tag.
        name: of the model, and what tells it from another of the same name.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self,
        model: Owlv2ForObjectDetection,
        tokenizer: Any,
        image_processor: Owlv2ImageProcessorPil,
        *,
        threshold: float = 0.2,
        pad_value: int | None = PAD_VALUE,
        legacy_empty_query: bool = False,
        template: str = TEMPLATE,
        name: Sequence[str] = (),
    ) -> None:
        check_fraction(threshold, "threshold")
        whole = isinstance(pad_value, int) and not isinstance(pad_value, bool)
        if pad_value is not None and not (whole and 0 <= pad_value <= 255):
            raise InputError(f"pad_value must be a whole number from 0 to 255 or None, not {pad_value!r}.")
        self.model: Any = model.eval()  # transformers annotates some of its results as what they are not
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.threshold = threshold
        self.pad_value = pad_value
        self.legacy_empty_query = legacy_empty_query
        self.template = template
        self.name = list(name)
        self._known: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, device: str | torch.device | None = None, **options: Any
    ) -> Owlv2Detector:
        """Load a folder or a repository such as "google/owlv2-large-patch14-ensemble", in float32.

        Args:
            device: CPU by default.
            options: as the class takes them.

        Raises:
            InputError: there is no such model, it is of another kind, or as the class.
            CheckpointError: it is damaged or incomplete.
        """
        folder = find_checkpoint(name)
        parts = _load(folder, os.fspath(name), device)
        return cls(*parts, name=(folder.name, fingerprint(folder)), **options)

    @property
    def names(self) -> None:
        """It finds whatever is said."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """All that its boxes depend on besides pictures and tags."""
        return {
            "detector": "owlv2",
            "model": self.name,
            "threshold": self.threshold,
            "pad_value": self.pad_value,
            "legacy_empty_query": self.legacy_empty_query,
            "template": self.template,
        }

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], tags: Sequence[Sequence[str]]) -> list[BoxSet]:
        """The boxes of each picture (upright RGB) that its tags name, in the order of the model's candidates.

        Raises:
            InputError: a tag is longer than the model reads, or there are more than 5,000.
            CheckpointError: the model gives non-finite numbers.
        """
        none: list[str] = [""] if self.legacy_empty_query else []
        asked = [list(own) or none for own in tags]
        queries = [self.encode(own) if own else None for own in asked]
        wanted = [k for k, own in enumerate(queries) if own is not None]
        found = [BoxSet((), (), ())] * len(asked)
        if not wanted:
            return found
        features, maps = self._look([images[k] for k in wanted])
        for row, k in enumerate(wanted):
            own = queries[k]
            assert own is not None
            boxes, scores, labels = self._answer(features[row : row + 1], maps[row : row + 1], own, images[k])
            whole = boxes.clamp(-_LARGEST_INT, _LARGEST_INT).trunc().to(torch.int64).tolist()
            names = tuple(asked[k][label] for label in labels.tolist())
            found[k] = BoxSet(tuple(tuple(box) for box in whole), tuple(scores.tolist()), names)
        return found

    def encode(self, words: Sequence[str]) -> Tensor:
        """(Q, D) normalised text features; those of a word are computed once.

        Raises:
            InputError: a word is longer than the model reads, or there are more than 5,000.
        """
        if len(words) > MAX_WORDS:
            raise InputError(f"{len(words)} words for OWLv2 are more than the {MAX_WORDS} allowed; give fewer.")
        with self._lock:
            new = [word for word in dict.fromkeys(words) if word not in self._known]
            for start in range(0, len(new), _TEXTS_TOGETHER):
                part = new[start : start + _TEXTS_TOGETHER]
                self._known |= dict(zip(part, self._encode(part), strict=True))
            return torch.stack([self._known[word] for word in words])

    @torch.inference_mode()
    def _encode(self, words: Sequence[str]) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = [self.tokenizer(self.template.format(word))["input_ids"] for word in words]
        for word, ids in zip(words, tokens, strict=True):
            if len(ids) > limit:
                raise InputError(
                    f"the word {word!r} for OWLv2 has {len(ids)} tokens, more than the {limit} it reads; shorten it."
                )
        batch = self.tokenizer.pad(
            {"input_ids": tokens}, padding="max_length", max_length=limit, return_tensors="pt"
        ).to(self.model.device)
        encoded = self.model.owlv2.get_text_features(**batch).pooler_output
        return encoded / torch.linalg.norm(encoded, dim=-1, keepdim=True)

    def _look(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """(B, P, C) features of the candidates and the (B, g, g, C) map that they are of."""
        squares = [self._square(image) for image in images]
        pixels = self.image_processor(images=squares, return_tensors="pt")["pixel_values"]
        feature_map, _ = self.model.image_embedder(pixels.to(self.model.device, self.model.dtype))
        return feature_map.flatten(1, 2), feature_map

    def _square(self, image: Image.Image) -> Image.Image:
        if self.pad_value is None or image.width == image.height:
            return image
        side = max(image.size)
        square = Image.new("RGB", (side, side), (self.pad_value, self.pad_value, self.pad_value))
        square.paste(image, (0, 0))
        return square

    def _answer(
        self, features: Tensor, feature_map: Tensor, queries: Tensor, image: Image.Image
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (R, 4) in pixels of the picture, scores (R,) and queries (R,) of the candidates above the threshold."""
        logits, _ = self.model.class_predictor(features, queries[None])
        boxes = self.model.box_predictor(features, feature_map)
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise CheckpointError("OWLv2 gives non-finite numbers; copy its checkpoint again.")
        found = self.image_processor.post_process_object_detection(
            Owlv2ObjectDetectionOutput(logits=logits.float(), pred_boxes=boxes.float()),
            threshold=self.threshold,
            target_sizes=[(image.height, image.width)],
        )[0]
        return found["boxes"], found["scores"], found["labels"]


class Owlv2Proposer:
    """Finds what words name, anywhere. Thread-safe to call. The words are encoded once, here.

    Args:
        model: is put into evaluation mode; stays on its device.
        tokenizer, image_processor: saved beside it.
        words: what to look for; the score of a box is that of its best word.
        threshold: a proposal needs a score above it.
        nms_threshold: of two proposals that overlap by a larger IoU, whatever their words, the better one stays.
        template: what is said to the text encoder of each word.

    Raises:
        InputError: no word, more than 5,000, one that is longer than the model reads, or an option out of range.
    """

    def __init__(
        self,
        model: Owlv2ForObjectDetection,
        tokenizer: Any,
        image_processor: Owlv2ImageProcessorPil,
        words: Sequence[str],
        *,
        threshold: float = 0.1,
        nms_threshold: float = 0.5,
        template: str = TEMPLATE,
    ) -> None:
        self.words = check_words(words, "the words for OWLv2")
        if not self.words:
            raise InputError("OWLv2 looks for words and none is given; name what to find, such as person, car, sign.")
        check_fraction(nms_threshold, "nms_threshold")
        self.nms_threshold = nms_threshold
        self._detector = Owlv2Detector(
            model, tokenizer, image_processor, threshold=threshold, pad_value=None, template=template
        )
        self._queries = self._detector.encode(self.words)

    @property
    def model(self) -> Any:
        """The network."""
        return self._detector.model

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        words: Sequence[str],
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Owlv2Proposer:
        """Load a folder or a repository such as "google/owlv2-base-patch16-ensemble", in float32.

        Args:
            words: what to look for.
            device: CPU by default.
            options: as the class takes them.

        Raises:
            InputError: there is no such model, it is of another kind, or as the class.
            CheckpointError: it is damaged or incomplete.
        """
        return cls(*_load(find_checkpoint(name), os.fspath(name), device), words, **options)

    @torch.inference_mode()
    def __call__(self, image: ImageSource) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (R, 4) float32 xyxy pixels inside the image, and their scores (R,), highest first.

        Raises:
            InputError: the image is none.
            CheckpointError: the model gives non-finite numbers.
        """
        picture = load_image(image)
        boxes, scores, _ = self._detector._answer(*self._detector._look([picture]), self._queries, picture)
        # The image lies in the upper left of a square; what overhangs it or lies beside it has nothing to show.
        inside = clip_boxes(boxes, (picture.height, picture.width))
        real = ((inside[:, 2:] - inside[:, :2]) >= 1).all(-1)
        inside, scores = inside[real], scores[real]
        kept = batched_nms(inside, scores, torch.zeros_like(scores), self.nms_threshold)
        return inside[kept].cpu().numpy(), scores[kept].cpu().numpy()


def _load(folder: Path, name: str, device: str | torch.device | None) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of a folder."""
    model_type = read_config(folder).get("model_type")
    if model_type != "owlv2":
        raise InputError(f"{name} is a {model_type!r} model, not an OWLv2.")
    model = load_complete(Owlv2ForObjectDetection, str(folder), dtype=torch.float32)
    try:
        image_processor = Owlv2ImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # transformers raises many types on a missing or damaged file
        raise CheckpointError(f"the image processor of {folder} cannot be loaded: {first_line(error)}") from None
    return model.to(device), load_tokenizer(folder), image_processor
