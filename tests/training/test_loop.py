"""The training loop: steps with fp16's scaler, which needs no GPU itself, and runs of a task without images."""

import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from golden_models import fresh_config
from processes import ROOT, TIMEOUT, start
from toy_task import STEPS, toy_losses, toy_task, train_toy
from training_runs import metrics

from modeling_umae import UMAEForPreTraining
from umae.training import checkpoints, signals
from umae.training.failures import MOST_OVERFLOWS, no_failure
from umae.training.loop import optimizer_step
from umae.training.pretraining import VALUES, pretraining_losses
from umae.training.signals import StopRequest

BATCH = {
    "pixel_values": torch.arange(4 * 3 * 16 * 16).view(4, 3, 16, 16).to(torch.uint8),
    "flip": torch.zeros(4, 2, dtype=torch.bool),
    "index": torch.arange(4),
    "epoch": 0,
}


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
            self.accelerator, self.model, [BATCH], self.done, num_patches=16, seed=0, mean=(0.5,) * 3,
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


# ----------------------------------------------------------------------------------------------------------------------
# The loop, by a task without images


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert train_toy(folder, toy_task()) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def assert_same_run(mine, folder):
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (mine / "step-12" / name).read_bytes() == (folder / "step-12" / name).read_bytes()
    assert metrics(mine) == metrics(folder)
    assert {entry.name for entry in mine.glob("step-*")} == {"step-8", "step-12"}


def test_the_loop_logs_evaluates_saves_and_publishes_when_it_says(undisturbed, tmp_path):
    published = []
    train_toy(tmp_path / "run", toy_task(), publish=published.append)
    assert published == [4, 8, 12]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert ["evaluations" in line for line in lines] == [False, True, False, True]
    assert lines[-1]["epoch"] == 1.0
    assert_same_run(tmp_path / "run", undisturbed)


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_its_own_step(undisturbed, tmp_path, monkeypatch):
    written, steps = threading.Event(), []

    def losses(model, micro_batches, step):
        steps.append(step)
        if step == 11:  # the fourth step after the second checkpoint, and the last of all
            written.set()
        return toy_losses(model, micro_batches, step)

    def slow(folder, step, *arguments):
        if step == 8:
            assert written.wait(TIMEOUT) and steps[-1] == 11, "the loop has not waited"
        return save_checkpoint(folder, step, *arguments)

    save_checkpoint, write_training_state = checkpoints.save_checkpoint, checkpoints.write_training_state
    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    train_toy(tmp_path / "slow", toy_task(losses), logging_steps=1)  # evaluates after steps 2, 4, 6, 8, 10 and 12
    monkeypatch.undo()
    mine, expected = tmp_path / "slow" / "step-8", undisturbed / "step-8"
    assert (mine / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    tensors, state = checkpoints.read_training_state(mine)
    others, _ = checkpoints.read_training_state(expected)
    assert state["counted"] == [4] and tensors.pop("online/evaluations").item() == 4
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items() if name != "window")

    def stop_at_five(model, micro_batches, step):
        if step == 5:
            raise FloatingPointError("the run ends while its checkpoint is written")
        return toy_losses(model, micro_batches, step)

    written.clear()
    with pytest.raises(FloatingPointError):
        monkeypatch.setattr(checkpoints, "write_training_state", lambda *a: time.sleep(0.2) or write_training_state(*a))
        train_toy(tmp_path / "ended", toy_task(stop_at_five))
    assert checkpoints.newest_whole(tmp_path / "ended") == (tmp_path / "ended" / "step-4", []), "it is completed"
    assert train_toy(tmp_path / "ended", toy_task()) == 0
    assert_same_run(tmp_path / "ended", undisturbed)


