"""The comparison of two results: against a bootstrap written as loops, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from zs3.command_line import InputError
from zs3.evaluation.compare import BETTER, OPEN, WORSE, CompareArgs, compare, main, report, verdict
from zs3.files import finite_or_none
from zs3.scores.bootstrap import images_path
from zs3.scores.confusion import ConfusionMatrix

NAMES, UNSEEN = ["sky", "grass", "cow", "boat"], ["cow", "boat"]
IGNORE = 255
IDS = [f"{index:03d}" for index in range(32)]
A, B = (1, 0.5), (2, 0.75)  # seed and share of right pixels of two models
SCORES = ["miou_seen", "miou_unseen", "hiou", "miou", "pixel_accuracy", "frequency_weighted_iou"]
OF_PIXELS = SCORES[4:]


def draw_images(seed: int, right: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps of 4 x 5 pixels; the same truth for every share of pixels that are right."""
    truth, noise = np.random.default_rng(0), np.random.default_rng(seed)
    pairs = []
    for _ in IDS:
        label = truth.choice([*truth.integers(0, 4, 3), IGNORE], (4, 5))
        prediction = np.where(noise.random(label.shape) < right, label % 4, noise.integers(0, 4, label.shape))
        pairs.append((prediction, label))
    return pairs


def write_result(path: Path, pairs, ids=IDS, names=NAMES, is_seen=None, **fields: object) -> str:
    """The files of one evaluation, with the fields that a comparison reads. Older versions had no is_seen."""
    confusion = ConfusionMatrix(len(names), IGNORE, is_seen)
    for (prediction, label), image_id in zip(pairs, ids, strict=True):
        confusion.update(prediction, label, image_id)
    result = {
        "model": f"runs/{path.stem}",
        "dataset": "scenes",
        "split": "validation",
        "label_space_sha256": "0123",
        "setting": "gzs3",
        "absent": "union",
        "seen": [name for name in names if name not in UNSEEN],
        "unseen": [name for name in names if name in UNSEEN],
    }
    result |= fields
    iou = confusion.iou(result["absent"])
    result |= {"miou": float(np.nanmean(iou)), "per_class": dict(zip(names, iou.tolist(), strict=True))}
    path.write_text(json.dumps(finite_or_none(result)))
    confusion.save_images(images_path(path), names)
    return str(path)


def titled(result: dict) -> list[str]:
    """The scores' names, as the printed table has them from above."""
    return [row.split(" | ")[0].removeprefix("| ") for row in report(result).split("\n\n")[2].splitlines()[2:]]


@pytest.fixture
def two(tmp_path) -> tuple[str, str]:
    """B is right more often."""
    return (
        write_result(tmp_path / "a.json", draw_images(*A)),
        write_result(tmp_path / "b.json", draw_images(*B)),
    )


def areas_of_sets(prediction, label) -> np.ndarray:
    """(3, C): of every class the pixels in both maps, in either and in the truth, from its sets of pixels."""
    truth, predicted = ([set() for _ in NAMES] for _ in range(2))
    for pixel in np.ndindex(label.shape):
        if label[pixel] != IGNORE:
            truth[label[pixel]].add(pixel)
            predicted[prediction[pixel]].add(pixel)
    return np.array(
        [
            [len(t & p) for t, p in zip(truth, predicted, strict=True)],
            [len(t | p) for t, p in zip(truth, predicted, strict=True)],
            [len(t) for t in truth],
        ]
    )


def scores_of(images: list[np.ndarray]) -> np.ndarray:
    """The six scores, then the IoU of each class."""
    both, either, truth = sum(images[1:], start=images[0])
    iou = both / either
    seen, unseen = iou[:2].mean(), iou[2:].mean()
    means = [seen, unseen, 2 * seen * unseen / (seen + unseen), iou.mean()]
    return np.array([*means, both.sum() / truth.sum(), (iou * truth / truth.sum()).sum(), *iou])


