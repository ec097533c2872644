"""Calibration against its definitions: maps with a bias counted by sets of pixels, pairs of pixels in loops, and the
conformal guarantee by drawing images anew."""

import json
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from label_maps_zs3 import SemanticMap, semantic_map, semantic_scores
from zs3.command_line import InputError
from zs3.files import write_json
from zs3.scores import calibration
from zs3.scores.calibration import (
    BINS,
    GAMMAS,
    LEVELS,
    OUTSIDER,
    UNIT,
    Rejection,
    Reliability,
    SeenBiasCurve,
    conformal_threshold,
    in_check_half,
)

IGNORE = 255
SCORES = ("miou_seen", "miou_unseen", "hiou", "miou")
IS_SEEN = torch.tensor([True, False, True])


def random_image(seed: int, classes: int, is_seen: torch.Tensor, queries: int = 5, kind: str = "soft"):
    """What semantic_map knows of an image, the label map, and the dense scores of Eq. 4 (C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    class_probs = (3 * torch.randn(1, queries, classes, generator=generator)).softmax(-1)
    if kind == "copies":  # of few values: classes tie, seen with unseen ones too
        class_probs = class_probs[..., torch.arange(classes) % 2]
    mask_logits = 4 * torch.randn(1, queries, 3, 3, generator=generator)
    (found,) = semantic_map(class_probs, mask_logits, (6, 7), is_seen=is_seen)
    choices = torch.cat([torch.randint(classes, (3,), generator=generator), torch.tensor([IGNORE])])
    label = choices[torch.randint(4, (6, 7), generator=generator)]
    return found, label.numpy(), semantic_scores(class_probs.double(), mask_logits.double(), (6, 7))[0]


def scores_by_sets(maps: list[np.ndarray], labels: list[np.ndarray], is_seen: Iterable[bool], absent: str) -> dict:
    """Dataset-level scores from their definition; None where there is no class to take a mean over."""
    iou = {}
    for index, _ in enumerate(is_seen):
        truth, predicted = set(), set()
        for image, (label_map, label) in enumerate(zip(maps, labels, strict=True)):
            for pixel in zip(*np.nonzero(label != IGNORE), strict=True):
                truth |= {(image, pixel)} if label[pixel] == index else set()
                predicted |= {(image, pixel)} if label_map[pixel] == index else set()
        if truth or (predicted and absent == "union"):
            iou[index] = len(truth & predicted) / len(truth | predicted)
    groups = {"miou_seen": {True}, "miou_unseen": {False}, "miou": {True, False}}
    found = {name: [v for index, v in iou.items() if bool(is_seen[index]) in group] for name, group in groups.items()}
    found = {name: sum(values) / len(values) if values else None for name, values in found.items()}
    seen, unseen = found["miou_seen"], found["miou_unseen"]
    found["hiou"] = None
    if seen is not None and unseen is not None:
        found["hiou"] = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0
    return found


def row(result: dict, place: int) -> dict:
    """The scores at one of the GAMMAS."""
    if place in (0, len(GAMMAS) - 1):
        return result["seen_only" if place == 0 else "unseen_only"]
    return {name: result["points"][name][place - 1] for name in SCORES}


def test_a_result_shows_some_of_the_points_among_them_none_and_the_best():
    curve = SeenBiasCurve([True, False], IGNORE)
    found = SemanticMap(torch.zeros(1, 3, dtype=torch.int64))
    found.label_map = torch.tensor([[0, 0, 1]])
    found.seen_map, found.unseen_map = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    found.gap = torch.tensor([[0.8, 0.9, 0.1]]) - torch.tensor([[0.7, 0.2, 0.6]])
    curve.update(found, torch.tensor([[1, 0, 1]]))
    whole, some = curve.result(every=1), curve.result(every=50)
    assert {name: some[name] for name in some if name != "points"} == {
        name: whole[name] for name in whole if name != "points"
    }
    gammas = whole["points"]["gamma"]
    assert some["points"]["gamma"] == sorted({*gammas[::50], 0.0, whole["best"]["gamma"]})
    for place, gamma in enumerate(some["points"]["gamma"]):
        for name in SCORES:
            assert some["points"][name][place] == whole["points"][name][gammas.index(gamma)]


def assert_scores(found: dict, expected: dict) -> None:
    for name in SCORES:
        assert (found[name] is None) == (expected[name] is None), name
        assert found[name] is None or found[name] == pytest.approx(expected[name], abs=1e-12), name


# ------------------------------------------------------------------------------------------------ seen and unseen


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 7),
    images=st.integers(1, 3),
    absent=st.sampled_from(["union", "truth"]),
    kind=st.sampled_from(["soft", "copies"]),
    places=st.lists(st.integers(0, len(GAMMAS) - 1), min_size=2, max_size=4),
    data=st.data(),
)
def test_every_point_is_the_map_with_that_bias(seed, classes, images, absent, kind, places, data):
    is_seen = torch.tensor(data.draw(st.permutations([True, False, *[seed % 3 > 0] * (classes - 2)])))
    curve = SeenBiasCurve(is_seen, IGNORE)
    made = [random_image(seed + image, classes, is_seen, kind=kind) for image in range(images)]
    for found, label, _ in made:
        curve.update(found, label)
    labels = [label for _, label, _ in made]
    result = curve.result(absent, every=1)
    for place in (0, len(GAMMAS) // 2, len(GAMMAS) - 1, *places):
        maps = [found.with_seen_bias(float(GAMMAS[place])).numpy() for found, *_ in made]
        assert_scores(row(result, place), scores_by_sets(maps, labels, is_seen, absent))
    maps = [found.label_map.numpy() for found, *_ in made]
    assert_scores(result["unbiased"], scores_by_sets(maps, labels, is_seen, absent))


@pytest.mark.parametrize("absent", ["union", "truth"])
def test_every_point_is_the_argmax_of_the_biased_scores(absent):
    is_seen = torch.tensor([True, False, True, True, False])
    made = [random_image(seed, 5, is_seen) for seed in range(3)]
    curve = SeenBiasCurve(is_seen, IGNORE)
    for found, label, _ in made:
        curve.update(found, label)
    result, changes = curve.result(absent, every=1), set()
    for place in range(0, len(GAMMAS), 7):
        bias = max(-1e3, min(float(GAMMAS[place]), 1e3))  # no infinity less infinity
        maps = [(dense - bias * is_seen[:, None, None]).argmax(0).numpy() for *_, dense in made]
        assert_scores(row(result, place), scores_by_sets(maps, [label for _, label, _ in made], is_seen, absent))
        changes.add(np.stack(maps).tobytes())
    assert len(changes) > 10


def map_of(seen_map, seen_score, unseen_map, unseen_score, label_map=None) -> SemanticMap:
    seen_map, unseen_map = torch.tensor([seen_map]), torch.tensor([unseen_map])
    seen_score, unseen_score = torch.tensor([seen_score]), torch.tensor([unseen_score])
    seen_wins = (seen_score > unseen_score) | ((seen_score == unseen_score) & (seen_map < unseen_map))
    winner = torch.where(seen_wins, seen_map, unseen_map) if label_map is None else torch.tensor([label_map])
    return SemanticMap(winner, seen_map=seen_map, unseen_map=unseen_map, gap=seen_score - unseen_score)


def test_where_gamma_is_the_gap_the_lower_index_wins():
    """Gaps that are exactly one of the GAMMAS, up and down, with either index the lower one."""
    is_seen = [True, False, True]
    gaps = [0.5, 0.5, -0.5, -0.5, 0.0, 0.0, 2.0**-12, -(2.0**-12)]
    found = map_of([0, 2] * 4, [1 + gap for gap in gaps], [1] * 8, [1.0] * 8)
    label = np.array([[0, 2, 1, 1, 2, 0, 1, 2]])
    curve = SeenBiasCurve(is_seen, IGNORE)
    curve.update(found, label)
    result = curve.result(every=1)
    for gamma in gaps:
        (place,) = np.nonzero(gamma == GAMMAS)[0]
        for near in (place - 1, place, place + 1):
            maps = [found.with_seen_bias(float(GAMMAS[near])).numpy()]
            assert_scores(row(result, near), scores_by_sets(maps, [label], is_seen, "union"))


def test_near_ties_are_decided_as_by_fractions():
    """Gaps that are a gamma, or the next float32 number below or above it; the seen class has the higher index."""
    won = 0
    for number, place in enumerate(np.random.default_rng(0).integers(1, len(GAMMAS) - 1, 300).tolist()):
        gamma = np.float32(GAMMAS[place])
        if gamma == 0:  # there label_map says it
            continue
        gap = [gamma, np.nextafter(gamma, np.float32(-9)), np.nextafter(gamma, np.float32(9))][number % 3].item()
        curve = SeenBiasCurve([False, True], IGNORE)
        curve.update(map_of([1], [gap], [0], [0.0]), np.array([[1]]))
        seen_wins = Fraction(gap) > Fraction(GAMMAS[place])  # not where they are equal
        assert curve.iou()[place].tolist()[1] == float(seen_wins)
        won += seen_wins
    assert 50 < won < 250


def test_where_rounding_hides_the_winner_label_map_says_who_it_is_without_a_bias():
    found = map_of([0, 0], [1.0, 1.0], [1, 1], [1.0, 1.0], label_map=[1, 0])  # float64 told them apart
    for found.gap in (torch.zeros(1, 2), -torch.zeros(1, 2)):
        for is_seen in ([True, False], [False, True]):
            found.seen_map, found.unseen_map = (torch.full((1, 2), is_seen.index(one)) for one in (True, False))
            curve = SeenBiasCurve(is_seen, IGNORE)
            curve.update(found, np.array([[1, 0]]))
            result = curve.result(every=1)
            assert result["unbiased"]["miou"] == 1.0
            at = result["points"]["gamma"].index(0)
            smallest = [result["points"]["miou"][place] for place in (at - 1, at + 1)]
            assert smallest == [0.25, 0.25]  # any bias decides both pixels


def test_the_ends_are_seen_classes_only_and_unseen_classes_only():
    found = map_of([0, 0, 2], [50.0, 0.0, 1e-9], [1, 3, 3], [0.0, 90.0, 0.0])
    curve = SeenBiasCurve([True, False, True, False], IGNORE)
    curve.update(found, np.array([[0, 3, 2]]))
    result = curve.result(every=1)
    assert result["seen_only"] == pytest.approx({"miou_seen": 0.75, "miou_unseen": 0.0, "hiou": 0.0, "miou": 0.5})
    assert result["unseen_only"]["miou_seen"] == 0 and result["unseen_only"]["miou_unseen"] == 0.25  # 0 and 1 / 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0])
def test_gammas_are_close_at_every_order_of_magnitude(scale):
    """Of gaps all of one size, hIoU's best gamma is found to a thirtieth of that."""
    inside = GAMMAS[(np.abs(GAMMAS) >= scale / 2) & (np.abs(GAMMAS) <= 2 * scale)]
    for side in (inside[inside > 0], -inside[inside < 0][::-1]):
        assert (np.diff(side) <= side[:-1] / 30).all() and len(side) >= 33
    assert (np.diff(GAMMAS) > 0).all() and (-GAMMAS[::-1] == GAMMAS).all()
    assert (np.float32(GAMMAS) == GAMMAS).all()


