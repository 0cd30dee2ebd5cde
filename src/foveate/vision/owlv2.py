"""Regions that answer to words: transformers' OWLv2 as a proposer (Minderer et al., NeurIPS 2023, arXiv 2306.09683)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlv2.modeling_owlv2 import Owlv2ForObjectDetection, Owlv2ObjectDetectionOutput

from foveate.checkpoints import find_checkpoint, read_config
from foveate.errors import CheckpointError, InputError
from foveate.language.lm import load_tokenizer
from foveate.language.pretrained import first_line, load_complete
from foveate.language.words import check_words
from foveate.ops.boxes import batched_nms, clip_boxes
from foveate.vision.images import ImageSource, load_image
from foveate.vision.proposals import check_fraction

MAX_WORDS = 5_000
"""Most words at once: DynRefer's whole tag list has 4,585, and the scores of all boxes for more would fill memory."""

_TEXTS_TOGETHER = 256


class Owlv2Proposer:
    """Finds what words name. Thread-safe to call. The words are encoded once, here.

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
        template: str = "a photo of {}",
    ) -> None:
        self.words = check_words(words, "the words for OWLv2")
        if not self.words:
            raise InputError("OWLv2 looks for words and none is given; name what to find, such as person, car, sign.")
        if len(self.words) > MAX_WORDS:
            raise InputError(f"{len(self.words)} words for OWLv2 are more than the {MAX_WORDS} allowed; give fewer.")
        check_fraction(threshold, "threshold")
        check_fraction(nms_threshold, "nms_threshold")
        self.model: Any = model.eval()  # transformers annotates some of its results as what they are not
        self.image_processor = image_processor
        self.threshold, self.nms_threshold = threshold, nms_threshold
        self._queries = self._encode([template.format(word) for word in self.words], tokenizer)

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
        folder = find_checkpoint(name)
        model_type = read_config(folder).get("model_type")
        if model_type != "owlv2":
            raise InputError(f"{os.fspath(name)} is a {model_type!r} model, not an OWLv2.")
        model = load_complete(Owlv2ForObjectDetection, str(folder), dtype=torch.float32)
        try:
            image_processor = Owlv2ImageProcessorPil.from_pretrained(folder)
        except Exception as error:  # transformers raises many types on a missing or damaged file
            raise CheckpointError(f"the image processor of {folder} cannot be loaded: {first_line(error)}") from None
        return cls(model.to(device), load_tokenizer(folder), image_processor, words, **options)

    @torch.inference_mode()
    def _encode(self, texts: list[str], tokenizer: Any) -> Tensor:
        """(Q, D) text features."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = [tokenizer(text)["input_ids"] for text in texts]
        for word, ids in zip(self.words, tokens, strict=True):
            if len(ids) > limit:
                raise InputError(
                    f"the word {word!r} for OWLv2 has {len(ids)} tokens, more than the {limit} it reads; shorten it."
                )
        features = []
        for start in range(0, len(texts), _TEXTS_TOGETHER):
            batch = tokenizer.pad(
                {"input_ids": tokens[start : start + _TEXTS_TOGETHER]},
                padding="max_length",
                max_length=limit,
                return_tensors="pt",
            ).to(self.model.device)
            features.append(self.model.owlv2.get_text_features(**batch).pooler_output)
        encoded = torch.cat(features)
        return encoded / torch.linalg.norm(encoded, dim=-1, keepdim=True)

    @torch.inference_mode()
    def __call__(self, image: ImageSource) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (R, 4) float32 xyxy pixels inside the image, and their scores (R,), highest first.

        Raises:
            InputError: the image is none.
            CheckpointError: the model gives non-finite numbers.
        """
        picture = load_image(image)
        pixels = self.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        feature_map, _ = self.model.image_embedder(pixels.to(self.model.device, self.model.dtype))
        features = feature_map.flatten(1, 2)
        logits, _ = self.model.class_predictor(features, self._queries[None])
        boxes = self.model.box_predictor(features, feature_map)
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise CheckpointError("OWLv2 gives non-finite numbers; copy its checkpoint again.")
        size = (picture.height, picture.width)
        found = self.image_processor.post_process_object_detection(
            Owlv2ObjectDetectionOutput(logits=logits.float(), pred_boxes=boxes.float()),
            threshold=self.threshold,
            target_sizes=[size],
        )[0]
        # The image lies in the upper left of a square; what overhangs it or lies beside it has nothing to show.
        inside = clip_boxes(found["boxes"], size)
        real = ((inside[:, 2:] - inside[:, :2]) >= 1).all(-1)
        inside, scores = inside[real], found["scores"][real]
        kept = batched_nms(inside, scores, torch.zeros_like(scores), self.nms_threshold)
        return inside[kept].cpu().numpy(), scores[kept].cpu().numpy()
