"""The report of an ablation: means and intervals over seeds, paired differences, verdicts, shares of errors.

Scores and shares of areas are in percent.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from zs3.ablation.statistics import EQUIVALENT, LEVEL, judged, over_seeds, verdict
from zs3.ablation.tables import MADE_LABELS, TRAININGS, Row, Sample, Table
from zs3.command_line import printable
from zs3.evaluation.curves import save_figure, scores_figure
from zs3.evaluation.report import IMAGE_LABELS
from zs3.evaluation.results import read_result
from zs3.scores.means import ADDED_SCORES, SCORES, GeneralizedScores
from zs3.tables import markdown, markdown_table
from zs3.typed_json import read_json_lines

ADDED = {name: SCORES[name] for name in ADDED_SCORES} | {  # older results lack them
    "image_label_precision": "precision of image labels",
    "image_label_recall": "recall of image labels",
}
END = 4  # number of lines at each end of a log
LINE = dict[str, float | None]  # a line of metrics.jsonl
AREAS = (  # title, classes of the ground truth (100 %), kind of the wrong name
    ("seen area with an unseen name", "of_seen", "wrong_unseen"),
    ("unseen area with a seen name", "of_unseen", "wrong_seen"),
    ("unseen area with another unseen name", "of_unseen", "wrong_unseen"),
)
NEEDED = (
    *(*GeneralizedScores._fields, "unseen"),
    *(f"seen_unseen_confusion.{kind}.{wrong}" for _, kind, wrong in AREAS),
)

# ---- the numbers, in percent ------------------------------------------------------------------------------


def percents(shares: Iterable[float | None]) -> dict:
    """`over_seeds` in percent; None becomes NaN."""
    return over_seeds([math.nan if share is None else 100 * share for share in shares])


def logged_by(results: list[Path]) -> dict[str, dict]:
    """The losses and same_label_rate at both ends of training; NaN if the log lacks one.

    Losses are unweighted and summed over the decoder's outputs. results: each in the folder of its training.
    """
    paths = [path.parent / "metrics.jsonl" for path in results]
    logs = [read_json_lines(path, LINE, "log of train.py", "train again") if path.exists() else [] for path in paths]
    if not all(logs):
        return {}
    names = [name for name in logs[0][0] if name.startswith("loss_") or name == "same_label_rate"]
    found = {name: {} for name in names}
    for end, lines in {"first": slice(None, END), "last": slice(-END, None)}.items():
        for name in names:
            values = [np.array([line.get(name) for line in log[lines]], dtype=float).mean() for log in logs]
            found[name][end] = over_seeds(values)
    return found


def summary_of_row(row: Row, paths: list[Path], paper: GeneralizedScores | None) -> dict:
    """The numbers of a row; scores and areas in percent. paths: the row's result files, one per seed."""
    results = [read_result(path, NEEDED) for path in paths]
    curves = [result.get("seen_unseen_curve") for result in results]
    shares = [result["seen_unseen_confusion"] for result in results]
    return {
        "title": row.title,
        "training": row.training,
        "told": TRAININGS[row.training].unseen_labels,
        "ensemble": row.ensemble,
        "ensemble_weights": [result["clip_ensemble_weight"] for result in results] if row.is_chosen else None,
        "scores": {name: percents(result[name] for result in results) for name in GeneralizedScores._fields},
        "added_scores": {
            name: percents(result[name] for result in results)
            for name in ADDED
            if all(result.get(name) is not None for result in results)
        },
        "paper": None if paper is None else paper._asdict(),
        "curve": {  # a bias towards seen names does not change these
            "mIoU(S), seen names alone": percents(curve and curve["seen_only"]["miou_seen"] for curve in curves),
            "area under the seen/unseen curve": percents(curve and curve["area"] for curve in curves),
        },
        "areas": {title: percents(share[kind][wrong] for share in shares) for title, kind, wrong in AREAS},
        "unseen_classes": {
            name: percents(result["per_class"][name] for result in results)
            for name in results[0]["unseen"]
            if all(name in result["unseen"] for result in results)  # seeds may have class splits of their own
        },
        "logged": logged_by(paths),
    }


