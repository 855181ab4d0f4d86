"""Evaluate a frozen encoder: linear heads, k-NN and an attentive probe."""

import copy
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import ViTImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from arguments_umae import PROBE, ProbeArguments, arguments_of, check_launch
from modeling_umae import UMAEForImageClassification, UMAEModel
from umae.convert import encoder_from_pretrained, leave_out_final_layernorm, set_pooling
from umae.data.batches import CROP_SCALE, Plan
from umae.data.classes import load_labelled
from umae.data.images import Images
from umae.data.inputs import load_processor
from umae.evaluation.accuracy import ONE_CLASS, percent, topk_accuracy
from umae.evaluation.attentive import ATTENTIVE_PROTOCOL, AttentiveHead, train_attentive_head
from umae.evaluation.collapse import effective_rank, uniformity
from umae.evaluation.features import extract_features, parse_layers
from umae.evaluation.linear import LINEAR_PROTOCOL, LinearHead, knn_classify, low_shot, rank_classes, train_linear_heads
from umae.evaluation.mae import PROTOCOL as MAE_PROTOCOL
from umae.evaluation.mae import ProbeSchedule, train_mae_probe
from umae.files import write_text
from umae.programs.keywords import keywords
from umae.sharing.cards import base_model, probe_card
from umae.training.hardware import close, main_process_first, make_accelerator, num_workers, own_state

NEIGHBOURS, TEMPERATURE = (10, 20), 0.07  # of k-NN, as DINO evaluates
REPORT = "linear_probe.json"
STATE = "unfinished-seed-{seed}.safetensors"  # training state of protocol mae, until the report is written


@keywords("probe")
def probe(**given: Any) -> dict[str, Any]:
    """Evaluate a frozen encoder by linear heads and k-NN: `umae probe` from Python, with its arguments as keywords.

    Returns:
        The report, as in `linear_probe.json`: accuracies in percent by feature, and the complete protocol.

    Raises:
        ValueError: an argument, the images, the weights or the output folder are not valid.
    """
    with own_state():
        return run(*arguments_of(PROBE, given))


