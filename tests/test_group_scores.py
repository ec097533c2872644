"""Scores of groups of classes: seen classes on seen pixels, things, stuff. Against loops over pixels."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from zs3.command_line import InputError
from zs3.evaluation.results import read_images, read_result, write_result
from zs3.scores.bootstrap import load_images, resampled_areas
from zs3.scores.confusion import ConfusionMatrix

IGNORED = 255
IS_SEEN = np.array([True, False, True, True, False])
IS_THING = np.array([False, False, True, True, True])
GROUPS = ("miou_seen_on_seen_pixels", "miou_things", "miou_stuff")


def maps(seed: int, count: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions (-1 is rejected) and truths (with ignored pixels), each (6, 7)."""
    rng = np.random.default_rng(seed)
    truths = [rng.choice([0, 1, 2, 3, 4, IGNORED], (6, 7)) for _ in range(count)]
    return [(rng.choice([-1, 0, 1, 2, 3], (6, 7)), truth) for truth in truths]  # class 4 is never predicted


def pixels_of(images: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
    """(prediction, truth) of every labelled pixel."""
    pairs = [(int(p), int(t)) for prediction, truth in images for p, t in zip(prediction.flat, truth.flat, strict=True)]
    return [(p, t) for p, t in pairs if t != IGNORED]


def mean_iou(pixels: list[tuple[int, int]], classes: list[int], absent: str) -> float:
    ious = []
    for c in classes:
        both = sum(p == c and t == c for p, t in pixels)
        either = sum(p == c or t == c for p, t in pixels)
        is_in = either if absent == "union" else sum(t == c for _, t in pixels)
        if is_in:
            ious.append(both / either)
    return sum(ious) / len(ious) if ious else math.nan


def by_loops(images: list[tuple[np.ndarray, np.ndarray]], absent: str) -> dict[str, float]:
    pixels = pixels_of(images)
    on_seen = [(p, t) for p, t in pixels if IS_SEEN[t]]
    return {
        "miou_seen_on_seen_pixels": mean_iou(on_seen, [0, 2, 3], absent),
        "miou_things": mean_iou(pixels, [2, 3, 4], absent),
        "miou_stuff": mean_iou(pixels, [0, 1], absent),
    }


def counted(images: list[tuple[np.ndarray, np.ndarray]], is_seen: np.ndarray | None = IS_SEEN) -> ConfusionMatrix:
    confusion = ConfusionMatrix(5, IGNORED, is_seen)
    for number, (prediction, truth) in enumerate(images):
        confusion.update(prediction, truth, f"image {number}")
    return confusion


@pytest.mark.parametrize("absent", ["union", "truth"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_groups_equal_the_loops(seed, absent):
    images = maps(seed)
    scores = counted(images).scores(IS_SEEN, absent, IS_THING)
    for name, expected in by_loops(images, absent).items():
        assert scores[name] == pytest.approx(expected, abs=1e-12)
    assert scores["miou_seen_on_seen_pixels"] > scores["miou_seen"]  # an unseen pixel with a seen name is no error


def test_a_group_without_classes_or_pixels_has_no_score():
    confusion = counted(maps(0))
    assert math.isnan(confusion.scores(IS_SEEN)["miou_things"])  # not known which are things
    nothing = confusion.scores(np.zeros(5, dtype=bool), is_thing=np.ones(5, dtype=bool))
    assert math.isnan(nothing["miou_seen_on_seen_pixels"]) and math.isnan(nothing["miou_stuff"])
    empty = ConfusionMatrix(5, IGNORED, IS_SEEN).scores(IS_SEEN, is_thing=IS_THING)
    assert all(math.isnan(empty[name]) for name in GROUPS)
    with pytest.raises(ValueError, match="is_thing must be .5,. bool"):
        confusion.scores(IS_SEEN, is_thing=np.ones(4, dtype=bool))


@pytest.mark.parametrize("absent", ["union", "truth"])
def test_resamples_are_those_of_repeated_images(absent):
    images = maps(5, count=6)
    confusion = counted(images)
    boot = confusion.bootstrap(IS_SEEN, is_thing=IS_THING, absent=absent, resamples=8, seed=3)
    order = sorted(range(6), key=lambda at: (confusion.images[at][:, :4].tobytes(), confusion.images[at].tobytes()))
    drawn = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=8)
    for resample, times in enumerate(drawn):
        repeated = [images[at] for at, count in zip(order, times, strict=True) for _ in range(count)]
        for name, expected in by_loops(repeated, absent).items():
            assert boot.scores[name][resample] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_parts_merge_to_the_whole_and_other_seen_classes_do_not():
    images = maps(7)
    whole, part = counted(images), counted(images[:1])
    part.merge(counted(images[1:]))
    assert part.scores(IS_SEEN, is_thing=IS_THING) == whole.scores(IS_SEEN, is_thing=IS_THING)
    ends = [one.bootstrap(IS_SEEN, is_thing=IS_THING, resamples=20).intervals() for one in (part, whole)]
    assert ends[0] == ends[1]
    with pytest.raises(ValueError, match="two label spaces"):
        whole.merge(counted(images, ~IS_SEEN))


def test_without_the_areas_on_seen_pixels_their_interval_is_missing():
    images = maps(2)
    boot = counted(images, None).bootstrap(IS_SEEN, is_thing=IS_THING, resamples=10)
    assert np.isnan(boot.scores["miou_seen_on_seen_pixels"]).all() and np.isfinite(boot.scores["miou_things"]).all()
    other = counted(images).bootstrap(~IS_SEEN, resamples=10)
    assert np.isnan(other.scores["miou_seen_on_seen_pixels"]).all()
    old, new = (counted(images, is_seen).bootstrap(IS_SEEN, resamples=10).scores for is_seen in (None, IS_SEEN))
    assert all(np.array_equal(old[name], new[name]) for name in ("miou", "miou_seen", "hiou", "pixel_accuracy"))


def test_areas_of_images_are_saved_and_read_with_and_without_the_fifth_number(tmp_path):
    for is_seen, numbers in ((IS_SEEN, 4), (None, 3)):
        confusion = counted(maps(4), is_seen)
        confusion.save_images(tmp_path / "images.npz", list("abcde"))
        saved = load_images(tmp_path / "images.npz")
        assert len(saved.areas.counted) == numbers
        again = resampled_areas(saved.areas, 5, 0)
        for one, other in zip(again, resampled_areas(confusion.image_areas(range(4)), 5, 0), strict=True):
            assert np.array_equal(one, other)


def test_a_result_of_an_older_version_is_read_without_them(tmp_path):
    path = Path(__file__).parents[1] / "docs" / "results" / "first_edition" / "zs3-scenes.json"
    result = read_result(path, ("miou", "hiou"))
    assert not {*GROUPS, "things", "image_label_precision"} & {*result}


@pytest.mark.parametrize("change", [-1, 10_000])
def test_areas_on_seen_pixels_that_no_images_can_have_are_refused(tmp_path, change):
    counted(maps(4)).save_images(tmp_path / "whole.npz", list("abcde"))
    content = dict(np.load(tmp_path / "whole.npz"))
    content["rows"][0, 4] = change
    np.savez(tmp_path / "images.npz", **content)
    with pytest.raises(InputError, match="images.npz is no file of image areas, or is broken"):
        load_images(tmp_path / "images.npz")


def test_written_areas_agree_with_the_result_that_they_belong_to(tmp_path):
    confusion = counted(maps(9))
    names = list("abcde")
    result = {
        "per_class": dict(zip(names, confusion.iou().tolist(), strict=True)),
        "setting": "gzs3",
        "unseen": ["b", "e"],
    }
    result |= {
        "things": ["c", "d", "e"],
        "per_class_intervals": dict.fromkeys(names, [None, None]),
        "absent": "union",
        "num_images": 4,
    }
    write_result(tmp_path / "r.json", result, "report", confusion)
    assert json.loads((tmp_path / "r.json").read_text())["num_images"] == 4
    assert len(read_images(tmp_path / "r.json", result).areas.counted) == 4
    with (tmp_path / "r.csv").open(newline="") as file:
        found = {row["class"]: row["thing_or_stuff"] for row in csv.DictReader(file)}
    assert found == {"a": "stuff", "b": "stuff", "c": "thing", "d": "thing", "e": "thing"}
    right = {
        "seen": ["a", "c", "d"],
        "miou_seen_on_seen_pixels": by_loops(maps(9), "union")["miou_seen_on_seen_pixels"],
    }
    read_images(tmp_path / "r.json", result | right)
    for wrong in (right | {"miou_seen_on_seen_pixels": 0.5}, right | {"seen": ["a", "c"]}):
        with pytest.raises(InputError, match="was not written with"):
            read_images(tmp_path / "r.json", result | wrong)


def test_a_tensor_says_which_classes_are_things():
    confusion = counted(maps(1))
    of_array = confusion.scores(IS_SEEN, is_thing=IS_THING)
    assert confusion.scores(torch.from_numpy(IS_SEEN), is_thing=torch.from_numpy(IS_THING)) == of_array
