"""This project's criterion, compared with transformers' Mask2FormerLoss: equal terms, time and memory of a step.

    python -m benchmarks.criterion --output docs/results/criterion.json

A step computes the loss of all decoder outputs and its gradient. Predictions are random smooth masks; labels are
Voronoi cells. transformers gets ready-made binary masks; this project starts from the label map. Each number of classes
is measured in its own process, where the criteria take turns. A time is the median over the rounds; a ratio is the
median of the rounds' ratios. Memory is the peak that a step allocates in addition to its inputs and their gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from benchmarks import measuring
from configuration_zs3 import Zs3Config
from losses_zs3 import Targets, mask_ids, zs3_losses
from zs3.command_line import Count, InputError, Side, Some, flag, read_arguments, run

SAME_LOSSES = {"matching": "joint", "class_loss": "cross_entropy", "mask_loss": "bce", "match_points": "random"}
PEER, SAME = "transformers' Mask2FormerLoss", "zs3, the same losses"
CRITERIA = {
    SAME: SAME_LOSSES,
    "zs3, the same losses, matched on the mask grid": {**SAME_LOSSES, "match_points": "grid"},
    "zs3, Eq. 8 (focal loss, ranking loss, unpaired)": {},
}
TERMS = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}


@dataclass
class CriterionArgs(measuring.DeviceArguments):
    """Sizes of the comparison."""

    batch_size: Count = flag(4, "Images in the batch.")
    queries: Count = flag(100, "Queries.")
    outputs: Count = flag(10, "Decoder outputs.")
    size: Side = flag(512, "Side of the label maps, pixels; the side of a mask is a quarter of it.")
    class_names: Count = flag(171, "Number of class names.")
    classes: Some[Count] = flag([8, 40], "Classes in each image.")
    points: Count = flag(12544, "Points of the mask losses.")

    def check(self) -> None:
        check_classes(max(self.classes), self.class_names)


def check_classes(most: int, class_names: int) -> None:
    if most > class_names:
        raise InputError(f"--classes must be at most --class_names {class_names}, got {most}")


class Predictions(NamedTuple):
    """Leaf tensors, one for each decoder output. Their gradients are allocated before a step."""

    mask_logits: list[Tensor]  # (B, Q, h, w)
    similarity: list[Tensor]  # (B, Q, C)
    background: list[Tensor]  # (B, Q), cosine with the background embedding


def make_predictions(args: CriterionArgs, device: torch.device) -> Predictions:
    batch, queries, side = args.batch_size, args.queries, args.size // 4
    coarse = (torch.randn(batch, queries, 12, 12, device=device) for _ in range(args.outputs))
    predictions = Predictions(
        [6 * F.interpolate(values, size=(side, side), mode="bicubic") for values in coarse],
        [0.4 * torch.rand(batch, queries, args.class_names, device=device) - 0.2 for _ in range(args.outputs)],
        [0.4 * torch.rand(batch, queries, device=device) - 0.2 for _ in range(args.outputs)],
    )
    for leaf in chain(*predictions):
        leaf.requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
    return predictions


def make_labels(images: int, size: int, class_names: int, classes: int, device: torch.device) -> Tensor:
    """Label maps (B, H, W) with three Voronoi cells for each class. Each image has exactly `classes` classes."""
    axis = torch.arange(size, device=device)
    pixels = torch.cartesian_prod(axis, axis).float()
    maps = []
    while len(maps) < images:
        ids = torch.randperm(class_names, device=device)[:classes].repeat(3)
        nearest = torch.cdist(pixels, size * torch.rand(len(ids), 2, device=device)).argmin(1)
        label_map = ids[nearest].reshape(size, size)
        if len(label_map.unique()) == classes:
            maps.append(label_map)
    return torch.stack(maps)


def binary_masks(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The masks (M, H, W) and their classes (M,) of each image, in the form that transformers uses.

    labels: (B, H, W). An ignored pixel, -1, is in no mask.
    """
    ids = [own.to(labels.device) for own in mask_ids(labels)]
    return [(label == own[:, None, None]).float() for label, own in zip(labels, ids, strict=True)], ids


def peer_terms(
    predictions: Predictions, masks: list[Tensor], ids: list[Tensor], criterion: Mask2FormerLoss, temperature: float
) -> dict[str, Tensor]:
    """The unweighted terms of transformers' criterion, summed over the decoder outputs."""
    outputs = []
    for logits, scores, background in zip(*predictions, strict=True):
        scores = torch.cat([scores, background[..., None]], dim=-1) / temperature
        outputs.append({"masks_queries_logits": logits, "class_queries_logits": scores})
    losses = criterion(**outputs[-1], mask_labels=masks, class_labels=ids, auxiliary_predictions=outputs[:-1])
    return {name: sum(losses[key] for key in losses if key.startswith(theirs)) for name, theirs in TERMS.items()}


