"""Writes the embedded benchmark as a folder that train.py and eval.py read.

Not in `render.py`: the drawing processes import that file, and this one also imports transformers, which takes seconds.
"""

import multiprocessing
import os
from functools import partial
from pathlib import Path

from tqdm import tqdm

from zs3.command_line import InputError
from zs3.files import write_json, writing_folder
from zs3.scenes.render import CLASS_NAMES, IGNORE_INDEX, UNSEEN, write_scene

FIRST_VALIDATION = 10**6  # training indices count from 0, validation indices from here


def _write_all(folder: Path, jobs: list[tuple[str, int, int]], seed: int) -> None:
    write = partial(write_scene, folder=folder, seed=seed)
    processes = min(os.cpu_count() or 1, 8)
    with tqdm(total=len(jobs), desc="drawing scenes", unit="scene") as progress:
        if processes == 1 or len(jobs) < 500:  # a new process takes about as long to start as 300 scenes
            for job in jobs:
                write(job)
                progress.update()
            return
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in pool.imap_unordered(write, jobs, chunksize=20):
                progress.update()


def write_dataset(folder: str | Path, num_train: int, num_validation: int, seed: int) -> None:
    """Writes {train,validation}/{images,labels}/00000.png ... and classes.json.

    Labels are dense and include unseen classes, which the reader removes in training. The folder gets its name when it
    is complete. Several processes draw a large set. They import the main script again, so call this below
    `if __name__ == "__main__":`.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already: give another folder, or remove it first")
    jobs = [("train", number, number) for number in range(num_train)]
    jobs += [("validation", number, FIRST_VALIDATION + number) for number in range(num_validation)]
    with writing_folder(folder) as unfinished:
        for split in ("train", "validation"):
            for kind in ("images", "labels"):
                (unfinished / split / kind).mkdir(parents=True)
        _write_all(unfinished, jobs, seed)
        classes = {"name": "scenes", "classes": CLASS_NAMES, "unseen": UNSEEN, "ignore_label": IGNORE_INDEX}
        write_json(unfinished / "classes.json", classes)
