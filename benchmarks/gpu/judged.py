"""What checkpoints and evaluations cost."""

import shutil
from functools import partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu.fed import photographs
from benchmarks.gpu.items import Bench, Item
from benchmarks.gpu.training import Training, make_accelerator
from umae import UMAEConfig, UMAEModel
from umae.data.batches import Plan
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor
from umae.evaluation.features import frozen_features
from umae.evaluation.mae import BatchNormHead, encoded_batches
from umae.evaluation.monitor import MOST_IMAGES, Monitor, ProbeImages
from umae.training.checkpoints import Writer
from umae.training.hardware import usual_workers

CLASSES = 10


def items(bench: Bench) -> list[Item]:
    return [
        Item("a checkpoint of ViT-B/16", partial(checkpoint, bench), 60),
        Item("an evaluation by the monitor", partial(evaluation, bench), 60),
        Item("features of 2,048 images, float32", partial(features, bench, torch.float32), 60),
        Item("features of 2,048 images, bf16", partial(features, bench, torch.bfloat16), 60),
        Item("20 steps of protocol mae", partial(protocol_mae, bench), 120),
    ]


def checkpoint(bench: Bench) -> dict[str, Any]:
    """How long training waits for it, until it is whole on the disk, and restored."""
    folder = bench.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    training = Training(bench, "bf16", "no", "ViT-B/16").steps(1)
    with Writer() as writer:
        waited = measure.seconds_of(lambda: training.save(folder, writer), bench.device)
        written = waited + measure.seconds_of(writer.wait, bench.device)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    restored = measure.seconds_of(lambda: training.state.restore(folder), bench.device)
    shutil.rmtree(folder)
    return {"seconds": waited, "on the disk after": written, "restored in": restored, "GB": size / 1e9}


def evaluation(bench: Bench) -> dict[str, Any]:
    """Of MOST_IMAGES random images with labels, ViT-B/16 in bf16, the second time."""
    training = Training(bench, "bf16", "no", "ViT-B/16")
    config, accelerator = training.config, training.accelerator
    count, batch_size = bench.pick((MOST_IMAGES, 64), (8, 4))
    shape = (count // batch_size, batch_size)
    probe_images = ProbeImages(
        count,
        torch.randint(256, (*shape, config.num_channels, *config.image_height_width), dtype=torch.uint8),
        torch.arange(count).view(shape),
        torch.ones(shape, dtype=torch.bool),
        torch.randint(CLASSES, (count,)),
    )
    labels = torch.randint(CLASSES, (2048,))
    monitor = Monitor(accelerator, config, probe_images, labels, CLASSES, training.processor, 0)
    for step in range(4):
        monitor.observe(torch.randn(32, config.hidden_size, device=accelerator.device), torch.arange(32) + 32 * step)
    batch = training.batch(0)
    first = measure.seconds_of(lambda: monitor.evaluate(training.state.model, batch, 0), bench.device)
    second = measure.seconds_of(lambda: monitor.evaluate(training.state.model, batch, 0), bench.device)
    return {"seconds": second, "the first": first}


def features(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    """Of random images already on the device, ViT-B/16, batches of 256."""
    config = UMAEConfig(**bench.fields("ViT-B/16"), pooling="mean")
    encoder = UMAEModel._from_config(config, attn_implementation="sdpa").to(bench.device).eval()
    count, batch_size = bench.pick((2048, 256), (8, 4))
    pixel_values = torch.randn(batch_size, config.num_channels, *config.image_height_width, device=bench.device)

    @torch.inference_mode()
    def encode() -> None:
        with torch.autocast(bench.device, dtype, enabled=dtype != torch.float32):
            for _ in range(count // batch_size):
                frozen_features(encoder, pixel_values)

    seconds = measure.interleave({"encode": encode}, 3, bench.device)["encode"]
    return {"seconds": seconds, "images/s": count / seconds}


def protocol_mae(bench: Bench) -> dict[str, Any]:
    """With loading and random crops, in bf16, after the first step."""
    accelerator = make_accelerator(bench, "bf16")
    images = load_images(str(photographs(bench)))
    config = UMAEConfig(**bench.fields("ViT-B/16"), pooling="mean")
    encoder = UMAEModel._from_config(config, attn_implementation="sdpa").to(accelerator.device).eval()
    plan = Plan(len(images), min(512, len(images)), 1, 1, seed=0)
    steps, workers = bench.pick(20, 2), usual_workers(accelerator.device)
    heads = [BatchNormHead(CLASSES, config.hidden_size, 0, accelerator.device) for _ in range(2)]
    processor = evaluation_processor(config.image_height_width)
    batches = iter(encoded_batches(encoder, images, processor, plan, 0, 1 + steps, workers, accelerator))

    def step() -> None:
        encoded, index = next(batches)
        for column, head in enumerate(heads):
            head.step(encoded[:, column], index % CLASSES, 0.1)

    step()
    seconds = measure.seconds_of(lambda: [step() for _ in range(steps)], bench.device)
    return {"seconds": seconds, "images/s": steps * plan.batch_size / seconds, "batch": plan.batch_size}


def tables(results: dict[str, dict[str, Any]], bench: Bench) -> list[str]:
    rows = []
    for name, found in results.items():
        rest = "; ".join(f"{key} {value:,.4g}" for key, value in found.items() if key != "seconds")
        rows.append([name, f"{found['seconds']:.3f}", rest])
    return [measure.table(("", "seconds", "besides"), rows)] if rows else []
