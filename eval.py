"""Evaluate a checkpoint: mIoU(S), mIoU(U), hIoU and their intervals.

    accelerate launch eval.py --model runs/stage2/final --dataset DIR --setting gzs3 --output runs/stage2/gzs3.json

Settings (section 3.1): gzs3, candidates and pixels of all classes; zs3, of the unseen classes alone; ovs, another
label space than that of the training. The checkpoint is loaded through AutoModel and AutoProcessor only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from zs3.checkpoints import check_no_unseen_masks, class_vectors, file_sha256, load_checkpoint, trained_on
from zs3.command_line import (
    InputError,
    check_at_least,
    check_required,
    finite_or_none,
    flag,
    read_arguments,
    run,
    write_json,
)
from zs3.data import dataset_name, load_split
from zs3.evaluation import ConfusionMatrix, generalized_scores, percent
from zs3.label_space import LabelSpace, load_label_space
from zs3.pictures import draw_comparison


@dataclass
class EvalArgs:
    """One evaluation of one checkpoint on one dataset."""

    model: str | None = flag(None, "Checkpoint: a folder or a Hub id.")
    dataset: str | None = flag(None, "Folder or Hub id of the data.")
    split: str = flag("validation", "Split of the dataset to evaluate on.")
    label_space: str | None = flag(None, "Benchmark name or classes.json; default: the dataset's own.")
    setting: Literal["gzs3", "zs3", "ovs"] = flag(
        "gzs3",
        "Candidates: all classes (gzs3), the unseen alone (zs3), or those of a label space not trained on (ovs).",
    )
    output: str | None = flag(None, "Result file (JSON).")
    text_embeds: str | None = flag(None, "Text vectors for a checkpoint without text tower: a .npy, one row a class.")
    ensemble: Literal["off", "crops", "lazy", "single_pass"] | None = flag(
        None,
        "CLIP's view of the proposals joined in (section 4.6): of all their crops, of those that can change the label "
        "map, or from one pass over the image; default: crops where the checkpoint has an image tower and a weight.",
    )
    ensemble_weight: float | None = flag(None, "w of the ensemble; default: the checkpoint's clip_ensemble_weight.")
    ensemble_tolerance: float = flag(0.0, "Share of an image's pixels that 'lazy' may leave open.")
    absent: Literal["union", "truth"] = flag(
        "union", "A class is left out of means where truth and prediction (union) or truth alone lack it."
    )
    pictures: str | None = flag(None, "Folder for pictures: image, truth, prediction.")
    num_pictures: int = flag(8, "How many pictures to draw, spread evenly over the split.")
    max_images: int | None = flag(None, "Evaluate the first N images only.")
    seed: int = flag(0, "Of the bootstrap.")

    def check(self) -> None:
        check_required(self, "model", "dataset")
        check_at_least(self, 1, "max_images")
        check_at_least(self, 0, "num_pictures", "seed", "ensemble_weight", "ensemble_tolerance")
        if max(self.ensemble_weight or 0, self.ensemble_tolerance) > 1:
            raise InputError("--ensemble_weight and --ensemble_tolerance are shares, at most 1")
        if self.ensemble_tolerance > 0 and self.ensemble != "lazy":
            raise InputError("--ensemble_tolerance goes with --ensemble lazy")


def check_claim(config: PreTrainedConfig, label_space: LabelSpace, setting: str) -> None:
    """A zero-shot number needs a model that saw no unseen mask."""
    if setting == "ovs":
        return
    check_no_unseen_masks(config, label_space, f"{setting} result can be claimed, --setting ovs is open to it")
    missing = [name for name in label_space.seen if name not in trained_on(config, label_space.seen)]
    if missing and setting == "gzs3":
        raise InputError(f"the checkpoint saw no masks of {missing[:3]}, seen classes here: use --setting ovs")


def chosen_ensemble(args: EvalArgs, model: PreTrainedModel) -> tuple[str, float | None]:
    """The view and the weight, of which one that is not given is the checkpoint's; ("off", None) for no ensemble."""
    try:
        view = model.ensemble_view(args.ensemble, args.ensemble_weight)
    except ValueError as error:
        raise InputError(str(error)) from error
    weight = model.config.clip_ensemble_weight if args.ensemble_weight is None else args.ensemble_weight
    return view, None if view == "off" else weight


