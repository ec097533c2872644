"""Result files of an evaluation.

FILE.json has the scores, in [0, 1], with what a reader needs to know how they came about; beside it lie FILE.md for
people, FILE.csv with a line a class, and FILE_images.npz with the areas of every image, which zs3.compare needs.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configuration_zs3 import plain
from zs3.command_line import InputError, write_json, write_text
from zs3.evaluation import SCORES, ConfusionMatrix, class_areas, images_path, load_images, percent

TOLD = {
    "none": "no image labels",
    "pseudo": "pseudo image labels",
    "captions": "nouns of captions",
    "ground_truth": "ground-truth image labels",
}


def candidates(result: dict) -> str:
    """How many names were to choose from, in the words of the setting."""
    seen, unseen = len(result["seen"]), len(result["unseen"])
    told = {"gzs3": f"{seen} seen and {unseen} unseen names", "zs3": f"{unseen} unseen names"}
    return told.get(result["setting"], f"{seen + unseen} names")


def protocol(result: dict) -> str:
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
        trained = {*map(plain, result["trained_on_masks_of"])}
        parts.append(f"training saw masks of {sum(plain(name) in trained for name in result['per_class'])} of them")
    absent = {"union": "truth and prediction", "truth": "the truth"}[result["absent"]]
    return "; ".join([*parts, f"classes absent from {absent} are left out of means"])


def write_result(path: Path, result: dict[str, Any], confusion: ConfusionMatrix) -> None:
    """The JSON last: where it is, the others are."""
    confusion.save_images(images_path(path), list(result["per_class"]))
    write_text(path.with_suffix(".csv"), class_table(result, confusion))
    write_text(path.with_suffix(".md"), report(result))
    write_json(path, result)


def read_result(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Of eval.py. needed: fields that the caller cannot do without, beside per_class."""
    return read_fields(path, ("per_class", *needed), "eval.py")