def summarise(table: Table, paths: dict[Row, list[Path]], sample: Sample) -> dict:
    """The rows and differences of a table. paths: the result files of each row, one per seed of the sample."""
    rows = {row: summary_of_row(row, paths[row], table.paper.get(row)) for row in table.rows}
    differences = []
    for difference in table.differences:
        found = {}
        for name in GeneralizedScores._fields:
            above, below = (rows[row]["scores"][name] for row in (difference.row, difference.minus))
            its = None if difference.paper is None else getattr(difference.paper, name)
            found[name] = over_seeds([a - b for a, b in zip(above["seeds"], below["seeds"], strict=True)])
            found[name] |= {"ratio": above["mean"] / below["mean"] if below["mean"] else math.nan}
            found[name] |= {"paper": None if its is None else round(its, 1)}
            found[name] |= {"verdict": verdict(found[name]["interval"], its)}
        differences.append({"title": difference.title, "scores": found})
    summary = {"title": table.title, "note": table.note, "rows": list(rows.values()), "differences": differences}
    if table.sample is not None:
        summary["is_planned_sample"] = sample == table.sample
        scores = [difference["scores"]["hiou"] for difference in differences]
        found = judged([score["seeds"] for score in scores], [score["paper"] for score in scores])
        for difference, tests in zip(differences, found, strict=True):
            difference["tests"] = tests._asdict()
    return summary


# ---- the report --------------------------------------------------------------------------------------------

SCORE_TITLES = {name: SCORES[name] for name in GeneralizedScores._fields}


def number(value: float, form: str = ".1f") -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def plus_minus(score: dict, sign: str = "") -> str:
    """`mean ± half of the interval`. sign: "+" to print it."""
    low, high = score["interval"]
    return f"{number(score['mean'], sign + '.1f')} ± {number((high - low) / 2)}"


def each_seed(score: dict, sign: str = "") -> str:
    return " ".join(number(value, sign + ".1f") for value in score["seeds"])


def draw(result: dict, path: Path) -> None:
    """Draws all tables into a PNG: the scores of every seed, their means and the paper's scores."""
    tables = result["tables"].values()
    rows = {table["title"]: {row["title"]: row for row in table["rows"]} for table in tables}
    save_figure(scores_figure(rows), path)


def table_text(table: dict) -> str:
    """The Markdown of one table from `summarise`."""
    rows, differences = [], []
    added = [name for name in ADDED if any(name in row.get("added_scores", {}) for row in table["rows"])]
    for row in table["rows"]:
        told = "image labels made from the true ones" if row["told"] in MADE_LABELS else IMAGE_LABELS[row["told"]]
        cells = [row["title"], told]
        cells += [f"{plus_minus(row['scores'][name])} ({each_seed(row['scores'][name])})" for name in SCORE_TITLES]
        cells += [plus_minus(row["added_scores"][name]) if name in row["added_scores"] else "" for name in added]
        cells.append(" / ".join(f"{row['paper'][name]:.1f}" for name in SCORE_TITLES) if row["paper"] else "")
        rows.append(cells)
    for difference in table["differences"]:
        for name, title in SCORE_TITLES.items():
            score = difference["scores"][name]
            cells = [difference["title"], title, plus_minus(score, "+"), number(score["ratio"], ".2f")]
            cells += [each_seed(score, "+"), "" if score["paper"] is None else f"{score['paper']:+.1f}"]
            differences.append([*cells, score["verdict"]])
    text = [f"## {table['title']}", "", table["note"], ""]
    head = ["training", "image labels of unseen classes", *SCORE_TITLES.values(), *(ADDED[name] for name in added)]
    text += markdown_table([*head, "the paper's"], rows)
    text += weights_text(table)
    text += contrasts_text(table)
    head = ["difference", "score", "mean", "ratio", "every seed", "the paper's", "verdict"]
    text += ["", *markdown_table(head, differences), "", *areas_text(table), "", *logged_text(table), ""]
    return "\n".join(text)


def contrasts_text(table: dict) -> list[str]:
    """The tests of the contrasts in hIoU, if they were named before the runs."""
    if "is_planned_sample" not in table:
        return []
    rows = []
    for difference in table["differences"]:
        score, tests = difference["scores"]["hiou"], difference["tests"]
        cells = [difference["title"], plus_minus(score, "+"), number(score["ratio"], ".2f")]
        cells += [number(tests[name], ".2g") for name in ("p", "holm", "equivalent_holm")]
        cells += ["" if score["paper"] is None else f"{score['paper']:+.1f}", tests["verdict"]]
        rows.append(cells)
    text = "" if table["is_planned_sample"] else "**This is not the whole sample of the plan: no verdict counts yet.** "
    text += "Contrasts in hIoU that were named before the runs. p is of the paired t-test; Holm's correction is over "
    text += (
        f"these {len(rows)}. Equivalent: within {EQUIVALENT:g} points of 0, at the level {1 - LEVEL:.2f} after Holm. "
    )
    text += "All other differences are exploratory."
    head = ["contrast", "hIoU", "ratio", "p", "p after Holm", "p of equivalence after Holm", "the paper's", "verdict"]
    return ["", text, "", *markdown_table(head, rows)]


