"""Suites: one model on several datasets, and the row that the paper's table has for it.

A member is a dataset's folder under the suite's root, named as `zs3.convert` names benchmarks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from zs3.command_line import InputError
from zs3.evaluation import percent


class Suite(NamedTuple):
    """members: benchmark -> the paper's word for it. on_request: those that are left out where nobody names them.
    scores: what a member has in the row."""

    title: str
    setting: Literal["gzs3", "ovs"]
    members: dict[str, str]
    scores: dict[str, str]
    on_request: tuple[str, ...] = ()


SUITES = {
    "gzs3": Suite(
        "generalised zero-shot segmentation (Tables 1 and 2)",
        "gzs3",
        {"coco_stuff_171": "COCO-Stuff", "voc_20": "VOC-20"},
        {"miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU"},
    ),
    "ovs5": Suite(
        "open-vocabulary segmentation, without adaptation (Table 3)",
        "ovs",
        {
            "ade20k_847": "A-847",
            "pascal_context_459": "P-459",
            "ade20k_150": "A-150",
            "pascal_context_59": "PC-59",
            "voc_20": "VOC-20",
            "voc_21": "VOC-21",
        },
        {"miou": "mIoU"},
        on_request=("voc_21",),
    ),
}


def chosen_members(suite: Suite, root: Path, names: list[str]) -> list[str]:
    """Those named, or all that lie under root; in the table's order."""
    for name in names:
        if name not in suite.members:
            raise InputError(f"--members takes some of {', '.join(suite.members)}, got {name!r}")
        if not (root / name).is_dir():
            raise InputError(f"--members {name}: there is no folder {root / name}; `python -m zs3.convert` makes it")
    present = [name for name in suite.members if (root / name).is_dir()]
    chosen = [name for name in present if (name in names if names else name not in suite.on_request)]
    if not chosen:
        raise InputError(f"--data_root {root} has none of the folders {', '.join(suite.members)}")
    return chosen


def row(suite: Suite, root: Path, results: Mapping[str, dict], reasons: Mapping[str, str]) -> str:
    """The suite's table in Markdown, percent; below it, what each number is, or why there is none."""
    members = [name for name in suite.members if name in results or name in reasons or name not in suite.on_request]
    head, cells = [], []
    for name in members:
        for score, title in suite.scores.items():
            head.append(suite.members[name] if len(suite.scores) == 1 else f"{suite.members[name]} {title}")
            cells.append(percent(results[name][score]).strip() if name in results else "-")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", f"| {' | '.join(cells)} |", ""]
    for name in members:
        if name in results:
            result, (low, high) = results[name], results[name]["confidence_intervals"]["miou"]
            lines.append(
                f"- {suite.members[name]}: {result['num_images']} images, mIoU {percent(result['miou']).strip()} "
                f"(95 % interval {percent(low).strip()} to {percent(high).strip()}), {result['protocol']}"
            )
        else:
            absent = "not asked for" if (root / name).is_dir() else "no such folder"
            lines.append(f"- {suite.members[name]}: not evaluated, {reasons.get(name, absent)}")
    return "\n".join(lines) + "\n"
