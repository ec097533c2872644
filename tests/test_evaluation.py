import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zs3.evaluation import ConfusionMatrix, GeneralizedScores, average_precision, generalized_scores

IGNORE = 255


def iou_by_sets(pairs, num_classes, absent="union"):
    """IoU from its definition, on sets of pixels of all images; NaN where a class is left out."""
    truth, predicted = ([set() for _ in range(num_classes)] for _ in range(2))
    for image, (prediction, label) in enumerate(pairs):
        for pixel in np.ndindex(label.shape):
            if label[pixel] != IGNORE:
                truth[label[pixel]].add((image, pixel))
                if prediction[pixel] >= 0:
                    predicted[prediction[pixel]].add((image, pixel))
    left_out = [not (t if absent == "truth" else t | p) for t, p in zip(truth, predicted, strict=True)]
    return [math.nan if out else len(t & p) / len(t | p) for t, p, out in zip(truth, predicted, left_out, strict=True)]


def random_pairs(seed, num_images, num_classes, size=(5, 4)):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_images):
        some = rng.integers(0, num_classes, 3)  # few classes an image, so that some are absent everywhere
        label = rng.choice([*some, IGNORE], size)
        pairs.append((rng.choice([*some, -1, num_classes - 1], size), label))
    return pairs


def matrix_of(pairs, num_classes):
    matrix = ConfusionMatrix(num_classes, IGNORE)
    for prediction, label in pairs:
        matrix.update(prediction, label)
    return matrix


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), num_images=st.integers(1, 4), num_classes=st.integers(1, 9))
def test_iou_equals_its_definition_on_sets_of_pixels(seed, num_images, num_classes):
    pairs = random_pairs(seed, num_images, num_classes)
    for absent in ("union", "truth"):
        expected = iou_by_sets(pairs, num_classes, absent)
        np.testing.assert_allclose(matrix_of(pairs, num_classes).iou(absent), expected, equal_nan=True)


def test_absent_classes_follow_the_chosen_rule():
    matrix = matrix_of([(np.array([[0, 2]]), np.array([[0, 0]]))], 4)
    np.testing.assert_array_equal(matrix.iou("union"), [0.5, np.nan, 0.0, np.nan])
    np.testing.assert_array_equal(matrix.iou("truth"), [0.5, np.nan, np.nan, np.nan])
    with pytest.raises(ValueError, match="absent"):
        matrix.iou("both")


def test_rejected_pixels_count_against_recall_only():
    matrix = matrix_of([(np.array([[0, -1, 1, -1]]), np.array([[0, 0, 1, IGNORE]]))], 2)
    np.testing.assert_array_equal(matrix.iou(), [0.5, 1.0])
    assert matrix.pixel_accuracy() == 2 / 3


def test_ids_beyond_255_are_counted_apart():
    matrix = ConfusionMatrix(847, 65535)
    matrix.update(np.array([[300, 44]]), np.array([[300, 300]], dtype=np.uint16))
    matrix.update(np.array([[0]]), np.array([[65535]], dtype=np.uint16))
    assert matrix.iou()[300] == 0.5 and matrix.iou()[44] == 0.0 and matrix.counts.sum() == 2


def test_numpy_torch_and_batches_count_alike():
    pairs = random_pairs(1, 3, 6)
    by_torch = ConfusionMatrix(6, IGNORE)
    by_torch.update(*(torch.from_numpy(np.stack(maps)) for maps in zip(*pairs, strict=True)))
    whole = matrix_of(pairs, 6)
    np.testing.assert_array_equal(by_torch.counts, whole.counts)
    assert len(by_torch.images) == len(whole.images) == 3