def read_fields(path: Path, needed: Sequence[str], command: str) -> dict[str, Any]:
    """A result file of this command, with the fields that are needed."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; it should be a result file of {command}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON; it should be a result file of {command}") from error
    if not isinstance(result, dict):
        raise InputError(f"{path} is no result file of {command}: it holds no mapping")
    missing = [name for name in needed if name not in result]
    if missing:
        raise InputError(f"{path} is no result file of {command}, it lacks {missing[0]!r}")
    return result


# ---- the bias and the weight that a result has found -------------------------------------------------------

BY_HAND = "chosen by hand: it may be tuned on these images"
TUNED = "TUNED ON THE TEST IMAGES"


class Choice(NamedTuple):
    """What is taken off the scores of seen classes, or w of the ensemble (None: no ensemble); and how it was chosen, in
    words."""

    value: float | None
    chosen: str


def as_number(given: str) -> float | None:
    """None where it is none, but the name of a file."""
    try:
        return float(given)
    except ValueError:
        return None


def chosen_bias(given: str | None, stamp: dict, image_ids: list[str]) -> Choice:
    """A number as it is; of a result file the best of its curve, and what its choice knew."""
    if given is None:
        return Choice(0.0, "none")
    value = as_number(given)
    if value is None:
        return best_bias(Path(given), stamp, image_ids)
    if not math.isfinite(value):
        raise InputError(f"--seen_bias must be a finite number, got {given}")
    return Choice(value, BY_HAND)


def best_bias(path: Path, stamp: dict, image_ids: list[str]) -> Choice:
    result, unseen = read_result(path), stamp["unseen"]
    curve = result.get("seen_unseen_curve")
    if curve is None or curve["best"] is None:
        raise InputError(f"--seen_bias {path}: it has no curve; evaluate again, with --setting gzs3 and calibration")
    leaked = [name for name in unseen if plain(name) in map(plain, result["trained_on_masks_of"] or [])]
    if leaked:
        raise InputError(f"--seen_bias {path}: its model saw masks of {leaked}, which are unseen here")
    known = [name for name in unseen if plain(name) in map(plain, [*result["seen"], *result["unseen"]])]
    labels = f"with labels of the unseen classes ({', '.join(known)})" if known else "without labels of unseen classes"
    shared = 0
    if (result["dataset"], result["split"]) == (stamp["dataset"], stamp["split"]):
        shared = len({*load_images(images_path(path)).image_ids} & {*image_ids})
    if shared:
        chosen = f"{TUNED}, {shared} of {len(image_ids)}, {labels}"
    elif known:
        chosen = f"chosen on other images, {labels}"
    else:
        chosen = f"chosen on other images, on classes held out ({', '.join(result['unseen'])}), {labels}"
    return Choice(curve["best"]["gamma"], chosen)


def check_weight(given: str) -> None:
    weight = as_number(given)
    if not (Path(given).is_file() if weight is None else 0 <= weight <= 1):
        raise InputError(f"--ensemble_weight must be in [0, 1] or a file of zs3.ensemble_weight, got {given!r}")


def chosen_weight(given: str, stamp: dict, image_ids: list[str]) -> Choice:
    """A number as it is; of a file of zs3.ensemble_weight its answer, and what its choice knew."""
    weight = as_number(given)
    return best_weight(Path(given), stamp, image_ids) if weight is None else Choice(weight, BY_HAND)


def best_weight(path: Path, stamp: dict, image_ids: list[str]) -> Choice:
    needed = ("clip_ensemble_weight", "weights", "settings", "checkpoint_sha256", "dataset", "image_ids")
    answer = read_fields(path, needed, "zs3.ensemble_weight")
    weight, asked = answer["clip_ensemble_weight"], answer["settings"]
    if weight is not None and not (type(weight) in (int, float) and 0 <= weight <= 1):
        raise InputError(f"--ensemble_weight {path}: its weight must be null or in [0, 1], got {weight!r}")
    if answer["checkpoint_sha256"] != stamp["checkpoint_sha256"]:
        raise InputError(
            f"--ensemble_weight {path} was chosen for another checkpoint: choose for this one, python -m "
            f"zs3.ensemble_weight --model {stamp['model']} --output {path}, with the other flags as before"
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


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown; a bar in a cell ends no cell."""
    lines = [[cell.replace("|", r"\|") for cell in cells] for cells in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def class_table(result: dict[str, Any], confusion: ConfusionMatrix) -> str:
    """CSV, one line a class: IoU in [0, 1] with its interval, areas in pixels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    told = result["setting"] != "ovs"  # where seen and unseen are words
    kinds = {name: "unseen" if name in result["unseen"] else "seen" for name in result["per_class"]} if told else {}
    writer.writerow(["class", "kind", "iou", "low", "high", "intersection", "truth", "predicted"])
    areas = np.stack(class_areas(confusion.counts), axis=1)
    for (name, iou), own in zip(result["per_class"].items(), areas.tolist(), strict=True):
        writer.writerow([name, kinds.get(name), iou, *result["per_class_intervals"][name], *own])
    return text.getvalue()


def report(result: dict[str, Any]) -> str:
    """Markdown, percent."""
    title = f"{result['setting']}: {result['model']} on {result['num_images']} images of {result['dataset']}"
    lines = [f"{title}, {result['split']}", "", f"Protocol: {result['protocol']}.", ""]
    rows = [
        [title, percent(result[name]), _range(result["confidence_intervals"][name])]
        for name, title in SCORES.items()
        if result[name] is not None
    ]
    lines += [*markdown_table(["score", "percent", "95 % interval over images"], rows), "", *_sentences(result), ""]
    pairs = [
        [pair["truth"], pair["predicted"], str(pair["pixels"]), percent(pair["share"])]
        for pair in result["worst_pairs"]
    ]
    head = ["truth", "prediction", "pixels", "percent of the truth"]
    lines += ["Largest confusions:", "", *markdown_table(head, pairs), ""]
    told = result["setting"] != "ovs"
    rows = [
        [
            name + (" (unseen)" if told and name in result["unseen"] else ""),
            percent(iou),
            _range(result["per_class_intervals"][name]),
        ]
        for name, iou in result["per_class"].items()
    ]
    return "\n".join([*lines, *markdown_table(["class", "IoU", "95 % interval"], rows)]) + "\n"


def _sentences(result: dict[str, Any]) -> Iterable[str]:
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


def _rejection(rejection: dict[str, Any]) -> Iterable[str]:
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
