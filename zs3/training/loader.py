"""The data of a run: its dataset with image labels, and the loader that gives each process its part of each step."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from configuration_zs3 import Zs3Config
from losses_zs3 import count_targets, mask_ids
from processing_zs3 import Zs3ImageProcessor
from zs3.data.augmentation import Augmentation
from zs3.data.batches import StepSampler, StreamedBatches, collate
from zs3.data.caption_labels import CaptionLabels, load_caption_nouns
from zs3.data.image_labels import GroundTruthLabels, PseudoLabels, check_scored_pictures
from zs3.data.records import load_split, stream_split
from zs3.data.samples import SegmentationDataset
from zs3.label_space import LabelSpace
from zs3.training.arguments import TrainArgs
from zs3.training.processes import BatchParts
from zs3.training.stopping import outlive_first_sigterm


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
