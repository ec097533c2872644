"""Evaluation: the confusion matrix of a dataset, IoU and its means over seen and unseen classes, intervals.

Everything is dataset-level: intersections and unions are summed over all images before they are divided, and the
mean over classes comes last. IoUs and scores are shares in [0, 1], in percent only where they are printed.

Axes: H W pixels, C classes, N images, R resamples.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from zs3.command_line import InputError

REJECTED = -1  # in a prediction: no class
RESAMPLES_AT_ONCE = 100  # bounds the memory of a bootstrap: that many x N counts

Absent = Literal["union", "truth"]


class GeneralizedScores(NamedTuple):
    """Dataset-level means of IoU, in [0, 1]; NaN where there is no class to take the mean over."""

    miou_seen: float
    miou_unseen: float
    hiou: float


class ConfusionMatrix:
    """Counts of pixels by true and predicted class, over all images seen so far.

    counts: (C, C + 1) int64, [truth, prediction]; the last column counts rejected pixels.
    images: per image the rows (class, intersection, truth, predicted) of its classes, (K, 4) int64 in pixels;
        what the intervals need.
    """

    def __init__(self, num_classes: int, ignore_index: int):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        self.images: list[np.ndarray] = []

    def update(self, prediction: Tensor | np.ndarray, label: Tensor | np.ndarray) -> None:
        """Counts one image (H, W), or a batch of them (B, H, W).

        prediction: integers in 0 to C - 1, or REJECTED: such a pixel is missing from its true class's
            intersection, and counts against no other class.
        label: ids in 0 to C - 1, or ignore_index: such a pixel counts nowhere.
        """
        prediction, label = _integers(prediction, "prediction"), _integers(label, "label map")
        if prediction.shape != label.shape:
            raise ValueError(f"prediction has shape {prediction.shape}, but the label map {label.shape}")
        if label.ndim == 3:
            for one_prediction, one_label in zip(prediction, label, strict=True):
                self.update(one_prediction, one_label)
            return
        if prediction.size and not REJECTED <= prediction.min() <= prediction.max() < self.num_classes:
            raise ValueError(f"prediction must lie in {REJECTED} to {self.num_classes - 1}")
        label, prediction = (values[label != self.ignore_index] for values in (label, prediction))
        if label.size and not 0 <= label.min() <= label.max() < self.num_classes:
            raise InputError(
                f"label map holds ids from {label.min()} to {label.max()} besides the ignored {self.ignore_index}; "
                f"they must lie in 0 to {self.num_classes - 1}"
            )
        columns = self.num_classes + 1
        column = np.where(prediction == REJECTED, self.num_classes, prediction)
        counts = np.bincount(label * columns + column, minlength=self.counts.size).reshape(self.counts.shape)
        self.counts += counts
        self.images.append(_image_rows(*_areas(counts)))

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of another part of the dataset."""
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError("confusion matrices of two label spaces cannot be merged")
        self.counts += other.counts
        self.images += other.images

    def iou(self, absent: Absent = "union") -> np.ndarray:
        """(C,) float64 in [0, 1], NaN for the classes that are left out of means.

        absent: "union": a class is left out if neither truth nor prediction has it, so that one which is only
            predicted counts as 0. "truth": it is left out if the truth has not got it.
        """
        return _iou(*_areas(self.counts), absent)

    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels that got their true class, in [0, 1]; NaN without any."""
        return float(_ratio(np.trace(self.counts), self.counts.sum()))

    def confidence_intervals(
        self,
        is_seen: Sequence[bool] | Tensor | np.ndarray,
        *,
        absent: Absent = "union",
        resamples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap over images: (low, high) of miou, miou_seen, miou_unseen, hiou at `level`.

        Each resample draws N images with replacement. The order in which the images came makes no difference.
        """
        names = ("miou", *GeneralizedScores._fields)
        if not self.images:
            return dict.fromkeys(names, (float("nan"), float("nan")))
        images = sorted(self.images, key=lambda rows: rows.tobytes())
        intersection, truth, predicted = (self._by_class(images, column) for column in (1, 2, 3))
        rng = np.random.default_rng(seed)
        scores = []
        for start in range(0, resamples, RESAMPLES_AT_ONCE):
            size = min(RESAMPLES_AT_ONCE, resamples - start)
            drawn = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), size=size)  # (R, N)
            areas = ((area @ drawn.T).T for area in (intersection, truth, predicted))  # (R, C) each
            iou = _iou(*areas, absent)
            scores.append(np.stack([_nanmean(iou), *_generalized(iou, _mask(is_seen, self.num_classes))]))
        tail = (1 - level) / 2
        return {
            name: _interval(values, tail) for name, values in zip(names, np.concatenate(scores, axis=1), strict=True)
        }

    def _by_class(self, images: list[np.ndarray], column: int) -> csr_array:
        """(C, N) int64, sparse: one of the three areas of every class in every image."""
        rows = np.concatenate(images)
        image = np.repeat(np.arange(len(images)), [len(own) for own in images])
        return csr_array((rows[:, column], (rows[:, 0], image)), shape=(self.num_classes, len(images)))