@torch.inference_mode()
def evaluate(args: EvalArgs) -> dict | None:
    """The result, as it is written to args.output; None on processes other than the main one."""
    args.check()
    accelerator = Accelerator()
    label_space = load_label_space(args.label_space or args.dataset)
    records = load_split(args.dataset, args.split, label_space)
    with accelerator.local_main_process_first():
        model, processor = load_checkpoint(args.model)
    check_claim(model.config, label_space, args.setting)
    model.to(accelerator.device)
    view, weight = chosen_ensemble(args, model)
    text_embeds, prompts = class_vectors(model, processor, label_space.class_names, args.text_embeds)

    # Candidates: the class axis of this setting, and where each id of a label map lands on it
    is_seen = label_space.is_seen
    candidates = torch.nonzero(~is_seen if args.setting == "zs3" else torch.ones_like(is_seen)).squeeze(1)
    if len(candidates) == 0:
        raise InputError("the label space has no unseen class: nothing to evaluate with --setting zs3")
    names = [label_space.class_names[index] for index in candidates]
    ignored = len(label_space.class_names)  # an id of our own: the data's may lie inside the candidates' range
    place = np.full(ignored + 1, ignored)
    place[candidates.numpy()] = np.arange(len(candidates))
    text_embeds = text_embeds[candidates].to(accelerator.device)

    trained = trained_on(model.config, names)
    is_trained = torch.tensor([name in trained for name in names])

    confusion = ConfusionMatrix(len(names), ignored)
    shown, undecided = 0, 0.0
    count = len(records) if args.max_images is None else min(args.max_images, len(records))
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    drawn = set(np.linspace(0, count - 1, min(args.num_pictures, count)).astype(int).tolist())
    quiet = not accelerator.is_local_main_process
    with tqdm(total=len(mine), unit="image", mininterval=1, disable=quiet) as bar:
        for index in mine:
            image, label, image_id = records[index]
            label = place[np.where(label == label_space.ignore_index, ignored, label)]
            inputs = processor(images=image).to(accelerator.device)
            outputs = model(**inputs, text_embeds=text_embeds)
            if view != "off":
                outputs = model.ensemble(
                    outputs,
                    processor.to_rgb(inputs["pixel_values"]),
                    text_embeds,
                    is_seen=is_trained,
                    weight=weight,
                    view=view,
                    tolerance=args.ensemble_tolerance,
                    image_sizes=[label.shape],
                )
                shown += int(outputs.shown_to_clip.sum())
                undecided += float(outputs.undecided.sum())
            (prediction,) = processor.post_process_semantic_segmentation(outputs, [label.shape])
            confusion.update(prediction, label)
            if args.pictures is not None and index in drawn:
                panels = {
                    "image": image,
                    "truth": np.where(label == ignored, -1, label),
                    "prediction": prediction.cpu(),
                }
                draw_comparison(panels, names, Path(args.pictures) / f"{image_id}.png")
            bar.update()

    parts, looks = gather_object([confusion]), np.sum(gather_object([(shown, undecided)]), axis=0) / count
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    total = ConfusionMatrix(len(names), ignored)
    for part in parts:
        total.merge(part)
    result = summary(args, label_space, model.config, total, names, prompts)
    result |= {"clip_ensemble": view, "clip_ensemble_weight": weight, "ensemble_tolerance": args.ensemble_tolerance}
    result |= {"proposals_shown_to_clip": float(looks[0]), "undecided_share": float(looks[1])}  # means over images
    if args.output is not None:
        write_json(Path(args.output), result)
    return result


def summary(
    args: EvalArgs,
    label_space: LabelSpace,
    config: PreTrainedConfig,
    confusion: ConfusionMatrix,
    names: list[str],
    prompts: list[str],
) -> dict:
    """Scores in [0, 1] with everything a reader needs to know how they came about; None for a NaN."""
    is_seen = np.array([name not in label_space.unseen for name in names])
    iou = confusion.iou(args.absent)
    scores = generalized_scores(iou, is_seen)._asdict()
    intervals = confusion.confidence_intervals(is_seen, absent=args.absent, seed=args.seed)
    if args.setting == "ovs":  # seen and unseen are words of the zero-shot settings
        scores = dict.fromkeys(scores)
        intervals |= dict.fromkeys(scores, (None, None))
    weights = Path(args.model) / "model.safetensors"
    result = {
        "setting": args.setting,
        "model": args.model,
        "dataset": dataset_name(args.dataset),
        "split": args.split,
        "label_space": args.label_space or "the dataset's own",
        "label_space_sha256": label_space.sha256,
        "checkpoint_sha256": file_sha256(weights) if weights.exists() else None,
        "seen": [name for name in names if name not in label_space.unseen],
        "unseen": [name for name in names if name in label_space.unseen],
        "trained_on_masks_of": config.seen_class_names,
        "unseen_labels_in_training": config.unseen_labels,
        "prompts": prompts,
        "calibration": None,
        "absent": args.absent,
        "seed": args.seed,
        "num_images": len(confusion.images),
        "miou": float(np.nanmean(iou)) if np.isfinite(iou).any() else None,
        **scores,
        "pixel_accuracy": confusion.pixel_accuracy(),
        "confidence_intervals": {name: list(interval) for name, interval in intervals.items()},
        "per_class": dict(zip(names, iou.tolist(), strict=True)),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }
    return finite_or_none(result)


def report(result: dict) -> str:
    """The table for the terminal; percent."""
    lines = [f"{result['setting']}: {result['model']} on {result['num_images']} images of {result['dataset']}"]
    for name in ("miou_seen", "miou_unseen", "hiou", "miou"):
        low, high = result["confidence_intervals"][name]
        lines.append(f"  {name:12s} {percent(result[name])}   95 % interval {percent(low)} to {percent(high)}")
    lines.append(f"  {'accuracy':12s} {percent(result['pixel_accuracy'])}")
    unseen = set(result["unseen"])
    for name, iou in result["per_class"].items():
        lines.append(f"    {percent(iou)}  {name}{'  (unseen)' if name in unseen else ''}")
    return "\n".join(lines)


def main() -> None:
    args, _ = read_arguments(EvalArgs)
    result = evaluate(args)
    if result is not None:
        print(report(result))


if __name__ == "__main__":
    run(main)
