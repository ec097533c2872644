"""What a training run is about to do: how its batch is cut, what it says before it starts, when it will be done."""

import os
import textwrap
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from tqdm.auto import tqdm

from configuration_zs3 import Zs3Config
from zs3.command_line import InputError
from zs3.data.image_labels import PseudoLabels
from zs3.data.records import Split, StreamedSplit
from zs3.data.samples import SegmentationDataset
from zs3.label_space import FoundIds, LabelSpace
from zs3.training.arguments import TrainArgs
from zs3.training.processes import BatchParts

MOST_LOOKED_AT = 100  # label maps


def check_learnable(records: Split | StreamedSplit, label_space: LabelSpace) -> None:
    """Refuses data without anything to learn, as far as label maps can tell. Mostly the first map shows that there is.

    Where the first MOST_LOOKED_AT maps do not, a training split is read to its end until a seen class is found; of a
    stream no more is looked at.
    """
    if not label_space.seen:
        raise InputError("all classes are unseen, so no mask may be trained on: leave some out of the unseen names")
    streamed = isinstance(records, StreamedSplit)
    found = FoundIds(label_space)
    total = None if streamed else len(records)
    for ids, has_ignored in tqdm(records.ids(), desc="first labels", total=total, unit="map", delay=5, mininterval=1):
        found.add(ids, has_ignored)
        if found.enough or found.num_maps >= MOST_LOOKED_AT and (found.has_seen or streamed):
            break
    fault = found.fault()
    if fault is None:
        return
    if not streamed or found.num_maps < MOST_LOOKED_AT:  # all maps have been looked at
        raise InputError(fault)
    print(f"warning: {fault}")


