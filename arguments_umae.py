"""The arguments of the programs: dataclasses whose fields are flags, keys of recipes and keywords in Python alike.

Beside the package rather than in it, whose import takes seconds that `--help` need not wait for.
"""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

# In a clone the recipes lie beside this file, in an installed package inside of it
RECIPES = [Path(__file__).resolve().parent / folder for folder in ("recipes", "umae/recipes")]
STUDIES = [folder.with_name("studies") for folder in RECIPES]


@dataclass(frozen=True)
class Between:
    """The range of a number, for annotations: `Annotated[int, Between(1)]` is at least 1, and never NaN or infinite."""

    low: float
    high: float = math.inf


def flag(default: Any, help: str) -> Any:
    """A dataclass field that becomes a flag; a default that needs no explanation is shown in brackets."""
    explained = "" if default is None or default is False else f" [{default}]"
    return field(default=default, metadata={"help": help + explained})


def required(help: str) -> Any:
    """A dataclass field that becomes a flag without a default."""
    return field(metadata={"help": help})


def positional(help: str, metavar: str, default: Any = dataclasses.MISSING) -> Any:
    """As `required`, or with a default; on the command line its value may also stand alone, without the flag, as the
    usage shows."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


Share = Annotated[float, Between(0, 1)]
Count = Annotated[int, Between(1)]
Number = Annotated[float, Between(0)]
OptionalCount = Annotated[int | None, Between(1)]
OptionalNumber = Annotated[float | None, Between(0)]


# ----------------------------------------------------------------------------------------------------------------------
# Of several programs


@dataclass(kw_only=True)
class DataArguments:
    dataset_name: str = flag("digits", "Name on the Hub, local folder of images or of parquet, or `digits`.")
    dataset_config_name: str | None = flag(None, "Configuration of a Hub data set.")
    train_split: str = flag("train", "Split to train on; slices such as `train[:10%%]` for Hub data sets and parquet.")
    image_column_name: str | None = flag(None, "Column of the images; found by its type if there is one.")
    heldout: str | None = flag(None, "Share of the images to evaluate on, where there is no split for that: `5%%`.")


@dataclass(kw_only=True)
class LabelledDataArguments(DataArguments):
    test_split: str | None = flag(None, "Split to evaluate on. [test or validation, the first with labels]")
    label_column_name: str | None = flag(None, "Column of the labels; found by its type or name.")


@dataclass(kw_only=True)
class TrainingArguments:
    recipe: str | None = flag(None, "YAML file with values for these flags, or the name of a shipped one; flags win.")
    plan: bool = flag(False, "Only show what there is to do, what it needs and how long it may take.")
    max_train_steps: OptionalCount = flag(None, "Optimiser steps; overrides the epochs and sets the schedule's length.")
    per_device_train_batch_size: Count = flag(64, "Images of a forward pass on each process.")
    gradient_accumulation_steps: Count = flag(1, "Forward passes for each optimiser step.")
    weight_decay: Number = flag(0.05, "AdamW's decay of tensors with more than one dimension.")
    max_grad_norm: Annotated[float | None, Between(1e-9)] = flag(
        None, "Scale a gradient with a larger norm down to this one. [never]"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "[what `accelerate` says unless no; then bf16 if the hardware has it]"
    )
    torch_compile: Literal["no", "layers", "model", "graphs"] | None = flag(
        None, "no, layers, model, or graphs for small models. [model in long runs on GPUs, else no]"
    )
    gradient_checkpointing: bool = flag(False, "Compute activations twice instead of keeping them: larger batches fit.")
    checkpointing_steps: OptionalCount = flag(None, "Steps between checkpoints. [as many as take ten minutes]")
    checkpoints_total_limit: Count = flag(2, "Checkpoints to keep.")
    report_to: str = flag("none", "Trackers, separated by commas: tensorboard, wandb, trackio.")
    hub_model_id: str | None = flag(None, "Repository to upload to: `name/model`. [name of output_dir]")
    hub_private_repo: bool = flag(False, "If the repository has to be made, make it private.")


# ----------------------------------------------------------------------------------------------------------------------
# Pre-training


@dataclass(kw_only=True)
class PretrainDataArguments(DataArguments):
    label_column_name: str | None = flag(None, "Column of the labels, which only evaluate; `none` if there are none.")
    max_unreadable_share: Share = flag(0.01, "Share of the images that may be unreadable, and are left out.")
    intensity_range: Sequence | str | None = flag(
        None, "Values that become 0 and 1: set, percentiles, image, `LOW,HIGH`. [full]"
    )
    image_mean: Sequence | str | None = flag(None, "Numbers or measure. [imagenet for photographs, else measure]")
    image_std: Sequence | str | None = flag(None, "Standard deviation, likewise.")
    streaming: bool = flag(False, "Read the shards of the data set as they come, instead of downloading it first.")
    dataloader_num_workers: Annotated[int | None, Between(0)] = flag(
        None, "Processes that read images, for each of training. [a core each beside a GPU]"
    )


@dataclass(kw_only=True)
class PretrainModelArguments:
    model_name_or_path: str | None = flag(
        None, "Weights to start from, with their sizes: a folder, Hub id or file of any MAE or ViT."
    )
    model_size: Literal["tiny", "small", "base", "large", "huge"] | None = flag(
        None, "The encoder, with a decoder that fits: ViT-Ti, S, B, L or H. [base]"
    )
    config_overrides: Mapping | str | None = flag(
        None, "Fields of UMAEConfig: `hidden_size=96,num_hidden_layers=4`; other sizes follow."
    )
    image_size: OptionalCount = flag(None, "Side of the square crops, in pixels. [the weights', or 224]")
    patch_size: OptionalCount = flag(None, "Side of a patch, in pixels; divides image_size. [the weights', or 16]")
    num_channels: OptionalCount = flag(None, "Channels of the images; 1 for grey. [as the files say, or 3]")
    mask_ratio: Annotated[float | None, Between(0, 1)] = flag(None, "Share of the patches that is hidden. [0.75]")
    norm_pix_loss: bool | None = flag(None, "Reconstruct pixels normalised within each patch. [true]")
    uniformity_weight: OptionalNumber = flag(
        None, "Lambda, weight of the regularizer; 0 is plain MAE. [the weights', or 0.01]"
    )
    regularizer: Literal["uniformity", "coding_rate"] | None = flag(
        None, "What spreads the features: U-MAE's term or M-MAE's. [the weights', or uniformity]"
    )
    pooling: Literal["cls", "mean"] | None = flag(None, "The feature: class token or mean of the patches. [cls]")


@dataclass(kw_only=True)
class PretrainTrainingArguments(TrainingArguments):
    output_dir: str = flag("runs/umae", "The run folder: weights, metrics, figures, card and checkpoints.")
    num_train_epochs: Count = flag(200, "Passes over the images.")
    extend_to: OptionalCount = flag(
        None, "Make a finished run longer: epochs in all, or steps if max_train_steps is given."
    )
    exact_uniformity: bool = flag(False, "Regularizer of all accumulated passes together, for one more encoder pass.")
    base_learning_rate: Number = flag(1.5e-4, "Learning rate for 256 images a step; scaled by the effective batch.")
    warmup_epochs: OptionalNumber = flag(None, "Epochs of linear warm-up. [a tenth of the steps]")
    min_crop_scale: Share = flag(0.2, "Least share of an image's area in a crop; 1 is all.")
    horizontal_flip: Share = flag(0.5, "Share of the images that are mirrored; 0 where left and right matter.")
    vertical_flip: Share = flag(0.0, "Share of the images that are turned upside down: 0.5 where there is no up.")
    logging_steps: OptionalCount = flag(
        None, "Steps between lines of metrics.jsonl, each a mean over these steps. [50, or fewer]"
    )
    eval_steps: Annotated[int | None, Between(0)] = flag(
        None, "Steps between diagnostics, at lines of metrics.jsonl; 0 for none. [1%% of the time]"
    )
    seed: Annotated[int, Between(0, 2**32 - 1)] = flag(0, "Of weights, order, crops, flips and masks.")
    push_to_hub: bool = flag(False, "Upload every checkpoint, as a revision `step-N`, and the finished run to the Hub.")


PRETRAIN = (PretrainDataArguments, PretrainModelArguments, PretrainTrainingArguments)


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning


@dataclass(kw_only=True)
class FinetuneDataArguments(LabelledDataArguments):
    max_unreadable_share: Share = flag(0.01, "Share of the training images that may be unreadable, and are left out.")
    dataloader_num_workers: Annotated[int | None, Between(0)] = flag(
        None, "Processes that read images, for each of training. [a core each beside a GPU]"
    )


@dataclass(kw_only=True)
class FinetuneModelArguments:
    model_name_or_path: str = required("Encoder to start from: a folder, Hub id or file, of any MAE.")
    image_size: OptionalCount = flag(
        None, "Side of the square images, in pixels; a multiple of the patch. [the weights']"
    )
    pooling: Literal["cls", "mean"] = flag("mean", "The classifier's feature: class token or mean of the patches.")
    drop_path_rate: Share = flag(0.1, "Share of the images that skip a branch of the last layer; below 1.")


@dataclass(kw_only=True)
class AugmentationArguments:
    min_crop_scale: Share = flag(0.08, "Least share of an image's area in a crop; 1 is all.")
    horizontal_flip: Share = flag(0.5, "Share of the images that are mirrored; 0 where left and right matter.")
    rand_augment: Annotated[float, Between(0, 10)] = flag(9.0, "Magnitude of RandAugment, 2 operations; 0 for none.")
    random_erasing: Share = flag(0.25, "Share of the images that get a box of noise.")
    mixup: Share = flag(0.8, "Alpha of mixup; 0 for none.")
    cutmix: Share = flag(1.0, "Alpha of cutmix; 0 for none. With mixup, half the pairs each.")
    label_smoothing: Share = flag(0.1, "Share of the target that all classes get alike.")


@dataclass(kw_only=True)
class FinetuneTrainingArguments(TrainingArguments):
    output_dir: str = required("The run folder: classifier, report, metrics, card and checkpoints.")
    num_train_epochs: Count = flag(100, "Passes over the images.")
    per_device_eval_batch_size: Count = flag(256, "The same as per_device_train_batch_size, of the test images.")
    base_learning_rate: Number = flag(5e-4, "Learning rate for 256 images a step; scaled by the effective batch.")
    min_learning_rate: Number = flag(1e-6, "Learning rate at the end, not scaled.")
    layer_decay: Share = flag(0.65, "Each layer's learning rate as a share of that of the layer above.")
    warmup_epochs: OptionalNumber = flag(None, "Epochs of linear warm-up. [5, but at most half of the run]")
    logging_steps: Count = flag(50, "Steps between lines of metrics.jsonl, each the mean since the line before.")
    eval_steps: Annotated[int | None, Between(0)] = flag(
        None, "Steps between evaluations on the test split; 0 for the end only. [an epoch]"
    )
    seed: Annotated[int, Between(0, 2**32 - 1)] = flag(0, "Of the head, order, crops and augmentations.")
    push_to_hub: bool = flag(False, "Upload the finished run to the Hub.")


FINETUNE = (FinetuneDataArguments, FinetuneModelArguments, AugmentationArguments, FinetuneTrainingArguments)


# ----------------------------------------------------------------------------------------------------------------------
# Probing


@dataclass(kw_only=True)
class ProbeArguments(LabelledDataArguments):
    recipe: str | None = flag(None, "YAML file with values for these flags, or the name of a shipped one; flags win.")
    model_name_or_path: str = required("Encoder to evaluate: a folder, Hub id or file, of any MAE or ViT.")
    output_dir: str = required("Folder for the report and the classifier.")
    pooling: Literal["cls", "mean"] | None = flag(None, "The classifier's feature. [what the model was trained with]")
    global_pool: bool = flag(False, "As in MAE's code: the last norm is left out, and the mean of patches normalised.")
    per_device_eval_batch_size: Count = flag(256, "Images of a forward pass on each process.")
    dataloader_num_workers: Annotated[int | None, Between(0)] = flag(
        None, "Processes that read images, for each process. [a core each beside a GPU]"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Of the encoder in protocol mae. [bf16 if the hardware has it]"
    )
    protocol: Literal["cached", "mae"] = flag(
        "cached", "Of the linear heads: features once, or fresh crops for 90 epochs."
    )
    seeds: str = flag("0", "Of the heads' weights, order and parts: `0,1,2` gives means and deviations.")
    layers: str = flag("last", "Also evaluate features after these layers: `3,6,9` or `all`. Protocol cached.")
    low_shot: str | None = flag(None, "Also train on parts of every class: `1%%,10%%,5`. Protocol cached.")
    augmented_passes: Annotated[int, Between(0)] = flag(
        0, "Also train on this many random crops of every image. Protocol cached."
    )
    attentive: bool = flag(False, "Also train an attentive head on the patch tokens, kept on the disk meanwhile.")
    num_train_epochs: Count = flag(90, "Of protocol mae.")
    warmup_epochs: Number = flag(10, "Of protocol mae.")
    base_learning_rate: Number = flag(0.1, "Of protocol mae; for 256 images a step.")
    per_device_train_batch_size: Annotated[int, Between(2)] = flag(512, "Of protocol mae; images on each process.")
    gradient_accumulation_steps: Count = flag(1, "Of protocol mae; forward passes for each step.")
    torch_compile: bool = flag(False, "Compile every layer for protocol mae; takes a minute.")


PROBE = (ProbeArguments,)


# ----------------------------------------------------------------------------------------------------------------------
# Shrinking


@dataclass(kw_only=True)
class ShrinkArguments:
    folder: str = positional("Folder of image files; it is only read.", "FOLDER")
    output_dir: str = required("Folder for the smaller copy.")
    shortest_side: Count = flag(868, "Pixels of the shorter side; crops of 224 pixels need the default.")


SHRINK = (ShrinkArguments,)


# ----------------------------------------------------------------------------------------------------------------------
# Studies


@dataclass(kw_only=True)
class StudyArguments:
    study: str = positional("YAML file of the study, or the name of a shipped one.", "STUDY")
    dataset_name: str | None = flag(None, "Images to pre-train on and to evaluate with. [the study's]")
    data_dir: str | None = flag(None, "Folder that may hold the study's data sets, by the last part of their names.")
    output_dir: str | None = flag(None, "Folder for the runs, evaluations and results. [the study's]")
    jobs: OptionalCount = flag(None, "Runs and evaluations side by side. [one for each GPU; on CPUs one]")
    plan: bool = flag(False, "Only show what there is to do and how long it may take.")


STUDY = (StudyArguments,)


# ----------------------------------------------------------------------------------------------------------------------
# The page


@dataclass(kw_only=True)
class DemoArguments:
    run: str = positional("Model: a run folder, a Hub id or file of any MAE or ViT.", "RUN")
    other_run: str | None = positional("A second model, to compare.", "[RUN]", None)
    images: str | None = flag(None, "Folder of images, or another data set, to search and to map.")
    most_images: Count = flag(2000, "At most this many of them, spread evenly.")
    port: Annotated[int | None, Between(1, 65535)] = flag(
        None, "Port of the page on this machine. [the first free one from 7860 on]"
    )
    export: str | None = flag(None, "Write the page to this new folder, for Hugging Face Spaces, and do not open it.")


DEMO = (DemoArguments,)


# ----------------------------------------------------------------------------------------------------------------------
# From what is given to instances


SIZES = [
    prefix + name
    for prefix in ("", "decoder_")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
]


def pretraining_arguments(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """`arguments_of` PRETRAIN. The digits, of 8 x 8 pixels, come with sizes of their own unless a recipe is given.

    A recipe's sizes are not for weights or for a model_size that are given beside it: there, only given sizes count.
    """
    data, model, training = arguments_of(PRETRAIN, given)
    if data.dataset_name == "digits" and training.recipe is None:
        data, model, training = arguments_of(PRETRAIN, {**given, "recipe": "digits"})
    if given.get("model_size") is not None and isinstance(model.config_overrides, Mapping):
        others = {name: value for name, value in model.config_overrides.items() if name not in SIZES}
        model = dataclasses.replace(model, config_overrides=given.get("config_overrides", others))
    if given.get("model_name_or_path") is not None:
        sizes = {name: given.get(name) for name in ("model_size", "image_size", "patch_size", "config_overrides")}
        model = dataclasses.replace(model, **sizes)
    return data, model, training


# Of every program: its dataclasses, and what makes them from values by name
PROGRAMS: dict[str, tuple[tuple[type, ...], Callable[[Mapping[str, Any]], tuple[Any, ...]]]] = {
    "pretrain": (PRETRAIN, pretraining_arguments),
    "probe": (PROBE, lambda given: arguments_of(PROBE, given)),
    "finetune": (FINETUNE, lambda given: arguments_of(FINETUNE, given)),
    "shrink": (SHRINK, lambda given: arguments_of(SHRINK, given)),
    "study": (STUDY, lambda given: arguments_of(STUDY, given)),
    "demo": (DEMO, lambda given: arguments_of(DEMO, given)),
}


def arguments_of(types: Sequence[type], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """One instance of every dataclass in `types`. `given` overrides the recipe that it may name, which overrides the
    defaults.

    Raises:
        ValueError: an unknown name (the nearest is given), a value of another type or out of its range, a value that is
            required and missing, or no such recipe.
    """
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    for name in given:
        if name not in hints:
            raise ValueError(f"unknown argument {name}{nearest(name, list(hints))}")
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    values = {name: _typed(name, value, hints[name]) for name, value in given.items()}
    if values.get("recipe") is not None:
        values = {**_read_recipe(values["recipe"], hints), **values}
    instances = []
    for kind in types:
        for argument in dataclasses.fields(kind):
            if argument.default is dataclasses.MISSING and argument.name not in values:
                raise ValueError(f"{argument.name} is missing: {argument.metadata['help']}")
        instances.append(kind(**{name: values[name] for name in field_names([kind]) if name in values}))
        _check_ranges(instances[-1])
    return tuple(instances)


def field_names(types: Sequence[type]) -> list[str]:
    """The names of all arguments."""
    return [argument.name for kind in types for argument in dataclasses.fields(kind)]


def parse_overrides(given: Mapping[str, Any] | str | None, names: Sequence[str], argument: str) -> dict[str, Any]:
    """`hidden_size=192,pooling=mean` -> {"hidden_size": 192, "pooling": "mean"}, values read as YAML; a mapping, which
    has types, stays as it is.

    Raises:
        ValueError: a part without `=`, a value that is no YAML, or a name not in `names` (the nearest is given).
    """
    if isinstance(given, Mapping):
        overrides = dict(given)
    else:
        overrides = {}
        for part in filter(None, (given or "").split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"{argument}: {part!r} is not name=value")
            overrides[name.strip()] = _read_yaml(argument, value)
    for name in overrides:
        if name not in names:
            raise ValueError(f"{argument}: unknown name {name!r}{nearest(str(name), names)}")
    return overrides


def check_launch(environ: Mapping[str, str], num_processes: int) -> None:
    """Refuse a launch whose processes do not know of each other and would all do, and write, the same.

    Raises:
        ValueError: the launcher started `WORLD_SIZE` processes, but Accelerate counts fewer.
    """
    world_size = int(environ.get("WORLD_SIZE", "1"))
    if world_size != num_processes:
        raise ValueError(
            f"the launcher started {world_size} processes, but Accelerate sees {num_processes}: they would run as "
            f"independent copies. On CPUs start them with `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N ...`, on "
            f"GPUs with `accelerate launch --num_processes N ...`"
        )


class _Yaml(yaml.SafeLoader):
    """YAML, with `5e-4` a number as in YAML 1.2; PyYAML reads text unless it is `5.0e-4`."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_shipped(name: str, what: str, folders: Sequence[Path]) -> tuple[Path, Any]:
    """The path of a YAML file and what it holds.

    Args:
        name: its path, or the name of one in `folders`, which are those of a clone and of an installed package.
        what: it is, for messages: "recipe".

    Raises:
        ValueError: there is no such file, or it is no YAML.
    """
    for path in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path, _read_yaml(str(path), path.read_text())
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ValueError(f"there is no {what} {name}; give the path of a YAML file, or one of {', '.join(names)}")