def test_checkpoints_come_by_the_clock_where_no_number_of_steps_is_given(tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 250))  # seconds: a step takes 250
    monkeypatch.setattr(signals, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    published, stop = [], StopRequest()
    train_toy(tmp_path / "run", toy_task(), publish=published.append, stop=stop, checkpointing_steps=None)
    assert published == [3, 6, 9, 12]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_its_next_line(undisturbed, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("no space left on device")

    trained = []

    def losses(model, micro_batches, step):
        trained.append(step)
        time.sleep(0.05)
        return toy_losses(model, micro_batches, step)

    monkeypatch.setattr(checkpoints, "write_training_state", full)
    with pytest.raises(ValueError, match=r"cannot save .*step-4 \(no space left on device\)"):
        train_toy(tmp_path / "run", toy_task(losses))
    assert max(trained) == 5, "the line of step 6"
    monkeypatch.undo()
    assert train_toy(tmp_path / "run", toy_task()) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    "when", [*(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4)), 5, STEPS - 1]
)  # 4 is saved anyway
def test_a_signal_after_any_step_saves_it_and_the_next_start_ends_with_the_same_bits(undisturbed, tmp_path, when):
    def interrupted(model, micro_batches, step):
        if step + 1 == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy_losses(model, micro_batches, step)

    assert train_toy(tmp_path / "run", toy_task(interrupted)) == signal.SIGTERM
    assert (tmp_path / "run" / f"step-{when}").is_dir() and not (tmp_path / "run" / "step-12").exists()
    assert train_toy(tmp_path / "run", toy_task()) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected = (undisturbed / "step-12" / name).read_bytes()
        assert (tmp_path / "run" / "step-12" / name).read_bytes() == expected
    assert metrics(tmp_path / "run") == metrics(undisturbed)


@pytest.mark.parametrize("moment", ["write_training_state", "_fsync", "rename"])
def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(undisturbed, tmp_path, moment):
    process = start(ROOT / "tests" / "toy_task.py", tmp_path / "run", moment)
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert {entry.name for entry in (tmp_path / "run").glob("step-*")} == {"step-4", "step-8.tmp"}
    train_toy(tmp_path / "run", toy_task())
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("logging_steps", [1, 12])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved_and_names_its_images(tmp_path, logging_steps):
    def spoiled(model, micro_batches, step):
        for part, (loss, values) in enumerate(toy_losses(model, micro_batches, step)):
            infinite = step == 5 and part == 1
            yield loss, values + (torch.inf if infinite else 0)

    message = "loss was not finite at step 6, with the images number 20, number 21, number 22, number 23 of the toy"
    with pytest.raises(FloatingPointError, match=message):
        train_toy(tmp_path / "run", toy_task(spoiled), logging_steps)
    assert [entry.name for entry in (tmp_path / "run").glob("step-*")] == ["step-4"]


def test_images_that_cannot_be_read_are_kept_in_the_record_and_too_many_end_the_run(tmp_path, capsys):
    train_toy(tmp_path / "few", toy_task(refusals={2: {9: "a.jpg is truncated"}}))
    assert json.loads((tmp_path / "few" / "run.json").read_text())["unreadable"] == {"9": "a.jpg is truncated"}
    assert capsys.readouterr().out.count("left out: a.jpg is truncated") == 1
    with pytest.raises(ValueError, match=r"5 of 48 images cannot be read, more than max_unreadable_share 0.1"):
        train_toy(tmp_path / "many", toy_task(refusals={2: {index: f"{index}.jpg" for index in range(5)}}))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_with_too_large_a_norm_is_scaled_down_to_it_and_a_smaller_one_stays(accumulation):
    def change(max_grad_norm):
        """Of the weights by a step of plain gradient descent, and the norm that is logged."""
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model, failed = UMAEForPreTraining(fresh_config()), no_failure("cpu", len(VALUES))
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=1.0, fused=True))
        losses = pretraining_losses(
            accelerator, model, [BATCH] * accumulation, 0, num_patches=16, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3
        )
        values = optimizer_step(accelerator, model, optimizer, losses, accumulation, failed, 0, max_grad_norm)
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return after - before, values[-1].item()

    plain, norm = change(None)
    assert norm == pytest.approx(plain.norm().item(), rel=1e-4) and norm > 0.1
    scaled, logged = change(norm / 4)
    assert logged == norm
    assert torch.allclose(scaled, plain / 4, atol=1e-6)
    assert torch.equal(change(2 * norm)[0], plain)
