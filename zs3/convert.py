"""Official archives -> a dataset of parquet shards, which `zs3.data.load_split` and `datasets.load_dataset` read.

    python -m zs3.convert ade20k_150 --source ADEChallengeData2016 --output data/ade20k_150 --num_proc 8

The names and layouts are those of `zs3.archives`; docs/data.md tells them. Columns: image (the file's bytes as they
are), label (a PNG of ids: 8 bits where the ignored id is 255, 16 where it is 65535), image_id, class_ids (the sorted
ids in the label map, without the ignored one). coco_captions has image_id and captions alone: its pictures are those
of coco_stuff_171.

Everything is checked on the way. A shard, `train-00003-of-00016.parquet`, is there whole or not at all, and waits with
what was measured of it in `.progress/`: the same command again makes the shards that are missing, to the same bytes.
When all are there, `classes.json`, the card and `conversion.json` are written, and the shards become `data/`, so that
nobody loads the half of a dataset.

Axes: H W pixels.
"""

import difflib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from configuration_zs3 import shortened
from files_zs3 import Unwanted, is_leftover, map_png, read_text
from zs3.archives import ARCHIVES, NUM_CAPTIONS, SPLITS, BadFile, Captioned, Pair, opened
from zs3.command_line import (
    Arguments,
    InputError,
    OutputFolder,
    Processes,
    Some,
    check_required,
    flag,
    one_line,
    printable,
    read_arguments,
    run,
)
from zs3.data import exif_orientation, image_id_of
from zs3.dataset_card import card
from zs3.files import file_sha256, json_text, lock_folder, write_json, write_text, writing
from zs3.label_space import CLASSES_FOLDER, is_hub_id, load_label_space, source_ids

if TYPE_CHECKING:
    import pyarrow

ROW_GROUP = 64  # pictures that are read, and held in memory, at once
SHOWN = 5  # problems in the terminal
PROGRESS = ".progress"  # in the output: settings, measurements, and the shards until all are there
OUTSIDE = -1  # in the table of ids: no value of the archive's


@dataclass
class ConvertArgs(Arguments):
    """A benchmark's official archive becomes a dataset: python -m zs3.convert NAME --source DIR --output DIR."""

    name: str | None = flag(None, f"The benchmark: {', '.join(ARCHIVES)}.")
    source: str | None = flag(None, "Folder of the unpacked archive, or the one above.")
    output: OutputFolder | None = flag(None, "Folder for the dataset; the same command again goes on where it stopped.")
    splits: Some[str] = flag(list(SPLITS), "Splits to convert.")
    num_proc: Processes = flag(1, "Processes that read pictures.")
    on_problem: Literal["stop", "skip"] = flag(
        "stop",
        "What a picture that cannot be used does: nothing is finished around it (stop), or it is left out (skip).",
    )
    push_to_hub: str | None = flag(None, "Hub id, owner/name, of the dataset to upload to when all is done.")
    private: bool = flag(False, "A dataset that --push_to_hub makes is private.")

    def check(self) -> None:
        check_required(self, "name")
        if self.name not in ARCHIVES:
            alike = [name for name in ARCHIVES if name.startswith(self.name)]
            alike = alike or difflib.get_close_matches(self.name, ARCHIVES, n=1, cutoff=0.0)
            raise InputError(f"no archive is called {self.name!r}: did you mean {' or '.join(alike)}?")
        check_required(self, "source", "output")
        if not set(self.splits) <= set(SPLITS):
            raise InputError(f"--splits takes {' and '.join(SPLITS)}, got {' '.join(self.splits)}")
        if not Path(self.source).is_dir():
            raise InputError(f"--source {self.source} is no folder: give that of the unpacked archive")
        if self.push_to_hub is not None and not is_hub_id(self.push_to_hub):
            raise InputError(f"--push_to_hub {self.push_to_hub} is no Hub id of the form owner/name")


# ---- one picture -------------------------------------------------------------------------------------------


class Converted(NamedTuple):
    """What became of an item. row: of the table; None if there is a problem."""

    row: dict | None
    problems: list[dict[str, str]]  # kind, image_id, message
    notes: list[dict[str, str]]  # the same, of what is no fault
    pixels: dict[int, int]  # id -> how many, the ignored id among them


