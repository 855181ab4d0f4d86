"""A task for the training loop that needs no images: every parameter of a tiny model is drawn to a number.

python toy_task.py FOLDER MOMENT    # trains in FOLDER; killed by SIGKILL at MOMENT of its second checkpoint
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from golden_models import fresh_config

from modeling_umae import UMAEModel
from umae import files
from umae.data.batches import Plan
from umae.data.inputs import evaluation_processor
from umae.training import checkpoints
from umae.training.folder import hold_folder, open_run
from umae.training.log import MetricsLog
from umae.training.loop import Settings, Task, train
from umae.training.schedules import make_schedule
from umae.training.signals import StopRequest

STEPS, EVERY = 12, 4  # of the run, of checkpoints
PLAN = Plan(images=STEPS * 4, batch_size=2, accumulation=2, processes=1, seed=0)


def toy_task(losses=None, refusals=None) -> Task:
    """
    Args:
        losses: instead of the toy's own.
        refusals: of images that cannot be read, by step.
    """
    torch.manual_seed(0)
    model = UMAEModel(fresh_config())
    evaluations, counted = torch.zeros(1), [0]  # both are changed in place, as a monitor and a stream's cursors are

    def batches(steps: range):
        for step in steps:
            for part in range(PLAN.accumulation):
                first = 4 * step + 2 * part
                yield {
                    "index": torch.tensor([first, first + 1]),
                    "target": (step % 5) / 5 + part,
                    "refusals": (refusals or {}).get(step, {}),
                }

    def evaluate(state, batch) -> dict[str, float]:
        evaluations.add_(1)
        counted[0] += 1
        return {"evaluations": evaluations.item()}

    def restore(tensors, state) -> None:
        evaluations.copy_(tensors.get("evaluations", evaluations))
        counted[:] = state.get("counted", counted)

    return Task(
        model=model,
        parameter_groups=[{"params": list(model.parameters()), "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        values=("loss", "grad_norm"),
        own_values=("loss",),
        flops=1000,
        losses=losses or toy_losses,
        batches=batches,
        line=lambda means: (means, "toy"),
        evaluate=evaluate,
        evaluates=lambda step: step % 2 == 0,
        saved_beside=lambda: ({"evaluations": evaluations}, {"counted": counted}),
        restore=restore,
        index_name=lambda index: f"number {index}",
        description="the toy",
    )


def toy_losses(model, micro_batches, step):
    for batch in micro_batches:
        loss = sum((parameter - batch["target"]).square().mean() for parameter in model.parameters())
        yield loss, loss.detach()[None]


def train_toy(
    folder: Path, task: Task, logging_steps: int = 3, publish=lambda step: None, stop=None, checkpointing_steps=EVERY
) -> int:
    """Train in a run folder; the number of the signal that stopped it, 0 if none did."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PLAN.accumulation)
    settings = Settings(
        folder=folder,
        processor=evaluation_processor((16, 16)),
        plan=PLAN,
        schedule=make_schedule(STEPS, PLAN.steps_per_epoch, PLAN.images_per_step, 1.0, 0, usual_warmup_steps=0),
        min_learning_rate=0.0,
        logging_steps=logging_steps,
        checkpointing_steps=checkpointing_steps,
        checkpoints_total_limit=2,
        max_unreadable_share=0.1,
        gradient_checkpointing=False,
        torch_compile="no",
    )
    record = open_run(accelerator, folder, {"config": {}})
    with hold_folder(accelerator, folder, record), stop or StopRequest() as request, checkpoints.Writer() as writer:
        log = MetricsLog(accelerator, folder, PLAN.images_per_step)
        train(task, settings, accelerator, record, log, request, writer, publish)
    return request.signal


if __name__ == "__main__":
    folder, moment = Path(sys.argv[1]), sys.argv[2]
    module = {"rename": os, "_fsync": files}.get(moment, checkpoints)
    plain = getattr(module, moment)

    def killed(path, *arguments):
        if "step-8" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(path, *arguments)

    setattr(module, moment, killed)
    train_toy(folder, toy_task())
