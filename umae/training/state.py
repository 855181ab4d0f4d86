"""What training changes from one step to the next: how it begins, is saved in a checkpoint and continues from there."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import BaseImageProcessor, PreTrainedModel

from umae.speed import compile_model
from umae.training import checkpoints
from umae.training.folder import newest_checkpoint, write_run

BESIDE = "online/"  # in a checkpoint, before the names of tensors that are not the optimiser's


@dataclass
class State:
    """The state of training on one process.

    Args:
        step: optimiser steps done.
        kind: class of the model, which the accelerator may wrap in others, or replace by one of its own (FSDP2).
        model, optimizer: as the accelerator trains them.
        names: of the values that every step returns.
        window: (2, values), sums of these since the last line of the log, and how many of each.
    """

    accelerator: Accelerator
    step: int
    kind: type[PreTrainedModel]
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    names: Sequence[str]
    window: torch.Tensor

    @classmethod
    def begin(
        cls,
        accelerator: Accelerator,
        model: PreTrainedModel,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        names: Sequence[str],
        gradient_checkpointing: bool,
        torch_compile: str,
    ) -> "State":
        """Nothing done yet, by AdamW on some groups of parameters.

        Args:
            torch_compile: `no`, or what to compile, see `compile_model`.
        """
        if gradient_checkpointing:  # transformers is renaming it
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if torch_compile != "no":
            compile_model(model, torch_compile)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        window, kind = torch.zeros(2, len(names), device=accelerator.device), type(model)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        if accelerator.is_fsdp2:  # which Accelerate does for every other model; see `fsdp_plugin`
            prepared.forward = accelerator.autocast()(prepared.forward)
        if isinstance(prepared, DistributedDataParallel):
            prepared.broadcast_buffers = False  # they never change; Accelerate's own way warns from torch 2.13 on
        return cls(accelerator, 0, kind, prepared, optimizer, names, window)

    def count(self, values: torch.Tensor) -> None:
        """Add a step and its values, float32 (values,); in fp16 gradients overflow, and are not among them."""
        self.window += torch.stack([values.nan_to_num(0, 0, 0), values.isfinite()])
        self.step += 1

    def means(self) -> dict[str, float | None]:
        """The values of the steps in the window by their names, averaged over steps and processes; empties the window.

        None for a value that no step had.
        """
        sums, counts = self.accelerator.reduce(self.window, "mean").tolist()
        self.window.zero_()
        columns = zip(self.names, sums, counts, strict=True)
        return {name: total / count if count else None for name, total, count in columns}

    def restore(self, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Continue from the newest checkpoint of a run folder, if there is one.

        Returns:
            What `save` was given beside; nothing if there is no checkpoint.
        """
        newest = newest_checkpoint(self.accelerator, folder)
        if newest is None:
            return {}, {}
        checkpoints.restore_model(self.model, self.kind.from_pretrained(newest).state_dict())
        tensors, state = checkpoints.read_training_state(newest)
        self.window.copy_(tensors.pop("window"))
        beside = {name.removeprefix(BESIDE): tensors.pop(name) for name in list(tensors) if name.startswith(BESIDE)}
        checkpoints.restore_optimizer(self.model, self.optimizer.optimizer, tensors)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.accelerator.print(f"continuing from {newest}")
        return beside, state

    def save(
        self,
        folder: Path,
        record: dict[str, Any],
        processor: BaseImageProcessor,
        keep: int,
        beside: dict[str, torch.Tensor],
        state: dict[str, Any],
        writer: checkpoints.Writer,
        publish: Callable[[int], None],
    ) -> None:
        """Have `step-N/` and `run.json` written from a copy; every process takes part, the main one writes.

        Args:
            keep: how many checkpoints stay.
            beside, state: tensors and plain values that `restore` shall return.
            publish: called with the step by the main process, in the writer's thread, once the checkpoint stands.
        """
        accelerator, model = self.accelerator, self.model
        state_dict = checkpoints.model_tensors(model)
        tensors = checkpoints.optimizer_tensors(model, self.optimizer.optimizer)
        # What every process continues with, resumed or not
        self.window.copy_(accelerator.reduce(self.window, "mean"))
        tensors |= {"window": self.window.to("cpu", copy=True)}
        tensors |= {f"{BESIDE}{name}": tensor.clone() for name, tensor in beside.items()}
        state = copy.deepcopy(state)  # a stream's cursors move on
        state |= {"step": self.step, "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}

        if not accelerator.is_main_process:
            return
        with torch.device("meta"):  # a plain model: a class of FSDP2's would save FSDP2's code instead of ours
            plain = self.kind(copy.deepcopy(accelerator.unwrap_model(model).config))
        step, record = self.step, copy.deepcopy(record)  # as they are now

        def write_files(target: Path) -> None:
            plain.save_pretrained(target, state_dict=state_dict)
            processor.save_pretrained(target)
            checkpoints.write_training_state(target, tensors, state)

        def write() -> None:
            size = sum(tensor.nbytes for tensor in (*state_dict.values(), *tensors.values()))
            checkpoints.save_checkpoint(folder, step, write_files, keep, size)
            write_run(folder, record)
            publish(step)

        writer.start(write)