def test_the_best_gamma_is_that_of_the_best_hiou_and_the_smallest_of_equal_ones():
    """Unseen pixels fall 0.3 short of their class, seen ones hold theirs by 0.6: any gamma between is right."""
    found = map_of([0, 0], [0.7, 0.8], [1, 1], [0.4, 0.2])
    curve = SeenBiasCurve([True, False], IGNORE)
    curve.update(found, np.array([[1, 0]]))
    result = curve.result(every=1)
    assert result["best"] == {
        "gamma": min(gamma for gamma in GAMMAS if gamma > 0.7 - 0.4 + 1e-6),
        **dict.fromkeys(SCORES, 1.0),
    }
    assert result["unbiased"]["hiou"] == 0 and result["area"] == 1.0


def test_the_area_is_that_of_what_some_gamma_reaches():
    """Against a lattice of wished-for pairs (mIoU(U), mIoU(S)), each looked up in all the points."""
    is_seen = torch.tensor([True, False, True, False, False])
    curve = SeenBiasCurve(is_seen, IGNORE)
    for seed in range(4):
        found, _, dense = random_image(seed, 5, is_seen)
        noise = torch.Generator().manual_seed(seed)
        curve.update(
            found, (dense - 0.3 * is_seen[:, None, None] + 0.2 * torch.rand(5, 6, 7, generator=noise)).argmax(0)
        )
    result = curve.result(every=1)
    points = np.array([[row(result, place)[name] for name in SCORES[:2]] for place in range(len(GAMMAS))])
    wishes = (np.arange(200) + 0.5) / 200
    reached = [[((points[:, 0] >= seen) & (points[:, 1] >= unseen)).any() for seen in wishes] for unseen in wishes]
    assert result["area"] == pytest.approx(np.mean(reached), abs=0.01) and 0.1 < result["area"] < 1


