"""Describes a run folder or a checkpoint: what it is, what its training saw, and whether it is whole.

    zs3 doctor runs/stage2
    zs3 doctor runs/stage2/final

It changes nothing, and it runs no code that lies beside a checkpoint. Each problem is printed on one line, and any
problem makes the exit code 2. In a run folder it checks the checkpoints, the stamp and the final model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configuration_zs3 import Zs3Config, check_names, is_number, shared, unshared
from encoders_zs3 import family_of
from files_zs3 import is_leftover
from text_zs3 import check_text_embeds, read_labels
from zs3.checkpoints import (
    check_checkpoint,
    config_of,
    load_config,
    load_model,
    load_processor,
    project_code,
    weights_sha256,
)
from zs3.command_line import Arguments, InputError, check_required, flag, in_one_line, read_arguments, shown
from zs3.data.records import load_split, stream_split
from zs3.evaluation.report import IMAGE_LABELS, quality_in_words
from zs3.files import is_locked
from zs3.label_space import load_label_space, load_text_embeds
from zs3.training.folder import parse_recipe, read_metrics
from zs3.training.resume import complete_checkpoints, damage, true_name, unfit, whole_copies
from zs3.training.stamp import (
    STAMP,
    SeenRecord,
    Stamp,
    change_since,
    joined,
    read_stamp,
    record_in,
    record_of,
    stamped_space,
    vectors_sha256,
)

SHOWN = 8  # names in a line


@dataclass
class DoctorArgs(Arguments):
    """Checks the folder of a run or of a model."""

    first_words = ("path",)

    path: str | None = flag(
        None, "Folder of a run (--output_dir of train.py) or of a model (final/). The flag's name may be left out."
    )

    def check(self) -> None:
        check_required(self, "path")
        if not Path(self.path).is_dir():
            what = "is a file" if Path(self.path).exists() else "does not exist"
            raise InputError(f"--path {self.path} {what}: give the folder of a run or of a model")


@dataclass
class Findings:
    """The lines to print, and the problems."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, title: str, text: str) -> None:
        self.lines.append(f"{title:<11}{text}")

    @contextmanager
    def looking(self) -> Iterator[None]:
        """An InputError within the block becomes a problem. The examination continues after the block."""
        try:
            yield
        except InputError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


# ---- a checkpoint ------------------------------------------------------------------------------------------


def examine_checkpoint(folder: Path, found: Findings) -> Zs3Config | None:
    """Examines a checkpoint. Returns its configuration, or None if this cannot be read."""
    config, kind = None, Zs3Config.model_type
    with found.looking():
        kind = config_of("--path", str(folder)).get("model_type")
        check_checkpoint("path", str(folder))
    if kind != Zs3Config.model_type:
        return None
    with found.looking():
        config = load_config(str(folder))
    if config is None:
        return None
    towers = {"text": config.text_config, "image": config.vision_config}
    towers = {name: family_of(tower).title for name, tower in towers.items() if tower is not None}
    encoder = f"{' and '.join(towers)} tower{'s' * (len(towers) != 1)} of {' and '.join({*towers.values()})}"
    found.say(
        "model",
        f"{config.backbone_config.model_type} backbone, {config.num_queries} queries, vectors of "
        f"{config.projection_dim}, {encoder if towers else 'no encoder'}",
    )
    if config.class_head == "regions":
        found.say("names", f"without training, from what the image tower sees of each proposal ({config.region_view})")
    elif not config.head_is_trained:
        found.say("names", "none: its class head was never trained")
    say_record(found, record_of(config))
    quality = quality_in_words(config.image_label_precision, config.image_label_recall)
    if quality:
        found.say("", f"image labels of unseen classes in the last training that had some: {quality}")
    examine_names(found, folder, config)
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


def say_record(found: Findings, record: SeenRecord) -> None:
    if record.seen_class_names is None:
        found.say("saw", "unknown: no zero-shot result can be claimed")
        return
    found.say("saw", f"masks of {names_line(record.seen_class_names)}")
    found.say("had", f"{IMAGE_LABELS.get(record.unseen_labels, 'unknown image labels')} of unseen classes")


