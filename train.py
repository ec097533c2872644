"""Train Zs3ForSemanticSegmentation.

    accelerate launch train.py --config recipes/scenes_stage1.yaml --dataset DIR --output_dir runs/stage1
    accelerate launch train.py --config recipes/scenes_stage2_ground_truth.yaml --dataset DIR --output_dir runs/stage2 \
        --init_from runs/stage1/final

A recipe is a YAML file of flags; the command line wins over it, the defaults below stand where both are silent.
Besides the fields of TrainArgs every field of Zs3Config is a flag (losses, architecture); with --init_from the
checkpoint's own values are their defaults. The same command again resumes from the last checkpoint in the output
folder.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from configuration_zs3 import Zs3Config, among, shortened
from losses_zs3 import count_targets, mask_ids
from modeling_zs3 import Zs3ForSemanticSegmentation, Zs3Output
from processing_zs3 import PROMPT_TEMPLATES, Zs3ImageProcessor, Zs3Processor, saved_templates
from zs3.augmentation import Augmentation
from zs3.checkpoints import (
    CHECKPOINT_ERRORS,
    check_checkpoint,
    check_finite,
    load_config,
    load_tokenizer,
    refusal,
    trained_on,
)
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
    in_one_line,
    model_fields,
    read_arguments,
    run,
    shown,
)
from zs3.data import (
    SegmentationDataset,
    StepSampler,
    StreamedBatches,
    check_scored_pictures,
    collate,
    load_split,
    stream_split,
)
from zs3.files import lock_folder, write_json
from zs3.image_labels import GroundTruthLabels, PseudoLabels, Setting, training_space
from zs3.label_space import LabelSpace, load_label_space, load_text_embeds
from zs3.nouns import CaptionLabels, load_caption_nouns
from zs3.run_folder import (
    Checkpoints,
    MetricsLog,
    Progress,
    check_final,
    check_places,
    check_recipe,
    check_stamp,
    has_begun,
    save_final,
)
from zs3.run_plan import BatchParts, Pace, check_learnable, check_norms, check_trackers, cut_batch, describe
from zs3.stamp import STAMP, Record, joined, make_stamp, record_in, record_of
from zs3.stopping import EXIT_CODE, Termination, agree, all_refuse, outlive_first_sigterm

# Fields of Zs3Config that the training writes, beside `unseen_labels`, which is a flag of the run.
FILLED_IN = ("class_names", "seen_class_names")
UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
TOWERS = ("text_config", "vision_config")  # come from a checkpoint; null leaves one out


@dataclass
class TrainArgs(Arguments):
    """One training run. Section numbers are the paper's; its values are the defaults."""

    dataset: str | None = flag(None, "Folder or Hub id of the training data.")
    output_dir: OutputFolder | None = flag(None, "Folder for checkpoints, metrics and the final model.")
    split: str = flag("train", "Split of the dataset to train on.")
    label_space: str | None = flag(None, "Benchmark name or classes.json; default: the dataset's own.")
    streaming: bool = flag(False, "Read shard after shard, from the disk or the Hub, without a copy in the cache.")
    shuffle_buffer: Count = flag(
        1000, "Pictures, not decoded, that each worker of a stream shuffles among (1000 of COCO's are 0.2 GB)."
    )
    unseen_labels: str = flag(
        "none",
        "What training is told of unseen classes: 'none', and their names are not on the class axis (inductive); "
        "image labels, from a folder of pseudo labels (the --output of zs3.pseudo_labels) or 'ground_truth', never "
        "masks (transductive); or their 'masks' (supervised: no zero-shot training).",
    )
    pseudo_label_unknown_above: Share | None = flag(
        None,
        "Pseudo labels with a score above this, and below --pseudo_label_threshold, are unknown; default: absent.",
    )

    caption_nouns: str | None = flag(
        None, "Further class names, from captions (the --output of zs3.nouns), told with their images (section 4.5)."
    )
    dropped_words: Literal["unknown", "negative"] = flag(
        "unknown", "What a word of a caption is where it is dropped (--word_drop_probability)."
    )

    init_from: str | None = flag(None, "Checkpoint of this project to start from (stage 2).")
    init_parts: Literal["all", "backbone"] = flag(
        "all", "What to take of --init_from: the whole model, or its backbone (CLIP towers in either case)."
    )
    mask2former: str | None = flag(None, "Mask2Former checkpoint to start from (Hub id or folder).")
    backbone: str | None = flag(None, "ImageNet backbone to start from (Hub id or folder).")
    clip: str | None = flag(None, "CLIP checkpoint for text and image tower (Hub id or folder).")
    text_embeds: str | None = flag(None, "Ready-made text vectors instead of a text tower: a .npy, one row a class.")
    prompt_templates: list[str] | None = flag(
        None, "Prompts, '{}' is the name, '{}' alone is no prompt; default: --init_from's own, or ViLD's 14."
    )

    max_steps: Count = flag(50_000, "Optimizer steps (section 4.3: 50K COCO-Stuff, 5K VOC).")
    batch_size: Batch = flag(8, "Images a step, over all processes (section 4.3).")
    device_batch_size: Batch | None = flag(
        None, "The most images a process takes at once; a larger share of the batch goes in equal parts, one by one."
    )
    learning_rate: Amount = flag(5e-5, "AdamW's initial rate (section 4.3).")
    weight_decay: Amount = flag(1e-4, "AdamW's weight decay (section 4.3); 0 on norms and embeddings.")
    backbone_multiplier: Amount = flag(0.1, "Learning rate factor of the backbone (section 4.3).")
    max_grad_norm: Positive = flag(0.01, "Gradient clipping, L2 over the whole model (Mask2Former's).")
    lr_schedule: Literal["multistep", "poly"] = flag(
        "multistep", "'multistep' (section 4.3) or 'poly' (power 0.9, the ancestors')."
    )
    lr_milestones: list[Whole] = flag([5_000, 80_000], "Steps at which multistep divides the rate by 10.")
    backbone_norm: Literal["frozen", "batch", "sync"] = flag(
        "frozen",
        "Batch norms of the backbone: 'frozen' as the start has them (Mask2Former's), or with the statistics of each "
        "process's images ('batch') or of all ('sync', GPUs only), as a backbone from scratch needs them.",
    )
    activation_checkpointing: bool = flag(False, "Less memory, more time: activations are made anew for the gradient.")
    mixed_precision: Literal["no", "bf16", "fp16"] = flag("no", "Autocast of the forward pass; fp16 on a GPU only.")

    crop_size: Side = flag(640, "Side of the square training crop, pixels (640 COCO-Stuff, 512 VOC).")
    short_edges: Some[Pixels] | None = flag(None, "Short edges to resize to; default: 0.5 to 2 times crop_size.")
    max_size: Pixels = flag(2560, "Longest edge after resizing, pixels, in training and at inference.")
    flip: bool = flag(True, "Mirror half of the images.")
    color_jitter: bool = flag(True, "SSD's colour jitter.")
    single_class_max_area: PositiveShare = flag(1.0, "Largest share of one class in a crop; 1 is no limit.")
    test_short_edge: Pixels = flag(640, "Short edge at inference, pixels; stored in the image processor.")

    num_workers: Workers = flag(4, "Data loading processes of each training process; 0 loads in the main one.")
    logging_steps: Count = flag(50, "Steps between lines of metrics.jsonl.")
    checkpointing_steps: Count = flag(5_000, "Steps between checkpoints.")
    checkpoints_kept: Count = flag(2, "Checkpoints kept; older ones are deleted.")
    trackers: list[str] = flag([], "Where metrics.jsonl goes too, by accelerate's names: tensorboard, wandb, ...")
    seed: Seed = flag(0, "Of weights, data order, augmentation and point sampling.")

    @property
    def setting(self) -> Setting:
        return {"none": "inductive", "masks": "supervised"}.get(self.unseen_labels, "transductive")

    def check(self) -> None:
        """What the parser cannot check."""
        check_required(self, "dataset", "output_dir")
        if self.caption_nouns is not None and self.unseen_labels != "none":
            raise InputError("--caption_nouns are names beside the seen ones: leave out --unseen_labels")
        if self.caption_nouns is not None and self.text_embeds is not None:
            raise InputError("--caption_nouns need a text tower for their names: give --clip, not --text_embeds")
        # AdamW divides the rate by 0.1 in its first step, or multiplies it with the decay.
        largest = self.learning_rate * max(1.0, self.backbone_multiplier) * max(10.0, self.weight_decay)
        if not largest <= torch.finfo(torch.float32).max:
            raise InputError(
                f"--learning_rate {self.learning_rate}, --weight_decay {self.weight_decay} and --backbone_multiplier "
                f"{self.backbone_multiplier} are together beyond float32: give smaller ones"
            )
        if self.init_from is None and self.clip is None and self.text_embeds is None:
            raise InputError(
                "a recipe of stage 2 wants --init_from, the final/ of stage 1; stage 1 takes its text from --clip (a "
                "checkpoint) or --text_embeds (a .npy)"
            )
        if self.init_from is None and self.init_parts != "all":
            raise InputError("--init_parts says what to take of --init_from, which is missing")
        if self.init_from is not None and (self.mask2former or self.backbone or self.clip):
            raise InputError("--init_from brings the whole model: leave out mask2former, backbone and clip")
        check_trackers(self.trackers)


