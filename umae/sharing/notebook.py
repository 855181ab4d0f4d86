"""A notebook that uses a pre-trained model, which the Hub offers to open on the model's page."""

import json

NAME = "notebook.ipynb"  # the one name that the Hub looks for


def model_notebook(name: str) -> str:
    """The notebook, as JSON (nbformat 4.5).

    Args:
        name: of the model, for `from_pretrained`.
    """
    cells = [
        _cell(0, "markdown", TITLE.replace("NAME", name)),
        _cell(1, "code", INSTALL),
        _cell(2, "code", LOAD.replace("NAME", name)),
        _cell(3, "markdown", "## Features"),
        _cell(4, "code", FEATURES),
        _cell(5, "markdown", RECONSTRUCTION_TEXT),
        _cell(6, "code", RECONSTRUCTION),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def _cell(number: int, kind: str, text: str) -> dict:
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


TITLE = """\
# NAME

A masked autoencoder with features that do not collapse (U-MAE). Put an image beside this notebook as `image.jpg`, or
change the path below."""
INSTALL = '%pip install -q torch "transformers>=5.4" pillow numpy'
LOAD = """\
import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForPreTraining

name = "NAME"
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModelForPreTraining.from_pretrained(name, trust_remote_code=True).eval()
image = processor.open_image("image.jpg")
pixel_values = processor(image, return_tensors="pt").pixel_values
image"""
FEATURES = """\
with torch.no_grad():
    output = model.vit(pixel_values)
features = output.pooler_output  # (1, hidden size): of the image
patch_features = output.last_hidden_state[:, 1:]  # (1, patches, hidden size): of every patch
features.shape, patch_features.shape"""
RECONSTRUCTION_TEXT = """\
## Reconstruction

From left to right: the image, what the model saw of it, and its reconstruction. Other patches are hidden every time."""
RECONSTRUCTION = """\
code = sys.modules[type(model).__module__]
patch, grid = model.config.patch_height_width, model.config.grid
with torch.no_grad():
    output = model(pixel_values)
true, predicted = code.patchify(pixel_values, patch), output.logits
if model.config.norm_pix_loss:  # predictions are of normalised patches
    predicted = predicted * (true.var(-1, keepdim=True) + 1e-6) ** 0.5 + true.mean(-1, keepdim=True)
hidden = output.mask[..., None].bool()
rows = torch.cat([true, true.masked_fill(hidden, 0.0), torch.where(hidden, predicted, true)])
mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
pixels = (code.unpatchify(rows, patch, grid) * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
pixels = pixels[..., [0, 1, 2] if pixels.shape[-1] > 2 else [0, 0, 0]]  # three channels as RGB, or one as grey
Image.fromarray((np.concatenate(pixels.numpy(), axis=1) * 255).round().astype(np.uint8))"""
