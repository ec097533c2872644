"""One stored record: the picture is opened, the label map is read and checked.

Axes: H W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from configuration_zs3 import Refused, shortened
from files_zs3 import MAP_FORMATS, PICTURE_FORMATS, check_regular, decoding, is_deep, open_image, verify_checksums
from zs3.command_line import InputError
from zs3.data.contents import Row
from zs3.label_space import LabelSpace


class Record(NamedTuple):
    image: Image.Image  # RGB. An EXIF rotation is not applied.
    label: np.ndarray  # (H, W) int32: class ids, or ignore_index
    image_id: str


class StoredRecord(NamedTuple):
    """A record with a picture that is opened, but not decoded."""

    name: str  # of the picture, for messages
    image: Image.Image
    label: np.ndarray  # (H, W), with the integer type of its file
    ids: np.ndarray  # the class ids in the label map
    image_id: str

    def decoded(self, size: tuple[int, int] | None = None) -> Image.Image:
        """The picture in RGB.

        size: the width and height that are needed, to save time and memory. A JPEG is then decoded at a half, quarter
            or eighth of its size, but no smaller than this.
        """
        with readable(self.name):
            if size is not None:
                self.image.draft("RGB", size)
            self.image.load()
            return self.image if self.image.mode == "RGB" else self.image.convert("RGB")  # a copy

    @property
    def is_turned(self) -> bool:
        """Whether the picture has an EXIF rotation. It is never applied."""
        with readable(self.name):
            return exif_orientation(self.image) in range(2, 9)

    def record(self) -> Record:
        return Record(self.decoded(), self.label.astype(np.int32), self.image_id)


def read_stored(row: Row, image_id: str, label_space: LabelSpace) -> StoredRecord:
    image_name, image = _opened(row["image"], "picture", image_id)
    label_name, label, ids = read_label(row["label"], image_id, label_space)
    size = label.shape[::-1]
    if size != image.size:
        rotated = size == image.size[::-1]
        mend = "rotate the image as its EXIF tag says and save it without" if rotated else "make them equal"
        raise InputError(f"{label_name} is {_size(size)} pixels, but {image_name} is {_size(image.size)}: {mend}")
    return StoredRecord(image_name, image, label, ids, image_id)


def read_label(source: Path | Row, image_id: str, label_space: LabelSpace) -> tuple[str, np.ndarray, np.ndarray]:
    """A label map's name for messages, the map (H, W), and the class ids in it."""
    name, image = _opened(source, "map", image_id)
    if image.mode not in ("L", "P") and not image.mode.startswith("I"):
        raise InputError(f"{name} has mode {image.mode}: store one id a pixel, as PNG of mode L, P or I;16")
    with readable(name):
        label = np.asarray(image)  # a palette's indices are the ids
        found = np.flatnonzero(image.histogram()) if label.dtype == np.uint8 else np.unique(label)
    ids = found[found != label_space.ignore_index]
    num_classes = len(label_space.class_names)
    outside = ids[(ids < 0) | (ids >= num_classes)]
    if len(outside):
        raise InputError(
            f"{name} holds id {outside[0]}; ids are 0 to {num_classes - 1}, and {label_space.ignore_index} for "
            "ignored: correct the map, or the label space"
        )
    return name, label, ids


def read_ids(row: Row, image_id: str, label_space: LabelSpace) -> tuple[np.ndarray, bool]:
    _, label, ids = read_label(row["label"], image_id, label_space)
    return ids, bool((label == label_space.ignore_index).any())


def _opened(source: Path | Row | None, what: Literal["picture", "map"], image_id: str) -> tuple[str, Image.Image]:
    """A name for messages, and the image of a path or of a table's cell, not decoded yet."""
    if isinstance(source, Path):
        file, name = source, str(source)
    else:
        cell = source or {"bytes": None, "path": None}
        file = cell["path"] if cell["bytes"] is None else cell["bytes"]
        name = f"{'image' if what == 'picture' else 'label map'} of {shortened(image_id)}"
    if file is None:
        raise InputError(f"the {name} is empty: give the row a picture and a map, or remove it")
    with readable(name):
        return name, open_stored(file, what)


def open_stored(source: str | Path | bytes, what: Literal["picture", "map"]) -> Image.Image:
    """A dataset's picture or label map, not decoded yet. Raises Refused with the reason.

    Decoding it gives the written values, or an error. For this the checksums of a PNG are tested, and bit depths that
    Pillow would change are refused.
    """
    if not isinstance(source, bytes):
        check_regular(source)
        source = Path(source).read_bytes()
    image = open_image(source, PICTURE_FORMATS if what == "picture" else MAP_FORMATS)
    if image.format == "PNG":
        verify_checksums(source)
    depth = str(image.tile[0].args) if image.tile else ""  # a PNG has its raw mode here, such as "RGB;16B"
    if what == "picture" and (is_deep(image) or image.format == "PNG" and ";16" in depth):
        raise Refused("it has more than 8 bits a channel: save it with 8")
    if what == "map" and image.tile and image.tile[0].args in ("L;2", "L;4"):  # Pillow would scale them to 8 bits
        raise Refused("it has fewer than 8 bits a pixel: save it with 8")
    return image


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Within the block, the refusal of a decoder becomes an InputError with the file's name."""
    try:
        with decoding():
            yield
    except Refused as error:
        raise InputError(f"cannot read {name} ({error}): replace it, or remove it with its partner") from error


def exif_orientation(image: Image.Image) -> int:
    """1 for none; 2 to 8 for turned or mirrored pictures, from 5 on with height and width exchanged."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
