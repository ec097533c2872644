"""Result files of an evaluation.

FILE.json has the scores, in [0, 1], with what a reader needs to know how they came about: a `Result`. Beside it lie
FILE.md for people, FILE.csv with a line a class, and FILE_images.npz with the areas of every image, which zs3.compare
needs. Every command reads them with `read_result` and `read_images`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Required

import numpy as np
from typing_extensions import TypedDict

from configuration_zs3 import among, check_names, shortened
from zs3.command_line import InputError, shown
from zs3.scores.bootstrap import SavedImages, images_path, load_images, summed_areas
from zs3.scores.calibration import best_point
from zs3.scores.means import Absent, iou_of_areas
from zs3.typed_json import Amount, Count, Damaged, Share, check_needed, read_json, refusal, rule

RESULT_FILE, EVALUATE_AGAIN = "result file of eval.py", "move it away and evaluate again"


# ---- what a result file holds ------------------------------------------------------------------------------


# Confidences are sums of float32: a mean of them may exceed 1 by its rounding.
RoundedShare = Annotated[float, rule("a share in [0, 1]", lambda value: 0 <= value <= 1 + 1e-6)]
Interval = Annotated[
    list[Share | None],
    rule("[low, high] or [null, null]", lambda value: value == [None, None] or _is_interval(value)),
]


def _is_interval(value: list[float | None]) -> bool:
    return len(value) == 2 and None not in value and value[0] <= value[1]


class Calibration(TypedDict, total=False):
    """What was taken off the scores of seen classes, and who chose it and the weight of the ensemble, in words."""

    seen_bias: float
    seen_bias_chosen: str
    ensemble_weight_chosen: str


class Scores(TypedDict, total=False):
    """Of one bias; None where there is no class to take the mean over."""

    miou: Share | None
    miou_seen: Required[Share | None]
    miou_unseen: Share | None
    hiou: Share | None


class Point(Scores, total=False):
    gamma: Required[float]


class Points(TypedDict, total=False):
    """Columns of equal length."""

    gamma: Required[list[float]]
    miou: list[Share | None]
    miou_seen: list[Share | None]
    miou_unseen: list[Share | None]
    hiou: Required[list[Share | None]]


class SeenUnseenCurve(TypedDict, total=False):
    """See `zs3.calibration.SeenBiasCurve.result`."""

    absent: Absent
    area: Required[RoundedShare | None]
    unbiased: Point
    best: Point | None
    seen_only: Required[Scores]
    unseen_only: Scores
    points: Points


class Bin(TypedDict, total=False):
    low: Share
    high: Share
    count: Count
    confidence: RoundedShare | None
    accuracy: Share | None


class Reliability(TypedDict, total=False):
    """See `zs3.calibration.Reliability.result`."""

    pixels: Count
    ece: RoundedShare | None
    bins: list[Bin]


class Conformal(TypedDict, total=False):
    alpha: Share
    threshold: Share | None
    rejects_everything: bool
    num_calibration_images: Count
    num_check_images: Count
    wrong_share: RoundedShare | None
    accepted_share: RoundedShare | None


class Rejection(TypedDict, total=False):
    """See `zs3.calibration.Rejection.result`."""

    insiders: Count
    outsiders: Count
    auroc: RoundedShare | None
    threshold_at_95: Share | None
    fpr_at_95: Share | None
    conformal: Conformal


class AreaShares(TypedDict, total=False):
    """See `zs3.evaluation.AreaShares`."""

    right: Share | None
    wrong_seen: Share | None
    wrong_unseen: Share | None
    rejected: Share | None


class SeenUnseenConfusion(TypedDict, total=False):
    of_seen: AreaShares
    of_unseen: AreaShares


class ConfusedPair(TypedDict, total=False):
    truth: str
    predicted: str
    pixels: Count
    share: Share


class Result(TypedDict, total=False):
    """The content of a result file, in its order. None: not measured, or it does not belong to the setting."""

    protocol: str
    setting: Literal["gzs3", "zs3", "ovs"]
    model: str
    dataset: str
    split: str
    split_sha256: str
    split_images: Count
    label_space: str
    label_space_sha256: str
    checkpoint_sha256: str | None  # None of a Hub id that was not downloaded, as the next two
    settings_sha256: str | None
    code_sha256: str | None
    given_sha256: dict[str, str]
    seen: list[str]
    unseen: list[str]
    without: list[str]
    trained_on_masks_of: list[str] | None
    unseen_labels_in_training: Literal["none", "pseudo", "captions", "ground_truth"] | None
    absent: Absent
    seed: Count
    settings: dict[str, bool | float | str | list[str] | None]  # flags of eval.py
    versions: dict[str, str]
    prompts: list[str]
    clip_ensemble: Literal["off", "crops", "lazy", "single_pass"]
    clip_ensemble_weight: Share | None
    ensemble_tolerance: Share
    calibration: Calibration
    num_images: Count
    miou: Share | None
    miou_seen: Share | None
    miou_unseen: Share | None
    hiou: Share | None
    pixel_accuracy: Share | None
    frequency_weighted_iou: Share | None
    confidence_intervals: dict[str, Interval]
    per_class: dict[str, Share | None]
    per_class_intervals: dict[str, Interval]
    seen_unseen_confusion: SeenUnseenConfusion | None
    worst_pairs: list[ConfusedPair]
    seen_unseen_curve: SeenUnseenCurve | None
    reliability: Reliability | None
    rejection: Rejection | None
    proposals_shown_to_clip: Amount
    undecided_share: RoundedShare


# ---- a result in words, to the disk and back ---------------------------------------------------------------


def candidates(result: Result) -> str:
    """How many names were to choose from, in the words of the setting."""
    seen, unseen = len(result["seen"]), len(result["unseen"])
    told = {"gzs3": f"{seen} seen and {unseen} unseen names", "zs3": f"{unseen} unseen names"}
    return told.get(result["setting"], f"{seen + unseen} names")


def read_result(path: Path, needed: Sequence[str] = ()) -> Result:
    """Of eval.py, checked. needed: keys that the caller cannot do without, beside per_class."""
    result = read_json(path, Result, RESULT_FILE, EVALUATE_AGAIN, ("per_class",))
    contradiction = next(contradictions(result), None)
    if contradiction is not None:
        raise refusal(path, contradiction, EVALUATE_AGAIN)
    check_needed(result, needed, path, RESULT_FILE)
    return result


def check_replaceable(path: Path, read: Callable[[Path], object]) -> None:
    """Refuses to write over a file that is there and is no earlier one of its kind, whole or damaged."""
    if not path.exists():
        return
    try:
        read(path)
    except Damaged:
        return
    except InputError as error:
        raise InputError(f"--output {shown(path)} holds something else: choose another file") from error


def contradictions(result: Result) -> Iterable[str]:
    """What cannot be true of a result, in words; of the keys that are there."""
    names, candidates = list(result["per_class"]), [*result.get("seen", []), *result.get("unseen", [])]
    for told in (names, candidates):
        try:
            check_names(told)
        except ValueError as error:
            yield str(error)
    intervals = result.get("per_class_intervals", dict.fromkeys(names))
    if list(intervals) != names:
        yield "per_class and per_class_intervals have other names"
    lost = [name for name, iou in result["per_class"].items() if iou is None and any(intervals.get(name) or ())]
    if lost:
        yield f"per_class has no number of {shortened(lost[0])}, and per_class_intervals has"
    if "seen" in result and "unseen" in result:
        strangers = sorted({*names} - {*candidates})
        if strangers:
            yield f"{shortened(strangers[0])} of per_class is neither in seen nor in unseen"
    without = result.get("without", [])
    both = [name for name, there in zip(without, among(without, names), strict=True) if there]
    if both:
        yield f"{shortened(both[0])} is in without and in per_class"
    if result.get("num_images", 0) > result.get("split_images", math.inf):
        yield "num_images is more than split_images"
    if "clip_ensemble" in result and (result["clip_ensemble"] == "off") != (result.get("clip_ensemble_weight") is None):
        yield "clip_ensemble and clip_ensemble_weight do not agree on whether there is an ensemble"
    calibration = result.get("calibration", {})
    if calibration.get("seen_bias_chosen") == "none" and calibration.get("seen_bias", 0) != 0:
        yield "calibration has a seen_bias, and says that none was chosen"
    yield from _contradictions_of_curve(result.get("seen_unseen_curve") or {})


def _contradictions_of_curve(curve: SeenUnseenCurve) -> Iterable[str]:
    if "points" not in curve:
        return
    columns = {name: curve["points"][name] for name in Points.__annotations__ if name in curve["points"]}
    if len({len(column) for column in columns.values()}) > 1:
        yield "seen_unseen_curve.points has columns of several lengths"
        return
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    best = curve.get("best")
    if best_point(rows) != (best and {name: best.get(name) for name in columns}):
        yield "seen_unseen_curve.best is not the best of its points"


def read_images(path: Path, result: Result) -> SavedImages:
    """The areas beside a result file, which must be those that its numbers are made of."""
    beside = images_path(path)
    saved = load_images(beside)
    told = result["per_class"]
    iou = iou_of_areas(*summed_areas(saved.areas), result.get("absent", "union"))
    alike = result.get("num_images", len(saved.image_ids)) == len(saved.image_ids)
    if told:
        own = np.array(list(told.values()), dtype=np.float64)
        alike = alike and list(told) == saved.class_names
        alike = alike and np.allclose(iou, own, rtol=0, atol=1e-9, equal_nan=True)
    if not alike:
        raise InputError(f"{shown(beside)} was not written with {shown(path)}: the numbers differ; evaluate again")
    return saved
