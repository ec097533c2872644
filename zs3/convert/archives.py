"""The official archives of the benchmarks: pairs of picture and label file, and readers of label files.

A layout function takes the archive's folder and a split, and returns the pairs of that split. Each pair has the
function that reads its label file: (H, W) values of the archive, uint8 or uint16. `source_ids` in
`zs3/classes/NAME.json` maps values to classes; `Archive.ignored` lists the values of no class. `ARCHIVES` lists all.

Axes: H W pixels.
"""

import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from PIL import Image

from configuration_zs3 import Refused, one_line
from files_zs3 import MAX_PIXELS, check_regular, decoding, is_leftover, lines_of, read_text
from zs3.command_line import InputError
from zs3.data.stored import open_stored

SPLITS = ("train", "validation")
COMPRESSED = 15  # the type of a compressed element in MATLAB's files
MOST_OF_A_MAT = 2 * MAX_PIXELS  # bytes of the largest map, in 16 bits
_VOC_VALUES = 20  # the highest class index in VOC's palette; 255 is ignored


class BadFile(Exception):
    """A picture or label file that cannot be used. kind: the fault in one word; the message is a sentence."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Pair(NamedTuple):
    image_id: str
    image: Path
    label: Path
    values: Callable[[Path], np.ndarray]  # reads `label`: (H, W) of the archive's values; raises BadFile
    repeats: bool = False  # an earlier pair has this image_id


class Captioned(NamedTuple):
    image_id: str
    captions: list[str]
    repeats: bool = False


class Archive(NamedTuple):
    """A benchmark's archive.

    items: (folder, split) -> pairs or captions. Raises InputError for a folder of another layout.
    counts: the number of pictures in each split of the release; several numbers if copies differ.
    ignored: values of label files that are allowed but no class.
    licence: a sentence on the licence of the originals.
    """

    title: str
    items: Callable[[Path, str], list[Pair] | list[Captioned]]
    counts: dict[str, tuple[int, ...]]
    ignored: Iterable[int]
    licence: str


# ---- label files -------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, what: str) -> Iterator[bytes]:
    """The bytes of a file. The block decodes them; its errors become BadFile. what: "picture" or "map"."""
    if not path.exists():
        raise BadFile(f"missing_{what}", f"{path} is missing")
    try:
        with decoding():  # scipy raises many kinds of errors on a damaged file, and has bugs
            check_regular(path)
            yield path.read_bytes()
    except Refused as error:
        raise BadFile(f"unreadable_{what}", f"cannot read {path}: {error}") from error


def opened(path: Path, what: str) -> tuple[bytes, Image.Image]:
    """The bytes of a file, and its decoded image."""
    with reading(path, what) as content:
        image = open_stored(content, what)
        image.load()
    return content, image


def grey_values(path: Path) -> np.ndarray:
    """The values of a PNG with 8 bits a pixel."""
    return np.asarray(_of_mode(path, ("L", "P"), "one value a pixel is expected"))


def palette_values(path: Path) -> np.ndarray:
    """The indices in VOC's palette PNGs. Some copies of VOC store the indices in mode L, which is read too."""
    mend = "copy the original, whose pixels are indices"
    image = _of_mode(path, ("P", "L"), f"its palette was turned into colours; {mend}")
    values = np.asarray(image)
    outside = values[(values > _VOC_VALUES) & (values != 255)]
    if image.mode == "L" and len(outside):
        raise BadFile("ids_outside", f"{path} holds value {outside[0]}: its palette was turned into grey; {mend}")
    return values


def object_values(path: Path) -> np.ndarray:
    """The object ids of ADE20K's *_seg.png, which red and green encode."""
    pixels = np.asarray(_of_mode(path, ("RGB",), "object ids are expected in red and green"))
    return pixels[..., 0] // 10 * np.uint16(256) + pixels[..., 1]


def context_values(path: Path) -> np.ndarray:
    """The LabelMap in Pascal Context's .mat files."""
    return _from_mat(path, "LabelMap", lambda variable: variable)


def boundaries_values(path: Path) -> np.ndarray:
    """GTcls.Segmentation in the .mat files of SBD, the Semantic Boundaries Dataset."""
    return _from_mat(path, "GTcls", lambda variable: variable["Segmentation"][0, 0])


