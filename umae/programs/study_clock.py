"""How long a study takes: by what its tasks have taken so far, and before that by arithmetic."""

import json
import statistics
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from arguments_umae import pretraining_arguments
from umae.data.images import load_images
from umae.files import write_text
from umae.programs.initial_model import make_config
from umae.programs.study_file import RUNS, Study, Task
from umae.sharing.cards import duration, read_metrics
from umae.speed import has_fast_bf16, matmul_rate, training_flops
from umae.training.folder import METRICS_FILE, RUN_FILE
from umae.training.hardware import usable_cores

USUAL_SHARE = 0.4  # of the rate of matrix products that training reaches
FILE = "seconds.json"


class Clock:
    """What every task of a study has taken so far, and what is left.

    Args:
        jobs: tasks side by side.
    """

    def __init__(self, study: Study, jobs: int):
        self._study, self._jobs, self._file = study, jobs, study.output_dir / FILE
        self.seconds: dict[str, float] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def add(self, task: Task, seconds: float) -> None:
        """A task has run for so long, once more if it was interrupted."""
        self.seconds[task.name] = round(self.seconds.get(task.name, 0.0) + seconds, 1)
        write_text(self._file, json.dumps(self.seconds, indent=2) + "\n")

    def plan(self) -> str:
        """The kinds of tasks: how many there are, how many are finished, and how long the others may take."""
        lines = []
        for kind in self._study.kinds:
            tasks = [task for task in self._study.tasks if task.kind == kind]
            missing = [task for task in tasks if not task.is_finished]
            known = self._known_seconds(missing)
            text = f"  {kind:<16} {len(tasks) - len(missing)} of {len(tasks)} finished"
            if known:
                text += f", {duration(statistics.mean(known))} each for the others"
            elif missing:
                text += ", time not known before the first is finished"
            lines.append(text)
        return "\n".join([*lines, f"  {self.left()}, {self._jobs} side by side"])

    def left(self) -> str:
        """The time to the end, in words; at least that, where some tasks' is not known yet."""
        tasks = [task for task in self._study.tasks if not task.is_finished]
        known = self._known_seconds(tasks)
        if tasks and not known:
            return "time to the end not known yet"
        seconds = sum(known) / min(self._jobs, max(1, len(known)))
        return f"{'about' if len(known) == len(tasks) else 'more than'} {duration(seconds)} to the end"

    def _known_seconds(self, tasks: Collection[Task]) -> list[float]:
        """What is left of those tasks of which that is known."""
        known, usual = [], self._usual_seconds()
        for task in tasks:
            if task.kind == RUNS:
                progress = _progress(task)
                known.append(usual[RUNS] * self._works[task.name] if progress is None else progress.seconds_left)
            elif task.kind in usual:
                known.append(usual[task.kind])
        return known

    def _usual_seconds(self) -> dict[str, float]:
        """Usual ones of a finished evaluation, by kind; of a floating-point operation of a run."""
        usual = {}
        for kind in self._study.kinds:
            tasks = [task for task in self._study.tasks if task.kind == kind]
            if kind == RUNS:
                rates = [
                    progress.seconds / self._works[task.name]
                    for task in tasks
                    if (progress := _progress(task)) is not None
                ]
                precision = pretraining_arguments(tasks[0].arguments)[2].mixed_precision
                # Not the mean: a run of a step or two is mostly compilation
                usual[kind] = statistics.median(rates or [1 / (USUAL_SHARE * _matmul_rate(self._jobs, precision))])
            elif seconds := [
                self.seconds[task.name] for task in tasks if task.is_finished and task.name in self.seconds
            ]:
                usual[kind] = statistics.mean(seconds)
        return usual

    @cached_property
    def _works(self) -> dict[str, float]:
        """Floating-point operations of every run, by its name."""
        return {task.name: _work(task) for task in self._study.tasks if task.kind == RUNS}


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        seconds: of all its steps, at the pace so far.
    """

    step: int
    steps: int
    seconds: float

    @property
    def seconds_left(self) -> float:
        return self.seconds * (1 - self.step / self.steps)


def _progress(task: Task) -> Progress | None:
    """None before a run's first line of metrics."""
    record, log = task.folder / RUN_FILE, task.folder / METRICS_FILE
    if not record.exists() or not log.exists() or not (lines := read_metrics(task.folder)):
        return None
    identity = json.loads(record.read_text())["identity"]
    pace = statistics.median(line["pictures_per_second"] for line in lines)
    steps = identity["total_steps"]
    return Progress(lines[-1]["step"], steps, steps * identity["pictures_per_step"] / pace)


def progress_of(task: Task) -> str:
    """How far a run is, in words; empty before its first line of metrics, and for evaluations."""
    progress = _progress(task) if task.kind == RUNS else None
    return f"step {progress.step:,} of {progress.steps:,}" if progress else ""


def _work(task: Task) -> float:
    """Floating-point operations of a run."""
    data, model, training = pretraining_arguments(task.arguments)
    images = num_images(data.dataset_name, data.dataset_config_name, data.train_split)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = training.max_train_steps or training.num_train_epochs * max(1, images // per_step)
    return float(training_flops(make_config(model)) * steps * per_step)


@cache
def num_images(name: str, config_name: str | None, split: str) -> int:
    return load_images(name, config_name, split).num_images


@cache
def _matmul_rate(jobs: int, mixed_precision: str | None) -> float:
    """Of one of the jobs side by side."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_fast = mixed_precision in ("bf16", "fp16") or (mixed_precision is None and has_fast_bf16(device))
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, usable_cores() // jobs))
    rate = matmul_rate(device, torch.bfloat16 if is_fast else torch.float32)
    torch.set_num_threads(threads)
    return rate
