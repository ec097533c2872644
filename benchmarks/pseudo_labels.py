"""Throughput of pseudo labels: a loop over crops beside `zs3.pseudo_labels` with one process and with two.

    python -m benchmarks.pseudo_labels --model CHECKPOINT --dataset DIR --output docs/results/pseudo_labels.json

The loop scores one proposal after the other, as the ancestors do, in this process with one thread. Its scores must be
those of the command. The command runs as users start it, by `accelerate launch`, each process with one thread. The time
of a run with few images is taken off that of a run with many, so that starting and ending do not count.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.clip_views import crop_loop
from zs3.checkpoints import class_vectors, load_checkpoint
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFile,
    Processes,
    Some,
    check_required,
    flag,
    read_arguments,
    run,
)
from zs3.data.image_labels import load_unseen_scores
from zs3.data.records import load_split
from zs3.files import write_report
from zs3.pseudo_labels import unseen_scores
from zs3.scenes.demo import launcher
from zs3.tables import markdown_table

SAME = 1e-3  # a score of the loop and one of the command differ by no more
LOOP = "loop over crops, 1 thread"


@dataclass
class PseudoLabelBenchArgs(Arguments):
    """Sizes of the comparison."""

    model: str | None = flag(None, "Stage-1 checkpoint with an image tower.")
    dataset: str | None = flag(None, "Folder of its data.")
    few: Count = flag(64, "Images of the short run; of the loop too.")
    many: Count = flag(1088, "Images of the long run.")
    shard_size: Count = flag(32, "Images a shard.")
    num_processes: Some[Processes] = flag([1, 2], "Numbers of processes; the others are compared with the first.")
    output: OutputFile | None = flag(None, "Result file; the printed table goes beside it as .md.")

    def check(self) -> None:
        check_required(self, "model", "dataset")
        if not self.few < self.many:
            raise InputError(f"--many must be more than --few, got {self.many} and {self.few}")


def command_seconds(flags: list[str], processes: int) -> float:
    """Of the whole command with these flags, one thread a process."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", TOKENIZERS_PARALLELISM="false")
    start = time.perf_counter()
    command = [*launcher(processes), "-m", "zs3.pseudo_labels", *flags]
    ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if ended.returncode != 0:
        raise InputError("zs3.pseudo_labels failed, its error is above")
    return time.perf_counter() - start


@torch.inference_mode()
def loop(model: str, dataset: str, count: int) -> tuple[float, np.ndarray]:
    """Images a second, and the scores (N, U) of the first images, `count` of them."""
    model, processor = load_checkpoint(model)
    records = load_split(dataset, "train")
    text_embeds, _ = class_vectors(model, processor, records.label_space.unseen, None)
    scores, spent = [], 0.0
    for index in tqdm(range(count), unit="image", mininterval=1):
        start = time.perf_counter()
        inputs = processor(images=records[index].image)
        proposals = model.propose(**inputs)
        size, images = tuple(proposals["valid_sizes"][0].tolist()), processor.to_rgb(inputs["pixel_values"])
        views = crop_loop(model.vision_model, images[0], proposals["mask_logits"][0], size, masked=False)
        scores.append(unseen_scores(views.embeds[views.shown], text_embeds, model.config.clip_logit_scale))
        spent += time.perf_counter() - start
    return count / spent, torch.stack(scores).numpy()


def measure(args: PseudoLabelBenchArgs) -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rate, expected = loop(args.model, args.dataset, args.few)
    torch.set_num_threads(threads)
    rows = [{"way": LOOP, "images_per_second": rate}]
    records, written = load_split(args.dataset, "train"), set()
    same = ["--model", args.model, "--dataset", args.dataset, "--shard_size", str(args.shard_size), "--no_measure"]
    with tempfile.TemporaryDirectory() as folder:
        for processes in args.num_processes:
            name = f"zs3.pseudo_labels, {processes} process" + "es" * (processes > 1)
            outputs, seconds = [], []
            for images in (args.few, args.many):
                outputs.append(Path(folder, f"{processes}_{images}"))
                flags = [*same, "--output", str(outputs[-1]), "--max_images", str(images)]
                seconds.append(command_seconds(flags, processes))
            found = load_unseen_scores(outputs[0], records.label_space, records.image_ids[: args.few])
            far = float(np.abs(found - expected).max())
            if far > SAME:
                raise ValueError(f"loop and command give scores that differ by {far}: no comparison of speed")
            rows.append({"way": name, "images_per_second": (args.many - args.few) / (seconds[1] - seconds[0])})
            written.add(tuple(file.read_bytes() for file in sorted(outputs[1].glob("*.parquet"))))
    if len(written) > 1:
        raise ValueError("the numbers of processes gave different bytes, which is a defect")
    for row in rows:
        row["times_faster_than_loop"] = row["images_per_second"] / rate
        row["times_faster_than_first"] = row["images_per_second"] / rows[1]["images_per_second"]
    return rows


def report(result: dict) -> str:
    names = ("images_per_second", "times_faster_than_loop", "times_faster_than_first")
    rows = [[row["way"], *(f"{row[name]:.2f}" for name in names)] for row in result["rows"]]
    lines = [
        "# Throughput of pseudo labels",
        "",
        f"Made by `{result['command']}`, torch {result['torch']}, {result['cores']} CPU cores. One thread a process; "
        "all numbers of processes wrote the same bytes.",
        "",
        *markdown_table(["way", "images a second", "times faster than the loop", "times faster than the first"], rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    args, _ = read_arguments(PseudoLabelBenchArgs)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.pseudo_labels", *sys.argv[1:]]),
        "arguments": asdict(args),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "rows": measure(args),
    }
    text = report(result)
    print(text, end="")
    if args.output is not None:
        write_report(Path(args.output), result, text)


if __name__ == "__main__":
    run(main)