def _of_mode(path: Path, modes: Sequence[str], otherwise: str) -> Image.Image:
    image = opened(path, "map")[1]
    if image.mode not in modes:
        raise BadFile("wrong_mode", f"{path} is of mode {image.mode}: {otherwise}")
    return image


def _from_mat(path: Path, name: str, part: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    with reading(path, "map") as content:
        check_inflated(content)
        stored = part(scipy.io.loadmat(io.BytesIO(content), variable_names=[name])[name])
    if stored.ndim != 2 or stored.dtype.kind not in "uif":
        raise BadFile("unreadable_map", f"{name} of {path} is no map: {stored.ndim} axes of type {stored.dtype}")
    with np.errstate(invalid="ignore"):
        values = stored.astype(np.uint16)
    if not np.array_equal(values, stored):
        raise BadFile("ids_outside", f"{name} of {path} holds values that are no whole numbers from 0 to 65535")
    return values


def check_inflated(content: bytes) -> None:
    """Raises Refused if the unpacked variables of a MATLAB 5 file are larger than any label map.

    The file has a header of 128 bytes and elements: type and length, 4 bytes each, then the data, compressed by zlib.
    """
    order = "big" if content[126:128] == b"MI" else "little"
    place, total = 128, 0
    while place + 8 <= len(content):
        kind, length = (int.from_bytes(content[place + at : place + at + 4], order) for at in (0, 4))
        if kind == COMPRESSED:
            unpacker, packed = zlib.decompressobj(), content[place + 8 : place + 8 + length]
            while packed and total <= MOST_OF_A_MAT:
                total += len(unpacker.decompress(packed, 2**20))
                packed = unpacker.unconsumed_tail
        if total > MOST_OF_A_MAT:
            raise Refused(f"it is more than {MOST_OF_A_MAT:,} bytes unpacked, larger than any label map: replace it")
        place += 8 + length


# ---- layouts -----------------------------------------------------------------------------------------------


def coco_stuff(source: Path, split: str) -> list[Pair]:
    """COCO 2017's pictures and the stuffthingmaps, in the folders of their archives or of the COCO-Stuff repository."""
    folder = {"train": "train2017", "validation": "val2017"}[split]
    maps = [f"{parent}{folder}" for parent in ("annotations/", "stuffthingmaps/", "stuffthingmaps_trainval2017/", "")]
    return _pairs_of_folders(
        _folder([source], [f"images/{folder}", folder], "[!.]*.jpg", "pictures of COCO 2017"),
        _folder([source], maps, "[!.]*.png", "maps of COCO-Stuff"),
        grey_values,
    )


def voc(source: Path, split: str) -> list[Pair]:
    """VOC 2012. The training split is the usual "trainaug", with pictures of SBD outside VOC's validation split."""
    pictures = _voc_pictures(source, 2012)
    root = pictures.parent
    own = _folder([root], ["SegmentationClass"], "[!.]*.png", "maps of VOC 2012")
    lists = root / "ImageSets" / "Segmentation"

    def own_pair(image_id: str) -> Pair:
        return Pair(image_id, pictures / f"{image_id}.jpg", own / f"{image_id}.png", palette_values)

    validation = _listed(lists / "val.txt")
    if split == "validation":
        return [own_pair(image_id) for image_id in validation]

    train = _listed(lists / "train.txt")
    bases = [source, root.parent, root.parent.parent]
    names = ["benchmark_RELEASE/dataset/cls", "SBD/benchmark_RELEASE/dataset/cls", "SBD/dataset/cls", "SBD/cls"]
    sbd = _first_folder(bases, [*names, "dataset/cls", "cls"], "[!.]*.mat")
    augmented = _first_folder([root], ["SegmentationClassAug"], "[!.]*.png")
    if sbd is not None:
        others = _listed(sbd.parent / "train.txt") + _listed(sbd.parent / "val.txt")
        folder, suffix, values = sbd, ".mat", boundaries_values
    elif augmented is not None:
        others = _listed(_first_file(lists, ["trainaug.txt", "train_aug.txt"]))
        folder, suffix, values = augmented, ".png", palette_values
    else:
        raise InputError(
            f"{source} has neither benchmark_RELEASE/dataset/cls/*.mat of SBD nor "
            f"{_shown(root / 'SegmentationClassAug', source)}: the training split needs one of them"
        )
    left_out = {*train, *validation}
    rest = [image_id for image_id in dict.fromkeys(others) if image_id not in left_out]
    pairs = [own_pair(image_id) for image_id in train]
    return pairs + [Pair(name, pictures / f"{name}.jpg", folder / f"{name}{suffix}", values) for name in rest]


def pascal_context(source: Path, split: str) -> list[Pair]:
    """Pascal Context's .mat files for the pictures of VOC 2010, with the splits of VOC 2010."""
    pictures = _voc_pictures(source, 2010)
    root = pictures.parent
    maps = _folder([source, root, root.parent, root.parent.parent], ["trainval"], "[!.]*.mat", "Pascal Context's maps")
    name = {"train": "train.txt", "validation": "val.txt"}[split]
    ids = _listed(_first_file(root / "ImageSets", [f"SegmentationContext/{name}", f"Main/{name}"]))
    return [Pair(i, pictures / f"{i}.jpg", maps / f"{i}.mat", context_values) for i in ids]


def ade20k_challenge(source: Path, split: str) -> list[Pair]:
    """ADEChallengeData2016, the scene parsing benchmark."""
    bases = [source, source / "ADEChallengeData2016"]
    folder = {"train": "training", "validation": "validation"}[split]
    return _pairs_of_folders(
        _folder(bases, [f"images/{folder}"], "ADE_*.jpg", "pictures of ADEChallengeData2016"),
        _folder(bases, [f"annotations/{folder}"], "ADE_*.png", "maps of ADEChallengeData2016"),
        grey_values,
        "ADE_",
    )


def ade20k_full(source: Path, split: str) -> list[Pair]:
    """ADE20K_2021_17_01: pictures of full size in a tree of scenes, each beside its *_seg.png."""
    bases = [source, source / "ADE20K_2021_17_01"]
    folder = {"train": "training", "validation": "validation"}[split]
    tree = _folder(bases, [f"images/ADE/{folder}"], "**/ADE_*.jpg", "pictures of ADE20K_2021_17_01")
    files = [file for file in tree.rglob("ADE_*") if file.suffix.lower() in (".jpg", ".png")]
    images = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".jpg"}
    segs = {file.with_name(file.stem.removesuffix("_seg")): file for file in files if file.stem.endswith("_seg")}
    return [
        Pair(
            i.name,
            images.get(i, i.with_name(f"{i.name}.jpg")),
            segs.get(i, i.with_name(f"{i.name}_seg.png")),
            object_values,
        )
        for i in images.keys() | segs.keys()
    ]


