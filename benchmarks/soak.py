"""Runs killed at random moments and started again until they end: do they end with the same bits?

    make soak                                  # 200 kills, twenty minutes or more

Every run is a short one on the bundled digits; half of them read their images with two workers. SIGKILL comes at a
random moment after a run has taken its folder: while it resumes, trains, logs or writes a checkpoint. What has to be as
if nothing had happened: `model.safetensors`, and `metrics.jsonl` but for what depends on the clock.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import measure
from umae.training.folder import RUN_FILE
from umae.training.log import SPEED

ROOT = Path(__file__).resolve().parents[1]
RUN = ("run_pretrain.py", "--max_train_steps", "120", "--checkpointing_steps", "5", "--logging_steps", "4")


def start(folder: Path, workers: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *RUN, "--output_dir", str(folder), "--dataloader_num_workers", str(workers)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def result(folder: Path) -> tuple[bytes, list[dict]]:
    """What a run leaves: the bytes of its weights, and its metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in SPEED} for line in lines]
    return (folder / "model.safetensors").read_bytes(), metrics


def killed_until_it_ends(folder: Path, workers: int, longest: float, chance: random.Random, most: int) -> int:
    """Start a run again and again, killing it, until it ends; returns how many times it was killed."""
    kills = 0
    while True:
        before, process = _written(folder), start(folder, workers)
        if kills < most:
            while process.poll() is None and _written(folder) == before:
                time.sleep(0.005)
            try:
                process.wait(chance.uniform(0, longest))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            return kills
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"{folder} ended with status {process.returncode}:\n{errors.decode()[-2000:]}")
        kills += 1


def _written(folder: Path) -> int:
    """When a run last took the folder, or saved in it."""
    path = folder / RUN_FILE
    return path.stat().st_mtime_ns if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many at least (default 200)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = Path(temporary) / "undisturbed"
        began = time.monotonic()
        if start(undisturbed, workers=0).wait() != 0:
            raise SystemExit("the undisturbed run failed")
        longest = time.monotonic() - began  # mostly imports, which are over when a run takes its folder
        expected = result(undisturbed)

        kills = ends = identical = number = 0
        with ThreadPoolExecutor(args.parallel) as pool:
            while kills < args.kills:
                folders = [Path(temporary) / f"run-{number + i}" for i in range(args.parallel)]
                jobs = [
                    pool.submit(
                        killed_until_it_ends, folder, 2 * ((number + i) % 2), longest / 5,
                        random.Random(args.seed * 10**6 + number + i), args.kills - kills,
                    )
                    for i, folder in enumerate(folders)
                ]  # fmt: skip
                kills += sum(job.result() for job in jobs)
                ends += len(folders)
                identical += sum(result(folder) == expected for folder in folders)
                number += len(folders)
                print(f"{kills} kills, {ends} ends, {identical} of them bit-identical", flush=True)
    text = f"{kills} kills in {ends} runs: {identical} of {ends} ended with the bits of an undisturbed run."
    measure.report("soak", "Runs killed at random", "cpu", text)
    sys.exit(identical != ends)


if __name__ == "__main__":
    main()
