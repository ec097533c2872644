"""What a training run is about to do: how its batch is cut, what it says before it starts, when it will be done."""

import os
import resource
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import nn

from zs3.command_line import InputError
from zs3.data import SegmentationDataset
from zs3.label_space import LabelSpace

if TYPE_CHECKING:
    from train import TrainArgs

FIRST_MEASURED, LAST_MEASURED = 2, 6  # steps of a start; its first one warms up


class BatchParts(NamedTuple):
    """A step's batch in equal parts: each process takes its micro-batches one after the other."""

    processes: int
    micro_batches: int
    images: int  # of one micro-batch


def cut_batch(batch_size: int, num_processes: int, device_batch_size: int | None) -> BatchParts:
    """The fewest micro-batches of at most device_batch_size images each; None: one a process.

    Raises InputError where the processes cannot have equal shares.
    """
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


def check_trackers(names: list[str]) -> None:
    """accelerate leaves out, without a word, what is not installed."""
    known = sorted(set(LoggerType.list()) - {"all"})
    for name in names:
        if name not in known:
            raise InputError(f"--trackers {name}: accelerate knows {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            package = "'zs3[tensorboard]'" if name == "tensorboard" else name.replace("_", "-")
            raise InputError(f"--trackers {name} is not installed: pip install {package}, or leave it out")


def describe(
    args: "TrainArgs",
    label_space: LabelSpace,
    dataset: SegmentationDataset,
    model: nn.Module,
    parts: BatchParts,
    device: torch.device,
) -> str:
    """What is about to happen, for the reader of the log."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    unseen = {"none": "not used", "ground_truth": "GROUND-TRUTH image labels"}.get(
        args.unseen_labels, f"pseudo labels of {args.unseen_labels}"
    )
    told = f"{len(label_space.unseen)} names, no masks, {unseen}"
    if args.setting == "supervised":
        told = "none: the MASKS of all classes are trained on, and no zero-shot result can be claimed"
    count = "streamed" if args.streaming else f"{len(dataset)} images"
    nouns = f", {len(dataset.class_names)} names with nouns of {args.caption_nouns}" if args.caption_nouns else ""
    precision = "float32" if args.mixed_precision == "no" else f"{args.mixed_precision} autocast, losses in float32"
    norms = {"frozen": "frozen", "batch": "of each process's images", "sync": "of all processes' images"}
    remade = ", activations made anew for the gradient" if args.activation_checkpointing else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    trackers = f", also to {', '.join(args.trackers)} (trackers)" if args.trackers else ""
    lines = [
        f"data      {args.dataset} ({args.split}): {count}",
        f"setting   {args.setting}, label space {args.label_space or args.dataset}",
        f"seen      {len(label_space.seen)} names with masks{nouns}",
        *names_lines(label_space.seen),
        f"unseen    {told}",
        *names_lines(label_space.unseen),
        f"model     {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen",
        f"losses    class {model.config.class_loss}, mask {model.config.mask_loss}, matching {model.config.matching}",
        f"batch     {args.batch_size} images: processes x micro-batches x images at once = "
        f"{parts.processes} x {parts.micro_batches} x {parts.images}",
        f"steps     {args.max_steps}",
        f"precision {precision}{remade}",
        f"norms     statistics of the backbone's batch norms are {norms[args.backbone_norm]}",
        f"device    {where}",
        f"output    {args.output_dir}: checkpoints every {args.checkpointing_steps} steps (the last "
        f"{args.checkpoints_kept} stay),",
        f"          metrics.jsonl every {args.logging_steps}{trackers}, final at the end, then all_results.json",
    ]
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched_with not in ("no", args.mixed_precision):
        lines.append(
            f"note      accelerate was given mixed precision {launched_with}, which does not count here: the flag "
            "--mixed_precision behind train.py does"
        )
    late = [step for step in args.lr_milestones if step >= args.max_steps]
    if args.lr_schedule == "multistep" and late:
        lines.append(f"note      learning rate steps {late} lie beyond the end and are ignored")
    from_scratch = args.init_from is None and args.mask2former is None and args.backbone is None
    if from_scratch and args.backbone_norm == "frozen":
        lines.append("note      the backbone starts from random weights: it learns better with --backbone_norm batch")
    return "\n".join(lines)


def names_lines(names: list[str]) -> list[str]:
    """Lines of names, none of them broken."""
    whole = ", ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
    lines = textwrap.wrap(whole, width=110, break_on_hyphens=False)
    return [" " * 10 + line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


class Pace:
    """Where the wall time of one start of a run goes, from its making on."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.started = time.perf_counter()
        self.waited = 0.0  # seconds, for batches
        self.told = (self.started, 0.0)  # when data_wait was last asked, and `waited` then
        self.steps = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def timed(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The batches; what the caller waits for them is measured."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def data_wait(self) -> float:
        """The share of the wall time, since this was last asked, that the training waited for data: in [0, 1].

        That of the process which waited longest; all must ask together.
        """
        (then, waited), now = self.told, time.perf_counter()
        self.told = (now, self.waited)
        return self._largest((self.waited - waited) / max(now - then, 1e-9))

    def forecast(self, step: int, max_steps: int) -> str | None:
        """To be asked after every step, by all processes: once, after a few, when the run will be done; else None."""
        self.steps += 1
        if self.steps == FIRST_MEASURED - 1:
            self.measured_from = time.perf_counter()
        if self.steps != LAST_MEASURED:
            return None
        a_step = (time.perf_counter() - self.measured_from) / (LAST_MEASURED - FIRST_MEASURED + 1)
        memory = self._largest(peak_memory(self.accelerator.device) / 2**30)
        left = duration(a_step * (max_steps - step))
        return f"expected  {left} to step {max_steps}, peak memory so far {memory:.1f} GiB a process"

    def _largest(self, value: float) -> float:
        values = torch.tensor([value], dtype=torch.float32, device=self.accelerator.device)
        return float(self.accelerator.gather(values).max())


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a CUDA device, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """As people say it: "40 s", "12 min", "3 h 12 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
