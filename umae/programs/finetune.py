"""Fine-tune a pre-trained encoder on labelled images, as a whole, by MAE's recipe."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from arguments_umae import (
    FINETUNE,
    AugmentationArguments,
    FinetuneDataArguments,
    FinetuneModelArguments,
    FinetuneTrainingArguments,
    arguments_of,
)
from umae import UMAEConfig, UMAEForImageClassification, files
from umae.convert import load_exactly, read_model, resize_positions
from umae.data.augmentation import Strengths, augment, check_rand_augment
from umae.data.batches import Plan, TrainingImages, decode_all, training_loader
from umae.data.classes import load_labelled
from umae.data.decoding import reading_of, to_tensor
from umae.data.images import Images
from umae.data.inputs import evaluation_processor, load_processor
from umae.evaluation.accuracy import percent
from umae.evaluation.problem import MULTI_LABEL, SINGLE_LABEL, Problem
from umae.programs.keywords import keywords
from umae.programs.shell import begin, carry_out, make_plan, make_settings, print_plan
from umae.sharing import cards
from umae.speed import encoder_flops
from umae.training import checkpoints
from umae.training.failures import log_on
from umae.training.finetuning import VALUES, classification_losses
from umae.training.folder import Run, write_run
from umae.training.hardware import fast_attention, main_process_first, num_workers, own_state, set_threads
from umae.training.log import is_due
from umae.training.loop import Losses, Task
from umae.training.needs import needs
from umae.training.schedules import Schedule, layer_decay_groups, make_schedule
from umae.training.state import State

BETAS = (0.9, 0.999)  # of AdamW
USUAL_WARMUP = 5  # epochs, as MAE has them at any length; at most half of a run
REPORT = "finetune.json"


@keywords("finetune")
def finetune(**given: Any) -> Run:
    """Fine-tune an encoder on labelled images, by MAE's recipe: `umae finetune` from Python, with the same names as
    keywords.

    Called again with the same arguments, it continues from the newest checkpoint in `output_dir`.

    Returns:
        The run: its folder, metrics and model, a classifier.

    Raises:
        ValueError: an argument, the images, the weights or the folder are not as they should be.
        FloatingPointError: a loss or gradient was not finite.
    """
    with own_state():
        return run(*arguments_of(FINETUNE, given))


def run(
    data_args: FinetuneDataArguments,
    model_args: FinetuneModelArguments,
    augmentation_args: AugmentationArguments,
    args: FinetuneTrainingArguments,
) -> Run:
    """Fine-tune as the arguments say, in the run folder that they name."""
    accelerator = begin(args, args.output_dir, args.seed)
    train_images, test_images, names = load_data(accelerator, data_args)
    problem = MULTI_LABEL if train_images.multi_label else SINGLE_LABEL
    model = make_model(accelerator, model_args, names, problem)
    processor = make_processor(model_args, model.config.image_height_width)
    train_images, test_images = (images.read_as(reading_of(processor)) for images in (train_images, test_images))
    train_images.check_readable()
    if augmentation_args.rand_augment > 0:
        check_rand_augment(to_tensor(next(train_images.sample(0, len(train_images)))[1]))
    plan = make_plan(accelerator, len(train_images), train_images.description, args, args.seed)
    set_threads(accelerator, os.environ, flops_of(model.config) * plan.batch_size)
    total_steps = args.max_train_steps or args.num_train_epochs * plan.steps_per_epoch
    job = Job(
        accelerator=accelerator,
        folder=Path(args.output_dir),
        train=train_images,
        test=test_images,
        names=names,
        problem=problem,
        config=model.config,
        processor=processor,
        plan=plan,
        schedule=make_schedule(
            total_steps,
            plan.steps_per_epoch,
            plan.images_per_step,
            args.base_learning_rate,
            args.warmup_epochs,
            usual_warmup_steps=min(USUAL_WARMUP * plan.steps_per_epoch, total_steps / 2),
        ),
        min_crop_scale=augmentation_args.min_crop_scale,
        strengths=make_strengths(augmentation_args, plan),
        workers=num_workers(accelerator.device, data_args.dataloader_num_workers),
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
            args.logging_steps,
            flops_of(model.config),
            args.min_learning_rate,
        ),
        identity_of(job, model_args.model_name_or_path),
        initial_weights=model_args.model_name_or_path,
        make_task=lambda log, record: make_task(job, model, record),
        announce=lambda record: announce(job, record, model),
        finish=lambda record: finish(job, record),
        plan_only=args.plan,
        hub_repo=(args.hub_model_id, args.hub_private_repo) if args.push_to_hub else None,
    )


# ----------------------------------------------------------------------------------------------------------------------
# What will be done


@dataclass(frozen=True)
class Job:
    """What is to be done, and with what; nothing of it changes.

    Args:
        names: of the classes, by label.
        problem: whether an image has one class, or any number of them.
        workers: loader processes beside each of training.
    """

    accelerator: Accelerator
    folder: Path
    train: Images
    test: Images
    names: list[str]
    problem: Problem
    config: UMAEConfig
    processor: Any  # of transformers, with image_mean and image_std
    plan: Plan
    schedule: Schedule
    min_crop_scale: float
    strengths: Strengths
    workers: int
    args: FinetuneTrainingArguments


def load_data(accelerator: Accelerator, args: FinetuneDataArguments) -> tuple[Images, Images, list[str]]:
    """The images to train on, those to evaluate on, and the names of the classes."""
    with main_process_first(accelerator):  # the others find the main process' cache
        return load_labelled(
            args.dataset_name, args.dataset_config_name, args.train_split, args.test_split, args.image_column_name,
            args.label_column_name, accelerator.print, args.heldout, multi_label=True,
        )  # fmt: skip


def make_model(
    accelerator: Accelerator, args: FinetuneModelArguments, names: list[str], problem: Problem = SINGLE_LABEL
) -> UMAEForImageClassification:
    """The pre-trained encoder under a fresh head; as in MAE, with a fresh norm after the mean of the patches instead of
    the encoder's own."""
    config, tensors = read_model(args.model_name_or_path)
    grid = config.grid
    if args.image_size is not None:
        config.image_size = args.image_size
    config.pooling, config.final_layernorm = args.pooling, args.pooling == "cls"
    config.drop_path_rate = args.drop_path_rate
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    config.problem_type = problem.problem_type  # not that of a classifier which the weights may be of
    config.name_or_path = args.model_name_or_path
    model = UMAEForImageClassification._from_config(
        config, attn_implementation=fast_attention(accelerator), dtype=torch.float32
    )
    left = ("decoder.", "classifier.", "vit.fc_norm.") + (() if config.final_layernorm else ("vit.layernorm.",))
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(left)}
    tensors = resize_positions(tensors, grid, config, accelerator.print)
    return load_exactly(model, tensors, args.model_name_or_path, may_be_fresh=("classifier.", "vit.fc_norm."))