def test_differences_and_intervals_equal_a_paired_bootstrap_written_as_loops(two):
    a, b = ([areas_of_sets(*pair) for pair in draw_images(*model)] for model in (A, B))
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(4000):
        places = rng.integers(0, len(IDS), len(IDS))
        drawn.append(scores_of([b[place] for place in places]) - scores_of([a[place] for place in places]))
    intervals = np.quantile(drawn, [0.025, 0.975], axis=0).T
    result = compare(CompareArgs(*two))
    rows = [*result["scores"].values(), *result["per_class"].values()]
    assert (
        list(result["scores"]) == SCORES
        and titled(result) == ["mIoU(S)", "mIoU(U)", "hIoU", "mIoU", "pixel accuracy", "frequency-weighted IoU"]
        and list(result["per_class"]) == NAMES
    )
    np.testing.assert_allclose([row["a"] for row in rows], scores_of(a))
    np.testing.assert_allclose([row["b"] for row in rows], scores_of(b))
    np.testing.assert_allclose([row["difference"] for row in rows], scores_of(b) - scores_of(a))
    np.testing.assert_allclose([row["interval"] for row in rows], intervals, atol=0.015)  # two random draws
    assert np.ptp(intervals, axis=1).min() > 0.1


def iou_of_loops(pixels: list[tuple[int, int]], index: int) -> float:
    """pixels: (prediction, truth)."""
    both = sum(prediction == truth == index for prediction, truth in pixels)
    return both / sum(index in pair for pair in pixels)


def groups_of_loops(pairs) -> dict[str, float]:
    """Of sky and grass on their own pixels; of cow and sky, the things; of the others."""
    pixels = [pair for maps in pairs for pair in zip(*(own.ravel().tolist() for own in maps), strict=True)]
    pixels = [pair for pair in pixels if pair[1] != IGNORE]
    on_seen = [pair for pair in pixels if pair[1] in (0, 1)]
    return {
        "miou_seen_on_seen_pixels": np.mean([iou_of_loops(on_seen, index) for index in (0, 1)]),
        "miou_things": np.mean([iou_of_loops(pixels, index) for index in (0, 2)]),
        "miou_stuff": np.mean([iou_of_loops(pixels, index) for index in (1, 3)]),
    }


def test_groups_are_compared_where_both_results_have_their_areas(tmp_path):
    """An older result has neither the areas on seen pixels nor the names of the things."""
    images = draw_images(*A), draw_images(*B)
    new = {"is_seen": [True, True, False, False], "things": ["cow", "sky"]}
    a, b = (write_result(tmp_path / f"{name}.json", own, **new) for name, own in zip("ab", images, strict=True))
    found = compare(CompareArgs(a, b))["scores"]
    assert list(found) == [*SCORES[:4], *groups_of_loops(images[0]), *OF_PIXELS]
    for letter, own in zip("ab", images, strict=True):
        for name, value in groups_of_loops(own).items():
            assert found[name][letter] == pytest.approx(value)
            low, high = found[name]["interval"]
            assert low < found[name]["difference"] < high
    older = write_result(tmp_path / "older.json", images[1])
    for files in ((a, older), (older, a)):
        assert list(compare(CompareArgs(*files))["scores"]) == [*SCORES[:4], "miou_things", "miou_stuff", *OF_PIXELS]
    other = write_result(tmp_path / "other.json", images[1], **new | {"things": ["cow"]})
    assert list(compare(CompareArgs(a, other))["scores"]) == [*SCORES[:4], "miou_seen_on_seen_pixels", *OF_PIXELS]
    ovs = [write_result(tmp_path / f"ovs{at}.json", own, setting="ovs", **new) for at, own in enumerate(images)]
    assert list(compare(CompareArgs(*ovs))["scores"]) == ["miou", "miou_things", "miou_stuff", *OF_PIXELS]


