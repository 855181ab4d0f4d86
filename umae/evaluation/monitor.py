"""What is learned, while it is learned: measures of the features of a few images that stay the same.

Nothing here changes a weight of the model or a random number of training.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import layer_norm
from transformers import BaseImageProcessor

from configuration_umae import UMAEConfig
from image_processing_umae import UnreadableImage
from umae import seeding
from umae.data.batches import Plan
from umae.data.images import Images
from umae.data.inputs import device_inputs, normalize
from umae.data.streaming import Stream
from umae.evaluation.diagnosis import VIEWS, Diagnosis
from umae.evaluation.linear import knn_classify
from umae.evaluation.online import MemoryBank, OnlineClassifier
from umae.evaluation.reconstruction import SHOWN, reconstructions
from umae.speed import encoder_flops, training_flops

MOST_IMAGES = 512  # that are looked at
SHARE = 0.01  # of training's arithmetic, by default
OBSERVED_STEPS = 2  # the online classifier learns from every second step: on tiny models each would cost 1.5 %
BANK = 16_384  # training features among which neighbours are sought, as many as there are images at most
NEIGHBOURS = 20


def usual_steps(config: UMAEConfig, plan: Plan, count: int) -> int:
    """Steps from one look to the next with which looking takes SHARE of training's arithmetic.

    Args:
        count: images that are looked at.
    """
    patches, trained = config.grid[0] * config.grid[1], training_flops(config)
    visible = patches - config.num_hidden_patches
    views = encoder_flops(config, patches) + (VIEWS - 1) * encoder_flops(config, visible)
    gradients = 2 * plan.batch_size * plan.processes * trained
    return math.ceil((count * views + gradients) / (SHARE * plan.images_per_step * trained))


def classes_of(train: Images | Stream, probe_images: Images | Stream) -> int | None:
    """How many classes both data sets have labels of; None without labels, or with labels that do not agree."""
    if isinstance(train, Stream) or isinstance(probe_images, Stream) or train.label_names != probe_images.label_names:
        return None
    try:
        highest = max(int(train.labels().max()), int(probe_images.labels().max()))
    except ValueError:
        return None
    count = len(train.label_names or range(highest + 1))
    return count if count >= 2 and highest < count else None


@dataclass(frozen=True)
class ProbeImages:
    """The images that are looked at: `count` of them, this process' share in batches of one size.

    Every process has as many batches as any other, with the first images again at the end.

    Args:
        pixel_values: uint8 (batches, batch, channels, height, width).
        index: int64 (batches, batch), in their data set.
        readable: bool (batches, batch).
        labels: int64 (count,), None if there are none.
        trained_on: int64 (count,), where they are among the training images; None if they are held out.
    """

    count: int
    pixel_values: torch.Tensor
    index: torch.Tensor
    readable: torch.Tensor
    labels: torch.Tensor | None
    trained_on: torch.Tensor | None = None


def prepare_probe_images(
    accelerator: Accelerator,
    images: Images | Stream,
    processor: BaseImageProcessor,
    size: tuple[int, int],
    batch_size: int,
    with_labels: bool,
    seed: int,
    trained_on: bool = False,
) -> ProbeImages:
    """Read this process' share of at most MOST_IMAGES; of a stream the first that it gives.

    Args:
        trained_on: `images` are those that the model is trained on.
    """
    # Each is read by one process, but a stream only as a whole
    streamed = dict(images.sample(seed, MOST_IMAGES)) if isinstance(images, Stream) else {}
    indices = list(streamed) or images.spread(MOST_IMAGES, seed)
    count, processes = len(indices), accelerator.num_processes
    batch_size = min(batch_size, math.ceil(count / processes))
    batches = math.ceil(count / (batch_size * processes))
    indices = torch.tensor(indices)
    index = indices[torch.arange(batches * processes * batch_size) % count]
    index = index.view(batches, processes, batch_size)[:, accelerator.process_index]
    pixel_values = torch.zeros(*index.shape, 3, *size, dtype=torch.uint8)
    readable = torch.zeros(index.shape, dtype=torch.bool)
    for position in np.ndindex(*index.shape):
        try:
            image = streamed[int(index[position])] if streamed else images.read(int(index[position]))
        except UnreadableImage:
            continue
        prepared = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        pixel_values[position], readable[position] = prepared[0].round().clamp(0, 255).byte(), True
    labels = images.labels()[indices] if with_labels else None
    return ProbeImages(count, pixel_values, index, readable, labels, indices if trained_on else None)


class Monitor:
    """Looks at a model that is being trained.

    Args:
        probe_images: what it is shown.
        train_labels: int64 (N,), the labels of the training images, None for no online classifier.
        num_classes: of those labels.
        processor: has the images' mean and standard deviation.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: UMAEConfig,
        probe_images: ProbeImages,
        train_labels: torch.Tensor | None,
        num_classes: int | None,
        processor: BaseImageProcessor,
        seed: int,
    ):
        self.accelerator, self.config, self.probe_images, self.seed = accelerator, config, probe_images, seed
        self.num_classes = num_classes
        self.mean, self.std = processor.image_mean, processor.image_std
        self.train_labels = self.classifier = self.bank = None
        if num_classes is not None:
            self.train_labels = train_labels.to(accelerator.device)
            self.classifier = OnlineClassifier(num_classes, config.hidden_size, accelerator)
            self.bank = MemoryBank(min(BANK, len(train_labels)), accelerator)

    def observe(self, features: torch.Tensor, index: torch.Tensor) -> None:
        """Train the online classifier on a micro-batch, and remember its features; see `train_step`."""
        if self.classifier is not None:
            index = index.to(self.accelerator.device, non_blocking=True)
            self.classifier.update(features, self.train_labels[index])
            self.bank.update(features, index)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All it needs to continue with what it has observed, on the CPU; every process calls it."""
        if self.classifier is None:
            return {}
        return self.classifier.tensors() | {name: tensor.cpu() for name, tensor in self.bank.gathered().items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` returned."""
        if self.classifier is not None and tensors:
            bank = {name: tensor for name, tensor in tensors.items() if name.startswith("bank_")}
            self.classifier.restore({name: tensor for name, tensor in tensors.items() if name not in bank})
            if bank:  # checkpoints of older versions have none
                self.bank.restore(bank)

    def evaluate(self, model: nn.Module, batch: dict, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Every process calls it; the main one gets the measures, by name, and reconstructions to look at.

        Args:
            model: as prepared by the accelerator, in training mode; left as it is.
            batch: a micro-batch, on which the gradients of the two terms are compared.
            step: optimiser steps so far.

        Returns:
            Measures, each as `name_pooling` (see `Diagnosis`), `online_top1` and `online_knn_top1` if labels have been
            observed, in 0..1, and the gradients' norms; and what `reconstructions` returns.
        """
        values = self.gradient_norms(model, batch, step)
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # other shapes than training's are not worth compiling
            encoded = torch.cat([self._encode(model, position) for position in range(len(self.probe_images.index))])
            encoded = encoded[: self.probe_images.count]
            shown = self._reconstruct(model)
        model.train()
        bank = {} if self.bank is None else self.bank.gathered()
        return (self._measures(encoded.cpu(), bank) | values, shown) if self.accelerator.is_main_process else ({}, {})

    def gradient_norms(self, model: nn.Module, batch: dict, step: int) -> dict[str, float | None]:
        """How strongly either term, with its weight, pulls at the encoder: norms of their gradients for a micro-batch.

        None if it is not finite, as may happen in fp16.
        """
        encoder = self.accelerator.unwrap_model(model).vit
        weight, patches = self.config.uniformity_weight, self.config.grid[0] * self.config.grid[1]
        inputs = device_inputs(batch, self.accelerator.device, patches, self.seed, self.mean, self.std)
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        scale /= self.accelerator.gradient_accumulation_steps  # what `backward` multiplies by
        norms = {}
        for name, weights in {"reconstruction": (1.0, 0.0), "uniformity": (0.0, weight)}.items():
            seeding.seed_forward(self.seed, step, 0, self.accelerator.process_index)
            output = model(inputs[0], noise=inputs[1])
            # Both terms, so that every parameter has a gradient, as DistributedDataParallel expects
            self.accelerator.backward(weights[0] * output.reconstruction_loss + weights[1] * output.uniformity_loss)
            norm = nn.utils.get_total_norm([p.grad for p in encoder.parameters() if p.grad is not None])
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item() / scale
            norms[f"grad_norm_{name}"] = norm if math.isfinite(norm) else None
            model.zero_grad()
        return norms

    @torch.no_grad()
    def _encode(self, model: nn.Module, position: int) -> torch.Tensor:
        """One batch of every process, (all their images, 2 * VIEWS + 1, D): as `encode_views`, then what the online
        classifier sees."""
        pixel_values, index = self._batch(position)
        patches, views = self.config.grid[0] * self.config.grid[1], []
        for view in range(VIEWS):
            noise = seeding.uniform(0, seeding.MASK, view, index, patches)
            output = model(pixel_values, noise=noise, mask_ratio=None if view else 0.0, features_only=True)
            tokens, width = output.last_hidden_state, self.config.hidden_size
            mean = tokens[:, 1:].float().mean(dim=1)
            mean = output.features if self.config.pooling == "mean" else layer_norm(mean, (width,), eps=1e-6)
            views += [tokens[:, 0].float(), mean.float()]
            if view == 0:
                whole = output.features.float()
        encoded = torch.stack([*views, whole], dim=1)
        readable = self.probe_images.readable[position].to(encoded.device)
        return self.accelerator.gather(encoded.where(readable[:, None, None], torch.nan))

    def _batch(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.accelerator.device
        pixel_values = normalize(self.probe_images.pixel_values[position].to(device), self.mean, self.std)
        return pixel_values, self.probe_images.index[position].to(device)

    @torch.no_grad()
    def _reconstruct(self, model: nn.Module) -> dict[str, np.ndarray]:
        pixel_values, index = (values[:SHOWN] for values in self._batch(0))
        noise = seeding.uniform(0, seeding.MASK, 1, index, self.config.grid[0] * self.config.grid[1])
        output = model(pixel_values, noise=noise, output_logits=True)
        return reconstructions(output, pixel_values, self.config, self.mean, self.std)

    def _measures(self, encoded: torch.Tensor, bank: dict[str, torch.Tensor]) -> dict[str, float]:
        diagnosis, values = Diagnosis(), {}
        diagnosis.add(encoded[:, : 2 * VIEWS])
        if diagnosis.count == 0:  # a run does not end for want of something to look at
            return values
        for pooling, measures in diagnosis.measures().items():
            values |= {f"{name}_{pooling}": value for name, value in measures.items()}
        if not bank or bank["bank_index"].numel() < 2:
            return values
        readable = encoded.isfinite().all(dim=(1, 2))
        features, labels = encoded[readable, -1].to(self.accelerator.device), self.probe_images.labels[readable]
        scores = {
            "online_top1": self.classifier.scores(features),
            "online_knn_top1": self._votes(features, readable, bank),
        }
        hits = {name: votes.argmax(dim=1).cpu() == labels for name, votes in scores.items()}
        return values | {name: hit.double().mean().item() for name, hit in hits.items()}

    def _votes(self, features: torch.Tensor, readable: torch.Tensor, bank: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, D) -> (N, C), of the nearest features in the memory bank but those of the same image."""
        index, same = bank["bank_index"].flatten(), None
        if self.probe_images.trained_on is not None:
            same = self.probe_images.trained_on[readable].to(index.device)[:, None] == index
        labels, known = self.train_labels[index], bank["bank_features"].flatten(0, 1)
        return knn_classify(known, labels, features, self.num_classes, NEIGHBOURS, same=same)
