import subprocess

import pytest
import torch
from golden_models import fresh_config

from modeling_umae import UMAEForPreTraining
from umae.training import checkpoints
from umae.training.schedules import decay_groups


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

    with pytest.raises(
        ValueError, match=r"cannot save .*step-2 \(no space left on device\): it needs 7 MB, \d+ MB are"
    ):
        checkpoints.save_checkpoint(tmp_path, 2, fail, keep=1, size=7_000_000)
    assert {entry.name for entry in tmp_path.iterdir()} == {"step-1"}
    assert checkpoints.checkpoint_steps(tmp_path) == [1]
    assert checkpoints.newest_whole(tmp_path) == (tmp_path / "step-1", [])
    checkpoints.save_checkpoint(tmp_path, 2, write, keep=1)
    assert {entry.name for entry in tmp_path.iterdir()} == {"step-2"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("said", [0, 5_000_000], ids=["found out while writing", "known before"])
def test_a_full_disk_is_named_with_what_is_needed_and_spoils_nothing(small_disk, said):
    checkpoints.save_checkpoint(small_disk, 1, write, keep=1)
    tensors = {"weight": torch.zeros(1_250_000)}
    with pytest.raises(ValueError, match=r"step-2 \(.*\): it needs \d MB, 4 MB are free in .*Make room and start"):
        checkpoints.save_checkpoint(
            small_disk, 2, lambda folder: checkpoints.write_training_state(folder, tensors, {}), keep=1, size=said
        )
    assert {entry.name for entry in small_disk.iterdir()} == {"step-1"}
    assert checkpoints.newest_whole(small_disk) == (small_disk / "step-1", [])


@pytest.mark.parametrize("harm", ["changed", "lost", "no checksums", "cut checksums"])
def test_damage_is_recognised_and_the_whole_one_before_is_found(tmp_path, harm):
    for step in (9, 10, 11):
        checkpoints.save_checkpoint(tmp_path, step, write, keep=5)
    (tmp_path / "step-12.tmp").mkdir()
    for step in (10, 11):
        folder = tmp_path / f"step-{step}"
        if harm == "changed":
            (folder / "weights").write_text("hole!")
        elif harm == "lost":
            (folder / "weights").unlink()
        elif harm == "no checksums":
            (folder / checkpoints.CHECKSUMS_FILE).unlink()
        else:
            (folder / checkpoints.CHECKSUMS_FILE).write_text('{"weights": "')
    assert checkpoints.newest_whole(tmp_path) == (tmp_path / "step-9", [tmp_path / "step-11", tmp_path / "step-10"])


def test_leftovers_of_killed_runs_are_cleared(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 9, write, keep=5)
    (tmp_path / "step-10.tmp").mkdir()
    (tmp_path / "step-10.tmp" / "weights").write_text("ho")
    (tmp_path / "run.json.tmp").write_text("{")
    checkpoints.clear_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"step-9"}


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
