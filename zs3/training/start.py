"""What a run starts from: model, processor and text vectors, and the output folder that becomes its own."""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from configuration_zs3 import Zs3Config, among, shortened
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor, Zs3Processor, saved_templates
from text_zs3 import PROMPT_TEMPLATES
from zs3.checkpoints import (
    CHECKPOINT_ERRORS,
    check_checkpoint,
    check_finite,
    load_config,
    load_tokenizer,
    refusal,
    trained_on,
)
from zs3.command_line import InputError, in_one_line, shown
from zs3.data.samples import SegmentationDataset
from zs3.files import lock_folder, write_json
from zs3.label_space import LabelSpace, load_label_space
from zs3.training.arguments import TOWERS, TrainArgs, recipe_defaults, resolved_recipe
from zs3.training.folder import check_final, check_places, check_recipe, check_stamp, has_begun
from zs3.training.plan import check_learnable
from zs3.training.stamp import STAMP, Record, joined, make_stamp, record_of


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
