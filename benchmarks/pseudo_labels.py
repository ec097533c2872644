"""Throughput of pseudo labels: a loop over crops, compared with `zs3.pseudo_labels` in one process and in two.

    python -m benchmarks.pseudo_labels --model CHECKPOINT --dataset DIR --output docs/results/pseudo_labels.json

The loop scores one proposal after the other, as earlier work does, in this process with one thread. Its scores must
equal those of the command. `accelerate launch` starts the command, as for users; each process has one thread. The time
of a run with few images is subtracted from that of a run with many, so that start and end do not count.
"""

import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks import measuring
from benchmarks.clip_views import crop_loop
from zs3.checkpoints import class_vectors, load_checkpoint
from zs3.command_line import Count, InputError, Processes, Some, check_required, flag, read_arguments, run
from zs3.data.image_labels import load_unseen_scores
from zs3.data.records import load_split
from zs3.pseudo_labels import unseen_scores
from zs3.scenes.demo import launcher

SAME = 1e-3  # largest difference allowed between the scores of loop and command
LOOP = "loop over crops, 1 thread"


@dataclass
class PseudoLabelBenchArgs(measuring.BenchmarkArguments):
    """Sizes of the comparison."""

    model: str | None = flag(None, "Stage-1 checkpoint with an image tower.")
    dataset: str | None = flag(None, "Folder of the dataset.")
    few: Count = flag(64, "Images of the short run and of the loop.")
    many: Count = flag(1088, "Images of the long run.")
    shard_size: Count = flag(32, "Images in each shard.")
    num_processes: Some[Processes] = flag([1, 2], "Numbers of processes; all are compared with the first.")

    def check(self) -> None:
        check_required(self, "model", "dataset")
        if not self.few < self.many:
            raise InputError(f"--many must be more than --few, got {self.many} and {self.few}")


def command_seconds(flags: list[str], processes: int) -> float:
    """The seconds of the whole command with these flags. Each process has one thread."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", TOKENIZERS_PARALLELISM="false")
    command = [*launcher(processes), "-m", "zs3.pseudo_labels", *flags]
    seconds, ended = measuring.timed(lambda: subprocess.run(command, env=environment, stdout=subprocess.DEVNULL))
    if ended.returncode != 0:
        raise InputError("zs3.pseudo_labels failed; its error is above")
    return seconds


@torch.inference_mode()
def loop(model: str, dataset: str, count: int) -> tuple[float, np.ndarray]:
    """Images a second, and the scores (N, U) of the first `count` images."""
    model, processor = load_checkpoint(model)
    records = load_split(dataset, "train")
    text_embeds, _ = class_vectors(model, processor, records.label_space.unseen, None)

    def scores_of(index: int) -> torch.Tensor:
        inputs = processor(images=records[index].image)
        proposals = model.propose(**inputs)
        size, images = tuple(proposals["valid_sizes"][0].tolist()), processor.to_rgb(inputs["pixel_values"])
        views = crop_loop(model.vision_model, images[0], proposals["mask_logits"][0], size, masked=False)
        return unseen_scores(views.embeds[views.shown], text_embeds, model.config.clip_logit_scale)

    images = tqdm(range(count), unit="image", mininterval=1)
    seconds, scores = measuring.timed(lambda: [scores_of(index) for index in images])
    return count / seconds, torch.stack(scores).numpy()


def measure(args: PseudoLabelBenchArgs) -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rate, expected = loop(args.model, args.dataset, args.few)
    torch.set_num_threads(threads)
    rows = [{"way": LOOP, "images_per_second": rate}]
    records, written = load_split(args.dataset, "train"), set()
    same = ["--model", args.model, "--dataset", args.dataset, "--shard_size", str(args.shard_size), "--no_measure"]
    same += ["--unannotated_share", "0"]  # all proposals, as the loop
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
            measuring.check_close(far, SAME, "scores of loop and command")
            rows.append({"way": name, "images_per_second": (args.many - args.few) / (seconds[1] - seconds[0])})
            written.add(tuple(file.read_bytes() for file in sorted(outputs[1].glob("*.parquet"))))
    if len(written) > 1:
        raise ValueError("different numbers of processes wrote different bytes, which is a defect")
    for row in rows:
        row["times_faster_than_loop"] = row["images_per_second"] / rate
        row["times_faster_than_first"] = row["images_per_second"] / rows[1]["images_per_second"]
    return rows


TITLES = "way | images a second | times faster than the loop | times faster than the first"
CELLS = "{way} | {images_per_second:.2f} | {times_faster_than_loop:.2f} | {times_faster_than_first:.2f}"


def report(result: dict) -> str:
    return f"""# Throughput of pseudo labels

Made by `{result["command"]}`, torch {result["torch"]}, {result["cores"]} CPU cores. One thread a process; \
all numbers of processes wrote the same bytes.

{measuring.table(TITLES, CELLS, result["rows"])}"""


def main() -> None:
    args, _ = read_arguments(PseudoLabelBenchArgs)
    result = {**measuring.head(), "arguments": asdict(args), "cores": os.cpu_count(), "rows": measure(args)}
    measuring.publish(args.output, result, report(result))


if __name__ == "__main__":
    run(main)
