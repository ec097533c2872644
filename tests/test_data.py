import io
import json
import os
import shutil
import struct
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from zs3.command_line import InputError
from zs3.data.augmentation import IGNORED, Augmentation
from zs3.data.batches import BatchParts, StepSampler, StreamedBatches, collate
from zs3.data.image_labels import GroundTruthLabels, NoUnseenLabels, PseudoLabels
from zs3.data.records import Split, load_split, stream_split
from zs3.data.samples import SegmentationDataset, mask_positions, to_image_labels, to_mask_labels
from zs3.label_space import LabelSpace

SPACE = LabelSpace(["sky", "cow", "road", "cat", "sea"], ["cow", "cat"], 255)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = Augmentation(
    crop_size=16, max_size=2048, short_edges=[16], flip=False, color_jitter=False
)  # 16 x 16 pictures unchanged


def write_folder(root, samples, space=SPACE, split="train", suffix=".png"):
    """samples: {stem: (image (H,W,3) uint8, label (H,W) uint8 or uint16)}"""
    for kind in ("images", "labels"):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    for stem, (image, label) in samples.items():
        Image.fromarray(image).save(root / split / "images" / f"{stem}{suffix}")
        Image.fromarray(label).save(root / split / "labels" / f"{stem}.png")
    content = {"classes": space.class_names, "unseen": space.unseen, "ignore_label": space.ignore_index}
    (root / "classes.json").write_text(json.dumps(content))
    return root


def random_sample(seed, size=(16, 16), ids=(0, 1, 2, 3, 4, 255)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.choice(ids, size).astype(np.uint8)


def dataset_of(root, augmentation=PLAIN, **options):
    return SegmentationDataset(
        load_split(root, "train"), SPACE, augmentation, image_mean=MEAN, image_std=STD, **options
    )


def scored(folder, path, *options):
    return PseudoLabels(path, SPACE, load_split(folder, "train").image_ids, *options)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, {f"p{index}": random_sample(index) for index in range(4)})


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with an empty cache."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


@pytest.fixture(params=[load_split, stream_split])
def load(request):
    """Each of the two ways to read a split."""
    return request.param


# ---- records ----


def test_folder_is_read_pixel_by_pixel_in_the_order_of_its_stems(folder):
    records = load_split(folder, "train")
    assert [record.image_id for record in records] == ["p0", "p1", "p2", "p3"] == records.image_ids
    for seed, record in enumerate(records):
        image, label = random_sample(seed)
        np.testing.assert_array_equal(np.asarray(record.image), image)
        np.testing.assert_array_equal(record.label, label)
        assert record.image.mode == "RGB" and record.label.dtype == np.int32


def test_label_maps_are_read_without_their_pictures(folder):
    for seed in range(4):
        (folder / "train" / "images" / f"p{seed}.png").write_bytes(b"no picture")
        np.testing.assert_array_equal(load_split(folder, "train").label(seed), random_sample(seed)[1])


def test_records_are_opened_only_when_asked_for(folder):
    (folder / "train" / "images" / "p3.png").write_bytes(b"no picture")
    records = load_split(folder, "train")
    assert len(records) == 4 and records[0].image_id == "p0"


def test_jpeg_images_and_grey_images_become_rgb(tmp_path):
    write_folder(tmp_path, {"a": random_sample(0)}, suffix=".JPG")
    grey = Image.fromarray(random_sample(1)[0][..., 0])
    grey.save(tmp_path / "train" / "images" / "b.png")
    Image.fromarray(random_sample(1)[1]).save(tmp_path / "train" / "labels" / "b.png")
    assert [record.image.mode for record in load_split(tmp_path, "train")] == ["RGB", "RGB"]


def test_palette_labels_keep_their_indices(folder):
    ids = random_sample(0)[1]
    label = Image.fromarray(ids).convert("P")
    label.putdata(ids.ravel().tolist())
    label.putpalette([255 - value for value in range(256) for _ in range(3)])
    label.save(folder / "train" / "labels" / "p0.png")
    assert Image.open(folder / "train" / "labels" / "p0.png").mode == "P"
    np.testing.assert_array_equal(load_split(folder, "train")[0].label, ids)


