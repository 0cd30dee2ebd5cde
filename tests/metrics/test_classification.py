from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score

from foveate.errors import InputError
from foveate.metrics.classification import (
    average_precision,
    class_breakdown,
    mean_average_precision,
    ovad_map,
    top_k_accuracy,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dynrefer"
# Few distinct values, so that ties are common.
SCORES = hnp.arrays(np.float64, st.integers(1, 30), elements=st.integers(-4, 4).map(lambda value: value / 4))


def test_top_k_accuracy_by_hand():
    logits = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]
    assert top_k_accuracy(logits, [1, 1, 0]) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, [1, 1, 0], k=2) == pytest.approx(2 / 3)
    assert top_k_accuracy(logits, [1, 1, 0], k=3) == 1.0


def test_a_constant_predictor_gains_nothing_from_ties():
    logits = np.zeros((4, 4))
    assert top_k_accuracy(logits, [0, 1, 2, 3]) == 0.25
    assert top_k_accuracy(logits, [0, 1, 2, 3], k=2) == 0.5


def test_class_breakdown_by_hand():
    predicted = np.eye(4)[[0, 0, 1, 2, 0]]
    result = class_breakdown(predicted, [0, 0, 0, 2, 1])
    np.testing.assert_array_equal(result.confusion, [[2, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(result.per_class, [2 / 3, 0, 1, np.nan])
    np.testing.assert_allclose(result.precision, [2 / 3, 0, 1, np.nan])
    np.testing.assert_array_equal(result.support, [3, 1, 1, 0])
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.mean_class_accuracy == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_average_precision_by_hand():
    # Positives at ranks 1 and 3: (1/1 + 2/3) / 2. The ignored sample in between changes nothing.
    assert average_precision([4, 3.5, 3, 2], [1, -1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    # Tied scores are one threshold: both orders give 1/2.
    assert average_precision([1, 1], [1, 0]) == average_precision([1, 1], [0, 1]) == 0.5
    assert math.isnan(average_precision([1, 2], [0, -1]))


@given(SCORES, st.data())
def test_average_precision_equals_sklearn(scores, data):
    labels = data.draw(hnp.arrays(np.int64, scores.shape, elements=st.sampled_from([-1, 0, 1])))
    kept = labels != -1
    if not (labels == 1).any():
        assert math.isnan(average_precision(scores, labels))
        return
    expected = average_precision_score(labels[kept], scores[kept])
    assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)
    # Any strictly rising transform and any order of the samples leave it as it is.
    assert average_precision(np.exp(3 * scores) - 7, labels) == pytest.approx(expected, abs=1e-12)
    order = data.draw(st.permutations(range(len(scores))))
    assert average_precision(scores[order], labels[order]) == pytest.approx(expected, abs=1e-12)


def test_mean_average_precision_leaves_out_classes_without_positives():
    labels = np.array([[1, 0, -1], [0, 0, 1], [1, -1, 0]])
    perfect = mean_average_precision(np.where(labels == 1, 0.9, 0.1), labels)
    assert perfect.mean == 1.0
    np.testing.assert_array_equal(perfect.per_class, [1, np.nan, 1])
    # Ranking reversed: class 0 has its negative first and both positives tied (2/3), class 2 its positive second (1/2).
    reverse = mean_average_precision(-labels.astype(float), labels)
    np.testing.assert_allclose(reverse.per_class, [2 / 3, np.nan, 1 / 2])
    assert reverse.mean == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert math.isnan(mean_average_precision([[0.5]], [[0]]).mean)


def test_ovad_golden():
    expected = json.loads((GOLDEN / "ovad.json").read_text())
    arrays = np.load(GOLDEN / "ovad.npz")
    result = ovad_map(arrays["pred"], arrays["att_vec"], expected["attributes"])
    per_class = [np.nan if value is None else value for value in expected["per_class_ap"]]
    np.testing.assert_allclose(result.per_attribute, per_class, rtol=0, atol=1e-12)
    percent = {name.split("/")[1]: value for name, value in expected["map_percent"].items()}
    assert result.map_percent == pytest.approx(percent, abs=1e-9)
    # Ignored labels must not act as negatives.
    strict = ovad_map(arrays["pred"], np.maximum(arrays["att_vec"], 0), expected["attributes"])
    assert abs(strict.map_percent["all"] - percent["all"]) > 1


def test_ovad_clips_scores_as_the_benchmark_does():
    attribute = {"name": "colour:red", "parent_type": "colour", "freq_set": "head"}
    result = ovad_map([[2.0], [1.5], [-1.0]], [[1], [0], [0]], [attribute])
    assert result.map_percent["all"] == 50.0
    assert result.map_percent["single"] == 50.0
    assert math.isnan(result.map_percent["tail"])
    assert math.isnan(result.map_percent["multiple"])


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ({"name": "a:b", "parent_type": "a"}, "'freq_set'"),
        ({"name": "a:b", "parent_type": "a", "freq_set": "rare"}, "'rare'"),
        ({"name": "a:b", "parent_type": "head", "freq_set": "head"}, "'head'"),
    ],
)
def test_bad_ovad_attributes_are_refused(attribute, message):
    with pytest.raises(InputError, match=message):
        ovad_map([[0.5]], [[1]], [attribute])
    with pytest.raises(InputError, match="2 attributes for 1 columns"):
        ovad_map([[0.5]], [[1]], [attribute, attribute])


@pytest.mark.parametrize(
    ("logits", "labels", "k", "message"),
    [
        ([[0.1, 0.2]], [2], 1, "labels holds 2"),
        ([[0.1, 0.2]], [-1], 1, "labels holds -1"),
        ([[0.1, 0.2]], [0.5], 1, "whole numbers"),
        ([[0.1, math.nan]], [0], 1, "nan at index"),
        ([[0.1, 0.2]], [0, 1], 1, r"labels has shape \(2,\)"),
        ([0.1, 0.2], [0], 1, r"logits has shape \(2,\)"),
        (np.zeros((0, 3)), np.zeros(0), 1, "at least one sample"),
        ([[0.1, 0.2], [0.1]], [0, 0], 1, "equal length"),
        ([["a", "b"]], [0], 1, "not numbers"),
        ([[0.1, 0.2]], [0], 3, "k is 3"),
        ([[0.1, 0.2]], [0], 0, "k is 0"),
        ([[0.1, 0.2]], [0], True, "k is True"),
    ],
)
def test_bad_logits_are_refused(logits, labels, k, message):
    with pytest.raises(InputError, match=message):
        top_k_accuracy(logits, labels, k)


def test_bad_multi_label_input_is_refused():
    with pytest.raises(InputError, match="labels holds 2; allowed are -1, 0, 1"):
        mean_average_precision([[0.5]], [[2]])
    with pytest.raises(InputError, match="at least one sample"):
        mean_average_precision(np.zeros((0, 2)), np.zeros((0, 2)))
    with pytest.raises(InputError, match="inf"):
        average_precision([math.inf], [1])


def test_importing_the_metrics_pulls_in_neither_torch_nor_scikit_learn():
    code = (
        "import sys, foveate.metrics.captioning, foveate.metrics.calibration, foveate.metrics.detection;"
        "print([name for name in ('torch', 'transformers', 'sklearn', 'pycocotools') if name in sys.modules])"
    )
    source = Path(__file__).parents[2] / "src"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(source)}
    )
    assert run.stdout.strip() == "[]"
