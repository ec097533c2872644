"""Trains and measures the tiny encoders of the embedded benchmark: two CLIPs and a TIPSv2.

    zs3 tiny_encoders train --family clip --output DIR [--without scenes:0] [--steps 4000] [--seed 0]
    zs3 tiny_encoders train --family tipsv2 --output DIR
    zs3 tiny_encoders evaluate --model DIR [--proposals runs/stage1/final]

`train` writes weights, tokenizer, results.json and the card, which says the command. `evaluate` measures again and
writes results.json and the card again; with --proposals it also names the proposals of a trained checkpoint.
`zs3/scenes_clip` is the CLIP of the recipes, `zs3/scenes_clip_unseen` never had a caption of an unseen name,
`zs3/scenes_tipsv2` has patch tokens that are aligned with text.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPModel, CLIPTokenizer, Tipsv2Model
from transformers.models.tipsv2.tokenization_tipsv2 import Tipsv2Tokenizer
from typing_extensions import TypedDict

from files_zs3 import read_text
from zs3.checkpoints import check_checkpoint, refusing, weights_sha256
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFolder,
    Seed,
    check_required,
    flag,
    read_arguments,
    shown,
)
from zs3.command_line.flags import is_given
from zs3.files import write_json, write_text, writing_folder
from zs3.scenes import render, tiny_clip, tiny_tipsv2
from zs3.scenes.dataset import world_space
from zs3.scenes.encoder_accuracy import (
    NUM_SCENES,
    PER_CLASS,
    Scores,
    class_text_embeds,
    clip_accuracy,
    clip_namings,
    proposal_accuracy,
    text_cosines,
    tipsv2_accuracy,
    tipsv2_namings,
)
from zs3.tables import markdown_table
from zs3.typed_json import read_json

GROUPS = ("all", "seen", "unseen", "things", "stuff")


@dataclass
class EncoderArgs(Arguments):
    """Trains or measures a tiny encoder of the scenes benchmark."""

    first_words = ("command",)

    command: Literal["train", "evaluate"] | None = flag(None, "What to do; the flag --command may be left out.")
    family: Literal["clip", "tipsv2"] = flag("clip", "Model to train.")
    output: OutputFolder | None = flag(None, "New folder for `train`; it must not exist.")
    without: str | None = flag(None, "Label space, e.g. scenes:0, whose unseen names get no caption; clip alone.")
    steps: Count = flag(4000, "Steps of the training.")
    seed: Seed = flag(0, "Random seed of weights and pictures.")
    model: str | None = flag(None, "Folder that `evaluate` reads, and writes its results and card into.")
    proposals: str | None = flag(None, "Checkpoint whose proposals `evaluate` names, too.")

    def check(self) -> None:
        check_required(self, "command", "output" if self.command == "train" else "model")
        training = ("family", "output", "without", "steps", "seed")
        for name in ("model", "proposals") if self.command == "train" else training:
            if is_given(self, name):
                raise InputError(f"`{self.command}` takes no --{name}: leave it out")
        if self.without is not None and self.family != "clip":
            raise InputError(f"--without is for --family clip, not {self.family}: leave it out")
        hidden_names(self.without)  # refuses an unknown label space before the training


def hidden_names(without: str | None) -> frozenset[str]:
    return frozenset() if without is None else frozenset(world_space(without).unseen)


# ------------------------------------------------------------------------------------------------ measuring


def load(folder: Path) -> tuple[CLIPModel | Tipsv2Model, CLIPTokenizer | Tipsv2Tokenizer]:
    """A folder that `train` made. Raises InputError for another."""
    if not (folder / "tokenizer.json").is_file():  # without it, transformers makes a tokenizer without words
        raise InputError(f"{shown(folder)} has no tokenizer.json: give a folder that `train` made")
    with refusing(f"cannot read {shown(folder)}, give a folder that `train` made"):
        family = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
        if family == "clip":
            return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
        if family == "tipsv2":  # transformers knows the tokenizer by this name alone
            return Tipsv2Model.from_pretrained(folder).eval(), Tipsv2Tokenizer.from_pretrained(folder)
    raise InputError(f"{shown(folder)} holds a {family}: give a folder that `train` made")


def measure(folder: Path, proposals: str | None = None) -> dict[str, Any]:
    """Accuracies in [0, 1] among the 24 class names, and cosines of text vectors."""
    model, tokenizer = load(folder)
    text = class_text_embeds(model, tokenizer, render.CLASS_NAMES)
    is_clip = model.config.model_type == "clip"
    scores, by_name = (clip_accuracy if is_clip else tipsv2_accuracy)(model, text)
    result = {"regions_per_class": PER_CLASS, "accuracy": scores, "by_name": by_name}
    if proposals is not None:
        namings = clip_namings(model) if is_clip else tipsv2_namings(model)
        found, shares = proposal_accuracy(proposals, namings, text)
        path = Path(proposals).resolve()
        name = path.parent.name if path.name == "final" else path.name
        source = {"name": name, "sha256": weights_sha256(proposals)}
        result["proposals"] = {"checkpoint": source, "share_by_purity": shares, "accuracy": found}
    return result | {"text_cosine": text_cosines(model, tokenizer)}


def halve(folder: Path) -> None:
    """Saves the weights as float16. The configuration says float32, also of each tower: so they load as float32."""
    path = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads(read_text(folder / "config.json"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    write_json(folder / "config.json", config)


# ------------------------------------------------------------------------------------------------ the card


def score_table(scores: Scores) -> list[str]:
    rows = [[kind, *("-" if row[g] is None else f"{row[g]:.3f}" for g in GROUPS)] for kind, row in scores.items()]
    return markdown_table(["what the encoder sees", *GROUPS], rows)


def tables(result: dict[str, Any]) -> str:
    """The result of `measure` as Markdown tables."""
    lines = [*score_table(result["accuracy"]), ""]
    if "proposals" in result:
        shares = [f"{share:.0%} have {least}" for least, share in result["proposals"]["share_by_purity"].items()]
        words = result["proposals"]["checkpoint"] | {"num_scenes": NUM_SCENES, "shares": ", ".join(shares)}
        lines += [PROPOSALS.format(**words)]
        lines += [*score_table(result["proposals"]["accuracy"]), ""]
    names = [[name, f"{share:.2f}"] for name, share in result["by_name"].items()]
    lines += [*markdown_table(["class name", "accuracy"], names), ""]
    cosines = [[pair, f"{cosine:.2f}"] for pair, cosine in result["text_cosine"].items()]
    return "\n".join([*lines, *markdown_table(["text vectors of", "cosine"], cosines)])


PROPOSALS = """\
The same on the proposals of a trained segmenter ("{name}"), in {num_scenes} further scenes. The right name of a
proposal is the class of most of its pixels; its purity is the share of these pixels. Of all proposals, by their least
purity: {shares}.
"""
CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: zero-shot-image-classification
tags: [{family}, synthetic]
---
# A tiny {title} for the embedded benchmark `scenes`{without}

transformers' `{kind}` with {num_parameters:,} parameters: {image_size} x {image_size} pixels in patches of
{patch_size}, a text tower of its own small vocabulary, a joint space of {dim} numbers. The weights are stored as
float16.

It knows only synthetic pictures: coloured and patterned shapes on drawn textures, {num_names} names in all. It does
not know photographs or other words. It exists so that zero-shot segmentation can be trained, tested and shown on any
computer, offline.

{how}

{names} Made by

    {command}

with seed {seed}, {steps:,} steps, in {minutes:.0f} minutes on {threads}.

## Accuracy
The task is to choose the right one of 24 class names. There are {regions_per_class} regions of each class, from scenes
that training did not see. The vector of a class is the mean over the 14 ViLD templates. Seen and unseen are those of
the class split `scenes:0`. {rows}

{tables}
"""
HOW = {
    "clip": """Trained from random weights on captions and crops of `zs3.scenes`. The crops are boxes around drawn
objects and textures, whole or in part; rough cut-outs with the mean colour around them, as a segmenter's proposals
look; and product photos: one object alone on a plain backdrop. No label map of the benchmark took part, but the
cut-outs are made from the drawn shapes.""",
    "tipsv2": """Trained from random weights on captions and whole pictures of `zs3.scenes` with the boxes of the
captions, and on crops. No mask took part. Training fits each patch token to one of the names whose boxes touch it, so
the mean of the patch tokens in a mask can be compared with names.""",
}
ROWS = {
    "clip": """Margins are
shares of the box's side, on each side. In "mask" rows and in "crops, mean colour", pixels outside the mask have the
mean colour; in "crops, plain" they are as they are. In "one pass" all proposals are seen in one pass over their
picture. By class name: on boxes with a margin of 0.1.""",
    "tipsv2": """"box": the
mean of the patch tokens in the box; "mask": in the visible part of the region. By class name: on masks.""",
}


