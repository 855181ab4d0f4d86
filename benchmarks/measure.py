"""Shared by the benchmarks: interleaved timing, counting of FLOPs and bytes, and reports."""

import argparse
import platform
import re
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
CPU_INFO = Path("/proc/cpuinfo")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"], help=f"default here: {default}")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--repetitions", type=int, default=7, help="the median of this many is reported (default 7)")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, set the threads and the seed."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Time


def interleave(contenders: dict[str, Callable[[], object]], repetitions: int, device: str) -> dict[str, float]:
    """Median seconds of every contender, after one call each to warm up.

    Every repetition runs all of them in turn, so that other load on the machine affects all alike.
    """
    for run in contenders.values():
        run()
    seconds = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, run in contenders.items():
            seconds[name].append(seconds_of(run, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    before = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - before


def seconds_each(run: Callable[[], object], count: int, device: str) -> float:
    """Seconds of one of `count` calls in a row; on GPUs between two events, without waiting in between."""
    if device == "cpu":
        return seconds_of(lambda: [run() for _ in range(count)], device) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / count


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------------------
# Operations and bytes


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in a call; a multiplication and an addition count as two.

    Attention is counted as its matrix products, whatever kernel computes it: the counter does not know the CPU's
    kernels, and must not count what a fused kernel computes twice.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def saved_bytes(run: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that a forward pass saves for the backward pass: every storage once, without those of the model."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(s.nbytes() for s in storages(saved) - storages([*model.parameters(), *model.buffers()]))


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Peak bytes of a call's own allocations; on CPUs without the temporaries inside of kernels."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        run()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts, after every operation in the context, the bytes of tensors that were created in it and still exist."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.known.update(storages((args, kwargs)))  # of results, views of the arguments are not new
        for storage in storages(result):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, size: int) -> None:
        self.now -= size


def storages(tensors) -> set[torch.UntypedStorage]:
    """The storages of all tensors in nested lists, tuples and dicts."""
    return {leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)}


# ----------------------------------------------------------------------------------------------------------------------
# The report


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, the first column left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    form = f"| {{:<{first}}} | " + " | ".join(f"{{:>{width}}}" for width in others) + " |"
    rule = form.format("-" * first, *("-" * (width - 1) + ":" for width in others))
    return "\n".join([form.format(*cells[0]), rule, *(form.format(*row) for row in cells[1:])])


def report(name: str, title: str, device: str, *parts: str, repetitions: int | None = None) -> None:
    """Print the report and write it to `results/NAME_<date>_<hardware>.md`.

    Args:
        name: of the benchmark.
        parts: paragraphs and tables.
        repetitions: number over which times are medians; None if the benchmark measures no times.
    """
    hardware, threads = hardware_name(device), torch.get_num_threads()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    head = [
        f"# {title}",
        f"`{' '.join([f'python -m benchmarks.{name}', *sys.argv[1:]])}`",
        f"{date.today()}, {hardware}, {threads} CPU thread{'s' if threads > 1 else ''}, "
        f"Python {platform.python_version()}, {versions}."
        + (f"\nTimes are medians of {repetitions} interleaved repetitions." if repetitions else ""),
    ]
    text = "\n\n".join([*head, *parts]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / file_name(name, device)).write_text(text)
    print(text)


def file_name(name: str, device: str) -> str:
    """`NAME_<date>_<hardware>.md`."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware_name(device).lower()).strip("-")
    return f"{name}_{date.today()}_{slug}.md"


def hardware_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model_name = re.search(r"model name\s*: (.+)", CPU_INFO.read_text()) if CPU_INFO.exists() else None
    return model_name[1] if model_name else platform.machine()
