import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from umae.evaluation.collapse import (
    MEASURES,
    FeatureStatistics,
    alignment,
    dead_dimensions,
    effective_rank,
    mean_cosine,
    mean_norm,
    participation_ratio,
    rankme,
    singular_values,
    uniformity,
)

OF_ONE_MATRIX = [
    dead_dimensions, effective_rank, mean_cosine, mean_norm, participation_ratio, rankme, singular_values, uniformity,
]  # fmt: skip


def random_features(images: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(features: torch.Tensor) -> np.ndarray:
    """(N, N), one pair at a time."""
    rows = features.numpy()
    return np.array([[a @ b / math.sqrt(a @ a) / math.sqrt(b @ b) for b in rows] for a in rows])


shapes = pytest.mark.parametrize("shape", [(20, 5), (5, 20), (1, 7), (7, 1)])


@shapes
@pytest.mark.parametrize("center", [False, True])
def test_singular_values_are_the_roots_of_the_smaller_grams_eigenvalues(shape, center):
    features = random_features(*shape)
    matrix = features.numpy() - (features.numpy().mean(axis=0) if center else 0)
    gram = matrix @ matrix.T if shape[0] < shape[1] else matrix.T @ matrix
    expected = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))[::-1]
    values = singular_values(features, center)
    assert len(values) == min(shape) and values == sorted(values, reverse=True)
    np.testing.assert_allclose(values, expected, atol=1e-7)


def test_singular_values_of_a_diagonal_are_its_lengths():
    assert singular_values(torch.diag(torch.tensor([3.0, -5.0, 0.0]))) == [5.0, 3.0, 0.0]
    assert singular_values(torch.full((4, 3), 2.0), center=True) == [0.0, 0.0, 0.0]


@shapes
def test_effective_rank_is_scipys_entropy_of_numpys_spectrum(shape):
    features = random_features(*shape)
    spectrum = np.linalg.svd(features.numpy(), compute_uv=False)
    assert effective_rank(features) == pytest.approx(math.exp(entropy(spectrum)), rel=1e-10)


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(6)) == pytest.approx(6, abs=1e-12)
    # Shares 1/2, 1/4, 1/4, 0: the entropy is 1.5 ln 2.
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))) == pytest.approx(2**1.5, abs=1e-12)
    assert effective_rank(torch.outer(torch.arange(1.0, 300), torch.arange(1.0, 90))) == pytest.approx(1, abs=1e-6)


@shapes
def test_rankme_is_the_papers_formula(shape):
    features = random_features(*shape)
    values = np.linalg.svd(features.numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-10)
    assert rankme(features) == pytest.approx(effective_rank(features), rel=1e-4)


def test_dead_dimensions_are_those_that_do_not_differ():
    features = random_features(20, 6)
    assert dead_dimensions(features) == 0
    features[:, 1], features[:, 4] = 3.0, 1e-9 * features[:, 0]
    assert dead_dimensions(features) == 2
    assert dead_dimensions(1e-20 * features) == 2, "whatever the scale"
    assert dead_dimensions(torch.ones(5, 4)) == 4


@shapes
def test_uniformity_is_the_mean_squared_cosine_of_all_pairs(shape):
    features = random_features(*shape)
    assert uniformity(features) == pytest.approx((cosines(features) ** 2).mean(), rel=1e-12)


@shapes
def test_mean_cosine_is_that_of_all_pairs(shape):
    features = random_features(*shape)
    assert mean_cosine(features) == pytest.approx(cosines(features).mean(), rel=1e-10, abs=1e-15)


@shapes
def test_participation_ratio_counts_the_eigenvalues_of_the_directions(shape):
    directions = random_features(*shape).numpy()
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(directions.T @ directions / len(directions))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert participation_ratio(random_features(*shape)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 2**31), spread=st.floats(0, 30))
def test_participation_ratio_is_one_over_uniformity(shape, seed, spread):
    features = random_features(*shape, seed) * torch.logspace(0, -spread, shape[1], dtype=torch.float64)
    assert participation_ratio(features) * uniformity(features) == pytest.approx(1, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 2**31))
