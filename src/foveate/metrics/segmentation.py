"""Scores of semantic segmentation, accumulated over a set of label maps (spec vision_gru, 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import InputError
from foveate.metrics._checks import positive_int

IGNORE = 255
"""Label of pixels that count nothing, as ADE20K's readers have it."""


@dataclass(frozen=True, slots=True)
class SegmentationResult:
    """Attributes:
    mean_iou: mean over the classes that occur, in truth or prediction, of intersection / union.
    mean_accuracy: mean over the classes that occur in truth of the share of their pixels that are right.
    pixel_accuracy: share of all counted pixels that are right.
    iou: (K,) per class; NaN where a class never occurs.
    """

    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: np.ndarray


class SegmentationScore:
    """Counts of (true, predicted) pairs of classes, added image by image; the score is that of all pixels together.

    Args:
        classes: K; labels are 0 .. K - 1, and `IGNORE` in the truth.
    """

    def __init__(self, classes: int) -> None:
        self.classes = positive_int(classes, "classes")
        if self.classes > IGNORE:
            raise InputError(f"there may be at most {IGNORE} classes, not {classes}: {IGNORE} marks ignored pixels.")
        self.counts = np.zeros((self.classes, self.classes), np.int64)

    def add(self, truth: Any, prediction: Any) -> None:
        """Adds one image.

        Args:
            truth: (H, W) labels.
            prediction: (H, W) labels; what it says of ignored pixels counts nothing.

        Raises:
            InputError: other shapes, or a label that is none of the classes.
        """
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        if truth.shape != prediction.shape or truth.dtype.kind not in "iu" or prediction.dtype.kind not in "iu":
            raise InputError(
                f"truth and prediction must be integer maps of one shape, not {truth.shape} {truth.dtype} and "
                f"{prediction.shape} {prediction.dtype}."
            )
        counted = truth != IGNORE
        true, found = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
        for name, labels in (("truth", true), ("prediction", found)):
            if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
                wrong = labels.max() if labels.max() >= self.classes else labels.min()
                raise InputError(f"{name} has the label {wrong}, but there are {self.classes} classes from 0 on.")
        pairs = np.bincount(true * self.classes + found, minlength=self.classes**2)
        self.counts += pairs.reshape(self.classes, self.classes)

    def result(self) -> SegmentationResult:
        """Raises:
        InputError: no pixel was counted.
        """
        total = self.counts.sum()
        if not total:
            raise InputError("no pixel was counted; give images whose truth is not all ignored.")
        right, true, found = np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)
        union = true + found - right
        with np.errstate(invalid="ignore"):
            iou, accuracy = right / union, right / true
        return SegmentationResult(float(np.nanmean(iou)), float(np.nanmean(accuracy)), float(right.sum() / total), iou)
