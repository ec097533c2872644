"""Every recipe is accepted, repeats no default, and makes the model of its row in the paper."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configuration_zs3 import Zs3Config
from modeling_zs3 import Zs3ForSemanticSegmentation
from zs3.ablation.jobs import AblationArgs
from zs3.command_line import read_arguments
from zs3.convert.__main__ import ConvertArgs
from zs3.convert.nouns import NounArgs
from zs3.data.check import CheckArgs
from zs3.evaluation.arguments import EvalArgs
from zs3.pseudo_labels import PseudoLabelArgs
from zs3.scenes.__main__ import SceneArgs
from zs3.training.arguments import TrainArgs

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
STAGE2 = [path for path in RECIPES if "_stage2" in path.stem]
RUN_FIELDS = {field.name for field in fields(TrainArgs)}
SIZES = ("crop_size", "short_edges", "max_size", "test_short_edge", "color_jitter")
COMMANDS = {
    "train.py": TrainArgs,
    "eval.py": EvalArgs,
    "check": CheckArgs,
    "convert": ConvertArgs,
    "nouns": NounArgs,
    "zs3.pseudo_labels": PseudoLabelArgs,
    "ablation": AblationArgs,
    "scenes": SceneArgs,
}


def read(recipe: Path, *flags: str) -> tuple[TrainArgs, dict[str, Any]]:
    return read_arguments(TrainArgs, ["--config", str(recipe), *flags], Zs3Config, check=False)


def stage1_of(recipe: Path) -> Path:
    return recipe.with_name(recipe.name.split("_stage2")[0] + "_stage1.yaml")


def shapes(overrides: dict[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = Zs3ForSemanticSegmentation(Zs3Config(**overrides))
    return {name: weight.shape for name, weight in model.state_dict().items() if name != "background_embed"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_only_what_differs_from_the_defaults(recipe):
    """In stage 2 the values of stage 1 are defaults too, because --init_from brings them."""
    args, overrides = read(recipe)
    said = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert said.keys() == overrides.keys() | (said.keys() & RUN_FIELDS)
    repeated = [name for name in said.keys() & RUN_FIELDS if getattr(args, name) == getattr(TrainArgs(), name)]
    before = read(stage1_of(recipe))[1] if recipe in STAGE2 else {}
    for name, value in overrides.items():
        if value == getattr(Zs3Config(), name) and value == before.get(name, value):
            repeated.append(name)
    assert not repeated


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path not in STAGE2], ids=lambda path: path.stem)
def test_stage_one_is_joint_and_has_the_architecture_it_says(recipe):
    args, overrides = read(recipe)
    config = Zs3Config(**overrides)
    assert (config.matching, config.class_loss, config.rank_weight) == ("joint", "cross_entropy", 0)
    assert args.unseen_labels == "none" and args.init_from is None
    found = shapes(overrides)
    assert found["model.transformer_module.queries_features.weight"] == (config.num_queries, config.hidden_dim)
    decoder = {name.split(".")[4] for name in found if name.startswith("model.transformer_module.decoder.layers.")}
    assert len(decoder) == config.decoder_layers - 1
    sizes = {"swin": [192, 384, 768, 1536], "scenes_": [32, 64, 96, 128]}
    stages = [value for name, value in sizes.items() if name in recipe.stem] or [[256, 512, 1024, 2048]]
    inputs = [f"model.pixel_level_module.decoder.input_projections.{index}.0.weight" for index in range(3)]
    assert [found[name][1] for name in inputs] == stages[0][:0:-1]


@pytest.mark.parametrize("recipe", STAGE2, ids=lambda path: path.stem)
def test_stage_two_fits_its_stage_one(recipe):
    """It has the same weights and sizes of pictures, and names every loss that stage 1 does not have from the paper."""
    (first_args, before), (args, after) = read(stage1_of(recipe)), read(recipe)
    assert shapes(before) == shapes(before | after)
    assert all(getattr(first_args, name) == getattr(args, name) for name in SIZES)
    assert {"class_loss", "matching", "rank_weight", "mask_loss"} <= after.keys()


def test_the_numbers_of_section_4_3_are_those_of_the_run():
    args, overrides = read(ROOT / "recipes/coco_stuff_stage2_pseudo.yaml")
    numbers = (args.learning_rate, args.weight_decay, args.backbone_multiplier, args.batch_size, args.max_steps)
    assert numbers == (5e-5, 1e-4, 0.1, 8, 50_000) and args.lr_milestones == [5_000, 80_000]
    config = Zs3Config(**overrides)
    weights = (config.class_weight, config.mask_weight, config.dice_weight, config.rank_weight, config.matched_weight)
    assert weights == (2, 5, 5, 1, 0.6) and config.num_queries == 100
    voc, _ = read(ROOT / "recipes/voc_stage2_pseudo.yaml")
    assert {name for name in RUN_FIELDS if getattr(voc, name) != getattr(args, name)} == {
        *("unseen_labels", "max_steps", "crop_size", "max_size", "test_short_edge")
    }


def table(text: str) -> list[list[str]]:
    """The rows of our own results in the paper, as docs/training.md has them: row, recipe, flags of eval.py."""
    rows = re.findall(r"^\| (Table \d.*?) \| `(\w+)` \| (.*?) \|$", text, re.MULTILINE)
    return [[row, recipe, flags.strip("`")] for row, recipe, flags in rows]


def test_every_row_of_the_paper_has_a_recipe():
    found = {}
    for row, name, flags in table((ROOT / "docs/training.md").read_text(encoding="utf-8")):
        args, overrides = read(ROOT / f"recipes/{name}.yaml")
        config = Zs3Config(**overrides)
        evaluation, _ = read_arguments(EvalArgs, ["--model", "MODEL", "--dataset", "DATA", *shlex.split(flags)])
        labels = args.caption_nouns or args.unseen_labels
        losses = (config.class_loss, config.rank_weight)
        ensemble = evaluation.ensemble or config.clip_ensemble_weight
        found[row] = (labels, *losses, args.prompt_templates, evaluation.setting, ensemble)
    ours = ("background_aware", 1.0, None, "gzs3")
    coco, voc = "runs/coco_stuff_pseudo_labels", "runs/voc_pseudo_labels"
    assert found == {
        "Table 1": (coco, *ours, 0.8),
        "Table 2": (voc, *ours, 0.7),
        "Table 3, COCO-Stuff": (coco, *ours[:3], "ovs", "off"),
        "Table 3, COCO-Stuff + COCO Caption": ("runs/nouns", *ours[:3], "ovs", "off"),
        "Table 4, VOC-20, without ensemble": (voc, *ours, "off"),
        "Table 4, VOC-20, with ensemble": (voc, *ours, 0.7),
        "Table 4, COCO-Stuff, without ensemble": (coco, *ours, "off"),
        "Table 4, COCO-Stuff, with ensemble": (coco, *ours, 0.8),
        "Table 5, no unseen labels": ("none", *ours, 0.8),
        "Table 5, pseudo labels": (coco, *ours, 0.8),
        "Table 5, ground truth": ("ground_truth", *ours, 0.8),
        "Table 6, CE": ("ground_truth", "cross_entropy", 0, ["{}"], "gzs3", 0.8),
        "Table 6, CE + KL": ("ground_truth", "background_aware", 0, ["{}"], "gzs3", 0.8),
        "Table 6, CE + KL + R": ("ground_truth", "background_aware", 1.0, ["{}"], "gzs3", 0.8),
        "Table 6, CE + KL + R + P": ("ground_truth", *ours, 0.8),
    }


@pytest.mark.parametrize("document", ["data.md", "training.md"])
def test_the_commands_of_the_docs_are_understood(document):
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    understood = set()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.strip().replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            found = [word for word in words[1:] if word in COMMANDS][:1]
            if not found:
                assert not words or line.startswith("pip install -c constraints.txt")
                continue
            for place in [words[index + 1] for index, word in enumerate(words) if word.startswith("--config")]:
                assert (ROOT / place).exists(), place
            words = words[words.index(found[0]) + 1 :]
            words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
            is_there = COMMANDS[found[0]] in (TrainArgs, EvalArgs)
            read_arguments(COMMANDS[found[0]], words, Zs3Config if found == ["train.py"] else None, check=is_there)
            understood.add(found[0])
    assert {"train.py", "eval.py", "zs3.pseudo_labels", "convert"} <= understood
