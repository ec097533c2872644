"""Small trees in the layouts and formats of the official archives.

Each writer makes a tree and returns what a conversion has to give: {split: {image_id: (H, W) ids}}. The values of a
label file repeat `VALUES` from the first pixel on, and the ids written beside them by hand do the same.
"""

import json
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

# (values of label files, ids): COCO-Stuff's values skip 11, 25, 28, 29, 44, 65, 67, 68, 70, 82 and 90
VALUES = {
    "coco_stuff_171": ([0, 10, 12, 181, 255, 26, 180], [0, 10, 11, 170, 255, 24, 169]),
    "voc_20": ([0, 1, 15, 20, 255], [255, 0, 14, 19, 255]),
    "voc_21": ([0, 1, 15, 20, 255], [0, 1, 15, 20, 255]),
    "pascal_context_59": ([0, 1, 2, 9, 458, 459, 300], [255, 255, 0, 1, 58, 255, 255]),
    "pascal_context_459": ([0, 1, 2, 300, 459], [65535, 0, 1, 299, 458]),
    "ade20k_150": ([0, 1, 2, 150], [255, 0, 1, 149]),
    "ade20k_847": ([0, 2978, 312, 1, 3148, 3688], [65535, 0, 1, 65535, 846, 65535]),
}
PALETTE = [channel for index in range(256) for channel in (index * 37 % 256, index * 91 % 256, index * 53 % 256)]


def size_of(number: int) -> tuple[int, int]:
    """Height and width of the picture of this number: no two alike, none square."""
    return 11 + number, 30 - number


def made(path: Path) -> Path:
    """The path, whose folder is there now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_picture(path: Path, number: int, orientation: int | None = None, size: tuple[int, int] | None = None) -> None:
    height, width = size or size_of(number)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made(path), exif=exif)


def spread(values: list[int], number: int, dtype: type = np.uint8) -> np.ndarray:
    """(H, W): the values in turn, from another one on in each picture."""
    return np.resize(np.roll(np.array(values, dtype), number), size_of(number))


def write_grey(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(made(path))


def write_palette(path: Path, values: np.ndarray) -> None:
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette(PALETTE)
    image.save(made(path))


def write_object_ids(path: Path, values: np.ndarray) -> None:
    """Red and green spell the id; the last digit of red, and blue, say other things."""
    rng = np.random.default_rng(0)
    red = values // 256 * 10 + rng.integers(0, 6, values.shape)
    blue = rng.integers(0, 256, values.shape)
    Image.fromarray(np.stack([red, values % 256, blue], axis=-1).astype(np.uint8)).save(made(path))


def write_context(path: Path, values: np.ndarray) -> None:
    scipy.io.savemat(made(path), {"LabelMap": values.astype(np.uint16)}, do_compression=True)


def write_boundaries(path: Path, values: np.ndarray) -> None:
    """A struct as SBD's, with the boundaries of each class beside the map."""
    present = np.setdiff1d(values, [0, 255]).astype(np.uint8)
    boundaries = np.zeros((20, 1), dtype=object)
    struct = {"Boundaries": boundaries, "Segmentation": values.astype(np.uint8), "CategoriesPresent": present}
    scipy.io.savemat(made(path), {"GTcls": struct})


def write_list(path: Path, image_ids: list[str]) -> None:
    made(path).write_text("".join(f"{image_id}\n" for image_id in image_ids))


def coco_stuff(root: Path, name: str, train: int, images: str = "images/", maps: str = "annotations/") -> dict:
    expected = {"train": {}, "validation": {}}
    for number in range(train + 2):
        split, folder = ("train", "train2017") if number < train else ("validation", "val2017")
        image_id = f"{number * 7 + 9:012d}"
        write_picture(root / f"{images}{folder}" / f"{image_id}.jpg", number)
        write_grey(root / f"{maps}{folder}" / f"{image_id}.png", spread(VALUES[name][0], number))
        expected[split][image_id] = spread(VALUES[name][1], number)
    return expected


