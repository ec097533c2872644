"""The data of a run: its dataset with image labels, and the loader that gives each process its part of each step."""

import itertools
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from configuration_zs3 import Zs3Config
from losses_zs3 import count_targets, mask_ids
from processing_zs3 import Zs3ImageProcessor
from zs3.command_line import InputError
from zs3.data.augmentation import Augmentation
from zs3.data.batches import BatchParts, StepSampler, StreamedBatches, collate
from zs3.data.caption_labels import CaptionLabels, load_caption_nouns
from zs3.data.image_labels import GroundTruthLabels, ImageLabels, PseudoLabels, check_scored_pictures
from zs3.data.records import Split, StreamedSplit, load_split, stream_split
from zs3.data.samples import SegmentationDataset
from zs3.label_space import FoundIds, LabelSpace
from zs3.training.arguments import TrainArgs
from zs3.training.stopping import outlive_first_sigterm

MOST_LOOKED_AT = 100  # label maps, by `check_learnable`


def make_dataset(
    args: TrainArgs, label_space: LabelSpace, image_processor: Zs3ImageProcessor, config: Zs3Config
) -> SegmentationDataset:
    records = (stream_split if args.streaming else load_split)(args.dataset, args.split, label_space)
    return SegmentationDataset(
        records,
        label_space,
        Augmentation(**{field.name: getattr(args, field.name) for field in fields(Augmentation)}),
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
        image_labels=make_image_labels(args, label_space, records, config),
        seed=args.seed,
    )


def make_image_labels(
    args: TrainArgs, label_space: LabelSpace, records: Split | StreamedSplit, config: Zs3Config
) -> ImageLabels | None:
    """The source of image labels. None: training gets no image labels of unseen classes."""
    image_ids = None if args.streaming else records.image_ids
    if args.caption_nouns is not None:
        nouns = load_caption_nouns(args.caption_nouns, label_space)
        dropped_as = {"unknown": -1, "negative": 0}[args.dropped_words]
        return CaptionLabels(nouns, image_ids, config.word_drop_probability, dropped_as)
    if args.unseen_labels == "ground_truth":
        return GroundTruthLabels(label_space)
    if args.supervision != "transductive":
        return None
    threshold, unknown_above = config.pseudo_label_threshold, args.pseudo_label_unknown_above
    labels = PseudoLabels(args.unseen_labels, label_space, image_ids, threshold, unknown_above)
    if not args.streaming:
        check_scored_pictures(Path(args.unseen_labels), records)
    return labels


def check_learnable(records: Split | StreamedSplit, label_space: LabelSpace) -> None:
    """Refuses data without a seen class. Mostly the first label map has one, and no other is read.

    If the first MOST_LOOKED_AT maps have none, a split is read on until a map has a seen class. A stream is read no
    further.
    """
    if not label_space.seen:
        raise InputError("all classes are unseen, so no mask may be trained on: leave some out of the unseen names")
    found, streamed = FoundIds(label_space), isinstance(records, StreamedSplit)
    total = None if streamed else len(records)
    for ids, has_ignored in tqdm(records.ids(), desc="first labels", total=total, unit="map", delay=5, mininterval=1):
        found.add(ids, has_ignored)
        if found.enough or found.num_maps >= MOST_LOOKED_AT and (found.has_seen or streamed):
            break
    fault = found.fault()
    if fault is not None and streamed and found.num_maps >= MOST_LOOKED_AT:
        print(f"warning: {fault}")
    elif fault is not None:  # all maps were read
        raise InputError(fault)


def make_loader(
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    parts: BatchParts,
    steps: range,
    *,
    num_workers: int,
    shuffle_buffer: int,
) -> Iterator[dict]:
    """The micro-batches of this process for these steps. accelerate's `prepare` would cut them a second time.

    shuffle_buffer: number of pictures; only a stream uses it.
    """
    options = {
        "pin_memory": accelerator.device.type == "cuda",
        "generator": torch.Generator(),  # the loader must not change the global state that a resume restores
        "worker_init_fn": outlive_first_sigterm,
    }
    process = accelerator.process_index
    if not isinstance(dataset.records, StreamedSplit):
        sampler = StepSampler(len(dataset), parts, steps, process, dataset.seed)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, **options)
    batches = StreamedBatches(dataset, parts.images, shuffle_buffer, parts.processes, process)
    loader = batches.loader(num_workers, steps.start * parts.micro_batches, **options)
    return itertools.islice(loader, len(steps) * parts.micro_batches)


def with_counts(batches: Iterator[dict], micro_batches: int, config: Zs3Config) -> Iterator[dict]:
    """The micro-batches. If a step has several, each gets the target counts of the whole step for its losses."""
    if micro_batches == 1:
        yield from batches
        return
    while step := list(itertools.islice(batches, micro_batches)):
        targets = [(mask_ids(batch["labels"]), batch["image_labels"]) for batch in step]
        counts = [count_targets(*target, config.num_queries, config.matching) for target in targets]
        for batch in step:
            yield {**batch, "target_counts": torch.stack(counts).mean(dim=0)}