def test_areas_by_hand():
    area = calibration._attained_area
    assert area([(0.0, 0.8), (0.5, 0.5), (0.6, 0.0)]) == pytest.approx(0.25)
    assert area([(0.0, 0.4), (0.2, 0.8), (0.5, 0.5), (0.4, 0.1)]) == pytest.approx(0.2 * 0.8 + 0.3 * 0.5)
    assert area([(1.0, 1.0)]) == 1 and area([(0.0, 1.0), (1.0, 0.0)]) == 0


def test_a_group_that_does_not_occur_has_no_scores_and_the_result_is_json(tmp_path):
    found = map_of([0, 0], [0.7, 0.8], [1, 1], [0.4, 0.2])
    curve = SeenBiasCurve([True, False], IGNORE)
    curve.update(found, np.array([[0, 0]]))
    result = curve.result("truth", every=1)
    assert result["best"] is None and result["area"] is None and result["unbiased"]["miou_unseen"] is None
    write_json(tmp_path / "a.json", result)
    assert json.loads((tmp_path / "a.json").read_text()) == result
    empty = SeenBiasCurve([True, False], IGNORE).result()
    assert empty["best"] is None and empty["unbiased"]["miou"] is None


def test_a_curve_needs_both_groups_and_labels_of_the_label_space():
    for is_seen in ([True, True], [False]):
        with pytest.raises(InputError, match="both"):
            SeenBiasCurve(is_seen, IGNORE)
    found = map_of([0], [0.7], [1], [0.4])
    for label, message in (([[2]], "ids from 2 to 2"), ([[-1]], "ids from -1"), ([[0, 0]], "shape")):
        with pytest.raises(ValueError, match=message):
            SeenBiasCurve([True, False], IGNORE).update(found, np.array(label))


