"""Datasets: pictures with label maps, and the training samples made of them.

`load_split` reads records (picture, label map, id) and checks them at the door. `SegmentationDataset` turns a
record into a training sample in three steps: the label map is rewritten to the class axis of the run, which
takes the unseen classes out of it; picture and map are augmented together; the crop's seen classes and the
picture's unseen ones become image labels. `StepSampler` says which samples make up which step.

The leak rule: where the unseen classes lie never leaves `SegmentationDataset`, not even through the choice of
the crop. What may leave, when asked for, is whether they are in the picture.

Axes: H W pixels, C names on the class axis of the run, N images, U unseen names.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from configuration_zs3 import Zs3Config
from processing_zs3 import nearest_pixels
from zs3.command_line import InputError
from zs3.label_space import LabelSpace, is_hub_id, load_label_space

IGNORED = -1  # in the model's `labels`: no target here
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".png",)


# ---- records -----------------------------------------------------------------------------------------------


class Record(NamedTuple):
    image: Image.Image  # RGB, as stored: an EXIF rotation is not applied
    label: np.ndarray  # (H, W) int32: ids of the label space, or its ignore_index
    image_id: str


class Split(Sequence[Record]):
    """The records of one split, read when asked for.

    rows: each a mapping with "image" and "label", a path or {"bytes": ..., "path": ...} each.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], image_ids: list[str], label_space: LabelSpace):
        self.rows = rows
        self.image_ids = image_ids
        self.label_space = label_space

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Record:
        image_id = self.image_ids[index]  # raises IndexError past the end, which ends a loop over records
        image_name, image = _opened(self.rows[index % len(self)]["image"], f"image of {image_id!r}")
        label_name, label = self._label(index)
        size = label.shape[::-1]
        if size != image.size:
            rotated = size == image.size[::-1]
            mend = "rotate the image as its EXIF tag says and save it without" if rotated else "make them equal"
            raise InputError(f"{label_name} is {_size(size)} pixels, but {image_name} is {_size(image.size)}: {mend}")
        return Record(image.convert("RGB"), label, image_id)

    def label(self, index: int) -> np.ndarray:
        """(H, W) int32, a record's label map without its picture."""
        return self._label(index)[1]

    def _label(self, index: int) -> tuple[str, np.ndarray]:
        """The name to call a label map by, and its ids."""
        name, image = _opened(self.rows[index % len(self)]["label"], f"label map of {self.image_ids[index]!r}")
        if image.mode not in ("L", "P") and not image.mode.startswith("I"):
            raise InputError(f"{name} has mode {image.mode}: store one id a pixel, as PNG of mode L, P or I;16")
        label = np.asarray(image).astype(np.int32)  # a palette's indices are the ids
        self._check_ids(label, name)
        return name, label

    def picture_sizes_sha256(self, count: int) -> str | None:
        """Of the first pictures of a folder, the sizes of their files: other pictures have others. None for tables."""
        if not isinstance(self.rows, list):
            return None
        sizes = [row["image"].stat().st_size for row in self.rows[:count]]
        return hashlib.sha256(str(sizes).encode()).hexdigest()

    def _check_ids(self, label: np.ndarray, name: str) -> None:
        num_classes, ignore_index = len(self.label_space.class_names), self.label_space.ignore_index
        outside = ((label < 0) | (label >= num_classes)) & (label != ignore_index)
        if outside.any():
            raise InputError(
                f"{name} holds id {label[outside][0]}; ids are 0 to {num_classes - 1}, and {ignore_index} for ignored: "
                "correct the map, or the label space"
            )


