"""The paper's ablations in miniature: trainings over seeds, evaluations, one table of means, intervals and verdicts.

    python -m zs3.ablation table5 table6 --seeds 0 1 2 3 4 --processes 2 --result docs/results/scenes_tables.json

A table is data (`make_tables`): which trainings (`ROWS`), looked at with which ensemble (`VIEWS`), which pairs are
compared, and what the paper has there. The command runs what is missing through the project's own commands, each a
process of one thread, goes on with what was stopped, repeats nothing that is there, and writes the tables as JSON and
Markdown. Everything of a seed lies in one folder:

    OUTPUT_DIR/scenes                      the pictures, the same for all seeds; of another benchmark its own folder
    OUTPUT_DIR/seed0/stage1, none, ...     one training each: final/, train.log, gzs3_off.json, gzs3_crops.json, ...
    OUTPUT_DIR/seed0/pseudo_labels         of that seed's stage-1 model
    OUTPUT_DIR/times.jsonl                 how long each job took

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
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from scipy import stats
from tqdm.auto import tqdm

from configuration_zs3 import Zs3Config
from zs3.checkpoints import WEIGHTS, weights_sha256
from zs3.command_line import InputError, check_at_least, flag, read_arguments, run, write_report
from zs3.data import dataset_name, load_split
from zs3.evaluation import SCORES, GeneralizedScores
from zs3.results import table as markdown_table
from zs3.run_folder import differ
from zs3.scenes import write_dataset

LEVEL = 0.95  # of the intervals over seeds
ENSEMBLE_WEIGHT = Zs3Config.clip_ensemble_weight  # the paper's for COCO-Stuff; the recipes' models have none
POLL_SECONDS = 0.1
SCENES = "scenes"
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "scipy")


@dataclass
class AblationArgs:
    """Which tables, on what, and the sizes of what they are made from."""

    table: list[str] = flag(["table5", "table6"], "Tables; the word --table may be left out where they come first.")
    benchmark: str = flag(SCENES, "'scenes', which are drawn, or the folder of a dataset.")
    stage1: str = flag("recipes/scenes_stage1.yaml", "Recipe of stage 1.")
    stage2: str = flag(
        "recipes/scenes_stage2_ground_truth.yaml", "Recipe of stage 2; rows differ from it by what they are called."
    )
    backbone: str | None = flag(None, "Backbone that stage 1 starts from, as of train.py.")
    text_embeds: str | None = flag(
        None, "Ready-made text vectors, as of train.py: no rows without prompts then, no pseudo labels and no ensemble."
    )
    scripts: str | None = flag(
        None, "Module whose words `train` and `eval` stand for train.py and eval.py, as benchmarks.photographs."
    )
    seeds: list[int] = flag([0, 1, 2], "One run of everything for each.")
    processes: int = flag(1, "Jobs side by side, each a process of one thread.")
    output_dir: str = flag("runs/ablation", "Folder for everything the command makes but the tables.")
    num_train: int = flag(3000, "Training scenes.")
    num_validation: int = flag(200, "Validation scenes.")
    stage1_steps: int | None = flag(None, "Default: the recipe's.")
    stage2_steps: int | None = flag(None, "Default: the recipe's.")
    result: str | None = flag(None, "The tables (JSON), .md beside it; default: tables.json in --output_dir.")

    def check(self) -> None:
        names = make_tables(clip=self.text_embeds is None)
        unknown = [name for name in self.table if name not in names]
        if unknown:
            raise InputError(f"no table is called {unknown[0]!r}: the names are {', '.join(names)}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"--seeds must be distinct and 0 or more, got {self.seeds}")
        check_at_least(self, 1, "processes", "num_train", "num_validation", "stage1_steps", "stage2_steps")
        if self.benchmark != SCENES and not Path(self.benchmark).is_dir():
            raise InputError(f"--benchmark {self.benchmark}: there is no such folder; 'scenes' are drawn")

    def run_folder(self, seed: int, name: str) -> Path:
        return Path(self.output_dir, f"seed{seed}", name)

    @property
    def data(self) -> Path:
        return Path(self.output_dir, SCENES) if self.benchmark == SCENES else Path(self.benchmark)

    def script(self, word: str, row: str) -> list[str]:
        """The command of train.py or eval.py for this row."""
        module = ROWS[row].scripts or self.scripts
        return [sys.executable, *([f"{word}.py"] if module is None else ["-m", module, word])]


# ---- the rows: trainings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training: flags of train.py beside the recipe of its stage.

    start: the row whose model it starts from; None: it has the recipe of stage 1.
    whole: it has the steps of both stages in one. scripts: as AblationArgs.scripts.
    """

    title: str
    flags: tuple[str, ...] = ()
    start: str | None = "stage1"
    pseudo_labels: bool = False  # is told those made with the same seed's stage 1
    whole: bool = False
    scripts: str | None = None


