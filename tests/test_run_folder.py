"""The output folder of a run, and that a run resumes from it after any stop.

Each run is a process of its own, forked from one that has imported everything, so that a kill costs one second.
"""

import json
import math
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import forked
import pytest
import torch
import yaml
from accelerate import Accelerator
from forked import begin, ended
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint
from tiny_run import flags, write_data

import train
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.command_line import OLD_NAMES, InputError
from zs3.files import lock_folder
from zs3.training import loader
from zs3.training.folder import MetricsLog, check_recipe, read_recipe, save_final
from zs3.training.processes import go_on_after
from zs3.training.resume import Progress, RunCheckpoints, complete_checkpoints, damage, read_progress, write_manifest

SETTINGS = {"max_steps": 12, "checkpointing_steps": 3, "logging_steps": 1, "lr_milestones": 7}
KILLS = int(os.environ.get("ZS3_KILLS", 2))
SEED = int(os.environ.get("ZS3_KILL_SEED", time.time()))


# ---- runs --------------------------------------------------------------------------------------------------

start, start_two = partial(forked.start, "train"), partial(forked.start_two, "train")


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "final" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error_in(log: Path) -> str:
    """The one line with which all processes of a run were refused."""
    (line,) = {line for line in log.read_text().splitlines() if line.startswith("error: ")}
    return line


