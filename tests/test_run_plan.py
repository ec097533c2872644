"""How a run cuts its batch, what it prints before it starts, and how it measures itself."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from test_data import SPACE, random_sample, write_folder
from tiny import CLASS_NAMES, tiny_model
from transformers.models.swin import modeling_swin

from zs3.command_line import InputError
from zs3.data.batches import BatchParts, cut_batch
from zs3.data.image_labels import PseudoLabels
from zs3.data.records import load_split, stream_split
from zs3.label_space import LabelSpace
from zs3.pseudo_labels import write_shard
from zs3.training.arguments import TrainArgs, check_trackers
from zs3.training.loader import check_learnable
from zs3.training.pace import Pace, duration
from zs3.training.plan import describe, names_lines
from zs3.training.processes import check_norms
from zs3.training.start import Start


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("device_batch_size", [None, 1, 2, 3, 5])
def test_the_batch_is_what_was_asked_for_in_the_fewest_parts_that_fit(processes, device_batch_size):
    for share in range(1, 13):
        parts = cut_batch(share * processes, processes, device_batch_size)
        assert parts.processes == processes and parts.micro_batches * parts.images == share
        fitting = [n for n in range(1, 13) if share % n == 0 and share / n <= (device_batch_size or share)]
        assert parts.micro_batches == min(fitting)


@pytest.mark.parametrize(
    ("batch_size", "processes", "mend"),
    [
        (8, 3, "give --batch_size 6 or 9, or start 2 processes"),
        (7, 4, "give --batch_size 4 or 8, or start 1 process"),
        (2, 8, "give --batch_size 8, or start 2 processes"),
        (9, 6, "give --batch_size 6 or 12, or start 3 processes"),
    ],
)
def test_a_batch_that_cannot_be_shared_names_what_can(batch_size, processes, mend):
    with pytest.raises(InputError, match=f"{mend}$"):
        cut_batch(batch_size, processes, None)


def test_accelerate_reads_the_configuration_of_fsdp_and_the_layer_it_names_exists():
    path = Path(__file__).parent.parent / "recipes" / "accelerate" / "fsdp2.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert hasattr(modeling_swin, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])


def test_a_tracker_is_refused_where_accelerate_would_leave_it_out(monkeypatch):
    monkeypatch.setattr("zs3.training.arguments.get_available_trackers", lambda: ["wandb"])
    check_trackers(["wandb"])
    with pytest.raises(InputError, match=re.escape("pip install 'zs3[tensorboard]'")):
        check_trackers(["wandb", "tensorboard"])


def test_all_names_are_said_and_none_is_broken():
    names = [f"kind-of thing {n}" for n in range(60)]
    lines = names_lines(names)
    assert len(lines) > 5 and max(map(len, lines)) <= 120
    assert [name for line in lines for name in line.strip().rstrip(",").split(", ")] == names


class Images(list):
    """A stand-in for the dataset: its length and its source of image labels."""

    class_names, image_labels = CLASS_NAMES, None


@pytest.fixture
def plan(tmp_path):
    """A function: the text that a run of 6 images with these flags prints before it starts."""

    def plan(processes: int = 1, image_labels: object = None, config: dict | None = None, **flags) -> str:
        space = LabelSpace(CLASS_NAMES, CLASS_NAMES[:1], 255)
        args = TrainArgs(dataset="data", output_dir=str(tmp_path), **flags)
        images = Images(range(6))
        images.image_labels = image_labels
        parts = cut_batch(args.batch_size, processes, args.device_batch_size)
        start = Start(space, space, tiny_model(**(config or {})), None, images, None, None)
        return describe(args, start, parts, Accelerator(cpu=True))

    return plan


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"encoder": "c"}, "start     random weights; text tower of c"),
        ({"encoder": "c", "backbone": "b"}, "start     backbone b (--backbone), else random weights; text tower of c"),
        ({"proposals": "m", "text_embeds": "t.npy"}, "start     m (--proposals); text vectors of t.npy"),
        ({"init_from": "s/final"}, "start     s/final (--init_from); text tower of s/final"),
        (
            {"init_from": "s", "init_parts": "backbone"},
            "start     backbone of s (--init_from, --init_parts backbone); text tower of s",
        ),
        ({}, "rate      5e-05, divided by 10 at step 5000; of the backbone x 0.1"),
        ({"max_steps": 5000}, "rate      5e-05, constant; of the backbone x 0.1"),
        ({"lr_schedule": "poly"}, "rate      5e-05, falling to 0 at step 50000 (poly); of the backbone x 0.1"),
        (
            {"config": {"dice_weight": 0, "mask_weight": 2.5}},
            "losses    2 x class (background_aware) + 2.5 x mask (focal) + 1 x rank, matching unpaired",
        ),
        (
            {"batch_size": 6, "device_batch_size": 2, "backbone_norm": "batch", "processes": 3},
            "norms     statistics of the backbone's batch norms are of the 2 images that a process computes at once",
        ),
        (
            {"batch_size": 6, "backbone_norm": "sync", "processes": 3},
            "norms     statistics of the backbone's batch norms are of the 6 images that all processes compute at once",
        ),
        ({}, "device    cpu, one process"),
    ],
)
def test_the_plan_says(plan, flags, line):
    assert line in plan(**flags).splitlines()


@pytest.mark.parametrize(("device_batch_size", "is_noted"), [(5, True), (4, False), (8, False), (9, False)])
def test_a_device_batch_size_that_does_not_divide_the_batch_is_noted(plan, device_batch_size, is_noted):
    note = f"note      --device_batch_size {device_batch_size} does not divide a process's 8 images: it takes 4 at once"
    assert (note in plan(batch_size=8, device_batch_size=device_batch_size).splitlines()) == is_noted


def test_pseudo_labels_are_counted_and_none_is_noted(plan, tmp_path):
    label_space = LabelSpace(CLASS_NAMES, CLASS_NAMES[:2], 255)
    scores = np.array([[0.5, 0.9], [0.1, 0.2], [0.8, 0.7], [0.9, 0.9]], np.float32)
    write_shard(tmp_path / "scores-00000-of-00001.parquet", ["a", "b", "c", "other"], scores, label_space.unseen, b"")
    for threshold, counts in ((0.7, "3 labels, in 2 of 3 images"), (0.99, "0 labels, in 0 of 3 images")):
        labels = PseudoLabels(tmp_path, label_space, ["a", "b", "c"], threshold)
        text = plan(image_labels=labels, unseen_labels=str(tmp_path), config={"pseudo_label_threshold": threshold})
        assert ("no pseudo label reaches --pseudo_label_threshold" in text) == (threshold == 0.99)
        assert f"          positive at the threshold of {threshold}: {counts}" in text.splitlines()


def test_fsdp_that_accelerate_left_out_is_noted(plan, monkeypatch):
    note = "note      accelerate was asked for FSDP, which works on GPUs only: it is not used here"
    assert note not in plan()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert note in plan()


def test_a_precision_that_accelerate_was_given_is_said_not_to_count(plan, monkeypatch):
    notes = []
    for launched_with, precision in (("bf16", "no"), ("no", "bf16"), ("bf16", "bf16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
        notes.append("accelerate was given mixed precision bf16" in plan(mixed_precision=precision))
    assert notes == [True, False, False]


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Its `now` is the time for Pace."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("zs3.training.pace.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_share_of_time_that_batches_took_is_since_the_last_call(clock):
    def batches():
        for seconds in (3, 1):
            clock.now += seconds
            yield {}

    pace = Pace(Accelerator(cpu=True))
    shares = []
    for _ in pace.timed(batches()):
        clock.now += 1
        shares.append(pace.data_wait())
    assert shares == [0.75, 0.5]
    assert pace.waited == 4 and pace.seconds == 6


def test_the_end_is_foretold_once_from_the_second_to_the_sixth_step(clock):
    pace = Pace(Accelerator(cpu=True))
    lines = []
    for step in range(41, 50):  # a run that goes on at step 40
        clock.now += 500 if step == 41 else 12
        lines.append(pace.forecast(step, max_steps=1006))
    (line,) = [line for line in lines if line]
    assert lines.index(line) == 5 and "expected  3 h 12 min to step 1006" in line


def test_no_end_is_foretold_to_a_run_that_has_ended():
    pace = Pace(Accelerator(cpu=True))
    assert [pace.forecast(step, max_steps=6) for step in range(1, 7)] == [None] * 6


def test_a_time_is_said_as_people_say_it():
    assert [duration(seconds) for seconds in (41, 125, 11_520)] == ["41 s", "2 min", "3 h 12 min"]


# ---- data without anything to learn ------------------------------------------------------------------------


def records_with(tmp_path, *ids, space=SPACE):
    write_folder(tmp_path, {f"p{place}": random_sample(place, ids=own) for place, own in enumerate(ids)}, space)
    return [load_split(tmp_path, "train", space), stream_split(tmp_path, "train", space)]


@pytest.mark.parametrize(
    ("ids", "most"),
    [
        ([(255,), (0, 2), None], 100),  # the first map with something to learn is enough
        ([(0,), (0,), None], 2),  # of many maps of one class the first are enough
        ([(2, 255), (2,)], 100),  # one class alone can be learned
        ([(0,), (0,)], 100),
    ],
)
def test_no_more_maps_are_read_than_show_something_to_learn(ids, most, tmp_path, monkeypatch):
    monkeypatch.setattr("zs3.training.loader.MOST_LOOKED_AT", most)
    for records in records_with(tmp_path, *(own or (0,) for own in ids)):
        for place in [place for place, own in enumerate(ids) if own is None]:
            (tmp_path / "train" / "labels" / f"p{place}.png").write_bytes(b"never looked at")
        check_learnable(records, SPACE)


ALL_UNSEEN = LabelSpace(SPACE.class_names, SPACE.class_names, 255)


@pytest.mark.parametrize(
    ("ids", "space", "words"),
    [
        ([(0, 1)], ALL_UNSEEN, "all classes are unseen"),
        ([(255,), (255,)], SPACE, "the 2 label maps hold no class, so no seen class to train on"),
        ([(1, 255), (3,)], SPACE, "the 2 label maps hold nothing but 'cow', 'cat', so no seen class to train on"),
        ([(0, 255), (255,)], SPACE, "maps hold nothing but 'sky' and the ignored id 255: does 255 mean the object"),
    ],
)
def test_data_without_anything_to_learn_are_refused_before_the_run(ids, space, words, tmp_path):
    for records in records_with(tmp_path, *ids, space=space):
        with pytest.raises(InputError, match=words):
            check_learnable(records, space)


@pytest.mark.parametrize("norm", ["batch", "sync"])
@pytest.mark.parametrize("crop_size", [32, 33, 64, 65])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_norm_over_one_value_is_refused_where_torch_refuses_it(norm, crop_size, images, processes):
    maps = torch.zeros(images * (processes if norm == "sync" else 1), 3, crop_size, crop_size)
    for _ in range(5):  # of stride 2 each, as ResNet's
        maps = torch.nn.Conv2d(3, 3, 3, stride=2, padding=1)(maps)
    try:
        torch.nn.BatchNorm2d(3).train()(maps)
    except ValueError:
        with pytest.raises(InputError, match="needs two values or more"):
            check_norms(norm, crop_size, BatchParts(processes, 1, images))
    else:
        check_norms(norm, crop_size, BatchParts(processes, 1, images))
    check_norms("frozen", crop_size, BatchParts(processes, 1, images))
