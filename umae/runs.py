"""A run folder: what it is a run of, whether it may be continued, and the numbers it leaves while it runs."""

import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from configuration_umae import UMAEConfig
from umae.checkpoints import clear_leftovers, newest_whole, write_text
from umae.interruption import LOCK_FILE, lock
from umae.progress_bar import progress_bar
from umae.speed import used_memory

T = TypeVar("T")

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
# What depends on the machine: pictures a second, what share that is of the device's rate at matrix products and of its
# peak (see `ideal_seconds`), the share of the time spent waiting for pictures, memory in GB, and the seconds that went
# into diagnostics, which are not part of the others.
SPEED = ("pictures_per_second", "matmul_share", "mfu", "data_wait", "memory_gb", "diagnostics_seconds")


def open_run(accelerator: Accelerator, folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Start a run in a new or empty folder, or take up the one that it holds; nothing is written yet.

    Args:
        identity: what must stay the same when a run is continued: data, model, seed, batch, schedule, precision.

    Returns:
        What `run.json` holds: `identity`, `hardware`, `versions`, `seconds` of training so far,
        `unreadable` pictures (index and reason), `finished`.

    Raises:
        ValueError: the folder holds something else, or a run with another identity.
    """
    identity = json.loads(json.dumps(identity))  # as it will be read back
    run = {
        "identity": identity,
        "hardware": f"{accelerator.num_processes} x {_device_name(accelerator.device)}",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "seconds": 0.0,
        "unreadable": {},
        "finished": False,
    }
    if (folder / RUN_FILE).exists():
        before = json.loads((folder / RUN_FILE).read_text())
        _check_identity(folder, before["identity"], identity)
        run |= {name: before[name] for name in ("seconds", "unreadable", "finished")}
    elif folder.exists() and (not folder.is_dir() or any(entry.name != LOCK_FILE for entry in folder.iterdir())):
        found = "is not empty and holds no run" if folder.is_dir() else "is a file"
        raise ValueError(f"{folder} {found}; give a new or empty folder as output_dir")
    return run


@contextmanager
def hold_folder(accelerator: Accelerator, folder: Path, run: dict[str, Any]) -> Iterator[None]:
    """Make the folder this run's for a while; raises `ValueError` if another process trains in it."""
    accelerator.wait_for_everyone()  # nobody may look after the main process has begun to write
    if not accelerator.is_main_process:
        yield
        return
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))
            clear_leftovers(folder)
            write_run(folder, run)
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error}; give another output_dir") from error
        yield


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Replace `run.json`."""
    write_text(folder / RUN_FILE, json.dumps(run, indent=2) + "\n")


def track_picture(accelerator: Accelerator, name: str, pixels: np.ndarray, step: int) -> None:
    """Show a picture, uint8 (height, width, channels), in all trackers; the main process calls it."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # Accelerate has no pictures for it
            tracker.log({name: sys.modules["trackio"].Image(pixels)}, step=step)
        else:
            tracker.log_images({name: [pixels]}, step=step)


def newest_checkpoint(accelerator: Accelerator, folder: Path) -> Path | None:
    """The one to go on from, by the main process' judgement; damaged ones are named and put aside.

    Raises:
        ValueError: a process does not see it.
    """
    found = [None]
    if accelerator.is_main_process:
        found[0], damaged = newest_whole(folder)
        for checkpoint in damaged:
            print(
                f"{checkpoint} is damaged: its files are not those that were written; put aside as {checkpoint}.damaged"
            )
            checkpoint.rename(f"{checkpoint}.damaged")
    newest = broadcast_object_list(found)[0]
    if newest is not None and not newest.is_dir():
        raise ValueError(f"process {accelerator.process_index} does not see {newest}; output_dir must lie where all do")
    return newest


def looks(done: int, total: int, logging_steps: int, steps: int) -> bool:
    """Whether a line of metrics.jsonl, at step `done`, comes with what is measured every so many steps: the last, and
    the first of any `steps`; 0 is the last only."""
    line_before = (done - 1) // logging_steps * logging_steps
    return done == total or (steps > 0 and done // steps > line_before // steps)


def _check_identity(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    defaults = UMAEConfig().to_dict()  # of fields that are younger than a run
    flat_before, flat_now = ({**defaults, **one, **one["config"], "config": None} for one in (before, now))
    for name, value in flat_now.items():
        if flat_before.get(name) != value:
            raise ValueError(
                f"{folder} holds a run with {name} {flat_before.get(name)}, not {value}; use another output_dir (and "
                f"model_name_or_path {folder} to start from its weights)"
            )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type.upper()} ({platform.machine()})"


class MetricsLog:
    """`metrics.jsonl`, the trackers and the progress bar: the same numbers in three places.

    Args:
        start: steps done so far; lines of later ones are dropped, they will be written again.
        pictures_per_step: on all processes.
        ideal_seconds: what one picture would cost if training were nothing but matrix products at full rate, see the
            function of this name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        start: int,
        pictures_per_step: int,
        ideal_seconds: dict[str, float],
    ):
        self.accelerator, self.path, self.bar = accelerator, folder / METRICS_FILE, None
        self.pictures_per_step, self.ideal_seconds = pictures_per_step, ideal_seconds
        self.last_step, self.last_time, self.waited, self.diagnosed = start, time.perf_counter(), 0.0, 0.0
        if accelerator.is_main_process:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def progress(self, total: int) -> Iterator[int]:
        """The steps still to do, under a bar that shows rate, time left and the newest numbers."""
        hidden = not self.accelerator.is_main_process
        steps = range(self.last_step, total)
        self.bar = progress_bar(
            steps, initial=self.last_step, total=total, unit="step", dynamic_ncols=True, smoothing=0.05, disable=hidden
        )
        return self.bar

    def waited_for(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time that they let one wait is counted."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def diagnosing(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = time.perf_counter()
        yield
        self.diagnosed += time.perf_counter() - start

    def write(self, step: int, values: dict[str, float], shown: str) -> None:
        """One line for the steps since the last one; every process calls it.

        Args:
            shown: what of it stands beside the bar, in words.
        """
        now = time.perf_counter()
        seconds, self.last_time = now - self.last_time - self.diagnosed, now
        rate, memory = (step - self.last_step) * self.pictures_per_step / seconds, used_memory(self.accelerator.device)
        speed = {
            "pictures_per_second": rate,
            **{name: rate * ideal for name, ideal in self.ideal_seconds.items()},
            "data_wait": self.waited / seconds,
            "memory_gb": memory / 1e9,
            "diagnostics_seconds": self.diagnosed,
        }
        self.last_step, self.waited, self.diagnosed = step, 0.0, 0.0
        line = {"step": step, **values, **{name: float(f"{value:.4g}") for name, value in speed.items()}}
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(
            f"{shown}, {rate:.0f} pictures/s ({line['matmul_share']:.0%} of the matmul rate, "
            + (f"{line['mfu']:.0%} MFU, " if "mfu" in line else "")
            + f"{line['data_wait']:.0%} waiting)"
        )
        tracked = {name: value for name, value in line.items() if name != "step" and value is not None}
        self.accelerator.log(tracked, step=step)
