"""Precision and recall of a training's image labels: against loops over label maps, and what a run does with them."""

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ended
from PIL import Image
from test_data import SPACE
from test_run_folder import equal, kill_at, record_images, start, start_two, weights
from tiny import save_checkpoint, tiny_config
from tiny_run import flags, write_data

from configuration_zs3 import Zs3Config
from eval import evaluate
from zs3.convert.nouns import write_nouns
from zs3.data.augmentation import Augmentation
from zs3.data.caption_labels import CaptionLabels, CaptionNouns
from zs3.data.image_labels import GroundTruthLabels, ImageLabels, LabelCounts, count_labels, training_space
from zs3.data.records import Split, load_split
from zs3.data.samples import SegmentationDataset
from zs3.evaluation.arguments import EvalArgs
from zs3.evaluation.results import read_result
from zs3.label_space import LabelSpace
from zs3.pseudo_labels import write_shard
from zs3.release.card import training
from zs3.scenes.render import CLASS_NAMES, UNSEEN
from zs3.training.folder import label_quality
from zs3.training.resume import complete_checkpoints, write_manifest
from zs3.training.start import record_supervision

IMAGE_IDS = [f"{index:05d}" for index in range(6)]
SCORES = np.random.default_rng(3).random((6, len(UNSEEN))).astype(np.float32)
THRESHOLD = 0.6
SETTINGS = {"max_steps": 7, "checkpointing_steps": 2, "logging_steps": 1, "batch_size": 4}
SETTINGS |= {"pseudo_label_threshold": THRESHOLD, "pseudo_label_unknown_above": 0.3}
NAMES = ("image_label_precision", "image_label_recall")


def in_map(path: Path, name: str) -> bool:
    """Whether a pixel of the label map is of this class."""
    label = Image.open(path)
    of_class = CLASS_NAMES.index(name)
    return any(label.getpixel((x, y)) == of_class for y in range(label.height) for x in range(label.width))


def by_loops(data: Path, image_ids: Iterable[str]) -> tuple[float, float]:
    """Precision and recall of pseudo labels over all uses of images, pair by pair."""
    truth = {(i, name): in_map(data / "train" / "labels" / f"{i}.png", name) for i in IMAGE_IDS for name in UNSEEN}
    right = wrong = missed = 0
    for image_id in image_ids:
        for column, name in enumerate(UNSEEN):
            has_label = SCORES[IMAGE_IDS.index(image_id), column] >= THRESHOLD
            right += has_label and truth[image_id, name]
            wrong += has_label and not truth[image_id, name]
            missed += not has_label and truth[image_id, name]
    assert right and wrong and missed, "too easy"
    return right / (right + wrong), right / (right + missed)


def used(folder: Path) -> list[str]:
    """The images of all steps, as `record_images` wrote them."""
    lines = [line for path in folder.glob("images*.jsonl") for line in path.read_text().splitlines()]
    return [image_id for line in lines for image_id in json.loads(line)]


def results_of(run: Path) -> list[float | None]:
    results = json.loads((run / "all_results.json").read_text())
    return [results[name] for name in NAMES]


