"""Converters: ids written by hand, every fault found and named, and the same bytes however a conversion went on."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import archives
import numpy as np
import pyarrow.parquet
import pytest
import scipy.io
import torch
import yaml
from archives import TREES, size_of, spread, write_grey, write_palette, write_picture, write_tree
from forked import ended, start
from PIL import Image
from tiny import save_checkpoint
from transformers import AutoModel, AutoProcessor

import train
import zs3.convert.__main__ as conversion
from configuration_zs3 import Refused, Zs3Config
from eval import evaluate
from zs3.command_line import InputError, read_arguments
from zs3.convert import items
from zs3.convert.__main__ import ConvertArgs, classes_sha256, convert, main
from zs3.convert.archives import ARCHIVES, NUM_CAPTIONS, BadFile, Pair, check_inflated, context_values, grey_values
from zs3.convert.items import convert_all
from zs3.convert.shards import shards_of
from zs3.data.records import load_split
from zs3.evaluation.arguments import EvalArgs
from zs3.files import lock_folder
from zs3.label_space import load_label_space

MIXED = conversion.mixed  # as it is outside of the tests
ROOT = Path(__file__).parents[1]
SAMPLES = Path(__file__).parents[2] / "shared" / "data" / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples are not there")


@pytest.fixture(autouse=True)
def small_releases(monkeypatch):
    """The releases have as many pictures as the trees."""
    for name, archive in ARCHIVES.items():
        sizes = {"train": (4, 9), "validation": (2,)}
        monkeypatch.setitem(ARCHIVES, name, archive._replace(counts=sizes))


@pytest.fixture(autouse=True)
def sorted_training(monkeypatch):
    """The shards of the small trees hold what their names say; how training rows are mixed is a test of its own."""
    monkeypatch.setattr(conversion, "mixed", list)


def arguments(folder: Path, name: str, **options) -> ConvertArgs:
    return ConvertArgs(name=name, source=str(folder / "source"), output=str(folder / "out"), **options)


def files_of(folder: str | Path) -> dict[str, bytes]:
    """All files of a conversion but its progress, by their path in it."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and ".progress" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows_of(folder: Path, split: str) -> list[dict]:
    return [
        row for path in sorted(folder.glob(f"data/{split}-*")) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def ade20k(folder: Path, train: int = 9) -> Path:
    """A tree with one picture in each of its 8 shards, two in the last. Its folder."""
    write_tree(folder / "source", "ade20k_150", train)
    return folder / "source" / "ADEChallengeData2016"


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir()) if path.name != ".progress"}


def unfinished(out: Path) -> dict[str, int]:
    """The shards of a conversion which stopped, and when they were made. `load_split` does not see them."""
    for split in ("train", "validation"):
        with pytest.raises(InputError, match=f"has no split '{split}'"):
            load_split(out, split, load_label_space("ade20k_150"))
    return times(out / ".progress" / "data")


@pytest.fixture
def convert_ade20k(call, tmp_path):
    """convert_ade20k(*words): `zs3 convert ade20k_150` from source to out, and further words."""
    return partial(call, main, "ade20k_150", "--source", tmp_path / "source", "--output", tmp_path / "out")


