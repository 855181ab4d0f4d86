"""How fast training is, against what the same device does with plain matrix products, and its peak."""

import re
import time

import torch
from transformers import PreTrainedModel

from configuration_umae import UMAEConfig
from modeling_umae import UMAELayer


def training_flops(config: UMAEConfig) -> int:
    """Floating-point operations of the matrix products that train on one image, forward and backward.

    A multiply-add counts 2. The count is of what `UMAEForPreTraining` does in training mode: only visible patches are
    projected, and in the decoder's last layer and head only hidden patches are computed.
    """
    patches, hidden = config.grid[0] * config.grid[1], config.num_hidden_patches
    visible, all_tokens = 1 + patches - hidden, 1 + patches  # with the class token
    pixels = config.num_channels * config.patch_height_width[0] * config.patch_height_width[1]
    width, decoder_width = config.hidden_size, config.decoder_hidden_size

    forward = config.num_hidden_layers * _layer_flops(visible, visible, width, config.intermediate_size)
    forward += 2 * visible * width * decoder_width
    for i in range(config.decoder_num_hidden_layers):
        queries = hidden if i == config.decoder_num_hidden_layers - 1 else all_tokens
        forward += _layer_flops(all_tokens, queries, decoder_width, config.decoder_intermediate_size)
    forward += 2 * hidden * decoder_width * pixels
    # The backward pass is two products for each of the forward's, but pixels need no gradient and the uniformity term's
    # one product has one.
    return 3 * forward + 2 * (2 * (visible - 1) * pixels * width) + 2 * (2 * width**2)


def encoder_flops(config: UMAEConfig, patches: int) -> int:
    """Floating-point operations of the encoder's matrix products on one image in evaluation mode.

    Args:
        patches: how many of them it sees; all are projected.
    """
    pixels = config.num_channels * config.patch_height_width[0] * config.patch_height_width[1]
    layer = _layer_flops(1 + patches, 1 + patches, config.hidden_size, config.intermediate_size)
    return 2 * config.grid[0] * config.grid[1] * pixels * config.hidden_size + config.num_hidden_layers * layer


def _layer_flops(tokens: int, queries: int, size: int, inner: int) -> int:
    """Of one transformer layer, forward, where `queries` of the tokens look at all of them."""
    linear = 4 * (tokens + queries) * size**2 + 4 * queries * size * inner
    return linear + 4 * queries * tokens * size


def compile_layers(model: PreTrainedModel) -> None:
    """Compile layer by layer: all of a kind share their code, and names of parameters stay as they are."""
    for module in model.modules():
        if isinstance(module, UMAELayer):
            module.compile(dynamic=False)  # encoder and decoder differ in every shape, so let each have its own code


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 rather than emulates it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def used_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors have taken so far, on a CPU what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil  # for training alone, which everything else runs without

    return psutil.Process().memory_info().rss


# Matrix products in 16 bits on tensor cores, dense, accumulated in float32: operations a second by NVIDIA's data sheets
# and architecture whitepapers, which give twice as much "with sparsity"; names as `torch.cuda.get_device_name` has them
PEAK_FLOPS = {
    r"B200": 2250e12,
    r"H200": 989e12,
    r"H100 80GB HBM3": 989e12,  # SXM
    r"H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"A100[- ].*": 312e12,
    r"V100-SXM2-.*": 125e12,
    r"V100-PCIE-.*": 112e12,
    r"L40S": 362e12,
    r"L4": 121e12,
    r"GeForce RTX 4090": 165e12,
}


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """Floating-point operations a second that a GPU is made for, None where that is not known."""
    name = re.sub("^(NVIDIA|Tesla) ", "", device_name)
    if mixed_precision == "no" or " MIG " in name or (mixed_precision == "bf16" and name.startswith("V100")):
        return None
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def ideal_seconds(flops: int, device: torch.device, mixed_precision: str, processes: int) -> dict[str, float]:
    """How long this many operations take where all processes together do nothing but plain matrix products.

    Returns:
        Seconds, by what a share of that rate is called: `matmul_share`, of the rate that is reached here, and where the
        device's peak is known `mfu`, model FLOPs utilisation, of the peak (Chowdhery et al. 2022, appendix B).
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    rates = {"matmul_share": matmul_rate(device, dtype)}
    if device.type == "cuda":
        rates["mfu"] = peak_flops(torch.cuda.get_device_name(device), mixed_precision)
    return {name: flops / rate / processes for name, rate in rates.items() if rate is not None}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of square matrix products; the best of twenty, as other work may disturb."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(20):
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
