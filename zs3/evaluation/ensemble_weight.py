"""Choose the weight of the CLIP ensemble (section 4.6) without unseen masks and without the test set, or none at all.

    zs3 ensemble_weight --model runs/stage2/final --dataset DIR --unseen_labels runs/pseudo_labels

Label maps of training pictures are compared with the labels that training may use. The measure of seen classes is IoU
on annotated pixels. The measure of unseen classes is F1 of their presence in pictures: label map against image labels
(pseudo or ground truth). The score is the harmonic mean of the two means. The answer is "do not ensemble" unless a
weight is better in nearly all bootstrap resamples of the pictures: CLIP costs time for every proposal, and it harms a
model that knows the unseen classes better than CLIP.

--output writes the answer to a file for `eval.py --ensemble_weight FILE`; --write writes it into the checkpoint.

Two biases: pseudo labels come from the same CLIP, which favours the ensemble; the model was trained on these pictures,
which favours the model alone. A --split that training did not use avoids the second.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from configuration_zs3 import places, shortened
from text_zs3 import TextCache
from zs3.checkpoints import check_no_unseen_masks, class_vectors, load_checkpoint, read_settings, weights_sha256
from zs3.command_line import (
    Arguments,
    Count,
    InputError,
    OutputFile,
    Seed,
    Share,
    Some,
    check_required,
    flag,
    in_one_line,
    read_arguments,
    try_output,
)
from zs3.data.image_labels import load_unseen_scores, pseudo_labels
from zs3.data.records import dataset_name, load_split
from zs3.data.samples import mask_positions, to_mask_labels
from zs3.evaluation.choices import read_answer
from zs3.evaluation.results import check_replaceable
from zs3.files import write_json
from zs3.label_space import LabelSpace, load_label_space

OFF = "off"
RESAMPLES = 1000
SURE = 0.975  # share of the resamples in which a weight must beat no ensemble


@dataclass
class WeightArgs(Arguments):
    """One choice for one checkpoint."""

    model: str | None = flag(None, "Checkpoint with an image tower: a folder or a Hub id.")
    trust_remote_code: bool = flag(False, "Run the code that lies beside the checkpoint, in place of this project's.")
    dataset: str | None = flag(None, "Folder or Hub id of the data.")
    split: str = flag("train", "Split to choose the weight on; not the split of reported results.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; default: the dataset's own.")
    unseen_labels: str | None = flag(
        None,
        "Image labels of unseen classes: a folder of zs3 pseudo_labels; or 'ground_truth', for a model "
        "trained with them.",
    )
    weights: Some[Share] = flag([0.5, 0.6, 0.7, 0.8, 0.9], "Weights to compare with no ensemble.")
    num_images: Count = flag(300, "Number of pictures, spread evenly over the split.")
    min_share: Share = flag(0.01, "Smallest share of a label map's pixels for a class to be present.")
    text_embeds: str | None = flag(None, "Text vectors for a checkpoint without text tower: a .npy, one row a class.")
    output: OutputFile | None = flag(None, "Result file (JSON).")
    write: bool = flag(False, "Write the answer into the checkpoint's config.json, for evaluation and pipeline.")
    seed: Seed = flag(0, "Seed of the bootstrap.")

    def check(self) -> None:
        check_required(self, "model", "dataset", "unseen_labels")
        if self.write and not Path(self.model, "config.json").is_file():
            raise InputError(f"--write needs a checkpoint's folder, and {self.model} is no folder")
        if self.write:
            try_output("--write", Path(self.model, "config.json"), "file")
        if self.output is not None:
            check_replaceable(Path(self.output), read_answer)


def weight_settings(args: WeightArgs) -> dict:
    """The flags that decide the answer."""
    others = ("output", "write", "trust_remote_code")
    return {name: value for name, value in asdict(args).items() if name not in others}


class WeightCounts:
    """The counts of each picture with one weight.

    areas: N x (3, S) pixels: intersection, truth and prediction of seen classes, on annotated pixels.
    shown: N x (3, U) 0 or 1: hits, false alarms and misses of unseen classes.
    """

    def __init__(self, is_seen: np.ndarray, min_share: float):
        """is_seen: (C,) bool. min_share: see WeightArgs."""
        self.is_seen, self.min_share = is_seen, min_share
        self.areas: list[np.ndarray] = []
        self.shown: list[np.ndarray] = []

    def add(self, prediction: np.ndarray, label: np.ndarray, present: np.ndarray) -> None:
        """prediction, label: (H, W); label is -1 on pixels without a seen class. present: (U,) bool."""
        classes, annotated = len(self.is_seen), label >= 0
        truth, predicted, both = (
            np.bincount(values, minlength=classes)[self.is_seen]
            for values in (label[annotated], prediction[annotated], label[annotated & (label == prediction)])
        )
        self.areas.append(np.stack([both, truth, predicted]))
        pixels = np.bincount(prediction.ravel(), minlength=classes)[~self.is_seen]
        found = pixels >= self.min_share * prediction.size
        self.shown.append(np.stack([found & present, found & ~present, ~found & present]))

    def scores(self, drawn: np.ndarray) -> np.ndarray:
        """(R, 3): mIoU(S), mean F1(U) and their harmonic mean, of R resamples. drawn: (R, N), the count of each."""
        both, truth, predicted = np.einsum("rn,nkc->krc", drawn, np.stack(self.areas))
        hits, alarms, misses = np.einsum("rn,nkc->krc", drawn, np.stack(self.shown).astype(np.int64))
        seen = _mean_ratio(both, truth + predicted - both)
        unseen = _mean_ratio(2 * hits, 2 * hits + alarms + misses)
        total = np.where(seen + unseen > 0, seen + unseen, 1)
        return np.stack([seen, unseen, 2 * seen * unseen / total], axis=1)


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(R, K) each -> (R,): the mean over the classes that occur, 0 where none does."""
    occurs = whole > 0
    return np.where(occurs, part / np.where(occurs, whole, 1), 0).sum(1) / np.maximum(occurs.sum(1), 1)


