"""One training loop, for pre-training and for fine-tuning: what they differ in is a `Task`."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BaseImageProcessor, PreTrainedModel

from umae.data.batches import Plan
from umae.training.checkpoints import Writer
from umae.training.failures import (
    explained_out_of_memory,
    log_on,
    no_failure,
    remember_failure,
    report_unreadable,
    stop_if_failed,
)
from umae.training.log import MetricsLog
from umae.training.schedules import Schedule, set_learning_rate
from umae.training.signals import StopRequest
from umae.training.state import State

MEASURED_STEPS = 3  # of a plan
CHECKPOINT_SECONDS = 600  # between checkpoints, where no number of steps is given

# The loss of every micro-batch of a step, in turn, and float32 values to log that go with it, the loss first.
Losses = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Task:
    """What is trained: all that pre-training and fine-tuning differ in.

    Args:
        model: not yet prepared by the accelerator.
        parameter_groups, betas: of AdamW.
        values: names of what every step logs, in order; the norm of the gradient, the last of them, is the loop's.
        own_values: those that come from one process' images alone, which shows whose images made them not finite.
        flops: floating-point operations that train on one image.
        losses: (model, micro-batches, steps done) -> the loss of each micro-batch, computed when it is asked for.
        batches: steps -> this process' micro-batches of these steps.
        line: the means of the values since the last line -> what `metrics.jsonl` gets, and a text beside the bar.
        evaluate: (state, last micro-batch) -> measures for `metrics.jsonl`; every process calls it.
        evaluates: (steps done) -> whether the line of `metrics.jsonl` at this step comes with an evaluation.
        saved_beside: -> tensors and plain values that belong into a checkpoint; every process calls it.
        restore: takes what `saved_beside` returned when the newest checkpoint was written.
        index_name: index of an image -> how people read it.
        description: of the images, in print.
    """

    model: PreTrainedModel
    parameter_groups: list[dict[str, Any]]
    betas: tuple[float, float]
    values: Sequence[str]
    own_values: Sequence[str]
    flops: int
    losses: Callable[[nn.Module, Sequence[dict], int], Losses]
    batches: Callable[[range], Iterable[dict]]
    line: Callable[[dict[str, float | None]], tuple[dict[str, float | None], str]]
    evaluate: Callable[[State, dict], Mapping[str, float | None]]
    evaluates: Callable[[int], bool]
    saved_beside: Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]]
    restore: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
    index_name: Callable[[int], str]
    description: str


@dataclass(frozen=True)
class Settings:
    """Where and how a run is trained, whatever its task; steps are optimiser steps.

    Args:
        folder: of the run.
        processor: saved with every checkpoint.
        checkpointing_steps: None for a checkpoint every CHECKPOINT_SECONDS.
        max_unreadable_share: of the images, in [0, 1]; more end the run.
        torch_compile: `no`, or what to compile, see `compile_model`.
        max_grad_norm: see `optimizer_step`.
    """

    folder: Path
    processor: BaseImageProcessor
    plan: Plan
    schedule: Schedule
    min_learning_rate: float
    logging_steps: int
    checkpointing_steps: int | None
    checkpoints_total_limit: int
    max_unreadable_share: float
    gradient_checkpointing: bool
    torch_compile: str
    max_grad_norm: float | None = None


def train(
    task: Task,
    settings: Settings,
    accelerator: Accelerator,
    record: dict[str, Any],
    log: MetricsLog,
    stop: StopRequest,
    writer: Writer,
    publish: Callable[[int], None],
) -> None:
    """From the newest checkpoint, if there is one, to the last step, whose `step-N/` stands at the end.

    Stopped by a signal, `stop.signal` is not 0, and `step-N/` is that of the step it was at.

    Args:
        record: what `run.json` holds; kept up to date.
        publish: called in the writer's thread after every checkpoint, with its step.
    """
    plan, total = settings.plan, settings.schedule.total_steps
    state = State.begin(
        accelerator, task.model, task.parameter_groups, task.betas, task.values, settings.gradient_checkpointing,
        settings.torch_compile,
    )  # fmt: skip
    task.restore(*state.restore(settings.folder))
    accelerator.init_trackers("umae", config={name: str(value) for name, value in record["identity"].items()})
    log.begin(state.step, task.flops)
    micro_batches = log.waited_for(task.batches(range(state.step, total)))
    failed = no_failure(accelerator.device, len(task.values))
    unreadable: dict[int, str] = {}
    saved_at = stop.seconds
    used: dict[int, list[int]] = {}  # indices of the images of every step since `failed` was last read
    clock, seconds_before = time.perf_counter(), record["seconds"]

    state.model.train()
    for step in log.progress(total):
        learning_rate = set_learning_rate(state.optimizer, settings.schedule, step, settings.min_learning_rate)
        batches = [next(micro_batches) for _ in range(plan.accumulation)]
        for batch in batches:
            unreadable |= batch["refusals"]
        used[step + 1] = [index for batch in batches for index in batch["index"].tolist()]
        state.count(_step(task, settings, state, batches, failed, step))

        done, last = step + 1, step + 1 == total
        logs = last or done % settings.logging_steps == 0
        stopped = stop.has_come(accelerator, done) and not last
        if settings.checkpointing_steps is None:
            saves = last or stop.seconds - saved_at >= CHECKPOINT_SECONDS
        else:
            saves = last or done % settings.checkpointing_steps == 0
        if logs or saves or stopped:
            stop_if_failed(failed, task.index_name, task.description, used, task.values, task.own_values)
            used.clear()
            writer.check()
        if logs:
            report_unreadable(
                unreadable, record, plan.images, settings.max_unreadable_share, log_on(accelerator.is_main_process)
            )
            line, text = task.line(state.means())
            line = {"epoch": done / plan.steps_per_epoch, **line, "learning_rate": learning_rate}
            if task.evaluates(done):
                with log.evaluating(), explained_out_of_memory(plan.batch_size):
                    line |= task.evaluate(state, batches[-1])
            log.write(done, line, text)
        if saves or stopped:
            record["seconds"] = seconds_before + time.perf_counter() - clock
            saved_at = stop.seconds
            state.save(
                settings.folder, record, settings.processor, settings.checkpoints_total_limit, *task.saved_beside(),
                writer, publish,
            )  # fmt: skip
        if last or stopped:
            writer.wait()
            accelerator.wait_for_everyone()  # a process that ends early makes a launcher end the others
        if stopped:
            accelerator.print(f"\nstopped by a signal after step {done}; the same command continues from there")
            return


def _step(
    task: Task, settings: Settings, state: State, batches: Sequence[dict], failed: torch.Tensor, step: int
) -> torch.Tensor:
    """One step of the task on its micro-batches; what `optimizer_step` returns."""
    with explained_out_of_memory(settings.plan.batch_size):
        losses = task.losses(state.model, batches, step)
        return optimizer_step(
            state.accelerator, state.model, state.optimizer, losses, settings.plan.accumulation, failed, step,
            settings.max_grad_norm,
        )  # fmt: skip


def seconds_per_step(task: Task, settings: Settings, accelerator: Accelerator) -> float:
    """The median of MEASURED_STEPS steps, after one that is slower; nothing is logged or saved."""
    state = State.begin(
        accelerator, task.model, task.parameter_groups, task.betas, task.values, settings.gradient_checkpointing,
        settings.torch_compile,
    )  # fmt: skip
    failed = no_failure(accelerator.device, len(task.values))
    steps = min(1 + MEASURED_STEPS, settings.schedule.total_steps)
    micro_batches = iter(task.batches(range(steps)))
    seconds = []
    state.model.train()
    for step in range(steps):
        start = time.perf_counter()
        batches = [next(micro_batches) for _ in range(settings.plan.accumulation)]
        _step(task, settings, state, batches, failed, step).tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds)


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Losses,
    accumulation: int,
    failed: torch.Tensor,
    step: int,
    max_grad_norm: float | None = None,
) -> torch.Tensor:
    """Forward and backward over the micro-batches, then one step of the optimiser. Never waits for the device.

    Args:
        model, optimizer: as prepared by the accelerator; a fused optimiser.
        losses: as `Task.losses` returns them, `accumulation` of them.
        failed: as `no_failure` made it; changed, for good, by the first loss or gradient that is not finite. From then
            on, whichever process it was on, the weights of all of them stay as they are. (In fp16 a gradient may
            overflow, and leaves out that step; MOST_OVERFLOWS in a row are a failure.)
        step: the optimiser steps before this one.
        max_grad_norm: a gradient with a larger norm is scaled down to it.

    Returns:
        float32 (values,) on the device: the values of `losses`, averaged over the micro-batches of this process, then
        the norm of the gradient, before it is scaled down.
    """
    logged = []
    for _ in range(accumulation):
        with accelerator.accumulate(model):
            loss, values = next(losses)
            logged.append(values)
            sound = torch.isfinite(values).all() & (failed[0] == 0)
            # What fails on one process becomes a failure of all, by their common gradient, in this and all later steps
            accelerator.backward(loss * torch.where(sound, 1.0, torch.nan))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients(optimizer)
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                if max_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, grad_norm)
                grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # under FSDP2
                values = torch.cat([torch.stack(logged).float().mean(dim=0), grad_norm.float()[None]])
                remember_failure(accelerator, optimizer, values, step, failed)
            optimizer.step()
            optimizer.zero_grad()
    return values
