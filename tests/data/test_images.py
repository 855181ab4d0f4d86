import io
import math
import re
import shutil
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from processes import SHARED, run

from image_processing_umae import MAX_PIXELS
from umae import seeding
from umae.data import batches
from umae.data.batches import Plan, TrainingImages, decode_all, training_loader
from umae.data.images import load_images, split_names


def png(value: int = 0, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Names that `datasets`' own folder reader trips over: split words in file names, brackets in the folder's."""
    root = tmp_path / "my [old] images"
    for name in ("b/test_drive.png", "b/train.jpg", "a/1.PNG", "a/deep/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(len(name)))
    (root / "notes.txt").write_text("no image")
    (root / "export.json").write_text("{}")
    (root / "a" / ".hidden.png").write_bytes(png())
    return root


@pytest.fixture
def parquet(tmp_path):
    """Two splits, images as `datasets` stores them on the Hub."""
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"]), "name": datasets.Value("string")}
    )
    for split, count in (("train", 6), ("test", 3)):
        rows = {
            "img": [{"bytes": png(i), "path": None} for i in range(count)],
            "kind": [i % 2 for i in range(count)],
            "name": [f"{i % 3}" for i in range(count)],
        }
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return tmp_path / "images"


def test_every_image_of_a_folder_is_found_once_whatever_its_name(folder):
    images = load_images(str(folder))
    names = [images.name_of(i) for i in range(len(images))]
    assert names == ["a/1.PNG", "a/deep/2.png", "b/test_drive.png", "b/train.jpg"]
    assert images.label_names == ["a", "b"] and images.labels().tolist() == [0, 0, 1, 1]
    assert [images.read(i).getpixel((0, 0))[0] for i in range(4)] == [len(name) for name in names]
    assert str(folder.parent) not in images.description


def test_images_with_a_metadata_file_are_read_as_datasets_reads_them(tmp_path):
    (tmp_path / "1.png").write_bytes(png(7))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "kind": "cat"}\n')
    images = load_images(str(tmp_path), label_column="kind")
    assert images.label_column == "kind" and images.read(0).getpixel((0, 0)) == (7, 0, 0)


def write_images(folder: Path, *names: str) -> str:
    """Folders of five images, each image of another grey; a name with a dot is a single image."""
    for name in names:
        for file in [name] if "." in name else [f"{name}/{i}.png" for i in range(5)]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(png(len(list(folder.rglob("*.png")))))
    return str(folder)


@pytest.mark.parametrize("name", ["train", "Test", "val"])
def test_one_class_that_is_named_like_a_split_is_a_class(tmp_path, name):
    images = load_images(write_images(tmp_path, "bus", "car", name))
    assert split_names(str(tmp_path)) == ["train"] and len(images) == 15
    assert sorted(images.label_names) == sorted(["bus", "car", name])
    assert images.labels().bincount().tolist() == [5, 5, 5]


def test_folders_named_after_splits_are_splits_if_no_other_folder_holds_images(tmp_path):
    write_images(tmp_path, "train/a", "train/b", "Val/a", "Val/b")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "labels.csv").write_text("no image")
    (tmp_path / "test").mkdir()
    assert sorted(split_names(str(tmp_path))) == ["train", "validation"]
    for split in ("train", "validation"):
        images = load_images(str(tmp_path), split=split)
        assert len(images) == 10 and images.label_names == ["a", "b"]
    with pytest.raises(ValueError, match="has no split 'test'; it has validation, train"):
        load_images(str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test", "train", "extra"], "sub-folders test, train are named like splits, but extra beside them"),
        (["bus", "car", "train", "valid"], "sub-folders train, valid are named like splits, but bus, car beside them"),
        (["train", "test", "a.png", "b.png"], "sub-folders test, train are named like splits, but 2 loose images"),
        (["train", "a.png"], "sub-folders train are named like splits, but 1 loose images such as a.png"),
        (["train", "val", "validation"], "sub-folders val, validation are both of the split validation"),
        (["Train", "train"], "sub-folders Train, train are both of the split train"),
    ],
    ids=str,
)
def test_folders_that_may_be_splits_or_classes_are_refused_with_what_was_found(tmp_path, names, message):
    write_images(tmp_path, *names)
    for load in (load_images, split_names):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))


def test_labels_are_described_by_their_classes_and_where_they_come_from(tmp_path, parquet):
    assert load_images(str(parquet)).label_summary == "2 classes from column 'kind': x, y"
    assert load_images("digits").label_summary == "10 classes from column 'label': 0, 1, 2, 3, 4, 5, ..."
    assert load_images(str(parquet), label_column="name").label_summary == "string values from column 'name'"
    plate = tmp_path / "plate_00"
    assert (
        load_images(write_images(plate, "day 0", "day 1")).label_summary == "2 classes from sub-folders: day 0, day 1"
    )
    assert load_images(write_images(tmp_path / "flat", "a.png")).label_summary == "none"


def test_label_column_none_says_that_there_are_no_labels(tmp_path, parquet):
    for name in ("digits", str(parquet), write_images(tmp_path / "plate_00", "day 0", "day 1")):
        images = load_images(name, label_column="none")
        assert images.dataset.column_names == [images.image_column] and not images.has_labels
        assert len(images) == len(load_images(name)) and images.label_summary == "none"
    with pytest.raises(ValueError, match=r"digits .train. has no column 'kind'; it has image, label"):
        load_images("digits", label_column="kind")


def test_files_that_may_be_images_and_are_not_read_are_counted_by_their_ending(tmp_path):
    folder = write_images(
        tmp_path / "holiday", "a/1.png", "a/2.HEIC", "b/3.heic", "b/4.cr2", "notes.txt", ".hidden.heic"
    )
    assert load_images(folder).not_read == "2 .heic, 1 .cr2"
    assert load_images(write_images(tmp_path / "plain", "1.png", "notes.txt")).not_read == ""
    with pytest.raises(ValueError, match=r"no images could be loaded; it holds 1 .heic, which are not read"):
        load_images(write_images(tmp_path / "phone", "1.heic", "notes.txt"))


def test_a_file_that_is_not_read_does_not_hide_a_metadata_file(tmp_path):
    (tmp_path / "1.png").write_bytes(png(7))
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "metadata.csv").write_text("file_name,kind\n1.png,3\n")
    assert len(load_images(str(tmp_path), label_column="kind")) == 1


def test_a_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "1.png").write_bytes(png())
    images = load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"has no labels: its columns are image; name one with label_column_name"):
        images.labels()


def test_the_fingerprint_is_of_the_images_and_not_of_their_place(folder, tmp_path):
    before = load_images(str(folder)).fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = load_images(str(tmp_path / "elsewhere"))
    assert moved.fingerprint() == before
    file = Path(moved.dataset[0]["image"]["path"])
    shutil.copy(moved.dataset[1]["image"]["path"], file)
    assert load_images(str(tmp_path / "elsewhere")).fingerprint() != before
    file.unlink()
    assert moved.fingerprint() != before
    digits = load_images("digits")
    assert digits.fingerprint() == load_images("digits").fingerprint()
    assert digits.fingerprint() != load_images("digits", split="test").fingerprint()


def test_digits_are_bundled_and_whole():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1438, 359) and split_names("digits") == ["train", "test"]
    assert train.read(0).size == (8, 8) and train.read(0).mode == "RGB"
    assert torch.bincount(torch.cat([train.labels(), test.labels()])).min() >= 174
    assert np.asarray(train.read(0)).max() == 255 - 16  # 15 of 16 greys


def test_parquet_columns_are_found_by_their_types(parquet):
    images = load_images(str(parquet), split="test")
    assert (images.image_column, images.label_column, len(images)) == ("img", "kind", 3)
    assert split_names(str(parquet)) == ["train", "test"]
    assert images.read(2).getpixel((0, 0)) == (2, 0, 0)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([f"cat {i}" for i in range(6)], "'cat 0', 'cat 1', 'cat 2', 'cat 3', 'cat 4' and 1 other such values"),
        ([0, 1, -1, 0, 1, 0], "-1"),
        ([0, 1, None, 0, 1, 0], "None"),
        ([0, 1, 0.5, 0, 1, 0], "0.0, 0.5, 1.0"),
    ],
    ids=["text", "negative", "missing", "fractions"],
)
def test_labels_that_are_no_classes_are_refused_and_pretraining_never_asks(tmp_path, labels, found):
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(6)], "label": labels}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    images = load_images(str(tmp_path))
    assert len(images) == 6 and images.label_column == "label"
    with pytest.raises(ValueError, match=re.escape(f"column 'label' holds {found}; expected a class of at least 0")):
        images.labels()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "dev.*train.*test"),
        ({"image_column": "image"}, "has no column 'image'; it has img, kind, name"),
        ({"label_column": "labels"}, "has no column 'labels'; it has img, kind, name"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused_with_what_does(parquet, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(str(parquet), **arguments)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "some/where/else"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ValueError, match=f"there is no folder {name}"):
        load_images(name)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images could be loaded"):
        load_images(str(tmp_path))


def test_a_data_set_without_rows_is_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"split 'train': .* no data"):
        load_images(str(tmp_path))


def test_two_image_columns_are_ambiguous(tmp_path):
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    row = {"bytes": png(), "path": None}
    datasets.Dataset.from_dict({"a": [row], "b": [row]}, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="2 image columns among a, b; name the one"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), image_column="b").image_column == "b"


# -------------------------------------------------------------------------------------------------- plan and batches


def indices_of(plan: Plan, rank: int, start: int, stop: int) -> list[list[int]]:
    return [indices.tolist() for _, indices in plan.micro_batches(rank, start, stop)]


def test_an_epoch_shows_every_image_at_most_once():
    plan = Plan(images=50, batch_size=4, accumulation=3, processes=1, seed=0)
    assert plan.images_per_step == 12 and plan.steps_per_epoch == 4
    epochs = [list(chain(*indices_of(plan, 0, first, first + 4))) for first in (0, 4)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 48
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_global_micro_batch_is_shared_by_any_number_of_processes(processes):
    alone = Plan(images=50, batch_size=8, accumulation=2, processes=1, seed=3)
    shared = Plan(images=50, batch_size=8 // processes, accumulation=2, processes=processes, seed=3)
    ranks = [indices_of(shared, rank, 0, 7) for rank in range(processes)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == indices_of(alone, 0, 0, 7)


def test_starting_at_a_step_gives_what_would_have_come():
    plan = Plan(images=50, batch_size=8, accumulation=2, processes=1, seed=3)
    assert indices_of(plan, 0, 4, 9) == indices_of(plan, 0, 0, 9)[8:]
    assert [epoch for epoch, _ in plan.micro_batches(0, 2, 4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_memory_or_on_where_one_starts(workers, in_memory):
    images = load_images("digits")
    plan = Plan(len(images), batch_size=16, accumulation=1, processes=1, seed=0)
    expected = list(training_loader(TrainingImages(images, (8, 8), seed=0), plan, 0, 0, 6))
    decoded = TrainingImages(images, (8, 8), 0, decode_all(images) if in_memory else None)
    batches = list(training_loader(decoded, plan, 0, 3, 6, num_workers=workers))
    assert len(batches) == 3
    for batch, other in zip(batches, expected[3:], strict=True):
        assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].shape == (16, 3, 8, 8)
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
        assert torch.equal(batch["index"], other["index"]) and batch["epoch"] == other["epoch"] == 0


def test_a_small_set_is_decoded_whole():
    images = load_images("digits", split="test")
    decoded = decode_all(images, show_progress=False)
    pixels = decoded.pixels
    assert pixels.shape == (359, 3, 8, 8) and pixels.dtype == torch.uint8 and decoded.refusals == {}
    assert all(torch.equal(pixels[i], image) for i, image in zip((0, 300), images.read_pixels([0, 300]), strict=True))


def test_images_of_several_sizes_or_too_many_of_them_stay_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "MEMORY_LIMIT", 359 * 3 * 8 * 8)
    assert decode_all(load_images("digits", split="test"), show_progress=False) is not None
    monkeypatch.setattr(batches, "MEMORY_LIMIT", 359 * 3 * 8 * 8 - 1)
    assert decode_all(load_images("digits", split="test"), show_progress=False) is None
    for side in (4, 4, 5):
        Image.new("RGB", (side, 4)).save(tmp_path / f"{len(list(tmp_path.iterdir()))}.png")
    assert decode_all(load_images(str(tmp_path)), show_progress=False) is None


@pytest.fixture
def half_bad(tmp_path):
    """Twelve images, of which 1, 4, 5 and 11 cannot be read, each for a reason of its own."""
    for i in range(12):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "01.png").write_bytes(b"")
    (tmp_path / "04.png").write_bytes(png()[:20])
    (tmp_path / "05.png").write_text("<html></html>")
    (tmp_path / "11.png").unlink()
    (tmp_path / "11.png").symlink_to("nowhere")
    return load_images(str(tmp_path))


BAD = {1: "01.png", 4: "04.png", 5: "05.png", 11: "11.png"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_next_readable_image_of_the_order_takes_a_bad_ones_place(half_bad, processes, in_memory, workers):
    decoded = decode_all(half_bad) if in_memory else None
    order = seeding.permutation(7, 0, 12).tolist()
    expected = [next(i for i in order[position:] + order[:position] if i not in BAD) for position in range(12)]
    found, refusals = [], {}
    for rank in range(processes):
        plan = Plan(12, batch_size=6 // processes, accumulation=1, processes=processes, seed=7)
        dataset = TrainingImages(half_bad, (4, 4), seed=7, decoded=decoded)
        for step, batch in enumerate(training_loader(dataset, plan, rank, 0, 2, num_workers=workers)):
            assert batch["pixel_values"].shape == (6 // processes, 3, 4, 4)
            assert batch["pixel_values"][:, 0, 0, 0].tolist() == batch["index"].tolist()  # the image that it says
            found += [(step, rank, index) for index in batch["index"].tolist()]
            refusals |= batch["refusals"]
    assert [index for *_, index in sorted(found, key=lambda one: one[:2])] == expected
    assert {index: reason.split(": ")[0] for index, reason in refusals.items()} == BAD


def test_a_data_set_of_bad_images_alone_is_refused_with_the_first_three_reasons(half_bad, tmp_path):
    half_bad.check_readable()
    for file in tmp_path.iterdir():
        file.unlink()
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 12 images .*00.png: .*01.png: .*02.png: [^:]*$"):
        half_bad.check_readable()


def test_real_images_become_batches():
    folder = SHARED / "data" / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip("needs the ImageNet sample beside the project")
    images = load_images(str(folder))
    plan = Plan(len(images), batch_size=8, accumulation=1, processes=1, seed=0)
    (batch,) = training_loader(TrainingImages(images, (224, 224), seed=0), plan, 0, 0, 1)
    assert batch["pixel_values"].shape == (8, 3, 224, 224)
    assert batch["pixel_values"].float().std(dim=(1, 2, 3)).min() > 5  # none of them is blank


LOAD_LARGE = """
import image_processing_umae, resource, sys, torch
from umae.data import decoding
image_processing_umae.MAX_PIXELS = decoding.MAX_PIXELS = int(sys.argv[2])
from umae.data.batches import TrainingImages
from umae.data.images import load_images
images = load_images(sys.argv[1])
order = torch.arange(len(images)).repeat(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batch = TrainingImages(images, (32, 32), seed=0)[0, order]
print(len(images), len(batch["refusals"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_crops_show_the_share_of_the_area_that_is_asked_for_and_are_changed_last():
    images = load_images("digits")
    order = (0, torch.tensor([5, 2]))

    def shifted(crops, epoch, index):
        return [crop + index[position] for position, crop in enumerate(crops)]

    whole = TrainingImages(images, (8, 8), seed=0, min_scale=1.0)[order]["pixel_values"]
    # Of the whole area, only the square one of the shapes fits
    for crop, index in zip(whole, order[1].tolist(), strict=True):
        (pixels,) = images.read_pixels([index])
        assert crop.shape == pixels.shape and (crop.float() - pixels.float()).abs().mean() < 20
    after = TrainingImages(images, (8, 8), seed=0, min_scale=1.0, augment=shifted)[order]["pixel_values"]
    assert torch.equal(after[0], whole[0] + 5) and torch.equal(after[1], whole[1] + 2)
    small = TrainingImages(images, (8, 8), seed=0, min_scale=0.01)[order]["pixel_values"]
    assert not torch.equal(small, whole)


@pytest.mark.parametrize(
    ("fresh", "bytes_a_pixel"),
    [(False, 25), pytest.param(True, 13, marks=pytest.mark.slow)],  # a forked process first touches much memory anew
)
def test_memory_is_bounded_by_one_image_however_many_are_as_large_as_may_be(tmp_path, fresh, bytes_a_pixel):
    largest = MAX_PIXELS // 16  # the law is the same, the wait is shorter
    side = math.isqrt(largest)
    for name, mode, size, colour in (
        ("a.png", "RGB", (side, side), (9, 99, 199)), ("b.png", "RGBA", (side, side), (9, 99, 199, 99)),
        ("c.jpg", "RGB", (side, side), (9, 99, 199)), ("far_over.png", "1", (20_000, 10_000), 1),
        ("far_over.jpg", "L", (9_000, 6_000), 99), ("over.png", "1", (side + 1, side + 1), 1),
    ):  # fmt: skip
        Image.new(mode, size, colour).save(tmp_path / name, compress_level=1)
    result = run("-c", LOAD_LARGE, tmp_path, largest, fresh=fresh)
    count, refused, kilobytes = map(int, result.stdout.split())
    assert (count, refused) == (6, 3)
    assert kilobytes * 1024 < bytes_a_pixel * largest, (
        "three copies of 4 bytes a pixel, where an alpha channel is filled in"
    )
