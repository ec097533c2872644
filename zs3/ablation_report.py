"""What an ablation says: means and intervals over seeds, paired differences, verdicts, and where the pixels went.

All numbers are in percent, but losses and counts.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from zs3.ablation_tables import ROWS, VIEWS, Line, Table
from zs3.curves import draw_scores
from zs3.evaluation import SCORES, GeneralizedScores
from zs3.results import table as markdown_table

LEVEL = 0.95  # of the intervals over seeds
END = 4  # lines of a log at either end
AREAS = (  # title; where the truth is; what was wrong with the name
    ("seen area with an unseen name", "of_seen", "wrong_unseen"),
    ("unseen area with a seen name", "of_unseen", "wrong_seen"),
    ("unseen area with another unseen name", "of_unseen", "wrong_unseen"),
)

# ---- the statistics, in percent ----------------------------------------------------------------------------


def t_interval(values: list[float]) -> tuple[float, float]:
    """Of the mean, at LEVEL, by Student's t with n - 1 degrees of freedom; NaN for fewer than 2 values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def ratio(above: float, below: float) -> float:
    return float(above / below) if below else math.nan


def over_seeds(values: list[float]) -> dict:
    return {"mean": float(np.mean(values)), "interval": list(t_interval(values)), "seeds": values}


def verdict(interval: list[float], paper: float | None) -> str:
    """paper: its difference, where it has one; its sign alone counts."""
    low, high = interval
    if math.isnan(low):
        return "no interval"
    if low <= 0 <= high:
        return "no difference"
    if paper is None:
        return "higher" if low > 0 else "lower"
    return "same sign as the paper" if (low > 0) == (paper > 0) else "opposite"


class Runs(NamedTuple):
    """What the runs of one line left, one of each a seed."""

    results: list[dict]  # of eval.py
    logs: list[list[dict]]  # lines of metrics.jsonl; empty where training wrote none


def read_runs(results: list[Path]) -> Runs:
    """results: the files of eval.py, each in the folder of its training."""
    logs = [path.parent / "metrics.jsonl" for path in results]
    return Runs(
        [json.loads(path.read_text(encoding="utf-8")) for path in results],
        [
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
            for path in logs
        ],
    )


def in_percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def scores_of(runs: Runs) -> dict[str, list[float]]:
    """By score, one value a seed; NaN where the split had no such class."""
    return {name: [in_percent(result[name]) for result in runs.results] for name in GeneralizedScores._fields}


def areas_of(runs: Runs) -> dict[str, dict]:
    """The area that got a name of the wrong kind, by AREAS; NaN where there is no area of that kind."""
    shares = [result["seen_unseen_confusion"] for result in runs.results]
    return {title: over_seeds([in_percent(share[kind][wrong]) for share in shares]) for title, kind, wrong in AREAS}


def unseen_classes_of(runs: Runs) -> dict[str, dict]:
    """IoU by unseen class."""
    names = runs.results[0]["unseen"]
    return {name: over_seeds([in_percent(result["per_class"].get(name)) for result in runs.results]) for name in names}


def logged_by(runs: Runs) -> dict[str, dict]:
    """Losses, without weights and summed over the decoder's outputs, and same_label_rate, at both ends of training."""
    if not all(runs.logs):
        return {}
    names = [name for name in runs.logs[0][0] if name.startswith("loss_") or name == "same_label_rate"]
    ends = {"first": slice(None, END), "last": slice(-END, None)}
    return {
        name: {
            end: over_seeds([np.mean([row[name] for row in log[part]]) for log in runs.logs])
            for end, part in ends.items()
        }
        for name in names
    }


def summarise(table: Table, paths: Callable[[Line], list[Path]]) -> dict:
    """paths: a line's result files, one a seed."""
    runs = {line: read_runs(paths(line)) for line in table.lines}
    scores = {line: scores_of(runs[line]) for line in table.lines}
    lines = [
        {
            "training": line.row,
            "ensemble": line.view,
            "scores": {name: over_seeds(values) for name, values in scores[line].items()},
            "paper": table.paper[line]._asdict() if line in table.paper else None,
            "areas": areas_of(runs[line]),
            "unseen_classes": unseen_classes_of(runs[line]),
            "logged": logged_by(runs[line]),
        }
        for line in table.lines
    ]
    differences = []
    for difference in table.differences:
        found = {}
        for name in GeneralizedScores._fields:
            line, minus = scores[difference.line][name], scores[difference.minus][name]
            its = None if difference.paper is None else getattr(difference.paper, name)
            found[name] = over_seeds([a - b for a, b in zip(line, minus, strict=True)])
            found[name] |= {"ratio": ratio(np.mean(line), np.mean(minus))}
            found[name] |= {"paper": None if its is None else round(its, 1)}
            found[name] |= {"verdict": verdict(found[name]["interval"], its)}
        differences.append({"title": difference.title, "scores": found})
    return {"title": table.title, "note": table.note, "lines": lines, "differences": differences}


# ---- the report --------------------------------------------------------------------------------------------

