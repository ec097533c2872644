"""The paper's ablations in miniature: trainings over seeds, evaluations, one table of means, intervals and verdicts.

    zs3 ablation table5 table6 --seeds 0 1 2 3 4 --num_jobs 2 --output docs/results/scenes_tables.json

A table is data (zs3/ablation_tables.py): which trainings (`TRAININGS`), looked at with which ensemble (`VIEWS`), which
pairs are compared, and what the paper has there. The command runs what is missing through the project's own commands,
each a process of one thread, goes on with what was stopped, repeats nothing that is there, and writes what
zs3/ablation_report.py makes of it, as JSON and Markdown. Results stand where the weights are gone, so that seeds can be
run on several machines and brought together without final/ and checkpoints/. Where things lie:

    OUTPUT_DIR/scenes                      the pictures, the same for all seeds; of another benchmark its own folder
    OUTPUT_DIR/seed0/stage1, none, ...     one training each: final/, train.log, gzs3_off.json, gzs3_crops.json, ...,
                                           ensemble_weight.json where that is chosen
    OUTPUT_DIR/seed0/pseudo_labels         of that seed's stage-1 model
    OUTPUT_DIR/times.jsonl                 how long each job took, and on what
"""

import shlex
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from zs3.ablation.jobs import (
    SCENES,
    AblationArgs,
    Job,
    by_name,
    make_jobs,
    read_training,
    result_path,
    training_flags,
    trainings,
)
from zs3.ablation.report import LEVEL, draw, report, summarise
from zs3.ablation.runner import has_ended, jobs_to_run, run_jobs, seconds_by_machine, versions_of
from zs3.ablation.tables import ENSEMBLE_WEIGHT, TRAININGS, Row
from zs3.command_line import InputError, read_arguments, run
from zs3.data.records import dataset_name, load_split
from zs3.evaluation.results import read_result
from zs3.files import lock_folder, write_report
from zs3.scenes.dataset import write_dataset
from zs3.training.folder import differ, read_recipe
from zs3.typed_json import unless_damaged


def check_trained(args: AblationArgs, seed: int, name: str) -> int:
    """Steps of this training. One that is there, or has left results, must have been made with the flags of today."""
    training, overrides = read_training(*training_flags(args, seed, name))
    folder = args.run_folder(seed, name)
    if has_ended(folder) and (folder / "recipe.yaml").exists():
        before = by_name(read_recipe(folder / "recipe.yaml"))
        wanted = asdict(training) | {key: value for key, value in overrides.items() if not isinstance(value, dict)}
        changed = sorted(key for key, value in by_name(wanted).items() if key in before and differ(before[key], value))
        if changed:
            values = ", ".join(f"{key} {before[key]} (asked for: {wanted[key]})" for key in changed)
            start = TRAININGS[name].start
            alone = start is not None and (args.run_folder(seed, start) / "final").exists()
            raise InputError(
                f"{folder} was made with {values}: ask for that again, delete {folder if alone else folder.parent}, or "
                "choose another --output_dir"
            )
    return training.max_steps


def check_nothing_is_trained_anew(args: AblationArgs, planned: list[Job]) -> None:
    """A model that is gone, but has left results or models that started from it, is not trained again: the new one
    would be another."""
    names = {job.name for job in planned}
    for seed in args.seeds:
        of_seed = [job for job in planned if job.name.startswith(f"seed{seed}/")]  # the last is an evaluation
        for name in TRAININGS:
            if f"seed{seed}/{name}" not in names:
                continue
            followers = [other for other, training in TRAININGS.items() if training.start == name]
            folder, *others = (args.run_folder(seed, one) for one in (name, *followers))
            left = next(filter(has_ended, (folder, *others)), None)
            if left is not None:
                needed, left = folder.relative_to(args.output_dir) / "final", left.relative_to(args.output_dir)
                raise InputError(
                    f"{of_seed[-1].name}.json is missing and needs {needed}, now gone, although {left} was "
                    f"made with it: bring one back, or delete {folder.parent if followers else folder}"
                )


def check_same_images(results: Iterable[Path], args: AblationArgs, num_validation: int) -> None:
    """Results that are there, also from another machine, must be of as many images as are there."""
    for path in filter(Path.exists, results):
        result = unless_damaged(read_result, path, ("split_images",))
        count = num_validation if result is None else result["split_images"]
        if count != num_validation:
            raise InputError(
                f"{path} is of {count} validation images and {args.data} has {num_validation}: bring those images "
                "back, or delete it to evaluate again"
            )


# ---- the command -------------------------------------------------------------------------------------------


def prepare_data(args: AblationArgs) -> tuple[int, int]:
    """How many images there are for training and validation."""
    if args.dataset == SCENES and not args.data.exists():
        write_dataset(args.data, args.num_train, args.num_validation, seed=0)
    counts = (len(load_split(args.data, "train")), len(load_split(args.data, "validation")))
    if args.dataset == SCENES and counts != (args.num_train, args.num_validation):
        raise InputError(f"{args.data} holds {counts[0]} and {counts[1]} scenes: choose another --output_dir")
    return counts


def main() -> None:
    args, _ = read_arguments(AblationArgs)
    if not Path("train.py").exists():
        raise InputError("train.py is not here: start the ablation from the root of the repository")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends the jobs, too
    with lock_folder(Path(args.output_dir)):
        make_all(args)


def make_all(args: AblationArgs) -> None:
    """What is not done yet, and the tables, into a folder that is nobody else's now."""
    tables = {name: args.known_tables[name] for name in args.table}
    rows = [row for table in tables.values() for row in table.rows]
    steps = {name: check_trained(args, seed, name) for seed in args.seeds for name in trainings(rows)}
    num_train, num_validation = prepare_data(args)

    def result_paths(row: Row) -> list[Path]:
        return [result_path(args, seed, row) for seed in args.seeds]

    results = {path for row in rows for path in result_paths(row)}
    check_same_images(results, args, num_validation)
    jobs, times = make_jobs(args, rows), Path(args.output_dir, "times.jsonl")
    planned = jobs_to_run(jobs)
    check_nothing_is_trained_anew(args, planned)
    run_jobs(planned, args.num_jobs, times)
    result = {
        "command": shlex.join(["zs3", "ablation", *sys.argv[1:]]),
        "benchmark": dataset_name(str(args.data)),
        "synthetic": args.dataset == SCENES,
        "unit": "percent",
        "num_train": num_train,
        "num_validation": num_validation,
        "seeds": args.seeds,
        "level": LEVEL,
        "ensemble_weight": ENSEMBLE_WEIGHT,
        "steps": steps,
        "seconds": seconds_by_machine(jobs, times),
        "versions": versions_of(results),
        "tables": {name: summarise(table, result_paths) for name, table in tables.items()},
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
