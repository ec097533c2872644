"""Divides the pictures of a folder into cells: a dataset for each class split and fold, for `zs3 ablation`.

    python -m benchmarks.photograph_cells --dataset ../shared/data/msrc_v2 --output runs/cells
    zs3 ablation table6 --dataset runs/cells/{seed} --seeds 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 ...

The training and validation pictures are divided anew. Cell 5 s + f has the unseen classes of SPLITS[s], and is
evaluated on fold f of 5. The cells link to the pictures, they do not copy them.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configuration_zs3 import unshared
from zs3.command_line import Arguments, InputError, OutputFolder, check_required, flag, read_arguments, run
from zs3.files import write_json, writing_folder
from zs3.label_space import load_label_space

SPLITS = (  # unseen classes of MSRC v2; in each, two or more are no classes of ImageNet
    ("building", "sky", "sheep", "sign", "flower"),
    ("grass", "road", "car", "bird", "book"),
    ("water", "person", "aeroplane", "chair", "dog"),
)
FOLDS = 5


@dataclass
class CellArgs(Arguments):
    """The pictures."""

    dataset: str | None = flag(
        None, "Folder of MSRC v2: classes.json, and train and validation with images and labels."
    )
    output: OutputFolder | None = flag(None, "Folder of the cells.")

    def check(self) -> None:
        check_required(self, "dataset", "output")
        missing = unshared(list(itertools.chain(*SPLITS)), load_label_space(self.dataset).class_names)
        if missing:
            raise InputError(f"--dataset {self.dataset} has no class {missing[0]!r}: the splits are those of MSRC v2")
        if Path(self.output).exists():
            raise InputError(f"--output {self.output} exists already: give another folder, or remove it first")


def make_cells(source: Path, folder: Path) -> int:
    """Writes folder/0, 1, ...; returns the number of pictures in each."""
    classes = json.loads((source / "classes.json").read_text(encoding="utf-8"))
    pictures = [path for split in ("train", "validation") for path in sorted((source / split / "images").iterdir())]
    order = np.random.default_rng(0).permutation(len(pictures)).tolist()
    for cell, (unseen, fold) in enumerate(itertools.product(SPLITS, range(FOLDS))):
        for parts in itertools.product(("train", "validation"), ("images", "labels")):
            (folder / str(cell)).joinpath(*parts).mkdir(parents=True)
        for place, number in enumerate(order):
            split = folder / str(cell) / ("validation" if place % FOLDS == fold else "train")
            image = pictures[number].resolve()
            label = image.parents[1] / "labels" / f"{image.stem}.png"
            (split / "images" / image.name).symlink_to(image)
            (split / "labels" / label.name).symlink_to(label)
        write_json(folder / str(cell) / "classes.json", {**classes, "unseen": list(unseen)})
    return len(pictures)


def main() -> None:
    args, _ = read_arguments(CellArgs)
    with writing_folder(Path(args.output)) as folder:
        count = make_cells(Path(args.dataset), folder)
    print(f"cells     {args.output}: {len(SPLITS)} class splits x {FOLDS} folds of {count} pictures")


if __name__ == "__main__":
    run(main)
