"""Time and memory of the label stage, which turns class probabilities and mask logits into a label map.

    python -m benchmarks.label_count --output docs/results/label_count.json

The number of labels grows. Five ways are compared: transformers' Mask2Former post-processing, dense einsum, a running
maximum over chunks of classes, and `semantic_map` without and with scores. transformers first resizes masks to
384 x 384, so its label map differs. The run fails if semantic_map chooses a class whose float64 score is more than 1e-6
below the best score.

Inputs are synthetic (`trained_proposals`, `soft_proposals`). Every measurement runs in its own process on the same
tensors: first a small call, then a full call for the memory, then the timed calls. Memory is the peak of resident
memory (VmHWM of Linux) less the resident memory before. It includes all allocators, libraries and results. For the
ratios in the goals, calls take turns in one process.

The last table has what is made beside the label map, for a picture of the size of the model's input and a large one, by
calls that take turns in one process.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Mask2FormerImageProcessorPil

from benchmarks import measuring
from configuration_zs3 import INT32, Number
from label_maps_zs3 import SemanticMap, semantic_map, semantic_scores
from zs3.command_line import Amount, Count, InputError, Positive, Side, Some, flag, read_arguments, run

PEER, DENSE, CHUNKED = "transformers' Mask2Former post-processing", "dense einsum", "running maximum over chunks"
OURS, SCORED = "semantic_map", "semantic_map with scores"
PEER_SIDE = 384  # transformers first resizes all masks to this side
CHUNK = 64  # classes at once in the running maximum
CONFIDENT = 14  # queries with an object in trained_proposals
EQUAL = 1e-6  # a class is right if its float64 score is at most this far below the best
WARM_UP = (150, 64)  # labels and size of the call before the measured ones
ALONE, CONFIDENCES = "label map alone", "and confidences"
MOST_TIMES, MOST_MIB = 1.3, 400 * 10**6 / 2**20  # goals for a large picture with confidences


@dataclass
class LabelCountArgs(measuring.BenchmarkArguments):
    """Sizes of the comparison."""

    labels: Some[Count] = flag([150, 847, 4000, 20000], "Numbers of labels.")
    size: Side = flag(640, "Side of the label maps, pixels; the side of a mask is a quarter of it.")
    large_labels: Count = flag(847, "Labels of the larger image.")
    large_size: Side = flag(1024, "Side of the larger image, pixels.")
    picture_labels: Count = flag(171, "Labels of the pictures of 4 : 3; every tenth is unseen.")
    picture_width: Side = flag(4000, "Width of the large picture of 4 : 3; that of the small one is --size.")
    queries: Annotated[int, Number(int, 2, INT32)] = flag(100, "Queries.")
    rounds: Count = flag(7, "Timed calls of each method; rounds where two methods take turns.")
    seconds: Amount = flag(8.0, "No call or round starts after this time; at least one is measured.")
    memory_limit: Positive = flag(12.0, "A method that would need more GB is not started.")
    checked: Count = flag(2 * 10**9, "Scores (labels x pixels) checked in float64; a random sample if there are more.")

    def check(self) -> None:
        most = max(*self.labels, self.large_labels)
        if self.checked < most:
            raise InputError(f"--checked must be at least {most}, the number of labels, got {self.checked}")


class Proposals(NamedTuple):
    """The outputs of a model for one image."""

    class_probs: Tensor  # (1, Q, C)
    mask_logits: Tensor  # (1, Q, h, w)


class Case(NamedTuple):
    """One input of the comparison."""

    kind: str
    labels: int
    size: int


def trained_proposals(labels: int, size: int, queries: int) -> Proposals:
    """Proposals like a trained model's: a few queries have one object each, the others are undecided.

    The objects' masks are Voronoi cells. Their logits are about +-12 and change sign within a few mask pixels. One
    class has 0.6 to 0.95 of the probability. The other queries have nearly uniform classes and faint, smooth masks.
    """
    side, objects = size // 4, min(CONFIDENT, queries - 1)
    axis = torch.arange(side) + 0.5
    distance = torch.cdist(side * torch.rand(objects + 1, 2)[1:], torch.cartesian_prod(axis, axis))  # mask pixels
    two = distance.topk(min(2, objects), dim=0, largest=False).values
    others = torch.where(distance == two[0], two[-1], two[0])
    masks = 12 * torch.tanh((others - distance) / 4).view(objects, side, side)
    faint = _smooth(queries - objects, 6, side) - 4
    masks = torch.cat([masks, faint]) + 0.5 * torch.randn(queries, side, side)
    share = 0.6 + 0.35 * torch.rand(objects, 1)
    peaked = (1 - share) * (2 * torch.randn(objects, labels)).softmax(-1)
    peaked.scatter_add_(1, torch.randint(labels, (objects, 1)), share)
    uniform = (0.1 * torch.randn(queries - objects, labels)).softmax(-1)
    return Proposals(torch.cat([peaked, uniform])[None], masks[None])


def soft_proposals(labels: int, size: int, queries: int) -> Proposals:
    """Proposals that are hard for bounds: every mask is smooth, has logits about +-2 and covers half of the pixels.

    Half of each query's class probability lies on up to eight classes. The other half is spread unevenly over all.
    """
    masks = 2 * _smooth(queries, 8, size // 4)
    class_probs = (2 * torch.randn(queries, labels)).softmax(-1) / 2
    class_probs.scatter_add_(1, torch.randint(labels, (queries, 8)), torch.randn(queries, 8).softmax(-1) / 2)
    return Proposals(class_probs[None], masks[None])


def _smooth(maps: int, grid: int, side: int) -> Tensor:
    return F.interpolate(torch.randn(1, maps, grid, grid), (side, side), mode="bicubic", align_corners=False)[0]


KINDS = {"like a trained model's": trained_proposals, "soft": soft_proposals}


def draw_proposals(case: Case, queries: int) -> Proposals:
    """The same proposals in every process."""
    torch.manual_seed(0)
    return KINDS[case.kind](case.labels, case.size, queries)


def running_maximum(class_probs: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The argmax of Eq. 4, (B, H, W), without a tensor of C x H x W."""
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid_()
    best = masks.new_full((len(masks), *size), -torch.inf)
    label_map = torch.zeros(best.shape, dtype=torch.int64)
    for start in range(0, class_probs.shape[2], CHUNK):
        scores = torch.einsum("bqc,bqhw->bchw", class_probs[:, :, start : start + CHUNK], masks)
        score, place = scores.max(dim=1)
        label_map = torch.where(score > best, place + start, label_map)
        best = torch.maximum(score, best)
    return label_map