def test_values_keep_to_their_bounds_and_know_no_rotation(shape, seed):
    features = random_features(*shape, seed)
    rotation = torch.linalg.qr(random_features(shape[1], shape[1], seed + 1)).Q
    for measure, low, high in (
        (effective_rank, 1, min(shape)),
        (participation_ratio, 1, min(shape)),
        (uniformity, 1 / min(shape), 1),
        (mean_cosine, 0, 1),
    ):
        value = measure(features)
        assert low - 1e-9 <= value <= high + 1e-9
        assert measure(features @ rotation) == pytest.approx(value, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 5),
    shift=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_batch_by_batch_the_measures_are_those_of_all_rows(sizes, width, seed, spread, shift):
    features = random_features(sum(sizes), width, seed) * torch.logspace(0, -spread, width, dtype=torch.float64) + shift
    statistics = FeatureStatistics()
    for batch in features.split(sizes):
        statistics.add(batch)
    values = singular_values(features)
    np.testing.assert_allclose(statistics.singular_values(), values, rtol=1e-9, atol=1e-12 * values[0])
    for name, value in statistics.measures().items():
        assert value == pytest.approx(MEASURES[name](features), rel=1e-8), name


def test_no_rows_have_no_measures():
    with pytest.raises(ValueError, match="expected"):
        FeatureStatistics().measures()


def test_orthogonal_directions_are_spread_evenly():
    features = torch.eye(8)
    assert uniformity(features) == pytest.approx(1 / 8)
    assert mean_cosine(features) == pytest.approx(1 / 8)
    assert participation_ratio(features) == pytest.approx(8)
    assert participation_ratio(torch.eye(3, 8)) == pytest.approx(3)  # fewer rows than columns


def test_one_line_is_a_collapse_and_one_direction_as_well_by_its_cosine():
    line = torch.outer(torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([1.0, 2.0, 2.0]))
    for measure in (uniformity, participation_ratio, effective_rank):
        assert measure(line) == pytest.approx(1, abs=1e-12)
    assert mean_cosine(line) == pytest.approx(0, abs=1e-12)
    assert mean_cosine(line.abs()) == pytest.approx(1)
    assert mean_norm(line) == pytest.approx(7.5)  # 2.5 times 3


def test_zeros_have_rank_zero_and_no_direction():
    zeros = torch.zeros(4, 3)
    assert singular_values(zeros) == [0.0, 0.0, 0.0]
    for measure in (effective_rank, mean_cosine, mean_norm, participation_ratio, uniformity):
        assert measure(zeros) == 0.0
    assert alignment(zeros, zeros) == 0.0
    assert alignment(zeros, torch.ones(4, 3)) == pytest.approx(1)
    half = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert uniformity(half) == pytest.approx(1 / 4) and participation_ratio(half) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_directions_do_not_depend_on_the_scale(scale):
    features, other = random_features(6, 4), random_features(6, 4, seed=1)
    for measure in (uniformity, participation_ratio, mean_cosine, effective_rank):
        assert measure(features * scale) == pytest.approx(measure(features), rel=1e-9)
    assert alignment(features * scale, other) == pytest.approx(alignment(features, other), rel=1e-9)


def test_alignment_is_the_mean_squared_distance_on_the_sphere():
    first = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [1.0, 0.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 5.0], [1.0, 1.0]])
    # Distances squared are 2 - 2 cos: cosines 1, -1, 0, sqrt(1/2).
    assert alignment(first, second) == pytest.approx((0 + 4 + 2 + 2 - math.sqrt(2)) / 4, rel=1e-12)


def test_alignment_refuses_rows_without_a_pair():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(1, 3\); expected paired rows"):
        alignment(torch.ones(4, 3), torch.ones(1, 3))


def test_half_precision_is_measured_as_exactly_as_double():
    features = random_features(50, 8).to(torch.bfloat16).requires_grad_()
    for measure in OF_ONE_MATRIX:
        assert measure(features) == measure(features.detach().double())


@pytest.mark.parametrize("measure", OF_ONE_MATRIX)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(measure, value):
    features = torch.ones(4, 3)
    features[1, 2] = value
    with pytest.raises(ValueError, match="1 of 12 features are NaN or infinite"):
        measure(features)


@pytest.mark.parametrize("measure", OF_ONE_MATRIX)
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 3), (3, 0)])
def test_anything_but_a_matrix_is_refused(measure, shape):
    with pytest.raises(ValueError, match=r"features of shape .* expected"):
        measure(torch.ones(shape))
