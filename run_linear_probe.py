#!/usr/bin/env python
"""Judge a frozen encoder: linear heads and nearest neighbours on features that are computed once.

    python run_linear_probe.py --model_name_or_path runs/umae --output_dir runs/umae_probe

The model is a run folder or any U-MAE, ViT or ViTMAE checkpoint. The output folder gets `linear_probe.json`, with both
poolings and the whole protocol, and a classifier that `pipeline("image-classification")` runs.
"""

import copy
import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from script_arguments import Between, check_launch, flag, one_line_refusals, parse_arguments


@dataclass
class ProbeArguments:
    model_name_or_path: str = field(metadata={"help": "A run folder, or a U-MAE, ViT or ViTMAE on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for the report and the classifier."})
    pooling: Literal["cls", "mean"] | None = flag(None, "The classifier's feature. [what the model was trained with]")
    dataset_name: str = flag("digits", "Name on the Hub, local folder of pictures or of parquet, or `digits`.")
    dataset_config_name: str | None = flag(None, "Configuration of a Hub data set.")
    train_split: str = flag("train", "Split that the heads are trained on.")
    test_split: str | None = flag(None, "Split that is judged. [test, or else validation]")
    image_column_name: str | None = flag(None, "Column of the pictures; found by its type if there is one.")
    label_column_name: str | None = flag(None, "Column of the labels; found by its type or name.")
    per_device_eval_batch_size: Annotated[int, Between(1)] = flag(256, "Pictures of a forward pass on each process.")
    dataloader_num_workers: Annotated[int, Between(0)] = flag(0, "Processes that open pictures, for each process.")
    seed: Annotated[int, Between(0)] = flag(0, "Of the held-out part, the heads' weights and the order of pictures.")


if __name__ == "__main__":  # --help and slips of the pen are answered before the imports below, which take seconds
    with one_line_refusals("run_linear_probe.py"):
        parse_arguments((ProbeArguments,), sys.argv[1:])

import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor
from transformers.utils.logging import disable_progress_bar

from modeling_umae import UMAEForImageClassification, UMAEModel
from umae.cards import probe_card
from umae.checkpoints import write_text
from umae.collapse import effective_rank, uniformity
from umae.convert import encoder_from_pretrained, set_pooling
from umae.data import Pictures, load_pictures, split_names
from umae.features import extract_features, load_processor
from umae.metrics import TopKAccuracy
from umae.probing import LINEAR_PROTOCOL, LinearHead, knn_classify, rank_classes, train_linear_heads

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of k-NN, as DINO evaluates
REPORT = "linear_probe.json"


def main(argv: list[str]) -> None:
    (args,) = parse_arguments((ProbeArguments,), argv)
    accelerator = Accelerator()
    check_launch(os.environ, accelerator.num_processes)
    disable_progress_bar()  # transformers' own; extracting has one
    output = Path(args.output_dir)
    check_output(output)

    encoder = encoder_from_pretrained(args.model_name_or_path)
    pooling = args.pooling or encoder.config.pooling
    processor = load_processor(args.model_name_or_path)
    with accelerator.main_process_first():  # the others find the main process' cache
        train, test = load_splits(args)
    names = class_names(train, test)

    set_pooling(encoder, "mean")  # one pass then gives both features
    extract = partial(
        extract_features, encoder, processor=processor, batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers, accelerator=accelerator,
    )  # fmt: skip
    train_features, test_features = extract(train), extract(test)
    if accelerator.is_main_process:
        report, heads = {}, {}
        for feature in train_features:
            print(f"training linear heads on {feature} features")
            split = (train_features[feature], train.labels(), test_features[feature], test.labels())
            on_device = [tensor.to(accelerator.device) for tensor in split]
            report[feature], heads[feature] = judge(*on_device, num_classes=len(names), seed=args.seed)
        report["protocol"] = protocol(args, train, test, names, pooling, processor)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / REPORT, json.dumps(report, indent=2) + "\n")
        save_classifier(output, set_pooling(encoder, pooling), heads[pooling], names, processor)
        write_text(output / "README.md", probe_card(output))
        print_table(report, output)
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------------------------------
# What will be judged