@functools.cache
def lookup_table(name: str) -> tuple[np.ndarray, int]:
    """(65536,) int32: the id of each value of the archive's label files, or OUTSIDE; and the ignored id."""
    ignore_index = load_label_space(CLASSES_FOLDER / f"{name}.json").ignore_index
    table = np.full(65536, OUTSIDE, dtype=np.int32)
    table[list(ARCHIVES[name].ignored)] = ignore_index
    values = source_ids(name)
    table[values] = np.arange(len(values))
    return table, ignore_index


def convert_item(item: Pair | Captioned, name: str) -> Converted:
    if item.repeats:
        where = f": the second is {item.image}" if isinstance(item, Pair) else ""
        return Converted(None, [_remark(item, "repeated_id", f"{item.image_id} is there twice{where}")], [], {})
    if isinstance(item, Pair):
        return convert_pair(item, name)
    if not item.captions:
        return Converted(None, [_remark(item, "missing_captions", f"{item.image_id} has no caption")], [], {})
    return Converted({"image_id": item.image_id, "captions": item.captions}, [], [], {})


def convert_pair(pair: Pair, name: str) -> Converted:
    problems, image, ids = [], None, None
    ignore_index = lookup_table(name)[1]
    try:
        content, image = opened(pair.image, "picture")
    except BadFile as error:
        problems.append(_remark(pair, error.kind, str(error)))
    try:
        ids = read_ids(pair, name)
    except BadFile as error:
        problems.append(_remark(pair, error.kind, str(error)))
    if image is None or ids is None:
        return Converted(None, problems, [], {})
    turned = exif_orientation(image) in range(2, 9)
    if ids.shape != (image.height, image.width):
        return Converted(None, [_remark(pair, "size_mismatch", mismatch(pair, image, ids))], [], {})
    counts = np.bincount(ids.ravel())
    pixels = {int(i): int(counts[i]) for i in np.nonzero(counts)[0]}
    label = map_png(np.where(ids == ignore_index, -1, ids), len(source_ids(name)))
    row = {
        "image": {"bytes": content, "path": pair.image.name},
        "label": {"bytes": label, "path": f"{pair.image_id}.png"},
        "image_id": pair.image_id,
        "class_ids": [i for i in pixels if i != ignore_index],
    }
    message = f"{pair.image} has an EXIF orientation tag; its map fits it as stored, and so both are read"
    return Converted(row, [], [_remark(pair, "exif_orientation", message)] if turned else [], pixels)


def read_ids(pair: Pair, name: str) -> np.ndarray:
    """(H, W) int32 of the label space."""
    values = pair.values(pair.label)
    ids = lookup_table(name)[0][values]
    if (ids == OUTSIDE).any():
        value = values[ids == OUTSIDE][0]
        raise BadFile("ids_outside", f"{pair.label} holds value {value}, which the release of {name} does not have")
    return ids


def mismatch(pair: Pair, image: Image.Image, ids: np.ndarray) -> str:
    sizes = f"{pair.label} is {ids.shape[1]} x {ids.shape[0]} pixels, {pair.image} {image.width} x {image.height}"
    if exif_orientation(image) in range(5, 9) and ids.shape == image.size:
        return (
            f"{sizes}: the map was drawn on the picture turned as its EXIF tag says; save it turned and without the tag"
        )
    return sizes


def _remark(item: Pair | Captioned, kind: str, message: str) -> dict[str, str]:
    return {"kind": kind, "image_id": item.image_id, "message": message}


