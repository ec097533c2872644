"""The scores: against sets of pixels, the formulas of other libraries, and bootstraps written as loops."""

import io
import math
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zs3.command_line import InputError
from zs3.scores.bootstrap import images_path, load_images, summed_areas
from zs3.scores.confusion import AreaShares, ConfusedPair, ConfusionMatrix
from zs3.scores.means import GeneralizedScores, average_precision, generalized_scores, iou_of_areas

IGNORE = 255


def iou_by_sets(pairs, num_classes, absent="union", ignore=IGNORE):
    """IoU from its definition, on sets of pixels of all images; NaN where a class is left out."""
    truth, predicted = ([set() for _ in range(num_classes)] for _ in range(2))
    for image, (prediction, label) in enumerate(pairs):
        for pixel in np.ndindex(label.shape):
            if label[pixel] != ignore:
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


def matrix_of(pairs, num_classes, ignore=IGNORE, ids=None):
    matrix = ConfusionMatrix(num_classes, ignore)
    for index, (prediction, label) in enumerate(pairs):
        matrix.update(prediction, label, None if ids is None else ids[index])
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
    scores = matrix.scores([True, False])
    assert scores["pixel_accuracy"] == 2 / 3
    assert scores["frequency_weighted_iou"] == pytest.approx(2 / 3 * 0.5 + 1 / 3 * 1.0)


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


def of_pixels(pairs, num_classes) -> tuple[float, float]:
    """Pixel accuracy, and frequency-weighted IoU as the mean over pixels of the IoU of their true class."""
    iou = iou_by_sets(pairs, num_classes)
    pixels = [
        (label == prediction, iou[label])
        for predictions, labels in pairs
        for prediction, label in zip(predictions.flat, labels.flat, strict=True)
        if label != IGNORE
    ]
    right, weighted = np.mean(pixels, axis=0)
    return right, weighted


