"""Classifiers, evaluated as they are."""

import pytest
import torch
from golden_models import fresh_config
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from training_runs import digits_with_lists

import umae
from command_line_umae import main
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor
from umae.evaluation.accuracy import multi_label_scores

NAMES = [str(digit) for digit in range(10)]  # those of the digits


def classifier(folder, names=NAMES, **fields):
    """One with random weights, the same rows for the same names."""
    torch.manual_seed(0)
    config = fresh_config(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **fields)
    model = umae.UMAEForImageClassification(config).eval()
    rows = torch.randn(10, config.hidden_size)
    order = [NAMES.index(name) if name in NAMES else label for label, name in enumerate(names)]
    with torch.no_grad():
        model.classifier.weight.copy_(rows[order])
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    evaluation_processor(config.image_height_width).save_pretrained(folder)
    return model


@torch.no_grad()
def by_hand(model):
    images, processor = load_images("digits", split="test"), evaluation_processor(model.config.image_height_width)
    pixels = processor([images.read(index) for index in range(len(images))], return_tensors="pt").pixel_values
    scores, labels = model(pixels).logits, images.labels()
    hits = (scores.topk(5).indices == labels[:, None]).double()
    of_classes = [hits[labels == label, 0].mean() for label in range(10)]
    accuracies = (hits[:, 0].mean(), torch.stack(of_classes).mean(), hits.sum(1).mean())
    return *(100 * accuracy.item() for accuracy in accuracies), cross_entropy(scores, labels)


def test_accuracy_and_loss_are_those_of_the_logits(tmp_path, capsys):
    model = classifier(tmp_path)
    top1, mean_class, top5, loss = by_hand(model)
    results = umae.evaluate(str(tmp_path), "digits", batch_size=50)
    assert results == {
        "top1": pytest.approx(top1, abs=0.01), "mean_class_top1": pytest.approx(mean_class, abs=0.01),
        "top5": pytest.approx(top5, abs=0.01),
        "loss": pytest.approx(loss.item(), rel=1e-5), "images": 359, "unreadable": [],
    }  # fmt: skip
    main(["evaluate", str(tmp_path), "digits"])
    accuracies = f"top-1 {top1:.2f}%, mean per-class top-1 {mean_class:.2f}%, top-5 {top5:.2f}%"
    assert capsys.readouterr().out == f"{accuracies}, loss {loss:.4f}, of 359 images\n"


def test_classes_are_told_by_their_names_and_without_names_by_their_order(tmp_path):
    expected = umae.evaluate(str(classifier(tmp_path / "a") and tmp_path / "a"), "digits")
    classifier(tmp_path / "b", NAMES[::-1])
    reversed_classes = umae.evaluate(str(tmp_path / "b"), "digits")
    assert reversed_classes == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-6)}
    classifier(tmp_path / "c", [f"LABEL_{digit}" for digit in range(10)])
    assert umae.evaluate(str(tmp_path / "c"), "digits") == expected


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    classifier(tmp_path / "other", ["cat", *NAMES[1:]])
    with pytest.raises(ValueError, match="has classes that the model does not have, such as 0; the model's are cat, 1"):
        umae.evaluate(str(tmp_path / "other"), "digits")
    torch.manual_seed(0)
    umae.UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path / "pretrained")
    with pytest.raises(ValueError, match="holds no classifier; train one with umae finetune or umae probe"):
        umae.evaluate(str(tmp_path / "pretrained"), "digits")
    with pytest.raises(ValueError, match="labels up to 9, and the model 5 classes"):
        config = fresh_config(num_labels=5)
        umae.UMAEForImageClassification(config).save_pretrained(tmp_path / "five")
        umae.evaluate(str(tmp_path / "five"), "digits")


def test_a_classifier_of_several_classes_is_evaluated_on_lists_of_them(tmp_path, capsys):
    """Told by their names, and the model knows one class more than the images have."""
    lists = str(digits_with_lists(tmp_path / "lists"))
    names, problem = ["odd", "cat", "large"], "multi_label_classification"
    model = classifier(tmp_path / "model", names, problem_type=problem)
    images, processor = load_images("digits", split="test"), evaluation_processor(model.config.image_height_width)
    pixels = processor([images.read(index) for index in range(len(images))], return_tensors="pt").pixel_values
    digit = images.labels()
    labels = torch.stack([digit % 2 == 1, torch.zeros_like(digit).bool(), digit > 4], dim=1)
    with torch.no_grad():
        logits = model(pixels).logits
    results = umae.evaluate(str(tmp_path / "model"), lists, batch_size=50)
    expected = {name: 100 * value for name, value in multi_label_scores(logits.sigmoid(), labels).items()}
    assert {name: results.pop(name) for name in expected} == pytest.approx(expected, abs=0.01)
    loss = binary_cross_entropy_with_logits(logits, labels.float()).item()
    assert results == {"loss": pytest.approx(loss, rel=1e-5), "images": 359, "unreadable": []}
    main(["evaluate", str(tmp_path / "model"), lists])
    assert capsys.readouterr().out.startswith(f"mAP {expected['mAP']:.2f}%, micro F1 ")
    with pytest.raises(ValueError, match="has one class for each image, and the model has learned a list of classes"):
        umae.evaluate(str(tmp_path / "model"), "digits")
    classifier(tmp_path / "one", names)
    with pytest.raises(ValueError, match="has a list of classes for each image, and the model has learned one class"):
        umae.evaluate(str(tmp_path / "one"), lists)
    classifier(tmp_path / "other", ["odd", "cat"], problem_type=problem)
    with pytest.raises(ValueError, match="has classes that the model does not have, such as large"):
        umae.evaluate(str(tmp_path / "other"), lists)
