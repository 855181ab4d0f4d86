"""Model cards, made from the files of a run folder only."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_CITATION = """\
U-MAE: [arXiv:2210.08344](https://arxiv.org/abs/2210.08344). MAE: [arXiv:2111.06377](https://arxiv.org/abs/2111.06377).

```bibtex
@inproceedings{zhang2022mask,
  title     = {How Mask Matters: Towards Theoretical Understandings of Masked Autoencoders},
  author    = {Zhang, Qi and Wang, Yifei and Wang, Yisen},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}
@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}
```"""
_CITATION_CODING_RATE = """\
M-MAE: [arXiv:2309.17281](https://arxiv.org/abs/2309.17281).

```bibtex
@inproceedings{tan2024information,
  title     = {Information Flow in Self-Supervised Learning},
  author    = {Tan, Zhiquan and Yang, Jingqin and Huang, Weiran and Yuan, Yang and Zhang, Yifan},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}
```"""
# Titles of results, of images with one class each and with any number
_ONE_CLASS = {"top1": "top-1", "mean_class_top1": "mean per-class top-1", "top5": "top-5"}
_SEVERAL_CLASSES = {"mAP": "mAP", "f1_micro": "micro F1", "f1_macro": "macro F1"}
# Metrics of the Hub that are not accuracies, by titles
_METRICS = {"mAP": "mean_average_precision", "micro F1": "f1", "macro F1": "f1"}
_HOW = """\
mAP and macro F1 are means over the classes that occur in the test images; F1 is that of classes with a probability
above 0.5.
"""
_READING = """\
`open_image` reads a file as training did: 16-bit and float greyscale is scaled to 8 bits, transparency becomes white,
EXIF orientation is applied. The processor does the same to an image of `PIL.Image.open`. Three other ways clip 16-bit
and float greyscale or drop transparency: `.convert("RGB")`, a `pipeline` that is given a path or a URL, and a processor
that is loaded without `trust_remote_code=True`. The features are then those of a different image."""
_USE = f"""\
```python
import torch
from transformers import AutoImageProcessor, AutoModel

name = "."  # this folder, or its name on the Hub
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True)

pixel_values = processor(processor.open_image("image.jpg"), return_tensors="pt").pixel_values
with torch.no_grad():
    features = model(pixel_values).pooler_output  # (1, {{hidden_size}})
```

{_READING}"""
_CLASSIFY = f"""\
```python
from transformers import pipeline

classify = pipeline("image-classification", model=".", trust_remote_code=True)  # this folder, or its name on the Hub
image = classify.image_processor.open_image("image.jpg")
print(classify(image))
```

{_READING}"""
_CLASSIFY_ARRAY = """\
```python
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

name = "."  # this folder, or its name on the Hub
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)

pixel_values = processor(processor.open_image("image.npy"), return_tensors="pt").pixel_values
with torch.no_grad():
    label = model(pixel_values).logits.argmax().item()
print(model.config.id2label[label])
```

"""
_CLASSIFY_ARRAY_MULTI_LABEL = _CLASSIFY_ARRAY.replace(
    """\
    label = model(pixel_values).logits.argmax().item()
print(model.config.id2label[label])
""",
    """\
    probabilities = model(pixel_values).logits.sigmoid()[0].tolist()
print({model.config.id2label[label]: probability for label, probability in enumerate(probabilities)})
""",
)


def _inputs(folder: Path) -> str | None:
    """How the folder's image processor reads images, in words: `7 channels, the full range`; None for 8-bit RGB."""
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    if "num_channels" not in settings:
        return None
    bounds, channels = settings["intensity_range"], settings["num_channels"]
    words = {"full": "the full range", "image": "each image's own range"}
    intensities = words[bounds] if isinstance(bounds, str) else f"values from {bounds[0]:.6g} to {bounds[1]:.6g}"
    return f"{channels} channel{'s' if channels > 1 else ''}, {intensities}"


def _reading(inputs: str) -> str:
    return (
        f"`open_image` reads a file as training did, an image or `.npy`: {inputs}. The processor does the same to an\n"
        "array or tensor. A processor that is loaded without `trust_remote_code=True` does not."
    )


def _use(folder: Path, hidden_size: int) -> str:
    """The code on the card of a model, and how it reads images."""
    text, inputs = _USE.replace("{hidden_size}", str(hidden_size)), _inputs(folder)
    return text if inputs is None else text.replace("image.jpg", "image.npy").replace(_READING, _reading(inputs))


def _classify(folder: Path) -> str:
    """The code on the card of a classifier; pipelines take no arrays."""
    inputs = _inputs(folder)
    if inputs is None:
        return _CLASSIFY
    return (_CLASSIFY_ARRAY_MULTI_LABEL if _is_multi_label(folder) else _CLASSIFY_ARRAY) + _reading(inputs)


def _is_multi_label(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("problem_type") == "multi_label_classification"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "mfu" in line and "matmul_share" not in line:  # its name in older runs
            line["matmul_share"] = line.pop("mfu")
    return lines


def base_model(name_or_path: str | None) -> list[str]:
    """The Hub names for `base_model` in the card of a model that starts from these weights: their own name, or for a
    folder the one in its card, or else in its `config.json`. Never a local path.

    Args:
        name_or_path: where the weights were loaded from; None for newly initialised ones.
    """
    if name_or_path is None or Path(name_or_path).is_file():
        return []
    if not Path(name_or_path).exists():
        return [name_or_path]
    card, config = Path(name_or_path, "README.md"), Path(name_or_path, "config.json")
    base = None
    if card.is_file():
        with suppress(ValueError, yaml.YAMLError):  # a README.md without valid metadata
            base = (metadata_load(card) or {}).get("base_model")
    if base is None and config.is_file():
        base = json.loads(config.read_text()).get("_name_or_path")
    return [name for name in (base if isinstance(base, list) else [base]) if _is_hub_name(name)]


def _is_hub_name(name: Any) -> TypeGuard[str]:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and "/" in name


def hub_datasets(*descriptions: str) -> list[str]:
    """The names on the Hub among splits such as `uoft-cs/cifar10 (train)` or `5% of name/data (train)`; those of local
    data have no `/`."""
    names = (re.sub(r"^\S+% of ", "", description).partition(" (")[0] for description in descriptions)
    return list(dict.fromkeys(name for name in names if _is_hub_name(name)))


def _limitations(*of_this_model: str) -> str:
    """The section of a card that says what is not known of a model, and what it is not for."""
    limits = (
        *of_this_model,
        "Nobody has examined it for bias. It is not meant for identifying people, or for decisions about them.",
    )
    return "\n".join(["## Limitations", "", *(f"- {limit}" for limit in limits)])


def most_dimensions(identity: dict[str, Any]) -> int:
    """The largest participation ratio that the features in a run's regularizer can have."""
    passes = 1 if identity["exact_uniformity"] else identity["gradient_accumulation_steps"]
    return min(identity["pictures_per_step"] // passes, identity["config"]["hidden_size"])


def _kind(config: dict[str, Any], term: str) -> str:
    """What a model is, in one sentence."""
    kind = "A vision transformer pre-trained by masked reconstruction (MAE)"
    if config["uniformity_weight"] == 0:
        return f"{kind}, without the term of U-MAE."
    return f"{kind} with {term} that keeps its features from\ncollapsing into a few dimensions."


def model_card(folder: Path, checkpoint: Path | None = None) -> str:
    """The text of `README.md` for a run folder, or for a checkpoint in it."""
    run = json.loads((folder / "run.json").read_text())
    config = json.loads(((checkpoint or folder) / "config.json").read_text())
    lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    if checkpoint is not None:  # training has gone on while it was written
        lines = [line for line in lines if line["step"] <= int(checkpoint.name.removeprefix("step-"))]
    identity = run["identity"]
    by_coding_rate = config.get("regularizer") == "coding_rate"  # folders from before the field do not have it
    inputs = _inputs(checkpoint or folder)
    shown = "the first three as red, green and blue" if config["num_channels"] >= 3 else "the first as grey"
    fresh, base = identity.get("initial_weights") is None, run.get("base_model", [])
    facts = {
        "Data": f"{identity['dataset']}, "
        + (f"{identity['pictures']:,} images" if identity["pictures"] else "streamed")
        + ", no labels used",
        **({} if fresh else {"Started from": ", ".join(base) or Path(identity["initial_weights"]).name}),
        **({} if inputs is None else {"Channels": f"{inputs}; figures show {shown}"}),
        "Image and patch": f"{config['image_size']} and {config['patch_size']} pixels",
        "Encoder": f"{config['num_hidden_layers']} layers of width {config['hidden_size']}",
        "Decoder": f"{config['decoder_num_hidden_layers']} layers of width {config['decoder_hidden_size']}",
        "Mask ratio": config["mask_ratio"],
        ("Coding rate weight" if by_coding_rate else "Uniformity weight"): f"{config['uniformity_weight']} on the "
        f"{config['pooling']} feature",
        "Steps": (f"{checkpoint.name.removeprefix('step-')} of " if checkpoint else "")
        + f"{identity['total_steps']:,}, each of {identity['pictures_per_step']:,} images, seed {identity['seed']}",
        "Peak learning rate": f"{identity['learning_rate']:.3g}",
        "Hardware and time": f"{run['hardware']}, {duration(run['seconds'])}",
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    if lines:
        facts |= {
            "Reconstruction loss": f"{lines[-1]['reconstruction_loss']:.4f}",
            **({"Coding rate loss": f"{lines[-1]['coding_rate_loss']:.4f}"} if by_coding_rate else {}),
            "Uniformity": f"{lines[-1]['uniformity_loss']:.4f}, i.e. features that fill "
            f"{lines[-1]['participation_ratio']:.1f} of at most {most_dimensions(identity)} dimensions",
        }
    evaluation = next((line for line in reversed(lines) if "effective_rank_cls" in line), None)
    if evaluation:
        ranks = [f"{evaluation[f'effective_rank_{pooling}']:.1f}" for pooling in ("cls", "mean")]
        facts[f"Effective rank at step {evaluation['step']:,}"] = f"{ranks[0]} (class token), {ranks[1]} (mean)"
    titles = {
        "reconstructions.png": "Original, visible, predicted and pasted images",
        "curve.png": "Losses, ranks and accuracies over the steps",
        "spectrum.png": "Singular values of the features",
        "progress.png": "Reconstructions during training",
        "neighbours.png": "Images and their nearest neighbours",
        "attention.png": "Attention of the class token",
    }
    existing = [name for name in titles if checkpoint is None and (folder / name).exists()]
    citation = f"{_CITATION}\n\n{_CITATION_CODING_RATE}" if by_coding_rate else _CITATION
    term = "M-MAE's total coding rate, a term" if by_coding_rate else "a uniformity term"
    figures = [f"![{titles[name]}]({name})" for name in existing]
    data = _card_data(
        "image-feature-extraction", [], folder.resolve().name, base, hub_datasets(identity["dataset"]),
        "apache-2.0" if fresh else None,
    )  # fmt: skip
    limits = _limitations(
        f"It has seen images of {_cell(identity['dataset'])} only"
        + ("" if fresh else ", after those that the weights it started from had seen")
        + ". Features of other kinds of images may be worth less.",
        f"It was trained on images of {_size(config['image_size'])} pixels. At other sizes its position table is "
        f"interpolated.",
        "It is one run with one seed, so its numbers come without a spread.",
    )
    return f"""---
{data.to_yaml()}
---

# U-MAE

{_kind(config, term)}

## Use

{_use(checkpoint or folder, config["hidden_size"])}

## Training

{_table(facts)}

The losses are means over the last logging interval. `metrics.jsonl` holds those of all intervals.{_space(run)}

{(chr(10) * 2).join(figures)}

{limits}

## Citation

{citation}
"""


def probe_card(folder: Path) -> str:
    """The text of `README.md` for the folder of a linear probe: a classifier, and the accuracies of all features."""
    report = json.loads((folder / "linear_probe.json").read_text())
    protocol = report["protocol"]
    metrics = {name: f"linear probe {title}" for name, title in _ONE_CLASS.items()}
    metrics |= {f"knn{k}_top1": f"{k}-NN top-1" for k in protocol["knn"]["k"]}
    other_keys = ("protocol", "low_shot", "attentive")
    evaluated = {f"{feature} features": result for feature, result in report.items() if feature not in other_keys}
    for share, by_feature in report.get("low_shot", {}).items():
        for feature, result in by_feature.items():
            evaluated[f"{feature} features, {share} of the labels"] = result
    values: dict[str, float | None] = {}
    for name, result in evaluated.items():
        values |= {f"{title}, {name}": result.get(key) for key, title in metrics.items()}
    attentive = report.get("attentive", {})
    values |= {f"attentive probe {title}": attentive.get(name) for name, title in _ONE_CLASS.items()}
    results = _results(protocol["test"]["data"], values)
    facts = {
        "Encoder": protocol["model"],
        "Heads trained on": f"{protocol['train']['data']}, {protocol['train']['pictures']:,} images",
        "Evaluated on": f"{protocol['test']['data']}, {protocol['test']['pictures']:,} images",
        "Classes": protocol["classes"],
        "This classifier's feature": protocol["classifier_pooling"],
        **{f"{result.metric_name}, %": result.metric_value for result in results},
        **{f"Effective rank, {feature} features": report[feature]["effective_rank"] for feature in ("cls", "mean")},
        "Linear protocol": protocol["linear_protocol"],
        "Precision": "; ".join(f"{name}: {value}" for name, value in protocol["precision"].items()),
        "Seeds": ", ".join(map(str, protocol["seeds"])),
        "Versions": ", ".join(f"{name} {version}" for name, version in protocol["versions"].items()),
    }
    seen = hub_datasets(protocol["train"]["data"], protocol["test"]["data"])
    data = _card_data("image-classification", results, protocol["model"], protocol.get("base_model", []), seen)
    return f"""---
{data.to_yaml()}
---

# Linear probe of a frozen encoder

## Use

{_classify(folder)}

## Results

{_table(facts)}

`linear_probe.json` holds the complete protocol.

{_classifier_limits(protocol)}

## Citation

{_CITATION}
"""


def finetune_card(folder: Path) -> str:
    """The text of `README.md` for the folder of a fine-tuned classifier."""
    report, run = (json.loads((folder / name).read_text()) for name in ("finetune.json", "run.json"))
    protocol, identity = report["protocol"], run["identity"]
    titles = _ONE_CLASS | _SEVERAL_CLASSES
    results = _results(
        protocol["test"]["data"], {title: report[name] for name, title in titles.items() if name in report}
    )
    several, seen = "mAP" in report, hub_datasets(protocol["train"]["data"], protocol["test"]["data"])
    facts = {
        "Started from": protocol["model"],
        "Fine-tuned on": f"{protocol['train']['data']}, {protocol['train']['pictures']:,} images",
        "Evaluated on": f"{protocol['test']['data']}, {protocol['test']['pictures']:,} images",
        "Classes": protocol["classes"],
        **{f"{result.metric_name}, %": result.metric_value for result in results},
        "Steps": f"{identity['total_steps']:,}, each of {identity['pictures_per_step']:,} images, "
        f"seed {identity['seed']}",
        "Peak learning rate": f"{identity['learning_rate']:.3g}, times {identity['layer_decay']} for each layer below",
        "Augmentation": ", ".join(f"{name} {value:g}" for name, value in protocol["augmentation"].items()),
        "Hardware and time": f"{run['hardware']}, {duration(run['seconds'])}",
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    data = _card_data("image-classification", results, folder.resolve().name, run.get("base_model", []), seen)
    return f"""---
{data.to_yaml()}
---

# Fine-tuned image classifier

## Use

{_classify(folder)}

## Results

{_table(facts)}

`finetune.json` holds the complete protocol, `metrics.jsonl` the training curves. Results are after the last step.\
{_space(run)}
{_HOW if several else ""}
{_classifier_limits(protocol, several)}

## Citation

{_CITATION}
"""


def _classifier_limits(protocol: dict[str, Any], several: bool = False) -> str:
    """The limitations of a classifier; `several` if an image may have several of its classes."""
    classes = f"{protocol['classes']} classes that it was trained on"
    return _limitations(
        f"It gives each of the {classes} a probability of its own, and knows no other."
        if several
        else f"It answers with one of the {classes}, whatever the image shows.",
        f"Its results are those of one protocol on one split, {_cell(protocol['test']['data'])}. On other images they "
        f"may differ.",
    )


def _size(image_size: int | list[int]) -> str:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return f"{height} x {width}"


def _space(run: dict[str, Any]) -> str:
    """Where the curves of a run are shown, if they are in a Space of the Hub."""
    space = run.get("trackio_space")
    return f" [Curves in a Space](https://huggingface.co/spaces/{space})." if _is_hub_name(space) else ""


def _results(data: str, values: dict[str, float | None]) -> list[EvalResult]:
    """Results in percent by title, on a split such as `folder images (test)`, as entries of the model-index."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=next(iter(hub_datasets(data)), data.rpartition(" (")[0]),
            dataset_name=data,
            metric_type=_METRICS.get(name, "accuracy"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in values.items()
        if value is not None
    ]


def _card_data(
    task: str,
    results: list[EvalResult],
    name: str,
    base: list[str],
    datasets: list[str],
    licence: str | None = None,
) -> ModelCardData:
    """The metadata that the Hub reads. No licence for weights from elsewhere, which have their own.

    Whatever was trained further is a finetune of its base: the Hub's `adapter` is a file beside the base's weights, and
    a probe's folder has the encoder's weights in it.
    """
    return ModelCardData(
        license=licence,
        base_model=base or None,
        base_model_relation="finetune" if base else None,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["umae", "masked-autoencoder", "self-supervised"],
        eval_results=results or None,
        model_name=name if results else None,
    )


def _table(facts: dict[str, Any]) -> str:
    rows = (f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items())
    return "\n".join(["| | |", "| --- | --- |", *rows])


def duration(seconds: float) -> str:
    """A duration in words: `42 seconds`, `53.5 minutes`, `17.2 hours`."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _cell(value: Any) -> str:
    """A value in a Markdown table, escaped so that it cannot end the cell or the row, or start markup."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in text)
