"""The paper's ablations in miniature: trainings over seeds, evaluations, one table of means, intervals and verdicts.

    python -m zs3.ablation table5 table6 --seeds 0 1 2 3 4 --processes 2 --result docs/results/scenes_tables.json

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

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from configuration_zs3 import Zs3Config, shortened
from zs3.ablation_report import LEVEL, draw, report, summarise
from zs3.ablation_tables import ENSEMBLE_WEIGHT, TRAININGS, VIEWS, Row, Table, make_tables
from zs3.checkpoints import WEIGHTS, weights_sha256
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFile,
    OutputFolder,
    Pictures,
    Processes,
    Seed,
    Some,
    beginning,
    flag,
    read_arguments,
    run,
)
from zs3.curves import check_matplotlib
from zs3.data import dataset_name, load_split
from zs3.ensemble_weight import WeightArgs, weight_settings
from zs3.files import append_line, file_sha256, lock_folder, write_report
from zs3.image_labels import read_settings
from zs3.results import read_answer, read_result
from zs3.run_folder import differ, read_recipe
from zs3.scenes import write_dataset
from zs3.typed_json import Amount, read_json_lines, unless_damaged

POLL_SECONDS = 0.1
SCENES = "scenes"
# Flags that may be paths; the weight of the ensemble was a number in older results.
PLACES = ("output_dir", "dataset", "init_from", "unseen_labels", "text_embeds", "model", "ensemble_weight")


@dataclass
class AblationArgs(Arguments):
    """Which tables, on what, and the sizes of what they are made from."""

    table: Some[str] = flag(["table5", "table6"], "Tables; the word --table may be left out where they come first.")
    benchmark: str = flag(SCENES, "'scenes', which are drawn, or the folder of a dataset.")
    stage1: str = flag("recipes/scenes_stage1.yaml", "Recipe of stage 1.")
    stage2: str = flag("recipes/scenes_stage2_ground_truth.yaml", "Recipe of stage 2; trainings add flags to it.")
    backbone: str | None = flag(None, "Backbone that stage 1 starts from, as of train.py.")
    text_embeds: str | None = flag(
        None, "Ready-made text vectors, as of train.py; rows that need a CLIP are left out then."
    )
    scripts: str | None = flag(
        None, "Module whose words `train` and `eval` stand for train.py and eval.py, as benchmarks.photographs."
    )
    seeds: Some[Seed] = flag([0, 1, 2], "One run of everything for each.")
    processes: Processes = flag(1, "Jobs side by side, each a process of one thread.")
    output_dir: OutputFolder = flag("runs/ablation", "Folder for everything the command makes but the tables.")
    num_train: Pictures = flag(3000, "Training scenes.")
    num_validation: Pictures = flag(200, "Validation scenes.")
    stage1_steps: Count | None = flag(None, "Default: the recipe's.")
    stage2_steps: Count | None = flag(None, "Default: the recipe's.")
    result: OutputFile | None = flag(None, "The tables (JSON), .md beside it; default: tables.json in --output_dir.")
    picture: OutputFile | None = flag(None, "Draw all scores over seeds into this PNG (needs matplotlib).")

    def check(self) -> None:
        unknown = [name for name in self.table if name not in self.known_tables]
        if unknown:
            raise InputError(
                f"no table is called {shortened(unknown[0], 30)}: the names are {', '.join(self.known_tables)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds must be distinct, got {shortened(self.seeds)}")
        if self.benchmark != SCENES and not Path(self.benchmark).is_dir():
            raise InputError(f"--benchmark {self.benchmark}: there is no such folder; 'scenes' are drawn")
        if self.result is not None and Path(self.result).suffix != ".json":
            raise InputError(f"--result {self.result} must be a file that ends in .json")
        if self.picture is not None:
            check_matplotlib("--picture")

    @cached_property
    def known_tables(self) -> dict[str, Table]:
        _, model = read_training("--config", self.stage2)
        return make_tables(clip=self.text_embeds is None, matching=model.get("matching", Zs3Config.matching))

    def run_folder(self, seed: int, name: str) -> Path:
        return Path(self.output_dir, f"seed{seed}", name)

    @property
    def data(self) -> Path:
        return Path(self.output_dir, SCENES) if self.benchmark == SCENES else Path(self.benchmark)

    def script(self, word: str, name: str) -> list[str]:
        """The command of train.py or eval.py for this training."""
        module = TRAININGS[name].scripts or self.scripts
        return [sys.executable, *([f"{word}.py"] if module is None else ["-m", module, word])]


# ---- jobs: what has to be run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command. The same command again goes on where it was stopped."""

    name: str
    command: list[str]
    log: Path
    is_done: Callable[[], bool]
    after: list[str]  # names of the jobs that must be done before


