#!/usr/bin/env python
"""Pre-train U-MAE on pictures, without labels.

    python run_pretrain.py                                    # the bundled digits, two minutes on a laptop
    accelerate launch run_pretrain.py --dataset_name my_pictures --output_dir runs/mine

Run the same command again after an interruption and it continues from its newest checkpoint.
"""

import dataclasses
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tqdm.auto import tqdm
from transformers import ViTImageProcessorPil

from umae import UMAEConfig, UMAEForPreTraining, cards, checkpoints, hub, seeding
from umae.arguments import Between, check_launch, flag, parse_arguments, parse_overrides
from umae.data import Pictures, Plan, load_pictures, training_loader
from umae.pictures import reconstruction_strip
from umae.schedules import decay_groups, learning_rate_at
from umae.training import LOGGED, train_step
from umae.transforms import evaluation_processor


@dataclass
class DataArguments:
    dataset_name: str = flag("digits", "Name on the Hub, local folder of pictures or of parquet, or `digits`.")
    dataset_config_name: str | None = flag(None, "Configuration of a Hub data set.")
    train_split: str = flag("train", "Split to train on; slices such as `train[:10%%]` for Hub data sets and parquet.")
    image_column_name: str | None = flag(None, "Column of the pictures; found by its type if there is one.")
    label_column_name: str | None = flag(None, "Column of the labels, which pre-training does not use.")
    dataloader_num_workers: Annotated[int, Between(0)] = flag(
        0, "Processes that read and crop pictures, for each training process."
    )


@dataclass
class ModelArguments:
    model_name_or_path: str | None = flag(None, "Weights to start from: a run folder or a Hub id (U-MAE or MAE).")
    config_overrides: str | None = flag(None, "Fields of UMAEConfig: `hidden_size=192,num_hidden_layers=12`.")
    image_size: Annotated[int | None, Between(1)] = flag(None, "Side of the square crops, in pixels. [224]")
    patch_size: Annotated[int | None, Between(1)] = flag(None, "Side of a patch, in pixels; divides image_size. [16]")
    mask_ratio: Annotated[float | None, Between(0, 1)] = flag(None, "Share of the patches that is hidden. [0.75]")
    norm_pix_loss: bool | None = flag(None, "Reconstruct pixels normalised within each patch. [true]")
    uniformity_weight: Annotated[float | None, Between(0)] = flag(
        None, "Lambda, the weight of the uniformity term; 0 is plain MAE. [0.01]"
    )
    pooling: Literal["cls", "mean"] | None = flag(None, "The feature: class token or mean of the patches. [cls]")


@dataclass
class TrainingArguments:
    output_dir: str = flag("runs/umae", "The run folder: weights, metrics, pictures, card and checkpoints.")
    recipe: str | None = flag(None, "YAML file with values for these flags; flags override it.")
    num_train_epochs: Annotated[int, Between(1)] = flag(200, "Passes over the pictures.")
    max_train_steps: Annotated[int | None, Between(1)] = flag(
        None, "Optimiser steps; overrides the epochs and sets the schedule's length."
    )
    per_device_train_batch_size: Annotated[int, Between(1)] = flag(64, "Pictures of a forward pass on each process.")
    gradient_accumulation_steps: Annotated[int, Between(1)] = flag(1, "Forward passes for each optimiser step.")
    base_learning_rate: Annotated[float, Between(0)] = flag(
        1.5e-4, "Learning rate for 256 pictures a step; scaled by the effective batch."
    )
    weight_decay: Annotated[float, Between(0)] = flag(0.05, "AdamW's decay of tensors with more than one dimension.")
    warmup_epochs: Annotated[float | None, Between(0)] = flag(None, "Epochs of linear warm-up. [a tenth of the steps]")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "[what `accelerate config` says, else no]")
    checkpointing_steps: Annotated[int, Between(1)] = flag(500, "Steps between checkpoints.")
    checkpoints_total_limit: Annotated[int, Between(1)] = flag(2, "Checkpoints to keep.")
    logging_steps: Annotated[int, Between(1)] = flag(
        50, "Steps between lines of metrics.jsonl, each the mean since the line before."
    )
    report_to: str = flag("none", "Trackers, separated by commas: tensorboard, wandb, trackio.")
    seed: Annotated[int, Between(0)] = flag(0, "Of weights, order, crops, flips and masks.")
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the finished run folder to the Hub."})
    hub_model_id: str | None = flag(None, "Repository to upload to: `name/model`. [name of output_dir]")


