"""The images that each process reads for each step, from a split by index or from a stream."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from zs3.command_line import InputError
from zs3.data.contents import Row
from zs3.data.records import read_rows
from zs3.data.samples import Sample, SegmentationDataset

if TYPE_CHECKING:
    import datasets


class BatchParts(NamedTuple):
    """A step's batch in equal parts. Each process takes its micro-batches one after the other."""

    processes: int
    micro_batches: int  # of one process
    images: int  # of one micro-batch


def cut_batch(batch_size: int, num_processes: int, device_batch_size: int | None = None) -> BatchParts:
    """The fewest micro-batches of at most device_batch_size images each. None: one micro-batch for each process."""
    share, rest = divmod(batch_size, num_processes)
    if rest or not share:
        sizes = [str(n * num_processes) for n in (share, share + 1) if n]
        fewer = next(n for n in range(num_processes - 1, 0, -1) if batch_size % n == 0)
        raise InputError(
            f"--batch_size {batch_size} cannot be shared equally by {num_processes} processes: "
            f"give --batch_size {' or '.join(sizes)}, or start {fewer} process{'es' if fewer > 1 else ''}"
        )
    at_once = device_batch_size or share
    micro_batches = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= at_once)
    return BatchParts(num_processes, micro_batches, share // micro_batches)


@dataclass(eq=False, repr=False)
class StepSampler(Sampler[list[tuple[int, int]]]):
    """The samples of one process, step after step: a DataLoader's `batch_sampler`.

    All processes use one endless sequence: the permutations of all epochs, one after the other. A permutation depends
    on seed and epoch alone. Each step takes the next batch of this sequence. The batch is cut into its parts in order:
    process by process, and within a process micro-batch by micro-batch. So the images of a step depend neither on the
    number of processes nor on a restart. `accelerator.prepare` would cut the batches of the DataLoader a second time.

    steps: the steps to make; a run that resumes at step 7 gives range(7, max_steps).
    """

    num_samples: int
    parts: BatchParts
    steps: range
    process_index: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.steps) * self.parts.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        num_processes, micro_batches, images = self.parts
        epoch, order = None, None
        for step, micro_batch in itertools.product(self.steps, range(micro_batches)):
            start = ((step * num_processes + self.process_index) * micro_batches + micro_batch) * images
            samples = []
            for position in range(start, start + images):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                samples.append((epoch, int(order[position % self.num_samples])))
            yield samples


@dataclass(eq=False, repr=False)
class StreamedBatches(IterableDataset):
    """The micro-batches of one process from a stream, without an end. `loader` reads them.

    Each process gets some of the shards, and each worker of its DataLoader some of these. A worker reads its shards
    again and again, each epoch in another order, and shuffles the rows in a buffer. So the images of a step depend on
    the numbers of processes and workers, unlike with `StepSampler`. A restart continues with the same images.
    """

    dataset: SegmentationDataset  # of a StreamedSplit
    batch_size: int
    buffer_size: int  # undecoded rows in the shuffle buffer of a worker
    num_processes: int = 1
    process_index: int = 0
    start: int = 0  # micro-batches of this process to skip, a multiple of the number of workers

    def loader(self, num_workers: int, start: int = 0, **options: Any) -> Iterator[dict[str, Any]]:
        """The micro-batches from any `start` on. There are never more workers than shards.

        options: of the DataLoader.
        """
        workers = min(num_workers, self._table(0).num_shards)
        odd = start % max(workers, 1)  # the workers take turns, the first one begins
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
        """(epoch, row), epoch after epoch. Within a worker, datasets itself takes the worker's shards."""
        for epoch in itertools.count():
            row = None
            for row in read_rows(self._table(epoch)):
                yield epoch, row
            if row is None:
                raise InputError("a worker of the stream got no picture: use fewer processes or workers than shards")

    def _table(self, epoch: int) -> "datasets.IterableDataset":
        """The rows of this process in an epoch. datasets' own set_epoch is not used, because all workers share it."""
        from datasets.distributed import split_dataset_by_node

        order = np.random.default_rng((self.dataset.seed, epoch))
        # One shard at a time is enough: the converter has already shuffled the rows of a training split.
        options = {"buffer_size": self.buffer_size, "max_buffer_input_shards": 1}
        table = self.dataset.records.table.shuffle(generator=order, **options)
        return split_dataset_by_node(table, rank=self.process_index, world_size=self.num_processes)


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples -> the model's batch: pixel_values (B,3,S,S), pixel_mask (B,S,S), labels (B,S,S), image_labels (B,C).

    Two more are not for the model: `image_ids`, a list of B for messages, and `label_counts` (3,), see `LabelCounts`.
    """
    names = ("pixel_values", "pixel_mask", "labels", "image_labels")
    batch = {name: torch.stack([s[name] for s in samples]) for name in names}
    batch["image_ids"] = [sample["image_id"] for sample in samples]
    batch["label_counts"] = torch.stack([sample["label_counts"] for sample in samples]).sum(dim=0)
    return batch
