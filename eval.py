"""Evaluate a checkpoint: mIoU(S), mIoU(U), hIoU, their intervals, and how far its confidences can be trusted.

    accelerate launch eval.py --model runs/stage2/final --dataset DIR --setting gzs3 --output runs/stage2/gzs3.json
    accelerate launch eval.py --model runs/stage2/final --suite ovs5 --data_root data --output runs/stage2/ovs5

Settings (section 3.1). gzs3: candidates and pixels of all classes. zs3: those of the unseen classes alone. ovs: any
label space, without a claim about seen and unseen classes. The checkpoint runs with this project's code. With
--trust_remote_code it runs with the code that lies beside it.

One pass over the images gives all of FILE.json: the scores, the seen/unseen curve over all biases, reliability and
rejection (zs3/scores/calibration.py). Beside it lie FILE.md, FILE.csv (per class) and FILE_images.npz, which `zs3
compare` needs. A suite is one model on several datasets, without adaptation. Its results and the row of the paper's
table lie in the folder --output. A dataset that has a finished result is not evaluated again.
"""

import hashlib
import sys
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from text_zs3 import TextCache
from zs3.checkpoints import class_vectors, code_sha256, load_checkpoint, settings_sha256, weights_sha256
from zs3.command_line import InputError, printable, read_arguments, run
from zs3.data.records import Split, dataset_name, load_split
from zs3.evaluation.arguments import EvalArgs, deciding_flags
from zs3.evaluation.choices import chosen_bias, chosen_ensemble
from zs3.evaluation.counts import PassCounts, new_counts
from zs3.evaluation.curves import draw_curves
from zs3.evaluation.one_pass import Candidates, Drawings, Items, Predictor, candidates_of, check_claim, count_images
from zs3.evaluation.report import OWN_SPACE, report
from zs3.evaluation.result_types import Ensemble, Result
from zs3.evaluation.results import result_of, versions, write_result
from zs3.evaluation.suites import finished, run_suite
from zs3.files import file_sha256
from zs3.label_space import load_label_space
from zs3.scorers import Scorer, load_scorer


@torch.inference_mode()
def evaluate(args: EvalArgs, accelerator: Accelerator | None = None, reuse: bool = False) -> Result | None:
    """The result, as it is written to args.output; None on processes other than the main one.

    reuse: if args.output has the finished result of the same evaluation, it is returned.
    """
    args.check()
    accelerator = accelerator or Accelerator()
    loaded = load(args, accelerator)
    stamp = stamp_of(args, loaded)
    if reuse:
        found = [finished(Path(args.output), stamp) if accelerator.is_main_process else None]
        (found,) = broadcast_object_list(found)  # the other processes may not see the main one's disk
        if found is not None:
            return found
    bias = chosen_bias(args.seen_bias, stamp, loaded.image_ids)
    given = (args.ensemble, args.ensemble_weight)
    ensemble = chosen_ensemble(loaded.model, *given, stamp, loaded.image_ids, args.encoder)
    predictor, prompts = predictor_of(loaded, args.text_embeds, ensemble, accelerator.device)
    counts = count_all(args, loaded, predictor, bias.value, accelerator)
    if counts is None:
        return None

    result = result_of(stamp, prompts, ensemble, bias, counts, args.max_wrong)
    try:
        if args.output is not None:
            write_result(Path(args.output), result, report(result), counts.confusion)
        if args.curves is not None:
            draw_curves(result, Path(args.curves))
    except InputError:  # a file cannot be written: the printed report keeps the numbers
        print(report(result))
        raise
    return result


OLDER_CODE = "the code beside {} is older than this eval.py: copy the project's *_zs3.py over it"


class Loaded(NamedTuple):
    """The inputs of an evaluation. image_ids: the evaluated images, which are the first of the records.

    scorer: of --encoder, or None.
    """

    records: Split
    image_ids: list[str]
    model: PreTrainedModel
    processor: ProcessorMixin
    candidates: Candidates
    scorer: Scorer | None


def load(args: EvalArgs, accelerator: Accelerator) -> Loaded:
    label_space = load_label_space(args.label_space or args.dataset)
    records = load_split(args.dataset, args.split, label_space)
    with accelerator.local_main_process_first():
        model, processor = load_checkpoint(args.model, args.trust_remote_code)
    check_code(args.model, processor)
    if args.encoder is not None and "logit_scale" not in signature(model.ensemble).parameters:
        raise InputError(OLDER_CODE.format(args.model))
    check_claim(model.config, label_space, args.setting)
    candidates = candidates_of(label_space, args.setting, args.without, model.config)
    scorer = None
    if args.encoder is not None:
        with accelerator.local_main_process_first():
            scorer, _ = load_scorer(args.encoder, candidates.names, accelerator.device)
    image_ids = records.image_ids[: args.max_images]
    if not image_ids:
        raise InputError(f"split {args.split!r} of {args.dataset} has no images")
    return Loaded(records, image_ids, model, processor, candidates, scorer)