def trainings(rows: list[Row]) -> list[str]:
    """The trainings of these rows, those they start from, and stage 1 where pseudo labels are needed, in the order of
    TRAININGS."""
    used = {row.training for row in rows}
    used |= {start for name in used if (start := TRAININGS[name].start) is not None}
    used |= {"stage1" for row in rows if row.needs_pseudo_labels}
    return [name for name in TRAININGS if name in used]


def make_jobs(args: AblationArgs, rows: list[Row]) -> list[Job]:
    """All jobs behind these rows, done or not; a seed's before the next seed's, so that tables can be seen early."""
    jobs = []
    for seed in args.seeds:
        for name in trainings(rows):
            jobs.append(training_job(args, seed, name))
            if name == "stage1" and any(row.needs_pseudo_labels for row in rows):
                jobs.append(pseudo_label_job(args, seed))
            for row in dict.fromkeys(rows):
                if row.training == name:
                    jobs += [ensemble_weight_job(args, seed, row)] if row.is_chosen else []
                    jobs.append(evaluation_job(args, seed, row))
    return jobs


def training_flags(args: AblationArgs, seed: int, name: str) -> list[str]:
    training = TRAININGS[name]
    flags = ["--config", args.stage1 if training.start is None else args.stage2, "--dataset", str(args.data)]
    flags += ["--output_dir", str(args.run_folder(seed, name)), "--seed", str(seed)]
    if args.text_embeds is not None:
        flags += ["--text_embeds", args.text_embeds]
    if training.start is not None:
        flags += ["--init_from", str(args.run_folder(seed, training.start) / "final")]
    elif args.backbone is not None:
        flags += ["--backbone", args.backbone]
    flags += ["--unseen_labels", str(pseudo_labels_path(args, seed)) if training.told == "pseudo" else training.told]
    stages = [(args.stage1, args.stage1_steps), (args.stage2, args.stage2_steps)]
    if training.whole:
        steps = sum(steps or read_training("--config", recipe)[0].max_steps for recipe, steps in stages)
    else:
        _, steps = stages[0 if training.start is None else 1]
    if steps is not None:
        flags += ["--max_steps", str(steps)]
    return [*flags, *training.flags]


def read_training(*flags: str) -> tuple[Any, dict[str, Any]]:
    """TrainArgs and the fields of Zs3Config that these flags of train.py give."""
    from train import TrainArgs  # a script of the repository's root

    return read_arguments(TrainArgs, list(flags), Zs3Config)


def training_job(args: AblationArgs, seed: int, name: str) -> Job:
    training, folder = TRAININGS[name], args.run_folder(seed, name)
    after = [] if training.start is None else [f"seed{seed}/{training.start}"]
    after += [f"seed{seed}/pseudo_labels"] if training.told == "pseudo" else []
    return Job(
        name=f"seed{seed}/{name}",
        command=[*args.script("train", name), *training_flags(args, seed, name)],
        log=folder / "train.log",
        is_done=(folder / "final").exists,
        after=after,
    )


def pseudo_labels_path(args: AblationArgs, seed: int) -> Path:
    return args.run_folder(seed, "pseudo_labels")


def pseudo_label_job(args: AblationArgs, seed: int) -> Job:
    folder = pseudo_labels_path(args, seed)
    model = args.run_folder(seed, "stage1") / "final"

    def is_done() -> bool:
        """The summary is there, and the scores are of this checkpoint."""
        if not (folder / "summary.json").exists() or not model.exists():
            return False
        made_with = unless_damaged(read_settings, folder) or {}
        return made_with.get("checkpoint_sha256", {}).get(WEIGHTS) == weights_sha256(str(model))

    flags = ["--model", str(model), "--dataset", str(args.data), "--output", str(folder)]
    return Job(
        name=f"seed{seed}/pseudo_labels",
        command=[sys.executable, "-m", "zs3.pseudo_labels", *flags],
        log=folder / "pseudo_labels.log",
        is_done=is_done,
        after=[f"seed{seed}/stage1"],
    )


