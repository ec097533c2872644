"""The paper's ablations in miniature: trainings over seeds, and tables of means, intervals and verdicts.

    zs3 ablation table5 table6 --seeds 0 1 2 3 4 --num_jobs 2 --output docs/results/scenes_tables.json

zs3/ablation/tables.py defines a table: trainings, ensembles of their evaluations, pairs to compare, and the numbers of
the paper. The command runs missing trainings and evaluations as commands of the project, each a process of one thread.
It resumes stopped jobs and repeats no finished job. Then it writes the tables (zs3/ablation/report.py) as JSON and
Markdown. A result counts even if its weights are gone, so seeds can run on several machines, and their folders can be
merged without final/ and checkpoints/. The files:

    OUTPUT_DIR/scenes                      the pictures, the same for all seeds (with --dataset scenes)
    OUTPUT_DIR/seed0/stage1, none, ...     one training each: final/, train.log, gzs3_off.json, gzs3_crops.json, ...,
                                           ensemble_weight.json if the weight is chosen
    OUTPUT_DIR/seed0/pseudo_labels         made with the stage-1 model of the seed
    OUTPUT_DIR/times.jsonl                 the seconds of each job, and the machine
"""

import shlex
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from zs3.ablation.jobs import SCENES, AblationArgs, Job, SeedRuns, by_name, make_jobs, read_training, trainings
from zs3.ablation.report import draw, report, summarise
from zs3.ablation.runner import has_ended, jobs_to_run, run_jobs, seconds_by_machine, versions_of
from zs3.ablation.statistics import LEVEL
from zs3.ablation.tables import ENSEMBLE_WEIGHT, MADE_LABELS, TRAININGS, Row, Sample
from zs3.command_line import InputError, read_arguments, run
from zs3.data.records import dataset_name, load_split
from zs3.evaluation.results import read_result
from zs3.files import check_here, lock_folder, write_report
from zs3.scenes.dataset import write_if_missing
from zs3.training.folder import differ, read_recipe
from zs3.typed_json import unless_damaged


def check_trained(runs: SeedRuns, name: str) -> int:
    """The steps of this training. Raises InputError if its model or results were made with other flags."""
    training, overrides = read_training(*runs.training_flags(name))
    folder = runs.folder / name
    if has_ended(folder) and (folder / "recipe.yaml").exists():
        before = by_name(read_recipe(folder / "recipe.yaml"))
        wanted = asdict(training) | {key: value for key, value in overrides.items() if not isinstance(value, dict)}
        changed = sorted(key for key, value in by_name(wanted).items() if key in before and differ(before[key], value))
        if changed:
            values = ", ".join(f"{key} {before[key]} (asked for: {wanted[key]})" for key in changed)
            start = TRAININGS[name].start
            alone = start is not None and (runs.folder / start / "final").exists()
            raise InputError(
                f"{folder} was made with {values}: ask for that again, delete {folder if alone else folder.parent}, or "
                "choose another --output_dir"
            )
    return training.max_steps


def check_nothing_is_trained_anew(runs: SeedRuns, planned: list[Job]) -> None:
    """Refuses to train a lost model again if results or models made from it exist: the new model would differ."""
    names, root = [job.name for job in planned if job.name.startswith(runs.named(""))], runs.folder.parent
    for name in TRAININGS:
        if runs.named(name) not in names:
            continue
        followers = [other for other, training in TRAININGS.items() if training.start == name]
        folder, *others = (runs.folder / one for one in (name, *followers))
        left = next(filter(has_ended, (folder, *others)), None)
        if left is not None:
            needed, left = folder.relative_to(root) / "final", left.relative_to(root)
            raise InputError(  # the last job of a seed is an evaluation
                f"{names[-1]}.json is missing and needs {needed}, now gone, although {left} was "
                f"made with it: bring one back, or delete {folder.parent if followers else folder}"
            )


def check_same_images(runs: SeedRuns, rows: Iterable[Row], count: int) -> None:
    """Raises InputError if an existing result has another number of images than the split of the seed's dataset."""
    for path in filter(Path.exists, map(runs.result, rows)):
        result = unless_damaged(read_result, path, ("split_images",))
        if result is not None and result["split_images"] != count:
            raise InputError(
                f"{path} is of {result['split_images']} {runs.args.split} images and {runs.data} has {count}: bring "
                "those images back, or delete it to evaluate again"
            )


def check_scripts(names: Iterable[str]) -> None:
    """Raises InputError if a module that a training runs is missing; it may lie outside the package."""
    made = {"benchmarks.made_labels" for name in names if TRAININGS[name].unseen_labels in MADE_LABELS}
    for module in made | {TRAININGS[name].scripts for name in names} - {None}:
        check_here(Path(*module.split(".")).with_suffix(".py"))


# ---- the command -------------------------------------------------------------------------------------------


def num_images(runs: SeedRuns) -> tuple[int, int]:
    """The numbers of images for training and for evaluation. Missing scenes are drawn."""
    args = runs.args
    if args.dataset == SCENES:
        write_if_missing(runs.data, args.num_train, args.num_validation, args.num_test)
    return len(load_split(runs.data, "train")), len(load_split(runs.data, args.split))


def between(counts: list[int]) -> int | str:
    """The number of images of every seed, or, as an example, "472 to 473"."""
    return counts[0] if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def main() -> None:
    args, _ = read_arguments(AblationArgs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # this exit ends the jobs, too
    with lock_folder(Path(args.output_dir)):
        make_all(args)


def make_all(args: AblationArgs) -> None:
    """Runs the missing jobs and writes the tables. This process has locked the folder."""
    tables = {name: args.known_tables[name] for name in args.table}
    rows = [row for table in tables.values() for row in table.rows]
    check_scripts(trainings(rows))
    steps = {name: check_trained(runs, name) for runs in args.runs for name in trainings(rows)}
    counts = [num_images(runs) for runs in args.runs]
    for runs, (_, num_evaluated) in zip(args.runs, counts, strict=True):
        check_same_images(runs, rows, num_evaluated)
    results = {row: [runs.result(row) for runs in args.runs] for row in rows}
    paths = {path for of_row in results.values() for path in of_row}
    jobs, times = make_jobs(args.runs, rows), Path(args.output_dir, "times.jsonl")
    planned = jobs_to_run(jobs)
    for runs in args.runs:
        check_nothing_is_trained_anew(runs, planned)
    run_jobs(planned, args.num_jobs, times)
    sample = Sample(tuple(args.seeds), args.label_space, args.split)
    result = {
        "command": shlex.join(["zs3", "ablation", *sys.argv[1:]]),
        "benchmark": dataset_name(str(args.runs[0].data if args.dataset == SCENES else args.dataset)),
        "synthetic": args.dataset == SCENES,
        "unit": "percent",
        "num_train": between([num_train for num_train, _ in counts]),
        "split": args.split,
        "num_evaluated": between([num_evaluated for _, num_evaluated in counts]),
        "label_space": args.label_space,
        "seeds": args.seeds,
        "level": LEVEL,
        "ensemble_weight": ENSEMBLE_WEIGHT,
        "steps": steps,
        "seconds": seconds_by_machine(jobs, times),
        "versions": versions_of(paths),
        "tables": {name: summarise(table, results, sample) for name, table in tables.items()},
    }
    path = Path(args.output or Path(args.output_dir, "tables.json"))
    text = report(result)
    print(text)
    write_report(path, result, text)
    if args.picture is not None:
        draw(result, Path(args.picture))
    print(f"tables    {path}, {path.with_suffix('.md')}")


if __name__ == "__main__":
    run(main)
