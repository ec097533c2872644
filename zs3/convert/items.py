"""Converts a picture of an archive to a row of the dataset, and many pictures in processes.

Not in `zs3/convert/__main__.py`: processes that are spawned cannot import that file's functions.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from files_zs3 import map_png
from zs3.command_line import InputError
from zs3.convert.archives import ARCHIVES, BadFile, Captioned, Pair, opened
from zs3.data.stored import exif_orientation
from zs3.label_space import CLASSES_FOLDER, load_label_space, source_ids

PROGRESS = ".progress"  # folder in the output for settings, measurements and the shards of an unfinished conversion
OUTSIDE = -1  # id of a value that the archive does not have


# ---- one picture -------------------------------------------------------------------------------------------


class Converted(NamedTuple):
    """An item as a row of the table. row: None if there is a problem."""

    row: dict | None
    problems: list[dict[str, str]]  # kind, image_id, message
    notes: list[dict[str, str]]  # as problems, for things that are no fault
    pixels: dict[int, int]  # id -> number of pixels, with the ignored id


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
    problems, found = [], []
    for read in (lambda: opened(pair.image, "picture"), lambda: read_ids(pair, name)):
        try:
            found.append(read())
        except BadFile as error:
            problems.append(_remark(pair, error.kind, str(error)))
    if problems:
        return Converted(None, problems, [], {})
    (content, image), ids = found
    ignore_index = lookup_table(name)[1]
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
    message = f"{pair.image} has an EXIF orientation tag; its map fits the stored picture, so the tag is not applied"
    return Converted(row, [], [_remark(pair, "exif_orientation", message)] if turned else [], pixels)


def read_ids(pair: Pair, name: str) -> np.ndarray:
    """(H, W) int32: the label map, in ids of the label space."""
    values = pair.values(pair.label)
    ids = lookup_table(name)[0][values]
    if (ids == OUTSIDE).any():
        value = values[ids == OUTSIDE][0]
        raise BadFile("ids_outside", f"{pair.label} holds value {value}, which the release of {name} does not have")
    return ids


def mismatch(pair: Pair, image: Image.Image, ids: np.ndarray) -> str:
    sizes = f"{pair.label} is {ids.shape[1]} x {ids.shape[0]} pixels, {pair.image} {image.width} x {image.height}"
    if exif_orientation(image) in range(5, 9) and ids.shape == image.size:
        return f"{sizes}: the map fits the picture turned by its EXIF tag; save the turned picture without the tag"
    return sizes


def _remark(item: Pair | Captioned, kind: str, message: str) -> dict[str, str]:
    return {"kind": kind, "image_id": item.image_id, "message": message}


def convert_all(items: list[Pair | Captioned], name: str, num_workers: int) -> Iterator[Converted]:
    """The converted items, in order. At most 8 items per process are in work or waiting."""
    convert = functools.partial(convert_item, name=name)
    if num_workers == 0 or isinstance(next(iter(items), None), Captioned):
        yield from map(convert, items)
        return
    spawn = multiprocessing.get_context("spawn")
    remaining = iter(items)
    with ProcessPoolExecutor(num_workers, spawn, _begin_process) as pool:
        # Ctrl-C reaches every process of a terminal. The processes that start here ignore it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            waiting = deque((item, pool.submit(convert, item)) for item in islice(remaining, 8 * num_workers))
        finally:
            signal.signal(signal.SIGINT, before)
        while waiting:
            item, result = waiting.popleft()
            try:
                yield result.result()
            except BrokenProcessPool as error:
                raise InputError(
                    f"a process ended at {item.image_id} or soon after: memory is short, or a .mat file is broken: "
                    "start again with a smaller --num_workers, or replace the file"
                ) from error
            waiting.extend((item, pool.submit(convert, item)) for item in islice(remaining, 1))


def _begin_process() -> None:
    """Makes a process of the pool end with the main process, whatever the reason."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
