"""Measurements of a run's steps: mean losses, time and memory. They give a forecast of the time left."""

import sys
import time
from collections.abc import Iterable, Iterator

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from outputs_zs3 import Zs3Output

FIRST_MEASURED, LAST_MEASURED = 2, 6  # steps since the start; the first one warms up


class StepMean:
    """The mean of a step's values over its micro-batches and over all processes."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.micro_batches: list[Tensor] = []

    def add(self, outputs: Zs3Output) -> None:
        values = [outputs.loss, *outputs.loss_terms.values(), outputs.same_label_rate]
        self.names = ["loss", *(f"loss_{name}" for name in outputs.loss_terms), "same_label_rate"]
        self.micro_batches.append(torch.stack([value.detach().float() for value in values]))

    def values(self) -> dict[str, float]:
        """All processes call it together."""
        parts = self.accelerator.gather(torch.stack(self.micro_batches))  # (processes x micro-batches, values)
        mean = parts.nanmean(0)  # a micro-batch without masks has no same_label_rate
        return dict(zip(self.names, mean.tolist(), strict=True))


class Pace:
    """The wall time since a start of a run, and the part of it that is spent waiting for data."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.started = time.perf_counter()
        self.waited = 0.0  # seconds, for batches
        self.last_asked = (self.started, 0.0)  # time and `waited` at the last `data_wait`
        self.steps = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def timed(self, batches: Iterable[dict]) -> Iterator[dict]:
        """Yields the batches and measures how long the caller waits for them."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def data_wait(self) -> float:
        """The share of the time since the last call, in [0, 1], in which training waited for data.

        It is the largest share of all processes, which call it together.
        """
        (then, waited), now = self.last_asked, time.perf_counter()
        self.last_asked = (now, self.waited)
        return self._largest((self.waited - waited) / max(now - then, 1e-9))

    def forecast(self, step: int, max_steps: int) -> str | None:
        """A line about the time that is left: once, after LAST_MEASURED steps. Else None.

        All processes call it together, after every step.
        """
        self.steps += 1
        if self.steps == FIRST_MEASURED - 1:
            self.measured_from = time.perf_counter()
        if self.steps != LAST_MEASURED or step >= max_steps:
            return None
        a_step = (time.perf_counter() - self.measured_from) / (LAST_MEASURED - FIRST_MEASURED + 1)
        memory = self._largest(peak_memory(self.accelerator.device) / 2**30)
        left = duration(a_step * (max_steps - step))
        return f"expected  {left} to step {max_steps}, peak memory so far {memory:.1f} GiB a process"

    def _largest(self, value: float) -> float:
        values = torch.tensor([value], dtype=torch.float32, device=self.accelerator.device)
        return float(self.accelerator.gather(values).max())


def peak_memory(device: torch.device) -> int:
    """The peak in bytes: of the tensors on a CUDA device; on the CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows does not have it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """A time as text: "40 s", "12 min", "3 h 12 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
