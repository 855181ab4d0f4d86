"""What a training run will need, before its first step: memory and disk, by arithmetic."""

import shutil
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from configuration_umae import UMAEConfig

STATE_BYTES = 16  # a parameter: weight, gradient and AdamW's two moments, float32
CHECKPOINT_BYTES = 12  # a parameter, without the gradient
FEW_IMAGES = 1 / 10_000  # for each parameter of an encoder that starts from scratch
PUBLISHED = "facebook/vit-mae-base"


def activation_bytes(config: UMAEConfig, mixed_precision: str, reconstructs: bool) -> int:
    """What the forward pass keeps of one image for the backward pass, with fused attention and without checkpointing.

    Args:
        reconstructs: pre-training, with masks and a decoder; else a classifier that sees all patches.
    """
    patches, hidden = config.grid[0] * config.grid[1], config.num_hidden_patches
    tokens = 1 + (patches - hidden if reconstructs else patches)
    kept = config.num_hidden_layers * _layer_bytes(
        tokens, config.hidden_size, config.intermediate_size, mixed_precision
    )
    if reconstructs:
        kept += config.decoder_num_hidden_layers * _layer_bytes(
            1 + patches, config.decoder_hidden_size, config.decoder_intermediate_size, mixed_precision
        )
        height, width = config.patch_height_width
        kept += 4 * 3 * hidden * height * width * config.num_channels  # prediction, target and their difference
    return kept


def _layer_bytes(tokens: int, width: int, inner: int, mixed_precision: str) -> int:
    """Of a transformer layer: two residuals in float32; two norms' outputs, q, k, v, what attention returns, and the
    feed-forward layer before and after its activation in the precision of matrix products."""
    product = 4 if mixed_precision == "no" else 2
    return tokens * (2 * width * 4 + (6 * width + 2 * inner) * product)


def training_memory(
    model: PreTrainedModel,
    batch_size: int,
    mixed_precision: str,
    gradient_checkpointing: bool,
    processes_that_share: int,
    reconstructs: bool,
) -> int:
    """Bytes that training takes on one device, without what the libraries themselves take.

    Args:
        batch_size: images of a forward pass.
        processes_that_share: weights and optimiser (FSDP2); 1 if every process has them all.
    """
    config = cast(UMAEConfig, model.config)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state = STATE_BYTES * parameters // processes_that_share
    casts = 0 if mixed_precision == "no" else 2 * parameters
    kept = activation_bytes(config, mixed_precision, reconstructs)
    layers = config.num_hidden_layers + (config.decoder_num_hidden_layers if reconstructs else 0)
    working = kept // layers  # of the layer whose gradient is being computed
    if gradient_checkpointing:
        kept //= 4  # the inputs of layers, and what is outside them
    return state + casts + batch_size * (kept + working)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, or that a machine without one has free; None where torch does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    import psutil  # only training needs it

    return psutil.virtual_memory().available


def needs(
    accelerator: Accelerator,
    model: PreTrainedModel,
    folder: Path,
    batch_size: int,
    checkpoints: int,
    gradient_checkpointing: bool,
    reconstructs: bool,
) -> tuple[dict[str, str], list[str]]:
    """Lines of the announcement, and warnings where there is too little of something."""
    shared = accelerator.num_processes if accelerator.is_fsdp2 else 1
    memory = training_memory(
        model, batch_size, accelerator.mixed_precision, gradient_checkpointing, shared, reconstructs
    )
    processes = accelerator.num_processes if accelerator.device.type == "cpu" else 1  # which share one memory
    has, warnings = device_memory(accelerator.device), []
    lines = {"memory": f"about {in_bytes(memory)} on each {'device' if processes == 1 else 'process'}"}
    if has is not None:
        lines["memory"] += f"; {in_bytes(has)} {'free' if accelerator.device.type == 'cpu' else 'in all'}"
        if processes * memory > has:
            warnings.append(
                f"training takes about {in_bytes(processes * memory)} of memory, and there are {in_bytes(has)}; "
                f"lower per_device_train_batch_size and raise gradient_accumulation_steps as much, or set "
                f"gradient_checkpointing"
            )
    size = CHECKPOINT_BYTES * sum(parameter.numel() for parameter in model.parameters())
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    lines["disk"] = f"{in_bytes(size)} a checkpoint, {checkpoints} kept; {in_bytes(free)} free"
    if (checkpoints + 2) * size > free:  # one more while it is written, and the finished model
        warnings.append(
            f"{folder} has {in_bytes(free)} free, and the run needs {in_bytes((checkpoints + 2) * size)}; give an "
            f"output_dir on another disk"
        )
    return lines, warnings


def too_few_images(images: int | None, encoder_parameters: int) -> list[str]:
    """A warning where so few images can hardly train an encoder of this size from scratch."""
    if images is None or images >= FEW_IMAGES * encoder_parameters:
        return []
    return [
        f"{images:,} images are far too few to train {encoder_parameters / 1e6:.3g} million parameters from scratch; "
        f"start from published weights (model_name_or_path {PUBLISHED}), or take a smaller model_size, see "
        f"docs/recipes.md"
    ]


def in_bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
