"""Pre-train on images, without labels."""

import dataclasses
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from arguments_umae import (
    PretrainDataArguments,
    PretrainModelArguments,
    PretrainTrainingArguments,
    pretraining_arguments,
)
from umae import UMAEConfig, UMAEForPreTraining, UMAEImageProcessor, files
from umae.data.batches import Plan, TrainingImages, decode_all, training_loader
from umae.data.classes import load_first_labelled
from umae.data.crops import Flips
from umae.data.images import Images, held_out_splits, load_images
from umae.data.inputs import evaluation_processor
from umae.data.intensities import find_inputs, first_image
from umae.data.streaming import START, Cursor, Stream, load_stream, streaming_loader
from umae.evaluation.monitor import (
    MOST_IMAGES,
    OBSERVED_STEPS,
    Monitor,
    classes_of,
    estimated_steps,
    measured_steps,
    prepare_probe_images,
)
from umae.programs.initial_model import make_model
from umae.programs.keywords import keywords
from umae.programs.shell import begin, carry_out, make_plan, make_settings
from umae.sharing import cards, gallery, notebook
from umae.speed import training_flops
from umae.training import checkpoints
from umae.training.folder import USUAL_CROPS, USUAL_INPUTS, Run, write_run
from umae.training.hardware import (
    by_main_process,
    main_process_first,
    num_workers,
    own_state,
    set_threads,
    usual_workers,
)
from umae.training.log import SPEED, MetricsLog, is_due, track_image
from umae.training.loop import Losses, Task
from umae.training.pretraining import pretraining_losses, values_of
from umae.training.schedules import Schedule, decay_groups, make_schedule
from umae.training.state import State

BETAS = (0.9, 0.95)  # of AdamW
EVALUATIONS = 10  # at least, of a run
USUAL_LOGGING = 50  # steps
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
    images = load_data(accelerator, data_args, data_args.train_split)
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
    plan = make_plan(accelerator, images_of_a_run(accelerator, images, args), images.description, args, args.seed)
    set_threads(accelerator, os.environ, training_flops(model.config) * plan.batch_size)
    total_steps = args.max_train_steps or args.num_train_epochs * plan.steps_per_epoch
    job = Job(
        accelerator=accelerator,
        folder=Path(args.output_dir),
        images=images,
        probe_images=load_probe_images(accelerator, data_args, images) if args.eval_steps != 0 else None,
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
            usual_warmup_steps=total_steps / USUAL_WARMUP,
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
        hub_repo=(args.hub_model_id, args.hub_private_repo) if args.push_to_hub else None,
        published=lambda step: published_checkpoint(job.folder, step),
    )


# ----------------------------------------------------------------------------------------------------------------------
# What will be done


@dataclass(frozen=True)
class Job:
    """What is to be done, and with what; nothing of it changes.

    Args:
        probe_images: those that the features are evaluated on during training, None for no evaluation.
        workers: loader processes beside each of training.
    """

    accelerator: Accelerator
    folder: Path
    images: Images | Stream
    probe_images: Images | Stream | None
    config: UMAEConfig
    processor: UMAEImageProcessor
    plan: Plan
    schedule: Schedule
    workers: int
    args: PretrainTrainingArguments


def load_data(accelerator: Accelerator, args: PretrainDataArguments, split: str) -> Images | Stream:
    columns = (args.image_column_name, args.label_column_name)
    with main_process_first(accelerator):  # the others find the main process' cache
        if args.streaming:
            return load_stream(args.dataset_name, args.dataset_config_name, split, args.image_column_name)
        return load_images(args.dataset_name, args.dataset_config_name, split, *columns)


def load_probe_images(
    accelerator: Accelerator, args: PretrainDataArguments, images: Images | Stream
) -> Images | Stream:
    """The images to evaluate on: held-out ones where there are any, if possible with labels, else those of training."""
    try:
        splits = held_out_splits(args.dataset_name, args.dataset_config_name, args.train_split)
        if not images.has_labels:
            splits = splits[:1]
        load = partial(load_data, accelerator, args)
        probe_images = load_first_labelled(load, splits, accelerator.print) if splits else images
        probe_images = probe_images.read_as(images.reading)
        probe_images.check_readable()
        return probe_images
    except (ValueError, OSError) as error:  # no reason to refuse to train
        accelerator.print(f"held-out images cannot be loaded, so the training images are evaluated: {error}")
        return images