@torch.inference_mode()
def choose(args: WeightArgs) -> dict:
    """The result, as it is written to args.output."""
    args.check()
    label_space = load_label_space(args.label_space or args.dataset)
    records = load_split(args.dataset, args.split, label_space)
    model, processor = load_checkpoint(args.model, args.trust_remote_code)
    check_allowed(model.config, label_space, args.model, args.unseen_labels)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    present = unseen_labels_of(args.unseen_labels, label_space, records.image_ids, model.config.pseudo_label_threshold)
    text_embeds, _ = class_vectors(model, processor, label_space.class_names, args.text_embeds, TextCache())
    is_seen, weights = label_space.is_seen, (OFF, *args.weights)
    unseen_ids = np.flatnonzero(~is_seen.numpy())
    positions = mask_positions(label_space, label_space.class_names)

    counts = {weight: WeightCounts(is_seen.numpy(), args.min_share) for weight in weights}
    indices = np.unique(np.linspace(0, len(records) - 1, min(args.num_images, len(records))).astype(int)).tolist()
    for index in tqdm(indices, unit="image", mininterval=1):
        image, label, _ = records[index]
        here = np.isin(unseen_ids, label) if present is None else present[index]
        label = to_mask_labels(label, positions, label_space.ignore_index)
        with in_one_line(f"image {shortened(records.image_ids[index])}"):
            predictions = label_maps(model, processor, image, text_embeds, is_seen, weights)
        for weight, prediction in predictions.items():
            counts[weight].add(prediction, label, here)
    result = {
        "settings": weight_settings(args),
        "checkpoint_sha256": weights_sha256(args.model),
        "dataset": dataset_name(args.dataset),
        "image_ids": [records.image_ids[index] for index in indices],
        **decide(counts, len(indices), args.seed),
    }
    if args.output is not None:
        write_json(Path(args.output), result)
    if args.write:
        path = Path(args.model, "config.json")
        write_json(path, read_settings(path) | {"clip_ensemble_weight": result["clip_ensemble_weight"]})
    return result


