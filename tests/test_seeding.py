from itertools import product

import golden_inputs
import numpy as np
import torch

from umae import seeding


def test_mixing_is_splitmix64():
    """Against the numpy form in golden_inputs.py: its element i of stream s mixes the integer s * 2**32 + i."""
    expected = golden_inputs.uniform(stream=3, count=100)
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        start = (np.arange(100, dtype=np.uint64) + np.uint64(3 << 32) + np.uint64(1)) * golden
    bits = seeding._mix(torch.from_numpy(start.view(np.int64))).numpy().view(np.uint64)
    assert np.array_equal((bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0, expected)


def test_an_images_numbers_do_not_depend_on_its_batch():
    whole = seeding.uniform(1, seeding.CROP, 2, torch.arange(10), 5)
    assert torch.equal(whole[[7, 3]], seeding.uniform(1, seeding.CROP, 2, torch.tensor([7, 3]), 5))


def test_numbers_are_uniform_and_independent():
    numbers = seeding.uniform(0, seeding.MASK, 0, torch.arange(4000), 50)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.004 and abs(numbers.std() - 12**-0.5) < 0.004
    others = [
        seeding.uniform(1, seeding.MASK, 0, torch.arange(4000), 50),
        seeding.uniform(0, seeding.FLIP, 0, torch.arange(4000), 50),
        seeding.uniform(0, seeding.MASK, 1, torch.arange(4000), 50),
        seeding.uniform(0, seeding.MASK, 0, torch.arange(1, 4001), 50),
        numbers.roll(1, dims=1),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.01  # 4.5 standard deviations


def test_order_is_a_permutation_of_its_own_in_every_epoch():
    orders = [seeding.permutation(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], seeding.permutation(0, 0, 100))


def test_every_forward_pass_seeds_torch_differently():
    drawn = set()
    for position in product(range(3), repeat=3):
        seeding.seed_forward(0, *position)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 27
    seeding.seed_forward(0, 0, 0, 0)
    assert torch.rand(()).item() in drawn