def test_labels_beyond_255_are_counted():
    curve = SeenBiasCurve(np.arange(847) % 2 == 0, 65535)
    curve.update(map_of([300, 0], [0.7, 0.7], [1, 301], [0.4, 0.8]), np.array([[300, 65535]], dtype=np.uint16))
    assert curve.result(every=1)["unbiased"]["miou_seen"] == 1.0 and curve.truth.sum() == 1


# ------------------------------------------------------------------------------------------------ confidences


def map_with_confidence(label_map: np.ndarray, confidence: np.ndarray) -> SemanticMap:
    label_map, confidence = torch.as_tensor(label_map), torch.as_tensor(confidence, dtype=torch.float32)
    found = SemanticMap(label_map)
    found.confidence = confidence
    return found


def random_confidences(seed: int, size=(9, 11), levels: int | None = None, outsiders: float = 0.3):
    """A map whose confidence tells a little of whether it is right. levels: confidences are multiples of 1 / levels."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, size)
    label[rng.random(size) < outsiders] = OUTSIDER
    label[rng.random(size) < 0.1] = IGNORE
    label_map = np.where(rng.random(size) < 0.7, label, rng.integers(0, 4, size)).clip(0, 3)
    confidence = 0.7 * rng.random(size) + 0.3 * (label_map == label)
    confidence = confidence if levels is None else np.round(confidence * levels) / levels
    return map_with_confidence(label_map, confidence), label


@pytest.mark.parametrize("levels", [None, 15, 4])
def test_reliability_is_counted_pixel_by_pixel(levels):
    reliability, pixels = Reliability(IGNORE), []
    for seed in range(3):
        found, label = random_confidences(seed, levels=levels, outsiders=0)
        reliability.update(found, label)
        confidence, right = found.confidence.tolist(), (found.label_map.numpy() == label).tolist()
        pixels += [(confidence[y][x], right[y][x]) for y, x in zip(*np.nonzero(label != IGNORE), strict=True)]
    result, ece = reliability.result(), 0.0
    for place, found in enumerate(result["bins"]):
        own = [pixel for pixel in pixels if place < pixel[0] * BINS <= place + 1 or (place == pixel[0] == 0)]
        assert found["count"] == len(own) and (found["low"], found["high"]) == (place / BINS, (place + 1) / BINS)
        if not own:
            assert found["confidence"] is found["accuracy"] is None
            continue
        confidence, accuracy = (sum(values) / len(own) for values in zip(*own, strict=True))
        assert found["confidence"] == pytest.approx(confidence, abs=1e-7)
        assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        ece += len(own) / len(pixels) * abs(accuracy - confidence)
    assert result["ece"] == pytest.approx(ece, abs=1e-7) and result["ece"] > 0.02
    assert result["pixels"] == len(pixels) == sum(found["count"] for found in result["bins"])


def test_calibrated_confidences_have_no_error():
    found = map_with_confidence([[0] * 10 + [1] * 4], [[0.7] * 10 + [0.25] * 4])
    reliability = Reliability(IGNORE)
    reliability.update(found, np.array([[0] * 7 + [2] * 3 + [1] + [3] * 3]))
    assert reliability.result()["ece"] == pytest.approx(0, abs=1e-7)
    assert Reliability(IGNORE).result()["ece"] is None


# ------------------------------------------------------------------------------------------------ none of these


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 3, 16, 64]), share=st.sampled_from([0.05, 0.4, 0.9]))
def test_auroc_and_fpr_are_those_of_all_pairs_of_pixels(seed, levels, share):
    levels = 2 ** int(math.log2(levels))  # on the grid of thresholds, as all confidences then are
    found, label = random_confidences(seed, (5, 6), levels=levels, outsiders=share)
    rejection = Rejection(IGNORE)
    rejection.update(found, label, "a")
    result, confidence = rejection.result(), found.confidence.numpy()
    insiders = confidence[(label != OUTSIDER) & (label != IGNORE)].tolist()
    outsiders = confidence[label == OUTSIDER].tolist()
    assert (result["insiders"], result["outsiders"]) == (len(insiders), len(outsiders))
    if not insiders or not outsiders:
        assert result["auroc"] is None
        return
    pairs = [(i > o) + 0.5 * (i == o) for i in insiders for o in outsiders]
    assert result["auroc"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    threshold = max(t for t in insiders if sum(i >= t for i in insiders) / len(insiders) >= 0.95 - 1e-12)
    assert result["threshold_at_95"] == threshold
    assert result["fpr_at_95"] == pytest.approx(sum(o >= threshold for o in outsiders) / len(outsiders), abs=1e-12)


def test_without_outsiders_there_is_nothing_to_tell_apart_but_a_threshold_all_the_same():
    rejection = Rejection(IGNORE)
    for index in range(60):
        rejection.update(*random_confidences(index, outsiders=0), f"image {index}")
    result = rejection.result(0.2)
    assert result["auroc"] is result["fpr_at_95"] is result["threshold_at_95"] is None
    assert 0 < result["conformal"]["threshold"] < 1


def by_loops(images: list, alpha: float) -> tuple[float | None, float | None, float | None]:
    """The threshold of the calibration half by trying one after the other, and the check half's shares with it."""
    halves = {True: [], False: []}
    for found, label, image_id in images:
        if (label != IGNORE).any():
            halves[in_check_half(image_id)].append((found, label))

    def shares(found, label, threshold):
        kept = ~(found.confidence < threshold).numpy() & (label != IGNORE)  # as the pipeline rejects
        wrong = kept & (found.label_map.numpy() != label)
        return wrong.sum() / (label != IGNORE).sum(), kept.sum() / (label != IGNORE).sum()

    own = halves[False]
    for step in range(calibration.LEVELS + 1):
        threshold = step / calibration.LEVELS
        if (sum(shares(*image, threshold)[0] for image in own) + 1) / (len(own) + 1) <= alpha:
            checked = [shares(*image, threshold) for image in halves[True]]
            return threshold, *(np.mean(checked, axis=0) if checked else (None, None))
    return None, *((0, 0) if halves[True] else (None, None))


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("count", [1, 9, 40])
def test_the_threshold_is_the_least_that_keeps_the_conformal_bound(alpha, count, monkeypatch):
    monkeypatch.setattr(calibration, "LEVELS", 256)
    images = [(*random_confidences(index), f"{index:05d}") for index in range(count)]
    images.append((map_with_confidence([[0]], [[1.0]]), np.array([[IGNORE]]), "nothing is labelled"))
    rejection = Rejection(IGNORE)
    for image in images:
        rejection.update(*image)
    found = rejection.result(alpha)["conformal"]
    threshold, wrong, accepted = by_loops(images, alpha)
    assert found["threshold"] == threshold and found["rejects_everything"] == (threshold is None)
    assert found["wrong_share"] == (None if wrong is None else pytest.approx(wrong, abs=1e-6))
    assert found["accepted_share"] == (None if accepted is None else pytest.approx(accepted, abs=1e-6))
    assert found["num_calibration_images"] + found["num_check_images"] == count
    assert found["alpha"] == alpha


