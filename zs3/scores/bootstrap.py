"""Intervals of scores by bootstrap: images are resampled with replacement, and each resample has its scores."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from configuration_zs3 import Refused, check_names
from files_zs3 import decoding
from zs3.command_line import InputError, shown
from zs3.scores.means import Areas

RESAMPLES_AT_ONCE = 100  # bounds the memory of a bootstrap: that many x N counts
LEVEL = 0.95  # of the intervals
MOST_OF_AREAS = 2**29  # bytes, unpacked; a class in an image takes 48


class ImageAreas(NamedTuple):
    """The `Areas` of every class in every image: (C, N) int64 each, in pixels, sparse."""

    intersection: csr_array
    truth: csr_array
    predicted: csr_array
    predicted_on_seen: csr_array | None = None

    def of_images(self, order: Sequence[int]) -> "ImageAreas":
        """The areas of the images at these places, in this order."""
        return ImageAreas(*(area[:, order] for area in self.counted))

    @property
    def counted(self) -> list[csr_array]:
        return [area for area in self if area is not None]


class SavedImages(NamedTuple):
    """The content of a file of `save_images`."""

    class_names: list[str]  # C
    image_ids: list[str | None]  # N
    areas: ImageAreas


class Bootstrap(NamedTuple):
    """Scores and IoU in R resamples of the images; NaN where a resample has no class to take the mean over.

    scores: (R,) by name, those of `scores_of_areas`. iou: (R, C).
    """

    scores: dict[str, np.ndarray]
    iou: np.ndarray

    def intervals(self) -> dict[str, tuple[float, float]]:
        """(low, high) of each score."""
        return {name: interval(values) for name, values in self.scores.items()}

    def class_intervals(self) -> np.ndarray:
        """(C, 2) low and high of the IoU of each class. They are not corrected for the number of classes."""
        return np.array([interval(values) for values in self.iou.T])


def images_path(result: Path) -> Path:
    """The file with the areas of all images, beside a result file."""
    return result.with_name(f"{result.stem}_images.npz")


def load_images(path: Path) -> SavedImages:
    """Reads a file of `save_images`. Raises InputError if it is missing or damaged."""
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
            areas = image_areas(rows, image, len(names), len(ids))
    except Refused as error:
        raise InputError(f"{shown(path)} is no file of image areas, or is broken: evaluate again") from error
    return SavedImages(names.tolist(), [image_id or None for image_id in ids.tolist()], areas)


def _check_arrays(names: np.ndarray, ids: np.ndarray, image: np.ndarray, rows: np.ndarray) -> None:
    """Raises ValueError if `save_images` cannot have written these: class_names, image_ids, image and rows."""
    are_texts = all(texts.dtype.kind == "U" and texts.ndim == 1 for texts in (names, ids))
    if not are_texts or image.dtype != np.int64 or rows.dtype != np.int64 or image.ndim != 1:
        raise ValueError("arrays of other types")
    if rows.shape not in ((len(image), 4), (len(image), 5)):
        raise ValueError("image and rows have a row for each class in an image")
    check_names(names.tolist())
    place, intersection, truth, predicted, on_seen = rows.T if rows.shape[1] == 5 else (*rows.T, rows[:, 3])
    is_possible = (
        ((image >= 0) & (image < len(ids)) & (place >= 0) & (place < len(names))).all()
        and ((intersection >= 0) & (intersection <= truth) & (intersection <= predicted)).all()
        and ((on_seen >= 0) & (on_seen <= predicted)).all()
        and rows.sum(axis=0, dtype=np.float64).max() < 2**53  # more pixels are not counted exactly
        and len(np.unique(image * len(names) + place)) == len(rows)  # a class has at most one row in an image
    )
    if not is_possible:
        raise ValueError("areas that no images can have")


def summed_areas(areas: ImageAreas) -> Areas:
    """The areas over all of the images, each (C,)."""
    return Areas(*(area.sum(axis=1) for area in areas.counted))


def resampled_areas(areas: ImageAreas, resamples: int, seed: int) -> Areas:
    """The areas over the images of each resample, which draws N images with replacement: (R, C) each.

    The drawn images depend only on N and the seed, so that two models can be compared on the same images.
    """
    num_classes, num_images = areas.truth.shape
    totals = np.zeros((len(areas.counted), resamples, num_classes), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for start in range(0, resamples if num_images else 0, RESAMPLES_AT_ONCE):
        part = totals[:, start : start + RESAMPLES_AT_ONCE]
        drawn = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=part.shape[1])  # (R, N)
        for own, area in zip(part, areas.counted, strict=True):
            own[:] = (area @ drawn.T).T
    return Areas(*totals)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central interval that holds LEVEL of the values, by quantiles. NaN values are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def runs(prediction: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two flat maps (P,) as runs of equal neighbours: prediction, label and pixels of each, int64.

    Objects are wider than a pixel, so there are few runs: a few percent of the number of pixels.
    """
    first = np.ones(label.size, dtype=bool)
    np.not_equal(label[1:], label[:-1], out=first[1:])
    first[1:] |= prediction[1:] != prediction[:-1]
    (starts,) = np.nonzero(first)
    pixels = np.diff(starts, append=label.size)
    return prediction[starts].astype(np.int64), label[starts].astype(np.int64), pixels


def summed(place: np.ndarray, pixels: np.ndarray, size: int) -> np.ndarray:
    """(size,) int64: the pixels at each place; places from `size` on are left out."""
    total = np.bincount(place, weights=pixels, minlength=size)[:size]  # float64 is exact here: far below 2**53
    return total.astype(np.int64)


def joined_rows(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all images, and for each row the place of its image: see `image_areas`."""
    image = np.repeat(np.arange(len(images)), np.array([len(rows) for rows in images], dtype=np.int64))
    columns = images[0].shape[1] if images else 4
    return np.concatenate([np.empty((0, columns), dtype=np.int64), *images]), image


def image_areas(rows: np.ndarray, image: np.ndarray, num_classes: int, num_images: int) -> ImageAreas:
    """rows: see `ConfusionMatrix.images`; image: (K,) the place of the image of each row."""
    place, *columns = rows.T
    return ImageAreas(*(csr_array((own, (place, image)), shape=(num_classes, num_images)) for own in columns))
