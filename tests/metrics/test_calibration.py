from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foveate.errors import InputError
from foveate.metrics.calibration import (
    PlattScaling,
    best_f1_threshold,
    expected_calibration_error,
    fit_platt,
    reliability_bins,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=float)))


def logit(p):
    return math.log(p / (1 - p))


def platt_loss(scale, bias, logits, labels):
    positives, negatives = (labels == 1).sum(), (labels == 0).sum()
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    z = scale * logits + bias
    return (np.logaddexp(0, z) - targets * z).sum()


def test_reliability_bins_and_error_by_hand():
    confidences, correct = [0.9, 0.8, 0.3, 0.25, 0.1], [1, 0, 1, 0, -1]
    table = reliability_bins(confidences, correct, bins=4)
    # Bins are closed on the right: 0.25 belongs to the first one. The last sample is ignored.
    np.testing.assert_array_equal(table.count, [1, 1, 0, 2])
    np.testing.assert_allclose(table.confidence, [0.25, 0.3, np.nan, 0.85])
    np.testing.assert_allclose(table.accuracy, [0, 1, np.nan, 0.5])
    np.testing.assert_allclose(table.edges, [0, 0.25, 0.5, 0.75, 1])
    expected = (0.25 + 0.7 + 2 * 0.35) / 4
    assert expected_calibration_error(confidences, correct, bins=4) == pytest.approx(expected)


def test_confidences_zero_and_one_are_binned():
    np.testing.assert_array_equal(reliability_bins([0.0, 1.0], [0, 1], bins=3).count, [1, 0, 1])


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 20), st.randoms(use_true_random=False))
def test_certain_and_right_has_no_error(correct, bins, rng):
    confidences = [float(hit) for hit in correct]
    assert expected_calibration_error(confidences, correct, bins) == 0.0
    wrong = [1 - value for value in confidences]
    assert expected_calibration_error(wrong, correct, bins) == pytest.approx(1.0) or bins == 1
    pairs = [(rng.random(), hit) for hit in correct]
    before = expected_calibration_error([p for p, _ in pairs], [h for _, h in pairs], bins)
    rng.shuffle(pairs)
    after = expected_calibration_error([p for p, _ in pairs], [h for _, h in pairs], bins)
    assert after == pytest.approx(before)


def test_platt_of_two_groups_by_hand():
    # Logit 2: 3 of 4 positive; logit -1: 1 of 5. N+ = 4, N- = 5: targets 5/6 and 1/7. With one parameter per group the
    # optimum gives each group its mean target.
    logits = np.array([2.0] * 4 + [-1.0] * 5 + [50.0])
    labels = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, -1])
    high = logit((3 * 5 / 6 + 1 / 7) / 4)
    low = logit((5 / 6 + 4 / 7) / 5)
    scale = (high - low) / 3
    fitted = fit_platt(logits, labels)
    assert fitted.scale == pytest.approx(scale, rel=1e-8)
    assert fitted.bias == pytest.approx(high - 2 * scale, rel=1e-8)
    np.testing.assert_allclose(fitted([2.0, -1.0]), sigmoid([high, low]), rtol=1e-8)


def test_temperature_alone_by_hand():
    # Logits 1 (3 of 4 positive) and -1 (1 of 4): targets 5/6 and 1/6, so sigmoid(scale) = (3 * 5/6 + 1/6) / 4 = 2/3.
    fitted = fit_platt([1, 1, 1, 1, -1, -1, -1, -1], [1, 1, 1, 0, 0, 0, 0, 1], fit_bias=False)
    assert fitted.bias == 0.0
    assert fitted.scale == pytest.approx(math.log(2), rel=1e-8)


def test_platt_recovers_the_generating_scaling_and_mends_the_calibration():
    rng = np.random.default_rng(5)
    logits = rng.normal(2.0, 3.0, (20000, 2))
    labels = (rng.random(logits.shape) < sigmoid(0.4 * logits - 1.5)).astype(int)
    labels[rng.random(logits.shape) < 0.1] = -1
    fitted = fit_platt(logits, labels)
    assert fitted.scale == pytest.approx(0.4, abs=0.02)
    assert fitted.bias == pytest.approx(-1.5, abs=0.05)
    assert expected_calibration_error(sigmoid(logits), labels) > 0.2
    assert expected_calibration_error(fitted(logits), labels) < 0.01


