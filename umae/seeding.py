"""Every random number as a pure function of where it is used: (seed, purpose, epoch, index), or (seed, step,
micro-batch, rank) for torch's own.

Nothing here has a state, so a resumed run, another number of workers or another number of processes draws the same
crops, flips and masks for the same image in the same epoch.
"""

import torch

# Purposes. The numbers of different purposes are independent; a saved run continues only with the same values.
ORDER, CROP, FLIP, MASK, STEP, AUGMENT, ERASE, MIX = range(8)

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64: 2**64 divided by the golden ratio


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function (Steele, Lea & Flood 2014) on int64 tensors, which wrap around as uint64 would."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # the mask makes the shift a logical one
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _key(*parts: int | torch.Tensor) -> torch.Tensor:
    """One int64 key from any number of integers (or int64 tensors, which broadcast)."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix((key + part) + _GOLDEN)
    return key


def uniform(seed: int, purpose: int, epoch: int | torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform random numbers of each image, the same bits on every device.

    Args:
        epoch: the same for all images, or int64 (batch,).
        index: int64 (batch,), the images' positions in the data set.
        count: how many numbers each image needs.

    Returns:
        float32 (batch, count) in [0, 1), multiples of 2**-24.
    """
    key = _key(seed, purpose, epoch, index)  # (batch,)
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=index.device)
    bits = _mix(key[:, None] + counter * _GOLDEN)  # (batch, count)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, count: int, *part: int) -> torch.Tensor:
    """The order of an epoch, or of a part of it: int64 (count,), a permutation of range(count)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(_key(seed, ORDER, epoch, *part))))


def seed_forward(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Set torch's own generators (dropout, drop path) for one forward pass of an optimiser step on one process."""
    torch.manual_seed(int(_key(seed, STEP, step, micro_batch, rank)))
