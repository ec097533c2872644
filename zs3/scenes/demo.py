"""The demo: two training stages on the embedded benchmark, three evaluations, a picture with other labels.

    zs3 demo [--output_dir runs/demo]

Each public command for training and evaluation runs as a process. The demo can be interrupted and started again. The
masks of stage 1 are also named without stage 2, by an encoder (`zs3 assemble`). Stage 2 learns from ground-truth image
labels of unseen classes (Table 5, row 3), not from their masks.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline_zs3 import Zs3Pipeline
from text_zs3 import read_labels
from zs3.checkpoints import load_checkpoint, weights_sha256
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFolder,
    Pictures,
    Processes,
    flag,
    printable,
    read_arguments,
)
from zs3.data.records import load_split
from zs3.evaluation.figure import draw_figures
from zs3.evaluation.pictures import save_picture, stack
from zs3.evaluation.result_types import Result
from zs3.evaluation.results import read_result
from zs3.files import check_here, lock_folder, write_text
from zs3.scenes.dataset import write_if_missing
from zs3.scores.means import GeneralizedScores
from zs3.tables import markdown_table, percent

OWN_LABELS = [
    "sky",
    "grass",
    {"name": "water", "templates": ["a photo of {}.", "a picture of {}."]},
    "green cross",
    "red circle",
    ["red square", "a red square"],
    "stone wall",
    "blue heart",
]


@dataclass
class DemoArgs(Arguments):
    """Sizes of the demo; the defaults take about 7 minutes on 2 CPU cores, with fewer steps than the recipes."""

    output_dir: OutputFolder = flag("runs/demo", "Folder for all results of the demo.")
    num_train: Pictures = flag(3000, "Training scenes.")
    num_validation: Pictures = flag(200, "Validation scenes.")
    stage1_steps: Count = flag(1000, "Optimizer steps; the recipe has 2000.")
    stage2_steps: Count = flag(400, "Optimizer steps; the recipe has 500.")
    num_processes: Processes | None = flag(None, "Training processes; default: 2 on CPU, 1 on a GPU.")
    num_pictures: Pictures = flag(6, "Validation scenes in the pictures.")

    def check(self) -> None:
        check_here("train.py")


def cpu_cores() -> int:
    """The number of cores that this process may use; in a container, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launcher(num_processes: int) -> list[str]:
    """The command `accelerate launch`, without the user's own settings of accelerate."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(num_processes)]
    return command + ["--multi_gpu"] * (num_processes > 1)  # means several processes, on CPUs too


def launch(script: str, num_processes: int, *flags: object) -> None:
    """Runs `accelerate launch script flags`; of a module, `-m script`. Raises InputError if the command fails."""
    module = [] if script.endswith(".py") else ["-m"]
    command = [*launcher(num_processes), *module, script, *map(str, flags)]
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false")
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
        # More threads than cores make small models many times slower.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // num_processes)))
    if subprocess.run(command, env=environment).returncode != 0:
        raise InputError(f"{script} failed, its error is above: mend it, then the same command goes on from here")


def train_stage(recipe: str, data: Path, output_dir: Path, processes: int, steps: int, *flags: object) -> None:
    flags = ("--dataset", data, "--output_dir", output_dir, "--max_steps", steps, *flags)
    launch("train.py", processes, "--config", Path("recipes", recipe), *flags)


def name_without_stage2(stage1: Path, folder: Path) -> Path:
    """Joins the proposals of stage 1 with the tiny TIPSv2, if an earlier start has not. Returns the checkpoint."""
    output = folder / f"assembled_{weights_sha256(str(stage1))[:8]}"
    if not output.exists():
        encoder = Path("zs3", "scenes_tipsv2")
        launch("zs3", 1, "assemble", "--proposals", stage1, "--encoder", encoder, "--output", output)
    return output


def draw_own_labels(data: Path, model: Path, path: Path) -> list[str]:
    """Draws the first validation scene with the labels OWN_LABELS. Returns the labels found."""
    image, _, _ = load_split(data, "validation")[0]
    network, processor = load_checkpoint(str(model))
    segment = Zs3Pipeline(model=network, processor=processor, image_processor=processor.image_processor)
    result = segment(image, candidate_labels=OWN_LABELS, output="map")
    save_picture(segment.draw(image, result), path)
    return [result["labels"][index] for index in np.unique(result["segmentation"])]


def write_page(
    folder: Path, results: dict[str, Result], unseen: list[str], pictures: list[Path], found: list[str]
) -> str:
    """Writes report.md from the results. Returns its table. found: the labels of OWN_LABELS in the last picture."""
    rows = []
    for title, result in results.items():
        low, high = result["confidence_intervals"]["hiou"]
        means = (percent(result[name]) for name in GeneralizedScores._fields)
        rows.append([title, *means, f"{percent(low)} to {percent(high)}"])
    scores = "\n".join(markdown_table(["model", "mIoU(S)", "mIoU(U)", "hIoU", "hIoU, 95 % interval"], rows))
    images = "\n\n".join(f"![{path.stem}]({path.relative_to(folder)})" for path in pictures)
    own = [label.name for label in read_labels(OWN_LABELS)]
    text = f"""# Demo report

