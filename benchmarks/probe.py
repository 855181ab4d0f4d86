"""Cost of evaluating a frozen encoder: features once and all heads on them, against 90 epochs through the encoder.

    python -m benchmarks.probe

One pass of the tiny encoder over synthetic images is measured, and so are `train_linear_heads` (100 epochs, every
learning rate and weight decay) and `knn_classify` on its features. The usual protocol, a head trained for 90 epochs
that run the encoder, is calculated as 90 such passes; loading images and training the head are not counted.
"""

import torch

from benchmarks import measure
from benchmarks.step import SIZES
from modeling_umae import UMAEModel
from umae import UMAEConfig
from umae.evaluation.linear import LEARNING_RATES, WEIGHT_DECAYS, knn_classify, train_linear_heads

EPOCHS = 90
CLASSES = 10
BATCH_SIZE = 256
HEADS = len(LEARNING_RATES) * len(WEIGHT_DECAYS)


@torch.inference_mode()
def encode(encoder: UMAEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """(N, channels, height, width) -> (N, D), float32, unmasked."""
    return torch.cat([encoder(batch).pooler_output for batch in pixel_values.split(BATCH_SIZE)])


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--images", type=int, default=2048, help="synthetic training images (default 2048)")
    args = measure.start(parser)
    config = UMAEConfig(**SIZES["tiny"][0])
    encoder = UMAEModel._from_config(config, attn_implementation="sdpa").to(args.device).eval()
    size = (args.images, config.num_channels, *config.image_height_width)
    pixel_values = torch.randn(size, device=args.device)
    labels = torch.randint(CLASSES, (args.images,), device=args.device)
    features = encode(encoder, pixel_values)
    evaluated = features[: args.images // 5]

    seconds = measure.interleave(
        {
            "encoder": lambda: encode(encoder, pixel_values),
            "heads": lambda: train_linear_heads({"cls": features[None]}, labels, CLASSES, seed=0),
            "k-NN": lambda: knn_classify(features, labels, evaluated, CLASSES),
        },
        args.repetitions,
        args.device,
    )
    ours, usual = sum(seconds.values()), EPOCHS * seconds["encoder"]
    rows = [
        ["one pass through the encoder", "measured", f"{seconds['encoder']:.3f}"],
        [f"linear heads, {HEADS} settings, then the best on all images", "measured", f"{seconds['heads']:.3f}"],
        [f"k-NN of {len(evaluated):,} images", "measured", f"{seconds['k-NN']:.3f}"],
        ["all of these", "sum", f"{ours:.3f}"],
        [f"{EPOCHS} epochs through the encoder, 1 learning rate", "calculated", f"{usual:.1f}"],
        [f"the same, {HEADS} settings", "calculated", f"{HEADS * usual:.1f}"],
    ]
    measure.report(
        "probe",
        "Evaluating a frozen encoder",
        args.device,
        measure.table(("", "", "seconds"), rows),
        f"{args.images:,} synthetic images of 32 x 32, {CLASSES} classes, tiny encoder (192 x 12), float32, one of "
        f"the two poolings.\nFeatures once: **{usual / ours:.0f} times cheaper** than {EPOCHS} epochs with one "
        f"learning rate, {HEADS * usual / ours:.0f} times than with as many settings as here.",
        repetitions=args.repetitions,
    )


if __name__ == "__main__":
    main()