def logged(output_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


# Changes to a run


def kill_at(
    function_name: str, call: int, signum: int = signal.SIGKILL, rank: str = "0", whole_group: bool = False
) -> None:
    """Sends a signal to a process, or to its whole group, at this call of a function "module:name"."""
    owner, _, name = function_name.replace(":", ".").rpartition(".")
    calls, place, function = count(1), pkgutil.resolve_name(owner), pkgutil.resolve_name(function_name)

    def counted(*args, **kwargs):
        if next(calls) == call and os.environ.get("RANK", "0") == rank:
            (os.killpg if whole_group else os.kill)(os.getpid(), signum)
        return function(*args, **kwargs)

    setattr(place, name, counted)


def record_images(folder: Path) -> None:
    """Writes the image ids of each step, a line for a step, to one file for each process."""
    collate, agree, image_ids = loader.collate, train.agree, []

    def collated(samples):
        image_ids.extend(sample["image_id"] for sample in samples)
        return collate(samples)

    def agreed(*args):  # the call before a weight changes
        with (folder / f"images{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
            file.write(json.dumps(image_ids) + "\n")
        image_ids.clear()
        return agree(*args)

    loader.collate, train.agree = collated, agreed


def spoil_loss(term: Callable[[torch.Tensor], torch.Tensor], step: int, rank: str) -> None:
    """Adds a term of a weight to the loss, in one process and from a step on."""
    forward, calls = Zs3ForSemanticSegmentation.forward, count()

    def spoiled(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if next(calls) >= step and os.environ.get("RANK", "0") == rank:
            outputs.loss = outputs.loss + term(next(self.parameters()).sum())
        return outputs

    Zs3ForSemanticSegmentation.forward = spoiled


def spoil_weights(step: int) -> None:
    """Makes one weight infinite by an update, in every process. The loss before it is finite."""
    update, calls = torch.optim.AdamW.step, count(1)

    def spoiled(self, *args, **kwargs):
        update(self, *args, **kwargs)
        if next(calls) == step:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf

    torch.optim.AdamW.step = spoiled


def infinite(weight: torch.Tensor) -> torch.Tensor:
    return weight * math.inf


def flat_but_steep(weight: torch.Tensor) -> torch.Tensor:
    """0, with an infinite gradient."""
    return (weight - weight.detach()).abs().sqrt()


def limit_file_size(bytes_: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """The output folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    begin(int).join()  # it has waited for all imports
    began = time.monotonic()
    assert ended(start(flags(data, folder, **SETTINGS), folder / "log", partial(record_images, folder))) == 0
    (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder


@pytest.fixture
def stopped(data, straight, tmp_path) -> tuple[Path, list[str]]:
    """A copied run with two checkpoints and no final model, and its command."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "final")
    command = flags(data, folder, **SETTINGS)
    (folder / "log").unlink()
    return folder, command


# ---- killed ------------------------------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_one(data, straight, tmp_path):
    moments, expected = random.Random(SEED), weights(straight)
    print(f"ZS3_KILL_SEED={SEED}, {KILLS} kills")
    folder, kills = tmp_path / "run", 0
    while kills < KILLS:
        process = start(flags(data, folder, **SETTINGS), tmp_path / "log")
        moment = moments.uniform(0, float((straight / "seconds").read_text()))
        process.join(timeout=moment)
        if process.exitcode is None:
            process.kill()
            kills += 1
            found = complete_checkpoints(folder / "checkpoints")
            print(f"killed after {moment:.3f} s; newest checkpoint: {found[-1].name if found else None}")
        assert ended(process) in (0, -signal.SIGKILL)
        if (folder / "final").exists():  # it was faster
            assert equal(weights(folder), expected)
            shutil.rmtree(folder)
    assert ended(start(flags(data, folder, **SETTINGS), tmp_path / "log")) == 0
    assert equal(weights(folder), expected)
    assert logged(folder) == logged(straight) == list(range(1, 13))


# The function that is killed, at which call, and the checkpoints that are left
PLACES = {
    "in a checkpoint": ("zs3.training.resume:write_manifest", 2, ["step_00000003", "step_00000006.partial"]),
    "before old ones go": ("shutil:rmtree", 1, ["step_00000003", "step_00000006", "step_00000009"]),
    "in final": ("processing_zs3:Zs3ImageProcessor.save_pretrained", 1, ["step_00000009", "step_00000012"]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed(place, data, straight, tmp_path):
    *at, left = PLACES[place]
    command = flags(data, tmp_path / "run", **SETTINGS)
    assert ended(start(command, tmp_path / "log", partial(kill_at, *at))) == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == left
    assert not (tmp_path / "run" / "final").exists()
    assert ended(start(command, tmp_path / "log")) == 0
    assert equal(weights(tmp_path / "run"), weights(straight))
    assert logged(tmp_path / "run") == logged(straight)
    assert {path.suffix for path in tmp_path.rglob("*")}.isdisjoint({".partial"})


def test_a_run_of_two_processes_outlives_the_death_of_one(data, tmp_path):
    """It dies between two steps. If a process dies just when it waits for data, gloo may tell the other one only after
    its timeout of half an hour: it forgets a part that it has begun to send or to receive."""
    command = flags(data, tmp_path / "run", **{**SETTINGS, "max_steps": 7})
    two = start_two(command, tmp_path / "log", partial(kill_at, "train:agree", 5, rank="1"))
    assert ended(two[1]) == -signal.SIGKILL and ended(two[0]) not in (0, -signal.SIGKILL)
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]
    assert not (tmp_path / "run" / "final").exists()
    assert [ended(process) for process in start_two(command, tmp_path / "log")] == [0, 0]
    assert logged(tmp_path / "run") == list(range(1, 8))


# ---- damaged -----------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "optimizer.bin is missing": lambda folder: (folder / "optimizer.bin").unlink(),
    "model.safetensors has 1000 bytes": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "the contents of random_states_0.pkl have changed": lambda folder: flip_bit(folder / "random_states_0.pkl"),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "": lambda folder: flip_bit(folder / "manifest.json"),
}


@pytest.fixture
def whole(straight, tmp_path) -> Path:
    """A copy of an undisturbed run's last checkpoint."""
    return shutil.copytree(complete_checkpoints(straight / "checkpoints")[-1], tmp_path / "copy")


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_checkpoint_is_recognised(words, whole):
    assert damage(whole) is None
    DAMAGES[words](whole)
    assert words in damage(whole)


def test_an_empty_manifest_is_no_proof(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    for name in ("model.safetensors", "optimizer.bin", "progress.bin", "stamp.json"):
        others = {other: manifest[other] for other in manifest if other != name}
        (whole / "manifest.json").write_text(json.dumps(others))
        assert damage(whole) == f"manifest.json does not list {name}"
    (whole / "manifest.json").write_text("{}")
    assert "manifest.json does not list" in damage(whole)


def state_with(path: Path, **changes: object) -> None:
    """progress.bin with other values."""
    torch.save({**torch.load(path / "progress.bin", weights_only=True), **changes}, path / "progress.bin")


def weights_with(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = load_file(path / "model.safetensors")
    state["class_projection.0.weight"] = change(state["class_projection.0.weight"])
    save_file(state, path / "model.safetensors", {"format": "pt"})


# Checkpoints that fit their manifest, but from which no run can resume
UNFIT = {
    "progress.bin lacks seconds": lambda path: state_with(path, seconds=None),
    "progress.bin lacks scheduler": lambda path: state_with(path, scheduler="multistep"),
    "progress.bin lacks step": lambda path: torch.save([3], path / "progress.bin"),
    "is the checkpoint of step_00000009: it is renamed to step_00000012.damaged": lambda path: state_with(path, step=9),
    "class_projection.0.weight is not finite": lambda path: weights_with(path, lambda weight: weight * math.nan),
    "class_projection.0.weight is of torch.float16": lambda path: weights_with(path, lambda weight: weight.half()),
}


@pytest.mark.parametrize("words", UNFIT)
def test_of_a_checkpoint_that_cannot_be_gone_on_from_the_one_before_is_taken(words, straight, tmp_path, capsys):
    folder = shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    UNFIT[words](folder / "step_00000012")
    (folder / "step_00000012" / "manifest.json").unlink()
    write_manifest(folder / "step_00000012")
    assert newest_whole(folder, straight).name == "step_00000009"
    assert words in capsys.readouterr().out
    assert (folder / "step_00000012.damaged").is_dir()  # nothing is lost


def test_checkpoints_that_exchanged_their_names_get_them_back(straight, tmp_path, capsys):
    folder = shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    (folder / "step_00000012").rename(folder / "a")
    (folder / "step_00000009").rename(folder / "step_00000012")
    (folder / "a").rename(folder / "step_00000009")
    assert newest_whole(folder, straight) == folder / "step_00000012"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000009", "step_00000012"]
    assert [read_progress(folder / f"step_{step:08d}")["step"] for step in (9, 12)] == [9, 12]
    assert capsys.readouterr().out.count("it is renamed to") == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"a: [", b"\x00", b"max_st"])
def test_of_a_damaged_recipe_the_newest_checkpoints_copy_counts(content, straight, tmp_path, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    recipe = read_recipe(folder / "recipe.yaml")
    (folder / "recipe.yaml").write_bytes(content)
    assert read_recipe(folder / "recipe.yaml") == recipe
    assert "the copy in step_00000012 is used" in capsys.readouterr().out
    check_recipe(folder / "recipe.yaml", recipe)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == recipe


def newest_whole(folder: Path, run: Path) -> Path | None:
    """The checkpoint from which a run of this model would resume."""
    model = Zs3ForSemanticSegmentation.from_pretrained(run / "final", dtype=torch.float32)
    return RunCheckpoints(Accelerator(cpu=True), folder, model, None, Progress(), kept=2, stamp={})._newest_whole()


@pytest.fixture
def begun(tmp_path) -> Callable[[dict], Path]:
    """A function: writes a recipe beside a checkpoint and returns its path."""

    def begun(recipe: dict) -> Path:
        (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
        (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / "run" / "recipe.yaml"

    return begun


@pytest.mark.parametrize("content", ["", "[]", "3", "a: [", "\x00", None])
def test_a_recipe_that_is_none_is_one_line_beside_checkpoints(content, begun):
    path = begun({})
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match="recipe.yaml .*: restore the run's own recipe"):
        check_recipe(path, {"max_steps": 3})
    assert path.exists() == (content is not None)


@pytest.mark.parametrize(
    ("before", "same", "other", "words"),
    [
        ({"max_steps": 3}, {"max_steps": 3, "newer": 1}, {"max_steps": 3, "newer": 2}, "newer 1, this command 2: "),
        ({"iterations": 3}, {"max_steps": 3}, {"max_steps": 4}, "max_steps 3, this command 4: "),
    ],
)
def test_a_flag_that_is_newer_than_a_recipe_or_renamed_is_compared(before, same, other, words, begun, monkeypatch):
    monkeypatch.setitem(OLD_NAMES, "TrainArgs", {"iterations": "max_steps"})
    path, defaults = begun(before), {"newer": 1, "of_another_command": 5}
    with pytest.raises(InputError, match=words):
        check_recipe(path, other, defaults)
    check_recipe(path, same, defaults)
    assert yaml.safe_load(path.read_text()) == same


def test_many_other_flags_are_one_short_line(begun):
    before = {"zeta": 1, **{f"flag_{index}": index for index in range(50)}, "long": "x" * 500}
    with pytest.raises(InputError, match=r"\(and 51 more\)") as refusal:
        check_recipe(begun(before), dict.fromkeys(before, "y" * 500))
    assert len(str(refusal.value)) <= 200


def test_of_a_damaged_checkpoint_the_one_before_is_taken(straight, stopped):
    folder, command = stopped
    flip_bit(folder / "checkpoints" / "step_00000012" / "optimizer.bin")
    assert ended(start(command, folder / "log")) == 0
    log = (folder / "log").read_text()
    assert "step_00000012 is damaged (the contents of optimizer.bin have changed)" in log and "at step 9" in log
    assert "s, over all starts of the run; the model" in log
    assert re.search(r"trained in \d+ s; the model", (straight / "log").read_text())
    assert equal(weights(folder), weights(straight)) and logged(folder) == logged(straight)


def test_a_damaged_final_model_is_recognised_and_made_anew_of_the_last_checkpoint(straight, stopped):
    folder, command = stopped
    shutil.copytree(straight / "final", folder / "final")
    file = folder / "final" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert ended(start(command, folder / "log")) == 2
    assert f"{Path(folder.name, 'final')} is damaged" in (folder / "log").read_text()
    shutil.rmtree(folder / "final")
    assert [ended(start(command, folder / "log")) for _ in range(2)] == [0, 0]
    assert equal(weights(folder), weights(straight))
    assert "is there already: nothing to do" in (folder / "log").read_text()


def test_where_no_checkpoint_is_whole_nothing_is_lost_and_the_folder_named(stopped):
    folder, command = stopped
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").unlink()
    before = sorted((folder / "checkpoints").rglob("*"))
    assert ended(start(command, folder / "log")) == 2
    assert f"error: no checkpoint in {folder / 'checkpoints'} is whole" in (folder / "log").read_text()
    assert sorted((folder / "checkpoints").rglob("*")) == before


def test_a_half_written_line_of_metrics_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.25}\n{"step": 2, "loss": 0.5}\n{"step": 3, "loss": 0.7')
    log = MetricsLog(path, 2)
    assert log.last["loss"] == 0.5
    log.write(Progress(3, 9.0), {"loss": 0.75})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("bad", ["{nothing}", "[1, 2]}", '{"loss": 3}', '{"step": "2"}', "3", "\x00", ""])
def test_a_damaged_line_of_metrics_is_left_out_with_a_warning(bad, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 0.25}}\n{bad}\n{{"step": 3, "loss": 0.5}}\n')
    assert MetricsLog(path, 3).last == {"step": 3, "loss": 0.5}
    assert "metrics.jsonl" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_disk_that_is_full_leaves_the_last_checkpoint(file, stopped):
    folder, command = stopped
    last, newest = complete_checkpoints(folder / "checkpoints")
    size = (newest / file).stat().st_size
    shutil.rmtree(newest)
    assert ended(start(command, folder / "log", partial(limit_file_size, size - 1))) == 2
    assert "ulimit -f" in error_in(folder / "log")
    assert [*(folder / "checkpoints").iterdir()] == [last] and damage(last) is None  # nothing half written


# ---- frozen towers -----------------------------------------------------------------------------------------


def test_frozen_towers_are_in_no_checkpoint_and_must_be_the_same_again(data, tmp_path):
    options = {"config": None, "max_steps": 2, "checkpointing_steps": 1, "batch_size": 2, "crop_size": 64}
    command = flags(data, tmp_path / "run", init_from=tmp_path / "start", num_workers=0, **options)
    record = {"text": False, "vision": True, "seen_class_names": [], "unseen_labels": "none"}
    save_checkpoint(tmp_path / "start", seed=1, **record)
    assert ended(start(command, tmp_path / "log")) == 0
    expected = weights(tmp_path / "run")
    towers = {name for name in expected if name.startswith("vision_model.")}
    first, last = complete_checkpoints(tmp_path / "run" / "checkpoints")
    with safe_open(first / "model.safetensors", "pt") as file:
        assert towers and set(file.keys()) == expected.keys() - towers
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "run" / "final")
    assert ended(start(command, tmp_path / "log")) == 0
    assert equal(weights(tmp_path / "run"), expected)
    shutil.rmtree(tmp_path / "run" / "final")
    save_checkpoint(tmp_path / "start", seed=2, **record)
    assert ended(start(command, tmp_path / "log")) == 2
    assert "another encoder" in (tmp_path / "log").read_text()


# ---- stopped -----------------------------------------------------------------------------------------------


def test_sigterm_to_a_run_and_its_workers_saves_the_step(data, straight, tmp_path):
    rare = {**SETTINGS, "checkpointing_steps": 12, "num_workers": 2}
    command = flags(data, tmp_path / "run", **rare)
    process = start(command, tmp_path / "log", partial(kill_at, "train:agree", 3, signal.SIGTERM, whole_group=True))
    assert ended(process) == 143
    (saved,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"stopped after step {int(saved.name[5:])}, which is saved" in (tmp_path / "log").read_text()
    assert ended(start(command, tmp_path / "log")) == 0
    assert equal(weights(tmp_path / "run"), weights(straight)) and logged(tmp_path / "run") == logged(straight)


def test_one_process_goes_on_with_the_images_of_two_that_sigterm_stopped(data, straight, tmp_path):
    command = flags(data, tmp_path / "run", **SETTINGS, device_batch_size=1)  # one process alone takes two a step
    record = partial(record_images, tmp_path)
    sigterm = partial(kill_at, "zs3.training.loader:collate", 5, signal.SIGTERM, "1")  # the other one hears of it
    assert [ended(process) for process in start_two(command, tmp_path / "log", record, sigterm)] == [143, 143]
    halves = [read_lines(tmp_path / f"images{rank}.jsonl") for rank in (0, 1)]
    steps = [mine + others for mine, others in zip(*halves, strict=True)]
    assert len(steps) == 5
    (tmp_path / "images0.jsonl").unlink()
    assert ended(start(command, tmp_path / "log", record)) == 0
    steps += read_lines(tmp_path / "images0.jsonl")
    assert steps == read_lines(straight / "images0.jsonl")
    assert "saved by 2 processes, resumed by 1" in (tmp_path / "log").read_text()


def read_lines(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stream_is_not_resumed_with_another_number_of_processes():
    with pytest.raises(InputError, match="2 processes saved this run: resume it with 2, not 1"):
        go_on_after(2, 7, Accelerator(cpu=True), streaming=True, seed=0)


def test_an_infinite_loss_in_one_process_stops_all_and_names_its_images(data, tmp_path):
    command = flags(data, tmp_path / "run", **SETTINGS)
    changes = [partial(record_images, tmp_path), partial(spoil_loss, infinite, 4, "1")]
    assert [ended(process) for process in start_two(command, tmp_path / "log", *changes)] == [2, 2]
    assert f"at step 4, images {read_lines(tmp_path / 'images1.jsonl')[-1]}" in error_in(tmp_path / "log")
    assert len(read_lines(tmp_path / "images1.jsonl")) == 5
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]


def test_infinite_gradients_of_a_finite_loss_stop_the_run(data, tmp_path):
    command = flags(data, tmp_path / "run", **SETTINGS)
    assert ended(start(command, tmp_path / "log", partial(spoil_loss, flat_but_steep, 4, "0"))) == 2
    assert "at step 4 although the loss is finite" in (tmp_path / "log").read_text()
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]


def test_weights_that_are_not_finite_after_the_last_step_stop_all_and_leave_no_model(data, tmp_path):
    command = flags(data, tmp_path / "run", **{**SETTINGS, "max_steps": 4})
    spoil = partial(spoil_weights, 4)
    assert [ended(process) for process in start_two(command, tmp_path / "log", spoil)] == [2, 2]
    line = error_in(tmp_path / "log")
    assert "is not finite after step 4: not saved" in line and "--learning_rate" in line
    assert "model.pixel_level_module.encoder" in line and len(line) <= 200
    assert not (tmp_path / "run" / "final").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_final_model_that_is_not_finite_is_not_written(straight, tmp_path):
    model = Zs3ForSemanticSegmentation.from_pretrained(straight / "final", dtype=torch.float32)
    model.class_projection[0].bias.data[0] = math.inf
    with pytest.raises(InputError, match="class_projection.0.bias is not finite"):
        save_final(model, None, tmp_path / "final")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({"num_workers": 1, "trackers": []}, {"num_workers": 4, "trackers": ["tensorboard"]}, None),
        ({"device_batch_size": None}, {"device_batch_size": 2}, None),
        ({"device_batch_size": None, "backbone_norm": "batch"}, {"device_batch_size": 2}, "device_batch_size"),
        ({"device_batch_size": None, "backbone_norm": "sync"}, {"device_batch_size": 2}, "device_batch_size"),
        ({"num_workers": 1, "streaming": True}, {"num_workers": 4}, "num_workers"),
        ({"logging_steps": 5, "learning_rate": 0.1}, {"logging_steps": 1, "learning_rate": 0.2}, "learning_rate"),
    ],
)
def test_a_run_may_go_on_with_other_flags_where_its_weights_do_not_hang_on_them(begun, before, now, refused):
    path = begun(before)
    if refused is None:
        check_recipe(path, {**before, **now})
        assert yaml.safe_load(path.read_text()) == {**before, **now}
    else:
        words = f"has {refused} {before[refused]!r}, this command {now[refused]!r}: give the run's, or"
        with pytest.raises(InputError, match=words):
            check_recipe(path, {**before, **now})
        assert yaml.safe_load(path.read_text()) == before


def test_a_run_may_be_moved_and_its_paths_written_in_another_way(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "scenes").mkdir(parents=True)
    path = begun({"output_dir": "runs/before/", "dataset": "data/scenes", "max_steps": 3})
    for dataset in ("data/scenes/", "./data/scenes", str(tmp_path / "data" / "scenes")):
        check_recipe(path, {"output_dir": str(tmp_path / "run"), "dataset": dataset, "max_steps": 3})
    with pytest.raises(InputError, match="this command 'data': give the run's, or choose another --output_dir"):
        check_recipe(path, {"output_dir": "run", "dataset": "data", "max_steps": 3})


# ---- two at once -------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_by_all_its_processes(data, tmp_path):
    with lock_folder(tmp_path / "run"):
        command = flags(data, tmp_path / "run", **SETTINGS)
        assert [ended(process) for process in start_two(command, tmp_path / "log")] == [2, 2]
    assert f"another run writes in {tmp_path / 'run'} now" in error_in(tmp_path / "log")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate has GPUs for the processes")
def test_two_processes_that_accelerate_takes_for_one_each_are_refused(data, tmp_path):
    command = flags(data, tmp_path / "run", **SETTINGS)
    assert [ended(process) for process in start_two(command, tmp_path / "log", ACCELERATE_USE_CPU="false")] == [2, 2]
    assert "error: 2 processes were started, and accelerate sees no GPU for them" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def test_a_folder_is_free_when_its_run_was_killed_although_a_worker_lives_on(tmp_path):
    process = begin(lock_and_die, tmp_path / "run", tmp_path / "worker")
    assert ended(process) == -signal.SIGKILL
    worker = int((tmp_path / "worker").read_text())
    try:
        os.kill(worker, 0)  # is there
        lock_folder(tmp_path / "run").close()
    finally:
        os.kill(worker, signal.SIGKILL)


def lock_and_die(folder: Path, worker: Path) -> None:
    with lock_folder(folder):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        worker.write_text(str(pid))
        os.kill(os.getpid(), signal.SIGKILL)