def _read_recipe(recipe: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The names and values of a recipe, each of the type of its field."""
    path, values = read_shipped(recipe, "recipe", RECIPES)
    values = values or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no names and values; expected lines such as `mask_ratio: 0.75`")
    for name in values:
        if name not in hints or name == "recipe":
            raise ValueError(f"{path}: unknown key {name!r}{nearest(str(name), list(hints))}")
    return {name: _typed(f"{path}: {name}", value, hints[name]) for name, value in values.items()}


def _read_yaml(where: str, text: str) -> Any:
    try:
        return _Yaml(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A value as a field of that type has it; raises `ValueError` where it is of another."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            # YAML reads an unquoted `no` or `off` as false
            chosen = ("yes" if value else "no") if isinstance(value, bool) else value
            if chosen in get_args(kind):
                return chosen
        elif isinstance(value, get_origin(kind) or kind) and isinstance(value, bool) == (kind is bool):
            return value
        elif kind is float and type(value) is int:
            return float(value)
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text (in quotes)",
        NoneType: "null",
        Sequence: "numbers in a list",
    }
    *others, last = (
        "one of " + ", ".join(get_args(kind)) if get_origin(kind) is Literal else words.get(kind, "names and values")
        for kind in kinds
    )
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    raise ValueError(f"{name} is {text}, expected {' or '.join([', '.join(others), last] if others else [last])}")


def nearest(name: str, names: Sequence[str], prefix: str = "") -> str:
    """What a message says after an unknown name: the known one that is meant, else all."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(sorted(names))}"


def _check_ranges(instance: Any) -> None:
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        value = getattr(instance, name)
        for limit in getattr(hint, "__metadata__", ()):
            if value is not None and not (limit.low <= value <= limit.high and math.isfinite(value)):
                above = "" if limit.high == math.inf else f" and at most {limit.high:g}"
                raise ValueError(f"{name} must be at least {limit.low:g}{above}, got {value}")
