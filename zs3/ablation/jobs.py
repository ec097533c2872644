"""The jobs of an ablation: its trainings, pseudo labels, weights and evaluations as commands."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configuration_zs3 import Zs3Config, shortened
from zs3.ablation.tables import TRAININGS, VIEWS, Row, Table, make_tables
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
    flag,
    read_arguments,
)
from zs3.data.image_labels import read_settings
from zs3.evaluation.choices import read_answer
from zs3.evaluation.curves import check_matplotlib
from zs3.evaluation.ensemble_weight import WeightArgs, weight_settings
from zs3.evaluation.results import read_result
from zs3.files import file_sha256
from zs3.typed_json import unless_damaged

SCENES = "scenes"
# Flags that may be paths; the weight of the ensemble was a number in older results.
PLACES = ("output_dir", "dataset", "init_from", "unseen_labels", "text_embeds", "model", "ensemble_weight")


@dataclass
class AblationArgs(Arguments):
    """Which tables, on what, and the sizes of what they are made from."""

    first_words = ("table",)

    table: Some[str] = flag(["table5", "table6"], "Tables; the word --table may be left out where they come first.")
    dataset: str = flag(SCENES, "'scenes', which are drawn, or the folder of a dataset.")
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
    num_jobs: Processes = flag(1, "Jobs side by side, each a process of one thread.")
    output_dir: OutputFolder = flag("runs/ablation", "Folder for everything the command makes but the tables.")
    num_train: Pictures = flag(3000, "Training scenes.")
    num_validation: Pictures = flag(200, "Validation scenes.")
    stage1_steps: Count | None = flag(None, "Default: the recipe's.")
    stage2_steps: Count | None = flag(None, "Default: the recipe's.")
    output: OutputFile | None = flag(None, "The tables (JSON), .md beside it; default: tables.json in --output_dir.")
    picture: OutputFile | None = flag(None, "Draw all scores over seeds into this PNG (needs matplotlib).")

    def check(self) -> None:
        unknown = [name for name in self.table if name not in self.known_tables]
        if unknown:
            raise InputError(
                f"no table is called {shortened(unknown[0], 30)}: the names are {', '.join(self.known_tables)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds must be distinct, got {shortened(self.seeds)}")
        if self.dataset != SCENES and not Path(self.dataset).is_dir():
            raise InputError(f"--dataset {self.dataset}: there is no such folder; 'scenes' are drawn")
        if self.output is not None and Path(self.output).suffix != ".json":
            raise InputError(f"--output {self.output} must be a file that ends in .json")
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
        return Path(self.output_dir, SCENES) if self.dataset == SCENES else Path(self.dataset)

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
    from zs3.training.arguments import TrainArgs

    return read_arguments(TrainArgs, list(flags), Zs3Config, check=False)


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
    asked, _ = read_arguments(WeightArgs, flags, check=False)

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
        command=[sys.executable, "-m", "zs3", "ensemble_weight", *flags],
        log=path.with_suffix(".log"),
        is_done=is_done,
        after=[f"seed{seed}/{row.training}", *([f"seed{seed}/pseudo_labels"] if row.needs_pseudo_labels else [])],
    )


def evaluation_job(args: AblationArgs, seed: int, row: Row) -> Job:
    from zs3.evaluation.arguments import EvalArgs, deciding_flags, same_flags

    path = result_path(args, seed, row)
    model = path.parent / "final"
    flags = ["--model", str(model), "--dataset", str(args.data), "--output", str(path), *VIEWS[row.view].flags]
    if args.text_embeds is not None:
        flags += ["--text_embeds", args.text_embeds]
    weight = ensemble_weight_path(args, seed, row) if row.is_chosen else None
    if weight is not None:
        flags += ["--ensemble_weight", str(weight)]
    asked, _ = read_arguments(EvalArgs, flags, check=False)

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
            and same_flags(by_name(result["settings"]), by_name(deciding_flags(asked)))
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
