"""Images per second of training, and where the time of a step goes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure, step
from benchmarks.gpu.items import Bench, Item
from benchmarks.gpu.trace import CATEGORIES, milliseconds_by_category
from umae import UMAEConfig
from umae.speed import compile_model, matmul_rate, peak_flops, training_flops, used_memory

WAYS = ("eager", "layers", "model", "graphs")
BACKENDS = ("flash", "cuDNN", "efficient")
SHAPES = ((12, 50, 64), (16, 197, 32))  # attention heads, tokens, head width: encoder and decoder of ViT-B


def items(bench: Bench) -> list[Item]:
    """The most important ones first: with less time, the last ones are left out."""
    found = [Item("ceilings", partial(ceilings, bench), 20)]
    for heads, tokens, width in SHAPES:
        for backend in BACKENDS:
            run = partial(attention, bench, backend, heads, tokens, width)
            found.append(Item(attention_name(backend, tokens, width), run, 5))
    found += [train_item(bench, "ViT-B/16", 256, way) for way in (*WAYS, "float16", "ViTMAE", "ViTMAE compiled")]
    found += [train_item(bench, "CIFAR recipe", 256, way) for way in ("eager", "model", "graphs")]
    found += [Item(f"trace ViT-B/16 256 {way}", partial(trace, bench, way), 90) for way in WAYS]
    for model, batches in {"ViT-B/16": (64, 1024), "ViT-L/16": (256, 64, 1024)}.items():
        found += [train_item(bench, model, batch_size, way) for batch_size in batches for way in WAYS]
    return found


def train_item(bench: Bench, model: str, batch_size: int, way: str) -> Item:
    run = partial(train, bench, model, batch_size, way)
    return Item(f"{model} {batch_size} {way}", run, 40 if way in ("eager", "float16", "ViTMAE") else 100)


# ----------------------------------------------------------------------------------------------------------------------
# Ceilings


def ceilings(bench: Bench) -> dict[str, Any]:
    """FLOP/s of a bf16 product of 8192 x 8192 matrices (1024 on a CPU), and bytes per second of a copy."""
    source = torch.empty(bench.pick(2**30, 2**24), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = measure.seconds_each(lambda: target.copy_(source), 10, bench.device)
    rate = matmul_rate(torch.device(bench.device), torch.bfloat16)
    return {"matmul_flops": rate, "copy_bytes": 2 * source.nbytes / seconds}  # read once, written once


def attention_name(backend: str, tokens: int, width: int) -> str:
    return f"attention {tokens} x {width} {backend}"


def attention(bench: Bench, backend: str, heads: int, tokens: int, width: int) -> dict[str, Any]:
    """Milliseconds of the forward and of both passes of bf16 attention by one kernel."""
    shape = (bench.pick(256, 2), heads, tokens, width)
    query, key, value = (
        torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    gradient = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def both() -> None:
        torch.autograd.grad(forward(), (query, key, value), gradient)

    with sdpa_kernel(backend_of(bench.device, backend)):
        forward_ms, both_ms = (1000 * timed(bench, run)[1] for run in (forward, both))
    return {"forward_ms": forward_ms, "both_ms": both_ms}


def backend_of(device: str, name: str) -> SDPBackend:
    """A CPU has but one of these kernels; the others are computed step by step there."""
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return backends[name] if device == "cuda" or name == "flash" else SDPBackend.MATH


# ----------------------------------------------------------------------------------------------------------------------
# Training


def contender(bench: Bench, model: str, way: str) -> step.Contender:
    """A model as `umae pretrain` trains it on random images, in one of WAYS; or `float16`, or transformers' ViTMAE."""
    fields = bench.fields(model)
    if way == "float16":
        return step.ours(fields, torch.float16, bench.device)
    ours = step.ours(fields, torch.bfloat16, bench.device)
    if way.startswith("ViTMAE"):
        theirs = step.vitmae(fields, torch.bfloat16, bench.device, ours.model.state_dict(), fused=True)
        if way.endswith("compiled"):
            theirs.model.compile(dynamic=False)
        return theirs
    if way != "eager":
        compile_model(ours.model, way)
    return ours


