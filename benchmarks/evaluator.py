"""The cost of the evaluator, compared with the model that it evaluates: time, memory over images, the bootstrap.

    python -m benchmarks.evaluator --output docs/results/evaluator.json

Time: `ConfusionMatrix.update` takes turns with one inference: a ResNet-50 model with random weights, batch 1, and its
label map. A share is the median of the rounds' shares. Label maps show objects (Voronoi cells with frayed edges, other
cells in the prediction) or noise, the worst case. Predictions are on the device; truths are int64 arrays on the CPU.
"with counters" adds SeenBiasCurve, Reliability and Rejection to the confusion matrix. "and scores" adds the extra time
of a label map with confidences and with the best seen and the best unseen class, which these counters need.

Memory: the resident memory, and the memory that Python and NumPy hold, after a number of images, in a fresh process.
The other way keeps all label maps until the end, as the mean_iou script of the library `evaluate` does. That script is
not run. The least memory of this way is measured: two int64 arrays for each image.

Bootstrap: the time of the intervals of all scores and all classes, over synthetic areas.
"""

import statistics
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import KDTree
from torch import Tensor

from benchmarks import measuring
from benchmarks.label_count import trained_proposals
from benchmarks.network import make_zs3
from configuration_zs3 import Number, shortened
from label_maps_zs3 import SemanticMap, semantic_map
from zs3.command_line import Count, InputError, Side, Some, flag, read_arguments, run
from zs3.scores.calibration import Rejection, Reliability, SeenBiasCurve
from zs3.scores.confusion import ConfusionMatrix

INFERENCE, OBJECTS, NOISE = "inference", "objects", "noise"
COUNTED, CALIBRATED = "objects, with counters", "objects, with counters and scores"
PLAIN, SCORED = "label map", "label map with scores"
QUERIES = 100
OURS, KEPT = "ConfusionMatrix", "all label maps kept"
IGNORE = 65535
PRESENT = 12  # classes in a truth, and in a prediction
Classes = Annotated[int, Number(int, PRESENT, 10_000)]
CELLS = 40  # Voronoi cells in a truth; a prediction has twice as many
FRAY = 1.0  # standard deviation of the noise at the edges of objects, pixels
# Largest shares of an inference's time that are allowed: for counting, and with the extra time of the label map.
GOALS = {OBJECTS: 0.05, COUNTED: 0.05, CALIBRATED: 0.15}


@dataclass
class EvaluatorArgs(measuring.DeviceArguments):
    """Sizes of the measurements."""

    classes: Some[Classes] = flag([171, 847], "Numbers of classes.")
    height: Side = flag(480, "Height of the label maps, pixels.")
    width: Side = flag(640, "Width of the label maps, pixels.")
    maps: Count = flag(8, "Pairs of label maps that a round counts.")
    images: Some[Count] = flag([100, 1000], "Numbers of images after which memory is read, in rising order.")
    kept_images: Count = flag(100, "Images whose label maps are kept, for comparison.")
    bootstrap_images: Count = flag(5000, "Images of the bootstrap.")
    bootstrap_classes: Classes = flag(171, "Classes of the bootstrap.")
    resamples: Count = flag(1000, "Resamples of the bootstrap.")

    def check(self) -> None:
        if self.images != sorted(set(self.images)):
            raise InputError(f"--images must rise, got {shortened(self.images)}")


