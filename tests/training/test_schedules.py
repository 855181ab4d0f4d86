from itertools import pairwise

import pytest
import torch
from golden_models import fresh_config

from modeling_umae import UMAEForImageClassification, UMAEForPreTraining
from umae.training.schedules import Schedule, decay_groups, layer_decay_groups, learning_rate_at, set_learning_rate


def test_learning_rate_rises_from_zero_to_its_peak_and_falls_to_its_minimum():
    rates = [learning_rate_at(step, 100, 10, 1.0, 0.1) for step in range(101)]
    assert rates[0] == 0 and rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.5) and rates[55] == pytest.approx(0.55)
    assert all(after > before for before, after in pairwise(rates[:11]))
    assert all(after < before for before, after in pairwise(rates[10:]))


def test_without_warmup_the_first_step_has_the_peak():
    assert learning_rate_at(0, 10, 0, 1.0) == 1.0


def test_matrices_and_tokens_decay_and_nothing_else():
    model = UMAEForPreTraining(fresh_config(pooling="mean"))
    decayed, spared = decay_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names, spared_names = ({names[id(p)] for p in group["params"]} for group in (decayed, spared))
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0.0
    assert {"vit.embeddings.cls_token", "decoder.mask_token"} <= decayed_names
    assert all(name.endswith("weight") or name.endswith("token") for name in decayed_names)
    assert all("norm" in name or name.endswith("bias") for name in spared_names)
    assert decayed_names | spared_names == {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_layer_learns_by_its_power_of_the_layer_decay():
    """MAE's util/lr_decay.py: 0.65 to the power of (layers + 1 - depth), from the embeddings to the head."""
    config = fresh_config(num_hidden_layers=3, pooling="mean", final_layernorm=False)
    model = UMAEForImageClassification(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_decay_groups(model, 0.05, 0.65)
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(found), "each once"
    for name, (scale, decay) in found.items():
        if name.startswith("vit.embeddings."):
            power = 4
        elif name.startswith("vit.encoder.layer."):
            power = 3 - int(name.split(".")[3])
        else:
            power = 0
        assert scale == pytest.approx(0.65**power), name
        spared = "norm" in name or name.endswith(("bias", "cls_token", "position_embeddings"))
        assert decay == (0.0 if spared else 0.05), name
    assert found["vit.embeddings.position_embeddings"] == (pytest.approx(0.65**4), 0.0)
    assert found["classifier.weight"][0] == found["vit.fc_norm.weight"][0] == 1


def test_the_rate_of_a_group_is_that_of_the_step_times_its_scale():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.5)]
    optimizer = torch.optim.AdamW([*groups, {"params": [torch.nn.Parameter(torch.zeros(1))]}], lr=0.0)
    assert set_learning_rate(optimizer, Schedule(10, 2, 0.4), 1, 1e-6) == pytest.approx(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.1, 0.2])
