"""Evaluate a checkpoint: mIoU(S), mIoU(U), hIoU, their intervals, and how far its confidences can be trusted.

    accelerate launch eval.py --model runs/stage2/final --dataset DIR --setting gzs3 --output runs/stage2/gzs3.json
    accelerate launch eval.py --model runs/stage2/final --suite ovs5 --data_root data --output runs/stage2/ovs5

Settings (section 3.1): gzs3, candidates and pixels of all classes; zs3, of the unseen classes alone; ovs, any label
space, without a claim about seen and unseen. The checkpoint runs with this project's code; with --trust_remote_code,
with its own.

One pass over the images gives everything in FILE.json: the scores, the seen/unseen curve over all biases, reliability
and rejection (zs3.calibration). Beside it lie FILE.md, FILE.csv (per class) and FILE_images.npz (zs3.compare's).
A suite is one model on several datasets, without adaptation: its members' results lie in the folder --output, with the
row of the paper's table; members that are there are not repeated.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from configuration_zs3 import among, shortened
from label_maps_zs3 import SemanticMap
from zs3.calibration import OUTSIDER, Rejection, Reliability, SeenBiasCurve
from zs3.checkpoints import (
    Look,
    NoClaim,
    check_no_unseen_masks,
    class_vectors,
    code_sha256,
    is_trained,
    load_checkpoint,
    settings_sha256,
    weights_sha256,
)
from zs3.command_line import (
    TINY,
    Arguments,
    Count,
    InputError,
    Number,
    OutputFolder,
    Seed,
    Share,
    Whole,
    Workers,
    check_outside,
    check_required,
    flag,
    in_one_line,
    printable,
    read_arguments,
    run,
    try_output,
)
from zs3.curves import check_matplotlib, draw_reliability, draw_seen_unseen_curve
from zs3.data import Split, dataset_name, load_split
from zs3.evaluation import ConfusionMatrix, GeneralizedScores
from zs3.files import file_name, file_sha256, finite_or_none, lock_folder, write_json, write_text
from zs3.label_space import LabelSpace, load_label_space
from zs3.pictures import draw_comparison
from zs3.results import (
    RESULT_FILE,
    Choice,
    Result,
    check_bias,
    check_replaceable,
    check_weight,
    chosen_bias,
    chosen_weight,
    protocol,
    read_result,
    report,
    write_result,
)
from zs3.stopping import all_refuse
from zs3.suites import OF_A_ROW, SUITES, Suite, chosen_members, row
from zs3.typed_json import check_needed, unless_damaged


@dataclass
class EvalArgs(Arguments):
    """One evaluation of one checkpoint: on one dataset, or on the datasets of a suite."""

    model: str | None = flag(None, "Checkpoint: a folder or a Hub id.")
    trust_remote_code: bool = flag(False, "Run the code that lies beside the checkpoint, in place of this project's.")
    dataset: str | None = flag(None, "Folder or Hub id of the data.")
    suite: Literal["gzs3", "ovs5"] | None = flag(None, "Datasets and setting of the paper's Tables 1-2, or 3.")
    data_root: str | None = flag(None, "Folder of the suite's datasets, each named as zs3.convert names it.")
    members: list[str] = flag([], "Datasets of the suite; default: all that are there, voc_21 only where named.")
    split: str = flag("validation", "Split of the dataset to evaluate on.")
    label_space: str | None = flag(None, "Benchmark name or classes.json; default: the dataset's own.")
    setting: Literal["gzs3", "zs3", "ovs"] = flag(
        "gzs3",
        "Candidates: all classes (gzs3), the unseen alone (zs3), or of any label space, with no claim (ovs).",
    )
    without: list[str] = flag([], "Names that are no candidates; their pixels count for rejection alone.")
    output: str | None = flag(None, "Result file (JSON); of a suite, a folder.")
    text_embeds: str | None = flag(
        None,
        "Text vectors for a checkpoint without text tower: a .npy, one row a class; of a suite, a folder of NAME.npy.",
    )
    ensemble: Literal["off", "crops", "lazy", "single_pass"] | None = flag(
        None,
        "CLIP's view of the proposals joined in (section 4.6): of all their crops, of those that can change the label "
        "map, or from one pass over the image; default: crops where the checkpoint has an image tower and a weight.",
    )
    ensemble_weight: str | None = flag(
        None,
        "w of the ensemble: a number, or a file of zs3.ensemble_weight; default: the checkpoint's own weight.",
    )
    ensemble_tolerance: Share = flag(0.0, "Share of an image's pixels that 'lazy' may leave open.")
    seen_bias: str | None = flag(
        None, "What is taken off the scores of seen classes: a number, or a result file, for the best of its curve."
    )
    calibration: bool = flag(
        True, "Measure the seen/unseen curve, reliability and rejection in the same pass; not with --ensemble lazy."
    )
    max_wrong: Annotated[float, Number(float, TINY, 1, below=True)] = flag(
        0.1, "Share of an image's pixels that may get a wrong label, for the rejection threshold."
    )
    absent: Literal["union", "truth"] = flag(
        "union", "A class is left out of means where truth and prediction (union) or truth alone lack it."
    )
    pictures: OutputFolder | None = flag(None, "Folder for pictures: image, truth, prediction.")
    num_pictures: Whole = flag(8, "How many pictures to draw, spread evenly over the split.")
    curves: OutputFolder | None = flag(
        None, "Folder for the curve and the reliability diagram (PNG; needs matplotlib)."
    )
    max_images: Count | None = flag(None, "Evaluate the first N images only.")
    num_workers: Workers = flag(2, "Processes that read images ahead; 0 reads them in the main one.")
    seed: Seed = flag(0, "Of the bootstrap.")

    def check(self) -> None:
        check_required(self, "model")
        if self.ensemble_weight is not None:
            check_weight(self.ensemble_weight)
        if self.seen_bias is not None:
            check_bias(self.seen_bias)
        if self.ensemble_tolerance > 0 and self.ensemble != "lazy":
            raise InputError("--ensemble_tolerance goes with --ensemble lazy")
        if self.seen_bias is not None and (self.setting != "gzs3" or self.suite == "ovs5"):
            raise InputError("--seen_bias goes with --setting gzs3, where seen and unseen names compete")
        if self.ensemble == "lazy" and self.seen_bias is not None:
            raise InputError("--seen_bias does not go with --ensemble lazy, which decides the label map without it")
        if self.suite is None:
            check_required(self, "dataset")
            if self.data_root or self.members:
                raise InputError("--data_root and --members go with --suite")
        else:
            check_required(self, "data_root", "output")
            if self.dataset or self.label_space or self.without:
                raise InputError("--dataset, --label_space and --without do not go with --suite: it has its own")
        check_outside("--pictures", self.pictures, self.dataset)
        if self.output is not None and self.suite is None:
            if Path(self.output).suffix != ".json" or os.path.isdir(self.output):
                raise InputError(f"--output {self.output} must be a file that ends in .json")
            try_output("--output", self.output, "file")
            check_replaceable(Path(self.output), read_result)
        elif self.output is not None:
            if os.path.exists(self.output) and not os.path.isdir(self.output):
                raise InputError(f"--output {self.output} is a file: of a suite it is a folder")
            try_output("--output", self.output, "folder")
        if self.ensemble == "off" and self.ensemble_weight is not None:
            raise InputError("--ensemble_weight goes with an ensemble, and --ensemble is off")
        if self.curves is not None and not self.calibration:
            raise InputError("--curves draws what is left out without calibration")
        if self.curves is not None:
            check_matplotlib("--curves")


WORST_PAIRS = 10
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "zs3")
NOT_OF_THE_RESULT = {
    *("output", "pictures", "num_pictures", "curves", "num_workers", "suite", "data_root", "members"),
    "trust_remote_code",  # code_sha256 says which code it was
}


# ---- what is asked -----------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """The class axis of an evaluation, C names; is_seen and is_trained: (C,) bool.

    place: (ids + 1,) int64, where each id of a label map lands on the axis: OUTSIDER where the class is no candidate;
        the last entry is for pixels without a label.
    """

    names: list[str]
    index: Tensor  # (C,) int64, of the label space
    is_seen: Tensor
    is_trained: Tensor
    place: np.ndarray

    @property
    def ignored(self) -> int:
        """An id of our own for pixels without a label: the data's may lie inside the candidates' range."""
        return len(self.place) - 1

    def label_map(self, label: np.ndarray, ignore_index: int) -> np.ndarray:
        """(H, W) ids of the label space -> int64: 0 to C - 1, OUTSIDER or `ignored`."""
        return self.place[np.where(label == ignore_index, self.ignored, label)]


def candidates_of(label_space: LabelSpace, setting: str, without: list[str], config: PreTrainedConfig) -> Candidates:
    names = label_space.class_names
    strangers = [name for name, known in zip(without, among(without, names), strict=True) if not known]
    if strangers:
        raise InputError(f"--without {strangers[0]!r}: the label space has no such name (quote names of two words)")
    chosen = ~torch.tensor(among(names, without))
    if setting == "zs3":
        chosen &= ~label_space.is_seen
    index = torch.nonzero(chosen).squeeze(1)
    if len(index) == 0:
        raise InputError(f"no candidate is left: --setting {setting} asks for names that the label space has not got")
    place = np.full(len(names) + 1, OUTSIDER)
    place[-1] = len(names)
    place[index.numpy()] = np.arange(len(index))
    kept = [names[position] for position in index]
    return Candidates(kept, index, label_space.is_seen[index], is_trained(config, kept), place)


def check_claim(config: PreTrainedConfig, label_space: LabelSpace, setting: str) -> None:
    """A zero-shot number needs a model that saw no unseen mask."""
    if setting == "ovs":
        return
    check_no_unseen_masks(config, label_space, f"{setting} result can be claimed, --setting ovs is open to it")
    trained = among(label_space.seen, config.seen_class_names)
    missing = [name for name, is_known in zip(label_space.seen, trained, strict=True) if not is_known]
    if missing and setting == "gzs3":
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise NoClaim(
            f"the checkpoint saw no masks of {shortened(missing[0])}{more}, seen classes here: use --setting ovs"
        )


def check_code(path: str, processor: ProcessorMixin) -> None:
    """With --trust_remote_code the code comes with the checkpoint, and may be older than this evaluation."""
    known = signature(processor.post_process_semantic_segmentation).parameters
    if not {"return_scores", "is_seen"} <= known.keys():
        raise InputError(f"the code beside {path} is older than this eval.py: copy the project's *_zs3.py over it")


def chosen_ensemble(args: EvalArgs, model: PreTrainedModel, stamp: dict, image_ids: list[str]) -> tuple[str, Choice]:
    """The view, "off" for no ensemble, and the weight; what is not given is the checkpoint's."""
    given = None
    if args.ensemble_weight is not None:
        given = chosen_weight(args.ensemble_weight, stamp, image_ids)
    if given is not None and given.value is None:
        if args.ensemble is None:
            return "off", given
        raise InputError(
            f"{args.ensemble_weight} says not to ensemble: leave --ensemble {args.ensemble} out, or give a number"
        )
    try:
        view = model.ensemble_view(args.ensemble, None if given is None else given.value)
    except ValueError as error:
        raise InputError(str(error)) from error
    if view == "off":
        return view, Choice(None, "none")
    return view, given or Choice(model.config.clip_ensemble_weight, "the checkpoint's")


