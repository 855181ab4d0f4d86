"""What training ViT-B, ViT-L and ViT-H needs to hold, with MAE's decoder, in bf16 autocast with fused attention.

    python -m benchmarks.memory

Bytes are counted on tensors without contents (FakeTensorMode), which takes seconds and no memory; ViT-B is counted with
real ones too, as a check. What fits on a card is arithmetic from these counts.
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
STATE = 16  # bytes a parameter: weight, gradient and two moments of AdamW in float32
CARDS = (24e9, 141e9)
USABLE = 0.9  # share of a card; the rest is for the driver, a kernel's workspace and fragments
BATCHES = (256, 512)  # between these the peak grows by what an image costs; in small batches gradients decide


def make_model(fields: dict) -> UMAEForPreTraining:
    return UMAEForPreTraining._from_config(UMAEConfig(**fields), attn_implementation="sdpa").train()


@torch.autocast("cpu", torch.bfloat16)
def forward(model: UMAEForPreTraining, batch_size: int) -> torch.Tensor:
    config = model.config
    return model(torch.randn(batch_size, config.num_channels, *config.image_height_width)).loss


def kept(model: UMAEForPreTraining, batch_size: int) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    return measure.saved_bytes(lambda: forward(model, batch_size), model)


def peak(model: UMAEForPreTraining, batch_size: int) -> int:
    """The most bytes that a forward and backward pass hold at once on top of the weights."""
    model.zero_grad()
    return measure.peak_bytes(lambda: forward(model, batch_size).backward(), "cpu")


def slope(count, model: UMAEForPreTraining, batches: tuple[int, int]) -> float:
    """By how many bytes a count grows with an image."""
    few, many = batches
    return (count(model, many) - count(model, few)) / (many - few)


def count(fields: dict) -> dict[str, float]:
    """Parameters and bytes of a model; those named `checkpointed` with gradient checkpointing."""
    with FakeTensorMode():
        model = make_model(fields)
        found = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "cast": 2 * kept(model, 1) - kept(model, 2),  # what does not grow with the batch
            "kept": slope(kept, model, (1, 2)),
            "peak": slope(peak, model, BATCHES),
        }
        # transformers is renaming it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        checkpointed = {"kept": slope(kept, model, (1, 2)), "peak": slope(peak, model, BATCHES)}
    return {**found, **{f"checkpointed {name}": value for name, value in checkpointed.items()}}


def check(fields: dict, batch_size: int) -> list[str]:
    """Bytes kept and peak with contents and without, in MB."""
    counts = []
    for mode in (nullcontext(), FakeTensorMode()):
        with mode:
            model = make_model(fields)
            counts.append((kept(model, batch_size), peak(model, batch_size)))
    return [" and ".join(f"{size / 1e6:.1f} MB" for size in pair) for pair in counts]


def largest_batch(card: float, found: dict[str, float], peak: str) -> str:
    free = USABLE * card - STATE * found["parameters"] - found["cast"]
    return f"{max(int(free / found[peak]), 0):,}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {name: count(fields) for name, fields in MODELS.items()}
    real, fake = check(MODELS["ViT-B/16"], batch_size=8)

    columns = ("kept", "peak", "checkpointed kept", "checkpointed peak")
    counted = measure.table(
        ("model", "million parameters", "cast weights, GB", *(f"{name}, MB/image" for name in columns)),
        [
            [
                name, f"{n['parameters'] / 1e6:.1f}", f"{n['cast'] / 1e9:.2f}",
                *(f"{n[column] / 1e6:.1f}" for column in columns),
            ]
            for name, n in found.items()
        ],
    )  # fmt: skip
    cases = [(card, how) for card in CARDS for how in ("peak", "checkpointed peak")]
    batches = [f"batch on {card / 1e9:.0f} GB{', checkpointed' if how != 'peak' else ''}" for card, how in cases]
    held = measure.table(
        ("model", "weights, gradients, AdamW, GB", *batches),
        [
            [name, f"{STATE * n['parameters'] / 1e9:.2f}", *(largest_batch(card, n, how) for card, how in cases)]
            for name, n in found.items()
        ],
    )
    notes = f"""\
- Kept: storages that the forward pass saves for the backward pass, weights left out. Peak: the most that both passes
  hold at once, temporaries included; growth from a batch of {BATCHES[0]} to one of {BATCHES[1]}.
- Cast weights: bf16 copies that autocast makes and keeps until the backward pass, whatever the batch.
- Kept and peak for ViT-B/16 at batch 8: with real tensors {real}, without contents {fake}.
- Arithmetic: {STATE} bytes a parameter; batch = ({USABLE:.0%} of the card - weights, gradients, AdamW - cast weights) /
  peak of an image. The operations are those of a CPU; a GPU's kernels may hold a little more or less."""
    measure.report("memory", "Memory of training", "cpu", f"## Counted\n\n{counted}", f"## Arithmetic\n\n{held}", notes)


if __name__ == "__main__":
    main()
