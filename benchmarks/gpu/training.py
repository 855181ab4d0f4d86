"""Training as `umae pretrain` does it, a few steps at a time, on random images."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.gpu.items import Bench
from umae import UMAEConfig, UMAEForPreTraining
from umae.data.crops import Flips, random_flips
from umae.data.inputs import IMAGENET_MEAN, IMAGENET_STD, evaluation_processor
from umae.programs.pretrain import BETAS
from umae.training.checkpoints import Writer, model_tensors, optimizer_tensors
from umae.training.failures import no_failure
from umae.training.hardware import fast_attention
from umae.training.loop import optimizer_step
from umae.training.pretraining import VALUES, pretraining_losses
from umae.training.schedules import Schedule, decay_groups, set_learning_rate
from umae.training.state import State

SCHEDULE = Schedule(total_steps=100, warmup_steps=5, learning_rate=1e-3)


def make_accelerator(bench: Bench, precision: str) -> Accelerator:
    accelerator = Accelerator(cpu=bench.device == "cpu", mixed_precision=precision)
    if precision == "fp16" and bench.device == "cpu":  # where Accelerate scales no gradients
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    return accelerator


class Training:
    """A model with its state; the images of a step depend on its number only.

    Args:
        model: name of one in `Bench.fields`.
        precision: `no`, `bf16` or `fp16`.
        way: `no`, or what to compile.
        attention: implementation; by default that of `umae pretrain`.
    """

    def __init__(
        self, bench: Bench, precision: str, way: str, model="CIFAR recipe", batch_size=64, attention: str | None = None
    ):
        self.accelerator = make_accelerator(bench, precision)
        self.config, self.batch_size = UMAEConfig(**bench.fields(model)), bench.pick(batch_size, 4)
        torch.manual_seed(0)
        fresh = UMAEForPreTraining._from_config(
            self.config, attn_implementation=attention or fast_attention(self.accelerator)
        )
        groups = decay_groups(fresh, 0.05)
        self.state = State.begin(self.accelerator, fresh, groups, BETAS, VALUES, False, way)
        self.state.model.train()
        self.failed = no_failure(self.accelerator.device, len(VALUES))
        self.processor = evaluation_processor(self.config.image_height_width)

    def batch(self, step: int) -> dict[str, Any]:
        """A micro-batch as a loader gives it."""
        shape = (self.batch_size, self.config.num_channels, *self.config.image_height_width)
        pixel_values = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        index = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        if self.accelerator.device.type == "cuda":
            pixel_values, index = pixel_values.pin_memory(), index.pin_memory()
        flip = random_flips(0, 0, index, Flips())
        return {"pixel_values": pixel_values, "flip": flip, "index": index, "epoch": 0, "refusals": {}}

    def step(self, batch: dict[str, Any] | None = None) -> torch.Tensor:
        """One optimiser step, as `train` takes it; the values that it logs, on the device."""
        state, done = self.state, self.state.step
        set_learning_rate(state.optimizer, SCHEDULE, done)
        losses = pretraining_losses(
            self.accelerator, state.model, [batch or self.batch(done)], done, seed=0, mean=IMAGENET_MEAN,
            std=IMAGENET_STD, num_patches=self.config.grid[0] * self.config.grid[1],
        )  # fmt: skip
        values = optimizer_step(self.accelerator, state.model, state.optimizer, losses, 1, self.failed, done)
        state.count(values)
        return values

    def steps(self, count: int) -> "Training":
        for _ in range(count):
            self.step()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights, on the CPU."""
        return model_tensors(self.state.model)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights and the optimiser's state, on the CPU."""
        return {**self.weights(), **optimizer_tensors(self.state.model, self.state.optimizer.optimizer)}

    def save(self, folder: Path, writer: Writer) -> None:
        """Have a checkpoint written, as `train` does; `writer.wait()` says when it stands."""
        folder.mkdir(parents=True, exist_ok=True)
        self.state.save(folder, {}, self.processor, 1, {}, {}, writer, lambda step: None)


def largest_difference(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Of any two numbers of the same name and place; 0 only if all bits that count are equal."""
    assert some.keys() == others.keys()
    return max((some[name].double() - others[name].double()).abs().max().item() for name in some)
