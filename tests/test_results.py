"""What a result file says to people: every sentence, from numbers written by hand. And what its readers refuse."""

import copy
import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

import zs3.evaluation.compare as comparison
from zs3.command_line import InputError
from zs3.evaluation.choices import best_weight, chosen_bias
from zs3.evaluation.compare import CompareArgs, compare
from zs3.evaluation.figure import worst_images
from zs3.evaluation.report import protocol, report
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import read_result
from zs3.evaluation.suites import SUITES, finished, row
from zs3.label_space import LabelSpace
from zs3.release.__main__ import read_results
from zs3.release.card import model_index, tables
from zs3.scores.bootstrap import images_path
from zs3.scores.means import ADDED_SCORES
from zs3.tables import markdown_table
from zs3.typed_json import first_wrong

TESTS = Path(__file__).parent

RESULT = {
    "setting": "gzs3",
    "model": "runs/m",
    "dataset": "d",
    "split": "validation",
    "seen": ["sky", "sea"],
    "unseen": ["sun"],
    "without": [],
    "trained_on_masks_of": ["sky", "sea"],
    "unseen_labels_in_training": "pseudo",
    "image_label_precision": 0.755,
    "image_label_recall": 0.732,
    "absent": "union",
    "num_images": 40,
    "split_images": 40,
    "clip_ensemble": "off",
    "clip_ensemble_weight": None,
    "calibration": {"seen_bias": 0.0, "seen_bias_chosen": "none", "ensemble_weight_chosen": "none"},
    "protocol": "as agreed",
    "miou": 0.501,
    "miou_seen": 0.612,
    "miou_unseen": 0.203,
    "hiou": 0.304,
    "pixel_accuracy": 0.705,
    "frequency_weighted_iou": 0.606,
    "confidence_intervals": {
        "miou": [0.41, 0.59],
        "miou_seen": [0.51, 0.69],
        "miou_unseen": [0.11, 0.29],
        "hiou": [0.21, 0.39],
        "pixel_accuracy": [0.65, 0.75],
        "frequency_weighted_iou": [0.52, 0.68],
    },
    "per_class": {"sky": 0.9, "sea": 0.324, "sun": None},
    "per_class_intervals": {"sky": [0.85, 0.95], "sea": [0.2, 0.4], "sun": [None, None]},
    "seen_unseen_confusion": {
        "of_seen": {"right": 0.8, "wrong_seen": 0.1, "wrong_unseen": 0.1, "rejected": 0.0},
        "of_unseen": {"right": 0.25, "wrong_seen": 0.55, "wrong_unseen": 0.2, "rejected": 0.0},
    },
    "worst_pairs": [{"truth": "sun", "predicted": "sky", "pixels": 123, "share": 0.45}],
    "seen_unseen_curve": {"area": 0.123, "best": {"gamma": 0.5, "hiou": 0.432}},
    "reliability": {"ece": 0.067},
    "rejection": {
        "auroc": 0.712,
        "fpr_at_95": 0.345,
        "conformal": {
            "alpha": 0.1,
            "threshold": 0.36122131,
            "rejects_everything": False,
            "num_calibration_images": 18,
            "num_check_images": 22,
            "wrong_share": 0.089,
            "accepted_share": 0.777,
        },
    },
}


def changed(**fields: object) -> dict:
    return copy.deepcopy(RESULT) | fields


def test_every_number_is_told_in_its_place():
    lines = report(RESULT).splitlines()
    for line in (
        "gzs3: runs/m on 40 images of d, validation",
        "Protocol: as agreed.",
        "| mIoU(S) | 61.2 | 51.0 to 69.0 |",
        "| mIoU(U) | 20.3 | 11.0 to 29.0 |",
        "| hIoU | 30.4 | 21.0 to 39.0 |",
        "| mIoU | 50.1 | 41.0 to 59.0 |",
        "| pixel accuracy | 70.5 | 65.0 to 75.0 |",
        "| frequency-weighted IoU | 60.6 | 52.0 to 68.0 |",
        "- image labels of unseen classes in training: precision 75.5 %, recall 73.2 %",
        "- of the unseen area 25.0 % got its name, 55.0 % a seen name, 20.0 % another unseen one",
        "- area under the seen/unseen curve 12.3 %; its best hIoU, 43.2, needs a seen bias of 0.5, which was "
        "found on these images: so it is no result",
        "- expected calibration error of the confidences 6.7 %",
        "- confidence separates pixels of other classes from pixels of the candidates with an AUROC of 71.2 % (50 is "
        "chance); a threshold that accepts 95 % of the candidates' pixels accepts 34.5 % of the others",
        "- if labels with a confidence below 0.36123 are rejected, at most 10.0 % of the labelled pixels of a new "
        "image are wrong on average (chosen on 18 images); on the 22 others 8.9 % were wrong, and 77.7 % of the pixels "
        "kept a label",
        "| sun | sky | 123 | 45.0 |",
        "| sky | 90.0 | 85.0 to 95.0 |",
        "| sun (unseen) | - | - to - |",
    ):
        assert line in lines, line