def draw_pair(
    kind: str, num_classes: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, np.ndarray]:
    """Prediction and truth (H, W), int64; the truth has ignored pixels."""
    ids = rng.choice(num_classes, PRESENT, replace=False)
    found = np.append(ids[: PRESENT // 2], rng.choice(num_classes, PRESENT - PRESENT // 2))
    ids = np.append(ids, IGNORE)
    if kind == NOISE:
        return torch.from_numpy(rng.choice(found, size)), rng.choice(ids, size)
    return torch.from_numpy(_cells(found, 2 * CELLS, size, rng)), _cells(ids, CELLS, size, rng)


def _cells(ids: np.ndarray, cells: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    pixels = np.stack(np.indices(size), axis=-1).reshape(-1, 2) + rng.normal(0, FRAY, (size[0] * size[1], 2))
    _, nearest = KDTree(rng.random((cells, 2)) * size).query(pixels)
    return ids[rng.integers(0, len(ids), cells)][nearest].reshape(size)


def compare_time(size: tuple[int, int], maps: int, rounds: int, num_classes: int, device: torch.device) -> list[dict]:
    """A row for each kind of label map. All kinds are compared with the same inference."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = make_zs3("resnet50").eval().to(device)
    pixel_values = torch.randn(1, 3, *size, device=device)
    text_embeds = F.normalize(torch.randn(num_classes, model.config.projection_dim, device=device), dim=-1)

    def infer() -> None:
        outputs = model(pixel_values, text_embeds=text_embeds)
        semantic_map(outputs.class_logits.softmax(-1), outputs.mask_logits, size)

    proposals = [values.to(device) for values in trained_proposals(num_classes, max(size), QUERIES)]
    is_seen = torch.arange(num_classes, device=device) % 10 < 9
    steps: dict[str, Callable[[], None]] = {INFERENCE: infer}
    for kind in (OBJECTS, NOISE):
        pairs = [draw_pair(kind, num_classes, size, rng) for _ in range(maps)]
        steps[kind] = partial(count_all, [(found.to(device), label) for found, label in pairs], num_classes)
    with torch.inference_mode():
        (found,) = semantic_map(*proposals, size, is_seen=is_seen)
        steps[COUNTED] = calibrating(found, draw_pair(OBJECTS, num_classes, size, rng)[1], is_seen)
        steps[PLAIN] = lambda: semantic_map(*proposals, size)
        steps[SCORED] = lambda: semantic_map(*proposals, size, is_seen=is_seen)[0].confidence
        seconds = measuring.take_turns(steps, rounds, device)
    return time_rows(seconds, maps, num_classes)


def count_all(pairs: list[tuple[Tensor, np.ndarray]], num_classes: int) -> None:
    confusion = ConfusionMatrix(num_classes, IGNORE)
    for prediction, label in pairs:
        confusion.update(prediction, label)


def calibrating(found: SemanticMap, label: np.ndarray, is_seen: Tensor) -> Callable[[], None]:
    """A function that counts one image with all counters."""
    curve, reliability, rejection = SeenBiasCurve(is_seen.cpu(), IGNORE), Reliability(IGNORE), Rejection(IGNORE)

    def count() -> None:
        truth = torch.from_numpy(label).to(found.label_map.device)
        ConfusionMatrix(len(is_seen), IGNORE).update(found.label_map, truth)
        curve.update(found, truth)
        reliability.update(found, truth)
        rejection.update(found, truth, "0")

    return count


def time_rows(seconds: dict[str, list[float]], maps: int, num_classes: int) -> list[dict]:
    """A row for each kind of label map. seconds: the times of each step, one for each round."""
    extra = [scored - plain for scored, plain in zip(seconds[SCORED], seconds[PLAIN], strict=True)]
    each = {kind: [value / maps for value in seconds[kind]] for kind in (OBJECTS, NOISE)}
    each[COUNTED] = seconds[COUNTED]
    each[CALIBRATED] = [own + more for own, more in zip(seconds[COUNTED], extra, strict=True)]
    inference, rows = seconds[INFERENCE], []
    for kind, own in each.items():
        median = statistics.median(own)
        rows.append({"classes": num_classes, "maps": kind, "seconds": median, "images_per_second": 1 / median})
        rows[-1]["inference_seconds"] = statistics.median(inference)
        rows[-1]["share_of_inference"] = measuring.median_ratio(own, inference)
    return rows


def memory_over_images(size: tuple[int, int], maps: int, way: str, num_classes: int, images: list[int]) -> list[dict]:
    """A row for each number in `images`: the memory after this number of images."""
    rng = np.random.default_rng(0)
    pairs = [draw_pair(OBJECTS, num_classes, size, rng) for _ in range(maps)]
    ConfusionMatrix(num_classes, IGNORE).update(*pairs[0])  # allocates what only the first call allocates
    tracemalloc.start()
    before = measuring.resident_mib()
    confusion, kept, rows = ConfusionMatrix(num_classes, IGNORE), [], []
    for count in range(1, images[-1] + 1):
        shift = rng.integers(0, size)
        prediction, label = pairs[count % len(pairs)]
        prediction = np.roll(prediction.numpy(), shift, axis=(0, 1))  # a different prediction for every image
        if way == OURS:
            confusion.update(prediction, label, f"{count:012d}")
        else:
            kept.append((prediction, label.copy()))
        del prediction  # the loop's own reference must not count as held memory
        if count in images:
            rows.append({"way": way, "classes": num_classes, "images": count})
            rows[-1]["resident_mib"] = measuring.resident_mib() - before
            rows[-1]["held_mib"] = tracemalloc.get_traced_memory()[0] / 2**20
            rows[-1]["areas_mib"] = sum(own.nbytes for own in confusion.images) / 2**20
    tracemalloc.stop()
    return rows


def time_bootstrap(images: int, num_classes: int, resamples: int) -> dict[str, float]:
    """The seconds that the intervals of all scores and classes take."""
    rng = np.random.default_rng(0)
    confusion = ConfusionMatrix(num_classes, IGNORE)
    for _ in range(images):
        present = rng.choice(num_classes, PRESENT, replace=False)
        both = rng.integers(0, 20_000, PRESENT)
        truth, predicted = (both + rng.integers(1, 20_000, PRESENT) for _ in range(2))
        confusion.images.append(np.stack([present, both, truth, predicted], axis=1))
    is_seen = np.arange(num_classes) < 0.9 * num_classes

    def intervals() -> None:
        resampled = confusion.bootstrap(is_seen, resamples=resamples)
        resampled.intervals(), resampled.class_intervals()

    seconds = measuring.take_turns({"bootstrap": intervals}, 3)["bootstrap"]
    sizes = {"images": images, "classes": num_classes, "resamples": resamples}
    return {**sizes, "seconds": statistics.median(seconds)}


TIME_TITLES = "classes | label maps | milliseconds an image | images a second | inference, seconds | share of it | goal"
TIME_CELLS = "{classes} | {maps} | {milliseconds:.2f} | {images_per_second:.0f} | {inference_seconds:.3f} | "
TIME_CELLS += "{share_of_inference:.2%} | {goal}"
MEMORY_TITLES = "way | classes | images | resident, MiB | held, MiB | of it areas of images, MiB | held, KiB an image"
MEMORY_CELLS = "{way} | {classes} | {images} | {resident_mib:.1f} | {held_mib:.1f} | {areas_mib:.2f} | {each_kib:.1f}"


def tables(times: list[dict], memory: list[dict]) -> str:
    """Markdown."""
    shown = []
    for row in times:
        most = GOALS.get(row["maps"])
        goal = "-" if most is None else f"{'met' if row['share_of_inference'] <= most else 'missed'} ({most:.0%})"
        shown.append({**row, "milliseconds": 1000 * row["seconds"], "goal": goal})
    memory = [{**row, "each_kib": 1024 * row["held_mib"] / row["images"]} for row in memory]
    text = measuring.table(TIME_TITLES, TIME_CELLS, shown)
    return f"{text}\n{measuring.table(MEMORY_TITLES, MEMORY_CELLS, memory)}"


def main() -> None:
    args, _ = read_arguments(EvaluatorArgs)
    device, size, apart = measuring.device_named(args.device), (args.height, args.width), measuring.in_fresh_process
    times, memory = [], []
    for classes in args.classes:
        times += apart(compare_time, size, args.maps, args.rounds, classes, device)
        memory += apart(memory_over_images, size, args.maps, OURS, classes, args.images)
    memory += apart(memory_over_images, size, args.maps, KEPT, args.classes[0], [args.kept_images])
    bootstrap = apart(time_bootstrap, args.bootstrap_images, args.bootstrap_classes, args.resamples)
    facts = measuring.head(device)
    text = f"Label maps of {args.width} x {args.height}, torch {facts['torch']}, {facts['machine']}. Goals are largest "
    text += f"shares of an inference.\n\n{tables(times, memory)}\n"
    text += f"Bootstrap of {bootstrap['images']} images, {bootstrap['classes']} classes, {bootstrap['resamples']} "
    text += f"resamples, intervals of all scores and classes: {bootstrap['seconds']:.2f} seconds.\n"
    found = {"times": times, "memory": memory, "bootstrap": bootstrap}
    measuring.publish(args.output, {**facts, **vars(args), **found}, text)


if __name__ == "__main__":
    run(main)
