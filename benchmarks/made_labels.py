"""Image labels of unseen classes that are made from the true ones, for experiments on what labels are worth.

    python -m benchmarks.made_labels --dataset runs/scenes --shuffled true --output runs/shuffled
    python -m benchmarks.made_labels --dataset runs/scenes --precision 0.5 --recall 0.75 --output runs/imprecise

Shuffled: each picture has the labels of another one. So the number of labels is right, but they tell nothing of the
picture. Precision, recall: true labels are left out at random, and wrong ones are added at random. The folder is for
`--unseen_labels` of train.py, like one of `zs3 pseudo_labels`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from configuration_zs3 import TINY, Number
from zs3.command_line import Arguments, InputError, OutputFolder, Seed, check_required, flag, read_arguments, run
from zs3.data.image_labels import count_labels, shard_name
from zs3.data.records import load_split
from zs3.files import writing_folder
from zs3.label_space import load_label_space
from zs3.pseudo_labels import unseen_truth, write_shard

Rate = Annotated[float, Number(float, TINY, 1)]


@dataclass
class MadeLabelArgs(Arguments):
    """How the true labels are changed."""

    dataset: str | None = flag(None, "Folder of the data.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; default: the dataset's own.")
    shuffled: bool = flag(False, "Give each picture the labels of another one.")
    precision: Rate = flag(1.0, "Share of the labels that are right.")
    recall: Rate = flag(1.0, "Share of the true labels that are there.")
    seed: Seed = flag(0, "Seed of the choice.")
    output: OutputFolder | None = flag(None, "Folder of the labels.")

    def check(self) -> None:
        check_required(self, "dataset", "output")
        if Path(self.output).exists():
            raise InputError(f"--output {self.output} exists already: give another folder, or remove it first")


def changed(truth: np.ndarray, args: MadeLabelArgs) -> np.ndarray:
    """truth: (N, U) bool -> the labels, alike."""
    rng = np.random.default_rng(args.seed)
    if args.shuffled:
        return truth[_no_own_place(len(truth), rng)]
    labels, (present,), (absent,) = truth.copy().ravel(), np.nonzero(truth.ravel()), np.nonzero(~truth.ravel())
    kept = round(args.recall * len(present))
    wrong = round(kept * (1 / args.precision - 1))
    if wrong > len(absent):
        raise InputError(f"--precision {args.precision}: there are not as many wrong labels to give")
    labels[rng.permutation(present)[kept:]] = False
    labels[rng.permutation(absent)[:wrong]] = True
    return labels.reshape(truth.shape)


def _no_own_place(count: int, rng: np.random.Generator) -> np.ndarray:
    """A random cyclic order: no picture keeps its own place."""
    order = rng.permutation(count)
    places = np.empty(count, dtype=int)
    places[order] = np.roll(order, 1)
    return places


def main() -> None:
    args, _ = read_arguments(MadeLabelArgs)
    space = load_label_space(args.label_space or args.dataset)
    records = load_split(args.dataset, "train", space)
    truth = unseen_truth(records, space, len(records))
    if truth is None:
        raise InputError(f"{args.dataset}: the label maps hold no unseen class, so no labels can be made from them")
    labels = changed(truth, args)
    with writing_folder(Path(args.output)) as folder:
        write_shard(folder / shard_name(0, 1), records.image_ids, labels.astype(np.float32), space.unseen, b"")
    counts = count_labels(labels, truth)
    print(f"labels    {args.output}: precision {100 * counts.precision:.1f} %, recall {100 * counts.recall:.1f} %")


if __name__ == "__main__":
    run(main)
