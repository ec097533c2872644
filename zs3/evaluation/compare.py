"""Compare two results of eval.py: is B better than A, or do these images not decide it?

    zs3 compare A.json B.json --output runs/compare.json

Both models were evaluated on the same images, so each of the 1000 resamples draws the same images for both. The
interval is that of the difference of their scores. It is narrower than the intervals of the two models suggest, because
an image that is hard for one model is mostly hard for the other. The command reads the areas of all images, which
eval.py wrote beside each result (A_images.npz).
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configuration_zs3 import beginning, shortened
from zs3.command_line import Arguments, InputError, OutputFile, Seed, flag, read_arguments, shown
from zs3.evaluation.report import OWN_SPACE, quality_in_words, space_in_words
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import EVALUATE_AGAIN, read_images, read_result
from zs3.files import finite_or_none, write_report
from zs3.scores.bootstrap import ImageAreas, images_path, interval, resampled_areas, summed_areas
from zs3.scores.means import OF_SEEN_AND_UNSEEN, SCORES, iou_of_areas, scores_of_areas
from zs3.tables import markdown, markdown_table, percent
from zs3.typed_json import refusal

RESAMPLES = 1000
SAME = {  # a difference means something only if these are equal
    "dataset": "dataset",
    "split": "split",
    "label_space_sha256": "label space",
    "setting": "setting",
    "absent": "rule for absent classes",
}
NEEDED = (*SAME, "model", "seen", "unseen", "miou")
CLASSES = {"per_class": "candidates", "seen": "seen candidates", "unseen": "unseen candidates"}
FEW = 30  # images
BETTER, WORSE = "B is better: the interval excludes 0", "A is better: the interval excludes 0"
OPEN = "these images show no difference"


@dataclass
class CompareArgs(Arguments):
    """Two results of one protocol on the same images."""

    first_words = ("a", "b")

    a: str | None = flag(None, "Result file of eval.py. The two files may be given without their flags.")
    b: str | None = flag(None, "Result file to compare with A; differences are B - A.")
    output: OutputFile | None = flag(None, "Result file (JSON); the printed tables go beside it as .md.")
    seed: Seed = flag(0, "Seed of the bootstrap.")

    def check(self) -> None:
        if self.a is None or self.b is None:
            raise InputError("give two result files of eval.py: zs3 compare A.json B.json")
        if self.output is not None and Path(self.output).with_suffix("").resolve() in {
            Path(result).with_suffix("").resolve() for result in (self.a, self.b)
        }:
            raise InputError(f"--output {shown(self.output)} is one of the results: choose another name")


class Evaluated(NamedTuple):
    """A result file, and the areas of its images in the order of their ids."""

    path: Path
    result: Result
    image_ids: list[str]
    areas: ImageAreas


def load_evaluated(path: Path) -> Evaluated:
    result = read_result(path, NEEDED)
    class_names, image_ids, areas = read_images(path, result)
    beside = shown(images_path(path))
    if class_names != list(result["per_class"]) or {*class_names} != {*result["seen"], *result["unseen"]}:
        raise refusal(path, "per_class has other names than seen and unseen", EVALUATE_AGAIN)
    if None in image_ids:
        raise InputError(f"{beside} holds images without an id: they cannot be paired; evaluate again")
    repeated = [image_id for image_id, times in Counter(image_ids).items() if times > 1]
    if repeated:
        raise InputError(f"{beside} holds image {shortened(repeated[0])} twice: give every image an id of its own")
    order = sorted(range(len(image_ids)), key=image_ids.__getitem__)
    return Evaluated(path, result, [image_ids[at] for at in order], areas.of_images(order))


def check_comparable(a: Evaluated, b: Evaluated) -> None:
    both = f"{shown(a.path, 30)} and {shown(b.path, 30)}"
    for field, words in SAME.items():
        theirs = [one.result[field] for one in (a, b)]
        if theirs[0] != theirs[1]:
            what = " and ".join(beginning(value, 22) for value in theirs)
            raise InputError(f"{both} differ in the {words}, {what}: evaluate both by one protocol")
    for field, words in CLASSES.items():
        theirs = [list(one.result[field]) for one in (a, b)]
        if theirs[0] != theirs[1]:
            odd = sorted(set(theirs[0]) ^ set(theirs[1]))
            what = f"{beginning(', '.join(map(repr, odd[:3])), 37)} in one alone" if odd else "in their order"
            raise InputError(f"{both} differ in the {words}, {what}: evaluate both with the same names and --without")
    odd = sorted(set(a.image_ids) ^ set(b.image_ids))
    if odd:
        where = shown(a.path if odd[0] in set(a.image_ids) else b.path)
        what = f"{beginning(repr(odd[0]), 40)} is in {where} alone"
        raise InputError(f"{len(odd)} images are not in both results ({what}): evaluate both on the same")
    if (a.areas.truth != b.areas.truth).nnz:
        raise InputError(f"{both} differ in the label maps of their images: evaluate both on the same data")


def verdict(low: float | None, high: float | None, num_images: int) -> str:
    """The verdict of the interval of B - A. Few images get none, because their percentile bootstrap is too narrow."""
    if num_images < FEW:
        return f"no verdict: {num_images} images are too few"
    if low is not None and low > 0:
        return BETTER
    return WORSE if high is not None and high < 0 else OPEN


def compare(args: CompareArgs) -> dict:
    """The result, as it is written to args.output. Scores and differences lie in [-1, 1]; None: not defined."""
    args.check()
    a, b = load_evaluated(Path(args.a)), load_evaluated(Path(args.b))
    check_comparable(a, b)
    names, absent = list(a.result["per_class"]), a.result["absent"]
    is_seen = np.array([name not in a.result["unseen"] for name in names])
    areas = [summed_areas(one.areas) for one in (a, b)]
    areas += [resampled_areas(one.areas, RESAMPLES, args.seed) for one in (a, b)]
    scores = [scores_of_areas(own, is_seen, absent, which_are_things(a, b)) for own in areas]
    iou = [iou_of_areas(own, absent) for own in areas]
    left_out = OF_SEEN_AND_UNSEEN if a.result["setting"] == "ovs" else ()
    rows = {name: _row(*(own[name] for own in scores)) for name in SCORES if name not in left_out}
    return {
        "a": _source(a),
        "b": _source(b),
        **{field: a.result[field] for field in SAME},
        "label_space": a.result.get("label_space", OWN_SPACE),
        "unseen": a.result["unseen"],
        "num_images": len(a.image_ids),
        "resamples": RESAMPLES,
        "seed": args.seed,
        "scores": {
            name: row | {"verdict": verdict(*row["interval"], len(a.image_ids))}
            for name, row in rows.items()
            if row["difference"] is not None  # not defined in this setting, or not known of one of the two
        },
        "per_class": {name: _row(*(own[..., at] for own in iou)) for at, name in enumerate(names)},
    }


def which_are_things(a: Evaluated, b: Evaluated) -> np.ndarray | None:
    """(C,) bool. None: no result says it, or they contradict each other. Files of older versions do not say it."""
    known = [one.result["things"] for one in (a, b) if one.result.get("things") is not None]
    if not known or set(known[0]) != set(known[-1]):
        return None
    return np.array([name in known[0] for name in a.result["per_class"]])


def _source(one: Evaluated) -> dict:
    quality = quality_in_words(one.result.get("image_label_precision"), one.result.get("image_label_recall"))
    source = {"result": str(one.path), "model": one.result["model"], "protocol": one.result.get("protocol")}
    return source | {"image_labels": quality if one.result["setting"] != "ovs" else ""}


def _row(a: float, b: float, drawn_a: np.ndarray, drawn_b: np.ndarray) -> dict:
    row = {"a": float(a), "b": float(b), "difference": float(b - a), "interval": interval(drawn_b - drawn_a)}
    return finite_or_none(row)


def report(result: dict) -> str:
    """Markdown, percent; the classes from B's largest gain to its largest loss, then those without a difference."""
    lines = [
        f"{result['setting']} on {result['num_images']} images of {markdown(result['dataset'])} "
        f"({markdown(result['split'] + space_in_words(result))}); percent, "
        f"differences in points, 95 % intervals of {result['resamples']} resamples of the images.",
        "",
        *_source_lines("A", result["a"]),
        *_source_lines("B", result["b"]),
        "",
    ]
    head = ["A", "B", "B - A", "95 % interval"]
    rows = {title: result["scores"][name] for name, title in SCORES.items() if name in result["scores"]}
    lines += markdown_table(
        ["score", *head, "verdict"], ([title, *_cells(row), row["verdict"]] for title, row in rows.items())
    )
    unseen = set() if result["setting"] == "ovs" else set(result["unseen"])
    rows = result["per_class"].items()
    gains = sorted(rows, key=lambda item: math.inf if item[1]["difference"] is None else -item[1]["difference"])
    classes = ([markdown(name) + (" (unseen)" if name in unseen else ""), *_cells(row)] for name, row in gains)
    lines += ["", *markdown_table(["class", *head], classes), ""]
    lines.append(
        f"The intervals of the {len(gains)} classes are not corrected for their number: without any difference "
        "between A and B, about one in twenty would exclude 0 by chance."
    )
    return "\n".join(lines) + "\n"


def _source_lines(letter: str, source: dict) -> list[str]:
    name, protocol = markdown(f"{source['result']} ({source['model']})"), source["protocol"]
    lines = [protocol] if protocol else []
    if source["image_labels"]:
        lines.append(f"image labels of unseen classes in training: {source['image_labels']}")
    return [f"- {letter}: {name}", *(f"  - {markdown(line)}" for line in lines)]


def _cells(row: dict) -> list[str]:
    low, high = row["interval"]
    between = "-" if low is None else f"{_points(low)} to {_points(high)}"
    return [percent(row["a"]), percent(row["b"]), _points(row["difference"]), between]


def _points(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.2f}"


def main() -> None:
    args, _ = read_arguments(CompareArgs)
    result = compare(args)
    text = report(result)
    print(text, end="")
    if args.output is not None:
        write_report(Path(args.output), result, text)