def make_processor(args: FinetuneModelArguments, size: tuple[int, int]) -> Any:
    """The image processor of the weights; at another image size, one for that size that reads and
    normalises alike."""
    processor = load_processor(args.model_name_or_path, size)
    if args.image_size is None:
        return processor
    return evaluation_processor(size, reading_of(processor), processor.image_mean, processor.image_std)


def flops_of(config: UMAEConfig) -> int:
    """Floating-point operations that train on one image: the backward pass has twice as many as the forward pass."""
    return 3 * encoder_flops(config, config.grid[0] * config.grid[1])


def make_strengths(args: AugmentationArguments, plan: Plan) -> Strengths:
    if args.min_crop_scale == 0:
        raise ValueError("min_crop_scale 0 would show crops of nothing; use more than 0, 0.08 is usual")
    values = dataclasses.asdict(args)
    strengths = Strengths(**{name: values[name] for name in Strengths.__annotations__})
    if strengths.mixes and plan.batch_size % 2:
        raise ValueError(
            f"per_device_train_batch_size {plan.batch_size} is odd, and mixup and cutmix take images in pairs; use "
            f"{plan.batch_size + 1}, or mixup 0 and cutmix 0"
        )
    return strengths


def identity_of(job: Job, initial_weights: str) -> dict[str, Any]:
    """What makes this run this run, whatever machine continues with it."""
    fields = job.config.to_dict()
    return {
        "task": "fine-tuning",
        "dataset": job.train.description,
        "pictures": len(job.train),
        "dataset_fingerprint": job.train.fingerprint(),
        "test_dataset": job.test.description,
        "classes": job.names,
        "problem_type": job.problem.problem_type,
        "initial_weights": initial_weights,
        "config": {name: fields[name] for name in UMAEConfig.__annotations__ if name in fields},
        "seed": job.args.seed,
        "pictures_per_step": job.plan.images_per_step,
        "gradient_accumulation_steps": job.plan.accumulation,
        **dataclasses.asdict(job.schedule),
        "min_learning_rate": job.args.min_learning_rate,
        "layer_decay": job.args.layer_decay,
        "position_table": "trained",  # which it was not in runs that do not say so
        "optimizer": "AdamW",
        "betas": BETAS,
        "weight_decay": job.args.weight_decay,
        "max_grad_norm": job.args.max_grad_norm,
        "mixed_precision": job.accelerator.mixed_precision,
        "min_crop_scale": job.min_crop_scale,
        **dataclasses.asdict(job.strengths),
    }


