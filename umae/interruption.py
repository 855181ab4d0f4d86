"""What happens to a run from outside: a signal that asks it to stop, a second run on the same folder."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

LOCK_FILE = "run.lock"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers the first SIGTERM or Ctrl-C, for the loop to look at between two steps; a second one ends at once.

    Attributes:
        signal: the number of the signal that came, 0 if none has.
    """

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        self.signal = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)


def ignore_signals(worker: int = 0) -> None:
    """For the loader's workers: a terminal's Ctrl-C reaches them too, but they end when the training process does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; a lock whose process is gone is taken over.

    Raises:
        ValueError: another process holds it, or one of another machine may.
    """
    path = folder / LOCK_FILE
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            _refuse_unless_stale(path)
            path.unlink(missing_ok=True)
        else:
            break
    with open(descriptor, "w") as file:
        file.write(json.dumps(mine) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _refuse_unless_stale(path: Path) -> None:
    """Raise `ValueError` unless the process that wrote the lock is certain to be gone."""
    for _ in range(10):  # between its creation and its content lies a moment
        try:
            owner = json.loads(path.read_text())
            pid, host, started = owner["pid"], owner["host"], owner["started"]
            break
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            time.sleep(0.1)
    else:
        return  # a process was killed in that moment
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
