"""train.py: what it trains, how it resumes, what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import ended, start, start_two
from gradients_of_a_step import record_gradients
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint, tiny_config, tiny_model
from tiny_run import RECIPE, flags, write_data
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from modeling_zs3 import Zs3ForSemanticSegmentation
from outputs_zs3 import Zs3Output
from train import main, make_scheduler, parameter_groups
from zs3.command_line import run
from zs3.convert.nouns import write_nouns
from zs3.data.records import load_split
from zs3.label_space import LabelSpace, load_label_space
from zs3.pseudo_labels import write_shard
from zs3.scenes.render import CLASS_NAMES, UNSEEN
from zs3.training.arguments import TrainArgs
from zs3.training.pace import StepMean
from zs3.training.processes import make_accelerator, straighten_gradients
from zs3.training.start import kind_of_labels, record_supervision

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


class Forward(NamedTuple):
    """One forward pass of training."""

    model: Zs3ForSemanticSegmentation
    inputs: dict
    outputs: Zs3Output

    @property
    def loss(self) -> float:
        return float(self.outputs.loss.detach())


@pytest.fixture
def forwards(monkeypatch) -> Iterator[list[Forward]]:
    done, forward = [], Zs3ForSemanticSegmentation.forward

    def recorded(self, *args, **kwargs):
        done.append(Forward(self, kwargs, forward(self, *args, **kwargs)))
        return done[-1].outputs

    monkeypatch.setattr(Zs3ForSemanticSegmentation, "forward", recorded)
    yield done
    AcceleratorState._reset_state()  # it remembers the precision


def train_here(monkeypatch, arguments: list[str]) -> None:
    """Runs train.py in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    main()