def test_what_was_not_measured_is_not_told():
    parts = ("seen_unseen_confusion", "seen_unseen_curve", "reliability", "rejection")
    bare = report(changed(**dict.fromkeys(parts), miou_seen=None, miou_unseen=None, hiou=None, setting="ovs"))
    assert not [line for line in bare.splitlines() if line.startswith("- ")]
    assert "mIoU(S)" not in bare and "(unseen)" not in bare and "| mIoU | 50.1 |" in bare
    nothing = changed()
    nothing["rejection"] |= {"auroc": None}
    nothing["rejection"]["conformal"] |= {"rejects_everything": True, "threshold": None}
    del nothing["image_label_precision"], nothing["image_label_recall"]  # as in a file of an older version
    told = report(nothing)
    assert "image labels of unseen classes in training" not in told
    assert "AUROC" not in told
    assert "- 18 images are too few, or too wrong, for a threshold with at most 10.0 % wrong labels" in told


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {},
            "gzs3, 2 seen and 1 unseen names; no ensemble; training had pseudo image labels of unseen classes; "
            "classes absent from truth and prediction are left out of means",
        ),
        ({"without": ["a b", "c"]}, "; without a b, c; "),
        ({"split_images": 50}, "; the first 40 of 50 images; "),
        ({"absent": "truth"}, "; classes absent from the truth are left out of means"),
        ({"setting": "zs3"}, "zs3, 1 unseen names; "),
        (
            {"setting": "ovs", "trained_on_masks_of": ["Sky"]},
            "ovs, 3 names; no ensemble; training saw masks of 1 of them; ",
        ),
        (
            {"calibration": {"seen_bias_chosen": "none", "ensemble_weight_chosen": "chosen on 3 images"}},
            "; no ensemble (chosen on 3 images); training had",
        ),
        ({"unseen_labels_in_training": None}, "; it is not known which image labels of unseen classes training had; "),
        (
            {
                "clip_ensemble": "crops",
                "clip_ensemble_weight": 0.7,
                "calibration": {
                    "seen_bias": 0.25,
                    "seen_bias_chosen": "as it came",
                    "ensemble_weight_chosen": "the checkpoint's",
                },
            },
            "; ensemble with CLIP (crops, weight 0.7, the checkpoint's); 0.25 off the scores of seen classes, as it",
        ),
    ],
)
def test_the_protocol_says_what_changes_the_meaning_of_a_number(fields, told):
    assert told in protocol(changed(**fields))


def test_a_bar_in_a_cell_ends_no_cell():
    assert markdown_table(["class", "IoU"], [["a | b", "1.0"]]) == [
        "| class | IoU |",
        "| --- | --- |",
        r"| a \| b | 1.0 |",
    ]


# ---- files whose fields are of other types than they should ------------------------------------------------

