"""What the tests of training have in common."""

import json

import pytest
from PIL import Image

SHORT = ("--max_train_steps", "12", "--checkpointing_steps", "4", "--logging_steps", "3", "--eval_steps", "4")
TEN = ("--max_train_steps", "10", "--logging_steps", "1", "--checkpointing_steps", "10", "--eval_steps", "0")


def metrics(folder) -> list[dict]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    from umae.training.log import SPEED

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def assert_same_curve(mine, expected, names=("reconstruction_loss", "uniformity_loss", "grad_norm")) -> None:
    assert len(mine) == len(expected)
    for one, other in zip(mine, expected, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)


def folder_with_bad_images(folder, count: int, bad: int) -> str:
    """Small images, the first ones cut short; the flags to train on them."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (9, 9), (i, 2 * i, 255 - i)).save(folder / f"{i:03}.jpg")
    for i in range(bad):
        path = folder / f"{3 * i:03}.jpg"
        path.write_bytes(path.read_bytes()[: 200 * i])
    return small_model(folder)


def folder_of_parquet(folder, **labels_of_splits) -> str:
    """Small images of the classes a and b as the Hub stores them, each split in a file of its own."""
    import datasets  # takes seconds, and the process that starts xdist's workers needs none of it

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, labels in labels_of_splits.items():
        images = [Image.new("RGB", (9, 9), (i, 99, 199)) for i in range(len(labels))]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def small_model(dataset_name) -> str:
    """The flags to train a small model on a data set."""
    sizes = (
        "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,decoder_hidden_size=16,decoder_num_hidden_layers=1"
    )
    return f"--dataset_name {dataset_name} --image_size 8 --patch_size 2 --config_overrides {sizes} --logging_steps 2"


def digits_with_lists(folder):
    """The digits as the Hub stores them, with lists of classes: "odd" and "large" (5 to 9), each where it applies."""
    import datasets

    from umae.data.images import load_images

    folder.mkdir()
    for split in ("train", "test"):
        digits = load_images("digits", split=split)
        lists = [[name for name, has in (("odd", n % 2), ("large", n > 4)) if has] for n in digits.labels().tolist()]
        rows = digits.dataset.remove_columns("label").add_column("labels", lists)
        rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
