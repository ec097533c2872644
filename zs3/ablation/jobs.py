"""The jobs of an ablation: commands for trainings, pseudo labels, ensemble weights and evaluations."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configuration_zs3 import Zs3Config, shortened
from zs3.ablation.tables import ENSEMBLES, MADE_LABELS, TRAININGS, Row, Table, make_tables
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
    Whole,
    flag,
    read_arguments,
)
from zs3.data.image_labels import pseudo_label_settings
from zs3.evaluation.arguments import EvalArgs, deciding_flags, same_flags
from zs3.evaluation.choices import read_answer
from zs3.evaluation.curves import check_matplotlib
from zs3.evaluation.ensemble_weight import WeightArgs, weight_settings
from zs3.evaluation.results import read_result
from zs3.files import check_here, file_sha256
from zs3.label_space import load_label_space
from zs3.pseudo_labels import PseudoLabelArgs
from zs3.training.arguments import TrainArgs
from zs3.typed_json import unless_damaged

SCENES = "scenes"
# Flags that may be paths. (In older results ensemble_weight is a number.)
PLACES = ("output_dir", "dataset", "init_from", "unseen_labels", "text_embeds", "model", "ensemble_weight")


@dataclass
class AblationArgs(Arguments):
    """Trains, evaluates and reports tables of variants."""

    first_words = ("table",)

    table: Some[str] = flag(["table5", "table6"], "Names of tables; --table may be left out if they come first.")
    dataset: str = flag(
        SCENES, "'scenes', which the command draws, or the folder of a dataset; {seed} in it becomes the seed."
    )
    label_space: str | None = flag(
        None, "Label space of all jobs; {seed} in it becomes the seed: scenes:{seed} gives each its own class split."
    )
    split: str = flag("validation", "Split to evaluate on.")
    stage1: str = flag("recipes/scenes_stage1.yaml", "Recipe of stage 1.")
    stage2: str = flag("recipes/scenes_stage2_ground_truth.yaml", "Recipe of stage 2; each training adds its flags.")
    backbone: str | None = flag(None, "Backbone at the start of stage 1, as in train.py.")
    text_embeds: str | None = flag(None, "Text vectors, as in train.py; the tables then have no rows that need a CLIP.")
    scripts: str | None = flag(
        None, "Module to run in place of train.py and eval.py, with the first argument `train` or `eval`."
    )
    seeds: Some[Seed] = flag([0, 1, 2], "Seeds; each repeats all trainings and evaluations.")
    num_jobs: Processes = flag(1, "Jobs to run at once, each a process of one thread.")
    output_dir: OutputFolder = flag("runs/ablation", "Folder for everything except the tables.")
    num_train: Pictures = flag(3000, "Training scenes.")
    num_validation: Pictures = flag(200, "Validation scenes.")
    num_test: Whole = flag(0, "Test scenes.")
    stage1_steps: Count | None = flag(None, "Default: the recipe's.")
    stage2_steps: Count | None = flag(None, "Default: the recipe's.")
    output: OutputFile | None = flag(None, "The tables (JSON), .md beside it; default: tables.json in --output_dir.")
    picture: OutputFile | None = flag(None, "PNG to draw the scores of all seeds into (needs matplotlib).")

    def check(self) -> None:
        check_here("train.py")
        unknown = [name for name in self.table if name not in self.known_tables]
        if unknown:
            raise InputError(
                f"no table is called {shortened(unknown[0], 30)}: the names are {', '.join(self.known_tables)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds must be distinct, got {shortened(self.seeds)}")
        for runs in self.runs if self.label_space is not None else []:
            load_label_space(runs.label_space)
        if self.dataset == SCENES and self.split == "test" and not self.num_test:
            raise InputError("--split test needs test scenes: give --num_test too, such as 1000")
        missing = [runs.data for runs in self.runs if self.dataset != SCENES and not runs.data.is_dir()]
        if missing:
            raise InputError(f"--dataset {missing[0]}: there is no such folder; 'scenes' are drawn")
        if self.output is not None and Path(self.output).suffix != ".json":
            raise InputError(f"--output {self.output} must be a file that ends in .json")
        if self.picture is not None:
            check_matplotlib("--picture")

    @cached_property
    def known_tables(self) -> dict[str, Table]:
        _, model = read_training("--config", self.stage2)
        return make_tables(clip=self.text_embeds is None, matching=model.get("matching", Zs3Config.matching))

    @property
    def runs(self) -> list["SeedRuns"]:
        return [SeedRuns(self, seed) for seed in self.seeds]


# ---- jobs: what has to be run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command. Started again, it resumes a stopped run."""

    name: str
    command: list[str]
    log: Path
    is_done: Callable[[], bool]
    after: list[str]  # names of the jobs that must end before


