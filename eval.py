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
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from zs3.checkpoints import NoClaim, class_vectors, code_sha256, load_checkpoint, settings_sha256, weights_sha256
from zs3.command_line import InputError, read_arguments, run
from zs3.data.records import Split, dataset_name, load_split
from zs3.evaluation.arguments import EvalArgs, deciding_flags
from zs3.evaluation.choices import Choice, chosen_bias, chosen_weight
from zs3.evaluation.curves import draw_reliability, draw_seen_unseen_curve
from zs3.evaluation.one_pass import (
    Candidates,
    Counts,
    Images,
    Look,
    candidates_of,
    check_claim,
    count_images,
    new_counts,
)
from zs3.evaluation.report import protocol, report, write_result
from zs3.evaluation.results import Result
from zs3.evaluation.suites import SUITES, Suite, chosen_members, finished, row
from zs3.files import file_sha256, finite_or_none, lock_folder, write_json, write_text
from zs3.label_space import LabelSpace, load_label_space
from zs3.scores.means import GeneralizedScores
from zs3.training.stopping import all_refuse

WORST_PAIRS = 10
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "zs3")


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
