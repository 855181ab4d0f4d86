"""Cost of the uniformity term: D x D, as `modeling_umae.uniformity_loss` computes it, against N x N.

    python -m benchmarks.uniformity

Both are the mean squared cosine of all pairs of N features of width D = 768, shared by a number of processes: D x D
needs the sum of their matrices, N x N all of their features. The computation of one process is measured, N x N up to
16,384; the bytes it receives are measured on 2 and 4 processes. All else is calculated, and printed in italics.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks import measure, step
from modeling_umae import uniformity_loss

WIDTH = 768
# (processes, images on all of them together)
CASES = (
    (1, 256), (1, 4096), (1, 65536), (2, 256), (4, 512), (8, 1024), (32, 4096), (128, 16384), (512, 65536),
)  # fmt: skip
LARGEST_SQUARE = 16384  # N x N of more takes minutes and 87 GB
STEP_BATCH = 8  # images per step of the timed ViT-B
WIRE_RUNS = 20


def n_by_n(features: torch.Tensor) -> torch.Tensor:
    """The definition: mean over all N * N squared cosines."""
    features = F.normalize(features, dim=-1)
    return (features @ features.T).square().mean()


FORMS = {"D x D": uniformity_loss, "N x N": n_by_n}


def forward_backward(form, features: torch.Tensor) -> None:
    features.grad = None
    form(features).backward()


def measured(args) -> dict[tuple[str, int], tuple[float, int]]:
    """(form, N) -> seconds of a forward and backward pass in one process, peak bytes."""
    costs_by_form = {}
    counts = {total // world for world, total in CASES} | {total for _, total in CASES}
    for count in sorted(counts):
        features = torch.randn(count, WIDTH, device=args.device, requires_grad=True)
        forms = {name: form for name, form in FORMS.items() if name == "D x D" or count <= LARGEST_SQUARE}
        runs = {name: partial(forward_backward, form, features) for name, form in forms.items()}
        seconds = measure.interleave(runs, args.repetitions, args.device)
        for name, run in runs.items():
            costs_by_form[name, count] = seconds[name], measure.peak_bytes(run, args.device)
    return costs_by_form


def vit_base_step(args) -> tuple[float, float]:
    """FLOPs and seconds per image of a ViT-B step in bf16."""
    contender = step.ours({}, torch.bfloat16, args.device)
    two = step.random_batch({}, 2, args.device)
    flops = measure.flops(lambda: contender.loss(*two).backward()) / 2
    contender.optimizer.zero_grad()
    batch = step.random_batch({}, STEP_BATCH, args.device)
    seconds = measure.interleave({"step": lambda: contender.step(*batch)}, args.repetitions, args.device)
    return flops, seconds["step"] / STEP_BATCH


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{share:.0%}".replace("%", " %")


def share_of_flops(image_flops: float) -> str:
    """Two products of 2 N D^2 FLOPs each, against three of 2 N^2 D (both factors have a gradient)."""
    rows = []
    for world, total in CASES:
        local = total // world
        step_flops = local * image_flops
        shares = (4 * local * WIDTH**2 / step_flops, 6 * total**2 * WIDTH / step_flops)
        rows.append([world, f"{total:,}", *map(percent, shares)])
    return measure.table(("processes", "N", "D x D", "N x N"), rows)


# ----------------------------------------------------------------------------------------------------------------------
# Bytes received


def received(world: int, total: int) -> tuple[float, float]:
    """Bytes for D x D and N x N, by ring algorithms: all-reduce receives the others' parts twice, all-gather once."""
    others = (world - 1) / world
    return 2 * others * (WIDTH**2 + 1) * 4, others * total * WIDTH * 4


def received_here(world: int, total: int) -> tuple[float, float]:
    """The same, counted at the loopback device while `world` processes on this machine compute the term."""
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m", "benchmarks.uniformity")
    command = [sys.executable, "-m", *launch, str(total // world)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(json.loads(finished.stdout.splitlines()[-1]))


def loopback_bytes() -> int:
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def count_bytes(local: int) -> None:
    """Run by each of several processes; rank 0 prints the bytes that each receives for D x D and for N x N."""
    dist.init_process_group("gloo")
    features = torch.randn(local, WIDTH, requires_grad=True)
    all_features = [torch.empty(local, WIDTH) for _ in range(dist.get_world_size())]

    def gathered() -> None:
        dist.all_gather(all_features, features.detach())

    counts = []
    for run in (partial(forward_backward, uniformity_loss, features), gathered):
        run()
        dist.barrier()
        before = loopback_bytes()
        for _ in range(WIRE_RUNS):
            run()
        dist.barrier()
        counts.append((loopback_bytes() - before) / WIRE_RUNS / dist.get_world_size())
    if dist.get_rank() == 0:
        print(json.dumps(counts))
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------


def costs(measurements, wire: dict[int, tuple[float, float]], image_seconds: float) -> str:
    """The table with one row for each of CASES; calculated values in italics."""
    rows = []
    for world, total in CASES:
        local, factor = total // world, max(1, total / LARGEST_SQUARE) ** 2
        ours, square = measurements["D x D", local], measurements["N x N", min(total, LARGEST_SQUARE)]
        mark = "*" if factor > 1 else ""
        bytes_mark = "" if world in wire or world == 1 else "*"
        of_step = (seconds / (local * image_seconds) for seconds in (ours[0], square[0] * factor))
        rows.append([
            world, f"{total:,}",
            f"{1000 * ours[0]:,.1f}", f"{mark}{1000 * square[0] * factor:,.1f}{mark}",
            f"{ours[1] / 1e6:,.1f}", f"{mark}{square[1] * factor / 1e6:,.1f}{mark}",
            *(f"{bytes_mark}{count / 1e6:,.2f}{bytes_mark}" for count in wire.get(world, received(world, total))),
            *(f"*{percent(share)}*" for share in of_step),
        ])  # fmt: skip
    names = [f"{form}, {unit}" for unit in ("ms", "peak MB", "received MB", "of a step") for form in FORMS]
    return measure.table(("processes", "N", *names), rows)


def main() -> None:
    args = measure.start(measure.parser(__doc__))
    image_flops, image_seconds = vit_base_step(args)
    wire = {world: received_here(world, total) for world, total in CASES if world in (2, 4)}
    measure.report(
        "uniformity",
        "The uniformity term",
        args.device,
        f"{costs(measured(args), wire, image_seconds)}\n\n"
        f"Features of width {WIDTH}, float32. Measured in one process: forward and backward pass of D x D on its own "
        "rows, of N x N on all\nN; peak: what they allocate on top of the features. Received: by each process, counted "
        "at the loopback device on 2 and 4 processes\n(with what TCP adds), for 1 there is nothing; the backward pass "
        "of D x D sends nothing. In italics, calculated: N x N beyond\n"
        f"{LARGEST_SQUARE:,} grows with its square; bytes of ring algorithms; shares of a ViT-B step of "
        f"{1000 * image_seconds:.1f} ms per image, measured at\nbatch {STEP_BATCH} in bf16 and scaled by images "
        "of a process. Communication time is not included.",
        "## Calculated: share of a ViT-B step's FLOPs\n\n"
        f"{share_of_flops(image_flops)}\n\n"
        f"The step: {image_flops / 1e9:.1f} GFLOP per image, counted. D x D: 4 x n x D^2 on a process' n images,\n"
        "N x N, every process computing the whole matrix: 6 x N^2 x D.",
        repetitions=args.repetitions,
    )


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        count_bytes(int(sys.argv[1]))
    else:
        main()
