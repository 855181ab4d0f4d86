"""What learns from the features of training beside the model, and does not touch it."""

from collections import deque

import torch
from accelerate import Accelerator
from torch import nn

from umae.evaluation.linear import EPSILON, cross_entropy_gradient

LEARNING_RATE, DECAY = 3e-3, 0.99  # of Adam; of the running means


class OnlineClassifier:
    """A linear classifier trained on features while they are learned, by an optimiser of its own.

    It sees features without their gradient, so that nothing flows back into what makes them, as in the original's
    online evaluation; but there the model's own optimiser trains the classifier at every step, and here it is Adam with
    a rate of its own, at every second step. They are standardised by running means, without which a collapsed feature,
    whose differences are small beside what all images have in common, would look worse than it is. All processes hold
    the same classifier.

    Args:
        num_classes: C.
        width: D.
        accelerator: adds up what the processes find, at each update with one all-reduce of (C + 2) * (D + 1) numbers.
    """

    def __init__(self, num_classes: int, width: int, accelerator: Accelerator):
        self.accelerator = accelerator
        # The last column is the bias; running mean and variance of the features, and what their weights lack of 1
        self.weight = nn.Parameter(torch.zeros(num_classes, width + 1, device=accelerator.device))
        self.means, self.lacks = torch.zeros(2, width, device=accelerator.device), 1.0
        self.optimizer = torch.optim.Adam([self.weight], lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """One step of the optimiser.

        Args:
            features: (batch, D), of this process; every process calls it with as many.
            labels: int64 (batch,), in [0, num_classes).
        """
        features = features.detach().float()
        inputs = self._standardised(features)
        gradient = cross_entropy_gradient(inputs @ self.weight.T, labels).T @ inputs
        near = self.means[0] / (1 - self.lacks) if self.lacks < 1 else 0.0
        means = torch.stack([features.mean(dim=0), (features - near).square().mean(dim=0)])
        shared = torch.cat([gradient.flatten(), means.flatten()])
        if self.accelerator.num_processes > 1:
            shared = self.accelerator.reduce(shared, "mean")
        self.weight.grad = shared[: gradient.numel()].view_as(gradient)
        self.optimizer.step()
        means = shared[gradient.numel() :].view_as(means)
        means[1] -= (means[0] - near).square()  # of about 0, where the variance may be small beside the mean
        self.means.lerp_(means, 1 - DECAY)
        self.lacks *= DECAY

    @torch.no_grad()
    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, C), the logits."""
        return self._standardised(features.to(self.weight.device).float()) @ self.weight.T

    def _standardised(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D + 1), the last column 1."""
        if self.lacks < 1:
            mean, variance = self.means / (1 - self.lacks)
            features = (features - mean) * (variance.clamp(min=0) + EPSILON).rsqrt()
        return nn.functional.pad(features, (0, 1), value=1.0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All it needs to continue, on the CPU."""
        state = self.optimizer.state.get(self.weight, {})
        found = {
            "weight": self.weight.detach(),
            "means": self.means,
            "lacks": torch.tensor(self.lacks, dtype=torch.float64),
        }
        return {name: tensor.cpu() for name, tensor in (found | state).items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` returned."""
        tensors = {name: tensor.to(self.weight.device) for name, tensor in tensors.items()}
        self.weight.data.copy_(tensors.pop("weight"))
        self.means.copy_(tensors.pop("means"))
        self.lacks = tensors.pop("lacks").item()
        self.optimizer.state[self.weight] = tensors


class MemoryBank:
    """The newest features that training has made, for nearest neighbours (Wu et al. 2018, section 3.2).

    Every process keeps its own, whole micro-batches of them, without a word to the others. All together they hold
    `4 * size * D` bytes: 50 MB for 16,384 features of ViT-B.

    Args:
        size: most features of all processes together, but one micro-batch is always held.
    """

    def __init__(self, size: int, accelerator: Accelerator):
        self.size, self.accelerator = size, accelerator
        self.batches: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # oldest first

    def update(self, features: torch.Tensor, index: torch.Tensor) -> None:
        """Take in a micro-batch, and let go of the oldest.

        Args:
            features: (batch, D), of this process; every process calls it with as many.
            index: int64 (batch,), of the images, on the same device.
        """
        self.batches.append((features.detach().float().clone(), index))
        if len(self.batches) > max(1, self.size // (len(index) * self.accelerator.num_processes)):
            self.batches.popleft()

    def gathered(self) -> dict[str, torch.Tensor]:
        """What all processes hold, every one of which calls it; nothing if there is nothing yet.

        Returns:
            `bank_features` (micro-batches, batch, D) and `bank_index` int64 (micro-batches, batch), oldest first, the
            processes one after the other in every micro-batch.
        """
        if not self.batches:
            return {}
        mine = (torch.stack(column)[None] for column in zip(*self.batches, strict=True))
        features, index = (self.accelerator.gather(tensor).transpose(0, 1).flatten(1, 2) for tensor in mine)
        return {"bank_features": features, "bank_index": index}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `gathered` returned, the part of this process of it."""
        accelerator = self.accelerator
        columns = (tensors[name].to(accelerator.device) for name in ("bank_features", "bank_index"))
        mine = (column.tensor_split(accelerator.num_processes, dim=1)[accelerator.process_index] for column in columns)
        self.batches = deque(zip(*mine, strict=True))
