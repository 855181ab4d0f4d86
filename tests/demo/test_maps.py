"""The map of a folder."""

import numpy as np
import torch

from umae.demo.maps import clusters, map_figure, project


def three_groups():
    numbers = np.random.default_rng(0)
    centres = np.eye(8)[:3].repeat(10, 0)
    return torch.from_numpy(centres + 0.05 * numbers.normal(size=centres.shape)).float()


def test_groups_of_directions_lie_apart_on_the_map_whatever_their_length():
    features = three_groups() * torch.linspace(1, 9, 30)[:, None]
    points, names = project(features)
    groups = points.reshape(3, 10, 2)
    spread = groups.std(axis=1).max()
    distances = [np.linalg.norm(groups[i].mean(0) - groups[j].mean(0)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) > 10 * spread
    assert names[0].startswith("1st component, 5") and names[1].endswith("of the variance")


def test_features_on_one_point_have_a_map():
    points, names = project(torch.ones(5, 4))
    assert np.abs(points).max() < 1e-6 and names[0] == "1st component, 0% of the variance"
    assert set(clusters(torch.ones(5, 4))) == {"cluster 1"}
    assert project(torch.ones(1, 4))[0].shape == (1, 2)


def test_clusters_are_the_groups_and_the_same_ones_every_time():
    found = clusters(three_groups(), 3)
    assert [len(set(found[start : start + 10])) for start in (0, 10, 20)] == [1, 1, 1] and len(set(found)) == 3
    assert clusters(three_groups(), 3) == found


def test_rare_groups_are_grey_when_there_are_more_than_can_be_told_apart():
    points = np.random.default_rng(0).normal(size=(200, 2))
    few = map_figure(points, ("x", "y"), [str(i % 3) for i in range(200)])
    many = map_figure(points, ("x", "y"), [str(i % 40) for i in range(200)])
    grey_pixels = [(np.asarray(image) == 0xBB).all(axis=2).sum() for image in (few, many)]
    assert grey_pixels[0] < 50 < 500 < grey_pixels[1], "letters have some"
