"""Evaluation: the confusion matrix of a dataset, IoU and its means over seen and unseen classes, intervals.

Everything is dataset-level: intersections and unions are summed over all images before they are divided, and the
mean over classes comes last. IoUs and scores are shares in [0, 1], in percent only where they are printed.

Axes: H W pixels, C classes, N images, R resamples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from zs3.files import writing
from zs3.scores.bootstrap import Bootstrap, ImageAreas, image_areas, joined_rows, resampled_areas, runs, summed
from zs3.scores.means import Absent, check_ids, class_areas, class_mask, integers, iou_of_areas, ratio, scores_of_areas

REJECTED = -1  # in a prediction: no class


class ConfusedPair(NamedTuple):
    """Pixels of one class that got the name of another."""

    truth: int
    predicted: int
    pixels: int
    share: float  # of the true class's labelled pixels, in (0, 1]


class AreaShares(NamedTuple):
    """The shares of a group's labelled pixels by their predicted name: in [0, 1], with sum 1; NaN without any pixel."""

    right: float
    wrong_seen: float  # got the name of another class, a seen one
    wrong_unseen: float
    rejected: float


class SeenUnseenConfusion(NamedTuple):
    """of_unseen.wrong_seen is the bias towards seen classes: the share of the unseen area that got seen names."""

    of_seen: AreaShares
    of_unseen: AreaShares


