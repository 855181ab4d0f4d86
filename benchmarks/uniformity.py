"""What the uniformity term costs: D x D, as `modeling_umae.uniformity_loss` computes it, against N x N.

    python -m benchmarks.uniformity

Both are the mean squared cosine of all pairs of N features of width D = 768. Time and memory are measured up to
N = 16,384; shares of a ViT-B step and bytes on the wire follow by arithmetic, and are marked as such.
"""

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks import measure, step
from modeling_umae import uniformity_loss

WIDTH = 768
COUNTS = (256, 1024, 4096, 16384)
LOCAL = 128  # pictures of a process
WORLDS = (1, 8, 32, 64, 512)  # numbers of processes
STEP_BATCH = 8  # pictures of the ViT-B step that is timed


def n_by_n(features: torch.Tensor) -> torch.Tensor:
    """The definition, written down as it is: all N * N cosines."""
    features = F.normalize(features, dim=-1)
    return (features @ features.T).square().mean()


FORMS = {"D x D": uniformity_loss, "N x N": n_by_n}


def forward_backward(form, features: torch.Tensor) -> None:
    features.grad = None
    form(features).backward()


def measured(args) -> dict[tuple[str, int], tuple[float, int]]:
    """(form, N) -> seconds of a forward and backward pass, peak bytes."""
    found = {}
    for count in (LOCAL, *COUNTS):
        features = torch.randn(count, WIDTH, device=args.device, requires_grad=True)
        runs = {name: partial(forward_backward, form, features) for name, form in FORMS.items()}
        seconds = measure.interleave(runs, args.repetitions, args.device)
        for name, run in runs.items():
            found[name, count] = seconds[name], measure.peak_bytes(run, args.device)
    return found


def vit_base_step(args) -> tuple[float, float]:
    """FLOPs and seconds of a picture in a ViT-B step in bf16."""
    contender = step.ours("vit_base", torch.bfloat16, args.device)
    two = step.random_batch("vit_base", 2, args.device)
    flops = measure.flops(lambda: contender.loss(*two).backward()) / 2
    contender.optimizer.zero_grad()
    batch = step.random_batch("vit_base", STEP_BATCH, args.device)
    seconds = measure.interleave({"step": lambda: contender.step(*batch)}, args.repetitions, args.device)
    return flops, seconds["step"] / STEP_BATCH


def time_and_memory(found) -> str:
    rows = []
    for count in (LOCAL, *COUNTS):
        seconds, peaks = zip(*(found[name, count] for name in FORMS), strict=True)
        rows.append([f"{count:,}", *(f"{1000 * s:,.1f}" for s in seconds), *(f"{peak / 1e6:,.1f}" for peak in peaks)])
    quadratic = found["N x N", COUNTS[-1]][1] * (65536 / COUNTS[-1]) ** 2
    rows.append(["65,536 (arithmetic)", "", "", "", f"{quadratic / 1e6:,.0f}"])
    header = ("N", *(f"{name}, ms" for name in FORMS), *(f"{name}, peak MB" for name in FORMS))
    return measure.table(header, rows)


def share_of_flops(picture_flops: float) -> str:
    """Two products of 2 N D^2 each, against three of 2 N^2 D (either factor has a gradient)."""
    rows = []
    for world in WORLDS:
        total, whole = world * LOCAL, LOCAL * picture_flops
        rows.append([world, f"{total:,}", percent(4 * LOCAL * WIDTH**2 / whole), percent(6 * total**2 * WIDTH / whole)])
    return measure.table(("processes", "N", "D x D", "N x N"), rows)


def share_of_time(found, picture_seconds: float) -> str:
    rows = []
    for world, local in ((1, 4096), (32, LOCAL)):
        whole = local * picture_seconds
        d_by_d, n_by_n = found["D x D", local][0], found["N x N", world * local][0]
        rows.append([f"{world} x {local:,}", percent(d_by_d / whole), percent(n_by_n / whole)])
    return measure.table(("processes x pictures", "D x D", "N x N"), rows)


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{share:.0%}".replace("%", " %")


def wire(world: int) -> list[str]:
    """A ring: all-reduce sends everything twice but for its own part, all-gather receives the others' rows once."""
    others = (world - 1) / world
    reduced, gathered = 2 * others * (WIDTH**2 + 1) * 4, others * world * LOCAL * WIDTH * 4
    return [f"{world}", f"{world * LOCAL:,}", f"{reduced / 1e6:.2f}", f"{gathered / 1e6:.2f}"]


def main() -> None:
    args = measure.start(measure.parser(__doc__))
    picture_flops, picture_seconds = vit_base_step(args)
    found = measured(args)
    on_the_wire = measure.table(
        ("processes", "N", "all-reduce of D x D + 1, MB", "all-gather of N x D, MB"), [wire(world) for world in WORLDS]
    )
    measure.report(
        "uniformity",
        "The uniformity term",
        args.device,
        "## Measured: forward and backward pass in one process\n\n"
        f"{time_and_memory(found)}\n\n"
        f"Features of width {WIDTH}, float32. Peak: what the passes allocate on top of the features.",
        f"## Arithmetic: share of a ViT-B step's FLOPs, {LOCAL} pictures a process\n\n"
        f"{share_of_flops(picture_flops)}\n\n"
        f"The step: {picture_flops / 1e9:.1f} GFLOP a picture, counted. D x D: 4 x {LOCAL} x D^2.\n"
        "N x N, every process computing the whole matrix: 6 x N^2 x D.",
        "## Arithmetic from measured times: share of a ViT-B step's time, global batch 4,096\n\n"
        f"{share_of_time(found, picture_seconds)}\n\n"
        f"The step: {1000 * picture_seconds:.1f} ms a picture, measured at batch {STEP_BATCH} in bf16 and scaled by "
        "their number.\nA process computes D x D of its own rows, N x N of all 4,096; communication left out.",
        "## Arithmetic: received by every process in a step, float32\n\n"
        f"{on_the_wire}\n\n"
        f"{LOCAL} pictures a process, ring algorithms, forward pass only. The backward pass of D x D sends nothing.",
        repetitions=args.repetitions,
    )


if __name__ == "__main__":
    main()