def check_fields(overrides: dict) -> None:
    """Model fields of a wrong value are not the fault of the checkpoint that they would change."""
    try:
        Zs3Config(**overrides)
    except CHECKPOINT_ERRORS as error:
        raise refusal("the model's configuration", error) from error


def make_model(
    args: TrainArgs, overrides: dict, label_space: LabelSpace, text_embeds: Tensor | None
) -> Zs3ForSemanticSegmentation:
    """The model a run starts from: a whole checkpoint, or joined parts. Refuses one that saw unseen masks."""
    types = {"init_from": "zs3", "mask2former": "mask2former", "clip": "clip", "backbone": None}
    for name, model_type in types.items():
        if getattr(args, name) is not None:
            check_checkpoint(name, getattr(args, name), model_type)
    start = args.init_from or args.mask2former or args.backbone or args.clip or "random weights"
    try:
        if args.init_from is not None:
            model = load_whole(args.init_from, overrides)
        else:
            dim = {} if args.clip is not None or text_embeds is None else {"projection_dim": text_embeds.shape[1]}
            model = Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(
                args.mask2former, args.clip, backbone=args.backbone, **{**dim, **overrides}
            )
    except InputError:
        raise
    except CHECKPOINT_ERRORS as error:
        raise refusal(f"cannot make the model from {shown(start)}", error) from error
    check_finite(model, str(start))
    if args.init_parts == "backbone":
        model = keep_backbone(model)
    record_supervision(model, args, label_space)
    return model