def coco_captions(source: Path, split: str) -> list[Captioned]:
    """The captions of COCO 2017. Captions of one picture are in the order of their ids."""
    name = {"train": "captions_train2017.json", "validation": "captions_val2017.json"}[split]
    path = _first_file(source, [f"annotations/{name}", name])
    captions = defaultdict(list)
    try:
        content = json.loads(read_text(path))
        image_ids = [(image["id"], Path(image["file_name"]).stem) for image in content["images"]]
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions[annotation["image_id"]].append(annotation["caption"].strip())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no captions file of COCO ({one_line(error)}): copy the original") from error
    strangers = captions.keys() - {number for number, _ in image_ids}
    if strangers:
        raise InputError(f"{path} has captions of pictures that it does not list ({min(strangers)}): copy the original")
    return [Captioned(image_id, captions[number]) for number, image_id in image_ids]


def _voc_pictures(source: Path, year: int) -> Path:
    names = [f"{parent}JPEGImages" for parent in (f"VOCdevkit/VOC{year}/", f"VOC{year}/", "")]
    return _folder([source], names, "[!.]*.jpg", f"pictures of VOC {year}")


def _pairs_of_folders(images: Path, labels: Path, values: Callable[[Path], np.ndarray], begin: str = "") -> list[Pair]:
    """Pairs of picture and map with the same stem. A file without a partner makes a pair with a missing file.

    Maps of other tools, such as 000000000139_labelTrainIds.png, are left out: their names begin with the name of a
    picture.
    """
    pictures, maps = _of_suffix(images, ".jpg", begin), _of_suffix(labels, ".png", begin)
    stems = pictures.keys() | {stem for stem in maps if pictures.keys().isdisjoint(_beginnings(stem))}
    return [
        Pair(stem, pictures.get(stem, images / f"{stem}.jpg"), maps.get(stem, labels / f"{stem}.png"), values)
        for stem in stems
    ]


