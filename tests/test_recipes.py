"""Every recipe is accepted, field by field, and makes the model it describes."""

import re
import shlex
from pathlib import Path

import pytest

from configuration_zs3 import Zs3Config
from eval import EvalArgs
from train import TrainArgs
from zs3.check import CheckArgs
from zs3.command_line import read_arguments
from zs3.convert import ConvertArgs
from zs3.nouns import NounArgs
from zs3.pseudo_labels import PseudoLabelArgs

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_field_of_a_recipe_is_one_of_the_run_or_of_the_model(recipe):
    args, overrides = read_arguments(TrainArgs, ["--config", str(recipe)], config_class=Zs3Config)
    config = Zs3Config(**overrides)
    assert all(getattr(config, name) == value for name, value in overrides.items() if name != "backbone_config")
    assert args.max_steps != TrainArgs().max_steps, "the recipe's own number of steps did not arrive"


@pytest.mark.parametrize("recipe", [path for path in RECIPES if "stage2" in path.stem], ids=lambda path: path.stem)
def test_stage_two_says_every_loss_in_which_stage_one_differs_from_the_paper(recipe):
    first = recipe.with_name(recipe.name.split("_stage2")[0] + "_stage1.yaml")
    losses = {"class_loss", "matching", "rank_weight", "mask_loss"}
    _, before = read_arguments(TrainArgs, ["--config", str(first)], config_class=Zs3Config)
    _, after = read_arguments(TrainArgs, ["--config", str(recipe)], config_class=Zs3Config)
    assert losses & before.keys() <= after.keys()


def test_the_rows_of_tables_5_and_6_are_flags():
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (Table [56], .*?) \| `(.*?)` \|$", text, re.MULTILINE))
    assert len(rows) == 7
    read = {}
    for row, flags in rows.items():
        argv = ["--config", str(ROOT / "recipes/scenes_stage2_ground_truth.yaml"), *shlex.split(flags)]
        args, overrides = read_arguments(TrainArgs, argv, config_class=Zs3Config)
        config = Zs3Config(**overrides)
        read[row] = (args.unseen_labels, config.class_loss, config.rank_weight, args.prompt_templates)
    assert read == {
        "Table 5, no unseen labels": ("none", "background_aware", 1.0, None),
        "Table 5, pseudo labels": ("runs/pseudo_labels", "background_aware", 1.0, None),
        "Table 5, ground truth": ("ground_truth", "background_aware", 1.0, None),
        "Table 6, CE with background": ("ground_truth", "cross_entropy", 0, ["{}"]),
        "Table 6, + KL": ("ground_truth", "background_aware", 0, ["{}"]),
        "Table 6, + ranking": ("ground_truth", "background_aware", 1.0, ["{}"]),
        "Table 6, + prompts": ("ground_truth", "background_aware", 1.0, None),
    }


def test_the_commands_of_the_docs_of_data_are_understood():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").replace("RECIPE", "recipes/photographs_stage1.yaml")
    kinds = {
        "train.py": TrainArgs,
        "eval.py": EvalArgs,
        "zs3.pseudo_labels": PseudoLabelArgs,
        "zs3.nouns": NounArgs,
        "zs3.check": CheckArgs,
        "zs3.convert": ConvertArgs,
    }
    understood = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.strip().splitlines():
            words = shlex.split(line)
            found = [name for name in kinds if name in words]
            if not found:
                assert line.startswith("pip install -c constraints.txt")
                continue
            words = words[words.index(found[0]) + 1 :]
            words = words if words[0].startswith("--") else ["--name", *words]
            words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
            args, _ = read_arguments(kinds[found[0]], words, config_class=Zs3Config if found == ["train.py"] else None)
            if kinds[found[0]] in (TrainArgs, EvalArgs):
                args.check()
            understood.append(found[0])
    assert set(understood) == set(kinds)
