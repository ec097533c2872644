"""The output folder of a run: recipe, stamp, metrics and final model. (Its checkpoints: `zs3.training.resume`.)

A file or folder is written under a temporary name, synced to the disk, and renamed. So a file with its final name is
whole, and a run may be killed at any moment.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor
from transformers import ProcessorMixin

from configuration_zs3 import Zs3Config, one_line, shortened
from files_zs3 import lines_of, read_text
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor
from zs3.checkpoints import load_config, not_finite, weight_files
from zs3.command_line import InputError, parse_yaml, renamed
from zs3.data.image_labels import LabelCounts
from zs3.files import append_line, finite_or_none, lock_folder, naming, rename, write_json, write_text
from zs3.training.arguments import RECIPE, recipe_defaults, resolved_recipe
from zs3.training.loader import check_learnable
from zs3.training.resume import Progress, complete_checkpoints, whole_copies
from zs3.training.stamp import (
    BRIEF,
    STAMP,
    change_since,
    check_not_unseen,
    joined,
    make_stamp,
    read_stamp,
    record_in,
    record_of,
)
from zs3.training.start import Start
from zs3.training.stopping import all_refuse


def claim_folder(flags: dict, start: Start, accelerator: Accelerator) -> tuple[ExitStack, dict]:
    """Locks the output folder for this run, or refuses it. The model's config gets the record of all starts of the run.

    All processes call it together. Returns the lock and the run's stamp. Only the main process holds the lock. It
    releases the folder when it closes the lock.

    flags: of train.py.
    """
    lock, stamps = ExitStack(), [None]
    with all_refuse(accelerator):
        if accelerator.is_main_process:
            lock, stamps[0] = _claim(flags, start)
    (stamp,) = broadcast_object_list(stamps)
    start.model.config.seen_class_names, start.model.config.unseen_labels = record_in(stamp)
    return lock, stamp


def _claim(flags: dict, start: Start) -> tuple[ExitStack, dict]:
    folder = Path(flags["output_dir"])
    if not has_begun(folder):
        check_learnable(start.dataset.records, start.label_space)
    with lock_folder(folder) as lock:
        check_places(folder)
        check_final(folder / "final")
        before = None if flags["init_from"] is None else record_of(load_config(flags["init_from"]))
        stamp = make_stamp(flags, start.whole_space, start.dataset.records, start.prompts, before, start.model)
        stamp = check_stamp(folder, stamp, flags, start.label_space.unseen)
        check_recipe(folder / RECIPE, resolved_recipe(flags, start.model.config), recipe_defaults())
        write_json(folder / STAMP, stamp)
        return lock.pop_all(), stamp


def has_begun(folder: Path) -> bool:
    """Whether the folder has a checkpoint or a final model. If not, any run may use it."""
    return bool(complete_checkpoints(folder / "checkpoints")) or (folder / "final").exists()


def check_places(folder: Path) -> None:
    """Refuses a file where the run writes a folder, and the reverse. Otherwise the run would fail much later."""
    for name in ("checkpoints", "final", "trackers"):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise InputError(f"{folder / name} is a file, but the run needs a folder there: move it away")
    for name in (RECIPE, STAMP, "metrics.jsonl", "all_results.json"):
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a folder, but the run needs a file there: move it away")


def check_final(folder: Path) -> None:
    """Refuses a final model that cannot be read. It reads the headers of the weights, which give the file's length."""
    if not folder.exists():
        return
    try:
        if not (folder / "config.json").is_file():  # without it transformers would use the defaults
            raise InputError("it has no config.json")
        Zs3Config.from_pretrained(folder)
        for path in weight_files(folder):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
    except Exception as error:  # see `refusing`
        raise InputError(
            f"{folder} is damaged ({one_line(error)}): delete it, and the same command makes it again"
        ) from error


# ---- the recipe --------------------------------------------------------------------------------------------


def check_recipe(path: Path, recipe: dict, defaults: dict | None = None) -> None:
    """Writes the recipe of a new run. When a run resumes, all flags but those of `may_change` must be the same.

    defaults: the values of flags that the recipe of an older version does not have.
    """
    if has_begun(path.parent):
        written = read_recipe(path)
        before = {**{name: value for name, value in (defaults or {}).items() if name in recipe}, **written}
        fixed = (before.keys() | recipe.keys()) - may_change(recipe)
        changed = [name for name in sorted(fixed) if differ(before.get(name), recipe.get(name))]
        changed.sort(key=lambda name: name not in written)  # flags of the run's own file come first
        if changed:
            name, others = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            old, new = (shortened(values.get(name), BRIEF) for values in (before, recipe))
            raise InputError(
                f"the run has {name} {old}, this command {new}{others}: give the run's, or choose another --output_dir"
            )
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))


def may_change(recipe: dict) -> set[str]:
    """The flags that a later start of a run may change. Apart from rounding, the weights do not depend on them."""
    free = {"output_dir", "logging_steps", "checkpointing_steps", "checkpoints_kept", "trackers"}
    if not recipe.get("streaming"):  # the order of a stream depends on its workers
        free.add("num_workers")
        if recipe.get("backbone_norm") not in ("batch", "sync"):  # they average over the images computed at once
            free.add("device_batch_size")
    return free


