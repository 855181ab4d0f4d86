import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from processes import together

from image_processing_umae import UnreadableImage
from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import load_processor
from umae.evaluation import feature_files
from umae.evaluation.feature_files import write_features
from umae.evaluation.features import extract_features

COUNT = 37


def extract(run, folder, batch_size=8, **options):
    encoder = encoder_from_pretrained(run, pooling="mean")
    return extract_features(encoder, load_images(str(folder)), load_processor(run), batch_size, **options)


def test_every_image_has_its_own_features_in_order(run, folder):
    features = extract(run, folder)
    encoder, processor = encoder_from_pretrained(run, pooling="mean"), load_processor(run)
    files = sorted(folder.rglob("*.png"))
    assert {name: (tuple(f.shape), f.dtype) for name, f in features.items()} == {
        "cls": ((COUNT, 32), torch.float32),
        "mean": ((COUNT, 32), torch.float32),
    }
    for i, file in enumerate(files):
        with torch.no_grad():
            output = encoder(processor(images=Image.open(file), return_tensors="pt")["pixel_values"])
        assert (features["cls"][i] - output.last_hidden_state[0, 0]).abs().max() < 1e-5
        assert (features["mean"][i] - output.pooler_output[0]).abs().max() < 1e-5


def test_features_are_those_of_the_unmasked_image_in_evaluation_mode(run, folder):
    encoder = encoder_from_pretrained(run, pooling="mean").train()
    for layer in encoder.encoder["layer"]:
        layer.dropout.p = 0.5
    features = extract_features(encoder, load_images(str(folder)), load_processor(run), 8)
    assert torch.equal(features["cls"], extract(run, folder)["cls"])
    assert not features["cls"].requires_grad


def test_workers_and_batch_sizes_change_nothing(run, folder):
    features = extract(run, folder)
    assert torch.equal(features["mean"], extract(run, folder, num_workers=2)["mean"])
    for batch_size in (1, 5, 64):
        assert (features["mean"] - extract(run, folder, batch_size=batch_size)["mean"]).abs().max() < 1e-5


SIZES = (8, 9, 20, 50)  # of batches of 37 images: at the end, or for 50 at once, the second process has nothing to do


def test_batches_are_dealt_out_to_two_processes_and_come_back_in_order_to_the_bit(run, folder, tmp_path):
    together(2, Path(__file__), run, folder, tmp_path / "rank")
    for size in SIZES:
        alone = extract(run, folder, size)
        for rank in (0, 1):
            features = torch.load(tmp_path / f"rank_{rank}_{size}.pt", weights_only=True)
            assert all(torch.equal(features[name], alone[name]) for name in ("cls", "mean")), (size, rank)
    (tmp_path / "alone").mkdir()
    write_shards(run, folder, tmp_path / "alone")
    shards = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert len(shards) == 1 + 3
    for name in shards:
        assert (tmp_path / "rank_files" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def write_shards(run, folder, out: Path) -> None:
    """Files of 16 images each, in batches of 8."""
    feature_files.SHARD_BYTES = 16 * (2 + 16) * 32 * 2
    write_features(run, folder, out, patches=True, dtype="float16", format="safetensors", batch_size=8)


def test_an_unreadable_image_is_an_error_that_names_it(run, folder):
    (folder / "a" / "03.png").write_bytes(b"not an image")
    for num_workers in (0, 1):
        with pytest.raises(UnreadableImage, match=r"^a/03\.png"):
            extract(run, folder, num_workers=num_workers)


def test_features_that_are_not_finite_and_one_sided_encoders_are_refused(run, folder):
    encoder, processor, images = encoder_from_pretrained(run), load_processor(run), load_images(str(folder))
    with pytest.raises(ValueError, match='pooling="mean"'):
        extract_features(encoder, images, processor, 8)
    encoder = encoder_from_pretrained(run, pooling="mean")
    encoder.layernorm.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        extract_features(encoder, images, processor, 8)


if __name__ == "__main__":  # what each of two processes does
    run_folder, image_folder, target = sys.argv[1:]
    for size in SIZES:
        features = extract(run_folder, image_folder, size, accelerator=Accelerator())
        torch.save(features, f"{target}_{os.environ['RANK']}_{size}.pt")
    write_shards(run_folder, image_folder, Path(f"{target}_files"))
