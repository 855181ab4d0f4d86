"""The model under transformers' own Trainer, for those who do not use our script."""

import pytest
import torch
from golden_models import fresh_config
from transformers import Trainer, TrainingArguments

from modeling_umae import UMAEForPreTraining


class Images(torch.utils.data.Dataset):
    def __init__(self, labels: bool):
        self.pixel_values, self.labels = torch.randn(32, 3, 16, 16), labels

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        item = {"pixel_values": self.pixel_values[index], "noise": torch.linspace(0, 1, 16).roll(index)}
        return {**item, "labels": index % 4} if self.labels else item


def trainer(folder, labels=False, steps=4, accumulation=1):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, save_steps=2, gradient_accumulation_steps=accumulation,
        report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False, seed=0, logging_steps=1,
        lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    return Trainer(UMAEForPreTraining(fresh_config()), arguments, train_dataset=Images(labels))


def test_save_and_resume_restore_every_tensor(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_labels_in_the_batch_do_not_scale_the_gradient(tmp_path, accumulation):
    norms = []
    for labels in (False, True):
        one = trainer(tmp_path / str(labels), labels=labels, steps=1, accumulation=accumulation)
        one.train()
        norms.append(one.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