def names_line(names: Sequence[str]) -> str:
    """The number of names, and the first SHOWN of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} classes: {', '.join(names[:SHOWN])}{more}" if names else "no class"


def examine_names(found: Findings, folder: Path, config: Zs3Config) -> None:
    """Looks for names that repeat, or that cannot be compared."""
    with found.looking(), in_one_line(f"the vocabulary of {shown(folder)}"):
        check_names(config.class_names or [])
    with found.looking(), in_one_line("seen names"):
        check_names(config.seen_class_names or [])
    if config.class_names is not None:
        seen = len(shared(config.class_names, config.seen_class_names))
        more = "" if config.seen_class_names is None else f"; masks of {seen} of them were seen"
        found.say("names", f"a vocabulary of {names_line(config.class_names)}{more}")


def say_code(found: Findings, folder: Path) -> None:
    """Reports the code that lies beside the weights. It is not run."""
    own = {path.name: path.read_bytes() for path in project_code()}
    there = {path.name: path.read_bytes() for path in folder.glob("*.py") if not is_leftover(path.name)}
    other = sorted(name for name in there if there[name] != own.get(name))
    missing = sorted(own.keys() - there.keys())
    text = "that of this project"
    if not there:
        text = "none: only this project can load it"
    elif other:
        text = f"not that of this project ({', '.join(other[:3])}{', ...' * (len(other) > 3)})"
    elif missing:
        text = f"that of this project, without {', '.join(missing)}"
        found.problems.append(f"{shown(folder)} lacks {missing[0]}, without which only this project can load it")
    found.say("code", text)


# ---- a run -------------------------------------------------------------------------------------------------


def examine_run(folder: Path, found: Findings) -> None:
    if is_locked(folder):
        raise InputError(f"a run writes in {folder} now: look at it when it has ended")
    recipe, copy = {}, next(iter(whole_copies(folder / "checkpoints", "recipe.yaml")), None)
    with found.looking():
        recipe = parse_recipe(folder / "recipe.yaml")
    if not recipe and copy is not None:
        found.say("recipe", f"the copy in {copy.parent.name} is used")
        recipe = parse_recipe(copy)
    states = complete_checkpoints(folder / "checkpoints")
    faults = {path: damage(path) or unfit(path) for path in states}
    whole = [path for path in states if faults[path] is None]
    final = folder / "final"
    found.say("run", f"{folder}, {what_comes_next(final, states, whole)}")
    if recipe:
        found.say(
            "data", f"{recipe.get('dataset')} ({recipe.get('split')}), unseen labels {recipe.get('unseen_labels')}"
        )
        found.say(
            "start", str(recipe.get("init_from") or recipe.get("proposals") or recipe.get("backbone") or "random")
        )
    stamp = examine_stamp(folder, whole, found)
    if stamp is not None and recipe:
        examine_data(stamp, recipe, found)
    for path, fault in faults.items():
        found.say("checkpoint", f"{path.name}, {'whole' if fault is None else 'damaged'}")
        if fault is not None:
            found.problems.append(f"{path}: {fault}; the next start does not use it")
        elif true_name(path) != path.name:
            found.problems.append(f"{path} is the checkpoint of {true_name(path)}; the next start gives it that name")
    examine_metrics(folder / "metrics.jsonl", found)
    if final.exists():
        found.say("final", str(final))
        config = examine_checkpoint(final, found)
        if config is not None and stamp is not None:
            examine_final_record(record_of(config), record_in(stamp), found)


def what_comes_next(final: Path, states: Sequence[Path], whole: Sequence[Path]) -> str:
    """The next action of the run's own command, in words."""
    if final.exists():
        return "it has a final model"
    if whole:
        newest = max(map(true_name, whole))
        return f"its command resumes after step {int(newest.removeprefix('step_'))}"
    return "no checkpoint is whole, so its command refuses" if states else "no checkpoint, so its command begins anew"


def examine_stamp(folder: Path, whole: Sequence[Path], found: Findings) -> Stamp | None:
    """The stamp of the run: the copy in the newest whole checkpoint, or else the file beside the recipe."""
    own, copy, copies = None, None, [path / STAMP for path in whole if (path / STAMP).exists()]
    if (folder / STAMP).exists():
        with found.looking():
            own = read_stamp(folder / STAMP)
    if copies:
        with found.looking():
            copy = read_stamp(copies[-1])
    stamp = own if copy is None else copy
    if own is None or copy is not None and own != copy:
        state = "differs from" if own is not None else "is missing or damaged beside"
        where = "damaged" if (folder / STAMP).exists() else "none: made by an older version; the next start writes one"
        where = where if copy is None else f"that of {copies[-1].parent.name} is used; {STAMP} {state} it"
        found.say("stamp", where)
        if own is not None:
            found.problems.append(f"{folder / STAMP} differs from the copy in {copies[-1].parent.name}, which is used")
    if stamp is None:
        return None
    space = stamp["label_space"]
    found.say("stamp", f"label space of {len(space['class_names'])} classes, {len(space['unseen'])} of them unseen")
    known = {name: value for name, value in stamp.items() if name not in Stamp.__annotations__}
    hashes = [f"{name.removesuffix('_sha256')} {known[name][:12]}" for name in known if name.endswith("_sha256")]
    found.say("", f"{known.get('num_images', 'a stream of')} pictures; sha256 of {', '.join(hashes)}")
    say_record(found, record_in(stamp))
    return stamp


