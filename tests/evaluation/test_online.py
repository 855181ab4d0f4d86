"""The classifier that is trained during the training of the model."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_linear import clusters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from umae.evaluation import attentive
from umae.evaluation.online import MemoryBank, OnlineClassifier

STAND_IN = torch.device("meta")  # for a device without float64


class NoFloat64(TorchDispatchMode):
    """Refuses what a device without float64 refuses, on STAND_IN."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == STAND_IN and tensor.dtype == torch.float64:
                raise TypeError(f"{operation} makes a float64 tensor")
        return result


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


def test_a_run_with_labels_continues_on_a_device_without_float64():
    features, labels = clusters(64)
    accelerator = Accelerator(cpu=True)
    classifier, bank = OnlineClassifier(4, 12, accelerator), MemoryBank(64, accelerator)
    classifier.update(features, labels)
    bank.update(features, torch.arange(64))
    stand_in = SimpleNamespace(device=STAND_IN, process_index=0, num_processes=1)
    with NoFloat64():
        OnlineClassifier(4, 12, stand_in).restore(classifier.tensors())
        MemoryBank(64, stand_in).restore(bank.gathered())


def test_tokens_are_standardised_for_a_device_without_float64(monkeypatch):
    tokens = torch.randn(8, 3, 5).half()
    expected = attentive._moments(tokens, torch.device("cpu"))
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        attentive._moments(tokens, STAND_IN)
    monkeypatch.setattr(attentive, "has_float64", lambda device: False)
    with NoFloat64():
        moved = attentive._moments(tokens, STAND_IN)
    assert [tensor.shape for tensor in moved] == [tensor.shape for tensor in expected]
    assert all(
        torch.equal(a, b) for a, b in zip(attentive._moments(tokens, torch.device("cpu")), expected, strict=True)
    )
