"""What ends a training run before its last step: SIGTERM, which saves first, and numbers that are not finite.

With several processes one of them alone may meet it; `agree` makes all of them stop at the same step. What the main
process refuses before the first step ends all of them by `all_refuse`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from zs3.command_line import InputError

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Termination:
    """Within the block SIGTERM is noted, not obeyed; a second one ends the process at once."""

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
    """A DataLoader's `worker_init_fn`. A signal to the whole process group, which is what torchrun and batch systems
    send, must not take the workers away from the step that is to be finished. The second one ends a worker: DataLoader
    itself ends with it those that are left over."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def all_refuse(accelerator: Accelerator) -> Iterator[None]:
    """The InputError that the main process raises within the block is raised by all. Entered by all together."""
    refusal = [None]
    try:
        yield
    except InputError as error:
        refusal = [str(error)]
    (text,) = broadcast_object_list(refusal)
    if text is not None:
        raise InputError(text)


def agree(accelerator: Accelerator, terminated: bool, fault: str | None) -> bool:
    """Whether any process got SIGTERM. Called by all together: once a step, before a weight changes, and before weights
    are saved.

    fault: what is wrong with this process's part of the step. If any process has one, all raise InputError with it.
    """
    faults = [fault]
    if accelerator.num_processes > 1:
        mine = torch.tensor([terminated, fault is not None], dtype=torch.int32, device=accelerator.device)
        terminated, faulty = (bool(count) for count in accelerator.reduce(mine, "sum"))
        faults = gather_object(faults) if faulty else []
    told = list(dict.fromkeys(text for text in faults if text is not None))
    if told:
        # The same words from all: who ends first has the others stopped, perhaps before they could say theirs.
        raise InputError("; ".join(told))
    return terminated
