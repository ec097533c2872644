"""The output folder of a training run: its recipe, checkpoints, metrics and the final model."""

import json
import os
import shutil
from pathlib import Path

import yaml
from accelerate import Accelerator

from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import InputError, finite_or_none, write_text


def check_recipe(path: Path, recipe: dict) -> None:
    """A folder holds one run: its recipe is written at the start and must be the same when the run resumes.

    A run that left neither a checkpoint nor a final model never was: its folder is free.
    """
    if path.parent.is_file():
        raise InputError(f"--output_dir {path.parent} is a file: choose a folder")
    if path.exists() and (complete_checkpoints(path.parent / "checkpoints") or (path.parent / "final").exists()):
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in before.keys() | recipe.keys() if before.get(name) != recipe.get(name))
        if changed:
            raise InputError(
                f"{path.parent} holds a run with another {', '.join(changed)}: choose another --output_dir or delete it"
            )
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))


class Progress:
    """Optimizer steps done and seconds spent; saved with every checkpoint."""

    def __init__(self, num_processes: int) -> None:
        self.step = 0
        self.seconds = 0.0
        self.num_processes = num_processes

    def state_dict(self) -> dict:
        return {"step": self.step, "seconds": self.seconds, "num_processes": self.num_processes}

    def load_state_dict(self, state: dict) -> None:
        if state["num_processes"] != self.num_processes:
            raise InputError(
                f"the run was started with {state['num_processes']} processes: resume it with as many, not "
                f"{self.num_processes}, or choose another --output_dir"
            )
        self.step, self.seconds = state["step"], state["seconds"]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in order of their steps. A folder still being written has another name."""
    return sorted(path for path in folder.glob("step_*") if path.suffix != ".partial")


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, kept: int) -> None:
    """Written beside and renamed; older ones go only when the new one is complete."""
    final = folder / f"step_{step:08d}"
    partial = final.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, final)
        for old in complete_checkpoints(folder)[:-kept]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_final(model: Zs3ForSemanticSegmentation, processor, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    os.replace(partial, folder)


class MetricsLog:
    """metrics.jsonl: one JSON a logged step. Lines past the step a run resumes at are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.last: dict = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A killed run may leave its last line half written.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, progress: Progress, values: dict[str, float]) -> None:
        self.last = finite_or_none({"step": progress.step, **values, "seconds": round(progress.seconds, 2)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.last) + "\n")
