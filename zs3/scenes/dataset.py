"""Writes the embedded benchmark as a folder that train.py and eval.py read.

Not in `render.py`: the drawing processes import that file, and this one also imports transformers, which takes seconds.
"""

import multiprocessing
import os
from functools import partial
from pathlib import Path

from tqdm import tqdm

from zs3.command_line import InputError
from zs3.data.records import load_split
from zs3.files import write_json, writing_folder
from zs3.label_space import LabelSpace, benchmark_spaces, load_label_space
from zs3.scenes.render import SceneFile, write_scene

FIRST_VALIDATION = 10**6  # training indices count from 0, validation indices from here
TEST_SCENES = 2**34  # added to the seed of a dataset: its test split has a seed that no other scene has
SPACES = ("scenes", "scenes_90")  # label spaces whose ids are in the label maps


def world_space(name: str) -> LabelSpace:
    """The label space "scenes" or "scenes_90", with the unseen names of a class split behind a colon: "scenes:3".

    Unlike `load_label_space`, it reads no folder: a dataset of that name may lie in the working directory.
    """
    spaces = {}
    for own in SPACES:
        whole, *splits = benchmark_spaces(own)
        spaces |= {own: whole} | {f"{own}:{number}": split for number, split in enumerate(splits)}
    if name not in spaces:
        known = f"{' or '.join(SPACES)}, alone or with a split, 0 to {len(splits) - 1}"
        raise InputError(f"label space {name} is none of the scenes: give {known}, as in scenes:3")
    return spaces[name]


def scene_files(num_train: int, num_validation: int, num_test: int, seed: int) -> list[SceneFile]:
    """All pictures of a dataset. The splits share no scene."""
    files = [SceneFile("train", number, seed, number) for number in range(num_train)]
    files += [SceneFile("validation", number, seed, FIRST_VALIDATION + number) for number in range(num_validation)]
    return files + [SceneFile("test", number, TEST_SCENES + seed, number) for number in range(num_test)]


def _write_all(folder: Path, files: list[SceneFile]) -> None:
    write = partial(write_scene, folder)
    processes = min(os.cpu_count() or 1, 8)
    with tqdm(total=len(files), desc="drawing scenes", unit="scene") as progress:
        if processes == 1 or len(files) < 500:  # a new process takes about as long to start as 300 scenes
            for file in files:
                write(file)
                progress.update()
            return
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in pool.imap_unordered(write, files, chunksize=20):
                progress.update()


def write_dataset(
    folder: str | Path, num_train: int, num_validation: int, seed: int, num_test: int = 0, label_space: str = "scenes"
) -> None:
    """Writes {train,validation,test}/{images,labels}/00000.png ... and classes.json.

    label_space: of classes.json, see `world_space`. Pictures and label maps are the same for all of them. Labels are
        dense and include unseen classes, which the reader removes in training.
    The folder gets its name when it is complete. Several processes draw a large set. They import the main script again,
    so call this below `if __name__ == "__main__":`.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already: give another folder, or remove it first")
    space = world_space(label_space)
    files = scene_files(num_train, num_validation, num_test, seed)
    with writing_folder(folder) as unfinished:
        for split in dict.fromkeys(file.split for file in files):
            for kind in ("images", "labels"):
                (unfinished / split / kind).mkdir(parents=True)
        _write_all(unfinished, files)
        classes = {"name": label_space, "classes": space.class_names, "things": space.things, "unseen": space.unseen}
        write_json(unfinished / "classes.json", {**classes, "ignore_label": space.ignore_index})


def write_if_missing(folder: Path, num_train: int, num_validation: int, num_test: int = 0) -> None:
    """Writes the benchmark of seed 0, or refuses a folder with another number of scenes or another edition."""
    if not folder.exists():
        write_dataset(folder, num_train, num_validation, seed=0, num_test=num_test)
    if load_label_space(folder) != world_space("scenes"):
        raise InputError(f"{folder} holds scenes of another edition: delete it, or choose another --output_dir")
    asked = {"train": num_train, "validation": num_validation} | ({"test": num_test} if num_test else {})
    counts = {split: len(load_split(folder, split)) if (folder / split).is_dir() else 0 for split in asked}
    if counts != asked:
        found = ", ".join(f"{count} {split}" for split, count in counts.items())
        raise InputError(f"{folder} holds {found} scenes: delete it, or choose another --output_dir")
