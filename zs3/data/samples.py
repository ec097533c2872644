"""Training samples: a record's picture, with the masks and image labels that the training may see.

`SegmentationDataset` augments picture and label map together. It rewrites every crop of the map to the class axis of
the run before anything looks at it, which takes the unseen classes out. The seen classes of the crop, and the image
labels that the training is given of the other names, become the image labels of the sample.

The leak rule: where the unseen classes lie never leaves `SegmentationDataset`, not even through the choice of
the crop. What may leave, when asked for, is whether they are in the picture.

Axes: H W pixels, C names on the class axis of the run, S side of the crop.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from configuration_zs3 import places
from zs3.data.augmentation import IGNORED, Augmentation, augment
from zs3.data.image_labels import NothingTold, Told
from zs3.data.records import Split, StreamedSplit
from zs3.data.stored import StoredRecord
from zs3.label_space import LabelSpace

Sample = dict[str, Any]


# ---- label maps -> targets ---------------------------------------------------------------------------------


def mask_positions(label_space: LabelSpace, class_names: list[str]) -> np.ndarray:
    """(number of ids,) int64: place of each id on the class axis; IGNORED for unseen ones, wherever they are."""
    found = zip(label_space.is_seen.tolist(), places(label_space.class_names, class_names), strict=True)
    return np.array([place if is_seen else IGNORED for is_seen, place in found], dtype=np.int64)


def to_mask_labels(label: np.ndarray, positions: np.ndarray, ignore_index: int) -> np.ndarray:
    """The model's `labels` (H, W) int64: places on the class axis, IGNORED where no seen class is.

    label: (H, W) ids. positions: from `mask_positions`.
    """
    ignored = label == ignore_index
    return np.where(ignored, IGNORED, positions[np.where(ignored, 0, label)])


def to_image_labels(mask_labels: np.ndarray, told: np.ndarray) -> np.ndarray:
    """The model's `image_labels` (C,) int8: 1 present, 0 absent, -1 unknown.

    mask_labels: (H, W) of the crop; a name that has a mask there is present.
    told: (C,) int8, what else is known of the picture; it decides for all other names.
    """
    present = np.bincount(mask_labels[mask_labels != IGNORED], minlength=len(told)) > 0
    return np.where(present, 1, told).astype(np.int8)


# ---- training samples --------------------------------------------------------------------------------------


class SegmentationDataset(Dataset):
    """Training samples by (epoch, index); an epoch and an image_id give one sample, whoever asks, from whatever source.

    records: a Split; or a StreamedSplit, which knows no index: `StreamedBatches` goes through its samples.
    image_mean, image_std: (3,) of RGB in [0, 1].
    told: what is told of pictures as a whole; None: nothing of unseen classes (the inductive setting).

    `class_names` are the names on the class axis.
    """

    def __init__(
        self,
        records: Split | StreamedSplit,
        label_space: LabelSpace,
        augmentation: Augmentation,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        told: Told | None = None,
        seed: int = 0,
    ):
        self.records = records
        self.label_space = label_space
        self.augmentation = augmentation
        mean, std = (torch.tensor(list(values))[:, None, None] for values in (image_mean, image_std))
        self.scale, self.shift = 1 / (255 * std), mean / std
        self.told = NothingTold(label_space) if told is None else told
        self.seed = seed
        self.class_names = self.told.class_names
        self.positions = mask_positions(label_space, self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index)."""
        epoch, index = key
        return self.sample(self.records.stored(index), epoch)

    def sample(self, stored: StoredRecord, epoch: int) -> Sample:
        """pixel_values (3, S, S) float32 normalised, pixel_mask and labels (S, S) int64, image_labels (C,) int8,
        image_id."""
        # Keyed by the id, so that a sample does not depend on the order or the way in which pictures are read.
        key = int.from_bytes(hashlib.sha256(stored.image_id.encode()).digest()[:8])
        rng, words = np.random.default_rng((self.seed, epoch, key)).spawn(2)
        told = self.told(stored.image_id, stored.ids, words)
        size = self.augmentation.draw_size(stored.image.size, rng)
        image = stored.decoded(size)
        image, label = augment(image, stored.label, size, rng, self.augmentation, self._mask_labels)
        return {
            **self.padded(image, label),
            "image_labels": torch.from_numpy(to_image_labels(label, told)),
            "image_id": stored.image_id,
        }

    def _mask_labels(self, label: np.ndarray) -> np.ndarray:
        """Here the unseen classes go out of a map: a crop that was chosen by them would tell where they are."""
        return to_mask_labels(label, self.positions, self.label_space.ignore_index)

    def padded(self, image: Image.Image, label: np.ndarray) -> dict[str, Tensor]:
        """A crop and its map on a square of crop_size: pixel_values (3, S, S) normalised, pixel_mask and labels (S, S);
        right of and below the picture the mean colour, 0 and IGNORED."""
        size, inside = self.augmentation.crop_size, np.s_[: image.height, : image.width]
        pixel_values, pixel_mask = torch.zeros(3, size, size), torch.zeros(size, size, dtype=torch.int64)
        labels = torch.full((size, size), IGNORED)
        pixels = pixel_values[:, *inside]
        pixels.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        pixels.mul_(self.scale).sub_(self.shift)
        pixel_mask[inside] = 1
        labels[inside] = torch.from_numpy(label.copy() if min(label.strides) < 0 else label)  # of a mirrored crop
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}
