"""Where the things that tags name are (MG-LLaVA spec 2.8): one small interface over everything that finds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from foveate.checkpoints import WEIGHTS, find_checkpoint, fingerprint, read_config
from foveate.data.samples import BoxSet
from foveate.errors import InputError
from foveate.vision.proposals import check_fraction
from foveate.vision.zero_shot import ZeroShot

THRESHOLD = 0.2
"""A box needs a score above it (spec 2.8)."""


class Detector(Protocol):
    """Finds what words name in pictures."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the boxes depend on besides pictures and tags, as JSON has it."""
        ...

    @property
    def names(self) -> Sequence[str] | None:
        """All that it can find; None where it finds whatever is said."""
        ...

    def __call__(self, images: Sequence[Image.Image], tags: Sequence[Sequence[str]]) -> list[BoxSet]:
        """Of each picture (upright RGB) the boxes, xyxy in whole pixels, of what its tags name."""
        ...


class ProposalDetector:
    """Proposed boxes, each with the tag that fits best what is in it. A box's score is that of the proposal times the
    probability of its tag, and has to exceed the threshold.

    A proposer with classes finds these only: other tags ("red", "left") are passed over, and the probability of a tag
    is among all classes, so that a thing that no tag names does not become the tag that is least wrong. Without classes
    it is among the picture's tags.

    Args:
        propose: gives for pictures their boxes (R, 4), scores (R,) and, where it has classes, the probabilities (R, K)
            of these.
        classes: K names.
        zero_shot: a CLIP that looks at the crops and decides in the place of the proposer's own classes.
        threshold: a box needs a score above it.
        settings: what tells this proposer from others.

    Raises:
        InputError: neither classes nor a CLIP, or the threshold is out of range.
    """

    def __init__(
        self,
        propose: Callable[[Sequence[Image.Image]], Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]],
        *,
        classes: Sequence[str] = (),
        zero_shot: ZeroShot | None = None,
        threshold: float = THRESHOLD,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_fraction(threshold, "threshold")
        if zero_shot is None and not classes:
            raise InputError("this proposer has no names for what it finds; give a CLIP that labels its boxes.")
        self.propose = propose
        self.classes = tuple(classes)
        self.zero_shot = zero_shot
        self.threshold = threshold
        self._settings = dict(settings or {})

    @property
    def names(self) -> tuple[str, ...] | None:
        return self.classes or None

    @property
    def settings(self) -> dict[str, Any]:
        labels = None if self.zero_shot is None else self.zero_shot.settings
        return {"detector": "proposals", **self._settings, "labels": labels, "threshold": self.threshold}

    def __call__(self, images: Sequence[Image.Image], tags: Sequence[Sequence[str]]) -> list[BoxSet]:
        return [
            self._named(image, own, *found) if own else BoxSet((), (), ())
            for image, own, found in zip(images, tags, self.propose(images), strict=True)
        ]

    def _named(
        self,
        image: Image.Image,
        tags: Sequence[str],
        boxes: np.ndarray,
        scores: np.ndarray,
        class_scores: np.ndarray | None,
    ) -> BoxSet:
        known = list(self.classes or dict.fromkeys(tags))
        wanted = [known.index(tag) for tag in dict.fromkeys(tags) if tag in known]
        if not wanted or not len(boxes):
            return BoxSet((), (), ())
        if self.zero_shot is not None:
            class_scores = self.zero_shot([_crop(image, box) for box in boxes.tolist()], known)
        assert class_scores is not None
        fits = class_scores[:, wanted]
        best = fits.argmax(1)
        total = scores * fits.max(1)
        kept = np.flatnonzero(total > self.threshold)
        return BoxSet(
            tuple(tuple(box) for box in np.trunc(boxes[kept]).astype(np.int64).tolist()),
            tuple(total[kept].tolist()),
            tuple(known[wanted[k]] for k in best[kept].tolist()),
        )


def _crop(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """What is in a box, at least one pixel of it."""
    left, top = (min(int(low), size - 1) for low, size in zip(box[:2], image.size, strict=True))
    right, bottom = (max(round(high), low + 1) for high, low in zip(box[2:], (left, top), strict=True))
    return image.crop((left, top, min(right, image.width), min(bottom, image.height)))


def load_detector(
    name: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    threshold: float = THRESHOLD,
    pad_value: int | None = None,
    legacy_empty_query: bool = False,
    device: str | torch.device | None = None,
) -> Detector:
    """The detector behind a name.

    Args:
        name: a shipped model, a folder or a repository of the Hugging Face hub. Its `config.json` decides which: an
            OWLv2 such as "google/owlv2-large-patch14-ensemble", "proposer-world", or a SAM whose boxes a CLIP labels.
        labels: the CLIP that labels proposed boxes; those of "proposer-world" by default "clip-world", which tells its
            words apart better than the proposer itself.
        threshold: a box needs a score above it.
        pad_value, legacy_empty_query: of OWLv2, see `foveate.vision.owlv2.Owlv2Detector`; grey by default.
        device: for the models; CPU by default.

    Raises:
        InputError: there is no such model, it is of another kind, or an option does not suit it.
        CheckpointError: it is damaged or incomplete.
    """
    folder = find_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    if model_type == "owlv2":
        from foveate.vision.owlv2 import PAD_VALUE, Owlv2Detector

        if labels is not None:
            raise InputError(f"{os.fspath(name)} labels its boxes itself; leave the CLIP for labels out.")
        return Owlv2Detector.from_pretrained(
            folder,
            device=device,
            threshold=threshold,
            pad_value=PAD_VALUE if pad_value is None else pad_value,
            legacy_empty_query=legacy_empty_query,
        )
    if pad_value is not None or legacy_empty_query:
        raise InputError(f"pad_value and legacy_empty_query are of OWLv2, and {os.fspath(name)} is a {model_type!r}.")
    settings = {"model": [folder.name, fingerprint(folder)]}
    if model_type == "foveate_proposer":
        from foveate.vision.proposer import RegionProposer

        proposer = RegionProposer.from_pretrained(folder, device=device)
        if labels is None and folder.parent == WEIGHTS:
            labels = "clip-world"
        return ProposalDetector(
            lambda images: [(own.boxes, own.scores, own.class_scores) for own in proposer.propose(list(images))],
            classes=proposer.model.config.class_names,
            zero_shot=None if labels is None else ZeroShot.from_pretrained(labels, device=device),
            threshold=threshold,
            settings=settings,
        )
    if model_type == "sam":
        from foveate.vision.sam import SamProposer

        if labels is None:
            raise InputError(f"{os.fspath(name)} is a SAM, which names nothing; give a CLIP that labels its boxes.")
        sam = SamProposer.from_pretrained(folder, device=device)
        return ProposalDetector(
            lambda images: [(*sam(image)[:2], None) for image in images],
            zero_shot=ZeroShot.from_pretrained(labels, device=device),
            threshold=threshold,
            settings=settings,
        )
    raise InputError(
        f"{os.fspath(name)} is a {model_type!r} model, which finds no boxes of tags; give an OWLv2 checkpoint, "
        "proposer-world or a SAM."
    )
