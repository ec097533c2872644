"""JSON files that a command reads: their content is declared as a type, and checked once, when it is read.

The types are TypedDicts; pydantic validates the content. A key may be missing unless it is Required. A key
that is not declared may hold anything: a later version wrote it.

A reader lists the keys that it needs as `needed`; a dot leads into a nested mapping.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from configuration_zs3 import beginning, one_line, shortened
from files_zs3 import lines_of, read_text
from zs3.command_line import InputError, shown

Content = TypeVar("Content")


TYPES = ("bool", "float", "str", "list[str]")  # pydantic's names of the types that are in a union here
# What a value should be, by the kind of pydantic's error.
WORDS = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "a text",
}


def rule(words: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """Narrows a type: Annotated[float, rule("a share", ...)]. words: what a value should be."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("rule", words)
        return value

    return AfterValidator(check)


Count = Annotated[int, rule("a count", lambda value: 0 <= value < 2**53)]
Share = Annotated[float, rule("a share in [0, 1]", lambda value: 0 <= value <= 1)]
Amount = Annotated[float, rule("a number of 0 or more", lambda value: value >= 0)]


class Damaged(InputError):
    """A file that is no JSON. A full disk or a power cut can leave such a file."""


def read_json(path: Path, kind: type[Content], what: str, mend: str, needed: Sequence[str] = ()) -> Content:
    """The content of a file, checked. what, mend: for messages, as "result file of eval.py", "evaluate again"."""
    text = _text(path, what)
    try:
        content = _parsed(text)
    except (ValueError, RecursionError) as error:  # RecursionError: too many brackets
        raise Damaged(f"{shown(path)} is no JSON ({one_line(error, 50)}), so no {what}: {mend}") from error
    check_content(content, kind, path, what, mend)
    check_needed(content, needed, path, what)
    return content


def read_json_lines(path: Path, kind: type[Content], what: str, mend: str) -> list[Content]:
    """The content of a file with a JSON value a line, each of them checked.

    A line that is no JSON is left out, with a warning. Half a line at the end of the file gets no warning, because a
    killed process leaves one.
    """
    rows: list[Content] = []
    text = _text(path, what)
    lines = lines_of(text)
    for number, line in enumerate(lines, start=1):
        try:
            row = _parsed(line)
        except (ValueError, RecursionError):
            is_half = number == len(lines) and not text.endswith("\n")
            if line.strip() and not is_half:
                print(f"warning: line {number} of {shown(path)} is damaged: it is left out")
            continue
        wrong = first_wrong(row, kind)
        if wrong is not None:
            raise refusal(path, f"line {number}, {wrong}", mend)
        rows.append(row)
    return rows


def unless_damaged(read: Callable[..., Content], *given: Any) -> Content | None:
    """The result of read(*given). For a damaged file it is None, with a warning: the command makes the file again."""
    try:
        return read(*given)
    except Damaged as error:
        print(f"warning: {error}; it counts as missing")
        return None


def check_content(content: object, kind: type, path: Path, what: str, mend: str) -> None:
    """Raises InputError where the content is no mapping, or a value of it is not of its type."""
    if not isinstance(content, dict):
        raise InputError(f"{shown(path)} is no {what}: it holds no mapping")
    wrong = first_wrong(content, kind)
    if wrong is not None:
        raise refusal(path, wrong, mend)


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
    return InputError(f"{shown(path)}: {beginning(words, 105)}: {mend}")


# ---- a value against its type --------------------------------------------------------------------------------


def first_wrong(value: object, kind: Any) -> str | None:
    """The first part of the value that is not of its type, in words, or None."""
    try:
        _adapter(kind).validate_python(value, strict=True)  # strict: true is no number, 2.0 no whole number
        return None
    except ValidationError as error:
        faults = error.errors(include_url=False)
    first = faults[0]
    field = beginning(_field(value, first["loc"]), 40)
    if first["type"] == "missing":
        return f"{field} is missing"
    # Where several types are allowed, pydantic has a fault for each, with the type's name at the end of "loc".
    alike = [one for one in faults if one["loc"][:-1] == first["loc"][:-1] and one["input"] is first["input"]]
    expected = [WORDS.get(one["type"]) or one.get("ctx", {}).get("expected") or one["msg"] for one in alike]
    words = beginning(" or ".join(dict.fromkeys(expected)), 40)
    return f"{field} is {shown_value(first['input'])}, not {words}".strip()


_adapter = cache(TypeAdapter)


def _field(value: Any, location: tuple[str | int, ...]) -> str:
    """The place of a part in the value, as "per_class.sky" or "points.gamma[2]", without pydantic's names of types."""
    field = ""
    for part in location:
        if isinstance(value, dict) and part in value:
            field += ("." if field else "") + shortened(part)[1:-1]
        elif isinstance(value, list) and isinstance(part, int):
            field += f"[{part}]"
        else:  # a missing key, or the name of a type; no declared key has such a name
            is_missing = isinstance(value, dict) and part not in TYPES
            return f"{field}.{part}".strip(".") if is_missing else field
        value = value[part]
    return field


# ---- texts -----------------------------------------------------------------------------------------------------


def _text(path: Path, what: str) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise InputError(f"cannot read {shown(path)}: {error.strerror}; it should be a {what}") from error
    except ValueError as error:
        raise Damaged(f"{shown(path)} is no JSON; it should be a {what}") from error


def _parsed(text: str) -> Any:
    """Raises ValueError or RecursionError where a text is no JSON."""
    content = json.loads(text, parse_constant=_number, parse_float=_number)
    json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
    return content


def _number(text: str) -> float:
    """Refuses NaN and infinities: they are no JSON, and no result."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def shown_value(value: object) -> str:
    """A value for a message, on one line: a text in quotes, a container by its kind."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a mapping"
    return beginning(shortened(value) if isinstance(value, str) else json.dumps(value), 25)
