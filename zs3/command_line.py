"""The doors of the commands: recipes and flags in, result files out, one clear line when the input is bad.

A recipe is a YAML file of the same flags written down, so one parser validates both: its entries are placed
before those of the command line, which therefore win.
"""

import argparse
import difflib
import errno
import inspect
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import field, fields
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import uuid4

import numpy as np
import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from configuration_zs3 import HUGE, INT32, TINY, Number, Refused, beginning, is_number, one_line, shortened
from files_zs3 import read_text

Args = TypeVar("Args", bound="Arguments")
# Flags that name what a command makes; `try_outputs` tries the places before the work.
OutputFile = Annotated[str, "file"]
OutputFolder = Annotated[str, "folder"]
NO_SPACE = {
    errno.ENOSPC: "no space left on the disk for {}; free some and start again",
    errno.EDQUOT: "no space left in the disk quota for {}; free some and start again",
    errno.EFBIG: "a limit on the size of files is too low for {}; raise it (ulimit -f) and start again",
}


# Flags that were renamed: the old name, which recipes and commands may still have, and the name now. An old name counts
# where a command has the new one, and none of its own that is called like the old one.
OLD_NAMES = {
    "num_proc": "num_workers",
    "processes": "num_jobs",
    "train": "num_train",
    "validation": "num_validation",
}


BESIDE = (".md", ".csv", "_images.npz")  # what commands write beside a result file
LONGEST_LINE = 200  # characters of a refusal
SHORTEST_WORD = 40  # characters that are left of a long path or name where the line is too long
MOST_OF_A_YAML = 100_000  # values, those that are there by reference counted each time


class InputError(ValueError):
    """Bad input. The message is one line of at most 200 characters, which names the thing and the mend.

    Long paths and names in it are shortened; one from a DataLoader worker comes wrapped in a traceback.
    """

    def __init__(self, message: object = ""):
        text = str(message).strip()
        if text.startswith("Caught "):
            text = text.splitlines()[-1].split("InputError: ", 1)[-1]
        super().__init__(refusal_line(text))


@contextmanager
def in_one_line(thing: str) -> Iterator[None]:
    """Turns a refusal of the model or the processor into an InputError. thing: what was given, for the message."""
    try:
        yield
    except Refused as error:
        raise InputError(f"{thing}: {one_line(error)}") from error