def result_path(args: AblationArgs, seed: int, row: Row) -> Path:
    return args.run_folder(seed, row.training) / f"gzs3_{row.view}.json"


def ensemble_weight_path(args: AblationArgs, seed: int, row: Row) -> Path:
    return args.run_folder(seed, row.training) / "ensemble_weight.json"


def ensemble_weight_job(args: AblationArgs, seed: int, row: Row) -> Job:
    """The choice of the ensemble's weight by what training may know."""
    path = ensemble_weight_path(args, seed, row)
    model = path.parent / "final"

    labels = str(pseudo_labels_path(args, seed)) if row.needs_pseudo_labels else "ground_truth"
    flags = ["--model", str(model), "--dataset", str(args.data), "--unseen_labels", labels, "--output", str(path)]
    asked, _ = read_arguments(WeightArgs, flags)

    def is_done() -> bool:
        """The answer is there, of these flags, and for this checkpoint, where that is still there."""
        if not path.exists():
            return False
        answer = unless_damaged(read_answer, path)
        return (
            answer is not None
            and by_name(answer.get("settings", {})) == by_name(weight_settings(asked))
            and (not model.exists() or answer.get("checkpoint_sha256") == weights_sha256(str(model)))
        )

    return Job(
        name=f"seed{seed}/{row.training}/{path.stem}",
        command=[sys.executable, "-m", "zs3.ensemble_weight", *flags],
        log=path.with_suffix(".log"),
        is_done=is_done,
        after=[f"seed{seed}/{row.training}", *([f"seed{seed}/pseudo_labels"] if row.needs_pseudo_labels else [])],
    )


def evaluation_job(args: AblationArgs, seed: int, row: Row) -> Job:
    from eval import EvalArgs, deciding_flags  # a script of the repository's root

    path = result_path(args, seed, row)
    model = path.parent / "final"
    flags = ["--model", str(model), "--dataset", str(args.data), "--output", str(path), *VIEWS[row.view].flags]
    if args.text_embeds is not None:
        flags += ["--text_embeds", args.text_embeds]
    weight = ensemble_weight_path(args, seed, row) if row.is_chosen else None
    if weight is not None:
        flags += ["--ensemble_weight", str(weight)]
    asked, _ = read_arguments(EvalArgs, flags)

    def is_done() -> bool:
        """The result is there, of these flags, on all images, and of the checkpoint and the chosen weight that are
        still there."""
        if not path.exists():
            return False
        needed = ("checkpoint_sha256", "num_images", "split_images", "settings")
        result = unless_damaged(read_result, path, needed)
        if result is None:
            return False
        given = result.get("given_sha256", {}).values()
        return (
            (not model.exists() or result["checkpoint_sha256"] == weights_sha256(str(model)))
            and result["num_images"] == result["split_images"]
            and (weight is None or not weight.exists() or file_sha256(weight) in given)
            and by_name(result["settings"]) == by_name(deciding_flags(asked))
        )

    return Job(
        name=f"seed{seed}/{row.training}/{path.stem}",
        command=[*args.script("eval", row.training), *flags],
        log=path.with_suffix(".log"),
        is_done=is_done,
        after=[f"seed{seed}/{row.training}", *([f"seed{seed}/{row.training}/{weight.stem}"] if weight else [])],
    )


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """With the last parts of paths alone: what lies elsewhere, or is spelled another way, is the same."""
    return {name: Path(str(value)).name if name in PLACES and value else value for name, value in settings.items()}


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


def has_ended(folder: Path) -> bool:
    """Whether this training has left a model or results."""
    return (folder / "final").exists() or any(folder.glob("gzs3_*.json"))


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


# ---- the runner --------------------------------------------------------------------------------------------


class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float  # of time.monotonic


def jobs_to_run(jobs: list[Job]) -> list[Job]:
    """The evaluations that are not done, and of what they need what is not done either.

    jobs: in an order in which each stands after those it waits for.
    """
    wanted = {job.name for job in jobs} - {name for job in jobs for name in job.after}
    planned = []
    for job in reversed(jobs):
        if job.name in wanted and not job.is_done():
            planned.append(job)
            wanted |= set(job.after)
    return planned[::-1]


