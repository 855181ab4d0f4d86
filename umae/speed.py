"""Training speed compared with the device's measured rate of matrix products, and with its peak rate."""

import re
import time

import torch
from transformers import PreTrainedModel

from configuration_umae import UMAEConfig
from modeling_umae import UMAELayer

SECONDS = 0.2  # of matrix products, whose rate is measured before training


def training_flops(config: UMAEConfig) -> int:
    """Floating-point operations of the matrix products that train on one image, forward and backward.

    A multiply-add counts 2. As `UMAEForPreTraining` computes in training mode: the projection has only visible patches,
    the decoder's last layer and head only hidden patches.
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
    # Backward takes two products for each forward product; only one for the projection, as pixels need no gradient, and
    # for the product in the uniformity term or the coding rate, whose D x D factors are not of an image but of a step.
    return 3 * forward + 2 * (2 * (visible - 1) * pixels * width) + 2 * (2 * width**2)


def encoder_flops(config: UMAEConfig, patches: int) -> int:
    """Floating-point operations of the encoder's matrix products on one image in evaluation mode.

    Args:
        patches: number of patches in its layers; the projection always has all patches of the image.
    """
    pixels = config.num_channels * config.patch_height_width[0] * config.patch_height_width[1]
    layer = _layer_flops(1 + patches, 1 + patches, config.hidden_size, config.intermediate_size)
    return 2 * config.grid[0] * config.grid[1] * pixels * config.hidden_size + config.num_hidden_layers * layer


def _layer_flops(tokens: int, queries: int, size: int, inner: int) -> int:
    """Floating-point operations of one transformer layer, forward; `queries` of the tokens attend to all tokens."""
    linear = 4 * (tokens + queries) * size**2 + 4 * queries * size * inner
    return linear + 4 * queries * tokens * size


def compile_model(model: PreTrainedModel, what: str) -> None:
    """Compile in place, for one shape of input; parameter names do not change.

    Args:
        what: `layers` compiles each transformer layer, of which equal ones share their code: the fastest to start, and
            the only one for a model that FSDP2 shards layer by layer. `model` compiles the forward pass as one graph,
            `graphs` also has it replayed as CUDA graphs, for models so small that starting kernels takes the time.
    """
    if what == "layers":
        for module in model.modules():
            if isinstance(module, UMAELayer):
                module.compile(dynamic=False)  # encoder and decoder differ in every shape
    else:
        model.compile(dynamic=False, mode="reduce-overhead" if what == "graphs" else None)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 without emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64; Apple's GPUs (MPS) do not."""
    return device.type != "mps"


def has_room(device: torch.device, size: int) -> bool:
    """Whether a GPU has this many bytes free twice over, so that work on them fits beside them."""
    return device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]


def used_memory(device: torch.device) -> int:
    """Bytes: on a GPU the peak of allocated tensors so far, on a CPU the resident memory of the process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil  # only training needs it

    return psutil.Process().memory_info().rss


# Dense 16-bit matrix products on tensor cores, accumulated in float32: operations per second in NVIDIA's data sheets
# and architecture whitepapers ("with sparsity" they give twice as much); names as in `torch.cuda.get_device_name`
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
    """Floating-point operations per second of a GPU by PEAK_FLOPS, None if unknown."""
    name = re.sub("^(NVIDIA|Tesla) ", "", device_name)
    if mixed_precision == "no" or " MIG " in name or (mixed_precision == "bf16" and name.startswith("V100")):
        return None
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def ideal_seconds(flops: int, device: torch.device, mixed_precision: str, processes: int) -> dict[str, float]:
    """How long this many operations take if all processes together compute nothing but matrix products.

    Returns:
        Seconds: `matmul_share` at the rate measured on the device, and `mfu` (model FLOPs utilisation, Chowdhery et al.
        2022, appendix B) at its peak rate, if that is known.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    rates: dict[str, float | None] = {"matmul_share": matmul_rate(device, dtype)}
    if device.type == "cuda":
        rates["mfu"] = peak_flops(torch.cuda.get_device_name(device), mixed_precision)
    return {name: flops / rate / processes for name, rate in rates.items() if rate is not None}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of square matrix products: the best of up to 20 in SECONDS, as other work
    may slow some."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds: list[float] = []
    while len(seconds) < 20 and sum(seconds) < SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
