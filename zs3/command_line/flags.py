"""The flags of a command: a dataclass that checks its fields whenever they are set. Outputs are tested here, too."""

import os
import stat
from dataclasses import field
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from configuration_zs3 import HUGE, INT32, TINY, Number, is_number, one_line, shortened
from zs3.command_line.refusals import InputError, shown

# ---- what a field takes ----------------------------------------------------------------------------------------

NOT_EMPTY = "not empty"
Item = TypeVar("Item")
Some = Annotated[list[Item], NOT_EMPTY]

# Flags that name an output. `try_outputs` tests the place before the work.
OutputFile = Annotated[str, "file"]
OutputFolder = Annotated[str, "folder"]

Count = Annotated[int, Number(int, 1, INT32)]
Whole = Annotated[int, Number(int, 0, INT32)]
Batch = Annotated[int, Number(int, 1, 2**16)]
Pictures = Annotated[int, Number(int, 1, 10**6)]  # the indices of validation scenes start there
Pixels = Annotated[int, Number(int, 1, 2**16)]
Side = Annotated[int, Number(int, 32, 2**14)]  # of a model's input, in pixels
Seed = Annotated[int, Number(int, 0, 2**32 - 1)]  # NumPy takes no larger one
Processes = Annotated[int, Number(int, 1, 1024)]
Workers = Annotated[int, Number(int, 0, 1024)]  # 0: none beside the main process
Share = Annotated[float, Number(float, 0, 1)]
PositiveShare = Annotated[float, Number(float, TINY, 1)]
Amount = Annotated[float, Number(float, 0, HUGE)]
Positive = Annotated[float, Number(float, TINY, HUGE)]
ANY = {int: Number(int, -INT32, INT32), float: Number(float, -HUGE, HUGE)}  # torch takes no larger ones


def flag(default: Any, text: str) -> Any:
    """A field of an argument dataclass: its default and its sentence in --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


class Arguments:
    """Base of the commands' arguments. A field's type is checked whenever the field is set, from Python too."""

    first_words: ClassVar[tuple[str, ...]] = ()  # flags that need no name if their values come first

    def __setattr__(self, name: str, value: object) -> None:
        hints = type_hints(type(self))
        super().__setattr__(name, checked(name, value, hints[name]) if name in hints else value)

    def check(self) -> None:
        """Raises InputError if a flag is missing, or if flags do not go together."""


@cache
def type_hints(args_class: type) -> dict[str, Any]:
    return get_type_hints(args_class, include_extras=True)


def checked(name: str, value: object, hint: Any) -> Any:
    """The value of a flag, with Python's own numbers. Raises InputError if it is not of the type."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):  # X | None
        return None if value is None else checked(name, value, parts[0])
    if kind is list and (isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim)):
        return [checked(name, one, parts[0]) for one in value]
    if kind is Annotated and not isinstance(parts[1], Number):
        value = checked(name, value, parts[0])
        if parts[1] == NOT_EMPTY and not value:
            raise InputError(f"--{name} is empty: give one value or more")
        return value
    try:
        return _of_type(value, hint)
    except ValueError as error:
        raise InputError(f"--{name} must be {error}, got {shortened(value, 40)}") from error


def _of_type(value: object, hint: Any) -> Any:
    """Raises ValueError with the expected kind of value. A path or a number is accepted as a text."""
    kind, parts = get_origin(hint), get_args(hint)
    if hint in ANY or kind is Annotated:
        return (ANY.get(hint) or parts[1]).of(value)
    if kind is list:
        raise ValueError("a list")
    if kind is Literal and not (isinstance(value, str) and value in parts):
        raise ValueError(f"one of {', '.join(parts)}")
    if hint is bool and not isinstance(value, bool | np.bool_):
        raise ValueError("true or false")
    if hint is str and not (isinstance(value, str | os.PathLike) or is_number(value)):
        raise ValueError("a text")
    if hint is str and value == "":
        raise ValueError("a text that is not empty")
    if hint is str and "\0" in str(value):  # from a recipe: a command line has none
        raise ValueError("a text without null characters")
    if hint is str:
        return os.fsdecode(value) if isinstance(value, os.PathLike) else str(value)
    return bool(value) if hint is bool else value


# ---- flags together --------------------------------------------------------------------------------------------


def check_required(args: Arguments, *names: str) -> None:
    """Raises InputError if one of these flags is missing."""
    for name in names:
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing")


def is_given(args: Arguments, name: str) -> bool:
    """Whether the value of a flag is not the default, not None and not an empty list."""
    return getattr(args, name) not in (None, []) and getattr(args, name) != getattr(type(args), name, None)


