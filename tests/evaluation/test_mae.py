"""MAE's linear probe, against its restatement with torch's own modules in float64."""

import pytest
import torch
from accelerate import Accelerator
from golden_models import fresh_config

from modeling_umae import UMAEForPreTraining
from umae import seeding
from umae.convert import encoder_from_pretrained
from umae.data.batches import Plan
from umae.data.crops import random_resized_crop
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor, load_processor
from umae.evaluation.mae import BatchNormHead, ProbeSchedule, train_mae_probe


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates, one parameter at a time, from the paper's algorithm."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "momentum": 0.9, "trust": 0.001})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if parameter.ndim == 2:
                    update = update * group["trust"] * parameter.norm() / update.norm()
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.copy_(group["momentum"] * velocity + update)
                parameter -= group["lr"] * velocity


def restated(seed: int, width: int) -> torch.nn.Sequential:
    norm, linear = torch.nn.BatchNorm1d(width, affine=False, eps=1e-6), torch.nn.Linear(width, 10)
    torch.nn.init.trunc_normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.zeros_(linear.bias)
    return torch.nn.Sequential(norm, linear).double()


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config(image_size=8, patch_size=2)).save_pretrained(tmp_path / "model")
    evaluation_processor((8, 8)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_epochs_loss_is_that_of_the_protocol_step_by_step(model, tmp_path):
    epochs, batch_size, seed = 4, 64, 3
    images, processor = load_images("digits", split="test"), load_processor(model)
    encoder, schedule = encoder_from_pretrained(model, pooling="mean"), ProbeSchedule(epochs, 1, 16.0)
    plan = Plan(len(images), batch_size // 2, accumulation=2, processes=1, seed=seed)
    heads, record = train_mae_probe(
        encoder, images, processor, 10, schedule, plan, 0, Accelerator(cpu=True), tmp_path / "state"
    )

    encoder = encoder_from_pretrained(model, pooling="mean").double()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    labels, per_epoch = images.labels(), len(images) // batch_size
    for position, name in enumerate(("cls", "mean")):
        head = restated(seed, encoder.config.hidden_size)
        optimizer = Lars(head.parameters(), lr=0.0)
        for epoch in range(epochs):
            losses, order = [], seeding.permutation(seed, epoch, len(images))
            for step in range(per_epoch):
                passed = epoch + step / per_epoch  # the peak is 16 * 64 / 256
                rate = 4 * passed if passed < 1 else 2 * (1 + torch.cos(torch.tensor((passed - 1) / 3 * torch.pi)))
                optimizer.param_groups[0]["lr"] = float(rate)
                index = order[step * batch_size : (step + 1) * batch_size]
                numbers = seeding.uniform(seed, seeding.CROP, epoch, index, 22)
                flips = seeding.uniform(seed, seeding.FLIP, epoch, index, 1)[:, 0] < 0.5
                crops = [
                    random_resized_crop(pixels, crop_numbers, (8, 8), (0.08, 1.0))
                    for pixels, crop_numbers in zip(images.read_pixels(index.tolist()), numbers, strict=True)
                ]
                crops = [crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)]
                with torch.no_grad():
                    output = encoder(((torch.stack(crops) / 255 - mean) / std).double())
                features = (output.last_hidden_state[:, 0], output.pooler_output)[position]
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(head(features), labels[index])
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert record["epoch_losses"][name][epoch] == pytest.approx(sum(losses) / per_epoch, rel=1e-4)
        assert record["epoch_losses"][name][-1] < record["epoch_losses"][name][0] - 0.01, "it learns"
        test = torch.randn(20, encoder.config.hidden_size)
        expected = head.eval()(test.double())
        assert (heads[name](test) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_head_steps_as_the_restatement_does_in_float64():
    features = 3 + 2 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(64) % 10
    mine, other = BatchNormHead(10, 16, 1, torch.device("cpu"), torch.float64), restated(1, 16)
    optimizer = Lars(other.parameters(), lr=6.4)
    for batch in torch.arange(64).split(16):
        loss = torch.nn.functional.cross_entropy(other(features[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert mine.step(features[batch], labels[batch], 6.4).item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(mine.folded({})(features), other.eval()(features), rtol=1e-10)


def test_the_learning_rate_is_that_of_the_published_probe():
    plan = Plan(images=1_281_167, batch_size=512, accumulation=1, processes=32, seed=0)
    schedule, per_epoch = ProbeSchedule(), plan.steps_per_epoch
    assert schedule.learning_rate(0, plan) == 0
    assert schedule.learning_rate(10 * per_epoch, plan) == pytest.approx(6.4, rel=1e-12)
    assert schedule.learning_rate(5 * per_epoch, plan) == pytest.approx(3.2, rel=1e-9)
    assert schedule.learning_rate(50 * per_epoch, plan) == pytest.approx(3.2, rel=1e-9)
    assert schedule.learning_rate(90 * per_epoch, plan) == pytest.approx(0, abs=1e-12)


def test_an_interrupted_probe_continues_to_the_same_bits(model, tmp_path, monkeypatch):
    images, evaluated = load_images("digits", split="test"), []

    def weight(name, head):
        evaluated.append(name)
        return float(head.weight.double().norm())

    def train(state, base_learning_rate=1.0):
        encoder, schedule = encoder_from_pretrained(model, pooling="mean"), ProbeSchedule(3, 1, base_learning_rate)
        plan = Plan(len(images), 64, 1, 1, seed=0)
        rest = (10, schedule, plan, 0, Accelerator(cpu=True), tmp_path / state, False, weight)
        return train_mae_probe(encoder, images, load_processor(model), *rest)

    heads, record = train("whole")
    assert evaluated == 3 * ["cls", "mean"]
    assert record["epoch_top1"]["mean"][-1] == pytest.approx(float(heads["mean"].weight.double().norm()))
    assert not (tmp_path / "whole.tmp").exists()
    steps = []

    def interrupted(head, *args, step=BatchNormHead.step):
        if len(steps) == 2 * (5 + 2):  # in the middle of the second epoch; there are two heads and five steps
            raise KeyboardInterrupt
        steps.append(None)
        return step(head, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BatchNormHead, "step", interrupted)
        train("cut")
    with pytest.raises(ValueError, match="cut belongs to a run with other schedule; use the same"):
        train("cut", base_learning_rate=2.0)
    resumed_heads, resumed = train("cut")
    assert resumed == record
    for name, head in heads.items():
        assert torch.equal(head.weight, resumed_heads[name].weight) and torch.equal(head.bias, resumed_heads[name].bias)
    assert train("cut")[1] == record, "and when it had finished"
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut is damaged .*; delete it"):
        train("cut")


def test_too_few_images_and_too_long_a_warm_up_are_refused(model, tmp_path):
    encoder, images = encoder_from_pretrained(model, pooling="mean"), load_images("digits")
    first, rest = (load_processor(model), 10), (0, Accelerator(cpu=True), tmp_path / "state")
    with pytest.raises(ValueError, match=r"holds 1438 images, fewer than one step of 2000 .*; lower per_device"):
        train_mae_probe(encoder, images, *first, ProbeSchedule(), Plan(1438, 1000, 2, 1, 0), *rest)
    with pytest.raises(ValueError, match="warmup_epochs 10 must be less than num_train_epochs 5; lower it"):
        train_mae_probe(encoder, images, *first, ProbeSchedule(epochs=5), Plan(1438, 256, 1, 1, 0), *rest)
