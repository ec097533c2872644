"""Evaluation: the confusion matrix of a dataset, IoU and its means over seen and unseen classes, intervals.

Everything is dataset-level: intersections and unions are summed over all images before they are divided, and the
mean over classes comes last. IoUs and scores are shares in [0, 1], in percent only where they are printed.

Axes: H W pixels, C classes, N images, R resamples.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from configuration_zs3 import Refused, check_names
from files_zs3 import decoding
from zs3.command_line import InputError, shown
from zs3.files import writing

REJECTED = -1  # in a prediction: no class
RESAMPLES_AT_ONCE = 100  # bounds the memory of a bootstrap: that many x N counts
LEVEL = 0.95  # of the intervals
MOST_OF_AREAS = 2**29  # bytes, unpacked; a class in an image takes 40

Absent = Literal["union", "truth"]
SCORES = {
    "miou_seen": "mIoU(S)",
    "miou_unseen": "mIoU(U)",
    "hiou": "hIoU",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
}  # by their names in result files, as they are printed


class GeneralizedScores(NamedTuple):
    """Dataset-level means of IoU, in [0, 1]; NaN where there is no class to take the mean over."""

    miou_seen: float
    miou_unseen: float
    hiou: float


class ConfusedPair(NamedTuple):
    """Pixels of one class that got the name of another."""

    truth: int
    predicted: int
    pixels: int
    share: float  # of the true class's labelled pixels, in (0, 1]


class AreaShares(NamedTuple):
    """Where the labelled pixels of a group of classes went: shares in [0, 1] that sum to 1; NaN without any pixel."""

    right: float
    wrong_seen: float  # the name of a seen class that is not theirs
    wrong_unseen: float
    rejected: float


class SeenUnseenConfusion(NamedTuple):
    """of_unseen.wrong_seen is the bias towards seen classes: the share of the unseen area that got seen names."""

    of_seen: AreaShares
    of_unseen: AreaShares


class ImageAreas(NamedTuple):
    """The areas that make up IoU, of every class in every image: (C, N) int64 each, in pixels, sparse."""

    intersection: csr_array
    truth: csr_array
    predicted: csr_array


class SavedImages(NamedTuple):
    """What `save_images` wrote."""

    class_names: list[str]  # C
    image_ids: list[str | None]  # N
    areas: ImageAreas


class Bootstrap(NamedTuple):
    """Scores and IoU in R resamples of the images; NaN where a resample has no class to take the mean over.

    scores: (R,) by name, those of `scores_of_areas`. iou: (R, C).
    """

    scores: dict[str, np.ndarray]
    iou: np.ndarray

    def intervals(self, level: float = LEVEL) -> dict[str, tuple[float, float]]:
        """(low, high) of each score."""
        return {name: interval(values, level) for name, values in self.scores.items()}

    def class_intervals(self, level: float = LEVEL) -> np.ndarray:
        """(C, 2) low and high of the IoU of each class. They are not corrected for the number of classes."""
        return np.array([interval(values, level) for values in self.iou.T])


class ConfusionMatrix:
    """Counts of pixels by true and predicted class, over all images seen so far.

    counts: (C, C + 1) int64, [truth, prediction]; the last column counts rejected pixels.
    images: per image the rows (class, intersection, truth, predicted) of its classes, (K, 4) int64 in pixels;
        what the intervals need.
    image_ids: the name of each of them, None where it was given none.
    """

    def __init__(self, num_classes: int, ignore_index: int):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        self.images: list[np.ndarray] = []
        self.image_ids: list[str | None] = []

    def update(
        self,
        prediction: Tensor | np.ndarray,
        label: Tensor | np.ndarray,
        image_id: str | Sequence[str] | None = None,
    ) -> None:
        """Counts one image (H, W), or a batch of them (B, H, W) with a list of ids. A tensor on a GPU is copied once.

        prediction: integers in 0 to C - 1, or REJECTED: such a pixel is missing from its true class's
            intersection, and counts against no other class.
        label: ids in 0 to C - 1, or ignore_index: such a pixel counts nowhere.
        """
        prediction, label = _integers(prediction, "prediction"), _integers(label, "label map")
        if prediction.shape != label.shape:
            raise ValueError(f"prediction has shape {prediction.shape}, but the label map {label.shape}")
        if label.ndim == 3:
            ids = [None] * len(label) if image_id is None else image_id
            if isinstance(ids, str) or len(ids) != len(label):
                raise ValueError(f"a batch of {len(label)} label maps takes a list of as many ids, not {image_id!r}")
            for one_prediction, one_label, one_id in zip(prediction, label, ids, strict=True):
                self.update(one_prediction, one_label, one_id)
            return
        prediction, label, pixels = _runs(prediction.ravel(), label.ravel())
        if prediction.size and not REJECTED <= prediction.min() <= prediction.max() < self.num_classes:
            raise ValueError(f"prediction must lie in {REJECTED} to {self.num_classes - 1}")
        labelled = label != self.ignore_index
        prediction, label, pixels = prediction[labelled], label[labelled], pixels[labelled]
        if label.size and not 0 <= label.min() <= label.max() < self.num_classes:
            raise InputError(
                f"label map holds ids from {label.min()} to {label.max()} besides the ignored {self.ignore_index}; "
                f"they must lie in 0 to {self.num_classes - 1}"
            )
        column = np.where(prediction == REJECTED, self.num_classes, prediction)
        # No dense (C, C + 1) matrix an image: at 847 classes it has more entries than the image has pixels.
        np.add.at(self.counts.reshape(-1), label * (self.num_classes + 1) + column, pixels)
        right = label == prediction
        intersection, truth, predicted = (
            _summed(place, own, self.num_classes)
            for place, own in ((label[right], pixels[right]), (label, pixels), (column, pixels))
        )
        (present,) = np.nonzero(truth + predicted)
        self.images.append(np.stack([present, intersection[present], truth[present], predicted[present]], axis=1))
        self.image_ids.append(image_id)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of another part of the dataset."""
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError("confusion matrices of two label spaces cannot be merged")
        self.counts += other.counts
        self.images += other.images
        self.image_ids += other.image_ids

    def iou(self, absent: Absent = "union") -> np.ndarray:
        """(C,) float64 in [0, 1], NaN for the classes that are left out of means.

        absent: "union": a class is left out if neither truth nor prediction has it, so that one which is only
            predicted counts as 0. "truth": it is left out if the truth has not got it.
        """
        return iou_of_areas(*class_areas(self.counts), absent)

    def scores(self, is_seen: Sequence[bool] | Tensor | np.ndarray, absent: Absent = "union") -> dict[str, float]:
        """The scores of `scores_of_areas` over all images. is_seen: (C,) bool."""
        scores = scores_of_areas(*class_areas(self.counts), is_seen, absent)
        return {name: float(score) for name, score in scores.items()}

    def worst_pairs(self, count: int) -> list[ConfusedPair]:
        """The `count` pairs of classes that most pixels were confused in, or all there are; largest first."""
        wrong = self.counts[:, :-1] * ~np.eye(self.num_classes, dtype=bool)
        truth, predicted = np.nonzero(wrong)
        pixels, whole = wrong[truth, predicted], self.counts.sum(axis=1)
        largest = np.argsort(-pixels, kind="stable")[:count]  # equal ones in the order of their ids
        return [
            ConfusedPair(int(truth[at]), int(predicted[at]), int(pixels[at]), float(pixels[at] / whole[truth[at]]))
            for at in largest
        ]

    def seen_unseen_confusion(self, is_seen: Sequence[bool] | Tensor | np.ndarray) -> SeenUnseenConfusion:
        """What the areas of the seen and of the unseen classes were taken for. is_seen: (C,) bool."""
        is_seen = class_mask(is_seen, self.num_classes)
        right = np.diagonal(self.counts)
        wrong_seen, wrong_unseen = (
            self.counts[:, :-1] @ group.astype(np.int64) - right * group for group in (is_seen, ~is_seen)
        )
        columns = np.stack([right, wrong_seen, wrong_unseen, self.counts[:, -1]], axis=1)  # (C, 4)
        pixels = (columns[group].sum(axis=0) for group in (is_seen, ~is_seen))
        return SeenUnseenConfusion(*(AreaShares(*_ratio(own, own.sum()).tolist()) for own in pixels))

    def bootstrap(
        self,
        is_seen: Sequence[bool] | Tensor | np.ndarray,
        *,
        absent: Absent = "union",
        resamples: int = 1000,
        seed: int = 0,
    ) -> Bootstrap:
        """Scores and IoU in resamples of the images. The order in which the images came makes no difference."""
        order = sorted(range(len(self.images)), key=lambda index: self.images[index].tobytes())
        areas = resampled_areas(self.image_areas(order), resamples, seed)
        return Bootstrap(scores_of_areas(*areas, is_seen, absent), iou_of_areas(*areas, absent))

    def image_areas(self, order: Sequence[int]) -> ImageAreas:
        """Of the images at these places of `images`, in this order."""
        images = [self.images[index] for index in order]
        return _image_areas(_all_rows(images), _image_of_rows(images), self.num_classes, len(images))

    def save_images(self, path: Path, class_names: Sequence[str]) -> None:
        """Writes the areas of all images to one .npz, for `load_images`: what a paired comparison needs."""
        if len(class_names) != self.num_classes:
            raise ValueError(f"{len(class_names)} class names for {self.num_classes} classes")
        with writing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                class_names=np.array(class_names, dtype=np.str_),
                image_ids=np.array(["" if image_id is None else image_id for image_id in self.image_ids], np.str_),
                image=_image_of_rows(self.images),
                rows=_all_rows(self.images),
            )


