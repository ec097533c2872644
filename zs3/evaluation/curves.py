"""Curves as PNGs: seen against unseen classes over the bias, accuracy against confidence, scores over seeds.

The numbers are those of result files and of ablations; all are drawn in percent. matplotlib draws (`pip install -e
".[figures]"`); no other module imports it.
"""

from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from zs3.command_line import InputError, printable
from zs3.evaluation.result_types import CurvePoint, CurveResult, ReliabilityResult, Result
from zs3.files import writing
from zs3.scores.means import SCORES, GeneralizedScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Shape, size in points, legend. Each is smaller than the next, so that all are visible at one place.
MARKERS = {"best": ("*", 7, "best hIoU"), "unbiased": ("o", 9, "no bias"), "chosen": ("D", 11, "chosen bias")}
SHADED = "shaded: reached or exceeded at some bias"
FAINT = "0.6"  # matplotlib's greys
SEED = {"marker": "o", "markersize": 4, "color": "C0", "alpha": 0.6, "markeredgewidth": 0, "linestyle": ""}
MEAN = {"marker": "|", "markersize": 12, "markeredgewidth": 1.5, "color": "black", "linestyle": ""}
PAPER = {"marker": "D", "markersize": 5, "color": FAINT, "markerfacecolor": "none", "linestyle": ""}


def check_matplotlib(flag: str) -> None:
    if find_spec("matplotlib") is None:
        raise InputError(f'{flag} needs matplotlib: pip install -e ".[figures]"')


def draw_curves(result: Result, folder: Path) -> None:
    """Draws PNGs of the curves that a result has."""
    curve, bias = result["seen_unseen_curve"], result["calibration"]["seen_bias"]
    if curve is not None and curve["area"] is not None:
        chosen = {"gamma": bias, **{name: result[name] for name in GeneralizedScores._fields}} if bias else None
        save_figure(seen_unseen_figure(result["model"], curve, chosen), folder / "seen_unseen_curve.png")
    if result["reliability"] is not None and result["reliability"]["pixels"]:
        save_figure(reliability_figure(result["reliability"]), folder / "reliability.png")


def seen_unseen_figure(title: str, curve: CurveResult, chosen: CurvePoint | None = None) -> "Figure":
    """The curve with its marked points. Some bias reaches or exceeds each shaded point. chosen: one more point."""
    figure = _figure(5.2, 5.75)
    axes = figure.subplots()
    rows = [dict(zip(curve["points"], row, strict=True)) for row in zip(*curve["points"].values(), strict=True)]
    points = [curve["seen_only"], *rows, curve["unseen_only"]]
    x, y = _percents([point for point in points if None not in (point["miou_seen"], point["miou_unseen"])])
    marked = {"best": curve["best"], "unbiased": curve["unbiased"], "chosen": chosen}
    marked = {name: point for name, point in marked.items() if point is not None}
    axes.plot(x, y, color="C0", linewidth=1.5, label=_legend_entry(title, curve["area"], marked))
    steps = sorted(zip(x, y, strict=True), reverse=True)  # down from the best unseen score
    tops = list(accumulate((seen for _, seen in steps), max))
    corners = [0, *(unseen for unseen, _ in reversed(steps))]
    shade = {"step": "pre", "color": "C0", "alpha": 0.12, "linewidth": 0, "label": SHADED}
    axes.fill_between(corners, [max(y), *reversed(tops)], **shade)
    for name, point in marked.items():
        shape, size, words = MARKERS[name]
        style = {"marker": shape, "markersize": size, "markerfacecolor": "C0" if name == "best" else "none"}
        axes.plot(*_percents([point]), color="C0", linestyle="", label=words, zorder=3, **style)
    for place, text, offset in ((0, "seen names only", (6, -12)), (-1, "unseen names only", (6, 5))):
        axes.annotate(text, (x[place], y[place]), offset, textcoords="offset points", color=FAINT, fontsize=8)
    axes.set_title("Seen against unseen classes")
    axes.set(xlabel="mIoU of unseen classes (%)", ylabel="mIoU of seen classes (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9", linewidth=0.8)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, labelspacing=0.7)
    return figure


