"""A model card from a run folder and nothing else."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

_CITATION = """\
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

_USE = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

name = "."  # this folder, or its name on the Hub
processor = AutoImageProcessor.from_pretrained(name)
model = AutoModel.from_pretrained(name, trust_remote_code=True)

pixel_values = processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt").pixel_values
with torch.no_grad():
    features = model(pixel_values).pooler_output  # (1, {hidden_size})
```"""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def model_card(folder: Path) -> str:
    """The text of `README.md` for a run folder: what it is, how to use it, how it was made."""
    run = json.loads((folder / "run.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    last = read_metrics(folder)[-1]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["umae", "masked-autoencoder", "self-supervised"],
    )
    identity = run["identity"]
    facts = {
        "Data": f"{identity['dataset']}, "
        + (f"{identity['pictures']:,} pictures" if identity["pictures"] else "streamed")
        + ", no labels used",
        "Picture and patch": f"{config['image_size']} and {config['patch_size']} pixels",
        "Encoder": f"{config['num_hidden_layers']} layers of width {config['hidden_size']}",
        "Decoder": f"{config['decoder_num_hidden_layers']} layers of width {config['decoder_hidden_size']}",
        "Mask ratio": config["mask_ratio"],
        "Uniformity weight": f"{config['uniformity_weight']} on the {config['pooling']} feature",
        "Steps": f"{identity['total_steps']:,} of {identity['pictures_per_step']:,} pictures, seed {identity['seed']}",
        "Peak learning rate": f"{identity['learning_rate']:.3g}",
        "Hardware and time": f"{run['hardware']}, {duration(run['seconds'])}",
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "Reconstruction loss": f"{last['reconstruction_loss']:.4f}",
        "Uniformity": f"{last['uniformity_loss']:.4f}, i.e. features that fill {last['participation_ratio']:.1f} "
        f"of {config['hidden_size']} dimensions",
    }
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    use = _USE.replace("{hidden_size}", str(config["hidden_size"]))
    return f"""---
{data.to_yaml()}
---

# U-MAE

A vision transformer pre-trained by masked reconstruction (MAE) with a uniformity term that keeps its features from
collapsing into a few dimensions.

## Use

{use}

## Training

| | |
| --- | --- |
{rows}

The losses are means over the last logged window of training. `metrics.jsonl` holds the whole curve.

![Original, visible and reconstructed pictures](reconstructions.png)

## Citation

{_CITATION}
"""


def duration(seconds: float) -> str:
    """A time to read: `42 seconds`, `53.5 minutes`, `17.2 hours`."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _cell(value: Any) -> str:
    """A value in a Markdown table: nothing in it may end the cell, the row or start markup."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in text)
