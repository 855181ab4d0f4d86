"""Evaluations during pre-training: of which images, at which steps, and what is said of them."""

from typing import Any

from tqdm.auto import tqdm

from umae.data.streaming import Stream
from umae.evaluation.monitor import MOST_IMAGES, Monitor, classes_of, estimated_steps, prepare_probe_images
from umae.programs.job import Job
from umae.sharing import gallery
from umae.training.log import is_due, track_image
from umae.training.state import State

EVALUATIONS = 10  # at least, of a run
COLLAPSE = 0.5  # of an untrained encoder's effective rank
USUAL_LOGGING = 50  # steps


def make_monitor(job: Job) -> Monitor | None:
    if job.probe_images is None:
        return None
    classes, size = classes_of(job.images, job.probe_images), job.config.image_height_width
    probe_images = prepare_probe_images(
        job.accelerator, job.probe_images, job.processor, size, job.plan.batch_size, classes is not None, job.args.seed,
        trained_on=job.probe_images is job.images,
    )  # fmt: skip
    labels = None if classes is None or isinstance(job.images, Stream) else job.images.labels()
    return Monitor(job.accelerator, job.config, probe_images, labels, classes, job.processor, job.args.seed)


def eval_steps(job: Job, record: dict[str, Any]) -> int:
    """Steps between evaluations: as asked for, or so that they take 1 % of the time, but ten in a short run.

    Args:
        record: what `run.json` holds; also the number of steps, once it has been measured.
    """
    count = job.probe_images.num_images if job.probe_images is not None else None
    images = min(MOST_IMAGES, count or MOST_IMAGES)
    held_out = job.probe_images is not job.images
    usual = record.get("eval_steps") or estimated_steps(job.config, job.plan, images, held_out)
    return job.args.eval_steps or min(usual, max(1, job.schedule.total_steps // EVALUATIONS))


def logging_steps(job: Job) -> int:
    """Steps between lines of `metrics.jsonl`: as asked for, or 50, but in a short run one for each evaluation.

    The same for the whole run, so by the estimate.
    """
    if job.args.logging_steps is not None or job.probe_images is None:
        return job.args.logging_steps or USUAL_LOGGING
    return min(USUAL_LOGGING, eval_steps(job, {}))


def evaluates(job: Job, record: dict[str, Any], step: int) -> bool:
    """Whether the line of `metrics.jsonl` at a step comes with an evaluation; the first one does by default."""
    is_first = job.args.eval_steps is None and step <= logging_steps(job)
    return is_first or is_due(step, job.schedule.total_steps, logging_steps(job), eval_steps(job, record))


def evaluate_features(
    job: Job, monitor: Monitor, state: State, batch: dict, record: dict[str, Any]
) -> dict[str, float | None]:
    """Measure the features; show it by a line on the terminal, and by figures in the run folder and in the trackers."""
    values, reconstructed = monitor.evaluate(state.model, batch, state.step)
    if "untrained_ranks" not in record:
        record["untrained_ranks"] = monitor.untrained_ranks()
        if job.accelerator.is_main_process and record["untrained_ranks"]:
            tqdm.write(f"on the probe images {compared(record['untrained_ranks'])}")
    if job.accelerator.is_main_process:
        most = min(monitor.probe_images.count, job.config.hidden_size)
        tqdm.write(f"step {state.step:,}: {in_words(values, most)}")
        warn_of_collapse(job, record, values, state.step)
        tile = gallery.save_tile(job.folder, state.step, reconstructed)
        track_image(job.accelerator, "reconstructions", tile, state.step)
    return values


def compared(untrained: dict[str, float]) -> str:
    """What effective ranks mean: those of an untrained encoder, and of collapsed features."""
    ranks = " and ".join(f"{rank:.1f} ({pooling})" for pooling, rank in untrained.items())
    return f"an untrained encoder has effective rank {ranks}, features that have collapsed have 1"


def warn_of_collapse(job: Job, record: dict[str, Any], values: dict[str, float | None], step: int) -> None:
    """Say once in a run that the training feature's effective rank is below COLLAPSE of an untrained encoder's.

    Not in the first quarter: at the start the rank falls in every run, and rises again.
    """
    pooling, weight = job.config.pooling, job.config.uniformity_weight
    rank, before = values.get(f"effective_rank_{pooling}"), record["untrained_ranks"].get(pooling)
    if rank is None or before is None or rank >= COLLAPSE * before:
        return
    if step >= job.schedule.total_steps / 4 and "collapsed_at" not in record:
        record["collapsed_at"] = step
        tqdm.write(
            f"warning: the {pooling} features collapse: their effective rank, {rank:.1f}, is less than {COLLAPSE:.0%} "
            f"of an untrained encoder's, {before:.1f}; raise uniformity_weight, which is {weight:g}"
        )


def in_words(values: dict[str, float | None], most: int) -> str:
    """Diagnostics on one line; `most` is what the rank of the probe images' features can be."""
    if "effective_rank_cls" not in values:
        return "nothing can be measured: no probe image can be read, or no feature is finite"
    ranks = " and ".join(f"{values[f'effective_rank_{pooling}']:.1f} ({pooling})" for pooling in ("cls", "mean"))
    text = f"effective rank {ranks} of at most {most}"
    for name, title in {"online_top1": "linear classifier", "online_knn_top1": "nearest neighbours"}.items():
        text += f", {title} {values[name]:.1%}" if name in values else ""
    norms = [value for name, value in values.items() if name.startswith("grad_norm_")]  # reconstruction, regularizer
    return text + (f", gradient of the terms {norms[0]:.3g} and {norms[1]:.2g}" if None not in norms else "")