def convert_all(items: list[Pair | Captioned], name: str, num_proc: int) -> Iterator[Converted]:
    """In order; a few items for each process are under way or done, never more."""
    convert = functools.partial(convert_item, name=name)
    if num_proc == 1 or isinstance(next(iter(items), None), Captioned):
        yield from map(convert, items)
        return
    spawn = multiprocessing.get_context("spawn")
    remaining = iter(items)
    with ProcessPoolExecutor(num_proc, spawn, _begin_process) as pool:
        with _deaf_to_ctrl_c():  # processes that are started in it are so from their first line on
            waiting = deque((item, pool.submit(convert, item)) for item in islice(remaining, 8 * num_proc))
        while waiting:
            item, result = waiting.popleft()
            try:
                yield result.result()
            except BrokenProcessPool as error:
                raise InputError(
                    f"a process ended at {item.image_id} or soon after, for want of memory or at a broken .mat file: "
                    "start again with a smaller --num_proc, or replace the file"
                ) from error
            waiting.extend((item, pool.submit(convert, item)) for item in islice(remaining, 1))


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal, and is for the main one to hear."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_process() -> None:
    """Of the pool: when the main process is gone, however it went, so is this one."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# ---- one shard ---------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    split: str
    name: str
    items: list[Pair | Captioned]

    @property
    def items_sha256(self) -> str:
        """Of captions, or of image ids and the sizes and times of their files."""
        if isinstance(self.items[0], Pair):
            lines = [f"{item.image_id} {_stamp(item.image)} {_stamp(item.label)}" for item in self.items]
        else:
            lines = [json.dumps(item) for item in self.items]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shards_of(split: str, items: list[Pair | Captioned]) -> list[Shard]:
    """The shards of a split: a multiple of 8, so that 2, 4 or 8 processes get equal shares of a stream."""
    total = 8 * math.ceil(len(items) / 16000) if len(items) >= 8 else 1
    bounds = [number * len(items) // total for number in range(total + 1)]
    names = [f"{split}-{number:05d}-of-{total:05d}.parquet" for number in range(total)]
    return [Shard(split, name, items[bounds[n] : bounds[n + 1]]) for n, name in enumerate(names)]


def record(output: Path, shard: Shard) -> Path:
    """Where the measurements of a shard lie."""
    return output / PROGRESS / f"{shard.name}.json"


def recorded(output: Path, shard: Shard) -> dict | None:
    """The measurements of a shard, if they are of the items it should have."""
    path = record(output, shard)
    measures = _read_json(path) if path.is_file() else None
    return measures if measures is not None and measures.get("items_sha256") == shard.items_sha256 else None


def finished(output: Path, folder: Path, shard: Shard) -> dict | None:
    """As `recorded`, of a shard that is in the folder, and whole."""
    path, measures = folder / shard.name, recorded(output, shard)
    if measures is None or not path.is_file() or path.stat().st_size != measures.get("bytes"):
        return None
    return measures if file_sha256(path) == measures.get("sha256") else None


def write_shard(path: Path, results: Iterable[Converted], schema: "pyarrow.Schema", args: ConvertArgs) -> dict:
    """Its measurements. Written beside and renamed; with a problem and --on_problem stop, only examined."""
    import pyarrow.parquet

    measures = {"num_images": 0, "num_captions": 0, "all_ignored": 0, "problems": [], "notes": []}
    pixels, images, rows = Counter(), Counter(), []
    # Pictures are compressed already, and no use in dictionaries and statistics.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": ["image_id"]}
    with writing(path) as partial:
        with pyarrow.parquet.ParquetWriter(partial, schema, **options) as writer:
            for result in results:
                measures["problems"] += [_of_source(remark, args.source) for remark in result.problems]
                measures["notes"] += [_of_source(remark, args.source) for remark in result.notes]
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
        if args.on_problem == "stop" and measures["problems"]:
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


def _of_source(remark: dict[str, str], source: str) -> dict[str, str]:
    """With paths in the source, wherever that is."""
    return remark | {"message": remark["message"].replace(f"{Path(source)}{os.sep}", "")}


def _by_id(counts: Counter) -> dict[str, int]:
    return {str(i): counts[i] for i in sorted(counts)}


# ---- the whole ---------------------------------------------------------------------------------------------


def list_items(args: ConvertArgs) -> dict[str, list[Pair | Captioned]]:
    """Of each split; those whose id was there before are marked.

    The training split is mixed, the others are in the order of the ids. A split whose size is not the release's is
    refused, unless problems are skipped.
    """
    archive, items = ARCHIVES[args.name], {}
    for split in args.splits:
        found = sorted(archive.items(Path(args.source), split), key=lambda item: item[:2])
        if not found:
            raise InputError(f"{split} of {args.name} in {args.source} is empty: copy it from the archive")
        for item in found:
            image_id_of(item.image_id)
        ids = [None, *(item.image_id for item in found)]
        found = [item._replace(repeats=item.image_id == ids[n]) for n, item in enumerate(found)]
        items[split] = mixed(found) if split == "train" else found
        for what, (count, known) in counts(args.name, split, items[split]).items():
            if count not in known and args.on_problem == "stop":
                raise InputError(
                    f"{split} of {args.name} in {args.source} holds {count:,} {what}, the release {known[0]:,}: "
                    "copy the rest, or --on_problem skip"
                )
    return items


def mixed(items: list[Pair | Captioned]) -> list[Pair | Captioned]:
    """In the order of the digests of the image ids: every shard is then a fair sample of the split.

    A stream shuffles no more than its buffer, and some archives are sorted by scene.
    """
    return sorted(items, key=lambda item: hashlib.sha256(item.image_id.encode()).digest())


def counts(name: str, split: str, items: list[Pair | Captioned]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """What was found and what the release has, or may have, by kind."""
    found = {"pictures": (len(items), ARCHIVES[name].counts[split])}
    if name == "coco_captions":
        found["captions"] = (sum(len(item.captions) for item in items), (NUM_CAPTIONS[split],))
    return found


def check_free(output: Path) -> None:
    """A folder holds one conversion, and nothing else."""
    if not output.exists() or (output / PROGRESS / "settings.json").exists():
        return
    if not output.is_dir():
        raise InputError(f"--output {output} is a file: choose a folder")
    others = [file.name for file in output.iterdir() if file.name != PROGRESS and not is_leftover(file.name)]
    if others:
        raise InputError(f"--output {output} holds other files ({shortened(others[0])}): choose a new folder")


def check_settings(args: ConvertArgs) -> None:
    """The settings of a conversion are written at the start and must be the same when it goes on."""
    output = Path(args.output)
    settings = {
        "name": args.name,
        "source": str(Path(args.source).resolve()),
        "splits": args.splits,
        "classes_sha256": hashlib.sha256(classes_text(args.name).encode()).hexdigest(),
        "versions": versions(),
    }
    path = output / PROGRESS / "settings.json"
    before = _read_json(path) if path.exists() else None
    if before is not None:
        whole = (output / "data").is_dir()  # no shard of another version will join it
        changed = [key for key in settings if before.get(key) != settings[key] and not (whole and key == "versions")]
        if changed:
            raise InputError(
                f"{output} was made with another {', '.join(changed)}: choose another --output, or delete it"
            )
        return
    write_json(path, settings)


def _read_json(path: Path) -> dict | None:
    """None of a file that holds no mapping, as a power cut leaves it empty or in pieces."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def classes_text(name: str) -> str:
    """The label space's file; captions have none."""
    path = CLASSES_FOLDER / f"{name}.json"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("datasets", "numpy", "pillow", "pyarrow", "scipy")}