def test_sixteen_bit_labels_keep_ids_beyond_255(tmp_path):
    space = LabelSpace([str(index) for index in range(847)], [], 65535)
    label = np.array([[0, 255, 256], [300, 846, 65535]], dtype=np.uint16)
    write_folder(tmp_path, {"a": (np.zeros((2, 3, 3), np.uint8), label)}, space)
    np.testing.assert_array_equal(load_split(tmp_path, "train")[0].label, label)


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("{}", "test", "no split 'test'"),
        ("{}/nowhere", "train", "nowhere"),
        ("/no/such/place", "train", "/no/such/place"),
    ],
)
def test_missing_datasets_are_named(folder, dataset, split, message):
    with pytest.raises(InputError, match=message):
        load_split(dataset.format(folder), split)


def test_a_rotated_photograph_is_refused_with_a_word_on_exif(tmp_path):
    write_folder(tmp_path, {"a": (np.zeros((8, 6, 3), np.uint8), np.zeros((6, 8), np.uint8))})
    with pytest.raises(InputError, match="EXIF"):
        load_split(tmp_path, "train")[0]


def filled(mode, size=(16, 16), value=0):
    """A function that writes a picture of one value."""
    return lambda file: Image.new(mode, size, value).save(file)


def remove_two(folder):
    for stem in ("p0", "p2"):
        (folder / f"{stem}.png").unlink()


# A file of the split, what is done to it, and the words of the refusal
BAD_FILES = [
    ("labels", remove_two, r"labels lacks the partner of 2 of 4 \(p0.png, p2.png\)"),
    ("images/p0.jpg", Path.touch, "p0.jpg.*p0.png.*the same name"),
    ("images/camera1", Path.mkdir, "images/camera1 is a folder: .* metadata.jsonl"),
    ("images/p1.png", lambda file: file.write_bytes(b"no picture"), "cannot read .*images/p1.png .*replace it"),
    ("images/p1.png", lambda file: os.truncate(file, 200), "cannot read .*images/p1.png .*replace it"),
    ("images/p1.png", filled("I;16"), "images/p1.png .it has more than 8 bits a channel"),
    ("labels/p1.png", filled("L", (15, 16)), "labels/p1.png is 15 x 16 pixels, but .*images/p1.png is 16 x 16"),
    ("labels/p1.png", filled("L", value=5), "labels/p1.png holds id 5; ids are 0 to 4, and 255 for ignored"),
    ("labels/p1.png", filled("RGB"), "labels/p1.png has mode RGB"),
    ("labels/p1.png", lambda file: write_grey_png(file, bits=4), "labels/p1.png .it has fewer than 8 bits a pixel"),
    *((f"images/x{suffix}", Path.touch, f"x{suffix} ends in none of .*.png") for suffix in (".heic", ".txt", "")),
    *((f"labels/x{suffix}", Path.touch, f"x{suffix} ends in none of .png") for suffix in (".bmp", ".gif", ".npy")),
]


