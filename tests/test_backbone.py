"""The encoder under transformers' own heads for dense tasks."""

import json

import pytest
import torch
from golden_models import fresh_config
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from modeling_umae import UMAEBackbone, UMAEForPreTraining


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_backbone_of_a_pretrained_folder_returns_the_feature_maps_of_its_encoder(tmp_path, pooling):
    torch.manual_seed(0)
    model = UMAEForPreTraining(fresh_config(pooling=pooling)).eval()
    model.save_pretrained(tmp_path)
    assert (
        not {"out_features", "out_indices", "stage_names"} & json.loads((tmp_path / "config.json").read_text()).keys()
    )
    backbone, report = UMAEBackbone.from_pretrained(tmp_path, out_indices=[1, 2], output_loading_info=True)
    assert not any(report.values()), "nothing is missing, left over or of another shape"
    pixel_values = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        output = backbone(pixel_values)
        expected = model.vit.feature_maps(pixel_values, (1, 2), interpolate_pos_encoding=True)
        assert torch.equal(backbone(pixel_values, return_dict=False)[0][1], output.feature_maps[1])
    assert output.hidden_states is None and backbone.channels == [32, 32]
    assert backbone.out_features == ["stage1", "stage2"]
    for mine, known in zip(output.feature_maps, expected, strict=True):
        assert mine.shape == (2, 32, 4, 6) and torch.equal(mine, known)
    backbone.save_pretrained(tmp_path / "again")
    again = UMAEBackbone.from_pretrained(tmp_path / "again")
    assert again.out_indices == [1, 2] and torch.equal(again(pixel_values).feature_maps[0], expected[0])


def test_without_a_choice_it_returns_the_last_layer_and_the_stem_are_the_embeddings():
    model = UMAEBackbone(fresh_config()).eval()
    pixel_values = torch.rand(1, 3, 16, 16)
    output = model(pixel_values, output_hidden_states=True)
    assert model.out_features == ["stage2"] and len(output.feature_maps) == 1 and len(output.hidden_states) == 3
    model.out_features = ["stem", "stage2"]
    stem = model(pixel_values).feature_maps[0]
    embedded = model.layernorm(output.hidden_states[0])[:, 1:]
    assert torch.equal(stem.flatten(2).transpose(1, 2), embedded)
    with pytest.raises(ValueError, match="must be a subset of stage_names"):
        fresh_config(out_features=["stage3"])


def test_a_head_for_segmentation_learns_on_it():
    """UperNet on four layers: which quarter of the image is brighter."""
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(fresh_config(num_hidden_layers=4, out_indices=[1, 2, 3, 4], pooling="mean"))
    config = UperNetConfig(
        backbone_config=backbone.config, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=32, num_labels=2
    )
    model = UperNetForSemanticSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    labels = torch.zeros(8, 16, 16, dtype=torch.long)
    for image in range(8):
        rows, columns = 8 * (image % 2), 8 * (image // 2 % 2)
        labels[image, rows : rows + 8, columns : columns + 8] = 1
    pixel_values = labels[:, None].expand(-1, 3, -1, -1) + 0.3 * torch.randn(8, 3, 16, 16)
    losses = []
    for _ in range(25):
        output = model(pixel_values, labels=labels)
        output.loss.backward()
        losses.append(output.loss.item())
        assert all(parameter.grad is not None for parameter in model.parameters()), "as several GPUs demand"
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