def test_parts_merged_equal_the_whole_intervals_included():
    pairs = random_pairs(2, 7, 6)
    whole, one, other = matrix_of(pairs, 6), matrix_of(pairs[1::2], 6), matrix_of(pairs[::2], 6)
    one.merge(other)
    np.testing.assert_array_equal(one.counts, whole.counts)
    is_seen = [True] * 4 + [False] * 2
    assert one.confidence_intervals(is_seen) == whole.confidence_intervals(is_seen)
    with pytest.raises(ValueError, match="merged"):
        one.merge(ConfusionMatrix(7, IGNORE))


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([[2]], [[0]], "prediction must lie in -1 to 1"),
        ([[-2]], [[0]], "prediction must lie in -1 to 1"),
        ([[0]], [[2]], "label map holds ids from 2 to 2"),
        ([[0]], [[-1]], "label map holds ids"),
        ([[0, 0]], [[0]], "shape"),
        ([[0.0]], [[0]], "integers"),
    ],
)
def test_maps_outside_the_label_space_are_refused(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(2, IGNORE).update(np.array(prediction), np.array(label))


def test_dataset_level_iou_is_not_the_mean_over_images():
    zeros = np.zeros((1, 9), dtype=int)
    matrix = matrix_of([(zeros, zeros), (np.array([[1]]), np.array([[0]]))], 2)
    assert matrix.iou()[0] == 0.9  # images alone: 1.0 and 0.0


@pytest.mark.parametrize(
    ("iou", "expected"),
    [
        ([0.6, 0.2, 0.3], (0.4, 0.3, 2 * 0.4 * 0.3 / 0.7)),
        ([0.6, math.nan, 0.3], (0.6, 0.3, 0.4)),
        ([0.0, 0.0, 0.0], (0.0, 0.0, 0.0)),
        ([0.5, 0.5, 0.0], (0.5, 0.0, 0.0)),
        ([0.5, 0.5, math.nan], (0.5, math.nan, math.nan)),
    ],
)
def test_generalized_scores_by_hand(iou, expected):
    for kind in (list, np.array, torch.tensor):
        scores = generalized_scores(kind(iou), kind([True, True, False]))
        assert isinstance(scores, GeneralizedScores)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_label_space_without_unseen_names_has_no_unseen_mean():
    scores = generalized_scores(np.array([0.5, 1.0]), torch.tensor([True, True]))
    assert scores.miou_seen == 0.75 and math.isnan(scores.miou_unseen) and math.isnan(scores.hiou)


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="is_seen must be"):
        generalized_scores(np.array([0.5, 1.0]), [True])


def test_intervals_equal_a_bootstrap_written_as_loops():
    pairs = random_pairs(3, 30, 5)
    is_seen = np.array([True, True, True, False, False])
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(400):
        sample = [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))]
        iou = np.array(iou_by_sets(sample, 5))
        seen, unseen = np.nanmean(iou[is_seen]), np.nanmean(iou[~is_seen])
        scores.append([np.nanmean(iou), seen, unseen, 2 * seen * unseen / (seen + unseen)])
    expected = np.quantile(scores, [0.025, 0.975], axis=0).T
    found = matrix_of(pairs, 5).confidence_intervals(is_seen, resamples=2000)
    assert list(found) == ["miou", "miou_seen", "miou_unseen", "hiou"]
    np.testing.assert_allclose(list(found.values()), expected, atol=0.015)  # two random draws of resamples


def test_intervals_are_a_point_where_all_images_are_alike():
    pair = (np.array([[0, 1, 1, 1]]), np.array([[0, 0, 1, 1]]))
    matrix = matrix_of([pair] * 5, 2)
    found = matrix.confidence_intervals([True, False])
    np.testing.assert_allclose(found["miou_seen"], [0.5, 0.5])
    np.testing.assert_allclose(found["miou_unseen"], [2 / 3, 2 / 3])


def test_intervals_repeat_with_their_seed_and_survive_no_images():
    matrix = matrix_of(random_pairs(4, 9, 5), 5)
    is_seen = [True] * 3 + [False] * 2
    assert matrix.confidence_intervals(is_seen) == matrix.confidence_intervals(is_seen)
    assert matrix.confidence_intervals(is_seen) != matrix.confidence_intervals(is_seen, seed=1)
    assert all(map(math.isnan, ConfusionMatrix(5, IGNORE).confidence_intervals(is_seen)["miou"]))


def test_a_thousand_resamples_of_5000_images_of_171_classes_take_seconds():
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(171, IGNORE)
    for _ in range(5000):
        area = rng.integers(1, 900, 12)
        matrix.images.append(np.stack([rng.choice(171, 12, replace=False), area, area * 2, area * 3], axis=1))
    start = time.perf_counter()
    found = matrix.confidence_intervals(np.arange(171) < 156)
    assert time.perf_counter() - start < 10  # about 0.4 s on an idle core
    np.testing.assert_allclose(found["miou"], [0.25, 0.25])  # area / (2 area + 3 area - area), whatever is drawn


def average_precision_by_thresholds(scores, truth):
    """Every distinct score is a threshold: the recall it adds to that of the next higher, times its precision."""
    total, recall_above = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [is_true for score, is_true in zip(scores, truth, strict=True) if score >= threshold]
        recall = sum(taken) / sum(truth)
        total += (recall - recall_above) * sum(taken) / len(taken)
        recall_above = recall
    return total


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0]), st.booleans()), min_size=1, max_size=20))
def test_average_precision_equals_its_definition_ties_included(rows):
    scores, truth = np.array([row[0] for row in rows], np.float32), np.array([row[1] for row in rows])
    found = average_precision(scores, truth)
    if truth.any():
        assert found == pytest.approx(average_precision_by_thresholds(scores.tolist(), truth.tolist()))
        backwards = average_precision(scores[::-1], truth[::-1])
        assert backwards == found
    else:
        assert math.isnan(found)


def test_scores_that_are_all_equal_are_worth_the_share_of_true_ones():
    assert average_precision(np.ones(4, np.float32), np.array([True, False, False, False])) == 0.25