def load_whole(path: str, overrides: dict) -> Zs3ForSemanticSegmentation:
    """A checkpoint of this project under changed fields. Every weight must be found, a background embedding aside."""
    config = Zs3Config(**{**load_config(path).to_dict(), **overrides})
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, loading = Zs3ForSemanticSegmentation.from_pretrained(path, config=config, dtype=torch.float32, **options)
    left_out = [name.replace("_config", "_model.") for name in TOWERS if getattr(config, name) is None]
    changed = {*loading["missing_keys"], *loading["unexpected_keys"], *(str(k[0]) for k in loading["mismatched_keys"])}
    lost = sorted(
        name for name in changed - {"background_embed"} if not any(name.startswith(tower) for tower in left_out)
    )
    if lost:
        raise InputError(f"{path} is of another architecture: {lost[0]} and {len(lost) - 1} other weights do not fit")
    return model


def keep_backbone(model: Zs3ForSemanticSegmentation) -> Zs3ForSemanticSegmentation:
    """A new model of random weights, but for the backbone and the frozen CLIP towers of this one."""
    new = Zs3ForSemanticSegmentation(model.config)
    kept = [(new.model.pixel_level_module.encoder, model.model.pixel_level_module.encoder)]
    kept += [(new.text_model, model.text_model), (new.vision_model, model.vision_model)]
    for mine, its in kept:
        if its is not None:
            mine.load_state_dict(its.state_dict())
    return new


