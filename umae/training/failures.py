"""What ends a run, or nearly: values that are not finite, images that cannot be read, too little memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

MOST_OVERFLOWS = 20  # gradients in a row that are not finite, in fp16, whose scale is then beyond help


def no_failure(device: torch.device, values: int) -> torch.Tensor:
    """What a step notes its first failure in, on this process, see `remember_failure`.

    float32 (2 + values,): the step's number (0: none), gradients in a row that were not finite, and a flag for each of
    the logged values.
    """
    return torch.zeros(2 + values, device=device)


def remember_failure(accelerator, optimizer, values: torch.Tensor, step: int, failed: torch.Tensor) -> None:
    """Note in `failed` the first value that is not finite; from then on the fused optimiser skips every step.

    Args:
        values: float32, the logged values of this step, the gradient's norm last.
        step: the optimiser steps before this one.
    """
    bad = (~torch.isfinite(values)).float()
    failed[1] = (failed[1] + 1) * bad[-1]
    bad[-1] = failed[1] >= (1 if accelerator.scaler is None else MOST_OVERFLOWS)
    now = torch.cat([bad.new_full((1,), step + 1), failed[1:2], bad])
    failed.copy_(torch.where((failed[0] == 0) & bad.any(), now, failed))
    if accelerator.scaler is None:  # else the scaler itself skips steps whose gradients are not finite
        optimizer.optimizer.found_inf = (failed[0] > 0).float()


def report_unreadable(
    reasons: dict[int, str], record: dict[str, Any], num_images: int, max_share: float, log: Callable[[str], None]
) -> None:
    """Name every unreadable image once, and end a run that leaves out too many; every process calls it.

    Args:
        reasons: why images cannot be read, by index, as this process has found them; emptied.
        record: of the run; gets them in `unreadable`.
        log: prints a line, on the main process only.

    Raises:
        ValueError: they are more than `max_share` of all images.
    """
    known = record["unreadable"]
    for index, reason in sorted(gather_object(list(reasons.items()))):
        if str(index) not in known:  # as JSON has it
            known[str(index)] = reason
            log(f"left out: {reason}")
    reasons.clear()
    if len(known) > max_share * num_images:
        raise ValueError(
            f"{len(known)} of {num_images} images cannot be read, more than max_unreadable_share {max_share:g} "
            f"allows: {'; '.join(list(known.values())[:3])}. Repair or remove them, or allow more"
        )


def log_on(is_main_process: bool) -> Callable[[str], None]:
    """A function that prints a line above the progress bar, on the main process only."""
    return tqdm.write if is_main_process else lambda line: None


@contextmanager
def explained_out_of_memory(batch_size: int) -> Iterator[None]:
    """Say what would need less memory. On CPUs neither torch nor oneDNN has an error of its own for it."""
    try:
        yield
    except RuntimeError as error:
        of_cpus = ("allocate memory", "could not create a primitive")
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in of_cpus):
            raise
        raise ValueError(
            f"out of memory with per_device_train_batch_size {batch_size}; lower it (and raise "
            f"gradient_accumulation_steps to keep the effective batch), or add gradient_checkpointing ({error})"
        ) from error


def stop_if_failed(
    failed: torch.Tensor,
    index_name: Callable[[int], str],
    description: str,
    used: dict[int, list[int]],
    names: Sequence[str],
    own: Sequence[str],
) -> None:
    """End the run before weights are saved that come after a value that was not finite; every process calls it.

    Args:
        failed: as `umae.training.failures.remember_failure` leaves it.
        index_name: index of an image -> how people read it.
        description: of the images, in print.
        used: the indices of the images of every step since the last call.
        names: of the values that `failed` has flags for; `grad_norm` is among them.
        own: those that one process' images alone make, which shows whose images they were; the gradient is everybody's.

    Raises:
        FloatingPointError: with the values, the step and the images.
    """
    step, in_a_row, *flags = (int(value) for value in failed.tolist())
    mine = {name for name, flag in zip(names, flags, strict=True) if flag}
    failures = [failure for failure in gather_object([(step, mine, used.get(step, []))]) if failure[0]]
    if not failures:
        return
    failures = [failure for failure in failures if failure[1] & set(own)] or failures
    indices = [index for _, _, used_indices in failures for index in used_indices]
    not_finite = set().union(*(flagged for _, flagged, _ in failures))
    causes = [name for name in names if name in not_finite - {"grad_norm"}] or ["grad_norm"]
    listed = ", ".join(map(index_name, indices[:16]))
    listed += f" and {len(indices) - 16} more" if len(indices) > 16 else ""
    raise FloatingPointError(
        f"{', '.join(causes)} was not finite at step {min(step for step, _, _ in failures)}"
        + (f", the {MOST_OVERFLOWS}th time in a row" if in_a_row >= MOST_OVERFLOWS else "")
        + f", with the images {listed} of {description}; the weights have not changed since, and the last "
        f"checkpoint is from before. Lower base_learning_rate, or train with mixed_precision no"
    )
