"""The paper's ablations in miniature: trainings over seeds, evaluations, one table of means, intervals and verdicts.

    python -m zs3.ablation table4 table5 --seeds 0 1 2 --processes 2 --result docs/results/scenes_tables.json

A table is data (`TABLES`): which trainings (`ROWS`), looked at with which ensemble, which pairs are compared, and
what the paper has there. The command runs what is missing through the project's own commands, each a process of one
thread, goes on with what was stopped, repeats nothing that is there, and writes the tables as JSON and Markdown.
Everything of a seed lies in one folder:

    OUTPUT_DIR/scenes                      the pictures, the same for all seeds
    OUTPUT_DIR/seed0/stage1, none, ...     one training each: final/, train.log, gzs3_off.json, gzs3_crops.json, ...
    OUTPUT_DIR/seed0/pseudo_labels         of that seed's stage-1 model

Scores, intervals and differences are in percent here, in the JSON and in the Markdown.
"""

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import yaml
from scipy import stats
from tqdm.auto import tqdm

from configuration_zs3 import Zs3Config
from zs3.checkpoints import WEIGHTS, weights_sha256
from zs3.command_line import InputError, check_at_least, flag, read_arguments, run, write_report
from zs3.data import load_split
from zs3.evaluation import SCORES, GeneralizedScores
from zs3.scenes import write_dataset

LEVEL = 0.95  # of the intervals over seeds
ENSEMBLE_WEIGHT = Zs3Config.clip_ensemble_weight  # the paper's for COCO-Stuff; the recipes' models have none
POLL_SECONDS = 0.1
VIEWS = {"off": "off", "crops": "on, crops", "single_pass": "on, single pass"}  # lazy is crops, to the pixel
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "scipy")