def trainings(rows: list[Row]) -> list[str]:
    """The trainings that these rows need, in the order of TRAININGS: with starts, and stage 1 for pseudo labels."""
    used = {row.training for row in rows}
    used |= {start for name in used if (start := TRAININGS[name].start) is not None}
    used |= {"stage1" for row in rows if row.needs_pseudo_labels}
    return [name for name in TRAININGS if name in used]


def make_jobs(runs: list["SeedRuns"], rows: list[Row]) -> list[Job]:
    """All jobs for these rows, done or not. They are in the order of seeds, so that a first seed is ready early."""
    return [job for of_seed in runs for job in of_seed.jobs(rows)]


@dataclass(frozen=True)
class SeedRuns:
    """The runs of one seed as jobs."""

    args: AblationArgs
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir, f"seed{self.seed}")

    def jobs(self, rows: list[Row]) -> list[Job]:
        jobs = []
        for name in trainings(rows):
            labels = TRAININGS[name].unseen_labels
            if labels in MADE_LABELS and self.named(f"{labels}_labels") not in {job.name for job in jobs}:
                jobs.append(self.made_label_job(labels))
            jobs.append(self.training_job(name))
            if name == "stage1" and any(row.needs_pseudo_labels for row in rows):
                jobs.append(self.pseudo_label_job())
            for row in dict.fromkeys(rows):
                if row.training == name:
                    jobs += [self.ensemble_weight_job(row)] if row.is_chosen else []
                    jobs.append(self.evaluation_job(row))
        return jobs

    def named(self, *parts: str) -> str:
        """The name of a job."""
        return "/".join([f"seed{self.seed}", *parts])

    def script(self, word: str, training: str) -> list[str]:
        """The command of train.py or eval.py for this training."""
        module = TRAININGS[training].scripts or self.args.scripts
        return [sys.executable, *([f"{word}.py"] if module is None else ["-m", module, word])]

    @property
    def space_flags(self) -> list[str]:
        """The flags of the dataset and its label space, which all commands know."""
        flags = [] if self.label_space is None else ["--label_space", self.label_space]
        return ["--dataset", str(self.data), *flags]

    @property
    def data(self) -> Path:
        args = self.args
        return Path(args.output_dir, SCENES) if args.dataset == SCENES else Path(self.of_seed(args.dataset))

    @property
    def label_space(self) -> str | None:
        return None if self.args.label_space is None else self.of_seed(self.args.label_space)

    def of_seed(self, pattern: str) -> str:
        return pattern.replace("{seed}", str(self.seed))

    @property
    def data_flags(self) -> list[str]:
        vectors = self.args.text_embeds
        return self.space_flags if vectors is None else [*self.space_flags, "--text_embeds", vectors]

    def result(self, row: Row) -> Path:
        split = "" if self.args.split == AblationArgs.split else f"_{self.args.split}"
        return self.folder / row.training / f"gzs3_{row.ensemble}{split}.json"

    def training_flags(self, name: str) -> list[str]:
        training, args = TRAININGS[name], self.args
        stages = (args.stage1, args.stage1_steps), (args.stage2, args.stage2_steps)
        recipe, steps = stages[training.start is not None]
        flags = ["--config", recipe, *self.data_flags]
        flags += ["--output_dir", str(self.folder / name), "--seed", str(self.seed)]
        if training.start is not None:
            flags += ["--init_from", str(self.folder / training.start / "final")]
        elif args.backbone is not None:
            flags += ["--backbone", args.backbone]
        made = training.labels_folder
        flags += ["--unseen_labels", training.unseen_labels if made is None else str(self.folder / made)]
        if training.whole:
            steps = sum(own or read_training("--config", recipe)[0].max_steps for recipe, own in stages)
        if steps is not None:
            flags += ["--max_steps", str(steps)]
        return [*flags, *training.flags]

    def training_job(self, name: str) -> Job:
        training = TRAININGS[name]
        after = [] if training.start is None else [self.named(training.start)]
        after += [] if training.labels_folder is None else [self.named(training.labels_folder)]
        return Job(
            name=self.named(name),
            command=[*self.script("train", name), *self.training_flags(name)],
            log=self.folder / name / "train.log",
            is_done=(self.folder / name / "final").exists,
            after=after,
        )

    def pseudo_label_job(self) -> Job:
        folder, model = self.folder / "pseudo_labels", self.folder / "stage1" / "final"

        def is_done() -> bool:
            """Whether the summary exists, and this checkpoint made the scores, with today's choice of proposals."""
            if not (folder / "summary.json").exists() or not model.exists():
                return False
            made_with = unless_damaged(pseudo_label_settings, folder) or {}
            return (
                made_with.get("checkpoint_sha256", {}).get(WEIGHTS) == weights_sha256(str(model))
                and made_with.get("unannotated_share") == PseudoLabelArgs.unannotated_share
            )

        flags = ["--model", str(model), *self.data_flags, "--output", str(folder)]
        return Job(
            name=self.named("pseudo_labels"),
            command=[sys.executable, "-m", "zs3.pseudo_labels", *flags],
            log=folder / "pseudo_labels.log",
            is_done=is_done,
            after=[self.named("stage1")],
        )

    def made_label_job(self, labels: str) -> Job:
        folder = self.folder / f"{labels}_labels"
        flags = [*self.space_flags, "--seed", str(self.seed), *MADE_LABELS[labels], "--output", str(folder)]
        return Job(
            name=self.named(folder.name),
            command=[sys.executable, "-m", "benchmarks.made_labels", *flags],
            log=self.folder / f"{labels}_labels.log",
            is_done=folder.exists,
            after=[],
        )

    def ensemble_weight_job(self, row: Row) -> Job:
        """The job that chooses the ensemble's weight, from labels that training may use."""
        path = self.folder / row.training / "ensemble_weight.json"
        model = path.parent / "final"
        labels = str(self.folder / "pseudo_labels") if row.needs_pseudo_labels else "ground_truth"
        flags = ["--model", str(model), *self.data_flags, "--unseen_labels", labels, "--output", str(path)]
        asked, _ = read_arguments(WeightArgs, flags, check=False)

        def is_done() -> bool:
            """Whether the answer exists, with these flags, and of the checkpoint, if that still exists."""
            answer = unless_damaged(read_answer, path) if path.exists() else None
            return (
                answer is not None
                and by_name(answer.get("settings", {})) == by_name(weight_settings(asked))
                and (not model.exists() or answer.get("checkpoint_sha256") == weights_sha256(str(model)))
            )

        after = [self.named(row.training), *([self.named("pseudo_labels")] if row.needs_pseudo_labels else [])]
        return Job(
            name=self.named(row.training, path.stem),
            command=[sys.executable, "-m", "zs3", "ensemble_weight", *flags],
            log=path.with_suffix(".log"),
            is_done=is_done,
            after=after,
        )

    def evaluation_job(self, row: Row) -> Job:
        path = self.result(row)
        model, weight = path.parent / "final", path.with_name("ensemble_weight.json")
        flags = ["--model", str(model), *self.data_flags, "--split", self.args.split, "--output", str(path)]
        flags += ENSEMBLES[row.ensemble].flags
        if row.is_chosen:
            flags += ["--ensemble_weight", str(weight)]
        asked, _ = read_arguments(EvalArgs, flags, check=False)

        def is_done() -> bool:
            """Whether the result exists, with these flags, on all images, and of the checkpoint and the chosen weight,
            if these still exist."""
            needed = ("checkpoint_sha256", "num_images", "split_images", "settings")
            result = unless_damaged(read_result, path, needed) if path.exists() else None
            if result is None:
                return False
            given = result.get("given_sha256", {}).values()
            return (
                (not model.exists() or result["checkpoint_sha256"] == weights_sha256(str(model)))
                and result["num_images"] == result["split_images"]
                and (not row.is_chosen or not weight.exists() or file_sha256(weight) in given)
                and same_flags(by_name(result["settings"]), by_name(deciding_flags(asked)))
            )

        after = [self.named(row.training), *([self.named(row.training, weight.stem)] if row.is_chosen else [])]
        return Job(
            name=self.named(row.training, path.stem),
            command=[*self.script("eval", row.training), *flags],
            log=path.with_suffix(".log"),
            is_done=is_done,
            after=after,
        )


def read_training(*flags: str) -> tuple[TrainArgs, dict[str, Any]]:
    """The TrainArgs and the Zs3Config fields from these flags of train.py."""
    return read_arguments(TrainArgs, list(flags), Zs3Config, check=False)


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with only the last part of each path, so that a moved folder does not matter."""
    return {name: Path(str(value)).name if name in PLACES and value else value for name, value in settings.items()}
