"""U-MAE: a masked autoencoder (He et al., 2022) whose features are kept from collapsing by a uniformity term.

    Zhang, Wang & Wang: "How Mask Matters: Towards Theoretical Understandings of Masked Autoencoders", NeurIPS 2022.

Written from the papers' equations for transformers 5. This file and `configuration_umae.py` import only the standard
library, torch and transformers, because they are saved with every model. The parameter names are those of the published
MAE checkpoints (`facebook/vit-mae-base`), which therefore load without conversion.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

# In a saved folder this module is part of a package: relative import. As a top-level module it needs the absolute one.
# Other import errors stay visible, because only a top-level module tries the second form.
try:
    from .configuration_umae import UMAEConfig
except ImportError:
    if __package__:
        raise
    from configuration_umae import UMAEConfig


# ----------------------------------------------------------------------------------------------------------------------
# The losses


def reconstruction_loss(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None, norm_pix_loss: bool = True
) -> torch.Tensor:
    """Mean squared error of the hidden patches (He et al., 2022, section 3).

    Args:
        logits: (batch, patches, pixels), the predicted patches.
        target: (batch, patches, pixels), the true patches, as `patchify` returns them.
        mask: (batch, patches), 1 where the patch was hidden, 0 where the encoder saw it. Only hidden patches count;
            without a mask all do.
        norm_pix_loss: compare with patches of zero mean and unit (unbiased) variance instead of raw pixels.

    Returns:
        A scalar, the mean over the hidden patches of the whole batch.
    """
    if norm_pix_loss:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    loss = ((logits - target) ** 2).mean(-1)  # (batch, patches)
    return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()


def uniformity_loss(
    features: torch.Tensor, across_processes: bool = True, second_moment: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Mean squared cosine of all pairs of features (the U-MAE term of Zhang, Wang & Wang, 2022).

    With the rows of `features` L2-normalised, `S = F F^T` over the global batch of N images, it is the mean of
    `S**2` over all N * N entries, the diagonal included. It lies between max(1/N, 1/D) (spread evenly) and 1 (all on
    one line), and is one over the participation ratio of the features: 0.25 says that they fill 4 dimensions.

    `||F F^T||^2 = ||F^T F||^2`, so processes exchange only their D x D matrices, in one all-reduce, for any N. The
    result is that of one process with all images, also when processes have different numbers of images. So is the
    gradient, after DDP or FSDP has averaged it over the processes: the backward pass multiplies by the number of
    processes to undo that average. (The original back-propagates through the features of one process only, so its
    gradient is this one divided by the number of processes.)

    Args:
        features: (batch, hidden_size). Half precisions are computed in float32; a row of zeros contributes 0.
        across_processes: whether the batch is that of all processes (all of them must then call this) or the local one.
        second_moment: (hidden_size, hidden_size), optional; `feature_second_moment` of a whole batch of which
            `features` are one of several equal parts, on this process or others. The value is then the whole batch's,
            and the mean of the parts' gradients is its gradient: exact for gradient accumulation.

    Returns:
        A scalar, float32 (float64 for float64 features), the same on every process.
    """
    return _uniformity(*_gram_of_batch(features, across_processes, second_moment))


CODING_RATE_SCALE = 4 / 3  # `coding_rate_loss` says why


