"""One optimiser step (forward, backward, AdamW): our model against transformers' ViTMAE.

    python -m benchmarks.step
    python -m benchmarks.step --size vit_base --batch_size 128      # on a GPU

ViTMAE gets our weights and position embeddings, since its own are initialised to zeros here. All contenders get the
same images and noise. Loading, flipping and logging are not part of the step.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks import measure
from modeling_umae import UMAEForPreTraining
from umae import UMAEConfig
from umae.convert.names import rename
from umae.speed import compile_model

# Fields that differ from the defaults of both configurations (ViT-B/16 on 224 x 224), and batch size
SIZES = {
    "vit_base": ({}, 8),
    "tiny": (
        {
            "image_size": 32, "patch_size": 4, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3,
            "intermediate_size": 768, "decoder_hidden_size": 128, "decoder_num_hidden_layers": 4,
            "decoder_num_attention_heads": 4, "decoder_intermediate_size": 512,
        },
        256,
    ),
}  # fmt: skip
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "float32", torch.float16: "float16"}


@dataclass
class Contender:
    """A model, its optimiser and the dtype of its autocast (float32: no autocast)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    device: str

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype == torch.float16)

    def loss(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(pixel_values, noise=noise).loss

    def step(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> None:
        self.scaler.scale(self.loss(pixel_values, noise)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def resting_bytes(self) -> int:
        """Bytes held between two steps: parameters, buffers, optimiser state."""
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *states))


def ours(fields: dict, dtype: torch.dtype, device: str) -> Contender:
    """Our model as run_pretrain.py trains it: eager attention for bf16 on CPUs, fused otherwise.

    Args:
        fields: of the configuration, those that differ from ViT-B/16.
    """
    attention = "eager" if device == "cpu" and dtype == torch.bfloat16 else "sdpa"
    config = UMAEConfig(**{"uniformity_weight": 0.01, **fields})
    model = UMAEForPreTraining._from_config(config, attn_implementation=attention).to(device).train()
    return Contender(model, adamw(model, fused=True), dtype, device)


def vitmae(fields: dict, dtype: torch.dtype, device: str, weights: dict[str, torch.Tensor], fused: bool) -> Contender:
    """transformers' ViTMAE with our weights and position embeddings."""
    config = ViTMAEConfig(**fields, norm_pix_loss=True)  # one per model: `_from_config` modifies it
    model = ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa").to(device).train()
    model.load_state_dict({name: weights[our_name(name)] for name in model.state_dict()})
    return Contender(model, adamw(model, fused=fused), dtype, device)


def our_name(name: str) -> str:
    """Our name of a parameter of `ViTMAEForPreTraining`."""
    encoder = "vit." if name.startswith("vit.") else ""
    return encoder + rename(name.removeprefix(encoder))


def adamw(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """AdamW with a learning rate that hardly changes the weights; without `fused`, torch chooses the implementation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05, fused=fused or None)


def contenders(fields: dict, device: str) -> dict[str, Contender]:
    by_name = {f"ours, {DTYPE_NAMES[dtype]}": ours(fields, dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    weights = by_name["ours, bf16"].model.state_dict()
    for dtype in (torch.bfloat16, torch.float32):
        for fused in (False, True):
            optimizer = "fused AdamW" if fused else "default AdamW"
            by_name[f"ViTMAE, {DTYPE_NAMES[dtype]}, {optimizer}"] = vitmae(fields, dtype, device, weights, fused)
    if device == "cuda":
        by_name["ours, float16"] = ours(fields, torch.float16, device)
        by_name["ours, bf16, layers compiled"] = ours(fields, torch.bfloat16, device)
    return by_name


def random_batch(fields: dict, batch_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixel_values, noise) of a batch."""
    config = UMAEConfig(**fields)
    rows, columns = config.grid
    pixel_values = torch.randn(batch_size, config.num_channels, *config.image_height_width, device=device)
    return pixel_values, torch.rand(batch_size, rows * columns, device=device)


class Matmuls:
    """Only the feed-forward matrix products of a forward pass, to measure the machine's matmul rate.

    (tokens, D) x (D, 4 D) x (4 D, D), once for each layer of encoder and decoder, always with the same weights.
    """

    def __init__(self, fields: dict, batch_size: int, dtype: torch.dtype, device: str):
        config = UMAEConfig(**fields)
        patches = config.grid[0] * config.grid[1]
        visible = patches - config.num_hidden_patches
        shapes = (
            (visible, config.hidden_size, config.intermediate_size, config.num_hidden_layers),
            (patches, config.decoder_hidden_size, config.decoder_intermediate_size, config.decoder_num_hidden_layers),
        )
        self.stacks = []
        for tokens, width, inner, layers in shapes:
            inputs = torch.randn(batch_size * (1 + tokens), width, device=device, dtype=dtype)
            first, second = torch.randn(inner, width).to(inputs), torch.randn(width, inner).to(inputs)
            self.stacks.append((inputs, first, second, layers))
        self.flops = measure.flops(self)

    @torch.no_grad()
    def __call__(self) -> None:
        for inputs, first, second, layers in self.stacks:
            for _ in range(layers):
                F.linear(F.linear(inputs, first), second)


def section(size: str, args: argparse.Namespace) -> str:
    """The table of one model size."""
    fields, usual = SIZES[size]
    batch_size = args.batch_size or usual
    batch = random_batch(fields, batch_size, args.device)
    compared = contenders(fields, args.device)

    batch_of_one, batch_of_two = (random_batch(fields, count, args.device) for count in (1, 2))
    gflop, saved, peak = {}, {}, {}
    for name, contender in compared.items():
        gflop[name] = measure.flops(lambda c=contender: c.loss(*batch_of_two).backward()) / 2 / 1e9
        bytes_of_two = measure.saved_bytes(lambda c=contender: c.loss(*batch_of_two), contender.model)
        bytes_of_one = measure.saved_bytes(lambda c=contender: c.loss(*batch_of_one), contender.model)
        saved[name] = (bytes_of_two - bytes_of_one) / 1e6
        contender.optimizer.zero_grad()
        if name.endswith("compiled"):
            compile_model(contender.model, "layers")
            saved[name] = None  # the compiler decides what is kept
        contender.step(*batch)
        transient = measure.peak_bytes(lambda c=contender: c.step(*batch), args.device)
        peak[name] = (contender.resting_bytes() + transient) / 1e9

    dtypes = {contender.dtype for contender in compared.values()}
    matmuls = {dtype: Matmuls(fields, batch_size, dtype, args.device) for dtype in dtypes}
    runs = {name: lambda c=contender: c.step(*batch) for name, contender in compared.items()}
    seconds = measure.interleave({**runs, **matmuls}, args.repetitions, args.device)
    rates = {dtype: matmul.flops / seconds[dtype] for dtype, matmul in matmuls.items()}

    rows = []
    for name, contender in compared.items():
        rate = gflop[name] * 1e9 * batch_size / seconds[name]
        rows.append(
            [
                name, f"{1000 * seconds[name]:.1f}", f"{batch_size / seconds[name]:.2f}",
                f"{seconds[name] / seconds['ours, bf16']:.2f}", f"{gflop[name]:.2f}",
                f"{rate / rates[contender.dtype]:.0%}", "-" if saved[name] is None else f"{saved[name]:.1f}",
                f"{peak[name]:.2f}",
            ]
        )  # fmt: skip
    header = (
        "contender", "ms", "images/s", "time / ours bf16", "GFLOP/image", "share of matmul rate",
        "kept for backward, MB/image", "peak memory, GB",
    )  # fmt: skip
    measured = ", ".join(f"{DTYPE_NAMES[dtype]} {rates[dtype] / 1e9:,.0f} GFLOP/s" for dtype in rates)
    return f"## {size}, batch {batch_size}\n\n{measure.table(header, rows)}\n\nMatmul rate: {measured}."


NOTES = """\
- GFLOP/image: matrix products of one forward and backward pass, counted (FlopCounterMode) for each contender;
  attention as plain products, whatever kernel computes it.
- Share of matmul rate: the contender's own FLOPs over its time, against the feed-forward products of the same model and
  batch in the same precision, timed alone in the same repetitions.
- Kept for backward: storages saved by autograd, without weights; a batch of 2 minus a batch of 1, so that what does not
  grow with the batch (weights cast to bf16) is not counted.
- Peak memory: weights, gradients, the optimiser's state, and all that torch allocates during a step.
- ViTMAE has our weights and position embeddings; default AdamW is `torch.optim.AdamW(parameters)`."""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, help="default: both")
    parser.add_argument("--batch_size", type=int, help="images per step (default: 8 for vit_base, 256 for tiny)")
    args = measure.start(parser)
    sections = [section(size, args) for size in ([args.size] if args.size else SIZES)]
    measure.report("step", "One training step", args.device, *sections, NOTES, repetitions=args.repetitions)


if __name__ == "__main__":
    main()
