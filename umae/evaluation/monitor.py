"""Evaluation during training: measures of the features of a fixed set of images, the probe images.

Nothing here changes the model's weights or the random numbers of the training.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import layer_norm
from transformers import ViTImageProcessorPil

from configuration_umae import UMAEConfig
from image_processing_umae import UnreadableImage
from modeling_umae import patchify, reconstruction_loss
from umae import seeding
from umae.data.batches import Plan
from umae.data.decoding import reading_of, stacked
from umae.data.images import Images
from umae.data.inputs import device_inputs, evaluation_pixels, normalize, on_device
from umae.data.streaming import Stream
from umae.evaluation.collapse import effective_rank
from umae.evaluation.diagnosis import POOLINGS, VIEWS, Diagnosis, untrained_encoder
from umae.evaluation.features import frozen_features
from umae.evaluation.linear import knn_classify
from umae.evaluation.online import MemoryBank, OnlineClassifier
from umae.evaluation.reconstruction import FIGURE_IMAGES, reconstructions
from umae.speed import encoder_flops, training_flops

MOST_IMAGES = 512  # probe images
SHARE = 0.01  # of the time, by default
OBSERVED_STEPS = 2  # the online classifier is trained at every second step: every step would cost a tiny model 1.5 %
BANK = 16_384  # training features kept for k-NN, at most one per training image
NEIGHBOURS = 20  # k of k-NN


def estimated_steps(config: UMAEConfig, plan: Plan, count: int, held_out: bool) -> int:
    """Steps between evaluations with which these take SHARE of the training's FLOPs: of the time at the least, as
    statistics on the CPU and images to save come on top.

    Args:
        count: number of probe images.
        held_out: whether they are reconstructed, which takes about a third of training on them.
    """
    patches, trained = config.grid[0] * config.grid[1], training_flops(config)
    visible = patches - config.num_hidden_patches
    views = encoder_flops(config, patches) + (VIEWS - 1) * encoder_flops(config, visible)
    views += trained // 3 if held_out else 0
    gradients = 2 * plan.batch_size * plan.processes * trained
    return math.ceil((count * views + gradients) / (SHARE * plan.images_per_step * trained))


def measured_steps(accelerator: Accelerator, evaluation: float, step: float) -> int:
    """Steps between evaluations with which these take SHARE of the time, as the main process has measured it; every
    process must call this.

    Args:
        evaluation, step: seconds that each of them takes.
    """
    (steps,) = broadcast_object_list([math.ceil(evaluation / (SHARE * step))])
    return steps


def classes_of(train: Images | Stream, probe_images: Images | Stream) -> int | None:
    """The number of classes that both data sets share; None if one has no labels, or if the classes differ."""
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
    """This process' share of the probe images, in batches of equal size.

    Every process has the same number of batches: the first images repeat at the end.

    Args:
        count: number of probe images on all processes together.
        pixel_values: (batches, batch, channels, height, width), uint8, or float32 in 0..1.
        index: int64 (batches, batch), indices in their data set.
        readable: bool (batches, batch).
        labels: int64 (count,), None without labels.
        trained_on: int64 (count,), their indices among the training images; None if they are held out.
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
    processor: ViTImageProcessorPil,
    size: tuple[int, int],
    batch_size: int,
    with_labels: bool,
    seed: int,
    trained_on: bool = False,
) -> ProbeImages:
    """Read this process' share of at most MOST_IMAGES images; of a stream, its first readable ones.

    Args:
        with_labels: `images` is not a stream, and its labels are needed.
        trained_on: `images` are the training images.
    """
    images = images.read_as(reading_of(processor))
    streamed = dict(images.sample(seed, MOST_IMAGES)) if isinstance(images, Stream) else {}  # read by every process
    indices = torch.tensor(list(streamed) if isinstance(images, Stream) else images.spread(MOST_IMAGES, seed))
    count, processes = len(indices), accelerator.num_processes
    batch_size = min(batch_size, math.ceil(count / processes))
    batches = math.ceil(count / (batch_size * processes))
    index = indices[torch.arange(batches * processes * batch_size) % count]
    index = index.view(batches, processes, batch_size)[:, accelerator.process_index]
    channels = images.reading.num_channels
    prepared = [torch.zeros(channels, *size, dtype=torch.uint8)] * index.numel()
    readable = torch.zeros(index.shape, dtype=torch.bool)
    for position, i in enumerate(index.flatten().tolist()):
        try:
            image = streamed[i] if isinstance(images, Stream) else images.read(i)
        except UnreadableImage:
            continue
        prepared[position], readable.view(-1)[position] = evaluation_pixels(processor, image), True
    pixel_values = stacked(prepared).view(*index.shape, channels, *size)
    labels = images.labels()[indices] if with_labels and isinstance(images, Images) else None
    return ProbeImages(count, pixel_values, index, readable, labels, indices if trained_on else None)


