"""Calibration: reliability bins, expected calibration error, and Platt / temperature scaling of binary logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import InputError
from foveate.metrics._checks import float_array, labels_in, positive_int
from foveate.metrics.classification import IGNORE

NEWTON_STEPS = 100
LINE_SEARCH_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class ReliabilityBins:
    """Equal-width bins over [0, 1]; the arrays have one entry per bin, B in all.

    Attributes:
        edges: `(B + 1,)`; bin b is (edges[b], edges[b + 1]], the first one includes 0.
        confidence: `(B,)` mean confidence, NaN for an empty bin.
        accuracy: `(B,)` share of correct samples, NaN for an empty bin.
        count: `(B,)` samples.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability_bins(confidences: Any, correct: Any, bins: int = 15) -> ReliabilityBins:
    """Mean confidence and accuracy in equal-width bins, the data of a reliability diagram.

    Args:
        confidences: `(...)` probabilities in [0, 1]: of the predicted class, or of a binary label.
        correct: `(...)` 1 = the prediction was right (or the label holds), 0 = not, -1 = ignored.
        bins: number of bins; 15 is what the literature uses.

    Raises:
        InputError: shapes disagree, a confidence is outside [0, 1], a label is not -1, 0 or 1, or nothing is left.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2.
    """
    bins = positive_int(bins, "bins")
    confidences, hits = _flat(confidences, correct, "confidences")
    outside = (confidences < 0) | (confidences > 1)
    if outside.any():
        raise InputError(f"confidences holds {confidences[outside][0]}; give probabilities in [0, 1], not logits.")
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.maximum(np.searchsorted(edges, confidences, side="left") - 1, 0)
    count = np.bincount(index, minlength=bins)
    divisor = np.where(count > 0, count, np.nan)
    return ReliabilityBins(
        edges=edges,
        confidence=np.bincount(index, weights=confidences, minlength=bins) / divisor,
        accuracy=np.bincount(index, weights=hits, minlength=bins) / divisor,
        count=count,
    )


def expected_calibration_error(confidences: Any, correct: Any, bins: int = 15) -> float:
    """ECE = sum over bins of (count / N) * |accuracy - confidence|, 0 to 1 (Guo et al. 2017, equation 3).

    Arguments and errors as `reliability_bins`.
    """
    table = reliability_bins(confidences, correct, bins)
    filled = table.count > 0
    gaps = np.abs(table.accuracy[filled] - table.confidence[filled])
    return float((table.count[filled] * gaps).sum() / table.count.sum())


@dataclass(frozen=True, slots=True)
class F1Threshold:
    """`score > threshold` decides best; `f1` is what that reaches, 0 to 1."""

    threshold: float
    f1: float


def best_f1_threshold(scores: Any, labels: Any) -> F1Threshold:
    """The threshold of one label with the highest F1 = 2 TP / (2 TP + FP + FN).

    It lies midway between the lowest score above it and the highest below it (or 0); of thresholds that are equally
    good the highest is taken.

    Args:
        scores: `(N,)` probabilities in [0, 1].
        labels: `(N,)` 1 = the label holds, 0 = not, -1 = ignored.

    Raises:
        InputError: shapes disagree, a score is outside [0, 1], a label is not -1, 0 or 1, or none is 1.
    """
    scores, hits = _flat(scores, labels, "scores")
    outside = (scores < 0) | (scores > 1)
    if outside.any():
        raise InputError(f"scores holds {scores[outside][0]}; give probabilities in [0, 1], not logits.")
    if not hits.any():
        raise InputError("no label is 1, so that no threshold is better than another; leave this label out.")
    order = np.argsort(-scores, kind="stable")
    ranked = np.append(scores[order], 0.0)
    f1 = 2 * np.cumsum(hits[order]) / (np.arange(1, len(scores) + 1) + hits.sum())
    f1[ranked[:-1] == ranked[1:]] = -1  # no threshold parts equal scores, and none of use is below 0
    best = int(f1.argmax())
    return F1Threshold(float((ranked[best] + ranked[best + 1]) / 2), max(float(f1[best]), 0.0))


