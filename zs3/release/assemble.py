"""Joins published parts into a checkpoint that names without training.

    zs3 assemble --proposals facebook/mask2former-swin-tiny-coco-panoptic --encoder google/tipsv2-b14 --output DIR

The Mask2Former, or the network of a checkpoint of this project, proposes masks. The image tower of the encoder, a CLIP
or a TIPSv2, sees every proposal, and its text tower reads the names. Nothing is trained. The folder has weights, code,
processor and a card; `pipeline`, `eval.py --setting ovs`, `train.py --init_from`, `zs3 release` and `zs3 doctor` take
it.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from transformers import Mask2FormerImageProcessorPil, PreTrainedConfig

from configuration_zs3 import PatchTokens, RegionView, Zs3Config, among, one_line, places, shortened
from encoders_zs3 import FAMILIES, family_of
from files_zs3 import read_text
from modeling_zs3 import Zs3ForSemanticSegmentation, proposal_config
from pipeline_zs3 import Zs3Pipeline
from processing_zs3 import Zs3ImageProcessor, Zs3Processor, saved_processor
from text_zs3 import TextCache
from zs3.checkpoints import (
    check_checkpoint,
    check_finite,
    config_of,
    load_texts,
    refusing,
    weight_headers,
    weights_sha256,
)
from zs3.command_line import (
    Arguments,
    InputError,
    OutputFolder,
    check_required,
    flag,
    looks_local,
    read_arguments,
    shown,
)
from zs3.evaluation.report import IMAGE_LABELS
from zs3.files import project_folder, write_text, writing_folder
from zs3.label_space import BENCHMARKS, is_hub_id, load_label_space
from zs3.tables import markdown

CARD = project_folder("hub_cards") / "assembled.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]  # of a Hub checkpoint
PROCESS_MIB = 450  # of memory, without the weights
SIDES = (640, 480)  # of the picture that is named at the end
LABELS = ["sky", "grass", "road", "person", "building", "tree", "car", "water", "wall", "dog"]
COCO_PANOPTIC = ("banner", "blanket", "wall-brick", "tree-merged")  # names that no other set has
UNKNOWN = "unknown masks"
MERGED = ("-merged", "-other", "-stuff")  # ends of COCO-panoptic's names


@dataclass
class AssembleArgs(Arguments):
    """Joins a Mask2Former and an encoder into a checkpoint that labels images without training."""

    proposals: str | None = flag(
        None, "Mask2Former, or checkpoint of train.py, that proposes masks (Hub id or folder)."
    )
    encoder: str | None = flag(None, "CLIP or TIPSv2 that names them (Hub id or folder).")
    output: OutputFolder | None = flag(None, "New folder of the checkpoint.")
    proposals_revision: str | None = flag(None, "Branch, tag or commit of --proposals on the Hub.")
    encoder_revision: str | None = flag(None, "Branch, tag or commit of --encoder on the Hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the saved weights.")
    region_view: RegionView = flag(
        "single_pass",
        "crops: a crop of each proposal; single_pass: all in one pass over the image; mixed: crops of the largest, one "
        "pass for the others.",
    )
    patch_tokens: PatchTokens = flag(
        "values",
        "TIPSv2 in one pass: 'values', no attention in the last block, as published; or 'attention', as in training.",
    )
    objectness: bool = flag(
        False, "Multiply by 1 - the probability of 'no object', which needs a class predictor of the proposals."
    )
    prompt_templates: list[str] | None = flag(
        None, "Prompts with {} for the name; default: those of the encoder's family."
    )

    def check(self) -> None:
        check_required(self, "proposals", "encoder", "output")
        wrong = [template for template in self.prompt_templates or [] if "{}" not in template]
        if wrong:
            raise InputError(f"--prompt_templates needs '{{}}' where the name goes, got {shortened(wrong[0])}")


# ---- the parts ---------------------------------------------------------------------------------------------


def local_copy(flag_name: str, source: str, revision: str | None) -> Path:
    """The folder of a checkpoint; of a Hub id, after a download if needed. Raises InputError."""
    if looks_local(source) or Path(source).is_dir() or not is_hub_id(source):
        if not Path(source).is_dir():
            raise InputError(f"--{flag_name} {shown(source)}: no such folder, and no Hub id of the form owner/name")
        if revision is not None:
            raise InputError(f"--{flag_name}_revision is for a Hub id, and {shown(source)} is a folder: leave it out")
        return Path(source)
    where = f"--{flag_name} {shown(source)}"
    with refusing(f"{where} cannot be downloaded"):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=FILES, ignore_patterns=["*/*"]))
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{where} has no safetensors weights on this disk: take a revision that has them")
    return folder


def licence_of(folder: Path) -> str:
    """What the README of a checkpoint declares as its licence."""
    path = folder / "README.md"
    if not path.is_file():
        return "not declared"
    try:
        data = ModelCard(read_text(path), ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"not readable ({one_line(error, 60)})"
    found = getattr(data, "license_name", None) or data.license or "not declared"
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)


def first_names(names: Iterable[str]) -> list[str]:
    """Of names with synonyms after commas, as ADE20K has them, the first."""
    return [str(name).split(",")[0] for name in names]


def masks_of(config: PreTrainedConfig) -> str:
    """The data set whose masks a Mask2Former was trained on, by the names of its classes."""
    if isinstance(config, Zs3Config):  # id2label is its vocabulary
        return UNKNOWN
    names = first_names(config.id2label.values())
    if None not in places(COCO_PANOPTIC, names):
        return "COCO-panoptic"
    known = first_names(load_label_space("ade20k_150").class_names)
    if len(names) == len(known) and sum(among(names, known)) > 0.8 * len(known):
        return "ADE20K (150 classes)"
    return UNKNOWN


def shared_classes(names: list[str]) -> list[dict[str, str]]:
    """For each benchmark of real pictures how many of its classes have one of these names."""

    def plain(some: list[str]) -> list[str]:
        for end in MERGED:
            some = [name.removesuffix(end) for name in some]
        return some

    def count(classes: list[str]) -> str:
        known, classes = [*names, *plain(names)], first_names(classes)
        found = map(any, zip(among(classes, known), among(plain(classes), known), strict=True))
        return f"{sum(found)} of {len(classes)}" if classes else "-"

    spaces = {name: load_label_space(name) for name in BENCHMARKS if not name.startswith("scenes")}
    return [{"name": n, "classes": count(s.class_names), "unseen": count(s.unseen)} for n, s in spaces.items()]


def image_processor_of(folder: Path, own: bool) -> Zs3ImageProcessor:
    """An image processor with the size and the normalisation of a Mask2Former's; without one, this project's.

    own: it is a checkpoint of this project.
    """
    if own:
        return saved_processor(str(folder), text=False)
    if not (folder / "preprocessor_config.json").is_file():
        return Zs3ImageProcessor()
    its = Mask2FormerImageProcessorPil.from_pretrained(folder)
    if not (its.do_rescale and its.do_normalize):
        raise InputError("preprocessor_config.json turns do_rescale or do_normalize off, which no Mask2Former needs")
    size = {name: side for name, side in dict(its.size).items() if side is not None}
    return Zs3ImageProcessor(size=size, image_mean=list(its.image_mean), image_std=list(its.image_std))


def assemble(
    args: AssembleArgs, proposals: Path, encoder: Path, config: PreTrainedConfig
) -> tuple[Zs3ForSemanticSegmentation, Zs3Processor]:
    """The joined model, in the type of --dtype, and its processor. config: that of the proposals."""
    own = isinstance(config, Zs3Config)
    image_processor = image_processor_of(proposals, own)
    classes = config.proposal_classes if own else config.num_labels
    if args.objectness and not classes:
        raise InputError(f"--objectness needs the class predictor of a Mask2Former, and {shown(proposals)} has none")
    torch.manual_seed(0)  # of the class embeddings, which nothing uses before a training
    model = Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(
        str(proposals),
        str(encoder),
        class_head="regions",
        region_view=args.region_view,
        patch_tokens=args.patch_tokens,
        proposal_classes=classes,
        objectness=args.objectness,
        clip_ensemble_weight=None,
        pixel_mean=list(image_processor.image_mean),
        pixel_std=list(image_processor.image_std),
    )
    model = model.to(DTYPES[args.dtype]).eval()
    check_finite(model, f"{shown(proposals)} with {shown(encoder)} as {args.dtype}")
    text_config = model.config.text_config
    tokenizer, templates = load_texts(str(encoder), text_config, family_of(text_config).templates)
    return model, Zs3Processor(image_processor, tokenizer, args.prompt_templates or templates)


# ---- what is told ------------------------------------------------------------------------------------------


def part(source: str, folder: Path, what: str) -> dict[str, str]:
    """A row of the card's table of parts. What is not from the Hub is named by a digest of its weights."""
    commit = folder.name if folder.parent.name == "snapshots" else f"sha256 {weights_sha256(str(folder))[:12]}"
    name = source if is_hub_id(source) and not Path(source).is_dir() else Path(source).name
    row = {"what": what, "name": name, "revision": commit, "licence": licence_of(folder)}
    return {title: markdown(text) for title, text in row.items()}