def recorded_in(run: Path) -> list[float | None]:
    config = json.loads((run / "final" / "config.json").read_text())
    return [config[name] for name in NAMES]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six scenes, and pseudo labels of them in the folder `scores` beside it."""
    data = write_data(tmp_path_factory.mktemp("data"))
    (data.parent / "scores").mkdir()
    write_shard(data.parent / "scores" / "scores-00000-of-00001.parquet", IMAGE_IDS, SCORES, UNSEEN, b"")
    return data


def command(data: Path, output_dir: Path, **overrides) -> list[str]:
    return flags(data, output_dir, **{**SETTINGS, "unseen_labels": data.parent / "scores", **overrides})


def trained(arguments: list[str], log: Path) -> Path:
    assert ended(start(arguments, log)) == 0
    return Path(arguments[arguments.index("--output_dir") + 1])


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert ended(start(command(data, folder), folder / "log", partial(record_images, folder))) == 0
    return folder


# ---- counts ------------------------------------------------------------------------------------------------


def test_counts_are_those_of_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    labels, present = rng.integers(-1, 2, (20, 4)), rng.random((20, 4)) < 0.4
    labels[:, 1] = -1  # unknown is no label
    present[:, 2] = False
    found = count_labels(labels == 1, present, axis=0)
    for u in range(4):
        hits = sum(labels[n, u] == 1 and bool(present[n, u]) for n in range(20))
        given, true = sum(labels[n, u] == 1 for n in range(20)), sum(bool(present[n, u]) for n in range(20))
        assert [column[u] for column in found] == [hits, given, true]
        np.testing.assert_equal(found.precision[u], hits / given if given else np.nan)
        np.testing.assert_equal(found.recall[u], hits / true if true else np.nan)
    assert count_labels(labels == 1, present) == LabelCounts(*(column.sum() for column in found))


def dataset(records: Split, space: LabelSpace, source: ImageLabels | None) -> SegmentationDataset:
    recipe = Augmentation(crop_size=16, max_size=200, short_edges=[32])
    return SegmentationDataset(records, space, recipe, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_labels=source)


def test_a_sample_counts_the_pairs_of_its_whole_picture(data):
    records = load_split(data, "train")
    space = records.label_space
    counts = [dataset(records, space, GroundTruthLabels(space))[0, row]["label_counts"].tolist() for row in range(6)]
    for image_id, found in zip(IMAGE_IDS, counts, strict=True):
        present = sum(in_map(data / "train" / "labels" / f"{image_id}.png", name) for name in UNSEEN)
        assert found == [present] * 3, "true labels are all right"
    assert len({*map(tuple, counts)}) > 1
    for none in (dataset(records, space, None), dataset(records, training_space(space, "supervised"), None)):
        assert none[0, 0]["label_counts"].tolist() == [0, 0, 0]


def test_words_of_captions_count_for_the_unseen_names_among_them(data):
    """Of the unseen names, the nouns have the second and the first. Each picture's captions say the first."""
    records = load_split(data, "train")
    names = [*records.label_space.seen, "lawn", UNSEEN[1].upper(), UNSEEN[0]]
    said = np.array([names.index("lawn"), len(names) - 1], dtype=np.int32)
    source = CaptionLabels(CaptionNouns(names, dict.fromkeys(IMAGE_IDS, said)), IMAGE_IDS, drop_probability=0.0)
    crops = dataset(records, records.label_space, source)
    for row, image_id in enumerate(IMAGE_IDS):
        first, second = (in_map(data / "train" / "labels" / f"{image_id}.png", name) for name in UNSEEN[:2])
        assert crops[0, row]["label_counts"].tolist() == [first, 1, first + second]
    source.drop_probability = 1.0
    assert [crops[0, row]["label_counts"][1] for row in range(6)] == [0] * 6


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((3, 4, 6), [0.75, 0.5]),
        ((0, 0, 6), [None, 0.0]),
        ((0, 4, 0), [None, None]),  # label maps without unseen classes say nothing about the labels
        ((0, 0, 0), [None, None]),
        ((float("nan"),) * 3, [None, None]),
    ],
)
def test_a_quality_that_is_not_known_is_none(counts, expected):
    assert list(label_quality(torch.tensor(counts, dtype=torch.float64)).values()) == expected


# ---- runs --------------------------------------------------------------------------------------------------


def test_a_run_has_the_quality_of_the_labels_it_used(data, straight):
    assert len(used(straight)) == 7 * 4
    assert results_of(straight) == pytest.approx(by_loops(data, used(straight)))
    assert recorded_in(straight) == results_of(straight)


def test_two_processes_count_what_one_counts(data, straight, tmp_path):
    two = start_two(command(data, tmp_path / "run", device_batch_size=1), tmp_path / "log")
    assert [ended(process) for process in two] == [0, 0]
    assert results_of(tmp_path / "run") == recorded_in(tmp_path / "run") == results_of(straight)


@pytest.mark.parametrize("place", [("train:agree", 6), ("zs3.training.resume:write_manifest", 2)])
def test_a_killed_run_counts_every_step_once(place, data, straight, tmp_path):
    arguments = command(data, tmp_path / "run")
    assert ended(start(arguments, tmp_path / "log", partial(kill_at, *place))) == -9
    assert complete_checkpoints(tmp_path / "run" / "checkpoints")
    run = trained(arguments, tmp_path / "log")
    assert results_of(run) == recorded_in(run) == results_of(straight)
    assert equal(weights(run), weights(straight))


def test_one_process_goes_on_with_the_counts_of_two(data, straight, tmp_path):
    arguments = command(data, tmp_path / "run")
    two = start_two(arguments, tmp_path / "log", partial(kill_at, "train:agree", 6, rank="1"))
    assert 0 not in [ended(process) for process in two]
    assert complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert results_of(trained(arguments, tmp_path / "log")) == results_of(straight)


def test_a_checkpoint_without_counts_leaves_them_unknown(data, straight, tmp_path):
    """As an older version left it."""
    run = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(run / "final")
    last = complete_checkpoints(run / "checkpoints")[-1]
    state = torch.load(last / "progress.bin", weights_only=True)
    del state["label_counts"]
    torch.save(state, last / "progress.bin")
    (last / "manifest.json").unlink()
    write_manifest(last)
    trained(command(data, run), tmp_path / "log")
    assert "warning" not in (tmp_path / "log").read_text()
    assert results_of(run) == recorded_in(run) == [None, None]


def relabelled(data: Path, folder: Path, change: dict[int, int]) -> Path:
    """A copy of the data and the files beside it, with other ids in the training label maps."""
    copy = shutil.copytree(data.parent, folder) / data.name
    table = np.arange(256, dtype=np.uint8)
    table[list(change)] = list(change.values())
    for path in (copy / "train" / "labels").iterdir():
        Image.fromarray(table[np.asarray(Image.open(path))]).save(path)
    return copy


