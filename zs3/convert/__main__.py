"""Converts an official archive to parquet shards, which `zs3.data.load_split` and `datasets.load_dataset` read.

    zs3 convert ade20k_150 --source ADEChallengeData2016 --output data/ade20k_150 --num_workers 8

docs/data.md describes the archives of `zs3.convert.archives`. Columns: image (the bytes of the file), label (a PNG of
ids: 8 bits if the ignored id is 255, 16 bits if it is 65535), image_id, class_ids (the sorted ids in the label map,
without the ignored one). coco_captions has image_id and captions only; coco_stuff_171 has its pictures.

All input is checked. Complete shards, such as `train-00003-of-00016.parquet`, and their measurements wait in
`.progress/`. The same command makes the missing shards, always with the same bytes. After the last one, it writes
`classes.json`, the card and `conversion.json`, and moves the shards to `data/`, so an incomplete dataset is never
loaded.

Axes: H W pixels.
"""

import difflib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from configuration_zs3 import one_line, shortened
from files_zs3 import is_leftover, read_text
from zs3.command_line import (
    Arguments,
    InputError,
    OutputFolder,
    Some,
    Workers,
    check_required,
    flag,
    printable,
    read_arguments,
    run,
)
from zs3.convert.archives import ARCHIVES, SPLITS, Captioned, Pair
from zs3.convert.card import card
from zs3.convert.items import PROGRESS, Converted, convert_all
from zs3.convert.measures import conversion, counts, remarks, report, tally, versions
from zs3.convert.shards import Shard, finished, read_measures, record, recorded, schema_of, shards_of, write_shard
from zs3.data.tables import image_id_of
from zs3.files import json_text, lock_folder, rename, write_json, write_text
from zs3.label_space import CLASSES_FOLDER, is_hub_id


@dataclass
class ConvertArgs(Arguments):
    """Converts a benchmark's official archive to a dataset: zs3 convert NAME --source DIR --output DIR."""

    first_words = ("name",)

    name: str | None = flag(None, f"The benchmark: {', '.join(ARCHIVES)}.")
    source: str | None = flag(None, "Folder of the unpacked archive, or its parent folder.")
    output: OutputFolder | None = flag(None, "Folder for the dataset; the same command resumes a stopped run.")
    splits: Some[str] = flag(list(SPLITS), "Splits to convert.")
    num_workers: Workers = flag(0, "Processes that read pictures; 0 reads in the main one.")
    on_problem: Literal["stop", "skip"] = flag(
        "stop",
        "What to do about an unusable picture: make no dataset until it is mended (stop), or leave it out (skip).",
    )
    push_to_hub: str | None = flag(None, "Hub id, owner/name, of the dataset to upload to when all is done.")
    private: bool = flag(False, "Make a new dataset of --push_to_hub private.")

    def check(self) -> None:
        check_required(self, "name")
        if self.name not in ARCHIVES:
            alike = [name for name in ARCHIVES if name.startswith(self.name)]
            alike = alike or difflib.get_close_matches(self.name, ARCHIVES, n=1, cutoff=0.0)
            raise InputError(f"no archive is called {self.name!r}: did you mean {' or '.join(alike)}?")
        check_required(self, "source", "output")
        if not set(self.splits) <= set(SPLITS):
            raise InputError(f"--splits takes {' and '.join(SPLITS)}, got {' '.join(self.splits)}")
        if not Path(self.source).is_dir():
            raise InputError(f"--source {self.source} is no folder: give the folder of the unpacked archive")
        if self.push_to_hub is not None and not is_hub_id(self.push_to_hub):
            raise InputError(f"--push_to_hub {self.push_to_hub} is no Hub id of the form owner/name")


# ---- the whole ---------------------------------------------------------------------------------------------


def list_items(name: str, source: Path, splits: list[str], skip: bool) -> dict[str, list[Pair | Captioned]]:
    """The items of each split. An item that repeats an earlier id is marked.

    The training split is shuffled, others are in the order of their ids. A split of another size than in the release
    raises InputError, unless skip is true.
    """
    items = {}
    for split in splits:
        found = sorted(ARCHIVES[name].items(source, split), key=lambda item: item[:2])
        if not found:
            raise InputError(f"{split} of {name} in {source} is empty: copy it from the archive")
        for item in found:
            image_id_of(item.image_id)
        ids = [None, *(item.image_id for item in found)]
        found = [item._replace(repeats=item.image_id == ids[n]) for n, item in enumerate(found)]
        items[split] = mixed(found) if split == "train" else found
        for what, (count, known) in counts(name, split, items[split]).items():
            if count not in known and not skip:
                raise InputError(
                    f"{split} of {name} in {source} holds {count:,} {what}, the release {known[0]:,}: "
                    "copy the rest, or --on_problem skip"
                )
    return items


