"""The shards of a converted dataset: their items, how they are written, and how finished ones are recognised."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from files_zs3 import Unwanted, read_text
from zs3.convert.archives import Captioned, Pair
from zs3.convert.items import PROGRESS, Converted
from zs3.files import file_sha256, writing

if TYPE_CHECKING:
    import pyarrow

ROW_GROUP = 64  # pictures that a reader holds in memory at once


# ---- one shard ---------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    split: str
    name: str
    items: list[Pair | Captioned]

    @property
    def items_sha256(self) -> str:
        """Digest of the captions, or of the image ids and the sizes and times of the files."""
        if isinstance(self.items[0], Pair):
            lines = [f"{item.image_id} {_stamp(item.image)} {_stamp(item.label)}" for item in self.items]
        else:
            lines = [json.dumps(item) for item in self.items]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shards_of(split: str, items: list[Pair | Captioned]) -> list[Shard]:
    """The shards of a split. Their number is a multiple of 8, so that 2, 4 or 8 processes share a stream equally."""
    total = 8 * math.ceil(len(items) / 16000) if len(items) >= 8 else 1
    bounds = [number * len(items) // total for number in range(total + 1)]
    names = [f"{split}-{number:05d}-of-{total:05d}.parquet" for number in range(total)]
    return [Shard(split, name, items[bounds[n] : bounds[n + 1]]) for n, name in enumerate(names)]


def record(output: Path, shard: Shard) -> Path:
    """The file for the measurements of a shard."""
    return output / PROGRESS / f"{shard.name}.json"


def recorded(output: Path, shard: Shard) -> dict | None:
    """The measurements of a shard; None if its items have changed since, or if there are none."""
    path = record(output, shard)
    measures = read_measures(path) if path.is_file() else None
    return measures if measures is not None and measures.get("items_sha256") == shard.items_sha256 else None


def finished(output: Path, folder: Path, shard: Shard) -> dict | None:
    """The measurements of a shard if the folder holds it complete; else None."""
    path, measures = folder / shard.name, recorded(output, shard)
    if measures is None or not path.is_file() or path.stat().st_size != measures.get("bytes"):
        return None
    return measures if file_sha256(path) == measures.get("sha256") else None


def write_shard(
    path: Path,
    results: Iterable[Converted],
    schema: "pyarrow.Schema",
    source: Path,
    on_problem: Literal["stop", "skip"],
) -> dict:
    """Writes one shard. Returns its measurements.

    source: the archive's folder. Messages of problems give paths relative to it.
    on_problem: with "stop", a shard with a problem is read to its end but not written.
    """
    import pyarrow.parquet

    measures = {"num_images": 0, "num_captions": 0, "all_ignored": 0, "problems": [], "notes": []}
    pixels, images, rows = Counter(), Counter(), []
    # Pictures are compressed already; dictionaries and statistics do not help.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": ["image_id"]}
    with writing(path) as partial:
        with pyarrow.parquet.ParquetWriter(partial, schema, **options) as writer:
            for result in results:
                measures["problems"] += [_of_source(remark, source) for remark in result.problems]
                measures["notes"] += [_of_source(remark, source) for remark in result.notes]
                if result.row is None:
                    continue
                rows.append(result.row)
                measures["num_images"] += 1
                measures["num_captions"] += len(result.row.get("captions", []))
                measures["all_ignored"] += result.row.get("class_ids") == []
                pixels.update(result.pixels)
                images.update(result.row.get("class_ids", []))
                if len(rows) == ROW_GROUP:
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                    rows = []
            if rows:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        if on_problem == "stop" and measures["problems"]:
            raise Unwanted
        measures |= {"sha256": file_sha256(partial), "bytes": partial.stat().st_size}
        measures |= {"pixels": _by_id(pixels), "images": _by_id(images)}
    return measures


def schema_of(name: str) -> "pyarrow.Schema":
    from datasets import Features, Image, List, Value

    if name == "coco_captions":
        return Features({"image_id": Value("string"), "captions": List(Value("string"))}).arrow_schema
    columns = {"image": Image(), "label": Image(), "image_id": Value("string"), "class_ids": List(Value("int32"))}
    return Features(columns).arrow_schema


def _stamp(path: Path) -> str:
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else "missing"


def _of_source(remark: dict[str, str], source: Path) -> dict[str, str]:
    """A remark with paths relative to the source."""
    return remark | {"message": remark["message"].replace(f"{source}{os.sep}", "")}


def _by_id(counts: Counter) -> dict[str, int]:
    return {str(i): counts[i] for i in sorted(counts)}


def read_measures(path: Path) -> dict | None:
    """The measurements in a file; None if it holds no mapping, as after a power cut."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