def write_card(folder: Path, result: dict[str, Any]) -> None:
    family = result["family"]
    words = {"how": HOW[family], "rows": ROWS[family], "tables": tables(result), "num_names": len(render.WORLD_NAMES)}
    words |= {"title": {"clip": "CLIP", "tipsv2": "TIPSv2"}[family]}
    words |= {"kind": {"clip": "CLIPModel", "tipsv2": "Tipsv2Model"}[family]}
    hidden = result["hidden_names"]
    words["without"] = f", without captions of {len(hidden)} names" * bool(hidden)
    words["threads"] = f"{result['threads']} CPU thread" + "s" * (result["threads"] != 1)
    words["names"] = (
        "The captions hold all names of `scenes`, as web captions hold the classes of any benchmark."
        if not hidden
        else f"No caption holds these {len(hidden)} names, the unseen ones of a class split: {', '.join(hidden)}."
    )
    write_text(folder / "README.md", CARD.format(**result | words))


# ------------------------------------------------------------------------------------------------ commands


class Facts(TypedDict):
    """What results.json and the card say of the training."""

    command: str
    family: Literal["clip", "tipsv2"]
    hidden_names: list[str]
    seed: int
    steps: int
    minutes: float
    threads: int
    num_parameters: int
    image_size: int
    patch_size: int
    dim: int