def load_split(dataset: str | Path, split: str, label_space: LabelSpace | None = None) -> Split:
    """The records of `split` ("train", "validation", ...).

    dataset: a folder with `{split}/images` and `{split}/labels` (pairs of one stem; jpg or png, labels png), a
        folder with `data/{split}-*.parquet`, or a Hub id; the last two with columns image, label, image_id.
    label_space: what the ids of the label maps mean; None reads the dataset's own classes.json.
    """
    folder = Path(dataset)
    if label_space is None:
        label_space = load_label_space(dataset)
    if (folder / split).is_dir():
        return _folder_split(folder / split, label_space)
    if folder.is_dir():
        shards = sorted(str(file) for file in folder.glob(f"data/{split}-*.parquet"))
        if not shards:
            raise InputError(f"{folder} has no split {split!r}: neither {split}/images nor data/{split}-*.parquet")
        return _table_split("parquet", {"data_files": {split: shards}}, split, folder, label_space)
    if not is_hub_id(str(dataset)):
        raise InputError(f"dataset {dataset} is no folder, and no Hub id of the form owner/name")
    return _table_split(str(dataset), {}, split, dataset, label_space)


def dataset_name(dataset: str) -> str:
    """What results call it: a Hub id, or a folder's name without the way to it."""
    return Path(dataset).name if Path(dataset).is_dir() else dataset


def _folder_split(folder: Path, label_space: LabelSpace) -> Split:
    images, labels = _by_stem(folder / "images", IMAGE_SUFFIXES), _by_stem(folder / "labels", LABEL_SUFFIXES)
    for ours, others, missing in ((images, labels, "labels"), (labels, images, "images")):
        alone = sorted(ours.keys() - others.keys())
        if alone:
            shown = ", ".join(ours[stem].name for stem in alone[:3]) + (", ..." if len(alone) > 3 else "")
            raise InputError(f"{folder / missing} lacks the partner of {len(alone)} files ({shown}): add or remove")
    if not images:
        raise InputError(f"{folder / 'images'} has no picture ({', '.join(IMAGE_SUFFIXES)})")
    stems = sorted(images)
    return Split([{"image": images[stem], "label": labels[stem]} for stem in stems], stems, label_space)


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"folder {folder} is missing: a split holds images and labels")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            if file.stem in found:
                raise InputError(f"{found[file.stem]} and {file.name} have one name: rename one of them")
            found[file.stem] = file
    return found


def _table_split(source: str, options: dict[str, Any], split: str, shown: str | Path, label_space: LabelSpace) -> Split:
    import datasets

    try:
        table = datasets.load_dataset(source, split=split, **options)
        missing = [name for name in ("image", "label", "image_id") if name not in table.column_names]
        if missing:
            raise InputError(f"{shown} has no column {', '.join(missing)}; its columns are {table.column_names}")
        for name in ("image", "label"):
            table = table.cast_column(name, datasets.Image(decode=False))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load split {split!r} of {shown}: {reason}") from error
    return Split(table, [str(image_id) for image_id in table["image_id"]], label_space)


def _opened(source: Path | dict[str, Any], thing: str) -> tuple[str, Image.Image]:
    """The decoded picture behind a path or a table's cell, with the name to call it by."""
    if isinstance(source, dict):
        file = io.BytesIO(source["bytes"]) if source["bytes"] is not None else source["path"]
        name = thing
    else:
        file, name = source, str(source)
    try:
        with Image.open(file) as image:
            image.load()
            return name, image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read {name} ({reason}): replace it, or remove it with its partner") from error


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


# ---- label maps -> targets ---------------------------------------------------------------------------------


def class_axis(label_space: LabelSpace, unseen_labels: str) -> list[str]:
    """Names on the class axis of a training run: all of them in label-space order if something is told about
    the unseen ones, else the seen ones alone (as names that are never positive they would only be pushed down).
    """
    return label_space.seen if unseen_labels == "none" else label_space.class_names


def mask_positions(label_space: LabelSpace, class_names: list[str]) -> np.ndarray:
    """(number of ids,) int64: place of each id on the class axis; IGNORED for unseen ones, wherever they are."""
    place = {name: index for index, name in enumerate(class_names)}
    seen = set(label_space.seen)
    return np.array([place[name] if name in seen else IGNORED for name in label_space.class_names])