def differ(before: object, now: object) -> bool:
    """Whether two values differ. Two spellings of one existing path do not."""
    if isinstance(before, str) and isinstance(now, str) and os.path.exists(now):
        return Path(before).resolve() != Path(now).resolve()
    return before != now


def read_recipe(path: Path) -> dict:
    """The recipe of a run, with today's flag names. If it is damaged, the copy in the newest checkpoint is read."""
    try:
        return parse_recipe(path)
    except InputError:
        copies = whole_copies(path.parent / "checkpoints", RECIPE)
        if not copies:
            raise
        print(f"warning: {path} is missing or damaged: the copy in {copies[0].parent.name} is used")
        return parse_recipe(copies[0])


def parse_recipe(path: Path) -> dict:
    try:
        recipe = parse_yaml(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: restore the run's own recipe") from error
    if not recipe or not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise InputError(f"{path} is no recipe: restore the run's own recipe")
    return renamed(recipe, path, "TrainArgs")


# ---- the stamp ---------------------------------------------------------------------------------------------


def check_stamp(folder: Path, stamp: dict, flags: Mapping[str, Any], unseen: list[str]) -> dict:
    """The stamp to write. Its record is joined with the records of all earlier starts. Refuses changed inputs.

    flags: of train.py. unseen: the names of the classes that are unseen in this start.
    """
    if not has_begun(folder):
        return stamp
    before = kept_stamps(folder)
    if before:
        change = change_since(before[0], stamp, flags)
        if change is not None:
            raise InputError(f"{change}: restore the run's first inputs, or choose another --output_dir")
    else:
        print(f"warning: the run in {folder} has no {STAMP}: changes of its data cannot be found")
    records = [*map(record_in, before), record_in(stamp)]
    if (folder / "final" / "config.json").is_file():
        records.append(record_of(Zs3Config.from_pretrained(folder / "final")))
    seen = joined(records)
    check_not_unseen(seen, unseen)
    return {**(before[0] if before else {}), **stamp, **seen._asdict()}


def kept_stamps(folder: Path) -> list[dict]:
    """The stamps of a run, the most reliable one first.

    A checkpoint's copy is protected by a manifest. The file beside the recipe can be changed by hand, so it comes last.
    """
    found = [read_stamp(path) for path in whole_copies(folder / "checkpoints", STAMP)]
    if (folder / STAMP).exists():
        try:
            found.append(read_stamp(folder / STAMP))
        except InputError:
            if not found:
                raise
            print(f"warning: {folder / STAMP} is damaged, so the newest checkpoint's copy is used")
    if len(found) > 1 and found[0] != found[-1]:
        print(f"warning: {STAMP} differs from the newest checkpoint's copy, which is used; both records are joined")
    return found


# ---- results -----------------------------------------------------------------------------------------------


def label_quality(counts: Tensor) -> dict[str, float | None]:
    """Precision and recall of a training's image labels of unseen classes, as fields of Zs3Config.

    None: the training had no such labels, its label maps have no unseen class, or an older version began the run.
    counts: (3,) as in `LabelCounts`.
    """
    found = LabelCounts(*counts.numpy())
    measured = {"image_label_precision": float(found.precision), "image_label_recall": float(found.recall)}
    return finite_or_none(measured) if found.present else dict.fromkeys(measured)


def save_final(model: Zs3ForSemanticSegmentation, processor: ProcessorMixin | Zs3ImageProcessor, folder: Path) -> None:
    """Writes the final model. Refuses weights that are not finite."""
    name = not_finite(model.state_dict())
    if name is not None:
        raise InputError(f"{name} is not finite, so {folder} is not written: take a lower --learning_rate")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with naming(folder):
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        rename(partial, folder)


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """The lines of a metrics.jsonl in order, and the number of damaged lines.

    A half-written last line does not count as damaged, because a killed run leaves one.
    """
    text = path.read_bytes().decode("utf-8-sig", "replace") if path.exists() else ""
    rows = [_values(line) for line in lines_of(text)]
    return [row for row in rows if row is not None], rows[:-1].count(None)


def _values(line: str) -> dict | None:
    """The content of a line. None if `MetricsLog.write` cannot have written it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


class MetricsLog:
    """metrics.jsonl: one JSON for each logged step. Lines after the step from which a run resumes are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        rows, damaged = read_metrics(path)
        if damaged:
            print(f"warning: {damaged} lines of {path} are damaged: they are left out")
        kept = [values for values in rows if values["step"] <= step]
        self.last: dict = kept[-1] if kept else {}
        write_text(path, "".join(json.dumps(values) + "\n" for values in kept))

    def write(self, progress: Progress, values: dict[str, float]) -> None:
        self.last = finite_or_none({"step": progress.step, **values, "seconds": round(progress.seconds, 2)})
        append_line(self.path, json.dumps(self.last))  # on the disk before the next checkpoint
