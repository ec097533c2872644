"""This project's criterion beside transformers' Mask2FormerLoss: equal terms, time and memory of a step, in one run.

    python -m benchmarks.criterion --output docs/results/criterion.json

A step is the loss of all decoder outputs and its gradient with respect to them. Predictions are random but smooth
masks, labels are Voronoi cells. transformers is given its binary masks ready-made; this project starts from the label
map. Each number of classes has a process of its own, in which the criteria take turns: time is the median over rounds,
a ratio the median of the rounds' ratios. Memory is the peak of what a step allocates beyond its inputs and their
gradients.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from configuration_zs3 import Zs3Config
from losses_zs3 import Targets, mask_ids, zs3_losses
from zs3.command_line import Arguments, Count, InputError, OutputFile, Side, Some, flag, read_arguments, run
from zs3.files import write_report
from zs3.tables import markdown_table

SAME_LOSSES = {"matching": "joint", "class_loss": "cross_entropy", "mask_loss": "bce", "match_points": "random"}
PEER = "transformers' Mask2FormerLoss"
CRITERIA = {
    "zs3, the same losses": SAME_LOSSES,
    "zs3, the same losses, matched on the mask grid": {**SAME_LOSSES, "match_points": "grid"},
    "zs3, Eq. 8 (focal loss, ranking loss, unpaired)": {},
}
TERMS = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}


@dataclass
class CriterionArgs(Arguments):
    """Sizes of the comparison."""

    batch_size: Count = flag(4, "Images in the batch.")
    queries: Count = flag(100, "Queries.")
    outputs: Count = flag(10, "Decoder outputs.")
    size: Side = flag(512, "Side of the label maps, pixels; masks have a quarter of it.")
    class_names: Count = flag(171, "Names on the class axis.")
    classes: Some[Count] = flag([8, 40], "Classes in each image.")
    points: Count = flag(12544, "Points of the mask losses.")
    rounds: Count = flag(7, "Rounds; the first is not counted.")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "'cpu', 'cuda', or 'auto': CUDA where there is one.")
    output: OutputFile | None = flag(None, "Result file; the printed table goes beside it as .md.")


@dataclass
class Predictions:
    """Leaves, with gradients that are there before a step: one tensor a decoder output."""

    mask_logits: list[Tensor]  # (B, Q, h, w)
    similarity: list[Tensor]  # (B, Q, C)
    background: list[Tensor]  # (B, Q), cosine with the background embedding

    def leaves(self) -> list[Tensor]:
        return [*self.mask_logits, *self.similarity, *self.background]


def make_predictions(args: CriterionArgs, device: torch.device) -> Predictions:
    batch, queries, side = args.batch_size, args.queries, args.size // 4
    coarse = (torch.randn(batch, queries, 12, 12, device=device) for _ in range(args.outputs))
    predictions = Predictions(
        [6 * F.interpolate(values, size=(side, side), mode="bicubic") for values in coarse],
        [0.4 * torch.rand(batch, queries, args.class_names, device=device) - 0.2 for _ in range(args.outputs)],
        [0.4 * torch.rand(batch, queries, device=device) - 0.2 for _ in range(args.outputs)],
    )
    for leaf in predictions.leaves():
        leaf.requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
    return predictions


def make_labels(args: CriterionArgs, classes: int, device: torch.device) -> Tensor:
    """Label maps (B, H, W) of three Voronoi cells a class, each class in every image."""
    axis = torch.arange(args.size, device=device)
    pixels = torch.cartesian_prod(axis, axis).float()
    maps = []
    for _ in range(args.batch_size):
        while True:
            ids = torch.randperm(args.class_names, device=device)[:classes].repeat(3)
            nearest = torch.cdist(pixels, args.size * torch.rand(len(ids), 2, device=device)).argmin(1)
            label_map = ids[nearest].reshape(args.size, args.size)
            if len(label_map.unique()) == classes:
                break
        maps.append(label_map)
    return torch.stack(maps)


def zs3_terms(predictions: Predictions, labels: Tensor, image_labels: Tensor, config: Zs3Config) -> dict[str, Tensor]:
    """Unweighted terms, summed over the decoder outputs."""
    targets = Targets(labels, mask_ids(labels), image_labels)
    return zs3_losses(predictions.mask_logits, predictions.similarity, predictions.background, targets, config).terms


def peer_terms(
    predictions: Predictions, masks: list[Tensor], ids: list[Tensor], criterion: Mask2FormerLoss, temperature: float
) -> dict[str, Tensor]:
    """The same of transformers' criterion."""
    outputs = [
        {
            "masks_queries_logits": logits,
            "class_queries_logits": torch.cat([scores, background[..., None]], dim=-1) / temperature,
        }
        for logits, scores, background in zip(
            predictions.mask_logits, predictions.similarity, predictions.background, strict=True
        )
    ]
    losses = criterion(**outputs[-1], mask_labels=masks, class_labels=ids, auxiliary_predictions=outputs[:-1])
    return {
        name: sum(value for key, value in losses.items() if key.startswith(theirs)) for name, theirs in TERMS.items()
    }


