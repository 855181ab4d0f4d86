"""A signal that asks a run to stop."""

import signal
import threading
import time

import torch
from accelerate import Accelerator

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