def check_code(path: str, processor: ProcessorMixin) -> None:
    """Refuses code beside a checkpoint (--trust_remote_code) that is too old for this evaluation."""
    known = signature(processor.post_process_semantic_segmentation).parameters
    reads_labels = hasattr(processor, "check_readable") or not hasattr(processor, "tokenizer")
    code = sys.modules[processor.post_process_semantic_segmentation.__module__]
    has_gap = hasattr(getattr(code, "SemanticMap", None), "gap")  # the curve of seen and unseen classes needs it
    if not {"return_scores", "is_seen"} <= known.keys() or not reads_labels or not has_gap:
        raise InputError(OLDER_CODE.format(path))


def stamp_of(args: EvalArgs, loaded: Loaded) -> Result:
    """The keys of the result that are known before the pass. Evaluations with equal stamps give equal numbers."""
    label_space, config = loaded.records.label_space, loaded.model.config
    unseen = [name for name in loaded.candidates.names if name in label_space.unseen]
    things = label_space.things
    if things is not None:
        things = [name for name in loaded.candidates.names if name in things]
    files = (args.text_embeds, args.seen_bias, args.ensemble_weight)
    given = {name: file_sha256(Path(name)) for name in files if name is not None and Path(name).is_file()}
    if args.encoder is not None:
        digests = {args.encoder: weights_sha256, f"settings of {args.encoder}": settings_sha256}
        given |= {name: digest(args.encoder) for name, digest in digests.items()}
    return {
        "setting": args.setting,
        "model": args.model,
        "dataset": dataset_name(args.dataset),
        "split": args.split,
        "split_sha256": hashlib.sha256("\n".join(loaded.image_ids).encode()).hexdigest(),
        "split_images": len(loaded.records),
        "label_space": args.label_space or OWN_SPACE,
        "label_space_sha256": label_space.sha256,
        "checkpoint_sha256": weights_sha256(args.model),
        "settings_sha256": settings_sha256(args.model),
        "code_sha256": code_sha256(args.model, args.trust_remote_code),
        "given_sha256": given,
        "seen": [name for name in loaded.candidates.names if name not in unseen],
        "unseen": unseen,
        "things": things,
        "without": args.without,
        "trained_on_masks_of": config.seen_class_names,
        "unseen_labels_in_training": config.unseen_labels,
        # Older code beside a checkpoint (--trust_remote_code) does not know these two.
        "image_label_precision": getattr(config, "image_label_precision", None),
        "image_label_recall": getattr(config, "image_label_recall", None),
        "absent": args.absent,
        "seed": args.seed,
        "settings": deciding_flags(args),
        "versions": versions(),
    }


def predictor_of(
    loaded: Loaded, text_embeds: str | None, ensemble: Ensemble, device: torch.device
) -> tuple[Predictor, list[str]]:
    """The model with the vectors of the candidates, and the prompts behind them. text_embeds: as in EvalArgs."""
    model, candidates, names = loaded.model.to(device), loaded.candidates, loaded.records.label_space.class_names
    vectors, prompts = class_vectors(model, loaded.processor, names, text_embeds, TextCache())
    vectors = vectors[candidates.index].to(device)
    options = (ensemble.view, ensemble.weight.value, loaded.scorer)
    return Predictor(model, loaded.processor, vectors, candidates.is_trained, *options), prompts


def count_all(
    args: EvalArgs, loaded: Loaded, predictor: Predictor, seen_bias: float, accelerator: Accelerator
) -> PassCounts | None:
    """The counts of all processes; None on processes other than the main one. Each process takes every Nth image."""
    candidates, num_images = loaded.candidates, len(loaded.image_ids)
    counts = new_counts(
        candidates.names, candidates.is_seen, candidates.ignored, args.setting, seen_bias, args.calibration
    )
    mine = range(accelerator.process_index, num_images, accelerator.num_processes)
    items = Items(loaded.records, mine, candidates, loaded.processor)
    drawings = None
    if args.pictures is not None:
        spread = np.linspace(0, num_images - 1, min(args.num_pictures, num_images)).astype(int)
        drawings = Drawings(Path(args.pictures), {*spread.tolist()})
    title, quiet = printable(dataset_name(args.dataset)), not accelerator.is_local_main_process
    with tqdm(total=len(items), desc=title, unit="image", mininterval=1, disable=quiet) as bar:
        count_images(counts, items, predictor, seen_bias, args.num_workers, drawings, bar)
    total, *others = gather_object([counts])
    if not accelerator.is_main_process:
        return None
    for part in others:
        total.merge(part)
    return total


def main() -> None:
    args, _ = read_arguments(EvalArgs)
    accelerator = Accelerator()
    if args.suite is not None:
        text = run_suite(args, evaluate, accelerator)
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