def mixed(items: list[Pair | Captioned]) -> list[Pair | Captioned]:
    """The items in the order of their id digests, so that every shard is a fair sample of the split.

    A stream shuffles only within its buffer, and some archives are sorted by scene.
    """
    return sorted(items, key=lambda item: hashlib.sha256(item.image_id.encode()).digest())


def check_free(output: Path) -> None:
    """Refuses a folder that holds other files than a conversion."""
    if not output.is_dir() or (output / PROGRESS / "settings.json").exists():
        return
    others = [file.name for file in output.iterdir() if file.name != PROGRESS and not is_leftover(file.name)]
    if others:
        raise InputError(f"--output {output} holds other files ({shortened(others[0])}): choose a new folder")


def check_settings(output: Path, name: str, source: str, splits: list[str]) -> None:
    """Writes the settings of a new conversion; refuses to resume one with other settings."""
    settings = {
        "name": name,
        "source": str(Path(source).resolve()),
        "splits": splits,
        "classes_sha256": classes_sha256(name),
        "versions": versions(),
    }
    path = output / PROGRESS / "settings.json"
    before = read_measures(path) if path.exists() else None
    if before is None:
        write_json(path, settings)
        return
    whole = (output / "data").is_dir()  # finished: no shard of another version is added
    changed = [key for key in settings if before.get(key) != settings[key] and not (whole and key == "versions")]
    if changed:
        raise InputError(f"{output} was made with another {', '.join(changed)}: choose another --output, or delete it")


def classes_text(name: str) -> str:
    """The text of the label space's file; empty for captions."""
    path = CLASSES_FOLDER / f"{name}.json"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def classes_sha256(name: str) -> str:
    """The digest of the label space's file without the keys on things: older versions had none of them, and their
    conversions go on."""
    text = classes_text(name)
    if text:
        content = {key: value for key, value in json.loads(text).items() if key not in ("things", "things_source")}
        text = json.dumps(content, indent=1) + "\n"  # the form of these files
    return hashlib.sha256(text.encode()).hexdigest()