def to_mask_labels(label: np.ndarray, positions: np.ndarray, ignore_index: int) -> np.ndarray:
    """The model's `labels` (H, W) int64: places on the class axis, IGNORED where no seen class is.

    label: (H, W) ids. positions: from `mask_positions`.
    """
    ignored = label == ignore_index
    return np.where(ignored, IGNORED, positions[np.where(ignored, 0, label)])


def to_image_labels(mask_labels: np.ndarray, is_seen: np.ndarray, unseen_labels: np.ndarray) -> np.ndarray:
    """The model's `image_labels` (C,) int8: 1 present, 0 absent, -1 unknown.

    mask_labels: (H, W) of the crop; it decides for the seen names.
    is_seen: (C,) bool. unseen_labels: (C,) int8, which decides for the other names.
    """
    present = np.bincount(mask_labels[mask_labels != IGNORED], minlength=len(is_seen)) > 0
    return np.where(is_seen, present, unseen_labels).astype(np.int8)


# ---- pseudo labels -----------------------------------------------------------------------------------------


def load_unseen_scores(path: str | Path, label_space: LabelSpace, image_ids: Sequence[str]) -> np.ndarray:
    """(N, U) float32: what `python -m zs3.pseudo_labels` says of the unseen names, in the order of label_space.unseen.

    path: its folder of shards `scores-00003-of-00047.parquet`, or one such file, with the columns image_id and scores
        (a struct of one number for each unseen name).
    image_ids: N, of the images that are wanted.
    """
    row_of, scores = {}, []
    for file in _score_files(Path(path)):
        ids, part = _read_scores(file, label_space.unseen)
        row_of.update(zip(ids, range(len(row_of), len(row_of) + len(ids)), strict=True))
        scores.append(part)
        if len(row_of) != sum(map(len, scores)):
            raise InputError(f"{file} has an image_id that was there before: an image has one row")
    missing = [image_id for image_id in image_ids if image_id not in row_of]
    if missing:
        raise InputError(
            f"{path} has no row for {len(missing)} images ({missing[0]!r}, ...): make the pseudo labels from this split"
        )
    return np.concatenate(scores)[[row_of[image_id] for image_id in image_ids]]


def check_scored_pictures(path: Path, records: Split) -> None:
    """Refuses scores of a folder's pictures for another folder whose image ids are the same."""
    settings = path / "settings.json"
    made_of = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    known, count = made_of.get("picture_sizes_sha256"), made_of.get("num_images", 0)
    own = records.picture_sizes_sha256(count)
    if None not in (known, own) and known != own:
        raise InputError(f"{path} was made of other pictures of the same names: make the pseudo labels of this dataset")


