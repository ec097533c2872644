"""Result files of an evaluation: made, written and read here.

FILE.json holds a `Result`: scores in [0, 1], and the conditions of the evaluation. Beside it lie FILE.md for people,
FILE.csv with a line for each class, and FILE_images.npz with the areas of every image, which `zs3 compare` needs.
"""

import csv
import io
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from configuration_zs3 import among, check_names, shared, shortened
from zs3.command_line import InputError, shown
from zs3.evaluation.counts import PassCounts
from zs3.evaluation.report import protocol
from zs3.evaluation.result_types import Chosen, CurveColumns, CurveResult, Ensemble, Result
from zs3.files import finite_or_none, write_json, write_text
from zs3.scores.bootstrap import SavedImages, images_path, load_images, summed_areas
from zs3.scores.calibration import best_point
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import OF_SEEN_AND_UNSEEN, class_areas, iou_of_areas, scores_of_areas
from zs3.tables import csv_text
from zs3.typed_json import Damaged, check_needed, read_json, refusal

RESULT_FILE, EVALUATE_AGAIN = "result file of eval.py", "move it away and evaluate again"
WORST_PAIRS = 10
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "zs3")


# ---- made ----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that may change the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def result_of(
    stamp: Result, prompts: list[str], ensemble: Ensemble, bias: Chosen, counts: PassCounts, max_wrong: float
) -> Result:
    """The whole result. stamp: its first keys, which are known before the pass over the images."""
    result = stamp | {
        "prompts": prompts,
        "clip_ensemble": ensemble.view,
        "clip_ensemble_weight": ensemble.weight.value,
        "calibration": {
            "seen_bias": bias.value,
            "seen_bias_chosen": bias.how,
            "ensemble_weight_chosen": ensemble.weight.how,
        },
        **scores_of(counts, stamp, max_wrong),
    }
    if stamp["setting"] == "ovs":  # it makes no difference between seen and unseen classes
        result |= dict.fromkeys([*OF_SEEN_AND_UNSEEN, "seen_unseen_confusion"])
        result["confidence_intervals"] |= {name: [None, None] for name in OF_SEEN_AND_UNSEEN}
    return finite_or_none({"protocol": protocol(result), **result})


def scores_of(counts: PassCounts, stamp: Result, max_wrong: float) -> Result:
    """Shares in [0, 1]; NaN where a mean has no class."""
    confusion, names, is_seen, curve = counts.confusion, counts.names, counts.is_seen.numpy(), counts.curve
    things, absent = stamp["things"], stamp["absent"]
    is_thing = None if things is None else np.array([name in things for name in names])
    bootstrap = confusion.bootstrap(is_seen, is_thing=is_thing, absent=absent, seed=stamp["seed"])
    groups = confusion.seen_unseen_confusion(is_seen)._asdict()
    return {
        "num_images": len(confusion.images),
        **confusion.scores(is_seen, absent, is_thing),
        "confidence_intervals": {name: list(ends) for name, ends in bootstrap.intervals().items()},
        "per_class": dict(zip(names, confusion.iou(absent).tolist(), strict=True)),
        "per_class_intervals": dict(zip(names, bootstrap.class_intervals().tolist(), strict=True)),
        "seen_unseen_confusion": {name: shares._asdict() for name, shares in groups.items()},
        "worst_pairs": [
            pair._asdict() | {"truth": names[pair.truth], "predicted": names[pair.predicted]}
            for pair in confusion.worst_pairs(WORST_PAIRS)
        ],
        "seen_unseen_curve": curve.result(absent) if curve is not None and curve.has_both else None,
        "reliability": None if counts.reliability is None else counts.reliability.result(),
        "rejection": None if counts.rejection is None else counts.rejection.result(max_wrong),
    }


# ---- written -------------------------------------------------------------------------------------------------


def write_result(path: Path, result: Result, report: str, confusion: ConfusionMatrix) -> None:
    """The JSON is written last: if it exists, the files beside it exist too."""
    confusion.save_images(images_path(path), list(result["per_class"]))
    write_text(path.with_suffix(".csv"), class_table(result, confusion))
    write_text(path.with_suffix(".md"), report)
    write_json(path, result)


