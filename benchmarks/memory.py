"""Memory that training ViT-B, ViT-L and ViT-H needs, with MAE's decoder, in bf16 autocast with fused attention.

    python -m benchmarks.memory

Bytes are counted on tensors without data (FakeTensorMode), which takes seconds and no memory; ViT-B is also counted
with real tensors, as a check. The batch sizes that fit on a card are calculated from these counts.
"""

import argparse
from contextlib import nullcontext

import torch
from torch._subclasses import FakeTensorMode

from benchmarks import measure
from modeling_umae import UMAEForPreTraining
from umae import UMAEConfig

# Fields that differ from ViT-B/16; the decoder is 512 wide with 8 layers and 16 heads for all.
MODELS = {
    "ViT-B/16": {},
    "ViT-L/16": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    },
    "ViT-H/14": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
        "patch_size": 14,
    },
}  # fmt: skip
STATE = 16  # bytes per parameter: weight, gradient and two moments of AdamW in float32
CARDS = (24e9, 141e9)
USABLE = 0.9  # share of a card; the rest is for the driver, a kernel's workspace and fragments
BATCHES = (256, 512)  # between these the peak grows by the bytes of the images; in small batches gradients dominate


def make_model(fields: dict) -> UMAEForPreTraining:
    return UMAEForPreTraining._from_config(UMAEConfig(**fields), attn_implementation="sdpa").train()


@torch.autocast("cpu", torch.bfloat16)
def forward(model: UMAEForPreTraining, batch_size: int) -> torch.Tensor:
    config = model.config
    return model(torch.randn(batch_size, config.num_channels, *config.image_height_width)).loss


def kept(model: UMAEForPreTraining, batch_size: int) -> int:
    """Bytes that a forward pass saves for the backward pass."""
    return measure.saved_bytes(lambda: forward(model, batch_size), model)


def peak(model: UMAEForPreTraining, batch_size: int) -> int:
    """Peak bytes of a forward and backward pass, in addition to the weights."""
    model.zero_grad()
    return measure.peak_bytes(lambda: forward(model, batch_size).backward(), "cpu")


def slope(count, model: UMAEForPreTraining, batches: tuple[int, int]) -> float:
    """Bytes per image by which `count` grows with the batch."""
    few, many = batches
    return (count(model, many) - count(model, few)) / (many - few)


def count(fields: dict) -> dict[str, float]:
    """Number of parameters, and bytes of a model; `checkpointed` ones with gradient checkpointing."""
    with FakeTensorMode():
        model = make_model(fields)
        counts = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "cast": 2 * kept(model, 1) - kept(model, 2),  # the part that does not grow with the batch
            "kept": slope(kept, model, (1, 2)),
            "peak": slope(peak, model, BATCHES),
        }
        # transformers is renaming it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        checkpointed = {"kept": slope(kept, model, (1, 2)), "peak": slope(peak, model, BATCHES)}
    return {**counts, **{f"checkpointed {name}": value for name, value in checkpointed.items()}}


def check(fields: dict, batch_size: int) -> list[str]:
    """Bytes kept and peak bytes, with real tensors and with fake ones, in MB."""
    counts = []
    for mode in (nullcontext(), FakeTensorMode()):
        with mode:
            model = make_model(fields)
            counts.append((kept(model, batch_size), peak(model, batch_size)))
    return [" and ".join(f"{size / 1e6:.1f} MB" for size in pair) for pair in counts]


def largest_batch(card: float, counts: dict[str, float], key: str) -> str:
    """The largest batch on a card of this many bytes; `key` of the peak in `counts`."""
    free = USABLE * card - STATE * counts["parameters"] - counts["cast"]
    return f"{max(int(free / counts[key]), 0):,}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    counts = {name: count(fields) for name, fields in MODELS.items()}
    real, fake = check(MODELS["ViT-B/16"], batch_size=8)

    columns = ("kept", "peak", "checkpointed kept", "checkpointed peak")
    counted = measure.table(
        ("model", "million parameters", "cast weights, GB", *(f"{name}, MB/image" for name in columns)),
        [
            [
                name, f"{n['parameters'] / 1e6:.1f}", f"{n['cast'] / 1e9:.2f}",
                *(f"{n[column] / 1e6:.1f}" for column in columns),
            ]
            for name, n in counts.items()
        ],
    )  # fmt: skip
    cases = [(card, key) for card in CARDS for key in ("peak", "checkpointed peak")]
    batches = [f"batch on {card / 1e9:.0f} GB{', checkpointed' if key != 'peak' else ''}" for card, key in cases]
    held = measure.table(
        ("model", "weights, gradients, AdamW, GB", *batches),
        [
            [name, f"{STATE * n['parameters'] / 1e9:.2f}", *(largest_batch(card, n, key) for card, key in cases)]
            for name, n in counts.items()
        ],
    )
    notes = f"""\
- Kept: storages that the forward pass saves for the backward pass, without weights. Peak: the most that both passes
  hold at once, with temporaries; growth from a batch of {BATCHES[0]} to one of {BATCHES[1]}.
- Cast weights: bf16 copies that autocast makes and keeps until the backward pass, whatever the batch.
- Kept and peak for ViT-B/16 at batch 8: with real tensors {real}, with fake tensors {fake}.
- Calculated: {STATE} bytes per parameter; batch = ({USABLE:.0%} of the card - weights, gradients, AdamW - cast weights)
  / peak of an image. The operations are those of a CPU; a GPU's kernels may hold a little more or less."""
    measure.report("memory", "Memory of training", "cpu", f"## Counted\n\n{counted}", f"## Calculated\n\n{held}", notes)


if __name__ == "__main__":
    main()
