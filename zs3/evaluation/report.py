"""The texts of a result: what it is the result of, its report, its table of classes."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configuration_zs3 import among
from zs3.evaluation.results import Rejection, Result, candidates
from zs3.files import write_json, write_text
from zs3.scores.bootstrap import images_path
from zs3.scores.confusion import ConfusionMatrix
from zs3.scores.means import SCORES, class_areas
from zs3.tables import csv_text, markdown, markdown_table, percent, percent_range

TOLD = {
    "none": "no image labels",
    "pseudo": "pseudo image labels",
    "captions": "nouns of captions",
    "ground_truth": "ground-truth image labels",
}


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


# ---- for people --------------------------------------------------------------------------------------------


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
        [title, percent(result[name]), percent_range(result["confidence_intervals"][name])]
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
            percent_range(result["per_class_intervals"][name]),
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
