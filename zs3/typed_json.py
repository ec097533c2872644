"""JSON files that a command reads: their content is declared as a type, and checked once, where it is read.

A type is a TypedDict of `str`, `int`, `float`, `bool`, `None`, lists, dicts, unions, `Literal` and further TypedDicts.
`Annotated[type, Rule]` narrows one. A key may be missing unless it is Required. A key that is not declared may hold
anything: a later version wrote it.

A reader that cannot do without a key names it as `needed`; a dot leads into a nested mapping.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from configuration_zs3 import shortened
from zs3.command_line import InputError

Content = TypeVar("Content")
MISSING = object()
LARGEST = sys.float_info.max
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


class Rule(NamedTuple):
    """What the values of a type have to be, in words, and whether one is."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Rule("a count", lambda value: 0 <= value < 2**53)]
Share = Annotated[float, Rule("a share in [0, 1]", lambda value: 0 <= value <= 1)]
Amount = Annotated[float, Rule("a number of 0 or more", lambda value: value >= 0)]


class Wrong(NamedTuple):
    """The first value of a file that is not of its type."""

    field: str
    value: object
    words: str  # what it should be

    def __str__(self) -> str:
        return f"{cut(self.field, 40)} is {shown_value(self.value)}, not {cut(self.words, 40)}"


def read_json(path: Path, kind: type[Content], what: str, mend: str, needed: Sequence[str] = ()) -> Content:
    """The content of a file, checked. what, mend: for messages, as "result file of eval.py", "evaluate again"."""
    content = _parsed(_text(path, what), path, what)
    check_content(content, kind, path, what, mend)
    check_needed(content, needed, path, what)
    return content


def read_json_lines(path: Path, kind: type[Content], what: str, mend: str) -> list[Content]:
    """The content of a file with a JSON value a line, each of them checked."""
    rows = []
    for number, line in enumerate(_text(path, what).splitlines(), start=1):
        rows.append(_parsed(line, path, what))
        wrong = first_wrong(rows[-1], kind)
        if wrong is not None:
            raise refusal(path, f"line {number}, {wrong}", mend)
    return rows


def check_content(content: object, kind: type, path: Path, what: str, mend: str) -> None:
    """Raises InputError where the content is no mapping, or a value of it is not of its type."""
    if not isinstance(content, dict):
        raise InputError(f"{shown(path)} is no {what}: it holds no mapping")
    wrong = first_wrong(content, kind)
    if wrong is not None:
        raise refusal(path, str(wrong), mend)


def check_needed(content: dict, needed: Sequence[str], path: Path, what: str) -> None:
    """Raises InputError where a needed key is missing."""
    for name in needed:
        inner: Any = content
        for part in name.split("."):
            if not isinstance(inner, dict) or part not in inner:
                raise InputError(f"{shown(path)} is no {what}, it lacks {name!r}")
            inner = inner[part]


def refusal(path: Path, words: str, mend: str) -> InputError:
    """One line of at most 200 characters: the file, what is wrong with it, the mend."""
    return InputError(f"{shown(path)}: {cut(words, 105)}: {mend}")


def shown(path: Path, length: int = 60) -> str:
    """A path for a message: its end, where it is long."""
    text = str(path)
    return text if len(text) <= length else f"...{text[3 - length :]}"


# ---- a value against its type --------------------------------------------------------------------------------


def first_wrong(value: object, kind: Any, field: str = "") -> Wrong | None:
    """The first part of the value that is not of its type, or None. field: where the value stands."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Required:
        return first_wrong(value, arguments[0], field)
    if origin is Annotated:
        base, rule = arguments
        wrong = first_wrong(value, base, field)
        if wrong is not None and wrong.field != field:
            return wrong  # a part of it
        return None if wrong is None and rule.holds(value) else Wrong(field, value, rule.words)
    if origin in (Union, UnionType):
        found = [first_wrong(value, one, field) for one in arguments]
        if None in found:
            return None
        return next((wrong for wrong in found if wrong.field != field), Wrong(field, value, _words(kind)))
    if not _is_of(value, origin or kind, arguments):
        return Wrong(field, value, _words(kind))
    return next((wrong for wrong in _wrong_parts(value, kind, field) if wrong is not None), None)


def _wrong_parts(value: Any, kind: Any, field: str) -> Iterator[Wrong | None]:
    """Of the items of a list, and of the keys and values of a mapping."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        for place, item in enumerate(value):
            yield first_wrong(item, arguments[0], f"{field}[{place}]")
    elif origin is dict:
        for key, item in value.items():
            yield first_wrong(key, arguments[0], field)
            yield first_wrong(item, arguments[1], _inside(field, key))
    elif is_typeddict(kind):
        for key, hint in _hints(kind).items():
            if key in value:
                yield first_wrong(value[key], hint, _inside(field, key))
            elif key in kind.__required_keys__:
                yield Wrong(_inside(field, key), MISSING, _words(hint))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _inside(field: str, key: str) -> str:
    """The name of what stands in a mapping."""
    return ".".join(filter(None, (field, shortened(key)[1:-1])))


def _is_of(value: object, kind: Any, arguments: tuple) -> bool:
    """Whether a value is of a type, its parts aside."""
    if kind is Any:
        return True
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if kind is float:  # true is an int for Python, JSON has whole numbers, and NaN is none
        return type(value) in (int, float) and -LARGEST <= value <= LARGEST
    if kind is str:  # half a surrogate pair cannot be printed
        return type(value) is str and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return type(value) is (dict if is_typeddict(kind) else kind)


def _words(kind: Any) -> str:
    """What a value of the type is, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Required:
        return _words(arguments[0])
    if origin is Annotated:
        return arguments[1].words
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in arguments))
    return WORDS.get(kind) or ("a list" if (origin or kind) is list else "a mapping")


# ---- texts -----------------------------------------------------------------------------------------------------


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {shown(path)}: {error.strerror}; it should be a {what}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is no JSON; it should be a {what}") from error


def _parsed(text: str, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of too many brackets
        raise InputError(f"{shown(path)} is no JSON; it should be a {what}") from error


def shown_value(value: object) -> str:
    """A value for a message, as JSON writes it, on one line; a text without its marks, a container by its kind."""
    if value is MISSING:
        return "missing"
    if isinstance(value, dict | list):
        return _words(type(value))
    text = shortened(value) if isinstance(value, str) else json.dumps(value)
    return cut(text[1:-1] if isinstance(value, str) and value else text, 20)


def cut(text: str, length: int) -> str:
    """A text for a message: on one line, its beginning where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