def run_jobs(jobs: list[Job], processes: int, times: Path) -> None:
    """Runs what is not done, at most `processes` at once, each job after those it waits for, in the order given.

    A job that fails ends the others, who go on from their last checkpoint when the same command comes again.
    times: JSON lines, to which the seconds of every job are added, also where it was stopped.
    """
    waiting = {job.name: job for job in jobs}
    running: dict[str, Running] = {}
    with tqdm(total=len(jobs), unit="job", disable=not jobs) as bar:
        try:
            while waiting or running:
                before = list(running)
                for name, one in list(running.items()):
                    if one.process.poll() is not None:
                        del running[name]
                        note_time(times, one)
                        check_ended(one.job, one.process.returncode)
                        bar.update()
                for name, job in list(waiting.items()):
                    if len(running) == processes:
                        break
                    if any(other in waiting or other in running for other in job.after):
                        continue
                    if job.is_done():
                        bar.update()
                    else:
                        running[name] = Running(job, start(job), time.monotonic())
                    del waiting[name]
                if list(running) != before:
                    bar.set_postfix_str(", ".join(running))
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for one in running.values():
                one.process.terminate()
            for one in running.values():
                one.process.wait()
                note_time(times, one)


def note_time(times: Path, one: Running) -> None:
    row = {"job": one.job.name, "seconds": round(time.monotonic() - one.began, 1), "machine": machine()}
    append_line(times, json.dumps(row))


class Timed(TypedDict):
    """A line of times.jsonl."""

    job: str
    seconds: Amount
    machine: str


def seconds_by_machine(jobs: list[Job], times: Path) -> dict[str, float] | None:
    """Of these jobs, all their starts counted; None where a training has left no time. A line that is there twice, as
    of files that were joined twice, counts once."""
    rows = read_json_lines(times, Timed, "list of the times of jobs", "delete the line") if times.exists() else []
    rows = {json.dumps(row): row for row in rows}.values()
    if not {job.name for job in jobs if job.log.name == "train.log"} <= {row["job"] for row in rows}:
        return None
    names, seconds = {job.name for job in jobs}, defaultdict(float)
    for row in rows:
        if row["job"] in names:
            seconds[row["machine"]] += row["seconds"]
    return {machine: round(total, 1) for machine, total in seconds.items()}


def versions_of(results: Iterable[Path]) -> dict[str, list[str]]:
    """By package, those that the evaluations ran with."""
    found = defaultdict(set)
    for path in results:
        for name, number in read_result(path, ("versions",))["versions"].items():
            found[name].add(number)
    return {name: sorted(numbers) for name, numbers in found.items()}


def start(job: Job) -> subprocess.Popen:
    """The log is locked as long as the job lives, even if this command was killed before: none is run twice at once."""
    import fcntl  # not there on Windows

    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process inherits the open file, and the lock with it
        except BlockingIOError as error:
            raise InputError(f"{job.name} is running already, it writes {job.log}: let it end, or end it") from error
        return subprocess.Popen(job.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def check_ended(job: Job, code: int) -> None:
    if code == 0 and job.is_done():
        return
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    how = f"failed with exit code {code}" if code else "ended without its result"
    raise InputError(
        f"{job.name} {how}, see {job.log} ({beginning(last, 70)}); once mended, the same command goes on from here"
    )


# ---- the command -------------------------------------------------------------------------------------------


def prepare_data(args: AblationArgs) -> tuple[int, int]:
    """How many images there are for training and validation."""
    if args.benchmark == SCENES and not args.data.exists():
        write_dataset(args.data, args.num_train, args.num_validation, seed=0)
    counts = (len(load_split(args.data, "train")), len(load_split(args.data, "validation")))
    if args.benchmark == SCENES and counts != (args.num_train, args.num_validation):
        raise InputError(f"{args.data} holds {counts[0]} and {counts[1]} scenes: choose another --output_dir")
    return counts


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU with {os.cpu_count()} threads"


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--table", *argv]
    args, _ = read_arguments(AblationArgs, argv)
    args.check()
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
    run_jobs(planned, args.processes, times)
    result = {
        "command": shlex.join(["python", "-m", "zs3.ablation", *sys.argv[1:]]),
        "benchmark": dataset_name(str(args.data)),
        "synthetic": args.benchmark == SCENES,
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
    path = Path(args.result or Path(args.output_dir, "tables.json"))
    text = report(result)
    print(text)
    write_report(path, result, text)
    if args.picture is not None:
        draw(result, Path(args.picture))
    print(f"tables    {path}, {path.with_suffix('.md')}")


if __name__ == "__main__":
    run(main)
