"""Curves as PNGs: seen against unseen classes over the bias, accuracy against confidence, scores over seeds.

The numbers are those of result files and of ablations; all are drawn in percent. matplotlib draws (`pip install -e
".[figures]"`); no other module imports it.
"""

from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from zs3.command_line import InputError, printable
from zs3.evaluation.result_types import CurveResult, ReliabilityResult, Result
from zs3.files import writing
from zs3.scores.means import SCORES, GeneralizedScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Shape, size in points and words. Each lies within the next, so that none hides another of the same place.
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
    """The curves of one result, as far as it has them."""
    curve, bias = result["seen_unseen_curve"], result["calibration"]["seen_bias"]
    if curve is not None and curve["area"] is not None:
        chosen = {"gamma": bias, **{name: result[name] for name in GeneralizedScores._fields}} if bias else None
        draw_seen_unseen_curve({result["model"]: curve | {"chosen": chosen}}, folder / "seen_unseen_curve.png")
    if result["reliability"] is not None and result["reliability"]["pixels"]:
        draw_reliability(result["reliability"], folder / "reliability.png")


def draw_seen_unseen_curve(results: dict[str, CurveResult], path: Path) -> None:
    """The curves of one or several models.

    results: by title, what SeenBiasCurve.result returned. A further point `chosen` (gamma, miou_seen, miou_unseen,
    hiou) is marked too. The area of a single curve is shaded: some bias reaches or exceeds each of its points.
    """
    _save(_seen_unseen_figure(results), path)


def draw_reliability(reliability: ReliabilityResult, path: Path) -> None:
    """Accuracy of each bin of confidences, and its share of the pixels. reliability: of Reliability.result."""
    _save(_reliability_figure(reliability), path)


def draw_scores(tables: dict[str, dict[str, dict]], path: Path) -> None:
    """A panel for each table and score: every seed a dot, their mean a bar, the paper's a diamond where there is one.

    tables: by the titles of table and row, a row of `zs3.ablation.report.summarise`.
    """
    _save(_scores_figure(tables), path)


def _seen_unseen_figure(results: dict[str, CurveResult]) -> "Figure":
    for title, result in results.items():
        if result["area"] is None:
            raise InputError(f"{title}: no curve to draw: seen or unseen classes do not occur in these images")
    figure = _figure(5.2, 5.4 + 0.35 * len(results))
    axes = figure.subplots()
    marked = set()
    for number, (title, result) in enumerate(results.items()):
        points = [result["seen_only"], *_rows(result["points"]), result["unseen_only"]]
        x, y = _percents([point for point in points if None not in (point["miou_seen"], point["miou_unseen"])])
        colour = f"C{number}"
        axes.plot(x, y, color=colour, linewidth=1.5, label=_legend_entry(title, result))
        if len(results) == 1:  # more would hide each other
            steps = sorted(zip(x, y, strict=True), reverse=True)  # down from the best unseen score
            tops = list(accumulate((seen for _, seen in steps), max))
            corners = [0, *(unseen for unseen, _ in reversed(steps))]
            shade = {"step": "pre", "color": colour, "alpha": 0.12, "linewidth": 0, "label": SHADED}
            axes.fill_between(corners, [max(y), *reversed(tops)], **shade)
        for name in MARKERS:
            if result.get(name) is not None:
                marked.add(name)
                axes.plot(*_percents([result[name]]), **_marker(name, colour), zorder=3)
        if number == 0:
            for place, text, offset in ((0, "seen names only", (6, -12)), (-1, "unseen names only", (6, 5))):
                axes.annotate(text, (x[place], y[place]), offset, textcoords="offset points", color=FAINT, fontsize=8)
    for name in MARKERS:
        if name in marked:
            axes.plot([], [], **_marker(name, "black"), label=MARKERS[name][2])
    axes.set_title("Seen against unseen classes")
    axes.set(xlabel="mIoU of unseen classes (%)", ylabel="mIoU of seen classes (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9", linewidth=0.8)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, labelspacing=0.7)
    return figure


def _legend_entry(title: str, result: CurveResult) -> str:
    parts = [f"hIoU {100 * result['unbiased']['hiou']:.1f}"]
    for name in ("best", "chosen"):
        if result.get(name) is not None:
            parts.append(f"{name} {100 * result[name]['hiou']:.1f} (bias {result[name]['gamma']:.3g})")
    return f"{as_text(title)}, area {100 * result['area']:.1f} %\n" + ", ".join(parts)


def as_text(title: str) -> str:
    """For matplotlib, which would take text between dollar signs for a formula."""
    return printable(title).replace("$", r"\$")


def _marker(name: str, colour: str) -> dict[str, str | float]:
    shape, size, _ = MARKERS[name]
    face = colour if name == "best" else "none"
    return {"marker": shape, "markersize": size, "color": colour, "markerfacecolor": face, "linestyle": ""}


def _rows(columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _percents(points: list[dict]) -> tuple[list[float], list[float]]:
    """x and y: unseen and seen."""
    return tuple([100 * point[name] for point in points] for name in ("miou_unseen", "miou_seen"))


def _reliability_figure(reliability: ReliabilityResult) -> "Figure":
    if not reliability["pixels"]:
        raise InputError("no reliability to draw: no pixel is labelled")
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


def _scores_figure(tables: dict[str, dict[str, dict]]) -> "Figure":
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
    """Inches. Without pyplot: no window, no state that outlives the figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('curves are drawn by matplotlib, which is missing: pip install -e ".[figures]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    """A PNG."""
    with writing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
