"""Pre-train on images, without labels."""

import dataclasses
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from arguments_umae import (
    PretrainDataArguments,
    PretrainModelArguments,
    PretrainTrainingArguments,
    pretraining_arguments,
)
from umae import UMAEConfig, UMAEForPreTraining, UMAEImageProcessor, files
from umae.data.batches import Plan, TrainingImages, decode_all, training_loader
from umae.data.classes import parse_share
from umae.data.crops import Flips
from umae.data.inputs import evaluation_processor
from umae.data.intensities import find_inputs, first_image
from umae.data.streaming import START, Cursor, Stream, streaming_loader
from umae.evaluation.monitor import (
    MOST_IMAGES,
    OBSERVED_STEPS,
    classes_of,
    measured_steps,
)
from umae.programs.evaluations import eval_steps, evaluate_features, evaluates, logging_steps, make_monitor
from umae.programs.initial_model import make_model
from umae.programs.job import Job, images_of_a_run, load_data, load_probe_images, readers
from umae.programs.keywords import keywords
from umae.programs.shell import begin, carry_out, make_plan, make_settings, print_plan
from umae.sharing import cards, gallery, notebook
from umae.speed import training_flops
from umae.training import checkpoints
from umae.training.folder import USUAL_CROPS, USUAL_INPUTS, Run, length_before, write_run
from umae.training.hardware import (
    by_main_process,
    own_state,
    set_threads,
)
from umae.training.log import SPEED, MetricsLog
from umae.training.loop import Losses, Task
from umae.training.needs import needs, too_few_images
from umae.training.pretraining import pretraining_losses, values_of
from umae.training.schedules import decay_groups, make_schedule
from umae.training.state import State

BETAS = (0.9, 0.95)  # of AdamW
USUAL_WARMUP = 10  # one in ten steps


@keywords("pretrain")
def pretrain(**given: Any) -> Run:
    """Pre-train on images, without labels: `umae pretrain` from Python, with the same names as keywords.

    Called again with the same arguments, it continues from the newest checkpoint in `output_dir`.

    Returns:
        The run: its folder, metrics and model.

    Raises:
        ValueError: an argument, the images, the weights or the folder are not as they should be.
        FloatingPointError: a loss or gradient was not finite.
    """
    with own_state():
        return run(*pretraining_arguments(given))


def run(data_args: PretrainDataArguments, model_args: PretrainModelArguments, args: PretrainTrainingArguments) -> Run:
    """Train as the arguments say, in the run folder that they name."""
    accelerator = begin(args, args.output_dir, args.seed)
    images, held_out = load_data(accelerator, data_args, data_args.train_split), None
    if data_args.heldout is not None:
        if isinstance(images, Stream):
            raise ValueError("heldout needs all images at hand; leave out streaming")
        images, held_out = images.hold_out(parse_share(data_args.heldout))
    first = by_main_process(accelerator, lambda: first_image(images, model_args.num_channels))
    model = make_model(accelerator, model_args, first.channels)
    inputs, warning = by_main_process(
        accelerator,
        lambda: find_inputs(
            images, first, model.config.num_channels, data_args.intensity_range or "full", data_args.image_mean,
            data_args.image_std, args.seed,
        ),
    )  # fmt: skip
    images = images.read_as(inputs.reading)
    held_out = held_out and held_out.read_as(inputs.reading)
    plan = make_plan(accelerator, images_of_a_run(accelerator, images, args), images.description, args, args.seed)
    set_threads(accelerator, os.environ, training_flops(model.config) * plan.batch_size)
    total_steps, extended_at = length_of(args, plan)
    job = Job(
        accelerator=accelerator,
        folder=Path(args.output_dir),
        images=images,
        probe_images=(held_out or load_probe_images(accelerator, data_args, images)) if args.eval_steps != 0 else None,
        config=model.config,
        processor=evaluation_processor(
            model.config.image_height_width, inputs.reading, inputs.image_mean, inputs.image_std
        ),
        plan=plan,
        schedule=make_schedule(
            total_steps,
            plan.steps_per_epoch,
            plan.images_per_step,
            args.base_learning_rate,
            args.warmup_epochs,
            usual_warmup_steps=(total_steps - extended_at) / USUAL_WARMUP,
            extended_at=extended_at,
        ),
        workers=readers(accelerator, images, data_args.dataloader_num_workers),
        args=args,
    )
    return carry_out(
        accelerator,
        make_settings(
            accelerator,
            args,
            args.output_dir,
            job.processor,
            plan,
            job.schedule,
            data_args.max_unreadable_share,
            logging_steps(job),
            training_flops(model.config),
        ),
        identity_of(job, model_args.model_name_or_path),
        initial_weights=model_args.model_name_or_path,
        make_task=lambda log, record: make_task(job, model, log, record),
        announce=lambda record: announce(job, record, model, warning),
        finish=lambda record: finish(job, record),
        plan_only=args.plan,
        hub_repo=(args.hub_model_id, args.hub_private_repo) if args.push_to_hub else None,
        published=lambda step: published_checkpoint(job.folder, step),
    )