def check_allowed(config: PreTrainedConfig, label_space: LabelSpace, model: str, unseen_labels: str) -> None:
    """The choice may use the labels that training had, and no others."""
    if not label_space.unseen:
        raise InputError("the label space has no unseen class: there is nothing to choose the weight for")
    check_no_unseen_masks(config, label_space, "weight can be chosen without unseen masks")
    if config.vision_config is None:
        raise InputError(f"{model} has no image tower: there is nothing to ensemble with")
    if unseen_labels == "ground_truth" and config.unseen_labels != "ground_truth":
        raise InputError(
            f"the training of {model} had no ground-truth image labels, so its weight must not be chosen with them: "
            "give a folder of pseudo labels"
        )


def unseen_labels_of(
    unseen_labels: str, label_space: LabelSpace, image_ids: list[str], threshold: float
) -> np.ndarray | None:
    """(all of the split, U) bool: the unseen classes in each picture; None: they are read from the label maps."""
    if unseen_labels == "ground_truth":
        return None
    scores = load_unseen_scores(unseen_labels, label_space, image_ids)
    order = np.argsort(places(label_space.unseen, label_space.class_names))  # from the file's order to that of the ids
    return pseudo_labels(scores, threshold)[:, order] == 1


def label_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    text_embeds: Tensor,
    is_seen: Tensor,
    weights: Sequence[str | float],
) -> dict[str | float, np.ndarray]:
    """The label map (H, W) for each weight. The network and CLIP run once."""
    inputs = processor(images=image).to(model.device)
    outputs = model(**inputs, text_embeds=text_embeds, return_dict=True)
    images = processor.to_rgb(inputs["pixel_values"])
    proposals = model.embed_proposals(images, outputs.mask_logits, outputs.valid_sizes)
    maps = {}
    for weight in weights:
        made = outputs
        if weight != OFF:
            made = model.ensemble(outputs, proposals, text_embeds, is_seen=is_seen, weight=weight)
        (found,) = processor.post_process_semantic_segmentation(made, [(image.height, image.width)])
        maps[weight] = found.cpu().numpy()
    return maps


def decide(counts: dict[str | float, WeightCounts], num_images: int, seed: int) -> dict:
    """The scores of each weight, its share of resamples that are better than OFF, and the chosen weight or None."""
    whole = np.ones((1, num_images), dtype=np.int64)
    shares = np.full(num_images, 1 / num_images)
    drawn = np.random.default_rng(seed).multinomial(num_images, shares, size=RESAMPLES)
    resampled = {weight: own.scores(drawn)[:, 2] for weight, own in counts.items()}
    rows = {}
    for weight, own in counts.items():
        seen, unseen, both = own.scores(whole)[0].tolist()
        better = float((resampled[weight] > resampled[OFF]).mean())
        rows[str(weight)] = {"miou_seen": seen, "f1_unseen": unseen, "score": both, "better_than_off": better}
    sure = [weight for weight in counts if weight != OFF and rows[str(weight)]["better_than_off"] >= SURE]
    best = max(sure, key=lambda weight: rows[str(weight)]["score"], default=None)
    return {"weights": rows, "clip_ensemble_weight": best}


def report(result: dict) -> str:
    split = result["settings"]["split"]
    lines = [f"{len(result['image_ids'])} pictures of {result['dataset']} ({split}), percent"]
    lines.append("  weight   mIoU(S)   F1(U)   both   better than off in")
    for weight, row in result["weights"].items():
        numbers = [100 * row[name] for name in ("miou_seen", "f1_unseen", "score")]
        share = "" if weight == OFF else f"{100 * row['better_than_off']:8.1f} % of resamples"
        lines.append(f"  {weight:>6s}   {numbers[0]:7.1f} {numbers[1]:7.1f} {numbers[2]:6.1f}   {share}".rstrip())
    best = result["clip_ensemble_weight"]
    lines.append("do not ensemble: no weight is surely better than none" if best is None else f"take the weight {best}")
    return "\n".join(lines)


def main() -> None:
    args, _ = read_arguments(WeightArgs)
    print(report(choose(args)))