def test_the_classes_in_the_label_maps_change_the_measurement_and_nothing_else(data, straight, tmp_path):
    ids = [CLASS_NAMES.index(name) for name in UNSEEN]
    turned = relabelled(data, tmp_path / "turned", dict(zip(ids, ids[1:] + ids[:1], strict=True)))
    run = trained(command(turned, tmp_path / "turned_run"), tmp_path / "log")
    assert results_of(run) == pytest.approx(by_loops(turned, used(straight))) and results_of(run) != results_of(
        straight
    )
    void = relabelled(data, tmp_path / "void", dict.fromkeys(ids, 255))
    unknown = trained(command(void, tmp_path / "void_run"), tmp_path / "log")
    assert results_of(unknown) == recorded_in(unknown) == [None, None]
    assert equal(weights(run), weights(straight)) and equal(weights(unknown), weights(straight))


def test_an_evaluation_and_a_model_card_tell_the_quality_of_the_training_labels(data, straight, tmp_path):
    places = {"model": str(straight / "final"), "dataset": str(data), "text_embeds": str(data.parent / "text.npy")}
    evaluate(EvalArgs(**places, output=str(tmp_path / "gzs3.json"), ensemble="off"))
    precision, recall = results_of(straight)
    result = read_result(tmp_path / "gzs3.json", NAMES)
    assert [result[name] for name in NAMES] == [precision, recall]
    told = f"precision {100 * precision:.1f} %, recall {100 * recall:.1f} %"
    assert f"- image labels of unseen classes in training: {told}\n" in (tmp_path / "gzs3.md").read_text()
    config = Zs3Config.from_pretrained(straight / "final")
    assert f"for training images; never a mask (in the last training that had some: {told}).\n" in training(
        config, None, []
    )
    config.image_label_precision = config.image_label_recall = None
    assert "for training images; never a mask.\n" in training(config, None, [])


def test_a_model_has_the_quality_of_its_last_image_labels(data, straight, tmp_path):
    def next_stage(name: str, before: Path, unseen_labels: str) -> Path:
        options = {"unseen_labels": unseen_labels, "init_from": before / "final", "max_steps": 1}
        return trained(command(data, tmp_path / name, **options), tmp_path / "log")

    none = next_stage("none", straight, "none")
    assert results_of(none) == [None, None] and recorded_in(none) == results_of(straight)
    truth = next_stage("truth", none, "ground_truth")
    assert results_of(truth) == recorded_in(truth) == [1.0, 1.0]
    first = trained(command(data, tmp_path / "first", unseen_labels="none", max_steps=1), tmp_path / "log")
    assert results_of(first) == recorded_in(first) == [None, None]


def test_a_run_with_captions_has_the_quality_of_the_nouns(data, tmp_path):
    """The nouns have one unseen name. Of the six pictures, captions say it for the first three."""
    save_checkpoint(tmp_path / "start", seen_class_names=[], unseen_labels="none")
    seen = load_split(data, "train").label_space.seen
    name = max(UNSEEN, key=lambda name: sum(in_map(path, name) for path in (data / "train" / "labels").iterdir()))
    truth = [in_map(data / "train" / "labels" / f"{image_id}.png", name) for image_id in IMAGE_IDS]
    (tmp_path / "nouns").mkdir()
    said = [[0, len(seen)]] * 3 + [[0]] * 3
    write_nouns(tmp_path / "nouns" / "nouns-train.parquet", IMAGE_IDS, said)
    content = {"classes": [*seen, name], "unseen": [], "ignore_label": 255}
    (tmp_path / "nouns" / "classes.json").write_text(json.dumps(content))
    settings = {"label_space": "scenes", "label_space_sha256": load_split(data, "train").label_space.sha256}
    (tmp_path / "nouns" / "settings.json").write_text(json.dumps(settings))
    options = {"unseen_labels": None, "text_embeds": None, "caption_nouns": tmp_path / "nouns", "max_steps": 3}
    options |= {"init_from": tmp_path / "start", "word_drop_probability": 0, "backbone_norm": "frozen"}
    (tmp_path / "plain.yaml").write_text("crop_size: 64\nmax_size: 96\nnum_workers: 0\ntrain_num_points: 64\n")
    run = trained(command(data, tmp_path / "run", config=tmp_path / "plain.yaml", **options), tmp_path / "log")
    hits = sum(truth[:3])  # 3 steps of 4 images use each picture twice
    assert results_of(run) == recorded_in(run) == [hits / 3, hits / sum(truth)]


def test_the_start_of_a_training_with_image_labels_forgets_those_before():
    for kind, expected in (("none", 0.25), ("pseudo", None), ("captions", None), ("ground_truth", None)):
        config = tiny_config(text=False, seen_class_names=[], unseen_labels="pseudo", image_label_precision=0.25)
        record_supervision(config, SPACE, kind, init_from="start")
        assert config.image_label_precision == expected