@given(
    hnp.arrays(np.float64, st.integers(4, 30), elements=st.floats(-50, 50, width=32)),
    st.data(),
    st.booleans(),
)
def test_no_neighbouring_scaling_is_better(logits, data, fit_bias):
    labels = data.draw(hnp.arrays(np.int64, logits.shape, elements=st.sampled_from([-1, 0, 1])))
    labels[:2] = [0, 1]
    logits[:2] = [-1.0, 1.5]
    fitted = fit_platt(logits, labels, fit_bias=fit_bias)
    kept = labels != -1
    best = platt_loss(fitted.scale, fitted.bias, logits[kept], labels[kept])
    step = 1e-3
    for scale_step, bias_step in [(step, 0), (-step, 0), (0, step), (0, -step)]:
        if bias_step and not fit_bias:
            continue
        other = platt_loss(fitted.scale + scale_step, fitted.bias + bias_step, logits[kept], labels[kept])
        assert other >= best - 1e-9 * (1 + abs(best))


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6, 1e300])
def test_separable_labels_have_a_finite_fit_at_any_scale_of_the_logits(factor):
    logits = np.array([-3.0, -1.0, 2.0, 4.0]) * factor
    fitted = fit_platt(logits, [0, 0, 1, 1])
    reference = fit_platt(logits / factor, [0, 0, 1, 1])
    assert math.isfinite(fitted.scale)
    assert fitted.scale > 0
    np.testing.assert_allclose(fitted(logits), reference(logits / factor), rtol=1e-6)


def test_scores_of_the_wrong_way_round_get_a_negative_scale():
    assert fit_platt([-2, -1, 1, 2], [1, 1, 0, 0]).scale < 0


def test_applying_a_scaling_does_not_overflow():
    np.testing.assert_allclose(PlattScaling(1.0, 0.0)([[-2000.0, 0.0, 2000.0]]), [[0.0, 0.5, 1.0]])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "2 positive and 0 negative"),
        ([1.0, 1.0], [1, 0], "All logits are 1"),
        ([1.0, 2.0], [1, 2], "labels holds 2"),
        ([1.0, 2.0], [-1, -1], "no entry with a label"),
        ([1.0, math.nan], [1, 0], "nan"),
        ([1.0, 2.0], [1], "labels has shape"),
        ([], [], "no entry"),
    ],
)
def test_bad_calibration_data_is_refused(logits, labels, message):
    with pytest.raises(InputError, match=message):
        fit_platt(logits, labels)


def test_temperature_of_zero_logits_is_refused():
    with pytest.raises(InputError, match="All logits are 0"):
        fit_platt([0.0, 0.0], [1, 0], fit_bias=False)


def test_bad_confidences_are_refused():
    with pytest.raises(InputError, match=r"confidences holds 1\.5"):
        expected_calibration_error([1.5], [1])
    with pytest.raises(InputError, match="bins is 0"):
        reliability_bins([0.5], [1], bins=0)
    with pytest.raises(InputError, match="equal length"):
        expected_calibration_error([[0.5, 0.2], [0.1]], [1, 0])


def test_best_f1_threshold_by_hand():
    # Of the cuts after 1, 2, 3, 4, 5 scores: F1 = 2/4, 2/5, 4/6, 6/7, 6/8.
    found = best_f1_threshold([0.9, 0.8, 0.6, 0.5, 0.1], [1, 0, 1, 1, 0])
    assert found.threshold == pytest.approx(0.3)
    assert found.f1 == pytest.approx(6 / 7)
    # Equal scores are on one side together, and what is unknown does not count.
    assert best_f1_threshold([0.7, 0.7, 0.2, 0.9], [1, 0, 0, -1]).threshold == pytest.approx(0.45)
    assert best_f1_threshold([0.4], [1]).threshold == pytest.approx(0.2)
    # Two cuts with F1 of 2/3: the higher one.
    assert best_f1_threshold([0.9, 0.5, 0.3, 0.1], [1, 0, 0, 1]).threshold == pytest.approx(0.7)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=12))
def test_no_other_threshold_has_a_better_f1(pairs):
    scores, labels = np.array([s / 8 for s, _ in pairs]), np.array([int(label) for _, label in pairs])
    assume(labels.any() and (scores[labels == 1] > 0).any())

    def f1(threshold):
        said = scores > threshold
        return 2 * (said & (labels == 1)).sum() / (said.sum() + labels.sum())

    best = best_f1_threshold(scores, labels)
    assert best.f1 == pytest.approx(f1(best.threshold))
    assert all(f1(threshold) <= best.f1 + 1e-12 for threshold in np.linspace(0, 1, 33))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [([0.5], [0], "no label is 1"), ([1.5], [1], "probabilities in"), ([0.5], [2], "2")],
)
def test_bad_scores_for_a_threshold(scores, labels, message):
    with pytest.raises(InputError, match=message):
        best_f1_threshold(scores, labels)
