"""Classification metrics: top-k accuracy, per-class breakdown, average precision, and the OVAD attribute benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import InputError
from foveate.metrics._checks import float_array, int_array, labels_in, positive_int

IGNORE = -1


def top_k_accuracy(logits: Any, labels: Any, k: int = 1) -> float:
    """Share of samples whose class is among the k highest-scoring ones, 0 to 1.

    Ties go to the lower class index, as with argmax, so that a constant predictor gains nothing.

    Args:
        logits: `(N, K)` scores of any scale.
        labels: `(N,)` class indices.
        k: 1 to K.

    Raises:
        InputError: shapes disagree, N is 0, a label is outside [0, K), k is outside [1, K], or a score is not finite.
    """
    logits, labels = _logits_and_labels(logits, labels)
    k = positive_int(k, "k")
    if k > logits.shape[1]:
        raise InputError(f"k is {k} but there are only {logits.shape[1]} classes; give a smaller k.")
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    rank = (logits > own).sum(axis=1) + ((logits == own) & earlier).sum(axis=1)
    return float((rank < k).mean())


@dataclass(frozen=True, slots=True)
class ClassBreakdown:
    """Top-1 results by class.

    Attributes:
        accuracy: over all samples, 0 to 1.
        mean_class_accuracy: mean of `per_class` over classes that occur.
        per_class: `(K,)` recall of each class, NaN where `support` is 0.
        precision: `(K,)` share of the predictions of a class that are right, NaN where it was never predicted.
        support: `(K,)` samples of each class.
        confusion: `(K, K)` counts, rows = true class, columns = predicted class.
    """

    accuracy: float
    mean_class_accuracy: float
    per_class: np.ndarray
    precision: np.ndarray
    support: np.ndarray
    confusion: np.ndarray


def class_breakdown(logits: Any, labels: Any) -> ClassBreakdown:
    """Accuracy, recall and precision by class, and the confusion matrix, from argmax predictions (first on ties).

    Args:
        logits: `(N, K)` scores.
        labels: `(N,)` class indices.

    Raises:
        InputError: as `top_k_accuracy`.
    """
    logits, labels = _logits_and_labels(logits, labels)
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    hits = np.diag(confusion)
    support = confusion.sum(axis=1)
    predictions = confusion.sum(axis=0)
    per_class = np.where(support > 0, hits / np.maximum(support, 1), np.nan)
    precision = np.where(predictions > 0, hits / np.maximum(predictions, 1), np.nan)
    return ClassBreakdown(
        accuracy=float(hits.sum() / len(labels)),
        mean_class_accuracy=float(np.nanmean(per_class)),
        per_class=per_class,
        precision=precision,
        support=support,
        confusion=confusion,
    )


def average_precision(scores: Any, labels: Any) -> float:
    """Average precision of one class: sum over thresholds of (R_n - R_{n-1}) * P_n, without interpolation.

    Equal to `sklearn.metrics.average_precision_score` (tied scores form one threshold) over the samples not ignored.

    Args:
        scores: `(N,)` scores of any scale.
        labels: `(N,)` 1 = positive, 0 = negative, -1 = ignored.

    Returns:
        0 to 1; NaN if there is no positive.

    Raises:
        InputError: shapes disagree, a label is not -1, 0 or 1, or a score is not finite.
    """
    scores = float_array(scores, "scores", (None,))
    labels = labels_in(labels, "labels", scores.shape, (IGNORE, 0, 1))
    return _average_precision(scores, labels)


@dataclass(frozen=True, slots=True)
class MeanAveragePrecision:
    """`mean`: over classes with positives (NaN if none has). `per_class`: `(K,)`, NaN for a class without positives."""

    mean: float
    per_class: np.ndarray


def mean_average_precision(scores: Any, labels: Any) -> MeanAveragePrecision:
    """Multi-label mAP (tags, attributes): mean of the classes' `average_precision`; classes without positives excluded.

    Args:
        scores: `(N, K)` scores; only their order within a class matters.
        labels: `(N, K)` 1 = positive, 0 = negative, -1 = ignored.

    Raises:
        InputError: as `average_precision`; N or K is 0.
    """
    scores, labels = _scores_and_labels(scores, labels)
    per_class = np.array([_average_precision(scores[:, k], labels[:, k]) for k in range(scores.shape[1])])
    return MeanAveragePrecision(_nan_mean(per_class), per_class)


@dataclass(frozen=True, slots=True)
class OvadResult:
    """`map_percent`: mAP x 100 by group (NaN if none of it has positives). `per_attribute`: `(K,)` AP, 0 to 1."""

    map_percent: dict[str, float]
    per_attribute: np.ndarray


def ovad_map(scores: Any, labels: Any, attributes: Sequence[Mapping[str, Any]]) -> OvadResult:
    """Attribute mAP by the rules of the Open-Vocabulary Attribute Detection benchmark, box-oracle setting.

    Args:
        scores: `(N, K)` attribute scores of N boxes. The benchmark clips them to [0, 1] before ranking, and so does
            this: pass probabilities, not logits, or all scores above 1 become ties.
        labels: `(N, K)` 1 = holds, 0 = does not, -1 = unknown, ignored.
        attributes: K entries of the top-level "attributes" list of the annotation file, in column order. Read are
            "name" ("type:synonym/synonym/..."), "parent_type", and "freq_set" ("head", "medium" or "tail").

    Returns:
        Groups "all", "head", "medium", "tail", every parent type, "single" and "multiple" (synonyms in the name).

    Raises:
        InputError: as `mean_average_precision`; `attributes` disagrees with K or lacks a key.

    Source: Bravo et al., "Open-vocabulary Attribute Detection", CVPR 2023; DynRefer spec section 5.
    """
    scores, labels = _scores_and_labels(scores, labels)
    if len(attributes) != scores.shape[1]:
        raise InputError(
            f"There are {len(attributes)} attributes for {scores.shape[1]} columns of scores; give one for each."
        )
    groups: dict[str, list[int]] = {name: [] for name in ("all", "head", "medium", "tail")}
    synonyms: dict[str, list[int]] = {"single": [], "multiple": []}
    types: dict[str, list[int]] = {}
    for index, attribute in enumerate(attributes):
        missing = [key for key in ("name", "parent_type", "freq_set") if not isinstance(attribute.get(key), str)]
        if missing:
            raise InputError(f"attributes[{index}] has no text under {missing[0]!r}; use the entries of the OVAD file.")
        if attribute["freq_set"] not in ("head", "medium", "tail"):
            raise InputError(
                f"attributes[{index}] has freq_set {attribute['freq_set']!r}; allowed are head, medium, tail."
            )
        if attribute["parent_type"] in groups or attribute["parent_type"] in synonyms:
            raise InputError(
                f"attributes[{index}] has parent_type {attribute['parent_type']!r}, which names another group; rename."
            )
        groups["all"].append(index)
        groups[attribute["freq_set"]].append(index)
        types.setdefault(attribute["parent_type"], []).append(index)
        synonyms["multiple" if "/" in attribute["name"] else "single"].append(index)
    clipped = scores.clip(0.0, 1.0)
    per_attribute = np.array([_average_precision(clipped[:, k], labels[:, k]) for k in range(scores.shape[1])])
    map_percent = {
        name: 100.0 * _nan_mean(per_attribute[members]) for name, members in (groups | types | synonyms).items()
    }
    return OvadResult(map_percent, per_attribute)


def _average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    kept = labels != IGNORE
    scores, positive = scores[kept], labels[kept] == 1
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    true_positives = np.cumsum(positive[order])
    last_of_tie = np.append(scores[1:] != scores[:-1], True)
    true_positives = true_positives[last_of_tie]
    precision = true_positives / (np.flatnonzero(last_of_tie) + 1)
    gained = np.diff(true_positives, prepend=0) / true_positives[-1]
    return float((gained * precision).sum())


def _nan_mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def _logits_and_labels(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    logits = float_array(logits, "logits", (None, None))
    labels = int_array(labels, "labels", (logits.shape[0],))
    if logits.size == 0:
        raise InputError(f"logits has shape {logits.shape}; give at least one sample and one class.")
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        raise InputError(f"labels holds {labels[outside][0]}; class indices run from 0 to {logits.shape[1] - 1}.")
    return logits, labels


def _scores_and_labels(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    scores = float_array(scores, "scores", (None, None))
    if scores.size == 0:
        raise InputError(f"scores has shape {scores.shape}; give at least one sample and one class.")
    return scores, labels_in(labels, "labels", scores.shape, (IGNORE, 0, 1))
