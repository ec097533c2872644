"""What a result file says to people: every sentence, from numbers written by hand."""

import copy

import pytest

from zs3.command_line import InputError
from zs3.results import markdown_table, protocol, read_result, report

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
        "- of the unseen area 25.0 % got its name, 55.0 % a seen name, 20.0 % another unseen one",
        "- area under the seen/unseen curve 12.3 %; its best hIoU, 43.2, is at a bias of 0.5 off seen classes: found "
        "on these images, so it is no result",
        "- expected calibration error of the confidences 6.7 %",
        "- confidence tells pixels of other classes from the candidates' with an AUROC of 71.2 % (50 is chance); "
        "34.5 % of them are accepted where 95 % of the candidates' are",
        "- labels with a confidence below 0.36123 rejected: at most 10.0 % of the labelled pixels of a new image are "
        "wrong, on average (chosen on 18 images); on the 22 others 8.9 % were, and 77.7 % kept a label",
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
    told = report(nothing)
    assert "AUROC" not in told
    assert "- 18 images are too few, or too wrong, for a threshold with at most 10.0 % wrong labels" in told


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {},
            "gzs3, 2 seen and 1 unseen names; no ensemble; training was told pseudo image labels of unseen classes; "
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
            "; no ensemble (chosen on 3 images); training was told",
        ),
        ({"unseen_labels_in_training": None}, "; training was told what is not known of unseen classes; "),
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


def test_a_file_that_is_no_result_is_one_line(tmp_path):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "other.json").write_text("[1]")
    for name, words in {"none": "cannot read", "text": "is no JSON", "other": "is no result file"}.items():
        with pytest.raises(InputError, match=f"{words}"):
            read_result(tmp_path / f"{name}.json")


def test_a_bar_in_a_cell_ends_no_cell():
    assert markdown_table(["class", "IoU"], [["a | b", "1.0"]]) == [
        "| class | IoU |",
        "| --- | --- |",
        r"| a \| b | 1.0 |",
    ]