@dataclass
class AblationArgs:
    """Which tables, and the sizes of what they are made from."""

    table: list[str] = flag(["table4", "table5"], "Tables; the word --table may be left out where they come first.")
    benchmark: Literal["scenes"] = flag("scenes", "The benchmark.")
    seeds: list[int] = flag([0, 1, 2], "One run of everything for each.")
    processes: int = flag(1, "Jobs side by side, each a process of one thread.")
    output_dir: str = flag("runs/ablation", "Folder for everything the command makes but the tables.")
    num_train: int = flag(3000, "Training scenes.")
    num_validation: int = flag(200, "Validation scenes.")
    stage1_steps: int | None = flag(None, "Default: the recipe's.")
    stage2_steps: int | None = flag(None, "Default: the recipe's.")
    result: str | None = flag(None, "The tables (JSON), .md beside it; default: tables.json in --output_dir.")

    def check(self) -> None:
        unknown = [name for name in self.table if name not in TABLES]
        if unknown:
            raise InputError(f"no table is called {unknown[0]!r}: the names are {', '.join(TABLES)}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"--seeds must be distinct and 0 or more, got {self.seeds}")
        check_at_least(self, 1, "processes", "num_train", "num_validation", "stage1_steps", "stage2_steps")

    def run_folder(self, seed: int, name: str) -> Path:
        return Path(self.output_dir, f"seed{seed}", name)

    @property
    def data(self) -> Path:
        return Path(self.output_dir, self.benchmark)


# ---- the tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training: a recipe, and the flags of train.py beside it."""

    title: str
    recipe: str
    flags: tuple[str, ...] = ()
    stage: Literal[1, 2] = 2  # 2 starts from the same seed's stage 1
    pseudo_labels: bool = False  # is told those made with the same seed's stage 1


ROWS = {
    "stage1": Row("stage 1", "scenes_stage1.yaml", stage=1),
    "none": Row("no unseen labels", "scenes_stage2_none.yaml"),
    "pseudo": Row("pseudo unseen labels", "scenes_stage2_pseudo.yaml", pseudo_labels=True),
    "ground_truth": Row("ground-truth unseen labels", "scenes_stage2_ground_truth.yaml"),
}


class Line(NamedTuple):
    """One line of a table: a training and the ensemble it is evaluated with."""

    row: str  # of ROWS
    view: str  # of VIEWS


class Difference(NamedTuple):
    """line - minus, paired by seed."""

    line: Line
    minus: Line
    paper: GeneralizedScores  # the paper's difference, in percentage points

    @property
    def title(self) -> str:
        row, other = ROWS[self.line.row].title, ROWS[self.minus.row].title
        if row == other:
            return f"{row}: ensemble {VIEWS[self.line.view]} − {VIEWS[self.minus.view]}"
        return f"{row} − {other}"


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    lines: list[Line]
    differences: list[Difference]
    paper: dict[Line, GeneralizedScores] = field(default_factory=dict)  # where the paper has such a line; percent


def gain(before: GeneralizedScores, after: GeneralizedScores) -> GeneralizedScores:
    return GeneralizedScores(*(a - b for a, b in zip(after, before, strict=True)))


# Tables 4 and 5 of the paper, COCO-Stuff, percent. Table 5's pseudo labels are Table 4's model with the ensemble on.
PAPER_NONE = GeneralizedScores(40.1, 25.3, 31.0)
PAPER_PSEUDO = GeneralizedScores(38.6, 42.0, 40.2)
PAPER_GROUND_TRUTH = GeneralizedScores(39.0, 52.2, 44.7)
PAPER_PSEUDO_ENSEMBLE_OFF = GeneralizedScores(37.2, 35.5, 36.4)

TABLES = {
    "table4": Table(
        "Table 4: the ensemble with CLIP",
        f"The weight is {ENSEMBLE_WEIGHT}, the paper's for COCO-Stuff. The paper has one pair, of the model trained "
        "with pseudo labels; its sign is asked of every training here.",
        [Line(row, view) for row in ROWS for view in VIEWS],
        [
            Difference(Line(row, view), Line(row, "off"), gain(PAPER_PSEUDO_ENSEMBLE_OFF, PAPER_PSEUDO))
            for row in ROWS
            for view in ("crops", "single_pass")
        ],
        {Line("pseudo", "off"): PAPER_PSEUDO_ENSEMBLE_OFF, Line("pseudo", "crops"): PAPER_PSEUDO},
    ),
    "table5": Table(
        "Table 5: what training is told of unseen classes",
        "The ensemble is off here. In the paper it is on, at least in the row of pseudo labels: that one is Table 4's "
        "with the ensemble.",
        [Line("none", "off"), Line("pseudo", "off"), Line("ground_truth", "off")],
        [
            Difference(Line("pseudo", "off"), Line("none", "off"), gain(PAPER_NONE, PAPER_PSEUDO)),
            Difference(Line("ground_truth", "off"), Line("none", "off"), gain(PAPER_NONE, PAPER_GROUND_TRUTH)),
        ],
        {
            Line("none", "off"): PAPER_NONE,
            Line("pseudo", "off"): PAPER_PSEUDO,
            Line("ground_truth", "off"): PAPER_GROUND_TRUTH,
        },
    ),
}


# ---- jobs: what has to be run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command. The same command again goes on where it was stopped."""

    name: str
    command: list[str]
    log: Path
    is_done: Callable[[], bool]
    after: list[str]  # names of the jobs that must be done before


def make_jobs(args: AblationArgs, lines: list[Line]) -> list[Job]:
    """All jobs behind these lines, done or not; a seed's before the next seed's, so that tables can be seen early."""
    jobs = []
    for seed in args.seeds:
        used = [name for name in ROWS if any(line.row == name for line in lines)]
        needed = [name for name in ROWS if name in used or name == "stage1"]  # every other row starts from it
        for name in needed:
            if ROWS[name].pseudo_labels:
                jobs.append(pseudo_label_job(args, seed))
            jobs.append(training_job(args, seed, name))
            jobs += [evaluation_job(args, seed, line) for line in dict.fromkeys(lines) if line.row == name]
    return jobs


def training_flags(args: AblationArgs, seed: int, name: str) -> list[str]:
    row, stage1 = ROWS[name], args.run_folder(seed, "stage1")
    flags = ["--config", f"recipes/{row.recipe}", "--dataset", str(args.data)]
    flags += ["--output_dir", str(args.run_folder(seed, name)), "--seed", str(seed)]
    if row.stage == 2:
        flags += ["--init_from", str(stage1 / "final")]
    if row.pseudo_labels:
        flags += ["--unseen_labels", str(args.run_folder(seed, "pseudo_labels"))]
    steps = args.stage1_steps if row.stage == 1 else args.stage2_steps
    if steps is not None:
        flags += ["--max_steps", str(steps)]
    return [*flags, *row.flags]


def training_job(args: AblationArgs, seed: int, name: str) -> Job:
    row, folder = ROWS[name], args.run_folder(seed, name)
    after = [f"seed{seed}/stage1"] if row.stage == 2 else []
    after += [f"seed{seed}/pseudo_labels"] if row.pseudo_labels else []
    return Job(
        name=f"seed{seed}/{name}",
        command=[sys.executable, "train.py", *training_flags(args, seed, name)],
        log=folder / "train.log",
        is_done=(folder / "final").exists,
        after=after,
    )


def pseudo_label_job(args: AblationArgs, seed: int) -> Job:
    folder = args.run_folder(seed, "pseudo_labels")
    model = args.run_folder(seed, "stage1") / "final"

    def is_done() -> bool:
        """The summary is there, and the scores are of this checkpoint."""
        if not (folder / "summary.json").exists():
            return False
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return settings["checkpoint_sha256"].get(WEIGHTS) == weights_sha256(str(model))

    flags = ["--model", str(model), "--dataset", str(args.data), "--output", str(folder)]
    return Job(
        name=f"seed{seed}/pseudo_labels",
        command=[sys.executable, "-m", "zs3.pseudo_labels", *flags],
        log=folder / "pseudo_labels.log",
        is_done=is_done,
        after=[f"seed{seed}/stage1"],
    )


def result_path(args: AblationArgs, seed: int, line: Line) -> Path:
    return args.run_folder(seed, line.row) / f"gzs3_{line.view}.json"


def evaluation_job(args: AblationArgs, seed: int, line: Line) -> Job:
    path = result_path(args, seed, line)
    model = path.parent / "final"
    flags = ["--model", str(model), "--dataset", str(args.data), "--output", str(path)]
    flags += ["--ensemble", line.view]
    if line.view != "off":
        flags += ["--ensemble_weight", str(ENSEMBLE_WEIGHT)]

    def is_done() -> bool:
        """The result is there, and of this checkpoint."""
        if not path.exists():
            return False
        result = json.loads(path.read_text(encoding="utf-8"))
        wanted = {
            "checkpoint_sha256": weights_sha256(str(model)),
            "num_images": args.num_validation,
            "clip_ensemble": line.view,
            "clip_ensemble_weight": None if line.view == "off" else ENSEMBLE_WEIGHT,
        }
        return all(result.get(name) == value for name, value in wanted.items())

    return Job(
        name=f"seed{seed}/{line.row}/{path.stem}",
        command=[sys.executable, "eval.py", *flags],
        log=path.with_suffix(".log"),
        is_done=is_done,
        after=[f"seed{seed}/{line.row}"],
    )


def check_trained(args: AblationArgs, seed: int, name: str) -> int:
    """Steps of this training. One that is there must have been made with the flags of today."""
    from train import TrainArgs  # a script of the repository's root

    training, overrides = read_arguments(TrainArgs, training_flags(args, seed, name), Zs3Config)
    folder = args.run_folder(seed, name)
    if (folder / "final").exists() and (folder / "recipe.yaml").exists():
        before = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        wanted = asdict(training) | {key: value for key, value in overrides.items() if not isinstance(value, dict)}
        changed = sorted(key for key, value in wanted.items() if key in before and before[key] != value)
        if changed:
            old = folder.parent if name == "stage1" else folder  # all of a seed starts from its stage 1
            raise InputError(
                f"{folder} holds a run with another {', '.join(changed)}: delete {old}, or choose another --output_dir"
            )
    return training.max_steps


# ---- the runner --------------------------------------------------------------------------------------------


def run_jobs(jobs: list[Job], processes: int) -> None:
    """Runs what is not done, at most `processes` at once, each job after those it waits for, in the order given.

    A job that fails ends the others, who go on from their last checkpoint when the same command comes again.
    """
    waiting = {job.name: job for job in jobs}
    running: dict[str, tuple[Job, subprocess.Popen]] = {}
    with tqdm(total=len(jobs), unit="job") as bar:
        try:
            while waiting or running:
                before = list(running)
                for name, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        check_ended(job, process.returncode)
                        bar.update()
                for name, job in list(waiting.items()):
                    if len(running) == processes:
                        break
                    if any(other in waiting or other in running for other in job.after):
                        continue
                    if job.is_done():
                        bar.update()
                    else:
                        running[name] = (job, start(job))
                    del waiting[name]
                if list(running) != before:
                    bar.set_postfix_str(", ".join(running))
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()


def start(job: Job) -> subprocess.Popen:
    """The log is locked as long as the job lives, even if this command was killed before: none is run twice at once."""
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
    raise InputError(f"{job.name} {how}, see {job.log} ({last[:200]}); once mended, the same command goes on from here")


# ---- the statistics, in percent ----------------------------------------------------------------------------


def t_interval(values: list[float]) -> tuple[float, float]:
    """Of the mean, at LEVEL, by Student's t with n - 1 degrees of freedom; NaN for fewer than 2 values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def over_seeds(values: list[float]) -> dict:
    return {"mean": float(np.mean(values)), "interval": list(t_interval(values)), "seeds": values}


def verdict(interval: list[float], paper: float) -> str:
    """paper: its difference; its sign alone counts."""
    low, high = interval
    if math.isnan(low):
        return "no interval"
    if low <= 0 <= high:
        return "no difference"
    return "same sign as the paper" if (low > 0) == (paper > 0) else "opposite"


def read_scores(args: AblationArgs, line: Line) -> dict[str, list[float]]:
    """By score, one value a seed; NaN where the split had no such class."""
    results = [json.loads(result_path(args, seed, line).read_text(encoding="utf-8")) for seed in args.seeds]
    return {
        name: [math.nan if result[name] is None else 100 * result[name] for result in results]
        for name in GeneralizedScores._fields
    }


def summarise(args: AblationArgs, table: Table) -> dict:
    scores = {line: read_scores(args, line) for line in table.lines}
    lines = [
        {
            "training": line.row,
            "ensemble": line.view,
            "scores": {name: over_seeds(values) for name, values in scores[line].items()},
            "paper": table.paper[line]._asdict() if line in table.paper else None,
        }
        for line in table.lines
    ]
    differences = []
    for difference in table.differences:
        found = {}
        for name, its in difference.paper._asdict().items():
            pairs = zip(scores[difference.line][name], scores[difference.minus][name], strict=True)
            found[name] = over_seeds([a - b for a, b in pairs])
            found[name] |= {"paper": round(its, 1), "verdict": verdict(found[name]["interval"], its)}
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
    text = [f"## {table['title']}", "", table["note"], ""]
    text.append(f"| training | ensemble | {' | '.join(SCORE_TITLES.values())} | the paper's |")
    text.append("|---|---|---|---|---|---|")
    for line in table["lines"]:
        cells = [ROWS[line["training"]].title, VIEWS[line["ensemble"]]]
        cells += [f"{plus_minus(line['scores'][name])} ({each_seed(line['scores'][name])})" for name in SCORE_TITLES]
        cells.append(" / ".join(f"{line['paper'][name]:.1f}" for name in SCORE_TITLES) if line["paper"] else "")
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "| difference | score | mean | every seed | the paper's | verdict |", "|---|---|---|---|---|---|"]
    for difference in table["differences"]:
        for name, title in SCORE_TITLES.items():
            score = difference["scores"][name]
            cells = [difference["title"], title, plus_minus(score, "+")]
            cells += [each_seed(score, "+"), f"{score['paper']:+.1f}", score["verdict"]]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def report(result: dict) -> str:
    """The Markdown file."""
    steps = ", ".join(f"{ROWS[name].title}: {count}" for name, count in result["steps"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    head = f"""# Tables of the paper in miniature

    {result["command"]}

The benchmark `{result["benchmark"]}` is synthetic: {result["num_train"]} training and {result["num_validation"]} \
validation scenes, drawn by this project. The paper's numbers are those of COCO-Stuff, to compare signs with, not sizes.

Every score is in percent, on the validation scenes with all names as candidates (gzs3): the mean over seeds {seeds} ± \
half of its 95 % t-interval, and in brackets every seed. A seed decides weights, order, augmentation and points of \
both stages; the scenes are the same. Differences are paired by seed, in percentage points. "No difference": their \
interval holds 0.

Training steps: {steps}. Versions: {", ".join(f"{name} {number}" for name, number in result["versions"].items())}.
"""
    return "\n".join([head, *(table_text(table) for table in result["tables"].values())])


# ---- the command -------------------------------------------------------------------------------------------


def prepare_data(args: AblationArgs) -> None:
    if not args.data.exists():
        write_dataset(args.data, args.num_train, args.num_validation, seed=0)
    counts = (len(load_split(args.data, "train")), len(load_split(args.data, "validation")))
    if counts != (args.num_train, args.num_validation):
        raise InputError(f"{args.data} holds {counts[0]} and {counts[1]} scenes: choose another --output_dir")


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--table", *argv]
    args, _ = read_arguments(AblationArgs, argv)
    args.check()
    if not Path("train.py").exists():
        raise InputError("train.py is not here: start the ablation from the root of the repository")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends the jobs, too

    tables = {name: TABLES[name] for name in args.table}
    lines = [line for table in tables.values() for line in table.lines]
    trained = [name for name in ROWS if name == "stage1" or any(line.row == name for line in lines)]
    steps = {name: check_trained(args, seed, name) for seed in args.seeds for name in trained}
    prepare_data(args)
    run_jobs(make_jobs(args, lines), args.processes)

    result = {
        "command": shlex.join(["python", "-m", "zs3.ablation", *sys.argv[1:]]),
        "benchmark": args.benchmark,
        "synthetic": True,
        "unit": "percent",
        "num_train": args.num_train,
        "num_validation": args.num_validation,
        "seeds": args.seeds,
        "level": LEVEL,
        "ensemble_weight": ENSEMBLE_WEIGHT,
        "steps": steps,
        "versions": {name: version(name) for name in PACKAGES},
        "tables": {name: summarise(args, table) for name, table in tables.items()},
    }
    path = Path(args.result or Path(args.output_dir, "tables.json"))
    text = report(result)
    write_report(path, result, text)
    print(text)
    print(f"tables    {path}, {path.with_suffix('.md')}")


if __name__ == "__main__":
    run(main)