def record_supervision(model: Zs3ForSemanticSegmentation, args: TrainArgs, label_space: LabelSpace) -> None:
    """Write into the checkpoint's config what all its training saw, so that no claim can be made beyond it.

    A Mask2Former from elsewhere saw masks nobody here knows of: its classes stay unknown (None).
    """
    leaked = trained_on(model.config, label_space.unseen)
    if leaked:
        raise InputError(
            f"{args.init_from} was trained on masks of {shortened(leaked)}, which are unseen here: take another start"
        )
    start = record_of(model.config) if args.init_from is not None else Record([], "none")
    told = {"none": "none", "masks": "none", "ground_truth": "ground_truth"}.get(args.unseen_labels, "pseudo")
    if args.caption_nouns is not None:
        listed = load_label_space(args.caption_nouns).class_names
        told = "captions" if any(among(listed, label_space.unseen)) else "none"
    now = Record(None, None) if args.mask2former is not None else Record(label_space.seen, told)
    model.config.seen_class_names, model.config.unseen_labels = joined([start, now])


def make_processor(
    args: TrainArgs, model: Zs3ForSemanticSegmentation, label_space: LabelSpace
) -> Zs3Processor | Zs3ImageProcessor:
    """What is saved beside the model. Without a text tower there is nothing to tokenize."""
    size = {"shortest_edge": args.test_short_edge, "longest_edge": args.max_size}
    image_processor = Zs3ImageProcessor(size=size, ignore_index=label_space.ignore_index)
    if model.text_model is None:
        return image_processor
    source = args.clip or args.init_from
    tokenizer = load_tokenizer(source, model.config.text_config)
    try:
        own = PROMPT_TEMPLATES if args.init_from is None else saved_templates(source)
        return Zs3Processor(image_processor, tokenizer, args.prompt_templates or own)
    except CHECKPOINT_ERRORS as error:
        raise refusal("--prompt_templates" if args.prompt_templates else shown(source), error) from error


def choose_what_learns(model: Zs3ForSemanticSegmentation, backbone_norm: str) -> None:
    """The backbone's batch norms as asked for; and what no loss depends on is frozen, since DDP would wait for it."""
    pixels = model.model.pixel_level_module
    if backbone_norm == "frozen":
        model.freeze_backbone_norms()
    elif backbone_norm == "sync":
        pixels.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(pixels.encoder)
    if hasattr(pixels.encoder, "swin"):
        pixels.encoder.swin.layernorm.requires_grad_(False)  # as a backbone, Swin gives its stages, not its last output


def straighten_gradients(model: nn.Module) -> None:
    """For DDP, which warns of gradients with other strides than their weights have.

    Those of 1 x 1 convolutions of channels-last maps differ in strides that no element is found by.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.weight.requires_grad:
            module.weight.register_hook(lambda grad: grad.flatten(1)[:, :, None, None])


def parameter_groups(model: nn.Module, args: TrainArgs) -> list[dict]:
    """Trainable parameters: the backbone learns slower, norms and embeddings do not decay (Mask2Former's rule)."""
    undecayed = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                in_backbone = module_name.startswith("model.pixel_level_module.encoder")
                groups.setdefault((in_backbone, isinstance(module, undecayed)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate * (args.backbone_multiplier if in_backbone else 1.0),
            "weight_decay": 0.0 if is_undecayed else args.weight_decay,
        }
        for (in_backbone, is_undecayed), parameters in groups.items()
    ]


def make_scheduler(optimizer: torch.optim.Optimizer, args: TrainArgs) -> torch.optim.lr_scheduler.LRScheduler:
    if args.lr_schedule == "poly":
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=args.max_steps, power=0.9)
    milestones = [step for step in args.lr_milestones if step < args.max_steps]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=milestones, gamma=0.1)


