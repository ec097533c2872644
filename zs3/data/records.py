"""The records of a split: picture, label map, id.

`load_split` gives them by index. `stream_split` reads the same records one after the other, without a copy on the disk.
`zs3.data.samples` makes training samples of them.

Axes: H W pixels.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zs3.command_line import InputError
from zs3.data.contents import Row, contents_of, sizes_sha256
from zs3.data.stored import Record, StoredRecord, read_ids, read_label, read_stored
from zs3.data.tables import folder_rows, image_id_of, open_table, table_files, whole_table
from zs3.label_space import LabelSpace, load_label_space

if TYPE_CHECKING:
    import datasets


@dataclass(eq=False, repr=False)
class Split(Sequence[Record]):
    """The records of one split by index. A record is read only when it is indexed."""

    rows: Sequence[Row]
    image_ids: list[str]
    label_space: LabelSpace
    shards: Sequence[Path] | str = ()  # the files of a table, see `table_files`

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Record:
        return self.stored(index).record()

    def stored(self, index: int) -> StoredRecord:
        image_id = self.image_ids[index]  # raises IndexError past the end, which ends a loop over records
        return read_stored(self.rows[index % len(self)], image_id, self.label_space)

    def label(self, index: int) -> np.ndarray:
        """(H, W) int32: a record's label map. The picture is not read."""
        _, label, _ = read_label(self.rows[index % len(self)]["label"], self.image_ids[index], self.label_space)
        return label.astype(np.int32)

    def ids(self) -> Iterator[tuple[np.ndarray, bool]]:
        """For each label map in turn: the class ids in it, and whether it has ignored pixels."""
        rows = zip(self.rows, self.image_ids, strict=True)
        return (read_ids(row, image_id, self.label_space) for row, image_id in rows)

    def contents(self) -> dict[str, int | str]:
        """The fingerprint of the split; see `contents_of`."""
        return contents_of(self.image_ids, self.rows if isinstance(self.rows, list) else None, self.shards)

    def picture_sizes_sha256(self, count: int) -> str | None:
        """The digest of the file sizes of the first pictures. None for a table, which has no picture files."""
        if not isinstance(self.rows, list):
            return None
        return sizes_sha256([row["image"] for row in self.rows[:count]])


@dataclass(eq=False, repr=False)
class StreamedSplit:
    """The records of one split, one after the other. A shard is read, or downloaded, when its turn comes."""

    table: "datasets.IterableDataset"  # rows as `Row`, with pictures that are not decoded
    label_space: LabelSpace
    rows: list[Row] | None = None  # of a folder; None: a table
    shards: Sequence[Path] | str = ()  # as in a Split

    def __iter__(self) -> Iterator[Record]:
        return (self.stored(row).record() for row in read_rows(self.table))

    def ids(self) -> Iterator[tuple[np.ndarray, bool]]:
        """See `Split.ids`."""
        return (read_ids(row, image_id_of(row["image_id"]), self.label_space) for row in read_rows(self.table))

    def stored(self, row: Row) -> StoredRecord:
        return read_stored(row, image_id_of(row["image_id"]), self.label_space)

    def contents(self) -> dict[str, int | str]:
        """The fingerprint of the split; see `contents_of`."""
        image_ids = None if self.rows is None else [row["image_id"] for row in self.rows]
        return contents_of(image_ids, self.rows, self.shards)


def read_rows(table: "datasets.IterableDataset") -> Iterator[Row]:
    """The rows of a stream. Raises InputError at a shard that is damaged or cannot be reached."""
    with whole_table("cannot read the rest of the stream"):
        yield from table


def load_split(dataset: str | Path, split: str, label_space: LabelSpace | None = None) -> Split:
    """The records of `split` ("train", "validation", ...).

    dataset: a folder with `{split}/images` and `{split}/labels` (png, with the names of their pictures), or with
        `{split}/metadata.jsonl`; or a folder with `data/{split}-*.parquet`, or a Hub id, both with the columns image,
        label, image_id.
    label_space: the class names of the ids in the label maps. None: the dataset's own classes.json.
    """
    label_space = label_space or load_label_space(dataset)
    if (Path(dataset) / split).is_dir():
        rows = folder_rows(Path(dataset) / split)
        return Split(rows, [row["image_id"] for row in rows], label_space)
    table = open_table(dataset, split, streaming=False)
    with whole_table(f"cannot read image_id of split {split!r} of {dataset}"):
        image_ids = [image_id_of(image_id) for image_id in table["image_id"]]
    repeated = [image_id for image_id, times in Counter(image_ids).items() if times > 1]
    if repeated:
        raise InputError(f"split {split!r} of {dataset} has image_id {repeated[0]!r} twice: give every picture its own")
    return Split(table, image_ids, label_space, table_files(dataset, split))


def stream_split(dataset: str | Path, split: str, label_space: LabelSpace | None = None) -> StreamedSplit:
    """The records of `load_split` as a stream."""
    import datasets

    label_space = label_space or load_label_space(dataset)
    if (Path(dataset) / split).is_dir():
        rows = folder_rows(Path(dataset) / split)  # datasets divides this list over its readers
        table = datasets.IterableDataset.from_generator(_each, gen_kwargs={"rows": rows})
        return StreamedSplit(table, label_space, rows)
    return StreamedSplit(open_table(dataset, split, streaming=True), label_space, shards=table_files(dataset, split))


def _each(rows: list[Row]) -> Iterator[Row]:
    yield from rows


def dataset_name(dataset: str) -> str:
    """The name in results: a Hub id, or a folder's name without its path."""
    return Path(dataset).name if Path(dataset).is_dir() else dataset