def examine_data(stamp: Stamp, recipe: dict, found: Findings) -> None:
    """Compares the dataset and the text vectors with the stamp, if they are on this disk. Nothing else is compared."""
    dataset, split, vectors = recipe.get("dataset"), recipe.get("split"), recipe.get("text_embeds")
    now: dict = {"label_space": stamp["label_space"]}
    with found.looking():
        if isinstance(dataset, str) and isinstance(split, str) and Path(dataset).is_dir():
            space = load_label_space(recipe.get("label_space") or dataset)
            read = stream_split if recipe.get("streaming") else load_split
            now = {"label_space": stamped_space(space), **read(dataset, split, space).contents()}
        if isinstance(vectors, str) and Path(vectors).is_file():
            load_text_embeds(vectors, len(stamp["label_space"]["class_names"]))
            now["text_embeds_sha256"] = vectors_sha256(vectors)
        change = change_since(stamp, now, recipe)
        if change is not None:
            raise InputError(f"the run's inputs have changed: {change}; its command refuses")
    others = [name for name in stamp if name not in now and name not in SeenRecord._fields]
    others += ["label_space"] if "layout" not in now else []
    found.say("inputs", f"compared with the stamp; not compared: {', '.join(others) or 'nothing'}")


def examine_metrics(path: Path, found: Findings) -> None:
    rows, damaged = read_metrics(path)
    if damaged:
        found.problems.append(f"{path}: {damaged} lines are damaged; the next start of the run leaves them out")
    if not rows:
        found.say("metrics", "none yet")
        return
    step, loss = rows[-1]["step"], rows[-1].get("loss")
    found.say("metrics", f"{len(rows)} lines, the last of step {step}, loss {loss}")
    if not is_number(loss):
        found.problems.append(f"{path}: the loss of step {step} is no number")


def examine_final_record(final: SeenRecord, stamped: SeenRecord, found: Findings) -> None:
    """The final model must not say that it saw less than the run's stamp says."""
    both = joined([final, stamped])
    if both == joined([final]):
        return
    what = "it is unknown which masks it saw"
    if both.seen_class_names is not None:
        lost = unshared(stamped.seen_class_names or [], final.seen_class_names)
        what = f"it saw masks of {names_line(lost)}" if lost else f"training had {IMAGE_LABELS[both.unseen_labels]}"
    found.problems.append(f"final/ says less than the run's stamp: {what}")


# ---- the command -------------------------------------------------------------------------------------------


def examine(folder: Path) -> Findings:
    """folder: of a run or of a checkpoint."""
    found = Findings()
    if (folder / "progress.bin").exists():
        raise InputError(
            f"{folder} is a training checkpoint: give the folder of the run, {folder.resolve().parents[1]}"
        )
    if (folder / "recipe.yaml").exists() or (folder / "checkpoints").is_dir():
        examine_run(folder, found)
    elif (folder / "config.json").exists():
        found.say("folder", str(folder))
        examine_checkpoint(folder, found)
    else:
        raise InputError(f"{folder} is neither a run (recipe.yaml) nor a model (config.json)")
    return found


def main() -> None:
    args, _ = read_arguments(DoctorArgs)
    found = examine(Path(args.path))
    lines = [*found.lines, *(f"problem    {problem}" for problem in found.problems)]
    print("\n".join(lines if found.problems else [*lines, "healthy    no problem was found"]))
    count = len(found.problems)
    if count:
        raise InputError(f"{count} problem{'s' * (count > 1)} in {args.path}, listed above")


if __name__ == "__main__":  # the command's old spelling
    from zs3.__main__ import run_old_command

    run_old_command("zs3.doctor")
