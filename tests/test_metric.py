"""The metric of `evaluate`: loaded as a stranger loads it, its numbers, its memory, and what it refuses."""

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from zs3.metric.metric import SegmentationScores
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import generalized_scores

ROOT = Path(__file__).parent.parent
IGNORE, CLASSES = 255, 6
IS_SEEN = [True, True, False, True, False, True]


def draw_maps(count: int, size=(5, 4)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predictions with rejected pixels, references with ignored ones; class 5 is nowhere, class 4 only predicted."""
    rng = np.random.default_rng(0)
    predictions = [rng.choice([-1, 0, 1, 2, 3, 4], size) for _ in range(count)]
    return predictions, [rng.choice([0, 1, 2, 3, IGNORE], size) for _ in range(count)]


@pytest.fixture
def make_metric(tmp_path):
    def make(**settings) -> SegmentationScores:
        return SegmentationScores(**{"num_classes": CLASSES, "is_seen": IS_SEEN, "cache_dir": str(tmp_path)} | settings)

    return make


@pytest.mark.parametrize(
    ("folder", "path"), [(ROOT, "zs3/metric"), (None, ROOT / "zs3" / "metric"), (None, ROOT / "zs3/metric/metric.py")]
)
def test_it_loads_offline_from_any_folder_and_counts_as_the_confusion_matrix(tmp_path, monkeypatch, folder, path):
    import evaluate

    monkeypatch.chdir(folder or tmp_path)
    metric = evaluate.load(str(path), num_classes=CLASSES, is_seen=IS_SEEN, cache_dir=str(tmp_path))
    assert str(ROOT) not in sys.modules[type(metric).__module__].__file__  # the copy that evaluate makes
    predictions, references = draw_maps(8)
    for start in (0, 3, 6):
        part = slice(start, start + 3)
        metric.add_batch(predictions=predictions[part], references=references[part])
    scores = metric.compute()
    matrix = ConfusionMatrix(CLASSES, IGNORE)
    for prediction, reference in zip(predictions, references, strict=True):
        matrix.update(prediction, reference)
    iou = matrix.iou()
    expected = {"miou": np.nanmean(iou), **generalized_scores(iou, IS_SEEN)._asdict()}
    right, pixels = np.diagonal(matrix.counts), matrix.counts.sum(axis=1)
    expected |= {"pixel_accuracy": right.sum() / pixels.sum()}
    expected |= {"frequency_weighted_iou": np.nansum(pixels / pixels.sum() * iou)}
    np.testing.assert_allclose(scores.pop("per_class"), iou, equal_nan=True)
    seen = ConfusionMatrix(CLASSES, IGNORE)  # of the pixels of seen classes alone
    for prediction, reference in zip(predictions, references, strict=True):
        seen.update(prediction, np.where(np.isin(reference, np.flatnonzero(IS_SEEN)), reference, IGNORE))
    expected |= {"miou_seen_on_seen_pixels": np.nanmean(seen.iou()[np.asarray(IS_SEEN)])}
    assert np.isnan(iou[5]) and iou[4] == 0 and scores == pytest.approx(expected)


def test_scores_are_those_of_pixels_counted_by_hand(make_metric):
    prediction, reference = np.array([[0, 0, 1, -1, 2]]), np.array([[0, 1, 1, 1, IGNORE]])
    scores = make_metric(num_classes=3, is_seen=[True, False, False]).compute(
        predictions=[prediction], references=[reference]
    )
    np.testing.assert_equal(scores.pop("per_class"), [1 / 2, 1 / 3, np.nan])
    hiou = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    expected = {"miou": 5 / 12, "miou_seen": 1 / 2, "miou_unseen": 1 / 3, "hiou": hiou, "miou_seen_on_seen_pixels": 1}
    expected |= {"pixel_accuracy": 2 / 4, "frequency_weighted_iou": 1 / 4 * 1 / 2 + 3 / 4 * 1 / 3}
    assert scores == pytest.approx(expected)


def test_however_the_maps_come_the_scores_are_the_same(make_metric):
    predictions, references = draw_maps(6)
    expected = make_metric().compute(predictions=predictions, references=references)
    parts = make_metric()
    parts.add(prediction=predictions[0].tolist(), reference=references[0].tolist())
    parts.add_batch(predictions=torch.tensor(np.stack(predictions[1:3])), references=np.stack(references[1:3]))
    parts.add_batch(predictions=[p.astype(np.int8) for p in predictions[3:5]], references=tuple(references[3:5]))
    assert len(parts) == 5
    np.testing.assert_equal(parts.compute(predictions=predictions[5:], references=references[5:]), expected)


def test_counting_starts_anew_after_compute(make_metric):
    predictions, references = draw_maps(4)
    once, again = make_metric(), make_metric()
    again.compute(predictions=predictions[:2], references=references[:2])
    assert len(again) == 0
    second = {"predictions": predictions[2:], "references": references[2:]}
    np.testing.assert_equal(again.compute(**second), once.compute(**second))


def test_absent_classes_follow_the_rule_given_when_it_is_loaded(make_metric):
    predictions, references = draw_maps(6)
    union, truth = (
        make_metric(absent=absent).compute(predictions=predictions, references=references)
        for absent in ("union", "truth")
    )
    assert union["per_class"][4] == 0 and np.isnan(truth["per_class"][4])
    assert truth["miou"] == pytest.approx(union["miou"] * 5 / 4)


def test_without_seen_classes_named_their_means_are_left_out(make_metric):
    predictions, references = draw_maps(2)
    scores = make_metric(is_seen=None).compute(predictions=predictions, references=references)
    assert list(scores) == ["miou", "pixel_accuracy", "frequency_weighted_iou", "per_class"]
    of_things = make_metric(is_seen=None, is_thing=IS_SEEN).compute(predictions=predictions, references=references)
    assert of_things["miou_things"] == pytest.approx(np.nanmean(np.array(scores["per_class"])[np.asarray(IS_SEEN)]))
    assert of_things["miou_stuff"] == pytest.approx(np.nanmean(np.array(scores["per_class"])[~np.asarray(IS_SEEN)]))


def test_no_map_is_kept_in_memory_or_on_the_disk(make_metric, tmp_path):
    metric = make_metric()
    (prediction,), (reference,) = draw_maps(1, (200, 250))
    map_bytes = prediction.nbytes

    def held_after(images: int) -> int:
        for _ in range(images):
            metric.add_batch(predictions=[prediction.copy()], references=[reference.copy()])
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = held_after(3), held_after(50)
    finally:
        tracemalloc.stop()
    assert after - before < map_bytes / 5  # 50 images leave 50 small tables of areas
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_seen": [True]}, "is_seen must be"),
        ({"is_seen": ["cow"] * CLASSES}, "is_seen must be"),
        ({"absent": "both"}, "absent is 'union' or 'truth'"),
        ({"num_process": 2}, "counts in one process"),
    ],
)
def test_wrong_settings_are_refused_before_the_evaluation(make_metric, settings, message):
    with pytest.raises(ValueError, match=message):
        make_metric(**settings)


def test_what_cannot_be_counted_is_refused(make_metric):
    predictions, references = draw_maps(2)
    metric = make_metric()
    with pytest.raises(ValueError, match="2 predictions, but 1 references"):
        metric.add_batch(predictions=predictions, references=references[:1])
    with pytest.raises(ValueError, match="takes predictions and references"):
        metric.compute(predictions=predictions)
    with pytest.raises(ValueError, match="label map holds ids"):
        metric.add(prediction=predictions[0], reference=np.full((5, 4), CLASSES))
    with pytest.raises(ValueError, match="no label map was added"):
        metric.compute()
