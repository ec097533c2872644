"""Suites: one model on several datasets, and the row that the paper's table has for it.

A member is a dataset's folder under the suite's root, named as `zs3.convert` names benchmarks.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from zs3.command_line import InputError
from zs3.evaluation.results import RESULT_FILE, Result, read_result
from zs3.label_space import CLASSES_FOLDER, load_label_space
from zs3.scores.means import SCORES, GeneralizedScores
from zs3.tables import markdown, markdown_table, percent
from zs3.typed_json import check_needed, unless_damaged


class Suite(NamedTuple):
    """members: benchmark -> the paper's word for it. on_request: those that are left out where nobody names them.
    scores: what a member has in the row."""

    title: str
    setting: Literal["gzs3", "ovs"]
    members: dict[str, str]
    scores: tuple[str, ...]
    on_request: tuple[str, ...] = ()


SUITES = {
    "gzs3": Suite(
        "generalised zero-shot segmentation, as in Tables 1 and 2",
        "gzs3",
        {"coco_stuff_171": "COCO-Stuff", "voc_20": "VOC-20"},
        GeneralizedScores._fields,
    ),
    "ovs5": Suite(
        "mIoU of open-vocabulary segmentation without adaptation, as in Table 3",
        "ovs",
        {
            "ade20k_847": "A-847",
            "pascal_context_459": "P-459",
            "ade20k_150": "A-150",
            "pascal_context_59": "PC-59",
            "voc_20": "VOC-20",
            "voc_21": "VOC-21",
        },
        ("miou",),
        on_request=("voc_21",),
    ),
}

# Keys of a member's result that a row cannot do without.
OF_A_ROW = ("model", "num_images", "protocol", *SCORES, *(f"confidence_intervals.{name}" for name in SCORES))


def chosen_members(suite: Suite, root: Path, names: list[str]) -> list[str]:
    """Those named, or all that lie under root; in the table's order."""
    for name in names:
        if name not in suite.members:
            raise InputError(f"--members takes some of {', '.join(suite.members)}, got {name!r}")
        if not (root / name).is_dir():
            raise InputError(f"--members {name}: there is no folder {root / name}; `zs3 convert` makes it")
    present = [name for name in suite.members if (root / name).is_dir()]
    chosen = [name for name in present if (name in names if names else name not in suite.on_request)]
    if not chosen:
        raise InputError(f"--data_root {root} has none of the folders {', '.join(suite.members)}: make them")
    return chosen


def row(suite: Suite, root: Path, results: Mapping[str, Result], reasons: Mapping[str, str]) -> str:
    """The suite's table in Markdown, percent; below it, what each number is, or why there is none."""
    members = [name for name in suite.members if name in results or name in reasons or name not in suite.on_request]
    head, cells, lines = [], [], []
    for name in members:
        for score in suite.scores:
            head.append(f"{suite.members[name]} {SCORES[score]}" if len(suite.scores) > 1 else suite.members[name])
            cells.append(percent(results[name][score]) if name in results else "-")
        lines.append(f"- {suite.members[name]}: {_told(suite, root, name, results.get(name), reasons.get(name))}")
    models = ", ".join(dict.fromkeys(markdown(result["model"]) for result in results.values())) or "no model"
    return "\n".join([f"{models}: {suite.title}; percent", "", *markdown_table(head, [cells]), "", *lines]) + "\n"


def _told(suite: Suite, root: Path, name: str, result: Result | None, reason: str | None) -> str:
    if result is None:
        absent = "not asked for" if (root / name).is_dir() else "no such folder"
        return f"not evaluated, {markdown(reason or absent)}"
    score = suite.scores[-1]
    low, high = result["confidence_intervals"][score]
    told = f"{SCORES[score]} {percent(result[score])}, 95 % interval {percent(low)} to {percent(high)} over "
    told += f"{result['num_images']} images; {markdown(result['protocol'])}"
    if list(result["per_class"]) != load_label_space(CLASSES_FOLDER / f"{name}.json").class_names:
        told += "; ITS NAMES ARE NOT THOSE OF THE BENCHMARK"
    return told


def finished(path: Path, stamp: Result) -> Result | None:
    """The result that is there, if it is that of the same checkpoint, data, flags and versions."""
    if not path.exists():
        return None
    result = unless_damaged(read_result, path)
    if result is None or {name: result.get(name) for name in stamp} != json.loads(json.dumps(stamp)):
        return None
    check_needed(result, OF_A_ROW, path, RESULT_FILE)
    return result