def coding_rate_loss(
    features: torch.Tensor, across_processes: bool = True, second_moment: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Minus the total coding rate of the features, the term of M-MAE.

    Tan, Yang, Huang, Yuan & Zhang: "Information Flow in Self-Supervised Learning", ICML 2024.

    It is `-log det(I + a M)`, where `M = F^T F / N` is the second moment of the N features of the global batch,
    L2-normalised, and `a` is CODING_RATE_SCALE. M-MAE's code computes `-log det(I + mu / D * F^T F)`, so its `a` is
    `mu * N / D`: 4/3 for ViT-B (D 768) with its default mu 1 and the 1,024 images a step of its script. Here `a` is 4/3
    for every batch, width and number of processes, so that one weight means the same for all of them.

    With the eigenvalues p of M, none negative and 1 in sum, it is `-sum(log(1 + a p))`. For r = min(N, D) it lies
    between `-r log(1 + a / r)` (spread evenly), which is more than -4/3, and `-log(1 + a)` = -0.847 (all on one line).
    Features of zeros have 0. To second order in M, i.e. where all `a p` are small, it is
    `-a + a^2 / 2 * uniformity`: the uniformity term with 8/9 of the weight. The exact term is at most this, and less by
    at most `a^3 / 3 * sum(p^3)`. It pushes two directions of eigenvalues p and q towards each other like the uniformity
    term with `8/9 / ((1 + a p) (1 + a q))` of the weight, which is 0.38 for features on one line.

    The matrix `I + a M` has eigenvalues between 1 and 1 + a, so its Cholesky factor is exact to rounding for any
    features. Processes, gradients, arguments and the result are as in `uniformity_loss`.
    """
    return _coding_rate(*_gram_of_batch(features, across_processes, second_moment))


def feature_second_moment(features: torch.Tensor) -> torch.Tensor:
    """The mean of `f f^T` over L2-normalised features: (batch, D) -> (D, D), at least float32.

    Its squared norm is the uniformity of these features; that of a batch in several equal parts is the mean of theirs.
    """
    return _gram_of_directions(features) / features.shape[0]


def _gram_of_batch(
    features: torch.Tensor, across_processes: bool, second_moment: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | int]:
    """What both terms are functions of: (D, D), the sum of `f f^T` over L2-normalised features, and their number.

    The arguments are those of `uniformity_loss`. With a `second_moment` the sum is that, of one feature, and its
    gradient goes to the moment of `features`: any function of it has the whole batch's value and the part's gradient.
    """
    with torch.autocast(features.device.type, enabled=False):
        if second_moment is not None:
            part = feature_second_moment(features)
            return second_moment + (part - part.detach()), 1
        gram = _gram_of_directions(features)
        count = torch.full((), features.shape[0], dtype=gram.dtype, device=features.device)
        if across_processes and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            total = _SumOverProcesses.apply(torch.cat([gram.flatten(), count[None]]))  # one all-reduce for both
            return total[:-1].view_as(gram), total[-1].detach()
        return gram, count


def _uniformity(gram: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    return gram.square().sum() / count**2


def _coding_rate(gram: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return -_LogDeterminant.apply(identity + CODING_RATE_SCALE / count * gram)


def _gram_of_directions(features: torch.Tensor) -> torch.Tensor:
    """(batch, D) -> (D, D), the sum of `f f^T` over L2-normalised features, at least float32."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        return _Gram.apply(F.normalize(features, dim=-1))


class _Gram(torch.autograd.Function):
    """`F^T F` at full float32 precision, forward and backward, whatever matmul precision is set outside."""

    @staticmethod
    def forward(ctx, features):
        ctx.save_for_backward(features)
        with _full_precision_matmul():
            return features.T @ features

    @staticmethod
    def backward(ctx, grad):
        (features,) = ctx.saved_tensors
        with torch.autocast(features.device.type, enabled=False), _full_precision_matmul():
            return features @ (grad + grad.T)


class _LogDeterminant(torch.autograd.Function):
    """Of a symmetric positive definite matrix, at full float32 precision, forward and backward. NaN stays NaN."""

    @staticmethod
    def forward(ctx, matrix):
        ctx.save_for_backward(matrix)
        with _full_precision_matmul():
            factor = torch.linalg.cholesky_ex(matrix).L  # unlike `cholesky`, it does not wait for a GPU
            return 2 * factor.diagonal().log().sum()

    @staticmethod
    def backward(ctx, grad):
        (matrix,) = ctx.saved_tensors
        with torch.autocast(matrix.device.type, enabled=False), _full_precision_matmul():
            return grad * torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is multiplied by the number of processes, because DDP and FSDP divide by it."""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return grad * dist.get_world_size()


@contextmanager
def _full_precision_matmul():
    """Turn TensorFloat-32 off in this context; no effect under torch.compile, which sets it when it traces."""
    if torch.compiler.is_compiling():
        yield
        return
    backend = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and from then on reading the old one can raise
    name, full = ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    if (before := getattr(backend, name)) == full:
        yield
        return
    setattr(backend, name, full)
    try:
        yield
    finally:
        setattr(backend, name, before)


# ----------------------------------------------------------------------------------------------------------------------
# Patches and positions


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, patches, pixels), row by row; pixels as row, column, channel."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size[0], width // patch_size[1]
    patches = pixel_values.reshape(batch, channels, rows, patch_size[0], columns, patch_size[1])
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: torch.Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `patchify`, for a grid of (rows, columns): -> (batch, channels, height, width)."""
    (height, width), (rows, columns) = patch_size, grid
    pixels = patches.reshape(patches.shape[0], rows, columns, height, width, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, rows * height, columns * width)


def sincos_position_table(size: int, grid: tuple[int, int]) -> torch.Tensor:
    """The fixed 2-D sine-cosine table of MAE, (1, 1 + rows * columns, size) in float32; the class token's row is zero.

    The first half of the channels encodes the patch's column, the second half its row; within a half come all sines,
    then all cosines, of `position / 10000 ** (k / (size / 4))`.
    """
    frequency = 10000.0 ** -(torch.arange(size // 4, dtype=torch.float64) / (size / 4))

    def along_one_axis(length):
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, size / 2)

    column = along_one_axis(grid[1]).repeat(grid[0], 1)
    row = along_one_axis(grid[0]).repeat_interleave(grid[1], dim=0)
    table = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, size, dtype=torch.float64), table])[None].float()