def refused(monkeypatch, capsys, arguments: list[str]) -> str:
    """The one line train.py prints for bad input; its exit code must be 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_two_processes_train_one_model(data, tmp_path):
    """With torch's launcher, and with a Swin, whose last norm no loss depends on: DDP would stop at the second step."""
    swin = {"model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4,
            "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    command += flags(data, tmp_path / "two", backbone_config=json.dumps(swin), max_steps=3)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert json.loads((tmp_path / "two" / "all_results.json").read_text())["num_processes"] == 2
    assert (tmp_path / "two" / "final" / "pipeline_zs3.py").exists()


def test_two_processes_that_take_image_by_image_have_the_gradients_of_one_that_takes_four(data, tmp_path):
    options, log = {"batch_size": 4, "max_steps": 1, "backbone_norm": "frozen"}, tmp_path / "log"
    record = [partial(record_gradients, tmp_path / f"{processes}.safetensors") for processes in (1, 2)]
    first, second = (
        flags(data, tmp_path / f"run{at_once}", **options, device_batch_size=at_once) for at_once in (4, 1)
    )
    running = [start("train", first, log, record[0]), *start_two("train", second, log, record[1])]
    assert [ended(process) for process in running] == [0, 0, 0], log.read_text()
    with safe_open(tmp_path / "2.safetensors", "pt") as file:
        assert file.metadata() == {"num_processes": "2"}
    one, two = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys() and len(one) > 50
    largest = max(grad.norm() for grad in one.values())
    for name, grad in one.items():  # a bias before a group norm has a gradient of rounding errors alone
        assert (two[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7 * largest, name


def test_the_parts_of_a_batch_are_not_replaced_by_what_the_environment_says_of_accumulation(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator, parts = make_accelerator(TrainArgs(output_dir=str(tmp_path), batch_size=6, device_batch_size=3))
    assert accelerator.gradient_accumulation_steps == parts.micro_batches == 2


def test_the_largest_seed_trains(data, tmp_path, monkeypatch):
    train_here(monkeypatch, flags(data, tmp_path / "out", max_steps=1, seed=2**32 - 1))
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_goes_on_with_the_pictures_it_would_have_met(data, tmp_path, monkeypatch, forwards, workers):
    options = {"streaming": "true", "shuffle_buffer": 3, "num_workers": workers, "max_steps": 5}
    train_here(monkeypatch, flags(data, tmp_path / "run", checkpointing_steps=3, **options))
    whole = [forward.inputs["labels"] for forward in forwards]
    expected = load_file(tmp_path / "run" / "final" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000005")
    forwards.clear()
    main()
    assert len(whole) == 5 and len(forwards) == 2
    assert all(torch.equal(one.inputs["labels"], labels) for one, labels in zip(forwards, whole[3:], strict=True))
    resumed = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_supervised_training_sees_all_masks_and_says_so(data, tmp_path, monkeypatch, forwards):
    found = {}
    for unseen_labels in ("masks", "ground_truth"):
        options = {"unseen_labels": unseen_labels, "max_steps": 2, "batch_size": 6, "crop_size": 96, "short_edges": 96}
        forwards.clear()
        train_here(monkeypatch, flags(data, tmp_path / unseen_labels, **options))
        labels = torch.cat([forward.inputs["labels"] for forward in forwards])
        found[unseen_labels] = set(labels.unique().tolist()) - {-1}
    unseen = {CLASS_NAMES.index(name) for name in UNSEEN}
    present = set(np.unique([record.label for record in load_split(data, "train")]).tolist()) - {255}
    assert found == {"masks": present, "ground_truth": present - unseen} and present & unseen
    saved = json.loads((tmp_path / "masks" / "final" / "config.json").read_text())
    assert set(saved["seen_class_names"]) == set(CLASS_NAMES)  # what the leak guard goes by
    assert json.loads((tmp_path / "masks" / "all_results.json").read_text())["setting"] == "supervised"


@pytest.mark.parametrize("listed", [[], [UNSEEN[0]]])
def test_caption_nouns_are_further_names_with_image_labels(data, tmp_path, monkeypatch, forwards, listed):
    seen = [name for name in CLASS_NAMES if name not in UNSEEN]
    names = [*seen, "lawn", "horizon", *listed]
    (tmp_path / "nouns").mkdir()
    said = {f"{index:05d}": [0, len(seen) + index % 2] for index in range(6)}
    write_nouns(tmp_path / "nouns" / "nouns-train.parquet", list(said), list(said.values()))
    settings = {"label_space": "scenes", "label_space_sha256": load_label_space(data).sha256}
    (tmp_path / "nouns" / "settings.json").write_text(json.dumps(settings))
    content = {"classes": names, "unseen": [], "ignore_label": 255}
    (tmp_path / "nouns" / "classes.json").write_text(json.dumps(content))
    save_checkpoint(tmp_path / "start", seen_class_names=[], unseen_labels="none")
    options = {"caption_nouns": tmp_path / "nouns", "batch_size": 6, "max_steps": 1, "word_drop_probability": 0}
    train_here(monkeypatch, plain_flags(data, tmp_path / "run", tmp_path / "start", text_embeds=None, **options))
    ((_, batch, _),) = forwards
    image_labels = batch["image_labels"]
    assert len(batch["text_embeds"]) == image_labels.shape[1] == len(names)
    assert image_labels[:, 0].tolist() == [1] * 6
    assert sorted(image_labels[:, len(seen) : len(seen) + 2].tolist()) == [[0, 1]] * 3 + [[1, 0]] * 3
    assert not image_labels[:, len(seen) + 2 :].any()
    saved = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert saved["unseen_labels"] == ("captions" if listed else "none")


@pytest.mark.parametrize(("unseen_labels", "names"), [("none", 16), ("ground_truth", 24)])
def test_unseen_names_are_on_the_class_axis_only_if_they_have_image_labels(
    unseen_labels, names, data, tmp_path, monkeypatch, forwards
):
    train_here(monkeypatch, flags(data, tmp_path / "run", max_steps=1, unseen_labels=unseen_labels))
    ((_, batch, _),) = forwards
    assert len(batch["text_embeds"]) == batch["image_labels"].shape[1] == names


def test_pseudo_labels_reach_the_model_by_image_and_threshold(data, tmp_path, monkeypatch, forwards):
    image_ids = [f"{index:05d}" for index in range(6)]
    scores = np.random.default_rng(0).random((6, len(UNSEEN))).astype(np.float32)
    (tmp_path / "scores").mkdir()
    write_shard(tmp_path / "scores" / "scores-00000-of-00001.parquet", image_ids, scores, UNSEEN, b"")
    overrides = {"pseudo_label_threshold": 0.7, "pseudo_label_unknown_above": 0.3, "batch_size": 6, "max_steps": 1}
    train_here(monkeypatch, flags(data, tmp_path / "run", unseen_labels=tmp_path / "scores", **overrides))
    image_labels = forwards[0].inputs["image_labels"]
    columns = [CLASS_NAMES.index(name) for name in UNSEEN]
    expected = [[1 if score >= 0.7 else -1 if score > 0.3 else 0 for score in row] for row in scores.tolist()]
    assert sorted(image_labels[:, columns].tolist()) == sorted(expected)  # the step took all images, in some order
    saved = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert saved["unseen_labels"] == "pseudo" and saved["pseudo_label_threshold"] == 0.7


def test_training_lowers_the_loss_and_keeps_the_names(data, tmp_path, monkeypatch):
    train_here(monkeypatch, flags(data, tmp_path / "run", max_steps=30, matching="joint"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["matching"] == "joint" and recipe["max_steps"] == 30
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert len(config["seen_class_names"]) == 16 and config["class_names"] == CLASS_NAMES


def test_frozen_norms_of_the_backbone_stay_as_the_start_has_them(data, tmp_path, monkeypatch):
    start = save_checkpoint(tmp_path / "start", text=False, seen_class_names=[], unseen_labels="none").state_dict()
    stay = {}
    for kind in ("frozen", "batch"):
        norms = {"backbone_norm": kind, "backbone_multiplier": 1}
        train_here(monkeypatch, plain_flags(data, tmp_path / kind, tmp_path / "start", **norms))
        after = load_file(tmp_path / kind / "final" / "model.safetensors")
        kept = {name: torch.equal(after[name], start[name]) for name in start if "pixel_level_module.encoder" in name}
        stay[kind] = [kept[name] for name in kept if ".normalization." in name]
        assert not any(same for name, same in kept.items() if ".convolution." in name)
    assert all(stay["frozen"]) and not any(stay["batch"]) and len(stay["batch"]) > 30


def test_in_bfloat16_the_losses_fall_and_are_float32(data, tmp_path, monkeypatch, forwards):
    arguments = flags(data, tmp_path / "run", mixed_precision="bf16", max_steps=12, matching="joint")
    AcceleratorState._reset_state()
    train_here(monkeypatch, arguments)
    assert {forward.outputs.mask_logits.dtype for forward in forwards} == {torch.bfloat16}
    assert {forward.outputs.loss.dtype for forward in forwards} == {torch.float32}
    assert forwards[-1].loss < 0.8 * forwards[0].loss
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}


def test_activations_computed_twice_change_nothing(data, tmp_path, monkeypatch, forwards):
    losses = {}
    for twice in ("true", "false"):
        arguments = flags(data, tmp_path / twice, activation_checkpointing=twice)
        forwards.clear()
        train_here(monkeypatch, arguments)
        on = any(getattr(module, "gradient_checkpointing", False) for module in forwards[0].model.modules())
        assert on == (twice == "true")
        losses[twice] = [forward.loss for forward in forwards]
    assert losses["true"] == losses["false"]


def test_the_backbone_learns_slower_and_norms_and_embeddings_do_not_decay():
    model = tiny_model(vision=True)
    groups = parameter_groups(model, learning_rate=1.0, backbone_multiplier=0.1, weight_decay=0.5)
    found = {id(p): group for group in groups for p in group["params"]}
    names = {name: found.get(id(p)) for name, p in model.named_parameters()}
    conv = "model.pixel_level_module.encoder.embedder.embedder.convolution.weight"
    norm = "model.pixel_level_module.encoder.embedder.embedder.normalization.weight"
    assert (names[conv]["lr"], names[conv]["weight_decay"]) == (0.1, 0.5)
    assert (names[norm]["lr"], names[norm]["weight_decay"]) == (0.1, 0.0)
    assert names["model.transformer_module.queries_features.weight"]["weight_decay"] == 0.0
    assert (names["class_projection.0.weight"]["lr"], names["class_projection.0.weight"]["weight_decay"]) == (1.0, 0.5)
    assert all(group is None for name, group in names.items() if name.startswith(("text_model", "vision_model")))
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_gradients_have_the_strides_of_their_weights_for_ddp():
    pixel_values = torch.rand(2, 3, 64, 64)
    labels = torch.randint(0, 4, (2, 64, 64))
    grads, strides = [], []
    for straightened in (False, True):
        model = tiny_model().train()
        if straightened:
            straighten_gradients(model)
        torch.manual_seed(0)
        model(pixel_values, text_embeds=torch.eye(4, 12), labels=labels).loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        grads.append([parameter.grad for parameter in trained])
        strides.append([parameter.grad.stride() == parameter.stride() for parameter in trained])
    assert not all(strides[0]) and all(strides[1])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_the_printed_schedule_decays_at_5000_and_ignores_80000():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=5e-5)
    args = TrainArgs()
    scheduler = make_scheduler(optimizer, args.lr_schedule, args.lr_milestones, args.max_steps)
    rates = {}
    for step in range(1, 50_001):
        optimizer.step()
        scheduler.step()
        rates[step] = scheduler.get_last_lr()[0]
    assert rates[4999] == 5e-5
    assert rates[5000] == pytest.approx(5e-6) and rates[50_000] == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("images/00000.png", lambda path: path.write_bytes(b"not a picture"), "cannot read"),
        ("labels/00001.png", lambda path: Image.new("L", (50, 96)).save(path), "50 x 96"),
        ("labels/00002.png", lambda path: Image.new("L", (96, 96), 77).save(path), "77"),
    ],
)
def test_a_bad_picture_or_label_map_is_one_line_with_its_name(file, change, words, data, tmp_path, monkeypatch, capsys):
    broken = shutil.copytree(data, tmp_path / "copy")
    change(broken / "train" / file)
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", dataset=broken, batch_size=6))
    assert Path(file).name in line and words in line


def test_a_misspelled_field_is_one_line_with_the_right_name(data, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "learning_rat": 1}))
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", config=recipe))
    assert "learning_rat" in line and "learning_rate" in line


def test_another_recipe_does_not_overwrite_a_run(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump({"max_steps": 7}))
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out"))
    assert "max_steps" in line and "output_dir" in line
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()) == {"max_steps": 7}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"text_embeds": "nowhere.npy"}, "nowhere.npy"),
        ({"encoder": "./nowhere"}, "--encoder ./nowhere: no such folder"),
        ({"dataset": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"logging_steps": 0}, "--logging_steps must be 1 or more, got 0"),
        ({"max_steps": 0}, "--max_steps must be 1 or more, got 0"),
        ({"learning_rate": -1}, "--learning_rate must be 0 or more, got -1"),
        ({"lr_schedule": "cosine"}, "cosine"),
        ({"seed": 2**32}, "--seed must be at most 4,294,967,295, got 4294967296"),
        ({"single_class_max_area": 0}, "--single_class_max_area must be positive, got 0.0"),
        ({"max_grad_norm": 1e-320}, "--max_grad_norm must be 1.17549e-38 or more, got 1e-320"),
        ({"lr_milestones": -1}, "--lr_milestones must be 0 or more, got -1"),
        ({"seen_class_names": "[]"}, "seen_class_names is written by the training itself"),
        ({"class_loss": "hinge"}, "class_loss must be one of"),
        ({"class_norm": "querys"}, "configuration: class_norm must be one of 'groups', 'queries', got 'querys'"),
        ({"class_norm": "queries", "class_loss": "cross_entropy"}, "class_norm 'queries' does not go with class_loss"),
        ({"class_weight": ".nan"}, "class_weight must be a finite number, got nan"),
        ({"class_weight": ".INF"}, "class_weight must be a finite number, got inf"),
        ({"matched_weight": "1.5"}, "matched_weight must be at most 1, got 1.5"),
        ({"backbone_config": "{}"}, "error: the model's configuration: "),
        ({"num_queries": 0}, "configuration: num_queries must be 1 or more, got 0"),
        ({"decoder_layers": -1}, "configuration: decoder_layers must be 1 or more, got -1"),
        ({"dropout": 1.5}, "configuration: dropout must be at most 1, got 1.5"),
        ({"init_std": -1}, "configuration: init_std must be 0 or more, got -1"),
        ({"train_num_points": 2**31 - 1}, "configuration: train_num_points must be at most 1,000,000, got 2147483647"),
        ({"oversample_ratio": 1e30}, "configuration: oversample_ratio must be at most 1,000, got 1e+30"),
        ({"feature_strides": "[4]"}, "configuration: feature_strides must be four whole numbers"),
        ({"device_batch_size": 0}, "--device_batch_size must be 1 or more, got 0"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"backbone_norm": "sync"}, "give batch or frozen"),
        ({"trackers": "tensorbord"}, "accelerate knows aim, clearml"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"matching": "joined"}, "matching must be one of 'unpaired', 'joint', 'hybrid', got 'joined'"),
        ({"class_weight": -1}, "error: the model's configuration: class_weight must be 0 or more, got -1"),
        ({"unseen_labels": "ground-truth"}, "do not exist: did you mean ground_truth?"),
        ({"text_embeds": None}, "no start: stage 2 needs --init_from"),
        ({"caption_nouns": "nouns"}, "--text_embeds does not go with --caption_nouns: the nouns need a text tower"),
        ({"caption_nouns": "nouns", "unseen_labels": "masks"}, "--unseen_labels does not go with --caption_nouns"),
        ({"learning_rate": "inf"}, "--learning_rate must be"),
        ({"learning_rate": "nan"}, "--learning_rate must be"),
        ({"learning_rate": "1e39"}, "--learning_rate must be"),
        ({"weight_decay": "inf"}, "--weight_decay must be"),
        ({"max_grad_norm": "nan"}, "--max_grad_norm must be"),
        ({"backbone_multiplier": "inf"}, "--backbone_multiplier must be"),
        ({"learning_rate": "1e38", "weight_decay": "1e38"}, "are too large together for float32"),
        ({"learning_rate": "1e20", "backbone_multiplier": "1e20"}, "are too large together for float32"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(overrides, words, data, tmp_path, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", **overrides))
    assert words in line and len(line) <= 200
    assert not (tmp_path / "out" / "checkpoints").exists() and not (tmp_path / "out" / "final").exists()


def test_a_checkpoint_of_another_model_is_refused_by_its_flag(data, tmp_path, monkeypatch, capsys):
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", encoder=tmp_path / "resnet"))
    assert "--encoder" in line and "'resnet'" in line and "'clip'" in line


def spoil(start: Path) -> None:
    state = load_file(start / WEIGHTS)
    state["class_projection.0.bias"][0] = float("nan")
    save_file(state, start / WEIGHTS, {"format": "pt"})


# Flags, fields of the start's config, a change of its folder, and the words of the refusal
BAD_STARTS = {
    "a text tower": ({}, {"text": True}, None, "start has a text tower: leave out --text_embeds"),
    "vectors of another size": ({"text_embeds": "wide.npy"}, {}, None, "wide.npy has 99 columns"),
    "another architecture": ({"decoder_layers": 5}, {}, None, "start is of another architecture"),
    "unseen masks": ({}, {"seen_class_names": ["grass", "stone wall"]}, None, "masks of ['stone wall'], which are"),
    "cut weights": ({}, {}, lambda start: os.truncate(start / WEIGHTS, 5000), "is no whole weight file"),
    "not finite": ({}, {}, spoil, "class_projection.0.bias"),
}


@pytest.mark.parametrize("kind", BAD_STARTS)
def test_a_bad_start_is_refused(kind, data, tmp_path, monkeypatch, capsys):
    overrides, config, change, words = BAD_STARTS[kind]
    save_checkpoint(tmp_path / "start", **{"text": False, "seen_class_names": [], "unseen_labels": "none", **config})
    np.save(tmp_path / "wide.npy", np.ones((len(CLASS_NAMES), 99), np.float32))
    if change is not None:
        change(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    assert words in refused(monkeypatch, capsys, plain_flags(data, tmp_path / "out", "start", **overrides))
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_is_no_start_but_what_it_ended_with(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "stage1" / "final").mkdir(parents=True)
    line = refused(monkeypatch, capsys, plain_flags(data, tmp_path / "out", tmp_path / "stage1"))
    assert line.endswith("/stage1 is the folder of a run: give its final/ instead")


def plain_flags(data: Path, output_dir: Path, start: Path, **overrides) -> list[str]:
    """A run from a checkpoint, whose architecture the recipe does not say again."""
    recipe = {name: value for name, value in RECIPE.items() if name in TrainArgs.__dataclass_fields__}
    (output_dir.parent / "plain.yaml").write_text(yaml.safe_dump(recipe))
    return flags(data, output_dir, config=output_dir.parent / "plain.yaml", init_from=start, **overrides)


def test_a_start_whose_config_asks_for_tuples_is_trained_on(data, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "start", text=False, seen_class_names=[], return_dict=False)
    assert json.loads((tmp_path / "start" / "config.json").read_text())["return_dict"] is False
    train_here(monkeypatch, plain_flags(data, tmp_path / "out", tmp_path / "start", max_steps=1))
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_of_a_start_the_backbone_and_the_frozen_tower_can_be_kept_alone(data, tmp_path, monkeypatch):
    start = save_checkpoint(
        tmp_path / "start", seed=5, text=False, vision=True, seen_class_names=[], unseen_labels="none"
    )
    arguments = plain_flags(data, tmp_path / "run", tmp_path / "start", init_parts="backbone", max_steps=1)
    arguments += ["--learning_rate", "0"]
    train_here(monkeypatch, arguments)
    after = Zs3ForSemanticSegmentation.from_pretrained(tmp_path / "run" / "final").state_dict()
    kept = ("model.pixel_level_module.encoder.", "vision_model.")
    running = ("running_mean", "running_var", "num_batches_tracked")  # batch norms look at the data
    for name, tensor in start.state_dict().items():
        if name.startswith(kept) and not name.endswith(running):
            assert torch.equal(after[name], tensor), name
    for name in ("class_projection.0.weight", "model.transformer_module.queries_features.weight"):
        assert not torch.equal(after[name], start.state_dict()[name]), name


@pytest.mark.parametrize(("before", "after"), [(["zebra"], {"zebra", *CLASS_NAMES} - set(UNSEEN)), (None, None)])
def test_what_an_earlier_stage_saw_is_not_forgotten_nor_made_up(before, after, data, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "start", text=False, seen_class_names=before)
    train_here(monkeypatch, plain_flags(data, tmp_path / "out", tmp_path / "start", max_steps=1))
    seen = json.loads((tmp_path / "out" / "final" / "config.json").read_text())["seen_class_names"]
    assert (seen and set(seen)) == after


def test_a_mask2former_from_elsewhere_makes_the_seen_classes_unknown(data, tmp_path, monkeypatch):
    config = Mask2FormerConfig(**{name: RECIPE[name] for name in RECIPE if name in Mask2FormerConfig.__annotations__})
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "mask2former")
    start = {"proposals": tmp_path / "mask2former", "max_steps": 1}
    arguments = plain_flags(data, tmp_path / "out", tmp_path / "none", **start)
    at = arguments.index("--init_from")
    train_here(monkeypatch, arguments[:at] + arguments[at + 2 :])
    saved = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert saved["seen_class_names"] is None and saved["unseen_labels"] is None


def test_the_log_holds_the_mean_of_a_step_and_the_rate_it_used(data, tmp_path, monkeypatch, forwards):
    overrides = {"device_batch_size": 2, "batch_size": 4, "max_steps": 2, "logging_steps": 1}
    schedule = {"lr_milestones": 1, "lr_schedule": "multistep"}
    arguments = flags(data, tmp_path / "out", **overrides, **schedule)
    train_here(monkeypatch, arguments)
    losses = [forward.loss for forward in forwards]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert lines[0]["loss"] == pytest.approx((losses[0] + losses[1]) / 2)
    assert lines[1]["loss"] == pytest.approx((losses[2] + losses[3]) / 2)
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 1e-4])


