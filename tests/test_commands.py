"""The command `zs3`: the list of commands, the --help of each, and the spellings of version 0.1.0."""

import re
import runpy
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from transformers import Mask2FormerConfig

from configuration_zs3 import Zs3Config
from zs3.__main__ import COMMANDS, main
from zs3.command_line import model_fields, read_arguments
from zs3.training.arguments import TrainArgs

ROOT = Path(__file__).parents[1]
NAMES = [name for name, *_ in COMMANDS]
OLD = ["check", "compare", "demo", "doctor", "ensemble_weight", "export", "figure", "nouns"]


@pytest.fixture(autouse=True)
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_list_of_commands_is_in_order_and_fits_a_screen(words, call):
    ended = call(main, *words)
    lines = ended.out.splitlines()
    assert ended.code == 0
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line.startswith("  ")][: len(NAMES)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_names_it_and_fits_a_screen(name, call):
    ended = call(main, name, "--help")
    lines = ended.out.splitlines()
    assert ended.code == 0
    assert lines[0].startswith(f"usage: zs3 {name} ") and lines[2]
    assert len(lines) <= 40 and max(map(len, lines)) <= 100


def test_words_may_be_joined_by_hyphens(call):
    assert call(main, "ensemble-weight", "--help").out.startswith("usage: zs3 ensemble_weight ")


@pytest.mark.parametrize(
    ("word", "mend"),
    [
        ("chek", "did you mean check?"),
        ("xyz", "see --help"),
        ("train", "in the repository, run: accelerate launch train.py"),
        ("x" * 1000, ""),
    ],
)
def test_an_unknown_command_is_one_line_and_exit_code_2(word, mend, call):
    line = call(main, word).refusal
    assert line.startswith(f"error: zs3 has no command '{word[:6]}") and line.endswith(mend) and len(line) <= 207


def test_the_package_is_the_command(tmp_path):
    command = [sys.executable, "-m", "zs3", "check", "--dataset", "nowhere/at/all"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: nowhere/at/all does not exist")


def run_module(name: str, monkeypatch) -> None:
    """Runs `python -m zs3.NAME --help` in this process."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    module = f"zs3.{name}.__main__" if (ROOT / "zs3" / name).is_dir() else f"zs3.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns if the module is already imported
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"zs3.{name}", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0


@pytest.mark.parametrize("name", OLD)
def test_an_old_spelling_runs_and_names_the_new_one(name, monkeypatch, capsys):
    run_module(name, monkeypatch)
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: zs3 {name} ")
    assert shown.err == f"note: python -m zs3.{name} is called zs3 {name} now\n"


@pytest.mark.parametrize("name", ["convert", "release", "ablation", "scenes", "pseudo_labels"])
def test_a_public_module_runs_without_a_note(name, monkeypatch, capsys):
    run_module(name, monkeypatch)
    assert capsys.readouterr().err == ""


def test_an_old_module_cannot_be_imported_and_the_message_names_its_command():
    with pytest.raises(ModuleNotFoundError, match="its command is `zs3 check`"):
        import_module("zs3.check")


# ---- train.py --------------------------------------------------------------------------------------------------


def test_every_flag_of_training_has_its_help(call):
    """The help of a field of the model comes from the docstring of Zs3Config or of Mask2FormerConfig."""
    shown = call(lambda: read_arguments(TrainArgs, ["--help"], Zs3Config)).out
    flags = re.split(r"^  --", shown, flags=re.MULTILINE)[1:]
    words = {flag.split()[0]: len(flag.split()) for flag in flags}
    names = [*(field.name for field in fields(TrainArgs)), *model_fields(Zs3Config)]
    assert [name for name in names if words.get(name, 0) < 5] == []


def test_the_text_of_a_field_is_whole_and_its_own(call):
    class Config(Mask2FormerConfig):
        """A configuration.

        Losses:
            rank_weight, dice_weight: weights of two
                losses, in [0, 100 %]: both
                of them.

            kl: which way.
        Fields that nobody declared: nothing.
        """

        rank_weight: float = 1.0
        kl: str = "p_u"

    words = " ".join(call(lambda: read_arguments(TrainArgs, ["--help"], Config)).out.split())
    assert "--rank_weight VALUE [VALUE ...] weights of two losses, in [0, 100 %]: both of them. (default: 1.0)" in words
    assert "--dice_weight VALUE [VALUE ...] weights of two losses" in words
    assert "--kl VALUE [VALUE ...] which way. (default: p_u)" in words
    assert "--num_queries VALUE [VALUE ...] Number of queries for the decoder. (default: 100)" in words
