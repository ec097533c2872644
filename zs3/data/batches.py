"""Which pictures a process reads for each step, from a table or from a stream."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from zs3.command_line import InputError
from zs3.data.contents import Row
from zs3.data.records import read_rows
from zs3.data.samples import Sample, SegmentationDataset

if TYPE_CHECKING:
    import datasets


def part_size(total_batch_size: int, num_processes: int, micro_batches: int) -> int:
    """Samples of one micro-batch of one process."""
    parts = num_processes * micro_batches
    if total_batch_size < 1 or total_batch_size % parts:
        raise InputError(
            f"total batch size {total_batch_size} cannot be cut into {parts} equal parts "
            f"({num_processes} processes x {micro_batches} micro-batches): change one of them"
        )
    return total_batch_size // parts


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The samples of this process, step after step: a DataLoader's `batch_sampler`.

    All processes walk through one endless sequence, the epochs' permutations (keyed by seed and epoch) laid end
    to end; step t takes the total_batch_size samples from t * total_batch_size on. They are cut into equal
    parts, in order: process by process, and within a process micro-batch by micro-batch, each one item of the
    iteration. So what a step trains on depends neither on the number of processes nor on a restart at
    `start_step`. The DataLoader must not be cut again (no `accelerator.prepare`).

    micro_batches: parts of a step that one process takes one after the other (gradient accumulation).
    """

    def __init__(
        self,
        num_samples: int,
        total_batch_size: int,
        max_steps: int,
        *,
        start_step: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        micro_batches: int = 1,
        seed: int = 0,
    ):
        self.num_samples = num_samples
        self.total_batch_size = total_batch_size
        self.steps = range(start_step, max_steps)
        self.first_part = process_index * micro_batches
        self.micro_batches = micro_batches
        self.part_size = part_size(total_batch_size, num_processes, micro_batches)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = None, None
        for step in self.steps:
            for part in range(self.first_part, self.first_part + self.micro_batches):
                start = step * self.total_batch_size + part * self.part_size
                samples = []
                for position in range(start, start + self.part_size):
                    if position // self.num_samples != epoch:
                        epoch = position // self.num_samples
                        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                    samples.append((epoch, int(order[position % self.num_samples])))
                yield samples


class StreamedBatches(IterableDataset):
    """The micro-batches of this process from a stream, without an end: the dataset of its own `loader`.

    Shards are dealt out to the processes, and within one to the DataLoader's workers; every reader goes through its own
    again and again, each epoch in another order, rows shuffled in a buffer. So a step's pictures depend on the numbers
    of processes and of workers, other than with `StepSampler`; a restart at `start` goes on with the same ones.

    dataset: its records are a StreamedSplit.
    buffer_size: rows, not decoded, that a reader holds to shuffle among.
    start: micro-batches of this process to leave out, a multiple of the number of workers.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        batch_size: int,
        buffer_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        start: int = 0,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.node = {"rank": process_index, "world_size": num_processes}
        self.start = start

    def loader(self, num_workers: int, start: int = 0, **options: Any) -> Iterator[dict[str, Any]]:
        """The micro-batches from any `start` on, read by at most so many workers as there are shards for.

        options: of the DataLoader.
        """
        workers = min(num_workers, self._table(0).num_shards)
        odd = start % max(workers, 1)  # workers take turns, from the first one on
        self.start = start - odd
        return itertools.islice(DataLoader(self, batch_size=None, num_workers=workers, **options), odd, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        passed = self.start // (worker.num_workers if worker else 1) * self.batch_size
        rows = itertools.islice(self._rows(), passed, None)
        while True:
            batch = itertools.islice(rows, self.batch_size)
            yield collate([self.dataset.sample(self.dataset.records.stored(row), epoch) for epoch, row in batch])

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """(epoch, row) of this reader, epoch after epoch; in a worker, datasets itself takes the worker's shards."""
        for epoch in itertools.count():
            row = None
            for row in read_rows(self._table(epoch)):
                yield epoch, row
            if row is None:
                raise InputError("a reader of the stream got no picture: take fewer processes or workers than shards")

    def _table(self, epoch: int) -> "datasets.IterableDataset":
        """The rows of this process in an epoch. (All workers share the epoch that a datasets stream has: not used.)"""
        from datasets.distributed import split_dataset_by_node

        order = np.random.default_rng((self.dataset.seed, epoch))
        # One shard at a time: the rows of a converted training split are mixed already.
        options = {"buffer_size": self.buffer_size, "max_buffer_input_shards": 1}
        return split_dataset_by_node(self.dataset.records.table.shuffle(generator=order, **options), **self.node)


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples -> the model's batch: pixel_values (B,3,S,S), pixel_mask (B,S,S), labels (B,S,S), image_labels (B,C).

    `image_ids`, a list of B, is for the reader.
    """
    names = ("pixel_values", "pixel_mask", "labels", "image_labels")
    batch = {name: torch.stack([s[name] for s in samples]) for name in names}
    batch["image_ids"] = [sample["image_id"] for sample in samples]
    return batch
