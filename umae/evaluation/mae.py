"""Linear probing by MAE's protocol: the encoder runs at every step, on new random crops.

He et al. 2022, appendix A.1 and table 9; facebookresearch/mae, `main_linprobe.py`: batch norm without a learned scale,
a linear layer, LARS without weight decay, random resized crops and flips.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import ViTImageProcessorPil

from modeling_umae import UMAEModel
from umae.data.batches import CROP_SCALE, Plan, TrainingImages, check_fills_a_step, decode_all, training_loader
from umae.data.decoding import reading_of
from umae.data.images import Images
from umae.data.inputs import flipped_and_normalized, on_device
from umae.evaluation.features import frozen_features, weights_hash
from umae.evaluation.linear import LinearHead, cross_entropy_gradient
from umae.files import read_tensors, write_tensors
from umae.progress_bar import progress_bar
from umae.speed import compile_model
from umae.training.hardware import fast_attention
from umae.training.schedules import learning_rate_at

EPSILON = 1e-6  # of the batch norm
BATCH_SHARE = 0.1  # of a batch in the running mean and variance
INIT_STD = 0.01
MOMENTUM, TRUST = 0.9, 0.001  # of LARS
ENCODER_BATCH = 64  # images per forward pass: few enough for a CPU's caches, enough for a GPU
PROTOCOL = {
    "head": f"batch norm without scale and shift (epsilon {EPSILON:g}, over the batch of all processes), then linear",
    "initialisation": f"weights truncated normal with standard deviation {INIT_STD}, biases 0",
    "optimiser": f"LARS, momentum {MOMENTUM}, trust coefficient {TRUST}, no weight decay",
    "augmentation": f"random resized crops of {CROP_SCALE:.0%} to 100 % of the area, bicubic, and flips",
}


@dataclass(frozen=True)
class ProbeSchedule:
    """Lengths in epochs; `base_learning_rate` is for 256 images per step, and scaled with the batch size."""

    epochs: int = 90
    warmup_epochs: float = 10
    base_learning_rate: float = 0.1

    def learning_rate(self, step: int, plan: Plan) -> float:
        per_epoch, peak = plan.steps_per_epoch, self.base_learning_rate * plan.images_per_step / 256
        return learning_rate_at(step, self.epochs * per_epoch, self.warmup_epochs * per_epoch, peak)


class BatchNormHead:
    """Batch norm without a learned scale, a linear layer, and LARS (You, Gitman & Ginsburg 2017) to train it.

    Before the momentum, LARS scales the gradient of the weights by `TRUST * |weights| / |gradient|`; not the biases'.
    """

    def __init__(self, num_classes: int, width: int, seed: int, device: torch.device, dtype=torch.float32):
        weight = torch.empty(num_classes, width)
        torch.nn.init.trunc_normal_(weight, std=INIT_STD, generator=torch.Generator().manual_seed(seed))
        self.weight = weight.to(device, dtype)
        self.bias = torch.zeros(num_classes, device=device, dtype=dtype)
        self.momenta = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.mean, self.variance = torch.zeros_like(self.weight[0]), torch.ones_like(self.weight[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state to continue from, as references: copying into these tensors restores it."""
        names = ("weight", "bias", "weight_momentum", "bias_momentum", "mean", "variance")
        return dict(zip(names, (self.weight, self.bias, *self.momenta, self.mean, self.variance), strict=True))

    def step(self, features: torch.Tensor, labels: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """One LARS step on (batch, D) and int64 (batch,), the same on every process; the cross entropy before it."""
        variance, mean = torch.var_mean(features, dim=0, correction=0)
        self.mean.lerp_(mean, BATCH_SHARE)
        self.variance.lerp_(variance * len(features) / max(len(features) - 1, 1), BATCH_SHARE)
        inputs = (features - mean) * (variance + EPSILON).rsqrt()
        logits = torch.addmm(self.bias, inputs, self.weight.T)
        error = cross_entropy_gradient(logits, labels)
        gradient = error.T @ inputs
        lengths = self.weight.norm(), gradient.norm()
        trust = torch.where((lengths[0] > 0) & (lengths[1] > 0), TRUST * lengths[0] / lengths[1], 1.0)
        updates = gradient * trust, error.sum(dim=0)
        for parameter, momentum, update in zip((self.weight, self.bias), self.momenta, updates, strict=True):
            momentum.mul_(MOMENTUM).add_(update)
            parameter.sub_(learning_rate * momentum)
        return torch.nn.functional.cross_entropy(logits, labels)

    def folded(self, chosen: dict[str, float]) -> LinearHead:
        """The head in evaluation mode (running mean and variance) as one linear layer of the raw features."""
        weight = self.weight * (self.variance + EPSILON).rsqrt()
        return LinearHead(weight, self.bias - weight @ self.mean, chosen)


def train_mae_probe(
    encoder: UMAEModel,
    images: Images,
    processor: ViTImageProcessorPil,
    num_classes: int,
    schedule: ProbeSchedule,
    plan: Plan,
    num_workers: int,
    accelerator: Accelerator,
    state: Path,
    torch_compile: bool = False,
    evaluate: Callable[[str, LinearHead], float] | None = None,
) -> tuple[dict[str, LinearHead], dict[str, Any]]:
    """A head on the class token and one on the mean of the patch tokens, trained side by side.

    Every process encodes its share of a batch and takes the same step on the whole batch. Called again after an
    interruption, it continues after the last complete epoch, with bit-identical results.

    Args:
        encoder: loaded with `pooling="mean"`; runs frozen, in the accelerator's precision.
        plan: which images every process gets at every step; its seed is also that of the heads.
        state: file of the training state, in a folder that all processes share; replaced after every epoch.
        torch_compile: compile every layer of the encoder.
        evaluate: called with a feature's name and its head after every epoch; returns the head's top-1 in percent.

    Returns:
        The heads by `cls` and `mean`, and a record: effective batch size, steps, peak learning rate, the encoder's
            precision, mean loss and top-1 of every epoch.

    Raises:
        ValueError: there are fewer images than a batch, the warm-up is not shorter than the training, or `state` is of
            another probe.
    """
    device = accelerator.device
    check_fills_a_step(plan, images.description)
    if schedule.warmup_epochs >= schedule.epochs:
        raise ValueError(
            f"warmup_epochs {schedule.warmup_epochs:g} must be less than num_train_epochs {schedule.epochs}; lower it"
        )
    labels = images.labels().to(device)
    heads = {
        name: BatchNormHead(num_classes, encoder.config.hidden_size, plan.seed, device) for name in ("cls", "mean")
    }
    encoder = copy.deepcopy(encoder).to(device).eval()  # the caller's is not changed
    encoder.set_attn_implementation(fast_attention(accelerator))
    if torch_compile:
        compile_model(encoder, "layers")
    done, total = 0, schedule.epochs * plan.steps_per_epoch
    losses = torch.zeros(total, len(heads), device=device)
    top1 = torch.zeros(schedule.epochs, len(heads))
    tensors = {f"{name}.{key}": tensor for name, head in heads.items() for key, tensor in head.tensors().items()}
    identity = {
        "weights": weights_hash(encoder),
        "pictures": images.fingerprint(),
        "preprocessing": processor.to_json_string(),
        "mixed_precision": accelerator.mixed_precision,
        "schedule": asdict(schedule),
        "pictures_per_step": plan.images_per_step,
        "seed": plan.seed,
    }
    if state.exists():
        saved = read_tensors(state, identity)
        saved_losses = saved.pop("losses")
        done = len(saved_losses)
        losses[:done] = saved_losses
        saved_top1 = saved.pop("top1", top1[:0])  # older ones have none
        top1[: len(saved_top1)] = saved_top1
        for name, tensor in saved.items():
            tensors[name].copy_(tensor)
    bar = progress_bar(
        total=total, initial=done, desc="linear probe", unit="step", disable=not accelerator.is_main_process
    )
    batches = encoded_batches(encoder, images, processor, plan, done, total, num_workers, accelerator)
    for step in range(done, total):
        encoded, index = (torch.cat(parts) for parts in zip(*islice(batches, plan.accumulation), strict=True))
        learning_rate = schedule.learning_rate(step, plan)
        for column, head in enumerate(heads.values()):
            losses[step, column] = head.step(encoded[:, column], labels[index], learning_rate)
        bar.update()
        if (step + 1) % plan.steps_per_epoch == 0:
            if not losses.isfinite().all():
                raise ValueError(f"the probe's loss was not finite by step {step + 1}; lower base_learning_rate")
            epoch = step // plan.steps_per_epoch
            if evaluate is not None:
                top1[epoch] = torch.tensor([evaluate(name, head.folded({})) for name, head in heads.items()])
                texts = [f"{name} {value:.2f}%" for name, value in zip(heads, top1[epoch].tolist(), strict=True)]
                bar.set_postfix_str(f"epoch {epoch + 1}: top-1 {', '.join(texts)}")
            if accelerator.is_main_process:
                progress = {"losses": losses[: step + 1], "top1": top1[: epoch + 1]}
                write_tensors(state, tensors | progress, identity)
    bar.close()
    means = losses.view(schedule.epochs, plan.steps_per_epoch, len(heads)).mean(dim=1)
    peak = schedule.base_learning_rate * plan.images_per_step / 256
    record: dict[str, Any] = {
        "pictures_per_step": plan.images_per_step,
        "steps": total,
        "learning_rate": peak,
        "mixed_precision": accelerator.mixed_precision,
        "epoch_losses": {name: means[:, column].tolist() for column, name in enumerate(heads)},
    }
    if evaluate is not None:
        record["epoch_top1"] = {name: top1[:, column].tolist() for column, name in enumerate(heads)}
    return {name: head.folded({"learning_rate": peak}) for name, head in heads.items()}, record


def encoded_batches(
    encoder: UMAEModel,
    images: Images,
    processor: ViTImageProcessorPil,
    plan: Plan,
    start_step: int,
    stop_step: int,
    num_workers: int,
    accelerator: Accelerator,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per micro-batch: features of new crops, (images of all processes, 2, D), and the images' indices, int64."""
    config, device = encoder.config, accelerator.device
    images = images.read_as(reading_of(processor))
    decoded = decode_all(images, show_progress=accelerator.is_main_process)
    crops = TrainingImages(images, config.image_height_width, plan.seed, decoded, CROP_SCALE)
    loader = training_loader(
        crops, plan, accelerator.process_index, start_step, stop_step, num_workers, pin_memory=device.type == "cuda"
    )
    for batch in loader:
        for reason in batch["refusals"].values():
            raise ValueError(f"{reason}: repair or remove this image; a probe uses every image")
        with torch.no_grad(), accelerator.autocast():
            pixels = flipped_and_normalized(batch, device, processor.image_mean, processor.image_std)
            parts = [frozen_features(encoder, part) for part in pixels.split(ENCODER_BATCH)]
            encoded = torch.cat(parts).float()
        yield accelerator.gather(encoded), accelerator.gather(on_device(batch["index"], device))