def voc(
    root: Path, name: str, train: int, folder: str = "VOCdevkit/VOC2012", sbd: str | None = "benchmark_RELEASE/dataset"
) -> dict:
    """Of the training pictures the first third is VOC's; SBD has those too, with other maps, and one of validation.

    Without sbd, the maps of the others are PNGs of SegmentationClassAug.
    """
    values, ids = VALUES[name]
    voc_root = root / folder
    names = [f"2007_{number:06d}" for number in range(train + 2)]
    own = names[: train // 3]
    expected = {"train": {}, "validation": {}}
    for number, image_id in enumerate(names):
        write_picture(voc_root / "JPEGImages" / f"{image_id}.jpg", number)
        other = np.full(size_of(number), 7)
        if image_id in own or number >= train:
            write_palette(voc_root / "SegmentationClass" / f"{image_id}.png", spread(values, number))
        if number <= train:
            other = other if image_id in own or number == train else spread(values, number)
            if sbd is None:
                write_grey(voc_root / "SegmentationClassAug" / f"{image_id}.png", other)
            else:
                write_boundaries(root / sbd / "cls" / f"{image_id}.mat", other)
        expected["train" if number < train else "validation"][image_id] = spread(ids, number)
    lists = voc_root / "ImageSets" / "Segmentation"
    write_list(lists / "train.txt", own)
    write_list(lists / "val.txt", names[train:])
    if sbd is None:
        lines = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in names[:train]]
        write_list(lists / "trainaug.txt", lines)
    else:
        write_list(root / sbd / "train.txt", names[:2] + names[train : train + 1])
        write_list(root / sbd / "val.txt", names[2:train])
    return expected


def pascal_context(
    root: Path, name: str, train: int, folder: str = "VOCdevkit/VOC2010", lists: str = "ImageSets/Main"
) -> dict:
    expected = {"train": {}, "validation": {}}
    for number in range(train + 2):
        image_id = f"2008_{number:06d}"
        write_picture(root / folder / "JPEGImages" / f"{image_id}.jpg", number)
        write_context(root / "trainval" / f"{image_id}.mat", spread(VALUES[name][0], number, np.uint16))
        expected["train" if number < train else "validation"][image_id] = spread(VALUES[name][1], number, np.uint16)
    write_list(root / folder / lists / "train.txt", list(expected["train"]))
    write_list(root / folder / lists / "val.txt", list(expected["validation"]))
    return expected


def ade20k_challenge(root: Path, name: str, train: int, folder: str = "ADEChallengeData2016") -> dict:
    expected = {"train": {}, "validation": {}}
    for number in range(train + 2):
        split, part, short = ("train", "training", "train") if number < train else ("validation", "validation", "val")
        image_id = f"ADE_{short}_{number:08d}"
        write_picture(root / folder / "images" / part / f"{image_id}.jpg", number)
        write_grey(root / folder / "annotations" / part / f"{image_id}.png", spread(VALUES[name][0], number))
        expected[split][image_id] = spread(VALUES[name][1], number)
    return expected


def ade20k_full(root: Path, name: str, train: int, folder: str = "ADE20K_2021_17_01") -> dict:
    expected = {"train": {}, "validation": {}}
    for number in range(train + 2):
        split, part, short = ("train", "training", "train") if number < train else ("validation", "validation", "val")
        image_id = f"ADE_{short}_{number:08d}"
        scene = (
            root / folder / "images" / "ADE" / part / ("cultural", "nature_landscape")[number % 2] / f"scene{number}"
        )
        write_picture(scene / f"{image_id}.jpg", number)
        write_object_ids(scene / f"{image_id}_seg.png", spread(VALUES[name][0], number, np.uint16))
        write_object_ids(scene / f"{image_id}_parts_1.png", spread([0, 5], number, np.uint16))
        write_grey(scene / image_id / f"instance_000_{image_id}.png", spread([0, 255], number))
        (scene / f"{image_id}.json").write_text("{}")
        expected[split][image_id] = spread(VALUES[name][1], number, np.uint16)
    return expected


TREES = {
    "coco_stuff_171": coco_stuff,
    "voc_20": voc,
    "voc_21": voc,
    "pascal_context_59": pascal_context,
    "pascal_context_459": pascal_context,
    "ade20k_150": ade20k_challenge,
    "ade20k_847": ade20k_full,
}


def write_tree(root: Path, name: str, train: int = 4, **options: str | None) -> dict[str, dict[str, np.ndarray]]:
    """`train` training pictures and two of validation."""
    return TREES[name](root, name, train, **options)


def write_captions(root: Path) -> dict[str, dict[str, list[str]]]:
    """Annotations out of order, with the white space the release has."""
    expected = {"train": {"000000000009": ["A cat.", "Two cats"]}, "validation": {"000000000030": ["a dog on a sofa"]}}
    for split, short in (("train", "train"), ("validation", "val")):
        content = {"images": [], "annotations": []}
        for image_id, captions in expected[split].items():
            content["images"].append({"id": int(image_id), "file_name": f"{image_id}.jpg"})
            for place, caption in reversed(list(enumerate(captions))):
                text = f"{caption} \n" if place else caption
                content["annotations"].append({"id": 40 + place, "image_id": int(image_id), "caption": text})
        path = root / "annotations" / f"captions_{short}2017.json"
        made(path).write_text(json.dumps(content))
    return expected
