"""Suites: one model on several datasets, and its row of the paper's table.

A member is the folder of a dataset under --data_root, named as `zs3 convert` names benchmarks.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from accelerate import Accelerator

from zs3.checkpoints import NoClaim
from zs3.command_line import InputError
from zs3.evaluation.arguments import EvalArgs, same_flags
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import RESULT_FILE, read_result
from zs3.files import lock_folder, write_json, write_text
from zs3.label_space import CLASSES_FOLDER, load_label_space
from zs3.scores.means import SCORES, GeneralizedScores
from zs3.tables import markdown, markdown_table, percent, percent_range
from zs3.training.stopping import all_refuse
from zs3.typed_json import check_needed, unless_damaged


class Suite(NamedTuple):
    """members: benchmark -> its name in the paper. on_request: members that are evaluated only if --members names
    them. scores: the columns of each member."""

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

# The keys of a result that a row needs.
COLUMNS = sorted({score for suite in SUITES.values() for score in suite.scores})
NEEDED = ("model", "num_images", "protocol", *COLUMNS, *(f"confidence_intervals.{name}" for name in COLUMNS))


def chosen_members(suite: Suite, root: Path, names: list[str]) -> list[str]:
    """The members in `names`, or else all in root but those on request; in the order of the table."""
    for name in names:
        if name not in suite.members:
            raise InputError(f"--members takes some of {', '.join(suite.members)}, got {name!r}")
        if not (root / name).is_dir():
            raise InputError(f"--members {name}: there is no folder {root / name}; `zs3 convert` makes it")
    present = [name for name in suite.members if (root / name).is_dir()]
    chosen = [name for name in present if (name in names if names else name not in suite.on_request)]
    if not chosen:
        raise InputError(
            f"--data_root {root} has none of the folders {', '.join(suite.members)}: `zs3 convert` makes them"
        )
    return chosen


def row(suite: Suite, root: Path, results: Mapping[str, Result], reasons: Mapping[str, str]) -> str:
    """The table of the suite in Markdown, percent. Below it, what each number means, or why it is missing."""
    members = [name for name in suite.members if name in results or name in reasons or name not in suite.on_request]
    head, cells, lines = [], [], []
    for name in members:
        for score in suite.scores:
            head.append(f"{suite.members[name]} {SCORES[score]}" if len(suite.scores) > 1 else suite.members[name])
            cells.append(percent(results[name][score]) if name in results else "-")
        lines.append(f"- {suite.members[name]}: {_explained(suite, root, name, results.get(name), reasons.get(name))}")
    models = ", ".join(dict.fromkeys(markdown(result["model"]) for result in results.values())) or "no model"
    return "\n".join([f"{models}: {suite.title}; percent", "", *markdown_table(head, [cells]), "", *lines]) + "\n"


def _explained(suite: Suite, root: Path, name: str, result: Result | None, reason: str | None) -> str:
    if result is None:
        absent = "not asked for" if (root / name).is_dir() else "no such folder"
        return f"not evaluated, {markdown(reason or absent)}"
    score = suite.scores[-1]
    ends = percent_range(result["confidence_intervals"][score])
    text = f"{SCORES[score]} {percent(result[score])}, 95 % interval {ends} over {result['num_images']} images; "
    text += markdown(result["protocol"])
    if list(result["per_class"]) != load_label_space(CLASSES_FOLDER / f"{name}.json").class_names:
        text += "; ITS NAMES ARE NOT THOSE OF THE BENCHMARK"
    return text


def run_suite(args: EvalArgs, evaluate: Callable[..., Result | None], accelerator: Accelerator) -> str | None:
    """Evaluates every member into a file of the folder args.output; a finished one is not repeated. Returns the table.

    If no zero-shot result can be claimed on a member, the reason stands in its place.
    """
    args.check()
    suite, root, folder = SUITES[args.suite], Path(args.data_root), Path(args.output)
    members = chosen_members(suite, root, args.members)
    results, reasons = {}, {}
    with ExitStack() as held:
        with all_refuse(accelerator):
            if accelerator.is_main_process:
                held.enter_context(lock_folder(folder))
        for name in members:
            try:
                results[name] = evaluate(member_args(args, suite.setting, name), accelerator, reuse=True)
            except NoClaim as error:
                reasons[name] = str(error)
        if not accelerator.is_main_process:
            return None
        text = row(suite, root, results, reasons)
        write_text(folder / f"{args.suite}.md", text)
        table = {name: {score: result[score] for score in suite.scores} for name, result in results.items()}
        write_json(folder / f"{args.suite}.json", {"suite": args.suite, "table": table, "not_evaluated": reasons})
    return text


def member_args(args: EvalArgs, setting: str, name: str) -> EvalArgs:
    """The flags of the suite as those of one member."""

    def within(folder: str | None, file: str = name) -> str | None:
        return None if folder is None else str(Path(folder, file))

    alone = replace(args, suite=None, data_root=None, members=[], dataset=within(args.data_root), setting=setting)
    return replace(
        alone,
        output=within(args.output, f"{name}.json"),
        text_embeds=within(args.text_embeds, f"{name}.npy"),
        pictures=within(args.pictures),
        curves=within(args.curves),
    )


def finished(path: Path, stamp: Result) -> Result | None:
    """The result in the file, if it has the same checkpoint, data, flags and versions; else None."""
    result = unless_damaged(read_result, path) if path.exists() else None
    if result is None or not same_flags(result.get("settings", {}), stamp["settings"]):
        return None
    if any(result.get(name) != value for name, value in stamp.items() if name != "settings"):
        return None
    check_needed(result, NEEDED, path, RESULT_FILE)
    return result
