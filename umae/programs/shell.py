"""What pre-training and fine-tuning do alike around their loop: hold the folder, announce, train, finish, push."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import BaseImageProcessor
from transformers.utils.logging import disable_progress_bar

from arguments_umae import TrainingArguments, check_launch
from umae.data.batches import Plan, check_fills_a_step
from umae.sharing import cards, hub
from umae.training.checkpoints import Writer
from umae.training.folder import Run, hold_folder, open_run
from umae.training.hardware import close, make_accelerator, what_to_compile
from umae.training.log import MetricsLog
from umae.training.loop import Settings, Task, seconds_per_step, train
from umae.training.schedules import Schedule
from umae.training.signals import StopRequest


def begin(args: TrainingArguments, output_dir: str, seed: int) -> Accelerator:
    """The accelerator of a training program, and every random number that is drawn before training seeded."""
    accelerator = make_accelerator(
        os.environ, args.mixed_precision, args.gradient_accumulation_steps, args.report_to, Path(output_dir)
    )
    check_launch(os.environ, accelerator.num_processes)
    set_seed(seed)
    disable_progress_bar()  # transformers' own; training has one
    return accelerator


def make_plan(accelerator: Accelerator, num_images: int, description: str, args: TrainingArguments, seed: int) -> Plan:
    """Which images every process uses at every step; raises `ValueError` if they do not fill a step."""
    plan = Plan(
        images=num_images,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=accelerator.num_processes,
        seed=seed,
    )
    check_fills_a_step(plan, description)
    return plan


def make_settings(
    accelerator: Accelerator,
    args: TrainingArguments,
    output_dir: str,
    processor: BaseImageProcessor,
    plan: Plan,
    schedule: Schedule,
    max_unreadable_share: float,
    logging_steps: int,
    flops: int,
    min_learning_rate: float = 0.0,
) -> Settings:
    """How a run is trained, from the arguments that all training programs have.

    Args:
        flops: floating-point operations that train on one image.
    """
    return Settings(
        folder=Path(output_dir),
        processor=processor,
        plan=plan,
        schedule=schedule,
        min_learning_rate=min_learning_rate,
        logging_steps=logging_steps,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        max_unreadable_share=max_unreadable_share,
        gradient_checkpointing=args.gradient_checkpointing,
        max_grad_norm=args.max_grad_norm,
        torch_compile=what_to_compile(
            accelerator, args.torch_compile, flops * plan.images_per_step * schedule.total_steps
        ),
    )


def print_plan(accelerator: Accelerator, lines: Mapping[str, str], warnings: Sequence[str]) -> None:
    """What will be done, a line for each name."""
    for name, text in lines.items():
        accelerator.print(f"  {name:<16} {text}")
    for warning in warnings:
        accelerator.print(f"warning: {warning}")


def carry_out(
    accelerator: Accelerator,
    settings: Settings,
    identity: dict[str, Any],
    initial_weights: str | None,
    make_task: Callable[[MetricsLog, dict[str, Any]], Task],
    announce: Callable[[dict[str, Any]], None],
    finish: Callable[[dict[str, Any]], None],
    hub_repo: tuple[str | None, bool] | None,
    plan_only: bool,
    published: Callable[[int], dict[str, Path | bytes]] | None = None,
) -> Run:
    """Train in a run folder, from its newest checkpoint if it has one; nothing is done where the run is finished.

    Args:
        identity: what must stay the same when a run is continued.
        initial_weights: where the run starts from, None for fresh weights; the card's base model.
        make_task: (log, what `run.json` holds) -> what is trained; called once the folder is held.
        announce: prints what will be done, given what `run.json` holds.
        finish: given the same, completes the folder after the last step; the main process calls it.
        plan_only: announce, measure the time of a step, and leave everything as it is.
        hub_repo: repository (None: named after the folder) and whether it shall be private; None for no push.
        published: step -> the files of a checkpoint that are pushed as a revision of their own; None for none.

    Raises:
        ValueError: the folder holds something else, or the Hub refuses.
        FloatingPointError: a loss or gradient was not finite.
        SystemExit: 128 + the number of the signal that stopped the run, after its checkpoint.
    """
    folder, push = settings.folder, None
    if plan_only:
        record = open_run(accelerator, folder, identity)
        announce(record)
        log = MetricsLog(accelerator, folder, settings.plan.images_per_step)
        seconds = seconds_per_step(make_task(log, record), settings, accelerator)
        accelerator.print(
            f"  {'time':<16} {cards.duration(seconds * settings.schedule.total_steps)} for all steps, at "
            f"{settings.plan.images_per_step / seconds:,.3g} images/s; evaluations come on top"
        )
        close(accelerator)
        return Run(folder)
    if hub_repo is not None and accelerator.is_main_process:  # access is checked now, not after hours of training
        repo_id = hub.check_access(hub_repo[0] or folder.resolve().name, hub_repo[1])
        push = hub.BackgroundPush(repo_id, folder, log=tqdm.write)

    def publish(step: int) -> None:
        is_last = step == settings.schedule.total_steps  # which is pushed when the folder is complete
        if push is not None and published is not None and not is_last:
            push.start(published(step), f"Step {step}", f"step-{step}")

    record = open_run(accelerator, folder, identity)
    record["base_model"] = cards.base_model(initial_weights)
    if "trackio" in [str(tracker) for tracker in accelerator.log_with]:
        record["trackio_space"] = os.environ.get("TRACKIO_SPACE_ID")  # where trackio itself puts the curves
    if record["finished"]:
        accelerator.print(f"{folder} holds this run, finished; nothing to do")
    else:
        with hold_folder(accelerator, folder, record), StopRequest() as stop, Writer() as writer:
            announce(record)
            if settings.torch_compile != "no":
                accelerator.print(f"  {'compiled':<16} {settings.torch_compile}; the first step takes a minute or two")
            log = MetricsLog(accelerator, folder, settings.plan.images_per_step)
            train(make_task(log, record), settings, accelerator, record, log, stop, writer, publish)
            if accelerator.is_main_process and not stop.signal:
                finish(record)
        if stop.signal:
            close(accelerator)
            raise SystemExit(128 + stop.signal)
    close(accelerator)
    if push is not None:
        push.wait()
        hub.push_finished(folder, push.repo_id)
    return Run(folder)