def label_stage(method: str, proposals: Proposals, side: int) -> Callable[[], Tensor]:
    """The call that is measured. It returns a label map (H, W)."""
    size = (side, side)
    if method == PEER:
        logits = F.pad(proposals.class_probs.log(), (0, 1), value=-1e4)  # softmax gives class_probs, then a 0
        outputs = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=proposals.mask_logits)
        processor = Mask2FormerImageProcessorPil()
        return lambda: processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
    calls = {
        DENSE: lambda: semantic_scores(*proposals, size).argmax(dim=1)[0],
        CHUNKED: lambda: running_maximum(*proposals, size)[0],
        OURS: lambda: semantic_map(*proposals, size)[0],
        SCORED: lambda: with_confidences(*proposals, size).label_map,
    }
    return calls[method]


def with_confidences(*given: object, **options: object) -> SemanticMap:
    (found,) = semantic_map(*given, return_scores=True, **options)
    found.confidence  # noqa: B018 - it is made when it is read
    return found


def bytes_needed(method: str, case: Case, queries: int) -> int:
    """Bytes of the largest float32 tensors that a method holds at once: scores, mask logits, mask probabilities."""
    pixels = case.size**2
    scores = {PEER: case.labels * (PEER_SIDE**2 + pixels), DENSE: case.labels * pixels, CHUNKED: CHUNK * pixels}
    masks = {PEER: PEER_SIDE**2, DENSE: pixels, CHUNKED: pixels}
    return 4 * (scores.get(method, 0) + 2 * queries * masks.get(method, 0))


