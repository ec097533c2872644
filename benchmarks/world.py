"""What the embedded benchmark `scenes` shows: how often each class, ignored pixels by class split, a contact sheet.

    zs3 scenes --output runs/scenes
    python -m benchmarks.world --dataset runs/scenes --output docs/results/world.json --sheet docs/images/scenes.png

Counts are over the label maps of a split. In training, pixels of unseen classes and of distractors are ignored; a share
says how many of these pixels are of unseen classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import measuring
from configuration_zs3 import Number
from zs3.command_line import InputError, OutputFile, check_required, flag, read_arguments, run
from zs3.data.records import Split, load_split
from zs3.evaluation.pictures import save_picture
from zs3.label_space import benchmark_spaces
from zs3.tables import percent

COLUMNS = 8  # of the contact sheet
GAP = 4  # pixels between its pictures


@dataclass
class WorldArgs(measuring.BenchmarkArguments):
    """The data that is counted."""

    dataset: str | None = flag(None, "Folder made by `zs3 scenes`.")
    split: str = flag("train", "Split whose label maps are counted.")
    sheet: OutputFile | None = flag(None, "PNG to draw the first pictures into.")
    pictures: Annotated[int, Number(int, 1, 1000)] = flag(24, "Pictures of the contact sheet.")

    def check(self) -> None:
        check_required(self, "dataset")


def areas_of(records: Split) -> np.ndarray:
    """(N, C + 1) int64: pixels of each class in each label map; the last column is for ignored pixels."""
    space = records.label_space
    num_classes = len(space.class_names)
    rows = []
    for index in tqdm(range(len(records)), desc="label maps", unit="map"):
        label = records.label(index)
        label = np.where(label == space.ignore_index, num_classes, label)
        rows.append(np.bincount(label.ravel(), minlength=num_classes + 1))
    return np.stack(rows)


def class_rows(areas: np.ndarray, names: list[str], things: list[str]) -> list[dict]:
    """Of each class: the share of pictures that show it, and its share of all pixels."""
    shown, pixels = (areas > 0).mean(axis=0), areas.sum(axis=0) / areas.sum()
    return [
        {
            "class": name,
            "kind": "thing" if name in things else "stuff",
            "pictures": shown[place],
            "pixels": pixels[place],
        }
        for place, name in enumerate(names)
    ]


def split_row(areas: np.ndarray, names: list[str], unseen: list[str]) -> dict:
    """One class split: how much of the pictures its unseen classes and the distractors hide."""
    own = areas[:, [names.index(name) for name in unseen]]
    hidden, distractors = own.sum(), areas[:, -1].sum()
    labels = (own > 0).sum(axis=1)
    return {
        "unseen": ", ".join(unseen),
        "unseen_pixels": hidden / areas.sum(),
        "ignored_pixels": (hidden + distractors) / areas.sum(),
        "unseen_of_ignored": hidden / max(hidden + distractors, 1),
        "labels_per_picture": labels.mean(),
        "one_label": (labels == 1).mean(),
        "no_label": (labels == 0).mean(),
    }


def draw_sheet(records: Split, count: int, path: Path) -> None:
    images = [records[index].image for index in range(min(count, len(records)))]
    width, height = images[0].size
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % COLUMNS * (width + GAP), number // COLUMNS * (height + GAP)))
    save_picture(sheet, path)


def counted(records: Split) -> dict:
    space, *splits = benchmark_spaces("scenes")
    if records.label_space.class_names[: len(space.class_names)] != space.class_names:  # `scenes_90` has more
        raise InputError("--dataset has other classes than the scenes: give a folder made by `zs3 scenes`")
    areas = areas_of(records)
    return {
        "pictures": len(records),
        "classes_per_picture": (areas[:, :-1] > 0).sum(axis=1).mean(),
        "classes": class_rows(areas, space.class_names, space.things),
        "splits": [
            {"split": f"scenes:{number}", **split_row(areas, space.class_names, split.unseen)}
            for number, split in enumerate(splits)
        ],
    }


def text_of(result: dict, split: str) -> str:
    classes = [
        [row["class"], row["kind"], percent(row["pictures"]), percent(row["pixels"])] for row in result["classes"]
    ]
    shares = ("unseen_pixels", "ignored_pixels", "unseen_of_ignored")
    splits = [
        [
            *(row["split"], row["unseen"], *(percent(row[name]) for name in shares)),
            *(f"{row['labels_per_picture']:.2f}", percent(row["one_label"]), percent(row["no_label"])),
        ]
        for row in result["splits"]
    ]
    titles = ["class split", "unseen classes", "unseen pixels", "ignored pixels", "unseen of ignored"]
    titles += ["unseen classes a picture", "pictures with one unseen class", "pictures without"]
    largest = percent(max(row["unseen_of_ignored"] for row in result["splits"]))
    return f"""# The embedded benchmark `scenes`: what its pictures show

Synthetic. Shares of pictures and pixels are in percent. The split `{split}` has {result["pictures"]:,} pictures, with
{result["classes_per_picture"]:.1f} classes a picture on average. Made by `{result["command"]}`.

## Classes
{measuring.table_of(["class", "kind", "pictures", "pixels"], classes)}
## Class splits
In training, the pixels of unseen classes and of distractors are ignored. The share of ignored pixels that are of unseen
classes is at most {largest} %.

{measuring.table_of(titles, splits)}"""


def main() -> None:
    args, _ = read_arguments(WorldArgs)
    records = load_split(args.dataset, args.split)
    result = {**measuring.head(), **counted(records)}
    measuring.publish(args.output, result, text_of(result, args.split))
    if args.sheet is not None:
        draw_sheet(records, args.pictures, Path(args.sheet))


if __name__ == "__main__":
    run(main)