def refuse_together(args: Arguments, name: str, *others: str, why: str) -> None:
    """Refuses `others` beside the flag `name`. why: the end of the message, as "it brings the whole model"."""
    for other in others:
        if is_given(args, name) and is_given(args, other):
            raise InputError(f"--{other} does not go with --{name}: {why}")


def refuse_alone(args: Arguments, *names: str, without: str) -> None:
    """Refuses flags that mean nothing without another one."""
    for name in names:
        if is_given(args, name) and not is_given(args, without):
            raise InputError(f"--{name} goes with --{without}, which is missing")


def check_outside(flag: str, path: str | None, dataset: str | None) -> None:
    """Refuses a folder for pictures that lies in a dataset, where it could replace the dataset's own pictures."""
    if path is not None and dataset is not None and Path(path).resolve().is_relative_to(Path(dataset).resolve()):
        raise InputError(f"{flag} {shown(path)} lies in --dataset: choose another place")


def looks_local(name: str) -> bool:
    """Whether `name` can only be a path: it begins with a dot, a slash or a ~, or has several slashes."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


# ---- outputs ---------------------------------------------------------------------------------------------------

BESIDE = (".md", ".csv", "_images.npz")  # what commands write beside a result file


def try_outputs(args: Arguments) -> None:
    """Tests before the work that a command can write its outputs.

    Outputs are the fields of the types OutputFile and OutputFolder. The folder of --dataset is no output folder. The
    test leaves no file. Raises InputError.
    """
    dataset = getattr(args, "dataset", None)
    for name, hint in type_hints(type(args)).items():
        kinds = [kind for kind in (OutputFile, OutputFolder) if kind in (hint, *get_args(hint))]
        output = getattr(args, name) if kinds else None
        if output is not None:
            try_output(f"--{name}", output, kinds[0].__metadata__[0])
            if dataset and os.path.isdir(dataset) and Path(output).resolve() == Path(dataset).resolve():
                raise InputError(f"--{name} {shown(output)} is the folder of --dataset: choose another one")


def try_output(flag: str, given: str | Path, kind: str) -> None:
    """Raises InputError if the output cannot be written. kind: "file" or "folder"."""
    if not str(given):
        raise InputError(f"{flag} is empty: give a path")
    path = Path(given)
    what = f"{flag} {shown(path)}"
    path = path if path.name else path.absolute()  # "." has no name
    if "\0" in str(path) or str(path) != str(path).encode("utf-8", "replace").decode():
        raise InputError(f"{what}: give a path in UTF-8 that names a {kind}")
    try:
        if os.path.lexists(path):  # Path.exists raises where a name is too long
            _check_kind(path.stat().st_mode, kind, what)
        place = path if kind == "folder" else path.parent
        missing = []
        while not os.path.exists(place):
            if place.is_symlink():
                raise InputError(f"{what}: {shown(place)} is a link to nothing: choose another place")
            missing.append(place.name)
            place = place.parent
        if not os.path.isdir(place):
            raise InputError(f"{what}: {shown(place)} is a file, not a folder: choose another place")
        _check_names(path, kind, place, missing, what)
        with TemporaryFile(dir=place) as trial:
            trial.write(b"\n")
            trial.flush()
            os.fsync(trial.fileno())
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{what} cannot be written ({reason}): choose another place") from error


def _check_kind(mode: int, kind: str, what: str) -> None:
    if kind == "folder" and not stat.S_ISDIR(mode):
        raise InputError(f"{what} is a file: choose a folder")
    if kind == "file" and stat.S_ISDIR(mode):
        raise InputError(f"{what} is a folder: choose a file")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{what} is a device or a pipe: choose a file")


def _check_names(path: Path, kind: str, place: Path, missing: list[str], what: str) -> None:
    """Checks the names of the output, of files beside it, and of the folders that are missing in `place`."""
    beside = [f"{path.name}.partial"] if kind == "folder" else [f"{path.stem}{end}" for end in BESIDE]
    for name in beside if kind == "file" else ():
        if os.path.isdir(path.with_name(name)):
            raise InputError(f"{what}: {name}, a file beside it, is a folder: choose another place")
    longest = os.pathconf(place, "PC_NAME_MAX")
    for name in (*missing, path.name, *beside):
        if len(os.fsencode(name)) > longest:
            raise InputError(f"{what}: {shortened(name, 30)} is longer than the {longest} bytes of a file's name")
    # 50 bytes for the longer name of an unfinished file, PARTIAL.
    if len(os.fsencode(path.absolute())) > os.pathconf(place, "PC_PATH_MAX") - 50:
        raise InputError(f"{what} is too long a path: choose another place")
