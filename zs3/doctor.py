"""Says of a run folder or a checkpoint what it is, what it saw, and whether it is whole.

    python -m zs3.doctor runs/stage2
    python -m zs3.doctor runs/stage2/final

It changes nothing, and no code that lies beside a checkpoint runs. Each problem is one line; with one the exit code is
2. Of a run folder the checkpoints, the stamp and the final model are looked at.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configuration_zs3 import Zs3Config, among, check_names
from modeling_zs3 import check_text_embeds
from processing_zs3 import read_labels
from zs3.checkpoints import (
    check_checkpoint,
    load_config,
    load_model,
    load_processor,
    project_code,
    weights_sha256,
)
from zs3.command_line import InputError, check_required, flag, in_one_line, read_arguments, run
from zs3.data import load_split, stream_split
from zs3.label_space import load_label_space
from zs3.results import TOLD
from zs3.run_folder import complete_checkpoints, damage, is_locked, read_metrics, read_recipe, unfit
from zs3.stamp import STAMP, Record, Stamp, change_since, joined, read_stamp, record_in, record_of, space_of

SHOWN = 8  # names in a line
TOWER_FIELDS = {"text": "text_config", "image": "vision_config"}


@dataclass
class DoctorArgs:
    """Is a run folder, or a checkpoint, what it should be?"""

    path: str | None = flag(None, "Folder of a run or of a checkpoint. It may be given without the flag.")

    def check(self) -> None:
        check_required(self, "path")
        if not Path(self.path).is_dir():
            raise InputError(f"--path {self.path}: no such folder; give that of a run or of a checkpoint")


@dataclass
class Findings:
    """What there is to say, line by line, and what is wrong."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, title: str, text: str) -> None:
        self.lines.append(f"{title:<11}{text}")

    @contextmanager
    def looking(self) -> Iterator[None]:
        """What is refused while something is looked at is a problem, and the rest is looked at all the same."""
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))


# ---- a checkpoint ------------------------------------------------------------------------------------------


def examine_checkpoint(folder: Path, found: Findings) -> Zs3Config | None:
    """Its configuration, if that can be read."""
    config = None
    with found.looking():
        check_checkpoint("path", str(folder), "zs3")
    with found.looking():
        config = load_config(str(folder))
    if config is None:
        return None
    towers = [name for name in ("text", "image") if getattr(config, TOWER_FIELDS[name]) is not None]
    found.say(
        "model",
        f"{config.backbone_config.model_type} backbone, {config.num_queries} queries, vectors of "
        f"{config.projection_dim}, {' and '.join(towers) or 'no'} tower{'s' * (len(towers) != 1)} of CLIP",
    )
    say_record(found, record_of(config))
    examine_names(found, config)
    with found.looking():
        model = load_model(str(folder))
        count = sum(parameter.numel() for parameter in model.parameters())
        found.say("numbers", f"{count:,} weights, all of them finite")
        if model.vocabulary is not None:
            with in_one_line(f"the vocabulary of {folder}"):
                check_text_embeds(model.vocabulary, config.projection_dim)
    with found.looking():
        processor = load_processor(str(folder), config)
        if config.text_config is not None and config.class_names:
            with in_one_line(f"the names of {folder}"):
                processor.check_readable(read_labels(config.class_names, processor.prompt_templates))
    say_code(found, folder)
    with found.looking():
        found.say("files", f"sha256 of the weights {weights_sha256(str(folder))}")
    return config


def say_record(found: Findings, record: Record) -> None:
    if record.seen_class_names is None:
        found.say("saw", "nobody knows whose masks: no zero-shot result can be claimed")
        return
    found.say("saw", f"masks of {names_line(record.seen_class_names)}")
    found.say("was given", f"{TOLD.get(record.unseen_labels, 'what is not known')} of unseen classes")


def names_line(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} classes: {', '.join(names[:SHOWN])}{more}" if names else "no class"


def examine_names(found: Findings, config: Zs3Config) -> None:
    """Names that are one, or that cannot be compared."""
    for title, names in (("vocabulary", config.class_names), ("seen names", config.seen_class_names)):
        if names is None:
            continue
        with found.looking(), in_one_line(title):
            check_names(names)
            if title == "vocabulary":
                seen = sum(among(names, config.seen_class_names))
                found.say("names", f"a vocabulary of {names_line(names)}; masks of {seen} of them were seen")


def say_code(found: Findings, folder: Path) -> None:
    """Whose code lies beside the weights. It was not run."""
    own = {path.name: path.read_bytes() for path in project_code()}
    there = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    other = sorted(name for name in there if there[name] != own.get(name))
    missing = sorted(own.keys() - there.keys())
    text = "this project's of today"
    if not there:
        text = "none: only this project can load it"
    elif other:
        text = f"another than this project's of today ({', '.join(other[:3])}{', ...' * (len(other) > 3)})"
    elif missing:
        text = f"this project's of today, without {', '.join(missing)}"
    found.say("code", text)


# ---- a run -------------------------------------------------------------------------------------------------