def length_of(args: PretrainTrainingArguments, plan: Plan) -> tuple[int, int]:
    """Optimiser steps of the run, and those that it had before it was made longer, else 0."""
    total_steps = args.max_train_steps or args.num_train_epochs * plan.steps_per_epoch
    if args.extend_to is None:
        return total_steps, 0
    total_steps = args.extend_to if args.max_train_steps else args.extend_to * plan.steps_per_epoch
    return total_steps, length_before(Path(args.output_dir), total_steps)


# ----------------------------------------------------------------------------------------------------------------------
# What will be done


def identity_of(job: Job, initial_weights: str | None) -> dict[str, Any]:
    """What makes this run this run, whatever machine continues with it."""
    fields = job.config.to_dict()
    identity = {
        "dataset": job.images.description,
        "pictures": job.images.num_images,
        "streaming": isinstance(job.images, Stream),
        "dataset_fingerprint": job.images.fingerprint(),
        "initial_weights": initial_weights,
        "config": {name: fields[name] for name in UMAEConfig.__annotations__ if name in fields},
        "seed": job.args.seed,
        "pictures_per_step": job.plan.images_per_step,
        "gradient_accumulation_steps": job.plan.accumulation,
        "exact_uniformity": job.args.exact_uniformity,
        **dataclasses.asdict(job.schedule),
        "optimizer": "AdamW",
        "betas": BETAS,
        "weight_decay": job.args.weight_decay,
        "max_grad_norm": job.args.max_grad_norm,
        **{name: getattr(job.args, name) for name in USUAL_CROPS},
        **{name: getattr(job.processor, name) for name in USUAL_INPUTS},
        "mixed_precision": job.accelerator.mixed_precision,
    }
    if isinstance(job.images, Stream):  # there, what a process reads depends on how many readers there are
        identity |= {
            "shards": job.images.num_shards,
            "processes": job.accelerator.num_processes,
            "dataloader_num_workers": job.workers,
        }
    return identity


def announce(job: Job, record: dict[str, Any], model: UMAEForPreTraining, warning: str) -> None:
    """Print what is about to be done, before it is done."""
    identity, config, plan = record["identity"], job.config, job.plan
    (height, width), patches = config.image_height_width, config.grid[0] * config.grid[1]
    exact = identity["exact_uniformity"]
    features, parts = (plan.images_per_step, 1) if exact else (plan.batch_size * plan.processes, plan.accumulation)
    encoder = sum(parameter.numel() for parameter in model.vit.parameters()) / 1e6
    decoder = sum(parameter.numel() for parameter in model.parameters()) / 1e6 - encoder
    lines = {
        "images": (f"{identity['pictures']:,} from " if identity["pictures"] else "")
        + identity["dataset"]
        + (f", streamed from {identity['shards']} shards" if identity["streaming"] else ""),
        "input": f"{height} x {width} pixels, {patches} patches, {patches - config.num_hidden_patches} of them visible",
        "channels": channels_of(job.processor),
        "model": f"{encoder:.3g} million parameters, from {config.name_or_path or 'scratch'}; "
        f"{decoder:.3g} in the decoder",
        "steps": f"{identity['total_steps']:,} ({identity['total_steps'] / plan.steps_per_epoch:.4g} epochs), "
        f"{identity['warmup_steps']:,.0f} of them warm-up",
        "effective batch": f"{plan.images_per_step} = {plan.batch_size} per device x {plan.processes} "
        f"process{'es' if plan.processes > 1 else ''} x {plan.accumulation} accumulated",
        "learning rate": f"{identity['learning_rate']:.3g} at its peak",
        **regularizer_of(config, features, parts),
        "precision": f"{identity['mixed_precision']} on {record['hardware']}",
    }
    if extended_at := identity["extended_at"]:
        lines["steps"] = (
            f"{identity['total_steps']:,}, {extended_at:,} of them done: the rest is a new warm-up of "
            f"{identity['warmup_steps']:,.0f} steps and a new cosine, from these weights and this optimiser"
        )
    crops = f"{job.args.min_crop_scale:.0%} to 100% of an image's area"
    mirrored = {"left and right": job.args.horizontal_flip, "upside down": job.args.vertical_flip}
    turns = [f"{share:.0%} mirrored {how}" for how, share in mirrored.items() if share]
    lines["crops"] = ", ".join([crops, *turns])
    lines["labels"] = job.images.label_summary
    if job.images.not_read:
        lines["not read"] = job.images.not_read
    if job.probe_images is not None:
        if job.images.has_labels and classes_of(job.images, job.probe_images) is None:
            lists = not isinstance(job.images, Stream) and job.images.multi_label
            lacking = "they need one class" if lists else f"{job.probe_images.description} has no such labels"
            lines["labels"] += f"; without online accuracies: {lacking}"
        lines["evaluated on"] = f"{job.probe_images.description}, every {eval_steps(job, record):,} steps"
    needed, warnings = needs(
        job.accelerator, model, job.folder, plan.batch_size, job.args.checkpoints_total_limit,
        job.args.gradient_checkpointing, reconstructs=True,
    )  # fmt: skip
    warnings = [warning, *warnings] if warning else warnings
    if decoder > encoder:
        warnings.append(
            "the decoder, which only pre-training needs, is larger than the encoder; leave out its sizes, and they "
            "follow from the encoder's"
        )
    if not identity["initial_weights"]:
        warnings += too_few_images(identity["pictures"], round(1e6 * encoder))
    print_plan(job.accelerator, lines | needed, warnings)