# ---- the pass ----------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """An image as the pass meets it. label: (H, W) int64 on the class axis, see Candidates.label_map."""

    index: int
    image: Image.Image
    label: np.ndarray
    image_id: str
    inputs: BatchFeature


class Images(Dataset):
    """Some of a split's images."""

    def __init__(self, records: Split, indices: range, candidates: Candidates, processor: ProcessorMixin):
        self.records, self.indices, self.candidates, self.processor = records, indices, candidates, processor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Item:
        image, label, image_id = self.records[self.indices[position]]
        label = self.candidates.label_map(label, self.records.label_space.ignore_index)
        return Item(self.indices[position], image, label, image_id, self.processor(images=image))


def as_it_is(item: Item) -> Item:
    """No collation, which would make tensors of arrays."""
    return item


@dataclass
class Counts:
    """What one process counts. shown, undecided: sums over images, of the ensemble."""

    confusion: ConfusionMatrix
    curve: SeenBiasCurve | None
    reliability: Reliability | None
    rejection: Rejection | None
    shown: int = 0
    undecided: float = 0.0

    def merge(self, other: "Counts") -> None:
        for name in ("confusion", "curve", "reliability", "rejection"):
            if getattr(self, name) is not None:
                getattr(self, name).merge(getattr(other, name))
        self.shown += other.shown
        self.undecided += other.undecided


