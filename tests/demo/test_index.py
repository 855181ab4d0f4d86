"""Neighbours and similar patches in a folder that is indexed once."""

import os

import numpy as np
import pytest
import torch
from demo_run import save_run
from PIL import Image

from umae.data.images import load_images
from umae.demo import index
from umae.demo.index import at_most, load_index, nearest, same_class, similar_patches
from umae.demo.models import load_model


@pytest.fixture
def indexed(model, folder, tmp_path):
    return load_index(model, load_images(str(folder)), tmp_path / "cache")


@pytest.fixture
def encoded(monkeypatch):
    """How many images were encoded, at every time that some were."""
    counts, extract = [], index.extract_features

    def counting(encoder, images, *rest, **options):
        counts.append(len(images))
        return extract(encoder, images, *rest, **options)

    monkeypatch.setattr(index, "extract_features", counting)
    return counts


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_an_image_of_the_index_is_its_own_nearest_neighbour_with_cosine_1(model, indexed, feature):
    for position, row in enumerate(indexed.rows.tolist()):
        features, _ = model.features(model.prepare(indexed.images.read(row)))
        (first, cosine), *others = nearest(indexed.features[feature], features[feature], 3)
        assert first == position and cosine == pytest.approx(1, abs=1e-5)
        assert [cosine for _, cosine in others] == sorted((cosine for _, cosine in others), reverse=True)
        assert others == nearest(indexed.features[feature], features[feature], 2, exclude=position)


def test_a_patch_of_the_index_is_its_own_most_similar_one(model, indexed):
    for position, row in enumerate(indexed.rows.tolist()):
        _, patches = model.features(model.prepare(indexed.images.read(row)))
        (first, patch, cosine), *others = similar_patches(indexed.patches, patches[5], 3)
        assert (first, patch) == (position, 5) and cosine == pytest.approx(1, abs=1e-3)
        assert len({first, *(row for row, _, _ in others)}) == 3, "one patch of each image"


def test_similar_patches_are_the_largest_cosines_of_all(indexed, monkeypatch):
    monkeypatch.setattr(index, "BATCH", 4)
    query = torch.randn(32, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(indexed.patches.float(), query, dim=-1)
    found = similar_patches(indexed.patches, query, 5)
    best = cosines.amax(1).topk(5).indices.tolist()
    assert [row for row, _, _ in found] == best
    assert [patch for _, patch, _ in found] == [int(cosines[row].argmax()) for row in best]


def test_a_second_start_encodes_nothing(model, folder, tmp_path, encoded):
    first, second = (load_index(model, load_images(str(folder)), tmp_path / "cache") for _ in range(2))
    assert encoded == [9]
    assert torch.equal(first.patches, second.patches) and torch.equal(first.features["cls"], second.features["cls"])


def change(file):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(file)


def touch(file):
    """Other pixels in as many bytes, as far as the file system says."""
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("act", [change, touch, os.remove, lambda file: change(file.with_name("new.png"))])
def test_the_index_is_made_again_when_an_image_differs(model, folder, tmp_path, encoded, act):
    load_index(model, load_images(str(folder)), tmp_path / "cache")
    act(folder / "b" / "4.png")
    after = load_index(model, load_images(str(folder)), tmp_path / "cache")
    assert encoded == [9, len(after)]
    for position, row in enumerate(after.rows.tolist()):
        features, _ = model.features(model.prepare(after.images.read(row)))
        assert torch.allclose(after.features["cls"][position], features["cls"], atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "nothing is left of the earlier one"


def test_the_index_is_made_again_for_other_weights_and_for_a_damaged_file(model, folder, tmp_path, encoded):
    images, cache = load_images(str(folder)), tmp_path / "cache"
    load_index(model, images, cache)
    other = load_model(str(save_run(tmp_path / "other")))
    with torch.no_grad():
        other.encoder.embeddings.cls_token += 1
    load_index(other, images, cache)
    assert encoded == [9, 9] and len(list(cache.iterdir())) == 2
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    load_index(model, images, cache)
    assert encoded == [9, 9, 9]


def test_images_in_parquet_are_told_apart_by_their_content(model, tmp_path, encoded):
    from datasets import Dataset, Features
    from datasets import Image as Column

    for seed in (0, 1):
        numbers = np.random.default_rng(seed)
        rows = [Image.fromarray(numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_dict({"image": rows}, Features({"image": Column()})).to_parquet(tmp_path / "set" / "train.parquet")
        for _ in range(2):
            load_index(model, load_images(str(tmp_path / "set")), tmp_path / "cache")
    assert encoded == [3, 3]


def test_unreadable_images_are_left_out_and_the_others_keep_their_names_and_labels(model, folder, tmp_path):
    (folder / "a" / "3.png").write_bytes(b"not an image")
    found = load_index(model, load_images(str(folder)), tmp_path / "cache")
    assert found.names() == [
        "a/0.png",
        "a/6.png",
        *(f"b/{i}.png" for i in (1, 4, 7)),
        *(f"c/{i}.png" for i in (2, 5, 8)),
    ]
    assert found.labels() == ["a", "a", "b", "b", "b", "c", "c", "c"]
    assert found.patches.shape == (8, 16, 32) and found.features["mean"].shape == (8, 32)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="none of the 9 images of folder images"):
        load_index(model, load_images(str(folder)), tmp_path / "cache")


def test_of_many_images_some_are_taken_from_everywhere(folder):
    some = at_most(load_images(str(folder)), 3)
    assert [some.name_of(i) for i in range(3)] == ["a/0.png", "b/1.png", "c/2.png"]
    assert len(at_most(some, 5)) == 3


def test_the_share_of_neighbours_of_the_same_class(monkeypatch):
    monkeypatch.setattr(index, "BATCH", 2)
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.12, 1.0]])
    assert same_class(features, ["a", "a", "b", "b", "b"]) == 1
    assert same_class(features, ["a", "a", "b", "b", "c"]) == pytest.approx(3 / 5)
