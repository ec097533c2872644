"""Trains and evaluates transformers' own Mask2Former on the seen classes only, without zero-shot segmentation.

    python -m benchmarks.closed_set train --config recipes/scenes_stage1.yaml --dataset DIR --output_dir FOLDER
    python -m benchmarks.closed_set eval --model FOLDER/final --dataset DIR --output FOLDER/gzs3_off.json

Network, losses and post-processing are those of transformers. Data, augmentation, optimizer and schedule are those of
train.py. The model has no unseen class, so its mIoU(U) is 0 by construction. It trains in one process, from random
weights. A stopped run cannot resume: it starts from the first step. The flags are those of train.py and eval.py. Flags
about class names, matching and losses of zs3 have no effect. Every other flag that this script does not use is refused.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)

from benchmarks.criterion import binary_masks
from configuration_zs3 import Zs3Config
from eval import versions
from modeling_zs3 import draw_as_mask2former
from processing_zs3 import Zs3ImageProcessor
from train import make_scheduler, parameter_groups
from zs3.checkpoints import weights_sha256
from zs3.command_line import InputError, check_required, read_arguments, run
from zs3.data.batches import cut_batch
from zs3.data.image_labels import training_space
from zs3.data.records import load_split
from zs3.evaluation.arguments import EvalArgs, deciding_flags
from zs3.files import write_json
from zs3.label_space import load_label_space
from zs3.scores.confusion import ConfusionMatrix
from zs3.training.arguments import TrainArgs
from zs3.training.folder import check_recipe, save_final
from zs3.training.loader import make_dataset, make_loader

TRAIN_FLAGS = {
    *("dataset", "split", "label_space", "output_dir", "seed", "max_steps", "batch_size", "num_workers"),
    *("learning_rate", "backbone_multiplier", "weight_decay", "max_grad_norm", "lr_schedule", "lr_milestones"),
    *("crop_size", "short_edges", "flip", "color_jitter", "single_class_max_area", "max_size", "test_short_edge"),
    *("encoder", "text_embeds", "prompt_templates", "logging_steps", "checkpointing_steps"),  # accepted without effect
}
EVAL_FLAGS = {"model", "dataset", "split", "label_space", "output", "absent", "num_workers"}


def check_obeyed(args: TrainArgs | EvalArgs, obeyed: set[str]) -> None:
    """Refuses a flag that this script does not use, unless its value is what the script does anyway."""
    anyhow = {name: [value] for name, value in asdict(type(args)()).items()}
    anyhow |= {"backbone_norm": ["batch"], "ensemble": [None, "off"]}
    for name, value in asdict(args).items():
        if name not in obeyed and value not in anyhow[name]:
            raise InputError(f"--{name} {value}: the closed-set comparison has {anyhow[name][-1]} alone")


def make_model(overrides: dict, class_names: list[str]) -> Mask2FormerForUniversalSegmentation:
    """A model with random weights. overrides: fields of Zs3Config; only fields of Mask2FormerConfig are used."""
    known = {name: value for name, value in overrides.items() if name in Mask2FormerConfig.__dataclass_fields__}
    if isinstance(known.get("backbone_config"), dict):
        known["backbone_config"] = AutoConfig.for_model(**known["backbone_config"])
    config = Mask2FormerConfig(**known, id2label=dict(enumerate(class_names)))
    model = Mask2FormerForUniversalSegmentation(config)
    draw_as_mask2former(model.model)
    return model


def train(args: TrainArgs, overrides: dict) -> None:
    args.check()
    check_required(args, "dataset", "output_dir")
    check_obeyed(args, TRAIN_FLAGS)
    final = Path(args.output_dir) / "final"
    check_recipe(final.with_name("recipe.yaml"), {**overrides, **asdict(args)})
    if final.exists():
        print(f"{final} is there already: nothing to do")
        return
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise InputError("the closed-set comparison trains in one process")
    set_seed(args.seed)
    label_space = training_space(load_label_space(args.label_space or args.dataset), "inductive")
    size = {"shortest_edge": args.test_short_edge, "longest_edge": args.max_size}
    processor = Zs3ImageProcessor(size=size, ignore_index=label_space.ignore_index)
    dataset = make_dataset(args, label_space, processor, Zs3Config())
    model = make_model(overrides, dataset.class_names).to(accelerator.device).train()
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, args.backbone_multiplier)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    scheduler = make_scheduler(optimizer, args.lr_schedule, args.lr_milestones, args.max_steps)
    parts, steps = cut_batch(args.batch_size, 1), range(args.max_steps)
    loader = make_loader(dataset, accelerator, parts, steps, num_workers=args.num_workers, shuffle_buffer=0)
    for batch in tqdm(loader, total=args.max_steps, unit="step", mininterval=1):
        masks, ids = binary_masks(batch["labels"].to(accelerator.device))
        pixels = {name: batch[name].to(accelerator.device) for name in ("pixel_values", "pixel_mask")}
        model(**pixels, mask_labels=masks, class_labels=ids, return_dict=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    save_final(model, processor, final)


@torch.inference_mode()
def evaluate(args: EvalArgs) -> dict:
    args.check()
    check_required(args, "dataset", "output")
    check_obeyed(args, EVAL_FLAGS)
    label_space = load_label_space(args.label_space or args.dataset)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(args.model).eval()
    processor = Zs3ImageProcessor.from_pretrained(args.model)
    names = [model.config.id2label[index] for index in range(len(model.config.id2label))]
    ids = torch.tensor([label_space.class_names.index(name) for name in names])
    records = load_split(args.dataset, args.split, label_space)
    confusion = ConfusionMatrix(len(label_space.class_names), label_space.ignore_index)  # without intervals
    theirs = Mask2FormerImageProcessorPil()
    for image, label, image_id in tqdm(records, total=len(records), unit="image", mininterval=1):
        inputs = processor(images=image)
        outputs = model(**inputs, return_dict=True)
        height, width = inputs["pixel_mask"][0].any(1).sum(), inputs["pixel_mask"][0].any(0).sum()
        size = inputs["pixel_values"].shape[-2:]
        masks = functional.interpolate(outputs.masks_queries_logits, size=size, mode="bilinear")
        outputs.masks_queries_logits = masks[..., :height, :width]  # the image without its padding
        (found,) = theirs.post_process_semantic_segmentation(outputs, [label.shape])
        confusion.update(ids[found], label, image_id)
    is_seen = label_space.is_seen.numpy()
    confused = confusion.seen_unseen_confusion(is_seen)._asdict()
    return {
        "settings": deciding_flags(args),
        "versions": versions(),
        "checkpoint_sha256": weights_sha256(args.model),
        "unseen": [name for name in label_space.class_names if name in label_space.unseen],
        "seen_unseen_confusion": {group: shares._asdict() for group, shares in confused.items()},
        "num_images": len(confusion.images),
        "split_images": len(records),
        **confusion.scores(is_seen, args.absent, label_space.is_thing),
        "per_class": dict(zip(label_space.class_names, confusion.iou(args.absent).tolist(), strict=True)),
    }


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else None
    if word == "train":
        train(*read_arguments(TrainArgs, sys.argv[2:], Zs3Config))
    elif word == "eval":
        args, _ = read_arguments(EvalArgs, sys.argv[2:])
        write_json(Path(args.output), evaluate(args))
    else:
        raise InputError("say `train` with the flags of train.py, or `eval` with those of eval.py")


if __name__ == "__main__":
    run(main)
