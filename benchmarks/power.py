"""The power of the confirmatory contrasts: what a number of class splits can show, computed before they are trained.

    python -m benchmarks.power --output docs/results/power.json --picture docs/images/power.png

The standard deviations are those of the first edition's paired differences in hIoU: five seeds of one class split.
Other class splits may vary more. The first edition has no control of `best`; its deviation is taken from `best` with
and without hybrid matching. Holm's correction tests the smallest p of m contrasts at level / m, and the largest at the
whole level.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from scipy import special, stats
from scipy.optimize import brentq

from benchmarks import measuring
from configuration_zs3 import Number
from zs3.ablation.statistics import EQUIVALENT, LEVEL
from zs3.ablation.tables import make_tables
from zs3.command_line import Arguments, OutputFile, Some, flag, read_arguments, run
from zs3.evaluation.curves import check_matplotlib, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = Path(__file__).parent.parent / "docs" / "results" / "first_edition" / "scenes_tables.json"
POWER = 0.8
# The first edition's differences, in the order of the confirmatory contrasts: its table, and their titles there.
PILOTS = (
    ("table6", "CE, KL, no prompts − CE and background, no prompts"),
    ("table6", "CE, KL, ranking, no prompts − CE, KL, no prompts"),
    ("table6", "stage 2 − CE, KL, ranking, no prompts"),
    ("table4", "stage 2, ensemble on, crops − stage 2"),
    ("table6", "stage 2 − CE and background, no prompts"),
    ("parts", "hybrid matching, label map loss − label map loss"),
)
Splits = Annotated[int, Number(int, 4, 1000)]


@dataclass
class PowerArgs(Arguments):
    """The numbers of class splits."""

    splits: Some[Splits] = flag([4, 8, 11, 24], "Numbers of class splits, each with one seed.")
    planned: Splits = flag(11, "The number that is planned.")
    output: OutputFile | None = flag(None, "Result file; the printed table is written beside it as .md.")
    picture: OutputFile | None = flag(None, "PNG of the power over the difference, for the planned number.")

    def check(self) -> None:
        if self.picture is not None:
            check_matplotlib("--picture")


class Contrast(NamedTuple):
    title: str
    paper: float | None  # the paper's difference in hIoU, points
    deviation: float  # standard deviation of the pilot's differences, points
    pilots: int  # their number


def contrasts() -> list[Contrast]:
    tables = json.loads(FIRST.read_text(encoding="utf-8"))["tables"]
    seeds = [
        next(pair["scores"]["hiou"]["seeds"] for pair in tables[table]["differences"] if pair["title"] == title)
        for table, title in PILOTS
    ]
    named = make_tables(clip=True, matching="unpaired")["confirmatory"].differences
    papers = [None if pair.paper is None else round(pair.paper.hiou, 1) for pair in named]
    return [
        Contrast(pair.title, paper, float(np.std(values, ddof=1)), len(values))
        for pair, paper, values in zip(named, papers, seeds, strict=True)
    ]


def power(difference: float, deviation: float, count: int, level: float) -> float:
    """The chance that the two-sided paired t-test of `count` values finds a difference at this level.

    difference, deviation: mean and standard deviation of the values, in points.
    """
    bound, shift = stats.t.ppf(1 - level / 2, count - 1), difference / deviation * math.sqrt(count)
    return float(1 - special.ncfdtr(1, count - 1, shift**2, bound**2))  # the square of t has an F distribution


def equivalence_power(difference: float, deviation: float, count: int, level: float) -> float:
    """The chance that the two one-sided t-tests of `count` values place them within EQUIVALENT of 0; as `power`."""
    shares = (np.arange(2000) + 0.5) / 2000
    found = deviation * np.sqrt(stats.chi2.ppf(shares, count - 1) / (count - 1))  # standard deviations, equally likely
    room = EQUIVALENT - stats.t.ppf(1 - level, count - 1) * found / math.sqrt(count)  # left for the mean
    mean = stats.norm(difference, deviation / math.sqrt(count))
    return float(np.mean(np.where(room > 0, mean.cdf(room) - mean.cdf(-room), 0)))


def found_with(deviation: float, count: int, level: float) -> float:
    """The difference that is found with a chance of POWER, in points."""
    return brentq(lambda difference: power(difference, deviation, count, level) - POWER, 0, 15 * deviation / count**0.5)


def figure_of(rows: list[Contrast], count: int) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    differences = np.linspace(0, 16, 161)
    for number, row in enumerate(rows):
        chances = [100 * power(value, row.deviation, count, (1 - LEVEL) / len(rows)) for value in differences]
        (line,) = axes.plot(differences, chances, label=f"{row.title} (s = {row.deviation:.1f})", zorder=2)
        if row.paper is not None and row.paper > 0:
            at = 100 * power(row.paper, row.deviation, count, (1 - LEVEL) / len(rows))
            axes.plot([row.paper], [at], "D", color=line.get_color(), zorder=3 + number)
    axes.axhline(100 * POWER, color="0.6", linewidth=0.8, zorder=1)
    axes.set(xlim=(0, 16), ylim=(0, 101), xlabel="true difference in hIoU, points", ylabel="chance to find it (%)")
    axes.set_title(f"{count} class splits, the strictest step of Holm; diamonds: the paper's difference", fontsize=9)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    return figure


def row_of(contrast: Contrast, args: PowerArgs) -> dict:
    """What the numbers of splits find: at the strictest step of Holm, and at the whole level."""
    strict, whole = (1 - LEVEL) / len(PILOTS), 1 - LEVEL
    planned, freedom = (contrast.deviation, args.planned), contrast.pilots - 1
    return {
        **contrast._asdict(),
        "deviation_interval": [  # at LEVEL, of a normal distribution
            contrast.deviation * float(np.sqrt(freedom / stats.chi2.ppf(share, freedom)))
            for share in ((1 + LEVEL) / 2, (1 - LEVEL) / 2)
        ],
        "found": {
            count: [found_with(contrast.deviation, count, level) for level in (strict, whole)] for count in args.splits
        },
        "papers_is_found": None if contrast.paper is None else power(contrast.paper, *planned, strict),
        "zero_is_equivalent": [equivalence_power(0, *planned, level) for level in (strict, whole)],
    }


def table_of(rows: list[dict], args: PowerArgs) -> str:
    cells = [
        [
            row["title"],
            "" if row["paper"] is None else f"{row['paper']:+.1f}",
            "{:.1f} ({:.1f} to {:.1f})".format(row["deviation"], *row["deviation_interval"]),
            *(f"{loose:.1f} to {strict:.1f}" for strict, loose in row["found"].values()),
            "" if row["paper"] is None else f"{row['papers_is_found']:.0%}",
            " to ".join(f"{chance:.0%}" for chance in row["zero_is_equivalent"]),
        ]
        for row in rows
    ]
    head = ["contrast, hIoU", "the paper's", "standard deviation, 95 % interval"]
    head += [f"found with {count} splits" for count in args.splits] + ["the paper's is found", "0 is equivalent"]
    text = (
        f"Differences in points that are found with a chance of {POWER:.0%}: at the level {1 - LEVEL:.2f}, and at the "
    )
    text += (
        f"strictest step of Holm's correction over {len(rows)} contrasts. The last two columns are of {args.planned} "
    )
    text += (
        "splits: the chance to find the paper's difference at the strictest step, and the chance that no difference "
    )
    text += f"is found to be within {EQUIVALENT:g} points of 0, at the strictest step and at the level "
    text += (
        f"{1 - LEVEL:.2f}. The deviation of the last contrast is that of `best` with and without hybrid matching.\n\n"
    )
    return text + measuring.table_of(head, cells)


def main() -> None:
    args, _ = read_arguments(PowerArgs)
    found = contrasts()
    rows = [row_of(contrast, args) for contrast in found]
    measuring.publish(
        args.output, {"command": measuring.script(), **vars(args), "contrasts": rows}, table_of(rows, args)
    )
    if args.picture is not None:
        save_figure(figure_of(found, args.planned), Path(args.picture))


if __name__ == "__main__":
    run(main)
