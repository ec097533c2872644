import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from zs3.command_line import InputError
from zs3.data import (
    IGNORED,
    Augmentation,
    SegmentationDataset,
    Split,
    StepSampler,
    augment,
    collate,
    load_split,
    mask_positions,
    to_image_labels,
    to_mask_labels,
)
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


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, {f"p{index}": random_sample(index) for index in range(4)})


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


def test_parquet_shards_are_read_as_the_folder_is(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    (tmp_path / "parquet" / "classes.json").write_bytes((folder / "classes.json").read_bytes())
    for shard, stems in enumerate((["p0", "p1"], ["p2", "p3"])):
        cells = {
            column: [{"bytes": (folder / "train" / part / f"{s}.png").read_bytes(), "path": None} for s in stems]
            for column, part in (("image", "images"), ("label", "labels"))
        }
        picture = datasets.Image()
        features = datasets.Features(image=picture, label=picture, image_id=datasets.Value("string"))
        table = datasets.Dataset.from_dict({**cells, "image_id": stems}, features=features)
        table.to_parquet(tmp_path / "parquet" / "data" / f"train-{shard:05d}-of-00002.parquet")
    ours, theirs = load_split(tmp_path / "parquet", "train"), load_split(folder, "train")
    assert ours.image_ids == theirs.image_ids
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(one.image), np.asarray(other.image))
        np.testing.assert_array_equal(one.label, other.label)
    with pytest.raises(InputError, match="no split 'validation'"):
        load_split(tmp_path / "parquet", "validation")


def test_missing_partners_are_listed(folder):
    for stem in ("p0", "p2"):
        (folder / "train" / "labels" / f"{stem}.png").unlink()
    with pytest.raises(InputError, match=r"labels lacks the partner of 2 files \(p0.png, p2.png\)"):
        load_split(folder, "train")


def test_two_images_of_one_stem_are_refused(folder):
    Image.new("RGB", (16, 16)).save(folder / "train" / "images" / "p0.jpg")
    with pytest.raises(InputError, match="p0.jpg.*p0.png.*one name"):
        load_split(folder, "train")


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


