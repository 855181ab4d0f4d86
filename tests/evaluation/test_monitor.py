"""Evaluation during training, which must not change it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from golden_models import fresh_config
from torch.utils.flop_counter import FlopCounterMode

from modeling_umae import UMAEForPreTraining, UMAEModel, coding_rate_loss, uniformity_loss
from umae import seeding
from umae.convert import set_pooling
from umae.data.batches import Plan
from umae.data.crops import Flips, random_flips
from umae.data.images import Images, load_images
from umae.data.inputs import evaluation_processor, normalize
from umae.evaluation.collapse import effective_rank
from umae.evaluation.diagnosis import VIEWS
from umae.evaluation.features import frozen_features
from umae.evaluation.monitor import SHARE, Monitor, ProbeImages, classes_of, estimated_steps, prepare_probe_images
from umae.evaluation.online import MemoryBank
from umae.programs import evaluations
from umae.speed import encoder_flops, training_flops


def make_monitor(accelerator: Accelerator, batch_size: int = 50, **fields) -> tuple[Monitor, UMAEForPreTraining]:
    torch.manual_seed(0)
    model = UMAEForPreTraining._from_config(fresh_config(**fields), attn_implementation="eager").train()
    images, processor = load_images("digits", split="test"), evaluation_processor((16, 16))
    probe_images = prepare_probe_images(accelerator, images, processor, (16, 16), batch_size, with_labels=True, seed=0)
    labels = load_images("digits").labels()
    return Monitor(accelerator, model.config, probe_images, labels, 10, processor, seed=0), model


def micro_batch(count: int = 16) -> dict:
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 16, 16), generator=numbers).byte()
    index = torch.arange(count)
    return {"pixel_values": pixels, "flip": random_flips(0, 0, index, Flips()), "index": index, "epoch": 0}


def test_the_ranks_of_an_untrained_encoder_are_those_of_fresh_weights_and_change_no_random_number():
    monitor, model = make_monitor(Accelerator(cpu=True))
    with torch.no_grad():
        model.vit.layernorm.weight.zero_()  # the trained weights do not count
    state = torch.random.get_rng_state()
    ranks = monitor.untrained_ranks()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(0)
    fresh = set_pooling(UMAEModel(fresh_config()), "mean").eval()
    images, processor = load_images("digits", split="test"), evaluation_processor((16, 16))
    pixel_values = torch.cat([processor(images.read(i), return_tensors="pt")["pixel_values"] for i in range(359)])
    with torch.no_grad():
        features = frozen_features(fresh, pixel_values)
    for column, name in enumerate(("cls", "mean")):
        assert ranks[name] == pytest.approx(effective_rank(features[:, column]), rel=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_evaluation_measures_the_features_of_the_unmasked_images(pooling):
    monitor, model = make_monitor(Accelerator(cpu=True), pooling=pooling)
    values, images_by_name = monitor.evaluate(model, micro_batch(), step=1)
    images, processor = load_images("digits", split="test"), evaluation_processor((16, 16))
    pixel_values = torch.cat([processor(images.read(i), return_tensors="pt")["pixel_values"] for i in range(359)])
    with torch.no_grad():
        features = frozen_features(set_pooling(model.vit.eval(), "mean"), pixel_values)
    for column, name in enumerate(("cls", "mean")):
        assert values[f"effective_rank_{name}"] == pytest.approx(effective_rank(features[:, column]), rel=1e-4)
        assert values[f"participation_ratio_{name}"] == pytest.approx(1 / values[f"uniformity_{name}"])
        assert 0 < values[f"alignment_{name}"] < 4
    assert not {"online_top1", "online_knn_top1"} & values.keys(), "nothing has been observed"
    monitor.observe(torch.randn(300, model.config.hidden_size), torch.arange(300))
    values, _ = monitor.evaluate(model, micro_batch(), step=2)
    assert 0 <= values["online_top1"] <= 1 and 0 <= values["online_knn_top1"] <= 1
    assert [row.shape for row in images_by_name.values()] == [(8, 16, 16, 3)] * 4


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_reconstruction_loss_is_that_of_held_out_images_alone(norm_pix_loss):
    """Each counts once, under a mask of its own; of images that are trained on there is none."""
    monitor, model = make_monitor(Accelerator(cpu=True), norm_pix_loss=norm_pix_loss)  # 359 images in batches of 50
    value = monitor.evaluate(model, micro_batch(), step=1)[0]["heldout_reconstruction_loss"]
    images, processor = load_images("digits", split="test"), evaluation_processor((16, 16))
    pixel_values = torch.cat([processor(images.read(i), return_tensors="pt")["pixel_values"] for i in range(359)])
    with torch.no_grad():
        output = model.eval()(pixel_values, noise=seeding.uniform(0, seeding.MASK, 1, torch.arange(359), 16))
    assert value == pytest.approx(output.reconstruction_loss.item(), rel=1e-5)
    monitor.probe_images = dataclasses.replace(monitor.probe_images, trained_on=torch.arange(359))
    assert "heldout_reconstruction_loss" not in monitor.evaluate(model.train(), micro_batch(), step=2)[0]


def test_an_evaluation_changes_neither_model_nor_gradients_nor_random_numbers_of_training():
    monitor, model = make_monitor(Accelerator(cpu=True), hidden_dropout_prob=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monitor.evaluate(model, micro_batch(), step=1)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    seeding.seed_forward(0, 1, 0, 0)
    expected = torch.rand(3)
    monitor.evaluate(model, micro_batch(), step=1)
    seeding.seed_forward(0, 1, 0, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("regularizer", "term"), [("uniformity", uniformity_loss), ("coding_rate", coding_rate_loss)])
def test_gradient_norms_are_those_of_the_two_terms(regularizer, term):
    monitor, model = make_monitor(Accelerator(cpu=True), uniformity_weight=0.5, regularizer=regularizer)
    batch = micro_batch()
    norms = monitor.gradient_norms(model, batch, step=1)
    noise = seeding.uniform(0, seeding.MASK, 0, batch["index"], 16)
    flipped = seeding.uniform(0, seeding.FLIP, 0, batch["index"], 1)[:, 0] < 0.5
    pixels = torch.where(flipped[:, None, None, None], batch["pixel_values"].flip(-1), batch["pixel_values"])
    output = model(normalize(pixels, monitor.mean, monitor.std), noise=noise)
    encoder = list(model.vit.parameters())
    (0.5 * term(output.features)).backward(retain_graph=True)
    expected = torch.cat([parameter.grad.flatten() for parameter in encoder if parameter.grad is not None]).norm()
    assert norms[f"grad_norm_{regularizer}"] == pytest.approx(expected.item(), rel=1e-5) and len(norms) == 2
    model.zero_grad()
    output.reconstruction_loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in encoder]).norm()
    assert norms["grad_norm_reconstruction"] == pytest.approx(expected.item(), rel=1e-5)


def test_no_gradient_of_the_online_classifier_reaches_the_model():
    monitor, model = make_monitor(Accelerator(cpu=True))
    output = model(torch.randn(16, 3, 16, 16))
    before = monitor.classifier.weight.detach().clone()
    monitor.observe(output.features, torch.arange(16))
    assert not torch.equal(monitor.classifier.weight, before), "it learns"
    assert all(parameter.grad is None for parameter in model.parameters()) and output.features.grad_fn is not None
    assert not {id(monitor.classifier.weight)} & {id(parameter) for parameter in model.parameters()}


def one_hot(labels: torch.Tensor, width: int = 1000) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, width).float()


def monitor_of(labels: torch.Tensor, probe_labels: torch.Tensor, trained_on: torch.Tensor | None = None) -> Monitor:
    """A monitor of features of width 1,000."""
    count = len(probe_labels)
    index, readable = torch.arange(count)[None], torch.ones(1, count, dtype=torch.bool)
    probe_images = ProbeImages(
        count, torch.zeros(1, count, 3, 16, 16, dtype=torch.uint8), index, readable, probe_labels, trained_on
    )
    config = fresh_config(hidden_size=1000)
    processor = evaluation_processor((16, 16))
    return Monitor(Accelerator(cpu=True), config, probe_images, labels, 1000, processor, seed=0)


def accuracies(monitor: Monitor, features: torch.Tensor) -> dict[str, float]:
    """The measures if every view of the probe images has these features."""
    return monitor._measures(features[:, None].expand(-1, 2 * VIEWS + 1, -1), monitor.bank.gathered())


def test_perfect_features_of_a_thousand_classes_have_perfect_neighbours():
    labels, probe_labels = torch.arange(2000) % 1000, torch.randperm(1000)[:512]
    monitor = monitor_of(labels, probe_labels)
    for index in torch.arange(2000).split(100):
        monitor.observe(one_hot(labels[index]), index)
    assert accuracies(monitor, one_hot(probe_labels))["online_knn_top1"] == 1.0


@pytest.mark.parametrize(("trained_on", "top1"), [(False, 1.0), (True, 0.0)])
def test_a_probe_image_that_is_trained_on_has_no_vote_for_itself(trained_on, top1):
    index, labels = torch.arange(20), torch.arange(20) % 2
    monitor = monitor_of(labels, labels[:10], index[:10] if trained_on else None)
    monitor.observe(one_hot(index), index)  # all equally far apart: 9 others of the same class, 10 of the other
    assert accuracies(monitor, one_hot(index[:10]))["online_knn_top1"] == top1


def test_the_memory_bank_holds_the_newest_micro_batches_and_is_restored_in_their_order():
    bank = MemoryBank(100, Accelerator(cpu=True))
    for step in range(7):
        bank.update(torch.full((32, 4), float(step)), torch.full((32,), step))
    held = bank.gathered()
    assert held["bank_index"].tolist() == [[step] * 32 for step in (4, 5, 6)]
    again = MemoryBank(100, Accelerator(cpu=True))
    again.restore(held)
    for memory_bank in (bank, again):
        memory_bank.update(torch.full((32, 4), 7.0), torch.full((32,), 7))
    assert all(torch.equal(tensor, again.gathered()[name]) for name, tensor in bank.gathered().items())


def test_the_rank_is_printed_with_the_largest_one_that_this_many_images_can_have():
    values = {"effective_rank_cls": 300.0, "effective_rank_mean": 20.0}
    values |= {"grad_norm_reconstruction": None, "grad_norm_uniformity": None}
    assert evaluations.in_words(values, 512) == "effective rank 300.0 (cls) and 20.0 (mean) of at most 512"


def test_evaluation_takes_its_share_of_the_trainings_flops():
    config = fresh_config()
    plan = Plan(images=1000, batch_size=8, accumulation=2, processes=2, seed=0)
    steps = estimated_steps(config, plan, count=100, held_out=False)
    monitor, model = make_monitor(Accelerator(cpu=True), batch_size=60)
    with FlopCounterMode(display=False) as counter:
        monitor._encode(model.eval(), 0)
    views = encoder_flops(config, 16) + 2 * encoder_flops(config, 16 - config.num_hidden_patches)
    assert counter.get_total_flops() == 60 * views
    evaluation = 100 * views + 2 * 16 * training_flops(config)
    assert evaluation / (steps * 32 * training_flops(config)) == pytest.approx(SHARE, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        monitor._reconstruction_losses(model, 0)
    with_losses = estimated_steps(config, plan, count=100, held_out=True)
    reconstructing = (with_losses - steps) * SHARE * 32 * training_flops(config)
    assert reconstructing == pytest.approx(counter.get_total_flops() / 60 * 100, rel=0.25), (
        "all patches, not the hidden"
    )


def images_of(labels: list[int], names: list[str]) -> Images:
    image = {"bytes": b"", "path": None}
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"image": [image] * len(labels), "label": labels}, features=features)
    return Images(rows, "image", "label", "some")


def test_labels_are_used_only_where_both_data_sets_agree_on_them():
    train = images_of([0, 1, 1], ["a", "b"])
    assert classes_of(train, images_of([1, 0], ["a", "b"])) == 2
    assert classes_of(train, images_of([1, 0], ["b", "a"])) is None, "other classes"
    assert classes_of(train, images_of([-1, -1], ["a", "b"])) is None, "hidden labels"
    assert classes_of(images_of([0], ["a"]), images_of([0], ["a"])) is None, "one class"


def test_every_process_has_the_same_number_of_batches_and_together_they_have_all_images():
    class Rank:
        num_processes = 3

    images, indices = load_images("digits", split="test"), []
    for Rank.process_index in range(3):
        share = prepare_probe_images(
            Rank, images, evaluation_processor((8, 8)), (8, 8), 50, True, seed=4, trained_on=True
        )
        assert share.index.shape == (3, 50) and share.readable.all() and share.count == 359
        indices.append(share.index)
    order = torch.stack(indices, dim=1).flatten()  # as gathered, batch by batch
    assert sorted(order[:359].tolist()) == list(range(359)) and torch.equal(order[359:], order[:91])
    assert torch.equal(share.labels, images.labels()[order[:359]]) and torch.equal(share.trained_on, order[:359])


def test_images_that_cannot_be_read_do_not_count(tmp_path):
    from PIL import Image

    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"<html>")
    accelerator = Accelerator(cpu=True)
    probe_images = prepare_probe_images(
        accelerator, load_images(str(tmp_path)), evaluation_processor((16, 16)), (16, 16), 4, False, 0
    )
    assert probe_images.count == 6 and (probe_images.index[~probe_images.readable] == 2).all()
    torch.manual_seed(0)
    model = UMAEForPreTraining(fresh_config()).train()
    monitor = Monitor(accelerator, model.config, probe_images, None, None, evaluation_processor((16, 16)), seed=0)
    values, _ = monitor.evaluate(model, micro_batch(), step=1)
    assert 1 <= values["effective_rank_cls"] <= 5 and "online_top1" not in values
    assert 0 < values["heldout_reconstruction_loss"] < 10


@pytest.mark.parametrize("record", [{}, {"eval_steps": 100_000}], ids=str)
@pytest.mark.parametrize("total", [8, 150, 920, 1100, 10_000])
def test_a_run_is_evaluated_at_least_eight_times_and_first_within_its_first_eighth(total, record):
    """1 % of the time would be steps 850 and 920 of 920, and one evaluation of 150 steps."""
    job = SimpleNamespace(
        args=SimpleNamespace(eval_steps=None, logging_steps=None), probe_images=load_images("digits", split="test"),
        images=None, config=fresh_config(), plan=Plan(images=1438, batch_size=8, accumulation=1, processes=1, seed=0),
        schedule=SimpleNamespace(total_steps=total),
    )  # fmt: skip
    every = evaluations.logging_steps(job)
    logged = [step for step in range(1, total + 1) if step == total or step % every == 0]
    evaluated = [step for step in logged if evaluations.evaluates(job, record, step)]
    assert len(evaluated) >= 8 and evaluated[0] <= total / 8 and evaluated[-1] == total
    job.args.eval_steps, job.args.logging_steps = 40, 30  # arguments take precedence
    steps = [step for step in (30, 60, 90, 120) if step <= total]
    assert [step for step in steps if evaluations.evaluates(job, record, step)] == steps[1:]