def conversion(args: ConvertArgs, items: dict[str, list], shards: list[tuple[Shard, dict]]) -> dict:
    """What was measured, for conversion.json."""
    label_space = None if args.name == "coco_captions" else load_label_space(CLASSES_FOLDER / f"{args.name}.json")
    splits, problems, notes = {}, [], []
    for split in args.splits:
        own = [(shard, measures) for shard, measures in shards if shard.split == split]
        problems += [{"split": split, **remark} for _, measures in own for remark in measures["problems"]]
        notes += [{"split": split, **remark} for _, measures in own for remark in measures["notes"]]
        known = counts(args.name, split, items[split])
        splits[split] = {
            "num_images": sum(measures["num_images"] for _, measures in own),
            "bytes": sum(measures["bytes"] for _, measures in own),
            "in_source": {what: found for what, (found, _) in known.items()},
            "in_release": {what: list(release) for what, (_, release) in known.items()},
            "as_released": all(found in release for found, release in known.values())
            and not any(measures["problems"] for _, measures in own),
            "shards": [
                {"file": f"data/{shard.name}"} | {key: measures[key] for key in ("num_images", "bytes", "sha256")}
                for shard, measures in own
            ],
        }
        if label_space is None:
            splits[split]["num_captions"] = sum(measures["num_captions"] for _, measures in own)
        else:
            pixels, images = (sum((Counter(m[key]) for _, m in own), Counter()) for key in ("pixels", "images"))
            names = label_space.class_names
            splits[split] |= {
                "pixels": {name: pixels[str(i)] for i, name in enumerate(names)},
                "images": {name: images[str(i)] for i, name in enumerate(names)},
                "ignored_pixels": pixels[str(label_space.ignore_index)],
                "images_ignored_everywhere": sum(measures["all_ignored"] for _, measures in own),
                "never": [name for i, name in enumerate(names) if not images[str(i)]],
            }
    return {
        "name": args.name,
        "source": Path(args.source).resolve().name,
        "on_problem": args.on_problem,
        "label_space_sha256": label_space and label_space.sha256,
        "splits": splits,
        "problems": problems,
        "notes": notes,
        "versions": versions(),
    }