def percent(score: float | None) -> str:
    """A score in [0, 1] as it is printed."""
    return "  -  " if score is None else f"{100 * score:5.1f}"


def generalized_scores(
    iou: Sequence[float] | Tensor | np.ndarray, is_seen: Sequence[bool] | Tensor | np.ndarray
) -> GeneralizedScores:
    """Means of IoU over the seen and over the unseen classes, and their harmonic mean (0 if both are 0).

    iou: (C,) in [0, 1] over the whole dataset; NaN classes are left out. is_seen: (C,) bool.
    """
    iou = np.asarray(_on_cpu(iou), dtype=np.float64)
    return GeneralizedScores(*(float(score) for score in _generalized(iou, _mask(is_seen, len(iou)))))


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the precision-recall curve in steps, in [0, 1]; NaN where nothing is true.

    scores: (N,). truth: (N,) bool. Equal scores enter together, so their order makes no difference: each distinct
    score adds the recall it brings, times the precision from there up.
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
    seen, unseen = _nanmean(iou[..., is_seen]), _nanmean(iou[..., ~is_seen])
    total = seen + unseen
    return seen, unseen, np.where(total == 0, 0.0, 2 * _ratio(seen * unseen, total))


def _areas(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """counts (C, C + 1) -> intersection, truth, predicted, each (C,) in pixels."""
    return np.diagonal(counts), counts.sum(axis=1), counts[:, :-1].sum(axis=0)


def _image_rows(intersection: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    (present,) = np.nonzero(truth + predicted)
    return np.stack([present, intersection[present], truth[present], predicted[present]], axis=1)


def _iou(intersection: np.ndarray, truth: np.ndarray, predicted: np.ndarray, absent: Absent) -> np.ndarray:
    iou = _ratio(intersection, truth + predicted - intersection)
    if absent == "union":
        return iou
    if absent == "truth":
        return np.where(truth == 0, np.nan, iou)
    raise ValueError(f"absent is 'union' or 'truth', not {absent!r}")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN, without a warning, where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.asarray(numerator) / np.where(denominator == 0, np.nan, denominator)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """(..., C) -> (...): the mean of what is not NaN; NaN if nothing is."""
    return _ratio(np.nansum(values, axis=-1), np.count_nonzero(~np.isnan(values), axis=-1))


def _interval(values: np.ndarray, tail: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _mask(is_seen: Sequence[bool] | Tensor | np.ndarray, num_classes: int) -> np.ndarray:
    mask = np.asarray(_on_cpu(is_seen))
    if mask.shape != (num_classes,) or mask.dtype != np.bool_:
        raise ValueError(f"is_seen must be ({num_classes},) bool, not {mask.shape} {mask.dtype}")
    return mask


def _integers(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(_on_cpu(values))
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {values.dtype}")
    return values.astype(np.int64, copy=False)


def _on_cpu(values: object) -> object:
    return values.detach().cpu() if isinstance(values, torch.Tensor) else values
