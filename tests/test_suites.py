"""Suites: from archives in their native formats to the row of the paper's table."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from archives import write_tree
from conftest import Ended
from tiny import change_json, save_checkpoint
from transformers import AutoModel, AutoProcessor

import eval as evaluation
from zs3.command_line import InputError
from zs3.convert.__main__ import ConvertArgs, convert
from zs3.convert.archives import ARCHIVES
from zs3.data.records import load_split
from zs3.evaluation.suites import SUITES, run_suite
from zs3.label_space import load_label_space

MEMBERS = SUITES["ovs5"].members


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """Small trees of all archives in their formats, converted."""
    root = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in MEMBERS:
            write_tree(root / "source" / name, name)
            small = ARCHIVES[name]._replace(counts={"train": (4,), "validation": (2,)})
            monkeypatch.setitem(ARCHIVES, name, small)
            convert(ConvertArgs(name=name, source=str(root / "source" / name), output=str(root / "data" / name)))
    return root / "data"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = save_checkpoint(folder)
    model.config.seen_class_names = ["wall", "sky"]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def suite(call) -> Callable[..., Ended]:
    return partial(call, evaluation.main)


def test_the_row_of_table_3_is_that_of_each_dataset_evaluated_alone(checkpoint, data_root, tmp_path, suite):
    words = ["--model", checkpoint, "--suite", "ovs5", "--data_root", data_root, "--output", tmp_path / "ovs5"]
    code, printed, _ = suite(*words)
    assert code == 0
    head, _, cells = printed.splitlines()[2:5]
    assert head == "| A-847 | P-459 | A-150 | PC-59 | VOC-20 |"  # VOC-21 only where it is asked for
    told = dict(zip(list(MEMBERS)[:5], re.findall(r"[\d.]+", cells), strict=True))
    for name, number in told.items():
        flags = {"model": str(checkpoint), "dataset": str(data_root / name), "setting": "ovs", "num_workers": 0}
        alone = evaluation.evaluate(evaluation.EvalArgs(**flags))
        assert number == f"{100 * alone['miou']:.1f}" and alone["num_images"] == 2
        result = json.loads((tmp_path / "ovs5" / f"{name}.json").read_text())
        assert result["per_class"] == alone["per_class"] and result["confidence_intervals"]["hiou"] == [None, None]
        with (tmp_path / "ovs5" / f"{name}.csv").open(newline="") as file:
            assert [row["class"] for row in csv.DictReader(file)] == list(alone["per_class"])
    assert len(json.loads((tmp_path / "ovs5" / "ade20k_847.json").read_text())["per_class"]) == 847
    assert (tmp_path / "ovs5" / "ovs5.md").read_text() == printed.rstrip("\n") + "\n"
    table = json.loads((tmp_path / "ovs5" / "ovs5.json").read_text())["table"]
    assert {name: f"{100 * scores['miou']:.1f}" for name, scores in table.items()} == told


def test_a_number_of_the_row_is_that_of_sets_of_pixels(checkpoint, data_root, tmp_path, suite):
    """And a folder of other names than the benchmark's says so."""
    words = ["--model", checkpoint, "--suite", "ovs5", "--members", "voc_20", "--output", tmp_path / "out"]
    _, printed, _ = suite(*words, "--data_root", data_root)
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    records = load_split(data_root / "voc_20", "validation")
    names = records.label_space.class_names
    truth, predicted = ([set() for _ in names] for _ in range(2))
    for number, (image, label, _) in enumerate(records):
        with torch.inference_mode():
            outputs = model(**processor(images=image, class_names=names))
        (found,) = processor.post_process_semantic_segmentation(outputs, [label.shape])
        for pixel in np.ndindex(*label.shape):
            if label[pixel] != 255:
                truth[label[pixel]].add((number, pixel))
                predicted[found[pixel]].add((number, pixel))
    ious = [len(t & p) / len(t | p) for t, p in zip(truth, predicted, strict=True) if t | p]
    assert printed.splitlines()[4] == f"| - | - | - | - | {100 * sum(ious) / len(ious):.1f} |"
    assert "training saw masks of 0 of them" in printed and "NOT THOSE" not in printed
    shutil.copytree(data_root / "voc_21", tmp_path / "data" / "voc_20")
    _, printed, _ = suite(*words, "--data_root", tmp_path / "data")
    assert "ITS NAMES ARE NOT THOSE OF THE BENCHMARK" in printed