def images_path(result: Path) -> Path:
    """Where the areas of the images lie that the numbers of a result file are made of."""
    return result.with_name(f"{result.stem}_images.npz")


def load_images(path: Path) -> SavedImages:
    """What `save_images` wrote there."""
    if not path.exists():
        raise InputError(f"{shown(path)} does not exist: eval.py writes it beside its --output; evaluate again")
    try:
        with decoding():
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > MOST_OF_AREAS:
                    raise Refused(f"it is more than {MOST_OF_AREAS:,} bytes unpacked")
            with np.load(path, allow_pickle=False) as file:
                names, ids, image, rows = (file[name] for name in ("class_names", "image_ids", "image", "rows"))
            _check_arrays(names, ids, image, rows)
            areas = _image_areas(rows, image, len(names), len(ids))
    except Refused as error:
        raise InputError(f"{shown(path)} is no file of image areas, or is broken: evaluate again") from error
    return SavedImages(names.tolist(), [image_id or None for image_id in ids.tolist()], areas)


def _check_arrays(names: np.ndarray, ids: np.ndarray, image: np.ndarray, rows: np.ndarray) -> None:
    """Raises ValueError where these are not what `save_images` writes: class_names, image_ids, image and rows."""
    for texts in (names, ids):
        if texts.dtype.kind != "U" or texts.ndim != 1:
            raise ValueError("names and ids are texts")
    check_names(names.tolist())
    for numbers, shape in ((image, (len(rows),)), (rows, (len(rows), 4))):
        if numbers.dtype != np.int64 or numbers.shape != shape:
            raise ValueError("image and rows are whole numbers, as many as there are classes in images")
    place, (intersection, truth, predicted) = rows[:, 0], rows[:, 1:].T
    for values, end in ((image, len(ids)), (place, len(names))):
        if len(values) and not 0 <= values.min() <= values.max() < end:
            raise ValueError("a row is of an image or a class that is not there")
    if len(rows) and (intersection.min() < 0 or (intersection > np.minimum(truth, predicted)).any()):
        raise ValueError("an intersection lies in the areas that it is of")
    if rows[:, 1:].sum(axis=0, dtype=np.float64).max() >= 2**53:
        raise ValueError("more pixels than are counted exactly")
    if len(np.unique(image * len(names) + place)) != len(rows):
        raise ValueError("a class has one row in an image")


