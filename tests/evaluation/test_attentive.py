"""The attentive probe, against the head written out plainly."""

import pytest
import torch

from umae.evaluation import attentive
from umae.evaluation.attentive import AttentiveHead, attend, train_attentive_head
from umae.evaluation.features import scratch_tensor
from umae.evaluation.linear import train_linear_heads

COUNT, TOKENS, WIDTH, CLASSES, HEADS = 24, 9, 16, 3, 4


def test_the_head_is_that_of_the_paper_with_its_gradients():
    """Keys and values of every standardised token, by torch's own attention, in float64; for two heads at once."""
    generator = torch.Generator().manual_seed(0)
    tokens = 3 + 2 * torch.randn(COUNT, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    shapes = ((WIDTH,), (WIDTH, WIDTH), (WIDTH, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    both = {
        name: torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in zip(attentive.PARAMETER_NAMES, shapes, strict=True)
    }
    mean = tokens.mean(dim=(0, 1))
    scale = (tokens.var(dim=(0, 1), correction=0) + 1e-6).rsqrt()
    logits = attend(both, tokens, mean, scale, HEADS)
    found_gradients = torch.autograd.grad(logits.square().sum(), both.values())

    norm = torch.nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6).double()
    plain, split = norm(tokens.transpose(1, 2)).transpose(1, 2), (HEADS, WIDTH // HEADS)
    for position in range(2):
        query, key, value, weight, bias = (tensor[position] for tensor in both.values())
        queries = query.view(1, 1, *split).expand(COUNT, -1, -1, -1)
        pooled = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            (plain @ key.T).unflatten(2, split).transpose(1, 2),
            (plain @ value.T).unflatten(2, split).transpose(1, 2),
        )
        expected = pooled.transpose(1, 2).flatten(1) @ weight.T + bias
        assert (logits[:, position] - expected).abs().max() < 1e-9 * expected.abs().max()
        gradients = torch.autograd.grad(expected.square().sum(), both.values(), retain_graph=True)
        for found, expected in zip(found_gradients, gradients, strict=True):
            assert (found[position] - expected[position]).abs().max() < 1e-9 * expected[position].abs().max()


def marked(count, generator):
    """One token of each image is marked and encodes its class; the others encode random classes, so that their mean
    says little."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    token_classes = torch.randint(CLASSES, (count, TOKENS), generator=generator)
    position = torch.randint(TOKENS, (count,), generator=generator)
    token_classes[torch.arange(count), position] = labels
    tokens = 0.1 * torch.randn(count, TOKENS, WIDTH, generator=generator)
    tokens[:, :, :CLASSES] += 3 * torch.nn.functional.one_hot(token_classes, CLASSES)
    tokens[torch.arange(count), position, -1] += 3
    return tokens.half(), labels


def top1(head, features, labels):
    return (head(features).argmax(dim=1) == labels).float().mean().item()


@pytest.mark.slow
def test_it_finds_the_token_with_the_class_which_the_mean_hides(capsys):
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    (tokens, labels), test = marked(800, generator), marked(300, generator)
    head = train_attentive_head(tokens, labels, CLASSES, HEADS, 0, device)
    linear = train_linear_heads({"mean": tokens.float().mean(dim=1)[None]}, labels, CLASSES, 0)["mean"]
    assert top1(linear, test[0].float().mean(dim=1), test[1]) < 0.8
    assert top1(head, *test) > 0.97
    assert head.chosen["learning_rate"] in attentive.LEARNING_RATES and head.chosen["validation_top1"] > 0.97
    printed = capsys.readouterr().err
    for text in ("moments of the tokens", "0/800", "evaluating an attentive head", "0/300"):
        assert text in printed, "each of them reads tokens from the disk"
    again = train_attentive_head(tokens, labels, CLASSES, HEADS, 0, device)
    assert all(torch.equal(head.parameters[name], again.parameters[name]) for name in attentive.PARAMETER_NAMES)


def test_heads_side_by_side_are_those_trained_one_by_one(monkeypatch):
    """In float64."""
    monkeypatch.setattr(attentive, "EPOCHS", 4)
    tokens, labels = marked(100, torch.Generator().manual_seed(1))
    mean, scale = (moment.double() for moment in attentive._moments(tokens, torch.device("cpu")))

    def train(rates):
        generator = torch.Generator().manual_seed(0)
        rest = (CLASSES, mean, scale, HEADS, torch.arange(5, 95), rates, "")
        return attentive._train(tokens, labels, *rest, generator)

    for rate, head in zip(attentive.LEARNING_RATES, train(attentive.LEARNING_RATES), strict=True):
        (alone,) = train([rate])
        for name in attentive.PARAMETER_NAMES:
            assert (alone[name] - head[name]).norm() < 1e-6 * alone[name].norm(), (rate, name)


def test_the_learning_rate_is_chosen_on_images_that_the_heads_did_not_see(monkeypatch):
    monkeypatch.setattr(attentive, "EPOCHS", 10)
    tokens, labels = marked(200, torch.Generator().manual_seed(1))
    labels[::3] = torch.randint(CLASSES, (67,), generator=torch.Generator().manual_seed(2))  # something to get wrong
    calls, train = [], attentive._train

    def spy(*args, rows, learning_rates, **options):
        heads = train(*args, rows=rows, learning_rates=learning_rates, **options)
        calls.append((rows, learning_rates, heads, args[3:6]))
        return heads

    monkeypatch.setattr(attentive, "_train", spy)
    chosen = train_attentive_head(tokens, labels, CLASSES, HEADS, 0, torch.device("cpu")).chosen
    (rows, rates, heads, settings), (every, again, _, _) = calls
    assert (len(set(rows.tolist())), len(set(every.tolist()))) == (180, 200)
    held_out = torch.tensor(sorted(set(range(200)) - set(rows.tolist())))
    accuracies = [top1(AttentiveHead(head, *settings, {}), tokens[held_out], labels[held_out]) for head in heads]
    assert len(set(accuracies)) > 1 and chosen["validation_top1"] == max(accuracies)
    assert accuracies[rates.index(chosen["learning_rate"])] == max(accuracies) and again == [chosen["learning_rate"]]


def test_tokens_are_kept_in_a_file_that_is_always_removed(tmp_path):
    tokens = scratch_tensor(tmp_path / "out", (4, 3, 2))
    tokens[1:3] = torch.arange(12.0).view(2, 3, 2)
    assert tokens.dtype == torch.float16 and tokens.sum() == 66
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match=r"tokens of 1,000,000,000 images take .* GB, and .*out has no room"):
        scratch_tensor(tmp_path / "out", (10**9, 196, 768))
    assert list((tmp_path / "out").iterdir()) == []


def test_tokens_that_float16_cannot_hold_are_refused():
    tokens, labels = marked(40, torch.Generator().manual_seed(0))
    tokens[3, 2, 1] = torch.inf
    with pytest.raises(ValueError, match="tokens exceed float16's range"):
        train_attentive_head(tokens, labels, CLASSES, HEADS, 0, torch.device("cpu"))
