"""Pseudo labels (section 3.4): which unseen classes CLIP finds in the pictures of a split.

    accelerate launch -m zs3.pseudo_labels --model runs/stage1/final --dataset DIR --output runs/pseudo_labels
    accelerate launch train.py ... --init_from runs/stage1/final --unseen_labels runs/pseudo_labels

The stage-1 model proposes masks. Its image tower scores the box around each proposal that lies on unannotated
pixels (Eq. 9). An image's score of a name is that of the best proposal (Eq. 10), or 0 without one. A pixel is
unannotated if it belongs to no seen class: in training, ignored pixels and pixels of unseen classes are the same.

The output folder gets `settings.json`, everything that determines the scores; shards of --shard_size images,
`scores-00003-of-00047.parquet`, with columns image_id and scores; and `summary.json`. A threshold is applied when the
scores are read (`zs3.data.image_labels`), so another threshold needs no new run. A shard is always made in the same
batches, so the number of processes changes no byte. A restart makes the missing shards only.

Leak rule: scores use pictures and the pixels of seen classes. Only `unseen_truth`, for the summary, reads the pixels of
unseen classes.

Axes: B image of a batch, N image, Q query, U unseen name, C name in the softmax, D embedding, H W input size, h w
mask size.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from clip_views_zs3 import CROPS_AT_ONCE, proposal_masks
from configuration_zs3 import Number, RegionView, shortened
from files_zs3 import is_leftover
from outputs_zs3 import label_similarity
from processing_zs3 import Zs3ImageProcessor, resize_nearest
from zs3.checkpoints import (
    check_no_unseen_masks,
    class_vectors,
    load_checkpoint,
    local_folder,
)
from zs3.command_line import (
    Arguments,
    Batch,
    Count,
    InputError,
    OutputFolder,
    Share,
    Workers,
    check_required,
    flag,
    in_one_line,
    read_arguments,
    refuse_together,
    run,
    shown,
)
from zs3.data.augmentation import IGNORED
from zs3.data.image_labels import (
    SETTINGS_KEY,
    count_labels,
    load_unseen_scores,
    pseudo_label_settings,
    pseudo_labels,
    settings_digest,
    shard_digest,
    shard_name,
)
from zs3.data.records import Split, dataset_name, load_split
from zs3.data.samples import mask_positions, to_mask_labels
from zs3.files import file_sha256, lock_folder, write_json, writing
from zs3.label_space import LabelSpace, load_label_space
from zs3.scorers import Scorer, load_scorer, own_scorer
from zs3.scores.means import average_precision, nanmean
from zs3.tables import percent
from zs3.training.stopping import all_refuse

THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99, 0.999)  # in the summary, besides the model's own
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class PseudoLabelArgs(Arguments):
    """Pseudo labels of one split, from the proposals of a stage-1 model."""

    model: str | None = flag(None, "Stage-1 checkpoint with an image tower: a folder or a Hub id.")
    trust_remote_code: bool = flag(False, "Run the code that lies beside the checkpoint, in place of this project's.")
    dataset: str | None = flag(None, "Folder or Hub id of the data.")
    output: OutputFolder | None = flag(None, "Folder for the scores; the same command resumes a stopped run.")
    split: str = flag("train", "Split of the dataset to make pseudo labels for.")
    label_space: str | None = flag(None, "Benchmark, its split (scenes:3) or classes.json; default: the dataset's own.")
    text_embeds: str | None = flag(None, "Text vectors for a checkpoint without text tower: a .npy, one row per class.")
    max_images: Count | None = flag(None, "Score the first N images only.")

    encoder: str | None = flag(None, "CLIP or TIPSv2 that scores the proposals; default: the checkpoint's own towers.")
    region_view: RegionView = flag("crops", "What the image tower sees: crops, one pass, or crops of the largest.")
    seen_names: bool = flag(False, "Seen names compete with unseen names in the softmax of Eq. 9.")
    unannotated_share: Share = flag(
        0.5,
        "Use only proposals with at least this share of unannotated pixels, which are those outside seen classes; 0: "
        "all proposals of all images.",
    )
    fill: Literal["none", "mean"] = flag("none", "What CLIP sees outside a mask: the picture, or CLIP's mean colour.")
    mask_threshold: Annotated[float, Number(float, 0, 1, below=True)] = flag(
        0.5, "A pixel is in a proposal if its mask probability is above this."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = flag("no", "Autocast type of the image tower.")

    batch_size: Batch = flag(8, "Images in a batch.")
    shard_size: Count = flag(256, "Images in a shard.")
    num_workers: Workers = flag(0, "Data loading processes of each process; 0 loads in the process itself.")
    measure: bool = flag(True, "Measure the labels against the unseen classes in the label maps, if there are any.")

    def check(self) -> None:
        check_required(self, "model", "dataset", "output")
        refuse_together(self, "encoder", "text_embeds", why="the encoder has a text tower")


# ---- scores ------------------------------------------------------------------------------------------------


def unseen_scores(proposal_embeds: Tensor, text_embeds: Tensor, logit_scale: float = 100.0) -> Tensor:
    """Scores of the unseen names for one image (Eq. 9, 10): (U,) in [0, 1]; 0 without proposals.

    proposal_embeds: (Q, D), CLIP embeddings of the proposals. text_embeds: (U, D).
    Reading: cosines are multiplied by CLIP's logit scale. Without it, the better of two names gets at most 0.88.
    """
    if len(proposal_embeds) == 0:
        return text_embeds.new_zeros(len(text_embeds), dtype=torch.float32)
    probs = (logit_scale * label_similarity(proposal_embeds, text_embeds)).softmax(dim=-1)  # Eq. 9
    return probs.amax(dim=0)  # Eq. 10


def usable_proposals(mask_logits: Tensor, annotated: Tensor, mask_threshold: float, share: float) -> Tensor:
    """(Q,) bool: the proposals that are not empty and have at least `share` of their pixels outside `annotated`.

    mask_logits: (Q, h, w). annotated: (H, W) bool, pixels of seen classes, at the model's input size without padding.
    """
    usable = []
    for part in mask_logits.split(CROPS_AT_ONCE):  # all masks at the input size would need much memory
        masks = proposal_masks(part, tuple(annotated.shape), mask_threshold)
        area = masks.flatten(1).sum(1)
        usable.append((area > 0) & ((masks & ~annotated).flatten(1).sum(1) >= share * area))
    return torch.cat(usable)


class Inputs(NamedTuple):
    """A batch: the model's input, and `annotated`, B tensors (H, W) bool for `usable_proposals`."""

    pixel_values: Tensor
    pixel_mask: Tensor
    annotated: list[Tensor]

    def only(self, rows: list[int]) -> "Inputs":
        return Inputs(self.pixel_values[rows], self.pixel_mask[rows], [self.annotated[row] for row in rows])