def report(result: dict) -> str:
    """The lines for the terminal."""
    lines = []
    for split, row in result["splits"].items():
        what, number = ("pictures", "num_images") if "pixels" in row else ("captions", "num_captions")
        amount = f"{row[number]:,} {what}"
        release = "as released" if row["as_released"] else f"the release has {max(row['in_release'][what]):,}"
        lines.append(f"{split:<12}{amount} ({release}), {len(row['shards'])} shards, {row['bytes'] / 1e6:,.1f} MB")
        if row.get("images_ignored_everywhere"):
            lines.append(f"{'':<12}{row['images_ignored_everywhere']:,} pictures are ignored everywhere")
        if row.get("never"):
            shown = ", ".join(row["never"][:SHOWN]) + (", ..." if len(row["never"]) > SHOWN else "")
            lines.append(f"{'':<12}{len(row['never'])} classes never occur: {shown}")
    if result["notes"]:
        lines.append(f"{'notes':<12}{tally(result['notes'])}")
    if result["problems"]:
        lines.append(f"{'left out':<12}{tally(result['problems'])}")
    return "\n".join(lines)


def tally(remarks: list[dict[str, str]]) -> str:
    """How many of each kind, and the first few."""
    kinds = Counter(remark["kind"] for remark in remarks)
    lines = [", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())]
    lines += [f"  {remark['message']}" for remark in remarks[:SHOWN]]
    if len(remarks) > SHOWN:
        lines.append("  ...")
    return "\n".join(lines)


def push(args: ConvertArgs) -> None:
    """Uploads the dataset; what an earlier one left in its data/ goes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The bases of HfHubHTTPError: OSError, and all errors of the HTTP library, which changes with huggingface_hub.
    try:
        HfApi().create_repo(args.push_to_hub, repo_type="dataset", private=args.private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=args.push_to_hub,
            repo_type="dataset",
            folder_path=args.output,
            ignore_patterns=[".progress/*", "*.partial"],
            delete_patterns="data/*.parquet",
            commit_message=f"{args.name}, converted from the official archive",
        )
    except (*HfHubHTTPError.__bases__, ValueError) as error:
        raise InputError(
            f"cannot upload to {args.push_to_hub} ({one_line(error, 70)}): the dataset in {args.output} is whole; the "
            "same command tries again"
        ) from error


# ---- the command -------------------------------------------------------------------------------------------


def convert(args: ConvertArgs) -> dict:
    """What was measured, as conversion.json holds it."""
    args.check()
    args = replace(args, splits=[split for split in SPLITS if split in args.splits])
    items = list_items(args)
    check_free(Path(args.output))
    with lock_folder(Path(args.output, PROGRESS)):
        check_settings(args)
        return convert_items(args, items)


def convert_items(args: ConvertArgs, items: dict[str, list[Pair | Captioned]]) -> dict:
    """As `convert`, of a folder that is nobody else's now."""
    output = Path(args.output)
    whole, begun = output / "data", output / PROGRESS / "data"
    folder = whole if whole.is_dir() else begun
    shards = [shard for split in args.splits for shard in shards_of(split, items[split])]
    done = [(shard, finished(output, folder, shard)) for shard in shards]
    if args.on_problem == "stop" and any(measures and measures["problems"] for _, measures in done):
        raise InputError(
            f"{output} holds shards from which --on_problem skip left pictures out: "
            "choose another --output, or skip again"
        )
    if folder == whole and None not in (measures for _, measures in done):
        result = conversion(args, items, done)
        mended = write_about(args, result, again=False)
        print(f"there already: {f'all but {mended}' if mended else 'nothing was left to do'} in {output}")
        return result
    if folder == whole and None in (recorded(output, shard) for shard in shards):
        raise InputError(
            f"{output} is a finished dataset of other pictures than {args.source} holds now, and stays as it is: "
            "choose another --output, or delete it"
        )

    measured = make_shards(args, folder, done)  # of a finished dataset, those that were lost
    check_problems(args, measured)
    result = conversion(args, items, measured)
    write_about(args, result)
    if folder == begun:
        for file in {*begun.iterdir()} - {begun / shard.name for shard in shards}:
            file.unlink()  # of a copy of the archive that had fewer pictures, or half a shard
        begun.rename(whole)
    return result


def write_about(args: ConvertArgs, result: dict, again: bool = True) -> str:
    """What lies beside the shards; with again=False, of it what is damaged or gone. The names of what was written."""
    texts = {"README.md": card(result), "conversion.json": json_text(result)}
    if args.name != "coco_captions":
        texts["classes.json"] = classes_text(args.name)
    written = [name for name in texts if again or not _is_whole(Path(args.output, name))]
    for name in written:
        write_text(Path(args.output, name), texts[name])
    return ", ".join(written)


def _is_whole(path: Path) -> bool:
    """A text that is not empty; of JSON, a mapping."""
    try:
        return bool(read_text(path)) and (path.suffix != ".json" or bool(_read_json(path)))
    except (OSError, ValueError):
        return False


def make_shards(args: ConvertArgs, folder: Path, done: list[tuple[Shard, dict | None]]) -> list[tuple[Shard, dict]]:
    """Those without measurements, and the measurements of all."""
    folder.mkdir(exist_ok=True)
    total = sum(len(shard.items) for shard, _ in done)
    remaining = [item for shard, measures in done if measures is None for item in shard.items]
    schema = schema_of(args.name)
    measured = []
    results = convert_all(remaining, args.name, args.num_proc)
    with closing(results), tqdm(total=total, initial=total - len(remaining), unit="picture", mininterval=1) as bar:
        for shard, measures in done:
            if measures is None:
                own = _counted(islice(results, len(shard.items)), bar)
                measures = write_shard(folder / shard.name, own, schema, args) | {"items_sha256": shard.items_sha256}
                if "sha256" in measures:
                    write_json(record(Path(args.output), shard), measures)
            measured.append((shard, measures))
    return measured


def check_problems(args: ConvertArgs, measured: list[tuple[Shard, dict]]) -> None:
    """With --on_problem stop, all problems are written down and the first few shown; a split needs a picture."""
    path = Path(args.output) / "problems.json"
    problems = [{"split": shard.split, **remark} for shard, measures in measured for remark in measures["problems"]]
    if problems and args.on_problem == "stop":
        write_json(path, {"problems": problems})
        print(printable(f"problems    {tally(problems)}"), file=sys.stderr)
        raise InputError(
            f"{len(problems):,} problem{'s' * (len(problems) > 1)}, all in {path}: mend them and run the same command "
            "again, which redoes only what is missing, or --on_problem skip"
        )
    path.unlink(missing_ok=True)
    for split in args.splits:
        if not any(measures["num_images"] for shard, measures in measured if shard.split == split):
            print(printable(f"problems    {tally(problems)}"), file=sys.stderr)
            raise InputError(f"not one picture of {split} can be used: give the archive as it was released")


def _counted(results: Iterable[Converted], bar: tqdm) -> Iterator[Converted]:
    for result in results:
        bar.update()
        yield result


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--name", *argv]
    args, _ = read_arguments(ConvertArgs, argv)
    result = convert(args)
    print(report(result))
    if args.push_to_hub is not None:
        push(args)
        print(f"uploaded    https://huggingface.co/datasets/{args.push_to_hub}")
    print(f"dataset     {args.output}")


if __name__ == "__main__":
    run(main)