def announce(job: Job, record: dict[str, Any], model: UMAEForImageClassification) -> None:
    """Print what is about to be done, before it is done."""
    identity, config, plan = record["identity"], job.config, job.plan
    height, width = config.image_height_width
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    changes = {"crops from": job.min_crop_scale, **dataclasses.asdict(job.strengths)}
    lines = {
        "images": f"{len(job.train):,} from {job.train.description}, evaluated on {len(job.test):,} from "
        f"{job.test.description}",
        "labels": job.train.label_summary,
        "model": f"{millions:.1f} million parameters, {height} x {width} pixels, pooling {config.pooling}, from "
        f"{config.name_or_path}",
        "steps": f"{identity['total_steps']:,} ({identity['total_steps'] / plan.steps_per_epoch:.4g} epochs), "
        f"{identity['warmup_steps']:,.0f} of them warm-up",
        "effective batch": f"{plan.images_per_step} = {plan.batch_size} per device x {plan.processes} "
        f"process{'es' if plan.processes > 1 else ''} x {plan.accumulation} accumulated",
        "learning rate": f"{identity['learning_rate']:.3g} at its peak, times {identity['layer_decay']:g} for each "
        f"layer below",
        "regularisation": f"drop path {config.drop_path_rate:g}, "
        + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in changes.items()),
        "precision": f"{identity['mixed_precision']} on {record['hardware']}",
    }
    if job.train.not_read:
        lines["not read"] = job.train.not_read
    needed, warnings = needs(
        job.accelerator, model, Path(job.args.output_dir), plan.batch_size, job.args.checkpoints_total_limit,
        job.args.gradient_checkpointing, reconstructs=False,
    )  # fmt: skip
    print_plan(job.accelerator, lines | needed, warnings)


# ----------------------------------------------------------------------------------------------------------------------
# The task


def make_task(job: Job, model: UMAEForImageClassification, record: dict[str, Any]) -> Task:
    """What is trained: the cross entropy of augmented images; test images evaluate it."""
    accelerator, problem = job.accelerator, job.problem
    labels = problem.labels(job.train, job.names).to(accelerator.device)
    every = job.plan.steps_per_epoch if job.args.eval_steps is None else job.args.eval_steps

    def targets(index: torch.Tensor) -> torch.Tensor:
        return problem.targets(labels[index], len(job.names), job.strengths.label_smoothing)

    def losses(model: nn.Module, micro_batches: Sequence[dict], step: int) -> Losses:
        return classification_losses(
            accelerator, model, micro_batches, step, targets=targets, loss=problem.loss, seed=job.args.seed,
            strengths=job.strengths, mean=job.processor.image_mean, std=job.processor.image_std,
        )  # fmt: skip

    return Task(
        model=model,
        parameter_groups=layer_decay_groups(model, job.args.weight_decay, job.args.layer_decay),
        betas=BETAS,
        values=VALUES,
        own_values=("loss",),
        flops=flops_of(job.config),
        losses=losses,
        batches=lambda steps: make_loader(job, steps),
        line=lambda means: (means, f"loss {means['loss']:.3f}"),
        evaluate=lambda state, micro_batch: evaluate(job, state, record),
        evaluates=lambda step: is_due(step, job.schedule.total_steps, job.args.logging_steps, every),
        saved_beside=lambda: ({}, {}),
        restore=lambda tensors, state: None,
        index_name=job.train.index_name,
        description=job.train.description,
    )