def _score_files(path: Path) -> list[Path]:
    """The shards of a folder, all of them; or the one file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            f"pseudo labels {path} do not exist: unseen_labels is 'none', 'ground_truth', or a folder that "
            "python -m zs3.pseudo_labels made"
        )
    found = sorted(path.glob("scores-[0-9]*-of-[0-9]*.parquet"))
    if not found:
        raise InputError(f"{path} holds no shards: give the --output of python -m zs3.pseudo_labels")
    total = int(found[0].stem.rsplit("-", 1)[1])
    if found != [path / shard_name(index, total) for index in range(total)]:
        raise InputError(
            f"{path} holds {len(found)} shards, but not the {total} of one run: "
            "start python -m zs3.pseudo_labels again, or delete those of another run"
        )
    return found


def shard_name(index: int, total: int) -> str:
    return f"scores-{index:05d}-of-{total:05d}.parquet"


def _read_scores(file: Path, unseen: list[str]) -> tuple[list[str], np.ndarray]:
    """Image ids, and their scores (N, U) float32 in the order of `unseen`."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file, columns=["image_id", "scores"])
        rows = table["scores"].combine_chunks()
        names = [field.name for field in rows.type]
        columns = dict(zip(names, rows.flatten(), strict=True))
        image_ids = [str(image_id) for image_id in table["image_id"].to_pylist()]
    except (OSError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read image_id and scores of pseudo labels {file}: {reason}") from error
    if set(names) != set(unseen):
        odd = sorted(set(names) ^ set(unseen))
        raise InputError(f"{file} has scores of other unseen names than the label space ({odd[0]!r}): make them anew")
    scores = np.stack([columns[name].to_numpy(zero_copy_only=False) for name in unseen], axis=1).astype(np.float32)
    if not np.isfinite(scores).all():
        raise InputError(f"{file} has a score that is missing or not finite: make the pseudo labels anew")
    return image_ids, scores


def pseudo_labels(scores: np.ndarray, threshold: float, unknown_above: float | None = None) -> np.ndarray:
    """Section 3.4: scores -> int8 of the same shape, 1 from the threshold on, else 0.

    unknown_above: what lies above it, and below the threshold, is -1, unknown; None: nothing is.
    """
    labels = (scores >= threshold).astype(np.int8)
    if unknown_above is not None:
        if unknown_above >= threshold:
            raise InputError(f"pseudo_label_unknown_above {unknown_above} must be below the threshold {threshold}")
        labels[(scores > unknown_above) & (scores < threshold)] = -1
    return labels


# ---- augmentation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Mask2Former's recipe for semantic segmentation. Lengths in pixels.

    crop_size: side of the square crop, and of the sample.
    short_edges: lengths of the image's shorter edge, one drawn for each sample; None stands for 0.5 to 2.0
        times crop_size in steps of a tenth.
    max_size: upper bound of the longer edge.
    flip: mirror left and right, half of the time.
    color_jitter: SSD's changes of brightness, contrast, saturation and hue, each half of the time.
    single_class_max_area: largest share of the labelled pixels of a crop that one class should have, in (0, 1];
        ten draws are tried. 1 takes the first.
    """

    crop_size: int
    max_size: int
    short_edges: Sequence[int] | None = None
    flip: bool = True
    color_jitter: bool = True
    single_class_max_area: float = 1.0

    def __post_init__(self) -> None:
        edges = self.short_edges
        if edges is None:
            edges = [max(1, self.crop_size * tenth // 10) for tenth in range(5, 21)]
        object.__setattr__(self, "short_edges", tuple(edges))
        if not edges or min(self.crop_size, self.max_size, *edges) < 1:
            raise InputError("crop_size, max_size and every one of short_edges must be 1 pixel or more")
        if not 0 < self.single_class_max_area <= 1:
            raise InputError(f"single_class_max_area {self.single_class_max_area} must be above 0 and at most 1")


def augment(
    image: Image.Image, label: np.ndarray, rng: np.random.Generator, augmentation: Augmentation
) -> tuple[Image.Image, np.ndarray]:
    """Scaled, cropped, jittered, mirrored: an RGB picture and its (h, w) map, both at most crop_size a side.

    label: (H, W) integers of any range, IGNORED where there is no label.
    """
    width, height = _scaled_size(image, rng.choice(augmentation.short_edges), augmentation.max_size)
    rows = nearest_pixels(height, image.height)
    columns = nearest_pixels(width, image.width)
    for _ in range(10):
        w, h = min(width, augmentation.crop_size), min(height, augmentation.crop_size)
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        cropped = label[rows[y : y + h, None], columns[None, x : x + w]]
        if augmentation.single_class_max_area == 1 or _is_mixed(cropped, augmentation.single_class_max_area):
            break
    scale_x, scale_y = image.width / width, image.height / height
    box = (x * scale_x, y * scale_y, min((x + w) * scale_x, image.width), min((y + h) * scale_y, image.height))
    image = image.resize((w, h), Image.Resampling.BILINEAR, box=box)  # the crop of the resized picture
    if augmentation.color_jitter:
        image = _jittered(image, rng)
    if augmentation.flip and rng.random() < 0.5:
        image, cropped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), cropped[:, ::-1]
    return image, cropped


def _scaled_size(image: Image.Image, short_edge: int, max_size: int) -> tuple[int, int]:
    scale = min(short_edge / min(image.size), max_size / max(image.size))
    return max(1, int(image.width * scale + 0.5)), max(1, int(image.height * scale + 0.5))


def _is_mixed(label: np.ndarray, max_area: float) -> bool:
    counts = np.unique(label[label != IGNORED], return_counts=True)[1]
    return len(counts) > 1 and counts.max() < max_area * counts.sum()


def _jittered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """SSD's photometric distortion; contrast stands before or after saturation and hue, half of the time each."""
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    if brightness:
        image = _linear(image, 1, rng.uniform(-32, 32))
    if contrast and contrast_first:
        image = _linear(image, rng.uniform(0.5, 1.5), 0)
    if saturation or hue:
        hsv = np.array(image.convert("HSV"))
        if saturation:
            hsv[..., 1] = (hsv[..., 1] * np.float32(rng.uniform(0.5, 1.5))).clip(0, 255)
        if hue:  # 18 of OpenCV's units of 2 degrees; here a turn is 256
            hsv[..., 0] += np.uint8(round(rng.uniform(-36, 36) * 256 / 360) % 256)
        image = Image.fromarray(hsv, "HSV").convert("RGB")
    if contrast and not contrast_first:
        image = _linear(image, rng.uniform(0.5, 1.5), 0)
    return image


def _linear(image: Image.Image, factor: float, offset: float) -> Image.Image:
    """Every channel's value v in [0, 255] becomes factor * v + offset, cut back to that range."""
    table = (np.arange(256) * factor + offset).clip(0, 255).round().astype(int)
    return image.point(table.tolist() * 3)


# ---- training samples --------------------------------------------------------------------------------------


class SegmentationDataset(Dataset):
    """Training samples by (epoch, index); the same pair gives the same sample, whoever asks for it.

    unseen_labels: what training is told about unseen classes. "none": nothing, and their names are not on the
        class axis. "ground_truth": whether each is in the picture (the whole of it, not the crop). Otherwise a
        folder of scores (`load_unseen_scores`), which become labels by the next two (`pseudo_labels`).
    pseudo_label_threshold, pseudo_label_unknown_above: in [0, 1].
    image_mean, image_std: (3,) of RGB in [0, 1].

    `class_names` are the names on the class axis, `is_seen` (C,) bool which of them are seen.
    """

    def __init__(
        self,
        records: Split,
        label_space: LabelSpace,
        augmentation: Augmentation,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        unseen_labels: str = "none",
        pseudo_label_threshold: float = Zs3Config.pseudo_label_threshold,
        pseudo_label_unknown_above: float | None = None,
        seed: int = 0,
    ):
        self.records = records
        self.label_space = label_space
        self.augmentation = augmentation
        self.image_mean = np.array(image_mean, dtype=np.float32)
        self.image_std = np.array(image_std, dtype=np.float32)
        self.unseen_labels = unseen_labels
        self.seed = seed
        self.class_names = class_axis(label_space, unseen_labels)
        self.is_seen = torch.tensor([name not in label_space.unseen for name in self.class_names])
        self.positions = mask_positions(label_space, self.class_names)
        self.pseudo_labels = None
        if unseen_labels not in ("none", "ground_truth"):
            check_scored_pictures(Path(unseen_labels), records)
            scores = load_unseen_scores(unseen_labels, label_space, records.image_ids)
            self.pseudo_labels = np.zeros((len(records), len(self.class_names)), dtype=np.int8)
            unseen = [self.class_names.index(name) for name in label_space.unseen]
            self.pseudo_labels[:, unseen] = pseudo_labels(scores, pseudo_label_threshold, pseudo_label_unknown_above)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """pixel_values (3, S, S) float32 normalised, labels (S, S) int64, image_labels (C,) int8, image_id."""
        epoch, index = key
        image, label, image_id = self.records[index]
        unseen_labels = self._unseen_labels(label, index)
        # Unseen classes go before the crop is chosen: a choice that looked at them would tell where they are.
        label = to_mask_labels(label, self.positions, self.label_space.ignore_index)
        # index + 1, because a trailing 0 does not change numpy's seed, and (seed, epoch) is the sampler's.
        rng = np.random.default_rng((self.seed, epoch, index + 1))
        image, label = augment(image, label, rng, self.augmentation)
        return {
            "pixel_values": self._padded_pixels(image),
            "labels": self._padded_labels(label),
            "image_labels": torch.from_numpy(to_image_labels(label, self.is_seen.numpy(), unseen_labels)),
            "image_id": image_id,
        }

    def _unseen_labels(self, label: np.ndarray, index: int) -> np.ndarray:
        """(C,) int8: at the unseen names 1 if the picture is said to show it, -1 if that is unknown; else 0."""
        if self.unseen_labels == "none":
            return np.zeros(len(self.class_names), dtype=np.int8)
        if self.pseudo_labels is not None:
            return self.pseudo_labels[index]
        ids = label[label != self.label_space.ignore_index]
        present = np.bincount(ids, minlength=len(self.class_names)) > 0  # here the class axis is all ids
        return (present & ~self.is_seen.numpy()).astype(np.int8)

    def _padded_pixels(self, image: Image.Image) -> Tensor:
        """(3, S, S); right of and below the picture 0, the mean colour."""
        pixels = np.asarray(image) * (1 / (255 * self.image_std)) - self.image_mean / self.image_std
        padded = torch.zeros(3, self.augmentation.crop_size, self.augmentation.crop_size)
        padded[:, : image.height, : image.width] = torch.from_numpy(pixels).permute(2, 0, 1)
        return padded

    def _padded_labels(self, label: np.ndarray) -> Tensor:
        """(S, S); IGNORED right of and below the picture."""
        size = self.augmentation.crop_size
        padded = torch.full((size, size), IGNORED)
        padded[: label.shape[0], : label.shape[1]] = torch.from_numpy(np.ascontiguousarray(label))
        return padded


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The samples of this process, step after step: a DataLoader's `batch_sampler`.

    All processes walk through one endless sequence, the epochs' permutations (keyed by seed and epoch) laid end
    to end; step t takes the total_batch_size samples from t * total_batch_size on. They are cut into equal
    parts, in order: process by process, and within a process micro-batch by micro-batch, each one item of the
    iteration. So what a step trains on depends neither on the number of processes nor on a restart at
    `start_step`. The DataLoader must not be cut again (no `accelerator.prepare`).

    micro_batches: parts of a step that one process takes one after the other (gradient accumulation).
    """

    def __init__(
        self,
        num_samples: int,
        total_batch_size: int,
        max_steps: int,
        *,
        start_step: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        micro_batches: int = 1,
        seed: int = 0,
    ):
        parts = num_processes * micro_batches
        if total_batch_size < 1 or total_batch_size % parts:
            raise InputError(
                f"total batch size {total_batch_size} cannot be cut into {parts} equal parts "
                f"({num_processes} processes x {micro_batches} micro-batches): change one of them"
            )
        self.num_samples = num_samples
        self.total_batch_size = total_batch_size
        self.steps = range(start_step, max_steps)
        self.first_part = process_index * micro_batches
        self.micro_batches = micro_batches
        self.part_size = total_batch_size // parts
        self.seed = seed

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = None, None
        for step in self.steps:
            for part in range(self.first_part, self.first_part + self.micro_batches):
                start = step * self.total_batch_size + part * self.part_size
                samples = []
                for position in range(start, start + self.part_size):
                    if position // self.num_samples != epoch:
                        epoch = position // self.num_samples
                        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                    samples.append((epoch, int(order[position % self.num_samples])))
                yield samples


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> the model's batch: pixel_values (B,3,S,S), pixel_mask (B,S,S), labels (B,S,S), image_labels (B,C).

    `image_ids`, a list of B, is for the reader. The mask is 1 throughout: in training, padding is told by labels.
    """
    batch = {name: torch.stack([s[name] for s in samples]) for name in ("pixel_values", "labels", "image_labels")}
    batch["pixel_mask"] = torch.ones_like(batch["labels"])
    batch["image_ids"] = [sample["image_id"] for sample in samples]
    return batch