def _legend_entry(title: str, area: float, marked: dict[str, CurvePoint]) -> str:
    parts = [f"hIoU {100 * marked['unbiased']['hiou']:.1f}"]
    for name in ("best", "chosen"):
        if name in marked:
            parts.append(f"{name} {100 * marked[name]['hiou']:.1f} (bias {marked[name]['gamma']:.3g})")
    return f"{as_text(title)}, area {100 * area:.1f} %\n" + ", ".join(parts)


def as_text(title: str) -> str:
    """Escapes dollar signs, because matplotlib reads text between them as a formula."""
    return printable(title).replace("$", r"\$")


def _percents(points: list[dict]) -> tuple[list[float], list[float]]:
    """x: mIoU of unseen classes, y: of seen classes; in percent."""
    return tuple([100 * point[name] for point in points] for name in ("miou_unseen", "miou_seen"))


def reliability_figure(reliability: ReliabilityResult) -> "Figure":
    """Accuracy of each bin of confidences, and its share of the pixels."""
    figure = _figure(5.2, 5.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = [own for own in reliability["bins"] if own["count"]]
    left = [100 * own["low"] for own in bins]
    width = [100 * (own["high"] - own["low"]) for own in bins]
    bars = {"align": "edge", "width": width, "edgecolor": "white", "linewidth": 0.8}
    above.bar(left, [100 * own["accuracy"] for own in bins], color="C0", label="accuracy", **bars)
    above.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle="--", label="as accurate as confident")
    above.set_title(f"Reliability, expected calibration error {100 * reliability['ece']:.1f} %")
    above.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    below.bar(left, [100 * own["count"] / reliability["pixels"] for own in bins], color=FAINT, **bars)
    below.set(xlabel="confidence (%)", ylabel="pixels (%)")
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure


def scores_figure(tables: dict[str, dict[str, dict]]) -> "Figure":
    """A panel for each table and score: a dot for each seed, a bar for their mean, a diamond for the paper's score.

    tables: by the titles of table and row, a row of `zs3.ablation.report.summarise`.
    """
    counts = [len(rows) for rows in tables.values()]
    names = GeneralizedScores._fields
    figure = _figure(10, 0.5 + sum(0.28 * count + 0.6 for count in counts))
    grid = figure.subplots(len(counts), len(names), sharex="col", sharey="row", squeeze=False, height_ratios=counts)
    for panels, (title, rows) in zip(grid, tables.items(), strict=True):
        panels[0].set_title(as_text(title), loc="left", fontsize=10)
        panels[0].set_yticks(range(len(rows)), list(map(as_text, rows)), fontsize=8)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
        for axes, name in zip(panels, names, strict=True):
            for height, row in enumerate(rows.values()):
                score, paper = row["scores"][name], row["paper"]
                axes.plot(score["seeds"], [height] * len(score["seeds"]), **SEED)
                axes.plot([score["mean"]], [height], **MEAN)
                if paper is not None:
                    axes.plot([paper[name]], [height], **PAPER)
            axes.grid(color="0.9", linewidth=0.8)
            axes.tick_params(axis="y", length=0)
    for axes, name in zip(grid[-1], names, strict=True):
        axes.set_xlabel(f"{SCORES[name]} (%)")
        axes.set_xlim(left=0)
    entries = {"a seed": SEED, "mean": MEAN}
    if any(row["paper"] for rows in tables.values() for row in rows.values()):
        entries["the paper's, on its own data"] = PAPER
    for words, style in entries.items():
        grid[-1][-1].plot([], [], **style, label=words)
    figure.legend(loc="outside lower right", ncols=len(entries), frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float) -> "Figure":
    """width, height: inches. pyplot is not used, because it opens windows and keeps state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG."""
    with writing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