class ConfusionMatrix:
    """Counts of pixels by true and predicted class, over all images seen so far.

    counts: (C, C + 1) int64, [truth, prediction]; the last column counts rejected pixels.
    images: for each image a row (class, intersection, truth, predicted) for each of its classes, (K, 4) int64 in
        pixels. The intervals need them. With `is_seen` a row has a fifth number, predicted_on_seen (see `Areas`).
    image_ids: the id of each image, or None.
    is_seen: (C,) bool, for the intervals of mIoU(S) on seen pixels; None: there are none.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, is_seen: Sequence[bool] | Tensor | np.ndarray | None = None
    ):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.is_seen = None if is_seen is None else class_mask(is_seen, num_classes)
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
        prediction, label = integers(prediction, "prediction"), integers(label, "label map")
        if prediction.shape != label.shape:
            raise ValueError(f"prediction has shape {prediction.shape}, but the label map {label.shape}")
        if label.ndim == 3:
            ids = [None] * len(label) if image_id is None else image_id
            if isinstance(ids, str) or len(ids) != len(label):
                raise ValueError(f"a batch of {len(label)} label maps takes a list of as many ids, not {image_id!r}")
            for one_prediction, one_label, one_id in zip(prediction, label, ids, strict=True):
                self.update(one_prediction, one_label, one_id)
            return
        prediction, label, pixels = runs(prediction.ravel(), label.ravel())
        if prediction.size and not REJECTED <= prediction.min() <= prediction.max() < self.num_classes:
            raise ValueError(f"prediction must lie in {REJECTED} to {self.num_classes - 1}")
        labelled = label != self.ignore_index
        prediction, label, pixels = prediction[labelled], label[labelled], pixels[labelled]
        check_ids(label, self.num_classes, self.ignore_index)
        column = np.where(prediction == REJECTED, self.num_classes, prediction)
        # No dense (C, C + 1) matrix an image: at 847 classes it has more entries than the image has pixels.
        np.add.at(self.counts.reshape(-1), label * (self.num_classes + 1) + column, pixels)
        counted = [(label, label == prediction), (label, slice(None)), (column, slice(None))]
        if self.is_seen is not None:
            counted.append((column, self.is_seen[label]))
        areas = [summed(place[where], pixels[where], self.num_classes) for place, where in counted]
        (present,) = np.nonzero(areas[1] + areas[2])
        self.images.append(np.stack([present, *(area[present] for area in areas)], axis=1))
        self.image_ids.append(image_id)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds the counts of another part of the dataset."""
        same_seen = np.array_equal(self.is_seen, other.is_seen)
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index) or not same_seen:
            raise ValueError("confusion matrices of two label spaces cannot be merged")
        self.counts += other.counts
        self.images += other.images
        self.image_ids += other.image_ids

    def iou(self, absent: Absent = "union") -> np.ndarray:
        """(C,) float64 in [0, 1], NaN for the classes that are left out of means.

        absent: "union": a class is left out if both truth and prediction lack it; a class that is only predicted counts
            as 0. "truth": a class is left out if the truth lacks it.
        """
        return iou_of_areas(class_areas(self.counts), absent)

    def scores(
        self,
        is_seen: Sequence[bool] | Tensor | np.ndarray,
        absent: Absent = "union",
        is_thing: Sequence[bool] | Tensor | np.ndarray | None = None,
    ) -> dict[str, float]:
        """The scores of `scores_of_areas` over all images."""
        is_seen = class_mask(is_seen, self.num_classes)
        scores = scores_of_areas(class_areas(self.counts, is_seen), is_seen, absent, is_thing)
        return {name: float(score) for name, score in scores.items()}

    def worst_pairs(self, count: int) -> list[ConfusedPair]:
        """The `count` pairs of classes with most confused pixels, largest first."""
        wrong = self.counts[:, :-1] * ~np.eye(self.num_classes, dtype=bool)
        truth, predicted = np.nonzero(wrong)
        pixels, whole = wrong[truth, predicted], self.counts.sum(axis=1)
        largest = np.argsort(-pixels, kind="stable")[:count]  # equal ones in the order of their ids
        return [
            ConfusedPair(int(truth[at]), int(predicted[at]), int(pixels[at]), float(pixels[at] / whole[truth[at]]))
            for at in largest
        ]

    def seen_unseen_confusion(self, is_seen: Sequence[bool] | Tensor | np.ndarray) -> SeenUnseenConfusion:
        """The shares of the seen and of the unseen area by their predicted names. is_seen: (C,) bool."""
        is_seen = class_mask(is_seen, self.num_classes)
        right = np.diagonal(self.counts)
        wrong_seen, wrong_unseen = (
            self.counts[:, :-1] @ group.astype(np.int64) - right * group for group in (is_seen, ~is_seen)
        )
        columns = np.stack([right, wrong_seen, wrong_unseen, self.counts[:, -1]], axis=1)  # (C, 4)
        pixels = (columns[group].sum(axis=0) for group in (is_seen, ~is_seen))
        return SeenUnseenConfusion(*(AreaShares(*ratio(own, own.sum()).tolist()) for own in pixels))

    def bootstrap(
        self,
        is_seen: Sequence[bool] | Tensor | np.ndarray,
        *,
        is_thing: Sequence[bool] | Tensor | np.ndarray | None = None,
        absent: Absent = "union",
        resamples: int = 1000,
        seed: int = 0,
    ) -> Bootstrap:
        """Scores and IoU in resamples of the images. The order of the images makes no difference.

        mIoU(S) on seen pixels is NaN for another is_seen than that of this matrix: the images lack its areas.
        """
        # First without the fifth column, so that the resamples are those of older versions, which lack it.
        order = sorted(
            range(len(self.images)), key=lambda at: (self.images[at][:, :4].tobytes(), self.images[at].tobytes())
        )
        areas = resampled_areas(self.image_areas(order), resamples, seed)
        if not np.array_equal(self.is_seen, class_mask(is_seen, self.num_classes)):
            areas = areas._replace(predicted_on_seen=None)
        return Bootstrap(scores_of_areas(areas, is_seen, absent, is_thing), iou_of_areas(areas, absent))

    def image_areas(self, order: Sequence[int]) -> ImageAreas:
        """The areas of the images at these places of `images`, in this order."""
        rows, image = joined_rows([self.images[index] for index in order])
        return image_areas(rows, image, self.num_classes, len(order))

    def save_images(self, path: Path, class_names: Sequence[str]) -> None:
        """Writes the areas of all images to one .npz, for `load_images`. A paired comparison needs them."""
        if len(class_names) != self.num_classes:
            raise ValueError(f"{len(class_names)} class names for {self.num_classes} classes")
        rows, image = joined_rows(self.images)
        with writing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                class_names=np.array(class_names, dtype=np.str_),
                image_ids=np.array(["" if image_id is None else image_id for image_id in self.image_ids], np.str_),
                image=image,
                rows=rows,
            )