def test_unreadable_image_is_named(folder):
    file = folder / "train" / "images" / "p1.png"
    for content in (b"no picture", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*images/p1.png .*replace it"):
            load_split(folder, "train")[1]


def test_label_map_of_another_size_is_named(folder):
    file = folder / "train" / "labels" / "p1.png"
    Image.fromarray(np.zeros((16, 15), np.uint8)).save(file)
    with pytest.raises(InputError, match=r"labels/p1.png is 15 x 16 pixels, but .*images/p1.png is 16 x 16"):
        load_split(folder, "train")[1]


def test_rotated_photograph_is_told_of_exif(tmp_path):
    write_folder(tmp_path, {"a": (np.zeros((8, 6, 3), np.uint8), np.zeros((6, 8), np.uint8))})
    with pytest.raises(InputError, match="EXIF"):
        load_split(tmp_path, "train")[0]


def test_id_outside_the_label_space_is_named(folder):
    Image.fromarray(np.full((16, 16), 5, np.uint8)).save(folder / "train" / "labels" / "p1.png")
    with pytest.raises(InputError, match=r"labels/p1.png holds id 5; ids are 0 to 4, and 255 for ignored"):
        load_split(folder, "train")[1]


def test_coloured_label_map_is_refused(folder):
    Image.new("RGB", (16, 16)).save(folder / "train" / "labels" / "p1.png")
    with pytest.raises(InputError, match=r"labels/p1.png has mode RGB"):
        load_split(folder, "train")[1]


# ---- targets ----


def test_mask_labels_hold_places_of_seen_classes_only():
    label = np.array([[0, 1, 2], [3, 4, 255]])
    seen_only = to_mask_labels(label, mask_positions(SPACE, SPACE.seen), 255)
    np.testing.assert_array_equal(seen_only, [[0, -1, 1], [-1, 2, -1]])
    all_names = to_mask_labels(label, mask_positions(SPACE, SPACE.class_names), 255)
    np.testing.assert_array_equal(all_names, [[0, -1, 2], [-1, 4, -1]])


def test_image_labels_take_seen_from_the_map_and_unseen_from_what_is_told():
    is_seen = np.array([True, False, True, False, False])
    told = np.array([1, 1, 1, 0, -1], dtype=np.int8)
    labels = to_image_labels(np.array([[2, IGNORED], [2, 2]]), is_seen, told)
    assert labels.tolist() == [0, 1, 1, 0, -1] and labels.dtype == np.int8


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


def test_ground_truth_tells_of_unseen_classes_outside_the_crop(tmp_path):
    label = np.zeros((32, 32), np.uint8)
    label[0, 0] = 3  # one pixel of cat, in a corner
    write_folder(tmp_path, {"a": (np.zeros((32, 32, 3), np.uint8), label)})
    data = dataset_of(
        tmp_path, Augmentation(crop_size=4, max_size=2048, short_edges=[32], flip=False), unseen_labels="ground_truth"
    )
    assert data.class_names == SPACE.class_names and data.is_seen.tolist() == [True, False, True, False, True]
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


def write_scores(file, scores):
    """scores: {image_id: {name: score}}, written as JSON would be: each row a dict."""
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(exist_ok=True)
    names = list(next(iter(scores.values())))
    kind = pyarrow.struct([(name, pyarrow.float32()) for name in names])
    columns = {"image_id": list(scores), "scores": pyarrow.array(list(scores.values()), kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


SCORES = {
    "p3": {"cat": 0.2, "cow": 0.9},
    "p1": {"cat": 0.99, "cow": 0.0},
    "p0": {"cat": 0.5, "cow": 0.989},
    "p2": {"cat": 0.51, "cow": 1.0},
}


@pytest.fixture
def scores_folder(tmp_path):
    """The four images of `folder` in two shards, in an order of their own."""
    for shard, ids in enumerate((["p3", "p1"], ["p0", "p2"])):
        name = f"scores-{shard:05d}-of-00002.parquet"
        write_scores(tmp_path / "scores" / name, {image_id: SCORES[image_id] for image_id in ids})
    return tmp_path / "scores"


@pytest.mark.parametrize(("threshold", "unknown_above"), [(0.99, None), (0.99, 0.5), (0.9, 0.2), (0.5, None)])
def test_scores_become_labels_where_they_are_read(folder, scores_folder, threshold, unknown_above):
    data = dataset_of(
        folder,
        unseen_labels=str(scores_folder),
        pseudo_label_threshold=threshold,
        pseudo_label_unknown_above=unknown_above,
    )
    for index, image_id in enumerate(("p0", "p1", "p2", "p3")):
        expected = []
        for name in ("cow", "cat"):  # places 1 and 3 of the class axis
            score = SCORES[image_id][name]
            unknown = unknown_above is not None and unknown_above < score < threshold
            expected.append(1 if score >= threshold else -1 if unknown else 0)
        assert data[0, index]["image_labels"][[1, 3]].tolist() == expected
        assert data[0, index]["image_id"] == image_id


def test_the_threshold_of_the_paper_is_the_default(folder, scores_folder):
    data = dataset_of(folder, unseen_labels=str(scores_folder))
    assert data.pseudo_labels.tolist() == [[0] * 5, [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0] * 5]
    assert data.pseudo_labels.dtype == np.int8


def test_one_file_of_scores_will_do(folder, tmp_path):
    file = write_scores(tmp_path / "all" / "mine.parquet", {**SCORES, "of another split": SCORES["p0"]})
    assert dataset_of(folder, unseen_labels=str(file)).pseudo_labels[2].tolist() == [0, 1, 0, 0, 0]


def renamed(row):
    return {"cow": row["cow"], "dog": row["cat"]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: shard.unlink(), "holds 1 shards, but not the 2 of one run"),
        (lambda shard: write_scores(shard, {i: renamed(SCORES[i]) for i in ("p0", "p2")}), r"other .*names.*'cat'"),
        (lambda shard: write_scores(shard, {"p0": SCORES["p0"]}), r"no row for 1 images \('p2'"),
        (lambda shard: write_scores(shard, {"p0": SCORES["p0"], "p1": SCORES["p1"]}), "one row"),
        (lambda shard: write_scores(shard, {i: {"cat": None, "cow": 1.0} for i in ("p0", "p2")}), "not finite"),
        (lambda shard: shard.write_bytes(b"PAR1 no more"), "cannot read .*scores-00001-of-00002"),
        (lambda shard: shutil.rmtree(shard.parent), "do not exist"),
        (lambda shard: [file.unlink() for file in shard.parent.iterdir()], "holds no shards"),
        (lambda shard: shard.rename(shard.with_name("scores-00001-of-00003.parquet")), "not the 2 of one run"),
    ],
)
def test_bad_pseudo_labels_are_named(folder, scores_folder, spoil, message):
    spoil(scores_folder / "scores-00001-of-00002.parquet")
    with pytest.raises(InputError, match=message):
        dataset_of(folder, unseen_labels=str(scores_folder))


def test_unknown_scores_lie_below_the_threshold(folder, scores_folder):
    for unknown_above in (0.99, 1.0):
        with pytest.raises(InputError, match="must be below the threshold 0.99"):
            dataset_of(folder, unseen_labels=str(scores_folder), pseudo_label_unknown_above=unknown_above)


@pytest.mark.parametrize("unseen_labels", ["none", "ground_truth"])
@pytest.mark.parametrize("change", [{1: 3, 3: 1}, {1: 3}, {1: 255, 3: 255}], ids=str)
def test_where_unseen_classes_lie_never_reaches_a_sample(tmp_path, unseen_labels, change):
    # Unseen classes cover much, and the single-class limit looks at the map: both could leak through the crop.
    image, label = random_sample(5, (48, 40), ids=(0, 1, 1, 1, 2, 3, 3, 4, 255))
    label[:24] = np.where(label[:24] == 255, 255, 1)
    changed = np.vectorize(lambda value: change.get(value, value))(label).astype(np.uint8)
    assert (changed != label).any()
    recipe = Augmentation(crop_size=16, max_size=2048, short_edges=[20, 30], single_class_max_area=0.4)
    kept, other = (
        dataset_of(write_folder(tmp_path / name, {"a": (image, ids)}), recipe, unseen_labels=unseen_labels)
        for name, ids in (("kept", label), ("changed", changed))
    )
    is_seen = kept.is_seen
    for epoch in range(6):
        one, two = kept[epoch, 0], other[epoch, 0]
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert torch.equal(one["labels"], two["labels"])
        assert torch.equal(one["image_labels"][is_seen], two["image_labels"][is_seen])
        assert not set(one["labels"].unique().tolist()) & set(torch.where(~is_seen)[0].tolist())
        if unseen_labels == "ground_truth":
            assert two["image_labels"][[1, 3]].tolist() == [int(value in changed) for value in (1, 3)]


# ---- augmentation ----


def coordinates(height, width):
    """A picture and a map which say of every pixel where it came from; ids up to 65535."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    return Image.fromarray(image), (rows * width + columns).astype(np.int32)


def test_crop_takes_one_window_of_picture_and_map_ids_beyond_255_included():
    image, label = coordinates(200, 250)
    recipe = Augmentation(crop_size=64, max_size=2048, short_edges=[200], color_jitter=False)
    corners, flips = set(), Counter()
    for seed in range(40):
        cropped, ids = augment(image, label, np.random.default_rng(seed), recipe)
        pixels = np.asarray(cropped).astype(int)
        np.testing.assert_array_equal(pixels[..., 0] * 250 + pixels[..., 1], ids)
        assert ids.shape == (64, 64)
        corners.add(int(ids.min()))
        flips[bool(ids[0, 0] > ids[0, 1])] += 1
    assert len(corners) > 30 and min(flips.values()) > 8


def test_map_scales_with_the_picture_by_nearest_pixel():
    image, label = coordinates(10, 20)
    recipe = Augmentation(crop_size=100, max_size=2048, short_edges=[20], flip=False, color_jitter=False)
    doubled, ids = augment(image, label, np.random.default_rng(0), recipe)
    assert doubled.size == (40, 20)
    np.testing.assert_array_equal(ids, label.repeat(2, axis=0).repeat(2, axis=1))
    # PIL's own nearest-neighbour resize, where it can say the ids
    recipe = Augmentation(crop_size=9, max_size=2048, short_edges=[7], flip=False)
    smaller, ids = augment(image, label, np.random.default_rng(0), recipe)
    whole = np.asarray(Image.fromarray(label.astype(np.uint8)).resize((14, 7), Image.Resampling.NEAREST))
    assert any(np.array_equal(whole[:, x : x + 9], ids) for x in range(6)) and smaller.size == (9, 7)


def test_crop_equals_resizing_the_whole_picture_first():
    image = Image.fromarray(random_sample(0, (60, 90))[0])
    label = np.arange(60 * 90).reshape(60, 90)
    recipe = Augmentation(crop_size=32, max_size=2048, short_edges=[45], flip=False, color_jitter=False)
    cropped, _ = augment(image, label, np.random.default_rng(3), recipe)
    whole = np.asarray(image.resize((68, 45), Image.Resampling.BILINEAR)).astype(int)
    gaps = [np.abs(whole[y : y + 32, x : x + 32] - np.asarray(cropped)).max() for y in range(14) for x in range(37)]
    assert sorted(gaps)[0] <= 1 < sorted(gaps)[1]


def test_longer_edge_is_bounded():
    image, label = coordinates(10, 100)
    recipe = Augmentation(crop_size=100, short_edges=[20], max_size=50, flip=False)
    assert augment(image, label, np.random.default_rng(0), recipe)[0].size == (50, 5)


def test_single_class_limit_finds_a_mixed_crop():
    label = np.zeros((64, 64), np.int64)
    label[:, 40:] = 1
    image = Image.new("RGB", (64, 64))
    shares = {}
    for limit in (1.0, 0.75):
        recipe = Augmentation(crop_size=16, max_size=2048, short_edges=[64], single_class_max_area=limit)
        crops = [augment(image, label, np.random.default_rng(seed), recipe)[1] for seed in range(30)]
        shares[limit] = sum(0.25 < crop.mean() < 0.75 for crop in crops)
    assert shares[0.75] > 20 > shares[1.0]


def test_color_jitter_changes_colours_but_no_place():
    image = Image.new("RGB", (20, 10), (200, 80, 40))
    recipe = Augmentation(crop_size=10, max_size=2048, short_edges=[10], flip=False)
    colours = set()
    for seed in range(20):
        jittered = np.asarray(augment(image, np.zeros((10, 20)), np.random.default_rng(seed), recipe)[0])
        assert (jittered == jittered[0, 0]).all()
        colours.add(tuple(jittered[0, 0].tolist()))
    assert len(colours) > 12


def test_padding_is_the_mean_colour_and_ignored(tmp_path):
    write_folder(tmp_path, {"a": (np.full((8, 12, 3), 9, np.uint8), np.zeros((8, 12), np.uint8))})
    sample = dataset_of(tmp_path, Augmentation(crop_size=16, max_size=2048, short_edges=[8], flip=False))[0, 0]
    padding = torch.ones(16, 16, dtype=torch.bool)
    padding[:8, :12] = False
    assert (sample["labels"] == -1).equal(padding)
    assert (sample["pixel_values"] == 0).all(dim=0).equal(padding)


def test_default_short_edges_are_those_of_mask2former():
    assert Augmentation(512, 2048).short_edges == tuple(int(x * 0.1 * 512) for x in range(5, 21))


@pytest.mark.parametrize(
    "options", [{"crop_size": 0}, {"short_edges": []}, {"short_edges": [0]}, {"single_class_max_area": 0}]
)
def test_impossible_augmentations_are_refused(options):
    with pytest.raises(InputError):
        Augmentation(**{"crop_size": 16, "max_size": 64, **options})


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
    parts = [
        list(
            StepSampler(
                7,
                12,
                stop,
                start_step=start,
                num_processes=num_processes,
                process_index=index,
                micro_batches=micro_batches,
                seed=seed,
            )
        )
        for index in range(num_processes)
    ]
    return [
        sum((batch for part in parts for batch in part[step * micro_batches : (step + 1) * micro_batches]), [])
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


def test_total_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="12 cannot be cut into 8 equal parts"):
        StepSampler(7, 12, 9, num_processes=4, micro_batches=2)


def test_loader_gives_the_same_batches_with_and_without_workers(folder):
    recipe = Augmentation(crop_size=12, max_size=2048, short_edges=[12, 20])
    data = dataset_of(folder, recipe, unseen_labels="ground_truth")
    batches = [
        list(DataLoader(data, batch_sampler=StepSampler(4, 3, 2), collate_fn=collate, num_workers=workers))
        for workers in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) == len(StepSampler(4, 3, 2)) == 2
    for one, other in zip(*batches, strict=True):
        shapes = {name: tuple(value.shape) for name, value in one.items() if name != "image_ids"}
        assert shapes == {
            "pixel_values": (3, 3, 12, 12),
            "labels": (3, 12, 12),
            "image_labels": (3, 5),
            "pixel_mask": (3, 12, 12),
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
