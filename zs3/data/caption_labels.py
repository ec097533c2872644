"""Image labels from captions (section 4.5): the nouns of a picture's captions as further class names."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from typing_extensions import TypedDict

from configuration_zs3 import among, beginning, one_line
from zs3.command_line import InputError, shown
from zs3.label_space import LabelSpace, load_label_space
from zs3.typed_json import read_json


class CaptionSettings(TypedDict):
    """The keys of settings.json that `load_caption_nouns` needs."""

    label_space: str
    label_space_sha256: str


class CaptionNouns(NamedTuple):
    class_names: list[str]  # C, the seen names of the label space first
    positions: dict[str, np.ndarray]  # image_id -> int32, ascending: places of its nouns on the class axis


def load_caption_nouns(path: str | Path, label_space: LabelSpace) -> CaptionNouns:
    """Reads the folder that `zs3 nouns` made for this label space."""
    import pyarrow
    import pyarrow.parquet

    folder = Path(path)
    files = sorted(folder.glob("nouns-*.parquet"))
    if not files or not (folder / "settings.json").is_file():
        raise InputError(f"{folder} holds no caption nouns: give the --output of zs3 nouns")
    class_names = load_label_space(folder).class_names
    what, mend = "settings file of zs3 nouns", "make the caption nouns again"
    settings = read_json(folder / "settings.json", CaptionSettings, what, mend)
    try:
        tables = [pyarrow.parquet.read_table(file, columns=["image_id", "nouns"]) for file in files]
        rows = [(table["image_id"].to_pylist(), table["nouns"].combine_chunks()) for table in tables]
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read the caption nouns {folder}: {one_line(error)}; make them again") from error
    if settings["label_space_sha256"] != label_space.sha256:
        named = beginning(settings["label_space"], 60)
        raise InputError(f"{shown(folder)} was made for another label space ({named}): make caption nouns for this one")
    if not all(among(label_space.seen, class_names)):
        raise InputError(f"{shown(folder)} lacks a seen name of the label space in its classes.json: make it again")
    found = {}
    for image_ids, nouns in rows:
        flat = nouns.values.to_numpy().astype(np.int32)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(class_names):
            raise InputError(f"{folder} has positions outside its {len(class_names)} class names: make it again")
        found.update(zip(image_ids, np.split(flat, nouns.offsets.to_numpy()[1:-1]), strict=True))
    return CaptionNouns(class_names, found)


def dropped(labels: np.ndarray, rng: np.random.Generator, probability: float, dropped_as: int = -1) -> np.ndarray:
    """(C,) int8: image labels in which each present word is dropped with this probability (0.25 in the paper).

    labels: (C,) int8, 1 present, 0 absent, -1 unknown.
    dropped_as: the label of a dropped word. Reading: -1, unknown. With 0 the ranking loss would push down a word that
        is in the captions.
    """
    drop = (labels == 1) & (rng.random(len(labels)) < probability)
    return np.where(drop, np.int8(dropped_as), labels)


class CaptionLabels:
    """The `ImageLabels` of captions. The class axis is the nouns; a noun that is not in an image's captions is absent.

    image_ids: the training images, which must all have captions. None, for a stream: each is checked when it is read.
    """

    def __init__(
        self, nouns: CaptionNouns, image_ids: Sequence[str] | None, drop_probability: float, dropped_as: int = -1
    ):
        self.class_names, self.positions = nouns
        self.drop_probability, self.dropped_as = drop_probability, dropped_as
        for image_id in image_ids or []:
            self._nouns(image_id)

    def __call__(self, image_id: str, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        labels = np.zeros(len(self.class_names), dtype=np.int8)
        labels[self._nouns(image_id)] = 1
        return dropped(labels, rng, self.drop_probability, self.dropped_as)

    def _nouns(self, image_id: str) -> np.ndarray:
        if image_id not in self.positions:
            raise InputError(f"image {image_id!r} has no captions: make the nouns from the captions of this dataset")
        return self.positions[image_id]