def check_output(output: Path) -> None:
    """Raise `ValueError` unless the folder is new, empty, or that of an earlier probe, which is overwritten."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder as --output_dir")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT).exists():
        raise ValueError(f"{output} is not empty and holds no {REPORT}; give a new or empty --output_dir")


def load_splits(args: ProbeArguments) -> tuple[Pictures, Pictures]:
    """The pictures to train heads on, and those to judge them by."""
    columns = (args.image_column_name, args.label_column_name)
    train = load_pictures(args.dataset_name, args.dataset_config_name, args.train_split, *columns)
    test_split = args.test_split or find_test_split(split_names(args.dataset_name, args.dataset_config_name))
    if test_split == args.train_split:
        raise ValueError(f"--train_split and --test_split are both {test_split}; a head is judged on other pictures")
    return train, load_pictures(args.dataset_name, args.dataset_config_name, test_split, *columns)


def find_test_split(splits: list[str]) -> str:
    for name in ("test", "validation"):
        if name in splits:
            return name
    raise ValueError(f"there is no split test or validation; name one of {', '.join(splits)} with --test_split")


def class_names(train: Pictures, test: Pictures) -> list[str]:
    """The names of the classes, their numbers if they have none. Raises `ValueError` if the splits' labels differ."""
    found, highest_test = train.labels().unique().tolist(), int(test.labels().max())
    highest, names = found[-1], train.label_names
    if names != test.label_names:
        raise ValueError(
            f"{train.description} and {test.description} do not have the same classes: {_listed(names)} and "
            f"{_listed(test.label_names)}"
        )
    names = names or [str(label) for label in range(highest + 1)]
    if max(highest, highest_test) >= len(names):
        raise ValueError(
            f"{test.description} has labels up to {highest_test}, {train.description} up to {highest} of {len(names)} "
            f"classes"
        )
    if len(found) < 2:
        raise ValueError(f"{train.description} has the class {names[highest]} only; expected at least 2 classes")
    return names


def _listed(names: list[str] | None) -> str:
    return "plain numbers" if names is None else f"{len(names)} names ({', '.join(names[:20])})"


# ----------------------------------------------------------------------------------------------------------------------
# Judging


def judge(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    num_classes: int,
    seed: int,
) -> tuple[dict[str, Any], LinearHead]:
    """What one kind of feature is worth, accuracies in percent, and the head that shows it."""
    head = train_linear_heads(train_features, train_labels, num_classes, seed)
    logits = test_features @ head.weight.T + head.bias
    votes = knn_classify(train_features, train_labels, test_features, num_classes, NEIGHBOURS, TEMPERATURE)
    linear = accuracy(rank_classes(logits, 5 if num_classes > 5 else 1), test_labels)
    results = {
        "top1": percent(linear["top1"]),
        "top5": percent(linear["top5"]) if "top5" in linear else None,
        "knn_top1": percent(accuracy(rank_classes(votes, 1), test_labels)["top1"]),
        "effective_rank": round(effective_rank(test_features), 2),
        "uniformity": round(uniformity(test_features), 6),
        "learning_rate": head.learning_rate,
        "validation_top1": percent(head.validation_top1),
    }
    return results, head


def accuracy(guesses: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    return TopKAccuracy(keep_in_memory=True).compute(predictions=guesses.cpu(), references=labels.cpu())


def percent(fraction: float) -> float:
    return round(100 * fraction, 2)


# ----------------------------------------------------------------------------------------------------------------------
# What is left behind


def protocol(
    args: ProbeArguments, train: Pictures, test: Pictures, names: list[str], pooling: str, processor: BaseImageProcessor
) -> dict[str, Any]:
    """Everything needed to repeat the numbers and to judge them."""
    model = Path(args.model_name_or_path)
    return {
        "model": model.resolve().name if model.is_dir() else args.model_name_or_path,
        "train": {"data": train.description, "pictures": len(train)},
        "test": {"data": test.description, "pictures": len(test)},
        "classes": len(names),
        "features": {
            "cls": "class token after the encoder's norm, unmasked picture, frozen encoder, float32",
            "mean": "fc_norm of the mean of the patch tokens (no learned scale unless pre-trained with it), likewise",
        },
        "linear": LINEAR_PROTOCOL,
        "knn": {"k": NEIGHBOURS, "temperature": TEMPERATURE, "vote": "exp(cosine / temperature)"},
        "effective_rank_and_uniformity": "of the test features",
        "classifier_pooling": pooling,
        "seed": args.seed,
        "evaluation_transform": json.loads(processor.to_json_string()),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "pillow")},
    }


def save_classifier(
    folder: Path, encoder: UMAEModel, head: LinearHead, names: list[str], processor: BaseImageProcessor
) -> None:
    """The encoder and the head as one model, with the processor that prepared the head's features."""
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    model = UMAEForImageClassification(config)
    model.vit = encoder.cpu()
    model.classifier.load_state_dict({"weight": head.weight, "bias": head.bias})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def print_table(report: dict[str, Any], output: Path) -> None:
    shown = ("top1", "top5", "knn_top1", "effective_rank", "uniformity")
    print("".join(f"{title:>16}" for title in ("", *shown)))
    for feature in ("cls", "mean"):
        values = ("-" if report[feature][name] is None else f"{report[feature][name]:g}" for name in shown)
        print("".join(f"{value:>16}" for value in (feature, *values)))
    print(f"{output / REPORT}, and a classifier beside it (pooling {report['protocol']['classifier_pooling']})")


if __name__ == "__main__":
    with one_line_refusals("run_linear_probe.py"):
        main(sys.argv[1:])
