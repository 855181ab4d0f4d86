"""What a run is started on: device, processes, precision, trackers, loader processes."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    str_to_bool,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from umae.speed import has_fast_bf16

FLOPS_TO_COMPILE = 1e18  # of a run; by arithmetic 40 minutes on an H100 at 40 % of its peak
FLOPS_FOR_THREADS = 5e9  # a step of fewer is not faster on two threads: the digits' recipe has 0.9e9, CIFAR-10's 42e9
DOWNLOAD = timedelta(days=7)  # at most, of a data set
PATIENCE = timedelta(minutes=30)  # with a process that does not answer; one that has died is noticed at once


T = TypeVar("T")


def make_accelerator(
    environ: Mapping[str, str],
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    report_to: str,
    folder: Path,
) -> Accelerator:
    """The accelerator of a training run.

    Args:
        environ: of the process; Accelerate's launchers say there what they were asked for.
        mixed_precision: None for what `environ` says unless no, then bf16 if the hardware has it.
        report_to: names of trackers, separated by commas, or "none".
        folder: of the run; trackers write to `logs` in it.

    Raises:
        ValueError: a tracker is not installed or not known, or FSDP is of version 1.
    """
    trackers = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    available = [str(name) for name in get_available_trackers()]
    for name in trackers:  # Accelerate would drop it without a word
        if name not in available:
            raise ValueError(f"report_to {name}: not installed or not known; here are {', '.join(available) or 'none'}")
    on_cpu = bool(str_to_bool(environ.get("ACCELERATE_USE_CPU", "false")))
    device = PartialState(cpu=on_cpu, timeout=PATIENCE).device
    asked = mixed_precision or environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision is None and asked == "no" and has_fast_bf16(device):
        asked = "bf16"
    return Accelerator(
        mixed_precision=asked,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=trackers or None,
        project_dir=folder / "logs",
        fsdp_plugin=fsdp_plugin(environ),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of the gradients
    )


def fsdp_plugin(environ: Mapping[str, str]) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as the launcher was asked for it, but for two things; None without FSDP.

    Without Accelerate's mixed precision, which also casts what goes into the model and comes out of it: noise, in which
    bf16 makes ties, targets and losses. The forward pass runs under autocast instead, as without FSDP, see
    `State.begin`. And without `cpu_ram_efficient_loading`, as every process loads the weights.

    Args:
        environ: of the process.

    Raises:
        ValueError: FSDP of version 1.
    """
    if not str_to_bool(environ.get("ACCELERATE_USE_FSDP", "false")):
        return None
    if (version := environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"the launcher was asked for FSDP version {version}, expected 2; set fsdp_version: 2 in its configuration"
        )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False
    )


def set_threads(accelerator: Accelerator, environ: Mapping[str, str], flops_per_step: float) -> None:
    """On a CPU: as many threads as a step can use, unless the user has chosen; and a word if the machine is busy.

    The threads of a tiny model wait for each other at every operation, and beside other work for much longer: one
    trained for 19 minutes instead of 2.5.

    Args:
        environ: of the process; `OMP_NUM_THREADS` in it is the user's choice.
        flops_per_step: of one process.
    """
    if accelerator.device.type != "cpu":
        return
    if "OMP_NUM_THREADS" not in environ and flops_per_step < FLOPS_FOR_THREADS:
        torch.set_num_threads(1)
    cores = usable_cores()
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > cores:
        accelerator.print(f"the machine is busy: load {os.getloadavg()[0]:.1f} on {cores} cores; this will take longer")


def usable_cores() -> int:
    """The processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_main_process(accelerator: Accelerator, compute: Callable[[], T]) -> T:
    """What the main process computes, on every process; its `ValueError` is raised on all of them."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = compute()
        except ValueError as error:
            result[1] = error
    value, refusal = broadcast_object_list(result)
    if refusal is not None:
        raise refusal
    return value


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process does something, a download mostly, before the others do, which then find its cache.

    As `Accelerator.main_process_first`, but the others wait for DOWNLOAD instead of PATIENCE.
    """
    if accelerator.num_processes == 1:
        yield
        return
    waiting = dist.new_group(backend="gloo", timeout=DOWNLOAD)
    if not accelerator.is_main_process:
        dist.barrier(waiting)
    yield
    if accelerator.is_main_process:
        dist.barrier(waiting)
    dist.destroy_process_group(waiting)


def close(accelerator: Accelerator) -> None:
    """Let go of models, processes and trackers."""
    accelerator.free_memory()  # a DistributedDataParallel that outlives its process group can hang the process
    accelerator.end_training()


@contextmanager
def own_state() -> Iterator[None]:
    """Forget Accelerate's state at the end, also of a run that fails: later work in the process would inherit it, for
    example its precision."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def fast_attention(accelerator: Accelerator) -> str:
    """The attention to train with: on CPUs in bf16 the backward pass of the fused one is many times slower."""
    return "eager" if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" else "sdpa"


def what_to_compile(accelerator: Accelerator, asked: str | None, flops: float) -> str:
    """`no`, or what of the model to compile, see `compile_model`: by default on GPUs, where the run is long.

    Args:
        asked: by the user, None for the default.
        flops: floating-point operations of the whole run.

    Raises:
        ValueError: what was asked for cannot be compiled with FSDP2.
    """
    if accelerator.is_fsdp2 and asked in ("model", "graphs"):
        raise ValueError(f"torch_compile {asked}: FSDP2 shards the model layer by layer; use torch_compile layers")
    if asked is not None:
        return asked
    if accelerator.device.type != "cuda" or flops < FLOPS_TO_COMPILE:
        return "no"
    return "layers" if accelerator.is_fsdp2 else "model"


def usual_workers(device: torch.device) -> int:
    """Loader processes beside each of training: one a core beside GPUs, which share them; none where training itself
    takes the cores."""
    if device.type == "cpu":
        return 0
    return min(16, usable_cores() // max(1, torch.accelerator.device_count()))


def num_workers(device: torch.device, asked: int | None) -> int:
    """Loader processes beside each of training: as asked for, or the usual number."""
    return usual_workers(device) if asked is None else asked
