"""The numbers that a run leaves while it runs: metrics.jsonl, trackers and the progress bar."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from accelerate import Accelerator
from tqdm.std import tqdm

from umae.files import write_text
from umae.progress_bar import progress_bar
from umae.speed import ideal_seconds, used_memory
from umae.training.folder import METRICS_FILE

T = TypeVar("T")

# What depends on the machine: images a second, what share that is of the device's rate at matrix products and of its
# peak (see `ideal_seconds`), the share of the time spent waiting for images, memory in GB, and the seconds that went
# into diagnostics, which are not part of the others.
SPEED = ("pictures_per_second", "matmul_share", "mfu", "data_wait", "memory_gb", "diagnostics_seconds")


class MetricsLog:
    """`metrics.jsonl`, the trackers and the progress bar: the same numbers in three places.

    Args:
        images_per_step: on all processes.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, images_per_step: int):
        self.accelerator, self.path = accelerator, folder / METRICS_FILE
        self.bar: tqdm | None = None
        self.images_per_step = images_per_step
        self.waited, self.evaluated = 0.0, 0.0  # seconds since the last line
        self.lines = 0  # written by this process
        self.step_seconds = 0.0  # a step, by the last line

    def begin(self, step: int, flops: int) -> None:
        """Start the clock; lines of steps after `step` are dropped, they will be written again.

        Args:
            flops: floating-point operations that train on one image.
        """
        accelerator = self.accelerator
        self.ideal_seconds = ideal_seconds(
            flops, accelerator.device, accelerator.mixed_precision, accelerator.num_processes
        )
        self.last_step, self.last_time = step, time.perf_counter()
        if accelerator.is_main_process:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def progress(self, total: int) -> Iterator[int]:
        """The steps still to do, under a bar that shows rate, time left and the newest numbers."""
        hidden = not self.accelerator.is_main_process
        self.bar = progress_bar(
            initial=self.last_step, total=total, unit="step", dynamic_ncols=True, smoothing=0.05, disable=hidden
        )
        with self.bar:
            for step in range(self.last_step, total):
                yield step
                self.bar.update()  # a bar around the steps would not know, between its own lines, where it is

    def waited_for(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time spent waiting for each is counted."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = time.perf_counter()
        yield
        self.evaluated += time.perf_counter() - start

    def write(self, step: int, values: dict[str, float | None], text: str) -> None:
        """One line for the steps since the last one; every process calls it.

        Args:
            text: what stands beside the bar.
        """
        now = time.perf_counter()
        seconds, self.last_time = now - self.last_time - self.evaluated, now
        rate, memory = (step - self.last_step) * self.images_per_step / seconds, used_memory(self.accelerator.device)
        speed = {
            "pictures_per_second": rate,
            **{name: rate * ideal for name, ideal in self.ideal_seconds.items()},
            "data_wait": self.waited / seconds,
            "memory_gb": memory / 1e9,
            "diagnostics_seconds": self.evaluated,
        }
        self.lines, self.step_seconds = self.lines + 1, seconds / (step - self.last_step)
        self.last_step, self.waited, self.evaluated = step, 0.0, 0.0
        line = {"step": step, **values, **{name: float(f"{value:.4g}") for name, value in speed.items()}}
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        assert self.bar is not None, "`progress` comes first"
        self.bar.set_postfix_str(
            f"{text}, {rate:.0f} images/s ({line['matmul_share']:.0%} of the matmul rate, "
            + (f"{line['mfu']:.0%} MFU, " if "mfu" in line else "")
            + f"{line['data_wait']:.0%} waiting)"
        )
        tracked = {name: value for name, value in line.items() if name != "step" and value is not None}
        self.accelerator.log(tracked, step=step)


def track_image(accelerator: Accelerator, name: str, pixels: np.ndarray, step: int) -> None:
    """Log an image, uint8 (height, width, channels), to all trackers; the main process calls it."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # Accelerate has no images for it
            tracker.log({name: sys.modules["trackio"].Image(pixels)}, step=step)
        else:
            tracker.log_images({name: [pixels]}, step=step)


def is_due(done: int, total: int, logging_steps: int, steps: int) -> bool:
    """Whether a line of metrics.jsonl, at step `done`, comes with an evaluation: the last one does, and
    the first one after every multiple of `steps`; with 0 only the last."""
    line_before = (done - 1) // logging_steps * logging_steps
    return done == total or (steps > 0 and done // steps > line_before // steps)
