"""Steps with fp16's scaler, which needs no GPU itself; other steps are tested by whole runs in test_run_pretrain.py."""

import pytest
import torch
from accelerate import Accelerator
from golden_models import fresh_config

from modeling_umae import UMAEForPreTraining
from umae.training.failures import MOST_OVERFLOWS, no_failure
from umae.training.loop import optimizer_step
from umae.training.pretraining import VALUES, pretraining_losses

BATCH = {"pixel_values": torch.arange(4 * 3 * 16 * 16).view(4, 3, 16, 16).to(torch.uint8), "index": torch.arange(4)}


class Steps:
    """A model that trains as fp16 does; `spoil` says what is not finite from now on."""

    def __init__(self, accelerator: Accelerator):
        torch.manual_seed(0)
        self.accelerator, self.model = accelerator, UMAEForPreTraining(fresh_config())
        self.failed = no_failure("cpu", len(VALUES))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.done, self.spoil = 0, ""
        self.model.get_parameter("vit.layernorm.bias").register_hook(
            lambda grad: grad * float("inf") if self.spoil == "gradient" else grad
        )
        self.model.register_forward_hook(self._spoil_loss)

    def _spoil_loss(self, model, arguments, output) -> None:
        if self.spoil == "loss":  # its gradients alone would stay as they are
            output.loss = output.loss + torch.inf

    def take(self, spoil: str = "") -> bool:
        """One step; returns whether a weight has changed."""
        self.spoil, before = spoil, self.weights()
        losses = pretraining_losses(
            self.accelerator, self.model, [{**BATCH, "epoch": 0}], self.done, num_patches=16, seed=0, mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )  # fmt: skip
        optimizer_step(self.accelerator, self.model, self.optimizer, losses, 1, self.failed, self.done)
        self.done += 1
        return not torch.equal(before, self.weights())

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def failure(self) -> tuple[int, list[str]]:
        step, _, *flags = self.failed.tolist()
        return int(step), [name for name, flag in zip(VALUES, flags, strict=True) if flag]


@pytest.fixture
def steps(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    return Steps(accelerator)


def test_a_gradient_that_overflows_in_fp16_leaves_out_its_step_only(steps):
    assert [steps.take(spoil) for spoil in ("", "gradient", "gradient", "")] == [True, False, False, True]
    assert steps.failure() == (0, [])
    assert steps.accelerator.scaler.get_scale() == 2.0**14, "halved twice"


def test_too_many_overflows_in_a_row_are_a_failure(steps):
    for _ in range(MOST_OVERFLOWS - 1):
        steps.take("gradient")
    assert steps.failure() == (0, [])
    steps.take()
    for _ in range(MOST_OVERFLOWS):  # the count began again
        assert steps.failure() == (0, [])
        steps.take("gradient")
    assert steps.failure() == (2 * MOST_OVERFLOWS, ["grad_norm"])
    assert not steps.take(), "a sound step after the failure"


def test_a_loss_that_is_not_finite_freezes_the_weights_in_fp16_too(steps):
    assert [steps.take(spoil) for spoil in ("", "loss", "", "")] == [True, False, False, False]
    assert steps.failure() == (2, ["loss"])
