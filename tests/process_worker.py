"""Run by torchrun in test_processes.py: every process holds a part of one batch, the gradients must be the whole's."""

import dataclasses
import itertools
import json
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from golden_models import fresh_config
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from configuration_umae import REGULARIZERS
from modeling_umae import (
    UMAEForPreTraining,
    UMAELayer,
    UMAEModel,
    coding_rate_loss,
    feature_second_moment,
    uniformity_loss,
)
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor
from umae.evaluation.monitor import Monitor, prepare_probe_images
from umae.training import checkpoints
from umae.training.failures import no_failure
from umae.training.loop import optimizer_step
from umae.training.pretraining import VALUES, pretraining_losses

COUNT = 12
PARTS = {  # images of every process
    1: {"even": [12]},
    2: {"even": [6, 6], "uneven": [9, 3]},
    4: {"even": [3, 3, 3, 3], "uneven": [1, 5, 2, 4]},
}


class Term(nn.Module):
    """The regularizer alone; the batch of all processes in training mode, the local one in evaluation mode."""

    def __init__(self, config):
        super().__init__()
        self.vit = UMAEModel(config)
        self.term = {"uniformity": uniformity_loss, "coding_rate": coding_rate_loss}[config.regularizer]

    def forward(self, pixel_values, noise):
        return self.term(self.vit(pixel_values, noise=noise).pooler_output, across_processes=self.training)


class Loss(nn.Module):
    """The whole objective."""

    def __init__(self, config):
        super().__init__()
        self.model = UMAEForPreTraining(config)

    def forward(self, pixel_values, noise, **kwargs):
        return self.model(pixel_values, noise=noise, **kwargs).loss


def replicated(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module, broadcast_buffers=False)


def sharded(module: nn.Module) -> nn.Module:
    """As Accelerate shards by FSDP2: layers, input embeddings, the rest; under gradient checkpointing as well."""
    model = getattr(module, "model", getattr(module, "vit", module))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # transformers renames it
    for layer in module.modules():
        if isinstance(layer, UMAELayer):
            fully_shard(layer)
    fully_shard(model.get_input_embeddings())
    return fully_shard(module)


def value_and_gradient(module, pixel_values, noise) -> tuple[float, torch.Tensor]:
    module.zero_grad()
    loss = module(pixel_values, noise)
    loss.backward()
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]
    return loss.item(), torch.cat([gradient.flatten().double() for gradient in gradients])


def errors_of(
    objective, regularizer: str, parts: list[int], dtype: torch.dtype, wrap=replicated
) -> tuple[float, float]:
    """Relative errors of value and gradient: this process' part of the batch among all, against the whole batch alone.

    A function of its own, because a DistributedDataParallel that outlives its process group can hang the process.
    """
    torch.manual_seed(0)
    alone = objective(fresh_config(uniformity_weight=0.5, regularizer=regularizer)).to(dtype)
    pixel_values, noise = torch.randn(COUNT, 3, 16, 16, dtype=dtype), torch.rand(COUNT, 16)
    value, expected = value_and_gradient(alone.eval(), pixel_values, noise)
    rank = dist.get_rank()
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    together = wrap(alone.train())
    found_value, found = value_and_gradient(together, pixel_values[mine], noise[mine])
    return abs(found_value / value - 1), ((found - expected).norm() / expected.norm()).item()


def error_of_accumulation(regularizer: str, micro_batches: int, dtype: torch.dtype) -> float:
    """Relative error of the gradient accumulated over equal parts of a batch, by the exact term."""
    torch.manual_seed(0)
    alone = Loss(fresh_config(uniformity_weight=0.5, regularizer=regularizer)).to(dtype)
    parts = dist.get_world_size() * micro_batches
    pixel_values, noise = torch.randn(3 * parts, 3, 16, 16, dtype=dtype), torch.rand(3 * parts, 16)
    _, expected = value_and_gradient(alone.eval(), pixel_values, noise)
    together = replicated(alone.train())
    mine = [
        (pixel_values[part::parts], noise[part::parts])
        for part in range(dist.get_rank() * micro_batches, (dist.get_rank() + 1) * micro_batches)
    ]
    with torch.no_grad():
        outputs = [together.module.model.encode_features(*part) for part in mine]
        whole = sum(feature_second_moment(output.features) for output in outputs) / parts
    dist.all_reduce(whole)
    together.zero_grad()
    for i, part in enumerate(mine):
        with nullcontext() if i == micro_batches - 1 else together.no_sync():
            (together(*part, second_moment=whole) / micro_batches).backward()
    found = torch.cat([parameter.grad.flatten().double() for parameter in together.parameters()])
    return ((found - expected).norm() / expected.norm()).item()


def all_reduces(regularizer: str) -> list[int]:
    """How many all-reduces a forward pass asks for, and then a backward pass."""
    model, counts, all_reduce = Loss(fresh_config(regularizer=regularizer)), [0, 0], dist.all_reduce

    def counted(tensor):
        counts[at] += 1
        return all_reduce(tensor)

    try:
        dist.all_reduce, at = counted, 0
        loss, at = model(torch.randn(2, 3, 16, 16), torch.rand(2, 16)), 1
        loss.backward()
    finally:
        dist.all_reduce = all_reduce
    return counts


