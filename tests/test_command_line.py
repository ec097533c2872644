import errno
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest
import torch
import yaml
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import Mask2FormerConfig

from zs3.command_line import OLD_NAMES, InputError, read_arguments, run


@dataclass
class Args:
    """Trains a model."""

    dataset: str = field(metadata={"help": "folder or Hub id"})
    learning_rate: float = field(default=1e-4, metadata={"help": "of AdamW"})
    max_steps: int = 10
    milestones: list[int] = field(default_factory=lambda: [5000, 80000])
    mixed_precision: Literal["no", "bf16"] = "no"
    resume: bool = False
    shuffle: bool = True
    text_embeds: str | None = "vectors.npy"
    shares: list[float] = field(default_factory=list)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text)
        return ["--config", str(tmp_path / "recipe.yaml")]

    return write


def test_recipe_values_get_the_types_of_the_fields(recipe):
    text = (
        "dataset: 2012\nlearning_rate: 5e-5\nmilestones: [1, 2]\nmixed_precision: no\nresume: true\n"
        "shuffle: false\ntext_embeds: null\n"
    )
    args, overrides = read_arguments(Args, recipe(text))
    assert args == Args("2012", 5e-5, 10, [1, 2], "no", True, False, None)
    assert overrides == {}


def test_command_line_wins_over_recipe_wherever_config_stands(recipe):
    config = recipe("dataset: a\nmax_steps: 3\nmilestones: [1]\nshuffle: false\n")
    flags = ["--max-steps", "4", "--milestones", "7", "8", "--shuffle", "true"]
    for argv in (config + flags, flags + config):
        assert read_arguments(Args, argv)[0] == Args("a", max_steps=4, milestones=[7, 8], shuffle=True)


def test_empty_list_and_null_can_be_written(recipe):
    args, _ = read_arguments(Args, recipe("dataset: a\nmilestones: []\ntext_embeds:\n"))
    assert args.milestones == [] and args.text_embeds is None


def test_arguments_written_as_yaml_read_back_equal(recipe):
    args = Args("d", 1e-7, 3, [], "no", True, False, None)
    assert read_arguments(Args, recipe(yaml.safe_dump(asdict(args))))[0] == args


def test_model_fields_come_back_apart_with_their_yaml_values(recipe):
    config = recipe("dataset: a\ndropout: 1e-1\nbackbone_config:\n  depths: [1, 1]\n  eps: 1e-6\nnum_queries: 7\n")
    flags = ["--num_queries", "9", "--feature_strides", "4", "8", "--pre_norm", "true", "--class_weight=2.0"]
    args, overrides = read_arguments(Args, config + flags, Mask2FormerConfig)
    assert args == Args("a")
    assert overrides == {
        "dropout": 0.1,
        "backbone_config": {"depths": [1, 1], "eps": 1e-6},
        "num_queries": 9,
        "feature_strides": [4, 8],
        "pre_norm": True,
        "class_weight": 2.0,
    }


def test_fields_annotated_by_a_subclass_of_the_configuration_are_accepted_and_those_of_transformers_not():
    class Config(Mask2FormerConfig):
        rank_weight: float | int = 1.0

    assert read_arguments(Args, ["--dataset", "a", "--rank_weight", "2"], Config)[1] == {"rank_weight": 2}
    with pytest.raises(InputError, match="unknown flag --architectures"):
        read_arguments(Args, ["--dataset", "a", "--architectures", "x"], Config)


