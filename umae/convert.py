"""Encoders of other families as ours, each by a table of renames; nothing is left over or missing in silence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTMAEModel, ViTModel
from transformers.utils import logging

from configuration_umae import POOLINGS, UMAEConfig
from modeling_umae import UMAEModel

ACCEPTED = ("umae", "vit", "vit_mae")  # the model_type of a checkpoint's config.json

# Of transformers' encoders in memory (since 5.17; before, their names were ours) to ours, applied in this order.
RENAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

# Of facebookresearch/mae and zhangq327/U-MAE (pre-training) to ours, applied in this order.
ORIGINAL_RENAMES = (
    (r"^(cls_token)$", r"vit.embeddings.\1"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^norm\.", "vit.layernorm."),
    (r"^fc_norm\.", "vit.fc_norm."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token$|decoder_(embed|pos_embed|norm|pred)\b)", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

# What an encoder has no use for: decoders, heads, ViT's pooler, the mask token of masked image modelling.
NOT_THE_ENCODER = re.compile(r"^(vit\.)?(decoder|classifier|pooler)\.|embeddings\.mask_token$")

# Fields that all three configurations share. The decoder's stay at their defaults: it is not loaded.
FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias", "initializer_range",
)  # fmt: skip


def encoder_from_pretrained(name_or_path: str, pooling: str | None = None, revision: str | None = None) -> UMAEModel:
    """The encoder of a U-MAE, ViT or ViTMAE checkpoint, in float32 and evaluation mode.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or a model on the Hub.
        pooling: what `pooler_output` is, see `set_pooling`; by default what the checkpoint was trained with, and
            "cls" for ViT and ViTMAE.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no such model, it is of another kind, or its weights are not exactly those of its
            configuration. Keys that are missing, left over or of another shape are listed.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
    except OSError as error:
        raise ValueError(
            f"there is no model {str(name_or_path)!r}, neither as a folder with a config.json nor on the Hub ({error})"
        ) from error
    if not config:
        raise ValueError(f"{name_or_path} has no config.json; give a finished run, or one of its checkpoints step-N")
    kind = config.get("model_type")
    if kind not in ACCEPTED:
        raise ValueError(f"{name_or_path} is a model of type {kind!r}; accepted are {', '.join(ACCEPTED)}")
    if kind == "umae":
        encoder = _load(UMAEModel, name_or_path, revision)
    elif kind == "vit":
        encoder = _from_vit(_load(ViTModel, name_or_path, revision, add_pooling_layer=False))
    else:
        encoder = _from_vit(_load(ViTMAEModel, name_or_path, revision))
    return set_pooling(encoder, pooling or encoder.config.pooling).eval()


def set_pooling(encoder: UMAEModel, pooling: str) -> UMAEModel:
    """Change, in place, which feature `pooler_output` is.

    "cls" is the class token, `last_hidden_state[:, 0]`. "mean" is `fc_norm` of the mean of the patch tokens: with the
    scale that was learned if the encoder was trained with it, else a plain layer norm, as facebookresearch/mae probes.
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


def _load(model_class: type[PreTrainedModel], name_or_path: str, revision: str | None, **kwargs) -> PreTrainedModel:
    """`from_pretrained` in float32, where weights that do not fit are an error instead of a warning."""
    with _no_warnings():  # they would list every tensor of a decoder
        model, found = model_class.from_pretrained(
            name_or_path,
            revision=revision,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    left_over = [key for key in found["unexpected_keys"] if not NOT_THE_ENCODER.search(key)]
    _check_keys(name_or_path, found["missing_keys"], left_over, [key for key, *_ in found["mismatched_keys"]])
    return model


def _from_vit(model: ViTModel | ViTMAEModel) -> UMAEModel:
    """Our encoder with the weights of transformers' ViT; its learned position table takes the place of ours."""
    fields = {name: getattr(model.config, name) for name in FIELDS}
    encoder = UMAEModel(UMAEConfig(**fields, mask_ratio=0.0))
    weights = {rename(key): value for key, value in model.state_dict().items()}
    found = encoder.load_state_dict(weights, strict=False)
    _check_keys(model.config.model_type, found.missing_keys, found.unexpected_keys, ())
    return encoder


def from_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the original MAE or U-MAE code, `torch.load(...)["model"]`, under our names.

    The fused `attn.qkv` (3 * D rows) becomes query, key and value. Nothing is left out: the names of what only the
    original has (its online classifier `fc`) stay as they are, for the caller to drop or to refuse.
    """
    ours = {}
    for key, tensor in tensors.items():
        name = rename(key, ORIGINAL_RENAMES)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            ours[name] = tensor
    return ours


def rename(key: str, renames: tuple[tuple[str, str], ...] = RENAMES) -> str:
    """A parameter's name after all renames of a table."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _check_keys(name, missing, left_over, mismatched) -> None:
    problems = {"missing": missing, "left over": left_over, "of another shape": mismatched}
    found = "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys)
    if found:
        raise ValueError(f"{name}: the weights are not those of the encoder that its configuration describes; {found}")


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