OF_LAZY = {"ensemble_tolerance", "proposals_shown_to_clip", "undecided_share"}  # keys that nothing reads now
NUMBERS = [True, "0.5", [0.5], {"a": 0.5}, [[[0.5]]], None, math.nan, math.inf, -math.inf, -1, 1.5, 10**30, 1e300]
OTHERS = [True, 1, 0.5, "text", ["text", 1], {"a": 1}, {"a": ["text"]}, [[["text"]]], None, math.nan]
MAY_BE_NONE = {  # by the last name of the way there
    *("checkpoint_sha256", "settings_sha256", "code_sha256", "trained_on_masks_of", "unseen_labels_in_training"),
    *("miou", "miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "frequency_weighted_iou", "area", "best", "right"),
    *("wrong_seen", "wrong_unseen", "rejected", "seen_unseen_confusion", "seen_unseen_curve", "reliability", "ece"),
    *("rejection", "confidence", "accuracy", "auroc", "threshold_at_95", "fpr_at_95", "threshold", "wrong_share"),
    *("accepted_share", "low", "high", "grass"),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """The result that c24e825 wrote."""
    folder = tmp_path_factory.mktemp("old")
    shutil.unpack_archive(TESTS / "fixtures" / "c24e825.zip", folder)
    return folder / "result" / "gzs3.json"


def ways(value: object, way: tuple = ()) -> Iterator[tuple]:
    """To every field of a mapping at whatever depth, and to the first item of every list."""
    if isinstance(value, dict):
        chosen = [*value][:2] if way[:1] in [("per_class",), ("per_class_intervals",)] else value
        for name in chosen:
            yield (*way, name)
            yield from ways(value[name], (*way, name))
    elif isinstance(value, list) and value:
        yield (*way, 0)
        yield from ways(value[0], (*way, 0))


def at(value: object, way: tuple) -> object:
    for step in way:
        value = value[step]
    return value


def shorten(curve: dict) -> None:
    """To the first of its points and the best one, for the sake of time."""
    best = curve["points"]["gamma"].index(curve["best"]["gamma"])
    curve["points"] = {name: [column[0], column[best]] for name, column in curve["points"].items()}


def mutations(content: dict, numbers: list = NUMBERS) -> Iterator[tuple[tuple, dict]]:
    """Every field of a file, one at a time, with values of other types or outside its range."""
    for way in ways(content):
        before = at(content, way)
        is_number = type(before) in (int, float)
        for value in numbers if is_number else OTHERS:
            if type(value) is type(before) and not is_number or value is None and way[-1] in MAY_BE_NONE:
                continue
            if way[0] == "settings" and not isinstance(value, dict):
                continue  # any flag may be there: other flags are another evaluation, which no reader shows
            mutated = copy.deepcopy(content)
            at(mutated, way[:-1])[way[-1]] = value
            yield way, mutated


def read_by_compare(path: Path, content: dict, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(comparison, "RESAMPLES", 3)
    return comparison.report(compare(CompareArgs(str(path), str(path))))


def read_by_release(path: Path, content: dict, monkeypatch: pytest.MonkeyPatch) -> object:
    results = read_results([str(path)], content["checkpoint_sha256"], content["settings_sha256"])
    return tables(results, "0" * 64), [vars(entry) for result in results for entry in model_index(result)]


def read_by_figure(path: Path, content: dict, monkeypatch: pytest.MonkeyPatch) -> object:
    ids = ["00000", "00001", "00002"]
    space = LabelSpace(list(content["per_class"]), content["unseen"])
    return worst_images(SimpleNamespace(label_space=space, image_ids=ids), "validation", path, 3)


def read_by_seen_bias(path: Path, content: dict, monkeypatch: pytest.MonkeyPatch) -> object:
    stamp = {name: content[name] for name in ("unseen", "dataset", "split")}
    return chosen_bias(str(path), stamp, ["00000", "x"])


def read_by_suite(path: Path, content: dict, monkeypatch: pytest.MonkeyPatch) -> object:
    names = ("setting", "model", "dataset", "split", "seen", "unseen", "without", "settings", "versions")
    settings = {name: value for name, value in content["settings"].items() if name != "ensemble_tolerance"}
    result = finished(path, {name: content[name] for name in names} | {"settings": settings})
    return None if result is None else row(SUITES["gzs3"], Path("nowhere"), {"voc_20": result}, {})


READERS = [read_by_compare, read_by_release, read_by_figure, read_by_seen_bias, read_by_suite]


@pytest.mark.parametrize("place", range(len(READERS)), ids=[reader.__name__ for reader in READERS])
def test_a_field_of_a_wrong_type_changes_nothing_or_is_one_line(old, tmp_path, monkeypatch, place):
    """Each command reads every field with a fifth of the wrong values: it refuses the file, or says what it said."""
    content, path, reader = json.loads(old.read_text()), tmp_path / "gzs3.json", READERS[place]
    shorten(content["seen_unseen_curve"])
    images_path(path).write_bytes(images_path(old).read_bytes())
    path.write_text(json.dumps(content))
    whole, refused = reader(path, content, monkeypatch), 0
    for way, mutated in islice(mutations(content), place, None, len(READERS)):
        path.write_text(json.dumps(mutated))
        try:
            found = reader(path, content, monkeypatch)
        except InputError as error:
            message = str(error)
            assert "gzs3" in message and len(message) <= 200 and message.isprintable(), (way, message)
            refused += 1
        else:
            assert found in (whole, None), (way, at(mutated, way))
    assert refused > 230  # of the suite's reader, a file that is no JSON is one that is not there


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("miou", True, "miou is true, not a number"),
        ("miou", 42.0, "miou is 42.0, not a share in"),
        ("confidence_intervals", {"miou": [0.5, 0.4]}, "confidence_intervals.miou is a list, not [low, high]"),
        ("confidence_intervals", {"miou": [0.5, None]}, "confidence_intervals.miou is a list, not [low, high]"),
        ("confidence_intervals", {"miou": [0.1, 0.2, 0.3]}, "confidence_intervals.miou is a list, not [low, high]"),
        ("setting", "gzs4", "setting is 'gzs4', not 'gzs3', 'zs3' or 'ovs'"),
        ("per_class", {"sky": 0.5}, "per_class and per_class_intervals have different names"),
        ("seen", ["sky"], "'blue heart' of per_class is neither in seen nor in unseen"),
        ("unseen", ["Sky "], "names repeat: 'sky' and 'Sky ' are one name"),
        ("seen", ["a\nb"], "a name must be one line"),
        ("without", ["sky"], "'sky' is in without and in per_class"),
        ("split_images", 2, "num_images is more than split_images"),
        ("clip_ensemble_weight", None, "do not agree on whether there is an ensemble"),
        ("clip_ensemble", "off", "do not agree on whether there is an ensemble"),
        ("calibration", {"seen_bias": 0.5, "seen_bias_chosen": "none"}, "a seen_bias, but says that none was chosen"),
    ],
)
def test_what_a_result_cannot_be_is_told(old, tmp_path, field, value, words):
    path = tmp_path / "gzs3.json"
    path.write_text(json.dumps(json.loads(old.read_text()) | {field: value}))
    with pytest.raises(InputError) as refused:
        read_result(path)
    assert "gzs3.json: " in str(refused.value) and words in str(refused.value)
    assert len(str(refused.value)) <= 200 and "evaluate again" in str(refused.value)


def test_a_curve_must_have_the_best_of_its_points(old, tmp_path, monkeypatch):
    content, path = json.loads(old.read_text()), tmp_path / "gzs3.json"
    images_path(path).write_bytes(images_path(old).read_bytes())
    path.write_text(json.dumps(content))
    assert read_by_seen_bias(path, content, monkeypatch).value == content["seen_unseen_curve"]["best"]["gamma"]
    content["seen_unseen_curve"]["points"]["of a later version"] = 5
    path.write_text(json.dumps(content))
    assert read_by_seen_bias(path, content, monkeypatch).value == content["seen_unseen_curve"]["best"]["gamma"]
    content["seen_unseen_curve"]["best"]["gamma"] = 0.0
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="gzs3.json: seen_unseen_curve.best is not the best of its points"):
        read_by_seen_bias(path, content, monkeypatch)


