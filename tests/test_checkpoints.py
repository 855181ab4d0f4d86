import pytest
import torch
from golden_models import fresh_config

from modeling_umae import UMAEForPreTraining
from umae import checkpoints
from umae.schedules import decay_groups


def write(folder):
    (folder / "weights").write_text("whole")


def test_the_newest_checkpoint_is_found_by_number(tmp_path):
    for step in (9, 10, 100):
        checkpoints.save_checkpoint(tmp_path, step, write, keep=5)
    (tmp_path / "step-200.tmp").mkdir()
    (tmp_path / "step-x").mkdir()
    assert checkpoints.checkpoint_steps(tmp_path) == [9, 10, 100]


def test_old_checkpoints_go_only_after_the_new_one_stands(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 1, write, keep=1)

    def fail(folder):
        write(folder)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoints.save_checkpoint(tmp_path, 2, fail, keep=1)
    assert checkpoints.checkpoint_steps(tmp_path) == [1]
    assert (tmp_path / "step-1" / "weights").read_text() == "whole"
    checkpoints.save_checkpoint(tmp_path, 2, write, keep=1)
    assert {entry.name for entry in tmp_path.iterdir()} == {"step-2"}


def trained(seed: int):
    torch.manual_seed(seed)
    model = UMAEForPreTraining(fresh_config()).train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-3, fused=True)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer) -> None:
    torch.manual_seed(5)
    model(torch.randn(4, 3, 16, 16)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_optimizer_takes_the_same_step(tmp_path):
    model, optimizer = trained(seed=0)
    checkpoints.write_training_state(tmp_path, checkpoints.optimizer_tensors(model, optimizer), {"step": 1})
    other, other_optimizer = trained(seed=1)
    other.load_state_dict(model.state_dict())
    tensors, state = checkpoints.read_training_state(tmp_path)
    checkpoints.restore_optimizer(other, other_optimizer, tensors)
    assert state == {"step": 1} and "vit.layernorm.weight/exp_avg" in tensors
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        step(one, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_state_of_another_model_is_refused():
    model, optimizer = trained(seed=0)
    tensors = checkpoints.optimizer_tensors(model, optimizer)
    del (
        tensors["vit.layernorm.bias/exp_avg"],
        tensors["vit.layernorm.bias/exp_avg_sq"],
        tensors["vit.layernorm.bias/step"],
    )
    with pytest.raises(ValueError, match=r"does not belong to this model; it differs in vit\.layernorm\.bias"):
        checkpoints.restore_optimizer(model, optimizer, tensors)
