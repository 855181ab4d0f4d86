from itertools import pairwise

import pytest
from golden_models import fresh_config

from modeling_umae import UMAEForPreTraining
from umae.schedules import decay_groups, learning_rate_at


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