def run(args: ProbeArguments) -> dict[str, Any]:
    accelerator = make_accelerator(os.environ, args.mixed_precision, 1, "none", Path(args.output_dir))
    check_launch(os.environ, accelerator.num_processes)
    disable_progress_bar()  # transformers' own; `extract_features` shows one
    output = Path(args.output_dir)
    check_output(output)

    encoder = encoder_from_pretrained(args.model_name_or_path)
    pooling = args.pooling or ("mean" if args.global_pool else encoder.config.pooling)
    if args.global_pool:
        if pooling == "cls":
            raise ValueError("pooling cls: global_pool is a mean of patch tokens; leave one of the two out")
        leave_out_final_layernorm(encoder)
    processor = load_processor(args.model_name_or_path, encoder.config.image_height_width)
    with main_process_first(accelerator):  # the others then read its cache
        train, test, names = load_labelled(
            args.dataset_name, args.dataset_config_name, args.train_split, args.test_split, args.image_column_name,
            args.label_column_name, accelerator.print, args.heldout,
        )  # fmt: skip

    accelerator.print(f"labels: {train.label_summary}")
    if train.not_read:
        accelerator.print(f"not read: {train.not_read}")
    seeds, layers = parse_seeds(args.seeds), parse_layers(args.layers, encoder.config.num_hidden_layers)
    shares = [share.strip() for share in (args.low_shot or "").split(",") if share.strip()]
    for share in shares:
        low_shot(train.labels(), share, seed=0)  # invalid shares fail here, before the images are encoded
    if args.protocol == "mae" and (layers or shares or args.augmented_passes):
        raise ValueError("layers, low_shot and augmented_passes need protocol cached; leave out protocol mae")

    workers = num_workers(accelerator.device, args.dataloader_num_workers)
    set_pooling(encoder, "mean")  # so that one pass gives both features
    extract = partial(
        extract_features, encoder, processor=processor, batch_size=args.per_device_eval_batch_size,
        num_workers=workers, accelerator=accelerator, layers=layers,
    )  # fmt: skip
    tokens_in = output if args.attentive else None
    test_set = FeatureSet.of(extract(test, tokens_in=tokens_in), labels=test.labels())
    trained: list[dict[str, LinearHead]] = []
    records: dict[int, dict[str, Any]] = {}
    if args.protocol == "mae":
        trained, records = mae_heads(args, encoder, train, test_set, processor, len(names), seeds, workers, accelerator)
    train_set = FeatureSet.of(
        extract(train, tokens_in=tokens_in),
        *(extract(train, view=view) for view in range(args.augmented_passes)),
        labels=train.labels(),
    )
    if accelerator.is_main_process:
        device = accelerator.device
        if not trained:
            print(f"training linear heads on {len(train_set.views)} kinds of features")
            train_all = partial(train_linear_heads, train_set.views, train_set.labels, len(names), device=device)
            trained = [train_all(seed) for seed in seeds]
        report = evaluate(train_set, test_set, trained, len(names), device)
        if args.attentive:
            report["attentive"] = evaluate_attentive(
                train_set, test_set, seeds, len(names), encoder.config.num_attention_heads, device
            )
        if shares:
            report["low_shot"] = {
                share: evaluate_part(train_set, test_set, share, seeds, len(names), device) for share in shares
            }
        report["protocol"] = protocol(args, train, test, names, pooling, processor, seeds, records)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / REPORT, json.dumps(report, indent=2) + "\n")
        save_classifier(output, set_pooling(encoder, pooling), trained[0][pooling], names, processor)
        write_text(output / "README.md", probe_card(output))
        for seed in seeds:
            (output / STATE.format(seed=seed)).unlink(missing_ok=True)
        print_table(report, output)
    accelerator.wait_for_everyone()
    close(accelerator)
    return json.loads((output / REPORT).read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Checking the arguments


def check_output(output: Path) -> None:
    """Raise `ValueError` unless the folder is new, empty, or of an earlier probe, which is continued or overwritten."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder as output_dir")
    patterns = (REPORT, STATE.format(seed="*"))
    if output.is_dir() and any(output.iterdir()) and not any(any(output.glob(pattern)) for pattern in patterns):
        raise ValueError(f"{output} is not empty and holds no {REPORT}; give a new or empty output_dir")


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ValueError(f"seeds {text}: expected different whole numbers, separated by commas, such as 0,1,2")
    return [int(word) for word in words]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluating


@dataclass(frozen=True)
class FeatureSet:
    """Features and labels of N images, on the CPU.

    Args:
        views: (V, N, D) by feature name (`cls`, `mean`, ...): of the images, then of V - 1 augmentations of them.
        labels: int64 (N,).
        tokens: float16 (N, T, D); None without an attentive probe.
    """

    views: dict[str, torch.Tensor]
    labels: torch.Tensor
    tokens: torch.Tensor | None = None

    @classmethod
    def of(
        cls, features: dict[str, torch.Tensor], *augmented: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> "FeatureSet":
        """From the features of the images and of their augmentations, as `extract_features` returns them."""
        tokens, views = features.pop("tokens", None), {}
        for name, values in features.items():
            views[name] = torch.stack([values, *(view[name] for view in augmented)]) if augmented else values[None]
        return cls(views, labels, tokens)

    def part(self, rows: torch.Tensor) -> "FeatureSet":
        """Some of the images, without tokens; `rows` are int64 indices."""
        return FeatureSet({name: values[:, rows] for name, values in self.views.items()}, self.labels[rows])


def mae_heads(
    args: ProbeArguments,
    encoder: UMAEModel,
    images: Images,
    test: FeatureSet,
    processor: ViTImageProcessorPil,
    num_classes: int,
    seeds: Sequence[int],
    num_workers: int,
    accelerator: Accelerator,
) -> tuple[list[dict[str, LinearHead]], dict[int, dict[str, Any]]]:
    """For each seed: heads on both poolings by MAE's protocol, and a record of the training; all processes call it."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    schedule = ProbeSchedule(args.num_train_epochs, args.warmup_epochs, args.base_learning_rate)
    batch = (args.per_device_train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes)
    labels = test.labels.to(accelerator.device)

    def top1(name: str, head: LinearHead) -> float:
        ranked = rank_classes(head(test.views[name][0].to(accelerator.device)), 1)
        return round(100 * topk_accuracy(ranked, labels)["top1"], 2)

    trained, records = [], {}
    for seed in seeds:
        heads, records[seed] = train_mae_probe(
            encoder, images, processor, num_classes, schedule, Plan(len(images), *batch, seed), num_workers,
            accelerator, output / STATE.format(seed=seed), args.torch_compile, top1,
        )  # fmt: skip
        trained.append(heads)
    return trained, records


def evaluate(
    train: FeatureSet,
    test: FeatureSet,
    trained: Sequence[dict[str, LinearHead]],
    num_classes: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """The results of every feature by name, accuracies in percent.

    Args:
        trained: for each seed, the heads by feature name, on the device.
        device: takes one feature after the other, as each may fill its memory.
    """
    results = {}
    train_labels, labels = train.labels.to(device), test.labels.to(device)
    for name, views in test.views.items():
        features, known = views[0].to(device), train.views[name][0].to(device)  # of the unaugmented images
        results[name] = over_seeds([evaluate_head(heads[name], features, labels) for heads in trained])
        for k in NEIGHBOURS:
            votes = knn_classify(known, train_labels, features, num_classes, k, TEMPERATURE, show_progress=True)
            results[name][f"knn{k}_top1"] = percent(topk_accuracy(rank_classes(votes, 1), labels)["top1"])
        results[name]["effective_rank"] = round(effective_rank(features), 2)
        results[name]["uniformity"] = round(uniformity(features), 6)
    return results


def evaluate_part(
    train: FeatureSet, test: FeatureSet, share: str, seeds: Sequence[int], num_classes: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Results of linear heads trained on a part of every class, a different part for each seed."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in train.views}
    for seed in seeds:
        part = train.part(low_shot(train.labels, share, seed))
        for name, head in train_linear_heads(part.views, part.labels, num_classes, seed, device).items():
            results[name].append(evaluate_head(head, test.views[name][0].to(device), test.labels.to(device)))
    return {name: {"pictures": len(part.labels), **over_seeds(by_seed)} for name, by_seed in results.items()}


def evaluate_attentive(
    train: FeatureSet,
    test: FeatureSet,
    seeds: Sequence[int],
    num_classes: int,
    num_attention_heads: int,
    device: torch.device,
) -> dict[str, Any]:
    """Results of an attentive head on the patch tokens, trained for each seed."""
    assert train.tokens is not None and test.tokens is not None
    results = []
    for seed in seeds:
        head = train_attentive_head(train.tokens, train.labels, num_classes, num_attention_heads, seed, device)
        results.append(evaluate_head(head, test.tokens, test.labels))
    return over_seeds(results)


def evaluate_head(
    head: LinearHead | AttentiveHead, features: torch.Tensor, labels: torch.Tensor
) -> dict[str, float | None]:
    """Accuracies of a head in percent (top5 None with at most 5 classes), and what was chosen for it."""
    scores = head(features)
    accuracies = topk_accuracy(rank_classes(scores, 5 if scores.shape[1] > 5 else 1), labels)
    chosen = {name: percent(value) if name.endswith("top1") else value for name, value in head.chosen.items()}
    return {**{name: percent(accuracies.get(name)) for name in ONE_CLASS}, **chosen}


def over_seeds(results: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    """The results of one seed; of several their mean accuracies, standard deviations, and all results."""
    if len(results) == 1:
        return dict(results[0])
    columns = {}
    for name in ONE_CLASS:
        values = [value for result in results if (value := result.get(name)) is not None]
        if len(values) == len(results):
            columns[name] = values
    return {
        **{name: round(statistics.mean(values), 2) for name, values in columns.items()},
        "deviation": {name: round(statistics.stdev(values), 2) for name, values in columns.items()},
        "of_each_seed": list(results),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Writing the results


def protocol(
    args: ProbeArguments,
    train: Images,
    test: Images,
    names: list[str],
    pooling: str,
    processor: ViTImageProcessorPil,
    seeds: Sequence[int],
    record: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """Everything needed to repeat and to interpret the results."""
    model = Path(args.model_name_or_path)
    return {
        "model": model.resolve().name if model.exists() else args.model_name_or_path,
        "base_model": base_model(args.model_name_or_path),
        "train": {"data": train.description, "pictures": len(train)},
        "test": {"data": test.description, "pictures": len(test)},
        "classes": len(names),
        "features": {
            "cls": f"class token {'without' if args.global_pool else 'after'} the encoder's norm, unmasked image, "
            f"frozen encoder",
            "mean": "fc_norm of the mean of the patch tokens (no learned scale unless pre-trained with it), likewise",
        },
        "precision": precision(record),
        "linear_protocol": args.protocol,
        "linear": cached_protocol(args) if args.protocol == "cached" else mae_protocol(args, record),
        **({"attentive": ATTENTIVE_PROTOCOL} if args.attentive else {}),
        "knn": {"k": list(NEIGHBOURS), "temperature": TEMPERATURE, "vote": "exp(cosine / temperature)"},
        "effective_rank_and_uniformity": "of the test features",
        "classifier_pooling": pooling,
        "seeds": list(seeds),
        "deviation": "of the sample (n - 1), over the seeds",
        "evaluation_transform": json.loads(processor.to_json_string()),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "pillow")},
    }


def precision(record: dict[int, dict[str, Any]]) -> dict[str, str]:
    """The encoder's precision: the accelerator's in the training of protocol mae, else float32."""
    mixed = {of_seed["mixed_precision"] for of_seed in record.values()} - {"no"}
    trained = f"encoder in {mixed.pop()} autocast, heads in float32" if mixed else "float32"
    return {"training": trained, "evaluation": "float32"}


def cached_protocol(args: ProbeArguments) -> dict[str, Any]:
    augmentation = "none"
    if args.augmented_passes:
        augmentation = (
            f"every image as it is and as {args.augmented_passes} random resized crops of {CROP_SCALE:.0%} to 100 % "
            "of its area, half of them flipped, in turns from epoch to epoch; features are computed once"
        )
    return LINEAR_PROTOCOL | {"augmentation": augmentation, "augmented_passes": args.augmented_passes}


def mae_protocol(args: ProbeArguments, record: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {
        **MAE_PROTOCOL,
        "epochs": args.num_train_epochs,
        "warmup_epochs": args.warmup_epochs,
        "base_learning_rate": args.base_learning_rate,
        "of_each_seed": list(record.values()),
    }


def save_classifier(
    folder: Path, encoder: UMAEModel, head: LinearHead, names: list[str], processor: ViTImageProcessorPil
) -> None:
    """Save the encoder and the head as one model, with the encoder's image processor."""
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    model = UMAEForImageClassification(config)
    model.vit = encoder.cpu()
    model.classifier.load_state_dict({"weight": head.weight.cpu(), "bias": head.bias.cpu()})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def print_table(report: dict[str, Any], output: Path) -> None:
    columns = (*ONE_CLASS, *(f"knn{k}_top1" for k in NEIGHBOURS), "effective_rank", "uniformity")
    table = [("", *columns)]
    rows = {name: result for name, result in report.items() if name not in ("protocol", "low_shot")}
    for share, results in report.get("low_shot", {}).items():
        rows |= {f"{name}, {share}": result for name, result in results.items()}
    for name, result in rows.items():
        cells = [name]
        for title in columns:
            value = "" if title not in result else "-" if result[title] is None else f"{result[title]:g}"
            deviation = result.get("deviation", {}).get(title)
            cells.append(value if deviation is None else f"{value} +-{deviation:g}")
        table.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"{output / REPORT}, and a classifier beside it (pooling {report['protocol']['classifier_pooling']})")
