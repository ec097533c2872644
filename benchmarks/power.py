"""The power of the confirmatory contrasts: what a number of class splits can show, computed before they are trained.

    python -m benchmarks.power --output docs/results/power.json --picture docs/images/power.png

The standard deviations are those of the first edition's paired differences in hIoU: five seeds of one class split.
Other class splits may vary more. The first edition has no control of `best`; its deviation is taken from `best` with
and without hybrid matching. Holm's correction tests the smallest p of m contrasts at level / m, and the largest at the
whole level.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq

from benchmarks import measuring
from configuration_zs3 import Number
from zs3.ablation.statistics import LEVEL, power
from zs3.ablation.tables import make_tables
from zs3.command_line import Arguments, OutputFile, Some, flag, read_arguments, run
from zs3.evaluation.curves import save_figure

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

    splits: Some[Splits] = flag([4, 8, 12, 24], "Numbers of class splits, each with one seed.")
    planned: Splits = flag(12, "The number that is planned.")
    output: OutputFile | None = flag(None, "Result file; the printed table is written beside it as .md.")
    picture: OutputFile | None = flag(None, "PNG of the power over the difference, for the planned number.")


class Contrast(NamedTuple):
    title: str
    paper: float | None  # the paper's difference in hIoU, points
    deviation: float  # standard deviation of the pilot's differences, points


def contrasts() -> list[Contrast]:
    tables = json.loads(FIRST.read_text(encoding="utf-8"))["tables"]
    seeds = [
        next(pair["scores"]["hiou"]["seeds"] for pair in tables[table]["differences"] if pair["title"] == title)
        for table, title in PILOTS
    ]
    named = make_tables(clip=True, matching="unpaired")["confirmatory"].differences
    papers = [None if pair.paper is None else round(pair.paper.hiou, 1) for pair in named]
    deviations = [float(np.std(values, ddof=1)) for values in seeds]
    return [Contrast(pair.title, *both) for pair, *both in zip(named, papers, deviations, strict=True)]


def found_with(deviation: float, count: int, level: float) -> float:
    """The difference that is found with a chance of POWER, in points."""
    return brentq(lambda difference: power(difference, deviation, count, level) - POWER, 0, 15 * deviation / count**0.5)


def figure_of(rows: list[Contrast], count: int) -> Figure:
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


def main() -> None:
    args, _ = read_arguments(PowerArgs)
    rows, strict = contrasts(), (1 - LEVEL) / len(PILOTS)
    found = [
        row._asdict()
        | {"splits": {count: [found_with(row.deviation, count, level) for level in (strict, 1 - LEVEL)]
                      for count in args.splits}}
        | {"power_for_the_papers": None if row.paper is None else power(row.paper, row.deviation, args.planned, strict)}
        for row in rows
    ]  # fmt: skip
    cells = [
        [
            *(row["title"], "" if row["paper"] is None else f"{row['paper']:+.1f}", f"{row['deviation']:.1f}"),
            *(" to ".join(f"{value:.1f}" for value in both[::-1]) for both in row["splits"].values()),
            "" if row["paper"] is None else f"{row['power_for_the_papers']:.0%}",
        ]
        for row in found
    ]
    head = [
        "contrast, hIoU",
        "the paper's",
        "standard deviation",
        *(f"found with {count} splits" for count in args.splits),
    ]
    text = f"Differences in points that are found with a chance of {POWER:.0%}: at the level {1 - LEVEL:.2f}, and at "
    text += (
        f"{strict:.4f}, the strictest step of Holm's correction over {len(rows)} contrasts. Last column: the chance "
    )
    text += f"to find the paper's difference with {args.planned} splits at the strictest step.\n\n"
    text += measuring.table_of([*head, "chance for the paper's"], cells)
    measuring.publish(args.output, {"command": measuring.script(), **vars(args), "contrasts": found}, text)
    if args.picture is not None:
        save_figure(figure_of(rows, args.planned), Path(args.picture))


if __name__ == "__main__":
    run(main)