def test_a_threshold_divides_pixels_as_the_pipeline_does():
    """Confidences at, just below and just above the levels."""
    rng = np.random.default_rng(0)
    levels = (rng.integers(0, LEVELS + 1, 4000) / LEVELS).astype(np.float32)
    up, down = np.nextafter(levels, np.float32(2)).clip(0, 1), np.nextafter(levels, np.float32(-1)).clip(0, 1)
    found = map_with_confidence(np.zeros((3, 4000), dtype=int), np.stack([levels, up, down]))
    rejection = Rejection(IGNORE)
    rejection.update(found, np.full((3, 4000), OUTSIDER), "a")
    outsiders = rejection.outsiders[::-1].cumsum()[::-1]
    for step in (0, 1, 2, 30000, LEVELS - 1, LEVELS, *rng.integers(0, LEVELS, 50)):
        assert outsiders[step] == int((~(found.confidence < int(step) / LEVELS)).sum())


def test_shares_of_images_are_rounded_up_so_that_the_promise_holds():
    rejection = Rejection(IGNORE)
    rejection.update(map_with_confidence([[0, 0, 0]], [[1.0] * 3]), np.array([[0, 0, 1]]), "a")
    share = int(rejection.wrong.max())
    assert Fraction(1, 3) <= Fraction(share, UNIT) < Fraction(1, 3) + Fraction(1, 10**7)


