"""A smaller copy of a folder of images, which training reads as it reads the folder."""

import csv
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from processes import run, start
from sklearn.datasets import load_sample_images

import umae
from arguments_umae import SHRINK, arguments_of
from command_line_umae import given_flags
from image_processing_umae import open_image
from umae.data.batches import TrainingImages
from umae.data.crops import least_side
from umae.data.decoding import to_tensor
from umae.data.shrinking import ShrunkFiles

SIZE = (64, 64)  # of the crops
SIDE = least_side(SIZE)  # 248
PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427


def saved(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two splits of two classes; names that a change of their endings would put in another order, or make the same."""
    top, (china, flower) = tmp_path / "images", PHOTOGRAPHS
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    saved(top / "train/china/a.png", china)
    saved(top / "train/china/a.jpg", china, quality=95)
    saved(top / "train/china/a.k.png", china.crop((50, 0, 640, 427)))
    saved(top / "train/china/turned.JPEG", china, quality=95, exif=orientation)
    saved(top / "train/flower/large.webp", flower, lossless=True)
    saved(top / "train/flower/small.png", flower.resize((SIDE + 9, SIDE)))
    saved(top / "val/china/b.jpg", china, quality=95, comment="mine")
    saved(top / "val/flower/c.jpg", flower.convert("L"), quality=95)
    (top / "labels.csv").write_text("file,kind\ntrain/china/a.png,1\n")
    (top / "train/flower/notes.jpg.tmp").write_text("no image")
    (top / "val/.hidden.jpg").write_bytes(b"")
    return top


def test_a_copy_has_the_classes_the_order_and_nearly_the_crops_of_its_folder(folder, tmp_path):
    before = contents(folder)
    record = umae.shrink(folder=folder, output_dir=tmp_path / "small", shortest_side=SIDE)
    assert contents(folder) == before
    assert record["images"] == 8 and record["bytes_after"] < record["bytes_before"] and record["unreadable"] == {}
    for split in ("train", "validation"):
        full, small = (umae.load_images(str(top), split=split) for top in (folder, tmp_path / "small"))
        names = [full.name_of(index) for index in range(len(full))]
        assert names == [small.name_of(index) for index in range(len(small))]
        assert full.label_names == small.label_names and torch.equal(full.labels(), small.labels())
        assert small.not_read == full.not_read
        for index in range(len(full)):
            assert min(small.read(index).size) == SIDE
        key = (0, torch.arange(len(full)))
        crops = [TrainingImages(images, SIZE, seed=0)[key]["pixel_values"].float() for images in (full, small)]
        assert 0 < (crops[0] - crops[1]).abs().mean() < 4


def test_small_images_and_other_files_are_copied_as_they_are_and_hidden_ones_are_not(folder, tmp_path):
    umae.shrink(folder=folder, output_dir=tmp_path / "small", shortest_side=SIDE)
    full, small = contents(folder), contents(tmp_path / "small")
    same = {"labels.csv", "train/flower/notes.jpg.tmp", "train/flower/small.png"}
    assert {name for name in full if full[name] == small.get(name)} == same
    assert small.keys() - full.keys() == {"shrink.json", ".shrink.lock"} and full.keys() - small.keys() == {
        "val/.hidden.jpg"
    }


def test_labels_of_a_metadata_file_stay_with_their_images(tmp_path):
    for number, image in enumerate(PHOTOGRAPHS):
        saved(tmp_path / f"images/{number}.png", image)
    with open(tmp_path / "images/metadata.csv", "w") as file:
        csv.writer(file).writerows([("file_name", "label"), ("0.png", 3), ("1.png", 5)])
    umae.shrink(folder=tmp_path / "images", output_dir=tmp_path / "small", shortest_side=SIDE)
    images = umae.load_images(str(tmp_path / "small"))
    assert images.labels().tolist() == [3, 5] and [min(images.read(i).size) for i in range(2)] == [SIDE, SIDE]


def test_images_of_every_kind_become_what_training_sees_of_them(tmp_path):
    grey = np.asarray(PHOTOGRAPHS[0].convert("L"))
    transparent = PHOTOGRAPHS[1].copy()
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 8
    kinds = {
        "grey.png": (Image.fromarray(grey), {}),
        "sixteen bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "float.tif": (Image.fromarray(grey.astype(np.float32) * 3), {}),
        "transparent.png": (transparent, {}),
        "turned.jpg": (PHOTOGRAPHS[0], {"exif": orientation, "quality": 95}),
        "cmyk.jpg": (PHOTOGRAPHS[0].convert("CMYK"), {"quality": 95}),
        "palette.gif": (PHOTOGRAPHS[0], {"comment": b"c" * 70_000}),  # more than a JPEG can hold
    }
    for name, (image, options) in kinds.items():
        saved(tmp_path / "images" / name, image, **options)
    umae.shrink(folder=tmp_path / "images", output_dir=tmp_path / "small", shortest_side=SIDE)
    for name in kinds:
        small, full = open_image(tmp_path / "small" / name), open_image(tmp_path / "images" / name)
        assert min(small.size) == SIDE, name
        resized = to_tensor(full.resize(small.size, Image.Resampling.BICUBIC)).float()
        difference = (to_tensor(small).float() - resized).abs()
        assert difference.mean() < 5, name
        if "grey" in name or "bits" in name or "float" in name:
            assert len(set(small.convert("RGB").split()[0].tobytes()) ^ set(small.split()[2].tobytes())) == 0, name
        with Image.open(tmp_path / "small" / name) as file:
            assert file.format == "JPEG" and file.layer[0][1:3] == (2, 2), "4:2:0"


def test_a_copy_is_there_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    def full_disk(path):
        raise OSError("No space left on device")

    (tmp_path / "temporary").mkdir()
    names = ["train/china/a.png", "train/flower/small.png"]  # resized and copied
    images = ShrunkFiles(folder, tmp_path / "small", names, SIDE, tmp_path / "temporary")
    with monkeypatch.context() as patch:
        patch.setattr("umae.files._fsync", full_disk)
        assert {name: str(error) for name, error in map(images.__getitem__, range(2))} == dict.fromkeys(
            names, "No space left on device"
        )
    assert not [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
    assert [images[index] for index in range(2)] == [(name, None) for name in names]


@pytest.mark.parametrize("everyone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_that_is_started_again_ends_with_the_same_bytes(tmp_path, everyone):
    for number in range(60):
        image = PHOTOGRAPHS[number % 2].crop((number, 0, 640, 427))
        saved(tmp_path / f"images/{number % 3}/{number:02}.png", image, compress_level=1)
    (tmp_path / "images/0/30.png").write_bytes(b"no image")
    (tmp_path / "images/labels.txt").write_text("cat\ndog\n")
    command = ("-m", "umae", "shrink", tmp_path / "images", "--shortest_side", "300", "--output_dir")
    undisturbed = run(*command, tmp_path / "whole")
    assert "whole: 59 images" in undisturbed.stdout and "left out: 1 of 60 images" in undisturbed.stdout
    process = start(*command, tmp_path / "small")
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "small").glob("*/*.png"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    assert 5 <= len(list((tmp_path / "small").glob("*/*.png"))) < 59, "not in the middle"
    run(*command, tmp_path / "small")  # while workers of the killed one may still write
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").rglob("*.png")}
    run(*command, tmp_path / "small")
    assert written == {path: path.stat().st_mtime_ns for path in written}, "a finished copy is left as it is"


def test_ctrl_c_stops_without_a_traceback_and_leaves_nobody(tmp_path):
    saved(tmp_path / "images/00.jpg", PHOTOGRAPHS[0].resize((1800, 1200)))
    for number in range(1, 60):
        shutil.copy(tmp_path / "images/00.jpg", tmp_path / f"images/{number:02}.jpg")
    command = ("-m", "umae", "shrink", tmp_path / "images", "--output_dir", tmp_path / "small")
    with open(tmp_path / "printed", "w+") as printed:
        process = start(*command, stdout=printed)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "small").glob("*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 128 + signal.SIGINT
        printed.seek(0)
        assert printed.read() == "stopped; the same command continues\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert 0 < len(list((tmp_path / "small").glob("*.jpg"))) < 60


@pytest.mark.slow
def test_workers_that_are_spawned_write_the_same_bytes(folder, tmp_path):
    """As on macOS, and from Python 3.14 on."""
    umae.shrink(folder=folder, output_dir=tmp_path / "small", shortest_side=SIDE)
    call = f"umae.shrink(folder={str(folder)!r}, output_dir={str(tmp_path / 'spawned')!r}, shortest_side={SIDE})"
    run("-c", f"import multiprocessing, umae; multiprocessing.set_start_method('spawn'); {call}")
    assert contents(tmp_path / "spawned") == contents(tmp_path / "small")


def test_images_that_cannot_be_read_are_left_out_counted_and_named(folder, tmp_path, capsys):
    (folder / "train/china/broken.png").write_bytes((folder / "train/china/a.png").read_bytes()[:9000])
    (folder / "train/flower/tiny.jpg").write_text("<html>")
    record = umae.shrink(folder=folder, output_dir=tmp_path / "small", shortest_side=SIDE)
    assert list(record["unreadable"]) == ["train/china/broken.png", "train/flower/tiny.jpg"]
    assert "broken.png: " in record["unreadable"]["train/china/broken.png"]
    assert record["images"] == 8 and "unreadable and left out: 2 of 10 images" in capsys.readouterr().out
    assert not list((tmp_path / "small").rglob("broken*")) and not list((tmp_path / "small").rglob("tiny*"))


def test_a_folder_that_would_be_written_to_or_mixed_is_refused(folder, tmp_path):
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    for output_dir in (folder, folder / "small", folder / "train", tmp_path / "link" / "small", tmp_path):
        with pytest.raises(ValueError, match=r"^output_dir .* lie within each other"):
            umae.shrink(folder=folder, output_dir=output_dir)
    assert contents(folder) == before
    (tmp_path / "other").mkdir()
    saved(tmp_path / "other" / "a.jpg", PHOTOGRAPHS[0])
    with pytest.raises(ValueError, match=r"other is not empty and holds no shrink.json"):
        umae.shrink(folder=folder, output_dir=tmp_path / "other")
    umae.shrink(folder=folder, output_dir=tmp_path / "small", shortest_side=SIDE)
    with pytest.raises(ValueError, match=f"small holds images shrunk with shortest_side {SIDE}, not 300; give another"):
        umae.shrink(folder=folder, output_dir=tmp_path / "small", shortest_side=300)
    with pytest.raises(ValueError, match=f"small holds images shrunk with folder {folder}, not {tmp_path / 'other'}"):
        umae.shrink(folder=tmp_path / "other", output_dir=tmp_path / "small", shortest_side=SIDE)
    (tmp_path / "empty").mkdir()
    for nothing, message in ((tmp_path / "empty", "empty holds no image files"), ("nowhere", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            umae.shrink(folder=nothing, output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_copy_can_be_shrunk_again(folder, tmp_path):
    umae.shrink(folder=folder, output_dir=tmp_path / "small", shortest_side=SIDE)
    record = umae.shrink(folder=tmp_path / "small", output_dir=tmp_path / "smaller", shortest_side=100)
    assert record["folder"] == str(tmp_path / "small") and record["shortest_side"] == 100
    images = umae.load_images(str(tmp_path / "smaller"))
    assert {min(images.read(index).size) for index in range(len(images))} == {100}


def test_a_disk_that_cannot_be_written_to_ends_the_run_with_one_line(folder, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / ".shrink").write_text("a file where a folder has to be")
    result = run("-m", "umae", "shrink", folder, "--output_dir", tmp_path / "small", check=False)
    assert result.returncode == 1 and result.stderr.startswith("umae shrink: [Errno 17] File exists")


def test_a_failed_write_in_a_worker_is_not_an_unreadable_image(folder, tmp_path):
    umae.shrink(folder=folder, output_dir=tmp_path / "small")
    shutil.rmtree(tmp_path / "small" / "val")
    (tmp_path / "small" / "val").symlink_to("nowhere/at/all")  # a folder that cannot be made
    with pytest.raises(OSError, match=r"File exists: .*val"):
        umae.shrink(folder=folder, output_dir=tmp_path / "small")


def test_an_error_that_a_notebook_keeps_does_not_keep_the_process(folder, tmp_path):
    """At its end a process waits for the workers, which wait for work as long as their loader is there."""
    call = f"umae.shrink(folder={str(folder)!r}, output_dir={str(tmp_path / 'small')!r})"
    wrong = "from umae.data import shrinking; shrinking.shrunk = None"  # as an error in a library would be
    lines = ("import sys, umae", wrong, "try:", f"    {call}", "except TypeError as error:", "    sys.kept = error")
    run("-c", "\n".join(lines), timeout=30)


def test_the_default_side_is_what_the_crops_of_pretraining_need():
    assert arguments_of(SHRINK, {"folder": "f", "output_dir": "o"})[0].shortest_side == least_side((224, 224))


def test_a_folder_stands_alone_anywhere_on_the_command_line():
    for words in ("f --output_dir o", "--output_dir o f", "--output_dir o --folder f"):
        assert given_flags(SHRINK, words.split()) == {"folder": "f", "output_dir": "o"}
    for words in ("f g --output_dir o", "--folder f g --output_dir o"):
        with pytest.raises(ValueError, match="unknown argument g"):
            given_flags(SHRINK, words.split())
    with pytest.raises(ValueError, match=r"^shortest_side must be at least 1, got 0"):
        umae.shrink(folder="f", output_dir="o", shortest_side=0)
