"""Datasets: pictures with label maps, and the training samples made of them.

`load_split` reads records (picture, label map, id) and checks them at the door; `stream_split` reads the same ones
one after the other, without a copy on the disk. `SegmentationDataset` turns a record into a training sample: picture
and map are augmented together; every crop of the map is rewritten to the class axis of the run before anything looks at
it, which takes the unseen classes out; the crop's seen classes and what is told of the other names become image labels.
`StepSampler` says which samples make up which step, `StreamedBatches` does so for a stream.

The leak rule: where the unseen classes lie never leaves `SegmentationDataset`, not even through the choice of
the crop. What may leave, when asked for, is whether they are in the picture.

Axes: H W pixels, C names on the class axis of the run, S side of the crop.
"""

import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from configuration_zs3 import Refused, places, shortened
from files_zs3 import (
    MAP_FORMATS,
    PICTURE_FORMATS,
    PICTURE_SUFFIXES,
    check_regular,
    decoding,
    is_deep,
    is_leftover,
    is_of_the_machine,
    lines_of,
    open_image,
    read_text,
    verify_checksums,
)
from zs3.augmentation import IGNORED, Augmentation, augment
from zs3.command_line import InputError, one_line, shown
from zs3.contents import Row, contents_of, size_of, sizes_sha256
from zs3.image_labels import NothingTold, Told, read_settings
from zs3.label_space import LabelSpace, is_hub_id, load_label_space

if TYPE_CHECKING:
    import datasets

MAP_SUFFIXES = (".png",)
COLUMNS = ("image", "label", "image_id")
NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<total>\d+)(-\w+)?\.parquet")  # of a table's shards

Sample = dict[str, Any]


# ---- records -----------------------------------------------------------------------------------------------


class Record(NamedTuple):
    image: Image.Image  # RGB, as stored: an EXIF rotation is not applied
    label: np.ndarray  # (H, W) int32: ids of the label space, or its ignore_index
    image_id: str


class StoredRecord(NamedTuple):
    """A record whose picture has been opened, but not decoded."""

    name: str  # what to call the picture
    image: Image.Image
    label: np.ndarray  # (H, W), as many bits a pixel as in its file
    ids: np.ndarray  # of the label space, those in the label map
    image_id: str

    def decoded(self, size: tuple[int, int] | None = None) -> Image.Image:
        """The picture in RGB.

        size: width and height that will do: a JPEG is then decoded at a half, quarter or eighth of its size, as long
            as that is no less, which costs less time and memory.
        """
        with readable(self.name):
            if size is not None:
                self.image.draft("RGB", size)
            self.image.load()
            return self.image if self.image.mode == "RGB" else self.image.convert("RGB")  # which would copy it

    @property
    def is_turned(self) -> bool:
        """Whether the picture has an EXIF rotation, which nothing here applies."""
        with readable(self.name):
            return exif_orientation(self.image) in range(2, 9)

    def record(self) -> Record:
        return Record(self.decoded(), self.label.astype(np.int32), self.image_id)


class Split(Sequence[Record]):
    """The records of one split, read when asked for.

    shards: the files of a table, see `table_files`.
    """

    def __init__(
        self, rows: Sequence[Row], image_ids: list[str], label_space: LabelSpace, shards: Sequence[Path] | str = ()
    ):
        self.rows = rows
        self.image_ids = image_ids
        self.label_space = label_space
        self.shards = shards

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Record:
        return self.stored(index).record()

    def stored(self, index: int) -> StoredRecord:
        image_id = self.image_ids[index]  # raises IndexError past the end, which ends a loop over records
        return _stored(self.rows[index % len(self)], image_id, self.label_space)

    def label(self, index: int) -> np.ndarray:
        """(H, W) int32, a record's label map without its picture."""
        row, image_id = self.rows[index % len(self)], self.image_ids[index]
        return _read_label(row["label"], image_id, self.label_space)[1].astype(np.int32)

    def ids(self) -> Iterator[tuple[np.ndarray, bool]]:
        """Of each label map in turn the ids that are in it, the ignored one aside; and whether that is in it, too."""
        for row, image_id in zip(self.rows, self.image_ids, strict=True):
            yield _read_ids(row, image_id, self.label_space)

    def contents(self) -> dict[str, int | str]:
        """What the split is made of; see `contents_of`."""
        return contents_of(self.image_ids, self.rows if isinstance(self.rows, list) else None, self.shards)

    def picture_sizes_sha256(self, count: int) -> str | None:
        """Of the sizes of the first pictures of a folder; None for tables."""
        if not isinstance(self.rows, list):
            return None
        return sizes_sha256([row["image"] for row in self.rows[:count]])


