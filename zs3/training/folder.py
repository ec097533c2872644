"""The output folder of a training run: its recipe, its stamp, checkpoints, metrics and the final model.

Whatever is there under its own name is whole: files and folders are written beside, brought to the disk and renamed.
So a run may be killed at any moment. What happens to a checkpoint later (a truncated file, a flipped bit) its manifest
shows, and the run goes on from the one before.

Weights are read from safetensors alone, but for FSDP's checkpoints, which are torch's sharded files. The states of
optimizer, scaler and random numbers are accelerate's files, the schedule's and the counts are in progress.bin: pickles,
all read with torch's `weights_only`, which runs no code of the file. (Objects given to `register_for_checkpointing`
would be read without it, hence none is.)
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import ProcessorMixin

from configuration_zs3 import Zs3Config, one_line, shortened
from files_zs3 import is_leftover, lines_of, read_text
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor
from zs3.checkpoints import CHECKPOINT_ERRORS, WEIGHTS, not_finite, weight_files
from zs3.command_line import InputError, parse_yaml, renamed
from zs3.files import append_line, file_sha256, finite_or_none, naming, rename, write_json, write_text
from zs3.training.arguments import recipe_defaults
from zs3.training.stamp import (
    BRIEF,
    STAMP,
    TOWER_WEIGHTS,
    change_since,
    check_not_unseen,
    joined,
    read_stamp,
    record_in,
    record_of,
)
from zs3.training.stopping import agree, all_refuse

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
# A checkpoint that has these lists them in its manifest.
LISTED = ("progress.bin", WEIGHTS, "optimizer.bin", STAMP, RECIPE)
# What progress.bin holds.
PROGRESS = {"step": int, "seconds": int | float, "num_processes": int, "towers_sha256": str, "scheduler": dict}
# What torch.save says when the disk takes no more: the system's reason is lost in its C++.
TORCH_CANNOT_WRITE = ("iostream error", "inline_container", "PytorchStreamWriter")


def may_change(recipe: dict) -> set[str]:
    """The flags that another start of a run may have otherwise: rounding aside, its weights do not hang on them."""
    free = {"output_dir", "logging_steps", "checkpointing_steps", "checkpoints_kept", "trackers"}
    if not recipe.get("streaming"):  # whose order is that of its readers
        free.add("num_workers")
        if recipe.get("backbone_norm") not in ("batch", "sync"):  # of the images that are taken at once
            free.add("device_batch_size")
    return free


def has_begun(folder: Path) -> bool:
    """A run that left neither a checkpoint nor a final model never was: its folder is free."""
    return bool(complete_checkpoints(folder / "checkpoints")) or (folder / "final").exists()


def check_recipe(path: Path, recipe: dict, defaults: dict | None = None) -> None:
    """A folder holds one run: its recipe is written at the start and must be the same when the run resumes, but for
    what `may_change`.

    defaults: of every flag; they stand for flags that the run's recipe lacks.
    """
    if has_begun(path.parent):
        written = read_recipe(path)
        before = {**{name: value for name, value in (defaults or {}).items() if name in recipe}, **written}
        fixed = (before.keys() | recipe.keys()) - may_change(recipe)
        changed = [name for name in sorted(fixed) if differ(before.get(name), recipe.get(name))]
        changed.sort(key=lambda name: name not in written)  # what the run's own file says comes first
        if changed:
            name, others = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            old, new = (shortened(values.get(name), BRIEF) for values in (before, recipe))
            raise InputError(
                f"the run has {name} {old}, this command {new}{others}: give it that, or choose another --output_dir"
            )
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))


def read_recipe(path: Path) -> dict:
    """What a run that has begun was begun with, with the names of today; of a damaged file the newest copy."""
    try:
        return parse_recipe(path)
    except InputError:
        copy = copied_recipe(path.parent / "checkpoints")
        if copy is None:
            raise
        print(f"warning: {path} is missing or damaged: the copy in {copy.parent.name} counts")
        return parse_recipe(copy)


def copied_recipe(checkpoints: Path) -> Path | None:
    """The newest checkpoint's copy, where one has a whole one."""
    newest_first = reversed(complete_checkpoints(checkpoints))
    whole = (path / RECIPE for path in newest_first if (path / RECIPE).is_file() and damage(path, RECIPE) is None)
    return next(whole, None)