def weights_text(table: dict) -> list[str]:
    """The chosen weights of the ensemble, if any were chosen."""
    rows = [
        [TRAININGS[row["training"]].title, " ".join("none" if w is None else str(w) for w in row["ensemble_weights"])]
        for row in table["rows"]
        if row["ensemble_weights"]
    ]
    return ["", *markdown_table(["training", "weight chosen, every seed"], rows)] if rows else []


def areas_text(table: dict) -> list[str]:
    """A table of scores that no bias changes, areas with a wrong name, and IoU of each unseen class."""
    classes = list(table["rows"][0]["unseen_classes"])
    rows = []
    for row in table["rows"]:
        values = [*row["curve"].values(), *row["areas"].values(), *row["unseen_classes"].values()]
        rows.append([row["title"], *map(plus_minus, values)])
    text = "Scores that no bias towards seen names changes, shares of the labelled area of seen and of unseen classes, "
    text += "and IoU of the unseen classes, percent. With the seen names alone a pixel of an unseen class is always "
    text += "wrong, as for a model that has no other names:"
    curve = table["rows"][0]["curve"]
    head = ["training", *curve, *(title for title, *_ in AREAS), *(f"IoU of {markdown(name)}" for name in classes)]
    return [text, "", *markdown_table(head, rows)]


def logged_text(table: dict) -> list[str]:
    """A table of logged losses and same_label_rate, to see which fall and whether the two matchings differ."""
    logged = {row["training"]: row["logged"] for row in table["rows"]}
    names = list(dict.fromkeys(name for ends in logged.values() for name in ends))
    rows = [
        [TRAININGS[training].title, *(both_ends(ends[name]) if name in ends else "" for name in names)]
        for training, ends in logged.items()
    ]
    text = f"What training logged, means of the first {END} lines → of the last {END}, and over seeds"
    return [
        f"{text} (losses without weights, sums over the decoder's outputs):",
        "",
        *markdown_table(["training", *names], rows),
    ]


def both_ends(ends: dict[str, dict]) -> str:
    return " → ".join(number(ends[end]["mean"], ".2f") for end in ("first", "last"))


def steps_text(steps: dict[str, int]) -> str:
    """The steps of each training; if it starts from another one, the steps of both."""
    parts = []
    for name, count in steps.items():
        start = TRAININGS[name].start
        parts.append(f"{TRAININGS[name].title} {count if start is None else f'{steps[start]} + {count}'}")
    return "; ".join(parts)


def made_on(result: dict) -> str:
    """The time by machine, if known, and the versions of packages."""
    versions = ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in result["versions"].items())
    text = f"Versions of the evaluations: {versions}."
    if result["seconds"] is None:
        return text
    spent = " and ".join(f"{value / 3600:.1f} job-hours on {machine}" for machine, value in result["seconds"].items())
    return f"Jobs of one thread, with the loader's process: {spent}. {text}"


def report(result: dict) -> str:
    """The text of the Markdown file."""
    result = {
        "split": "validation",
        "label_space": None,
        "num_evaluated": result.get("num_validation"),
    } | result  # older
    seeds, level = ", ".join(map(str, result["seeds"])), f"{100 * result['level']:.0f} %"
    images = "scenes" if result["synthetic"] else "images"
    decides = "weights" if result["label_space"] is None else f"the label space {result['label_space']}, weights"
    kind = "synthetic, drawn by this project" if result["synthetic"] else "a folder"
    pairs = len(SCORE_TITLES) * sum(len(table["differences"]) for table in result["tables"].values())
    return "\n".join(
        [
            "# Ablation",
            "",
            f"    {printable(result['command'])}",
            "",
            f"The benchmark {markdown(result['benchmark'])} is {kind}: {result['num_train']} training and "
            f"{result['num_evaluated']} {result['split']} {images}. The paper's numbers are of COCO-Stuff: "
            "compare signs, not sizes.",
            "",
            f"Every score is in percent, on the {result['split']} {images} with all names as candidates (gzs3): the "
            f"mean over seeds {seeds} ± half of its {level} t-interval, and in brackets every seed. A seed decides "
            f"{decides}, order, augmentation and points of both stages; the {images} are the same. Differences are "
            'paired by seed, in percentage points, and ratios are of the means. "No difference": the seeds do not show '
            f"one, the interval holds 0. Every interval stands by itself: of the {pairs} differences here, "
            f"{(1 - result['level']) * pairs:.0f} would get another verdict by chance if nothing differed.",
            "",
            f"Training steps: {steps_text(result['steps'])}.",
            "",
            made_on(result),
            "",
            *(table_text(table) for table in result["tables"].values()),
        ]
    )