@pytest.mark.parametrize(
    ("text", "flags", "name"),
    [
        ("", ["--learning_rate", "nan"], "learning_rate"),
        ("", ["--learning_rate", "inf"], "learning_rate"),
        ("", ["--learning_rate=-inf"], "learning_rate"),
        ("", ["--learning_rate", "1e999"], "learning_rate"),
        ("learning_rate: Infinity", [], "learning_rate"),
        ("learning_rate: nan", [], "learning_rate"),
        ("", ["--shares", "0.5", "NaN"], "shares"),
        ("shares: [0.5, inf]", [], "shares"),
        ("", ["--class_weight", ".nan"], "class_weight"),
        ("class_weight: .inf", [], "class_weight"),
        ("", ["--class_weight=-.INF"], "class_weight"),
        ("", ["--feature_strides", "4", ".inf"], "feature_strides"),
        ("backbone_config: {eps: .nan}", [], "backbone_config"),
        ("backbone_config: {depths: [1, {a: .inf}]}", [], "backbone_config"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_in_every_flag(recipe, text, flags, name):
    with pytest.raises(InputError, match=f"^--{name} must be a finite number, got "):
        read_arguments(Args, [*recipe(f"dataset: a\n{text}"), *flags], Mask2FormerConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: a\nlearning_rat: 1", r"recipe.yaml: unknown field 'learning_rat'; did you mean learning_rate\?"),
        ("dataset: a\nnum_querys: 1", r"unknown field 'num_querys'; did you mean num_queries\?"),
        ("dataset: a\nmax_steps: many", "--max_steps must be a whole number, got 'many'"),
        ("dataset: a\nmax_steps: 1.5", "--max_steps must be a whole number, got '1.5'"),
        ("dataset: a\nmax_steps: [1, 2]", "'max_steps' takes one plain value"),
        ("dataset: a\nmilestones: [[1]]", "'milestones' takes a list of plain values"),
        ("dataset: a\nmixed_precision: fp8", "--mixed_precision must be one of no, bf16, got 'fp8'"),
        ("dataset: a\nresume: perhaps", "--resume must be true or false, got 'perhaps'"),
        ("dataset: a\nmax_steps: 1\n  bad: [", "recipe.yaml, line 3: broken YAML"),
        ("- dataset", "a recipe is a mapping"),
        ("max_steps: 1", "required: --dataset"),
    ],
)
def test_bad_recipe_is_one_line_naming_the_field(recipe, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_arguments(Args, recipe(text), Mask2FormerConfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataste", "a"], r"unknown flag --dataste; did you mean --dataset\?"),
        (["--dataset", "a", "--max_step", "3"], r"unknown flag --max_step; did you mean --max_steps\?"),
        (["--dataset", "a", "--max_steps", "x"], "--max_steps must be a whole number, got 'x'"),
        (["--dataset", "a", "stray"], "unexpected argument 'stray'"),
        (["--dataset", "a", "--dropout", "[1"], "dropout.*no YAML value"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: No such file"),
        (["--config"], "expected one argument"),
    ],
)
def test_bad_flag_is_one_line_naming_it(argv, message):
    with pytest.raises(InputError, match=message):
        read_arguments(Args, argv, Mask2FormerConfig)


def test_help_lists_run_and_model_fields(capsys):
    with pytest.raises(SystemExit) as ended:
        read_arguments(Args, ["--help"], Mask2FormerConfig)
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Trains a model." in text and "folder or Hub id" in text and "--num_queries" in text and "--config" in text


@pytest.fixture
def renamed(monkeypatch):
    monkeypatch.setitem(OLD_NAMES, "iterations", "max_steps")
    monkeypatch.setitem(OLD_NAMES, "mix", "shuffle")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--iterations", "3"], ""),
        (["--iterations=3"], ""),
        ([], "iterations: 3"),
        (["--iterations", "3"], "max_steps: 4"),
        (["--max_steps", "3"], "iterations: 4"),
    ],
)
def test_a_flag_of_an_old_name_is_taken_and_a_line_says_so(argv, text, renamed, recipe, capsys):
    assert read_arguments(Args, ["--dataset", "a", *recipe(text), *argv])[0].max_steps == 3
    assert capsys.readouterr().err == "note: --iterations is called --max_steps now\n"


@pytest.mark.parametrize("argv", [["--no_mix"], ["--no-mix"], ["--mix", "false"]])
def test_a_switch_of_an_old_name_can_be_turned_off(argv, renamed, capsys):
    assert read_arguments(Args, ["--dataset", "a", *argv])[0].shuffle is False
    assert capsys.readouterr().err == "note: --mix is called --shuffle now\n"


def test_a_recipe_with_a_flags_old_and_new_name_is_refused(renamed, recipe):
    with pytest.raises(InputError, match="'iterations' and 'max_steps', which are one flag"):
        read_arguments(Args, recipe("dataset: a\niterations: 3\nmax_steps: 4"))


def exit_code_and_stderr(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run(main)
    return ended.value.code, capsys.readouterr().err


def test_bad_input_ends_with_one_line_and_code_2(capsys):
    def main():
        raise InputError("picture.png is gone: put it back")

    assert exit_code_and_stderr(main, capsys) == (2, "error: picture.png is gone: put it back\n")


class Broken(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        raise InputError("cannot read InputError: no.png: put it back")


def test_bad_input_met_by_a_loader_worker_is_the_same_one_line(capsys):
    code, text = exit_code_and_stderr(lambda: list(DataLoader(Broken(), num_workers=1)), capsys)
    assert (code, text) == (2, "error: cannot read InputError: no.png: put it back\n")


def test_full_disk_ends_with_one_line_and_code_2(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    code, text = exit_code_and_stderr(main, capsys)
    assert code == 2 and "model.safetensors" in text and text.count("\n") == 1


def test_interruption_ends_with_code_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert exit_code_and_stderr(main, capsys) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback_and_success_is_silent():
    code = "from zs3.command_line import run\ndef main():\n    {}['key']\nrun(main)"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode == 1 and "Traceback" in failed.stderr and "KeyError" in failed.stderr
    assert run(lambda: None) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "weights.bin"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "weights.bin"),
        OSError(errno.EFBIG, "File too large", "weights.bin"),
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed: No space left on device"),
    ],
    ids=["python", "safetensors", "quota", "limit", "torch"],
)
def test_a_full_disk_is_one_line_whoever_writes(error, capsys):
    def write() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(write)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("error: (no space left|a limit on the size)", line)
