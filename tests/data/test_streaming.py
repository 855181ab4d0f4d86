"""Data sets in shards, read as they come."""

import io
import json
import shutil
import tarfile
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path

import datasets
import pytest
import torch
from fake_hub import Blob, Repo
from PIL import Image
from processes import hub_user, run, torchrun

from umae.data import streaming
from umae.data.batches import Plan
from umae.data.streaming import START, Cursor, load_stream, streaming_loader

SHARDS = (7, 12, 5, 9, 1, 6)  # rows of each


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 255 - number, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """A folder of parquet, one file a shard; every image has a colour of its own."""
    folder, first = tmp_path / "shards", 0
    folder.mkdir()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for i, count in enumerate(SHARDS):
        rows = {"img": [{"bytes": png(first + row), "path": None} for row in range(count)], "label": [0] * count}
        file = folder / f"train-{i:05}-of-{len(SHARDS):05}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
        first += count
    return folder


@pytest.fixture
def stream(shards, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 4)  # several blocks a shard
    return load_stream(str(shards), None, "train", None)


def numbers(rows) -> list[int]:
    """Which images these are, by their colour."""
    return [Image.open(io.BytesIO(row.source)).getpixel((0, 0))[0] for row in rows]


def epoch_of(stream, epoch: int, reader: int = 0, readers: int = 1, seed: int = 0):
    rows = stream.walk(seed, reader, readers)
    return [row for row in islice(rows, 3 * sum(SHARDS)) if row.epoch == epoch]


def test_a_stream_knows_its_column_shards_and_name(stream):
    assert (stream.image_column, stream.num_shards, stream.description) == ("img", 6, "shards (train)")
    assert stream.num_images is None, "parquet files alone do not say"
    stream.check_readable()


@pytest.mark.parametrize("readers", [1, 2, 4, 6])
def test_every_epoch_shows_every_image_once_whatever_reads(stream, readers):
    for epoch in (0, 1):
        rows = list(chain(*(epoch_of(stream, epoch, reader, readers) for reader in range(readers))))
        if readers == 1:
            assert len(rows) == sum(SHARDS)
        shown = Counter(numbers(rows))
        assert set(shown) == set(range(sum(SHARDS))) and set(shown.values()) == {1}
        assert len({row.index for row in rows}) == sum(SHARDS)