def card(
    args: AssembleArgs, model: Zs3ForSemanticSegmentation, folders: dict[str, Path], config: PreTrainedConfig
) -> str:
    """config: that of the proposals."""
    seen, family = model.config.seen_class_names, family_of(model.config.vision_config)
    masks = masks_of(config) if seen is None else f"{len(seen)} classes"
    is_known = seen is None and masks != UNKNOWN  # the card then lists what benchmarks share with these masks
    parts = [
        part(args.proposals, folders["proposals"], f"proposals, trained on {masks}"),
        part(args.encoder, folders["encoder"], f"text and image encoder ({family.title})"),
    ]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    facts = {
        "folder": args.output,
        "parts": parts,
        "masks": masks,
        "unknown": masks == UNKNOWN,
        "seen": None if seen is None else markdown(", ".join(seen) or "no class"),
        "image_labels": IMAGE_LABELS.get(model.config.unseen_labels, "unknown image labels"),
        "benchmarks": shared_classes(first_names(config.id2label.values())) if is_known else [],
        "config": model.config,
        "name": Path(args.output).name,
    }
    return template.from_string(read_text(CARD)).render(**facts)


def parts_line(folders: Iterable[Path]) -> str:
    """The size of the parts, and the memory for joining them: they are there twice, in float32."""
    count = sum(math.prod(shape) for folder in folders for *_, shape in weight_headers(folder))
    memory = 2 * 4 * count / 2**20 + PROCESS_MIB
    return f"parts     {count / 1e6:.0f} M weights; joining them takes about {memory:,.0f} MiB of memory"