def train(bench: Bench, model: str, batch_size: int, way: str) -> dict[str, Any]:
    """Images per second, seconds of the first step (in which it is compiled), and memory."""
    batch_size = bench.pick(batch_size, 2)
    torch.manual_seed(0)
    try:
        trained = contender(bench, model, way)
        batch = step.random_batch(bench.fields(model), batch_size, bench.device)
        first, seconds = timed(bench, lambda: trained.step(*batch))
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    flops = training_flops(UMAEConfig(**bench.fields(model))) * batch_size
    return {
        "ms": 1000 * seconds,
        "images_per_second": batch_size / seconds,
        "flops": None if way.startswith("ViTMAE") else flops / seconds,
        "first_step_s": first,
        "memory_gb": used_memory(torch.device(bench.device)) / 1e9,
    }


def timed(bench: Bench, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first call, and of one of 30 after 10 to warm up."""
    first = measure.seconds_of(run, bench.device)
    for _ in range(bench.pick(9, 1)):
        run()
    return first, measure.seconds_each(run, bench.pick(30, 1), bench.device)


def trace(bench: Bench, way: str) -> dict[str, Any]:
    """Milliseconds of a step of ViT-B/16 at batch 256, by what its kernels compute."""
    trained = contender(bench, "ViT-B/16", way)
    batch = step.random_batch(bench.fields("ViT-B/16"), bench.pick(256, 2), bench.device)
    _, seconds = timed(bench, lambda: trained.step(*batch))
    return milliseconds_by_category(lambda: trained.step(*batch), bench.pick(5, 1), 1000 * seconds, bench.device)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def tables(results: dict[str, dict[str, Any]], bench: Bench) -> list[str]:
    peak = peak_flops(measure.hardware_name(bench.device), "bf16")
    parts = []
    if ceiling := results.get("ceilings"):
        share = f" ({ceiling['matmul_flops'] / peak:.0%} of its peak)" if peak else ""
        parts.append(
            f"bf16 matrix products: {ceiling['matmul_flops'] / 1e12:.3g} TFLOP/s{share}. "
            f"Copies on the device: {ceiling['copy_bytes'] / 1e9:,.0f} GB/s, read and written."
        )
    training = [(name, result) for name, result in results.items() if name.startswith(("ViT-", "CIFAR"))]
    if training:
        header = ("model, batch, way", "ms", "images/s", "MFU", "first step, s", "peak memory, GB")
        rows = [[name, *training_cells(result, peak)] for name, result in training]
        parts += ["### Training steps, bf16", measure.table(header, rows)]
    traces = {name.rsplit(" ", 1)[1]: result for name, result in results.items() if name.startswith("trace")}
    if traces:
        rows = [[kind, *(f"{result['ms'][kind]:.2f}" for result in traces.values())] for kind in CATEGORIES]
        rows.append(["step", *(f"{result['step_ms']:.2f}" for result in traces.values())])
        parts += [
            "### Milliseconds of a step, ViT-B/16, batch 256",
            measure.table(("kernels", *traces), rows),
            "By the names of kernels, which `records.jsonl` lists. Casts are also copies into another layout; idle is "
            "what kernels leave\nof a step.",
        ]
    alone = [(name, result) for name, result in results.items() if name.startswith("attention")]
    if alone:
        rows = [[name, f"{result['forward_ms']:.3f}", f"{result['both_ms']:.3f}"] for name, result in alone]
        header = ("tokens x head width, kernel", "forward, ms", "forward and backward, ms")
        parts += ["### Attention alone, batch 256, bf16", measure.table(header, rows)]
    return parts


def training_cells(result: dict[str, Any], peak: float | None) -> list[str]:
    if result.get("out_of_memory"):
        return ["out of memory", "-", "-", "-", "-"]
    mfu = f"{result['flops'] / peak:.1%}" if peak and result["flops"] else "-"
    cells = [f"{result['ms']:.2f}", f"{result['images_per_second']:,.0f}", mfu]
    return [*cells, f"{result['first_step_s']:.1f}", f"{result['memory_gb']:.2f}"]