def parse_recipe(path: Path) -> dict:
    try:
        recipe = parse_yaml(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: put back what the run began with") from error
    if not recipe or not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise InputError(f"{path} is no recipe: put back what the run began with")
    return renamed(recipe, path, recipe_defaults())


# ---- the stamp ---------------------------------------------------------------------------------------------


def kept_stamps(folder: Path) -> list[dict]:
    """The stamps of the run in a folder, the one to believe first.

    Each checkpoint has a copy under its manifest. The file beside the recipe can be changed by hand: it counts where no
    checkpoint has a copy.
    """
    newest_first = reversed(complete_checkpoints(folder / "checkpoints"))
    copies = [path / STAMP for path in newest_first if (path / STAMP).is_file() and damage(path, STAMP) is None]
    found = [read_stamp(path) for path in copies]
    if (folder / STAMP).exists():
        try:
            found.append(read_stamp(folder / STAMP))
        except InputError:
            if not found:
                raise
            print(f"warning: {folder / STAMP} is damaged, so the newest checkpoint's copy is used")
    if len(found) > 1 and found[0] != found[-1]:
        print(f"warning: {STAMP} differs from the newest checkpoint's copy, which counts; both records are joined")
    return found


def check_stamp(folder: Path, stamp: dict, flags: Mapping[str, Any], unseen: list[str]) -> dict:
    """Refuses to go on with a run that began with something else. The stamp to keep: the record of what was seen is
    joined with those of all starts before.

    flags: of train.py. unseen: the names whose masks training never shows.
    """
    if not has_begun(folder):
        return stamp
    before = kept_stamps(folder)
    if before:
        change = change_since(before[0], stamp, flags)
        if change is not None:
            raise InputError(f"{change}: restore what this run began with, or choose another --output_dir")
    else:
        print(f"warning: the run in {folder} has no {STAMP}: whether its data have changed could not be checked")
    records = [*map(record_in, before), record_in(stamp)]
    if (folder / "final" / "config.json").is_file():
        records.append(record_of(Zs3Config.from_pretrained(folder / "final")))
    seen = joined(records)
    check_not_unseen(seen, unseen)
    return {**(before[0] if before else {}), **stamp, **seen._asdict()}


def differ(before: object, now: object) -> bool:
    """Two spellings of the path of one thing that is there do not."""
    if isinstance(before, str) and isinstance(now, str) and os.path.exists(now):
        return Path(before).resolve() != Path(now).resolve()
    return before != now


def check_places(folder: Path) -> None:
    """Of a run's files and folders none may be the other kind; some are written only after a long time."""
    for name in ("checkpoints", "final", "trackers"):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise InputError(f"{folder / name} is a file, where the run has a folder: move it away")
    for name in (RECIPE, STAMP, "metrics.jsonl", "all_results.json"):
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a folder, where the run has a file: move it away")


def check_final(folder: Path) -> None:
    """Where a final model is, can it be read? Of the weights their headers, which know how long a file is."""
    if not folder.exists():
        return
    try:
        if not (folder / "config.json").is_file():  # transformers would take the defaults
            raise InputError("it has no config.json")
        Zs3Config.from_pretrained(folder)
        for path in weight_files(folder):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
    except CHECKPOINT_ERRORS as error:
        raise InputError(
            f"{folder} is damaged ({one_line(error)}): delete it, and the same command makes it of the last checkpoint"
        ) from error


# ---- checkpoints -------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is: optimizer steps done, seconds spent."""

    step: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of a run: folders `step_*` with all that it needs to go on, but for the frozen CLIP towers.

    folder: seen by all processes, those on other machines too.
    model: not prepared yet.
    kept: how many stay when a new one is complete.
    stamp: of the run, each checkpoint has a copy.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        model: Zs3ForSemanticSegmentation,
        scheduler: LRScheduler,
        progress: Progress,
        kept: int,
        stamp: dict,
    ):
        self.accelerator = accelerator
        self.folder = folder
        self.model = model
        self.scheduler = scheduler
        self.progress = progress
        self.kept = kept
        self.stamp = stamp
        recipe = folder.parent / RECIPE
        self.recipe = read_text(recipe) if recipe.is_file() else ""  # as the start of the run has written it
        accelerator.register_save_state_pre_hook(self._leave_towers_out)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self) -> None:
        """By all processes together. Older checkpoints go only when the new one is complete."""
        self.check_finite()
        final = self.folder / f"step_{self.progress.step:08d}"
        partial = final.with_suffix(".partial")
        try:
            with naming(partial):
                self._write(partial)
        except Exception as error:
            if self.accelerator.is_main_process:  # others may be writing there
                shutil.rmtree(partial, ignore_errors=True)  # a full disk has this much room again
            if any(words in str(error) for words in TORCH_CANNOT_WRITE):
                raise InputError(
                    f"cannot write {partial}: no space left on the disk, or a limit (ulimit -f) is too low; the "
                    "checkpoint before is whole, make room and start again"
                ) from error
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            rename(partial, final)
            for old in complete_checkpoints(self.folder)[: -self.kept]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def check_finite(self) -> None:
        """By all processes together, before weights are saved: the loss shows what a step did only in the next one."""
        name = not_finite(self.model.state_dict())
        mend = "not saved; take a lower --learning_rate, and another --output_dir"
        fault = f"{name} is not finite after step {self.progress.step}: {mend}"
        agree(self.accelerator, False, None if name is None else fault)

    def _write(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            state = {
                **asdict(self.progress),
                "num_processes": self.accelerator.num_processes,
                "towers_sha256": self.stamp["towers_sha256"],
                "scheduler": self.scheduler.state_dict(),
            }
            torch.save(state, folder / "progress.bin")
            write_json(folder / STAMP, self.stamp)
            write_text(folder / RECIPE, self.recipe)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_manifest(folder)

    def resume(self) -> int | None:
        """Takes up the newest checkpoint that is whole. The number of processes that saved it; None: there is none."""
        found: list = [None]  # by the main process, for all
        with all_refuse(self.accelerator):
            if self.accelerator.is_main_process:
                found[0] = self._newest_whole()
        (path,) = broadcast_object_list(found)
        if path is None:
            return None
        state = read_progress(path)
        if state["towers_sha256"] != self.stamp["towers_sha256"]:
            raise InputError(
                f"{path} was trained with other CLIP towers: start from the same --clip or --init_from as before"
            )
        try:
            self.accelerator.load_state(str(path))
        except UnpicklingError as error:  # torch's `weights_only` ran nothing of it
            raise InputError(f"{path} holds Python objects, which are never read: delete it") from error
        # accelerate counts micro-batches. A checkpoint lies between two steps, on any number of micro-batches a step.
        self.accelerator.step = 0
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress.step, self.progress.seconds = state["step"], state["seconds"]
        return state["num_processes"]

    def _newest_whole(self) -> Path | None:
        """Damaged ones after it are put aside; what a killed run left half written is deleted."""
        for partial in filter(Path.is_dir, self.folder.glob("*.partial")):
            shutil.rmtree(partial)
        give_true_names(self.folder)
        damaged = []
        found = complete_checkpoints(self.folder)
        for path in reversed(found):
            fault = damage(path) or unfit(path, self.model.state_dict())
            if fault is None:
                break
            print(f"warning: checkpoint {path} is damaged ({fault}): it is not used")
            damaged.append(path)
        else:
            if found:
                # Starting over by itself could throw away days of work that the user may still rescue: a copy of the
                # folder, a disk that is back tomorrow.
                raise InputError(
                    f"no checkpoint in {self.folder} is whole: put one back, or delete this folder to train from the "
                    "beginning"
                )
            return None
        for other in damaged:
            aside = other.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(other, aside)
        return path

    def _leave_towers_out(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        """accelerate's hook before it writes the weights; sharded ones (FSDP) it has written already, whole."""
        if weights:
            state = self.model.state_dict()
            weights[:] = [{name: tensor for name, tensor in state.items() if not name.startswith(TOWER_WEIGHTS)}]

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        """accelerate's hook before it reads the weights; those that it is to read itself (FSDP's) are not listed."""
        if models:
            models.clear()
            missing, unexpected = load_model(self.model, Path(folder) / "model.safetensors", strict=False)
            lost = sorted(name for name in missing if not name.startswith(TOWER_WEIGHTS)) + unexpected
            if lost:
                raise InputError(f"{folder} is of another architecture: {lost[0]} and {len(lost) - 1} other weights")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in order of their steps. One still being written, or put aside as damaged, has another name."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def unfit(folder: Path, state: Mapping[str, Tensor] | None = None) -> str | None:
    """Why a run cannot continue from a checkpoint that is as it was written, or None.

    state: of the run's model, whose types the weights must have; None: not known. FSDP's sharded weights are checked
    before the next save.
    """
    try:
        read_progress(folder)
        weights = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {}
    except (InputError, OSError, SafetensorError) as error:
        return one_line(error)
    for name in weights.keys() & (state or {}).keys():
        if weights[name].dtype != state[name].dtype:
            return f"{name} is of {weights[name].dtype}, not of {state[name].dtype}"
    name = not_finite(weights)
    return None if name is None else f"{name} is not finite"


def read_progress(folder: Path) -> dict:
    """What a checkpoint says beside its weights. Raises InputError where it is not what `Checkpoints` wrote there."""
    try:
        state = torch.load(folder / "progress.bin", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise InputError(f"progress.bin cannot be read: {one_line(error, 80)}") from error
    state = state if isinstance(state, dict) else {}
    lacking = [name for name, kind in PROGRESS.items() if not isinstance(state.get(name), kind)]
    if lacking:
        raise InputError(f"progress.bin lacks {lacking[0]}")
    return state


def true_name(folder: Path) -> str:
    """What a checkpoint is to be called: names may have been exchanged. Raises InputError of a damaged one."""
    return f"step_{read_progress(folder)['step']:08d}"


def give_true_names(folder: Path) -> None:
    """Of the checkpoints in a folder; a line says which had another's."""
    for path in complete_checkpoints(folder):
        try:
            misnamed = damage(path, "progress.bin") is None and true_name(path) != path.name
        except InputError:  # a damaged one, of which more is said where it is not used
            misnamed = False
        if misnamed:
            path.replace(path.with_suffix(".misnamed"))
    for aside in sorted(folder.glob("step_*.misnamed")):  # also those of a start that was killed here
        name, place = true_name(aside), folder / true_name(aside)
        place = aside.with_suffix(".damaged") if place.exists() else place
        print(f"warning: {aside.with_suffix('')} is the checkpoint of {name}: it is renamed to {place.name}")
        shutil.rmtree(place, ignore_errors=True)
        aside.replace(place)


def write_manifest(folder: Path) -> None:
    """The size and hash of every file of a folder, in a file of its own."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not is_leftover(path.name))
    manifest = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    write_json(folder / MANIFEST, manifest)


def damage(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint by its manifest; None if it is as it was written.

    only: the one file to look at; None: all.
    """
    try:
        manifest = json.loads(read_text(folder / MANIFEST))
        unlisted = [name for name in LISTED if name not in manifest and (folder / name).exists()]
        if unlisted or "progress.bin" not in manifest:
            return f"{MANIFEST} does not list {[*unlisted, 'progress.bin'][0]}"
        for name, written in manifest.items() if only is None else [(only, manifest[only])]:
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} bytes, not {written['bytes']}"
            if file_sha256(folder / name) != written["sha256"]:
                return f"the contents of {name} have changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    # An unreadable file, or a damaged manifest.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return one_line(error)
    return None


# ---- results -----------------------------------------------------------------------------------------------


def save_final(model: Zs3ForSemanticSegmentation, processor: ProcessorMixin | Zs3ImageProcessor, folder: Path) -> None:
    """Refuses weights that are not finite: no number can be had of them."""
    name = not_finite(model.state_dict())
    if name is not None:
        raise InputError(f"{name} is not finite, so {folder} is not written: take a lower --learning_rate")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with naming(folder):
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        rename(partial, folder)


class Metrics(NamedTuple):
    """What a metrics.jsonl holds: its lines in order, and how many more there are that the training did not write."""

    rows: list[dict]
    damaged: int


def read_metrics(path: Path) -> Metrics:
    """The last line may be the half of one that a killed run leaves: it does not count as damaged."""
    text = path.read_bytes().decode("utf-8-sig", "replace") if path.exists() else ""
    rows = [_values(line) for line in lines_of(text)]
    return Metrics([row for row in rows if row is not None], rows[:-1].count(None))


def _values(line: str) -> dict | None:
    """What `MetricsLog.write` wrote in a line; None if that cannot be."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


class MetricsLog:
    """metrics.jsonl: one JSON a logged step. Lines past the step a run resumes at are dropped."""

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
        append_line(self.path, json.dumps(self.last))  # to the disk before the checkpoint that passes it