BARE = ("--prompt_templates", "{}")
LABEL_MAP = ("--label_map_weight", "2")
BEST = (*LABEL_MAP, "--matching", "hybrid")  # that of recipes/scenes_stage2_best.yaml
CE = ("--class_loss", "cross_entropy", "--rank_weight", "0")
CE_KL = ("--rank_weight", "0")
ROWS = {
    "stage1": Row("stage 1", start=None),
    "stage1_bare": Row("stage 1, names without prompts", BARE, start=None),
    # Table 5
    "none": Row("no unseen labels", ("--unseen_labels", "none")),
    "pseudo": Row("pseudo unseen labels", pseudo_labels=True),
    "ground_truth": Row("ground-truth unseen labels"),
    # Table 6: all of them with ground-truth unseen labels; with prompts, the last one is Table 5's
    "ce": Row("CE and background", CE),
    "ce_kl": Row("CE, KL", CE_KL),
    "bare_ce": Row("CE and background", (*CE, *BARE), "stage1_bare"),
    "bare_ce_kl": Row("CE, KL", (*CE_KL, *BARE), "stage1_bare"),
    "bare_ce_kl_rank": Row("CE, KL, ranking", BARE, "stage1_bare"),
    # beyond the paper: one choice of the last row changed
    "closed": Row(
        "closed: CE and background, seen labels only", ("--unseen_labels", "none", *CE, "--matching", "joint")
    ),
    "joint": Row("joint matching", ("--matching", "joint")),
    "hybrid": Row("hybrid matching", ("--matching", "hybrid")),
    "focal": Row("focal mask loss", ("--mask_loss", "focal")),
    "kl_u_p": Row("KL(U || p)", ("--kl", "u_p")),
    "ignored_negative": Row("ignored pixels are negatives", ("--ignored_pixels", "negative")),
    "warm": Row("temperature 0.07 in stage 2", ("--class_temperature", "0.07")),
    "rank_pairs": Row("ranking of 10 cos, mean over pairs", ("--rank_scale", "10", "--rank_norm", "pairs")),
    # not the paper's: a loss on the label map of Eq. 4
    "label_map": Row("with the label map loss", LABEL_MAP),
    "label_map_labelled": Row(
        "with the label map loss, labelled pixels alone", (*LABEL_MAP, "--label_map_pixels", "labelled")
    ),
    "best": Row("best", BEST),
    "pseudo_best": Row("best, pseudo unseen labels", BEST, pseudo_labels=True),
    # what else a user could take
    "mask2former": Row(
        "transformers' Mask2Former, seen classes only", start=None, whole=True, scripts="benchmarks.closed_set"
    ),
    "zegformer": Row("ZegFormer-like", ("--class_projection", "linear"), start=None, whole=True),
}


class View(NamedTuple):
    """How a model is looked at: flags of eval.py."""

    title: str
    flags: tuple[str, ...]


WEIGHT = ("--ensemble_weight", str(ENSEMBLE_WEIGHT))
VIEWS = {  # lazy is crops, to the pixel
    "off": View("off", ("--ensemble", "off")),
    "crops": View("on, crops", ("--ensemble", "crops", *WEIGHT)),
    "single_pass": View("on, single pass", ("--ensemble", "single_pass", *WEIGHT)),
    "zegformer": View(
        "on, crops, w = 2/3, bias 0.1", ("--ensemble", "crops", "--ensemble_weight", "0.6667", "--seen_bias", "0.1")
    ),
}


# ---- the tables --------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One line of a table: a training and the ensemble it is evaluated with."""

    row: str  # of ROWS
    view: str = "off"  # of VIEWS


class Difference(NamedTuple):
    """line - minus, paired by seed."""

    line: Line
    minus: Line
    paper: GeneralizedScores | None = None  # the paper's difference, in percentage points, where it has one

    @property
    def title(self) -> str:
        row, other = (ROWS[line.row].title for line in (self.line, self.minus))
        view, its = (VIEWS[line.view].title for line in (self.line, self.minus))
        if row == other:
            return f"{row}: ensemble {view} − {its}"
        return f"{row} − {other}" if view == its == "off" else f"{row}, ensemble {view} − {other}, ensemble {its}"


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    lines: list[Line]
    differences: list[Difference]
    paper: dict[Line, GeneralizedScores] = field(default_factory=dict)  # where the paper has such a line; percent


