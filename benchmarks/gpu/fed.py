"""Does loading keep up with training? Images are read from the page cache after the first pass."""

import math
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import measure
from benchmarks.gpu import programs
from benchmarks.gpu.items import Bench, Item
from benchmarks.loader import SEED, images_per_second, our_loader, without_simplejpeg
from umae.data import decoding
from umae.data.batches import Plan
from umae.data.images import load_images

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

WORKERS = (1, 8, 16)


def items(bench: Bench) -> list[Item]:
    decoders = ["Pillow", *(["simplejpeg"] if decoding.simplejpeg else [])]
    alone = [*decoders, *(["torchvision", "torchvision on the device"] if decode_jpeg else [])]
    found = [
        Item(f"loader, {name}, {n} workers", partial(load, bench, name, n), 30) for n in WORKERS for name in decoders
    ]
    found += [Item(f"decoding alone, {name}", partial(decode, bench, name), 20) for name in alone]
    return [*found, Item("a run of 100 steps", partial(waiting, bench), 180)]


def photographs(bench: Bench) -> Path:
    """The folder that was given, or JPEGs of 500 x 375 pixels of smooth noise."""
    if bench.images is not None:
        return bench.images
    folder, (count, width, height) = bench.folder / "photographs", bench.pick((512, 500, 375), (8, 40, 30))
    if not folder.exists():
        folder.mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(256, size=(height // 8, width // 8, 3), dtype=np.uint8)
            size = (width + i % 2, height)  # of one size, they would be kept in memory, decoded
            image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            image.save(folder / f"{i:04}.jpg", quality=90)
    return folder


def load(bench: Bench, decoder: str, workers: int) -> dict[str, Any]:
    """Images per second through our whole DataLoader, as uint8 crops."""
    images = load_images(str(photographs(bench)))
    side = bench.pick(224, 16)
    plan = Plan(len(images), min(64, len(images)), accumulation=1, processes=1, seed=SEED)
    batches = bench.pick(20 + 10 * workers, 2)

    def run() -> float:
        return images_per_second(our_loader(images, plan, (side, side), bench.pick(workers, 1)), plan, batches)

    return {"images_per_second": without_simplejpeg(run) if decoder == "Pillow" else run()}


def decode(bench: Bench, decoder: str) -> dict[str, Any]:
    """Images per second of decoding alone, at full size, in one process."""
    files = [path for path in sorted(photographs(bench).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    encoded = [path.read_bytes() for path in islice(cycle(files), bench.pick(256, 4))]
    seconds = measure.interleave({decoder: partial(decode_batch(decoder, bench.device), encoded)}, 3, bench.device)
    return {"images_per_second": len(encoded) / seconds[decoder]}


def decode_batch(decoder: str, device: str) -> Callable[[list[bytes]], object]:
    """A function that decodes a list of JPEGs to RGB."""
    if decoder == "Pillow":
        return lambda encoded: without_simplejpeg(lambda: [decoding.read_pixels(data) for data in encoded])
    if decoder == "simplejpeg":
        return lambda encoded: [decoding.read_pixels(data) for data in encoded]
    where = device if decoder == "torchvision on the device" else "cpu"

    def by_torchvision(encoded: list[bytes]) -> object:
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]
        if where == "cpu":
            return [decode_jpeg(tensor, mode=ImageReadMode.RGB) for tensor in tensors]
        return decode_jpeg(tensors, mode=ImageReadMode.RGB, device=where)

    return by_torchvision


def waiting(bench: Bench) -> dict[str, Any]:
    """`umae pretrain` of ViT-B/16 in bf16, compiled: its share of waiting after the first third."""
    folder, photos = bench.folder / "fed", photographs(bench)
    batch_size = min(256, len(load_images(str(photos))))
    fields = ",".join(
        f"{name}={value}" for name, value in bench.fields("ViT-B/16").items() if "_size" in name or "num" in name
    )
    steps = bench.pick(100, 4)
    flags = [
        "--dataset_name",
        str(photos),
        "--max_train_steps",
        str(steps),
        "--logging_steps",
        str(math.ceil(steps / 10)),
    ]
    flags += ["--per_device_train_batch_size", str(batch_size), "--eval_steps", "0", "--mixed_precision", "bf16"]
    flags += ["--torch_compile", bench.pick("model", "no"), *(["--config_overrides", fields] if fields else [])]
    programs.run(bench, folder, "pretrain", *flags)
    lines = programs.metrics(folder)
    lines = lines[math.ceil(len(lines) / 3) :]
    means = {name: sum(line[name] for line in lines) / len(lines) for name in ("pictures_per_second", "data_wait")}
    return {"batch": batch_size, **means}


def tables(results: dict[str, dict[str, Any]], bench: Bench) -> list[str]:
    rates = [[name, f"{found['images_per_second']:,.0f}"] for name, found in results.items() if len(found) == 1]
    parts = [measure.table(("", "images/s"), rates)] if rates else []
    parts.append(f"Images: {bench.images.name if bench.images else 'made ones of smooth noise, 500 x 375 pixels'}.")
    if run := results.get("a run of 100 steps"):
        parts.append(
            f"ViT-B/16 in a run of 100 steps at batch {run['batch']}: {run['pictures_per_second']:,.0f} images/s, "
            f"{run['data_wait']:.1%} of the time waiting."
        )
    return parts