def readers(accelerator: Accelerator, images: Images | Stream, asked: int | None) -> int:
    """Loader processes beside each of training; a stream must have a shard for each of them."""
    if not isinstance(images, Stream):
        return num_workers(accelerator.device, asked)
    processes, shards = accelerator.num_processes, images.num_shards
    workers = min(usual_workers(accelerator.device), shards // processes) if asked is None else asked
    if shards < processes * max(1, workers):
        raise ValueError(
            f"{images.description} comes in {shards} shards, fewer than {processes} processes x {max(1, workers)} "
            f"readers; lower dataloader_num_workers or the number of processes, or leave out streaming"
        )
    return workers


def images_of_a_run(accelerator: Accelerator, images: Images | Stream, args: PretrainTrainingArguments) -> int:
    """How many images there are; for a stream that does not say, as many as the run uses, which is then one epoch."""
    if images.num_images is not None:
        return images.num_images
    if args.max_train_steps is None:
        raise ValueError(f"{images.description} does not say how many images it holds; give max_train_steps")
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    return args.max_train_steps * per_step


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
    crops = f"{job.args.min_crop_scale:.0%} to 100% of an image's area"
    mirrored = {"left and right": job.args.horizontal_flip, "upside down": job.args.vertical_flip}
    turns = [f"{share:.0%} mirrored {how}" for how, share in mirrored.items() if share]
    lines["crops"] = ", ".join([crops, *turns])
    lines["labels"] = job.images.label_summary
    if job.images.not_read:
        lines["not read"] = job.images.not_read
    if job.probe_images is not None:
        if job.images.has_labels and classes_of(job.images, job.probe_images) is None:
            lines["labels"] += f"; without online accuracies: {job.probe_images.description} has no such labels"
        lines["evaluated on"] = f"{job.probe_images.description}, every {eval_steps(job, record):,} steps"
    for name, text in lines.items():
        job.accelerator.print(f"  {name:<16} {text}")
    if warning:
        job.accelerator.print(f"warning: {warning}")
    if decoder > encoder:
        job.accelerator.print(
            "warning: the decoder, which only pre-training needs, is larger than the encoder; leave out its sizes, and "
            "they follow from the encoder's"
        )


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
        values = evaluate_features(job, monitor, state, micro_batch)
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


def make_monitor(job: Job) -> Monitor | None:
    if job.probe_images is None:
        return None
    classes, size = classes_of(job.images, job.probe_images), job.config.image_height_width
    probe_images = prepare_probe_images(
        job.accelerator, job.probe_images, job.processor, size, job.plan.batch_size, classes is not None, job.args.seed,
        trained_on=job.probe_images is job.images,
    )  # fmt: skip
    labels = None if classes is None or isinstance(job.images, Stream) else job.images.labels()
    return Monitor(job.accelerator, job.config, probe_images, labels, classes, job.processor, job.args.seed)


def eval_steps(job: Job, record: dict[str, Any]) -> int:
    """Steps between evaluations: as asked for, or so that they take 1 % of the time, but ten in a short run.

    Args:
        record: what `run.json` holds; also the number of steps, once it has been measured.
    """
    count = job.probe_images.num_images if job.probe_images is not None else None
    images = min(MOST_IMAGES, count or MOST_IMAGES)
    usual = record.get("eval_steps") or estimated_steps(job.config, job.plan, images)
    return job.args.eval_steps or min(usual, max(1, job.schedule.total_steps // EVALUATIONS))


def logging_steps(job: Job) -> int:
    """Steps between lines of `metrics.jsonl`: as asked for, or 50, but in a short run one for each evaluation.

    The same for the whole run, so by the estimate.
    """
    if job.args.logging_steps is not None or job.probe_images is None:
        return job.args.logging_steps or USUAL_LOGGING
    return min(USUAL_LOGGING, eval_steps(job, {}))


def evaluates(job: Job, record: dict[str, Any], step: int) -> bool:
    """Whether the line of `metrics.jsonl` at a step comes with an evaluation; the first one does by default."""
    is_first = job.args.eval_steps is None and step <= logging_steps(job)
    return is_first or is_due(step, job.schedule.total_steps, logging_steps(job), eval_steps(job, record))


def evaluate_features(job: Job, monitor: Monitor, state: State, batch: dict) -> dict[str, float | None]:
    """Measure the features; show it by a line on the terminal, and by figures in the run folder and in the trackers."""
    values, reconstructed = monitor.evaluate(state.model, batch, state.step)
    if job.accelerator.is_main_process:
        most = min(monitor.probe_images.count, job.config.hidden_size)
        tqdm.write(f"step {state.step:,}: {in_words(values, most)}")
        tile = gallery.save_tile(job.folder, state.step, reconstructed)
        track_image(job.accelerator, "reconstructions", tile, state.step)
    return values


def in_words(values: dict[str, float | None], most: int) -> str:
    """Diagnostics on one line; `most` is what the rank of the probe images' features can be."""
    if "effective_rank_cls" not in values:
        return "nothing can be measured: no probe image can be read, or no feature is finite"
    ranks = " and ".join(f"{values[f'effective_rank_{pooling}']:.1f} ({pooling})" for pooling in ("cls", "mean"))
    text = f"effective rank {ranks} of at most {most}"
    for name, title in {"online_top1": "linear classifier", "online_knn_top1": "nearest neighbours"}.items():
        text += f", {title} {values[name]:.1%}" if name in values else ""
    norms = [value for name, value in values.items() if name.startswith("grad_norm_")]  # reconstruction, regularizer
    return text + (f", gradient of the terms {norms[0]:.3g} and {norms[1]:.2g}" if None not in norms else "")


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