def weights_line(model: Zs3ForSemanticSegmentation, dtype: str) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"weights   {count / 1e6:.0f} M, {count * DTYPES[dtype].itemsize / 2**20:,.0f} MiB as {dtype}"


def try_out(model: Zs3ForSemanticSegmentation, processor: Zs3Processor) -> str:
    """Names a picture of noise, twice. Returns a line with the seconds."""
    segment = Zs3Pipeline(model=model, processor=processor, image_processor=processor.image_processor)
    segment.text_cache = TextCache(folder=None)
    image, seconds = Image.effect_noise(SIDES, 80).convert("RGB"), []
    for labels in (LABELS[:-1], LABELS):
        start = time.perf_counter()
        segment(image, candidate_labels=labels)
        seconds.append(time.perf_counter() - start)
    size = "{} x {}".format(*SIDES)
    return f"time      {seconds[-1]:.1f} s for a picture of {size}, {len(LABELS)} labels, on {model.device.type}"


# ---- the command -------------------------------------------------------------------------------------------


def main() -> None:
    args, _ = read_arguments(AssembleArgs)
    output = Path(args.output)
    if output.exists():
        raise InputError(f"{output} exists already: give another folder, or remove it first")
    kinds = {"proposals": ("mask2former", "zs3"), "encoder": tuple(FAMILIES)}
    folders = {}
    for name, types in kinds.items():
        folders[name] = local_copy(name, getattr(args, name), getattr(args, f"{name}_revision"))
        (other,) = kinds.keys() - {name}
        found = config_of(f"--{name}", str(folders[name])).get("model_type")
        if found in kinds[other]:
            raise InputError(f"--{name} {shown(folders[name])} is a {found!r}: give it as --{other}")
        check_checkpoint(name, str(folders[name]), types)
    config = proposal_config(str(folders["proposals"]))
    print(parts_line(folders.values()), flush=True)
    print("joining the parts ...", flush=True)
    with refusing("these parts do not fit together"):
        model, processor = assemble(args, folders["proposals"], folders["encoder"], config)
        print(weights_line(model, args.dtype), flush=True)
        print("naming a picture of noise ...", flush=True)
        time_line = try_out(model, processor)
    with writing_folder(output) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        write_text(unfinished / "README.md", card(args, model, folders, config))
    print(time_line)
    print(f"the checkpoint is in {output}; its README.md says what it is made of")
