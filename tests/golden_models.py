"""Our models with the weights of golden_inputs.py, and the values that the original code computed for them."""

import argparse
import dataclasses
import json
from pathlib import Path

import golden_inputs
import torch

from configuration_umae import UMAEConfig
from modeling_umae import UMAEForPreTraining

SETUP = golden_inputs.SETUPS["golden"]
# The width of ViT-B, whose number of heads is known, and little else
SETUP_OF_768 = dataclasses.replace(
    SETUP, hidden_size=768, num_hidden_layers=1, num_attention_heads=12, image_size=8, patch_size=2, mlp_ratio=1,
    decoder_hidden_size=64, decoder_num_attention_heads=16,
)  # fmt: skip
VALUES = json.loads((Path(__file__).parent / "golden.json").read_text())


def our_name(name: str) -> str:
    """A name of golden_inputs.py as our models have it."""
    (ours,) = golden_inputs.to_legacy({name: None})
    return f"vit.{ours}" if ours.startswith("fc_norm") else ours


def our_weights(setup=SETUP, pooling: str = "cls") -> dict[str, torch.Tensor]:
    """The state dict of `UMAEForPreTraining` for a set-up, with both position tables."""
    values = golden_inputs.with_position_tables(setup, golden_inputs.weights(setup))
    left_out = ("classifier",) if pooling == "mean" else ("classifier", "fc_norm")
    return {our_name(name): torch.tensor(v) for name, v in values.items() if not name.startswith(left_out)}


def pretraining_model(setup=SETUP, dtype=torch.float32, attention="sdpa", **config) -> UMAEForPreTraining:
    config = UMAEConfig(**golden_inputs.config_arguments(setup), **config)
    model = UMAEForPreTraining._from_config(config, attn_implementation=attention)
    model.load_state_dict(our_weights(setup, config.pooling))
    return model.to(dtype)


def batch(setup=SETUP, step: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixel_values, noise) of a step."""
    images, noise = golden_inputs.images(setup, step), golden_inputs.noise(setup, step)
    return torch.tensor(images, dtype=dtype), torch.tensor(noise)


def fresh_config(**changes) -> UMAEConfig:
    """A configuration small enough for a test."""
    small = {
        "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32,
    }  # fmt: skip
    return UMAEConfig(**{**small, **changes})


def original_file(path, setup=SETUP, decoder: bool = True, **content):
    """A checkpoint as the original code saves it: its names, its settings, and what else training needs."""
    values = golden_inputs.with_position_tables(setup, golden_inputs.weights(setup))
    tensors = {name: torch.tensor(v) for name, v in golden_inputs.to_original(values).items()}
    tensors |= {"fc_norm.weight": torch.ones(setup.hidden_size), "fc_norm.bias": torch.zeros(setup.hidden_size)}
    if not decoder:
        tensors = {name: v for name, v in tensors.items() if not name.startswith(("decoder", "mask_token", "fc"))}
    settings = argparse.Namespace(
        mask_ratio=0.6, norm_pix_loss=True, lamb=0.08, reg="spectral", world_size=8, output_dir="/somebody/s"
    )
    whole = {"model": tensors, "args": settings, "epoch": 3, "optimizer": {"state": {}}, **content}
    torch.save({name: value for name, value in whole.items() if value is not None}, path)
    return path
