"""Image labels: which classes are in a picture as a whole. Training gets them beside the masks of the seen classes.

Inductive training has no image labels of unseen classes. Transductive training has them from the ground truth, or from
the scores of `zs3 pseudo_labels` (section 3.4). `zs3.data.caption_labels` has image labels from captions (section 4.5).
`count_labels` compares image labels with the label maps. This is a measurement only.

Axes: C names on the class axis of the run, N images, U unseen names.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from typing_extensions import TypedDict

from configuration_zs3 import Zs3Config, one_line, places, shortened, unshared
from zs3.command_line import InputError, shown
from zs3.data.records import Split
from zs3.label_space import LabelSpace
from zs3.scores.means import ratio
from zs3.typed_json import Count, Share, read_json

# What training gets of the unseen classes.
# "inductive": nothing. Their names are not on the class axis.
# "transductive": their names and image labels, but never their masks.
# "supervised": their masks too, so no zero-shot result can be claimed (the upper bound).
Supervision = Literal["inductive", "transductive", "supervised"]
SHARD = re.compile(r"scores-\d+-of-\d+\.parquet")  # see `shard_name`
SETTINGS_KEY = b"zs3_settings_sha256"  # metadata of a shard of scores


def training_space(label_space: LabelSpace, supervision: Supervision) -> LabelSpace:
    """The label space of the training. In supervised training no class is unseen."""
    if supervision == "supervised":
        return LabelSpace(label_space.class_names, [], label_space.ignore_index)
    return label_space


# ---- sources of image labels -------------------------------------------------------------------------------


class ImageLabels(Protocol):
    """A source of image labels. `class_names`: the C names on the class axis of the run."""

    class_names: list[str]

    def __call__(self, image_id: str, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(C,) int8: 1 present, 0 absent, -1 unknown. A name with a mask in the crop becomes present in any case.

        ids: the class ids in the whole picture, unseen classes included. rng: of this sample.
        """


