"""zs3.doctor: what it says of runs and checkpoints, and each damage by its name."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import begin, ended, wait_for
from safetensors.torch import load_file, save_file
from tiny import CLASS_NAMES, change_json, save_checkpoint
from tiny_run import flags, write_data

import train
from zs3.command_line import InputError
from zs3.doctor import examine, main
from zs3.files import lock_folder
from zs3.training.resume import write_manifest

ROOT = Path(__file__).parents[1]
FIXTURE = Path(__file__).parent / "fixtures" / "c24e825.zip"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run with two states, its data, and a checkpoint with both towers; nothing changes them."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags(data, folder / "run", max_steps=4, checkpointing_steps=2)])
        train.main()
    record = {"seen_class_names": CLASS_NAMES[:2], "unseen_labels": "pseudo"}
    record |= {"image_label_precision": 0.7514, "image_label_recall": 0.5}
    save_checkpoint(folder / "checkpoint", seed=1, vision=True, **record)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """Its own copy, for a test to damage; the run's recipe still names the data of `whole`."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def said(folder: Path) -> str:
    found = examine(folder)
    assert found.problems == []
    return "\n".join(found.lines)


CHECKPOINT_SAYS = (
    "resnet backbone, 5 queries, vectors of 12, text and image towers of CLIP",
    "masks of 2 classes: sky, grass",
    "pseudo image labels of unseen classes",
    "in the last training that had some: precision 75.1 %, recall 50.0 %",
    "a vocabulary of 4 classes: sky, grass, red circle, blue square; masks of 2 of them were seen",
    "all of them finite",
    "that of this project",
)
RUN_SAYS = (
    "it has a final model",
    "label space of 24 classes, 8 of them unseen",
    "6 pictures; sha256 of image_ids ",
    "compared with the stamp; not compared: towers_sha256",
    "step_00000002, whole",
    "step_00000004, whole",
    "the last of step 4",
    "masks of 16 classes",
    "no image labels of unseen classes",
)


@pytest.mark.parametrize(("folder", "expected"), [("checkpoint", CHECKPOINT_SAYS), ("run", RUN_SAYS)])
def test_what_is_whole_is_described(whole, folder, expected):
    text = said(whole / folder)
    for words in expected:
        assert words in text, words


def test_what_an_older_version_left_is_whole(tmp_path, monkeypatch):
    shutil.unpack_archive(FIXTURE, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = said(Path("run"))
    assert "its command resumes after step 3" in text and "none: made by an older version" in text
    assert "not that of this project" in said(Path("checkpoint"))


def replace_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(path), name: tensor}, path, {"format": "pt"})


def spoil(path: Path, name: str, value: float) -> None:
    tensor = load_file(path)[name].clone()
    tensor.view(-1)[0] = value
    replace_tensor(path, name, tensor)


