"""Where the time of a step goes: the kernels of a profiler's trace, by their names."""

import re
from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import synchronize

# The first pattern that is found in a name, in lower case, decides. Names are those of cuBLAS, cuDNN, FlashAttention,
# ATen and of Inductor's Triton kernels; on a CPU of ATen's operations.
PATTERNS = {
    "optimiser": r"adam|multi_tensor_apply|foreach|amp_update|non_finite",
    "attention": r"flash|fmha|sdpa|attention|softmax|cudnn_generated.*fprop|cudnn_generated.*bprop",
    "GEMM": r"gemm|nvjet|cutlass|cublas|xmma|splitk|addmm|::b?mm\b|matmul|convolution|conv2d",
    "norms": r"layer_?norm|gammabeta|batch_?norm|rms_?norm",
    "copies": r"memcpy|memset|catarray|::cat\b|gather|scatter|index|fill",
    "casts": r"copy_kernel|::copy_|::_to_copy|::to\b|fused__to_copy_(t_)?\d*$",
}
CATEGORIES = (*PATTERNS, "elementwise", "idle")


def category(name: str) -> str:
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name.lower())), "elementwise")


def milliseconds_by_category(run: Callable[[], object], count: int, step_ms: float, device: str) -> dict[str, Any]:
    """
    Args:
        count: calls that are traced.
        step_ms: milliseconds of a call without the profiler, which slows the starting of kernels.

    Returns:
        `ms`, milliseconds of a call by CATEGORIES; `step_ms`; `kernels`, the milliseconds of the longest 40 by name.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(count):
            run()
        synchronize(device)
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    kernels: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type != kind or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        kernels[event.key] = kernels.get(event.key, 0.0) + microseconds / 1000 / count
    milliseconds = dict.fromkeys(CATEGORIES, 0.0)
    for name, time in kernels.items():
        milliseconds[category(name)] += time
    milliseconds["idle"] = max(0.0, step_ms - sum(kernels.values()))
    longest = sorted(kernels.items(), key=lambda pair: -pair[1])[:40]
    return {"ms": milliseconds, "step_ms": step_ms, "kernels": {name[:160]: round(time, 4) for name, time in longest}}