@pytest.mark.parametrize(("name", "change", "words"), BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(name, change, words, folder):
    change(folder / "train" / name)
    with pytest.raises(InputError, match=words):
        load_split(folder, "train")[1]


# ---- targets ----


def test_mask_labels_hold_places_of_seen_classes_only():
    label = np.array([[0, 1, 2], [3, 4, 255]])
    seen_only = to_mask_labels(label, mask_positions(SPACE, SPACE.seen), 255)
    np.testing.assert_array_equal(seen_only, [[0, -1, 1], [-1, 2, -1]])
    all_names = to_mask_labels(label, mask_positions(SPACE, SPACE.class_names), 255)
    np.testing.assert_array_equal(all_names, [[0, -1, 2], [-1, 4, -1]])


def test_a_name_with_a_mask_in_the_crop_is_present_and_others_are_as_in_the_picture():
    of_picture = np.array([0, 1, -1, 0, -1], dtype=np.int8)
    labels = to_image_labels(np.array([[2, IGNORED], [2, 3]]), of_picture)
    assert labels.tolist() == [0, 1, 1, 1, -1] and labels.dtype == np.int8


def test_sample_without_augmentation_is_the_picture_normalised_and_its_map(folder):
    image, label = random_sample(0)
    sample = dataset_of(folder)[0, 0]
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(sample["pixel_values"].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    place = {0: 0, 2: 1, 4: 2}  # sky, road, sea
    assert sample["labels"].tolist() == [[place.get(value, -1) for value in row] for row in label.tolist()]
    assert sample["image_labels"].tolist() == [int(value in label) for value in place]
    assert sample["image_id"] == "p0"
    kinds = [sample[name].dtype for name in ("pixel_values", "labels", "image_labels")]
    assert kinds == [torch.float32, torch.int64, torch.int8]


def test_ground_truth_labels_have_unseen_classes_outside_the_crop(tmp_path):
    label = np.zeros((32, 32), np.uint8)
    label[0, 0] = 3  # one pixel of cat, in a corner
    write_folder(tmp_path, {"a": (np.zeros((32, 32, 3), np.uint8), label)})
    recipe = Augmentation(crop_size=4, max_size=2048, short_edges=[32], flip=False)
    data = dataset_of(tmp_path, recipe, image_labels=GroundTruthLabels(SPACE))
    assert data.class_names == SPACE.class_names
    for epoch in range(5):
        assert data[epoch, 0]["image_labels"].tolist() == [1, 0, 0, 1, 0]


def test_seen_labels_come_from_the_crop(tmp_path):
    label = np.full((16, 64), 0, np.uint8)
    label[:, 32:] = 4
    write_folder(tmp_path, {"a": (np.zeros((16, 64, 3), np.uint8), label)})
    data = dataset_of(tmp_path, Augmentation(crop_size=16, max_size=2048, short_edges=[16]))
    seen = set()
    for epoch in range(20):
        sample = data[epoch, 0]
        present = [index for index, value in enumerate(sample["image_labels"].tolist()) if value]
        assert present == sorted(set(sample["labels"].unique().tolist()) - {-1})
        seen.add(tuple(present))
    assert {(0,), (2,)} <= seen


def test_padding_is_the_mean_colour_and_ignored_and_in_the_pixel_mask(tmp_path):
    write_folder(tmp_path, {"a": (np.full((8, 12, 3), 9, np.uint8), np.zeros((8, 12), np.uint8))})
    sample = dataset_of(tmp_path, Augmentation(crop_size=16, max_size=2048, short_edges=[8], flip=False))[0, 0]
    padding = torch.ones(16, 16, dtype=torch.bool)
    padding[:8, :12] = False
    assert (sample["labels"] == -1).equal(padding)
    assert (sample["pixel_values"] == 0).all(dim=0).equal(padding)
    assert (sample["pixel_mask"] == 0).equal(padding)


@pytest.mark.parametrize("source", [NoUnseenLabels(SPACE), GroundTruthLabels(SPACE)])
@pytest.mark.parametrize("change", [{1: 3, 3: 1}, {1: 3}, {1: 255, 3: 255}], ids=str)
def test_where_unseen_classes_lie_never_reaches_a_sample(tmp_path, source, change):
    # Unseen classes cover much, and the single-class limit looks at the map: both could leak through the crop.
    image, label = random_sample(5, (48, 40), ids=(0, 1, 1, 1, 2, 3, 3, 4, 255))
    label[:24] = np.where(label[:24] == 255, 255, 1)
    changed = np.vectorize(lambda value: change.get(value, value))(label).astype(np.uint8)
    assert (changed != label).any()
    recipe = Augmentation(crop_size=16, max_size=2048, short_edges=[20, 30], single_class_max_area=0.4)
    kept, other = (
        dataset_of(write_folder(tmp_path / name, {"a": (image, ids)}), recipe, image_labels=source)
        for name, ids in (("kept", label), ("changed", changed))
    )
    is_seen = torch.tensor([name not in SPACE.unseen for name in kept.class_names])
    for epoch in range(6):
        one, two = kept[epoch, 0], other[epoch, 0]
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert torch.equal(one["labels"], two["labels"])
        assert torch.equal(one["image_labels"][is_seen], two["image_labels"][is_seen])
        assert not set(one["labels"].unique().tolist()) & set(torch.where(~is_seen)[0].tolist())
        if isinstance(source, GroundTruthLabels):
            assert two["image_labels"][[1, 3]].tolist() == [int(value in changed) for value in (1, 3)]


# ---- which sample when ----


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    recipe = Augmentation(crop_size=12, max_size=2048, short_edges=[12, 16, 20])
    data, again, other = (dataset_of(folder, recipe, seed=seed) for seed in (0, 0, 1))
    first = data[3, 1]["pixel_values"]
    assert torch.equal(first, data[3, 1]["pixel_values"]) and torch.equal(first, again[3, 1]["pixel_values"])
    for different in (data[4, 1], data[3, 2], other[3, 1]):
        assert not torch.equal(first, different["pixel_values"])


def steps_of(num_processes=1, micro_batches=1, start=0, stop=9, seed=0):
    """The samples of each step, put together from all processes in their order."""
    parts = BatchParts(num_processes, micro_batches, 12 // (num_processes * micro_batches))
    steps = range(start, stop)
    processes = [list(StepSampler(7, parts, steps, process_index=i, seed=seed)) for i in range(num_processes)]
    return [
        sum((batch for own in processes for batch in own[step * micro_batches : (step + 1) * micro_batches]), [])
        for step in range(stop - start)
    ]


@pytest.mark.parametrize(("num_processes", "micro_batches"), [(1, 3), (2, 1), (2, 2), (4, 3), (12, 1)])
def test_steps_do_not_depend_on_the_number_of_processes(num_processes, micro_batches):
    assert steps_of(num_processes, micro_batches) == steps_of()


def test_a_restart_goes_on_where_it_stopped():
    assert steps_of(start=0, stop=4) + steps_of(start=4) == steps_of()


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own():
    samples = sum(steps_of(), [])
    assert samples[:7] != sorted(samples[:7])
    epochs = [samples[start : start + 7] for start in range(0, 105, 7)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, index) for index in range(7)]
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) > 10
    assert steps_of(seed=1) != steps_of()


def test_loader_gives_the_same_batches_with_and_without_workers(folder):
    recipe = Augmentation(crop_size=12, max_size=2048, short_edges=[12, 20])
    data = dataset_of(folder, recipe, image_labels=GroundTruthLabels(SPACE))
    sampler = StepSampler(4, BatchParts(1, 1, 3), range(2))
    batches = [
        list(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) == len(sampler) == 2
    for one, other in zip(*batches, strict=True):
        shapes = {name: tuple(value.shape) for name, value in one.items() if name != "image_ids"}
        assert shapes == {
            "pixel_values": (3, 3, 12, 12),
            "labels": (3, 12, 12),
            "image_labels": (3, 5),
            "pixel_mask": (3, 12, 12),
            "label_counts": (3,),
        }
        assert one["image_ids"] == other["image_ids"] and len(one["image_ids"]) == 3
        assert one["pixel_mask"].all()
        for name in shapes:
            assert torch.equal(one[name], other[name])


def test_an_image_in_memory_is_named_by_its_id():
    good = io.BytesIO()
    Image.new("L", (4, 4)).save(good, "PNG")
    rows = [{"image": {"bytes": b"broken", "path": None}, "label": {"bytes": good.getvalue(), "path": None}}]
    with pytest.raises(InputError, match="image of '000123'"):
        Split(rows, ["000123"], SPACE)[0]


# ---- streams ----


def write_parquet(folder, root, shards=2):
    """A folder's train split again as `data/train-*.parquet`."""
    datasets = pytest.importorskip("datasets")
    (root / "data").mkdir(parents=True)
    (root / "classes.json").write_bytes((folder / "classes.json").read_bytes())
    stems = sorted(file.stem for file in (folder / "train" / "images").iterdir())
    features = datasets.Features(image=datasets.Image(), label=datasets.Image(), image_id=datasets.Value("string"))
    for shard, part in enumerate(np.array_split(stems, shards)):
        cells = {
            column: [{"bytes": (folder / "train" / kind / f"{s}.png").read_bytes(), "path": None} for s in part]
            for column, kind in (("image", "images"), ("label", "labels"))
        }
        table = datasets.Dataset.from_dict({**cells, "image_id": list(part)}, features=features)
        table.to_parquet(root / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet")
    return root


def write_listed(folder, root):
    """A folder's train split again with a metadata.jsonl, in files of other names."""
    (root / "train" / "a").mkdir(parents=True)
    (root / "classes.json").write_bytes((folder / "classes.json").read_bytes())
    lines = []
    for stem in sorted(file.stem for file in (folder / "train" / "images").iterdir()):
        entry = {"image_file_name": f"a/{stem}.png", "label_file_name": f"a/{stem}_ids.png"}
        lines.append(json.dumps(entry))
        for kind, name in zip(("images", "labels"), entry.values(), strict=True):
            shutil.copy(folder / "train" / kind / f"{stem}.png", root / "train" / name)
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return root


def test_every_way_of_loading_gives_the_same_records_and_samples(folder, tmp_path, monkeypatch, datasets):
    parquet, listed = write_parquet(folder, tmp_path / "parquet"), write_listed(folder, tmp_path / "listed")
    monkeypatch.setattr(datasets, "load_dataset", hub_of({"me/pictures": parquet}, datasets.load_dataset))
    monkeypatch.setattr("zs3.label_space._downloaded_classes", lambda _: folder / "classes.json")
    recipe = Augmentation(crop_size=12, max_size=2048, short_edges=[12, 20])
    expected = [dataset_of(folder, recipe)[3, index] for index in range(4)]
    for source in (folder, parquet, listed, "me/pictures"):
        mapped, stream = load_split(source, "train"), stream_split(source, "train")
        for index, (one, other) in enumerate(zip(mapped, stream, strict=True)):
            picture, label = random_sample(index)
            for record in (one, other):
                assert record.image_id == f"p{index}" and record.image.mode == "RGB"
                np.testing.assert_array_equal(np.asarray(record.image), picture)
                np.testing.assert_array_equal(record.label, label)
        data = SegmentationDataset(stream, SPACE, recipe, image_mean=MEAN, image_std=STD)
        for row, sample in zip(stream.table, expected, strict=True):
            same = data.sample(stream.stored(row), epoch=3)
            assert same.keys() == sample.keys() and same["image_id"] == sample["image_id"]
            assert all(torch.equal(same[name], sample[name]) for name in ("pixel_values", "labels", "image_labels"))


def hub_of(folders, load):
    """datasets.load_dataset with a Hub that holds these: there is none in a test."""

    def load_dataset(source, *, split, **options):
        if source in folders:
            files = [str(file) for file in sorted(folders[source].glob(f"data/{split}-*.parquet"))]
            source, options["data_files"] = "parquet", {split: files}
        return load(source, split=split, **options)

    return load_dataset


def streamed(root, batch_size=2, workers=0, **options):
    data = SegmentationDataset(stream_split(root, "train"), SPACE, PLAIN, image_mean=MEAN, image_std=STD)
    batches = StreamedBatches(data, batch_size, 8, **options)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    return (batch["image_ids"] for batch in loader)


@pytest.mark.parametrize("shards", [None, 4])
def test_processes_and_workers_share_every_epoch_of_a_stream(tmp_path, shards, datasets):
    folder = write_folder(tmp_path / "folder", {f"p{index:02d}": random_sample(index) for index in range(16)})
    root = folder if shards is None else write_parquet(folder, tmp_path / "parquet", shards)
    orders = []
    for workers in (0, 2):
        parts = [streamed(root, workers=workers, num_processes=2, process_index=index) for index in range(2)]
        for _ in range(2):  # epochs: 16 pictures are 4 batches of 2 in each of 2 processes
            ids = [image_id for part in parts for batch in islice(part, 4) for image_id in batch]
            assert sorted(ids) == [f"p{index:02d}" for index in range(16)]
            orders.append(ids)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_stopped(tmp_path, workers):
    folder = write_folder(tmp_path, {f"p{index:02d}": random_sample(index) for index in range(7)})
    whole = list(islice(streamed(folder, workers=workers), 28))
    for start in (0, 6, 14, 20):  # epochs end at different times in different workers
        assert list(islice(streamed(folder, workers=workers, start=start), 28 - start)) == whole[start:]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}"], "line 1 .'image_file_name' is missing.: a line is"),
        (["", "no JSON"], "line 2 .*: a line is"),
        (["[1]"], "line 1 .*: a line is"),
        ([], "is empty"),
        (['{"image_file_name": "a/p0.png", "label_file_name": "a/none.png"}'], "line 1: .*a/none.png does not exist"),
        (['{"image_file_name": "a/p0.png", "label_file_name": "a/p0_ids.png"}'] * 2, "line 2: 'p0' was there before"),
    ],
)
def test_bad_lines_of_a_list_are_named(folder, tmp_path, lines, message):
    listed = write_listed(folder, tmp_path / "listed")
    (listed / "train" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        load_split(listed, "train")


def test_a_list_may_give_ids_of_its_own(folder, tmp_path):
    listed = write_listed(folder, tmp_path / "listed")
    entry = {"image_file_name": "a/p1.png", "label_file_name": "a/p1_ids.png", "image_id": 17}
    (listed / "train" / "metadata.jsonl").write_text(json.dumps(entry))
    assert load_split(listed, "train").image_ids == ["17"]


def test_shards_that_are_missing_are_missed(folder, tmp_path, load):
    parquet = write_parquet(folder, tmp_path / "parquet")
    (parquet / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="holds 1 shards of 'train', of 00002: .* not complete"):
        load(parquet, "train")


def test_one_id_of_two_pictures_is_refused(folder, tmp_path, datasets):
    parquet = write_parquet(folder, tmp_path / "parquet", shards=1)
    shutil.copy(parquet / "data" / "train-00000-of-00001.parquet", parquet / "data" / "train-00001-of-00002.parquet")
    (parquet / "data" / "train-00000-of-00001.parquet").rename(parquet / "data" / "train-00000-of-00002.parquet")
    with pytest.raises(InputError, match="image_id 'p0' twice"):
        load_split(parquet, "train")


def test_large_jpegs_are_decoded_at_a_size_that_will_do(tmp_path):
    rows, columns = np.mgrid[:480, :640] / 40
    picture = (127 + 120 * np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], axis=-1)).astype(np.uint8)
    label = (rows > 6).astype(np.uint8)
    write_folder(tmp_path, {"a": (picture, label)}, suffix=".jpg")
    stored = load_split(tmp_path, "train").stored(0)
    assert stored.image.size == (640, 480) and stored.decoded((150, 112)).size == (160, 120)
    assert load_split(tmp_path, "train").stored(0).decoded((161, 120)).size == (320, 240)
    recipe = Augmentation(crop_size=96, max_size=2048, short_edges=[112, 128], flip=False, color_jitter=False)
    sample = dataset_of(tmp_path, recipe)[0, 0]
    write_folder(tmp_path / "png", {"a": (np.asarray(Image.open(tmp_path / "train/images/a.jpg")), label)})
    whole = dataset_of(tmp_path / "png", recipe)[0, 0]  # a PNG is decoded whole
    assert torch.equal(sample["labels"], whole["labels"])
    gap = (sample["pixel_values"] - whole["pixel_values"]).abs().max() * max(STD) * 255
    assert 0 < gap < 6  # of 255