def largest_difference(ours: Callable[[], dict], theirs: Callable[[], dict], config: Zs3Config, device) -> float:
    """The largest relative difference between the terms of both criteria at the same random points.

    Every point is at least half a mask pixel from the border. Nearer to it, only transformers mixes in zeros.
    """
    points = config.train_num_points
    candidates, uncertain = int(config.oversample_ratio * points), int(config.importance_sample_ratio * points)
    margin = 1 / 32
    table = margin + (1 - 2 * margin) * torch.rand(candidates + points - uncertain, 2, device=device)
    match = margin + (1 - 2 * margin) * torch.rand(points, 2, device=device)
    drawn = {len(table): table, candidates: table[:candidates], points - uncertain: table[candidates:], points: match}

    def rand(*shape: int, device: torch.device) -> Tensor:
        return drawn[shape[-2]].expand(shape).contiguous()

    with patch("torch.rand", rand), torch.no_grad():
        left, right = ours(), theirs()
    return float(torch.stack([(left[name] / right[name] - 1).abs() for name in TERMS]).max())  # max keeps a NaN


def copies_to_host(step: Callable[[], None]) -> int:
    """The number of device-to-host copies in a step on CUDA. Each copy waits for the device."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "Memcpy DtoH" in event.key)


def weighted(terms: dict[str, Tensor], config: Zs3Config) -> Tensor:
    weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight, "rank": 1.0}
    return sum(weights[name] * term for name, term in terms.items())


def compare(args: CriterionArgs, classes: int, device: torch.device) -> dict:
    """Compares all criteria on the same tensors."""
    torch.manual_seed(0)
    predictions = make_predictions(args, device)
    labels = make_labels(args.batch_size, args.size, args.class_names, classes, device)
    masks, ids = binary_masks(labels)
    image_labels = torch.zeros(args.batch_size, args.class_names, dtype=torch.int8)
    for row, present in zip(image_labels, ids, strict=True):
        row[present.cpu()] = 1
    configs = {
        name: Zs3Config(train_num_points=args.points, **changes, text_config=None, vision_config=None)
        for name, changes in CRITERIA.items()
    }
    same = configs[SAME]
    peer_config = Mask2FormerConfig(num_labels=args.class_names, train_num_points=args.points)
    criterion = Mask2FormerLoss(peer_config, weight_dict={}).to(device)

    def theirs() -> dict[str, Tensor]:
        return peer_terms(predictions, masks, ids, criterion, same.class_temperature)

    def ours(config: Zs3Config) -> dict[str, Tensor]:
        targets = Targets(labels, mask_ids(labels), image_labels)
        return zs3_losses(*predictions, targets, config).terms

    difference = largest_difference(lambda: ours(same), theirs, same, device)
    steps = {PEER: lambda: weighted(theirs(), same).backward()}
    for name, config in configs.items():
        steps[name] = lambda config=config: weighted(ours(config), same).backward()
    criteria = measuring.compared(steps, measuring.take_turns(steps, args.rounds, device), PEER, device)
    if device.type == "cuda":
        for name, step in steps.items():
            criteria[name]["copies_to_host"] = copies_to_host(step)
    return {"classes": classes, "largest_difference": difference, "criteria": criteria}


TITLES = "classes an image | criterion | seconds a step | times faster | peak MiB | share of the peer's"
CELLS = "{classes} | {criterion} | {seconds:.3f} | {times_faster:.2f} | {peak_mib:.0f} | {peak_share:.2f}"


def main() -> None:
    args, _ = read_arguments(CriterionArgs)
    device = measuring.device_named(args.device)
    results = [measuring.in_fresh_process(compare, args, classes, device) for classes in args.classes]
    worst = max(result["largest_difference"] for result in results)
    measuring.check_close(worst, 1e-4, "the terms of the two criteria")
    facts = measuring.head(device)
    rows = [{**one, "criterion": name, **row} for one in results for name, row in one["criteria"].items()]
    text = f"Batch of {args.batch_size}, {args.queries} queries, {args.outputs} decoder outputs, labels {args.size} x "
    text += f"{args.size}, {args.points} points, torch {facts['torch']}, {facts['machine']}.\n\n"
    text += measuring.table(TITLES, CELLS, rows)
    text += f"\nLargest relative difference of a term (class, mask, dice) at the same points: {worst:.1e}.\n"
    measuring.publish(args.output, {**facts, **vars(args), "results": results}, text)


if __name__ == "__main__":
    run(main)
