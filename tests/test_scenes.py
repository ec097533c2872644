"""The embedded benchmark: what its pictures, labels and folders promise."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import world
from zs3.__main__ import main
from zs3.command_line import InputError
from zs3.label_space import load_label_space
from zs3.scenes import render
from zs3.scenes.crops import HELD_OUT_SCENES, TRAIN_SCENES
from zs3.scenes.dataset import TEST_SCENES, scene_files, world_space, write_dataset
from zs3.scenes.render import CLASS_NAMES, IGNORE_INDEX, STUFF, UNSEEN, render_scene

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def some_scenes() -> list[render.Scene]:
    return [render_scene(3, index) for index in range(250)]


def test_a_seed_and_an_index_name_one_picture():
    first, again, other = render_scene(0, 5), render_scene(0, 5), render_scene(1, 5)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (128, 128, 3) and first.image.dtype == np.uint8
    assert first.label.shape == (128, 128) and first.label.dtype == np.uint8


def test_the_regions_own_the_pixels_that_the_labels_name(some_scenes):
    for scene in some_scenes[:60]:
        names = np.array([region.name for region in scene.regions])[scene.owner]
        for number, name in enumerate(CLASS_NAMES):
            assert np.array_equal(scene.label == number, names == name)


SPLITS = [load_label_space(f"scenes:{number}").unseen for number in range(12)]


def test_twelve_class_splits_are_balanced_and_different():
    assert UNSEEN == SPLITS[0] == load_label_space("scenes").unseen
    assert len({frozenset(unseen) for unseen in SPLITS}) == 12
    times = [sum(name in unseen for unseen in SPLITS) for name in CLASS_NAMES]
    assert set(times[:8]) == {3} and set(times[8:]) <= {4, 5}


@pytest.mark.parametrize("unseen", SPLITS)
def test_a_split_has_eight_unseen_classes_made_of_seen_words(unseen):
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 24 and len(unseen) == 8
    stuff, things = CLASS_NAMES[:8], CLASS_NAMES[8:]
    assert stuff == render.STUFF and things == render.THINGS
    assert len(set(stuff) & set(unseen)) == 2
    seen_words = {word for name in set(things) - set(unseen) for word in name.split()}
    assert {word for name in set(things) & set(unseen) for word in name.split()} <= seen_words


def test_the_wide_space_holds_all_names_but_those_of_distractors():
    wide = load_label_space("scenes_90")
    assert wide.class_names[:24] == CLASS_NAMES and len(wide.class_names) == 90
    assert set(wide.class_names) == set(render.WORLD_NAMES) - set(render.DISTRACTORS)
    assert set(wide.things) == {name for name in wide.class_names if name not in render.TEXTURES}
    assert [load_label_space(f"scenes_90:{number}").unseen for number in range(12)] == SPLITS


def test_no_scene_shows_a_name_beside_the_classes_and_the_distractors(some_scenes):
    drawn = {region.name for scene in some_scenes for region in scene.regions}
    assert drawn == {*CLASS_NAMES, *render.DISTRACTORS}


@pytest.mark.parametrize("unseen", SPLITS)
def test_an_ignored_pixel_is_unseen_in_sixty_percent_or_less(unseen, some_scenes):
    labels = np.stack([scene.label for scene in some_scenes])
    hidden = np.isin(labels, [CLASS_NAMES.index(name) for name in unseen]).sum()
    assert 0.4 < hidden / (hidden + (labels == IGNORE_INDEX).sum()) <= 0.6


def test_labels_lie_on_what_the_picture_shows(some_scenes):
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        ids = [number for number, name in enumerate(CLASS_NAMES) if name.startswith(colour)]
        pixels = np.concatenate([scene.image[np.isin(scene.label, ids)] for scene in some_scenes]).astype(int)
        others = np.delete(pixels, channel, axis=1)
        assert (pixels[:, channel] > others.max(axis=1)).mean() > 0.98


def test_distractors_are_ignored_and_nothing_else_is(some_scenes):
    with_distractor = [any(region.name not in CLASS_NAMES for region in scene.regions) for scene in some_scenes]
    has_ignored = [bool((scene.label == IGNORE_INDEX).any()) for scene in some_scenes]
    assert 0.8 < np.mean(with_distractor) < 0.95
    assert sum(ignored and not drawn for ignored, drawn in zip(has_ignored, with_distractor, strict=True)) == 0
    assert sum(has_ignored) > 0.95 * sum(with_distractor)  # a later thing may hide one


def test_every_labelled_pixel_lies_in_a_box_of_its_class(some_scenes):
    for _, label, regions, _ in some_scenes[:60]:
        for number in np.setdiff1d(np.unique(label), [IGNORE_INDEX]):
            inside = np.zeros_like(label, dtype=bool)
            for name, (x0, y0, x1, y1) in regions:
                inside[y0:y1, x0:x1] |= name == CLASS_NAMES[number]
            assert inside[label == number].all()


def test_a_scene_has_two_or_three_bands_and_three_to_eight_things(some_scenes):
    for scene in some_scenes:
        bands = [region for region in scene.regions if region.name in render.TEXTURES]
        assert 2 <= len(bands) <= 3 and 3 <= len(scene.regions) - len(bands) <= 8


def test_every_class_is_common_and_an_unseen_label_is_in_most_pictures(some_scenes):
    present = np.stack([np.isin(np.arange(24), scene.label) for scene in some_scenes])
    assert present.mean(axis=0).min() > 0.1
    for unseen in SPLITS:
        assert 0.7 < present[:, [CLASS_NAMES.index(name) for name in unseen]].any(axis=1).mean() < 0.98


def test_things_stand_mostly_with_the_stuff_of_their_themes(some_scenes):
    for theme in render.THEMES:
        bands = {name for stack in theme.bands for name in stack}
        shares = {True: [], False: []}  # by whether all stuff is of the theme
        for scene in some_scenes:
            names = [region.name for region in scene.regions]
            things = [name in theme.things for name in names if name in render.THINGS]
            shares[bands >= {*names} & {*STUFF}].append(np.mean(things))
        assert np.mean(shares[True]) > 1.2 * np.mean(shares[False])


def test_things_survive_a_stride_of_four(some_scenes):
    cells = [(scene.label == number)[::4, ::4].sum() for scene in some_scenes
             for number in np.unique(scene.label) if 8 <= number < 24]  # fmt: skip
    assert np.mean(np.array(cells) >= 6) > 0.95


def test_no_two_shapes_look_alike():
    def silhouette(shape: str, seed: int) -> np.ndarray:
        canvas = np.zeros((128, 128, 3), dtype=np.float32)
        return render.paint_thing(np.random.default_rng(seed), canvas, f"red {shape}", 32, 64, 64)

    for seed in range(5):
        masks = [silhouette(shape, seed) for shape in render.OUTLINES]
        overlap = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
        assert max(overlap) < 0.85


def test_a_folder_holds_what_render_scene_draws(tmp_path):
    write_dataset(tmp_path / "set", num_train=5, num_validation=3, seed=7, num_test=2, label_space="scenes:3")
    files = sorted(str(path.relative_to(tmp_path / "set")) for path in tmp_path.rglob("*") if path.is_file())
    sizes = {"test": 2, "train": 5, "validation": 3}
    expected = [
        f"{split}/{kind}/{number:05d}.png"
        for split, count in sizes.items()
        for kind in ("images", "labels")
        for number in range(count)
    ]
    assert files == ["classes.json", *expected]
    for split, scene in {"train": render_scene(7, 4), "test": render_scene(TEST_SCENES + 7, 1)}.items():
        name = f"{sizes[split] - 1:05d}.png"
        picture, label = (Image.open(tmp_path / "set" / split / kind / name) for kind in ("images", "labels"))
        assert picture.mode == "RGB" and label.mode == "L"
        assert np.array_equal(picture, scene.image) and np.array_equal(label, scene.label)
    assert load_label_space(tmp_path / "set") == load_label_space("scenes:3")
    classes = json.loads((tmp_path / "set" / "classes.json").read_text())
    assert (classes["name"], classes["unseen"]) == ("scenes:3", SPLITS[3])


def test_a_dataset_named_scenes_in_the_working_directory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset("scenes", num_train=1, num_validation=1, seed=0, label_space="scenes_90")
    for space in ("scenes", "scenes:3"):
        assert world_space(space).class_names == CLASS_NAMES
    assert world_space("scenes_90:3").unseen == world_space("scenes:3").unseen == SPLITS[3]


def test_no_split_has_a_scene_of_another_or_depends_on_its_size():
    few, more = scene_files(2, 2, 2, seed=0), scene_files(6, 5, 4, seed=0)
    assert set(few) < set(more)
    highest = 2**32 - 1  # of --seed
    scenes = [(file.seed, file.index) for seed in (0, 1, highest) for file in scene_files(10, 10, 10, seed)]
    assert len(set(scenes)) == len(scenes)
    held_out = {HELD_OUT_SCENES, *(TRAIN_SCENES + seed for seed in (0, 1))}
    assert held_out.isdisjoint(seed for seed, _ in scenes)


def test_several_processes_of_the_command_draw_the_same_pictures(tmp_path):
    sizes = ["--num_train", "510", "--num_validation", "1", "--num_test", "0"]
    words = ["scenes", "--output", "large", *sizes, "--seed", "2"]
    subprocess.run([sys.executable, "-m", "zs3", *words], cwd=tmp_path, check=True)
    for number in (0, 37, 509):
        drawn = np.asarray(Image.open(tmp_path / "large" / "train" / "images" / f"{number:05d}.png"))
        assert np.array_equal(drawn, render_scene(2, number).image)


def test_a_drawing_process_loads_neither_torch_nor_transformers():
    """A process that is spawned imports the main module and the one that draws."""
    code = "import sys, zs3.__main__, zs3.scenes.render; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="exists already"):
        write_dataset(tmp_path / "mine", num_train=1, num_validation=1, seed=0)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"


def test_a_stopped_run_leaves_no_folder_of_that_name(tmp_path, monkeypatch):
    calls = []

    def stop_at_the_third(*job: int) -> render.Scene:
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return render_scene(*job)

    monkeypatch.setattr(render, "render_scene", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "set", num_train=5, num_validation=1, seed=0)
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    write_dataset(tmp_path / "set", num_train=1, num_validation=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "exists already"),
        (["--seed", str(2**32)], "--seed"),
        (["--num_train", "x" * 9999], "--num_train"),
        (["--num_validation", str(10**6 + 1)], "--num_validation"),
        (["--num_test", "-1"], "--num_test"),
        (["--label_space", "voc_20"], "scenes or scenes_90"),
        (["--label_space", "scenes:12"], "a split, 0 to 11"),
        (["--label_space", "scenes:" + "9" * 9999], "a split, 0 to 11"),
    ],
)
def test_bad_input_of_the_command_is_one_line_and_exit_code_2(flags, word, tmp_path, call):
    ended = call(main, "scenes", "--output", tmp_path, *flags)
    assert word in ended.refusal and ended.err.count("\n") == 1 and len(ended.err) < 210


# ---- what the world shows -----------------------------------------------------------------------------------


def test_the_counts_of_the_world_equal_those_of_the_scenes(tmp_path, call):
    write_dataset(tmp_path / "set", num_train=9, num_validation=1, seed=0, label_space="scenes_90")
    words = ["--dataset", tmp_path / "set", "--output", tmp_path / "world.json", "--sheet", tmp_path / "sheet.png"]
    assert call(world.main, *words).code == 0
    labels = np.stack([render_scene(0, index).label for index in range(9)])
    result = json.loads((tmp_path / "world.json").read_text())
    assert [row["class"] for row in result["classes"]] == CLASS_NAMES
    for number, row in enumerate(result["classes"]):
        assert row["pixels"] == pytest.approx((labels == number).mean())
        assert row["pictures"] == pytest.approx((labels == number).any(axis=(1, 2)).mean())
        assert (row["kind"] == "thing") == (row["class"] in render.THINGS)
    for row, unseen in zip(result["splits"], SPLITS, strict=True):
        own = np.stack([labels == CLASS_NAMES.index(name) for name in unseen], axis=1)  # (pictures, unseen, H, W)
        ignored = own.any(axis=1) | (labels == IGNORE_INDEX)
        assert row["unseen"] == ", ".join(unseen)
        assert row["unseen_of_ignored"] == pytest.approx(own.any(axis=1).sum() / ignored.sum())
        assert row["ignored_pixels"] == pytest.approx(ignored.mean())
        count = own.any(axis=(2, 3)).sum(axis=1)
        assert row["labels_per_picture"] == pytest.approx(count.mean())
        assert (row["one_label"], row["no_label"]) == pytest.approx(((count == 1).mean(), (count == 0).mean()))
    first, ninth = (Image.open(tmp_path / "sheet.png").crop(box) for box in ((0, 0, 128, 128), (0, 132, 128, 260)))
    assert np.array_equal(first, render_scene(0, 0).image) and np.array_equal(ninth, render_scene(0, 8).image)


def test_another_dataset_is_no_world(tmp_path, call):
    write_dataset(tmp_path / "set", num_train=1, num_validation=1, seed=0)
    classes = {"classes": ["sky"], "unseen": [], "ignore_label": 255}
    (tmp_path / "set" / "classes.json").write_text(json.dumps(classes))
    assert "has other classes" in call(world.main, "--dataset", tmp_path / "set").refusal