def test_a_reader_without_a_picture_says_so(folder):
    with pytest.raises(InputError, match="got no picture: use fewer processes or workers than shards"):
        next(streamed(folder, num_processes=5, process_index=4))  # of 4 pictures


def test_a_broken_shard_is_one_line_when_its_turn_comes(folder, tmp_path):
    parquet = write_parquet(folder, tmp_path / "parquet")
    broken = parquet / "data" / "train-00001-of-00002.parquet"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(InputError, match="stream"):
        list(stream_split(parquet, "train"))


@pytest.mark.parametrize("column", ["image", "label", "image_id"])
def test_empty_cells_are_named(folder, tmp_path, column, datasets, load):
    import pyarrow
    import pyarrow.parquet

    parquet = write_parquet(folder, tmp_path / "parquet", shards=1)
    file = parquet / "data" / "train-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(file)
    cells = [*table[column].to_pylist()[:3], None]
    place = table.column_names.index(column)
    table = table.set_column(place, table.schema.field(column), pyarrow.array(cells, table.schema.field(column).type))
    pyarrow.parquet.write_table(table, file)
    message = {"image": "image of 'p3' is empty", "label": "label map of 'p3' is empty", "image_id": "has no image_id"}
    with pytest.raises(InputError, match=message[column]):
        list(load(parquet, "train"))