Synthetic benchmark `scenes`, validation split, one seed. Generalised zero-shot setting: all 24 names are candidates.
mIoU(S) is the mean IoU of the seen classes, mIoU(U) that of the unseen ones, hIoU their harmonic mean, in percent.

The unseen classes are {", ".join(unseen)}. Stage 1 learned nothing about them, and gives their pixels any name. The
second row has the masks of stage 1, but names from the tiny TIPSv2, whose training had captions of all classes. Stage 2
had ground-truth image labels: which of them each training image shows, not where. Both stages are short.

{scores}

## Validation scenes

Hatched grey areas have no label: shapes and textures that are no class. Each picture has its own colours of names.

{images}

## A label list of its own

The model of stage 2 and the first scene, with other labels: {", ".join(own)}. Every pixel gets one of them, even if
none fits.

![own labels](own_labels.png)

Labels found: {", ".join(found)}.
"""
    write_text(folder / "report.md", printable(text))
    return scores


def main() -> None:
    args, _ = read_arguments(DemoArgs)
    with lock_folder(Path(args.output_dir)):
        demonstrate(args, Path(args.output_dir))


def demonstrate(args: DemoArgs, folder: Path) -> None:
    """The seven steps. This process has locked the folder."""
    data, stage1, stage2 = folder / "scenes", folder / "stage1", folder / "stage2"
    processes = args.num_processes or (1 if torch.cuda.is_available() else min(2, cpu_cores()))

    print("1/7  rendering the scenes", flush=True)
    write_if_missing(data, args.num_train, args.num_validation)
    print("2/7  stage 1: masks and names of the seen classes", flush=True)
    train_stage("scenes_stage1.yaml", data, stage1, processes, args.stage1_steps)
    print("3/7  evaluation of stage 1", flush=True)
    launch("eval.py", processes, "--model", stage1 / "final", "--dataset", data, "--output", stage1 / "gzs3.json")
    print("4/7  names without stage 2: stage 1's masks and a tiny TIPSv2, evaluated", flush=True)
    joined = name_without_stage2(stage1 / "final", folder)
    launch("eval.py", processes, "--model", joined, "--dataset", data, "--output", folder / "assembled.json")
    print("5/7  stage 2: Eq. 5-8 with GROUND-TRUTH IMAGE LABELS for unseen classes, no unseen mask", flush=True)
    start = ("--init_from", stage1 / "final")
    train_stage("scenes_stage2_ground_truth.yaml", data, stage2, processes, args.stage2_steps, *start)
    print("6/7  evaluation of stage 2", flush=True)
    launch("eval.py", processes, "--model", stage2 / "final", "--dataset", data, "--output", stage2 / "gzs3.json")
    print("7/7  pictures", flush=True)
    records, stages = load_split(data, "validation"), {"stage 1": stage1 / "final", "stage 2": stage2 / "final"}
    pictures = draw_figures(records, stages, range(min(args.num_pictures, len(records))), folder / "pictures")
    stack(pictures[:3], folder / "pictures.png")
    found = draw_own_labels(data, stage2 / "final", folder / "own_labels.png")
    results = {
        title: read_result(path, (*GeneralizedScores._fields, "confidence_intervals.hiou"))
        for title, path in {
            "stage 1 (seen classes only)": stage1 / "gzs3.json",
            "stage 1's masks, names by TIPSv2": folder / "assembled.json",
            "stage 2 (ground-truth image labels)": stage2 / "gzs3.json",
        }.items()
    }
    print(write_page(folder, results, records.label_space.unseen, pictures, found))
    print(f"report    {folder / 'report.md'}")
    print(f"pictures  {folder / 'pictures'}, {folder / 'own_labels.png'}")
    print(f"model     {stage2 / 'final'}")
