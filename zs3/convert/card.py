"""The card of a converted dataset: README.md with front matter for the Hub and `load_dataset`.

Every number in it comes from `conversion.json`.
"""

import hashlib

import yaml

from zs3.convert.archives import ARCHIVES
from zs3.label_space import CLASSES_FOLDER, load_label_space
from zs3.tables import markdown_table

ABOUT_CAPTIONS = [
    "Columns: image_id and captions, a list. The pictures are those of coco_stuff_171 with the same image_id; they",
    "are not repeated here. Load it with `datasets.load_dataset(FOLDER)`.",
]


def card(result: dict) -> str:
    """README.md of the dataset: front matter, then a description."""
    archive, splits = ARCHIVES[result["name"]], result["splits"]
    captions = result["name"] == "coco_captions"
    counted = {"images": "num_images"} | ({"captions": "num_captions"} if captions else {})
    counted |= {} if captions else {"ignored everywhere": "images_ignored_everywhere"}
    lines = [
        "---",
        yaml.safe_dump(front_matter(result), sort_keys=False) + "---",
        f"\n# {archive.title}\n",
        f"Made from the official archive by `zs3 convert {result['name']}`; what was measured is in",
        "`conversion.json`.\n",
        *markdown_table(
            ["split", *counted], ([s, *(f"{row[key]:,}" for key in counted.values())] for s, row in splits.items())
        ),
        "",
        *(_departure(split, row) for split, row in splits.items() if not row["as_released"]),
        *(ABOUT_CAPTIONS if captions else _about_maps(result)),
        f"\nLicences of the originals: {archive.licence}\n",
    ]
    return "\n".join(lines)


def front_matter(result: dict) -> dict:
    """The files of each split, and the number of rows that `load_dataset` must find in them.

    `load_dataset` caches datasets by folder name and front matter. The digest of the shards distinguishes datasets,
    and states of one dataset.
    """
    splits = result["splits"]
    shards = [shard["sha256"] for row in splits.values() for shard in row["shards"]]
    digest = hashlib.sha256("".join(shards).encode()).hexdigest()
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    sizes = [{"name": s, "num_bytes": row["bytes"], "num_examples": row["num_images"]} for s, row in splits.items()]
    return {
        "pretty_name": ARCHIVES[result["name"]].title,
        "license": "other",
        "task_categories": ["image-to-text" if result["name"] == "coco_captions" else "image-segmentation"],
        "configs": [{"config_name": "default", "description": f"sha256 {digest}", "data_files": files}],
        "dataset_info": [{"config_name": "default", "splits": sizes}],
    }


def _departure(split: str, row: dict) -> str:
    """A sentence on the difference between a split and its release."""
    release = " and ".join(f"{max(numbers):,} {what}" for what, numbers in row["in_release"].items())
    source = " and ".join(f"{number:,} {what}" for what, number in row["in_source"].items())
    here = f"{row['num_images']:,} are here"
    return f"**{split} differs from the release**: that has {release}, the copy {source}; {here}.\n"


def _about_maps(result: dict) -> list[str]:
    label_space = load_label_space(CLASSES_FOLDER / f"{result['name']}.json")
    bits, last = (8 if label_space.ignore_index == 255 else 16), len(label_space.class_names) - 1
    lines = [
        f"Columns: image, the file as released; label, a PNG of {bits} bits with ids, 0 to {last}, or "
        f"{label_space.ignore_index}: ignored;",
        "image_id; class_ids, the ids in the label map. The names of the ids are in `classes.json`.\n",
        f"Unseen names of the zero-shot split: {', '.join(label_space.unseen) or 'none'}.\n",
        'Load it with `zs3.data.load_split(FOLDER, "validation")` or `datasets.load_dataset(FOLDER)`.',
    ]
    if any(note["kind"] == "exif_orientation" for note in result["notes"]):
        lines += [
            "\nSome pictures have an EXIF orientation tag, and maps that fit the picture as stored. `load_split` reads",
            "them so; `load_dataset` turns what it decodes (`datasets.Image(decode=False)` gives the bytes).",
        ]
    return lines