def test_the_same_file_twice_differs_by_exactly_nothing(two):
    result = compare(CompareArgs(two[0], two[0]))
    for row in [*result["scores"].values(), *result["per_class"].values()]:
        assert row["difference"] == 0 and row["interval"] == [0, 0] and row["a"] == row["b"]
    assert {row["verdict"] for row in result["scores"].values()} == {OPEN}


def test_the_order_of_the_images_makes_no_difference(two, tmp_path):
    other = write_result(tmp_path / "other.json", draw_images(*A)[::-1], IDS[::-1])
    assert all(row["interval"] == [0, 0] for row in compare(CompareArgs(two[0], other))["scores"].values())


def test_swapped_files_give_the_negative(two):
    forth, back = compare(CompareArgs(*two)), compare(CompareArgs(*reversed(two)))
    for kind in ("scores", "per_class"):
        for name, row in forth[kind].items():
            low, high = back[kind][name]["interval"]
            assert row["difference"] == -back[kind][name]["difference"]
            np.testing.assert_allclose(row["interval"], [-high, -low], atol=1e-12)
    assert forth["scores"]["miou"]["verdict"] == BETTER and back["scores"]["miou"]["verdict"] == WORSE


def test_a_small_gain_on_every_image_is_told_though_the_images_differ_widely(tmp_path):
    """The two models' own intervals overlap nearly wholly; in pairs the gain is plain."""
    rng = np.random.default_rng(5)
    pairs = {"a": [], "b": []}
    for _ in IDS:
        label, wrong = np.repeat([0, 2], 50)[None], int(rng.integers(5, 45))
        for name, fewer in (("a", 0), ("b", int(rng.integers(1, 3)))):
            prediction = label.copy()
            prediction[0, : wrong - fewer] = 1  # B's gain is one pixel of 50, or two
            prediction[0, 50 : 50 + wrong - fewer] = 3
            pairs[name].append((prediction, label))
    files = [write_result(tmp_path / f"{name}.json", own) for name, own in pairs.items()]
    row = compare(CompareArgs(*files))["scores"]["miou"]
    assert row["verdict"] == BETTER and 0 < row["interval"][0] < row["difference"] < row["interval"][1]
    matrix = ConfusionMatrix(4, IGNORE)
    for prediction, label in pairs["a"]:
        matrix.update(prediction, label)
    low, high = matrix.bootstrap([True, True, False, False]).intervals()["miou"]
    assert high - low > 10 * (row["interval"][1] - row["interval"][0])


def test_the_seed_draws_other_resamples_and_repeats(two):
    first, again, other = (compare(CompareArgs(*two, seed=seed)) for seed in (0, 0, 1))
    assert first == again and first["scores"] != other["scores"]


def test_other_label_maps_of_the_same_images_are_refused(two, tmp_path):
    pairs = draw_images(*B)
    pairs[3][1][0, 0] = (pairs[3][1][0, 0] + 1) % 4
    other = write_result(tmp_path / "other.json", pairs)
    with pytest.raises(InputError, match="differ in the label maps of their images"):
        compare(CompareArgs(two[0], other))


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.1, 0.2), BETTER), ((-0.2, -0.1), WORSE), ((-0.1, 0.2), OPEN), ((0.0, 0.2), OPEN), ((None, None), OPEN)],
)
def test_the_verdict_is_what_the_interval_says(interval, words):
    assert verdict(*interval, 30) == words
    assert verdict(*interval, 29) == "no verdict: 29 images are too few"


def test_scores_that_a_setting_lacks_are_left_out(tmp_path):
    pairs = [(prediction % 2, np.where(label == IGNORE, label, label % 2)) for prediction, label in draw_images(*A)]
    zs3 = write_result(tmp_path / "zs3.json", pairs, names=UNSEEN, setting="zs3")
    assert list(compare(CompareArgs(zs3, zs3))["scores"]) == ["miou_unseen", "miou", *OF_PIXELS]
    ovs = write_result(tmp_path / "ovs.json", draw_images(*A), setting="ovs")
    result = compare(CompareArgs(ovs, ovs))
    assert list(result["scores"]) == ["miou", *OF_PIXELS]
    assert titled(result) == ["mIoU", "pixel accuracy", "frequency-weighted IoU"] and "(unseen)" not in report(result)


