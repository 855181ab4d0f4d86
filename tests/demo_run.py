"""A run for tests of the demo."""

import torch
from golden_models import fresh_config


def save_run(folder, size: int = 16, **changes):
    """A run folder: weights that differ from their initial ones, and the evaluation transform."""
    from modeling_umae import UMAEForPreTraining
    from umae.data.inputs import evaluation_processor

    torch.manual_seed(0)
    model = UMAEForPreTraining(fresh_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():  # fresh ones attend to all patches alike
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    evaluation_processor((size, size)).save_pretrained(folder)
    return folder
