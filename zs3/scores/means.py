"""IoU of areas, and its means over groups of classes: seen and unseen, things and stuff."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zs3.command_line import InputError

Absent = Literal["union", "truth"]
SCORES = {
    "miou_seen": "mIoU(S)",
    "miou_unseen": "mIoU(U)",
    "hiou": "hIoU",
    "miou": "mIoU",
    "miou_seen_on_seen_pixels": "mIoU(S) on seen pixels",
    "miou_things": "mIoU of things",
    "miou_stuff": "mIoU of stuff",
    "pixel_accuracy": "pixel accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
}  # name in result files -> printed name
ADDED_SCORES = ("miou_seen_on_seen_pixels", "miou_things", "miou_stuff")  # older result files lack them


class GeneralizedScores(NamedTuple):
    """Dataset-level means of IoU, in [0, 1]; NaN: the mean has no class."""

    miou_seen: float
    miou_unseen: float
    hiou: float


OF_SEEN_AND_UNSEEN = (*GeneralizedScores._fields, "miou_seen_on_seen_pixels")  # not defined in the setting ovs


class Areas(NamedTuple):
    """Areas of the classes in pixels, each (..., C).

    predicted_on_seen: the part of `predicted` on pixels whose true class is a seen one. None: not counted.
    """

    intersection: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    predicted_on_seen: np.ndarray | None = None


def headline_scores(iou: np.ndarray, is_seen: Sequence[bool] | Tensor | np.ndarray) -> dict[str, np.ndarray]:
    """iou (..., C) -> miou, miou_seen, miou_unseen and hiou, each (...)."""
    generalized = _generalized(iou, class_mask(is_seen, iou.shape[-1]))
    return {"miou": nanmean(iou), **dict(zip(GeneralizedScores._fields, generalized, strict=True))}


def scores_of_areas(
    areas: Areas,
    is_seen: Sequence[bool] | Tensor | np.ndarray,
    absent: Absent,
    is_thing: Sequence[bool] | Tensor | np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The scores named in SCORES, each (...) in [0, 1]; NaN without a labelled pixel, or where an input is None.

    mIoU(S) on seen pixels leaves out all pixels of unseen classes: a seen name there is no error. Pixel accuracy is the
    share of the labelled pixels that got their true class. Frequency-weighted IoU weights each class by its labelled
    pixels. A class that the truth lacks has weight 0, so both rules for absent classes agree.

    is_seen, is_thing: (C,) bool; is_thing None: not known.
    """
    iou, pixels = iou_of_areas(areas, absent), areas.truth.sum(axis=-1)
    is_seen = class_mask(is_seen, iou.shape[-1])
    scores = headline_scores(iou, is_seen) | dict.fromkeys(ADDED_SCORES, np.full(pixels.shape, np.nan))
    if areas.predicted_on_seen is not None:
        on_seen = iou_of_areas(areas._replace(predicted=areas.predicted_on_seen), absent)
        scores["miou_seen_on_seen_pixels"] = nanmean(on_seen[..., is_seen])
    if is_thing is not None:
        is_thing = class_mask(is_thing, iou.shape[-1], "is_thing")
        scores |= {"miou_things": nanmean(iou[..., is_thing]), "miou_stuff": nanmean(iou[..., ~is_thing])}
    return scores | {
        "pixel_accuracy": ratio(areas.intersection.sum(axis=-1), pixels),
        "frequency_weighted_iou": ratio(np.nansum(areas.truth * iou, axis=-1), pixels),
    }


def class_mask(is_member: Sequence[bool] | Tensor | np.ndarray, num_classes: int, name: str = "is_seen") -> np.ndarray:
    """is_member as (C,) bool; anything else is refused. name: of this argument, for the message."""
    mask = np.asarray(_on_cpu(is_member))
    if mask.shape != (num_classes,) or mask.dtype != np.bool_:
        raise ValueError(f"{name} must be ({num_classes},) bool, not {mask.shape} {mask.dtype}")
    return mask


def generalized_scores(
    iou: Sequence[float] | Tensor | np.ndarray, is_seen: Sequence[bool] | Tensor | np.ndarray
) -> GeneralizedScores:
    """Means of IoU over the seen and over the unseen classes, and their harmonic mean (0 if both are 0).

    iou: (C,) in [0, 1] over the whole dataset; NaN classes are left out. is_seen: (C,) bool.
    """
    iou = np.asarray(_on_cpu(iou), dtype=np.float64)
    return GeneralizedScores(*(float(score) for score in _generalized(iou, class_mask(is_seen, len(iou)))))


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the precision-recall curve in steps, in [0, 1]; NaN where nothing is true.

    scores: (N,). truth: (N,) bool. Equal scores enter together, so their order makes no difference. Each distinct score
    adds its gain of recall, times the precision of all entries with this score or a higher one.
    """
    if not np.any(truth):
        return float("nan")
    order = np.argsort(-scores)
    scores, truth = scores[order], truth[order]
    (last,) = np.nonzero(np.append(scores[1:] != scores[:-1], True))  # of each group of equal scores
    hits = np.cumsum(truth)[last]
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)))


def _generalized(iou: np.ndarray, is_seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """iou (..., C) -> miou_seen, miou_unseen, hiou, each (...)."""
    seen, unseen = nanmean(iou[..., is_seen]), nanmean(iou[..., ~is_seen])
    total = seen + unseen
    return seen, unseen, np.where(total == 0, 0.0, 2 * ratio(seen * unseen, total))


def class_areas(counts: np.ndarray, is_seen: np.ndarray | None = None) -> Areas:
    """counts: (C, C + 1). is_seen: (C,) bool; None: predicted_on_seen is not counted."""
    on_seen = None if is_seen is None else counts[is_seen, :-1].sum(axis=0)
    return Areas(np.diagonal(counts), counts.sum(axis=1), counts[:, :-1].sum(axis=0), on_seen)


def iou_of_areas(areas: Areas, absent: Absent) -> np.ndarray:
    """(..., C) in [0, 1]; NaN for the classes that the rule `absent` leaves out."""
    intersection, truth, predicted, _ = areas
    iou = ratio(intersection, truth + predicted - intersection)
    if absent == "union":
        return iou
    if absent == "truth":
        return np.where(truth == 0, np.nan, iou)
    raise ValueError(f"absent is 'union' or 'truth', not {absent!r}")


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient; NaN, without a warning, where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.asarray(numerator) / np.where(denominator == 0, np.nan, denominator)


def nanmean(values: np.ndarray) -> np.ndarray:
    """(..., C) -> (...): the mean without NaN values; NaN if all are."""
    return ratio(np.nansum(values, axis=-1), np.count_nonzero(~np.isnan(values), axis=-1))


def integers(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(_on_cpu(values))
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {values.dtype}")
    return values


def check_ids(label: Tensor | np.ndarray, num_classes: int, ignore_index: int) -> None:
    """Raises InputError for an id outside 0 to C - 1. label: the ids of labelled pixels."""
    if len(label) and not 0 <= label.min() <= label.max() < num_classes:
        raise InputError(
            f"label map holds ids from {label.min()} to {label.max()} besides the ignored {ignore_index}; "
            f"they must lie in 0 to {num_classes - 1}"
        )


def _on_cpu(values: object) -> object:
    return values.detach().cpu() if isinstance(values, torch.Tensor) else values
