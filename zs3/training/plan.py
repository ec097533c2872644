"""The description that a run prints before its first step."""

import os
import textwrap
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env

from configuration_zs3 import Zs3Config
from zs3.data.batches import BatchParts
from zs3.data.image_labels import PseudoLabels
from zs3.training.arguments import TrainArgs
from zs3.training.start import Start


def describe(args: TrainArgs, start: Start, parts: BatchParts, accelerator: Accelerator) -> str:
    model, space, dataset = start.model, start.label_space, start.dataset
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    count = "streamed" if args.streaming else f"{len(dataset)} images"
    nouns = f", {len(dataset.class_names)} names with the nouns of {args.caption_nouns}" if args.caption_nouns else ""
    text = f"text tower of {args.init_from or args.encoder}"
    if args.text_embeds is not None:
        text = f"text vectors of {args.text_embeds}"
    schedule = schedule_text(args.lr_schedule, args.lr_milestones, args.max_steps)
    precision = "float32" if args.mixed_precision == "no" else f"{args.mixed_precision} autocast, losses in float32"
    norms = {
        "frozen": "frozen",
        "batch": f"of the {parts.images} images that a process computes at once",
        "sync": f"of the {parts.processes * parts.images} images that all processes compute at once",
    }
    twice = ", activations computed twice" if args.activation_checkpointing else ""
    trackers = f", also to {', '.join(args.trackers)} (trackers)" if args.trackers else ""
    lines = [
        f"data      {args.dataset} ({args.split}): {count}",
        f"training  {args.supervision}, label space {args.label_space or args.dataset}",
        f"seen      {len(space.seen)} names with masks{nouns}",
        *names_lines(space.seen),
        f"unseen    {unseen_text(args.unseen_labels, len(space.unseen))}",
        *names_lines(space.unseen),
        *pseudo_label_lines(start),
        f"start     {weights_text(args.init_from, args.init_parts, args.proposals, args.backbone)}; {text}",
        f"model     {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen",
        f"losses    {losses_text(model.config)}",
        f"rate      {args.learning_rate:g}, {schedule}; of the backbone x {args.backbone_multiplier:g}",
        f"batch     {args.batch_size} images: processes x micro-batches x images at once = "
        f"{parts.processes} x {parts.micro_batches} x {parts.images}",
        f"steps     {args.max_steps}",
        f"precision {precision}{twice}",
        f"norms     statistics of the backbone's batch norms are {norms[args.backbone_norm]}",
        f"device    {device_text(accelerator)}",
        f"output    {args.output_dir}: checkpoints every {args.checkpointing_steps} steps (the last "
        f"{args.checkpoints_kept} are kept),",
        f"          metrics.jsonl every {args.logging_steps}{trackers}, final at the end, then all_results.json",
    ]
    return "\n".join([*lines, *(f"note      {note}" for note in notes(args, start, parts, accelerator))])


def names_lines(names: list[str]) -> list[str]:
    """Indented lines of names. No name is split over two lines."""
    whole = ", ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
    lines = textwrap.wrap(whole, width=110, break_on_hyphens=False)
    return [" " * 10 + line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def unseen_text(unseen_labels: str, count: int) -> str:
    if unseen_labels == "masks":
        return "none: training uses the MASKS of all classes, so no zero-shot result can be claimed"
    kinds = {"none": "not used", "ground_truth": "GROUND-TRUTH image labels"}
    return f"{count} names, no masks, {kinds.get(unseen_labels, f'pseudo labels of {unseen_labels}')}"


def pseudo_label_lines(start: Start) -> list[str]:
    if not isinstance(start.dataset.image_labels, PseudoLabels):
        return []
    labels, images, all_images = start.dataset.image_labels.positives
    threshold = start.model.config.pseudo_label_threshold
    return [f"          positive at the threshold of {threshold}: {labels} labels, in {images} of {all_images} images"]


def weights_text(init_from: str | None, init_parts: str, proposals: str | None, backbone: str | None) -> str:
    """The source of the weights."""
    if init_from is not None and init_parts == "backbone":
        return f"backbone of {init_from} (--init_from, --init_parts backbone)"
    if init_from is not None:
        return f"{init_from} (--init_from)"
    if proposals is not None:
        return f"{proposals} (--proposals)"
    return "random weights" if backbone is None else f"backbone {backbone} (--backbone), else random weights"


def losses_text(config: Zs3Config) -> str:
    """The terms of Eq. 8 and the label map loss, without those of weight 0."""
    terms = {
        f"class ({config.class_loss})": config.class_weight,
        f"mask ({config.mask_loss})": config.mask_weight,
        "dice": config.dice_weight,
        "rank": config.rank_weight,
        "label map": config.label_map_weight,
    }
    weighted = " + ".join(f"{weight:g} x {name}" for name, weight in terms.items() if weight)
    return f"{weighted or 'none'}, matching {config.matching}"


def schedule_text(lr_schedule: str, lr_milestones: list[int], max_steps: int) -> str:
    if lr_schedule == "poly":
        return f"falling to 0 at step {max_steps} (poly)"
    steps = [str(step) for step in lr_milestones if step < max_steps]
    return f"divided by 10 at step {', '.join(steps)}" if steps else "constant"


def device_text(accelerator: Accelerator) -> str:
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    device = accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if processes == 1 and kind != DistributedType.FSDP:
        return f"{where}, one process"
    return f"{where}, {'FSDP2' if kind == DistributedType.FSDP else 'DDP'} with {processes} processes"


def notes(args: TrainArgs, start: Start, parts: BatchParts, accelerator: Accelerator) -> Iterator[str]:
    """Points of the plan that the user may not have intended."""
    labels = start.dataset.image_labels
    if isinstance(labels, PseudoLabels) and not labels.positives.labels:
        yield "no pseudo label reaches --pseudo_label_threshold: no unseen class is present in any image"
    share = parts.micro_batches * parts.images
    if args.device_batch_size is not None and parts.images < min(args.device_batch_size, share):
        yield (
            f"--device_batch_size {args.device_batch_size} does not divide a process's {share} images: "
            f"it takes {parts.images} at once"
        )
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched_with not in ("no", args.mixed_precision):
        yield (
            f"accelerate was given mixed precision {launched_with}, which has no effect here: give the flag "
            "--mixed_precision to train.py"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        yield "accelerate was asked for FSDP, which works on GPUs only: it is not used here"
    late = [step for step in args.lr_milestones if step >= args.max_steps]
    if args.lr_schedule == "multistep" and late:
        yield f"learning rate steps {late} lie beyond the last step and are ignored"
    from_scratch = args.init_from is None and args.proposals is None and args.backbone is None
    if from_scratch and args.backbone_norm == "frozen":
        yield "the backbone starts from random weights: it learns better with --backbone_norm batch"
