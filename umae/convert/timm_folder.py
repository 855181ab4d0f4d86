"""Folders that `timm.create_model` loads, of encoders and classifiers."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from configuration_umae import MODEL_SIZES, UMAEConfig
from image_processing_umae import UMAEImageProcessor
from modeling_umae import UMAEForImageClassification, UMAEModel
from umae.convert.names import to_original
from umae.files import write_folder

# Patch sizes of the models that timm has registered as `vit_<size>_patch<patch>_224`
PATCHES = {"tiny": (16,), "small": (16, 8, 32), "base": (16, 8, 32), "large": (16, 14, 32), "huge": (14,)}
EPSILON = 1e-6  # of timm's layer norms


def write_timm(
    model: UMAEModel | UMAEForImageClassification, processor: UMAEImageProcessor, licence: str | None, out: Path
) -> None:
    """Write a folder for `timm.create_model("local-dir:out", pretrained=True)`: `config.json`, `model.safetensors`.

    Raises:
        ValueError: timm's VisionTransformer cannot compute what the model does.
    """
    config = json.dumps(timm_config(model, processor, licence), indent=2) + "\n"

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(config)
        save_file(timm_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})

    write_folder(out, write)


def timm_tensors(model: UMAEModel | UMAEForImageClassification) -> dict[str, torch.Tensor]:
    """The weights under the names of timm's VisionTransformer, which are those of the original code."""
    prefix = "vit." if isinstance(model, UMAEModel) else ""
    tensors = to_original({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()})
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def timm_config(
    model: UMAEModel | UMAEForImageClassification, processor: UMAEImageProcessor, licence: str | None
) -> dict[str, Any]:
    """The `config.json` of a timm folder: the nearest registered architecture, and the arguments that differ from its.

    Raises:
        ValueError: timm's VisionTransformer cannot compute what the model does.
    """
    config = model.config
    _check_timm_has(config)
    size = min(MODEL_SIZES, key=lambda name: abs(MODEL_SIZES[name][0] - config.hidden_size))
    patch = config.patch_size if config.patch_size in PATCHES[size] else PATCHES[size][0]
    registered = dict(zip(("embed_dim", "depth", "num_heads"), MODEL_SIZES[size], strict=True)) | {
        "img_size": 224, "patch_size": patch, "in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": True,
        "global_pool": "token", "final_norm": True,
    }  # fmt: skip
    arguments = {
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "mlp_ratio": _mlp_ratio(config),
        "qkv_bias": config.qkv_bias,
        "global_pool": "avg" if config.pooling == "mean" else "token",
        # With "avg" it is the norm of the mean, and the tokens have none
        "final_norm": config.final_layernorm or config.pooling == "mean",
    }
    is_classifier = isinstance(model, UMAEForImageClassification)
    return {
        "architecture": f"vit_{size}_patch{patch}_224",
        "num_classes": config.num_labels if is_classifier else 0,
        "num_features": config.hidden_size,
        "global_pool": arguments["global_pool"],
        **({"label_names": [config.id2label[label] for label in range(config.num_labels)]} if is_classifier else {}),
        "model_args": {name: value for name, value in arguments.items() if value != registered[name]},
        "pretrained_cfg": {
            "input_size": [config.num_channels, *config.image_height_width],
            "fixed_input_size": True,
            **_transform(config, processor),
            "num_classes": config.num_labels if is_classifier else 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"license": licence} if licence else {}),
        },
    }


def _check_timm_has(config: UMAEConfig) -> None:
    if config.pooling == "mean" and config.final_layernorm:
        raise ValueError(
            'pooling is "mean" of tokens that are normalised before; timm normalises either the tokens or their mean. '
            'Convert the encoder alone, with the class token: encoder_from_pretrained(..., pooling="cls") and '
            "save_pretrained make its folder"
        )
    if config.hidden_act != "gelu" or config.layer_norm_eps > EPSILON:
        raise ValueError(
            f"hidden_act is {config.hidden_act}, layer_norm_eps {config.layer_norm_eps:g}; timm's VisionTransformer "
            f"has gelu and {EPSILON:g}, so this model stays with transformers or ONNX"
        )
    if config.layer_norm_eps < EPSILON:
        print(f"timm's layer norms add {EPSILON:g} to the variance, this model's {config.layer_norm_eps:g}")


def _mlp_ratio(config: UMAEConfig) -> float:
    """timm rounds the product of width and ratio down."""
    ratio = config.intermediate_size / config.hidden_size
    return ratio if int(config.hidden_size * ratio) == config.intermediate_size else math.nextafter(ratio, math.inf)


def _transform(config: UMAEConfig, processor: UMAEImageProcessor) -> dict[str, Any]:
    """What the processor does in the words of timm, whose evaluation resizes to `floor(size / crop_pct)`."""
    settings = processor.to_dict()
    size, (height, width) = settings["size"], config.image_height_width
    keeps_ratio = "shortest_edge" in size
    side, resized = (min(height, width), size["shortest_edge"]) if keeps_ratio else (height, size["height"])
    crop_pct = side / resized
    while math.floor(side / crop_pct) < resized:
        crop_pct = math.nextafter(crop_pct, 0)
    return {
        "interpolation": Image.Resampling(settings["resample"]).name.lower(),
        "crop_pct": crop_pct,
        "crop_mode": "center" if keeps_ratio else "squash",
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
    }
