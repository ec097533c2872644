"""Tables and names as text: Markdown for people, CSV for spreadsheets. Scores in [0, 1] are printed in percent."""

import math
import re
from collections.abc import Iterable, Sequence

from zs3.command_line import printable


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown. A bar within a cell is escaped, so that it does not end the cell."""
    lines = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in cells] for cells in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def markdown(text: str) -> str:
    """A name, a path or a sentence for Markdown. Markup and HTML are escaped, and line breaks become spaces."""
    one_line = " ".join(printable(text).split())
    return re.sub(r"[\\`*\[\]<>|&~$#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line)


def csv_text(text: str) -> str:
    """A name for a CSV file. A name that a spreadsheet would read as a formula gets an apostrophe."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def percent(score: float | None) -> str:
    """A score in [0, 1] in percent; "-" for None and NaN."""
    return "-" if score is None or math.isnan(score) else f"{100 * score:.1f}"


def percent_range(interval: Sequence[float | None]) -> str:
    """Both ends of an interval in percent."""
    low, high = interval
    return f"{percent(low)} to {percent(high)}"
