"""Result files of an evaluation.

FILE.json has the scores, in [0, 1], with what a reader needs to know how they came about: a `Result`. Beside it lie
FILE.md for people, FILE.csv with a line a class, and FILE_images.npz with the areas of every image, which zs3.compare
needs. Every command reads them with `read_result` and `read_images`.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Required

import numpy as np
from typing_extensions import TypedDict

from configuration_zs3 import among, check_names, shortened
from zs3.calibration import best_point
from zs3.command_line import InputError, checked, printable, shown
from zs3.command_line import Share as ShareFlag
from zs3.evaluation import (
    SCORES,
    Absent,
    ConfusionMatrix,
    SavedImages,
    class_areas,
    images_path,
    iou_of_areas,
    load_images,
    percent,
    summed_areas,
)
from zs3.files import write_json, write_text
from zs3.typed_json import Amount, Count, Damaged, Share, check_needed, read_json, refusal, rule, shown_value

TOLD = {
    "none": "no image labels",
    "pseudo": "pseudo image labels",
    "captions": "nouns of captions",
    "ground_truth": "ground-truth image labels",
}

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


def protocol(result: Result) -> str:
    """The stamps in a sentence."""
    calibration, parts = result["calibration"], [f"{result['setting']}, {candidates(result)}"]
    if result["without"]:
        parts.append(f"without {', '.join(result['without'])}")
    if result["num_images"] < result["split_images"]:
        parts.append(f"the first {result['num_images']} of {result['split_images']} images")
    if result["clip_ensemble"] == "off":
        why = calibration["ensemble_weight_chosen"]
        parts.append("no ensemble" if why == "none" else f"no ensemble ({why})")
    else:
        parts.append(f"ensemble with CLIP ({result['clip_ensemble']}, weight {result['clip_ensemble_weight']}, ")
        parts[-1] += f"{calibration['ensemble_weight_chosen']})"
    if calibration["seen_bias_chosen"] != "none":
        parts.append(
            f"{calibration['seen_bias']:.4g} off the scores of seen classes, {calibration['seen_bias_chosen']}"
        )
    if result["setting"] != "ovs":
        told = TOLD.get(result["unseen_labels_in_training"], "what is not known")
        parts.append(f"training was told {told} of unseen classes")
    elif result["trained_on_masks_of"] is not None:
        trained = among(list(result["per_class"]), result["trained_on_masks_of"])
        parts.append(f"training saw masks of {sum(trained)} of them")
    absent = {"union": "truth and prediction", "truth": "the truth"}[result["absent"]]
    return "; ".join([*parts, f"classes absent from {absent} are left out of means"])


def write_result(path: Path, result: Result, confusion: ConfusionMatrix) -> None:
    """The JSON last: where it is, the others are."""
    confusion.save_images(images_path(path), list(result["per_class"]))
    write_text(path.with_suffix(".csv"), class_table(result, confusion))
    write_text(path.with_suffix(".md"), report(result))
    write_json(path, result)


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


# ---- the bias and the weight that a result has found -------------------------------------------------------

BY_HAND = "chosen by hand: it may be tuned on these images"
TUNED = "TUNED ON THE TEST IMAGES"


class Choice(NamedTuple):
    """What is taken off the scores of seen classes, or w of the ensemble (None: no ensemble); and how it was chosen, in
    words."""

    value: float | None
    chosen: str


def number_or_none(given: str) -> float | None:
    """The number of a flag that takes the name of a file, too: None for that."""
    try:
        return float(given)
    except ValueError:
        return None


def chosen_bias(given: str | None, stamp: dict, image_ids: list[str]) -> Choice:
    """A number as it is; of a result file the best of its curve, and what its choice knew."""
    if given is None:
        return Choice(0.0, "none")
    value = number_or_none(given)
    if value is None:
        return best_bias(Path(given), stamp, image_ids)
    return Choice(value, BY_HAND)


def best_bias(path: Path, stamp: dict, image_ids: list[str]) -> Choice:
    result, unseen = read_result(path, ("dataset", "split", "seen", "unseen", "trained_on_masks_of")), stamp["unseen"]
    curve = result.get("seen_unseen_curve") or {}
    if curve.get("best") is None:
        raise InputError(
            f"--seen_bias {shown(path)}: it has no curve; evaluate again, with --setting gzs3 and calibration"
        )
    leaked = [name for name, saw in zip(unseen, among(unseen, result["trained_on_masks_of"]), strict=True) if saw]
    if leaked:
        raise InputError(
            f"--seen_bias {shown(path)}: its model saw masks of {shortened(leaked)}, which are unseen here"
        )
    theirs = among(unseen, [*result["seen"], *result["unseen"]])
    known = [name for name, is_theirs in zip(unseen, theirs, strict=True) if is_theirs]
    labels = f"with labels of the unseen classes ({', '.join(known)})" if known else "without labels of unseen classes"
    shared = 0
    if (result["dataset"], result["split"]) == (stamp["dataset"], stamp["split"]):
        shared = len({*read_images(path, result).image_ids} & {*image_ids})
    if shared:
        chosen = f"{TUNED}, {shared} of {len(image_ids)}, {labels}"
    elif known:
        chosen = f"chosen on other images, {labels}"
    else:
        chosen = f"chosen on other images, on classes held out ({', '.join(result['unseen'])}), {labels}"
    return Choice(curve["best"]["gamma"], chosen)


def check_bias(given: str) -> None:
    bias = number_or_none(given)
    if bias is not None:
        checked("seen_bias", bias, float)


def check_weight(given: str) -> None:
    weight = number_or_none(given)
    if weight is not None:
        checked("ensemble_weight", weight, ShareFlag)
    elif not Path(given).is_file():
        raise InputError(
            f"--ensemble_weight must be in [0, 1] or a file of zs3.ensemble_weight, got {shortened(given)}"
        )


def chosen_weight(given: str, stamp: dict, image_ids: list[str]) -> Choice:
    """A number as it is; of a file of zs3.ensemble_weight its answer, and what its choice knew."""
    weight = number_or_none(given)
    return best_weight(Path(given), stamp, image_ids) if weight is None else Choice(weight, BY_HAND)


class WeightSettings(TypedDict, total=False):
    """Those of the flags of zs3.ensemble_weight that say what its answer knew."""

    split: str
    unseen_labels: str


class WeightAnswer(TypedDict, total=False):
    """The content of a file of zs3.ensemble_weight, of what eval.py reads."""

    settings: WeightSettings
    checkpoint_sha256: str | None
    dataset: str
    image_ids: list[str]
    weights: dict[str, dict[str, float | None]]
    clip_ensemble_weight: Any  # best_weight has its own words for it


def read_answer(path: Path, needed: Sequence[str] = ()) -> WeightAnswer:
    """Of zs3.ensemble_weight, checked."""
    return read_json(path, WeightAnswer, "result file of zs3.ensemble_weight", "choose again", needed)


def best_weight(path: Path, stamp: dict, image_ids: list[str]) -> Choice:
    needed = ("clip_ensemble_weight", "weights", "settings.split", "settings.unseen_labels")
    answer = read_answer(path, (*needed, "checkpoint_sha256", "dataset", "image_ids"))
    weight, asked = answer["clip_ensemble_weight"], answer["settings"]
    if weight is not None and not (type(weight) in (int, float) and 0 <= weight <= 1):
        what = f"its weight must be null or in [0, 1], got {shown_value(weight)}"
        raise InputError(f"--ensemble_weight {shown(path)}: {what}")
    if answer["checkpoint_sha256"] != stamp["checkpoint_sha256"]:
        raise InputError(
            f"--ensemble_weight {shown(path)} was chosen for another checkpoint: choose for this one, python -m "
            "zs3.ensemble_weight, the other flags as before"
        )
    shared = 0
    if (answer["dataset"], asked["split"]) == (stamp["dataset"], stamp["split"]):
        shared = len({*answer["image_ids"]} & {*image_ids})
    chosen = f"chosen on {len(answer['image_ids'])} images of {answer['dataset']}, split {asked['split']}"
    if shared:
        chosen = f"{TUNED}, {shared} of {len(image_ids)}"
    truth = asked["unseen_labels"] == "ground_truth"
    labels = "ground-truth image labels" if truth else f"the image labels in {Path(asked['unseen_labels']).name}"
    return Choice(weight, f"{chosen}, with {labels}")


# ---- for people --------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """A name, a path or a sentence as it is, for a Markdown text: nothing in it is markup, HTML or a line's end."""
    one_line = " ".join(printable(text).split())
    return re.sub(r"[\\`*\[\]<>|&~$#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line)


def csv_text(text: str) -> str:
    """A name for a CSV file: what a spreadsheet would take for a formula gets an apostrophe."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown; a bar in a cell ends no cell."""
    lines = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in cells] for cells in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def class_table(result: Result, confusion: ConfusionMatrix) -> str:
    """CSV, one line a class: IoU in [0, 1] with its interval, areas in pixels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    told = result["setting"] != "ovs"  # where seen and unseen are words
    kinds = {name: "unseen" if name in result["unseen"] else "seen" for name in result["per_class"]} if told else {}
    writer.writerow(["class", "kind", "iou", "low", "high", "intersection", "truth", "predicted"])
    areas = np.stack(class_areas(confusion.counts), axis=1)
    for (name, iou), own in zip(result["per_class"].items(), areas.tolist(), strict=True):
        writer.writerow([csv_text(name), kinds.get(name), iou, *result["per_class_intervals"][name], *own])
    return text.getvalue()


def report(result: Result) -> str:
    """Markdown, percent."""
    title = f"{result['setting']}: {result['model']} on {result['num_images']} images of {result['dataset']}"
    lines = [markdown(f"{title}, {result['split']}"), "", f"Protocol: {markdown(result['protocol'])}.", ""]
    rows = [
        [title, percent(result[name]), _range(result["confidence_intervals"][name])]
        for name, title in SCORES.items()
        if result[name] is not None
    ]
    lines += [*markdown_table(["score", "percent", "95 % interval over images"], rows), "", *_sentences(result), ""]
    pairs = [
        [markdown(pair["truth"]), markdown(pair["predicted"]), str(pair["pixels"]), percent(pair["share"])]
        for pair in result["worst_pairs"]
    ]
    head = ["truth", "prediction", "pixels", "percent of the truth"]
    lines += ["Largest confusions:", "", *markdown_table(head, pairs), ""]
    told = result["setting"] != "ovs"
    rows = [
        [
            markdown(name) + (" (unseen)" if told and name in result["unseen"] else ""),
            percent(iou),
            _range(result["per_class_intervals"][name]),
        ]
        for name, iou in result["per_class"].items()
    ]
    return "\n".join([*lines, *markdown_table(["class", "IoU", "95 % interval"], rows)]) + "\n"


def _sentences(result: Result) -> Iterable[str]:
    """What the other measures say, a line each."""
    if result["seen_unseen_confusion"] is not None:
        shares = {name: percent(share) for name, share in result["seen_unseen_confusion"]["of_unseen"].items()}
        yield (
            f"- of the unseen area {shares['right']} % got its name, {shares['wrong_seen']} % a seen name, "
            f"{shares['wrong_unseen']} % another unseen one"
        )
    curve = result["seen_unseen_curve"]
    if curve is not None:
        yield (
            f"- area under the seen/unseen curve {percent(curve['area'])} %; its best hIoU, "
            f"{percent(curve['best']['hiou'])}, is at a bias of {curve['best']['gamma']:.3g} off seen classes: "
            "found on these images, so it is no result"
        )
    if result["reliability"] is not None:
        yield f"- expected calibration error of the confidences {percent(result['reliability']['ece'])} %"
    if result["rejection"] is not None:
        yield from _rejection(result["rejection"])


def _rejection(rejection: Rejection) -> Iterable[str]:
    if rejection["auroc"] is not None:
        yield (
            f"- confidence tells pixels of other classes from the candidates' with an AUROC of "
            f"{percent(rejection['auroc'])} % (50 is chance); {percent(rejection['fpr_at_95'])} % of them are accepted "
            "where 95 % of the candidates' are"
        )
    found = rejection["conformal"]
    alpha, images, others = percent(found["alpha"]), found["num_calibration_images"], found["num_check_images"]
    if found["rejects_everything"]:
        yield f"- {images} images are too few, or too wrong, for a threshold with at most {alpha} % wrong labels"
    else:
        wrong, accepted = percent(found["wrong_share"]), percent(found["accepted_share"])
        threshold = math.ceil(1e5 * found["threshold"]) / 1e5  # rounded down it would accept more
        yield (
            f"- labels with a confidence below {threshold:.5f} rejected: at most {alpha} % of the labelled pixels of a "
            f"new image are wrong, on average (chosen on {images} images); on the {others} others {wrong} % were, "
            f"and {accepted} % kept a label"
        )


def _range(interval: list[float | None]) -> str:
    low, high = interval
    return f"{percent(low)} to {percent(high)}"