DIGITS_RECIPE = Path(__file__).resolve().parent / "recipes" / "digits.yaml"


def main(argv: list[str]) -> None:
    data_args, model_args, args = parse(argv)
    accelerator = make_accelerator(args)
    check_launch(os.environ, accelerator.num_processes)
    set_seed(args.seed)

    pictures = load_data(accelerator, data_args)
    model = make_model(accelerator, model_args)
    plan = make_plan(accelerator, pictures, args)
    schedule = make_schedule(plan, args)
    run = describe(accelerator, data_args, args, pictures, model.config, plan, schedule)

    folder = Path(args.output_dir)
    if open_run(accelerator, folder, run) == "finished":
        accelerator.print(f"{folder} holds this run, finished; nothing to do")
    else:
        if args.push_to_hub and accelerator.is_main_process:
            hub.check_access(args.hub_model_id or folder.resolve().name)  # now rather than after hours of training
        announce(accelerator, run, model)
        train(accelerator, data_args, args, folder, pictures, model, plan, schedule, run)
        if accelerator.is_main_process:
            finish(folder, pictures, schedule.total_steps, run, args.seed)
    if args.push_to_hub and accelerator.is_main_process:
        print("pushed to", hub.push_folder(folder, args.hub_model_id or folder.resolve().name))
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------------------------------
# What will be done


def parse(argv: list[str]) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """The command line. The digits, 8 x 8 pixels small, come with sizes of their own unless a recipe is given."""
    types = (DataArguments, ModelArguments, TrainingArguments)
    data, model, training = parse_arguments(types, argv)
    if data.dataset_name == "digits" and training.recipe is None:
        data, model, training = parse_arguments(types, ["--recipe", str(DIGITS_RECIPE), *argv])
    return data, model, training


def make_accelerator(args: TrainingArguments) -> Accelerator:
    trackers = [name.strip() for name in args.report_to.split(",") if name.strip() not in ("", "none")]
    available = [str(name) for name in get_available_trackers()]
    for name in trackers:  # Accelerate would drop it without a word
        if name not in available:
            raise ValueError(
                f"--report_to {name}: not installed or not known; here are {', '.join(available) or 'none'}"
            )
    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers or None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # the position tables never change
        project_dir=Path(args.output_dir) / "logs",
    )


def load_data(accelerator: Accelerator, args: DataArguments) -> Pictures:
    with accelerator.main_process_first():  # the others find the main process' cache
        return load_pictures(
            args.dataset_name,
            args.dataset_config_name,
            args.train_split,
            args.image_column_name,
            args.label_column_name,
        )