def test_every_shard_of_training_is_a_fair_sample_of_it():
    ids = [f"ADE_train_{number:08d}" for number in range(20210)]  # sorted by scene in the archive
    pairs = [Pair(image_id, Path(image_id), Path(image_id), grey_values) for image_id in ids]
    rows = shards_of("train", MIXED(pairs))
    assert sorted(pair for shard in rows for pair in shard.items) == pairs and MIXED(pairs[::-1]) == MIXED(pairs)
    for shard in rows:
        early = np.mean([pair.image_id < ids[20210 // 4] for pair in shard.items])
        assert 0.2 < early < 0.3  # of the first quarter; 1263 pictures make 0.25 +- 0.012


# ---- every archive ----


@pytest.fixture(scope="module", params=list(TREES))
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    expected = write_tree(folder / "source", request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        small = ARCHIVES[request.param]._replace(counts={"train": (4,), "validation": (2,)})
        monkeypatch.setitem(ARCHIVES, request.param, small)
        result = convert(arguments(folder, request.param))
    return SimpleNamespace(
        name=request.param, source=folder / "source", out=folder / "out", expected=expected, result=result
    )


def test_load_split_gives_the_ids_written_by_hand(converted):
    for split, expected in converted.expected.items():
        records = load_split(converted.out, split)
        assert sorted(records.image_ids) == sorted(expected)
        assert records.label_space == load_label_space(converted.name)
        for record in records:
            np.testing.assert_array_equal(record.label, expected[record.image_id])


def test_it_is_trained_on_and_evaluated(converted, tmp_path, monkeypatch, capsys):
    """Two steps of a tiny model, from a stream, and the scores of its label maps by hand."""
    space = load_label_space(converted.name)
    model = save_checkpoint(tmp_path / "start", text=False, class_loss="background_aware")
    model.config.seen_class_names, model.config.unseen_labels = [], "none"
    model.save_pretrained(tmp_path / "start")
    vectors = np.random.default_rng(0).normal(size=(len(space.class_names), 12)).astype(np.float32)
    np.save(tmp_path / "text.npy", vectors)
    sizes = {"crop_size": 32, "max_size": 64, "test_short_edge": 32, "batch_size": 2, "max_steps": 2, "num_workers": 0}
    words = ["--dataset", str(converted.out), "--text_embeds", str(tmp_path / "text.npy")]
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += ["--init_from", str(tmp_path / "start"), "--output_dir", str(tmp_path / "run"), "--streaming", "true"]
    train.train(*read_arguments(train.TrainArgs, [*words, *flags], Zs3Config))
    saved = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert saved["seen_class_names"] == space.seen and saved["class_names"] == space.class_names

    setting = "gzs3" if space.unseen else "ovs"
    flags = ["--model", str(tmp_path / "run" / "final"), "--setting", setting, "--pictures", str(tmp_path / "pictures")]
    result = evaluate(read_arguments(EvalArgs, [*words, *flags])[0])
    assert result["label_space_sha256"] == space.sha256 and result["num_images"] == 2
    trained, processor = AutoModel.from_pretrained(tmp_path / "run" / "final", trust_remote_code=True), AutoProcessor
    processor = processor.from_pretrained(tmp_path / "run" / "final", trust_remote_code=True)
    right = total = 0
    for record in load_split(converted.out, "validation"):
        with torch.inference_mode():
            outputs = trained.eval()(**processor(images=record.image))
        (found,) = processor.post_process_semantic_segmentation(outputs, [record.label.shape])
        truth = converted.expected["validation"][record.image_id]
        right += (found.numpy() == truth).sum()
        total += (truth != space.ignore_index).sum()
    assert result["pixel_accuracy"] == pytest.approx(right / total)


def test_load_dataset_gives_the_same_and_streams_it(converted):
    import datasets

    whole = datasets.load_dataset(str(converted.out))
    streamed = datasets.load_dataset(str(converted.out), streaming=True)
    for split, expected in converted.expected.items():
        for rows in (whole[split], streamed[split]):
            labels = {row["image_id"]: np.asarray(row["label"]) for row in rows}
            assert labels.keys() == expected.keys()
            assert all(np.array_equal(labels[image_id], expected[image_id]) for image_id in expected)
        assert whole[split].features["image"] == datasets.Image()
        assert whole[split].features["class_ids"] == datasets.List(datasets.Value("int32"))


def test_pictures_keep_their_bytes_and_maps_are_8_or_16_bits(converted):
    pictures = {path.stem: path for path in converted.source.rglob("*.jpg")}
    ignored = load_label_space(converted.name).ignore_index
    for row in rows_of(converted.out, "train") + rows_of(converted.out, "validation"):
        assert row["image"] == {"bytes": pictures[row["image_id"]].read_bytes(), "path": f"{row['image_id']}.jpg"}
        assert row["label"]["path"] == f"{row['image_id']}.png"
        assert row["label"]["bytes"][24:26] == (b"\x08\x00" if ignored == 255 else b"\x10\x00")  # bits, grey


def test_class_ids_and_counts_equal_those_of_a_loop(converted):
    label_space = load_label_space(converted.name)
    for split, expected in converted.expected.items():
        pixels, images = Counter(), Counter()
        for ids in expected.values():
            pixels.update(ids.ravel().tolist())
            images.update(set(ids.ravel().tolist()))
        row = converted.result["splits"][split]
        assert row["pixels"] == {name: pixels[i] for i, name in enumerate(label_space.class_names)}
        assert row["images"] == {name: images[i] for i, name in enumerate(label_space.class_names)}
        assert row["ignored_pixels"] == pixels[label_space.ignore_index] > 0
        assert row["never"] == [name for i, name in enumerate(label_space.class_names) if i not in images]
        for table_row in rows_of(converted.out, split):
            present = set(expected[table_row["image_id"]].ravel().tolist()) - {label_space.ignore_index}
            assert table_row["class_ids"] == sorted(present)


def test_the_card_says_the_splits_and_conversion_json_what_was_measured(converted):
    card = (converted.out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    (config,) = front["configs"]
    assert [entry["split"] for entry in config["data_files"]] == ["train", "validation"] and front["license"] == "other"
    assert "| train | 4 | 0 |" in card and "Licences" in card
    assert all(name in card for name in load_label_space(converted.name).unseen)
    written = json.loads((converted.out / "conversion.json").read_text())
    assert written == converted.result
    assert written["splits"]["train"]["as_released"] and written["problems"] == []
    for split in ("train", "validation"):
        (shard,) = written["splits"][split]["shards"]
        content = (converted.out / shard["file"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_load_dataset_tells_datasets_of_one_folder_name_apart_and_misses_rows(tmp_path):
    """Its copies are kept by the folder's name and the front matter of the card, not by what is in the files."""
    import datasets

    picture = ade20k(tmp_path) / "images" / "training" / "ADE_train_00000000.jpg"
    content, sizes, last_bytes = picture.read_bytes(), [], []
    for last_byte in (b"\0", b"\1"):
        picture.write_bytes(content + last_byte)
        sizes.append(convert(arguments(tmp_path, "ade20k_150"))["splits"]["train"]["bytes"])
        rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
        last_bytes.append(rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"][-1:])
        shutil.rmtree(tmp_path / "out")
    assert last_bytes == [b"\0", b"\1"] and sizes[0] == sizes[1]

    convert(arguments(tmp_path, "ade20k_150"))
    (tmp_path / "out" / "data" / "train-00003-of-00008.parquet").unlink()
    with pytest.raises(datasets.exceptions.NonMatchingSplitsSizesError):
        datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))


# ---- layouts ----


@pytest.mark.parametrize(
    ("name", "folder", "options"),
    [
        ("coco_stuff_171", "", {"images": "", "maps": "stuffthingmaps/"}),
        ("coco_stuff_171", "", {"maps": "stuffthingmaps_trainval2017/"}),
        ("coco_stuff_171", "", {"images": "", "maps": ""}),
        ("voc_20", "", {"folder": "VOC2012", "sbd": "SBD"}),
        ("voc_20", "VOCdevkit/VOC2012", {}),  # SBD is beside VOCdevkit
        ("voc_21", "VOCdevkit/VOC2012", {"sbd": None}),
        ("pascal_context_59", "", {"folder": "."}),
        ("pascal_context_459", "VOCdevkit/VOC2010", {"lists": "ImageSets/SegmentationContext"}),
        ("ade20k_150", "ADEChallengeData2016", {}),
        ("ade20k_847", "ADE20K_2021_17_01", {}),
    ],
)
def test_other_layouts_give_the_same_ids(tmp_path, name, folder, options):
    expected = write_tree(tmp_path, name, **options)
    for split in expected:
        found = ARCHIVES[name].items(tmp_path / folder, split)
        assert sorted(pair.image_id for pair in found) == sorted(expected[split])
        for pair in found:
            ids = items.read_ids(pair, name)
            assert pair.image.is_file()
            np.testing.assert_array_equal(ids, expected[split][pair.image_id])


@pytest.mark.parametrize("name", [*TREES, "coco_captions"])
def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path, name):
    looked_for = {"coco": "train2017", "voc": "VOC2012/JPEGImages", "pasc": "VOC2010/JPEGImages", "ade2": "training"}
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError, match=looked_for[name[:4].rstrip("_")]) as refused:
        convert(arguments(tmp_path, name))
    assert str(refused.value).partition(" has ")[0].endswith(f"{tmp_path.name[-10:]}/source")
    assert not (tmp_path / "out").exists()


def test_voc_without_the_maps_of_sbd_has_a_validation_split_alone(tmp_path):
    write_tree(tmp_path / "source", "voc_20")
    shutil.rmtree(tmp_path / "source" / "benchmark_RELEASE")
    with pytest.raises(InputError, match="neither benchmark_RELEASE/.* nor VOCdevkit/VOC2012/SegmentationClassAug"):
        convert(arguments(tmp_path, "voc_20"))
    convert(arguments(tmp_path, "voc_20", splits=["validation"]))
    assert len(load_split(tmp_path / "out", "validation")) == 2


def test_shards_are_a_multiple_of_8_and_nearly_equal():
    items = [Pair(f"{number:06d}", Path(), Path(), grey_values) for number in range(16001)]
    for count, shards in ((1, 1), (7, 1), (8, 8), (16000, 8), (16001, 16)):
        parts = [shard.items for shard in shards_of("train", items[:count])]
        assert sum(parts, []) == items[:count] and len(parts) == shards
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---- faults ----


def write_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def faulty_ade20k(root: Path) -> None:
    """Faults in six of nine pictures, and two in one of them."""
    images, labels = root / "images" / "training", root / "annotations" / "training"
    (images / "ADE_train_00000000.jpg").unlink()
    (labels / "ADE_train_00000001.png").unlink()
    write_truncated(images / "ADE_train_00000002.jpg")
    write_grey(labels / "ADE_train_00000002.png", spread([0, 151], 2))
    (labels / "ADE_train_00000004.png").write_bytes(b"no picture")
    write_grey(labels / "ADE_train_00000005.png", spread([0, 1], 6))
    Image.new("RGB", size_of(6)[::-1]).save(labels / "ADE_train_00000006.png")


FAULTS = {  # image -> kind and what is said
    "missing_picture": ("ADE_train_00000000", "images/training/ADE_train_00000000.jpg is missing"),
    "missing_map": ("ADE_train_00000001", "annotations/training/ADE_train_00000001.png is missing"),
    "unreadable_picture": ("ADE_train_00000002", "truncated"),
    "ids_outside": ("ADE_train_00000002", "holds value 151"),
    "unreadable_map": ("ADE_train_00000004", "it is no image of a format that is read (PNG), or it is damaged"),
    "size_mismatch": ("ADE_train_00000005", "is 24 x 17 pixels, ADEChallengeData2016/images/training"),
    "wrong_mode": ("ADE_train_00000006", "is of mode RGB: one value a pixel is expected"),
}


def check_faults(problems: list[dict]) -> None:
    assert {problem["kind"]: problem["image_id"] for problem in problems} == {k: i for k, (i, _) in FAULTS.items()}
    assert len(problems) == len(FAULTS)
    for problem in problems:
        assert FAULTS[problem["kind"]][1] in problem["message"] and problem["split"] == "train"


def test_stop_finishes_nothing_around_a_fault_and_goes_on_when_it_is_mended(tmp_path, convert_ade20k):
    root = ade20k(tmp_path)
    convert(ConvertArgs(name="ade20k_150", source=str(tmp_path / "source"), output=str(tmp_path / "straight")))
    whole = shutil.copytree(root, tmp_path / "whole")
    faulty_ade20k(root)
    refusal = convert_ade20k().refusal
    assert refusal.startswith("error: 7 problems, all in ")
    assert "the same command again" in refusal and "--on_problem skip" in refusal
    check_faults(json.loads((tmp_path / "out" / "problems.json").read_text())["problems"])
    done = unfinished(tmp_path / "out")
    assert [name[:11] for name in done] == ["train-00003", "train-00007", "validation-"]  # 00007 has two pictures

    shutil.copytree(whole, root, dirs_exist_ok=True)
    assert convert_ade20k().code == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")
    assert done.items() <= times(tmp_path / "out" / "data").items(), "shards that were there were made again"


def test_skip_leaves_out_what_has_a_fault_and_tells(tmp_path, convert_ade20k):
    faulty_ade20k(ade20k(tmp_path))
    ended = convert_ade20k("--on_problem", "skip")
    assert ended.code == 0 and "1 missing_picture" in ended.out
    result = json.loads((tmp_path / "out" / "conversion.json").read_text())
    check_faults(result["problems"])
    row = result["splits"]["train"]
    assert (row["num_images"], row["in_source"], row["as_released"]) == (3, {"pictures": 9}, False)
    assert "differs from the release" in (tmp_path / "out" / "README.md").read_text()
    assert [shard["num_images"] for shard in row["shards"]] == [0, 0, 0, 1, 0, 0, 0, 2]
    left = [f"ADE_train_{number:08d}" for number in (3, 7, 8)]
    assert load_split(tmp_path / "out", "train").image_ids == left

    import datasets

    streamed = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    assert [row["image_id"] for row in streamed] == left  # shards without a row among them
    assert "from which --on_problem skip left pictures out" in convert_ade20k().refusal


def test_a_split_of_which_nothing_is_left_is_no_dataset(tmp_path, convert_ade20k):
    root = ade20k(tmp_path)
    for file in (root / "annotations" / "validation").iterdir():
        Image.open(file).convert("RGB").save(file)
    ended = convert_ade20k("--on_problem", "skip")
    assert "2 wrong_mode" in ended.err and "not one picture of validation can be used" in ended.refusal
    unfinished(tmp_path / "out")


def test_what_was_made_with_stop_goes_on_with_skip(tmp_path):
    root = ade20k(tmp_path)
    (root / "images" / "training" / "ADE_train_00000002.jpg").unlink()
    with pytest.raises(InputError, match="1 problem, all in"):
        convert(arguments(tmp_path, "ade20k_150"))
    convert(arguments(tmp_path, "ade20k_150", on_problem="skip"))
    assert len(load_split(tmp_path / "out", "train")) == 8 and not (tmp_path / "out" / "problems.json").exists()


def test_a_copy_with_other_than_the_released_number_is_refused_before_anything(tmp_path):
    root = ade20k(tmp_path)
    for folder in ("images", "annotations"):
        for path in (root / folder / "training").glob("*_00000003.*"):
            path.unlink()
    with pytest.raises(InputError, match="train of ade20k_150 in .* holds 8 pictures, the release 4: copy the rest"):
        convert(arguments(tmp_path, "ade20k_150"))
    assert not (tmp_path / "out").exists()
    row = convert(arguments(tmp_path, "ade20k_150", on_problem="skip"))["splits"]["train"]
    assert (row["num_images"], row["in_release"], row["as_released"]) == (8, {"pictures": [4, 9]}, False)


def kinds(folder: Path, name: str) -> dict[str, str]:
    """Kind -> message of what is left out, or noted."""
    result = convert(arguments(folder, name, on_problem="skip"))
    return {remark["kind"]: remark["message"] for remark in result["problems"] + result["notes"]}


def test_a_palette_turned_into_grey_or_colours_is_called_so(tmp_path):
    write_tree(tmp_path / "source", "voc_20", train=6)
    maps = tmp_path / "source" / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    write_palette(maps / "2007_000006.png", spread([0, 15, 21], 6))
    Image.open(maps / "2007_000000.png").convert("RGB").save(maps / "2007_000000.png")
    Image.open(maps / "2007_000001.png").convert("L").save(maps / "2007_000001.png")
    result = convert(arguments(tmp_path, "voc_20", on_problem="skip"))
    said = {problem["image_id"][-1]: (problem["kind"], problem["message"]) for problem in result["problems"]}
    assert said["0"][0] == "wrong_mode" and "its palette was turned into colours" in said["0"][1]
    assert said["1"][0] == "ids_outside" and "its palette was turned into grey" in said["1"][1]
    assert said["6"][0] == "ids_outside" and "value 21" in said["6"][1] and "grey" not in said["6"][1]


def test_values_that_a_release_does_not_have_are_outside(tmp_path):
    faults = {"coco_stuff_171": 11, "pascal_context_59": 460, "pascal_context_459": 460, "ade20k_847": 3689}
    writers = {"coco": write_grey, "pasc": archives.write_context, "ade2": archives.write_object_ids}
    for name, value in faults.items():
        write_tree(tmp_path / name / "source", name)
        pair = ARCHIVES[name].items(tmp_path / name / "source", "validation")[0]
        shape = Image.open(pair.image).size[::-1]
        writers[name[:4]](pair.label, np.full(shape, value))
        assert f"holds value {value}, which the release" in kinds(tmp_path / name, name)["ids_outside"]


def test_mat_files_without_a_map_in_them_are_unreadable(tmp_path):
    write_tree(tmp_path / "source", "pascal_context_459", train=6)
    maps = tmp_path / "source" / "trainval"
    write_truncated(maps / "2008_000000.mat")
    scipy.io.savemat(maps / "2008_000001.mat", {"Other": np.zeros((3, 4), np.uint16)})
    scipy.io.savemat(maps / "2008_000002.mat", {"LabelMap": "a text"})
    scipy.io.savemat(maps / "2008_000003.mat", {"LabelMap": np.full(size_of(3), -1, np.int16)})
    (maps / "2008_000004.mat").unlink()
    result = convert(arguments(tmp_path, "pascal_context_459", on_problem="skip"))
    found = {problem["image_id"][-1]: problem["kind"] for problem in result["problems"]}
    unreadable = dict.fromkeys("012", "unreadable_map")
    assert found == unreadable | {"3": "ids_outside", "4": "missing_map"}


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_mat_file_is_not_unpacked_beyond_the_largest_map(order, tmp_path):
    """Zeros of 1 GB, 1 MB as a file: a compressed element whose contents never end."""
    packer = zlib.compressobj(9)
    first, again = (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    packed = first + 1023 * again  # after a full flush, what follows does not depend on what was before
    assert zlib.decompressobj().decompress(packed, 2**22) == bytes(2**22)
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100) + (b"IM" if order == "<" else b"MI")
    content = head + struct.pack(f"{order}II", 15, len(packed)) + packed
    tracemalloc.start()
    with pytest.raises(Refused, match="more than 268,435,456 bytes unpacked"):
        check_inflated(content)
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(BadFile, match="bytes unpacked, larger than any label map") as refused:
        context_values(tmp_path / "a.mat")
    assert refused.value.kind == "unreadable_map"


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_map_that_is_no_png_inside_is_a_problem(kind, tmp_path):
    root = ade20k(tmp_path)
    path = root / "annotations" / "training" / "ADE_train_00000002.png"
    Image.open(path).convert("L").save(path, kind)
    assert f"it is a {kind} inside, and must be PNG" in kinds(tmp_path, "ade20k_150")["unreadable_map"]


@pytest.mark.parametrize("name", ["ade20k_150", "coco_stuff_171"])
def test_maps_of_other_tools_beside_the_archives_are_passed_over(name, tmp_path):
    expected = write_tree(tmp_path / "source", name, 4)
    for path in [*(tmp_path / "source").rglob("*.png")]:
        for ending in ("_labelTrainIds", "_instanceTrainIds", "_color", ".mask", "-1", " (1)"):
            shutil.copy(path, path.with_name(f"{path.stem}{ending}.png"))
        path.with_name(f"._{path.name}").write_bytes(b"a system's")
    convert(arguments(tmp_path, name))
    assert load_split(tmp_path / "out", "train").image_ids == sorted(expected["train"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_may_have_a_byte_order_mark(encoding, tmp_path):
    write_tree(tmp_path / "source", "voc_20")
    for path in (tmp_path / "source").rglob("*.txt"):
        path.write_text(path.read_text().replace("\n", "\r\n"), encoding=encoding, newline="")
    assert convert(arguments(tmp_path, "voc_20"))["problems"] == []


def test_a_folder_belongs_to_one_conversion_at_a_time(tmp_path):
    ade20k(tmp_path)
    with lock_folder(tmp_path / "out" / ".progress"):
        words = ["ade20k_150", "--source", tmp_path / "source", "--output", tmp_path / "out", "--on_problem", "skip"]
        assert ended(start("zs3.convert.__main__", words, tmp_path / "log")) == 2
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("error: another run writes in ")


def test_the_same_command_again_changes_nothing_and_makes_what_was_lost_or_damaged(tmp_path, capsys):
    ade20k(tmp_path)
    convert(arguments(tmp_path, "ade20k_150"))
    out, before = tmp_path / "out", files_of(tmp_path / "out")
    made = times(out) | times(out / "data")
    assert convert(arguments(tmp_path, "ade20k_150")) == json.loads(before["conversion.json"])
    assert "there already" in capsys.readouterr().out
    assert times(out) | times(out / "data") == made

    flipped, lost, empty = (out / "data" / f"train-0000{number}-of-00008.parquet" for number in (1, 2, 3))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    lost.unlink()
    empty.write_bytes(b"")  # as after a power cut
    convert(arguments(tmp_path, "ade20k_150"))
    assert files_of(out) == before

    (out / "classes.json").write_text("")
    (out / "conversion.json").write_text("{")
    (out / "README.md").unlink()
    capsys.readouterr()
    convert(arguments(tmp_path, "ade20k_150"))
    assert files_of(out) == before
    assert "all but README.md, conversion.json, classes.json" in capsys.readouterr().out


def test_a_repeated_image_id_is_a_fault(tmp_path):
    write_tree(tmp_path / "source", "ade20k_847")
    training = tmp_path / "source" / "ADE20K_2021_17_01" / "images" / "ADE" / "training"
    shutil.copytree(training / "cultural" / "scene0", training / "urban" / "street")
    assert (
        "ADE_train_00000000 is there twice: the second is ADE20K_2021_17_01/images/ADE/training/urban"
        in kinds(tmp_path, "ade20k_847")["repeated_id"]
    )
    assert load_split(tmp_path / "out", "train").image_ids == [f"ADE_train_{n:08d}" for n in range(4)]


def test_exif_orientation_is_noted_and_a_map_of_the_turned_picture_refused(tmp_path):
    root = ade20k(tmp_path)
    images = root / "images" / "training"
    write_picture(images / "ADE_train_00000001.jpg", 1, orientation=6)
    write_picture(images / "ADE_train_00000002.jpg", 2, orientation=6, size=size_of(2)[::-1])
    write_picture(images / "ADE_train_00000003.jpg", 3, orientation=1)
    write_picture(images / "ADE_train_00000004.jpg", 4, orientation=3, size=size_of(4)[::-1])
    result = convert(arguments(tmp_path, "ade20k_150", on_problem="skip"))
    (note,) = result["notes"]
    assert (note["kind"], note["image_id"]) == ("exif_orientation", "ADE_train_00000001")
    turned, other = result["problems"]
    assert turned["kind"] == other["kind"] == "size_mismatch"
    assert "the map fits the picture turned by its EXIF tag" in turned["message"] and turned["image_id"][-1] == "2"
    assert "EXIF" not in other["message"]
    assert "EXIF" in (tmp_path / "out" / "README.md").read_text()
    record = load_split(tmp_path / "out", "train")[1]
    assert record.image.size == size_of(1)[::-1] and record.label.shape == size_of(1)


def test_pictures_that_are_ignored_everywhere_are_kept_and_counted(tmp_path):
    root = ade20k(tmp_path)
    write_grey(root / "annotations" / "training" / "ADE_train_00000003.png", np.zeros(size_of(3)))
    row = convert(arguments(tmp_path, "ade20k_150"))["splits"]["train"]
    assert (row["num_images"], row["images_ignored_everywhere"]) == (9, 1)
    assert [table_row["class_ids"] for table_row in rows_of(tmp_path / "out", "train")].count([]) == 1


# ---- the same bytes, however it went ----


def test_the_command_with_two_processes_writes_the_bytes_of_one(tmp_path, monkeypatch):
    """Run as users do: what the processes get has to be found in the main script."""
    monkeypatch.setattr(conversion, "mixed", MIXED)
    write_tree(tmp_path / "source", "voc_20", train=21)  # maps as PNG and as .mat
    words = ["voc_20", "--source", tmp_path / "source", "--output", tmp_path / "two", "--num_workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "zs3", "convert", *words, "--on_problem", "skip"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    convert(arguments(tmp_path, "voc_20", on_problem="skip"))
    one, two = files_of(tmp_path / "out"), files_of(tmp_path / "two")
    assert len(two) == 8 + 1 + 3 and {n for n in one if one[n] != two.get(n)} <= {
        "conversion.json",
        "README.md",
    }  # other counts known
    assert "train       21 pictures (the release has 10,582)" in done.stdout and "23/23" in done.stderr


def end_process(path: Path) -> None:
    os._exit(1)


def test_a_process_that_is_killed_is_one_line(monkeypatch):
    fork = multiprocessing.get_context("fork")  # a spawned one takes seconds to begin
    monkeypatch.setattr(items.multiprocessing, "get_context", lambda _: fork)
    pairs = [Pair("0", Path("0.jpg"), Path("0.png"), end_process)] * 3
    with pytest.raises(InputError, match="a process ended at 0 or soon after"):
        list(convert_all(pairs, "ade20k_150", 2))


def interrupted_after(monkeypatch, count: int, error: Exception) -> None:
    """The shard number `count` meets the error after its pictures were read."""
    written = []

    def replace(source, target):
        written.extend([target] * str(target).endswith(".parquet"))
        if len(written) > count:
            raise error
        return os_replace(source, target)

    os_replace = os.replace
    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize(
    ("error", "code", "last_words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space"), 2, "train-00003-of-00008.parquet; free some and start again"),
    ],
)
def test_an_interrupted_conversion_goes_on_to_the_bytes_of_an_uninterrupted_one(
    tmp_path, monkeypatch, convert_ade20k, error, code, last_words
):
    import datasets

    ade20k(tmp_path)
    convert(ConvertArgs("ade20k_150", str(tmp_path / "source"), str(tmp_path / "straight")))
    with monkeypatch.context() as patched:
        interrupted_after(patched, 3, error)
        ended = convert_ade20k()
    assert ended.code == code and ended.err.strip().endswith(last_words)
    done = unfinished(tmp_path / "out")
    assert list(done) == [f"train-{number:05d}-of-00008.parquet" for number in range(3)]
    with pytest.raises(FileNotFoundError, match="any data files"):
        datasets.load_dataset(str(tmp_path / "out"))
    (tmp_path / "out" / ".progress" / "data" / ".train-00003-of-00008.parquet.partial").write_bytes(b"half a shard")
    ended = convert_ade20k()
    assert ended.code == 0 and "11/11" in ended.err  # the resumed ones are in the count
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")
    assert done.items() <= times(tmp_path / "out" / "data").items(), "shards that were there were made again"
    assert not (tmp_path / "out" / ".progress" / "data").exists()


def test_another_source_benchmark_or_split_in_the_same_folder_is_refused(tmp_path):
    ade20k(tmp_path)
    convert(arguments(tmp_path, "ade20k_150"))
    before = files_of(tmp_path / "out")
    shutil.copytree(tmp_path / "source", tmp_path / "other")
    write_tree(tmp_path / "voc", "voc_20")
    others = {
        "source": {"source": str(tmp_path / "other")},
        "name, source": {"name": "voc_20", "source": str(tmp_path / "voc")},
        "splits": {"splits": ["validation"]},
    }
    for changed, options in others.items():
        with pytest.raises(InputError, match=f"was made with another {changed}"):
            convert(ConvertArgs(**(vars(arguments(tmp_path, "ade20k_150")) | options)))
    assert files_of(tmp_path / "out") == before


def test_conversions_of_versions_without_things_go_on():
    """The digests are those of the files of commit c01fe31."""
    older = {
        "ade20k_150": "f72d76faad60d20d38bb9c75de63938813bb98db147bbb990dbb034bc6217183",
        "ade20k_847": "b95b6f92bb178218c4f64505e6f8628713be9af90c16858f275c027c95938926",
        "coco_stuff_171": "57ed4135344fb84d9989d0023e0885e159ad24595d04845562f76cfd71781082",
        "voc_20": "f434430a3b56ddebdb4747857bc3e1f74c5ce4862316312ab2fbdcca2e484185",
        "coco_captions": hashlib.sha256(b"").hexdigest(),
    }
    assert {name: classes_sha256(name) for name in older} == older


def test_shards_of_files_that_changed_are_made_again(tmp_path, monkeypatch):
    root = ade20k(tmp_path)
    interrupted = arguments(tmp_path, "ade20k_150")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted_after(patched, 5, KeyboardInterrupt())
        convert(interrupted)
    before = unfinished(tmp_path / "out")
    os.utime(root / "images" / "training" / "ADE_train_00000002.jpg", (1, 1))  # another file of the same size
    convert(interrupted)
    after = times(tmp_path / "out" / "data")
    changed = {name for name in before if after[name] != before[name]}
    assert len(before) == 5 and changed == {"train-00002-of-00008.parquet"}


def test_a_finished_dataset_stays_as_it_is_when_the_archive_changes(tmp_path):
    root = ade20k(tmp_path)
    convert(arguments(tmp_path, "ade20k_150"))
    before = files_of(tmp_path / "out")
    picture = root / "images" / "training" / "ADE_train_00000002.jpg"
    picture.write_bytes(picture.read_bytes()[:-40])
    for on_problem in ("stop", "skip"):
        with pytest.raises(InputError, match="finished dataset of other pictures .* stays as it is"):
            convert(arguments(tmp_path, "ade20k_150", on_problem=on_problem))
        assert files_of(tmp_path / "out") == before


def test_pictures_that_are_copied_later_get_shards_of_their_own_number(tmp_path, monkeypatch):
    root = ade20k(tmp_path)
    later = root / "images" / "training"
    for number in range(2, 9):
        (later / f"ADE_train_{number:08d}.jpg").rename(tmp_path / f"{number}.jpg")
        (root / "annotations" / "training" / f"ADE_train_{number:08d}.png").rename(tmp_path / f"{number}.png")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted_after(patched, 1, KeyboardInterrupt())
        convert(arguments(tmp_path, "ade20k_150", on_problem="skip"))
    assert list(unfinished(tmp_path / "out")) == ["train-00000-of-00001.parquet"]
    for number in range(2, 9):
        (tmp_path / f"{number}.jpg").rename(later / f"ADE_train_{number:08d}.jpg")
        (tmp_path / f"{number}.png").rename(root / "annotations" / "training" / f"ADE_train_{number:08d}.png")
    convert(arguments(tmp_path, "ade20k_150"))
    assert len(list((tmp_path / "out" / "data").glob("train-*-of-00008.parquet"))) == 8
    assert load_split(tmp_path / "out", "train").image_ids == [f"ADE_train_{number:08d}" for number in range(9)]


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    ade20k(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        convert(arguments(tmp_path, "ade20k_150"))
    assert files_of(tmp_path / "out") == {"README.md": b"mine"}


# ---- captions ----


def test_captions_are_a_table_without_pictures(tmp_path, monkeypatch):
    import datasets

    expected = archives.write_captions(tmp_path / "source")
    monkeypatch.setitem(
        ARCHIVES, "coco_captions", ARCHIVES["coco_captions"]._replace(counts=dict.fromkeys(expected, (1,)))
    )
    with pytest.raises(InputError, match="train of coco_captions in .* holds 2 captions, the release 591,753"):
        convert(arguments(tmp_path, "coco_captions"))
    monkeypatch.setitem(NUM_CAPTIONS, "train", 2)
    monkeypatch.setitem(NUM_CAPTIONS, "validation", 1)
    result = convert(arguments(tmp_path, "coco_captions"))
    assert result["splits"]["train"]["num_captions"] == 2
    for split, captions in expected.items():
        rows = datasets.load_dataset(str(tmp_path / "out"), split=split)
        assert {row["image_id"]: row["captions"] for row in rows} == captions
    assert "coco_stuff_171 with the same image_id" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "classes.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no captions file of COCO"),
        ("[]", "is no captions file of COCO"),
        ('{"images": [{"id": 1}], "annotations": []}', "is no captions file of COCO"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 7, "caption": "x"}]}', r"that it does not list \(7\)"),
        ('{"images": [], "annotations": []}', "is empty"),
    ],
)
def test_a_captions_file_that_is_none_is_refused(tmp_path, content, words):
    archives.write_captions(tmp_path / "source")
    (tmp_path / "source" / "annotations" / "captions_train2017.json").write_text(content)
    with pytest.raises(InputError, match=words):
        convert(arguments(tmp_path, "coco_captions"))


def test_a_picture_without_captions_is_a_fault(tmp_path):
    archives.write_captions(tmp_path / "source")
    path = tmp_path / "source" / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 3, "file_name": "000000000003.jpg"})
    path.write_text(json.dumps(content))
    assert kinds(tmp_path, "coco_captions") == {"missing_captions": "000000000003 has no caption"}