def test_intervals_equal_a_bootstrap_written_as_loops():
    pairs = random_pairs(3, 30, 5)
    is_seen = np.array([True, True, True, False, False])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(600):
        sample = [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))]
        iou = np.array(iou_by_sets(sample, 5))
        seen, unseen = np.nanmean(iou[is_seen]), np.nanmean(iou[~is_seen])
        means = [np.nanmean(iou), seen, unseen, 2 * seen * unseen / (seen + unseen)]
        drawn.append([*means, *of_pixels(sample, 5), *iou])
    expected = np.nanquantile(drawn, [0.025, 0.975], axis=0).T
    resampled = matrix_of(pairs, 5).bootstrap(is_seen, resamples=2000)
    found = resampled.intervals()
    names = ["miou", "miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "frequency_weighted_iou"]
    np.testing.assert_allclose([found[name] for name in names], expected[:6], atol=0.015)  # two random draws
    np.testing.assert_allclose(resampled.class_intervals(), expected[6:], atol=0.02)
    assert resampled.iou.shape == (2000, 5) and np.ptp(expected[6:], axis=1).min() > 0.05


def test_intervals_are_a_point_where_all_images_are_alike():
    pair = (np.array([[0, 1, 1, 1]]), np.array([[0, 0, 1, 1]]))
    matrix = matrix_of([pair] * 5, 2)
    found = matrix.bootstrap([True, False]).intervals()
    np.testing.assert_allclose(found["miou_seen"], [0.5, 0.5])
    np.testing.assert_allclose(found["miou_unseen"], [2 / 3, 2 / 3])


def test_intervals_repeat_with_their_seed_and_survive_no_images():
    matrix = matrix_of(random_pairs(4, 9, 5), 5)
    is_seen = [True] * 3 + [False] * 2
    first, again, other = (matrix.bootstrap(is_seen, seed=seed).intervals()["hiou"] for seed in (0, 0, 1))
    assert first == again != other
    assert all(map(math.isnan, ConfusionMatrix(5, IGNORE).bootstrap(is_seen).intervals()["miou"]))


def test_shares_that_are_alike_in_all_images_of_many_have_no_width():
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(171, IGNORE)
    for _ in range(300):
        area = rng.integers(1, 900, 12)
        matrix.images.append(np.stack([rng.choice(171, 12, replace=False), area, area * 2, area * 3], axis=1))
    found = matrix.bootstrap(np.arange(171) < 156).intervals()
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


# ---- the formulas of another library -----------------------------------------------------------------------


def detectron2_scores(pairs, num_classes, ignore):
    """One count over (C + 1) x (C + 1), ignored pixels as class C of the truth. The means are those of the old rule
    (divided by the classes with truth or prediction) and of the new one (by those with truth)."""
    counts = np.zeros((num_classes + 1) ** 2, dtype=np.int64)
    for prediction, label in pairs:
        truth = label.astype(np.int64)
        truth[truth == ignore] = num_classes
        counts += np.bincount(((num_classes + 1) * prediction + truth).ravel(), minlength=counts.size)
    counts = counts.reshape(num_classes + 1, num_classes + 1)
    both = counts.diagonal()[:-1].astype(float)
    truth, predicted = counts[:-1, :-1].sum(axis=0), counts[:-1, :-1].sum(axis=1)
    has_truth, has_either = truth > 0, truth + predicted > 0
    iou = both[has_truth] / (truth + predicted - both)[has_truth]
    weights = truth[has_truth] / truth.sum()
    return {
        "old": iou.sum() / has_either.sum(),
        "new": iou.sum() / (has_truth & has_either).sum(),
        "frequency_weighted_iou": (iou * weights).sum(),
        "pixel_accuracy": both.sum() / truth.sum(),
    }


SPACES = [(1, 255), (2, 255), (9, 255), (9, -1), (255, 255), (300, 65535)]  # classes, ignored id


@st.composite
def maps(draw):
    """(pairs, C, ignored id): random maps of few classes each, at least one labelled pixel in all."""
    num_classes, ignore = draw(st.sampled_from(SPACES))
    ids = {0, 1, 3, 7, 254, 255, 256, 299, num_classes - 1}
    ids = draw(st.lists(st.sampled_from(sorted(i for i in ids if i < num_classes)), min_size=1, max_size=4))
    size = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        label = rng.choice([*ids, ignore], size).astype(np.int32 if ignore < 0 else np.uint16)
        pairs.append((rng.choice([*ids, 0], size), label))
    pairs[0][1].flat[0] = ids[0]
    return pairs, num_classes, ignore


@settings(max_examples=150, deadline=None)
@given(case=maps())
def test_scores_equal_those_of_sets_of_pixels_and_of_detectron2(case):
    pairs, num_classes, ignore = case
    matrix = matrix_of(*case)
    iou = matrix.iou("union")
    np.testing.assert_allclose(iou, iou_by_sets(*case[:2], "union", ignore), equal_nan=True)
    theirs = detectron2_scores(*case)
    assert np.nanmean(iou) == pytest.approx(theirs["old"])
    assert np.nanmean(matrix.iou("truth")) == pytest.approx(theirs["new"])
    for absent in ("union", "truth"):
        scores = matrix.scores(np.arange(num_classes) % 2 == 0, absent)
        assert scores["pixel_accuracy"] == pytest.approx(theirs["pixel_accuracy"])
        assert scores["frequency_weighted_iou"] == pytest.approx(theirs["frequency_weighted_iou"])


@settings(max_examples=100, deadline=None)
@given(case=maps(), kind=st.sampled_from(["none", "all", "some"]), absent=st.sampled_from(["union", "truth"]))
def test_means_over_seen_and_unseen_equal_those_of_sets_of_pixels(case, kind, absent):
    pairs, num_classes, ignore = case
    is_seen = np.full(num_classes, kind == "all") if kind != "some" else np.arange(num_classes) % 2 == 0
    iou = iou_by_sets(pairs, num_classes, absent, ignore)

    def mean(wanted):
        values = [value for value, seen in zip(iou, is_seen, strict=True) if seen == wanted and not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    seen, unseen = mean(True), mean(False)
    both = 0.0 if seen + unseen == 0 else 2 * seen * unseen / (seen + unseen)
    found = generalized_scores(matrix_of(*case).iou(absent), is_seen)
    np.testing.assert_allclose(found, [seen, unseen, both], equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(case=maps(), shards=st.integers(1, 4))
def test_shards_merged_equal_the_whole_and_images_are_told_by_their_ids(case, shards):
    pairs, num_classes, ignore = case
    ids = [f"image {index}" for index in range(len(pairs))]
    whole, merged = matrix_of(*case, ids), ConfusionMatrix(num_classes, ignore)
    for shard in range(shards):
        merged.merge(matrix_of(pairs[shard::shards], num_classes, ignore, ids[shard::shards]))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    resampled = (matrix.bootstrap([True] * num_classes, resamples=20) for matrix in (merged, whole))
    np.testing.assert_equal(*resampled)
    with pytest.raises(ValueError, match="merged"):
        merged.merge(ConfusionMatrix(num_classes + 1, ignore))
    rows = [dict(zip(m.image_ids, (own.tolist() for own in m.images), strict=True)) for m in (whole, merged)]
    assert rows[0] == rows[1] and list(rows[0]) == ids
    for (prediction, label), own in zip(pairs, whole.images, strict=True):
        labelled = label != ignore
        expected = []
        for k in sorted({*label[labelled].tolist(), *prediction[labelled].tolist()}):
            areas = ((label == k) & (prediction == k), label == k, prediction == k)
            expected.append([k, *(int((area & labelled).sum()) for area in areas)])
        assert own.tolist() == expected


def test_counts_are_whole_numbers_however_many():
    matrix = ConfusionMatrix(2, 65535)
    matrix.counts[:] = 2**53  # where float64 begins to leave out odd numbers
    matrix.update(np.array([[0, 1]]), np.array([[0, 0]]))
    np.testing.assert_array_equal(matrix.counts - 2**53, [[1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_every_kind_of_integer_and_every_order_of_memory_counts_alike(kind):
    prediction, label = np.array([[0, 1, 2], [2, 2, 1]]), np.array([[0, 1, 1], [2, 255, 1]])
    expected = matrix_of([(prediction, label)], 3).counts
    np.testing.assert_array_equal(expected, [[1, 0, 0, 0], [0, 2, 1, 0], [0, 0, 1, 0]])
    for turned in (lambda values: values, np.asfortranarray, lambda values: np.repeat(values, 2, axis=1)[:, ::2]):
        found = matrix_of([(turned(prediction.astype(kind)), turned(label.astype(kind)))], 3)
        np.testing.assert_array_equal(found.counts, expected)


def test_an_image_without_a_labelled_pixel_counts_as_an_image():
    matrix = matrix_of([(np.zeros((2, 2), int), np.full((2, 2), IGNORE)), (np.zeros((0, 3), int),) * 2], 2)
    assert [len(rows) for rows in matrix.images] == [0, 0] and matrix.counts.sum() == 0
    assert all(map(math.isnan, matrix.scores([True, False]).values()))
    assert math.isnan(matrix.bootstrap([True, False]).intervals()["miou"][0])


# ---- ids and files of images -------------------------------------------------------------------------------


def test_ids_go_with_their_images():
    (prediction, label), other = random_pairs(5, 2, 4)
    matrix = ConfusionMatrix(4, IGNORE)
    matrix.update(prediction, label, "a")
    matrix.update(*other)
    matrix.update(*(np.stack(two) for two in zip((prediction, label), other, strict=True)), ["b", "c"])
    matrix.update(prediction[None], label[None])
    assert matrix.image_ids == ["a", None, "b", "c", None]
    for wrong in ("ab", ["a"]):
        with pytest.raises(ValueError, match="a batch of 2 label maps takes a list"):
            matrix.update(np.zeros((2, 1, 1), int), np.zeros((2, 1, 1), int), wrong)
    assert len(matrix.images) == 5


def test_images_saved_and_loaded_are_the_same(tmp_path):
    pairs = [*random_pairs(6, 4, 5), (np.zeros((1, 1), int), np.full((1, 1), IGNORE))]
    matrix = matrix_of(pairs, 5, IGNORE, ["é", "b/1", None, "a", "empty"])
    names = ["sky", "ground, soil", "ü", "d", "e"]
    path = images_path(tmp_path / "new" / "gzs3.json")
    matrix.save_images(path, names)
    assert [file.name for file in path.parent.iterdir()] == ["gzs3_images.npz"]
    assert not any(array.dtype.hasobject for array in np.load(path, allow_pickle=False).values())
    saved = load_images(path)
    assert saved.class_names == names and saved.image_ids == ["é", "b/1", None, "a", "empty"]
    for column, area in zip((1, 2, 3), saved.areas.counted, strict=True):
        expected = np.zeros((5, 5), dtype=np.int64)
        for place, rows in enumerate(matrix.images):
            for row in rows:
                expected[row[0], place] = row[column]
        np.testing.assert_array_equal(area.toarray(), expected)
    for absent in ("union", "truth"):
        np.testing.assert_array_equal(iou_of_areas(summed_areas(saved.areas), absent), matrix.iou(absent))


def test_no_images_can_be_saved_and_loaded(tmp_path):
    ConfusionMatrix(2, IGNORE).save_images(tmp_path / "none_images.npz", ["a", "b"])
    saved = load_images(tmp_path / "none_images.npz")
    assert saved.image_ids == [] and np.isnan(iou_of_areas(summed_areas(saved.areas), "union")).all()


def test_files_that_are_no_areas_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="none_images.npz does not exist: .*evaluate again"):
        load_images(tmp_path / "none_images.npz")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", rows=np.zeros(3))
    matrix = matrix_of(random_pairs(0, 2, 4), 4)
    matrix.save_images(tmp_path / "whole.npz", list("abcd"))
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-200])
    content = dict(np.load(tmp_path / "whole.npz"))
    np.savez(tmp_path / "stranger.npz", **content | {"image": content["image"] + 7})
    np.savez(tmp_path / "flat.npz", **content | {"rows": content["rows"].ravel()})
    np.savez(tmp_path / "pickled.npz", **content | {"image_ids": np.array([None, "a"], dtype=object)})
    for name in ("text", "other", "half", "stranger", "flat", "pickled"):
        with pytest.raises(InputError, match=f"{name}.npz is no file of image areas"):
            load_images(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="3 class names for 4 classes"):
        matrix.save_images(tmp_path / "wrong.npz", list("abc"))


def swapped(values: np.ndarray, place: tuple, value: int) -> np.ndarray:
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("class_names", lambda names: np.arange(len(names))),
        ("class_names", lambda names: names[:, None]),
        ("class_names", lambda names: names[:3]),
        ("class_names", lambda names: np.array(["a", "b", "c", " A"])),
        ("class_names", lambda names: np.array(["a", "b", "c", ""])),
        ("image_ids", lambda ids: np.arange(len(ids))),
        ("image_ids", lambda ids: ids[:1]),
        ("image_ids", lambda ids: ids.reshape(1, -1)),
        ("image", lambda image: image.astype(np.float64)),
        ("image", lambda image: image[:-1]),
        ("image", lambda image: image * 0),
        ("image", lambda image: swapped(image, (0,), -1)),
        ("image", lambda image: image > 0),
        ("rows", lambda rows: rows.astype(np.float64)),
        ("rows", lambda rows: rows.astype(np.uint8)),
        ("rows", lambda rows: rows[:, :3]),
        ("rows", lambda rows: rows[None]),
        ("rows", lambda rows: swapped(rows, (0, 0), 4)),
        ("rows", lambda rows: swapped(rows, (0, 0), -1)),
        ("rows", lambda rows: swapped(rows, (0, 1), -1)),
        ("rows", lambda rows: swapped(rows, (0, 2), -1)),
        ("rows", lambda rows: swapped(rows, (0, 1), rows[0, 2:].min() + 1)),
        ("rows", lambda rows: swapped(rows, (slice(None), slice(2, 4)), 2**62)),
    ],
)
def test_areas_that_no_images_can_have_are_refused_in_one_line(tmp_path, array, change):
    matrix_of(random_pairs(0, 2, 4), 4).save_images(tmp_path / "whole.npz", list("abcd"))
    content = dict(np.load(tmp_path / "whole.npz"))
    np.savez(tmp_path / "a_images.npz", **content)
    assert load_images(tmp_path / "a_images.npz").class_names == list("abcd")
    np.savez(tmp_path / "a_images.npz", **content | {array: change(content[array])})
    with pytest.raises(InputError, match="a_images.npz is no file of image areas, or is broken: evaluate again"):
        load_images(tmp_path / "a_images.npz")


def test_a_file_with_a_few_broken_bytes_is_refused_in_one_line_or_is_whole(tmp_path):
    matrix_of(random_pairs(0, 2, 4), 4).save_images(tmp_path / "whole.npz", list("abcd"))
    whole, rng = (tmp_path / "whole.npz").read_bytes(), np.random.default_rng(0)
    names = set()
    for _ in range(300):
        broken = bytearray(whole)
        broken[rng.integers(len(whole))] = rng.integers(256)
        (tmp_path / "a_images.npz").write_bytes(broken)
        try:
            names.add(tuple(load_images(tmp_path / "a_images.npz").class_names))
        except InputError as error:
            assert "a_images.npz" in str(error)
    assert names == {tuple("abcd")}


# ---- what was confused with what ---------------------------------------------------------------------------


def test_the_worst_pairs_are_those_counted_pixel_by_pixel():
    pairs = random_pairs(7, 6, 6)
    pixels, areas = {}, dict.fromkeys(range(6), 0)
    for prediction, label in pairs:
        for truth, found in zip(label.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            if truth != IGNORE:
                areas[truth] += 1
                if found not in (truth, -1):
                    pixels[truth, found] = pixels.get((truth, found), 0) + 1
    expected = [
        ConfusedPair(*pair, count, count / areas[pair[0]])
        for pair, count in sorted(pixels.items(), key=lambda item: (-item[1], item[0]))
    ]
    matrix = matrix_of(pairs, 6)
    assert len(expected) > 5 and matrix.worst_pairs(5) == expected[:5] and matrix.worst_pairs(99) == expected
    assert matrix_of([(np.array([[0, 1]]), np.array([[0, 1]]))], 2).worst_pairs(3) == []


def test_the_confusion_of_seen_and_unseen_by_hand():
    # classes 0, 1 seen, 2, 3 unseen; ten unseen pixels, five seen ones
    label = np.array([[2] * 8 + [3] * 2 + [0] * 4 + [1]])
    prediction = np.array([[0, 0, 1, 2, 2, 2, 3, -1] + [3, 2] + [0, 1, 3, -1] + [1]])
    found = matrix_of([(prediction, label)], 4).seen_unseen_confusion([True, True, False, False])
    np.testing.assert_allclose(found.of_unseen, AreaShares(right=0.4, wrong_seen=0.3, wrong_unseen=0.2, rejected=0.1))
    np.testing.assert_allclose(found.of_seen, AreaShares(right=0.4, wrong_seen=0.2, wrong_unseen=0.2, rejected=0.2))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_confusion_of_seen_and_unseen_is_that_of_sets_of_pixels(seed):
    pairs, is_seen = random_pairs(seed, 3, 5), np.array([True, False, True, True, False])
    found = matrix_of(pairs, 5).seen_unseen_confusion(is_seen)
    for shares, group in ((found.of_seen, True), (found.of_unseen, False)):
        kinds = []
        for prediction, label in pairs:
            for own, name in zip(label.ravel(), prediction.ravel(), strict=True):
                if own != IGNORE and is_seen[own] == group:
                    kinds.append("rejected" if name < 0 else "right" if name == own else is_seen[name])
        keys = ("right", True, False, "rejected")
        expected = [kinds.count(key) / len(kinds) if kinds else math.nan for key in keys]
        np.testing.assert_allclose(shares, expected, equal_nan=True)


def test_intervals_of_scores_and_classes_come_of_the_same_resamples():
    matrix = matrix_of(random_pairs(9, 12, 4), 4)
    resampled = matrix.bootstrap([True, True, False, False], resamples=50)
    for at in range(50):
        iou = resampled.iou[at]
        assert resampled.scores["miou"][at] == pytest.approx(np.nanmean(iou))
        assert resampled.scores["miou_unseen"][at] == pytest.approx(np.nanmean(iou[2:]))
    again = matrix.bootstrap([True, True, False, False], resamples=50)
    assert np.array_equal(resampled.scores["miou"], again.scores["miou"])


def test_a_class_that_is_nowhere_has_no_interval():
    matrix = matrix_of([(np.array([[0, 0]]), np.array([[0, 1]]))] * 3, 3)
    found = matrix.bootstrap([True, True, True], resamples=20).class_intervals()
    np.testing.assert_array_equal(found, [[0.5, 0.5], [0, 0], [np.nan, np.nan]])


def test_areas_that_are_larger_than_any_are_not_unpacked(tmp_path):
    """A bomb: 512 MB of zeros in less than 3 MB of file. And a header that says more than there is."""
    names = {"class_names": ["a"], "image_ids": ["a"], "image": [0]}
    np.savez(tmp_path / "bomb.npz", **names)  # as in a whole file, so that rows is not the first to be missed
    archive = zipfile.ZipFile(tmp_path / "bomb.npz", "a", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("rows.npy", "w") as rows:
        np.lib.format.write_array_header_1_0(rows, {"descr": "<i8", "fortran_order": False, "shape": (2**26,)})
        for _ in range(512):
            rows.write(bytes(2**20))
    assert (tmp_path / "bomb.npz").stat().st_size < 3e6
    tracemalloc.start()
    with pytest.raises(InputError, match="bomb.npz is no file of image areas"):
        load_images(tmp_path / "bomb.npz")
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        for name in ("class_names", "image_ids", "image", "rows"):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(InputError, match="lie.npz is no file of image areas"):
        load_images(tmp_path / "lie.npz")


@pytest.mark.parametrize(
    "head",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (" + "1" + "0" * 400 + ",)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (18446744073709551616, 18446744073709551616)}",
        "(" * 5000,
        "-" * 5000 + "1",
        "{'descr': 'O', 'fortran_order': False, 'shape': (1,)}",
        "no dictionary",
        "",
    ],
)
def test_whatever_the_head_of_an_array_says_the_refusal_is_one_line(head, tmp_path):
    content = b"\x93NUMPY\x02\x00" + len(head).to_bytes(4, "little") + head.encode()
    for place, array in enumerate((content, content[6:], b"a text", b"")):
        with zipfile.ZipFile(tmp_path / f"{place}.npz", "w") as archive:
            for name in ("class_names", "image_ids", "image", "rows"):
                archive.writestr(f"{name}.npy", array)
        with pytest.raises(InputError, match=f"{place}.npz is no file of image areas"):
            load_images(tmp_path / f"{place}.npz")