class StreamedSplit:
    """The records of one split, one after the other: a shard is read (or downloaded) when its turn comes.

    table: rows as `Row`, its pictures not decoded.
    rows: those of a folder, which are known beforehand. shards: as of a Split.
    """

    def __init__(
        self,
        table: "datasets.IterableDataset",
        label_space: LabelSpace,
        rows: list[Row] | None = None,
        shards: Sequence[Path] | str = (),
    ):
        self.table = table
        self.label_space = label_space
        self.rows = rows
        self.shards = shards

    def __iter__(self) -> Iterator[Record]:
        return (self.stored(row).record() for row in read_rows(self.table))

    def ids(self) -> Iterator[tuple[np.ndarray, bool]]:
        """As of a Split."""
        for row in read_rows(self.table):
            yield _read_ids(row, image_id_of(row["image_id"]), self.label_space)

    def stored(self, row: Row) -> StoredRecord:
        return _stored(row, image_id_of(row["image_id"]), self.label_space)

    def contents(self) -> dict[str, int | str]:
        """What the split is made of; see `contents_of`."""
        image_ids = None if self.rows is None else [row["image_id"] for row in self.rows]
        return contents_of(image_ids, self.rows, self.shards)


def read_rows(table: "datasets.IterableDataset") -> Iterator[Row]:
    """The rows of a stream; what is wrong with a shard, or with the way to it, is an InputError."""
    with whole_table("cannot read on in the stream"):
        yield from table


@contextmanager
def whole_table(trouble: str) -> Iterator[None]:
    """Whatever the reader of a table raises within the block is raised as an InputError, in one line.

    Of a damaged file pyarrow and datasets raise errors of many kinds, some of them their own bugs.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise InputError(f"{trouble}: {one_line(_cause(error))}") from error


def _cause(error: BaseException) -> BaseException:
    """What datasets wraps in an error of its own ("An error occurred while generating the dataset")."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def load_split(dataset: str | Path, split: str, label_space: LabelSpace | None = None) -> Split:
    """The records of `split` ("train", "validation", ...).

    dataset: a folder with `{split}/images` and `{split}/labels` (pairs of one stem, labels png) or with
        `{split}/metadata.jsonl`, a folder with `data/{split}-*.parquet`, or a Hub id; the last two with columns image,
        label, image_id.
    label_space: what the ids of the label maps mean; None reads the dataset's own classes.json.
    """
    if label_space is None:
        label_space = load_label_space(dataset)
    if (Path(dataset) / split).is_dir():
        rows = _folder_rows(Path(dataset) / split)
        return Split(rows, [row["image_id"] for row in rows], label_space)
    table = _table(dataset, split, streaming=False)
    with whole_table(f"cannot read image_id of split {split!r} of {dataset}"):
        image_ids = [image_id_of(image_id) for image_id in table["image_id"]]
    repeated = [image_id for image_id, times in Counter(image_ids).items() if times > 1]
    if repeated:
        raise InputError(f"split {split!r} of {dataset} has image_id {repeated[0]!r} twice: give every picture its own")
    return Split(table, image_ids, label_space, table_files(dataset, split))


def stream_split(dataset: str | Path, split: str, label_space: LabelSpace | None = None) -> StreamedSplit:
    """The records of `load_split`, of the same datasets, in a stream."""
    import datasets

    if label_space is None:
        label_space = load_label_space(dataset)
    if (Path(dataset) / split).is_dir():
        rows = _folder_rows(Path(dataset) / split)  # a list is dealt out to readers, and shuffled, entry by entry
        table = datasets.IterableDataset.from_generator(_each, gen_kwargs={"rows": rows})
        return StreamedSplit(table, label_space, rows)
    return StreamedSplit(_table(dataset, split, streaming=True), label_space, shards=table_files(dataset, split))


