"""The model that a run of pre-training starts from: a fresh one, or that of published weights."""

import dataclasses
from collections.abc import Callable

import torch
from accelerate import Accelerator

from arguments_umae import PretrainModelArguments, parse_overrides
from umae import UMAEConfig, UMAEForPreTraining
from umae.convert import load_exactly, read_model, resize_positions
from umae.training.hardware import fast_attention


def make_config(args: PretrainModelArguments, num_channels: int | None = None) -> UMAEConfig:
    """That of the weights, if the model starts from some, with what is given instead.

    Args:
        num_channels: that the images say they have, used where no other number is given.
    """
    names = (
        "image_size", "patch_size", "num_channels", "mask_ratio", "norm_pix_loss", "uniformity_weight", "regularizer",
        "pooling",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    fields = [field.name for field in dataclasses.fields(UMAEConfig)]
    found = {} if num_channels is None else {"num_channels": num_channels}
    overrides = {**found, **parse_overrides(args.config_overrides, fields, "config_overrides"), **given}
    if args.model_name_or_path is None:
        return UMAEConfig.sized(args.model_size, **overrides)
    if args.model_size is not None:
        raise ValueError(f"model_size {args.model_size}: weights have a size of their own; leave it out")
    config, _ = read_model(args.model_name_or_path)
    patch = config.patch_height_width
    config.uniformity_weight = config.uniformity_weight or UMAEConfig().uniformity_weight  # plain MAE has none
    for name, value in overrides.items():
        setattr(config, name, value)
    if config.patch_height_width != patch:
        size = patch[0] if patch[0] == patch[1] else patch
        raise ValueError(f"patch_size {config.patch_size} is not that of the weights, {size}; leave it out")
    config.name_or_path = args.model_name_or_path
    return config


def make_model(
    accelerator: Accelerator, args: PretrainModelArguments, num_channels: int | None = None
) -> UMAEForPreTraining:
    """A fresh model, or one that starts from weights; what is not given stays as the configuration has it."""
    config, attention = make_config(args, num_channels), fast_attention(accelerator)
    if args.model_name_or_path is None:
        model = UMAEForPreTraining._from_config(config, attn_implementation=attention)
    else:
        model = load_weights(accelerator, args.model_name_or_path, attention, config)
    if model.config.num_hidden_patches == 0:
        raise ValueError(f"mask_ratio {model.config.mask_ratio:g} hides no patch; raise it, 0.75 is usual")
    return model


def load_weights(accelerator: Accelerator, name_or_path: str, attention: str, config: UMAEConfig) -> UMAEForPreTraining:
    """Start from a run folder or any published MAE; only a decoder may be missing, and that is said.

    Images may have another size than the weights were made for, or more or fewer channels than RGB; their position
    tables are then resized, and their patch projection is adapted.
    """
    of_weights, tensors = read_model(name_or_path)
    model = UMAEForPreTraining._from_config(config, attn_implementation=attention, dtype=torch.float32)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier.")}
    tensors = resize_positions(tensors, of_weights.grid, config, accelerator.print)
    tensors = adapt_channels(tensors, of_weights.num_channels, config, accelerator.print)
    fresh = [key for key in model.state_dict() if key not in tensors]
    load_exactly(model, tensors, name_or_path, may_be_fresh=("decoder.", "vit.fc_norm."))
    if fresh:
        accelerator.print(f"{name_or_path} lacks {len(fresh)} tensors, such as {min(fresh)}; they start fresh")
    return model


def adapt_channels(
    tensors: dict[str, torch.Tensor], channels: int, config: UMAEConfig, log: Callable[[str], object]
) -> dict[str, torch.Tensor]:
    """The tensors of `read_model`, of a model for RGB, for images of another number of channels C.

    Each channel gets the mean of the three: in the patch projection times 3 / C, so that C equal channels give the
    embedding of a grey RGB image; in the decoder's prediction as it is. (timm's `adapt_input_conv` scales alike, but
    repeats red, green and blue in turns.)

    Args:
        channels: of the weights.
        config: of the model that the tensors are loaded into.
        log: called with one line if there is another number of channels.

    Raises:
        ValueError: the weights are neither for RGB nor for the wanted number of channels.
    """
    wanted, projection = config.num_channels, "vit.embeddings.patch_embeddings.projection.weight"
    if wanted == channels or projection not in tensors:  # an error in `load_exactly`
        return tensors
    if channels != 3:
        raise ValueError(
            f"the weights are for {channels} channels, not {wanted}; only those for RGB (3) can be adapted"
        )
    adapted = {projection: tensors[projection].mean(1, keepdim=True).repeat(1, wanted, 1, 1) * (3 / wanted)}
    for name in ("decoder.decoder_pred.weight", "decoder.decoder_pred.bias"):
        if name in tensors:  # (pixels * 3, ...), with the channels of a pixel side by side
            means = tensors[name].unflatten(0, (-1, 3)).mean(1, keepdim=True)
            adapted[name] = means.repeat_interleave(wanted, dim=1).flatten(0, 1)
    log(
        f"the weights are for RGB: each of the {wanted} channels starts from the mean of the three, in the patch "
        f"projection times {3 / wanted:.3g}"
    )
    return tensors | adapted
