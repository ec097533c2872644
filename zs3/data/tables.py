"""The rows of a split: from files in a folder, or from the shards of a table. No picture is decoded here."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from configuration_zs3 import one_line, shortened
from files_zs3 import PICTURE_SUFFIXES, is_leftover, is_of_the_machine, lines_of, read_text
from zs3.command_line import InputError, shown
from zs3.data.contents import Row, size_of
from zs3.label_space import is_hub_id

if TYPE_CHECKING:
    import datasets

COLUMNS = ("image", "label", "image_id")
NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<total>\d+)(-\w+)?\.parquet")  # of a table's shards


def folder_rows(folder: Path) -> list[Row]:
    if (folder / "metadata.jsonl").is_file():
        return _listed_rows(folder / "metadata.jsonl")
    images, labels = _by_stem(folder / "images", PICTURE_SUFFIXES), _by_stem(folder / "labels", (".png",))
    for ours, others, missing in ((images, labels, "labels"), (labels, images, "images")):
        alone = sorted(ours.keys() - others.keys())
        if alone:
            shown_names = ", ".join(ours[stem].name for stem in alone[:3]) + (", ..." if len(alone) > 3 else "")
            raise InputError(
                f"{folder / missing} lacks the partner of {len(alone)} of {len(ours)} ({shown_names}): give partners "
                "one name, as images/a.jpg and labels/a.png"
            )
    if not images:
        raise InputError(f"{folder / 'images'} has no picture ({', '.join(PICTURE_SUFFIXES)})")
    return [{"image": images[stem], "label": labels[stem], "image_id": image_id_of(stem)} for stem in sorted(images)]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Stem -> file. Leftover files of an operating system are skipped; any other file that does not fit is refused."""
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
            raise InputError(f"{found[file.stem]} and {file.name} have the same name: rename one of them")
        found[file.stem] = file
    return found


def _listed_rows(metadata: Path) -> list[Row]:
    """The lines of a metadata.jsonl in their order. datasets' "imagefolder" reads the same file."""
    rows: dict[str, Row] = {}
    try:
        lines = lines_of(read_text(metadata))
    except UnicodeDecodeError as error:
        raise InputError(f"{metadata} is no UTF-8 text: save it as such") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            entry = json.loads(line)
            image, label = (metadata.parent / entry[key] for key in ("image_file_name", "label_file_name"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
            raise InputError(
                f'{where} ({reason}): a line is {{"image_file_name": "...", "label_file_name": '
                '"..."}, paths from the file\'s own folder'
            ) from error
        for file in (image, label):
            if not os.path.isfile(file):
                fault = "is no file" if os.path.exists(file) else "does not exist"
                raise InputError(f"{where}: {file} {fault}")
        try:
            image_id = image_id_of(entry.get("image_id", image.stem))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if image_id in rows:
            raise InputError(
                f"{where}: {shortened(image_id)} was there before: give each line another image_id "
                "(where none is given, it is the picture's name without its suffix)"
            )
        rows[image_id] = {"image": image, "label": label, "image_id": image_id}
    if not rows:
        raise InputError(f"{metadata} is empty: a line for each picture")
    return list(rows.values())


def image_id_of(cell: object) -> str:
    """The id in a cell of a list or table, or in a file's name, as a text."""
    if cell is None:
        raise InputError("a row has no image_id: give every picture its own")
    if isinstance(cell, float) and cell.is_integer():  # pandas makes floats of whole numbers in a column with gaps
        cell = int(cell)
    if isinstance(cell, bool) or not isinstance(cell, str | int) or cell == "" or "\0" in str(cell):
        raise InputError(f"image_id {shortened(cell)} is neither a text nor a whole number: give every picture its own")
    try:
        str(cell).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"image_id {shortened(cell)} is no UTF-8 text: rename the picture, or its file") from error
    return str(cell)


def open_table(dataset: str | Path, split: str, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":
    """A split in parquet, from a folder or the Hub. Its pictures are bytes."""
    import datasets

    if Path(dataset).is_dir():
        shards = _with_rows(table_shards(Path(dataset), split))
        if not shards:
            raise InputError(f"split {split!r} of {dataset} has no row: name another split, or another dataset")
        # This name is part of the cache's key, so that a replaced shard with the same path and time is read again.
        source, options = "parquet", {"name": _identity(shards), "split": "rows"}
        options["data_files"] = {"rows": [glob.escape(str(shard.absolute())) for shard in shards]}
    elif is_hub_id(str(dataset)):
        source, options = str(dataset), {"split": split}
    else:
        raise InputError(f"dataset {dataset} is no folder, and no Hub id of the form owner/name")
    with whole_table(f"cannot load split {split!r} of {dataset}"):
        table = datasets.load_dataset(source, streaming=streaming, **options)
        if table.column_names is None:  # some streams know their columns only after the first rows
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
    """The parquet files of a folder's split; or the Hub id, if the dataset is on the Hub."""
    return table_shards(Path(dataset), split) if Path(dataset).is_dir() else str(dataset)


def _with_rows(shards: list[Path]) -> list[Path]:
    """The shards that have rows: datasets cannot read empty ones. A damaged one stays, and its reader refuses it."""
    import pyarrow.parquet

    kept = []
    for shard in shards:
        size_of(shard)  # refuses a pipe, on which the next line would wait for ever
        try:
            empty = pyarrow.parquet.read_metadata(shard).num_rows == 0
        except (OSError, ValueError):
            empty = False
        kept += [] if empty else [shard]
    return kept


def _identity(files: Sequence[Path]) -> str:
    """A digest of names, sizes and times. Each change of a file changes its ctime, which nobody can reset."""
    found = [(file.name, file.stat()) for file in files]
    facts = [(name, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in found]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def table_shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split. If their names have numbers, all of them must be there.

    Names are `train-00000-of-00008.parquet`, in older uploads with a digest before the suffix, or any other name that
    begins with `train-`.
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
        raise InputError(f"{shown(shards[0])}: datasets gives '::' or '$' in this path a meaning, rename the folder")
    totals = sorted({total for _, total in numbered})
    whole = [(number, len(shards)) for number in range(len(shards))]
    if numbered and sorted(numbered) != whole:
        raise InputError(
            f"{folder}/data holds {len(shards)} shards of {split!r}, of {' and '.join(f'{n:05d}' for n in totals)}: "
            "the conversion or the copy is not complete, or shards of another one lie between"
        )
    return shards


@contextmanager
def whole_table(trouble: str) -> Iterator[None]:
    """An error within the block becomes an InputError of one line.

    For a damaged file pyarrow and datasets raise errors of many kinds. Some are bugs of these libraries.
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
    """The first error. datasets wraps it in its own ("An error occurred while generating the dataset")."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
