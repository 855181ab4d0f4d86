"""Online evaluation: a classifier and a memory bank on the training features; neither changes the model."""

from collections import deque

import torch
from accelerate import Accelerator
from torch import nn

from umae.evaluation.linear import EPSILON, cross_entropy_gradient

LEARNING_RATE, DECAY = 3e-3, 0.99  # of Adam; of the running averages


class OnlineClassifier:
    """A linear classifier trained on the model's features during training, by its own optimiser.

    The features are detached, so no gradient reaches the model, as in the original code's online evaluation; there the
    model's optimiser trains the classifier at every step, here Adam with its own learning rate at every second step.
    The features are standardised by running averages: without them the accuracy of collapsed features, which differ
    little between images, would be too low. All processes hold the same classifier.

    Args:
        num_classes: C.
        width: D.
        accelerator: averages over the processes, at each update with one all-reduce of (C + 2) * (D + 1) numbers.
    """

    def __init__(self, num_classes: int, width: int, accelerator: Accelerator):
        self.num_classes, self.accelerator = num_classes, accelerator
        # The weight's last column is the bias. `lacks` is DECAY**steps, the bias of the running mean and variance
        self.weight = nn.Parameter(torch.zeros(num_classes, width + 1, device=accelerator.device))
        self.means, self.lacks = torch.zeros(2, width, device=accelerator.device), 1.0
        self.optimizer = torch.optim.Adam([self.weight], lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """One step of the optimiser.

        Args:
            features: (batch, D), of this process; every process calls this with the same batch size.
            labels: int64 (batch,), in [0, num_classes).
        """
        features = features.detach().float()
        inputs = self._standardised(features)
        gradient = cross_entropy_gradient(inputs @ self.weight.T, labels).T @ inputs
        center = self.means[0] / (1 - self.lacks) if self.lacks < 1 else 0.0
        means = torch.stack([features.mean(dim=0), (features - center).square().mean(dim=0)])
        averaged = torch.cat([gradient.flatten(), means.flatten()])
        if self.accelerator.num_processes > 1:
            averaged = self.accelerator.reduce(averaged, "mean")
        self.weight.grad = averaged[: gradient.numel()].view_as(gradient)
        self.optimizer.step()
        means = averaged[gradient.numel() :].view_as(means)
        means[1] -= (means[0] - center).square()  # variance about a value near the mean, which may be much larger
        self.means.lerp_(means, 1 - DECAY)
        self.lacks *= DECAY

    @torch.no_grad()
    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, C), the logits."""
        return self._standardised(features.to(self.weight.device).float()) @ self.weight.T

    def _standardised(self, features: torch.Tensor) -> torch.Tensor:
        """Standardised features and a column of ones: (N, D) -> (N, D + 1)."""
        if self.lacks < 1:
            mean, variance = self.means / (1 - self.lacks)
            features = (features - mean) * (variance.clamp(min=0) + EPSILON).rsqrt()
        return nn.functional.pad(features, (0, 1), value=1.0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state to continue from, on the CPU."""
        optimizer_state = self.optimizer.state.get(self.weight, {})
        state = {
            "weight": self.weight.detach(),
            "means": self.means,
            "lacks": torch.tensor(self.lacks, dtype=torch.float64),
        }
        return {name: tensor.cpu() for name, tensor in (state | optimizer_state).items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        self.lacks = tensors["lacks"].item()  # float64, which not every device has
        device = self.weight.device
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if name != "lacks"}
        self.weight.data.copy_(moved.pop("weight"))
        self.means.copy_(moved.pop("means"))
        self.optimizer.state[self.weight] = moved


class MemoryBank:
    """The newest training features, for k-NN (Wu et al. 2018, section 3.2).

    Every process keeps its own micro-batches, without communication. All processes together hold `4 * size * D` bytes:
    50 MB for 16,384 features of ViT-B.

    Args:
        size: largest number of features on all processes together; at least one micro-batch is always kept.
    """

    def __init__(self, size: int, accelerator: Accelerator):
        self.size, self.accelerator = size, accelerator
        self.batches: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # oldest first

    def update(self, features: torch.Tensor, index: torch.Tensor) -> None:
        """Add a micro-batch, and remove the oldest if there are too many.

        Args:
            features: (batch, D), of this process; every process calls this with the same batch size.
            index: int64 (batch,), the images' indices, on the same device.
        """
        self.batches.append((features.detach().float().clone(), index))
        if len(self.batches) > max(1, self.size // (len(index) * self.accelerator.num_processes)):
            self.batches.popleft()

    def gathered(self) -> dict[str, torch.Tensor]:
        """The features of all processes, which must all call this; empty before the first update.

        Returns:
            `bank_features` (micro-batches, batch, D) and `bank_index` int64 (micro-batches, batch), oldest first; in
            every micro-batch the processes in the order of their ranks.
        """
        if not self.batches:
            return {}
        stacked = (torch.stack(column)[None] for column in zip(*self.batches, strict=True))
        features, index = (self.accelerator.gather(tensor).transpose(0, 1).flatten(1, 2) for tensor in stacked)
        return {"bank_features": features, "bank_index": index}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `gathered` returned: this process keeps its own part."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        columns = (tensors[name].to(self.accelerator.device) for name in ("bank_features", "bank_index"))
        own = (column.tensor_split(processes, dim=1)[rank] for column in columns)
        self.batches = deque(zip(*own, strict=True))