SCORE_TITLES = {name: SCORES[name] for name in GeneralizedScores._fields}


def plus_minus(score: dict, sign: str = "") -> str:
    """`mean ± half of the interval`, `sign` is that of a number's format."""
    low, high = score["interval"]
    half = "-" if math.isnan(low) else f"{(high - low) / 2:.1f}"
    return f"{score['mean']:{sign}.1f} ± {half}"


def each_seed(score: dict, sign: str = "") -> str:
    return " ".join(f"{value:{sign}.1f}" for value in score["seeds"])


def table_text(table: dict) -> str:
    """Markdown of one of `summarise`."""
    lines, differences = [], []
    for line in table["lines"]:
        cells = names_of(line)
        cells += [f"{plus_minus(line['scores'][name])} ({each_seed(line['scores'][name])})" for name in SCORE_TITLES]
        cells.append(" / ".join(f"{line['paper'][name]:.1f}" for name in SCORE_TITLES) if line["paper"] else "")
        lines.append(cells)
    for difference in table["differences"]:
        for name, title in SCORE_TITLES.items():
            score = difference["scores"][name]
            times = "-" if math.isnan(score["ratio"]) else f"{score['ratio']:.2f}"
            cells = [difference["title"], title, plus_minus(score, "+"), times, each_seed(score, "+")]
            cells += ["" if score["paper"] is None else f"{score['paper']:+.1f}", score["verdict"]]
            differences.append(cells)
    text = [f"## {table['title']}", "", table["note"], ""]
    text += markdown_table(["training", "ensemble", *SCORE_TITLES.values(), "the paper's"], lines)
    head = ["difference", "score", "mean", "ratio", "every seed", "the paper's", "verdict"]
    text += ["", *markdown_table(head, differences), "", *where_text(table), "", *logged_text(table), ""]
    return "\n".join(text)


def draw(result: dict, path: Path) -> None:
    """A picture of all tables: every seed's scores, their means, the paper's."""
    tables = {}
    for table in result["tables"].values():
        titles = [", ensemble ".join(names_of(line)).replace(", ensemble off", "") for line in table["lines"]]
        tables[table["title"]] = dict(zip(titles, table["lines"], strict=True))
    draw_scores(tables, path)


def names_of(line: dict) -> list[str]:
    return [ROWS[line["training"]].title, VIEWS[line["ensemble"]].title]


def where_text(table: dict) -> list[str]:
    """Which pixels and which classes make the difference."""
    classes = list(table["lines"][0]["unseen_classes"])
    rows = []
    for line in table["lines"]:
        values = [*line["areas"].values(), *line["unseen_classes"].values()]
        rows.append([*names_of(line), *(f"{value['mean']:.1f}" for value in values)])
    head = ["training", "ensemble", *(title for title, *_ in AREAS), *(f"IoU of {name}" for name in classes)]
    return ["Where the pixels went, percent, means over seeds:", "", *markdown_table(head, rows)]


def logged_text(table: dict) -> list[str]:
    """What training says of itself: which terms fall, and whether the two matchings part."""
    logged = {line["training"]: line["logged"] for line in table["lines"]}
    names = list(dict.fromkeys(name for ends in logged.values() for name in ends))
    rows = []
    for row, ends in logged.items():
        told = [f"{ends[n]['first']['mean']:.2f} → {ends[n]['last']['mean']:.2f}" if n in ends else "" for n in names]
        rows.append([ROWS[row].title, *told])
    said = f"What training logged, means of the first {END} lines → of the last {END}, and over seeds"
    return [
        f"{said} (losses without weights, sums over the decoder's outputs):",
        "",
        *markdown_table(["training", *names], rows),
    ]


def report(result: dict) -> str:
    """The Markdown file."""
    steps = ", ".join(f"{ROWS[name].title} {count}" for name, count in result["steps"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    kind = "synthetic, drawn by this project: " if result["synthetic"] else ""
    same = " the scenes are the same." if result["synthetic"] else " the images are the same."
    return "\n".join(
        [
            "# Tables of the paper in miniature",
            "",
            f"    {result['command']}",
            "",
            f"The benchmark `{result['benchmark']}` is {kind}{result['num_train']} training and "
            f"{result['num_validation']} validation images. The paper's numbers are those of COCO-Stuff, to compare "
            "signs with, not sizes.",
            "",
            f"Every score is in percent, on the validation images with all names as candidates (gzs3): the mean over "
            f"seeds {seeds} ± half of its 95 % t-interval, and in brackets every seed. A seed decides weights, order, "
            f"augmentation and points of both stages;{same} Differences are paired by seed, in percentage points, and "
            'ratios are those of the means. "No difference": their interval holds 0.',
            "",
            f"Training steps: {steps}.",
            "",
            f"Jobs of one thread on {result['machine']}, {result['seconds'] / 3600:.1f} hours together. Versions: "
            f"{', '.join(f'{name} {number}' for name, number in result['versions'].items())}.",
            "",
            *(table_text(table) for table in result["tables"].values()),
        ]
    )