def measure(args: LabelCountArgs, case: Case, method: str) -> dict:
    """Measures one method in this process: seconds, calls, peak_mib, label_map. OURS is checked too."""
    warm_up = Case(case.kind, *WARM_UP)
    label_stage(method, draw_proposals(warm_up, args.queries), warm_up.size)()
    proposals = draw_proposals(case, args.queries)
    step = label_stage(method, proposals, case.size)
    first, timed = [], []
    peak = measuring.resident_peak(lambda: first.extend(measuring.timed(step)))
    spent, label_map = first
    while len(timed) < args.rounds and spent + sum(timed) < args.seconds:
        timed.append(measuring.seconds_of(step))
    timed = timed or [spent]
    row = check(label_map, proposals, args.checked // case.labels) if method == OURS else {}
    times = {"seconds": statistics.median(timed), "calls": len(timed), "peak_mib": peak}
    return {**times, "label_map": label_map.int().numpy(), **row}


def check(label_map: Tensor, proposals: Proposals, most: int) -> dict[str, int]:
    """How many checked pixels have a class whose float64 score is more than EQUAL below the best.

    most: largest number of pixels to check; a random sample if there are more.
    """
    pixels = torch.randperm(label_map.numel())[:most]
    logits = F.interpolate(proposals.mask_logits.double(), label_map.shape, mode="bilinear", align_corners=False)
    masks, class_probs = logits.sigmoid_()[0].flatten(1), proposals.class_probs[0].double()  # (Q, H W), (Q, C)
    wrong = 0
    for part in pixels.split(2**15):
        here = masks[:, part]
        best = torch.stack([(some.T @ here).amax(0) for some in class_probs.split(512, dim=1)]).amax(0)
        own = torch.einsum("qx,qx->x", class_probs[:, label_map.flatten()[part]], here)
        wrong += int((~(own >= best - EQUAL)).sum())
    return {"wrong_pixels": wrong, "checked_pixels": len(pixels)}


def time_ratio(args: LabelCountArgs, above: tuple[Case, str], below: tuple[Case, str]) -> float:
    """The time of one method and case, divided by that of another. The two take turns."""
    steps = {
        turn: label_stage(method, draw_proposals(case, args.queries), case.size)
        for turn, (case, method) in {"above": above, "below": below}.items()
    }
    return measuring.median_ratio(**measuring.take_turns(steps, args.rounds, limit=args.seconds))


def beside_the_map(labels: int, size: int, width: int, args: LabelCountArgs) -> list[dict]:
    """Times and peaks of what is made beside a label map. size: width of the model's input; width: of the picture."""
    class_probs, masks = draw_proposals(Case("like a trained model's", labels, size), args.queries)
    masks = masks[:, :, : masks.shape[2] * 3 // 4]
    is_seen = torch.arange(labels) % 10 < 9

    def made(**options: object) -> SemanticMap | Tensor:
        picture = [(width * 3 // 4, width)]
        return semantic_map(class_probs, masks, (size * 3 // 4, size), image_sizes=picture, **options)[0]

    def segments() -> None:
        found = made(return_scores=True)
        found.totals(found.label_map, labels)

    steps = {
        ALONE: made,
        CONFIDENCES: lambda: made(return_scores=True).confidence,
        "and a score for each segment": segments,
        "and margins": lambda: made(return_scores=True).margin,
        "and the best seen and unseen class": lambda: made(is_seen=is_seen),
    }
    peaks = {name: measuring.resident_peak(step) for name, step in steps.items()}
    seconds = measuring.take_turns(steps, args.rounds)
    return [
        {
            "labels": labels,
            "picture": f"{width} x {width * 3 // 4}",
            "made": name,
            "seconds": statistics.median(seconds[name]),
            "times": measuring.median_ratio(seconds[name], seconds[ALONE]),
            "peak_mib": peaks[name],
        }
        for name in steps
    ]


def apart(function: Callable, *args: object):
    return measuring.in_fresh_process(function, *args, start="forkserver")


def measure_all(args: LabelCountArgs, cases: list[Case]) -> list[dict]:
    """A row for each case and method. semantic_map comes first: the other label maps are compared with its map."""
    methods = [OURS, SCORED, PEER, DENSE, CHUNKED]
    rows = []
    for case, method in tqdm([(case, method) for case in cases for method in methods], desc="label stage"):
        row = {**case._asdict(), "method": method, "bytes_needed": bytes_needed(method, case, args.queries)}
        if row["bytes_needed"] <= 1e9 * args.memory_limit:
            row |= apart(measure, args, case, method)
            label_map = row.pop("label_map")
            if method == OURS:
                exact = label_map
            row["differing_share"] = float(np.mean(label_map != exact))
            wrong = row.get("wrong_pixels", 0) if method != SCORED else int((label_map != exact).sum())
            if wrong:
                raise InputError(f"{method}, {case}: {wrong} wrong pixels: its speed cannot be compared")
        rows.append(row)
    return rows


def goals_of(args: LabelCountArgs, kind: str, rows: list[dict]) -> list[dict]:
    """The goals of semantic_map without scores, for one kind of input. The ratios of times are measured here.

    A row has name, met and figure. A figure that was not measured is NaN.
    """
    found = {(Case(row["kind"], row["labels"], row["size"]), row["method"]): row for row in rows}
    ours = [row for (case, method), row in found.items() if case.kind == kind and method == OURS]
    wrong = sum(row["wrong_pixels"] for row in ours)
    few, many = min(args.labels), max(args.labels)
    turns = [(Case(kind, labels, args.size), OURS) for labels in (many, few)]
    growth = apart(time_ratio, args, *turns)
    large = Case(kind, args.large_labels, args.large_size)
    faster = share = float("nan")
    if "seconds" in found[large, PEER]:
        faster = apart(time_ratio, args, (large, PEER), (large, OURS))
        share = found[large, OURS]["peak_mib"] / found[large, PEER]["peak_mib"]
    peaks = [row["peak_mib"] * 2**20 / 1e9 for row in ours if row["size"] == args.size and row["labels"] <= 4000]
    peak = max(peaks, default=float("nan"))
    at = f"{large.labels} labels, {large.size} x {large.size}"
    goals = [
        ("no wrong pixel", wrong == 0, wrong),
        (f"time at {many} labels at most 1.5 times that at {few}", growth <= 1.5, growth),
        (f"{at}: at least 6 times faster than transformers", faster >= 6, faster),
        (f"{at}: at most 0.1 of transformers' peak", share <= 0.1, share),
        (f"up to 4000 labels, {args.size} x {args.size}: peak below 0.15 GB", peak < 0.15, peak),
    ]
    return [{"name": name, "met": met, "figure": figure} for name, met, figure in goals]


TITLES = "inputs | labels | size | method | seconds | calls | times faster than transformers | peak extra MiB | "
TITLES += "share of transformers' | pixels unlike semantic_map's"
CELLS = "{kind} | {labels} | {size} x {size} | {method} | {shown} | {calls} | {faster:.2f} | {peak_mib:.0f} | "
CELLS += "{share:.3f} | {differing_share:.3%}"


PICTURE_TITLES = "labels | picture | made | seconds | times the map alone | peak extra MiB"
PICTURE_CELLS = "{labels} | {picture} | {made} | {seconds:.3f} | {times:.2f} | {peak_mib:.0f}"


def large_picture_goals(pictures: list[dict]) -> str:
    row = [row for row in pictures if row["made"] == CONFIDENCES][-1]
    times, peak = (
        "met" if figure <= most else "missed"
        for figure, most in ((row["times"], MOST_TIMES), (row["peak_mib"], MOST_MIB))
    )
    goals = f"at most {MOST_TIMES} times the map alone ({times}), at most {MOST_MIB:.0f} MiB ({peak})"
    return f"Goals for the large picture with confidences: {goals}."


def table(rows: list[dict]) -> str:
    """Markdown."""
    peers = {(row["kind"], row["labels"], row["size"]): row for row in rows if row["method"] == PEER}
    lines = []
    for row in rows:
        peer = peers[row["kind"], row["labels"], row["size"]]
        shown = f"{row['seconds']:.3f}" if "seconds" in row else f"would need {row['bytes_needed'] / 1e9:.2g} GB"
        lines.append({**row, "shown": shown})
        if "seconds" in row and "seconds" in peer:
            lines[-1] |= {"faster": peer["seconds"] / row["seconds"], "share": row["peak_mib"] / peer["peak_mib"]}
    return measuring.table(TITLES, CELLS, lines)


def goal_table(goals: dict[str, list[dict]]) -> str:
    """A Markdown table with a column for each kind of input."""
    lines = [
        [same[0]["name"], *(f"{goal['figure']:.3g} ({'met' if goal['met'] else 'missed'})" for goal in same)]
        for same in zip(*goals.values(), strict=True)
    ]
    return measuring.table_of(["semantic_map, label map alone", *goals], lines)


def main() -> None:
    args, _ = read_arguments(LabelCountArgs)
    sizes = [*((labels, args.size) for labels in args.labels), (args.large_labels, args.large_size)]
    cases = [Case(kind, *size) for kind in KINDS for size in dict.fromkeys(sizes)]
    rows = measure_all(args, cases)
    goals = {kind: goals_of(args, kind, rows) for kind in tqdm(KINDS, desc="ratios")}
    facts = measuring.head()
    text = f"One image, {args.queries} queries, masks of a quarter of the size, float32, torch {facts['torch']}, "
    text += f"{facts['machine']}. Seconds are medians over the calls; peaks are of resident memory.\n\n{table(rows)}\n"
    ours = [row for row in rows if row["method"] == OURS]
    sampled = {row["labels"]: row["checked_pixels"] for row in ours if row["checked_pixels"] < row["size"] ** 2}
    sampled = "".join(f"; at {labels} labels {pixels} random ones" for labels, pixels in sampled.items())
    text += f"{goal_table(goals)}\nPixels checked in float64: all{sampled}.\n"
    pictures = []
    for width in tqdm((args.size, args.picture_width), desc="pictures"):
        pictures += apart(beside_the_map, args.picture_labels, args.size, width, args)
    text += f"\nBeside the label map, the model's input is {args.size} x {args.size * 3 // 4}:\n\n"
    text += f"{measuring.table(PICTURE_TITLES, PICTURE_CELLS, pictures)}\n{large_picture_goals(pictures)}\n"
    measuring.publish(args.output, {**facts, **vars(args), "rows": rows, "goals": goals, "pictures": pictures}, text)


if __name__ == "__main__":
    run(main)