def gain(before: GeneralizedScores, after: GeneralizedScores) -> GeneralizedScores:
    return GeneralizedScores(*(a - b for a, b in zip(after, before, strict=True)))


# Tables 4 to 6 of the paper, COCO-Stuff, percent. Table 5's pseudo labels are Table 4's model with the ensemble on.
PAPER_NONE = GeneralizedScores(40.1, 25.3, 31.0)
PAPER_PSEUDO = GeneralizedScores(38.6, 42.0, 40.2)
PAPER_GROUND_TRUTH = GeneralizedScores(39.0, 52.2, 44.7)
PAPER_PSEUDO_ENSEMBLE_OFF = GeneralizedScores(37.2, 35.5, 36.4)
PAPER_CE = GeneralizedScores(36.7, 35.2, 35.9)
PAPER_CE_KL = GeneralizedScores(31.8, 38.9, 35.0)
PAPER_CE_KL_RANK = GeneralizedScores(38.4, 50.1, 43.5)


def make_tables(clip: bool) -> dict[str, Table]:
    """clip: False where text vectors are ready made: there are no names without prompts, no pseudo labels, and no
    ensemble."""
    tables = {"table4": table4(), "table5": table5(), "table6": table6(clip), **beyond_the_paper()}
    tables |= {"best": best(clip), "comparison": comparison()}
    if clip:
        return tables
    reduced = {name: without_clip(table) for name, table in tables.items()}
    return {name: table for name, table in reduced.items() if table.differences}


def without_clip(table: Table) -> Table:
    def kept(line: Line) -> bool:
        return not ROWS[line.row].pseudo_labels and line.view == "off"

    differences = [pair for pair in table.differences if kept(pair.line) and kept(pair.minus)]
    return replace(table, lines=[line for line in table.lines if kept(line)], differences=differences)


def table4() -> Table:
    rows = ("stage1", "none", "pseudo", "ground_truth")
    return Table(
        "Table 4: the ensemble with CLIP",
        f"The weight is {ENSEMBLE_WEIGHT}, the paper's for COCO-Stuff. The paper has one pair, of the model trained "
        "with pseudo labels; its sign is asked of every training here.",
        [Line(row, view) for row in rows for view in ("off", "crops", "single_pass")],
        [
            Difference(Line(row, view), Line(row), gain(PAPER_PSEUDO_ENSEMBLE_OFF, PAPER_PSEUDO))
            for row in rows
            for view in ("crops", "single_pass")
        ],
        {Line("pseudo"): PAPER_PSEUDO_ENSEMBLE_OFF, Line("pseudo", "crops"): PAPER_PSEUDO},
    )


def table5() -> Table:
    paper = {"none": PAPER_NONE, "pseudo": PAPER_PSEUDO, "ground_truth": PAPER_GROUND_TRUTH}
    return Table(
        "Table 5: what training is told of unseen classes",
        "The ensemble is off here. In the paper it is on, at least in the row of pseudo labels: that one is Table 4's "
        "with the ensemble.",
        [Line(row) for row in paper],
        [
            *(Difference(Line(row), Line("none"), gain(PAPER_NONE, paper[row])) for row in ("pseudo", "ground_truth")),
            Difference(Line("pseudo"), Line("ground_truth"), gain(PAPER_GROUND_TRUTH, PAPER_PSEUDO)),
        ],
        {Line(row): scores for row, scores in paper.items()},
    )


def table6(clip: bool) -> Table:
    steps = {"ce": PAPER_CE, "ce_kl": PAPER_CE_KL, "ce_kl_rank": PAPER_CE_KL_RANK}
    if clip:
        steps = {f"bare_{row}": scores for row, scores in steps.items()} | {"ground_truth": PAPER_GROUND_TRUTH}
        note = "The rows without prompts have a stage 1 without prompts, too."
    else:
        steps = {"ground_truth" if row == "ce_kl_rank" else row: scores for row, scores in steps.items()}
        note = "The text vectors are ready made: there is no row without prompts, and the paper's has them last."
    rows = list(steps)
    pairs = [*zip(rows[1:], rows, strict=False), (rows[-1], rows[0]), (rows[-1], "closed")]
    return Table(
        "Table 6: the components",
        "All rows but 'closed' are told ground-truth unseen image labels, and the ensemble is off. 'Closed' is stage 1 "
        f"trained on for as many steps; the paper has no such row. {note}",
        [Line("closed"), *map(Line, rows)],
        [
            Difference(Line(row), Line(minus), gain(steps[minus], steps[row]) if minus in steps else None)
            for row, minus in dict.fromkeys(pairs)
        ],
        {Line(row): scores for row, scores in steps.items()},
    )


