import errno
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import Mask2FormerConfig

from configuration_zs3 import Number, one_line
from zs3.command_line import (
    GONE,
    OLD_NAMES,
    Arguments,
    InputError,
    Seed,
    check_required,
    flag,
    read_arguments,
    refuse_alone,
    refuse_together,
    run,
)


@dataclass
class Args(Arguments):
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
        ("", ["--feature_strides", "4", ".inf"], "feature_strides"),
        ("backbone_config: {eps: .nan}", [], "backbone_config"),
        ("backbone_config: {depths: [1, {a: .inf}]}", [], "backbone_config"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_in_every_flag(recipe, text, flags, name):
    with pytest.raises(InputError, match=f"^--{name} must be a finite number, got "):
        read_arguments(Args, [*recipe(f"dataset: a\n{text}"), *flags], Mask2FormerConfig)


@pytest.mark.parametrize(
    ("given", "text"),
    [(5, "5"), (1.5, "1.5"), (np.int64(5), "5"), (np.float64(1.5), "1.5"), (np.str_("a"), "a"), (Path("a/b"), "a/b")],
)
def test_a_path_or_a_number_for_a_text_becomes_a_text(given, text):
    args = Args(given, text_embeds=given)
    assert (args.dataset, args.text_embeds) == (text, text)
    assert type(args.dataset) is str and type(args.text_embeds) is str


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


@pytest.fixture
def renamed(monkeypatch):
    monkeypatch.setitem(OLD_NAMES, "Args", {"iterations": "max_steps", "mix": "shuffle"})


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


def test_an_old_name_is_one_of_its_own_command_alone():
    with pytest.raises(InputError, match="unknown flag --result; did you mean --results"):
        read_arguments(import_module("zs3.release.__main__").ReleaseArgs, ["--result", "a.json"])
    fields_of = {one.__name__: {field.name for field in fields(one)} for one in commands()}
    for command, names in OLD_NAMES.items():
        assert fields_of[command].issuperset(names.values()) and fields_of[command].isdisjoint(names)
    assert all(fields_of[command].isdisjoint(names) for command, names in GONE.items())


def test_a_flag_that_was_removed_is_refused_by_name(recipe):
    eval_args = import_module("zs3.evaluation.arguments").EvalArgs
    with pytest.raises(InputError, match="^the flag --ensemble_tolerance was removed; leave it out$"):
        read_arguments(eval_args, ["--ensemble-tolerance", "0.0"])
    with pytest.raises(InputError, match="recipe.yaml: the field ensemble_tolerance was removed; leave it out$"):
        read_arguments(eval_args, recipe("ensemble_tolerance: 0.0"))


@pytest.mark.parametrize(
    ("module", "args_class", "name"),
    [
        ("zs3.training.arguments", "TrainArgs", "output_dir"),
        ("zs3.pseudo_labels", "PseudoLabelArgs", "output"),
        ("zs3.evaluation.figure", "FigureArgs", "output"),
    ],
)
def test_the_folder_of_the_dataset_is_no_output(module, args_class, name, tmp_path):
    words = ["--dataset", str(tmp_path), f"--{name}", f"{tmp_path}/x/.."]
    with pytest.raises(InputError, match=rf"^--{name} .* is the folder of --dataset: choose another one$"):
        read_arguments(getattr(import_module(module), args_class), words, check=False)


def test_an_empty_text_is_refused_by_its_flag():
    with pytest.raises(InputError, match="^--dataset must be a text that is not empty, got ''$"):
        read_arguments(Args, ["--dataset", ""])


def test_a_text_with_a_null_character_is_refused_by_its_flag(recipe):
    with pytest.raises(InputError, match="^--dataset must be a text without null characters, got 'a.*b'$"):
        read_arguments(Args, recipe('dataset: "a\\0b"'))


# ---- first words, and flags that depend on each other --------------------------------------------------------


@dataclass
class Words(Arguments):
    first_words = ("name", "places")

    name: str | None = flag(None, "Of a thing.")
    places: list[str] = flag([], "Where it is.")
    loud: bool = flag(False, "With a noise.")
    level: float | None = flag(None, "Of the noise.")

    def check(self) -> None:
        check_required(self, "name")
        refuse_alone(self, "level", without="loud")
        refuse_together(self, "loud", "places", why="a noise is everywhere")


@pytest.mark.parametrize(
    "argv", ["a", "--name a", "a b c", "a --places b c", "--name a --places b c", "a b --loud false", "a --loud"]
)
def test_the_first_words_need_no_flag(argv):
    words = [word for word in argv.split() if not word.startswith("--") and word != "false"]
    args, _ = read_arguments(Words, argv.split())
    assert (args.name, args.places) == (words[0], words[1:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "--name is missing"),
        ("--loud", "--name is missing"),
        ("a --level 2", "--level goes with --loud, which is missing"),
        ("a --level 2 --loud false", "--level goes with --loud, which is missing"),
        ("a b --loud", "--places does not go with --loud: a noise is everywhere"),
        ("--loud a", "--loud must be true or false, got 'a'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_every_command(argv, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        read_arguments(Words, argv.split())
    assert message.endswith("'a'") or read_arguments(Words, argv.split(), check=False)


# ---- numbers of every command --------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
HOSTILE = [float("nan"), float("inf"), -float("inf"), True, np.bool_(True), np.float64("nan"), np.float32("inf"), -1e39]
HOSTILE += [10**400, "5", "x" * 10_000, "a\nb", [[1]], np.array(3), b"1", 1j]


def commands() -> list[type]:
    """The argument classes of train.py, eval.py, zs3/ and benchmarks/."""
    for file in (ROOT / "train.py", ROOT / "eval.py", *ROOT.glob("zs3/**/*.py"), *ROOT.glob("benchmarks/*.py")):
        if re.search(r"^class \w+Arg\w*\(", file.read_text(), re.MULTILINE):
            import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    found = [Arguments]
    for one in found:
        found += [kind for kind in one.__subclasses__() if kind not in found]
    return [one for one in found if one.__module__ not in ("zs3.command_line.flags", __name__)]


def ranges(hint: object) -> list[Number]:
    return [hint] if isinstance(hint, Number) else [one for part in get_args(hint) for one in ranges(part)]


def kinds(hint: object) -> set[object]:
    """The plain types in a type."""
    parts = get_args(hint) if get_origin(hint) is not Literal else ()
    return {one for part in parts for one in kinds(part)} or {hint}


@pytest.fixture(scope="module")
def numeric() -> list[tuple[type, str, Number, bool]]:
    """Every numeric field of every command, its range, and whether it takes a list."""
    found = []
    for args_class in commands():
        hints, plain = get_type_hints(args_class, include_extras=True), get_type_hints(args_class)
        for name in (one.name for one in fields(args_class)):
            if kinds(plain[name]) & {int, float}:
                (number,) = ranges(hints[name])  # a number without a range is a fault
                found.append((args_class, name, number, "list" in str(plain[name])))
    return found


def test_every_number_of_every_command_has_a_range_and_takes_no_other(numeric):
    assert len(numeric) > 113
    for args_class, name, number, is_list in numeric:
        wrong = [*HOSTILE, number.most + (1 if number.kind is int else max(1, number.most)), number.least - 1]
        wrong += [1.5, 2.0] if number.kind is int else []
        for value in wrong:
            with pytest.raises(InputError) as refused:
                args_class(**{name: [value] if is_list else value})
            message = str(refused.value)
            assert f"--{name} " in message and len(message) <= 200 and "\n" not in message


def test_numbers_of_numpy_are_kept_as_pythons_own(numeric):
    for args_class, name, number, is_list in numeric:
        value = number.least if number.below else number.most
        given = np.int64(value) if number.kind is int else np.float64(value)
        kept = getattr(args_class(**{name: np.array([given]) if is_list else given}), name)
        assert kept == ([value] if is_list else value)
        assert type(kept[0] if is_list else kept) is number.kind


def test_a_field_set_later_is_checked_too(numeric):
    for args_class, name, _, is_list in numeric:
        args = args_class()
        with pytest.raises(InputError, match=f"--{name} "):
            setattr(args, name, [True] if is_list else True)


def test_seeds_end_where_those_of_numpy_do():
    (seed,) = ranges(Seed)
    state = np.random.get_state()
    np.random.seed(seed.most)
    np.random.set_state(state)
    with pytest.raises(ValueError, match="2\\*\\*32 - 1"):
        np.random.seed(seed.most + 1)


@pytest.mark.parametrize("way", ["flag", "recipe"])
@pytest.mark.parametrize("value", ["True", "yes", "0x10", "1.5", "", "9" * 5000, "x" * 10_000, "a\nb", "2147483648"])
def test_a_text_that_is_no_number_of_the_flag_is_refused_and_not_shown_whole(value, way, recipe):
    argv = [f"--max_steps={value}"] if way == "flag" else recipe(yaml.safe_dump({"max_steps": value}))
    with pytest.raises(InputError, match="^--max_steps must be a") as refused:
        read_arguments(Args, ["--dataset", "a", *argv])
    assert len(str(refused.value)) <= 200 and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["resume", "mixed_precision", "x" * 10_000])
def test_long_values_and_names_of_other_flags_are_not_shown_whole(name):
    with pytest.raises(InputError, match=name[:40]) as refused:
        read_arguments(Args, ["--dataset", "a", f"--{name}", "y" * 10_000])
    assert len(str(refused.value)) <= 200


def test_an_empty_list_is_refused_where_a_command_needs_one():
    ablation = import_module("zs3.ablation.jobs")
    with pytest.raises(InputError, match="^--seeds is empty"):
        ablation.AblationArgs(seeds=[])


# ---- messages ------------------------------------------------------------------------------------------------


PATH = "/data/" + "very_deep/" * 40 + "scene_00017.png"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"{PATH} holds id 77: correct it", "^/data/very.*/scene_00017.png holds id 77: correct it$"),
        (f"/{'a' * 300}/a.json and /{'b' * 300}/b.json differ: evaluate", "a/a.json and .*b/b.json differ: evaluate$"),
        ("a.png: " + "so it is and " * 100 + "replace it", "^a.png: so it is .* and replace it$"),
        ("a\nb\x1b[2J: rename it", r"^a\\nb\\x1b\[2J: rename it$"),  # without what a terminal obeys
        ("a" * 100 + " " + "b" * 99, "^a{100} b{99}$"),  # just within the bound
    ],
)
def test_a_message_is_one_line_that_keeps_the_file_the_fault_and_the_mend(text, kept):
    message = str(InputError(text))
    assert re.search(kept, message) and len(message) <= 200