WEIGHT = "class_projection.0.weight"
OF_A_CHECKPOINT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight that is no number": (
        lambda c: spoil(c / "model.safetensors", WEIGHT, torch.nan),
        f"{WEIGHT} holds 1 NaN",
    ),
    "a stored vector of zeros": (
        lambda c: replace_tensor(c / "model.safetensors", "vocabulary", torch.zeros(4, 12)),
        "text vectors have no direction",
    ),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), "tokenizer"),
    "no processor": (lambda c: (c / "processor_config.json").unlink(), "processor"),
    "half of the weights": (lambda c: (c / "model.safetensors").write_bytes(b"half"), "model.safetensors"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors"),
    "names that are one": (
        lambda c: change_json(c / "config.json", class_names=["sky", "grass", "Sky", "sea"]),
        "'sky' and 'Sky' are one name",
    ),
    "names that the tokens do not tell apart": (
        lambda c: change_json(c / "config.json", class_names=["a-b", "grass", "a - b", "sea"]),
        "'a-b' and 'a - b' become the same tokens",
    ),
    "a blank seen name": (
        lambda c: change_json(c / "config.json", seen_class_names=["sky", " "]),
        "seen names: a name",
    ),
    "a setting of a wrong kind": (lambda c: change_json(c / "config.json", num_queries="many"), "num_queries"),
    "another model": (lambda c: change_json(c / "config.json", model_type="bert"), "'bert'"),
    "a configuration cut off": (lambda c: (c / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("damage", OF_A_CHECKPOINT)
def test_a_damaged_checkpoint_has_its_damage_named(damage, copy):
    change, words = OF_A_CHECKPOINT[damage]
    change(copy / "checkpoint")
    problems = examine(copy / "checkpoint").problems
    assert any(words in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def forget(run_folder: Path) -> None:
    names = json.loads((run_folder / "final" / "config.json").read_text())["seen_class_names"]
    change_json(run_folder / "final" / "config.json", seen_class_names=names[1:])


def restamp(run_folder: Path, **record: object) -> None:
    for path in [run_folder / "stamp.json", *run_folder.glob("checkpoints/*/stamp.json")]:
        change_json(path, **record)
    certify(run_folder)


def certified(run_folder: Path, weights: bytes) -> None:
    (run_folder / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(weights)
    certify(run_folder)


def certify(run_folder: Path) -> None:
    """Writes manifests that fit the files of the states."""
    for state in run_folder.glob("checkpoints/*"):
        (state / "manifest.json").unlink()
        write_manifest(state)


OF_A_RUN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a state with a flipped file": (
        lambda r: (r / "checkpoints" / "step_00000002" / "optimizer.bin").write_bytes(b"x"),
        "optimizer.bin has 1 bytes",
    ),
    "a state without its manifest": (
        lambda r: (r / "checkpoints" / "step_00000004" / "manifest.json").unlink(),
        "manifest.json is missing",
    ),
    "an empty recipe": (lambda r: (r / "recipe.yaml").write_text(""), "recipe.yaml is no recipe"),
    "a stamp cut off": (lambda r: (r / "stamp.json").write_text("{"), "stamp.json is no JSON"),
    "a stamp changed by hand": (
        lambda r: change_json(r / "stamp.json", seen_class_names=["grass"]),
        "stamp.json differs from the copy in step_00000004, which is used",
    ),
    "a damaged line of metrics": (
        lambda r: (r / "metrics.jsonl").write_text('oops\n{"step": 4, "loss": 1.0}\n'),
        "1 lines are damaged",
    ),
    "a loss that is no number": (
        lambda r: (r / "metrics.jsonl").write_text('{"step": 4, "loss": null}\n'),
        "the loss of step 4 is no number",
    ),
    "a final model that forgot what was seen": (forget, "it saw masks of 1 classes: grass"),
    "a final model that forgot which image labels it was given": (
        lambda r: restamp(r, unseen_labels="ground_truth"),
        "training had ground-truth image labels",
    ),
    "a final model that claims what the stamp does not know": (
        lambda r: restamp(r, seen_class_names=None, unseen_labels=None),
        "final/ says less than the run's stamp",
    ),
    "weights of a state that are none, under a manifest that fits": (
        lambda r: certified(r, b"x" * 20),
        "deserializing header",
    ),
    "a final model with a weight that is no number": (
        lambda r: spoil(r / "final" / "model.safetensors", WEIGHT, torch.inf),
        f"{WEIGHT} holds 1 NaN or infinite",
    ),
}


@pytest.mark.parametrize("damage", OF_A_RUN)
def test_a_damaged_run_has_its_damage_named(damage, copy):
    change, words = OF_A_RUN[damage]
    change(copy / "run")
    problems = examine(copy / "run").problems
    assert any(words in problem for problem in problems), problems


def test_data_that_have_changed_are_named(copy):
    recipe = (copy / "run" / "recipe.yaml").read_text()
    moved = copy / "data" / "scenes"
    lines = [f"dataset: {moved}" if line.startswith("dataset:") else line for line in recipe.splitlines()]
    (copy / "run" / "recipe.yaml").write_text("\n".join(lines))
    assert "compared with the stamp" in said(copy / "run")
    change_json(moved / "classes.json", unseen=[])
    (problem,) = examine(copy / "run").problems
    assert "was unseen, is seen now" in problem
    shutil.rmtree(moved)
    (line,) = [line for line in said(copy / "run").splitlines() if "not compared:" in line]
    assert "label_space" in line and "num_images" in line and "picture_sizes_sha256" in line


def test_text_vectors_that_have_changed_are_named(copy):
    lines = (copy / "run" / "recipe.yaml").read_text().splitlines()
    text = copy / "data" / "text.npy"
    lines = [f"text_embeds: {text}" if line.startswith("text_embeds:") else line for line in lines]
    (copy / "run" / "recipe.yaml").write_text("\n".join(lines))
    said(copy / "run")
    np.save(text, np.load(text) + 1)
    (problem,) = examine(copy / "run").problems
    assert "other text vectors in" in problem


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["final", "checkpoints/step_00000004/manifest.json"], "its command resumes after step 2"),
        (["final", *(f"checkpoints/step_0000000{step}/manifest.json" for step in (2, 4))], "so its command refuses"),
        (["final", "checkpoints"], "so its command begins anew"),
        (["stamp.json"], "that of step_00000004 is used; stamp.json is missing or damaged beside it"),
    ],
)
def test_it_is_said_what_the_runs_command_does_next(lost, words, copy):
    for name in lost:
        path = copy / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert words in "\n".join(examine(copy / "run").lines)


def test_other_folders_beside_the_states_are_no_states(copy):
    (copy / "run" / "checkpoints" / "step_old").mkdir()
    assert "step_old" not in said(copy / "run")


def test_a_run_that_is_writing_is_left_alone(copy):
    other = begin(hold, copy / "run", copy / "held")
    wait_for((copy / "held").exists, other)
    with pytest.raises(InputError, match="a run writes in .* now"):
        examine(copy / "run")
    other.kill()
    assert ended(other) == -signal.SIGKILL
    said(copy / "run")


def hold(folder: Path, marker: Path) -> None:
    with lock_folder(folder):
        marker.touch()
        time.sleep(60)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("data/scenes", "is neither a run .recipe.yaml. nor a model .config.json."),
        ("run/checkpoints/step_00000004", "is a training checkpoint: give the folder of the run"),
    ],
)
def test_what_is_neither_is_refused(folder, words, whole):
    with pytest.raises(InputError, match=words):
        examine(whole / folder)


def test_the_exit_code_is_0_for_the_whole_and_2_for_the_damaged(copy, call):
    assert "healthy" in call(main, copy / "checkpoint").out
    (copy / "checkpoint" / "tokenizer.json").unlink()
    for words in ([copy / "checkpoint"], ["--path", copy / "checkpoint"], [copy / "nowhere"], []):
        ended = call(main, *words)
        assert ended.refusal and ended.err.count("error: ") == 1 and "healthy" not in ended.out