def describe(
    args: TrainArgs,
    label_space: LabelSpace,
    dataset: SegmentationDataset,
    model: nn.Module,
    parts: BatchParts,
    accelerator: Accelerator,
) -> str:
    """What is about to happen, for the reader of the log."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    unseen = {"none": "not used", "ground_truth": "GROUND-TRUTH image labels"}.get(
        args.unseen_labels, f"pseudo labels of {args.unseen_labels}"
    )
    told = f"{len(label_space.unseen)} names, no masks, {unseen}"
    if args.setting == "supervised":
        told = "none: the MASKS of all classes are trained on, and no zero-shot result can be claimed"
    count = "streamed" if args.streaming else f"{len(dataset)} images"
    nouns = f", {len(dataset.class_names)} names with nouns of {args.caption_nouns}" if args.caption_nouns else ""
    precision = "float32" if args.mixed_precision == "no" else f"{args.mixed_precision} autocast, losses in float32"
    norms = {
        "frozen": "frozen",
        "batch": f"of {parts.images} images, which a process takes at once",
        "sync": f"of {parts.processes * parts.images} images, which all processes take at once",
    }
    remade = ", activations made anew for the gradient" if args.activation_checkpointing else ""
    trackers = f", also to {', '.join(args.trackers)} (trackers)" if args.trackers else ""
    lines = [
        f"data      {args.dataset} ({args.split}): {count}",
        f"setting   {args.setting}, label space {args.label_space or args.dataset}",
        f"seen      {len(label_space.seen)} names with masks{nouns}",
        *names_lines(label_space.seen),
        f"unseen    {told}",
        *names_lines(label_space.unseen),
        *pseudo_label_lines(dataset, model.config.pseudo_label_threshold),
        f"start     {start_text(args)}",
        f"model     {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen",
        f"losses    {losses_text(model.config)}",
        f"rate      {rate_text(args)}",
        f"batch     {args.batch_size} images: processes x micro-batches x images at once = "
        f"{parts.processes} x {parts.micro_batches} x {parts.images}",
        f"steps     {args.max_steps}",
        f"precision {precision}{remade}",
        f"norms     statistics of the backbone's batch norms are {norms[args.backbone_norm]}",
        f"device    {device_text(accelerator)}",
        f"output    {args.output_dir}: checkpoints every {args.checkpointing_steps} steps (the last "
        f"{args.checkpoints_kept} stay),",
        f"          metrics.jsonl every {args.logging_steps}{trackers}, final at the end, then all_results.json",
    ]
    return "\n".join([*lines, *(f"note      {note}" for note in notes(args, dataset, parts, accelerator))])


def pseudo_label_lines(dataset: SegmentationDataset, threshold: float) -> list[str]:
    if not isinstance(dataset.told, PseudoLabels):
        return []
    labels, images, all_images = dataset.told.positives
    return [f"          positive at the threshold of {threshold}: {labels} labels, in {images} of {all_images} images"]


def start_text(args: TrainArgs) -> str:
    """Where the weights and the text vectors come from."""
    random = "random weights"
    if args.backbone is not None:
        random = f"backbone {args.backbone} (--backbone), else random weights"
    start = f"{args.mask2former} (--mask2former)" if args.mask2former is not None else random
    if args.init_from is not None:
        part = "backbone of " if args.init_parts == "backbone" else ""
        start = f"{part}{args.init_from} (--init_from{', --init_parts backbone' if part else ''})"
    text = f"text tower of {args.init_from or args.clip}"
    return f"{start}; {text if args.text_embeds is None else f'text vectors of {args.text_embeds}'}"


def losses_text(config: Zs3Config) -> str:
    """The terms of Eq. 8 and of the label map loss, those of weight 0 aside."""
    terms = {
        f"class ({config.class_loss})": config.class_weight,
        f"mask ({config.mask_loss})": config.mask_weight,
        "dice": config.dice_weight,
        "rank": config.rank_weight,
        "label map": config.label_map_weight,
    }
    weighted = " + ".join(f"{weight:g} x {name}" for name, weight in terms.items() if weight)
    return f"{weighted or 'none'}, matching {config.matching}"


def rate_text(args: TrainArgs) -> str:
    steps = [str(step) for step in args.lr_milestones if step < args.max_steps]
    schedule = f"divided by 10 at step {', '.join(steps)}" if steps else "constant"
    if args.lr_schedule == "poly":
        schedule = f"falling to 0 at step {args.max_steps} (poly)"
    return f"{args.learning_rate:g}, {schedule}; of the backbone x {args.backbone_multiplier:g}"


def device_text(accelerator: Accelerator) -> str:
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    device = accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if processes == 1 and kind != DistributedType.FSDP:
        return f"{where}, one process"
    return f"{where}, {'FSDP2' if kind == DistributedType.FSDP else 'DDP'} with {processes} processes"


def notes(args: TrainArgs, dataset: SegmentationDataset, parts: BatchParts, accelerator: Accelerator) -> Iterator[str]:
    """What of this plan may not be what was meant."""
    if isinstance(dataset.told, PseudoLabels) and not dataset.told.positives.labels:
        yield "no pseudo label reaches --pseudo_label_threshold: no unseen class is said to be in any image"
    share = parts.micro_batches * parts.images
    if args.device_batch_size is not None and parts.images < min(args.device_batch_size, share):
        yield (
            f"--device_batch_size {args.device_batch_size} does not divide a process's {share} images: "
            f"it takes {parts.images} at once"
        )
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched_with not in ("no", args.mixed_precision):
        yield (
            f"accelerate was given mixed precision {launched_with}, which does not count here: the flag "
            "--mixed_precision behind train.py does"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        yield "accelerate was asked for FSDP, which it has on GPUs only: it is not in force"
    late = [step for step in args.lr_milestones if step >= args.max_steps]
    if args.lr_schedule == "multistep" and late:
        yield f"learning rate steps {late} lie beyond the end and are ignored"
    from_scratch = args.init_from is None and args.mask2former is None and args.backbone is None
    if from_scratch and args.backbone_norm == "frozen":
        yield "the backbone starts from random weights: it learns better with --backbone_norm batch"


def names_lines(names: list[str]) -> list[str]:
    """Lines of names, none of them broken."""
    whole = ", ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
    lines = textwrap.wrap(whole, width=110, break_on_hyphens=False)
    return [" " * 10 + line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
