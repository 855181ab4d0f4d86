"""Models with the weights of a checkpoint: a missing or unexpected key is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from configuration_umae import POOLINGS, UMAEConfig
from modeling_umae import UMAEModel, resize_position_table, sincos_position_table
from umae.convert.families import read_model
from umae.convert.weights import first_five

Model = TypeVar("Model", bound=PreTrainedModel)


def encoder_from_pretrained(name_or_path: str, pooling: str | None = None, revision: str | None = None) -> UMAEModel:
    """The encoder of any checkpoint that `read_model` knows, in float32 and evaluation mode.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, a file of the original code, or a model on the Hub.
        pooling: what `pooler_output` is, see `set_pooling`; by default what the checkpoint was trained with, and
            "cls" for ViT and ViTMAE.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: as `read_model`, and if the weights do not fit the encoder of its configuration exactly. Keys that
            are missing, left over or of another shape are listed.
    """
    config, tensors = read_model(name_or_path, revision)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(("decoder.", "classifier."))}
    encoder = load_exactly(UMAEModel(config), tensors, name_or_path)
    return set_pooling(encoder, pooling or config.pooling).eval()


def set_pooling(encoder: UMAEModel, pooling: str) -> UMAEModel:
    """Change `encoder.config.pooling`, the feature in `pooler_output`, in place; returns the encoder.

    "cls" is the class token, `last_hidden_state[:, 0]`. "mean" is `fc_norm` of the mean of the patch tokens in
    `last_hidden_state`, with its trained weights if the encoder has them, else with initial ones. These tokens are
    normalised by the encoder's last norm, unless it has `final_layernorm=False`, as models with `global_pool` of
    facebookresearch/mae have; see `leave_out_final_layernorm`.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if pooling == "mean" and encoder.config.pooling == "cls":
        fc_norm = nn.LayerNorm(encoder.config.hidden_size, eps=encoder.config.layer_norm_eps)
        encoder.fc_norm = fc_norm.to(encoder.device, encoder.dtype)
    elif pooling == "cls" and encoder.config.pooling == "mean":
        del encoder.fc_norm
    encoder.config.pooling = pooling
    return encoder


def leave_out_final_layernorm(encoder: UMAEModel) -> UMAEModel:
    """Leave the tokens as the last layer returns them, in place; returns the encoder.

    With `set_pooling(encoder, "mean")` it then has the feature that facebookresearch/mae calls `global_pool`,
    `models_vit.py`.
    """
    encoder.layernorm = nn.Identity()
    encoder.config.final_layernorm = False
    return encoder


def load_exactly(
    model: Model, tensors: dict[str, torch.Tensor], name: str | Path, may_be_fresh: tuple[str, ...] = ()
) -> Model:
    """Load tensors, with the names of `read_model`, into a model, in place; returns the model.

    Args:
        name: the checkpoint's name in error messages.
        may_be_fresh: prefixes of keys that may be missing; their weights are not changed.

    Raises:
        ValueError: keys are missing, left over or of another shape; the first five of each are listed.
    """
    if isinstance(model, UMAEModel):
        tensors = {key.removeprefix("vit."): tensor for key, tensor in tensors.items()}
    expected = model.state_dict()
    problems = {
        "missing": [key for key in expected if key not in tensors and not key.startswith(may_be_fresh or ("\0",))],
        "left over": [key for key in tensors if key not in expected],
        "of another shape": [key for key in expected if key in tensors and expected[key].shape != tensors[key].shape],
    }
    wrong_keys = "; ".join(f"{problem}: {first_five(keys)}" for problem, keys in problems.items() if keys)
    if wrong_keys:
        raise ValueError(f"{name}: the weights do not fit the model that its configuration describes; {wrong_keys}")
    model.load_state_dict(tensors, strict=False)
    return model


def resize_positions(
    tensors: dict[str, torch.Tensor], grid: tuple[int, int], config: UMAEConfig, log: Callable[[str], object]
) -> dict[str, torch.Tensor]:
    """The tensors of `read_model` with position tables for images of another size and patches of the same size.

    The encoder's table, which may be trained, is interpolated (bicubic, as in facebookresearch/mae); the decoder's is
    fixed and computed again.

    Args:
        grid: (rows, columns) of patches of the weights.
        config: of the model that the tensors are loaded into.
        log: called with one line if a table was changed.
    """
    encoder, decoder = "vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"
    is_table = encoder in tensors and tensors[encoder].shape == (1, 1 + grid[0] * grid[1], config.hidden_size)
    if grid == config.grid or not is_table:  # any other shape is an error in `load_exactly`
        return tensors
    (rows, columns), (new_rows, new_columns) = grid, config.grid
    text = f"position table is interpolated from {rows} x {columns} to {new_rows} x {new_columns} patches"
    tables = {encoder: resize_position_table(tensors[encoder], grid, config.grid)}
    if decoder in tensors:
        tables[decoder] = sincos_position_table(config.decoder_hidden_size, config.grid)
    log(f"the encoder's {text}" + (", the decoder's made anew" if decoder in tensors else ""))
    return tensors | tables