def class_table(result: Result, confusion: ConfusionMatrix) -> str:
    """CSV, one line a class: IoU in [0, 1] with its interval, areas in pixels, thing or stuff where this is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "kind", "iou", "low", "high", "intersection", "truth", "predicted", "thing_or_stuff"])
    areas = np.stack(class_areas(confusion.counts)[:3], axis=1)
    things = result["things"]
    for (name, iou), own in zip(result["per_class"].items(), areas.tolist(), strict=True):
        kind = "unseen" if name in result["unseen"] else "seen"
        kind = None if result["setting"] == "ovs" else kind
        matter = ("stuff", "thing")[name in things] if things is not None else None
        writer.writerow([csv_text(name), kind, iou, *result["per_class_intervals"][name], *own, matter])
    return text.getvalue()


# ---- read ----------------------------------------------------------------------------------------------------


def read_result(path: Path, needed: Sequence[str] = ()) -> Result:
    """A result file of eval.py, checked. needed: keys that must be there, beside per_class."""
    result = read_json(path, Result, RESULT_FILE, EVALUATE_AGAIN, ("per_class",))
    contradiction = next(contradictions(result), None)
    if contradiction is not None:
        raise refusal(path, contradiction, EVALUATE_AGAIN)
    check_needed(result, needed, path, RESULT_FILE)
    return result


def check_replaceable(path: Path, read: Callable[[Path], object]) -> None:
    """Refuses to overwrite a file of another kind. One of the same kind, whole or damaged, may be overwritten."""
    if not path.exists():
        return
    try:
        read(path)
    except Damaged:
        return
    except InputError as error:
        raise InputError(f"--output {shown(path)} holds something else: choose another file") from error


def contradictions(result: Result) -> Iterable[str]:
    """The contradictions between keys of a result, in words. A missing key is not compared."""
    names, candidates = list(result["per_class"]), [*result.get("seen", []), *result.get("unseen", [])]
    for several in (names, candidates):
        try:
            check_names(several)
        except ValueError as error:
            yield str(error)
    intervals = result.get("per_class_intervals", dict.fromkeys(names))
    if list(intervals) != names:
        yield "per_class and per_class_intervals have different names"
    lost = [name for name, iou in result["per_class"].items() if iou is None and any(intervals.get(name) or ())]
    if lost:
        yield f"per_class has no number for {shortened(lost[0])}, but per_class_intervals has"
    if "seen" in result and "unseen" in result:
        strangers = sorted({*names} - {*candidates})
        if strangers:
            yield f"{shortened(strangers[0])} of per_class is neither in seen nor in unseen"
    strangers = sorted({*(result.get("things") or [])} - {*names})
    if strangers:
        yield f"{shortened(strangers[0])} of things is not in per_class"
    without = result.get("without", [])
    both = shared(without, names)
    if both:
        yield f"{shortened(both[0])} is in without and in per_class"
    if result.get("num_images", 0) > result.get("split_images", math.inf):
        yield "num_images is more than split_images"
    if "clip_ensemble" in result and (result["clip_ensemble"] == "off") != (result.get("clip_ensemble_weight") is None):
        yield "clip_ensemble and clip_ensemble_weight do not agree on whether there is an ensemble"
    calibration = result.get("calibration", {})
    if calibration.get("seen_bias_chosen") == "none" and calibration.get("seen_bias", 0) != 0:
        yield "calibration has a seen_bias, but says that none was chosen"
    yield from _contradictions_of_curve(result.get("seen_unseen_curve") or {})


def _contradictions_of_curve(curve: CurveResult) -> Iterable[str]:
    if "points" not in curve:
        return
    columns = {name: curve["points"][name] for name in CurveColumns.__annotations__ if name in curve["points"]}
    if len({len(column) for column in columns.values()}) > 1:
        yield "seen_unseen_curve.points has columns of several lengths"
        return
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    best = curve.get("best")
    if best_point(rows) != (best and {name: best.get(name) for name in columns}):
        yield "seen_unseen_curve.best is not the best of its points"


def read_images(path: Path, result: Result) -> SavedImages:
    """The areas beside a result file. Refuses areas that give other numbers than the result."""
    beside = images_path(path)
    saved = load_images(beside)
    areas, absent = summed_areas(saved.areas), result.get("absent", "union")
    alike = result.get("num_images", len(saved.image_ids)) == len(saved.image_ids)
    if result["per_class"]:
        own = np.array(list(result["per_class"].values()), dtype=np.float64)
        alike = alike and list(result["per_class"]) == saved.class_names
        alike = alike and np.allclose(iou_of_areas(areas, absent), own, rtol=0, atol=1e-9, equal_nan=True)
    told = result.get("miou_seen_on_seen_pixels")
    if alike and told is not None and areas.predicted_on_seen is not None:
        is_seen = np.array(among(saved.class_names, result.get("seen")), dtype=bool)
        scores = scores_of_areas(areas, is_seen, absent)
        alike = abs(scores["miou_seen_on_seen_pixels"] - told) <= 1e-9
    if not alike:
        raise InputError(f"{shown(beside)} was not written with {shown(path)}: the numbers differ; evaluate again")
    return saved
