"""zs3.check: what it counts, and that no problem of a dataset escapes it."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Ended
from PIL import Image
from test_data import SPACE, random_sample, write_folder

from zs3.data.check import main
from zs3.label_space import LabelSpace


@pytest.fixture
def check(call):
    """check(folder, *words, code=0) checks a training split, with this exit code; returns what it printed."""

    def check(folder: Path, *words: str, code: int = 0) -> Ended:
        ended = call(main, "--dataset", folder, "--splits", "train", *words)
        assert ended.code == code, ended
        return ended

    return check


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_are_those_of_the_maps(tmp_path, check, workers):
    samples = {f"p{index}": random_sample(index, (9, 7), ids) for index, ids in enumerate([(0, 4, 255), (255,), (2,)])}
    write_folder(tmp_path / "data", samples)
    words = ["--output", str(tmp_path / "check.json"), "--num_workers", str(workers)]
    printed = check(tmp_path / "data", *words).out
    found = json.loads((tmp_path / "check.json").read_text())["splits"]["train"]
    labels = np.stack([label for _, label in samples.values()])
    for index, name in enumerate(SPACE.class_names):
        assert found["pixels"][name] == (labels == index).sum()
        assert found["images"][name] == (labels == index).any(axis=(1, 2)).sum()
    assert (found["num_images"], found["images_without_labels"], found["problems"]) == (3, 1, [])
    assert "3 images, 1 of them without a label" in printed and "cow (unseen)" in printed


def test_every_problem_is_a_line_and_the_exit_code_is_2(tmp_path, check):
    write_folder(tmp_path, {f"p{index}": random_sample(index) for index in range(4)})
    (tmp_path / "train" / "images" / "p0.png").write_bytes(b"no picture")
    Image.new("L", (16, 16), 77).save(tmp_path / "train" / "labels" / "p1.png")
    Image.new("L", (8, 16)).save(tmp_path / "train" / "labels" / "p3.png")
    printed = check(tmp_path, code=2)
    problems = [line for line in printed.out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3
    for line, words in zip(problems, ("p0.png", "p1.png holds id 77", "p3.png is 8 x 16"), strict=True):
        assert words in line
    assert printed.err.splitlines()[-1].startswith("error: 3 problems in ")


def test_rotated_photographs_are_noted_and_a_split_without_labels_is_a_problem(tmp_path, check):
    write_folder(tmp_path, {f"p{index}": random_sample(index, ids=(255,)) for index in range(2)}, suffix=".jpg")
    file = tmp_path / "train" / "images" / "p1.jpg"
    turned = Image.Exif()
    turned[274] = 3
    Image.open(file).save(file, exif=turned)
    printed = check(tmp_path, code=2).out
    assert "note: 1 pictures of train have an EXIF rotation (p1)" in printed
    assert "problem: every pixel of every picture is ignored" in printed


def test_masks_of_0_and_255_are_a_problem_where_255_is_ignored(tmp_path, check):
    write_folder(tmp_path, {f"p{index}": random_sample(index, ids=(0, 255)) for index in range(3)})
    said = "the 3 label maps hold nothing but 'sky' and the ignored id 255: does 255 mean the object?"
    assert f"problem: {said}" in check(tmp_path, code=2).out
    (tmp_path / "train").rename(tmp_path / "validation")
    assert f"note: validation: {said}" in check(tmp_path, "--splits", "validation").out
    write_folder(tmp_path, {"p3": random_sample(3, ids=(0, 2, 255))})
    printed = check(tmp_path).out
    assert "note" not in printed and "problem" not in printed


def test_a_training_split_without_a_seen_class_is_a_problem(tmp_path, check):
    space = LabelSpace(SPACE.class_names, SPACE.class_names, 255)
    write_folder(tmp_path, {"a": random_sample(0)}, space)
    assert "so no seen class to train on" in check(tmp_path, code=2).out


def test_a_record_that_cannot_be_read_is_a_line_and_the_others_are_counted(tmp_path, monkeypatch, check):
    """Every way in which a record can be broken, in one dataset."""
    import pyarrow
    import pyarrow.parquet

    write_folder(tmp_path / "a", {"ok": random_sample(0)})
    image, label = ((tmp_path / "a" / "train" / kind / "ok.png").read_bytes() for kind in ("images", "labels"))
    good = {"bytes": image, "path": None}, {"bytes": label, "path": None}
    rows = [
        good,
        ({"bytes": None, "path": None}, good[1]),
        (good[0], None),
        ({"bytes": b"", "path": None}, good[1]),
        ({"bytes": image[:-30], "path": None}, good[1]),
        (good[0], {"bytes": label[:60] + b"x" + label[61:], "path": None}),
        ({"bytes": None, "path": "/dev/zero"}, good[1]),
        ({"bytes": None, "path": str(tmp_path)}, good[1]),
        (good[0], {"bytes": None, "path": str(tmp_path / "nowhere.png")}),
        (good[0], good[0]),
    ]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = [pyarrow.array([row[place] for row in rows], kind) for place in (0, 1)]
    table = pyarrow.table([*columns, list(map(str, range(len(rows))))], ["image", "label", "image_id"])
    (tmp_path / "b" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "b" / "data" / "train-0.parquet")
    (tmp_path / "b" / "classes.json").write_bytes((tmp_path / "a" / "classes.json").read_bytes())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    printed = check(tmp_path / "b", code=2)
    problems = [line for line in printed.out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == len(rows) - 1
    assert all(f"'{number}'" in line for number, line in enumerate(problems, start=1))
    assert f"error: {len(rows) - 1} problems" in printed.err
