"""The classifier that is trained during the training of the model."""

import torch
from accelerate import Accelerator
from test_linear import clusters

from umae.evaluation.online import OnlineClassifier


def trained(classifier: OnlineClassifier, features, labels, steps: range) -> OnlineClassifier:
    for step in steps:
        batch = torch.arange(32 * step, 32 * (step + 1)) % len(features)
        classifier.update(features[batch], labels[batch])
    return classifier


def test_the_online_classifier_learns_from_collapsed_features():
    features, labels = clusters(640, noise=0.5)
    features = 1 + 1e-2 * (features - features.mean(dim=0)) / features.std(dim=0)  # nearly one direction
    classifier = trained(OnlineClassifier(4, 12, Accelerator(cpu=True)), features, labels, range(400))
    assert (classifier.scores(features).argmax(dim=1) == labels).float().mean() > 0.9


def test_a_restored_online_classifier_continues_with_the_same_bits():
    features, labels = clusters(640)
    accelerator = Accelerator(cpu=True)
    whole = trained(OnlineClassifier(4, 12, accelerator), features, labels, range(20))
    half = trained(OnlineClassifier(4, 12, accelerator), features, labels, range(10))
    again = OnlineClassifier(4, 12, accelerator)
    again.restore({name: tensor.clone() for name, tensor in half.tensors().items()})
    trained(again, features, labels, range(10, 20))
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in whole.tensors().items())