def new_counts(args: EvalArgs, candidates: Candidates, bias: Choice, calibration: bool) -> Counts:
    """A curve where there are seen and unseen candidates; confidences where no bias changes the winner, whose they
    are."""
    ignored, unbiased = candidates.ignored, calibration and bias.value == 0
    curve = calibration and args.setting == "gzs3" and 0 < int(candidates.is_seen.sum()) < len(candidates.names)
    return Counts(
        ConfusionMatrix(len(candidates.names), ignored),
        SeenBiasCurve(candidates.is_seen, ignored) if curve else None,
        Reliability(ignored) if unbiased else None,
        Rejection(ignored) if unbiased else None,
    )


def count(counts: Counts, found: SemanticMap, prediction: Tensor, label: Tensor, image_id: str) -> None:
    """One image into the counts. label: (H, W), see Candidates.label_map."""
    inside = torch.where(label == OUTSIDER, counts.confusion.ignore_index, label)
    counts.confusion.update(prediction, inside, image_id)
    if counts.curve is not None:
        counts.curve.update(found, inside)
    if counts.reliability is not None:
        counts.reliability.update(found, inside)
        counts.rejection.update(found, label, image_id)


@torch.inference_mode()
def count_images(
    args: EvalArgs, look: Look, images: Images, counts: Counts, seen_bias: float, accelerator: Accelerator
) -> None:
    """All of this process's images into the counts; some of them are drawn."""
    candidates, options = images.candidates, {"return_scores": counts.reliability is not None}
    if counts.curve is not None or seen_bias:
        options["is_seen"] = candidates.is_seen
    num_images = len(images.records.image_ids[: args.max_images])
    drawn = set(np.linspace(0, num_images - 1, min(args.num_pictures, num_images)).astype(int).tolist())
    workers = min(args.num_workers, len(images))
    loader = DataLoader(images, batch_size=None, num_workers=workers, collate_fn=as_it_is)
    quiet = not accelerator.is_local_main_process
    for item in tqdm(loader, desc=printable(dataset_name(args.dataset)), unit="image", mininterval=1, disable=quiet):
        size = item.label.shape
        with in_one_line(f"image {shortened(item.image_id)}"):
            outputs = look(item.inputs.to(accelerator.device), size)
        if look.view != "off":
            counts.shown += int(outputs.shown_to_clip.sum())
            counts.undecided += float(outputs.undecided.sum())
        (found,) = look.processor.post_process_semantic_segmentation(outputs, [size], **options)
        prediction = found if isinstance(found, Tensor) else found.with_seen_bias(seen_bias)
        count(counts, found, prediction, torch.from_numpy(item.label).to(prediction.device), item.image_id)
        if args.pictures is not None and item.index in drawn:
            try:
                draw(item, prediction, candidates, Path(args.pictures))
            except InputError as error:  # the pass is worth more than its pictures
                print(f"warning: {error}; no more pictures are drawn")
                drawn = set()