@dataclass(frozen=True, slots=True)
class PlattScaling:
    """p = sigmoid(scale * logit + bias). `scale` is the inverse temperature; negative if scores rank the wrong way."""

    scale: float
    bias: float

    def __call__(self, logits: Any) -> np.ndarray:
        """Calibrated probabilities, shape of `logits`.

        Raises:
            InputError: a logit is not a finite number.
        """
        logits = float_array(logits, "logits", None)
        return _sigmoid(self.scale * logits + self.bias)


def fit_platt(logits: Any, labels: Any, *, fit_bias: bool = True) -> PlattScaling:
    """Scale and bias that minimise the cross-entropy of sigmoid(scale * logit + bias), by Newton with line search.

    Args:
        logits: `(...)` raw binary scores, such as `(N,)` of one attribute or `(N, K)` of several sharing a scaling.
        labels: `(...)` 1 = positive, 0 = negative, -1 = ignored.
        fit_bias: False keeps bias = 0: pure temperature scaling.

    The targets are Platt's, (N+ + 1) / (N+ + 2) for positives and 1 / (N- + 2) for negatives, so that the optimum is
    finite even where the logits separate the labels; for large N they approach 1 and 0.

    Raises:
        InputError: shapes disagree, a label is not -1, 0 or 1, a logit is not finite, one of the two labels is missing,
            or all logits are equal (with `fit_bias=False`: all are 0), which leaves the scale undetermined.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999; Lin, Lin and Weng, "A Note on Platt's
    Probabilistic Outputs", 2007, algorithm 1.
    """
    logits, positive = _flat(logits, labels, "logits")
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        raise InputError(f"There are {positives} positive and {negatives} negative labels; calibration needs both.")
    # The fit runs on standardised logits, so that Newton's system is well conditioned at any scale of the scores.
    largest = float(np.abs(logits).max())
    standardised = logits / largest if largest else logits
    centre = float(standardised.mean()) if fit_bias else 0.0
    spread = float(np.abs(standardised - centre).max())
    if spread <= 1e-12:
        raise InputError(f"All logits are {logits[0]:g}, so no scale can be fitted; give logits that differ.")
    features = np.stack([(standardised - centre) / spread, np.full_like(logits, float(fit_bias))])
    targets = np.where(positive, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    weights = np.array([0.0, np.log((positives + 1) / (negatives + 1)) if fit_bias else 0.0])
    free = 2 if fit_bias else 1
    loss = _cross_entropy(weights @ features, targets)
    for _ in range(NEWTON_STEPS):
        probabilities = _sigmoid(weights @ features)
        gradient = (features @ (probabilities - targets))[:free]
        if np.abs(gradient).max() <= 1e-10 * len(logits):
            break
        curvature = (features * (probabilities * (1 - probabilities))) @ features.T
        step = np.zeros(2)
        # The ridge only matters where every probability has saturated and the curvature underflows.
        step[:free] = np.linalg.solve(curvature[:free, :free] + 1e-12 * np.eye(free), gradient)
        for halving in range(LINE_SEARCH_HALVINGS):
            candidate = weights - 0.5**halving * step
            candidate_loss = _cross_entropy(candidate @ features, targets)
            if candidate_loss < loss - 1e-4 * 0.5**halving * float(gradient @ step[:free]):
                break
        else:
            break  # No descent left at machine precision: this is the optimum.
        weights, loss = candidate, candidate_loss
    slope = float(weights[0] / spread)
    return PlattScaling(scale=slope / largest, bias=float(weights[1]) - slope * centre)


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # exp of a non-positive number only, so that nothing overflows.
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def _flat(values: Any, labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and 0/1 labels as flat arrays, ignored entries removed."""
    values = float_array(values, name, None)
    labels = labels_in(labels, "labels", values.shape, (IGNORE, 0, 1)).ravel()
    kept = labels != IGNORE
    if not kept.any():
        raise InputError(f"{name} has no entry with a label of 0 or 1; give at least one.")
    return values.ravel()[kept], labels[kept] == 1