def test_a_class_that_is_nowhere_has_no_difference(tmp_path):
    pairs = [(prediction % 3, np.where(label == 3, IGNORE, label)) for prediction, label in draw_images(*A)]
    path = write_result(tmp_path / "a.json", pairs)
    result = compare(CompareArgs(path, path))
    assert result["per_class"]["boat"] == {"a": None, "b": None, "difference": None, "interval": [None, None]}
    worse = write_result(tmp_path / "b.json", [(np.full_like(prediction, 0), label) for prediction, label in pairs])
    table = report(compare(CompareArgs(path, worse))).split("| class |")[1].splitlines()
    assert table[5] == "| boat (unseen) | - | - | - | - |"  # after the losses


def test_the_command_prints_what_it_writes(two, tmp_path, call):
    output = tmp_path / "new" / "compare.json"
    printed = call(main, *two, "--output", output).out
    result = json.loads(output.read_text())
    assert printed == output.with_suffix(".md").read_text() == report(result)
    assert result == compare(CompareArgs(*two)) and (result["resamples"], result["num_images"]) == (1000, 32)
    row = result["scores"]["hiou"]
    low, high = (f"{100 * bound:+.2f}" for bound in row["interval"])
    shown = f"| hIoU | {100 * row['a']:.1f} | {100 * row['b']:.1f} | {100 * row['difference']:+.2f} | {low} to {high} |"
    assert f"{shown} {row['verdict']} |" in printed
    rows = printed.split("| class |")[1].splitlines()[2:6]
    classes = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    gains = {f"{name} (unseen)" * (name in UNSEEN) or name: r["difference"] for name, r in result["per_class"].items()}
    assert classes == sorted(gains, key=gains.get, reverse=True)
    assert "not corrected for their number" in printed


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": "voc"}, "differ in the dataset, scenes and voc"),
        ({"split": "test"}, "differ in the split, validation and test"),
        ({"label_space_sha256": "4567"}, "differ in the label space"),
        ({"setting": "ovs"}, "differ in the setting, gzs3 and ovs"),
        ({"absent": "truth"}, "differ in the rule for absent classes, union and truth"),
    ],
)
def test_results_of_two_protocols_are_refused(two, tmp_path, fields, words):
    other = write_result(tmp_path / "other.json", draw_images(*B), **fields)
    with pytest.raises(InputError, match=words):
        compare(CompareArgs(two[0], other))


def test_results_with_other_candidates_are_refused_by_their_names(two, tmp_path):
    def refused(other: str, words: str) -> None:
        for files in ((two[0], other), (other, two[0])):
            with pytest.raises(InputError, match=f"differ in the {words}: evaluate both with the same names"):
                compare(CompareArgs(*files))

    pairs = [(prediction % 3, np.where(label == 3, IGNORE, label)) for prediction, label in draw_images(*A)]
    few = write_result(tmp_path / "few.json", pairs, names=NAMES[:3], without=["boat"])
    refused(few, "candidates, 'boat' in one alone")
    other_order = write_result(tmp_path / "order.json", draw_images(*A), names=["sky", "grass", "boat", "cow"])
    refused(other_order, "candidates, in their order")
    kinds = {"seen": ["sky", "grass", "cow"], "unseen": ["boat"]}
    refused(write_result(tmp_path / "kinds.json", draw_images(*A), **kinds), "seen candidates, 'cow' in one alone")
    renamed = write_result(tmp_path / "renamed.json", draw_images(*A), names=["sky", "grass", "boar", "goat"])
    refused(renamed, "candidates, 'boar', 'boat', 'cow' in one alone")