def make_model(accelerator: Accelerator, args: ModelArguments) -> UMAEForPreTraining:
    """A fresh model, or one that starts from weights; what is not said stays as the configuration has it."""
    names = ("image_size", "patch_size", "mask_ratio", "norm_pix_loss", "uniformity_weight", "pooling")
    said = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    fields = [field.name for field in dataclasses.fields(UMAEConfig)]
    overrides = {**parse_overrides(args.config_overrides, fields, "--config_overrides"), **said}
    # On CPUs the backward pass of fused attention is slower than attention written out
    attention = "eager" if accelerator.device.type == "cpu" else "sdpa"
    if args.model_name_or_path is None:
        return UMAEForPreTraining._from_config(UMAEConfig(**overrides), attn_implementation=attention)
    model, loading = UMAEForPreTraining.from_pretrained(
        args.model_name_or_path, attn_implementation=attention, output_loading_info=True, **overrides
    )
    wrong = [key for key in loading["missing_keys"] if not key.startswith(("decoder.", "vit.fc_norm."))]
    wrong += loading["unexpected_keys"] + [key for key, *_ in loading["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{args.model_name_or_path} does not fit: {len(wrong)} tensors are missing or left over, such as "
            f"{', '.join(sorted(wrong)[:5])}; give a U-MAE or MAE checkpoint and its sizes"
        )
    if loading["missing_keys"]:
        accelerator.print(f"{args.model_name_or_path} holds an encoder only; the decoder starts fresh")
    return model


def make_plan(accelerator: Accelerator, pictures: Pictures, args: TrainingArguments) -> Plan:
    plan = Plan(
        pictures=len(pictures),
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=accelerator.num_processes,
        seed=args.seed,
    )
    if plan.steps_per_epoch == 0:
        raise ValueError(
            f"{pictures.description} holds {len(pictures)} pictures, fewer than one step of {plan.pictures_per_step} "
            f"({plan.batch_size} per device x {plan.processes} processes x {plan.accumulation} accumulated); lower "
            f"--per_device_train_batch_size"
        )
    return plan


@dataclass(frozen=True)
class Schedule:
    """Length and height of the learning-rate curve, in optimiser steps."""

    total_steps: int
    warmup_steps: float
    learning_rate: float


def make_schedule(plan: Plan, args: TrainingArguments) -> Schedule:
    total = args.max_train_steps or args.num_train_epochs * plan.steps_per_epoch
    warmup = total / 10 if args.warmup_epochs is None else args.warmup_epochs * plan.steps_per_epoch
    if warmup > total:
        raise ValueError(
            f"--warmup_epochs {args.warmup_epochs:g} is {warmup:g} steps, longer than the whole run of {total}; lower "
            f"it, or leave it out for a tenth of the run"
        )
    return Schedule(total, warmup, args.base_learning_rate * plan.pictures_per_step / 256)


def describe(
    accelerator: Accelerator,
    data_args: DataArguments,
    args: TrainingArguments,
    pictures: Pictures,
    config: UMAEConfig,
    plan: Plan,
    schedule: Schedule,
) -> dict[str, Any]:
    """What goes into `run.json`. `identity` is what must stay the same when a run is continued."""
    sizes = config.to_dict()
    identity = {
        "dataset": pictures.description,
        "pictures": len(pictures),
        "config": {name: sizes[name] for name in sorted(sizes) if name in UMAEConfig.__annotations__},
        "seed": args.seed,
        "pictures_per_step": plan.pictures_per_step,
        "gradient_accumulation_steps": plan.accumulation,
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "learning_rate": schedule.learning_rate,
        "weight_decay": args.weight_decay,
        "mixed_precision": accelerator.mixed_precision,
    }
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "identity": json.loads(json.dumps(identity)),
        "data": {"description": pictures.description, "pictures": len(pictures)},
        "hardware": f"{accelerator.num_processes} x {device}",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "seconds": 0.0,
        "finished": False,
    }


def open_run(accelerator: Accelerator, folder: Path, run: dict[str, Any]) -> str:
    """Start a run folder, or find what it holds: "new", "continued" or "finished".

    Raises:
        ValueError: the folder holds something else, or a run with other settings.
    """
    status = "new"
    if (folder / "run.json").exists():
        before = json.loads((folder / "run.json").read_text())
        for name, value in run["identity"].items():
            if before["identity"].get(name) != value:
                raise ValueError(
                    f"{folder} holds a run with {name} {before['identity'].get(name)}, not {value}; use another "
                    f"--output_dir (and --model_name_or_path {folder} to start from its weights)"
                )
        status = "finished" if before["finished"] else "continued"
        run["seconds"] = before["seconds"]
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; give a new or empty --output_dir")
    accelerator.wait_for_everyone()  # nobody may look after the main process has begun to write
    if accelerator.is_main_process and status == "new":
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
    return status