@pytest.mark.parametrize("lost", ["dataset", "split", "seen", "unseen", "trained_on_masks_of"])
def test_a_bias_needs_what_says_what_its_choice_knew(old, tmp_path, monkeypatch, lost):
    content, path = json.loads(old.read_text()), tmp_path / "gzs3.json"
    path.write_text(json.dumps({name: value for name, value in content.items() if name != lost}))
    with pytest.raises(InputError, match=f"gzs3.json is no result file of eval.py, it lacks '{lost}'"):
        read_by_seen_bias(path, content, monkeypatch)


@pytest.mark.parametrize("lost", ["calibration.seen_bias", "confidence_intervals.hiou", "protocol", "prompts"])
def test_a_card_needs_keys_also_inside_of_others(old, tmp_path, monkeypatch, lost):
    content, path = json.loads(old.read_text()), tmp_path / "gzs3.json"
    mutated = copy.deepcopy(content)
    *way, last = lost.split(".")
    del at(mutated, tuple(way))[last]
    path.write_text(json.dumps(mutated))
    with pytest.raises(InputError, match=f"gzs3.json is no result file of eval.py, it lacks '{lost}'"):
        read_by_release(path, content, monkeypatch)


def test_areas_beside_a_result_must_be_those_of_its_numbers(old, tmp_path, monkeypatch):
    """Or "tuned on the test images", and the worst images, would be told of another evaluation."""
    content, path = json.loads(old.read_text()), tmp_path / "gzs3.json"
    images_path(path).write_bytes(images_path(old).read_bytes())
    others = ({"per_class": content["per_class"] | {"sky": 0.5}}, {"num_images": 2, "split_images": 2})
    for reader in (read_by_compare, read_by_figure, read_by_seen_bias):
        for other in others:
            path.write_text(json.dumps(content | other))
            with pytest.raises(InputError, match="gzs3_images.npz was not written with .*gzs3.json: .*evaluate again"):
                reader(path, content, monkeypatch)