def resize_position_table(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Interpolate a position table (1, 1 + patches, D) from one grid of (rows, columns) to another, in 2-D."""
    if old == new:
        return table
    patches = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    patches = F.interpolate(patches.float(), size=new, mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def random_masking(noise: torch.Tensor, mask_ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which patches are hidden: the `int(patches * (1 - mask_ratio))` smallest noises of an image stay visible.

    Args:
        noise: (batch, patches), any numbers; of equal ones the first counts as smaller.

    Returns:
        ids_keep: (batch, visible), the visible patches, by ascending noise.
        mask: (batch, patches), float32, 1 where the patch is hidden, 0 where the encoder sees it.
        ids_restore: (batch, patches), the position of every patch when patches are sorted by their noise.
    """
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = inverse_permutation(ids_shuffle)
    len_keep = int(noise.shape[1] * (1 - mask_ratio))
    mask = (ids_restore >= len_keep).float()
    return ids_shuffle[:, :len_keep], mask, ids_restore


def inverse_permutation(ids: torch.Tensor) -> torch.Tensor:
    """(batch, patches) -> (batch, patches), the permutation that reverses each row of `ids`."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.empty_like(ids).scatter_(1, ids, positions)


def gather_patches(patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(batch or 1, patches, D), (batch, n) -> (batch, n, D), the patches at `ids`."""
    return patches.expand(ids.shape[0], -1, -1).gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))


class UMAEEmbeddings(nn.Module):
    """Images to tokens: project the patches, add the position embeddings, leave out the hidden patches."""

    position_embeddings: torch.Tensor

    def __init__(self, config: UMAEConfig):
        super().__init__()
        self.config = config
        patch = config.patch_height_width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        # A buffer: saved, never trained. (`from_pretrained` would make a frozen parameter trainable.)
        # In a classifier it is a parameter, see `train_positions`.
        table = sincos_position_table(config.hidden_size, config.grid)
        self.register_buffer("position_embeddings", table.to(torch.get_default_dtype()))
        projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def forward(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, 1 + visible patches, hidden_size), the class token first."""
        positions = resize_position_table(self.position_embeddings, self.config.grid, grid)
        if (self.training and ids_keep is not None) or pixel_values.device.type != "cpu":
            # Also in evaluation on a GPU, whose convolutions compute in TensorFloat-32 unless told otherwise
            patches = self.project_patches(pixel_values, ids_keep)
            patches = patches + (positions[:, 1:] if ids_keep is None else gather_patches(positions[:, 1:], ids_keep))
        else:
            projection: nn.Conv2d = self.patch_embeddings["projection"]  # type: ignore[assignment]  # torch: any Module
            patches = projection(pixel_values.to(projection.weight.dtype)).flatten(2).transpose(1, 2)  # (B, patches, D)
            patches = patches + positions[:, 1:]
            patches = patches if ids_keep is None else gather_patches(patches, ids_keep)  # (B, visible, D)
        cls_token = (self.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
        return torch.cat([cls_token, patches], dim=1)

    def train_positions(self) -> None:
        """Make the position table a parameter of the same name, as facebookresearch/mae fine-tunes it."""
        table = self.position_embeddings
        del self.position_embeddings
        self.position_embeddings = nn.Parameter(table)

    def project_patches(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None) -> torch.Tensor:
        """The convolution as a matrix product, of the visible patches only where there are some: -> (batch, n, D)."""
        projection: nn.Conv2d = self.patch_embeddings["projection"]  # type: ignore[assignment]  # torch: any Module
        batch, channels = pixel_values.shape[:2]
        height, width = self.config.patch_height_width
        pixels = pixel_values.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, rows, h, columns, w)
        pixels = pixels.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * height * width)
        visible = pixels if ids_keep is None else gather_patches(pixels, ids_keep)
        return F.linear(visible.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)


# ----------------------------------------------------------------------------------------------------------------------
# The transformer layer


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(query key^T * scaling) value, written out: (B, heads, tokens, d) -> (B, tokens, heads, d), weights.

    The queries are scaled, since there are more weights; torch's softmax computes half precisions in float32.
    """
    weights = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class UMAEProjection(nn.Linear):
    """Queries, keys or values; a class of its own because MAE initialises the three as one matrix."""