def test_orders_differ_by_epoch_and_seed_and_leave_shards_and_blocks_together(stream):
    first = numbers(epoch_of(stream, 0))
    assert first != numbers(epoch_of(stream, 1)) and first != numbers(epoch_of(stream, 0, seed=1))
    assert first == numbers(epoch_of(stream, 0)) and first != sorted(first)
    rows = epoch_of(stream, 0)
    shards = [row.index >> 32 for row in rows]
    assert shards != sorted(shards)
    assert sum(shard != following for shard, following in pairwise(shards)) == len(SHARDS) - 1
    large = [row.index % 2**32 for row in rows if row.index >> 32 == 1]  # 12 rows in blocks of 4
    assert [sorted(large[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len({tuple(row % 4 for row in large[i : i + 4]) for i in (0, 4, 8)}) > 1, "each block has its own order"


@pytest.mark.parametrize("readers", [1, 3])
def test_every_cursor_leads_to_the_very_next_image(stream, readers):
    rows = list(islice(stream.walk(0, readers - 1, readers), 60))  # across epochs
    for position in range(len(rows) - 3):
        following = islice(stream.walk(0, readers - 1, readers, rows[position].cursor), 3)
        assert list(following) == rows[position + 1 : position + 4], "their cursors, too"


def plan(batch_size: int = 4, processes: int = 1, accumulation: int = 1) -> Plan:
    return Plan(images=40, batch_size=batch_size, accumulation=accumulation, processes=processes, seed=3)


def taken(stream, steps: range, workers: int, cursors: list[Cursor], rank: int = 0, **changes) -> list[dict]:
    return list(streaming_loader(stream, (8, 8), plan(**changes), rank, steps, cursors, workers))


@pytest.mark.parametrize(("workers", "border"), [(0, 1), (0, 4), (2, 4), (2, 7), (3, 7)])
def test_a_run_continues_from_any_step_as_if_it_had_not_been_interrupted(stream, workers, border):
    changes = {"processes": 2, "rank": 1, "accumulation": 1}
    whole = taken(stream, range(10), workers, [START] * max(1, workers), **changes)
    cursors = [START] * max(1, workers)
    before = streaming_loader(stream, (8, 8), plan(processes=2), 1, range(10), cursors, workers)
    head = list(islice(before, border))  # workers have read ahead; the cursors have not
    before.close()
    cursors = [Cursor(*cursor) for cursor in json.loads(json.dumps(cursors))]  # as a checkpoint holds them
    tail = taken(stream, range(border, 10), workers, cursors, **changes)
    assert len(head + tail) == len(whole) == 10
    for batch, expected in zip(head + tail, whole, strict=True):
        assert torch.equal(batch["index"], expected["index"]) and torch.equal(batch["epoch"], expected["epoch"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def parquet(folder, images: list[bytes], shards: int = 1) -> str:
    folder.mkdir()
    features = datasets.Features({"img": datasets.Image()})
    for shard in range(shards):
        rows = {"img": [{"bytes": image, "path": None} for image in images]}
        file = folder / f"train-{shard:05}-of-{shards:05}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return str(folder)


def test_unreadable_images_are_left_out_and_named(tmp_path):
    folder = parquet(tmp_path / "set", [png(i)[: 20 if i == 2 else None] for i in range(6)])
    batches = taken(load_stream(folder, None, "train", None), range(3), 0, [START], batch_size=5)
    assert {len(batch["index"]) for batch in batches} == {5}
    refusals = dict(chain(*(batch["refusals"].items() for batch in batches)))
    assert list(refusals) == [2] and refusals[2].startswith("set (train), row 2 of shard 0: ")
    assert 2 not in torch.cat([batch["index"] for batch in batches])


def test_nothing_readable_is_refused(tmp_path):
    stream = load_stream(parquet(tmp_path / "set", [b"<html>"] * 4, shards=2), None, "train", None)
    with pytest.raises(ValueError, match=r"none of the first 4 images of .* can be read: .*row 0 .*row 1 .*row 2"):
        stream.check_readable()
    with pytest.raises(ValueError, match=r"row . of shard ."):
        taken(stream, range(1), 0, [START])


def tar_shards(folder) -> None:
    """As `webdataset` keeps images: one tar a shard, one image a key."""
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for row in range(10):
                for name, content in ((f"{row:03}.png", png(10 * shard + row)), (f"{row:03}.cls", b"1")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def test_tar_files_are_streamed_too(tmp_path):
    tar_shards(tmp_path / "tars")
    stream = load_stream(str(tmp_path / "tars"), None, "train", None)
    assert (stream.image_column, stream.num_shards) == ("png", 3)
    assert sorted(numbers(islice(stream.walk(0), 30))) == list(range(30))


def test_the_fingerprint_is_of_images_and_shards(shards, tmp_path):
    first = load_stream(str(shards), None, "train", None).fingerprint()
    assert first == load_stream(str(shards), None, "train", None).fingerprint()
    (shards / "train-00005-of-00006.parquet").unlink()
    assert first != load_stream(str(shards), None, "train", None).fingerprint()


SIZES = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,decoder_hidden_size=16,decoder_num_hidden_layers=1"
SMALL = ("--image_size", "8", "--patch_size", "2", "--config_overrides", SIZES, "--mixed_precision", "no")
TEN = ("--max_train_steps", "10", "--logging_steps", "1", "--checkpointing_steps", "3", "--eval_steps", "0")
KEEP = ("--checkpoints_total_limit", "9")


def pretrain(folder, output, *flags, processes: int = 1, check: bool = True):
    words = ("run_pretrain.py", "--dataset_name", folder, "--streaming", "--output_dir", output, *SMALL, *TEN, *KEEP)
    words += ("--per_device_train_batch_size", "4", *flags)
    return run(*words, check=check) if processes == 1 else torchrun(processes, *words, check=check)


FROM_HUB = """
from umae.data.batches import Plan
from umae.data.streaming import START, load_stream, streaming_loader
stream = load_stream("tester/set", None, "train", None)
plan = Plan(images=40, batch_size=5, accumulation=1, processes=1, seed=0)
batches = list(streaming_loader(stream, (8, 8), plan, 0, range(8), [START, START], num_workers=2))
print(stream.num_shards, len(batches), len(set().union(*(batch["index"].tolist() for batch in batches))) > 30)
print(stream.description, stream.num_images)
"""
CARD = b"""---
dataset_info:
  features: [{name: img, dtype: image}, {name: label, dtype: int64}]
  splits: [{name: train, num_bytes: 9000, num_examples: 40}]
---
"""


def test_a_data_set_of_the_hub_is_streamed_without_a_copy(shards, server):
    repo = server.repos["dataset", "tester/set"] = Repo("tester/set", private=False)
    files = {path.name: path.read_bytes() for path in shards.iterdir()} | {"README.md": CARD}
    repo.add("main", {name: Blob(content, False) for name, content in files.items()}, "data")
    user = hub_user()
    assert run("-c", FROM_HUB, **user).stdout == "6 8 True\ntester/set (train) 40\n"
    assert not list(Path(user["HF_HOME"]).rglob("*.parquet")), "nothing stays on the disk"


def interrupted_copy(run_folder, copy, step: int):
    """What a run that was killed after its checkpoint at `step` has left behind."""
    shutil.copytree(run_folder, copy)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "finished": False}))
    (copy / "model.safetensors").unlink()
    for checkpoint in copy.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(("processes", "workers"), [(1, "2"), pytest.param(2, "0", marks=pytest.mark.slow)])
def test_a_streamed_run_is_resumed_to_the_same_bits_and_refused_to_other_readers(shards, tmp_path, processes, workers):
    flags = ("--dataloader_num_workers", workers)
    first = pretrain(shards, tmp_path / "run", *flags, processes=processes)
    assert "shards (train), streamed from 6 shards" in first.stdout
    interrupted_copy(tmp_path / "run", tmp_path / "copy", step=6)
    resumed = pretrain(shards, tmp_path / "copy", *flags, processes=processes)
    assert f"continuing from {tmp_path / 'copy'}/step-6" in resumed.stdout
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "copy")]
    assert weights[0] == weights[1]
    refused = pretrain(shards, tmp_path / "copy", "--dataloader_num_workers", "1", processes=processes, check=False)
    assert refused.returncode != 0
    assert f"holds a run with --dataloader_num_workers {workers}, not 1; use another --output_dir" in refused.stderr
    assert "streamed, no labels used" in (tmp_path / "run" / "README.md").read_text()


def test_what_cannot_be_streamed_is_refused(shards, tmp_path):
    many = pretrain(shards, tmp_path / "run", "--dataloader_num_workers", "7", check=False)
    assert "shards (train) comes in 6 shards, fewer than 1 processes x 7 readers; lower --dataloader" in many.stderr
    words = ("run_pretrain.py", "--dataset_name", shards, "--streaming", "--output_dir", tmp_path / "run")
    unknown = run(*words, *SMALL, check=False)
    assert "shards (train) does not say how many images it holds; give --max_train_steps" in unknown.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
    for name in ("digits", str(tmp_path / "images")):
        with pytest.raises(ValueError, match="does not come in shards; leave out streaming"):
            load_stream(name, None, "train", None)
    with pytest.raises(ValueError, match=r"there is no folder \./nowhere"):
        load_stream("./nowhere", None, "train", None)
    with pytest.raises(ValueError, match="has no column 'image'; it has img, label"):
        load_stream(str(shards), None, "train", "image")
    with pytest.raises(ValueError, match="split 'test'"):
        load_stream(str(shards), None, "test", None)