def largest_difference(ours: Callable[[], dict], theirs: Callable[[], dict], config: Zs3Config, device) -> float:
    """Between the terms of both at the same random points, relative.

    The points keep half a mask pixel from the border: beyond it transformers mixes in zeros, this project does not.
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
    return float(torch.stack([(left[name] / right[name] - 1).abs() for name in TERMS]).max())  # a NaN stays one


def peak_memory(step: Callable[[], None], device: torch.device) -> float:
    """The most a step holds at once beyond what was there before, MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def copies_to_host(step: Callable[[], None]) -> int:
    """Device-to-host copies of a step on CUDA; each one waits for the device."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "Memcpy DtoH" in event.key)


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; in a round all take turns."""
    seconds = {name: [] for name in steps}
    for _ in tqdm(range(rounds + 1), desc="rounds"):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def compare(args: CriterionArgs, classes: int, device: torch.device) -> dict:
    """All criteria on the same tensors."""
    torch.manual_seed(0)
    predictions, labels = make_predictions(args, device), make_labels(args, classes, device)
    ids = mask_ids(labels)
    image_labels = torch.zeros(args.batch_size, args.class_names, dtype=torch.int8)
    for row, present in zip(image_labels, ids, strict=True):
        row[present] = 1
    ids = [present.to(device) for present in ids]
    masks = [(labels[image] == present[:, None, None]).float() for image, present in enumerate(ids)]

    configs = {
        name: Zs3Config(train_num_points=args.points, **changes, text_config=None, vision_config=None)
        for name, changes in CRITERIA.items()
    }
    same = configs["zs3, the same losses"]
    criterion = Mask2FormerLoss(
        Mask2FormerConfig(num_labels=args.class_names, train_num_points=args.points), weight_dict={}
    ).to(device)

    def theirs() -> dict[str, Tensor]:
        return peer_terms(predictions, masks, ids, criterion, same.class_temperature)

    def ours(config: Zs3Config) -> dict[str, Tensor]:
        return zs3_terms(predictions, labels, image_labels, config)

    def weighted(terms: dict[str, Tensor]) -> Tensor:
        weights = {"class": same.class_weight, "mask": same.mask_weight, "dice": same.dice_weight, "rank": 1.0}
        return sum(weights[name] * term for name, term in terms.items())

    difference = largest_difference(lambda: ours(same), theirs, same, device)
    steps = {PEER: lambda: weighted(theirs()).backward()}
    for name, config in configs.items():
        steps[name] = lambda config=config: weighted(ours(config)).backward()
    seconds = measure(steps, args.rounds, device)
    rows = {}
    for name, step in steps.items():
        ratios = [peer / own for peer, own in zip(seconds[PEER], seconds[name], strict=True)]
        memory = peak_memory(step, device)
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "times_faster": statistics.median(ratios),
            "peak_mib": memory,
            "peak_share": memory / rows[PEER]["peak_mib"] if rows else 1.0,
        }
        if device.type == "cuda":
            rows[name]["copies_to_host"] = copies_to_host(step)
    return {"classes": classes, "largest_difference": difference, "criteria": rows}


def in_fresh_process(function: Callable, *args: object):
    """The memory that one comparison leaves to the C library changes the times of the next."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def table(results: list[dict]) -> str:
    """Markdown."""
    head = ["classes an image", "criterion", "seconds a step", "times faster", "peak MiB", "share of the peer's"]
    lines = []
    for result in results:
        for name, row in result["criteria"].items():
            cells = [str(result["classes"]), name, f"{row['seconds']:.3f}", f"{row['times_faster']:.2f}"]
            lines.append([*cells, f"{row['peak_mib']:.0f}", f"{row['peak_share']:.2f}"])
    return "\n".join(markdown_table(head, lines)) + "\n"


def device_named(name: str) -> torch.device:
    """'auto' is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA device here")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def main() -> None:
    args, _ = read_arguments(CriterionArgs)
    if max(args.classes) > args.class_names:
        raise InputError(f"--classes must be at most --class_names {args.class_names}, got {max(args.classes)}")
    device = device_named(args.device)
    results = [in_fresh_process(compare, args, classes, device) for classes in args.classes]
    machine = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name()
    text = f"Batch of {args.batch_size}, {args.queries} queries, {args.outputs} decoder outputs, labels {args.size} x "
    text += f"{args.size}, {args.points} points, torch {torch.__version__}, {machine}.\n\n{table(results)}"
    worst = max(result["largest_difference"] for result in results)
    text += f"\nLargest relative difference of a term (class, mask, dice) at the same points: {worst:.1e}.\n"
    if not worst <= 1e-4:
        raise InputError(f"the two criteria differ by {worst:.1e}: no comparison of speed means anything then")
    print(text, end="")
    if args.output is not None:
        write_report(
            Path(args.output), {**vars(args), "machine": machine, "torch": torch.__version__, "results": results}, text
        )


if __name__ == "__main__":
    run(main)
