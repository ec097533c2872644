"""The flags of train.py."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from configuration_zs3 import Zs3Config
from zs3.checkpoints import refusing
from zs3.command_line import (
    Amount,
    Arguments,
    Batch,
    Count,
    InputError,
    OutputFolder,
    Pixels,
    Positive,
    PositiveShare,
    Seed,
    Share,
    Side,
    Some,
    Whole,
    Workers,
    check_required,
    flag,
    model_fields,
    refuse_alone,
    refuse_together,
)
from zs3.data.image_labels import Supervision

RECIPE = "recipe.yaml"  # in the output folder: all flags of the run
# Fields of Zs3Config that training itself writes, beside `unseen_labels`, which is a flag of TrainArgs.
WRITTEN = ("class_names", "seen_class_names", "image_label_precision", "image_label_recall")
TOWERS = ("text_config", "vision_config")  # fields of Zs3Config that come from a checkpoint; null leaves one out


@dataclass
class TrainArgs(Arguments):
    """One training run. Sections are those of the paper, and the defaults are its values."""

    dataset: str | None = flag(None, "Folder or Hub id of the training data.")
    output_dir: OutputFolder | None = flag(None, "Folder for checkpoints, metrics and the final model.")
    split: str = flag("train", "Split of the dataset to train on.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; default: the dataset's own.")
    streaming: bool = flag(False, "Read shard after shard, from the disk or the Hub, without a copy in the cache.")
    shuffle_buffer: Count = flag(
        1000, "Pictures in the shuffle buffer of each worker of a stream, not decoded (1000 of COCO are 0.2 GB)."
    )
    unseen_labels: str = flag(
        "none",
        "Labels of unseen classes. 'none': their names are not on the class axis (inductive). 'ground_truth', or a "
        "folder of pseudo labels (the --output of zs3 pseudo_labels): image labels, no masks (transductive). 'masks': "
        "masks too (supervised, no zero-shot training).",
    )
    pseudo_label_unknown_above: Share | None = flag(
        None,
        "Pseudo labels with a score above this and below --pseudo_label_threshold are unknown; default: absent.",
    )
    caption_nouns: str | None = flag(
        None, "More class names and their image labels, from captions: the --output of zs3 nouns (section 4.5)."
    )
    dropped_words: Literal["unknown", "negative"] = flag(
        "unknown", "Image label of a dropped word of a caption (--word_drop_probability)."
    )

    init_from: str | None = flag(None, "Checkpoint of this project to start from (stage 2).")
    init_parts: Literal["all", "backbone"] = flag(
        "all", "Part of --init_from to use: the whole model, or its backbone alone. Its encoder is always used."
    )
    proposals: str | None = flag(None, "Mask2Former checkpoint to start from (Hub id or folder).")
    backbone: str | None = flag(None, "ImageNet backbone to start from (Hub id or folder).")
    encoder: str | None = flag(None, "CLIP or TIPSv2 that gives the text and image towers (Hub id or folder).")
    text_embeds: str | None = flag(None, "Ready-made text vectors instead of a text tower: a .npy, one row a class.")
    prompt_templates: list[str] | None = flag(
        None, "Prompts with {} for the name; '{}' alone means no prompt. Default: --init_from's own, or ViLD's 14."
    )

    max_steps: Count = flag(50_000, "Optimizer steps (section 4.3: 50K COCO-Stuff, 5K VOC).")
    batch_size: Batch = flag(8, "Images of a step, over all processes (section 4.3).")
    device_batch_size: Batch | None = flag(
        None, "Largest number of images that a process computes at once. A larger share is cut into equal parts."
    )
    learning_rate: Amount = flag(5e-5, "AdamW's initial rate (section 4.3).")
    weight_decay: Amount = flag(1e-4, "AdamW's weight decay (section 4.3); 0 on norms and embeddings.")
    backbone_multiplier: Amount = flag(0.1, "Learning rate factor of the backbone (section 4.3).")
    max_grad_norm: Positive = flag(0.01, "Gradient clipping, L2 over the whole model (Mask2Former's).")
    lr_schedule: Literal["multistep", "poly"] = flag(
        "multistep", "'multistep' (section 4.3) or 'poly' (power 0.9, as in earlier work)."
    )
    lr_milestones: list[Whole] = flag([5_000, 80_000], "Steps at which multistep divides the rate by 10.")
    backbone_norm: Literal["frozen", "batch", "sync"] = flag(
        "frozen",
        "Batch norms of the backbone: 'frozen' (Mask2Former's), or with the statistics of one process's images "
        "('batch') or of all images ('sync', GPUs only). A backbone of random weights needs 'batch' or 'sync'.",
    )
    activation_checkpointing: bool = flag(False, "Less memory, more time: activations are computed twice.")
    mixed_precision: Literal["no", "bf16", "fp16"] = flag("no", "Autocast of the forward pass; fp16 on a GPU only.")

    crop_size: Side = flag(640, "Side of the square training crop, pixels (640 COCO-Stuff, 512 VOC).")
    short_edges: Some[Pixels] | None = flag(None, "Short edges to resize to; default: 0.5 to 2 times crop_size.")
    max_size: Pixels = flag(2560, "Longest edge after resizing, pixels, in training and at inference.")
    flip: bool = flag(True, "Mirror half of the images.")
    color_jitter: bool = flag(True, "SSD's colour jitter.")
    single_class_max_area: PositiveShare = flag(1.0, "Largest share of one class in a crop; 1 is no limit.")
    test_short_edge: Pixels = flag(640, "Short edge at inference, pixels; stored in the image processor.")

    num_workers: Workers = flag(4, "Data loading processes of each training process; 0 loads in the main one.")
    logging_steps: Count = flag(50, "Steps between two lines of metrics.jsonl.")
    checkpointing_steps: Count = flag(5_000, "Steps between two checkpoints.")
    checkpoints_kept: Count = flag(2, "Checkpoints to keep; older ones are deleted.")
    trackers: list[str] = flag([], "Trackers that get the metrics too, by accelerate's names: tensorboard, wandb, ...")
    seed: Seed = flag(0, "Seed of weights, data order, augmentation and point sampling.")

    @property
    def supervision(self) -> Supervision:
        return {"none": "inductive", "masks": "supervised"}.get(self.unseen_labels, "transductive")

    def check(self) -> None:
        """Checks flags that depend on each other."""
        check_required(self, "dataset", "output_dir")
        refuse_together(self, "caption_nouns", "unseen_labels", why="the nouns have image labels of their own")
        refuse_together(self, "caption_nouns", "text_embeds", why="the nouns need a text tower, give --encoder")
        refuse_together(self, "init_from", "proposals", "backbone", "encoder", why="it is a whole model")
        refuse_alone(self, "init_parts", without="init_from")
        # AdamW computes rate / 0.1 in its first step, and rate x decay.
        largest = self.learning_rate * max(1.0, self.backbone_multiplier) * max(10.0, self.weight_decay)
        if not largest <= torch.finfo(torch.float32).max:
            raise InputError(
                f"--learning_rate {self.learning_rate}, --weight_decay {self.weight_decay} and --backbone_multiplier "
                f"{self.backbone_multiplier} are too large together for float32: give smaller ones"
            )
        if self.init_from is None and self.encoder is None and self.text_embeds is None:
            raise InputError(
                "no start: stage 2 needs --init_from, the final/ of stage 1; stage 1 needs --encoder (a checkpoint) "
                "or --text_embeds (a .npy)"
            )
        check_trackers(self.trackers)


def check_trackers(names: list[str]) -> None:
    """accelerate itself would leave out an unknown tracker without a message."""
    known = sorted(set(LoggerType.list()) - {"all"})
    for name in names:
        if name not in known:
            raise InputError(f"--trackers {name}: accelerate knows {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            package = "'zs3[tensorboard]'" if name == "tensorboard" else name.replace("_", "-")
            raise InputError(f"--trackers {name} is not installed: pip install {package}, or leave it out")


def check_overrides(overrides: dict) -> None:
    """Checks fields of Zs3Config by themselves, so that a wrong value is not blamed on a checkpoint."""
    for name in WRITTEN:
        if name in overrides:
            raise InputError(f"{name} is written by the training itself: leave it out")
    with refusing("the model's configuration"):
        Zs3Config(**overrides)


def resolved_recipe(flags: dict, config: Zs3Config) -> dict:
    """All flags of the run, those of the model included. A file of them can be given to --config.

    flags: the fields of TrainArgs.
    """
    saved = config.to_dict()
    names = [name for name in model_fields(Zs3Config) if name not in (*WRITTEN, *TOWERS)]
    left_out = [name for name in TOWERS if saved[name] is None]
    return {**{name: saved[name] for name in [*names, *left_out]}, **flags}


def recipe_defaults() -> dict:
    """The default of every flag that a recipe can have."""
    return {**Zs3Config().to_dict(), **asdict(TrainArgs())}