class ScoredImages(Dataset):
    """Of each image: the picture, and the pixels of seen classes, (H, W) bool."""

    def __init__(self, records: Split, label_space: LabelSpace):
        self.records = records
        self.positions = mask_positions(label_space, label_space.seen)
        self.ignore_index = label_space.ignore_index

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, label, _ = self.records[index]
        return image, to_mask_labels(label, self.positions, self.ignore_index) != IGNORED


def collate(image_processor: Zs3ImageProcessor, samples: list[tuple[Image.Image, np.ndarray]]) -> Inputs:
    images, annotated = zip(*samples, strict=True)
    inputs = image_processor(images=list(images))
    sizes = [(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in inputs["pixel_mask"]]
    annotated = [torch.from_numpy(resize_nearest(a, size)) for a, size in zip(annotated, sizes, strict=True)]
    return Inputs(inputs["pixel_values"], inputs["pixel_mask"], annotated)


def score_batch(
    batch: Inputs,
    model: PreTrainedModel,
    image_processor: Zs3ImageProcessor,
    scorer: Scorer,
    unannotated_share: float,
    fill: str,
    mask_threshold: float,
    mixed_precision: str,
    region_view: str,
) -> Tensor:
    """(B, C) scores. The last arguments are the flags of the same names."""
    text_embeds = scorer.text_embeds
    scores = torch.zeros(len(batch.annotated), len(text_embeds), device=model.device)
    if unannotated_share > 0:  # a fully annotated image has no usable proposal, so its scores stay 0
        rows = [row for row, annotated in enumerate(batch.annotated) if not annotated.all()]
    else:
        rows = list(range(len(scores)))
    if not rows:
        return scores
    batch = batch.only(rows)
    pixel_values = batch.pixel_values.to(model.device)
    proposals = model.propose(pixel_values, batch.pixel_mask.to(model.device))
    usable = None
    if unannotated_share > 0:
        pairs = zip(proposals["mask_logits"], batch.annotated, strict=True)
        options = (mask_threshold, unannotated_share)
        usable = torch.stack([usable_proposals(logits, a.to(model.device), *options) for logits, a in pairs])  # (B, Q)
    images, dtype = image_processor.to_rgb(pixel_values), DTYPES[mixed_precision]
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        views = scorer.embed(
            images,
            proposals["mask_logits"],
            proposals["valid_sizes"],
            view=region_view,
            fill=None if fill == "none" else fill,
            mask_threshold=mask_threshold,
            chosen=usable,
        )
    pairs, scale = zip(views.embeds, views.shown, strict=True), scorer.logit_scale
    scores[rows] = torch.stack([unseen_scores(embeds[shown], text_embeds, scale) for embeds, shown in pairs])
    return scores


def in_parts(indices: range, size: int) -> list[range]:
    """Parts of `size` indices, in order; the last part may be shorter."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def write_shard(path: Path, image_ids: list[str], scores: np.ndarray, unseen: list[str], settings: bytes) -> None:
    """scores: (N, U) float32. settings: the digest of the settings that made them."""
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array(np.ascontiguousarray(column)) for column in scores.T]
    table = pyarrow.table({"image_id": image_ids, "scores": pyarrow.StructArray.from_arrays(columns, names=unseen)})
    table = table.replace_schema_metadata({SETTINGS_KEY: settings})
    with writing(path) as partial:
        pyarrow.parquet.write_table(table, partial)


# ---- what decides the scores -------------------------------------------------------------------------------


def check_source(config: PreTrainedConfig, label_space: LabelSpace, encoder: str | None) -> None:
    """Refuses a model that learned from unseen classes, or that has no image tower while no encoder is given."""
    if not label_space.unseen:
        raise InputError("the label space has no unseen class: there is nothing to make pseudo labels for")
    check_no_unseen_masks(config, label_space, "pseudo labels can come from it, take the stage-1 model")
    if config.unseen_labels == "ground_truth":
        raise InputError(
            "the checkpoint learned from ground-truth image labels of unseen classes: take the stage-1 model for "
            "pseudo labels"
        )
    if config.vision_config is None and encoder is None:
        raise InputError("the checkpoint has no image tower to score proposals: give --encoder")


def resolved_settings(
    args: PseudoLabelArgs,
    model: PreTrainedModel,
    label_space: LabelSpace,
    records: Split,
    image_ids: list[str],
    prompts: list[str],
    scorer: Scorer,
) -> dict:
    """Everything that determines the scores, for settings.json.

    Pictures are recorded by id and, in a folder, by file size: reading all files takes too long.
    """
    # Flags of later versions: with their defaults they are left out, so that older unfinished folders can be resumed.
    later = {name: getattr(args, name) for name in ("trust_remote_code", "region_view")}
    later = {name: value for name, value in later.items() if value != getattr(PseudoLabelArgs, name)}
    if args.encoder is not None:
        folder = local_folder(args.encoder)
        later["encoder"] = args.encoder if folder is None else checkpoint_sha256(str(folder))
        later["patch_tokens"] = scorer.patch_tokens
    return later | {
        "checkpoint_sha256": checkpoint_sha256(args.model),
        "checkpoint_commit": getattr(model.config, "_commit_hash", None),
        "dataset": dataset_name(args.dataset),
        "split": args.split,
        "num_images": len(image_ids),
        "image_ids_sha256": sha256("\n".join(image_ids).encode()),
        "picture_sizes_sha256": records.picture_sizes_sha256(len(image_ids)),
        "label_space_sha256": label_space.sha256,
        "unseen": label_space.unseen,
        "prompts": prompts,
        "text_embeds_sha256": sha256(scorer.text_embeds.cpu().numpy().tobytes()),
        "logit_scale": scorer.logit_scale,
        "seen_names": args.seen_names,
        **crop_flags(args),
        # Version 0.1.0 had flags for these two. They stay, so that its unfinished folders can be resumed.
        "expansion": 1.0,
        "num_threads": 1,
        "batch_size": args.batch_size,
        "shard_size": args.shard_size,
        "device": device_name(model.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow", "pyarrow")},
    }


def crop_flags(args: PseudoLabelArgs) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("unannotated_share", "fill", "mask_threshold", "mixed_precision")}


def device_name(device: torch.device) -> str:
    """The kind of device. Its kernels determine the last digits of a score."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def checkpoint_sha256(path: str) -> dict[str, str]:
    """Digests of the files that determine the outputs of a local checkpoint. A Hub checkpoint has its commit."""
    files = sorted(file for kind in ("*.safetensors", "*.json", "*.py") for file in Path(path).glob(kind))
    return {file.name: file_sha256(file) for file in files if not is_leftover(file.name)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_settings(folder: Path, settings: dict) -> None:
    """Refuses a folder with shards of other settings. Otherwise writes settings.json.

    Each shard holds the digest of its settings. If all shards have the right digest, settings.json may be missing or
    damaged.
    """
    path, known = folder / "settings.json", settings_digest(settings)
    shards = {shard: shard_digest(shard) for shard in sorted(folder.glob("scores-*.parquet"))}
    all_bound = {*shards.values()} == {known}
    if shards and not path.exists() and not all_bound:
        raise InputError(f"{folder} holds shards without settings.json: choose another --output or delete it")
    if shards and path.exists():
        try:
            before = pseudo_label_settings(folder)
        except InputError as error:
            if not all_bound:
                raise
            print(f"warning: {error}; all shards have the settings of this command, so settings.json is written again")
            before = settings
        changed = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
        if changed:
            raise InputError(
                f"{folder} holds shards made with another {', '.join(changed)}: choose another --output or delete it"
            )
    strangers = [shard for shard, bound in shards.items() if bound not in (None, known)]
    if strangers:
        raise InputError(f"{shown(strangers[0])} was made with other settings: delete it, and start again")
    write_json(path, settings)


# ---- the summary -------------------------------------------------------------------------------------------


def unseen_truth(records: Split, label_space: LabelSpace, count: int) -> np.ndarray | None:
    """(N, U) bool: the unseen classes in the label maps of the first `count` images, for the summary.

    None if these maps hold no unseen class.
    """
    ids = [label_space.class_names.index(name) for name in label_space.unseen]
    truth = np.zeros((count, len(ids)), dtype=bool)
    for index in tqdm(range(count), desc="truth", unit="image", mininterval=1):
        label = records.label(index)
        label = label[label != label_space.ignore_index]
        truth[index] = np.bincount(label, minlength=len(label_space.class_names))[ids] > 0
    return truth if truth.any() else None


def precision_and_recall(labels: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, list[float] | float]]:
    """Image-level precision and recall: of each name, over all names (micro), and the mean over names (macro).

    labels, truth: (N, U) bool. A precision without labels and a recall without truth are NaN; the mean skips them.
    """
    by_name, total = count_labels(labels, truth, axis=0), count_labels(labels, truth)
    return {
        "precision": _measures(by_name.precision, total.precision),
        "recall": _measures(by_name.recall, total.recall),
    }


def _measures(per_class: np.ndarray, micro: np.ndarray) -> dict[str, list[float] | float]:
    return {"per_class": per_class.tolist(), "micro": float(micro), "macro": float(nanmean(per_class))}


def summary(scores: np.ndarray, truth: np.ndarray | None, unseen: list[str], own: float) -> dict:
    """How many labels each threshold gives, and how good they are. Lists are in the order of `unseen`.

    scores: (N, U). truth: (N, U) bool, or None if unknown. own: the model's threshold.
    """
    thresholds = []
    for threshold in sorted({own, *THRESHOLDS}):
        labels = pseudo_labels(scores, threshold) == 1
        measures = {} if truth is None else precision_and_recall(labels, truth)
        thresholds.append({"threshold": threshold, "labels": labels.sum(0).tolist(), **measures})
    result = {
        "num_images": len(scores),
        "images_without_proposals": int((~scores.any(axis=1)).sum()),  # a usable proposal has no score of 0
        "unseen": unseen,
        "pseudo_label_threshold": own,
        "thresholds": thresholds,
    }
    if truth is not None:
        found = np.array([average_precision(*columns) for columns in zip(scores.T, truth.T, strict=True)])
        known = found[~np.isnan(found)]
        result["images_with_class"] = truth.sum(0).tolist()
        result["average_precision"] = {"per_class": found.tolist(), "macro": float(known.mean())}
    return result


def report(result: dict) -> str:
    """The tables for the terminal; precision (P), recall (R) and AP in percent."""
    measured = "average_precision" in result
    lines = [f"labels of {len(result['unseen'])} unseen names in {result['num_images']} images"]
    if result["images_without_proposals"] == result["num_images"]:
        lines.append(
            "warning: CLIP got no proposal of any image, so all scores are 0 and mean nothing; with "
            "--unannotated_share 0 it gets all of them"
        )
    lines.append("  threshold   labels" + "   P micro R micro   P macro R macro" * measured)
    for row in result["thresholds"]:
        line = f"  {row['threshold']:<9g} {sum(row['labels']):8d}"
        if measured:
            for kind in ("micro", "macro"):
                line += f"     {percent(row['precision'][kind]):>5}   {percent(row['recall'][kind]):>5}"
        lines.append(line)
    (own,) = [row for row in result["thresholds"] if row["threshold"] == result["pseudo_label_threshold"]]
    lines.append(f"at {own['threshold']:g}, name by name")
    lines.append("              labels" + "   present     P     R    AP" * measured)
    for index, name in enumerate(result["unseen"]):
        line = f"  {own['labels'][index]:18d}"
        if measured:
            values = [own[kind]["per_class"][index] for kind in ("precision", "recall")]
            values.append(result["average_precision"]["per_class"][index])
            line += f"  {result['images_with_class'][index]:8d} {_percents(values)}"
        lines.append(f"{line}   {name}")
    line = f"  {sum(own['labels']):18d}"
    if measured:
        values = [own["precision"]["micro"], own["recall"]["micro"], math.nan]
        line += f"  {sum(result['images_with_class']):8d} {_percents(values)}"
    return "\n".join([*lines, f"{line}   all names together"])


def _percents(values: list[float]) -> str:
    return " ".join(f"{percent(value):>5}" for value in values)


# ---- the command -------------------------------------------------------------------------------------------


@torch.inference_mode()
def make_pseudo_labels(args: PseudoLabelArgs) -> dict | None:
    """Makes the pseudo labels. Returns the content of summary.json, or None on all but the main process."""
    args.check()
    # A finished process waits for the others, which may be a whole shard behind.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    torch.set_num_threads(1)  # another number can change the last digits of a score
    label_space = load_label_space(args.label_space or args.dataset)
    records = load_split(args.dataset, args.split, label_space)
    if len(set(records.image_ids)) < len(records):
        raise InputError(f"image_id repeats in split {args.split!r}: pseudo labels need a different one for each image")
    with accelerator.local_main_process_first():
        model, processor = load_checkpoint(args.model, args.trust_remote_code)
    check_source(model.config, label_space, args.encoder)
    model.to(accelerator.device)
    image_processor = getattr(processor, "image_processor", processor)
    with accelerator.local_main_process_first():
        scorer, prompts = make_scorer(args, model, processor, label_space)
    towers = {"model": model, "image_processor": image_processor, "scorer": scorer}
    score = partial(score_batch, **towers, **crop_flags(args), region_view=args.region_view)

    folder, image_ids = Path(args.output), records.image_ids[: args.max_images]
    digest = [b""]  # all processes use the main one's: device names may differ
    with ExitStack() as held:
        with all_refuse(accelerator):
            if accelerator.is_main_process:
                settings = resolved_settings(args, model, label_space, records, image_ids, prompts, scorer)
                held.enter_context(lock_folder(folder))
                check_settings(folder, settings)
                digest = [settings_digest(settings)]
        (bound,) = broadcast_object_list(digest)
        mine, resumed = own_shards(accelerator, folder, len(image_ids), args.shard_size)
        batches = loaded_batches(records, mine.values(), args.batch_size, image_processor, args.num_workers)
        total, quiet = resumed + sum(map(len, mine.values())), not accelerator.is_local_main_process
        with tqdm(total=total, initial=resumed, unit="image", mininterval=1, disable=quiet) as bar:
            make_shards(mine, records, batches, score, bound, bar)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if not accelerator.is_main_process:
            return None
        scores = load_unseen_scores(folder, label_space, image_ids)
        truth = unseen_truth(records, label_space, len(image_ids)) if args.measure else None
        result = summary(scores, truth, label_space.unseen, model.config.pseudo_label_threshold)
        write_json(folder / "summary.json", result)
        return result


def make_scorer(
    args: PseudoLabelArgs, model: PreTrainedModel, processor: ProcessorMixin, label_space: LabelSpace
) -> tuple[Scorer, list[str]]:
    """The scorer on the model's device, and its prompts. The unseen names come first in its text vectors."""
    in_softmax = [*label_space.unseen, *(label_space.seen if args.seen_names else [])]
    if args.encoder is not None:
        return load_scorer(args.encoder, in_softmax, model.device)
    embeds, prompts = class_vectors(model, processor, label_space.class_names, args.text_embeds)
    embeds = embeds[[label_space.class_names.index(name) for name in in_softmax]]
    return own_scorer(model, embeds), prompts


def own_shards(accelerator: Accelerator, folder: Path, count: int, shard_size: int) -> tuple[dict[Path, range], int]:
    """The missing shards of this process with their image indices, and the number of images in finished shards."""
    parts = in_parts(range(count), shard_size)
    shards = {folder / shard_name(number, len(parts)): part for number, part in enumerate(parts)}
    missing = {path: part for path, part in shards.items() if not path.exists()}
    accelerator.wait_for_everyone()  # no process writes while another one still looks for shards
    mine = dict(list(missing.items())[accelerator.process_index :: accelerator.num_processes])
    return mine, count - sum(map(len, missing.values()))


def loaded_batches(
    records: Split, parts: Iterable[range], batch_size: int, image_processor: Zs3ImageProcessor, num_workers: int
) -> Iterator[Inputs]:
    """The batches of each part in turn. No batch holds images of two parts."""
    return iter(
        DataLoader(
            ScoredImages(records, records.label_space),
            batch_sampler=[batch for part in parts for batch in in_parts(part, batch_size)],
            collate_fn=partial(collate, image_processor),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )


def make_shards(
    shards: dict[Path, range],
    records: Split,
    batches: Iterator[Inputs],
    score: Callable[[Inputs], Tensor],
    settings: bytes,
    bar: tqdm,
) -> None:
    """Scores the images of each shard and writes it; see `loaded_batches`, `score_batch` and `write_shard`."""
    unseen = records.label_space.unseen
    for path, part in shards.items():
        image_ids, scores = [records.image_ids[index] for index in part], []
        while sum(map(len, scores)) < len(part):
            with in_one_line(f"one of the images from {shortened(image_ids[0])} on"):
                scores.append(score(next(batches))[:, : len(unseen)].cpu())
            bar.update(len(scores[-1]))
        write_shard(path, image_ids, torch.cat(scores).numpy(), unseen, settings)


def main() -> None:
    args, _ = read_arguments(PseudoLabelArgs)
    result = make_pseudo_labels(args)
    if result is not None:
        print(report(result))


if __name__ == "__main__":
    run(main)
