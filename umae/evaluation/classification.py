"""Evaluate a classifier as it is, without training anything.

import umae

print(umae.evaluate("runs/mine_finetuned", "labelled_images")["top1"])
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from configuration_umae import UMAEConfig
from modeling_umae import UMAEForImageClassification
from umae.convert import load_exactly, read_model
from umae.data.classes import multi_hot
from umae.data.images import Images, held_out_splits, load_images
from umae.data.inputs import load_processor
from umae.evaluation.accuracy import ONE_CLASS, SEVERAL_CLASSES, percent
from umae.evaluation.problem import MULTI_LABEL, SINGLE_LABEL
from umae.training.hardware import num_workers


def evaluate(
    model: str,
    dataset: str | Images,
    split: str | None = None,
    batch_size: int = 64,
    dataloader_num_workers: int | None = None,
) -> dict[str, Any]:
    """Accuracy and cross entropy of a classifier on labelled images; under a launcher the processes share them.

    Classes are told by their names where the model and the images both have some, else by their order.

    Args:
        model: a folder of `umae finetune` or `umae probe`, a ViT classifier, a fine-tuned file of MAE's code, or a name
            on the Hub.
        dataset: a name as for `load_images`, or images that it has loaded.
        split: which split to load; by default `test` or `validation`.
        batch_size: images per forward pass.
        dataloader_num_workers: processes that read images; by default a core each beside a GPU.

    Returns:
        `top1`, `mean_class_top1` and `top5` (None with fewer than five classes) in percent, of a classifier of several
        classes per image `mAP`, `f1_micro` and `f1_macro`; `loss` in nats, `images`, and `unreadable`, the errors of
        images that cannot be read, which count as wrong and have no loss.

    Raises:
        ValueError: the model has no classifier, or its classes or their number per image are not those of the images.
    """
    config, tensors = read_model(model)
    if "classifier.weight" not in tensors:
        raise ValueError(f"{model} holds no classifier; train one with umae finetune or umae probe")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    classifier = load_exactly(UMAEForImageClassification(config), tensors, model)
    if isinstance(dataset, str):
        splits = [split] if split else held_out_splits(dataset, None, "train")
        if not splits:
            raise ValueError(f"{dataset} has no split test or validation; name the one to evaluate on with split")
        dataset = load_images(dataset, split=splits[0])
    num_classes = len(tensors["classifier.weight"])
    labels = labels_of(dataset, config, num_classes)
    accelerator = Accelerator()
    problem = MULTI_LABEL if _is_multi_label(config) else SINGLE_LABEL
    accuracy, loss, unreadable = problem.evaluate(
        labels, model=classifier.to(accelerator.device), images=dataset,
        processor=load_processor(model, config.image_height_width), batch_size=batch_size,
        num_workers=num_workers(accelerator.device, dataloader_num_workers), num_classes=num_classes,
        accelerator=accelerator,
    )  # fmt: skip
    return {
        **{name: percent(accuracy.get(name)) for name in problem.metrics},
        "loss": loss,
        "images": len(dataset),
        "unreadable": unreadable,
    }


def _is_multi_label(config: UMAEConfig) -> bool:
    return config.problem_type == MULTI_LABEL.problem_type


def labels_of(images: Images, config: UMAEConfig, num_classes: int) -> torch.Tensor:
    """The labels of the images as the model's classes count: int64 (N,), or of lists of classes bool (N, num_classes).

    Raises:
        ValueError: the images have classes that the model does not have, or one class each and the model any number.
    """
    if images.multi_label != _is_multi_label(config):
        one, lists = "one class for each image", "a list of classes for each image"
        has, knows = (lists, one) if images.multi_label else (one, lists)
        raise ValueError(f"{images.description} has {has}, and the model has learned {knows}; use other images")
    names = images.label_names
    if images.multi_label:
        found = sorted({label for row in images.label_lists() for label in row})
        names = names or (found if isinstance(found[0], str) else None)
        labels = multi_hot(images, names or [str(number) for number in range(found[-1] + 1)])
        highest = labels.shape[1] - 1
    else:
        labels = images.labels()
        highest = int(labels.max())
    by_name = {str(name): int(label) for label, name in (config.id2label or {}).items()}
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in by_name)  # as transformers names what has no names
    if names is None or unnamed:
        if highest >= num_classes:
            raise ValueError(f"{images.description} has labels up to {highest}, and the model {num_classes} classes")
        position = torch.arange(highest + 1)
    else:
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise ValueError(
                f"{images.description} has classes that the model does not have, such as {', '.join(unknown[:3])}; the "
                f"model's are {', '.join(list(by_name)[:5])}, ..."
            )
        position = torch.tensor([by_name[name] for name in names])
    if not images.multi_label:
        return position[labels]
    of_the_model = torch.zeros(len(images), num_classes, dtype=torch.bool)
    of_the_model[:, position] = labels
    return of_the_model


def main(argv: Sequence[str]) -> None:
    """Evaluate a classifier on labelled images, without training."""
    parser = argparse.ArgumentParser(prog="umae evaluate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "model", help="folder of a fine-tuning, a probe or a ViT classifier, a file, or a name on the Hub"
    )
    parser.add_argument("dataset", help="folder of labelled images, name on the Hub, or `digits`")
    parser.add_argument("--split", help="split to evaluate on (default test or validation)")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (default 64)")
    parser.add_argument("--dataloader_num_workers", type=int, help="processes that read (default a core each on GPUs)")
    args = parser.parse_args(argv)
    results = evaluate(args.model, args.dataset, args.split, args.batch_size, args.dataloader_num_workers)
    if PartialState().is_main_process:
        for error in results["unreadable"]:
            print(f"counted as wrong: {error}")
        titles = ONE_CLASS | SEVERAL_CLASSES
        accuracy = [f"{titles[name]} {results[name]:.2f}%" for name in titles if results.get(name) is not None]
        print(f"{', '.join(accuracy)}, loss {results['loss']:.4f}, of {results['images']:,} images")