def draw(item: Item, prediction: Tensor, candidates: Candidates, folder: Path) -> None:
    truth = np.where((item.label == OUTSIDER) | (item.label == candidates.ignored), -1, item.label)
    panels = {"image": item.image, "truth (grey: not counted)": truth, "prediction": prediction.cpu()}
    draw_comparison(panels, candidates.names, folder / file_name(item.image_id, ".png"))


@torch.inference_mode()
def evaluate(args: EvalArgs, accelerator: Accelerator | None = None, reuse: bool = False) -> Result | None:
    """The result, as it is written to args.output; None on processes other than the main one.

    reuse: a result of the same evaluation that lies there is taken.
    """
    args.check()
    accelerator = accelerator or Accelerator()
    label_space = load_label_space(args.label_space or args.dataset)
    records = load_split(args.dataset, args.split, label_space)
    with accelerator.local_main_process_first():
        model, processor = load_checkpoint(args.model, args.trust_remote_code)
    check_code(args.model, processor)
    check_claim(model.config, label_space, args.setting)
    candidates = candidates_of(label_space, args.setting, args.without, model.config)
    image_ids = records.image_ids[: args.max_images]
    num_images = len(image_ids)
    if num_images == 0:
        raise InputError(f"split {args.split!r} of {args.dataset} has no images")
    stamp = stamps(args, label_space, model.config, candidates, records)
    if reuse:
        there = [finished(Path(args.output), stamp) if accelerator.is_main_process else None]
        (there,) = broadcast_object_list(there)  # the others may not see the main process's disk
        if there is not None:
            return there
    bias = chosen_bias(args.seen_bias, stamp, image_ids)
    view, weight = chosen_ensemble(args, model, stamp, image_ids)
    model.to(accelerator.device)
    text_embeds, prompts = class_vectors(model, processor, label_space.class_names, args.text_embeds)
    text_embeds = text_embeds[candidates.index].to(accelerator.device)
    counts = new_counts(args, candidates, bias, calibration=args.calibration and view != "lazy")
    mine = range(accelerator.process_index, num_images, accelerator.num_processes)
    look = Look(model, processor, text_embeds, candidates.is_trained, view, weight.value, args.ensemble_tolerance)
    count_images(args, look, Images(records, mine, candidates, processor), counts, bias.value, accelerator)

    total, *others = gather_object([counts])
    if not accelerator.is_main_process:
        return None
    for part in others:
        total.merge(part)
    result = stamp | {
        "prompts": prompts,
        "clip_ensemble": view,
        "clip_ensemble_weight": weight.value,
        "ensemble_tolerance": args.ensemble_tolerance,
        "calibration": {
            "seen_bias": bias.value,
            "seen_bias_chosen": bias.chosen,
            "ensemble_weight_chosen": weight.chosen,
        },
    }
    result |= scores(args, total, candidates)
    result = {"protocol": protocol(result), **result}
    result |= {"proposals_shown_to_clip": total.shown / num_images, "undecided_share": total.undecided / num_images}
    result = finite_or_none(result)
    with kept_in_print(result):
        if args.output is not None:
            write_result(Path(args.output), result, total.confusion)
        if args.curves is not None:
            draw_curves(result, Path(args.curves))
    return result