def push(folder: str, name: str, repo_id: str, private: bool) -> None:
    """Uploads the dataset. Shards of an earlier upload are deleted from the Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The bases of HfHubHTTPError: OSError, and all errors of the HTTP library, which changes with huggingface_hub.
    try:
        HfApi().create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            ignore_patterns=[".progress/*", "*.partial"],
            delete_patterns="data/*.parquet",
            commit_message=f"{name}, converted from the official archive",
        )
    except (*HfHubHTTPError.__bases__, ValueError) as error:
        raise InputError(
            f"cannot upload to {repo_id} ({one_line(error, 70)}): the dataset in {folder} is whole; the "
            "same command tries again"
        ) from error


# ---- the command -------------------------------------------------------------------------------------------


def convert(args: ConvertArgs) -> dict:
    """Converts an archive. Returns the content of conversion.json."""
    args.check()
    args = replace(args, splits=[split for split in SPLITS if split in args.splits])
    items = list_items(args.name, Path(args.source), args.splits, skip=args.on_problem == "skip")
    check_free(Path(args.output))
    with lock_folder(Path(args.output, PROGRESS)):
        check_settings(Path(args.output), args.name, args.source, args.splits)
        return convert_items(args, items)


def convert_items(args: ConvertArgs, items: dict[str, list[Pair | Captioned]]) -> dict:
    """As `convert`, for a folder that this process has locked."""
    output, facts = Path(args.output), (args.name, Path(args.source).resolve().name, args.on_problem)
    whole, begun = output / "data", output / PROGRESS / "data"
    folder = whole if whole.is_dir() else begun
    shards = [shard for split in args.splits for shard in shards_of(split, items[split])]
    done = [(shard, finished(output, folder, shard)) for shard in shards]
    if args.on_problem == "stop" and any(measures and measures["problems"] for _, measures in done):
        raise InputError(
            f"{output} holds shards from which --on_problem skip left pictures out: "
            "choose another --output, or skip again"
        )
    if folder == whole and None not in (measures for _, measures in done):
        result = conversion(*facts, items, done)
        mended = write_about(output, result, again=False)
        print(f"there already: {f'all but {mended}' if mended else 'nothing was left to do'} in {output}")
        return result
    if folder == whole and None in (recorded(output, shard) for shard in shards):
        raise InputError(
            f"{output} is a finished dataset of other pictures than {args.source} holds now, and stays as it is: "
            "choose another --output, or delete it"
        )

    measured = make_shards(args, folder, done)  # the lost ones, if the dataset was finished
    check_problems(output, args.on_problem, measured)
    result = conversion(*facts, items, measured)
    write_about(output, result)
    if folder == begun:
        for file in {*begun.iterdir()} - {begun / shard.name for shard in shards}:
            file.unlink()  # a shard of an earlier copy of the archive, or an unfinished one
        rename(begun, whole)
    return result


def write_about(output: Path, result: dict, again: bool = True) -> str:
    """Writes the files beside the shards. again=False: only those that are damaged or missing. Returns their names."""
    texts = {"README.md": card(result), "conversion.json": json_text(result)}
    if result["name"] != "coco_captions":
        texts["classes.json"] = classes_text(result["name"])
    written = [name for name in texts if again or not _is_whole(output / name)]
    for name in written:
        write_text(output / name, texts[name])
    return ", ".join(written)


def _is_whole(path: Path) -> bool:
    """Whether a file holds a text, or, if its name ends in .json, a mapping."""
    try:
        return bool(read_text(path)) and (path.suffix != ".json" or bool(read_measures(path)))
    except (OSError, ValueError):
        return False


def make_shards(args: ConvertArgs, folder: Path, done: list[tuple[Shard, dict | None]]) -> list[tuple[Shard, dict]]:
    """Makes the shards that have no measurements. Returns the measurements of all shards."""
    folder.mkdir(exist_ok=True)
    total = sum(len(shard.items) for shard, _ in done)
    remaining = [item for shard, measures in done if measures is None for item in shard.items]
    schema = schema_of(args.name)
    measured = []
    results = convert_all(remaining, args.name, args.num_workers)
    with closing(results), tqdm(total=total, initial=total - len(remaining), unit="picture", mininterval=1) as bar:
        for shard, measures in done:
            if measures is None:
                own = _counted(islice(results, len(shard.items)), bar)
                measures = write_shard(folder / shard.name, own, schema, Path(args.source), args.on_problem)
                measures["items_sha256"] = shard.items_sha256
                if "sha256" in measures:
                    write_json(record(Path(args.output), shard), measures)
            measured.append((shard, measures))
    return measured


def check_problems(output: Path, on_problem: str, measured: list[tuple[Shard, dict]]) -> None:
    """Raises InputError for problems with --on_problem stop, after writing all of them, and for an empty split."""
    path, problems = output / "problems.json", remarks(measured, "problems")
    if problems and on_problem == "stop":
        write_json(path, {"problems": problems})
        print(printable(f"problems    {tally(problems)}"), file=sys.stderr)
        raise InputError(
            f"{len(problems):,} problem{'s' * (len(problems) > 1)}, all in {path}: mend them and run the same command "
            "again, which makes missing shards only, or --on_problem skip"
        )
    path.unlink(missing_ok=True)
    for split in dict.fromkeys(shard.split for shard, _ in measured):
        if not any(measures["num_images"] for shard, measures in measured if shard.split == split):
            print(printable(f"problems    {tally(problems)}"), file=sys.stderr)
            raise InputError(f"not one picture of {split} can be used: give the archive as it was released")


def _counted(results: Iterable[Converted], bar: tqdm) -> Iterator[Converted]:
    for result in results:
        bar.update()
        yield result


def main() -> None:
    args, _ = read_arguments(ConvertArgs)
    result = convert(args)
    print(report(result))
    if args.push_to_hub is not None:
        push(args.output, args.name, args.push_to_hub, args.private)
        print(f"uploaded    https://huggingface.co/datasets/{args.push_to_hub}")
    print(f"dataset     {args.output}")


if __name__ == "__main__":
    run(main)
