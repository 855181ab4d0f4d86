"""What a run of pre-training is to do, and with which images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from arguments_umae import PretrainDataArguments, PretrainTrainingArguments
from umae import UMAEConfig, UMAEImageProcessor
from umae.data.batches import Plan
from umae.data.classes import load_first_labelled
from umae.data.images import Images, held_out_splits, load_images
from umae.data.streaming import Stream, load_stream
from umae.training.hardware import main_process_first, num_workers, usual_workers
from umae.training.schedules import Schedule


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
        if not splits:
            return images
        probe_images = load_first_labelled(load, splits, accelerator.print).read_as(images.reading)
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