def _of_suffix(folder: Path, suffix: str, begin: str) -> dict[str, Path]:
    """Stem -> file. The case of the suffix does not matter; if both .jpg and .JPG exist, .jpg is taken."""
    files = (file for file in folder.iterdir() if file.name.startswith(begin) and not is_leftover(file.name))
    return {file.stem: file for file in sorted(files, reverse=True) if file.suffix.lower() == suffix}


def _beginnings(stem: str) -> set[str]:
    """The beginnings of a stem, up to each character that is neither letter nor digit."""
    return {stem[: match.start()] for match in re.finditer(r"[\W_]", stem)}


def _folder(bases: Sequence[Path], names: Sequence[str], pattern: str, what: str) -> Path:
    folder = _first_folder(bases, names, pattern)
    if folder is None:
        looked_for = _words(
            [_shown(base / name / pattern.removeprefix("[!.]"), bases[0]) for base in bases for name in names]
        )
        raise InputError(f"{bases[0]} has {looked_for}: the {what} are expected there")
    return folder


def _first_folder(bases: Sequence[Path], names: Sequence[str], pattern: str) -> Path | None:
    """The first of these folders that holds a file of the pattern; None if none does."""
    for base in bases:
        for name in names:
            if next((base / name).glob(pattern), None) is not None:
                return base / name
    return None


def _first_file(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} has {_words(names)}: copy it from the archive")


def _listed(path: Path) -> list[str]:
    """The image ids in a list file: the stem of the first word of each line, which may be a path."""
    try:
        lines = lines_of(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the list {path} ({one_line(error)}): copy it from the archive") from error
    return [Path(line.split()[0]).stem for line in lines if line.strip()]


def _words(names: Sequence[str]) -> str:
    return f"no {names[0]}" if len(names) == 1 else f"neither {' nor '.join(names)}"


def _shown(path: Path, source: Path) -> str:
    return str(path.relative_to(source)) if path.is_relative_to(source) else str(path)


# ---- the archives ------------------------------------------------------------------------------------------

_FLICKR = "The pictures are from Flickr, under its terms of use"
_COCO = f"{_FLICKR}; the annotations of COCO and COCO-Stuff are under CC BY 4.0."
_VOC = f"{_FLICKR}; the terms of the maps are on the pages of VOC and SBD."
_CONTEXT = f"{_FLICKR}; the terms of the maps are on the pages of VOC and Pascal Context."
_ADE = "The pictures are for non-commercial research and education alone; the annotations are under the BSD 3-clause."
_CONTEXT_COUNTS = {"train": (4_998,), "validation": (5_105, 5_104)}  # a widely used list lacks one picture

ARCHIVES = {
    "coco_stuff_171": Archive(
        "COCO-Stuff 164k, 171 classes", coco_stuff, {"train": (118_287,), "validation": (5_000,)}, [255], _COCO
    ),
    "voc_20": Archive(
        "Pascal VOC 2012 with SBD, 20 classes", voc, {"train": (10_582,), "validation": (1_449,)}, [0, 255], _VOC
    ),
    "voc_21": Archive(
        "Pascal VOC 2012 with SBD, 20 classes and background",
        voc,
        {"train": (10_582,), "validation": (1_449,)},
        [255],
        _VOC,
    ),
    "pascal_context_59": Archive(
        "Pascal Context, the 59 most frequent classes", pascal_context, _CONTEXT_COUNTS, range(460), _CONTEXT
    ),
    "pascal_context_459": Archive("Pascal Context, all 459 classes", pascal_context, _CONTEXT_COUNTS, [0], _CONTEXT),
    "ade20k_150": Archive(
        "ADE20K scene parsing, 150 classes", ade20k_challenge, {"train": (20_210,), "validation": (2_000,)}, [0], _ADE
    ),
    "ade20k_847": Archive(
        "ADE20K full, 847 classes", ade20k_full, {"train": (25_574,), "validation": (2_000,)}, range(3689), _ADE
    ),
    "coco_captions": Archive("COCO captions", coco_captions, {"train": (118_287,), "validation": (5_000,)}, [], _COCO),
}
NUM_CAPTIONS = {"train": 591_753, "validation": 25_014}  # of the release