def main_process_has(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = [tensors]
    dist.broadcast_object_list(found)
    return found[0]


def weights_after_three_steps(wrap) -> torch.Tensor:
    """Before the last step all that a checkpoint holds is saved, and restored into a new optimiser."""
    torch.manual_seed(0)
    accelerator, failed = Accelerator(cpu=True), no_failure(torch.device("cpu"), len(VALUES))
    model = wrap(UMAEForPreTraining(fresh_config(uniformity_weight=0.5)))
    images = torch.arange(8 * 3 * 16 * 16).view(8, 3, 16, 16).to(torch.uint8)
    index = torch.arange(8)[4 * dist.get_rank() :][:4]
    batch = {"pixel_values": images[index], "flip": torch.zeros(4, 2, dtype=torch.bool), "index": index, "epoch": 0}
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
    for step in range(3):
        if step == 2:
            weights = main_process_has(checkpoints.model_tensors(model))
            state = main_process_has(checkpoints.optimizer_tensors(model, optimizer.optimizer))
            optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
            checkpoints.restore_model(model, weights)
            checkpoints.restore_optimizer(model, optimizer.optimizer, state)
        losses = pretraining_losses(
            accelerator, model, [batch], step, num_patches=16, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3
        )
        optimizer_step(accelerator, model, optimizer, losses, 1, failed, step)
    assert failed[0] == 0
    weights = main_process_has(checkpoints.model_tensors(model))
    return torch.cat([tensor.flatten() for _, tensor in sorted(weights.items())])


def measures_of_a_look(wrap) -> torch.Tensor:
    torch.manual_seed(0)
    accelerator, processor = Accelerator(cpu=True), evaluation_processor((16, 16))
    model = UMAEForPreTraining(fresh_config(uniformity_weight=0.5))
    digits = load_images("digits", split="test")
    few = dataclasses.replace(digits, dataset=digits.dataset.select(range(90)))
    probe_images = prepare_probe_images(accelerator, few, processor, (16, 16), 13, True, seed=0)
    monitor = Monitor(accelerator, model.config, probe_images, load_images("digits").labels(), 10, processor, seed=0)
    model = wrap(model).train()
    index = torch.arange(8)[4 * dist.get_rank() :][:4]
    pixels = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    for _ in range(3):
        monitor.observe(
            torch.randn(8, monitor.config.hidden_size, generator=torch.Generator().manual_seed(1))[index], index
        )
    flip = torch.zeros(len(index), 2, dtype=torch.bool)
    batch = {"pixel_values": pixels[index], "flip": flip, "index": index, "epoch": 0}
    values, _ = monitor.evaluate(model, batch, step=1)
    classifier = torch.stack([tensor.double().sum() for _, tensor in sorted(monitor.classifier.tensors().items())])
    everyones = accelerator.gather(classifier[None])
    assert torch.equal(everyones[0], everyones[1]), "all processes have the same classifier"
    return torch.tensor([value for _, value in sorted(values.items())], dtype=torch.float64)


def main(report: str) -> None:
    dist.init_process_group("gloo")
    errors = {}
    for regularizer, dtype in itertools.product(REGULARIZERS, (torch.float32, torch.float64)):
        title = f"{regularizer} {str(dtype).removeprefix('torch.')}"
        for kind, parts in PARTS[dist.get_world_size()].items():
            for objective in (Term, Loss) if kind == "even" else (Term,):
                name = f"{title} {objective.__name__} {kind}"
                value, errors[f"{name} gradient"] = errors_of(objective, regularizer, parts, dtype)
                if objective is Term:  # the loss as a whole also holds the local reconstruction
                    errors[f"{name} value"] = value
        accumulation = {1: 4, 2: 2, 4: 2}[dist.get_world_size()]
        name = f"{title} Loss accumulated exactly gradient"
        errors[name] = error_of_accumulation(regularizer, accumulation, dtype)
        if dist.get_world_size() == 2 and dtype is torch.float64:
            for objective, parts in ((Loss, [6, 6]), (Term, [9, 3])):
                _, error = errors_of(objective, regularizer, parts, dtype, sharded)
                errors[f"{title} {objective.__name__} sharded gradient"] = error
    if dist.get_world_size() > 1:
        counts = {regularizer: all_reduces(regularizer) for regularizer in REGULARIZERS}
        assert all(count == [1, 0] for count in counts.values()), counts
    if dist.get_world_size() == 2:
        expected, found = weights_after_three_steps(replicated), weights_after_three_steps(sharded)
        errors["three steps sharded float32 weights"] = ((found - expected).norm() / expected.norm()).item()
        expected, found = measures_of_a_look(replicated), measures_of_a_look(sharded)
        if dist.get_rank() == 0:
            errors["measures sharded float32"] = ((found - expected).abs() / expected.abs().clamp(min=0.1)).max().item()
    if dist.get_rank() == 0:  # alone, in evaluation mode: must not wait for the others
        UMAEForPreTraining(fresh_config()).eval()(torch.randn(2, 3, 16, 16))
        with open(report, "w") as file:
            json.dump(errors, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