def channels_of(processor: UMAEImageProcessor) -> str:
    """How images are read and normalised, on one line: `3, the full range, mean 0.485, ..., deviation 0.229, ...`"""
    numbers = [
        ", ".join(f"{number:.4g}" for number in values[:4]) + (", ..." if len(values) > 4 else "")
        for values in (processor.image_mean, processor.image_std)
    ]
    intensities = processor.intensity_range
    if isinstance(intensities, str):
        intensities = "the full range" if intensities == "full" else "each image's own range"
    else:
        intensities = "values from {:.6g} to {:.6g}".format(*intensities)
    return f"{processor.num_channels}, {intensities}, mean {numbers[0]}, deviation {numbers[1]}"


def regularizer_of(config: UMAEConfig, features: int, parts: int) -> dict[str, str]:
    """Its line of the announcement, by its name; `parts` are the micro-batches that each have `features`."""
    weight, source = f"weight {config.uniformity_weight:g}", f"the {config.pooling} features of {features} images"
    if config.regularizer == "coding_rate":
        return {"coding rate": f"{weight}, of {source}" + (f", mean over {parts} micro-batches" if parts > 1 else "")}
    return {"uniformity": f"{weight}, mean over {source}" + (f", then over {parts} micro-batches" if parts > 1 else "")}


# ----------------------------------------------------------------------------------------------------------------------
# The task


