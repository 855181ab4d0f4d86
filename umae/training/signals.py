"""A signal that asks a run to stop."""

import signal
import threading
import time

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS = 2.0  # between two checks that several processes make together


class StopRequest:
    """Remembers the first SIGTERM or Ctrl-C, which the loop checks after every step; a second one ends the process.

    Attributes:
        signal: the number of the signal that came, 0 if none has.
        seconds: since the start, at the last check; the main process' clock, the same on every process.
    """

    def __init__(self):
        self.signal, self.seconds, self._start = 0, 0.0, time.perf_counter()
        self._last_step, self._last_time, self._next_step = None, 0.0, 0  # of the last check and of the next one

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def has_come(self, accelerator: Accelerator, step: int) -> bool:
        """Whether a signal has come, to any process; every process asks after every step.

        Several processes wait for each other only once in about SECONDS, at steps that they agree upon.
        """
        if accelerator.num_processes == 1:
            self.seconds = time.perf_counter() - self._start
            return self.signal > 0
        if step < self._next_step:
            return False
        now, steps = time.perf_counter(), 1.0  # where a run starts or is resumed, nothing is known of its pace
        if self._last_step is not None:
            steps = (step - self._last_step) * SECONDS / (now - self._last_time)
        mine = torch.tensor([[float(self.signal), steps, now - self._start]], device=accelerator.device)
        everyones = accelerator.gather(mine)
        agreed, steps, self.seconds = int(everyones[:, 0].max()), int(everyones[:, 1].min()), float(everyones[0, 2])
        self._last_step, self._last_time = step, time.perf_counter()
        self._next_step = step + max(1, steps)
        self.signal = agreed or self.signal  # a signal that has come since is for the next check
        return agreed > 0

    def _remember(self, number: int, frame) -> None:
        self.signal = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