def test_a_tracker_gets_what_metrics_jsonl_gets_and_goes_on_at_its_step(data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_steps = {"checkpointing_steps": 3, "logging_steps": 1, "trackers": "tensorboard", "max_steps": 5}
    train_here(monkeypatch, flags(data, tmp_path / "run", **run_steps))
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000005")
    main()  # from the checkpoint of step 3 on
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "zs3")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in lines])


def test_the_resolved_recipe_is_a_recipe(data, tmp_path, monkeypatch):
    train_here(monkeypatch, flags(data, tmp_path / "first", max_steps=1, kl="u_p", class_norm="queries"))
    again = ["--config", str(tmp_path / "first" / "recipe.yaml"), "--output_dir", str(tmp_path / "second")]
    train_here(monkeypatch, again)
    first, second = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = json.loads((tmp_path / "second" / "final" / "config.json").read_text())
    assert (saved["kl"], saved["class_norm"]) == ("u_p", "queries")


def test_the_image_processor_ignores_what_the_data_ignores(data, tmp_path, monkeypatch):
    other = shutil.copytree(data, tmp_path / "copy")
    classes = json.loads((other / "classes.json").read_text())
    (other / "classes.json").write_text(json.dumps({**classes, "ignore_label": 65535}))
    for path in (other / "train" / "labels").iterdir():
        ids = np.asarray(Image.open(path)).astype(np.uint16)
        Image.fromarray(np.where(ids == 255, np.uint16(65535), ids)).save(path)
    own = {"text_embeds": data.parent / "text.npy", "config": data.parent / "recipe.yaml"}
    train_here(monkeypatch, flags(other, tmp_path / "out", max_steps=1, **own))
    saved = json.loads((tmp_path / "out" / "final" / "preprocessor_config.json").read_text())
    assert saved["ignore_index"] == 65535