def make_task(job: Job, model: UMAEForPreTraining, log: MetricsLog, record: dict[str, Any]) -> Task:
    """What is trained: the two losses, on crops of the images; the monitor evaluates what is learned."""
    accelerator, args, config = job.accelerator, job.args, job.config
    monitor = make_monitor(job)
    cursors = [START] * max(1, job.workers)  # where this process' readers of a stream stand

    def observe(features: torch.Tensor, index: torch.Tensor) -> None:
        with log.evaluating():
            assert monitor is not None
            monitor.observe(features, index)

    def losses(model: nn.Module, micro_batches: Sequence[dict], step: int) -> Losses:
        return pretraining_losses(
            accelerator, model, micro_batches, step, num_patches=config.grid[0] * config.grid[1], seed=args.seed,
            mean=job.processor.image_mean, std=job.processor.image_std, exact_uniformity=args.exact_uniformity,
            observe=observe if monitor and step % OBSERVED_STEPS == 0 else None,
        )  # fmt: skip

    def evaluate(state: State, micro_batch: dict) -> dict[str, float | None]:
        assert monitor is not None
        start = time.perf_counter()
        values = evaluate_features(job, monitor, state, micro_batch, record)
        if job.args.eval_steps is None and "eval_steps" not in record and log.lines >= 2:  # the first one is slower
            seconds = time.perf_counter() - start
            record["eval_steps"] = measured_steps(accelerator, seconds, log.step_seconds)
        return values

    def saved_beside() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = monitor.tensors() if monitor else {}
        return tensors, {"cursors": gather_object([cursors]) if isinstance(job.images, Stream) else []}

    def restore(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        if monitor and tensors:
            monitor.restore(tensors)
        if state.get("cursors"):
            cursors[:] = [Cursor(*cursor) for cursor in state["cursors"][accelerator.process_index]]

    return Task(
        model=model,
        parameter_groups=decay_groups(model, args.weight_decay),
        betas=BETAS,
        values=values_of(config),
        own_values=("reconstruction_loss", "feature_norm"),
        flops=training_flops(config),
        losses=losses,
        batches=lambda steps: make_loader(job, steps, cursors),
        line=partial(line_of, accelerator),
        evaluate=evaluate,
        evaluates=lambda step: monitor is not None and evaluates(job, record, step),
        saved_beside=saved_beside,
        restore=restore,
        index_name=job.images.index_name,
        description=job.images.description,
    )


def make_loader(job: Job, steps: range, cursors: list[Cursor]) -> Iterable[dict]:
    """This process' micro-batches of some steps; of a stream from `cursors` on, which are moved on by what is read."""
    rank, on_gpu = job.accelerator.process_index, job.accelerator.device.type == "cuda"
    size = job.config.image_height_width
    min_scale, flips = job.args.min_crop_scale, Flips(job.args.horizontal_flip, job.args.vertical_flip)
    if isinstance(job.images, Stream):
        return streaming_loader(job.images, size, job.plan, rank, steps, cursors, job.workers, on_gpu, min_scale, flips)
    pixels = decode_all(job.images, show_progress=job.accelerator.is_main_process)
    cropped = TrainingImages(job.images, size, job.plan.seed, pixels, min_scale, flips=flips)
    return training_loader(cropped, job.plan, rank, steps.start, steps.stop, job.workers, pin_memory=on_gpu)


def line_of(accelerator: Accelerator, means: dict[str, float | None]) -> tuple[dict[str, float | None], str]:
    """The means since the last line, with the dimensions that the features fill by their uniformity; and in words."""
    norm, uniformity = means["feature_norm"], means["uniformity_loss"]
    if norm is not None and norm < 1e-6:  # the uniformity of nothing is 0, the best value there is
        accelerator.print("\nwarning: the features are zero, so the encoder is dead and their uniformity means nothing")
    line = {**means, "participation_ratio": 1 / uniformity if uniformity else 0.0}
    return line, f"loss {line['reconstruction_loss']:.3f}, features fill {line['participation_ratio']:.1f} dimensions"


def published_checkpoint(folder: Path, step: int) -> dict[str, Path | bytes]:
    """What of a checkpoint others can use, with a card."""
    checkpoint = folder / f"step-{step}"
    shared = {path.name: path for path in checkpoint.iterdir() if path.name not in checkpoints.ONLY_FOR_TRAINING}
    return {**shared, "README.md": cards.model_card(folder, checkpoint).encode()}


# ----------------------------------------------------------------------------------------------------------------------
# What stands at the end


def finish(job: Job, record: dict[str, Any]) -> None:
    """Put the last checkpoint's model at the top of the run folder, with figures of what it learned and a card."""
    folder = job.folder
    checkpoints.copy_model(folder / f"step-{job.schedule.total_steps}", folder)
    images = job.images if job.probe_images is None else job.probe_images
    sample = list(images.sample(job.args.seed, MOST_IMAGES))
    gallery.draw(folder, sample, images.description, job.accelerator.device)
    files.write_text(folder / notebook.NAME, notebook.model_notebook("."))
    files.write_text(folder / "README.md", cards.model_card(folder))
    record["finished"] = True
    write_run(folder, record)
    lines, unreadable = cards.read_metrics(folder), record["unreadable"]
    columns = {name: [line[name] for line in lines if name in line] for name in SPEED}
    speed = {name: statistics.median(column) for name, column in columns.items() if column}
    last, diagnostics = lines[-1], sum(columns["diagnostics_seconds"])
    mfu = f", {speed['mfu']:.0%} of its peak (MFU)" if "mfu" in speed else ""
    print(
        f"finished in {cards.duration(record['seconds'])}: reconstruction loss {last['reconstruction_loss']:.4f}, "
        + (f"coding rate loss {last['coding_rate_loss']:.4f}, " if "coding_rate_loss" in last else "")
        + f"uniformity {last['uniformity_loss']:.4f} (features fill {last['participation_ratio']:.1f} of at most "
        f"{cards.most_dimensions(record['identity'])} dimensions)\n"
        f"{speed['pictures_per_second']:,.0f} images/s, {speed['matmul_share']:.0%} of the device's rate at plain "
        f"matrix products{mfu}, {speed['data_wait']:.0%} of the time spent waiting for images, "
        f"{diagnostics / record['seconds']:.1%} on diagnostics\n"
        + (f"images left out because they cannot be read: {len(unreadable)}\n" if unreadable else "")
        + f"weights and card in {folder}, figures such as {folder / 'reconstructions.png'}"
    )
