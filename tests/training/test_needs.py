"""What a run will need, against what torch keeps for the backward pass."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from golden_models import fresh_config

from configuration_umae import UMAEConfig
from modeling_umae import UMAEForImageClassification, UMAEForPreTraining
from umae.training import needs


def kept_bytes(kind, config: UMAEConfig, batch_size: int, precision: str) -> int:
    """The memory of all tensors but the parameters that the forward pass keeps."""
    model = kind._from_config(config, attn_implementation="sdpa").train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    masks = {"noise": torch.rand(batch_size, 64)} if kind is UMAEForPreTraining else {}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = model(torch.rand(batch_size, 3, 128, 128), **masks)  # which holds what is kept
    assert output is not None
    return sum(storages.values())


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (UMAEForPreTraining, "bf16"),
        (UMAEForImageClassification, "no"),
        pytest.param(UMAEForPreTraining, "no", marks=pytest.mark.slow),
        pytest.param(UMAEForImageClassification, "bf16", marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_an_image_is_what_the_forward_pass_keeps(kind, precision):
    config = UMAEConfig.sized("small", image_size=128, num_hidden_layers=2, pooling="mean")
    measured = (kept_bytes(kind, config, 12, precision) - kept_bytes(kind, config, 4, precision)) / 8
    expected = needs.activation_bytes(config, precision, reconstructs=kind is UMAEForPreTraining)
    assert expected == pytest.approx(measured, rel=0.12)


def lines(model, folder):
    return needs.needs(Accelerator(cpu=True), model, folder, 8, 2, gradient_checkpointing=False, reconstructs=True)


def test_too_little_memory_or_disk_is_said_with_the_way_out(tmp_path, monkeypatch):
    model = UMAEForPreTraining(fresh_config())
    size = 12 * sum(parameter.numel() for parameter in model.parameters())
    announced, warnings = lines(model, tmp_path / "not" / "there" / "yet")
    assert warnings == [] and f"{size / 1e6:.3g} MB a checkpoint, 2 kept" in announced["disk"]
    monkeypatch.setattr(needs, "device_memory", lambda device: 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * size - 1))
    _, (memory, disk) = lines(model, tmp_path)
    assert "lower per_device_train_batch_size and raise gradient_accumulation_steps" in memory
    assert "give an output_dir on another disk" in disk


def test_checkpointing_and_sharding_need_less():
    model = UMAEForPreTraining(fresh_config())
    whole = needs.training_memory(model, 64, "no", False, 1, True)
    assert needs.training_memory(model, 64, "no", True, 1, True) < whole / 2
    assert whole - needs.training_memory(model, 64, "no", False, 4, True) == pytest.approx(
        12 * sum(p.numel() for p in model.parameters() if p.requires_grad), rel=1e-3
    )


def test_a_folder_of_200_images_is_too_few_for_the_default_size():
    (warning,) = needs.too_few_images(200, 85_600_000)
    assert "200 images are far too few" in warning and "facebook/vit-mae-base" in warning and "model_size" in warning
    assert needs.too_few_images(200, 200_000) == needs.too_few_images(None, 10**9) == []
