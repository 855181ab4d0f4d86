"""What happens to a run from outside: a signal that asks it to stop, a second run on the same folder."""

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

LOCK_FILE = "run.lock"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS = 2.0  # between two looks that several processes take together


class StopRequest:
    """Remembers the first SIGTERM or Ctrl-C, for the loop to look at between two steps; a second one ends at once.

    Attributes:
        signal: the number of the signal that came, 0 if none has.
    """

    def __init__(self):
        self.signal = 0
        self._looked, self._looked_at, self._next_look = None, 0.0, 0  # last look's step and time, next one's step

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def has_come(self, accelerator: Accelerator, step: int) -> bool:
        """Whether a signal has come, to any process; every process asks after every step.

        Several processes wait for each other only once in about SECONDS, at steps that they agree upon.
        """
        if accelerator.num_processes > 1:
            if step < self._next_look:
                return False
            steps = 1.0  # where a run starts or is resumed, nothing is known of its pace
            if self._looked is not None:
                steps = (step - self._looked) * SECONDS / (time.perf_counter() - self._looked_at)
            everyones = accelerator.gather(torch.tensor([[float(self.signal), steps]], device=accelerator.device))
            agreed, steps = int(everyones[:, 0].max()), int(everyones[:, 1].min())
            self._looked, self._looked_at, self._next_look = step, time.perf_counter(), step + max(1, steps)
            self.signal = agreed or self.signal  # one that has come since is for the next look
            return agreed > 0
        return self.signal > 0

    def _remember(self, number: int, frame) -> None:
        self.signal = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; a lock whose process is gone is taken over.

    Raises:
        ValueError: another process holds it, or one of another machine may.
    """
    path = folder / LOCK_FILE
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}
    with _one_at_a_time(folder):  # else two runs could take over the same lock
        if path.exists():
            _refuse_unless_stale(path)
        path.write_text(json.dumps(mine) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of this machine in after the other; the system lets go of it when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_unless_stale(path: Path) -> None:
    """Raise `ValueError` unless the process that wrote the lock is certain to be gone."""
    try:
        owner = json.loads(path.read_text())
        pid, host, started = owner["pid"], owner["host"], owner["started"]
    except (ValueError, KeyError, TypeError):
        return  # its process was killed while it wrote
    if host == socket.gethostname():
        try:
            if psutil.Process(pid).create_time() != started:
                return  # another process has got its number
        except psutil.NoSuchProcess:
            return
        raise ValueError(f"{path.parent} is being trained by process {pid}; wait for it, or use another --output_dir")
    raise ValueError(
        f"{path.parent} is held by process {pid} on {host}; if that machine or process is gone, delete {path}"
    )