def beyond_the_paper() -> dict[str, Table]:
    changed = {
        "matching": ("Matching of labels and masks; the paper's is unpaired", ("joint", "hybrid")),
        "mask_loss": ("Mask loss; the recipes have BCE", ("focal",)),
        "kl": ("Direction of the KL; as printed it is KL(p || U)", ("kl_u_p",)),
        "ignored_pixels": ("Ignored pixels; the paper leaves them out of the mask losses", ("ignored_negative",)),
        "temperature": ("Temperature; the recipes have 0.01", ("warm",)),
        "ranking": ("Ranking loss; as printed, on cosines, divided by the positives", ("rank_pairs",)),
    }
    return {
        name: Table(
            title,
            "One choice changed in the recipe of stage 2, with ground-truth unseen labels; the ensemble is off.",
            [Line("ground_truth"), *map(Line, rows)],
            [Difference(Line(row), Line("ground_truth")) for row in rows],
        )
        for name, (title, rows) in changed.items()
    }


def best(clip: bool) -> Table:
    baseline = "bare_ce" if clip else "ce"  # Table 6, row 1
    pairs = [
        *(("best", row) for row in ("ground_truth", baseline, "closed", "stage1")),
        *((row, "ground_truth") for row in ("hybrid", "label_map", "label_map_labelled")),
        *(("best", row) for row in ("hybrid", "label_map")),
        *(("pseudo_best", row) for row in ("pseudo", "none", "best")),
    ]
    rows = ["stage1", "closed", baseline, "none", "pseudo", "ground_truth"]
    rows += ["hybrid", "label_map_labelled", "label_map", "best", "pseudo_best"]
    return Table(
        "Better than the paper's",
        "'Best' has hybrid matching and the loss on the label map (`label_map_weight` 2 in place of 0), which are not "
        "the paper's. Rows that say nothing of unseen labels are told those of the ground truth; the ensemble is off.",
        [Line(row) for row in rows],
        [Difference(Line(row), Line(minus)) for row, minus in pairs],
    )


def comparison() -> Table:
    theirs = [Line("mask2former"), Line("closed", "crops"), Line("zegformer", "zegformer")]
    ours = [Line("pseudo"), Line("ground_truth"), Line("best")]
    return Table(
        "What else a user could take",
        "Everything has the same number of steps, data and augmentation. Transformers' Mask2Former has its own losses "
        "and no name for an unseen class, so its mIoU(U) is 0. 'Closed' with the ensemble is zsseg-like (Xu et al. "
        "2021: a background embedding, seen labels only, w = 0.8). 'ZegFormer-like' (Ding et al. 2022) has a linear "
        "class projection, its ensemble's exponents of 2/3 and 1/3, and 0.1 off the scores of seen classes; it lacks "
        "the averaging of CLIP's scores over seen classes. Both are stand-ins in this code, not those projects.",
        [*theirs, *ours],
        [Difference(line, minus) for line in ours for minus in theirs],
    )


# ---- jobs: what has to be run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command. The same command again goes on where it was stopped."""

    name: str
    command: list[str]
    log: Path
    is_done: Callable[[], bool]
    after: list[str]  # names of the jobs that must be done before


def trainings(lines: list[Line]) -> list[str]:
    """The rows of these lines and those they start from, in the order of ROWS."""
    used = {line.row for line in lines}
    used |= {start for row in used if (start := ROWS[row].start) is not None}
    used |= {"stage1" for row in used if ROWS[row].pseudo_labels}
    return [name for name in ROWS if name in used]


def make_jobs(args: AblationArgs, lines: list[Line]) -> list[Job]:
    """All jobs behind these lines, done or not; a seed's before the next seed's, so that tables can be seen early."""
    jobs = []
    for seed in args.seeds:
        for name in trainings(lines):
            if ROWS[name].pseudo_labels:
                jobs.append(pseudo_label_job(args, seed))
            jobs.append(training_job(args, seed, name))
            jobs += [evaluation_job(args, seed, line) for line in dict.fromkeys(lines) if line.row == name]
    return jobs


