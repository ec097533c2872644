"""Tables and names as text: Markdown for people, CSV for spreadsheets. Scores in [0, 1] are printed in percent."""

import re
from collections.abc import Iterable, Sequence

from zs3.command_line import printable


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown. A bar within a cell is escaped, so that it does not end the cell."""
    lines = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in cells] for cells in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def markdown(text: str) -> str:
    """A name, a path or a sentence for a Markdown text. What would be markup, HTML or a line's end is escaped."""
    one_line = " ".join(printable(text).split())
    return re.sub(r"[\\`*\[\]<>|&~$#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line)


def csv_text(text: str) -> str:
    """A name for a CSV file. A spreadsheet would take some names for formulas: they get an apostrophe."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def percent_range(interval: Sequence[float | None]) -> str:
    """The two ends of an interval."""
    low, high = interval
    return f"{percent(low)} to {percent(high)}"
