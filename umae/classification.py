"""A classifier that is trained as a whole: one step, and its guesses for pictures that it has not seen."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from umae import seeding
from umae.augmentation import MIX_NUMBERS, Strengths, mix_pairs, soft_targets
from umae.data import Pictures
from umae.features import EvaluationPictures
from umae.interruption import ignore_signals
from umae.metrics import TopKAccuracy
from umae.training import remember_failure
from umae.transforms import normalize

# What a step returns, in this order.
LOGGED = ("loss", "grad_norm")


def classification_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict],
    failed: torch.Tensor,
    labels: torch.Tensor,
    *,
    step: int,
    seed: int,
    num_classes: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Forward and backward over the micro-batches, then one step of the optimiser. Never waits for the device.

    Args:
        model, optimizer: as prepared by the accelerator; a fused optimiser.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        failed: as `no_failure` made it; see `umae.training.train_step`.
        labels: int64 (N,), of all training pictures, on the device.
        step: the optimiser steps before this one.
        seed: of the run; mixing is keyed by (seed, epoch, index), drop path by (seed, step, micro-batch, rank).

    Returns:
        float32 (2,) on the device: the values named in `LOGGED`, averaged over the micro-batches of this process.
    """
    losses = []
    for i, batch in enumerate(micro_batches):
        with accelerator.accumulate(model):
            pixel_values, targets = device_inputs(
                batch, accelerator.device, labels, seed, num_classes, strengths, mean, std
            )
            seeding.seed_forward(seed, step, i, accelerator.process_index)
            loss = nn.functional.cross_entropy(model(pixel_values).logits.float(), targets)
            losses.append(loss.detach())
            sound = torch.isfinite(losses[-1]) & (failed[0] == 0)
            # What fails on one process becomes a failure of all, by their common gradient
            accelerator.backward(loss * torch.where(sound, 1.0, torch.nan))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients(optimizer)
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # under FSDP2
                values = torch.stack([torch.stack(losses).mean(), grad_norm.float()])
                remember_failure(accelerator, optimizer, values, step, failed)
            optimizer.step()
            optimizer.zero_grad()
    return values


def device_inputs(
    batch: dict,
    device: torch.device,
    labels: torch.Tensor,
    seed: int,
    num_classes: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of uint8 crops -> normalised and mixed pictures, and their targets (batch, classes)."""
    index = batch["index"].to(device, non_blocking=True)
    pixel_values = normalize(batch["pixel_values"].to(device, non_blocking=True), mean, std)
    targets = soft_targets(labels[index], num_classes, strengths.label_smoothing)
    if not strengths.mixes:
        return pixel_values, targets
    numbers = seeding.uniform(seed, seeding.MIX, batch["epoch"], index[::2], MIX_NUMBERS)
    return mix_pairs(pixel_values, targets, numbers, strengths.mixup, strengths.cutmix)


@torch.no_grad()
def guess(
    model: nn.Module,
    pictures: Pictures,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int,
    num_classes: int,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, list[str]]:
    """The most likely classes of pictures, each counted exactly once on any number of processes, which all call this.

    Args:
        model: as prepared by the accelerator, in training mode; left so.
        batch_size: pictures of a batch; every process looks at one batch at a time.

    Returns:
        int64 (N, 5), or as many as there are classes, best first, on every process; -1, no class, for a picture that
        cannot be read. And why those cannot.
    """
    count, processes, best = len(pictures), accelerator.num_processes, min(5, num_classes)
    batch_size = min(batch_size, math.ceil(count / processes))
    rounds = math.ceil(count / (batch_size * processes))
    # All have as many batches as any other, with the first pictures again at the end, which are cut off below
    places = (torch.arange(rounds * processes * batch_size) % count).view(rounds, processes, batch_size)
    loader = DataLoader(
        EvaluationPictures(pictures, processor),
        sampler=places[:, accelerator.process_index].tolist(),
        batch_size=None,  # an element of the sampler is a whole batch
        num_workers=num_workers,
        worker_init_fn=ignore_signals if num_workers else None,
        pin_memory=accelerator.device.type == "cuda",
    )
    guesses, errors = [], set()
    model.eval()
    for batch in loader:
        mine = torch.full((batch_size, best), -1, device=accelerator.device)
        errors |= set(batch["errors"])
        if batch["pixel_values"] is not None:
            logits = model(batch["pixel_values"].to(accelerator.device, non_blocking=True)).logits.float()
            mine[batch["rows"].to(accelerator.device)] = logits.topk(best, dim=1).indices
        guesses.append(accelerator.gather(mine))  # one batch after the other
    model.train()
    return torch.cat(guesses)[:count].cpu(), sorted(set(gather_object(list(errors))))


def accuracy(guesses: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 and, with at least five guesses, top-5, in 0..1."""
    return TopKAccuracy(keep_in_memory=True).compute(predictions=guesses, references=labels)
