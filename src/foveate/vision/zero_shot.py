"""CLIP without training: which of some words fits a picture (Radford et al., ICML 2021, arXiv 2103.00020)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel

from foveate.checkpoints import find_checkpoint, fingerprint, read_config
from foveate.errors import CheckpointError, InputError
from foveate.language.lm import check_tokenizer, load_tokenizer
from foveate.language.pretrained import first_line, load_complete
from foveate.language.words import check_words

TEMPLATE = "a photo of {}"
_TOGETHER = 256


class ZeroShot:
    """Probabilities of words for pictures. Thread-safe to call; each word is encoded once.

    Args:
        model: is put into evaluation mode; stays on its device.
        tokenizer, image_processor: saved beside it.
        template: what is said to the text encoder of each word.
        name: of the model, and what tells it from another of the same name.
    """

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, *, template: str = TEMPLATE, name: Sequence[str] = ()
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = template
        self.name = list(name)
        self._known: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        template: str = TEMPLATE,
    ) -> ZeroShot:
        """Load clip-world, a folder, or a repository such as "openai/clip-vit-large-patch14", in float32.

        Args:
            device: CPU by default.

        Raises:
            InputError: there is no such model, or it is of another kind.
            CheckpointError: it is damaged or incomplete.
        """
        folder = find_checkpoint(name)
        model_type = read_config(folder).get("model_type")
        if model_type != "clip":
            raise InputError(f"{os.fspath(name)} is a {model_type!r} model, not a CLIP.")
        model = load_complete(CLIPModel, str(folder), dtype=torch.float32)
        try:
            image_processor = CLIPImageProcessorPil.from_pretrained(folder)
        except Exception as error:  # transformers raises many types on a missing or damaged file
            raise CheckpointError(f"the image processor of {folder} cannot be loaded: {first_line(error)}") from None
        tokenizer = load_tokenizer(folder)
        check_tokenizer(tokenizer, model.config.text_config.vocab_size, f"the tokenizer of {folder}")
        return cls(
            model.to(device), tokenizer, image_processor, template=template, name=(folder.name, fingerprint(folder))
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What its probabilities depend on."""
        return {"clip": self.name, "template": self.template}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], words: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """(N, T) float32: of each picture, the softmax over the words of CLIP's logits.

        Raises:
            InputError: no word, or one that is longer than the model reads.
            CheckpointError: the model gives non-finite numbers.
        """
        texts = self._encode(check_words(words, "the words for CLIP"))
        rows = [np.zeros((0, len(words)), dtype=np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = self.image_processor(images=list(images[start : start + batch_size]), return_tensors="pt")
            pixels = pixels["pixel_values"].to(self.model.device, self.model.dtype)
            seen = F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
            logits = self.model.logit_scale.exp() * seen @ texts.T
            if not logits.isfinite().all():
                raise CheckpointError("CLIP gives non-finite numbers; copy its checkpoint again.")
            rows.append(logits.float().softmax(-1).cpu().numpy())
        return np.concatenate(rows)

    def _encode(self, words: tuple[str, ...]) -> Tensor:
        """(T, D) normalised text features."""
        if not words:
            raise InputError(
                "CLIP chooses among words and none is given; give a vocabulary, such as person, car, sign."
            )
        with self._lock:
            new = [word for word in dict.fromkeys(words) if word not in self._known]
            limit = self.model.config.text_config.max_position_embeddings
            for start in range(0, len(new), _TOGETHER):
                part = new[start : start + _TOGETHER]
                ids = self.tokenizer([self.template.format(word) for word in part], padding=True, return_tensors="pt")
                lengths = ids["attention_mask"].sum(1).tolist()
                for word, length in zip(part, lengths, strict=True):
                    if length > limit:
                        raise InputError(
                            f"the word {word!r} for CLIP has {length} tokens, more than the {limit} it reads; "
                            "shorten it."
                        )
                features = self.model.get_text_features(
                    input_ids=ids["input_ids"].to(self.model.device),
                    attention_mask=ids["attention_mask"].to(self.model.device),
                ).pooler_output
                self._known |= dict(zip(part, F.normalize(features, dim=-1), strict=True))
            return torch.stack([self._known[word] for word in words])
