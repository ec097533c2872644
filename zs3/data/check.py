"""Reads every picture and label map of a dataset before a long run, and lists those that cannot be used.

    zs3 check --dataset DIR --num_workers 8

A dataset is a folder, parquet files or a Hub id (docs/data.md). Each problem is one line, and the exit code is then
2. The table gives, for each class, the number of its images and its share of the labelled pixels.

Axes: C class name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from zs3.command_line import Arguments, InputError, OutputFile, Some, Workers, check_required, flag, read_arguments
from zs3.data.records import Split, dataset_name, load_split
from zs3.files import write_json
from zs3.label_space import FoundIds, LabelSpace, load_label_space

SHOWN = 20  # problems that are printed
PIXELS_AT_ONCE = 2**22  # that one count takes


@dataclass
class CheckArgs(Arguments):
    """Checks that every picture of a dataset can be used for training and evaluation."""

    dataset: str | None = flag(None, "Folder or Hub id of the data.")
    splits: Some[str] = flag(["train", "validation"], "Splits to read.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; default: the dataset's own.")
    num_workers: Workers = flag(0, "Processes that read pictures; 0 reads in the main one.")
    output: OutputFile | None = flag(None, "Result file (JSON), with all problems and counts.")

    def check(self) -> None:
        check_required(self, "dataset")


class Read(NamedTuple):
    """One record. pixels: (C,) int64, the count of each class, or None if there is a problem. turned: the picture has
    an EXIF rotation. ignored: some pixels are ignored."""

    image_id: str
    pixels: np.ndarray | None
    problem: str | None
    turned: bool = False
    ignored: bool = False


class Reading(Dataset):
    def __init__(self, records: Split):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Read:
        space, image_id = self.records.label_space, self.records.image_ids[index]
        try:
            stored = self.records.stored(index)
            turned = stored.is_turned
            stored.decoded()
        except InputError as error:
            return Read(image_id, None, str(error))
        pixels = np.zeros(len(space.class_names), dtype=np.int64)
        for part in np.array_split(stored.label.ravel(), math.ceil(stored.label.size / PIXELS_AT_ONCE)):
            pixels += np.bincount(part[part != space.ignore_index], minlength=len(pixels))
        return Read(image_id, pixels, None, turned, bool(stored.label.size > pixels.sum()))


def read_split(records: Split, num_workers: int) -> dict:
    """Counts and problems of one split, image ids with an EXIF rotation, pixels and images of each class."""
    loader = DataLoader(Reading(records), batch_size=1, collate_fn=list, num_workers=num_workers)
    pixels = np.zeros(len(records.label_space.class_names), dtype=np.int64)
    images, problems, turned, unlabelled = pixels.copy(), [], [], 0
    found = FoundIds(records.label_space)
    for (read,) in tqdm(loader, unit="image", mininterval=1):
        if read.problem is not None:
            problems.append(read.problem)
            continue
        pixels += read.pixels
        images += read.pixels > 0
        unlabelled += not read.pixels.any()
        turned += [read.image_id] * read.turned
        found.add(np.flatnonzero(read.pixels), read.ignored)
    fault = found.fault()
    notes = [fault] if fault is not None and pixels.any() else []
    if unlabelled == len(records):
        problems.append("every pixel of every picture is ignored: there is nothing to train on")
    names = records.label_space.class_names
    return {
        "num_images": len(records),
        "images_without_labels": unlabelled,
        "pixels": dict(zip(names, pixels.tolist(), strict=True)),
        "images": dict(zip(names, images.tolist(), strict=True)),
        "exif_orientation": turned,
        "notes": notes,
        "problems": problems,
    }


def report(splits: dict[str, dict], label_space: LabelSpace) -> str:
    """A line for each class: its images and its percent of the labelled pixels, in each split."""
    lines, unseen = [], set(label_space.unseen)
    for split, found in splits.items():
        lines.append(f"{split}: {found['num_images']} images, {found['images_without_labels']} of them without a label")
    lines.append("  ".join(f"{split + ' images':>17} {'pixels':>7}" for split in splits) + "  class")
    for name in label_space.class_names:
        cells = []
        for found in splits.values():
            share = found["pixels"][name] / max(sum(found["pixels"].values()), 1)
            cells.append(f"{found['images'][name]:17d} {100 * share:6.2f}%")
        lines.append("  ".join(cells) + f"  {name}{' (unseen)' if name in unseen else ''}")
    for split, found in splits.items():
        if found["exif_orientation"]:
            shown = ", ".join(found["exif_orientation"][:3]) + (", ..." if len(found["exif_orientation"]) > 3 else "")
            lines.append(
                f"note: {len(found['exif_orientation'])} pictures of {split} have an EXIF rotation ({shown}), which is "
                "not applied: their maps must fit them as stored"
            )
        lines += [f"note: {split}: {note}" for note in found["notes"]]
    problems = [problem for found in splits.values() for problem in found["problems"]]
    lines += [f"problem: {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more (--output has them all)")
    return "\n".join(lines)


def main() -> None:
    args, _ = read_arguments(CheckArgs)
    label_space = load_label_space(args.label_space or args.dataset)
    records = {split: load_split(args.dataset, split, label_space) for split in args.splits}
    splits = {split: read_split(part, args.num_workers) for split, part in records.items()}
    for split, found in splits.items():
        if split == "train":  # an evaluation, unlike training, may have unseen classes alone
            found["problems"] += found["notes"]
            found["notes"] = []
    print(report(splits, label_space))
    if args.output is not None:
        write_json(Path(args.output), {"dataset": dataset_name(args.dataset), "splits": splits})
    count = sum(len(found["problems"]) for found in splits.values())
    if count:
        raise InputError(f"{count} problem{'s' * (count > 1)} in {args.dataset}, listed above: mend or remove each")