def examine_run(folder: Path, found: Findings) -> None:
    recipe: dict = {}
    with found.looking():
        recipe = read_recipe(folder / "recipe.yaml")
    steps = recipe.get("max_steps", "?")
    states = complete_checkpoints(folder / "checkpoints")
    newest = int(states[-1].name.removeprefix("step_")) if states else 0
    final = folder / "final"
    if is_locked(folder):
        raise InputError(f"a run writes in {folder} now: look at it when it has ended")
    state = "complete" if final.exists() else f"stopped after step {newest} of {steps}; its command goes on"
    found.say("run", f"{folder}, {state}")
    if recipe:
        found.say(
            "data", f"{recipe.get('dataset')} ({recipe.get('split')}), unseen labels {recipe.get('unseen_labels')}"
        )
        found.say(
            "start", str(recipe.get("init_from") or recipe.get("mask2former") or recipe.get("backbone") or "random")
        )
    stamp = examine_stamp(folder, states, found)
    if stamp is not None and recipe:
        examine_data(stamp, recipe, found)
    for path in states:
        examine_state(path, found)
    if states:
        found.say("states", ", ".join(path.name for path in states))
    examine_metrics(folder / "metrics.jsonl", found)
    if final.exists():
        found.say("final", str(final))
        config = examine_checkpoint(final, found)
        if config is not None and stamp is not None:
            examine_final_record(record_of(config), record_in(stamp), found)


def examine_stamp(folder: Path, states: Sequence[Path], found: Findings) -> Stamp | None:
    """What the run was stamped with; its copies in the states must say the same of what was seen."""
    stamp = None
    if not (folder / STAMP).exists():
        found.say("stamp", "none: made by an older version; the next start of its command writes one")
        return None
    with found.looking():
        stamp = read_stamp(folder / STAMP)
    if stamp is None:
        return None
    space = stamp["label_space"]
    found.say("stamp", f"label space of {len(space['class_names'])} classes, {len(space['unseen'])} of them unseen")
    known = {name: value for name, value in stamp.items() if name not in Stamp.__annotations__}
    hashes = [
        f"{name.removesuffix('_sha256')} {value[:12]}" for name, value in known.items() if name.endswith("sha256")
    ]
    found.say("", f"{known.get('num_images', 'a stream of')} pictures; sha256 of {', '.join(hashes)}")
    say_record(found, record_in(stamp))
    for path in states:
        if (path / STAMP).exists():
            with found.looking():
                copy = read_stamp(path / STAMP)
                if (copy["label_space"], record_in(copy)) != (space, record_in(stamp)):
                    raise InputError(f"{path / STAMP} says another label space or record than {folder / STAMP}")
    return stamp


def examine_data(stamp: Stamp, recipe: dict, found: Findings) -> None:
    """Whether the run's data are what they were, as far as they are here. Text vectors are not made for it."""
    dataset, split = recipe.get("dataset"), recipe.get("split")
    if not isinstance(dataset, str) or not isinstance(split, str) or not Path(dataset).is_dir():
        found.say("now", f"{dataset} is not here: not compared")
        return
    with found.looking():
        space = load_label_space(recipe.get("label_space") or dataset)
        read = stream_split if recipe.get("streaming") else load_split
        now = {"label_space": space_of(space), **read(dataset, split, space).contents()}
        change = change_since(stamp, now, recipe)
        if change is not None:
            raise InputError(f"the data are not what the run began with: {change}")
        found.say("now", "the label space and the pictures are what they were")


def examine_state(folder: Path, found: Findings) -> None:
    """One state that the run can go on from."""
    fault = damage(folder) or unfit(folder)
    if fault is not None:
        found.problems.append(f"{folder}: {fault}; a start of the run takes the one before")


def examine_metrics(path: Path, found: Findings) -> None:
    rows, damaged = read_metrics(path)
    if damaged:
        found.problems.append(f"{path}: {damaged} lines are damaged; the next start of the run leaves them out")
    if not rows:
        found.say("metrics", "none yet")
        return
    step, loss = rows[-1]["step"], rows[-1].get("loss")
    found.say("metrics", f"{len(rows)} lines, the last of step {step}, loss {loss}")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        found.problems.append(f"{path}: the loss of step {step} is no number")


def examine_final_record(final: Record, stamped: Record, found: Findings) -> None:
    """The final model must not claim to have seen less than the run's stamp says."""
    both = joined([final, stamped])
    if both == joined([final]):
        return
    what = "it saw"
    if both.seen_class_names is not None:
        names = stamped.seen_class_names or []
        lost = [name for name, known in zip(names, among(names, final.seen_class_names), strict=True) if not known]
        what = f"it saw masks of {names_line(lost)}" if lost else f"it was given {TOLD[both.unseen_labels]}"
    found.problems.append(f"final/ does not say all that the run's stamp does: {what}")


# ---- the command -------------------------------------------------------------------------------------------


def examine(folder: Path) -> Findings:
    """Of the folder of a run, or of a checkpoint."""
    found = Findings()
    if (folder / "recipe.yaml").exists() or (folder / "checkpoints").is_dir():
        examine_run(folder, found)
    elif (folder / "progress.bin").exists():
        raise InputError(f"{folder} is one state of a run: give the folder of the run, {folder.resolve().parents[1]}")
    elif (folder / "config.json").exists():
        found.say("checkpoint", str(folder))
        examine_checkpoint(folder, found)
    else:
        raise InputError(f"{folder} is neither: a run has a recipe.yaml, a checkpoint a config.json")
    return found


def main() -> None:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words.insert(0, "--path")
    args, _ = read_arguments(DoctorArgs, words)
    args.check()
    found = examine(Path(args.path))
    lines = [*found.lines, *(f"problem    {problem}" for problem in found.problems)]
    print("\n".join(lines if found.problems else [*lines, "healthy    no problem was found"]))
    count = len(found.problems)
    if count:
        raise InputError(f"{count} problem{'s' * (count > 1)} in {args.path}, listed above")


if __name__ == "__main__":
    run(main)
