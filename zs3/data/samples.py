"""Training samples: a record's picture, with the masks and image labels that the training may see.

`SegmentationDataset` augments picture and label map together. It first rewrites each crop of the map to the class axis
of the run. This removes the unseen classes, so that no later step can see them. In a sample's image labels the seen
classes of its crop are present. The run's source of image labels decides about all other names.

The leak rule: the places of unseen classes never leave `SegmentationDataset`, not even through the choice of the crop.
Transductive training gets only their image labels. A sample's `label_counts` compare these with the label map. They are
a measurement for the results of the run; train.py takes them out of each batch before the model gets it.

Axes: H W pixels, C names on the class axis of the run, U unseen names among them, S side of the crop.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from configuration_zs3 import places, shared
from zs3.data.augmentation import IGNORED, Augmentation, augment
from zs3.data.image_labels import ImageLabels, NoUnseenLabels, count_labels
from zs3.data.records import Split, StreamedSplit
from zs3.data.stored import StoredRecord
from zs3.label_space import LabelSpace

Sample = dict[str, Any]


# ---- label maps -> targets ---------------------------------------------------------------------------------


def mask_positions(label_space: LabelSpace, class_names: list[str]) -> np.ndarray:
    """(number of ids,) int64: the place of each id on the class axis. It is IGNORED for every unseen class."""
    found = zip(label_space.is_seen.tolist(), places(label_space.class_names, class_names), strict=True)
    return np.array([place if is_seen else IGNORED for is_seen, place in found], dtype=np.int64)


def to_mask_labels(label: np.ndarray, positions: np.ndarray, ignore_index: int) -> np.ndarray:
    """The model's `labels` (H, W) int64: places on the class axis; IGNORED where there is no seen class.

    label: (H, W) ids. positions: from `mask_positions`.
    """
    ignored = label == ignore_index
    return np.where(ignored, IGNORED, positions[np.where(ignored, 0, label)])


def to_image_labels(mask_labels: np.ndarray, of_picture: np.ndarray) -> np.ndarray:
    """The model's `image_labels` (C,) int8: 1 present, 0 absent, -1 unknown.

    mask_labels: (H, W) of the crop. A name with a mask there is present.
    of_picture: (C,) int8, the image labels of the whole picture, for all other names.
    """
    present = np.bincount(mask_labels[mask_labels != IGNORED], minlength=len(of_picture)) > 0
    return np.where(present, 1, of_picture).astype(np.int8)


# ---- training samples --------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class SegmentationDataset(Dataset):
    """Training samples by (epoch, index). A sample depends on seed, epoch and image_id alone.

    `class_names` are the names on the class axis.
    """

    records: Split | StreamedSplit  # a StreamedSplit has no index: `StreamedBatches` reads it
    label_space: LabelSpace
    augmentation: Augmentation
    image_mean: Sequence[float]  # (3,) of RGB in [0, 1]
    image_std: Sequence[float]
    image_labels: ImageLabels | None = None  # their source; None: no image labels of unseen classes (inductive)
    seed: int = 0

    def __post_init__(self) -> None:
        mean, std = (torch.tensor(list(values))[:, None, None] for values in (self.image_mean, self.image_std))
        self.scale, self.shift = 1 / (255 * std), mean / std
        self.image_labels = self.image_labels or NoUnseenLabels(self.label_space)
        self.class_names = self.image_labels.class_names
        self.positions = mask_positions(self.label_space, self.class_names)
        unseen = shared(self.label_space.unseen, self.class_names)
        self.unseen_ids = np.array(places(unseen, self.label_space.class_names), dtype=np.int64)  # (U,)
        self.unseen_places = np.array(places(unseen, self.class_names), dtype=np.int64)  # (U,) on the class axis

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index)."""
        epoch, index = key
        return self.sample(self.records.stored(index), epoch)

    def sample(self, stored: StoredRecord, epoch: int) -> Sample:
        """pixel_values (3, S, S) float32 normalised, pixel_mask and labels (S, S) int64, image_labels (C,) int8,
        label_counts (3,) int64 as in `LabelCounts`, image_id."""
        # The key is made of the id, so that a sample does not depend on the reading order or the source of pictures.
        key = int.from_bytes(hashlib.sha256(stored.image_id.encode()).digest()[:8])
        rng, words = np.random.default_rng((self.seed, epoch, key)).spawn(2)
        of_picture = self.image_labels(stored.image_id, stored.ids, words)
        counts = count_labels(of_picture[self.unseen_places] == 1, np.isin(self.unseen_ids, stored.ids))
        size = self.augmentation.draw_size(stored.image.size, rng)
        image = stored.decoded(size)
        image, label = augment(image, stored.label, size, rng, self.augmentation, self._mask_labels)
        return {
            **self.padded(image, label),
            "image_labels": torch.from_numpy(to_image_labels(label, of_picture)),
            "label_counts": torch.tensor(counts),
            "image_id": stored.image_id,
        }

    def _mask_labels(self, label: np.ndarray) -> np.ndarray:
        """Removes the unseen classes from a map. A crop that was chosen by them would show where they are."""
        return to_mask_labels(label, self.positions, self.label_space.ignore_index)

    def padded(self, image: Image.Image, label: np.ndarray) -> dict[str, Tensor]:
        """A crop and its map on a square of crop_size: pixel_values (3, S, S) normalised, pixel_mask and labels (S, S).
        The padding, right and below, is the mean colour, 0 and IGNORED."""
        size, inside = self.augmentation.crop_size, np.s_[: image.height, : image.width]
        pixel_values, pixel_mask = torch.zeros(3, size, size), torch.zeros(size, size, dtype=torch.int64)
        labels = torch.full((size, size), IGNORED)
        pixels = pixel_values[:, *inside]
        pixels.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        pixels.mul_(self.scale).sub_(self.shift)
        pixel_mask[inside] = 1
        labels[inside] = torch.from_numpy(label.copy() if min(label.strides) < 0 else label)  # of a mirrored crop
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}
