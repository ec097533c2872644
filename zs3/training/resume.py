"""The progress of a run, and the checkpoints from which it resumes.

A checkpoint gets its name `step_*` when it is whole, so a run may be killed at any moment. Later damage, such as a
truncated file or a flipped bit, shows in its manifest. The run then goes on from the checkpoint before it.

Weights are safetensors; under FSDP they are torch's sharded files. The other files are pickles: accelerate writes the
states of optimizer, scaler and random numbers, and progress.bin has the schedule and the counts. All pickles are read
with torch's `weights_only`, which runs no code of the file. accelerate's `register_for_checkpointing` is not used,
because accelerate reads such objects without `weights_only`.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from configuration_zs3 import one_line
from files_zs3 import is_leftover, read_text
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.checkpoints import WEIGHTS, not_finite
from zs3.command_line import InputError
from zs3.files import file_sha256, naming, rename, write_json, write_text
from zs3.training.arguments import RECIPE
from zs3.training.stamp import STAMP, TOWER_WEIGHTS
from zs3.training.stopping import agree, all_refuse

MANIFEST = "manifest.json"
LISTED = ("progress.bin", WEIGHTS, "optimizer.bin", STAMP, RECIPE)  # a manifest lists those that exist
PROGRESS = {"step": int, "seconds": int | float, "num_processes": int, "towers_sha256": str, "scheduler": dict}
# If the disk is full, torch.save's error has one of these words, and the system's own reason is lost.
TORCH_CANNOT_WRITE = ("iostream error", "inline_container", "PytorchStreamWriter")


def same_counts(count: float) -> Tensor:
    return torch.full((3,), count, dtype=torch.float64)


@dataclass
class Progress:
    """The optimizer steps that a run has made, the seconds that they took, and counts of its image labels."""

    step: int = 0
    seconds: float = 0.0
    label_counts: Tensor = field(default_factory=lambda: same_counts(0))  # (3,), this process's part; NaN: unknown

    def all_label_counts(self) -> Tensor:
        """(3,): see `zs3.data.image_labels.LabelCounts`. All processes call it together."""
        return torch.tensor(gather_object([self.label_counts.tolist()]), dtype=torch.float64).sum(dim=0)


@dataclass(eq=False)
class RunCheckpoints:
    """The checkpoints of a run: folders `step_*` with all that a resume needs, except the frozen encoder."""

    accelerator: Accelerator
    folder: Path  # all processes can read it, also those on other machines
    model: Zs3ForSemanticSegmentation  # before accelerate prepares it
    scheduler: LRScheduler
    progress: Progress
    kept: int  # number of checkpoints; older ones are deleted
    stamp: dict  # of the run; each checkpoint has a copy

    def __post_init__(self) -> None:
        recipe = self.folder.parent / RECIPE
        self.recipe = read_text(recipe) if recipe.is_file() else ""
        self.accelerator.register_save_state_pre_hook(self._leave_towers_out)
        self.accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self) -> None:
        """All processes call it together. Older checkpoints are deleted only when the new one is complete."""
        name = not_finite(self.model.state_dict())  # the loss shows it only in the next step
        mend = "not saved; take a lower --learning_rate, and another --output_dir"
        fault = None if name is None else f"{name} is not finite after step {self.progress.step}: {mend}"
        agree(self.accelerator, False, fault)
        final = self.folder / f"step_{self.progress.step:08d}"
        partial = final.with_suffix(".partial")
        try:
            with naming(partial):
                self._write(partial)
        except Exception as error:
            if self.accelerator.is_main_process:  # other processes may still write there
                shutil.rmtree(partial, ignore_errors=True)  # makes room on a full disk
            if any(words in str(error) for words in TORCH_CANNOT_WRITE):
                raise InputError(
                    f"cannot write {partial}: no space left on the disk, or a limit (ulimit -f) is too low; the "
                    "previous checkpoint is whole, make room and start again"
                ) from error
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            rename(partial, final)
            for old in complete_checkpoints(self.folder)[: -self.kept]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        label_counts = self.progress.all_label_counts()
        if self.accelerator.is_main_process:
            state = {
                **asdict(self.progress),
                "label_counts": label_counts,
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
        """Loads the newest whole checkpoint. Returns the number of processes that saved it, or None without one."""
        found: list = [None]  # the main process finds it for all
        with all_refuse(self.accelerator):
            if self.accelerator.is_main_process:
                found[0] = self._newest_whole()
        (path,) = broadcast_object_list(found)
        if path is None:
            return None
        state = read_progress(path)
        if state["towers_sha256"] != self.stamp["towers_sha256"]:
            raise InputError(
                f"{path} was trained with another encoder: start from the same --encoder or --init_from as before"
            )
        try:
            self.accelerator.load_state(str(path))
        except UnpicklingError as error:  # with torch's `weights_only` no code of the file has run
            raise InputError(f"{path} holds Python objects, which are never read: delete it") from error
        # accelerate counts micro-batches. A checkpoint is always between two steps, so the count begins again.
        self.accelerator.step = 0
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress.step, self.progress.seconds = state["step"], state["seconds"]
        if self.accelerator.is_main_process:  # it takes the counts of all; an older checkpoint has none
            self.progress.label_counts = state.get("label_counts", same_counts(math.nan))
        return state["num_processes"]

    def _newest_whole(self) -> Path | None:
        """The newest whole checkpoint. Newer damaged ones get another name, half-written ones are deleted."""
        for partial in filter(Path.is_dir, self.folder.glob("*.partial")):
            shutil.rmtree(partial)
        give_true_names(self.folder)
        damaged, path = [], None
        for path in reversed(complete_checkpoints(self.folder)):
            fault = damage(path) or unfit(path, self.model.state_dict())
            if fault is None:
                break
            print(f"warning: checkpoint {path} is damaged ({fault}): it is not used")
            damaged.append(path)
        if path in damaged:
            # To start from the beginning could cost days of work. The user may still have a copy of the folder, or the
            # disk may be back tomorrow.
            raise InputError(
                f"no checkpoint in {self.folder} is whole: put one back, or delete this folder to train from the "
                "beginning"
            )
        for other in damaged:
            aside = other.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(other, aside)
        return path

    def _leave_towers_out(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        """A hook that accelerate calls before it writes weights. FSDP's are already written, with the towers."""
        if weights:
            state = self.model.state_dict()
            weights[:] = [{name: tensor for name, tensor in state.items() if not name.startswith(TOWER_WEIGHTS)}]

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        """A hook that accelerate calls before it reads weights. FSDP's are not in `models`: accelerate reads them."""
        if models:
            models.clear()
            weights = load_file(Path(folder) / "model.safetensors")
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
            lost = sorted(name for name in missing if not name.startswith(TOWER_WEIGHTS)) + unexpected
            if lost:
                raise InputError(f"{folder} is of another architecture: {lost[0]} and {len(lost) - 1} other weights")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in order of their steps. A half-written or damaged one has another name."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def whole_copies(folder: Path, name: str) -> list[Path]:
    """The undamaged copies of a run's file in its checkpoints, the newest first."""
    newest_first = reversed(complete_checkpoints(folder))
    return [path / name for path in newest_first if (path / name).is_file() and damage(path, name) is None]


