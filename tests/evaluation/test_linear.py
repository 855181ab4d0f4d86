import math

import pytest
import torch

from umae.evaluation import linear
from umae.evaluation.linear import knn_classify, low_shot, rank_classes, train_heads, train_linear_heads


def clusters(count=600, width=12, classes=4, seed=0, noise=1.5):
    """Features around one centre for each class, on very different scales and far from zero; labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + noise * torch.randn(count, width, generator=generator)
    return features * torch.logspace(-2, 2, width) + torch.linspace(-5, 50, width), labels


@pytest.fixture
def few_epochs(monkeypatch):
    """For laws that hold after any number of them."""
    monkeypatch.setattr(linear, "EPOCHS", 10)


def top1(head, features, labels):
    return ((features @ head.weight.T + head.bias).argmax(dim=1) == labels).float().mean().item()


def one_head(features, labels, classes, seed):
    return train_linear_heads({"it": features[None]}, labels, classes, seed)["it"]


def test_a_linear_head_reaches_logistic_regression_on_the_digits():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    features, labels = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    test = torch.arange(len(labels)) % 5 == 4
    head = one_head(features[~test], labels[~test], 10, seed=0)
    scale = features[~test].std(dim=0) + 1e-6
    reference = LogisticRegression(max_iter=2000).fit(features[~test] / scale, labels[~test])
    assert top1(head, features[test], labels[test]) >= reference.score(features[test] / scale, labels[test]) - 0.005


@pytest.mark.usefixtures("few_epochs")
def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    features, labels = clusters(100)
    first, again, other = (one_head(features, labels, 4, seed) for seed in (3, 3, 4))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert first.chosen == again.chosen
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.usefixtures("few_epochs")
def test_heads_do_not_depend_on_scale_and_offset_of_the_features():
    """Each feature is standardised; the head undoes it for raw features."""
    features, labels = clusters(200)
    scale, offset = torch.logspace(2, -2, 12), torch.linspace(3, -3, 12)
    head = one_head(features, labels, 4, seed=0)
    other = one_head(features * scale + offset, labels, 4, seed=0)
    logits = features @ head.weight.T + head.bias
    assert (
        logits - ((features * scale + offset) @ other.weight.T + other.bias)
    ).abs().max() < 2e-3 * logits.abs().max()


@pytest.mark.usefixtures("few_epochs")
def test_folding_the_standardisation_into_the_head_is_exact():
    """A head trained on standardised features by torch's own autograd and SGD is the folded one; of two views of the
    images, every other epoch is of the second."""
    features, labels = clusters(64)
    views = torch.stack([features, features * 1.1 + torch.linspace(-1, 1, 12)])
    (weight,), (bias,) = train_heads(views, labels, 4, [(0.1, 1e-3)], torch.Generator().manual_seed(0))

    generator = torch.Generator().manual_seed(0)
    every = views.flatten(0, 1)
    standardised = (views - every.mean(0)) / (every.var(0, correction=0) + 1e-6).sqrt()
    layer = torch.nn.Linear(12, 4)
    layer.weight.data = 0.01 * torch.randn(12, 4, generator=generator).T.contiguous()
    layer.bias.data.zero_()
    groups = [{"params": [layer.weight], "weight_decay": 1e-3}, {"params": [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    step, steps = 0, linear.EPOCHS * 16
    for epoch in range(linear.EPOCHS):
        for batch in torch.randperm(64, generator=generator).split(4):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(standardised[epoch % 2, batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    expected = layer(standardised[0])
    assert (features @ weight.T + bias - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.usefixtures("few_epochs")
def test_heads_side_by_side_are_those_trained_one_by_one():
    """In float64."""
    features, labels = clusters(100)
    views, grid = features.double()[None], [(0.01, 0.0), (0.03, 1e-3), (0.1, 1e-2)]
    weights, biases = train_heads(views, labels, 4, grid, torch.Generator().manual_seed(0))
    for head, setting in enumerate(grid):
        (weight,), (bias,) = train_heads(views, labels, 4, [setting], torch.Generator().manual_seed(0))
        assert (weights[head] - weight).norm() < 1e-6 * weight.norm()
        assert (biases[head] - bias).norm() < 1e-6 * bias.norm()


@pytest.mark.usefixtures("few_epochs")
def test_a_head_does_not_depend_on_what_other_features_are_evaluated():
    features, labels = clusters(100)
    both = train_linear_heads({"a": features[None], "b": features.square()[None]}, labels, 4, seed=0)
    alone = train_linear_heads({"b": features.square()[None]}, labels, 4, seed=0)
    assert torch.equal(both["b"].weight, alone["b"].weight) and not torch.equal(both["a"].weight, both["b"].weight)


def test_the_best_learning_rate_wins_and_of_equal_ones_the_one_with_the_lowest_loss():
    labels = torch.tensor([0, 1])
    right, surer, wrong = (torch.tensor(m).float() for m in ([[1, 0], [0, 1]], [[2, 0], [0, 2]], [[9, 0], [9, 0]]))
    assert linear.best_head(torch.stack([wrong, right, surer]), labels) == (2, 1.0)
    assert linear.best_head(torch.stack([right, wrong]), labels) == (0, 1.0)


def test_the_learning_rate_is_chosen_on_images_that_the_heads_did_not_see(monkeypatch):
    """With labels that mean nothing and as many features as images, only seen images are classified rightly."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 300, generator=generator), torch.randint(10, (200,), generator=generator)
    trained_on = []
    train = linear.train_heads

    def spy(views, *args, **kwargs):
        trained_on.append(views.shape[1])
        return train(views, *args, **kwargs)

    monkeypatch.setattr(linear, "train_heads", spy)
    head = one_head(features, labels, 10, seed=0)
    assert trained_on == [180, 200]
    assert head.chosen["validation_top1"] < 0.4 and top1(head, features, labels) == 1