class StepMean:
    """The mean of a step's values over its micro-batches and over all processes."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.micro_batches: list[Tensor] = []

    def add(self, outputs: Zs3Output) -> None:
        values = [outputs.loss, *outputs.loss_terms.values(), outputs.same_label_rate]
        self.names = ["loss", *(f"loss_{name}" for name in outputs.loss_terms), "same_label_rate"]
        self.micro_batches.append(torch.stack([value.detach().float() for value in values]))

    def values(self) -> dict[str, float]:
        """All processes must ask together."""
        parts = self.accelerator.gather(torch.stack(self.micro_batches))  # (processes x micro-batches, values)
        mean = parts.nanmean(0)  # a micro-batch without masks has no same_label_rate; a NaN loss has stopped the run
        return dict(zip(self.names, mean.tolist(), strict=True))


def resolved_recipe(args: TrainArgs, config: Zs3Config) -> dict:
    """Every flag of the run, the model's included; it can be given to --config again."""
    saved = config.to_dict()
    names = [name for name in model_fields(Zs3Config) if name not in (*FILLED_IN, *TOWERS)]
    left_out = [name for name in TOWERS if saved[name] is None]
    return {**{name: saved[name] for name in [*names, *left_out]}, **asdict(args)}


def recipe_defaults() -> dict:
    """Of every flag of a recipe."""
    return {**Zs3Config().to_dict(), **asdict(TrainArgs())}


def make_dataset(
    args: TrainArgs,
    label_space: LabelSpace,
    image_processor: Zs3ImageProcessor,
    config: Zs3Config,
) -> SegmentationDataset:
    records = (stream_split if args.streaming else load_split)(args.dataset, args.split, label_space)
    image_ids = None if args.streaming else records.image_ids
    told = None
    if args.caption_nouns is not None:
        nouns = load_caption_nouns(args.caption_nouns, label_space)
        dropped_as = {"unknown": -1, "negative": 0}[args.dropped_words]
        told = CaptionLabels(nouns, image_ids, config.word_drop_probability, dropped_as)
    elif args.unseen_labels == "ground_truth":
        told = GroundTruthLabels(label_space)
    elif args.setting == "transductive":
        unknown_above = args.pseudo_label_unknown_above
        told = PseudoLabels(args.unseen_labels, label_space, image_ids, config.pseudo_label_threshold, unknown_above)
        if not args.streaming:
            check_scored_pictures(Path(args.unseen_labels), records)
    return SegmentationDataset(
        records,
        label_space,
        Augmentation(
            crop_size=args.crop_size,
            max_size=args.max_size,
            short_edges=args.short_edges,
            flip=args.flip,
            color_jitter=args.color_jitter,
            single_class_max_area=args.single_class_max_area,
        ),
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
        told=told,
        seed=args.seed,
    )


def make_loader(
    args: TrainArgs, dataset: SegmentationDataset, accelerator: Accelerator, parts: BatchParts, start_step: int
) -> Iterator[dict]:
    """The micro-batches of this process from start_step on; not prepared, since they are dealt out already."""
    place = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    options = {
        "pin_memory": accelerator.device.type == "cuda",
        "generator": torch.Generator(),  # its own: starting the loader must not move the state that a resume restores
        "worker_init_fn": outlive_first_sigterm,
    }
    if not args.streaming:
        sampler = StepSampler(
            len(dataset),
            args.batch_size,
            args.max_steps,
            start_step=start_step,
            micro_batches=parts.micro_batches,
            seed=args.seed,
            **place,
        )
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers, **options)
    batches = StreamedBatches(dataset, parts.images, args.shuffle_buffer, **place)
    loader = batches.loader(args.num_workers, start_step * parts.micro_batches, **options)
    return itertools.islice(loader, (args.max_steps - start_step) * parts.micro_batches)


def with_counts(batches: Iterator[dict], micro_batches: int, config: Zs3Config) -> Iterator[dict]:
    """The micro-batches, each with what the losses of its whole step divide by, if it is a part of one."""
    if micro_batches == 1:
        yield from batches
        return
    while step := list(itertools.islice(batches, micro_batches)):
        counts = [
            count_targets(mask_ids(batch["labels"]), batch["image_labels"], config.num_queries, config.matching)
            for batch in step
        ]
        for batch in step:
            yield {**batch, "target_counts": torch.stack(counts).mean(dim=0)}


