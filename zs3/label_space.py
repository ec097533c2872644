"""Label spaces: the class name of each id of a label map, the unseen names, the ignored id.

A label space comes from a `classes.json` with the keys "classes" (names in the order of their ids), "unseen"
(names; [] if there are none) and "ignore_label". Two keys are optional: "things", the names of the classes that are
things (all others are stuff), and "splits", a list of other lists of unseen names. `zs3/classes/` has the files of the
benchmarks, with two more keys: "source_ids", the value of each class in the archive's label files, and "synonyms" of
each class.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configuration_zs3 import Refused, check_names, is_number, one_line, places, shortened
from files_zs3 import decoding, read_text
from text_zs3 import check_text_embeds
from zs3.command_line import InputError, looks_local, shown

CLASSES_FOLDER = Path(__file__).parent / "classes"
BENCHMARKS = tuple(sorted(file.stem for file in CLASSES_FOLDER.glob("*.json")))
KEYS = ("classes", "unseen", "ignore_label")
MAX_CLASSES = 10_000  # an evaluation counts every pair of classes, which takes 0.8 GB for this number


@dataclass(frozen=True)
class LabelSpace:
    """C class names in the order of their ids, 0 to C - 1.

    unseen: the names of the classes without masks in training.
    ignore_index: the id of pixels without a label, outside 0 to C - 1.
    things: the names of the classes that are things; all others are stuff. None: not known.
    """

    class_names: list[str]
    unseen: list[str]
    ignore_index: int = 255
    things: list[str] | None = None

    def __post_init__(self) -> None:
        given = ("class_names", "unseen") if self.things is None else ("class_names", "unseen", "things")
        for field in given:
            object.__setattr__(self, field, _checked_names(field, getattr(self, field)))
        if not self.class_names:
            raise InputError("class_names is empty: a label space needs at least one name")
        if len(self.class_names) > MAX_CLASSES:
            raise InputError(
                f"class_names holds {len(self.class_names):,} names: a label space has {MAX_CLASSES:,} or less"
            )
        for field in given[1:]:
            _check_known(field, getattr(self, field), self.class_names)
        last = len(self.class_names) - 1
        fits = is_number(self.ignore_index, whole=True) and abs(self.ignore_index) < 2**31
        if not fits or 0 <= self.ignore_index <= last:
            raise InputError(f"ignore_index {shortened(self.ignore_index)} must be an integer outside ids 0 to {last}")
        object.__setattr__(self, "ignore_index", int(self.ignore_index))

    @property
    def is_seen(self) -> Tensor:
        """(C,) bool tensor."""
        unseen = set(self.unseen)
        return torch.tensor([name not in unseen for name in self.class_names])

    @property
    def is_thing(self) -> Tensor | None:
        """(C,) bool tensor. None: not known."""
        things = set(self.things or [])
        return None if self.things is None else torch.tensor([name in things for name in self.class_names])

    @property
    def sha256(self) -> str:
        """Digest of class names, unseen names and ignored id. Results and scores record it. `things` is not in it."""
        content = json.dumps([self.class_names, self.unseen, self.ignore_index])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def seen(self) -> list[str]:
        """The names that are not unseen, in the order of their ids."""
        unseen = set(self.unseen)
        return [name for name in self.class_names if name not in unseen]


def _checked_names(field: str, names: object) -> list[str]:
    if not isinstance(names, list | tuple):
        raise InputError(f"{field} must be a list of names, not {shortened(names)}")
    try:
        check_names(names)
    except ValueError as error:
        raise InputError(f"{field}: {error}") from error
    return list(names)


def _check_known(field: str, names: list[str], class_names: list[str]) -> None:
    """Raises InputError for a name that is no class name."""
    known = set(class_names)
    strangers = [name for name in names if name not in known]
    if strangers:
        (place,) = places(strangers[:1], class_names)
        mend = "add it" if place is None else f"spell it {shortened(class_names[place])} in both"
        raise InputError(f"{field} holds {shortened(strangers[0])}, which class_names lacks: {mend}")


class FoundIds:
    """Collects the ids in label maps and says whether training can learn from them."""

    def __init__(self, label_space: LabelSpace):
        self.label_space = label_space
        self.seen = set(np.flatnonzero(label_space.is_seen.numpy()).tolist())
        self.ids: set[int] = set()
        self.has_ignored, self.num_maps = False, 0

    def add(self, ids: np.ndarray, has_ignored: bool) -> None:
        self.ids.update(ids.tolist())
        self.has_ignored |= has_ignored
        self.num_maps += 1

    @property
    def has_seen(self) -> bool:
        return bool(self.ids & self.seen)

    @property
    def enough(self) -> bool:
        """Whether training can learn from the maps so far, so that no other map need be read."""
        return self.has_seen and self.ids != {0}

    def fault(self) -> str | None:
        """The reason why training cannot learn from the maps, in one line; None if it can."""
        names = [shortened(self.label_space.class_names[place], 30) for place in sorted(self.ids)[:3]]
        what = f"nothing but {', '.join(names)}{', ...' * (len(self.ids) > 3)}" if names else "no class"
        ignored = self.label_space.ignore_index
        if not self.has_seen:
            return (
                f"the {self.num_maps} label maps hold {what}, so no seen class to train on: check ids and label space"
            )
        if self.ids == {0} and self.has_ignored and len(self.label_space.class_names) > 1:
            held = f"the {self.num_maps} label maps hold {what} and the ignored id {ignored}"
            return f"{held}: does {ignored} mean the object?"
        return None


def load_label_space(name_or_path: str | Path) -> LabelSpace:
    """Reads a label space from a folder with classes.json, a benchmark name (`BENCHMARKS`), a file or a Hub dataset.

    The first of these that exists is used, so a dataset folder with a benchmark's name keeps its own classes. A colon
    and a number behind a folder, benchmark or file select one of its splits: the unseen names of "scenes:3" are those
    of split 3. The splits are counted from 0. A folder or file whose name has a colon is used as it is.
    """
    path, name = Path(name_or_path), str(name_or_path)
    file = _classes_file(name)
    if file is not None:
        return _read_classes(file)
    whole, _, split = name.rpartition(":")
    file = _classes_file(whole) if whole else None
    if file is not None:
        return _read_classes(file, split)
    if path.is_dir():
        raise InputError(f"{path / 'classes.json'} is missing: write it with the keys {', '.join(KEYS)}")
    if looks_local(name):
        raise InputError(f"{name} does not exist: give a dataset's folder, a classes.json or a Hub id")
    if is_hub_id(name):
        return _read_classes(_downloaded_classes(name))
    closest = get_close_matches(name, BENCHMARKS, n=1)
    hint = f"did you mean {closest[0]}?" if closest else f"the names are {', '.join(BENCHMARKS)}"
    raise InputError(f"label space {name!r} is no known name, and no such file exists; {hint}")


def benchmark_spaces(benchmark: str) -> list[LabelSpace]:
    """The label spaces of a benchmark: with the unseen names of its "unseen", then with those of each of its splits."""
    file = CLASSES_FOLDER / f"{benchmark}.json"
    numbers = range(len(_content(file).get("splits", [])))
    return [_read_classes(file), *(_read_classes(file, str(number)) for number in numbers)]


def source_ids(benchmark: str) -> list[int]:
    """The C values, all different, that the classes have in the label files of the benchmark's official archive."""
    return _content(CLASSES_FOLDER / f"{benchmark}.json")["source_ids"]


