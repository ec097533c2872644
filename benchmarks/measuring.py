"""Shared code of the benchmarks: flags, steps that take turns, memory peaks, fresh processes, tables, result files.

The other scripts of this folder import this module. It is not a command. The first lines of a script say how to run it.
"""

import ctypes
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from zs3.command_line import Arguments, Count, InputError, OutputFile, flag
from zs3.files import write_report
from zs3.tables import markdown_table

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@dataclass
class BenchmarkArguments(Arguments):
    """The flag that every benchmark has."""

    output: OutputFile | None = flag(None, "Result file; the printed tables are written beside it as .md.")


@dataclass
class DeviceArguments(BenchmarkArguments):
    """The flags of a benchmark that measures steps on a device."""

    device: Literal["auto", "cpu", "cuda"] = flag("auto", "'cpu', 'cuda', or 'auto' (CUDA if it is available).")
    rounds: Count = flag(7, "Rounds; the first is not counted.")


def device_named(name: str) -> torch.device:
    """The device that --device names; 'auto' is CUDA if it is available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def script() -> str:
    """The name of the module that was started."""
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def in_fresh_process(function: Callable, *args: object, start: str = "spawn"):
    """Calls the function in a new process: memory that an earlier measurement left behind would change its times.

    start: "forkserver" saves seconds for each process. It forks a process that has imported the script and computed
    nothing, so the processes share memory.
    """
    context = get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([script()])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def check_close(difference: float, most: float, what: str) -> None:
    """Refuses to compare the speed of two ways whose results differ. `most` is the largest difference allowed."""
    if not difference <= most:  # NaN is refused too
        raise InputError(f"{what} differ by {difference:.1e}: their speed cannot be compared")


# ---- time --------------------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    """Returns when the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], device: torch.device = CPU) -> float:
    wait_for(device)
    start = time.perf_counter()
    step()
    wait_for(device)
    return time.perf_counter() - start


def timed(function: Callable) -> tuple[float, object]:
    """The seconds of one call, and its result."""
    results = []
    return seconds_of(lambda: results.append(function())), results[0]


def take_turns(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device = CPU, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each step in each round. A round runs every step once; the first round is not counted.

    limit: no round starts after this many seconds, but at least one round is counted.
    """
    seconds = {name: [] for name in steps}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        if number > 1 and sum(map(sum, seconds.values())) >= limit:
            break
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
    return {name: values[1:] for name, values in seconds.items()}


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def compared(
    steps: dict[str, Callable[[], object]], seconds: dict[str, list[float]], peer: str, device: torch.device
) -> dict[str, dict[str, float]]:
    """Figures of each step; times_faster and peak_share compare it with the peer. seconds: by step and round."""
    peaks = {name: allocated_peak(step, device) for name, step in steps.items()}
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "times_faster": median_ratio(seconds[peer], seconds[name]),
            "peak_mib": peaks[name],
            "peak_share": peaks[name] / peaks[peer],
        }
        for name in steps
    }


# ---- memory ------------------------------------------------------------------------------------------------


def allocated_peak(step: Callable[[], object], device: torch.device) -> float:
    """The peak of the memory that torch holds in a step, less the memory that it held before, MiB."""
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def resident_mib(name: str = "VmRSS") -> float:
    """Resident memory of this process, MiB; Linux. Freed memory is returned first. name: "VmHWM" gives the peak."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def resident_peak(step: Callable[[], object]) -> float:
    """The peak of the resident memory in a step, less the resident memory before, MiB; Linux."""
    before = resident_mib()  # returns freed memory: a step that reuses it would look too small
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory of now
    step()
    return resident_mib("VmHWM") - before


# ---- the result --------------------------------------------------------------------------------------------


def machine_name(device: torch.device = CPU) -> str:
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name()


def code_commit() -> str | None:
    """The checkout's commit, with "changed" where a Python file differs from it; None outside a checkout."""
    answers = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", "*.py"]):
        try:
            done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        if done.returncode:
            return None
        answers.append(done.stdout.strip())
    return answers[0] + (", changed" if answers[1] else "")


def head(device: torch.device = CPU) -> dict[str, str | None]:
    """The first fields of a result: the command, the commit, the machine, the version of torch."""
    command = shlex.join(["python", "-m", script(), *sys.argv[1:]])
    return {"command": command, "commit": code_commit(), "machine": machine_name(device), "torch": torch.__version__}


def table(titles: str, cells: str, rows: list[dict]) -> str:
    """A Markdown table. titles: "backbone | seconds", cells: "{backbone} | {seconds:.3f}". A missing value is "-"."""

    def cell(form: str, row: dict) -> str:
        try:
            return form.format_map(row)
        except KeyError:
            return "-"

    return table_of(titles.split(" | "), [[cell(form, row) for form in cells.split(" | ")] for row in rows])


def table_of(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of rows whose cells are texts."""
    return "\n".join(markdown_table(titles, rows)) + "\n"


def publish(output: str | None, result: dict, text: str) -> None:
    """Prints the text. If an output is given, writes the result and the text there."""
    print(text, end="")
    if output is not None:
        write_report(Path(output), result, text)
