"""Processes side by side, one for each GPU or for each share of the cores."""

import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from umae.programs.study_file import RUNS, Task
from umae.training.hardware import usable_cores
from umae.training.signals import StopRequest

INTERVAL = 0.2  # seconds between two looks at the processes
WATCH = 5.0  # seconds between two looks at what they have written


@dataclass
class Job:
    task: Task
    process: subprocess.Popen
    start: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def slots(environ: Mapping[str, str], jobs: int | None) -> list[dict[str, str]]:
    """What each of the processes side by side finds in its environment: its GPU, or its share of the cores.

    Args:
        jobs: how many; by default one for each GPU, without GPUs one.
    """
    gpus = torch.cuda.device_count()
    if gpus:
        visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return [{"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]} for slot in range(jobs or gpus)]
    threads = environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // (jobs or 1))))
    return [{"OMP_NUM_THREADS": threads}] * (jobs or 1)


def carry_out(
    tasks: Sequence[Task],
    slots: Sequence[Mapping[str, str]],
    environ: Mapping[str, str],
    stop: StopRequest,
    ended: Callable[[Job, int], None],
    watch: Callable[[Collection[Job]], None],
) -> list[Task]:
    """Do the tasks in their order, as many side by side as there are slots; an evaluation waits for its run.

    Args:
        stop: where a signal has come, the processes are asked to end and waited for.
        ended: called with every job that has ended and its exit status.
        watch: called every WATCH seconds with the jobs that run.

    Returns:
        Those that failed, and those that could not be done without them.
    """
    waiting, running, failed = list(tasks), dict[int, Job](), list[Task]()
    watched = 0.0
    untrained = {task.run for task in tasks if task.kind == RUNS}  # and so to be waited for
    try:
        while (waiting or running) and not stop.signal:
            for slot, job in list(running.items()):
                if (status := job.process.poll()) is not None:
                    del running[slot]
                    ended(job, status)
                    if status:
                        failed.append(job.task)
                    if job.task.kind == RUNS:
                        untrained.discard(job.task.run)
            runs_failed = {task.run for task in failed if task.kind == RUNS}
            failed += [task for task in waiting if task.run in runs_failed]
            waiting = [task for task in waiting if task not in failed]
            for slot in set(range(len(slots))) - running.keys():
                ready = [task for task in waiting if task.kind == RUNS or task.run not in untrained]
                if ready:
                    waiting.remove(ready[0])
                    running[slot] = _start(ready[0], {**environ, **slots[slot]})
            if time.monotonic() > watched + WATCH:
                watch(running.values())
                watched = time.monotonic()
            time.sleep(INTERVAL)
    finally:
        for job in running.values():
            job.process.terminate()  # a run then writes a checkpoint
        for job in running.values():
            ended(job, job.process.wait())
    return failed


def log_of(task: Task) -> Path:
    """The file with all that a task has printed, also before it was interrupted."""
    return task.folder.with_name(task.folder.name + ".log")


def _start(task: Task, environ: Mapping[str, str]) -> Job:
    log_of(task).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(task), "a") as log:
        return Job(task, start_process(task.command_line, environ, log), time.monotonic())


def start_process(words: Sequence[str], environ: Mapping[str, str], log: IO[str]) -> subprocess.Popen:
    """Start `umae`, in a process group of its own: Ctrl-C comes to the study alone, which asks every process once."""
    return subprocess.Popen(
        [sys.executable, "-m", "umae", *words],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
