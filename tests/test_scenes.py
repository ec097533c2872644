"""The embedded benchmark: what its pictures, labels and folders promise."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zs3.__main__ import main
from zs3.command_line import InputError
from zs3.label_space import CLASSES_FOLDER
from zs3.scenes import render
from zs3.scenes.dataset import write_dataset
from zs3.scenes.render import CLASS_NAMES, IGNORE_INDEX, UNSEEN, render_scene

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def some_scenes() -> list[render.Scene]:
    return [render_scene(3, index) for index in range(250)]


def test_a_seed_and_an_index_name_one_picture():
    first, again, other = render_scene(0, 5), render_scene(0, 5), render_scene(1, 5)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (96, 96, 3) and first.image.dtype == np.uint8
    assert first.label.shape == (96, 96) and first.label.dtype == np.uint8


def test_five_of_twenty_classes_are_unseen_and_made_of_seen_words():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 20 and len(UNSEEN) == 5
    stuff, things = CLASS_NAMES[:7], CLASS_NAMES[7:]
    assert len(set(stuff) & set(UNSEEN)) == 1
    seen_words = {word for name in set(things) - set(UNSEEN) for word in name.split()}
    assert {word for name in set(things) & set(UNSEEN) for word in name.split()} <= seen_words


def test_no_word_of_a_distractor_is_a_word_of_a_class():
    words = {word for name in CLASS_NAMES for word in name.split()}
    assert words.isdisjoint(word for name in render.DISTRACTORS for word in name.split())


def test_labels_lie_on_what_the_picture_shows(some_scenes):
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        ids = [number for number, name in enumerate(CLASS_NAMES) if name.startswith(colour)]
        pixels = np.concatenate([image[np.isin(label, ids)] for image, label, _ in some_scenes]).astype(int)
        others = np.delete(pixels, channel, axis=1)
        assert (pixels[:, channel] > others.max(axis=1)).mean() > 0.98


def test_distractors_are_ignored_and_nothing_else_is(some_scenes):
    with_distractor = [any(region.name not in CLASS_NAMES for region in scene.regions) for scene in some_scenes]
    has_ignored = [bool((scene.label == IGNORE_INDEX).any()) for scene in some_scenes]
    assert 0.3 < np.mean(with_distractor) < 0.7
    assert sum(ignored and not drawn for ignored, drawn in zip(has_ignored, with_distractor, strict=True)) == 0
    assert sum(has_ignored) > 0.95 * sum(with_distractor)  # a later thing may hide one


def test_every_labelled_pixel_lies_in_a_box_of_its_class(some_scenes):
    for _, label, regions in some_scenes[:60]:
        for number in np.setdiff1d(np.unique(label), [IGNORE_INDEX]):
            inside = np.zeros_like(label, dtype=bool)
            for name, (x0, y0, x1, y1) in regions:
                inside[y0:y1, x0:x1] |= name == CLASS_NAMES[number]
            assert inside[label == number].all()


def test_a_scene_has_two_or_three_stuffs_and_two_to_five_things(some_scenes):
    for scene in some_scenes:
        stuff = [region for region in scene.regions if region.name in render.STUFF]
        things = [region for region in scene.regions if region.name in render.THINGS]
        assert 2 <= len(stuff) <= 3 and 2 <= len(things) <= 5


def test_every_class_is_common_and_an_unseen_label_is_in_most_pictures(some_scenes):
    present = np.stack([np.isin(np.arange(20), scene.label) for scene in some_scenes])
    assert present.mean(axis=0).min() > 0.05
    unseen = [CLASS_NAMES.index(name) for name in UNSEEN]
    assert 0.6 < present[:, unseen].any(axis=1).mean() < 0.95


def test_an_unseen_thing_stands_beside_its_relatives(some_scenes):
    present = np.stack([np.isin(np.arange(20), scene.label) for scene in some_scenes])
    relatives = {"red square": "red circle", "yellow heart": "yellow star", "striped star": "striped square",
                 "blue circle": "stone wall"}  # fmt: skip
    for name, relative in relatives.items():
        has = present[:, CLASS_NAMES.index(name)]
        with_relative = present[:, CLASS_NAMES.index(relative)]
        assert with_relative[has].mean() > 2 * with_relative[~has].mean()


def test_things_survive_a_stride_of_four(some_scenes):
    cells = [(label == number)[::4, ::4].sum() for _, label, _ in some_scenes
             for number in np.unique(label) if 7 <= number < 20]  # fmt: skip
    assert np.mean(np.array(cells) >= 6) > 0.95


def test_no_two_shapes_look_alike():
    def silhouette(shape: str, seed: int) -> np.ndarray:
        canvas = np.zeros((96, 96, 3), dtype=np.float32)
        return render.paint_thing(np.random.default_rng(seed), canvas, f"red {shape}", 24, 48, 48)

    for seed in range(5):
        masks = [silhouette(shape, seed) for shape in render.OUTLINES]
        overlap = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
        assert max(overlap) < 0.85


def test_a_folder_holds_what_render_scene_draws(tmp_path):
    write_dataset(tmp_path / "set", num_train=5, num_validation=3, seed=7)
    files = sorted(str(path.relative_to(tmp_path / "set")) for path in tmp_path.rglob("*") if path.is_file())
    train = [f"train/{kind}/{number:05d}.png" for kind in ("images", "labels") for number in range(5)]
    validation = [f"validation/{kind}/{number:05d}.png" for kind in ("images", "labels") for number in range(3)]
    assert files == ["classes.json", *train, *validation]
    picture, label = (Image.open(tmp_path / "set" / "train" / kind / "00004.png") for kind in ("images", "labels"))
    assert picture.mode == "RGB" and label.mode == "L"
    scene = render_scene(7, 4)
    assert np.array_equal(picture, scene.image) and np.array_equal(label, scene.label)
    classes = json.loads((tmp_path / "set" / "classes.json").read_text())
    assert classes == {"name": "scenes", "classes": CLASS_NAMES, "unseen": UNSEEN, "ignore_label": 255}


def test_validation_scenes_do_not_depend_on_the_number_of_training_scenes_and_are_none_of_them(tmp_path):
    write_dataset(tmp_path / "few", num_train=2, num_validation=2, seed=0)
    write_dataset(tmp_path / "more", num_train=6, num_validation=2, seed=0)
    few, more = (
        [(tmp_path / name / "validation" / "images" / f"{n:05d}.png").read_bytes() for n in range(2)]
        for name in ("few", "more")
    )
    assert few == more
    train = {path.read_bytes() for path in (tmp_path / "more" / "train" / "images").iterdir()}
    assert train.isdisjoint(more)


def test_several_processes_of_the_command_draw_the_same_pictures(tmp_path):
    words = ["scenes", "--output", "large", "--num_train", "510", "--num_validation", "1", "--seed", "2"]
    subprocess.run([sys.executable, "-m", "zs3", *words], cwd=tmp_path, check=True)
    for number in (0, 37, 509):
        drawn = np.asarray(Image.open(tmp_path / "large" / "train" / "images" / f"{number:05d}.png"))
        assert np.array_equal(drawn, render_scene(2, number).image)


def test_a_drawing_process_loads_neither_torch_nor_transformers():
    """A process that is spawned imports the main module and the one that draws."""
    code = "import sys, zs3.__main__, zs3.scenes.render; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_classes_of_the_package_are_those_that_are_drawn():
    content = json.loads((CLASSES_FOLDER / "scenes.json").read_text(encoding="utf-8"))
    assert content["classes"] == CLASS_NAMES
    assert (content["unseen"], content["ignore_label"]) == (UNSEEN, IGNORE_INDEX)


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
    ],
)
def test_bad_input_of_the_command_is_one_line_and_exit_code_2(flags, word, tmp_path, call):
    ended = call(main, "scenes", "--output", tmp_path, *flags)
    assert word in ended.refusal and ended.err.count("\n") == 1 and len(ended.err) < 210
