"""Records the inputs of a training run, and compares them when it resumes.

A run can stop and go on days later. Meanwhile the contents of its paths may have changed: other classes, other text
vectors, other pictures. The stamp of a run describes its first inputs. It also records the classes that training has
seen. Every zero-shot claim depends on this record, so it never shrinks. `zs3.training.folder` keeps the stamps.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Required, get_args

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from configuration_zs3 import UnseenLabels, Zs3Config, among, once, one_line, places, shortened
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.checkpoints import INDEX, WEIGHTS, files_sha256, local_folder, weights_sha256
from zs3.command_line import InputError, shown
from zs3.data.records import Split, StreamedSplit
from zs3.label_space import LabelSpace
from zs3.typed_json import read_json, refusal

STAMP = "stamp.json"
TOWER_WEIGHTS = ("text_model.", "vision_model.")  # frozen: a run has them from its start, not from its checkpoints

# The message for each key of a stamp that has changed. The braces hold flags, or the values before and now.
CHANGES = {
    "towers_sha256": "another encoder",
    "text_embeds_sha256": "other text vectors in {text_embeds}",
    "prompts_sha256": "other prompts, or another tokenizer",
    "layout": "the data were {before} and are {now} now",
    "num_images": "{before} pictures then, {now} now",
    "image_ids_sha256": "pictures of other names in {dataset}",
    "picture_sizes_sha256": "other pictures in {dataset}",
    "picture_ends_sha256": "other pictures in {dataset}",
    "label_sizes_sha256": "other label maps in {dataset}",
    "label_ends_sha256": "other label maps in {dataset}",
    "shard_names_sha256": "other parquet files in {dataset}",
    "shard_sizes_sha256": "other parquet files in {dataset}",
    "shard_ends_sha256": "other parquet files in {dataset}",
    "hub_files_sha256": "other files in {dataset} on the Hub",
    "caption_nouns_sha256": "other caption nouns in {caption_nouns}",
    "pseudo_labels_sha256": "other pseudo labels in {unseen_labels}",
    "init_from_sha256": "other weights in {init_from}",
    "init_from_record": "another record of seen classes in {init_from}",
    "proposals_sha256": "other weights in {proposals}",
    "backbone_sha256": "other weights in {backbone}",
}
STARTS = ("init_from", "proposals", "backbone")
OLD_KEYS = {"mask2former_sha256": "proposals_sha256"}  # of older versions
MEND = "restore the file"  # of a damaged stamp
BRIEF = 45  # characters of a name in a message with two names


class Space(TypedDict):
    """The fields of a LabelSpace that training depends on."""

    class_names: list[str]
    unseen: list[str]
    ignore_index: int


class Stamp(TypedDict, total=False):
    """The keys that every stamp has. It also has those keys of CHANGES that are known."""

    label_space: Required[Space]
    seen_class_names: Required[list[str] | None]
    unseen_labels: Required[UnseenLabels | None]


# ---- the record --------------------------------------------------------------------------------------------


class SeenRecord(NamedTuple):
    """The masks and image labels of all training of a model: two fields of Zs3Config. None: unknown."""

    seen_class_names: list[str] | None
    unseen_labels: str | None


def record_of(config: Zs3Config) -> SeenRecord:
    return SeenRecord(config.seen_class_names, config.unseen_labels)


def record_in(stamp: dict[str, Any]) -> SeenRecord:
    return SeenRecord(stamp["seen_class_names"], stamp["unseen_labels"])


def joined(records: Iterable[SeenRecord]) -> SeenRecord:
    """Every name of the records once, and the strongest of their image labels. One unknown record makes it unknown."""
    names, labels = zip(*records, strict=True)
    if None in names:
        return SeenRecord(None, None)
    strongest = None if None in labels else max(labels, key=get_args(UnseenLabels).index)
    return SeenRecord(once([name for part in names for name in part]), strongest)


def check_not_unseen(seen: SeenRecord, unseen: Sequence[str]) -> None:
    """The leak guard: a class is not unseen if any start of the run has seen its masks."""
    for name, place in zip(unseen, places(unseen, seen.seen_class_names), strict=True):
        if place is not None:
            raise InputError(
                f"this run saw masks of {shortened(name, BRIEF)}, which is unseen now: choose another --output_dir"
            )


# ---- the stamp ---------------------------------------------------------------------------------------------


def make_stamp(
    flags: Mapping[str, Any],
    label_space: LabelSpace,
    records: Split | StreamedSplit,
    prompts: Mapping[str, Tensor] | None,
    start: SeenRecord | None,
    model: Zs3ForSemanticSegmentation,
) -> dict[str, Any]:
    """The inputs of a run at its start. An unknown input, such as the weights of a Hub id, has no key.

    flags: of train.py.
    prompts: the tokens for the text tower. None: --text_embeds gives the vectors.
    start: the record of --init_from.
    model: its config has the record of this start.
    """
    found = {"label_space": stamped_space(label_space), **records.contents()}
    if prompts is None:
        found["text_embeds_sha256"] = vectors_sha256(flags["text_embeds"])
    else:
        found["prompts_sha256"] = _sha256(tensor.contiguous().numpy() for _, tensor in sorted(prompts.items()))
    if flags["caption_nouns"] is not None:
        folder = Path(flags["caption_nouns"])
        found["caption_nouns_sha256"] = files_sha256([folder / "classes.json", *folder.glob("nouns-*.parquet")])
    if flags["unseen_labels"] not in ("none", "ground_truth", "masks"):
        path = Path(flags["unseen_labels"])
        found["pseudo_labels_sha256"] = files_sha256([path] if path.is_file() else path.glob("scores-*.parquet"))
    for name in STARTS:
        path = flags[name]
        folder = None if path is None else local_folder(path)
        if folder is not None and any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
            found[f"{name}_sha256"] = weights_sha256(path)
    if start is not None:
        found["init_from_record"] = list(start)
    return {**found, "towers_sha256": towers_sha256(model), **record_of(model.config)._asdict()}


def stamped_space(label_space: LabelSpace) -> Space:
    return Space(**{name: getattr(label_space, name) for name in Space.__annotations__})


def vectors_sha256(path: str) -> str:
    """The digest of the numbers in a --text_embeds file."""
    return _sha256([np.load(path, mmap_mode="r", allow_pickle=False).astype(np.float32, order="C")])


def towers_sha256(model: nn.Module) -> str:
    """The digest of the weights that a run's checkpoints do not have."""
    towers = [(name, tensor) for name, tensor in model.state_dict().items() if name.startswith(TOWER_WEIGHTS)]
    bits = ((name.encode(), tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) for name, tensor in towers)
    return _sha256(itertools.chain.from_iterable(bits))