def test_candidates_that_are_not_those_of_seen_and_unseen_are_refused(two, tmp_path):
    other = write_result(tmp_path / "other.json", draw_images(*B), seen=["sky", "grass", "sea"])
    with pytest.raises(InputError, match="other.json: per_class has other names than seen and unseen"):
        compare(CompareArgs(two[0], other))


def test_a_difference_is_told_in_a_line_however_long_the_names_and_paths_are(two, tmp_path):
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    names = [name * 40 for name in NAMES]
    long = write_result(folder / "a.json", draw_images(*A), names=names, dataset="d" * 300)
    same = write_result(folder / "b.json", draw_images(*A), names=names)
    few = write_result(folder / "c.json", draw_images(*A)[:-1], [f"{image_id}x" * 40 for image_id in IDS[:-1]])
    for other in (long, same, few):
        with pytest.raises(InputError) as refused:
            compare(CompareArgs(two[0], other))
        assert len(str(refused.value)) <= 200 and "a.json" in str(refused.value)


def test_the_protocols_are_shown_where_the_files_have_them(two, tmp_path):
    tuned = "gzs3, bias 0.07 off seen classes, TUNED ON THE TEST IMAGES"
    other = write_result(tmp_path / "other.json", draw_images(*B), protocol=tuned)
    result = compare(CompareArgs(two[0], other))
    assert (result["a"]["protocol"], result["b"]["protocol"]) == (None, tuned)
    lines = report(result).splitlines()
    assert lines[lines.index(f"- B: {other} (runs/other)") + 1] == f"  - {tuned}" and "None" not in "".join(lines)
    assert lines.index(f"- B: {other} (runs/other)") == lines.index(f"- A: {two[0]} (runs/a)") + 1


def test_label_space_and_image_labels_are_shown_where_the_files_have_them(tmp_path):
    """The space as it was asked for; labels of unseen classes say nothing where no claim is made."""
    labels = {"image_label_precision": 0.751, "image_label_recall": 0.5, "label_space": "scenes:3"}
    for setting, lines in (("gzs3", 2), ("ovs", 0)):
        paths = [
            write_result(tmp_path / f"{setting}_{name}.json", draw_images(*A), setting=setting, **labels)
            for name in ("one", "other")
        ]
        text = report(compare(CompareArgs(*paths)))
        assert "(validation, label space scenes:3)" in text
        assert text.count("  - image labels of unseen classes in training: precision 75.1 %, recall 50.0 %") == lines


def test_results_on_other_images_are_refused(two, tmp_path):
    few = write_result(tmp_path / "few.json", draw_images(*A)[:-2], IDS[:-2])
    for files, where in (((two[0], few), "a.json"), ((few, two[0]), "a.json")):
        with pytest.raises(InputError, match=rf"2 images are not in both results \('030' is in .*{where} alone\)"):
            compare(CompareArgs(*files))


def test_images_that_cannot_be_paired_are_refused(two, tmp_path):
    for ids, words in (([*IDS[:-1], None], "without an id"), ([*IDS[:-1], IDS[0]], "image '000' twice")):
        path = write_result(tmp_path / "other.json", draw_images(*A), ids)
        with pytest.raises(InputError, match=words):
            compare(CompareArgs(two[0], path))


@pytest.mark.parametrize("text", ["", "[]", '{"miou": 0.5}', "\x80"])
def test_what_is_no_result_file_is_refused(two, tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match="other.json"):
        compare(CompareArgs(two[0], str(tmp_path / "other.json")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give two result files of eval.py"),
        (["a.json"], "give two result files of eval.py"),
        (["--b", "b.json"], "give two result files of eval.py"),
        (["no.json", "no.json"], "cannot read no.json"),
        (["a.json", "b.json", "c.json"], "unexpected argument 'c.json'"),
        (["a.json", "b.json", "--seed", "-1"], "--seed must be 0 or more"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(tmp_path, monkeypatch, words, message, call):
    monkeypatch.chdir(tmp_path)
    ended = call(main, *words)
    assert message in ended.refusal and len(ended.err.splitlines()) == 1