# ---- the Hub, and the command line ----


class StandIn:
    """Of HfApi: what it was asked for."""

    calls: list = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options.pop("repo_id"), options))


def test_push_uploads_the_whole_dataset_without_its_progress(tmp_path, monkeypatch, convert_ade20k):
    ade20k(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", StandIn)
    monkeypatch.setattr(StandIn, "calls", [])
    ended = convert_ade20k("--push_to_hub", "me/ade", "--private", "true")
    assert ended.code == 0 and "datasets/me/ade" in ended.out
    create, upload = StandIn.calls
    assert create == ("create_repo", "me/ade", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert upload[:2] == ("upload_folder", "me/ade") and upload[2]["folder_path"] == str(tmp_path / "out")
    assert ".progress/*" in upload[2]["ignore_patterns"] and upload[2]["repo_type"] == "dataset"
    assert upload[2]["delete_patterns"] == "data/*.parquet"  # of an earlier upload with other shards


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, convert_ade20k):
    ade20k(tmp_path)
    refusal = convert_ade20k("--push_to_hub", "me/ade").refusal  # the suite runs with HF_HUB_OFFLINE=1
    assert refusal.startswith("error: cannot upload to me/ade") and "is whole" in refusal
    assert len(load_split(tmp_path / "out", "train")) == 9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--name is missing"),
        (["ade20k_15"], "no archive is called 'ade20k_15': did you mean ade20k_150?"),
        (["ade20k"], "did you mean ade20k_150 or ade20k_847?"),
        (["ade20k150"], "did you mean ade20k_150?"),
        (["voc_20", "--source", "."], "--output is missing"),
        (["voc_20", "--source", "nowhere", "--output", "out"], "--source nowhere is no folder"),
        (
            ["voc_20", "--source", ".", "--output", "out", "--splits", "test"],
            "--splits takes train and validation, got test",
        ),
        (["voc_20", "--source", ".", "--output", "out", "--num_workers", "-1"], "--num_workers must be 0 or more"),
        (["voc_20", "--source", ".", "--output", "out", "--on_problem", "go"], "--on_problem"),
        (["voc_20", "--source", ".", "--output", "out", "--push_to_hub", "me"], "no Hub id of the form owner/name"),
        (["voc_20", "ade20k_150", "--source", "."], "unexpected argument 'ade20k_150'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, call, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    ended = call(main, *flags)
    assert words in ended.refusal and ended.err.count("\n") == 1


# ---- real files ----


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@needs_samples
def test_real_pictures_of_voc(tmp_path):
    """Two maps as VOC stores them (mode P) and one of the repackaging; other programs' files, read by Pillow alone."""
    root = tmp_path / "source" / "VOCdevkit" / "VOC2012"
    samples = SAMPLES / "voc2011_3"
    names = ["2011_000003", "2011_000006", "2011_000025"]
    for name in names:
        copy(samples / f"{name}.jpg", root / "JPEGImages" / f"{name}.jpg")
        copy(samples / f"{name}_labelme.png", root / "SegmentationClass" / f"{name}.png")
        copy(samples / f"{name}_voc_aug.png", root / "SegmentationClassAug" / f"{name}.png")
    for file, lines in {"train": names[:1], "val": names[2:], "trainaug": names[:2]}.items():
        archives.write_list(root / "ImageSets" / "Segmentation" / f"{file}.txt", lines)
    result = convert(arguments(tmp_path, "voc_20", on_problem="skip"))
    assert result["problems"] == []
    own, augmented = load_split(tmp_path / "out", "train")
    (validation,) = load_split(tmp_path / "out", "validation")
    for record, file in (
        (own, "2011_000003_labelme.png"),
        (augmented, "2011_000006_voc_aug.png"),
        (validation, "2011_000025_labelme.png"),
    ):
        values = np.asarray(Image.open(samples / file)).astype(int)
        np.testing.assert_array_equal(record.label, np.where((values == 0) | (values == 255), 255, values - 1))
    pixels = result["splits"]["validation"]["pixels"]
    assert {name: number for name, number in pixels.items() if number} == {"bus": 118222, "car": 7256}


@needs_samples
def test_real_pictures_of_ade20k(tmp_path):
    root = tmp_path / "source" / "ADEChallengeData2016"
    samples = SAMPLES / "ade20k_3"
    for image in (samples / "images").iterdir():
        copy(image, root / "images" / "validation" / image.name)
        copy(samples / "annotations" / f"{image.stem}.png", root / "annotations" / "validation" / f"{image.stem}.png")
    convert(arguments(tmp_path, "ade20k_150", splits=["validation"], on_problem="skip"))
    records = load_split(tmp_path / "out", "validation")
    names = [{records.label_space.class_names[i] for i in np.unique(record.label) if i != 255} for record in records]
    assert names[0] == {"wall", "building", "sky", "tree", "road, route", "grass", "plant"}
    assert {"car", "sidewalk, pavement", "street lamp"} <= names[2]
    assert (records[0].label == 255).sum() == 3613


@needs_samples
def test_a_real_picture_of_coco(tmp_path):
    """Its polygons drawn with the values of stuffthingmaps: category less 1."""
    from PIL import ImageDraw

    polygons = json.loads((SAMPLES / "coco_1" / "annotations.json").read_text())
    image = Image.open(SAMPLES / "coco_1" / "000000039769.png")
    drawn = Image.new("L", image.size, 255)
    for item in polygons:
        for polygon in item["segmentation"]:
            ImageDraw.Draw(drawn).polygon(polygon, fill=item["category_id"] - 1)
    for folder, picture, suffix in (("images", image, "jpg"), ("stuffthingmaps", drawn, "png")):
        (tmp_path / "source" / folder / "val2017").mkdir(parents=True)
        picture.save(tmp_path / "source" / folder / "val2017" / f"000000039769.{suffix}")
    convert(arguments(tmp_path, "coco_stuff_171", splits=["validation"], on_problem="skip"))
    (record,) = load_split(tmp_path / "out", "validation")
    ids = {name: load_label_space("coco_stuff_171").class_names.index(name) for name in ("cat", "remote")}
    assert set(np.unique(record.label)) == {*ids.values(), 255}
    np.testing.assert_array_equal(record.label == ids["cat"], np.asarray(drawn) == 16)