class NoUnseenLabels:
    """Inductive: the class axis has only seen names, because a name that is never present would only be pushed down."""

    def __init__(self, label_space: LabelSpace):
        self.class_names = label_space.seen

    def __call__(self, image_id: str, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(len(self.class_names), dtype=np.int8)


class GroundTruthLabels:
    """Table 5's "GT Unseen": whether each unseen class is in the whole picture, not only in the crop."""

    def __init__(self, label_space: LabelSpace):
        self.class_names = label_space.class_names
        self.is_unseen = ~label_space.is_seen.numpy()

    def __call__(self, image_id: str, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        labels = np.zeros(len(self.class_names), dtype=np.int8)
        labels[ids] = self.is_unseen[ids]
        return labels


class Positives(NamedTuple):
    labels: int  # number of positive labels
    images: int  # number of images with a positive label
    all_images: int


class PseudoLabels:
    """Section 3.4: the scores of a folder, made into labels by a threshold (`pseudo_labels`).

    image_ids: the training images, which must all have scores. None, for a stream: each is checked when it is read.

    `positives` counts the training images; for a stream, all images that have scores.
    """

    def __init__(
        self,
        path: str | Path,
        label_space: LabelSpace,
        image_ids: Sequence[str] | None,
        threshold: float = Zs3Config.pseudo_label_threshold,
        unknown_above: float | None = None,
    ):
        self.path = path
        self.class_names = label_space.class_names
        self.row_of, scores = read_scores(path, label_space)
        rows = slice(None) if image_ids is None else _rows_of(image_ids, self.row_of, path)
        self.labels = np.zeros((len(scores), len(self.class_names)), dtype=np.int8)
        columns = places(label_space.unseen, label_space.class_names)  # in the order of the scores
        self.labels[:, columns] = pseudo_labels(scores, threshold, unknown_above)
        is_positive = self.labels[rows] == 1
        self.positives = Positives(int(is_positive.sum()), int(is_positive.any(axis=1).sum()), len(is_positive))

    def __call__(self, image_id: str, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.labels[_rows_of([image_id], self.row_of, self.path)[0]]


def pseudo_labels(scores: np.ndarray, threshold: float, unknown_above: float | None = None) -> np.ndarray:
    """Section 3.4: scores -> int8 labels of the same shape: 1 from the threshold on, else 0.

    unknown_above: a score between it and the threshold gives -1, unknown. None: no label is unknown.
    """
    labels = (scores >= threshold).astype(np.int8)
    if unknown_above is not None:
        if unknown_above >= threshold:
            raise InputError(f"pseudo_label_unknown_above {unknown_above} must be below the threshold {threshold}")
        labels[(scores > unknown_above) & (scores < threshold)] = -1
    return labels


# ---- how good image labels are ------------------------------------------------------------------------------


class LabelCounts(NamedTuple):
    """Numbers of pairs of an image and an unseen name: over all pairs, or one number for each name."""

    hits: np.ndarray  # pairs with a label whose class is in the label map
    labelled: np.ndarray  # pairs with a label
    present: np.ndarray  # pairs whose class is in the label map

    @property
    def precision(self) -> np.ndarray:
        """In [0, 1]; NaN without labels."""
        return ratio(self.hits, self.labelled)

    @property
    def recall(self) -> np.ndarray:
        """In [0, 1]; NaN if no class is present."""
        return ratio(self.hits, self.present)


def count_labels(labelled: np.ndarray, present: np.ndarray, axis: int | None = None) -> LabelCounts:
    """labelled, present: bool arrays of one shape, such as (N, U). axis: summed over; None: over all.

    An unknown label does not count as a label.
    """
    return LabelCounts(*(pairs.sum(axis) for pairs in (labelled & present, labelled, present)))


# ---- the scores of `zs3 pseudo_labels` ----------------------------------------------------------------------


class PseudoLabelSettings(TypedDict, total=False):
    """The keys of settings.json, beside the scores, that a reader needs."""

    checkpoint_sha256: dict[str, str]
    num_images: Count
    picture_sizes_sha256: str | None
    unannotated_share: Share


def pseudo_label_settings(folder: Path) -> PseudoLabelSettings:
    """The checked content of a folder's settings.json."""
    what = "settings file of zs3 pseudo_labels"
    return read_json(folder / "settings.json", PseudoLabelSettings, what, "make the pseudo labels anew")


def settings_digest(settings: Mapping[str, Any]) -> bytes:
    """The digest of the settings of `zs3 pseudo_labels`. Each shard stores it."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest().encode()


def shard_digest(file: Path) -> bytes | None:
    """The digest of the settings that a shard stores. None: the shard is damaged, or of an older version."""
    import pyarrow
    import pyarrow.parquet

    try:
        return (pyarrow.parquet.read_schema(file).metadata or {}).get(SETTINGS_KEY) or None
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


def load_unseen_scores(path: str | Path, label_space: LabelSpace, image_ids: Sequence[str]) -> np.ndarray:
    """(N, U) float32: the scores of N images, from `read_scores`."""
    row_of, scores = read_scores(path, label_space)
    return scores[_rows_of(image_ids, row_of, path)]


def read_scores(path: str | Path, label_space: LabelSpace) -> tuple[dict[str, int], np.ndarray]:
    """The row of each image_id, and the scores of all images (N, U) in the order of label_space.unseen.

    path: a folder of shards `scores-00003-of-00047.parquet`, or one such file. Its columns are image_id and scores, a
        struct with one number for each unseen name.
    """
    row_of, scores = {}, []
    files, expected = _score_files(Path(path)), None
    if (Path(path) / "settings.json").is_file():
        expected = settings_digest(pseudo_label_settings(Path(path)))
    for file in files:
        bound = shard_digest(file)
        expected = expected or bound
        if bound not in (None, expected):
            raise InputError(f"{shown(file)} was made with other settings than the folder's: delete it, make it again")
        ids, part = _read_scores(file, label_space.unseen)
        row_of.update(zip(ids, range(len(row_of), len(row_of) + len(ids)), strict=True))
        scores.append(part)
        if len(row_of) != sum(map(len, scores)):
            raise InputError(f"{file} repeats an image_id: make the pseudo labels anew, with one row an image")
    return row_of, np.concatenate(scores)


def _rows_of(image_ids: Sequence[str], row_of: dict[str, int], path: str | Path) -> list[int]:
    missing = [image_id for image_id in image_ids if image_id not in row_of]
    if missing:
        raise InputError(
            f"{path} has no row for {len(missing)} images ({missing[0]!r}, ...): make the pseudo labels from this split"
        )
    return [row_of[image_id] for image_id in image_ids]


def _score_files(path: Path) -> list[Path]:
    """All shards of a folder, or the one file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        close = get_close_matches(str(path), ("none", "ground_truth", "masks"), n=1)
        if close and close[0] != str(path):
            raise InputError(f"pseudo labels {path} do not exist: did you mean {close[0]}?")
        raise InputError(
            f"pseudo labels {path} do not exist: unseen_labels is 'none', 'ground_truth', 'masks', or a "
            "folder that zs3 pseudo_labels made"
        )
    found = [file for file in sorted(path.glob("scores-*.parquet")) if SHARD.fullmatch(file.name)]
    if not found:
        raise InputError(f"{path} holds no shards: give the --output of zs3 pseudo_labels")
    total = int(found[0].stem.rsplit("-", 1)[1])
    if found != [path / shard_name(index, total) for index in range(total)]:
        raise InputError(
            f"{path} holds {len(found)} shards, but not the {total} of one run: "
            "start zs3 pseudo_labels again, or delete the shards of another run"
        )
    return found


def shard_name(index: int, total: int) -> str:
    return f"scores-{index:05d}-of-{total:05d}.parquet"


def _read_scores(file: Path, unseen: list[str]) -> tuple[list[str], np.ndarray]:
    """Image ids, and their scores (N, U) float32 in the order of `unseen`."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file, columns=["image_id", "scores"])
        rows = table["scores"].combine_chunks()
        names = [field.name for field in rows.type]
        columns = rows.flatten()
        image_ids = [str(image_id) for image_id in table["image_id"].to_pylist()]
    except (OSError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read pseudo labels {file} ({one_line(error, 60)}): make them anew") from error
    own = places(unseen, names)
    if None in own or len(names) != len(unseen):
        odd = unshared(unseen, names) + unshared(names, unseen)
        which = f" ({shortened(odd[0])})" if odd else ""
        raise InputError(f"{file} has scores of other unseen names than the label space{which}: make them anew")
    scores = np.stack([columns[place].to_numpy(zero_copy_only=False) for place in own], axis=1).astype(np.float32)
    if not np.isfinite(scores).all():
        raise InputError(f"{file} has a score that is missing or not finite: make the pseudo labels anew")
    return image_ids, scores


def check_scored_pictures(path: Path, records: Split) -> None:
    """Refuses scores of another dataset with the same image ids, by the file sizes of the pictures."""
    made_of = pseudo_label_settings(path) if (path / "settings.json").is_file() else {}
    known, count = made_of.get("picture_sizes_sha256"), made_of.get("num_images", 0)
    own = records.picture_sizes_sha256(count)
    if None not in (known, own) and known != own:
        raise InputError(f"{path} was made from other pictures of the same names: make pseudo labels of this dataset")