def _each(rows: list[Row]) -> Iterator[Row]:
    yield from rows


def check_scored_pictures(path: Path, records: Split) -> None:
    """Refuses scores of a folder's pictures for another folder whose image ids are the same."""
    made_of = read_settings(path) if (path / "settings.json").is_file() else {}
    known, count = made_of.get("picture_sizes_sha256"), made_of.get("num_images", 0)
    own = records.picture_sizes_sha256(count)
    if None not in (known, own) and known != own:
        raise InputError(f"{path} was made of other pictures of the same names: make the pseudo labels of this dataset")


def dataset_name(dataset: str) -> str:
    """What results call it: a Hub id, or a folder's name without the way to it."""
    return Path(dataset).name if Path(dataset).is_dir() else dataset


def _folder_rows(folder: Path) -> list[Row]:
    if (folder / "metadata.jsonl").is_file():
        return _listed_rows(folder / "metadata.jsonl")
    images, labels = _by_stem(folder / "images", PICTURE_SUFFIXES), _by_stem(folder / "labels", MAP_SUFFIXES)
    for ours, others, missing in ((images, labels, "labels"), (labels, images, "images")):
        alone = sorted(ours.keys() - others.keys())
        if alone:
            shown_names = ", ".join(ours[stem].name for stem in alone[:3]) + (", ..." if len(alone) > 3 else "")
            raise InputError(
                f"{folder / missing} lacks the partner of {len(alone)} of {len(ours)} ({shown_names}): give partners "
                f"one name, as images/a.jpg and labels/a{MAP_SUFFIXES[0]}"
            )
    if not images:
        raise InputError(f"{folder / 'images'} has no picture ({', '.join(PICTURE_SUFFIXES)})")
    return [{"image": images[stem], "label": labels[stem], "image_id": image_id_of(stem)} for stem in sorted(images)]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Stem -> file. What systems leave is passed over; no other file is left out without a word."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} is missing: a split holds images and labels, or a metadata.jsonl")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if is_leftover(file.name):
            continue
        if file.is_dir():
            raise InputError(f"{file} is a folder: put all files side by side, or list them in a metadata.jsonl")
        if file.suffix.lower() not in suffixes:
            raise InputError(
                f"{file} ends in none of {', '.join(suffixes)}: convert it, or move it and its partner away"
            )
        if file.stem in found:
            raise InputError(f"{found[file.stem]} and {file.name} have one name: rename one of them")
        found[file.stem] = file
    return found