class UMAEAttention(nn.Module):
    """Multi-head self-attention by transformers' attention interface (eager, sdpa, flash)."""

    def __init__(self, config: UMAEConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.attention = nn.ModuleDict(
            {name: UMAEProjection(hidden_size, hidden_size, bias=config.qkv_bias) for name in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden_size, hidden_size)})

    def forward(
        self, hidden_states: torch.Tensor, first_query: int = 0, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, D) -> (batch, queries, D), attention weights (batch, heads, queries, tokens) if eager.

        The tokens before `first_query` are keys and values only, not queries.
        """
        if first_query == 0:
            query, key, value = self.project(hidden_states, "query", "key", "value")
        else:
            (query,) = self.project(hidden_states[:, first_query:], "query")
            key, value = self.project(hidden_states, "key", "value")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.output["dense"](context.flatten(2)), weights

    def project(self, hidden_states: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
        """(batch, tokens, D) -> (batch, heads, tokens, d) for each of these projections."""
        modules = [self.attention[name] for name in names]
        plain = [module for module in modules if type(module) is UMAEProjection and not module._forward_hooks]
        if self.training and len(plain) == len(names):
            # One product instead of three, so that the tokens are cast and read once. What adapters and quantisation
            # put in place of a projection is of another class.
            weight = torch.cat([module.weight for module in plain])
            bias = torch.cat([module.bias for module in plain]) if self.config.qkv_bias else None
            projected = F.linear(hidden_states, weight, bias).chunk(len(names), dim=-1)
        else:
            projected = tuple(module(hidden_states) for module in modules)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)


class UMAELayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer: attention, then feed-forward, each with its residual."""

    def __init__(self, config: UMAEConfig, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = UMAEAttention(config, hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden_size, intermediate_size)})
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.ModuleDict({"dense": nn.Linear(intermediate_size, hidden_size)})
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_query: int = 0,
        branch_scales: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(batch, tokens, D) -> (batch, tokens from `first_query` on, D).

        `branch_scales`, (2, batch, 1, 1), is what attention and feed-forward are multiplied by, see `drop_path_scales`.
        """
        attended, _ = self.attention(self.layernorm_before(hidden_states), first_query, **kwargs)
        attended = self.dropout(attended)
        attended = attended if branch_scales is None else attended * branch_scales[0].to(attended.dtype)
        hidden_states = attended + hidden_states[:, first_query:]
        inner = self.activation(self.intermediate["dense"](self.layernorm_after(hidden_states)))
        inner = self.dropout(self.output["dense"](inner))
        inner = inner if branch_scales is None else inner * branch_scales[1].to(inner.dtype)
        return inner + hidden_states


def drop_path_scales(rate: float, num_layers: int, batch: int, device: torch.device) -> torch.Tensor:
    """Which images skip which branch (stochastic depth; Huang et al., "Deep Networks with Stochastic Depth", 2016).

    The share of images grows linearly from 0 in the first layer to `rate` in the last. Attention and feed-forward are
    drawn independently. Kept branches are scaled up, so that their mean does not change.

    Returns:
        float32 (num_layers, 2, batch, 1, 1): 0 where the branch is left out, else 1 / (1 - the layer's share).
    """
    # A tensor, not one Python number for each layer, for which torch.compile would compile every layer again
    rates = torch.linspace(0.0, rate, num_layers, device=device)[:, None, None, None, None]
    kept = torch.rand(num_layers, 2, batch, 1, 1, device=device) >= rates
    return kept / (1 - rates)


# ----------------------------------------------------------------------------------------------------------------------
# The models


@dataclass
class UMAEModelOutput(ModelOutput):
    """What the encoder returns.

    Args:
        last_hidden_state: (batch, 1 + visible patches, hidden_size), layer-normalised, the class token first.
        pooler_output: (batch, hidden_size), the feature of the image: the class token, or `fc_norm` of the mean of
            the patch tokens (`config.pooling`).
        mask: (batch, patches), 1 where the patch was hidden, 0 where the encoder saw it; None if nothing was masked.
        ids_restore: (batch, patches), the position of every patch when sorted by noise; None without masking.
        hidden_states: tuple of (batch, 1 + visible patches, hidden_size), the embeddings and every layer's output.
        attentions: tuple of (batch, heads, tokens, tokens), one for each layer; needs `attn_implementation="eager"`.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class UMAEForPreTrainingOutput(ModelOutput):
    """What the pre-training model returns.

    Args:
        loss: scalar, `reconstruction_loss + config.uniformity_weight * uniformity_loss`, or with `coding_rate_loss`
            instead, see `config.regularizer`.
        reconstruction_loss: scalar, the mean squared error of the hidden patches of the local batch.
        uniformity_loss: scalar, at least float32, the mean squared cosine of the features.
        coding_rate_loss: scalar, at least float32; None unless it is `config.regularizer`.
        logits: (batch, patches, pixels), every predicted patch (normalised if `norm_pix_loss`); None if not requested.
        mask: (batch, patches), 1 where the patch was hidden, 0 where the encoder saw it.
        ids_restore: (batch, patches), the position of every patch when sorted by noise; None without logits.
        features: (batch, hidden_size), the input of the uniformity term and of the coding rate.
        last_hidden_state: (batch, 1 + visible patches, hidden_size), the encoder's; None without `features_only`.
        hidden_states: tuple of (batch, 1 + visible patches, hidden_size), the encoder's.
        attentions: tuple of (batch, heads, tokens, tokens), the encoder's.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    uniformity_loss: torch.Tensor | None = None
    coding_rate_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    features: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class UMAEPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by all models."""

    config: UMAEConfig
    config_class = UMAEConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple in transformers' own models, too
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # else Trainer would scale the gradient of a batch with labels
    _auto_class: str | None = None
    _no_split_modules = ["UMAEEmbeddings", "UMAELayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": UMAELayer, "attentions": UMAEAttention}

    def __init__(self, config: UMAEConfig, *args, **kwargs):
        config.check_combinations()  # again: fields may have been set one by one after construction
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is not known; use one of {', '.join(sorted(ACT2FN))}")
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        """MAE's initialisation; transformers calls it for every module with tensors and skips loaded weights."""
        super()._init_weights(module)
        if isinstance(module, UMAEHead):
            init.trunc_normal_(module.weight, std=2e-5)  # MAE's for fine-tuning
        elif isinstance(module, UMAEProjection):
            init.xavier_uniform_(module.weight, gain=2**-0.5)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            bound = math.sqrt(6 / (module.weight.shape[0] + module.weight[0].numel()))
            init.uniform_(module.weight, -bound, bound)  # xavier on its (D, channels * height * width) form
        elif isinstance(module, UMAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.copy_(module.position_embeddings, sincos_position_table(self.config.hidden_size, self.config.grid))
        elif isinstance(module, UMAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            table = sincos_position_table(self.config.decoder_hidden_size, self.config.grid)
            init.copy_(module.decoder_pos_embed, table)

    def get_input_embeddings(self) -> nn.Module:
        """The `UMAEEmbeddings`: their output is the input of the first layer, so a hook on them gets all of it."""
        # Not their convolution: FSDP shards the returned module as one unit and gathers its weights when it is called,
        # but `project_patches` reads the convolution's weights without a call
        return self.base_model.get_submodule("embeddings")

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embeddings = value

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; also saves the code, for all its Auto classes."""
        self.config.auto_map = {
            "AutoBackbone": "modeling_umae.UMAEBackbone",
            "AutoConfig": "configuration_umae.UMAEConfig",
            "AutoModel": "modeling_umae.UMAEModel",
            "AutoModelForPreTraining": "modeling_umae.UMAEForPreTraining",
            "AutoModelForImageClassification": "modeling_umae.UMAEForImageClassification",
        }
        super().save_pretrained(save_directory, *args, **kwargs)


class UMAEModel(UMAEPreTrainedModel):
    """The encoder: a ViT that sees all patches of an image, or only the visible ones.

    Without `noise` or `mask_ratio` nothing is masked and the same image always gives the same tensors.
    """

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: UMAEConfig):
        super().__init__(config)
        self.embeddings = UMAEEmbeddings(config)
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
        layers = nn.ModuleList([UMAELayer(config, *sizes) for _ in range(config.num_hidden_layers)])
        self.encoder = nn.ModuleDict({"layer": layers})
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm = norm if config.final_layernorm else nn.Identity()
        if config.pooling == "mean":
            self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMAEModelOutput:
        """Encode images.

        Args:
            pixel_values: (batch, channels, height, width), normalised as the image processor does.
            noise: (batch, patches), optional; masks the patches with the largest numbers. Without `mask_ratio` the
                configuration's share is masked.
            mask_ratio: share of patches to mask, in [0, 1), optional; without `noise` they are drawn at random.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.

        Raises:
            ValueError: the images or the noise do not have the expected shape.
        """
        grid = self.grid_of(pixel_values, interpolate_pos_encoding)
        ids_keep = mask = ids_restore = None
        if noise is not None or mask_ratio is not None:
            ids_keep, mask, ids_restore = self.choose_patches(pixel_values, grid, noise, mask_ratio)

        hidden_states = self.embeddings(pixel_values, ids_keep, grid)
        layers: nn.ModuleList = self.encoder["layer"]  # type: ignore[assignment]  # torch: any Module
        scales = self.branch_scales(hidden_states, len(layers))
        for layer, branch_scales in zip(layers, scales, strict=True):
            hidden_states = layer(hidden_states, branch_scales=branch_scales, **kwargs)
        last_hidden_state = self.layernorm(hidden_states)

        return UMAEModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pool(last_hidden_state),
            mask=mask,
            ids_restore=ids_restore,
        )

    def feature_maps(
        self, pixel_values: torch.Tensor, layers: tuple[int, ...] | None = None, interpolate_pos_encoding: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """The patch features as maps, for dense tasks: segmentation, detection, retrieval of image parts.

        Args:
            pixel_values: (batch, channels, height, width), normalised as the image processor does.
            layers: after which layers, counted from 1; only the last by default.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.

        Returns:
            (batch, hidden_size, rows, columns) for each layer, normalised by the encoder's last norm: after the last
            layer they are the patches of `last_hidden_state`.

        Raises:
            ValueError: there is no such layer, or the images do not have the expected shape.
        """
        count = self.config.num_hidden_layers
        layers = (count,) if layers is None else layers
        if not layers or not all(1 <= layer <= count for layer in layers):
            raise ValueError(f"layers is {layers}, expected one or more numbers from 1 to {count}")
        grid = self.grid_of(pixel_values, interpolate_pos_encoding)
        output = self(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, output_hidden_states=True, return_dict=True
        )
        tokens = (self.layernorm(output.hidden_states[layer]) for layer in layers)  # hidden_states[0]: the embeddings
        return tuple(layer_tokens[:, 1:].transpose(1, 2).unflatten(2, grid) for layer_tokens in tokens)

    def branch_scales(self, hidden_states: torch.Tensor, num_layers: int) -> list[torch.Tensor | None]:
        """The `branch_scales` of every layer, (2, batch, 1, 1); None without drop path or in evaluation mode."""
        rate = self.config.drop_path_rate
        if rate == 0 or not self.training:
            return [None] * num_layers
        return list(drop_path_scales(rate, num_layers, hidden_states.shape[0], hidden_states.device))

    def pool(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """(batch, 1 + patches, hidden_size) -> (batch, hidden_size), by `config.pooling`."""
        if self.config.pooling == "cls":
            return last_hidden_state[:, 0]
        return self.fc_norm(last_hidden_state[:, 1:].mean(dim=1))

    def grid_of(self, pixel_values: torch.Tensor, any_size: bool) -> tuple[int, int]:
        """The (rows, columns) of patches in a batch of images. Raises `ValueError` if their shape is not expected."""
        expected = (self.config.num_channels, *self.config.image_height_width)
        shape = tuple(pixel_values.shape[1:])
        (height, width), patch = shape[-2:], self.config.patch_height_width
        fits = shape == expected or (
            any_size and len(shape) == 3 and shape[0] == expected[0] and height % patch[0] == width % patch[1] == 0
        )
        if not fits:
            raise ValueError(
                f"pixel_values is (batch, {', '.join(map(str, shape))}), expected (batch, channels, height, width) "
                f"with {expected}; resize the images, or pass interpolate_pos_encoding=True for other sizes that "
                f"the patch size {patch} divides"
            )
        return height // patch[0], width // patch[1]

    def choose_patches(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], noise: torch.Tensor | None, mask_ratio: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`random_masking` of a batch, by default with the configuration's ratio and with random noise."""
        mask_ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        shape = (pixel_values.shape[0], grid[0] * grid[1])
        if not 0 <= mask_ratio < 1 or int(shape[1] * (1 - mask_ratio)) < 1:
            raise ValueError(f"mask_ratio {mask_ratio} keeps no patch of {shape[1]}; it must be in [0, 1) and keep one")
        if noise is None:
            noise = torch.rand(shape, device=pixel_values.device)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, expected one number for each patch: {shape}")
        return random_masking(noise, mask_ratio)


class UMAEDecoder(nn.Module):
    """Visible tokens to pixels: add mask tokens for the hidden patches, predict every patch by a small transformer."""

    decoder_pos_embed: torch.Tensor

    def __init__(self, config: UMAEConfig):
        super().__init__()
        self.config = config
        size, patch = config.decoder_hidden_size, config.patch_height_width
        self.decoder_embed = nn.Linear(config.hidden_size, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        table = sincos_position_table(size, config.grid)
        self.register_buffer("decoder_pos_embed", table.to(torch.get_default_dtype()))
        sizes = (size, config.decoder_num_attention_heads, config.decoder_intermediate_size)
        self.decoder_layers = nn.ModuleList(
            [UMAELayer(config, *sizes) for _ in range(config.decoder_num_hidden_layers)]
        )
        self.decoder_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(size, patch[0] * patch[1] * config.num_channels)

    def forward(self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, 1 + visible, hidden_size) -> (batch, patches, pixels), the patches row by row."""
        tokens = self.with_mask_tokens(self.decoder_embed(hidden_states), ids_restore.shape[1])
        tokens = torch.cat([tokens[:, :1], gather_patches(tokens[:, 1:], ids_restore)], dim=1)
        tokens = tokens + resize_position_table(self.decoder_pos_embed, self.config.grid, grid)
        for layer in self.decoder_layers:
            tokens = layer(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    def predict_hidden(
        self, hidden_states: torch.Tensor, ids_shuffle: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """(batch, 1 + visible, hidden_size) -> (batch, hidden, pixels), the hidden patches in the order of their noise.

        The same predictions as `forward` with less work: the position embeddings are sorted instead of the patches,
        and the last layer and the head compute only the hidden patches.
        """
        visible = hidden_states.shape[1] - 1
        tokens = self.with_mask_tokens(self.decoder_embed(hidden_states), ids_shuffle.shape[1])
        table = resize_position_table(self.decoder_pos_embed, self.config.grid, grid)
        positions = gather_patches(table[:, 1:], ids_shuffle)
        tokens = tokens + torch.cat([table[:, :1].expand(tokens.shape[0], -1, -1), positions], dim=1)
        for i, layer in enumerate(self.decoder_layers):
            is_last = i == len(self.decoder_layers) - 1
            tokens = layer(tokens, first_query=1 + visible if is_last else 0)
        return self.decoder_pred(self.decoder_norm(tokens[:, visible - ids_shuffle.shape[1] :]))

    def with_mask_tokens(self, tokens: torch.Tensor, num_patches: int) -> torch.Tensor:
        """(batch, 1 + visible, D) -> (batch, 1 + num_patches, D), mask tokens at the end."""
        hidden = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], 1 + num_patches - tokens.shape[1], -1)
        return torch.cat([tokens, hidden], dim=1)


class UMAEForPreTraining(UMAEPreTrainedModel):
    """Encoder, decoder and the two losses: reconstruct the hidden patches, spread the features."""

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: UMAEConfig):
        super().__init__(config)
        self.vit = UMAEModel(config)
        self.decoder = UMAEDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        interpolate_pos_encoding: bool = False,
        output_logits: bool | None = None,
        second_moment: torch.Tensor | None = None,
        features_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMAEForPreTrainingOutput:
        """Mask the images, encode them, predict the hidden patches and compute the losses.

        Args:
            pixel_values: (batch, channels, height, width), normalised as the image processor does.
            noise: (batch, patches), optional; the patches with the largest numbers are hidden. Random by default.
            mask_ratio: share of patches to hide, optional; the configuration's by default.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            output_logits: whether to return `logits` and `ids_restore`; by default in evaluation mode only.
            second_moment: (hidden_size, hidden_size), optional, for an exact regularizer under gradient
                accumulation, see `uniformity_loss`: the mean of `feature_second_moment` over all micro-batches.
            features_only: return what `encode_features` returns, for callers with a model in DDP or FSDP, which wrap
                this method alone.

        In training mode the regularizer is that of the batch of all processes, and all of them must take part; in
        evaluation mode it is that of the local batch.

        Raises:
            ValueError: no patch would be hidden, or the images or the noise do not have the expected shape.
        """
        if features_only:
            return self.encode_features(pixel_values, noise, mask_ratio, interpolate_pos_encoding, **kwargs)
        output_logits = not self.training if output_logits is None else output_logits
        encoded = self.encode_masked(pixel_values, noise, mask_ratio, interpolate_pos_encoding, **kwargs)
        features = self.uniformity_features(encoded)
        logits, reconstruction = self.reconstruct(pixel_values, encoded, all_patches=output_logits)
        gram, count = _gram_of_batch(features, across_processes=self.training, second_moment=second_moment)
        uniformity = _uniformity(gram, count)
        coding_rate = _coding_rate(gram, count) if self.config.regularizer == "coding_rate" else None
        regularizer = uniformity if coding_rate is None else coding_rate

        return UMAEForPreTrainingOutput(
            loss=reconstruction + self.config.uniformity_weight * regularizer,
            reconstruction_loss=reconstruction,
            uniformity_loss=uniformity,
            coding_rate_loss=coding_rate,
            logits=logits if output_logits else None,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore if output_logits else None,
            features=features,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def encode_features(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMAEForPreTrainingOutput:
        """`features` and `last_hidden_state` only, without the decoder and the losses.

        The arguments and errors are those of `forward`, but a `mask_ratio` of 0 is allowed: the encoder then sees every
        patch, in order.
        """
        if (self.config.mask_ratio if mask_ratio is None else mask_ratio) == 0:
            encoded = self.vit(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
            )
        else:
            encoded = self.encode_masked(pixel_values, noise, mask_ratio, interpolate_pos_encoding, **kwargs)
        features = self.uniformity_features(encoded)
        return UMAEForPreTrainingOutput(features=features, last_hidden_state=encoded.last_hidden_state)

    def encode_masked(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None,
        mask_ratio: float | None,
        interpolate_pos_encoding: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UMAEModelOutput:
        """The encoder's output for the visible patches. Raises `ValueError` if no patch would be hidden."""
        mask_ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        num_patches = math.prod(self.vit.grid_of(pixel_values, interpolate_pos_encoding))
        if int(num_patches * (1 - mask_ratio)) == num_patches:
            raise ValueError(f"mask_ratio {mask_ratio} hides no patch of {num_patches}, so there is nothing to learn")
        return self.vit(
            pixel_values,
            noise=noise,
            mask_ratio=mask_ratio,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )

    def reconstruct(
        self, pixel_values: torch.Tensor, encoded: UMAEModelOutput, all_patches: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted patches, all or only the hidden ones by ascending noise, and `reconstruction_loss`."""
        assert encoded.last_hidden_state is not None and encoded.ids_restore is not None  # as the encoder has masked
        grid = self.vit.grid_of(pixel_values, any_size=True)
        target = patchify(pixel_values, self.config.patch_height_width)
        if all_patches:
            logits = self.decoder(encoded.last_hidden_state, encoded.ids_restore, grid)
            return logits, reconstruction_loss(logits, target, encoded.mask, self.config.norm_pix_loss)
        ids_shuffle = inverse_permutation(encoded.ids_restore)
        logits = self.decoder.predict_hidden(encoded.last_hidden_state, ids_shuffle, grid)
        target = gather_patches(target, ids_shuffle[:, -logits.shape[1] :])
        return logits, reconstruction_loss(logits, target, None, self.config.norm_pix_loss)

    def uniformity_features(self, encoded: UMAEModelOutput) -> torch.Tensor:
        """(batch, hidden_size), the uniformity term's input: with pooling "cls", the class token normalised twice."""
        assert encoded.pooler_output is not None
        if self.config.pooling == "cls":  # as in the original; differs from once if the norm's weights are trained
            return self.vit.layernorm(encoded.pooler_output)
        return encoded.pooler_output


def inferred_problem_type(labels: torch.Tensor, num_labels: int) -> str:
    """The problem type that transformers infers from labels where `config.problem_type` is not set."""
    if num_labels == 1:
        return "regression"
    is_class = labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if is_class else "multi_label_classification"


def check_labels(labels: torch.Tensor, logits: torch.Tensor, problem_type: str) -> None:
    """Raise `ValueError` where labels do not have the dtype, the shape or the range of a problem type.

    Args:
        labels: int64 (batch,), classes from 0 on, -100 for none, if "single_label_classification"; floating-point
            (batch, num_labels), in 0..1 if "multi_label_classification", any if "regression", where one label may also
            be (batch,). The range is checked on the CPU only, since reading it from a GPU would wait for it.
        logits: (batch, num_labels).
    """
    batch, num_labels = logits.shape
    single = problem_type == "single_label_classification"
    flat = single or (problem_type == "regression" and num_labels == 1)
    shapes = [(batch,), (batch, 1)] if flat else [(batch, num_labels)]
    right_dtype = labels.dtype == torch.int64 if single else labels.is_floating_point()
    if not right_dtype or tuple(labels.shape) not in shapes:
        raise ValueError(
            f"labels are {str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}; for problem_type "
            f"{problem_type!r} and num_labels {num_labels} expected {'int64' if single else 'floating point'} "
            f"{shapes[0]}; change the labels, or config.problem_type"
        )
    if problem_type == "regression" or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    labels, highest = (labels[labels != -100], num_labels - 1) if single else (labels, 1)
    if not ((labels >= 0) & (labels <= highest)).all():
        raise ValueError(
            f"labels lie in {labels.min():g} to {labels.max():g}; for problem_type {problem_type!r} and num_labels "
            f"{num_labels} expected 0 to {highest}; change the labels, or config.problem_type"
        )


class _Problem(NamedTuple):
    """The part of a configuration that transformers' losses read."""

    num_labels: int
    problem_type: str


class UMAEBackbone(BackboneMixin, UMAEModel):
    """The encoder under transformers' heads for detection and segmentation: it returns feature maps.

    `config.out_features`, `["stage3", "stage6"]`, or `config.out_indices`, `[3, 6]`, choose them, by default the last:
    see `UMAEConfig.stage_names`. All are normalised by the encoder's last norm, as in `UMAEModel.feature_maps`.
    """

    _auto_class = "AutoBackbone"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\.", r"\bfc_norm\."]

    def __init__(self, config: UMAEConfig):
        super().__init__(config)
        if config.pooling == "mean":
            del self.fc_norm  # which would be a parameter without a gradient
        config.set_output_features_output_indices(config._out_features, config._out_indices)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Encode images of any size that the patch divides; positions are interpolated.

        Args:
            pixel_values: (batch, channels, height, width), normalised as the image processor does.

        Returns:
            `feature_maps`, each (batch, hidden_size, rows, columns).

        Raises:
            ValueError: the images do not have the expected shape.
        """
        grid = self.grid_of(pixel_values, any_size=True)
        hidden_states = [self.embeddings(pixel_values, None, grid)]
        layers: nn.ModuleList = self.encoder["layer"]  # type: ignore[assignment]  # torch: any Module
        for layer, scales in zip(layers, self.branch_scales(hidden_states[0], len(layers)), strict=True):
            hidden_states.append(layer(hidden_states[-1], branch_scales=scales, **kwargs))
        tokens = [self.layernorm(hidden_states[index])[:, 1:] for index in self.out_indices]
        return BackboneOutput(feature_maps=tuple(of_layer.transpose(1, 2).unflatten(2, grid) for of_layer in tokens))


class UMAEHead(nn.Linear):
    """A classifier's last layer; a class of its own because it starts near zero."""


class UMAEForImageClassification(UMAEPreTrainedModel):
    """The encoder and a linear head on its pooled feature; `from_pretrained` loads a pre-trained encoder.

    All parameters are trained, also the position table (models_vit.py of facebookresearch/mae), fixed in pre-training.
    """

    _auto_class = "AutoModelForImageClassification"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: UMAEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = UMAEModel(config)
        self.vit.embeddings.train_positions()
        self.classifier = UMAEHead(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch, channels, height, width), normalised as the image processor does.
            labels: optional, of `config.problem_type`, see `check_labels`; where it is not set, it is inferred as in
                transformers: "regression" with one label, "single_label_classification" for integers, else
                "multi_label_classification". Adds the mean squared error, the cross entropy or the binary cross
                entropy as `loss`.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.

        Raises:
            ValueError: the labels do not fit the problem type, or the images do not have the expected shape.
        """
        encoded = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(encoded.pooler_output)
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_of(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """transformers' loss for the problem type, a scalar."""
        problem_type = self.config.problem_type or inferred_problem_type(labels, logits.shape[1])
        check_labels(labels, logits, problem_type)
        # Not the configuration itself: transformers would store in it the problem type of the first labels
        return self.loss_function(labels, logits, _Problem(logits.shape[1], problem_type))


__all__ = [
    "UMAEBackbone",
    "UMAEForImageClassification",
    "UMAEForPreTraining",
    "UMAEModel",
    "UMAEPreTrainedModel",
    "coding_rate_loss",
    "feature_second_moment",
    "patchify",
    "reconstruction_loss",
    "uniformity_loss",
    "unpatchify",
]