def _sha256(parts: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_stamp(path: Path) -> Stamp:
    """Raises InputError if `make_stamp` cannot have made the file."""
    stamp = read_json(path, Stamp, "stamp of a run", MEND)
    stamp = {OLD_KEYS.get(name, name): value for name, value in stamp.items()}
    try:
        LabelSpace(**stamp["label_space"])
    except (InputError, TypeError) as error:
        raise refusal(path, one_line(error), MEND) from error
    return stamp


# ---- what has changed --------------------------------------------------------------------------------------


def change_since(before: Stamp, now: Mapping[str, Any], flags: Mapping[str, Any]) -> str | None:
    """The first change in words, or None. A key that one stamp lacks is skipped.

    flags: of train.py, for the message.
    """
    change = label_space_change(before["label_space"], now["label_space"])
    shown_flags = {name: shown(value) for name, value in flags.items()}
    for name, words in CHANGES.items():
        if change is None and name in before and name in now and before[name] != now[name]:
            change = words.format(before=before[name], now=now[name], **shown_flags)
    return change


def label_space_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference of two label spaces in words, or None."""
    if before == now:
        return None
    names, its_names = before["class_names"], now["class_names"]
    is_unseen = [among(space["class_names"], space["unseen"]) for space in (before, now)]
    kinds, its_kinds = ([("seen", "unseen")[one] for one in own] for own in is_unseen)
    for name, kind, place in zip(names, kinds, places(names, its_names), strict=True):
        if place is not None and its_kinds[place] != kind:
            return f"{shortened(name, BRIEF)} was {kind}, is {its_kinds[place]} now"
    for name, kind, place in zip(names, kinds, places(names, its_names), strict=True):
        if place is None:
            return f"{shortened(name, BRIEF)} was {kind}, is no class now"
    for name, place in zip(its_names, places(its_names, names), strict=True):
        if place is None:
            return f"{shortened(name, BRIEF)} is a new class"
    for index, (name, its_name) in enumerate(zip(names, its_names, strict=False)):
        if name != its_name:
            return f"id {index} was {shortened(name, BRIEF)}, is {shortened(its_name, BRIEF)} now"
    if len(names) != len(its_names):
        return f"{len(names)} classes then, {len(its_names)} now"
    if before["ignore_index"] != now["ignore_index"]:
        return f"the ignored id was {before['ignore_index']}, is {now['ignore_index']} now"
    return "the unseen names are in another order"