def test_a_folder_where_nothing_was_trained_takes_another_recipe(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump({"max_steps": 7}))
    (tmp_path / "out" / "metrics.jsonl").touch()
    train_here(monkeypatch, flags(data, tmp_path / "out", max_steps=1))
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["max_steps"] == 1
    assert "checkpoints yet: training starts from the beginning" in capsys.readouterr().out


def test_an_output_folder_that_is_a_file_is_refused(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused(monkeypatch, capsys, flags(data, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("extreme", [{"learning_rate": "1e30"}, {"max_grad_norm": "1e38"}, {"weight_decay": "1e38"}])
def test_extremes_leave_a_finite_model_or_none(extreme, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(data, tmp_path / "out", max_steps=2, **extreme)])
    try:
        run(main)
    except SystemExit as stopped:
        assert stopped.code == 2 and not (tmp_path / "out" / "final").exists()
    else:
        weights = load_file(tmp_path / "out" / "final" / "model.safetensors")
        assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_text_vectors_that_are_not_finite_are_refused(value, data, tmp_path, monkeypatch, capsys):
    vectors = np.load(data.parent / "text.npy")
    vectors[3, 2] = value
    np.save(tmp_path / "spoiled.npy", vectors)
    line = refused(monkeypatch, capsys, flags(data, tmp_path / "out", text_embeds=tmp_path / "spoiled.npy"))
    assert "spoiled.npy" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("listed", "kind"), [("Stone  WALL", "captions"), ("stone", "none")])
def test_captions_with_an_unseen_name_are_recorded_in_any_spelling(listed, kind, tmp_path):
    content = {"classes": ["grass", listed], "unseen": [], "ignore_label": 255}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert kind_of_labels("none", str(tmp_path), ["stone wall"]) == kind


@pytest.mark.parametrize(
    ("before", "now", "seen", "labels"),
    [
        (([], "none"), "none", ["grass"], "none"),
        (([], "none"), "captions", ["grass"], "captions"),
        ((["Grass", "zebra"], "pseudo"), "none", ["Grass", "zebra"], "pseudo"),  # a name of both stages, once
    ],
)
def test_a_run_records_what_all_stages_have_seen(before, now, seen, labels):
    config = tiny_config(text=False, seen_class_names=before[0], unseen_labels=before[1])
    record_supervision(config, LabelSpace(["grass", "stone wall"], ["stone wall"]), now, init_from="start")
    assert config.unseen_labels == labels and config.seen_class_names == seen


def test_a_micro_batch_without_masks_leaves_the_rate_alone():
    mean = StepMean(Accelerator(cpu=True))
    for loss, rate in ((2.0, 0.5), (4.0, float("nan"))):
        terms = {"class": torch.tensor(loss / 2)}
        mean.add(Zs3Output(loss=torch.tensor(loss), loss_terms=terms, same_label_rate=torch.tensor(rate)))
    assert mean.values() == {"loss": 3.0, "loss_class": 1.5, "same_label_rate": 0.5}