def training_flags(args: AblationArgs, seed: int, name: str) -> list[str]:
    row = ROWS[name]
    flags = ["--config", args.stage1 if row.start is None else args.stage2, "--dataset", str(args.data)]
    flags += ["--output_dir", str(args.run_folder(seed, name)), "--seed", str(seed)]
    if args.text_embeds is not None:
        flags += ["--text_embeds", args.text_embeds]
    if row.start is not None:
        flags += ["--init_from", str(args.run_folder(seed, row.start) / "final")]
    elif args.backbone is not None:
        flags += ["--backbone", args.backbone]
    if row.pseudo_labels:
        flags += ["--unseen_labels", str(args.run_folder(seed, "pseudo_labels"))]
    if row.whole:
        flags += [
            "--max_steps",
            str(recipe_steps(args.stage1, args.stage1_steps) + recipe_steps(args.stage2, args.stage2_steps)),
        ]
    elif (steps := args.stage1_steps if row.start is None else args.stage2_steps) is not None:
        flags += ["--max_steps", str(steps)]
    return [*flags, *row.flags]


def recipe_steps(recipe: str, steps: int | None) -> int:
    from train import TrainArgs  # a script of the repository's root

    return read_arguments(TrainArgs, ["--config", recipe], Zs3Config)[0].max_steps if steps is None else steps


def training_job(args: AblationArgs, seed: int, name: str) -> Job:
    row, folder = ROWS[name], args.run_folder(seed, name)
    after = [] if row.start is None else [f"seed{seed}/{row.start}"]
    after += [f"seed{seed}/pseudo_labels"] if row.pseudo_labels else []
    return Job(
        name=f"seed{seed}/{name}",
        command=[*args.script("train", name), *training_flags(args, seed, name)],
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
    from eval import EvalArgs  # a script of the repository's root

    path = result_path(args, seed, line)
    model = path.parent / "final"
    flags = ["--model", str(model), "--dataset", str(args.data), "--output", str(path), *VIEWS[line.view].flags]
    if args.text_embeds is not None:
        flags += ["--text_embeds", args.text_embeds]
    asked, _ = read_arguments(EvalArgs, flags)

    def is_done() -> bool:
        """The result is there, of this checkpoint and these flags, on all images."""
        if not path.exists():
            return False
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = result["settings"]
        return (
            result["checkpoint_sha256"] == weights_sha256(str(model))
            and result["num_images"] == result["split_images"]
            and settings == {name: value for name, value in asdict(asked).items() if name in settings}
        )

    return Job(
        name=f"seed{seed}/{line.row}/{path.stem}",
        command=[*args.script("eval", line.row), *flags],
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
        changed = sorted(key for key, value in wanted.items() if key in before and differ(before[key], value))
        if changed:
            old = folder.parent if ROWS[name].start is None else folder  # others of a seed start from its stage 1
            raise InputError(
                f"{folder} holds a run with another {', '.join(changed)}: delete {old}, or choose another --output_dir"
            )
    return training.max_steps


# ---- the runner --------------------------------------------------------------------------------------------


class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float  # of time.monotonic


def run_jobs(jobs: list[Job], processes: int, times: Path) -> None:
    """Runs what is not done, at most `processes` at once, each job after those it waits for, in the order given.

    A job that fails ends the others, who go on from their last checkpoint when the same command comes again.
    times: JSON lines, to which the seconds of every job are added, also where it was stopped.
    """
    waiting = {job.name: job for job in jobs}
    running: dict[str, Running] = {}
    with tqdm(total=len(jobs), unit="job") as bar:
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
    with times.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"job": one.job.name, "seconds": round(time.monotonic() - one.began, 1)}) + "\n")


def seconds_of(jobs: list[Job], times: Path) -> float:
    """Of these jobs together, all their starts counted."""
    rows = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()] if times.exists() else []
    names = {job.name for job in jobs}
    return sum(row["seconds"] for row in rows if row["job"] in names)


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
        cells = [ROWS[line["training"]].title, VIEWS[line["ensemble"]].title]
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
    return "\n".join([*text, "", *markdown_table(head, differences), ""])


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

    known = make_tables(clip=args.text_embeds is None)
    tables = {name: known[name] for name in args.table}
    lines = [line for table in tables.values() for line in table.lines]
    steps = {name: check_trained(args, seed, name) for seed in args.seeds for name in trainings(lines)}
    num_train, num_validation = prepare_data(args)
    jobs, times = make_jobs(args, lines), Path(args.output_dir, "times.jsonl")
    run_jobs(jobs, args.processes, times)

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
        "machine": machine(),
        "seconds": seconds_of(jobs, times),
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
