"""How a run ends before its last step: after SIGTERM, when it has saved, or because a number is not finite.

Often only one of several processes has the reason. `agree` stops all of them at the same step. `all_refuse` ends all
of them when the main process refuses something before the first step.
"""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from configuration_zs3 import shortened
from zs3.command_line import InputError

EXIT_CODE = 128 + signal.SIGTERM  # a shell's exit code for a process that SIGTERM ended


class Termination:
    """Within the block the first SIGTERM only sets `received`. The second one ends the process at once."""

    def __enter__(self) -> "Termination":
        self.received = False
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self.before)


def outlive_first_sigterm(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a worker ignores its first SIGTERM, and a second one ends it.

    torchrun and batch systems send SIGTERM to the workers too, and the run still needs them to finish its step.
    DataLoader sends the second one to workers that still run at the end.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def all_refuse(accelerator: Accelerator) -> Iterator[None]:
    """An InputError of the main process within the block is raised by all processes. All enter the block together."""
    refusal = [None]
    try:
        yield
    except InputError as error:
        refusal = [str(error)]
    (text,) = broadcast_object_list(refusal)
    if text is not None:
        raise InputError(text)


def agree(accelerator: Accelerator, terminated: bool, fault: str | None) -> bool:
    """Whether any process got SIGTERM. If any process has a fault, all raise InputError.

    All processes call it together: once a step, before weights change, and before weights are saved.
    """
    faults = [fault]
    if accelerator.num_processes > 1:
        mine = torch.tensor([terminated, fault is not None], dtype=torch.int32, device=accelerator.device)
        terminated, faulty = (bool(count) for count in accelerator.reduce(mine, "sum"))
        faults = gather_object(faults) if faulty else []
    found = list(dict.fromkeys(text for text in faults if text is not None))
    if found:
        # All raise the same error: the first process that ends stops the others, maybe before they print theirs.
        raise InputError("; ".join(found))
    return terminated


def loss_fault(loss: torch.Tensor, step: int, image_ids: list[str]) -> str | None:
    if bool(torch.isfinite(loss)):
        return None
    return f"the loss is {float(loss.detach())} at step {step}, images {shortened(image_ids)}: lower --learning_rate"


def check_grad_norm(accelerator: Accelerator, grad_norm: float, step: int, image_ids: list[str]) -> None:
    """Refuses gradients that are not finite. All processes call it together, with the images of their part."""
    if accelerator.scaler is None and not math.isfinite(grad_norm):  # with fp16 the scaler skips such a step
        image_ids = gather_object(image_ids)
        raise InputError(
            f"the gradients' norm is {grad_norm} at step {step} although the loss is finite, "
            f"images {shortened(image_ids)}: lower --learning_rate"
        )