def load_text_embeds(path: str | Path, num_classes: int, dim: int | None = None) -> Tensor:
    """Text vectors from a .npy with one row per class name, in the order of ids. (C, D) float32, unit length."""
    try:
        with decoding():
            rows = np.load(path, mmap_mode="r", allow_pickle=False)  # memory mapping fails if the file is cut short
    except Refused as error:
        raise InputError(f"cannot read text vectors {shown(path)} ({one_line(error, 80)}): save a .npy") from error
    if not isinstance(rows, np.ndarray):
        raise InputError(f"{shown(path)} holds several arrays: save text vectors as one array, .npy")
    if rows.ndim != 2 or len(rows) != num_classes or (dim is not None and rows.shape[1] != dim):
        expected = f"({num_classes}, {'D' if dim is None else dim})"
        raise InputError(f"{shown(path)} has shape {rows.shape}, expected {expected}: one row for each class name")
    if rows.dtype.kind != "f":
        raise InputError(f"{shown(path)} holds {rows.dtype}: text vectors are floating-point numbers")
    with np.errstate(over="ignore"):  # values that are too large are refused below
        vectors = torch.from_numpy(np.array(rows, dtype=np.float32, order="C"))
    try:
        check_text_embeds(vectors, rows.shape[1])
    except ValueError as error:
        raise InputError(f"{shown(path)}: {error}") from error
    return F.normalize(vectors, dim=-1)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot read {shown(path)} as JSON ({one_line(error, 80)}): mend it, or give the dataset's folder"
        ) from error
    missing = [key for key in KEYS if key not in content] if isinstance(content, dict) else list(KEYS)
    if missing:  # no default: a misspelled "unseen" would train on the masks of unseen classes
        raise InputError(f"{shown(path)} lacks {', '.join(missing)}: it needs the keys {', '.join(KEYS)}")
    return content


def _classes_file(name: str) -> Path | None:
    """The file of a folder with classes.json, of a benchmark, or of a path; None if there is none on this disk."""
    path = Path(name)
    try:
        if (path / "classes.json").is_file():
            return path / "classes.json"
        if name in BENCHMARKS:
            return CLASSES_FOLDER / f"{name}.json"
        return path if path.is_file() else None
    except OSError as error:  # such as a name that is too long
        raise InputError(f"cannot look for label space {shown(name)}: {error.strerror}") from error


def _read_classes(path: Path, split: str | None = None) -> LabelSpace:
    """split: the number of a split, which gives the unseen names. None: "unseen" gives them."""
    content = _content(path)
    unseen = content["unseen"] if split is None else _split(path, content.get("splits"), split)
    try:
        return LabelSpace(content["classes"], unseen, content["ignore_label"], content.get("things"))
    except InputError as error:
        # The message names the file's keys, not the fields of the class.
        message = str(error).replace("class_names", "classes").replace("ignore_index", "ignore_label")
        where = shown(path) if split is None else f"{shown(path)}, split {split}"
        raise InputError(f"{where}: {message}") from error


def _split(path: Path, splits: object, number: str) -> object:
    """The entry of "splits" with this number."""
    if not isinstance(splits, list) or not splits:
        raise InputError(f"{shown(path)} has no splits: leave out {shortened(':' + number)}")
    numbers = [str(known) for known in range(len(splits))]
    if number not in numbers:
        raise InputError(f"{shown(path)} has no split {shortened(number)}: its splits are 0 to {numbers[-1]}")
    return splits[int(number)]


def _downloaded_classes(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, "classes.json", repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise InputError(f"no folder {repo_id}, and no Hub dataset with classes.json: {one_line(error)}") from error