@contextmanager
def kept_in_print(result: Result) -> Iterator[None]:
    """The pass is not lost with a file that cannot be written."""
    try:
        yield
    except InputError:
        print(report(result))
        raise


# ---- the result --------------------------------------------------------------------------------------------


def stamps(
    args: EvalArgs, label_space: LabelSpace, config: PreTrainedConfig, candidates: Candidates, records: Split
) -> Result:
    """What a reader needs to know of an evaluation before it has begun. Equal stamps stand for equal numbers."""
    unseen = [name for name in candidates.names if name in label_space.unseen]
    given = (args.text_embeds, args.seen_bias, args.ensemble_weight)
    return {
        "setting": args.setting,
        "model": args.model,
        "dataset": dataset_name(args.dataset),
        "split": args.split,
        "split_sha256": hashlib.sha256("\n".join(records.image_ids[: args.max_images]).encode()).hexdigest(),
        "split_images": len(records),
        "label_space": args.label_space or "the dataset's own",
        "label_space_sha256": label_space.sha256,
        "checkpoint_sha256": weights_sha256(args.model),
        "settings_sha256": settings_sha256(args.model),
        "code_sha256": code_sha256(args.model, args.trust_remote_code),
        "given_sha256": {name: file_sha256(Path(name)) for name in given if name is not None and Path(name).is_file()},
        "seen": [name for name in candidates.names if name not in unseen],
        "unseen": unseen,
        "without": args.without,
        "trained_on_masks_of": config.seen_class_names,
        "unseen_labels_in_training": config.unseen_labels,
        "absent": args.absent,
        "seed": args.seed,
        "settings": deciding_flags(args),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers may hang on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def deciding_flags(args: EvalArgs) -> dict:
    """Those of the flags that decide the numbers."""
    return {name: value for name, value in asdict(args).items() if name not in NOT_OF_THE_RESULT}


def scores(args: EvalArgs, total: Counts, candidates: Candidates) -> Result:
    """Shares in [0, 1]; NaN where there is nothing to take one of, None for what does not belong to the setting."""
    confusion, names, is_seen = total.confusion, candidates.names, candidates.is_seen.numpy()
    iou, means = confusion.iou(args.absent), confusion.scores(is_seen, args.absent)
    bootstrap = confusion.bootstrap(is_seen, absent=args.absent, seed=args.seed)
    intervals = {name: list(interval) for name, interval in bootstrap.intervals().items()}
    groups = {name: shares._asdict() for name, shares in confusion.seen_unseen_confusion(is_seen)._asdict().items()}
    if args.setting == "ovs":  # seen and unseen are words of the zero-shot settings
        groups = None
        means |= dict.fromkeys(GeneralizedScores._fields)
        intervals |= {name: [None, None] for name in GeneralizedScores._fields}
    return {
        "num_images": len(confusion.images),
        **means,
        "confidence_intervals": intervals,
        "per_class": dict(zip(names, iou.tolist(), strict=True)),
        "per_class_intervals": dict(zip(names, bootstrap.class_intervals().tolist(), strict=True)),
        "seen_unseen_confusion": groups,
        "worst_pairs": [
            pair._asdict() | {"truth": names[pair.truth], "predicted": names[pair.predicted]}
            for pair in confusion.worst_pairs(WORST_PAIRS)
        ],
        "seen_unseen_curve": total.curve.result(args.absent)
        if total.curve is not None and total.curve.has_both
        else None,
        "reliability": None if total.reliability is None else total.reliability.result(),
        "rejection": None if total.rejection is None else total.rejection.result(args.max_wrong),
    }


def draw_curves(result: Result, folder: Path) -> None:
    """PNGs of what was measured."""
    curve, bias = result["seen_unseen_curve"], result["calibration"]["seen_bias"]
    if curve is not None and curve["area"] is not None:
        chosen = {"gamma": bias, **{name: result[name] for name in GeneralizedScores._fields}} if bias else None
        draw_seen_unseen_curve({result["model"]: curve | {"chosen": chosen}}, folder / "seen_unseen_curve.png")
    if result["reliability"] is not None and result["reliability"]["pixels"]:
        draw_reliability(result["reliability"], folder / "reliability.png")


# ---- suites ------------------------------------------------------------------------------------------------


def evaluate_suite(args: EvalArgs, accelerator: Accelerator) -> str | None:
    """Every member into its file in the folder args.output, those that are there already left alone; the table's row.

    A member whose number cannot be claimed with this checkpoint has its reason in the place of one.
    """
    args.check()
    members = chosen_members(SUITES[args.suite], Path(args.data_root), args.members)
    with ExitStack() as held:
        with all_refuse(accelerator):
            if accelerator.is_main_process:
                held.enter_context(lock_folder(Path(args.output)))
        return evaluate_members(args, members, accelerator)


def evaluate_members(args: EvalArgs, members: list[str], accelerator: Accelerator) -> str | None:
    """As `evaluate_suite`, into a folder that is nobody else's now."""
    suite, root, folder = SUITES[args.suite], Path(args.data_root), Path(args.output)
    results, reasons = {}, {}
    for name in members:
        member = member_args(args, suite, name)
        try:
            results[name] = evaluate(member, accelerator, reuse=True)
        except NoClaim as error:
            reasons[name] = str(error)
    if not accelerator.is_main_process:
        return None
    text = row(suite, root, results, reasons)
    write_text(folder / f"{args.suite}.md", text)
    table = {name: {score: result[score] for score in suite.scores} for name, result in results.items()}
    write_json(folder / f"{args.suite}.json", {"suite": args.suite, "table": table, "not_evaluated": reasons})
    return text


def member_args(args: EvalArgs, suite: Suite, name: str) -> EvalArgs:
    return replace(
        args,
        suite=None,
        data_root=None,
        members=[],
        dataset=str(Path(args.data_root, name)),
        setting=suite.setting,
        output=str(Path(args.output, f"{name}.json")),
        text_embeds=None if args.text_embeds is None else str(Path(args.text_embeds, f"{name}.npy")),
        pictures=None if args.pictures is None else str(Path(args.pictures, name)),
        curves=None if args.curves is None else str(Path(args.curves, name)),
    )


def finished(path: Path, stamp: Result) -> Result | None:
    """The result that is there, if it is that of the same checkpoint, data, flags and versions."""
    if not path.exists():
        return None
    result = unless_damaged(read_result, path)
    if result is None or {name: result.get(name) for name in stamp} != json.loads(json.dumps(stamp)):
        return None
    check_needed(result, OF_A_ROW, path, RESULT_FILE)
    return result


def main() -> None:
    args, _ = read_arguments(EvalArgs)
    args.check()
    accelerator = Accelerator()
    if args.suite is not None:
        text = evaluate_suite(args, accelerator)
    else:
        result = evaluate(args, accelerator)
        text = None if result is None else report(result)
        if text is not None and args.output is not None:
            text += f"\nwritten to {args.output}, and beside it .md, .csv and _images.npz\n"
    accelerator.end_training()
    if text is not None:
        print(text, end="")


if __name__ == "__main__":
    run(main)
