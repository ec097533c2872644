"""Runs the jobs of an ablation in parallel, each after the jobs that it needs."""

import json
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from configuration_zs3 import beginning
from zs3.ablation.jobs import Job
from zs3.command_line import InputError
from zs3.evaluation.results import read_result
from zs3.files import append_line
from zs3.typed_json import Amount, read_json_lines

POLL_SECONDS = 0.1


def has_ended(folder: Path) -> bool:
    """Whether this training has a model or results."""
    return (folder / "final").exists() or any(folder.glob("gzs3_*.json"))


# ---- the runner --------------------------------------------------------------------------------------------


class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float  # of time.monotonic


def jobs_to_run(jobs: list[Job]) -> list[Job]:
    """The unfinished evaluations, and the unfinished jobs that they need.

    jobs: each one after the jobs that it waits for.
    """
    wanted = {job.name for job in jobs} - {name for job in jobs for name in job.after}
    planned = []
    for job in reversed(jobs):
        if job.name in wanted and not job.is_done():
            planned.append(job)
            wanted |= set(job.after)
    return planned[::-1]


def run_jobs(jobs: list[Job], num_jobs: int, times: Path) -> None:
    """Runs the unfinished jobs in order, at most `num_jobs` at once, each after the jobs that it waits for.

    A failed job ends the others. The same command resumes them from their last checkpoint.
    times: JSON lines. Each job, also a stopped one, adds a line with its seconds.
    """
    waiting = {job.name: job for job in jobs}
    running: dict[str, Running] = {}
    with tqdm(total=len(jobs), unit="job", disable=not jobs) as bar:
        try:
            while waiting or running:
                before = list(running)
                for name, one in list(running.items()):
                    if one.process.poll() is not None:
                        del running[name]
                        note_time(times, one)
                        check_ended(one.job, one.process.returncode)
                        bar.update()
                for name, job in list(waiting.items()):
                    if len(running) == num_jobs:
                        break
                    if any(other in waiting or other in running for other in job.after):
                        continue
                    if job.is_done():
                        bar.update()
                    else:
                        running[name] = Running(job, start(job), time.monotonic())
                    del waiting[name]
                if list(running) != before:
                    bar.set_postfix_str(", ".join(running))
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for one in running.values():
                one.process.terminate()
            for one in running.values():
                one.process.wait()
                note_time(times, one)


def note_time(times: Path, one: Running) -> None:
    row = {"job": one.job.name, "seconds": round(time.monotonic() - one.began, 1), "machine": machine()}
    append_line(times, json.dumps(row))


class Timed(TypedDict):
    """A line of times.jsonl."""

    job: str
    seconds: Amount
    machine: str


def seconds_by_machine(jobs: list[Job], times: Path) -> dict[str, float] | None:
    """The total time of these jobs by machine; None if a training has no time. Equal lines count once: two files may
    have been joined twice."""
    rows = read_json_lines(times, Timed, "list of the times of jobs", "delete the line") if times.exists() else []
    rows = {json.dumps(row): row for row in rows}.values()
    if not {job.name for job in jobs if job.log.name == "train.log"} <= {row["job"] for row in rows}:
        return None
    names, seconds = {job.name for job in jobs}, defaultdict(float)
    for row in rows:
        if row["job"] in names:
            seconds[row["machine"]] += row["seconds"]
    return {machine: round(total, 1) for machine, total in seconds.items()}


def versions_of(results: Iterable[Path]) -> dict[str, list[str]]:
    """Package -> its versions in the evaluations."""
    found = defaultdict(set)
    for path in results:
        for name, number in read_result(path, ("versions",))["versions"].items():
            found[name].add(number)
    return {name: sorted(numbers) for name, numbers in found.items()}


def start(job: Job) -> subprocess.Popen:
    """Starts a job. Its log is locked while it runs, even if this command is killed, so it never runs twice at once."""
    import fcntl  # not there on Windows

    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process inherits the open file and its lock
        except BlockingIOError as error:
            raise InputError(f"{job.name} is running already, it writes {job.log}: let it end, or end it") from error
        return subprocess.Popen(job.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def check_ended(job: Job, code: int) -> None:
    if code == 0 and job.is_done():
        return
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    how = f"failed with exit code {code}" if code else "ended without its result"
    raise InputError(
        f"{job.name} {how}, see {job.log} ({beginning(last, 70)}); once mended, the same command goes on from here"
    )


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU with {os.cpu_count()} threads"
