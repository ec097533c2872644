"""The seen bias and the ensemble weight of an evaluation, from a number or a file, and how each was chosen."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import TypedDict

from configuration_zs3 import shared, shortened
from zs3.command_line import InputError, checked, shown
from zs3.command_line import Share as ShareFlag
from zs3.evaluation.result_types import Chosen, Ensemble, Result
from zs3.evaluation.results import read_images, read_result
from zs3.typed_json import read_json, shown_value

BY_HAND = "chosen by hand: it may be tuned on these images"
TUNED = "TUNED ON THE TEST IMAGES"


def number_or_none(given: str) -> float | None:
    """The number that a flag gives. None: it gives the name of a file."""
    try:
        return float(given)
    except ValueError:
        return None


def chosen(given: str, best: Callable[..., Chosen], stamp: Result, image_ids: list[str]) -> Chosen:
    """given: a number, or a file. best: reads the answer of such a file."""
    value = number_or_none(given)
    return best(Path(given), stamp, image_ids) if value is None else Chosen(value, BY_HAND)


# ---- the bias ------------------------------------------------------------------------------------------------


def check_bias(given: str) -> None:
    bias = number_or_none(given)
    if bias is not None:
        checked("seen_bias", bias, float)


def chosen_bias(given: str | None, stamp: Result, image_ids: list[str]) -> Chosen:
    """given: None, a number, or a result file with a curve that has a best bias."""
    return Chosen(0.0, "none") if given is None else chosen(given, best_bias, stamp, image_ids)


def best_bias(path: Path, stamp: Result, image_ids: list[str]) -> Chosen:
    result, unseen = read_result(path, ("dataset", "split", "seen", "unseen", "trained_on_masks_of")), stamp["unseen"]
    curve = result.get("seen_unseen_curve") or {}
    if curve.get("best") is None:
        raise InputError(
            f"--seen_bias {shown(path)}: it has no curve; evaluate again, with --setting gzs3 and calibration"
        )
    leaked = shared(unseen, result["trained_on_masks_of"])
    if leaked:
        raise InputError(
            f"--seen_bias {shown(path)}: its model saw masks of {shortened(leaked)}, which are unseen here"
        )
    known = shared(unseen, [*result["seen"], *result["unseen"]])
    labels = f"with labels of the unseen classes ({', '.join(known)})" if known else "without labels of unseen classes"
    both = 0
    if (result["dataset"], result["split"]) == (stamp["dataset"], stamp["split"]):
        both = len({*read_images(path, result).image_ids} & {*image_ids})
    if both:
        how = f"{TUNED}, {both} of {len(image_ids)}, {labels}"
    elif known:
        how = f"chosen on other images, {labels}"
    else:
        how = f"chosen on other images, on classes held out ({', '.join(result['unseen'])}), {labels}"
    return Chosen(curve["best"]["gamma"], how)


# ---- the ensemble --------------------------------------------------------------------------------------------


def check_weight(given: str) -> None:
    weight = number_or_none(given)
    if weight is not None:
        checked("ensemble_weight", weight, ShareFlag)
    elif not Path(given).is_file():
        raise InputError(
            f"--ensemble_weight must be in [0, 1] or a file of zs3 ensemble_weight, got {shortened(given)}"
        )


def chosen_ensemble(
    model: PreTrainedModel,
    view: str | None,
    weight: str | None,
    stamp: Result,
    image_ids: list[str],
    encoder: str | None = None,
) -> Ensemble:
    """view, weight: as given; None: the checkpoint's own. encoder: another one, with which both are given."""
    if encoder is not None:
        if model.config.seen_class_names is None:
            raise InputError("no ensemble: the checkpoint does not say which classes its training saw masks of")
        return Ensemble(view, Chosen(float(weight), BY_HAND))
    given = None if weight is None else chosen(weight, best_weight, stamp, image_ids)
    if given is not None and given.value is None:
        if view is None:
            return Ensemble("off", given)
        raise InputError(f"{weight} says not to ensemble: leave --ensemble {view} out, or give a number")
    try:
        view = model.ensemble_view(view, None if given is None else given.value)
    except ValueError as error:
        raise InputError(str(error)) from error
    if view == "off":
        return Ensemble(view, Chosen(None, "none"))
    return Ensemble(view, given or Chosen(model.config.clip_ensemble_weight, "the checkpoint's"))


class WeightSettings(TypedDict, total=False):
    """The flags of zs3 ensemble_weight that say which images and labels its answer comes from."""

    split: str
    unseen_labels: str


class WeightAnswer(TypedDict, total=False):
    """The content of a file of zs3 ensemble_weight, as far as eval.py reads it."""

    settings: WeightSettings
    checkpoint_sha256: str | None
    dataset: str
    image_ids: list[str]
    weights: dict[str, dict[str, float | None]]
    clip_ensemble_weight: Any  # best_weight checks it


def read_answer(path: Path, needed: Sequence[str] = ()) -> WeightAnswer:
    """A file of zs3 ensemble_weight, checked."""
    return read_json(path, WeightAnswer, "result file of zs3 ensemble_weight", "choose again", needed)


def best_weight(path: Path, stamp: Result, image_ids: list[str]) -> Chosen:
    needed = ("clip_ensemble_weight", "weights", "settings.split", "settings.unseen_labels")
    answer = read_answer(path, (*needed, "checkpoint_sha256", "dataset", "image_ids"))
    weight, asked = answer["clip_ensemble_weight"], answer["settings"]
    if weight is not None and not (type(weight) in (int, float) and 0 <= weight <= 1):
        what = f"its weight must be null or in [0, 1], got {shown_value(weight)}"
        raise InputError(f"--ensemble_weight {shown(path)}: {what}")
    if answer["checkpoint_sha256"] != stamp["checkpoint_sha256"]:
        raise InputError(
            f"--ensemble_weight {shown(path)} was chosen for another checkpoint: choose for this one with "
            "zs3 ensemble_weight, the other flags as before"
        )
    both = 0
    if (answer["dataset"], asked["split"]) == (stamp["dataset"], stamp["split"]):
        both = len({*answer["image_ids"]} & {*image_ids})
    how = f"chosen on {len(answer['image_ids'])} images of {answer['dataset']}, split {asked['split']}"
    if both:
        how = f"{TUNED}, {both} of {len(image_ids)}"
    truth = asked["unseen_labels"] == "ground_truth"
    labels = "ground-truth image labels" if truth else f"the image labels in {Path(asked['unseen_labels']).name}"
    return Chosen(weight, f"{how}, with {labels}")