def test_a_member_that_is_there_is_not_evaluated_again(checkpoint, data_root, tmp_path, suite):
    words = ["--model", checkpoint, "--suite", "ovs5", "--data_root", data_root, "--output", tmp_path]
    words += ["--members", "voc_21", "voc_20"]
    _, first, _ = suite(*words)
    assert first.splitlines()[2] == "| A-847 | P-459 | A-150 | PC-59 | VOC-20 | VOC-21 |"
    assert "- A-847: not evaluated, not asked for" in first
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("voc_*")}
    assert len(times) == 8  # .json, .md, .csv, .npz of each
    _, second, _ = suite(*words)
    assert second == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("voc_*")} == times
    suite(*words, "--absent", "truth")
    changed = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("voc_*")}
    assert all(changed[name] != times[name] for name in times)
    shutil.copytree(checkpoint, tmp_path / "model")  # other weights, or the same with another temperature, are others
    words[1] = tmp_path / "model"
    suite(*words)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("voc_*")}
    change_json(tmp_path / "model" / "config.json", class_temperature=0.5)
    suite(*words)
    assert all(path.stat().st_mtime_ns != times[path.name] for path in tmp_path.glob("voc_*"))


def test_what_a_checkpoint_cannot_claim_has_its_reason(checkpoint, data_root, tmp_path, suite):
    words = ["--model", checkpoint, "--suite", "gzs3", "--data_root", data_root, "--output", tmp_path]
    code, printed, _ = suite(*words)
    assert code == 0 and printed.splitlines()[4] == "| - | - | - | - | - | - |"
    assert "- COCO-Stuff: not evaluated, no such folder" in printed
    assert "- VOC-20: not evaluated, the checkpoint saw no masks of 'aeroplane'" in printed
    assert not list(tmp_path.glob("voc_20*"))


def test_the_row_of_table_2_has_three_scores(checkpoint, data_root, tmp_path, suite):
    shutil.copytree(checkpoint, tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", seen_class_names=load_label_space("voc_20").seen)
    words = ["--model", tmp_path / "model", "--suite", "gzs3", "--data_root", data_root, "--output", tmp_path / "out"]
    code, printed, _ = suite(*words)
    result = json.loads((tmp_path / "out" / "voc_20.json").read_text())
    scores = [f"{100 * result[name]:.1f}" for name in ("miou_seen", "miou_unseen", "hiou")]
    assert code == 0 and printed.splitlines()[4] == f"| - | - | - | {' | '.join(scores)} |"
    assert result["setting"] == "gzs3" and len(result["unseen"]) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "ovs5", "--data_root", "."], "--output is missing"),
        (["--suite", "ovs5", "--output", "o"], "--data_root is missing"),
        (["--suite", "ovs5", "--data_root", ".", "--output", "o"], "none of the folders"),
        (["--suite", "ovs5", "--data_root", ".", "--output", "o", "--members", "voc"], "got 'voc'"),
        (["--suite", "ovs5", "--data_root", ".", "--output", "o", "--members", "voc_20"], "no folder voc_20"),
        (["--suite", "ovs5", "--data_root", ".", "--output", "o", "--dataset", "d"], "--dataset does not go with"),
        (["--dataset", "d", "--members", "voc_20"], "--members goes with --suite"),
    ],
)
def test_a_suite_that_cannot_be_is_one_line(words, message, checkpoint, tmp_path, monkeypatch, suite):
    monkeypatch.chdir(tmp_path)
    assert message in suite("--model", checkpoint, *words).refusal
    assert not list(tmp_path.iterdir())


def test_text_vectors_of_a_suite_lie_in_a_folder(data_root, tmp_path):
    save_checkpoint(tmp_path / "model", text=False)
    (tmp_path / "text").mkdir()
    np.save(tmp_path / "text" / "voc_20.npy", np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32))
    args = evaluation.EvalArgs(
        model=str(tmp_path / "model"),
        suite="ovs5",
        data_root=str(data_root),
        members=["voc_20"],
        output=str(tmp_path / "out"),
        text_embeds=str(tmp_path / "text"),
    )
    assert "| - | - | - | - |" in run_suite(args, evaluation.evaluate, Accelerator())
    args.members = ["voc_21"]
    with pytest.raises(InputError, match="voc_21.npy"):
        run_suite(args, evaluation.evaluate, Accelerator())
