"""What `umae features` writes."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import load_dataset
from safetensors import safe_open

from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import load_processor
from umae.evaluation import feature_files
from umae.evaluation.feature_files import main
from umae.evaluation.features import extract_features


def extract(run, folder, **options):
    """The features of all images, as they are in memory."""
    encoder, images = encoder_from_pretrained(run, pooling="mean"), load_images(str(folder))
    return extract_features(encoder, images, load_processor(run), 8, **options)


def write(run, folder, out, *words):
    main([str(word) for word in (run, folder, out, "--batch_size", "8", *words)])


def test_the_command_leaves_out_and_names_what_it_cannot_read(run, folder, tmp_path, capsys):
    (folder / "a" / "03.png").write_bytes(b"not an image")
    out = tmp_path / "features.parquet"
    write(run, folder, out)
    printed = capsys.readouterr().out
    assert printed.count("a/03.png") == 1 and "36 images" in printed and "1 could not be read" in printed

    table = pyarrow.parquet.read_table(out)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    files.remove("a/03.png")
    assert table["file"].to_pylist() == files
    assert table.schema.field("cls").type == pyarrow.list_(pyarrow.float32())
    features = extract(run, folder, skip_unreadable=True)
    readable = ~features["mean"].isnan().any(dim=1)
    for name in ("cls", "mean"):
        assert torch.equal(torch.tensor(table[name].to_pylist()), features[name][readable])
    assert load_dataset("parquet", data_files=str(out), split="train", cache_dir=tmp_path / "cache").num_rows == 36
    assert [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name] == []


def test_the_command_refuses_invalid_arguments_and_writes_nothing(run, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "only.png").write_bytes(b"not an image")
    (tmp_path / "note.parquet").write_text("mine")
    out = tmp_path / "features.parquet"
    for words, message in (
        ((run, tmp_path / "empty", out), "empty"),
        ((run, tmp_path / "broken", out), "none of the 1 images"),
        ((run, tmp_path / "nowhere" / "at_all", out), "nowhere"),
        ((tmp_path / "empty", folder, out), "has no config.json"),
        ((run, folder, tmp_path / "features.csv"), "name a file that ends in .parquet"),
        ((run, folder, tmp_path / "note.parquet"), "is not a parquet file"),
        ((run, folder, tmp_path / "nowhere" / "features.parquet"), "there is no folder"),
        ((run, folder, out, "--num_workers", "-1"), "num_workers at least 0"),
        ((run, folder, out, "--format", "safetensors"), "for shards of safetensors name a folder"),
        ((run, folder, out, "--layers", "2"), "expected `last`, `all`, or numbers from 1 to 1"),
        ((run, folder, folder), "holds no features.json; give a new or empty folder"),
    ):
        with pytest.raises(ValueError, match=message):
            write(*words)
    assert not out.exists() and (tmp_path / "note.parquet").read_text() == "mine"
    (run / "preprocessor_config.json").write_text('{"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.9}')
    with pytest.raises(ValueError, match="has the image processor ConvNextImageProcessor"):
        write(run, folder, out)
    (run / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor"):
        write(run, folder, out)


def read_shards(out) -> dict[str, np.ndarray]:
    """All shards of a folder, by column."""
    shards = []
    for path in sorted(path for path in out.iterdir() if path.name != "features.json"):
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path).to_pydict()
            shards.append({name: np.array(values) for name, values in table.items()})
        else:
            with safe_open(path, "np") as file:
                names = json.loads(file.metadata()["file"])
                shards.append({"file": np.array(names), **{name: file.get_tensor(name) for name in file.keys()}})  # noqa: SIM118
    assert [len(shard["file"]) for shard in shards] == [15, 16, 5], "two batches of 8 in a file"
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_shards_hold_the_features_of_layers_and_patches(run, folder, tmp_path, monkeypatch, format):
    monkeypatch.setattr(feature_files, "SHARD_BYTES", 17 * (4 + 16) * 32 * 2)  # of 20 float16 features
    (folder / "a" / "03.png").write_bytes(b"not an image")
    write(run, folder, tmp_path / "out", "--format", format, "--patches", "--layers", "1", "--dtype", "float16")
    columns = read_shards(tmp_path / "out")
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    files.remove("a/03.png")
    assert columns.pop("file").tolist() == files
    expected = extract(run, folder, skip_unreadable=True, layers=[1], tokens_in=tmp_path / "scratch")
    readable = ~expected["mean"].isnan().any(dim=1)
    assert set(columns) == {"cls", "mean", "cls@1", "mean@1", "patches"} and columns["patches"].shape == (36, 16, 32)
    for name, values in columns.items():
        known = expected["tokens" if name == "patches" else name][readable].half()
        assert np.array_equal(values.astype(np.float16), known.numpy()), name


def test_an_interrupted_folder_continues_with_the_shards_that_are_missing(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_files, "SHARD_BYTES", 8 * 2 * 32 * 4)
    write(run, folder, tmp_path / "whole")
    write_file, written = feature_files.write_file, []

    def interrupted(target, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target.name)
        write_file(target, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_files, "write_file", interrupted)
        write(run, folder, tmp_path / "cut")
    assert len(written) == 2
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.parquet")}
    with pytest.raises(ValueError, match="holds features with other columns, dtype; give a new"):
        write(run, folder, tmp_path / "cut", "--patches", "--dtype", "float16")
    capsys.readouterr()
    write(run, folder, tmp_path / "cut")
    assert "21 images" in (printed := capsys.readouterr().out) and "16 were there already" in printed
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in before.items())
    write(run, folder, tmp_path / "cut")
    assert "features of 0 images" in capsys.readouterr().out