def test_a_palette_may_have_less_than_8_bits_a_pixel(folder):
    label = random_sample(2, ids=(0, 1))[1]
    palette = Image.fromarray(label, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(folder / "train" / "labels" / "p3.png", bits=4)
    np.testing.assert_array_equal(load_split(folder, "train")[3].label, label)


def write_grey_png(path, bits):
    """A black PNG, 16 x 16, of fewer than 8 bits a pixel, by the format's own description; Pillow writes none."""
    header = struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)
    lines = bytes(16 * (1 + 16 * bits // 8))
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(lines), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def test_lists_may_have_a_byte_order_mark_but_not_another_encoding(folder, tmp_path):
    listed = write_listed(folder, tmp_path / "listed") / "train" / "metadata.jsonl"
    text = listed.read_text()
    listed.write_text("\ufeff" + text, encoding="utf-8")
    assert load_split(tmp_path / "listed", "train").image_ids == ["p0", "p1", "p2", "p3"]
    listed.write_text(text, encoding="utf-16")
    assert load_split(tmp_path / "listed", "train").image_ids == ["p0", "p1", "p2", "p3"]
    listed.write_text(text.replace("p0", "ü"), encoding="latin-1")
    with pytest.raises(InputError, match="is no UTF-8 text"):
        load_split(tmp_path / "listed", "train")


# ---- files of other people ---------------------------------------------------------------------------------

ODD_NAMES = [
    "run[12]",
    "run*",
    "ru?1",
    "{run1,run2}",
    "[!x]un1",
    "a b",
    "größe",
    ".hidden",
    "__x",
    "a%20b",
    "a#b",
    "a\nb",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_path_is_a_pattern(name, folder, tmp_path, datasets, load):
    for beside in ("run1", "run2", name):
        own = write_folder(tmp_path / f"{beside}_", {f"of {beside}": random_sample(1)})
        write_parquet(own, tmp_path / beside, shards=1)
    assert [record.image_id for record in load(tmp_path / name, "train")] == [f"of {name}"]
    with pytest.raises(InputError, match="no split"):
        load(tmp_path / "run1", "tr*")


@pytest.mark.parametrize("name", ["a::b", "$HOME"])
def test_a_path_that_datasets_would_not_take_as_it_is_has_its_reason(name, folder, tmp_path, load):
    write_parquet(folder, tmp_path / "plain", shards=1).rename(tmp_path / name)
    with pytest.raises(InputError, match="datasets gives .* in this path a meaning, rename the folder"):
        load(tmp_path / name, "train")


def test_a_part_of_a_shards_name_is_no_split(folder, tmp_path):
    write_parquet(folder, tmp_path / "parquet", shards=1)
    for split in ("train-00000", "train-00000-of", "trai", "train-"):
        with pytest.raises(InputError, match="has no split"):
            load_split(tmp_path / "parquet", split)


def test_a_shard_that_was_replaced_is_read_anew(folder, tmp_path, datasets):
    """At the same path, of the same size and time."""
    write_parquet(folder, tmp_path / "parquet", shards=1)
    shard = tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet"
    before = shard.stat()
    assert load_split(tmp_path / "parquet", "train").image_ids == ["p0", "p1", "p2", "p3"]
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"p3", b"q3"))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == before.st_size
    assert load_split(tmp_path / "parquet", "train").image_ids == ["p0", "p1", "p2", "q3"]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["00000-of-00002-0123456789abcdef", "00001-of-00002-fedcba9876543210"], True),  # of older uploads
        (["00000-of-00002", "00001-of-00002"], True),
        (["0", "1"], True),
        (["00000-of-00003-0123456789abcdef", "00001-of-00003-fedcba9876543210"], False),
        (["00000-of-00002-0123456789abcdef", "00000-of-00002-fedcba9876543210"], False),
        (["00000-of-00002", "00001-of-00003"], False),
        (["00000-of-00001", "extra"], False),
    ],
)
def test_shards_are_read_where_all_of_one_upload_are_there(names, read, folder, tmp_path, datasets):
    data = write_parquet(folder, tmp_path / "parquet") / "data"
    for shard, name in zip(sorted(data.iterdir()), names, strict=True):
        shard.rename(data / f"train-{name}.parquet.new")
    for shard in sorted(data.iterdir()):
        shard.rename(shard.with_suffix(""))
    (data / "train-extra-00000-of-00001.parquet").write_bytes(b"another split's")
    (data / "._train-00000-of-00002.parquet").write_bytes(b"a system's")
    if read:
        assert sorted(load_split(tmp_path / "parquet", "train").image_ids) == ["p0", "p1", "p2", "p3"]
    else:
        with pytest.raises(InputError, match="not complete, or shards of another one lie between"):
            load_split(tmp_path / "parquet", "train")