def test_the_message_of_a_library_is_one_line_and_its_absence_is_the_class():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError("x" * 50), 20) == "x" * 17 + "..."
    assert one_line(EOFError(), 20) == "EOFError"


def test_bad_input_ends_with_one_line_and_code_2(call):
    def main():
        raise InputError("picture.png is gone: put it back")

    assert call(main) == (2, "", "error: picture.png is gone: put it back\n")


class Broken(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        raise InputError("cannot read InputError: no.png: put it back")


def test_bad_input_met_by_a_loader_worker_is_the_same_one_line(call):
    ended = call(lambda: list(DataLoader(Broken(), num_workers=1)))
    assert ended == (2, "", "error: cannot read InputError: no.png: put it back\n")


def test_interruption_ends_with_code_130(call):
    def main():
        raise KeyboardInterrupt

    assert call(main) == (130, "", "interrupted\n")


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
def test_a_full_disk_is_one_line_whoever_writes(error, call):
    def write() -> None:
        raise error

    ended = call(write)
    assert re.match("error: (no space left|a limit on the size)", ended.refusal) and ended.err.count("\n") == 1
    assert getattr(error, "filename", None) is None or error.filename in ended.refusal


def test_a_recipe_that_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, words in (
        (tmp_path / "pipe.yaml", "it is a pipe"),
        ("/dev/zero", "it is a device"),
        ("--", "takes a file"),
    ):
        with pytest.raises(InputError, match=words):
            read_arguments(Args, [f"--config={path}"])
