"""A result in words: its protocol in a sentence, and its report in Markdown."""

import math
from collections.abc import Iterable
from pathlib import Path

from configuration_zs3 import shared
from zs3.evaluation.result_types import RejectionResult, Result
from zs3.scores.means import SCORES
from zs3.tables import markdown, markdown_table, percent, percent_range

IMAGE_LABELS = {  # of unseen classes in training, by `unseen_labels`
    "none": "no image labels",
    "pseudo": "pseudo image labels",
    "captions": "nouns of captions",
    "ground_truth": "ground-truth image labels",
}


OWN_SPACE = "the dataset's own"


def candidates_in_words(result: Result) -> str:
    """The number of candidates, in the words of the setting."""
    seen, unseen = len(result["seen"]), len(result["unseen"])
    words = {"gzs3": f"{seen} seen and {unseen} unseen names", "zs3": f"{unseen} unseen names"}
    return words.get(result["setting"], f"{seen + unseen} names")


def ensemble_encoder(result: Result) -> str | None:
    """The name of the encoder of --encoder, whose view of the proposals is ensembled; None: the checkpoint's own."""
    encoder = result.get("settings", {}).get("encoder")
    return None if encoder is None else Path(str(encoder)).resolve().name


def protocol(result: Result) -> str:
    """The conditions of this result's numbers, in a sentence."""
    calibration, parts = result["calibration"], [f"{result['setting']}, {candidates_in_words(result)}"]
    if result["without"]:
        parts.append(f"without {', '.join(result['without'])}")
    if result["num_images"] < result["split_images"]:
        parts.append(f"the first {result['num_images']} of {result['split_images']} images")
    how = calibration["ensemble_weight_chosen"]
    if result["clip_ensemble"] == "off":
        parts.append("no ensemble" if how == "none" else f"no ensemble ({how})")
    else:
        view, weight = result["clip_ensemble"], result["clip_ensemble_weight"]
        parts.append(f"ensemble with {ensemble_encoder(result) or 'CLIP'} ({view}, weight {weight}, {how})")
    how = calibration["seen_bias_chosen"]
    if how != "none":
        parts.append(f"{calibration['seen_bias']:.4g} off the scores of seen classes, {how}")
    if result["setting"] != "ovs":
        labels = IMAGE_LABELS.get(result["unseen_labels_in_training"])
        parts.append(
            f"training had {labels} of unseen classes"
            if labels is not None
            else "it is not known which image labels of unseen classes training had"
        )
    elif result["trained_on_masks_of"] is not None:
        trained = shared(list(result["per_class"]), result["trained_on_masks_of"])
        parts.append(f"training saw masks of {len(trained)} of them")
    absent = {"union": "truth and prediction", "truth": "the truth"}[result["absent"]]
    return "; ".join([*parts, f"classes absent from {absent} are left out of means"])


def report(result: Result) -> str:
    """Markdown, percent."""
    title = f"{result['setting']}: {result['model']} on {result['num_images']} images of {result['dataset']}, "
    title += f"{result['split']}{space_in_words(result)}"
    scores = [
        [title, percent(result[name]), percent_range(result["confidence_intervals"][name])]
        for name, title in SCORES.items()
        if result.get(name) is not None
    ]
    pairs = [
        [markdown(pair["truth"]), markdown(pair["predicted"]), str(pair["pixels"]), percent(pair["share"])]
        for pair in result["worst_pairs"]
    ]
    unseen = [] if result["setting"] == "ovs" else result["unseen"]
    classes = [
        [
            markdown(name) + (" (unseen)" if name in unseen else ""),
            percent(iou),
            percent_range(result["per_class_intervals"][name]),
        ]
        for name, iou in result["per_class"].items()
    ]
    lines = [
        *(markdown(title), "", f"Protocol: {markdown(result['protocol'])}.", ""),
        *(*markdown_table(["score", "percent", "95 % interval over images"], scores), "", *_sentences(result), ""),
        *("Largest confusions:", ""),
        *(*markdown_table(["truth", "prediction", "pixels", "percent of the truth"], pairs), ""),
        *markdown_table(["class", "IoU", "95 % interval"], classes),
    ]
    return "\n".join(lines) + "\n"


def space_in_words(result: Result) -> str:
    """The label space of a result, where it is not the dataset's own; older files may lack it."""
    name = result.get("label_space", OWN_SPACE)
    return "" if name == OWN_SPACE else f", label space {name}"


def quality_in_words(precision: float | None, recall: float | None) -> str:
    """The quality of a training's image labels of unseen classes, in words; empty if it is not known."""
    if precision is None and recall is None:
        return ""
    return f"precision {percent(precision)} %, recall {percent(recall)} %"


def _sentences(result: Result) -> Iterable[str]:
    """The measures beside the scores, a line each."""
    quality = quality_in_words(result.get("image_label_precision"), result.get("image_label_recall"))
    if quality and result["setting"] != "ovs":
        yield f"- image labels of unseen classes in training: {quality}"
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
            f"{percent(curve['best']['hiou'])}, needs a seen bias of {curve['best']['gamma']:.3g}, which was found on "
            "these images: so it is no result"
        )
    if result["reliability"] is not None:
        yield f"- expected calibration error of the confidences {percent(result['reliability']['ece'])} %"
    if result["rejection"] is not None:
        yield from _rejection(result["rejection"])


def _rejection(rejection: RejectionResult) -> Iterable[str]:
    if rejection["auroc"] is not None:
        yield (
            "- confidence separates pixels of other classes from pixels of the candidates with an AUROC of "
            f"{percent(rejection['auroc'])} % (50 is chance); a threshold that accepts 95 % of the candidates' pixels "
            f"accepts {percent(rejection['fpr_at_95'])} % of the others"
        )
    found = rejection["conformal"]
    alpha, images, others = percent(found["alpha"]), found["num_calibration_images"], found["num_check_images"]
    if found["rejects_everything"]:
        yield f"- {images} images are too few, or too wrong, for a threshold with at most {alpha} % wrong labels"
    else:
        wrong, accepted = percent(found["wrong_share"]), percent(found["accepted_share"])
        threshold = math.ceil(1e5 * found["threshold"]) / 1e5  # rounded up, because a lower one accepts more
        yield (
            f"- if labels with a confidence below {threshold:.5f} are rejected, at most {alpha} % of the labelled "
            f"pixels of a new image are wrong on average (chosen on {images} images); on the {others} others {wrong} % "
            f"were wrong, and {accepted} % of the pixels kept a label"
        )