def test_a_split_without_rows_has_its_own_words(folder, tmp_path, datasets):
    import pyarrow.parquet

    write_parquet(folder, tmp_path / "parquet", shards=1)
    shard = tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(shard)[:0], shard)
    with pytest.raises(InputError, match="has no row"):
        load_split(tmp_path / "parquet", "train")


def test_what_systems_leave_is_passed_over(folder):
    for kind in ("images", "labels"):
        for name in ("._p0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "._.DS_Store"):
            (folder / "train" / kind / name).write_bytes(b"\0\5\x16\7")
    assert load_split(folder, "train").image_ids == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tif", ".TIFF", ".ppm", ".gif"])
def test_pictures_of_other_suffixes_are_read(suffix, tmp_path):
    write_folder(tmp_path, {"a": random_sample(0)}, suffix=suffix)
    picture = Image.open(tmp_path / "train" / "images" / f"a{suffix}").convert("RGB")
    np.testing.assert_array_equal(load_split(tmp_path, "train")[0].image, picture)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_label_map_is_a_png_in_every_door(kind, folder, tmp_path, datasets):
    Image.fromarray(random_sample(0)[1]).save(folder / "train" / "labels" / "p0.png", kind)
    doors = [folder, write_listed(folder, tmp_path / "listed"), write_parquet(folder, tmp_path / "parquet")]
    for door in doors:
        for load in (load_split, stream_split):
            with pytest.raises(InputError, match=f"it is a {kind} inside, and must be PNG"):
                next(iter(load(door, "train")))


@pytest.mark.parametrize("image_id", [None, True, 1.5, [], {"a": 1}, ""])
def test_an_image_id_is_a_text_or_a_whole_number(image_id, folder, tmp_path):
    listed = write_listed(folder, tmp_path / "listed") / "train" / "metadata.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    listed.write_text("\n".join(json.dumps({**line, "image_id": image_id}) for line in lines[:1]))
    with pytest.raises(InputError, match="line 1: .*image_id"):
        load_split(tmp_path / "listed", "train")


def test_separators_inside_a_text_end_no_line(folder, tmp_path):
    listed = write_listed(folder, tmp_path / "listed") / "train" / "metadata.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    ids = ["a\u2028b", "a\x85b", "a\u2029b", 7]
    entries = [{**line, "image_id": image_id} for line, image_id in zip(lines, ids, strict=True)]
    text = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    listed.write_text(text, encoding="utf-8", newline="")
    assert load_split(tmp_path / "listed", "train").image_ids == ["a\u2028b", "a\x85b", "a\u2029b", "7"]


DAMAGES = {
    "cut early": lambda content: content[:100],
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another end": lambda content: content[:-4] + b"XXXX",
    "a hole": lambda content: content[:200] + bytes(300) + content[500:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_table_is_one_line(damage, folder, tmp_path, datasets, load):
    shard = write_parquet(folder, tmp_path / "parquet", shards=1) / "data" / "train-00000-of-00001.parquet"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(InputError) as refusal:
        list(load(tmp_path / "parquet", "train"))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize("cells", [[1, 2], ["a", "b"], [[1], [2]], [{"x": 1}, {"x": 2}], [1.5, None]])
def test_columns_of_other_types_are_one_line(cells, tmp_path, datasets, load):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    table = pyarrow.table({"image": cells, "label": cells, "image_id": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-0.parquet")
    with pytest.raises(InputError) as refusal:
        list(load(tmp_path, "train", SPACE))
    assert "\n" not in str(refusal.value)


def test_words_that_are_dropped_do_not_move_the_crop(folder):
    class Drawing(NoUnseenLabels):
        def __call__(self, image_id, ids, rng):
            rng.random(5)
            return super().__call__(image_id, ids, rng)

    recipe = Augmentation(crop_size=12, max_size=2048, short_edges=[12, 16, 20])
    plain, drawing = dataset_of(folder, recipe), dataset_of(folder, recipe, image_labels=Drawing(SPACE))
    for index in range(4):
        assert torch.equal(plain[0, index]["pixel_values"], drawing[0, index]["pixel_values"])