def make_accelerator(args: TrainArgs) -> tuple[Accelerator, BatchParts]:
    """How the run is spread over processes and devices; what cannot be is refused before anything is loaded."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # what is refused below ends a process, which must not while another still joins
        if torch.distributed.get_world_size() != state.num_processes:
            raise InputError(
                f"{torch.distributed.get_world_size()} processes were started, and accelerate sees no GPU for them: on "
                "CPU cores set ACCELERATE_USE_CPU=true in the environment"
            )
    if args.mixed_precision == "fp16" and state.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU: on CPU cores give bf16 or no")
    if args.backbone_norm == "sync" and state.device.type != "cuda":
        raise InputError("--backbone_norm sync needs CUDA GPUs: give batch or frozen")
    parts = cut_batch(args.batch_size, state.num_processes, args.device_batch_size)
    check_norms(args.backbone_norm, args.crop_size, parts)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # As a plugin, which ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment does not replace.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=parts.micro_batches),
        log_with=args.trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(args.output_dir) / "trackers")),
    )
    kind = accelerator.distributed_type
    if kind in UNSUPPORTED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise InputError(
            f"training with {kind.value} is not supported: choose several GPUs in `accelerate config`, or give "
            "--config_file recipes/accelerate/fsdp2.yaml"
        )
    if accelerator.is_fsdp2:
        # Autocast decides about precision, as without FSDP, whose own policy would round text vectors and losses too.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return accelerator, parts


def go_on_after(saved_by: int, args: TrainArgs, accelerator: Accelerator, step: int) -> None:
    """Another number of processes than saved_by takes up a run: what of it is kept, in words."""
    here = accelerator.num_processes
    if args.streaming:
        raise InputError(
            f"a stream's shards are dealt out to processes, and this run was saved by {saved_by}: resume it with as "
            f"many, not {here}, or it would meet some pictures twice and miss others"
        )
    # Neither the other processes' random numbers nor those of the run's beginning again.
    set_seed((args.seed + 1 + accelerator.process_index + here * step) % 2**32)
    accelerator.print(
        f"note      saved by {saved_by} processes, resumed by {here}: each step's images and their augmentation stay; "
        "the sampled points and the images that batch norm averages over do not"
    )


def whole_model(accelerator: Accelerator, model: nn.Module) -> Zs3ForSemanticSegmentation:
    """The trained model, for the main process to save. All must ask together: FSDP's parts are gathered."""
    trained = accelerator.unwrap_model(model)
    if not accelerator.is_fsdp2:
        return trained
    weights = accelerator.get_state_dict(model)
    whole = Zs3ForSemanticSegmentation(trained.config)  # FSDP made another class of the old one
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    return whole


