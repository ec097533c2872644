"""What a run starts from: label space, model, processor, dataset and text vectors."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configuration_zs3 import UnseenLabels, Zs3Config, among, shared, shortened
from encoders_zs3 import FAMILIES, family_of
from modeling_zs3 import Zs3ForSemanticSegmentation
from processing_zs3 import Zs3ImageProcessor, Zs3Processor
from text_zs3 import embed_labels, read_labels
from zs3.checkpoints import check_checkpoint, check_finite, load_config, load_texts, refusing
from zs3.command_line import InputError, in_one_line, shown
from zs3.data.image_labels import training_space
from zs3.data.samples import SegmentationDataset
from zs3.label_space import LabelSpace, load_label_space, load_text_embeds
from zs3.training.arguments import TOWERS, TrainArgs
from zs3.training.loader import make_dataset
from zs3.training.stamp import SeenRecord, joined, record_of

# Flags of checkpoints to start from, with the types of model that each may be; None: any backbone.
SOURCES = {"init_from": ("zs3",), "proposals": ("mask2former",), "backbone": None, "encoder": tuple(FAMILIES)}


@dataclass
class Start:
    """All that a run starts from, loaded and checked."""

    whole_space: LabelSpace  # of the dataset
    label_space: LabelSpace  # of the training, see `training_space`
    model: Zs3ForSemanticSegmentation
    processor: Zs3Processor | Zs3ImageProcessor
    dataset: SegmentationDataset
    text_embeds: Tensor  # (C, D), of the names on the class axis
    prompts: dict[str, Tensor] | None  # tokens for the text tower; None: --text_embeds gives the vectors


def make_start(args: TrainArgs, overrides: dict, accelerator: Accelerator) -> Start:
    """Loads and checks all that a run needs. It writes nothing.

    overrides: fields of Zs3Config.
    """
    whole_space = load_label_space(args.label_space or args.dataset)
    space = training_space(whole_space, args.supervision)
    given = None if args.text_embeds is None else load_text_embeds(args.text_embeds, len(space.class_names))
    size = {"shortest_edge": args.test_short_edge, "longest_edge": args.max_size}
    image_processor = Zs3ImageProcessor(size=size, ignore_index=space.ignore_index)

    with accelerator.local_main_process_first():
        sources = {name: getattr(args, name) for name in SOURCES if getattr(args, name) is not None}
        model = make_model(sources, overrides, None if given is None else given.shape[1])
        if args.init_parts == "backbone":
            model = keep_backbone(model)
        labels = kind_of_labels(args.unseen_labels, args.caption_nouns, space.unseen)
        record_supervision(model.config, space, labels, args.init_from, args.proposals)
        model = model.to(accelerator.device)
        processor = make_processor(model, image_processor, args.encoder, args.init_from, args.prompt_templates)
    choose_what_learns(model, args.backbone_norm)
    embeds, prompts = text_vectors(args, model, processor, space.class_names, given)
    model.set_vocabulary(space.class_names, embeds)

    with accelerator.local_main_process_first():  # datasets caches what it prepares
        dataset = make_dataset(args, space, image_processor, model.config)
    if args.caption_nouns is None:
        embeds = embeds[[space.class_names.index(name) for name in dataset.class_names]]
    else:
        with in_one_line(f"names of {args.caption_nouns}"):
            labels = read_labels(dataset.class_names, processor.prompt_templates)
            embeds = embed_labels(labels, model, processor)
    return Start(whole_space, space, model, processor, dataset, embeds.to(accelerator.device), prompts)


def make_model(sources: dict[str, str], overrides: dict, text_dim: int | None) -> Zs3ForSemanticSegmentation:
    """A whole checkpoint (init_from), or a model joined from parts.

    sources: the path for each flag of SOURCES that is given. text_dim: columns of --text_embeds, or None.
    """
    for name, path in sources.items():
        check_checkpoint(name, path, SOURCES[name])
    source = next(iter(sources.values()), "random weights")
    with refusing(f"cannot make the model from {shown(source)}"):
        if "init_from" in sources:
            model = load_whole(source, overrides)
        else:
            dim = {} if "encoder" in sources or text_dim is None else {"projection_dim": text_dim}
            parts = [sources.get(name) for name in ("proposals", "encoder")]
            fields = {"backbone": sources.get("backbone"), **dim, **overrides}
            model = Zs3ForSemanticSegmentation.from_mask2former_clip_pretrained(*parts, **fields)
    check_finite(model, str(source))
    return model


def load_whole(path: str, overrides: dict) -> Zs3ForSemanticSegmentation:
    """A checkpoint of this project with changed fields. All weights must fit, but for a background embedding.

    What names without training, of `zs3 assemble`, is left out: training needs a learned head, and its queries change.
    """
    learned = {"class_head": "learned", "objectness": False, "proposal_classes": 0}
    learned |= {name: getattr(Zs3Config(), name) for name in ("pixel_mean", "pixel_std")}  # of the run's pictures
    config = Zs3Config(**{**load_config(path).to_dict(), **learned, **overrides})
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, loading = Zs3ForSemanticSegmentation.from_pretrained(path, config=config, dtype=torch.float32, **options)
    left_out = (name.replace("_config", "_model.") for name in TOWERS if getattr(config, name) is None)
    changed = {*loading["missing_keys"], *loading["unexpected_keys"], *(str(k[0]) for k in loading["mismatched_keys"])}
    may_change = ("background_embed", "class_predictor.", *left_out)
    lost = sorted(name for name in changed if not name.startswith(may_change))
    if lost:
        raise InputError(f"{path} is of another architecture: {lost[0]} and {len(lost) - 1} other weights do not fit")
    return model


def keep_backbone(model: Zs3ForSemanticSegmentation) -> Zs3ForSemanticSegmentation:
    """A model of random weights with the backbone and the frozen encoder of this one."""
    new = Zs3ForSemanticSegmentation(model.config)
    kept = [(new.model.pixel_level_module.encoder, model.model.pixel_level_module.encoder)]
    kept += [(new.text_model, model.text_model), (new.vision_model, model.vision_model)]
    for mine, its in kept:
        if its is not None:
            mine.load_state_dict(its.state_dict())
    return new


def kind_of_labels(unseen_labels: str, caption_nouns: str | None, unseen: list[str]) -> UnseenLabels:
    """The kind of image labels of unseen classes. unseen_labels, caption_nouns: fields of TrainArgs."""
    if caption_nouns is not None:
        listed = load_label_space(caption_nouns).class_names
        return "captions" if any(among(listed, unseen)) else "none"
    return {"none": "none", "masks": "none", "ground_truth": "ground_truth"}.get(unseen_labels, "pseudo")


def record_supervision(
    config: Zs3Config,
    label_space: LabelSpace,
    unseen_labels: UnseenLabels,
    init_from: str | None = None,
    proposals: str | None = None,
) -> None:
    """Writes the seen classes and the image labels of all training of the model into its config: its head is trained.

    Refuses a start that has seen masks of unseen classes. If this training has image labels of unseen classes, their
    precision and recall are unknown until it ends.
    """
    leaked = shared(label_space.unseen, config.seen_class_names)
    if leaked:
        raise InputError(
            f"{init_from} was trained on masks of {shortened(leaked)}, which are unseen here: take another start"
        )
    before = record_of(config) if init_from is not None else SeenRecord([], "none")
    if proposals is not None:  # the masks of its training are unknown
        before = SeenRecord(None, None)
    now = SeenRecord(label_space.seen, unseen_labels)
    config.seen_class_names, config.unseen_labels = joined([before, now])
    config.head_is_trained = True  # when the run has ended; before that it saves no model
    if unseen_labels != "none":
        config.image_label_precision = config.image_label_recall = None


def make_processor(
    model: Zs3ForSemanticSegmentation,
    image_processor: Zs3ImageProcessor,
    encoder: str | None,
    init_from: str | None,
    prompt_templates: list[str] | None,
) -> Zs3Processor | Zs3ImageProcessor:
    """The processor that is saved with the model. It reads texts too if the model has a text tower."""
    if model.text_model is None:
        return image_processor
    source, config = encoder or init_from, model.config.text_config
    tokenizer, own = load_texts(source, config, family_of(config).templates if init_from is None else None)
    with refusing("--prompt_templates" if prompt_templates else shown(source)):
        return Zs3Processor(image_processor, tokenizer, prompt_templates or own)


def choose_what_learns(model: Zs3ForSemanticSegmentation, backbone_norm: str) -> None:
    """Sets up the backbone's batch norms. Freezes weights without a gradient, because DDP would wait for one."""
    pixels = model.model.pixel_level_module
    if backbone_norm == "frozen":
        model.freeze_backbone_norms()
    elif backbone_norm == "sync":
        pixels.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(pixels.encoder)
    if hasattr(pixels.encoder, "swin"):
        pixels.encoder.swin.layernorm.requires_grad_(False)  # only the stages of a Swin backbone are used


def text_vectors(
    args: TrainArgs,
    model: Zs3ForSemanticSegmentation,
    processor: Zs3Processor | Zs3ImageProcessor,
    class_names: list[str],
    given: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """(C, D) text vectors: `given` by --text_embeds, or of the text tower; and the tokens for the tower, or None."""
    prompts = None
    if given is not None:
        if model.text_model is not None:
            source = args.init_from or args.encoder
            raise InputError(f"{source} has a text tower: leave out --text_embeds, or add --text_config null")
        embeds = given
    else:
        if model.text_model is None:
            raise InputError(f"{args.init_from} has no text tower: give --text_embeds")
        with in_one_line(f"names of {args.label_space or args.dataset}"):
            labels = read_labels(class_names, processor.prompt_templates)
            embeds, prompts = embed_labels(labels, model, processor), processor.tokenize(labels)
    if embeds.shape[1] != model.config.projection_dim:
        own = model.config.projection_dim
        raise InputError(
            f"{args.text_embeds} has {embeds.shape[1]} columns, the model {own}: give vectors of its encoder"
        )
    return embeds, prompts