def test_a_small_training_set_keeps_as_much_of_every_class():
    labels = torch.tensor([0] * 200 + [1] * 50 + [2] * 10)
    assert labels[low_shot(labels, "10%", 0)].bincount().tolist() == [20, 5, 1]
    assert labels[low_shot(labels, "1%", 0)].bincount().tolist() == [2, 1, 1]
    assert labels[low_shot(labels, "15", 0)].bincount().tolist() == [15, 15, 10]
    assert torch.equal(low_shot(labels, "5", 1), low_shot(labels, "5", 1))
    assert not torch.equal(low_shot(labels, "5", 1), low_shot(labels, "5", 2))
    for share in ("0", "0%", "100%", "-1", "1.5", "some", "nan%"):
        with pytest.raises(ValueError, match="expected a percentage such as"):
            low_shot(labels, share, 0)


@pytest.mark.usefixtures("few_epochs")
def test_constant_features_and_collapsed_ones_give_a_finite_head():
    features, labels = clusters(50)
    features[:, 0] = 3.0
    assert one_head(features, labels, 4, seed=0).weight.isfinite().all()
    head = one_head(torch.ones(50, 8), labels, 4, seed=0)
    assert head.weight.isfinite().all() and head.bias.isfinite().all()


@pytest.mark.parametrize(
    "features, labels, classes, message",
    [
        (torch.ones(3, 2), torch.tensor([0, 1]), 2, r"labels \(2,\); expected"),
        (torch.ones(2, 2), torch.tensor([0, 2]), 2, "labels from 0 to 2 for 2 classes"),
        (torch.ones(2, 2), torch.tensor([-1, 1]), 2, "labels from -1 to 1"),
        (torch.ones(2, 2), torch.tensor([0, 0]), 1, "at least 2 classes"),
        (torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]), 2, "NaN or infinity"),
    ],
)
def test_nonsense_is_refused(features, labels, classes, message):
    with pytest.raises(ValueError, match=message):
        one_head(features, labels, classes, seed=0)
    with pytest.raises(ValueError, match=message):
        knn_classify(features, labels, torch.ones(1, features.shape[1]), classes)


def test_knn_is_the_brute_force_vote():
    features, labels = clusters(80)
    queries, _ = clusters(15, seed=1)
    scores = knn_classify(features, labels, queries, 4, k=7, temperature=0.1)
    for query, row in zip(queries, scores, strict=True):
        cosines = torch.nn.functional.cosine_similarity(features, query[None])
        expected = [0.0] * 4
        for neighbour in sorted(range(80), key=lambda i: -cosines[i])[:7]:
            expected[labels[neighbour]] += math.exp(cosines[neighbour] / 0.1)
        assert row.tolist() == pytest.approx(expected, rel=1e-4)


def test_knn_in_blocks_is_knn_at_once(monkeypatch):
    features, labels = clusters(80)
    queries, _ = clusters(15, seed=1)
    same = torch.rand(15, 80, generator=torch.Generator().manual_seed(0)) < 0.1
    at_once = knn_classify(features, labels, queries, 4, same=same)
    monkeypatch.setattr(linear, "BLOCK", 160)
    assert (knn_classify(features, labels, queries, 4, same=same) - at_once).abs().max() < 1e-3 * at_once.max()


@pytest.mark.usefixtures("few_epochs")
def test_what_takes_minutes_on_many_images_shows_how_far_it_is(capsys):
    features, labels = clusters(64)
    one_head(features, labels, 4, seed=0)
    knn_classify(features, labels, features, 4, show_progress=True)
    printed = capsys.readouterr().err
    steps = linear.EPOCHS * 16  # batches of a sixteenth
    for text in ("choosing a linear head, it", "training a linear head, it", f"/{steps}", "k-NN", "0/64"):
        assert text in printed


def test_knn_of_fewer_images_than_neighbours_uses_all_of_them():
    features, labels = torch.eye(3), torch.tensor([0, 1, 1])
    scores = knn_classify(features, labels, torch.tensor([[2.0, 0, 0]]), 2, k=20, temperature=1.0)
    assert scores[0].tolist() == pytest.approx([math.e, 2.0])


def test_classes_are_ranked_best_first_and_of_equal_ones_the_first():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.5]])
    assert rank_classes(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert rank_classes(scores, 5).tolist() == [[1, 2, 0], [0, 1, 2]]


def test_an_image_that_is_the_same_has_no_vote():
    features, labels = clusters(60)
    all_votes = knn_classify(features, labels, features, 4, k=7, same=torch.eye(60, dtype=torch.bool))
    for i in range(60):
        rest = torch.arange(60) != i
        votes = knn_classify(features[rest], labels[rest], features[i : i + 1], 4, k=7)
        torch.testing.assert_close(all_votes[i : i + 1], votes)