def _listed_rows(metadata: Path) -> list[Row]:
    """The lines of a metadata.jsonl in their order; datasets' own "imagefolder" reads the same file."""
    rows: dict[str, Row] = {}
    try:
        lines = lines_of(read_text(metadata))
    except UnicodeDecodeError as error:
        raise InputError(f"{metadata} is no UTF-8 text: save it as such") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, label = (metadata.parent / entry[key] for key in ("image_file_name", "label_file_name"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
            raise InputError(
                f'{metadata}, line {number} ({reason}): a line is {{"image_file_name": "...", "label_file_name": '
                '"..."}, paths from the file\'s own folder'
            ) from error
        for file in (image, label):
            if not os.path.isfile(file):
                fault = "is no file" if os.path.exists(file) else "does not exist"
                raise InputError(f"{metadata}, line {number}: {file} {fault}")
        try:
            image_id = image_id_of(entry.get("image_id", image.stem))
        except InputError as error:
            raise InputError(f"{metadata}, line {number}: {error}") from error
        if image_id in rows:
            raise InputError(
                f"{metadata}, line {number}: {shortened(image_id)} was there before: give each line another image_id "
                "(where none is given, it is the picture's name without its suffix)"
            )
        rows[image_id] = {"image": image, "label": label, "image_id": image_id}
    if not rows:
        raise InputError(f"{metadata} is empty: a line for each picture")
    return list(rows.values())


def _table(dataset: str | Path, split: str, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":
    """A split in parquet, of a folder or from the Hub, its pictures as bytes."""
    import datasets

    if Path(dataset).is_dir():
        shards = _with_rows(table_shards(Path(dataset), split))
        if not shards:
            raise InputError(f"split {split!r} of {dataset} has no row: name another split, or another dataset")
        # The name is a part of the cache's: a shard that was replaced, at the same path and time, is read anew.
        source, options = "parquet", {"name": _identity(shards), "split": "rows"}
        options["data_files"] = {"rows": [glob.escape(str(shard.absolute())) for shard in shards]}
    elif is_hub_id(str(dataset)):
        source, options = str(dataset), {"split": split}
    else:
        raise InputError(f"dataset {dataset} is no folder, and no Hub id of the form owner/name")
    with whole_table(f"cannot load split {split!r} of {dataset}"):
        table = datasets.load_dataset(source, streaming=streaming, **options)
        if table.column_names is None:  # a stream whose columns are not known before its first rows are read
            table = table._resolve_features()
        missing = [name for name in COLUMNS if name not in (table.column_names or [])]
        if missing:
            own = shortened(table.column_names)
            raise InputError(f"{dataset} has no column {', '.join(missing)}: rename one of {own}")
        table = table.select_columns(list(COLUMNS))
        for name in ("image", "label"):
            with whole_table(f"column {name!r} of split {split!r} of {dataset} holds no images"):
                table = table.cast_column(name, datasets.Image(decode=False))
    return table


def table_files(dataset: str | Path, split: str) -> list[Path] | str:
    """The parquet files of a split of a folder; or the Hub id, whose files the Hub knows."""
    return table_shards(Path(dataset), split) if Path(dataset).is_dir() else str(dataset)


def _with_rows(shards: list[Path]) -> list[Path]:
    """The shards without the empty ones, which datasets cannot read. A damaged one stays: its reader refuses it."""
    import pyarrow.parquet

    kept = []
    for shard in shards:
        size_of(shard)  # a pipe would be waited for
        try:
            empty = pyarrow.parquet.read_metadata(shard).num_rows == 0
        except (OSError, ValueError):
            empty = False
        kept += [] if empty else [shard]
    return kept


def _identity(files: Sequence[Path]) -> str:
    """Of files as they are now. ctime changes with every change of a file, and nobody sets it back."""
    found = [(file.name, file.stat()) for file in files]
    facts = [(name, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in found]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def table_shards(folder: Path, split: str) -> list[Path]:
    """The split's parquet files, all of those that their names promise.

    `train-00000-of-00008.parquet`, with a digest before the suffix in older uploads; or any names that begin so.
    """
    files = sorted((folder / "data").iterdir()) if (folder / "data").is_dir() else []
    shards, numbered, beside = [], [], []
    for file in files:
        match = NUMBERED.fullmatch(file.name)
        if match and match["split"] == split:
            numbered.append((int(match["number"]), int(match["total"])))
        elif match or not re.match(rf"{re.escape(split)}[\W_]", file.name):
            continue  # another split's
        elif not file.name.startswith(f"{split}-") or file.suffix != ".parquet":
            beside.append(file)
            continue
        shards.append(file)
    if not shards:
        raise InputError(
            f"{folder} has no split {split!r}: neither {split}/images nor {split}/metadata.jsonl nor "
            f"data/{split}-*.parquet"
        )
    if beside:
        raise InputError(f"{shown(beside[0])} is no shard {split}-*.parquet and would be left out: rename or move it")
    place = str(shards[0].absolute())
    if "::" in place or os.path.expandvars(place) != place:
        raise InputError(f"{shown(shards[0])}: datasets takes '::' or '$' in this path for more, rename the folder")
    totals = sorted({total for _, total in numbered})
    whole = [(number, len(shards)) for number in range(len(shards))]
    if numbered and sorted(numbered) != whole:
        raise InputError(
            f"{folder}/data holds {len(shards)} shards of {split!r}, of {' and '.join(f'{n:05d}' for n in totals)}: "
            "the conversion or the copy is not complete, or shards of another one lie between"
        )
    return shards


def image_id_of(cell: object) -> str:
    """An id as it stands in a list, a table or a file's name."""
    if cell is None:
        raise InputError("a row has no image_id: give every picture its own")
    if isinstance(cell, float) and cell.is_integer():  # pandas makes them of whole numbers with a gap
        cell = int(cell)
    if isinstance(cell, bool) or not isinstance(cell, str | int) or cell == "" or "\0" in str(cell):
        raise InputError(f"image_id {shortened(cell)} is neither a text nor a whole number: give every picture its own")
    try:
        str(cell).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"image_id {shortened(cell)} is no UTF-8 text: rename the picture, or its file") from error
    return str(cell)


def _stored(row: Row, image_id: str, label_space: LabelSpace) -> StoredRecord:
    image_name, image = _opened(row["image"], "picture", image_id)
    label_name, label, ids = _read_label(row["label"], image_id, label_space)
    size = label.shape[::-1]
    if size != image.size:
        rotated = size == image.size[::-1]
        mend = "rotate the image as its EXIF tag says and save it without" if rotated else "make them equal"
        raise InputError(f"{label_name} is {_size(size)} pixels, but {image_name} is {_size(image.size)}: {mend}")
    return StoredRecord(image_name, image, label, ids, image_id)


def _read_label(source: Path | Row, image_id: str, label_space: LabelSpace) -> tuple[str, np.ndarray, np.ndarray]:
    """The name to call a label map by, the map (H, W), and the ids that are in it, the ignored one aside."""
    name, image = _opened(source, "map", image_id)
    if image.mode not in ("L", "P") and not image.mode.startswith("I"):
        raise InputError(f"{name} has mode {image.mode}: store one id a pixel, as PNG of mode L, P or I;16")
    with readable(name):
        label = np.asarray(image)  # a palette's indices are the ids
        found = np.flatnonzero(image.histogram()) if label.dtype == np.uint8 else np.unique(label)
    ids = found[found != label_space.ignore_index]
    num_classes = len(label_space.class_names)
    outside = ids[(ids < 0) | (ids >= num_classes)]
    if len(outside):
        raise InputError(
            f"{name} holds id {outside[0]}; ids are 0 to {num_classes - 1}, and {label_space.ignore_index} for "
            "ignored: correct the map, or the label space"
        )
    return name, label, ids


def _opened(source: Path | Row | None, what: Literal["picture", "map"], image_id: str) -> tuple[str, Image.Image]:
    """What lies behind a path or a table's cell, its header read, with the name to call it by."""
    if isinstance(source, Path):
        file, name = source, str(source)
    else:
        cell = source or {"bytes": None, "path": None}
        file = cell["path"] if cell["bytes"] is None else cell["bytes"]
        name = f"{'image' if what == 'picture' else 'label map'} of {shortened(image_id)}"
    if file is None:
        raise InputError(f"the {name} is empty: give the row a picture and a map, or remove it")
    with readable(name):
        return name, open_stored(file, what)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """What a decoder refuses within the block is an InputError that names the file."""
    try:
        with decoding():
            yield
    except Refused as error:
        raise InputError(f"cannot read {name} ({error}): replace it, or remove it with its partner") from error


def _read_ids(row: Row, image_id: str, label_space: LabelSpace) -> tuple[np.ndarray, bool]:
    _, label, ids = _read_label(row["label"], image_id, label_space)
    return ids, bool((label == label_space.ignore_index).any())


def open_stored(source: str | Path | bytes, what: Literal["picture", "map"]) -> Image.Image:
    """A dataset's picture or label map, not decoded yet. Raises Refused, whose message is the reason.

    Whoever decodes it gets the values that were written, or an error: of a PNG the checksums are right, and none is
    of a depth that Pillow would stretch or cut.
    """
    if not isinstance(source, bytes):
        check_regular(source)
        source = Path(source).read_bytes()
    image = open_image(source, PICTURE_FORMATS if what == "picture" else MAP_FORMATS)
    if image.format == "PNG":
        verify_checksums(source)
    depth = str(image.tile[0].args) if image.tile else ""  # of a PNG its raw mode, as "RGB;16B"
    if what == "picture" and (is_deep(image) or image.format == "PNG" and ";16" in depth):
        raise Refused("it has more than 8 bits a channel: save it with 8")
    if what == "map" and image.tile and image.tile[0].args in ("L;2", "L;4"):  # Pillow fills 8 bits with them
        raise Refused("it has less than 8 bits a pixel: save it with 8")
    return image


def exif_orientation(image: Image.Image) -> int:
    """1 as stored, 2 to 8 turned or mirrored, from 5 on with the edges exchanged; nothing here applies it."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


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


def part_size(total_batch_size: int, num_processes: int, micro_batches: int) -> int:
    """Samples of one micro-batch of one process."""
    parts = num_processes * micro_batches
    if total_batch_size < 1 or total_batch_size % parts:
        raise InputError(
            f"total batch size {total_batch_size} cannot be cut into {parts} equal parts "
            f"({num_processes} processes x {micro_batches} micro-batches): change one of them"
        )
    return total_batch_size // parts


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
        self.num_samples = num_samples
        self.total_batch_size = total_batch_size
        self.steps = range(start_step, max_steps)
        self.first_part = process_index * micro_batches
        self.micro_batches = micro_batches
        self.part_size = part_size(total_batch_size, num_processes, micro_batches)
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


class StreamedBatches(IterableDataset):
    """The micro-batches of this process from a stream, without an end: the dataset of its own `loader`.

    Shards are dealt out to the processes, and within one to the DataLoader's workers; every reader goes through its own
    again and again, each epoch in another order, rows shuffled in a buffer. So a step's pictures depend on the numbers
    of processes and of workers, other than with `StepSampler`; a restart at `start` goes on with the same ones.

    dataset: its records are a StreamedSplit.
    buffer_size: rows, not decoded, that a reader holds to shuffle among.
    start: micro-batches of this process to leave out, a multiple of the number of workers.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        batch_size: int,
        buffer_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        start: int = 0,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.node = {"rank": process_index, "world_size": num_processes}
        self.start = start

    def loader(self, num_workers: int, start: int = 0, **options: Any) -> Iterator[dict[str, Any]]:
        """The micro-batches from any `start` on, read by at most so many workers as there are shards for.

        options: of the DataLoader.
        """
        workers = min(num_workers, self._table(0).num_shards)
        odd = start % max(workers, 1)  # workers take turns, from the first one on
        self.start = start - odd
        return itertools.islice(DataLoader(self, batch_size=None, num_workers=workers, **options), odd, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        passed = self.start // (worker.num_workers if worker else 1) * self.batch_size
        rows = itertools.islice(self._rows(), passed, None)
        while True:
            batch = itertools.islice(rows, self.batch_size)
            yield collate([self.dataset.sample(self.dataset.records.stored(row), epoch) for epoch, row in batch])

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """(epoch, row) of this reader, epoch after epoch; in a worker, datasets itself takes the worker's shards."""
        for epoch in itertools.count():
            row = None
            for row in read_rows(self._table(epoch)):
                yield epoch, row
            if row is None:
                raise InputError("a reader of the stream got no picture: take fewer processes or workers than shards")

    def _table(self, epoch: int) -> "datasets.IterableDataset":
        """The rows of this process in an epoch. (All workers share the epoch that a datasets stream has: not used.)"""
        from datasets.distributed import split_dataset_by_node

        order = np.random.default_rng((self.dataset.seed, epoch))
        # One shard at a time: the rows of a converted training split are mixed already.
        options = {"buffer_size": self.buffer_size, "max_buffer_input_shards": 1}
        return split_dataset_by_node(self.dataset.records.table.shuffle(generator=order, **options), **self.node)


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples -> the model's batch: pixel_values (B,3,S,S), pixel_mask (B,S,S), labels (B,S,S), image_labels (B,C).

    `image_ids`, a list of B, is for the reader.
    """
    names = ("pixel_values", "pixel_mask", "labels", "image_labels")
    batch = {name: torch.stack([s[name] for s in samples]) for name in names}
    batch["image_ids"] = [sample["image_id"] for sample in samples]
    return batch