# Reasons why a system does not let a file be read or written, all of its making and none of ours.
OF_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EMFILE, errno.EBUSY),
)
# What would move a cursor, ring a bell or turn the direction of reading around: escaped where text is shown.
UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """For people to see: characters that a terminal obeys, or does not show, as escapes. Line ends and tabs stay."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def refusal_line(text: str) -> str:
    """One line of at most 200 characters. Of long words, as paths are, both ends are kept; then of the line."""
    words = printable(text).replace("\n", "\\n").split(" ")
    for place in sorted(range(len(words)), key=lambda place: len(words[place]), reverse=True):
        word, over = words[place], len(" ".join(words)) - LONGEST_LINE
        length = max(len(word) - over, SHORTEST_WORD)
        if over > 0 and len(word) > length:
            words[place] = f"{word[:10]}...{word[13 - length :]}"
    line = " ".join(words)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[5 - LONGEST_LINE // 2 :]}"


class _PrintableStream:
    """A stream to which no name from the data can send more than letters, and no letter is a fault of the encoding."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], None]) -> None:
    """Calls main. Bad input or a disk that takes no more becomes one line and exit code 2; Ctrl-C, exit code 130.

    Any other exception is a bug, and keeps its traceback. What is printed is `printable`.
    """
    try:
        with redirect_stdout(_PrintableStream(sys.stdout)):
            main()
    except InputError as error:
        _refuse(error)
    except Exception as error:
        # Each writer has its own exception for a full disk: Python OSError, safetensors and torch theirs.
        thing = shown(getattr(error, "of_file", None) or getattr(error, "filename", None) or "a file", 150)
        reasons = [text.format(thing) for code, text in NO_SPACE.items() if _is(error, code)]
        if isinstance(error, OSError) and thing != "a file" and error.errno in OF_THE_SYSTEM:
            reasons.append(f"{thing}: {error.strerror}; give another place, or mend this one")
        if not reasons:
            raise
        _refuse(InputError(reasons[0]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _refuse(error: InputError) -> NoReturn:
    print(f"error: {error}", file=_PrintableStream(sys.stderr))
    sys.exit(2)


def _is(error: Exception, code: int) -> bool:
    return getattr(error, "errno", None) == code or os.strerror(code) in str(error)


def flag(default: Any, text: str) -> Any:
    """A field of an argument dataclass: its default and its sentence in --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def check_required(args: Any, *names: str) -> None:
    """Flags without a default."""
    for name in names:
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing")


# ---- what a field takes ------------------------------------------------------------------------------------

NOT_EMPTY = "not empty"
Item = TypeVar("Item")
Some = Annotated[list[Item], NOT_EMPTY]

Count = Annotated[int, Number(int, 1, INT32)]
Whole = Annotated[int, Number(int, 0, INT32)]
Batch = Annotated[int, Number(int, 1, 2**16)]
Pictures = Annotated[int, Number(int, 1, 10**6)]  # that a command draws; scenes: FIRST_VALIDATION
Pixels = Annotated[int, Number(int, 1, 2**16)]
Side = Annotated[int, Number(int, 32, 2**14)]  # of a picture that a model sees
Seed = Annotated[int, Number(int, 0, 2**32 - 1)]  # NumPy takes no larger one
Processes = Annotated[int, Number(int, 1, 1024)]
Workers = Annotated[int, Number(int, 0, 1024)]  # 0: none beside the main process
Share = Annotated[float, Number(float, 0, 1)]
PositiveShare = Annotated[float, Number(float, TINY, 1)]
Amount = Annotated[float, Number(float, 0, HUGE)]
Positive = Annotated[float, Number(float, TINY, HUGE)]
ANY = {int: Number(int, -INT32, INT32), float: Number(float, -HUGE, HUGE)}  # what torch takes


class Arguments:
    """Base of the commands' arguments. A field's type is checked whenever the field is set, from Python too."""

    def __setattr__(self, name: str, value: object) -> None:
        hints = _hints(type(self))
        super().__setattr__(name, checked(name, value, hints[name]) if name in hints else value)


@cache
def _hints(args_class: type) -> dict[str, Any]:
    return get_type_hints(args_class, include_extras=True)


def checked(name: str, value: object, hint: Any) -> Any:
    """The value of a flag, with Python's own numbers in it. Raises InputError where it is not of the type."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):  # with None
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
    """Raises ValueError, which says what the value should be. A text may be given as a path or a number."""
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
    if hint is str:
        return os.fsdecode(value) if isinstance(value, os.PathLike) else str(value)
    return bool(value) if hint is bool else value


def _typed(kind: Callable[[str], Any], text: str) -> Any:
    """The text as a value of the flag's type. Where that cannot be, it stays a text, for `checked` to refuse."""
    try:
        return kind(text)
    except (ValueError, argparse.ArgumentTypeError):
        return text


def _check_inner_numbers(name: str, value: object) -> None:
    """Refuses a NaN or an infinity within a model field, as in `backbone_config`: transformers does not look there."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if type(inner) in ANY:
            checked(name, inner, type(inner))
        _check_inner_numbers(name, inner)


# ---- outputs -----------------------------------------------------------------------------------------------


def try_outputs(args: Any) -> None:
    """Tries the places of a command's outputs before its work, so that no pass ends where nothing can be written.

    Outputs are the fields of the types OutputFile and OutputFolder. Nothing is left there. Raises InputError.
    """
    for name, hint in _hints(type(args)).items():
        kinds = [kind for kind in (OutputFile, OutputFolder) if kind in (hint, *get_args(hint))]
        if kinds and getattr(args, name) is not None:
            try_output(f"--{name}", getattr(args, name), kinds[0].__metadata__[0])


def try_output(flag: str, given: str | Path, kind: str) -> None:
    """kind: "file" or "folder"."""
    if not str(given):
        raise InputError(f"{flag} is empty: give a path")
    path = Path(given)
    what = f"{flag} {shown(path)}"
    path = path if path.name else path.absolute()  # of "."
    if "\0" in str(path) or str(path) != str(path).encode("utf-8", "replace").decode():
        raise InputError(f"{what}: give a path in UTF-8 that names a {kind}")
    try:
        if os.path.lexists(path):  # Path.exists raises where a name is too long
            mode = path.stat().st_mode
            if kind == "folder" and not stat.S_ISDIR(mode):
                raise InputError(f"{what} is a file: choose a folder")
            if kind == "file" and stat.S_ISDIR(mode):
                raise InputError(f"{what} is a folder: choose a file")
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InputError(f"{what} is a device or a pipe: choose a file")
        place = path if kind == "folder" else path.parent
        missing = []
        while not os.path.exists(place):
            if place.is_symlink():
                raise InputError(f"{what}: {shown(place)} is a link to nothing: choose another place")
            missing.append(place.name)
            place = place.parent
        if not os.path.isdir(place):
            raise InputError(f"{what}: {shown(place)} is a file, no folder: choose another place")
        longest = os.pathconf(place, "PC_NAME_MAX")
        beside = [f"{path.name}.partial"] if kind == "folder" else [f"{path.stem}{end}" for end in BESIDE]
        for name in beside if kind == "file" else ():
            if os.path.isdir(path.with_name(name)):
                raise InputError(f"{what}: {name}, which belongs beside it, is a folder: choose another place")
        for name in (*missing, path.name, *beside):
            if len(os.fsencode(name)) > longest:
                raise InputError(f"{what}: {shortened(name, 30)} is longer than the {longest} bytes of a file's name")
        # Half files are called by other names than the file: PARTIAL.
        if len(os.fsencode(path.absolute())) > os.pathconf(place, "PC_PATH_MAX") - 50:
            raise InputError(f"{what} is too long a path: choose another place")
        trial = place / f".{uuid4().hex}.trial"
        try:
            with trial.open("wb") as file:
                file.write(b"\n")
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{what} cannot be written ({reason}): choose another place") from error


def check_outside(flag: str, path: str | None, dataset: str | None) -> None:
    """Refuses a folder for pictures that lies in a dataset: they might take the place of its own."""
    if path is not None and dataset is not None and Path(path).resolve().is_relative_to(Path(dataset).resolve()):
        raise InputError(f"{flag} {shown(path)} lies in --dataset: choose another place")


def looks_local(name: str) -> bool:
    """Whether `name` can only be meant as a path: it begins with a dot, slash or ~, or has several slashes."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def shown(path: str | Path, length: int = 60) -> str:
    """A path for a message: its end, where it is long."""
    text = printable(str(path))
    return text if len(text) <= length else f"...{text[3 - length :]}"


def read_arguments(
    args_class: type[Args], argv: list[str] | None = None, config_class: type | None = None
) -> tuple[Args, dict[str, Any]]:
    """The run's arguments, and what recipe and flags say about the model's own configuration.

    args_class: a dataclass whose fields carry `metadata={"help": ...}`; each is a flag and a recipe key.
        It has no field named config.
    argv: without the program's name; None is the command line of this process.
    config_class: a transformers configuration; each field that it (or a base below PreTrainedConfig)
        annotates, and args_class does not have, is a flag and a recipe key too. Those given come back in the
        dict, read as YAML (`--backbone_config "{hidden_size: 8}"` is a mapping). Their types are the
        configuration's own to check.

    `--config FILE` names the recipe. Unknown names, wrong values and outputs that cannot be written raise InputError.
    """
    types = get_type_hints(args_class)  # without what Annotated says
    names = [field.name for field in fields(args_class) if field.init]
    config_names = [name for name in model_fields(config_class) if name not in names]
    argv = [_renamed_flag(token, names + config_names) for token in (sys.argv[1:] if argv is None else argv)]
    _check_flags(argv, [*names, *config_names, "config", "help"])

    usage = "%(prog)s [--config FILE] [--any_field value ...]"
    parser = _Parser(args_class, allow_abbrev=False, description=_description(args_class), usage=usage)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these flags; the command line wins")
    group = parser.add_argument_group("model configuration, values in YAML")
    for name in config_names:
        group.add_argument(f"--{name}", type=_yaml_value, nargs="+", default=argparse.SUPPRESS, metavar="VALUE")

    flags, empty, overrides = _read_recipe(_recipe_path(argv), types, names, config_names)
    parser.set_defaults(**empty)
    args, others, unexpected = parser.parse_args_into_dataclasses(
        flags + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unexpected:
        raise InputError(f"unexpected argument {shortened(unexpected[0])} (--help lists the flags)")
    for name, values in vars(others).items():
        if name in config_names:
            overrides[name] = values[0] if len(values) == 1 else values
    for name, value in overrides.items():
        _check_inner_numbers(name, value)
    try_outputs(args)
    return args, overrides


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """What argparse would refuse, with the whole value in its message, is left to `checked`."""
        if "choices" in options:
            options["metavar"] = f"{{{','.join(options.pop('choices'))}}}"
        if "type" in options:
            options["type"] = partial(_typed, options["type"])
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{beginning(message, 150)} (--help lists the flags)")


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-5 as a string, because it has neither dot nor sign; a recipe means the number."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_NULL = ("", "~", "null", "Null", "NULL")  # how YAML writes None


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Raises yaml.YAMLError where a text is no YAML, or holds a number or a date that cannot be."""
    if re.search(r"^\s*<<\s*:", text, re.MULTILINE):  # each of them may double the time
        raise yaml.YAMLError("it has a merge key, <<: write the fields out")
    try:
        content = yaml.load(text, loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # of a wrong date, a tag without a value, 1,000 brackets: the library's own bugs
        raise yaml.YAMLError(one_line(error)) from error
    if _count(content) > MOST_OF_A_YAML:
        raise yaml.YAMLError(f"it holds more than {MOST_OF_A_YAML:,} values")
    return content


def _count(content: Any) -> int:
    """Values in a content, as far as MOST_OF_A_YAML."""
    count, waiting = 0, [content]
    while waiting and count <= MOST_OF_A_YAML:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
    return count


def _yaml_value(text: str) -> Any:
    try:
        return parse_yaml(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is no YAML value") from error


def _recipe_path(argv: list[str]) -> str | None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(argv)[0].config
    if path is not None and not isinstance(path, str):  # argparse makes a list of `--config=--`
        raise InputError("--config takes a file")
    return path


def _read_recipe(
    path: str | None, types: dict[str, Any], names: list[str], config_names: list[str]
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The recipe's three parts: flags; None and [] by field, which no flag can say; model configuration."""
    flags, empty, overrides = [], {}, {}
    if path is None:
        return flags, empty, overrides
    as_written, as_typed = _load_recipe(path, names + config_names)
    for name, value in as_written.items():
        if name in config_names:
            overrides[name] = as_typed[name]
        elif name not in names:
            raise InputError(f"{path}: unknown field {shortened(name)}; {did_you_mean(name, names + config_names)}")
        elif value in _NULL and type(None) in get_args(types[name]):
            empty[name] = None
        elif value == [] and _is_list(types[name]):
            empty[name] = []
        elif isinstance(value, str):
            flags.append(f"--{name}={value}")
        elif _is_list(types[name]) and isinstance(value, list) and all(isinstance(v, str) for v in value):
            flags += [f"--{name}", *value]
        else:
            kind = "a list of plain values" if _is_list(types[name]) else "one plain value"
            raise InputError(f"{path}: field {name!r} takes {kind}, not {shortened(as_typed[name])}")
    return flags, empty, overrides


def _load_recipe(path: str, known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's mapping twice: scalars as the strings written there, and as the values they stand for."""
    try:
        text = read_text(path)
        as_written, as_typed = parse_yaml(text, yaml.BaseLoader), parse_yaml(text, _RecipeLoader)
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}; --config takes a file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: broken YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8
        raise InputError(f"{path} is no YAML file: {one_line(error)}") from error
    if as_typed is None:  # an empty file, or comments alone
        return {}, {}
    if not isinstance(as_typed, dict):
        raise InputError(f"{path}: a recipe is a mapping, one `field: value` a line")
    for old in old_names(known).keys() & as_written.keys():
        _say_renamed(old)
    as_typed = {str(name): value for name, value in as_typed.items()}
    return renamed(as_written, path, known), renamed(as_typed, path, known)


def old_names(known: Collection[str]) -> dict[str, str]:
    """The part of OLD_NAMES that counts for a command whose flags are `known`."""
    return {old: name for old, name in OLD_NAMES.items() if name in known and old not in known}


def renamed(recipe: dict[str, Any], path: str | Path, known: Collection[str]) -> dict[str, Any]:
    """A recipe with the names of today. known: the command's flags."""
    names = old_names(known)
    both = [old for old, name in names.items() if old in recipe and name in recipe]
    if both:
        raise InputError(f"{path} has {both[0]!r} and {names[both[0]]!r}, which are one flag: leave out the first")
    return {names.get(name, name): value for name, value in recipe.items()}


def _renamed_flag(token: str, known: Collection[str]) -> str:
    """An argument with the name of today, if it is a flag of an old name."""
    names, (given, equals, value) = old_names(known), token.partition("=")
    name = given.removeprefix("--").replace("-", "_")
    no = "" if name in names else "no_"  # of a switch that is turned off
    if not given.startswith("--") or name.removeprefix(no) not in names:
        return token
    now = names[name.removeprefix(no)]
    _say_renamed(name.removeprefix(no))
    return f"--{no if name.startswith(no) else ''}{now}{equals}{value}"


def _say_renamed(old: str) -> None:
    print(f"note: --{old} is called --{OLD_NAMES[old]} now", file=sys.stderr)


def _check_flags(argv: list[str], names: list[str]) -> None:
    """Refuses an unknown flag by name, before the parser complains of what its misspelling left out."""
    for token in argv:
        if token.startswith("--"):
            flag = token[2:].split("=", 1)[0]
            name = flag.replace("-", "_")
            if name not in names and name.removeprefix("no_") not in names:
                raise InputError(f"unknown flag --{beginning(flag, 60)}; {did_you_mean(name, names, '--')}")


def did_you_mean(name: str, names: list[str], prefix: str = "") -> str:
    closest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {prefix}{closest[0]}?" if closest else f"see {'--help' if prefix else 'the flags in --help'}"


def model_fields(config_class: type | None) -> list[str]:
    """The flags of a model: what its configuration and the bases below PreTrainedConfig annotate, the bases' first."""
    found = {}
    for base in reversed(config_class.__mro__ if config_class else ()):
        if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig:
            found |= inspect.get_annotations(base)
    inherited = inspect.get_annotations(PreTrainedConfig)
    return [n for n, kind in found.items() if n not in inherited and get_origin(kind) is not ClassVar]


def _is_list(kind: Any) -> bool:
    return any(list in (option, get_origin(option)) for option in (kind, *get_args(kind)))


def _description(args_class: type) -> str | None:
    """The class's docstring, unless it is the signature that `dataclass` writes for want of one."""
    doc = args_class.__doc__ or ""
    return None if doc.startswith(f"{args_class.__name__}(") else doc