def test_few_images_allow_no_promise():
    """Nine images without any error may promise 10 %, eight may not: the one to come might be all wrong."""
    no_errors = np.zeros(5)
    assert conformal_threshold(no_errors, 9, 0.1) == 0
    assert conformal_threshold(no_errors, 8, 0.1) is None
    assert conformal_threshold(no_errors, 0, 0.99) is None
    result = Rejection(IGNORE).result()["conformal"]
    assert result["rejects_everything"] and result["threshold"] is None and result["wrong_share"] is None


@pytest.mark.parametrize("alpha", [0.15, 0.3])
@pytest.mark.parametrize("images", [4, 30])
def test_new_images_have_the_promised_share_of_wrong_labels_at_most(alpha, images):
    """Many draws of calibration images, of which most are easy and some all wrong, with one new image each."""
    draws, pixels = 4000, 6
    thresholds = np.arange(9) / 8
    rng = np.random.default_rng(images)
    shape = draws, images + 1, pixels
    wrong = rng.random(shape) < rng.beta(0.2, 0.5, (draws, images + 1, 1))
    confidence = np.where(wrong, rng.random(shape), rng.random(shape) ** 0.3)
    losses = (wrong[..., None] & (confidence[..., None] >= thresholds)).mean(axis=2)  # (draws, images + 1, T)
    found = []
    for *known, new in losses:
        place = conformal_threshold(UNIT * np.sum(known, axis=0), images, alpha)
        found.append(0.0 if place is None else new[place])
    error = np.std(found) / math.sqrt(draws)
    assert np.mean(found) <= alpha + 3 * error
    assert images == 4 or np.mean(found) > 0.6 * alpha  # it does not reject for safety's sake


@pytest.mark.parametrize(
    ("counter", "image"),
    [
        (lambda: SeenBiasCurve(IS_SEEN, IGNORE), lambda index: random_image(index, 3, IS_SEEN)[:2]),
        (lambda: Reliability(IGNORE), random_confidences),
        (lambda: Rejection(IGNORE), lambda index: (*random_confidences(index), f"image {index}")),
    ],
)
def test_parts_merged_in_any_order_are_the_whole(counter, image):
    whole, one, two = counter(), counter(), counter()
    for index in range(12):
        whole.update(*image(index))
        (one if index % 3 else two).update(*image(index))
    two.merge(one)
    assert two.result() == whole.result() != counter().result()
    for name, counts in vars(whole).items():
        np.testing.assert_array_equal(getattr(two, name), counts)
        assert not isinstance(counts, np.ndarray) or counts.any() and counts.dtype == vars(counter())[name].dtype


def test_the_halves_of_the_images_are_about_equal():
    assert 450 < sum(in_check_half(f"{index:012d}") for index in range(1000)) < 550


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_a_share_of_wrong_labels_must_be_a_share(alpha):
    with pytest.raises(InputError, match="alpha"):
        Rejection(IGNORE).result(alpha)
