"""What a picture shows, in words for a detector to look for (MG-LLaVA spec 2.8): one small interface over everything
that names tags."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from foveate.checkpoints import find_checkpoint, fingerprint, read_config
from foveate.errors import CheckpointError, InputError
from foveate.language.words import check_words
from foveate.vision.proposals import check_fraction
from foveate.vision.ram_plus import RamPlus, load_ram_plus
from foveate.vision.zero_shot import ZeroShot

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Tagger(Protocol):
    """Names what pictures show."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the tags depend on besides the pictures, as JSON has it."""
        ...

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """Of each picture (upright RGB): tag -> score from 0 to 1, in the tagger's order."""
        ...


class VocabularyTagger:
    """The same words for every picture: a user's list, or COCO's 80 as in the paper's ablation."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = check_words(words, "the vocabulary")

    @property
    def settings(self) -> dict[str, Any]:
        return {"tagger": "vocabulary", "words": list(self.words)}

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        return [dict.fromkeys(self.words, 1.0) for _ in images]


class ClipTagger:
    """The words of a vocabulary that CLIP finds likeliest for a picture, best first.

    Args:
        zero_shot: the CLIP.
        vocabulary: the words to choose from.
        top_k: so many of the likeliest; None for all.
        threshold: least probability, of a softmax over the vocabulary.
    """

    def __init__(
        self, zero_shot: ZeroShot, vocabulary: Sequence[str], *, top_k: int | None = 10, threshold: float = 0.0
    ) -> None:
        self.vocabulary = check_words(vocabulary, "the vocabulary")
        if not self.vocabulary:
            raise InputError(
                "CLIP chooses tags from a vocabulary and none is given; give words, a file of them or coco."
            )
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise InputError(f"top_k must be a whole number of at least 1, not {top_k!r}.")
        check_fraction(threshold, "the threshold of the tags")
        self.zero_shot = zero_shot
        self.top_k, self.threshold = top_k, threshold

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "tagger": "clip",
            **self.zero_shot.settings,
            "words": list(self.vocabulary),
            "top_k": self.top_k,
            "threshold": self.threshold,
        }

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        tags = []
        for row in self.zero_shot(images, self.vocabulary):
            best = np.argsort(-row, kind="stable")[: self.top_k]
            tags.append({self.vocabulary[k]: float(row[k]) for k in best if row[k] >= self.threshold})
        return tags


class RamPlusTagger:
    """RAM++: the tags whose probability exceeds their own threshold, in the order of its list, in lower case.

    Args:
        model: is put into evaluation mode; stays on its device.
        tags, thresholds: one for each of its outputs.
        image_size: side of the square, in pixels, that a picture is resized to, whatever its shape.
        name: of the model, and what tells it from another of the same name.
    """

    def __init__(
        self,
        model: RamPlus,
        tags: Sequence[str],
        thresholds: Sequence[float],
        *,
        image_size: int = 384,
        name: Sequence[str] = (),
    ) -> None:
        if not len(tags) == len(thresholds) == model.tags:
            raise CheckpointError(
                f"RAM++ has {model.tags} outputs, {len(tags)} tags and {len(thresholds)} thresholds; they are of "
                "different models."
            )
        self.model = model.eval()
        self.tags, self.thresholds = tuple(tags), tuple(thresholds)
        self.image_size = image_size
        self.name = list(name)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, device: Any = None) -> RamPlusTagger:
        """Load a folder that `foveate convert ram_plus` wrote.

        Raises:
            InputError: there is no such folder, or it is of another kind.
            CheckpointError: it is damaged or incomplete.
        """
        folder = find_checkpoint(name)
        model, content = load_ram_plus(folder)
        return cls(
            model.to(device),
            content["tags"],
            content["thresholds"],
            image_size=content["image_size"],
            name=(folder.name, fingerprint(folder)),
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {"tagger": "ram_plus", "model": self.name}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        if not images:
            return []
        side = (self.image_size, self.image_size)
        pixels = np.stack([np.asarray(image.resize(side, Image.Resampling.BILINEAR)) for image in images])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
        mean, std = torch.tensor(_IMAGENET_MEAN)[:, None, None], torch.tensor(_IMAGENET_STD)[:, None, None]
        device = self.model.fc.weight.device
        logits = self.model(((values - mean) / std).to(device)).float()
        if not logits.isfinite().all():
            raise CheckpointError("RAM++ gives non-finite numbers; copy its checkpoint again.")
        scores = logits.sigmoid().cpu()
        above = scores > torch.tensor(self.thresholds)
        return [
            {self.tags[k].lower(): float(row[k]) for k in shown.nonzero().flatten().tolist()}
            for row, shown in zip(scores, above, strict=True)
        ]


class DescriberTagger:
    """The tags that a describer of regions (DynRefer's tag head) finds likely in a picture.

    Args:
        describe: `describe(images, tasks=["tags"])` gives for each image its regions, each with `tags` (the likely
            ones) and `tag_scores`; with `everything=True` of proposed regions, otherwise of the whole picture.
        everything: ask about proposed regions, too; a tag's score is its highest.
        settings: what tells this describer from others.
    """

    def __init__(
        self, describe: Callable[..., Any], *, everything: bool = True, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.describe = describe
        self.everything = everything
        self._settings = dict(settings or {})

    @property
    def settings(self) -> dict[str, Any]:
        return {"tagger": "describer", **self._settings, "everything": self.everything}

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        asked = [{}, {"everything": True}] if self.everything else [{}]
        found: list[dict[str, float]] = [{} for _ in images]
        for options in asked if images else ():
            for own, regions in zip(found, self.describe(list(images), tasks=["tags"], **options), strict=True):
                for region in regions:
                    for tag in region.tags:
                        own[tag] = max(own.get(tag, 0.0), region.tag_scores[tag])
        return [dict(sorted(own.items(), key=lambda item: -item[1])) for own in found]


def load_tagger(
    name: str | os.PathLike[str] | None,
    *,
    vocabulary: Sequence[str] | None = None,
    default_vocabulary: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> Tagger | None:
    """The tagger behind a name.

    Args:
        name: a shipped model, a folder or a repository of the Hugging Face hub. Its `config.json` decides which: a CLIP
            such as "openai/clip-vit-large-patch14", a RAM++ that was converted, or a DynRefer. None for the same words
            for all pictures.
        vocabulary: what CLIP chooses from, or the same words for all pictures; the others have lists of their own.
        default_vocabulary: what CLIP chooses from where there is no other.
        device: for the model; CPU by default.
    Returns:
        None where neither a name nor words are given.

    Raises:
        InputError: there is no such model, it is of another kind, or a vocabulary is missing or one too many.
        CheckpointError: it is damaged or incomplete.
    """
    if name is None:
        return None if vocabulary is None else VocabularyTagger(vocabulary)
    folder = find_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    if model_type == "clip":
        words = default_vocabulary if vocabulary is None else vocabulary
        return ClipTagger(ZeroShot.from_pretrained(folder, device=device), words)
    if vocabulary is not None:
        raise InputError(f"{os.fspath(name)} names tags of its own list; leave the vocabulary out, or give a CLIP.")
    if model_type == "foveate_ram_plus":
        return RamPlusTagger.from_pretrained(folder, device=device)
    from foveate.methods import METHODS, load

    if model_type == METHODS["dynrefer"].model_type:
        describer = load(folder, device="cpu" if device is None else device)
        settings = {"model": [folder.name, fingerprint(folder)]}
        return DescriberTagger(describer, everything=describer.model.config.proposer is not None, settings=settings)
    raise InputError(
        f"{os.fspath(name)} is a {model_type!r} model, which names no tags; give a CLIP, a RAM++ or a DynRefer."
    )