def read_progress(folder: Path) -> dict:
    """The content of progress.bin, with the keys of PROGRESS. Raises InputError if one is missing."""
    try:
        state = torch.load(folder / "progress.bin", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise InputError(f"progress.bin cannot be read: {one_line(error, 80)}") from error
    state = state if isinstance(state, dict) else {}
    lacking = [name for name, kind in PROGRESS.items() if not isinstance(state.get(name), kind)]
    if lacking:
        raise InputError(f"progress.bin lacks {lacking[0]}")
    return state


def unfit(folder: Path, state: Mapping[str, Tensor] | None = None) -> str | None:
    """Why a run cannot resume from an undamaged checkpoint, or None.

    state: the state dict of the run's model; the weights must have its types. FSDP's sharded weights are checked only
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


def write_manifest(folder: Path) -> None:
    """Writes the size and hash of every file of a folder into its MANIFEST."""
    manifest = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_leftover(path.name)
    }
    write_json(folder / MANIFEST, manifest)


def damage(folder: Path, only: str | None = None) -> str | None:
    """The first difference from a checkpoint's manifest, in words, or None.

    only: the one file to check; None: all files.
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
    # an unreadable file, or a damaged manifest
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return one_line(error)
    return None


def true_name(folder: Path) -> str:
    """The name that belongs to a checkpoint's step. Raises InputError for a damaged checkpoint."""
    return f"step_{read_progress(folder)['step']:08d}"


def give_true_names(folder: Path) -> None:
    """Renames checkpoints that have the name of another step, with a warning."""
    for path in complete_checkpoints(folder):
        with suppress(InputError):  # a damaged one: `_newest_whole` warns of it
            if damage(path, "progress.bin") is None and true_name(path) != path.name:
                path.replace(path.with_suffix(".misnamed"))
    for aside in sorted(folder.glob("step_*.misnamed")):  # a killed start may have left some
        name, place = true_name(aside), folder / true_name(aside)
        place = aside.with_suffix(".damaged") if place.exists() else place
        print(f"warning: {aside.with_suffix('')} is the checkpoint of {name}: it is renamed to {place.name}")
        shutil.rmtree(place, ignore_errors=True)
        aside.replace(place)
