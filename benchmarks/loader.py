"""From encoded images to batches of random crops: our loader against a worker that crops and resizes with Pillow.

    python -m benchmarks.loader my_images                         # photographs: 224 x 224 crops, one worker
    python -m benchmarks.loader my_images --small_set cifar10     # and a small set, 32 x 32, in the main process
    python -m benchmarks.loader my_images --shrunk my_images_868  # against its copy by `umae shrink`

Every contender makes uint8 batches of the same crops (the same boxes) with a DataLoader.
"""

import io
import time
from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import measure
from umae import seeding
from umae.data import decoding
from umae.data.batches import Decoded, Plan, TrainingImages, decode_all, training_loader
from umae.data.crops import CROP_NUMBERS, crop_box
from umae.data.images import Images, load_images
from umae.data.inputs import IMAGENET_MEAN, IMAGENET_STD, normalize

SEED = 0


class PillowCrops(torch.utils.data.Dataset):
    """The common way: open, convert, `resize(box=)`, to a tensor; with `in_float` also normalised in the worker."""

    def __init__(self, images: Images, size: tuple[int, int], in_float: bool):
        self.images, self.size, self.in_float = images, size, in_float

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        encoded = self.images.dataset[index][self.images.image_column]
        image = Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]).convert("RGB")
        (numbers,) = seeding.uniform(SEED, seeding.CROP, epoch, torch.tensor([index]), CROP_NUMBERS)
        top, left, height, width = crop_box(numbers, image.height, image.width)
        box = (left, top, left + width, top + height)
        crop = torch.from_numpy(np.array(image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=box)))
        crop = crop.permute(2, 0, 1)
        return normalize(crop[None], IMAGENET_MEAN, IMAGENET_STD)[0] if self.in_float else crop.contiguous()


def pillow_loader(images: Images, plan: Plan, size: tuple[int, int], in_float: bool, workers: int) -> DataLoader:
    batches = ([(epoch, index) for index in indices.tolist()] for epoch, indices in plan.micro_batches(0, 0, 10**6))
    return DataLoader(PillowCrops(images, size, in_float), batch_sampler=batches, num_workers=workers)


def our_loader(
    images: Images, plan: Plan, size: tuple[int, int], workers: int, decoded: Decoded | None = None
) -> DataLoader:
    return training_loader(TrainingImages(images, size, SEED, decoded), plan, 0, 0, 10**6, workers)


def images_per_second(loader: Iterable, plan: Plan, batches: int) -> float:
    """Measured after the first batch, so that the start of the workers does not count."""
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    return batches * plan.batch_size / (time.perf_counter() - start)


def without_simplejpeg(run: Callable[[], float]) -> float:
    """`run` with Pillow decoding; the workers are forked, so they see the change too."""
    simplejpeg, decoding.simplejpeg = decoding.simplejpeg, None
    try:
        return run()
    finally:
        decoding.simplejpeg = simplejpeg


def compare(contenders: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Images per second of every contender; every repetition runs all of them in turn."""
    rates = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, run in contenders.items():
            rates[name].append(run())
    return rates


def section(title: str, rates: dict[str, list[float]], baseline: str) -> str:
    """Median rates, and their ratios to the baseline's."""
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    rows = [
        [
            name,
            f"{median:,.0f}",
            f"{median / medians[baseline]:.2f}",
            f"{min(rates[name]):,.0f}-{max(rates[name]):,.0f}",
        ]
        for name, median in medians.items()
    ]
    return f"## {title}\n\n" + measure.table(("contender", "images/s", "ratio", "range"), rows)


def photographs(folder: str, repetitions: int) -> str:
    images, size, workers = load_images(folder), (224, 224), 1
    plan = Plan(len(images), batch_size=min(20, len(images)), accumulation=1, processes=1, seed=SEED)

    def rate(loader: DataLoader) -> float:
        return images_per_second(loader, plan, batches=30)

    pillow = "Pillow, resize(box=)"
    contenders = {
        "ours": lambda: without_simplejpeg(lambda: rate(our_loader(images, plan, size, workers))),
        "ours with simplejpeg": lambda: rate(our_loader(images, plan, size, workers)),
        pillow: lambda: rate(pillow_loader(images, plan, size, False, workers)),
        f"{pillow}, normalised in the worker": lambda: rate(pillow_loader(images, plan, size, True, workers)),
    }
    if decoding.simplejpeg is None:
        del contenders["ours with simplejpeg"]
    title = f"{len(images)} photographs, crops of 224 x 224, one worker"
    return section(title, compare(contenders, repetitions), pillow)


def shrunk_copy(folder: str, copy: str, repetitions: int) -> str:
    """Our loader on a folder and on its copy by `umae shrink`; and by how many levels their crops differ."""
    full, shrunk, size = load_images(folder), load_images(copy), (224, 224)
    if [full.name_of(index) for index in range(len(full))] != [shrunk.name_of(index) for index in range(len(shrunk))]:
        raise SystemExit(f"{copy} does not hold the images of {folder}; make it with `umae shrink`")
    plan = Plan(len(full), batch_size=min(20, len(full)), accumulation=1, processes=1, seed=SEED)
    contenders = {
        name: lambda images=images: images_per_second(our_loader(images, plan, size, workers=1), plan, batches=10)
        for name, images in (("the folder", full), ("its copy", shrunk))
    }
    before, after = (
        torch.cat(
            [TrainingImages(images, size, SEED)[0, part]["pixel_values"] for part in torch.arange(len(full)).split(20)]
        )
        for images in (full, shrunk)
    )
    difference = (before.float() - after.float()).abs().mean()
    table = section(f"{len(full)} photographs and their smaller copies", compare(contenders, repetitions), "the folder")
    return f"{table}\n\nMean difference of the crops: {difference:.2f} of 255 levels."


def small_set(name: str, repetitions: int) -> str:
    images, workers = load_images(name), 0
    decoded = decode_all(images)
    if decoded is None:
        raise SystemExit(f"{name} is not a small data set: its images differ in size or do not fit into memory")
    size = tuple(decoded.pixels.shape[2:])
    plan = Plan(len(images), batch_size=256, accumulation=1, processes=1, seed=SEED)

    def rate(loader: DataLoader) -> float:
        return images_per_second(loader, plan, batches=20)

    pillow = "Pillow, resize(box=)"
    contenders = {
        "ours, in memory": lambda: rate(our_loader(images, plan, size, workers, decoded)),
        "ours, from the encoded images": lambda: rate(our_loader(images, plan, size, workers)),
        pillow: lambda: rate(pillow_loader(images, plan, size, False, workers)),
    }
    title = f"{images.description}, {len(images):,} images of {size[0]} x {size[1]}, no worker"
    return section(title, compare(contenders, repetitions), pillow)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("folder", help="folder of photographs (JPEG)")
    parser.add_argument("--small_set", help="a data set of small images, all of the same size")
    parser.add_argument("--shrunk", help="the folder's copy by `umae shrink`")
    args = measure.start(parser)
    if args.shrunk:
        sections = [shrunk_copy(args.folder, args.shrunk, args.repetitions)]
    else:
        sections = [photographs(args.folder, args.repetitions)]
    if args.small_set:
        sections.append(small_set(args.small_set, args.repetitions))
    measure.report("loader", "From encoded images to crops", "cpu", *sections, repetitions=args.repetitions)


if __name__ == "__main__":
    main()