def make_loader(job: Job, steps: range) -> DataLoader:
    """This process' micro-batches of some steps."""
    processor, size = job.processor, job.config.image_height_width
    augmentation = partial(
        augment, seed=job.plan.seed, strengths=job.strengths, mean=processor.image_mean, std=processor.image_std
    )
    decoded = decode_all(job.train, show_progress=job.accelerator.is_main_process)
    images = TrainingImages(job.train, size, job.plan.seed, decoded, job.min_crop_scale, augmentation)
    rank, on_gpu = job.accelerator.process_index, job.accelerator.device.type == "cuda"
    return training_loader(images, job.plan, rank, steps.start, steps.stop, job.workers, pin_memory=on_gpu)


def evaluate(job: Job, state: State, record: dict[str, Any]) -> dict[str, float]:
    """Accuracies on the test images, in 0..1; every process calls it. Those that cannot be read count as wrong, and
    `record` gets their names."""
    accuracy, _, record["unreadable_test"] = job.problem.evaluate(
        job.problem.labels(job.test, job.names), model=state.model, images=job.test, processor=job.processor,
        batch_size=job.args.per_device_eval_batch_size, num_workers=job.workers, num_classes=len(job.names),
        accelerator=job.accelerator,
    )  # fmt: skip
    log_on(job.accelerator.is_main_process)(f"step {state.step:,}: {in_words(job.problem, accuracy)}")
    return {f"test_{name}": value for name, value in accuracy.items()}


def in_words(problem: Problem, accuracy: dict[str, float]) -> str:
    """Accuracies in 0..1 on one line, in percent."""
    return ", ".join(f"{problem.metrics[name]} {value:.2%}" for name, value in accuracy.items())


# ----------------------------------------------------------------------------------------------------------------------
# What stands at the end


def finish(job: Job, record: dict[str, Any]) -> None:
    """Put the last checkpoint's model at the top of the run folder, with what it is worth and a card."""
    folder = job.folder
    checkpoints.copy_model(folder / f"step-{job.schedule.total_steps}", folder)
    last = cards.read_metrics(folder)[-1]
    accuracy = {name: last[f"test_{name}"] for name in job.problem.metrics if f"test_{name}" in last}
    report: dict[str, Any] = {name: percent(accuracy.get(name)) for name in job.problem.metrics}
    report["protocol"] = protocol(job, record, record.get("unreadable_test", []))
    files.write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    files.write_text(folder / "README.md", cards.finetune_card(folder))
    record["finished"] = True
    write_run(folder, record)
    for error in record.get("unreadable_test", []):
        tqdm.write(f"counted as wrong: {error}")
    print(
        f"finished in {cards.duration(record['seconds'])}: {in_words(job.problem, accuracy)} of {len(job.test):,} "
        f"images from {job.test.description}\nclassifier, {REPORT} and card in {folder}"
    )


def protocol(job: Job, record: dict[str, Any], unreadable: list[str]) -> dict[str, Any]:
    """Everything needed to repeat the numbers and to evaluate them."""
    identity, model = record["identity"], Path(record["identity"]["initial_weights"])
    of_training = (
        "seed", "total_steps", "warmup_steps", "pictures_per_step", "gradient_accumulation_steps", "learning_rate",
        "min_learning_rate", "layer_decay", "position_table", "optimizer", "betas", "weight_decay",
        "mixed_precision",
    )  # fmt: skip
    return {
        "model": model.resolve().name if model.exists() else str(model),
        "train": {"data": job.train.description, "pictures": len(job.train), "unreadable": len(record["unreadable"])},
        "test": {"data": job.test.description, "pictures": len(job.test), "counted_as_wrong": unreadable},
        "classes": len(job.names),
        "accuracy": "in percent, after the last step; no step was chosen by it",
        "head": f"linear on the {job.config.pooling} feature, trained with the whole encoder",
        "drop_path_rate": job.config.drop_path_rate,
        "training": {name: identity[name] for name in of_training},
        "augmentation": {"min_crop_scale": job.min_crop_scale, **dataclasses.asdict(job.strengths)},
        "evaluation_transform": json.loads(job.processor.to_json_string()),
        "versions": record["versions"],
    }