def summed_areas(areas: ImageAreas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """intersection, truth, predicted over all of the images, each (C,) in pixels."""
    intersection, truth, predicted = (area.sum(axis=1) for area in areas)
    return intersection, truth, predicted


def resampled_areas(areas: ImageAreas, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """intersection, truth, predicted over the images of each resample, which draws N images with replacement: (R, C).

    The same seed draws the same places among N images, whatever their areas: two models are compared in pairs.
    """
    num_classes, num_images = areas.truth.shape
    summed = np.zeros((3, resamples, num_classes), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for start in range(0, resamples if num_images else 0, RESAMPLES_AT_ONCE):
        part = summed[:, start : start + RESAMPLES_AT_ONCE]
        drawn = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=part.shape[1])  # (R, N)
        for own, area in zip(part, areas, strict=True):
            own[:] = (area @ drawn.T).T
    intersection, truth, predicted = summed
    return intersection, truth, predicted


def headline_scores(iou: np.ndarray, is_seen: Sequence[bool] | Tensor | np.ndarray) -> dict[str, np.ndarray]:
    """iou (..., C) -> miou, miou_seen, miou_unseen and hiou, each (...)."""
    generalized = _generalized(iou, class_mask(is_seen, iou.shape[-1]))
    return {"miou": _nanmean(iou), **dict(zip(GeneralizedScores._fields, generalized, strict=True))}


def scores_of_areas(
    intersection: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    is_seen: Sequence[bool] | Tensor | np.ndarray,
    absent: Absent,
) -> dict[str, np.ndarray]:
    """Areas (..., C) in pixels -> the scores named in SCORES, each (...) in [0, 1]; NaN without a labelled pixel.

    Pixel accuracy is the share of the labelled pixels that got their true class. Frequency-weighted IoU weights each
    class by them: one that the truth has not got weighs nothing, so both rules for absent classes give one number.
    """
    iou, pixels = iou_of_areas(intersection, truth, predicted, absent), truth.sum(axis=-1)
    return headline_scores(iou, is_seen) | {
        "pixel_accuracy": _ratio(intersection.sum(axis=-1), pixels),
        "frequency_weighted_iou": _ratio(np.nansum(truth * iou, axis=-1), pixels),
    }


def class_mask(is_seen: Sequence[bool] | Tensor | np.ndarray, num_classes: int) -> np.ndarray:
    """is_seen as (C,) bool; anything else is refused."""
    mask = np.asarray(_on_cpu(is_seen))
    if mask.shape != (num_classes,) or mask.dtype != np.bool_:
        raise ValueError(f"is_seen must be ({num_classes},) bool, not {mask.shape} {mask.dtype}")
    return mask


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The quantiles between which `level` of the values lie, as many above as below; NaN values are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def percent(score: float | None) -> str:
    """A score in [0, 1] as it is printed."""
    return "-" if score is None else f"{100 * score:.1f}"


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


def class_areas(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """counts (C, C + 1) -> intersection, truth, predicted, each (C,) in pixels."""
    return np.diagonal(counts), counts.sum(axis=1), counts[:, :-1].sum(axis=0)


def _runs(prediction: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two flat maps (P,) as runs of equal neighbours: prediction, label and pixels of each, int64.

    Objects are wider than a pixel, so that all further work is on a few percent of the pixels.
    """
    first = np.ones(label.size, dtype=bool)
    np.not_equal(label[1:], label[:-1], out=first[1:])
    first[1:] |= prediction[1:] != prediction[:-1]
    (starts,) = np.nonzero(first)
    pixels = np.diff(starts, append=label.size)
    return prediction[starts].astype(np.int64), label[starts].astype(np.int64), pixels


def _summed(place: np.ndarray, pixels: np.ndarray, size: int) -> np.ndarray:
    """(size,) int64: the pixels at each place; what lies beyond is left out."""
    total = np.bincount(place, weights=pixels, minlength=size)[:size]  # float64 is exact here: far below 2**53
    return total.astype(np.int64)


def _all_rows(images: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty((0, 4), dtype=np.int64), *images])


def _image_of_rows(images: list[np.ndarray]) -> np.ndarray:
    return np.repeat(np.arange(len(images)), np.array([len(rows) for rows in images], dtype=np.int64))


def _image_areas(rows: np.ndarray, image: np.ndarray, num_classes: int, num_images: int) -> ImageAreas:
    """rows: (K, 4) class, intersection, truth, predicted; image: (K,) the place of the image of each row."""
    shape = (num_classes, num_images)
    return ImageAreas(*(csr_array((rows[:, column], (rows[:, 0], image)), shape=shape) for column in (1, 2, 3)))


def iou_of_areas(intersection: np.ndarray, truth: np.ndarray, predicted: np.ndarray, absent: Absent) -> np.ndarray:
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


def _integers(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(_on_cpu(values))
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {values.dtype}")
    return values


def _on_cpu(values: object) -> object:
    return values.detach().cpu() if isinstance(values, torch.Tensor) else values
