"""Result files of an evaluation.

FILE.json has the scores, in [0, 1], with what a reader needs to know how they came about; beside it lie FILE.md for
people, FILE.csv with a line a class, and FILE_images.npz with the areas of every image, which zs3.compare needs.
"""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from zs3.command_line import InputError, write_json, write_text
from zs3.evaluation import ConfusionMatrix, images_path, percent

HEADLINES = {"miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU", "miou": "mIoU"}


def write_result(path: Path, result: dict[str, Any], confusion: ConfusionMatrix) -> None:
    """The JSON last: where it is, the others are."""
    confusion.save_images(images_path(path), list(result["per_class"]))
    write_text(path.with_suffix(".csv"), class_table(result, confusion))
    write_text(path.with_suffix(".md"), report(result))
    write_json(path, result)


def read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; it should be a result file of eval.py") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON; it should be a result file of eval.py") from error
    if not isinstance(result, dict) or "per_class" not in result:
        raise InputError(f"{path} is no result file of eval.py: it has no per_class")
    return result


def class_table(result: dict[str, Any], confusion: ConfusionMatrix) -> str:
    """CSV, one line a class: IoU in [0, 1] with its interval, areas in pixels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "seen", "iou", "low", "high", "intersection", "truth", "predicted"])
    counts = confusion.counts
    areas = np.stack([np.diagonal(counts), counts.sum(axis=1), counts[:, :-1].sum(axis=0)], axis=1)
    for (name, iou), own in zip(result["per_class"].items(), areas.tolist(), strict=True):
        writer.writerow([name, name in result["seen"], iou, *result["per_class_intervals"][name], *own])
    return text.getvalue()


def report(result: dict[str, Any]) -> str:
    """Markdown, percent."""
    title = f"{result['setting']}: {result['model']} on {result['num_images']} images of {result['dataset']}"
    lines = [f"{title}, {result['split']}", "", f"Protocol: {result['protocol']}.", ""]
    rows = []
    for name, title in HEADLINES.items():
        if result[name] is not None:
            rows.append([title, percent(result[name]), _range(result["confidence_intervals"][name])])
    rows.append(["pixel accuracy", percent(result["pixel_accuracy"]), ""])
    rows.append(["frequency-weighted IoU", percent(result["frequency_weighted_iou"]), ""])
    lines += [*_table(["score", "percent", "95 % interval over images"], rows), "", *_sentences(result), ""]
    pairs = [[pair["truth"], pair["predicted"], percent(pair["share"])] for pair in result["worst_pairs"]]
    lines += ["Largest confusions:", "", *_table(["truth", "prediction", "share of the truth"], pairs), ""]
    told = result["setting"] != "ovs"
    rows = [
        [
            name + (" (unseen)" if told and name in result["unseen"] else ""),
            percent(iou),
            _range(result["per_class_intervals"][name]),
        ]
        for name, iou in result["per_class"].items()
    ]
    return "\n".join([*lines, *_table(["class", "IoU", "95 % interval"], rows)]) + "\n"


def _sentences(result: dict[str, Any]) -> Iterable[str]:
    """What the other measures say, a line each."""
    if result["seen_unseen_confusion"] is not None:
        shares = {name: percent(share) for name, share in result["seen_unseen_confusion"]["of_unseen"].items()}
        yield (
            f"- of the unseen area {shares['right']} % got its name, {shares['wrong_seen']} % a seen name, "
            f"{shares['wrong_unseen']} % another unseen one"
        )
    curve = result["seen_unseen_curve"]
    if curve is not None and curve["best"] is not None:
        yield (
            f"- area under the seen/unseen curve {percent(curve['area'])}; its best hIoU, "
            f"{percent(curve['best']['hiou'])}, is at a bias of {curve['best']['gamma']:.3g} off "
            "seen classes: found on these images, so it is no result"
        )
    if result["reliability"] is not None:
        yield f"- expected calibration error of the confidences {percent(result['reliability']['ece'])}"
    if result["rejection"] is not None:
        yield from _rejection(result["rejection"])


def _rejection(rejection: dict[str, Any]) -> Iterable[str]:
    if rejection["auroc"] is not None:
        yield (
            f"- pixels of other classes: AUROC {percent(rejection['auroc'])}; {percent(rejection['fpr_at_95'])} % of "
            "them are accepted where 95 % of the candidates' are"
        )
    found = rejection["conformal"]
    alpha, images, others = percent(found["alpha"]), found["num_calibration_images"], found["num_check_images"]
    if found["rejects_everything"]:
        yield f"- {images} images are too few, or too wrong, for a threshold with wrong labels on {alpha} % of an image"
    else:
        wrong, accepted = percent(found["wrong_share"]), percent(found["accepted_share"])
        yield (
            f"- rejecting below a confidence of {found['threshold']:.4f}, chosen on {images} images, leaves wrong "
            f"labels on {alpha} % of a new image on average or less; on {others} others it left {wrong} %, and "
            f"{accepted} % of the pixels with a label"
        )


def _range(interval: list[float | None]) -> str:
    low, high = interval
    return f"{percent(low)} to {percent(high)}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