def announce(accelerator: Accelerator, run: dict[str, Any], model: UMAEForPreTraining) -> None:
    """Print what is about to be done, before it is done."""
    identity, config = run["identity"], model.config
    patches = config.grid[0] * config.grid[1]
    visible = int(patches * (1 - config.mask_ratio))
    accumulation = identity["gradient_accumulation_steps"]
    features = identity["pictures_per_step"] // accumulation
    steps, batch = identity["total_steps"], identity["pictures_per_step"]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    lines = {
        "pictures": f"{identity['pictures']:,} from {identity['dataset']}, {steps // (identity['pictures'] // batch)} "
        f"epochs",
        "input": f"{config.image_height_width[0]} x {config.image_height_width[1]} pixels, {patches} patches, "
        f"{visible} visible",
        "model": f"{millions:.1f} million parameters with decoder, from {config.name_or_path or 'scratch'}",
        "steps": f"{steps:,}, of which {identity['warmup_steps']:g} warm-up",
        "effective batch": f"{batch} = {batch // accumulation // accelerator.num_processes} per device x "
        f"{accelerator.num_processes} processes x {accumulation} accumulated",
        "learning rate": f"{identity['learning_rate']:.3g} at its peak",
        "uniformity": f"weight {config.uniformity_weight:g}, mean over the {config.pooling} features of {features} "
        f"pictures" + (f", then over {accumulation} micro-batches" if accumulation > 1 else ""),
        "precision": f"{identity['mixed_precision']} on {run['hardware']}",
    }
    for name, text in lines.items():
        accelerator.print(f"  {name:<16} {text}")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(
    accelerator: Accelerator,
    data_args: DataArguments,
    args: TrainingArguments,
    folder: Path,
    pictures: Pictures,
    model: UMAEForPreTraining,
    plan: Plan,
    schedule: Schedule,
    run: dict[str, Any],
) -> None:
    """From the newest checkpoint, if there is one, to the last step; leaves `step-N/` of the last step behind."""
    processor = evaluation_processor(model.config.image_height_width)
    config = model.config
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    failed = torch.zeros((), device=accelerator.device)
    window = torch.zeros(len(LOGGED) + 1, device=accelerator.device)  # sums since the last line, and their count
    start = restore(accelerator, folder, model, optimizer, window)
    log = MetricsLog(accelerator, folder, start, args, run["identity"])

    loader = training_loader(
        pictures, plan, accelerator.process_index, config.image_height_width, start, schedule.total_steps,
        data_args.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    micro_batches = iter(loader)
    model.train()
    clock, seconds_before = time.perf_counter(), run["seconds"]
    for step in log.progress(range(start, schedule.total_steps), schedule.total_steps, plan.pictures_per_step):
        seeding.seed_step(args.seed, step, accelerator.process_index)
        learning_rate = learning_rate_at(step, schedule.total_steps, schedule.warmup_steps, schedule.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        values = train_step(
            accelerator, model, optimizer, [next(micro_batches) for _ in range(plan.accumulation)], failed,
            num_patches=config.grid[0] * config.grid[1], seed=args.seed,
            mean=processor.image_mean, std=processor.image_std,
        )  # fmt: skip
        window += torch.cat([values, values.new_ones(1)])

        done, last = step + 1, step + 1 == schedule.total_steps
        if done % args.logging_steps == 0 or last:
            stop_if_failed(failed, done)
            log.write(done, done / plan.steps_per_epoch, learning_rate, window)
        if done % args.checkpointing_steps == 0 or last:
            stop_if_failed(failed, done)
            run["seconds"] = seconds_before + time.perf_counter() - clock
            save(accelerator, folder, done, args.checkpoints_total_limit, model, optimizer, processor, window, run)


def stop_if_failed(failed: torch.Tensor, step: int) -> None:
    """The weights are as they were before the first value that was not finite; end the run before one is saved."""
    if failed.item():
        raise FloatingPointError(
            f"a loss or gradient was not finite at or before step {step}; the last checkpoint is from before that. "
            f"Lower --base_learning_rate, or train with --mixed_precision no or bf16"
        )


def restore(accelerator: Accelerator, folder: Path, model, optimizer, window: torch.Tensor) -> int:
    """Put the newest checkpoint back into model, optimiser and window; returns the step to go on from."""
    steps = checkpoints.checkpoint_steps(folder)
    if not steps:
        return 0
    newest = folder / f"step-{steps[-1]}"
    saved = UMAEForPreTraining.from_pretrained(newest)
    accelerator.unwrap_model(model).load_state_dict(saved.state_dict())
    tensors, state = checkpoints.read_training_state(newest)
    window.copy_(tensors.pop("window"))
    checkpoints.restore_optimizer(model, optimizer.optimizer, tensors)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"continuing from {newest}")
    return state["step"]


def save(accelerator, folder: Path, step: int, keep: int, model, optimizer, processor, window, run) -> None:
    """Write `step-N/`; every process takes part, the main one writes."""
    state_dict = accelerator.get_state_dict(model)
    tensors = checkpoints.optimizer_tensors(model, optimizer.optimizer)
    window.copy_(accelerator.reduce(window, "mean"))  # what every process goes on with, resumed or not
    state = {"step": step, "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}

    def write(target: Path) -> None:
        accelerator.unwrap_model(model).save_pretrained(target, state_dict=state_dict)
        processor.save_pretrained(target)
        checkpoints.write_training_state(target, {**tensors, "window": window.cpu()}, state)

    if accelerator.is_main_process:
        checkpoints.save_checkpoint(folder, step, write, keep)
        checkpoints.write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
    accelerator.wait_for_everyone()


class MetricsLog:
    """`metrics.jsonl`, the trackers and the progress bar: the same numbers in three places."""

    def __init__(self, accelerator: Accelerator, folder: Path, start: int, args: TrainingArguments, identity: dict):
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        self.bar, self.last_time, self.last_step = None, time.perf_counter(), start
        if accelerator.is_main_process:  # lines of steps after the checkpoint will be written again
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
            checkpoints.write_text(self.path, "".join(line + "\n" for line in kept))
        flat = {name: value for name, value in identity.items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("umae", config={**flat, **{k: str(v) for k, v in identity["config"].items()}})

    def progress(self, steps: range, total: int, pictures_per_step: int):
        """The steps, with a bar on the main process: rate, time left, and the newest numbers."""
        self.pictures_per_step = pictures_per_step
        self.bar = tqdm(
            steps, initial=steps.start, total=total, unit="step", dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        return self.bar

    def write(self, step: int, epoch: float, learning_rate: float, window: torch.Tensor) -> None:
        """One line for the steps since the last one; empties the window."""
        sums = self.accelerator.reduce(window, "mean").tolist()
        window.zero_()
        now = time.perf_counter()
        means = {name: value / sums[-1] for name, value in zip(LOGGED, sums[:-1], strict=True)}
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            **means,
            "participation_ratio": 1 / means["uniformity_loss"] if means["uniformity_loss"] else 0.0,
            "learning_rate": learning_rate,
            "pictures_per_second": round((step - self.last_step) * self.pictures_per_step / (now - self.last_time), 1),
        }
        self.last_time, self.last_step = now, step
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix_str(
                f"loss {means['reconstruction_loss']:.3f}, rank {line['participation_ratio']:.1f}, "
                f"{line['pictures_per_second']:.0f} pictures/s"
            )
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)


# ----------------------------------------------------------------------------------------------------------------------
# What stands at the end


def finish(folder: Path, pictures: Pictures, total_steps: int, run: dict[str, Any], seed: int) -> None:
    """Put the last checkpoint's model at the top of the run folder, with a picture and a card."""
    newest = folder / f"step-{total_steps}"
    for file in newest.iterdir():
        if file.name not in (checkpoints.OPTIMIZER_FILE, checkpoints.STATE_FILE):
            checkpoints.copy_file(file, folder / file.name)
    model = UMAEForPreTraining.from_pretrained(folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(folder)
    shown = seeding.permutation(seed, 0, len(pictures))[:8]
    pixel_values = processor(images=list(pictures.read_many(shown.tolist())), return_tensors="pt")["pixel_values"]
    noise = seeding.uniform(seed, seeding.MASK, 0, shown, model.config.grid[0] * model.config.grid[1])
    strip = reconstruction_strip(model, pixel_values, noise, processor.image_mean, processor.image_std)
    strip.save(folder / "reconstructions.png")
    checkpoints.write_text(folder / "README.md", cards.model_card(folder))
    run["finished"] = True
    checkpoints.write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
    last = cards.read_metrics(folder)[-1]
    print(
        f"finished in {run['seconds'] / 60:.1f} minutes: reconstruction loss {last['reconstruction_loss']:.4f}, "
        f"uniformity {last['uniformity_loss']:.4f} (features fill {last['participation_ratio']:.1f} of "
        f"{model.config.hidden_size} dimensions)\n"
        f"weights and card in {folder}, pictures in {folder / 'reconstructions.png'}"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"run_pretrain.py: {error}")