def train(args: EncoderArgs) -> None:
    folder, hidden = Path(args.output), hidden_names(args.without)
    if folder.exists():
        raise InputError(f"{folder} exists already: give another folder, or remove it first")
    with writing_folder(folder) as unfinished:
        start = time.monotonic()
        if args.family == "clip":
            model = tiny_clip.train(unfinished, args.steps, args.seed, hidden)
        else:
            model = tiny_tipsv2.train(unfinished, args.steps, args.seed)
        result = facts(args, model, (time.monotonic() - start) / 60)
        halve(unfinished)
        result |= measure(unfinished)
        write_json(unfinished / "results.json", result)
        write_card(unfinished, result)
    print(f"{tables(result)}\nthe encoder and its card are in {folder}")


def facts(args: EncoderArgs, model: CLIPModel | Tipsv2Model, minutes: float) -> Facts:
    command = f"zs3 tiny_encoders train --family {args.family} --output {Path(args.output).name}"
    command += f" --without {args.without}" * (args.without is not None)
    vision = model.config.vision_config
    return {
        "command": f"{command} --steps {args.steps} --seed {args.seed}",
        "family": args.family, "hidden_names": sorted(hidden_names(args.without)), "seed": args.seed,
        "steps": args.steps, "minutes": minutes, "threads": torch.get_num_threads(),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": vision.image_size, "patch_size": vision.patch_size,
        "dim": getattr(model.config, "projection_dim", None) or vision.hidden_size,
    }  # fmt: skip


def evaluate(folder: Path, proposals: str | None) -> None:
    path = folder / "results.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: give a folder that `train` made")
    before = read_json(path, Facts, "result file of `train`", "give a folder that `train` made")
    if proposals is not None:
        check_checkpoint("proposals", proposals)
    result = before | measure(folder, proposals)  # without `proposals`, earlier numbers on them stay
    write_json(path, result)
    write_card(folder, result)
    print(f"{tables(result)}\nthe results and the card are in {folder}")


def main() -> None:
    args, _ = read_arguments(EncoderArgs)
    if args.command == "train":
        train(args)
    else:
        evaluate(Path(args.model), args.proposals)