class Monitor:
    """Evaluates a model on the probe images during its training.

    Args:
        probe_images: this process' share of them.
        train_labels: int64 (N,), the labels of the training images; None for no online classifier and no k-NN.
        num_classes: of those labels; None together with them.
        processor: provides the mean and standard deviation that normalise the images.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: UMAEConfig,
        probe_images: ProbeImages,
        train_labels: torch.Tensor | None,
        num_classes: int | None,
        processor: ViTImageProcessorPil,
        seed: int,
    ):
        self.accelerator, self.config, self.probe_images, self.seed = accelerator, config, probe_images, seed
        self.mean, self.std = processor.image_mean, processor.image_std
        self.train_labels: torch.Tensor | None = None
        self.classifier: OnlineClassifier | None = None
        self.bank: MemoryBank | None = None
        if num_classes is not None and train_labels is not None:
            self.train_labels = train_labels.to(accelerator.device)
            self.classifier = OnlineClassifier(num_classes, config.hidden_size, accelerator)
            self.bank = MemoryBank(min(BANK, len(train_labels)), accelerator)

    def observe(self, features: torch.Tensor, index: torch.Tensor) -> None:
        """Train the online classifier on a micro-batch, and add its features to the memory bank; see `train_step`."""
        if self.classifier is None or self.bank is None or self.train_labels is None:
            return
        index = index.to(self.accelerator.device, non_blocking=True)
        self.classifier.update(features, self.train_labels[index])
        self.bank.update(features, index)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state of the online classifier and the memory bank, on the CPU; every process must call this."""
        if self.classifier is None or self.bank is None:
            return {}
        return self.classifier.tensors() | {name: tensor.cpu() for name, tensor in self.bank.gathered().items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        if self.classifier is None or self.bank is None or not tensors:
            return
        bank = {name: tensor for name, tensor in tensors.items() if name.startswith("bank_")}
        self.classifier.restore({name: tensor for name, tensor in tensors.items() if name not in bank})
        if bank:  # checkpoints of older versions have none
            self.bank.restore(bank)

    def evaluate(
        self, model: nn.Module, batch: dict, step: int
    ) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
        """Evaluate the model on the probe images; every process must call this.

        Args:
            model: as prepared by the accelerator, in training mode; not changed.
            batch: a micro-batch for `gradient_norms`.
            step: optimiser steps done.

        Returns:
            On the main process: measures by name, those of `Diagnosis` as `name_pooling`, of images that are held out
            `heldout_reconstruction_loss`, `online_top1` and `online_knn_top1` in [0, 1] if labelled features have been
            observed, and the gradient norms; and the images of `reconstructions`. On the others nothing.
        """
        norms = self.gradient_norms(model, batch, step)
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiling for the shapes of the evaluation does not pay
            positions = range(len(self.probe_images.index))
            encoded = torch.cat([self._encode(model, position) for position in positions])
            losses = []
            if self.probe_images.trained_on is None:
                losses = [self._reconstruction_losses(model, position) for position in positions]
            images = self._reconstruct(model)
        model.train()
        bank = {} if self.bank is None else self.bank.gathered()
        if not self.accelerator.is_main_process:
            return {}, {}
        count = self.probe_images.count
        values: dict[str, float | None] = {**self._measures(encoded[:count].cpu(), bank), **norms}
        if losses and math.isfinite(loss := torch.cat(losses)[:count].nanmean().item()):
            values["heldout_reconstruction_loss"] = loss
        return values, images

    @torch.no_grad()
    def untrained_ranks(self) -> dict[str, float]:
        """Effective ranks, by pooling, of an encoder like the model's before its first step, for comparison.

        On the main process; every process must call this. Empty if no probe image can be read.
        """
        encoder = untrained_encoder(self.config).to(self.accelerator.device).eval()
        parts = []
        for position in range(len(self.probe_images.index)):
            encoded = frozen_features(encoder, self._pixel_values(position)).float()
            readable = self.probe_images.readable[position].to(encoded.device)
            parts.append(self.accelerator.gather(encoded.where(readable[:, None, None], torch.nan)))
        encoded = torch.cat(parts)[: self.probe_images.count].cpu()
        encoded = encoded[encoded.isfinite().all(dim=(1, 2))]
        if not self.accelerator.is_main_process or not len(encoded):
            return {}
        return {pooling: effective_rank(encoded[:, column]) for column, pooling in enumerate(POOLINGS)}

    def gradient_norms(self, model: nn.Module, batch: dict, step: int) -> dict[str, float | None]:
        """Norms of the encoder's gradients of the two loss terms, each with its weight, for a micro-batch.

        They are `grad_norm_reconstruction` and, by the regularizer, `grad_norm_uniformity` or `grad_norm_coding_rate`.
        None for a norm that is not finite, as may happen in fp16.
        """
        encoder = self.accelerator.unwrap_model(model).vit
        weight, patches = self.config.uniformity_weight, self.config.grid[0] * self.config.grid[1]
        inputs = device_inputs(batch, self.accelerator.device, patches, self.seed, self.mean, self.std)
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        scale /= self.accelerator.gradient_accumulation_steps  # what `backward` multiplies by
        norms: dict[str, float | None] = {}
        regularizer = self.config.regularizer
        for name, weights in {"reconstruction": (1.0, 0.0), regularizer: (0.0, weight)}.items():
            seeding.seed_forward(self.seed, step, 0, self.accelerator.process_index)
            output = model(inputs[0], noise=inputs[1])
            # DistributedDataParallel expects a gradient of every parameter, so the other term has weight 0
            self.accelerator.backward(
                weights[0] * output.reconstruction_loss + weights[1] * output[f"{regularizer}_loss"]
            )
            norm = nn.utils.get_total_norm([p.grad for p in encoder.parameters() if p.grad is not None])
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item() / scale
            norms[f"grad_norm_{name}"] = norm if math.isfinite(norm) else None
            model.zero_grad()
        return norms

    @torch.no_grad()
    def _encode(self, model: nn.Module, position: int) -> torch.Tensor:
        """(images of one batch of every process, 2 * VIEWS + 1, D): as `encode_views`, then the training feature."""
        pixel_values, views = self._pixel_values(position), []
        for view in range(VIEWS):
            noise = self._noise(position, view)
            output = model(pixel_values, noise=noise, mask_ratio=None if view else 0.0, features_only=True)
            tokens, width = output.last_hidden_state, self.config.hidden_size
            mean = tokens[:, 1:].float().mean(dim=1)
            mean = output.features if self.config.pooling == "mean" else layer_norm(mean, (width,), eps=1e-6)
            views += [tokens[:, 0].float(), mean.float()]
            if view == 0:
                training_feature = output.features.float()
        encoded = torch.stack([*views, training_feature], dim=1)
        readable = self.probe_images.readable[position].to(encoded.device)
        return self.accelerator.gather(encoded.where(readable[:, None, None], torch.nan))

    @torch.no_grad()
    def _reconstruction_losses(self, model: nn.Module, position: int) -> torch.Tensor:
        """(images of one batch of every process,), each under one mask that stays the same; NaN where unreadable."""
        pixel_values = self._pixel_values(position)
        output = model(pixel_values, noise=self._noise(position, 1), output_logits=True)
        target = patchify(pixel_values, self.config.patch_height_width)
        of_image = partial(reconstruction_loss, norm_pix_loss=self.config.norm_pix_loss)
        losses = torch.vmap(of_image)(output.logits.float(), target, output.mask)
        readable = self.probe_images.readable[position].to(losses.device)
        return self.accelerator.gather(losses.where(readable, torch.nan))

    def _pixel_values(self, position: int) -> torch.Tensor:
        """(batch, channels, height, width), normalised, on the device."""
        pixel_values = on_device(self.probe_images.pixel_values[position], self.accelerator.device)
        return normalize(pixel_values, self.mean, self.std)

    def _noise(self, position: int, view: int) -> torch.Tensor:
        """(batch, patches), on the device."""
        patches = self.config.grid[0] * self.config.grid[1]
        noise = seeding.uniform(0, seeding.MASK, view, self.probe_images.index[position], patches)
        return on_device(noise, self.accelerator.device)

    @torch.no_grad()
    def _reconstruct(self, model: nn.Module) -> dict[str, np.ndarray]:
        pixel_values, noise = self._pixel_values(0)[:FIGURE_IMAGES], self._noise(0, 1)[:FIGURE_IMAGES]
        output = model(pixel_values, noise=noise, output_logits=True)
        return reconstructions(output, pixel_values, self.config, self.mean, self.std)

    def _measures(self, encoded: torch.Tensor, bank: dict[str, torch.Tensor]) -> dict[str, float]:
        """Measures of `Diagnosis` and accuracies of the features (count, 2 * VIEWS + 1, D); NaN where unreadable."""
        diagnosis = Diagnosis()
        values: dict[str, float] = {}
        diagnosis.add(encoded[:, : 2 * VIEWS])
        if diagnosis.count == 0:  # training continues if no probe image can be evaluated
            return values
        for pooling, measures in diagnosis.measures().items():
            values |= {f"{name}_{pooling}": value for name, value in measures.items()}
        if self.classifier is None or not bank or bank["bank_index"].numel() < 2:
            return values
        assert self.probe_images.labels is not None
        readable = encoded.isfinite().all(dim=(1, 2))
        features, labels = encoded[readable, -1].to(self.accelerator.device), self.probe_images.labels[readable]
        scores = {
            "online_top1": self.classifier.scores(features),
            "online_knn_top1": self._votes(features, readable, bank),
        }
        hits = {name: votes.argmax(dim=1).cpu() == labels for name, votes in scores.items()}
        return values | {name: hit.double().mean().item() for name, hit in hits.items()}

    def _votes(self, features: torch.Tensor, readable: torch.Tensor, bank: dict[str, torch.Tensor]) -> torch.Tensor:
        """k-NN votes of the memory bank, without the features of the same image: (N, D) -> (N, C)."""
        assert self.classifier is not None and self.train_labels is not None
        index, same = bank["bank_index"].flatten(), None
        if self.probe_images.trained_on is not None:
            same = self.probe_images.trained_on[readable].to(index.device)[:, None] == index
        labels, known = self.train_labels[index], bank["bank_features"].flatten(0, 1)
        return knn_classify(known, labels, features, self.classifier.num_classes, NEIGHBOURS, same=same)