RESULTS = TESTS.parent / "docs" / "results"
LATER = {"things", "image_label_precision", "image_label_recall", *ADDED_SCORES}  # keys that older versions lack


def test_a_result_of_this_version_has_every_key():
    content = json.loads((RESULTS / "zs3-scenes.json").read_text())
    assert read_result(RESULTS / "zs3-scenes.json") == content and content.keys() == Result.__annotations__.keys()


@pytest.mark.parametrize("path", [RESULTS / "first_edition" / "zs3-scenes.json", None])
def test_results_of_older_versions_are_read_as_they_are(old, path):
    path = path or old
    content = json.loads(path.read_text())
    assert read_result(path) == content and content.keys() == (Result.__annotations__.keys() - LATER) | OF_LAZY
    for later in ("code_sha256", "given_sha256"):  # as of a version before they were written
        del content[later]
        assert first_wrong(content, Result) is None


def test_a_result_of_the_view_lazy_is_read_compared_and_shown(old, tmp_path, monkeypatch):
    """That view is gone; its results are not."""
    content, path = json.loads(old.read_text()) | {"clip_ensemble": "lazy"}, tmp_path / "gzs3.json"
    images_path(path).write_bytes(images_path(old).read_bytes())
    path.write_text(json.dumps(content))
    assert read_result(path) == content and "ensemble with CLIP (lazy, weight 0.8" in protocol(content)
    table, _ = read_by_release(path, content, monkeypatch)
    assert "lazy, w = 0.8" in table
    compared = compare(CompareArgs(str(old), str(path)))["scores"]
    assert compared["hiou"]["difference"] == 0


@pytest.mark.parametrize(("tolerance", "is_finished"), [(0.0, True), (0.1, False)])
def test_a_suites_result_of_before_is_known_where_the_evaluation_is_the_same(old, tmp_path, tolerance, is_finished):
    content, path = json.loads(old.read_text()), tmp_path / "gzs3.json"
    content["settings"]["ensemble_tolerance"] = tolerance
    path.write_text(json.dumps(content))
    today = {name: value for name, value in content["settings"].items() if name != "ensemble_tolerance"}
    stamp = {name: content[name] for name in ("setting", "model", "split_sha256")}
    assert (finished(path, stamp | {"settings": today}) is not None) == is_finished
    assert finished(path, stamp | {"settings": today | {"absent": "truth"}}) is None
    assert finished(path, stamp | {"settings": today, "model": "another"}) is None


def test_an_answer_of_ensemble_weight_with_a_field_of_a_wrong_type_is_one_line(tmp_path):
    path, stamp = tmp_path / "weight.json", {"checkpoint_sha256": "0", "dataset": "d", "split": "validation"}
    answer = {"clip_ensemble_weight": 0.6, "weights": {"0.6": {"score": 0.5}}, "image_ids": ["a"], "dataset": "d"}
    answer |= {"checkpoint_sha256": "0", "settings": {"split": "train", "unseen_labels": "runs/pseudo_labels"}}
    path.write_text(json.dumps(answer))
    assert best_weight(path, stamp, ["a"]).value == 0.6
    cases = list(mutations(answer, NUMBERS[:6] + NUMBERS[9:]))
    for way, mutated in cases:
        path.write_text(json.dumps(mutated))
        if way in [("checkpoint_sha256",), ("weights", "0.6", "score"), ("clip_ensemble_weight",)]:
            wrong = at(mutated, way)
            if wrong is None or way[0] == "weights" and type(wrong) in (int, float):
                continue
        with pytest.raises(InputError) as refused:
            best_weight(path, stamp, ["a"])
        message = str(refused.value)
        assert "weight.json" in message and len(message) <= 200 and message.isprintable(), (way, message)
    assert len(cases) > 60
