"""The measurements of a conversion: conversion.json, and lines for the terminal."""

from collections import Counter
from importlib.metadata import version

from zs3.convert.archives import ARCHIVES, NUM_CAPTIONS, Captioned, Pair
from zs3.convert.shards import Shard
from zs3.label_space import CLASSES_FOLDER, LabelSpace, load_label_space

SHOWN = 5  # problems that are printed


def counts(name: str, split: str, items: list[Pair | Captioned]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By kind: the number found, and the numbers that the release may have."""
    found = {"pictures": (len(items), ARCHIVES[name].counts[split])}
    if name == "coco_captions":
        found["captions"] = (sum(len(item.captions) for item in items), (NUM_CAPTIONS[split],))
    return found


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("datasets", "numpy", "pillow", "pyarrow", "scipy")}


def conversion(
    name: str, source: str, on_problem: str, items: dict[str, list[Pair | Captioned]], shards: list[tuple[Shard, dict]]
) -> dict:
    """The content of conversion.json.

    source: the archive's folder. items: of each split. shards: all shards with their measurements.
    """
    label_space = None if name == "coco_captions" else load_label_space(CLASSES_FOLDER / f"{name}.json")
    splits = {}
    for split, found in items.items():
        own = [(shard, measures) for shard, measures in shards if shard.split == split]
        splits[split] = split_measures(counts(name, split, found), own, label_space)
    return {
        "name": name,
        "source": source,
        "on_problem": on_problem,
        "label_space_sha256": label_space and label_space.sha256,
        "splits": splits,
        "problems": remarks(shards, "problems"),
        "notes": remarks(shards, "notes"),
        "versions": versions(),
    }


def remarks(shards: list[tuple[Shard, dict]], kind: str) -> list[dict[str, str]]:
    """All remarks with their split. kind: "problems" or "notes"."""
    return [{"split": shard.split, **remark} for shard, measures in shards for remark in measures[kind]]


def split_measures(
    known: dict[str, tuple[int, tuple[int, ...]]], shards: list[tuple[Shard, dict]], label_space: LabelSpace | None
) -> dict:
    """The measurements of one split. known: as from `counts`. label_space: None for captions."""
    total = {key: sum(measures[key] for _, measures in shards) for key in ("num_images", "bytes")}
    row = total | {
        "in_source": {what: found for what, (found, _) in known.items()},
        "in_release": {what: list(release) for what, (_, release) in known.items()},
        "as_released": all(found in release for found, release in known.values())
        and not any(measures["problems"] for _, measures in shards),
        "shards": [
            {"file": f"data/{shard.name}"} | {key: measures[key] for key in ("num_images", "bytes", "sha256")}
            for shard, measures in shards
        ],
    }
    if label_space is None:
        return row | {"num_captions": sum(measures["num_captions"] for _, measures in shards)}
    pixels, images = (sum((Counter(m[key]) for _, m in shards), Counter()) for key in ("pixels", "images"))
    names = label_space.class_names
    return row | {
        "pixels": {name: pixels[str(i)] for i, name in enumerate(names)},
        "images": {name: images[str(i)] for i, name in enumerate(names)},
        "ignored_pixels": pixels[str(label_space.ignore_index)],
        "images_ignored_everywhere": sum(measures["all_ignored"] for _, measures in shards),
        "never": [name for i, name in enumerate(names) if not images[str(i)]],
    }


def report(result: dict) -> str:
    """The lines for the terminal."""
    lines = []
    for split, row in result["splits"].items():
        what, number = ("pictures", "num_images") if "pixels" in row else ("captions", "num_captions")
        amount = f"{row[number]:,} {what}"
        release = "as released" if row["as_released"] else f"the release has {max(row['in_release'][what]):,}"
        lines.append(f"{split:<12}{amount} ({release}), {len(row['shards'])} shards, {row['bytes'] / 1e6:,.1f} MB")
        if row.get("images_ignored_everywhere"):
            lines.append(f"{'':<12}{row['images_ignored_everywhere']:,} pictures are ignored everywhere")
        if row.get("never"):
            shown = ", ".join(row["never"][:SHOWN]) + (", ..." if len(row["never"]) > SHOWN else "")
            lines.append(f"{'':<12}{len(row['never'])} classes never occur: {shown}")
    if result["notes"]:
        lines.append(f"{'notes':<12}{tally(result['notes'])}")
    if result["problems"]:
        lines.append(f"{'left out':<12}{tally(result['problems'])}")
    return "\n".join(lines)


def tally(remarks: list[dict[str, str]]) -> str:
    """The number of remarks of each kind, and the first few messages."""
    kinds = Counter(remark["kind"] for remark in remarks)
    lines = [", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())]
    lines += [f"  {remark['message']}" for remark in remarks[:SHOWN]]
    if len(remarks) > SHOWN:
        lines.append("  ...")
    return "\n".join(lines)