def text_vectors(
    args: TrainArgs,
    model: Zs3ForSemanticSegmentation,
    processor: Zs3Processor | Zs3ImageProcessor,
    class_names: list[str],
    given: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """(C, D), those of --text_embeds (given) or of the model's text tower; and the tokens that the tower was given."""
    prompts = None
    if given is not None:
        if model.text_model is not None:
            source = args.init_from or args.clip
            raise InputError(f"{source} has a text tower: leave out --text_embeds, or add --text_config null")
        embeds = given
    else:
        if model.text_model is None:
            raise InputError(f"{args.init_from} has no text tower: give --text_embeds")
        with in_one_line(f"names of {args.label_space or args.dataset}"):
            prompts = processor(class_names=class_names)
            embeds = model.encode_text(**prompts)
    if embeds.shape[1] != model.config.projection_dim:
        own = model.config.projection_dim
        raise InputError(
            f"{args.text_embeds} has {embeds.shape[1]} columns, the model {own}: give vectors of its encoder"
        )
    return embeds, prompts


def claim_folder(
    args: TrainArgs,
    whole_space: LabelSpace,
    label_space: LabelSpace,
    dataset: SegmentationDataset,
    prompts: dict[str, Tensor] | None,
    model: Zs3ForSemanticSegmentation,
) -> tuple[ExitStack, dict]:
    """Makes the output folder this run's, with its recipe and stamp, or refuses. The open lock, and the stamp.

    whole_space: the label space as the data has it; label_space: as the training knows it.
    """
    output_dir = Path(args.output_dir)
    if not has_begun(output_dir):
        check_learnable(dataset.records, label_space)
    with lock_folder(output_dir) as lock:
        check_places(output_dir)
        check_final(output_dir / "final")
        start = None if args.init_from is None else record_of(load_config(args.init_from))
        stamp = make_stamp(vars(args), whole_space, dataset.records, prompts, start, model)
        stamp = check_stamp(output_dir, stamp, vars(args), label_space.unseen)
        check_recipe(output_dir / "recipe.yaml", resolved_recipe(args, model.config), recipe_defaults())
        write_json(output_dir / STAMP, stamp)
        return lock.pop_all(), stamp


def train(args: TrainArgs, overrides: dict) -> None:
    args.check()
    for name in FILLED_IN:
        if name in overrides:
            raise InputError(f"{name} is written by the training itself: leave it out")
    check_fields(overrides)
    output_dir = Path(args.output_dir)
    whole_space = load_label_space(args.label_space or args.dataset)
    label_space = training_space(whole_space, args.setting)
    accelerator, parts = make_accelerator(args)
    set_seed(args.seed)

    # Text vectors, model, data; nothing is written before they are known to be good
    all_embeds = None
    if args.text_embeds is not None:
        all_embeds = load_text_embeds(args.text_embeds, len(label_space.class_names))
    with accelerator.local_main_process_first():
        model = make_model(args, overrides, label_space, all_embeds).to(accelerator.device)
        processor = make_processor(args, model, label_space)
    choose_what_learns(model, args.backbone_norm)
    all_embeds, prompts = text_vectors(args, model, processor, label_space.class_names, all_embeds)
    model.set_vocabulary(label_space.class_names, all_embeds)
    image_processor = getattr(processor, "image_processor", processor)
    with accelerator.local_main_process_first():  # datasets caches what it prepares
        dataset = make_dataset(args, label_space, image_processor, model.config)
    if args.caption_nouns is None:
        text_embeds = all_embeds[[label_space.class_names.index(name) for name in dataset.class_names]]
    else:
        with in_one_line(f"names of {args.caption_nouns}"):
            text_embeds = model.encode_text(**processor(class_names=dataset.class_names))
    text_embeds = text_embeds.to(accelerator.device)
    lock, stamps = None, [None]
    with all_refuse(accelerator):
        if accelerator.is_main_process:
            lock, stamps[0] = claim_folder(args, whole_space, label_space, dataset, prompts, model)
    (stamp,) = broadcast_object_list(stamps)
    model.config.seen_class_names, model.config.unseen_labels = record_in(stamp)
    if (output_dir / "final").exists():
        accelerator.print(f"{output_dir / 'final'} is there already: nothing to do")
        accelerator.end_training()
        return
    accelerator.print(describe(args, label_space, dataset, model, parts, accelerator))

    # Optimizer, schedule, state
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.learning_rate)
    scheduler = make_scheduler(optimizer, args)
    if args.activation_checkpointing:
        # Called gradient_checkpointing_enable in the oldest transformers supported.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    progress = Progress()
    folder = output_dir / "checkpoints"
    checkpoints = Checkpoints(accelerator, folder, model, scheduler, progress, kept=args.checkpoints_kept, stamp=stamp)
    if accelerator.is_fsdp2:
        model.get_input_embeddings = lambda: None  # accelerate would shard them apart, and stop without a text tower
    elif accelerator.num_processes > 1:
        straighten_gradients(model)
    config = model.config  # no longer to be had when the model is wrapped
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    set_seed((args.seed + 1 + accelerator.process_index) % 2**32)  # point sampling differs between processes
    saved_by = checkpoints.resume()
    if saved_by is not None:
        accelerator.print(f"resumed   at step {progress.step}")
        if saved_by != accelerator.num_processes:
            go_on_after(saved_by, args, accelerator, progress.step)
    elif (output_dir / "metrics.jsonl").exists():
        accelerator.print(f"note      no checkpoint in {folder} yet: from the beginning")
    loader = make_loader(args, dataset, accelerator, parts, progress.step)
    log = MetricsLog(output_dir / "metrics.jsonl", progress.step) if accelerator.is_main_process else None
    # tensorboard drops what a killed run wrote after its last checkpoint.
    accelerator.init_trackers("zs3", init_kwargs={"tensorboard": {"purge_step": progress.step + 1}})

    # Loop
    quiet = not accelerator.is_local_main_process
    pace, seconds_before = Pace(accelerator), progress.seconds
    mean = StepMean(accelerator)
    bar = tqdm(total=args.max_steps, initial=progress.step, unit="step", mininterval=1, disable=quiet)
    step_ids, fault = [], None
    with Termination() as termination, bar:
        for batch in with_counts(pace.timed(loader), parts.micro_batches, config):
            image_ids = batch.pop("image_ids")
            step_ids += image_ids
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    outputs = model(**batch, text_embeds=text_embeds, return_dict=True)
                if not torch.isfinite(outputs.loss):
                    loss = float(outputs.loss.detach())
                    fault = f"the loss is {loss} at step {progress.step}, images {shortened(image_ids)}: stopped"
                mean.add(outputs)
                accelerator.backward(outputs.loss)
                if accelerator.sync_gradients:
                    terminated = agree(accelerator, termination.received, fault)
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm))
                    if accelerator.scaler is None and not math.isfinite(grad_norm):  # fp16's scaler skips such a step
                        step_ids = gather_object(step_ids)
                        raise InputError(
                            f"the gradients' norm is {grad_norm} at step {progress.step} although the loss is finite, "
                            f"images {shortened(step_ids)}: stopped"
                        )
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            learning_rate = max(scheduler.get_last_lr())  # the backbone's is smaller
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflow
                scheduler.step()
            progress.step += 1
            progress.seconds = seconds_before + pace.seconds
            bar.update()
            forecast = pace.forecast(progress.step, args.max_steps)
            if forecast and accelerator.is_main_process:
                bar.write(forecast)
            if progress.step % args.logging_steps == 0 or progress.step == args.max_steps:
                values = mean.values() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
                values |= {"data_wait": round(pace.data_wait(), 4)}
                bar.set_postfix(loss=f"{values['loss']:.2f}", same=f"{values['same_label_rate']:.2f}")
                if log is not None:
                    log.write(progress, values)
                accelerator.log(values, step=progress.step)
            mean = StepMean(accelerator)
            step_ids = []
            if terminated or progress.step % args.checkpointing_steps == 0 or progress.step == args.max_steps:
                checkpoints.save()
            if terminated:
                break

    # Save
    complete = progress.step == args.max_steps
    accelerator.wait_for_everyone()
    trained = whole_model(accelerator, model) if complete else None
    if complete and accelerator.is_main_process:
        results = {
            "images_per_second": round(progress.step * args.batch_size / max(progress.seconds, 1e-9), 2),
            "num_processes": accelerator.num_processes,
            "setting": args.setting,
            "unseen_labels": args.unseen_labels,
            **log.last,
        }
        write_json(output_dir / "all_results.json", results)
        save_final(trained, processor, output_dir / "final")  # last: where it is, the run is complete
    if complete:
        sittings = "" if saved_by is None else ", all sittings together"
        accelerator.print(f"trained in {progress.seconds:.0f} s{sittings}; the model is in {output_dir / 'final'}")
    else:
        accelerator.print(f"SIGTERM: stopped after step {progress.step}, which is saved; the same command goes on")
    # The model goes before its process group: the other way round, freeing DDP's reducer can wait for ever for a
    # thread of gloo that waits for Python's lock.
    del model, optimizer, trained
    accelerator.free_memory()
    accelerator.end_training()
    if lock is not None:
        lock.close()
    if not complete:
        sys.exit(EXIT_CODE)


def main() -> None:
    train(*read_arguments(TrainArgs, config_class=Zs3Config))


if __name__ == "__main__":
    run(main)
