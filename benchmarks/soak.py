"""Runs that are killed at random moments and restarted until they finish: are the results bit-identical?

    make soak                                  # 200 kills, twenty minutes or more

Every run is a short one on the bundled digits; half of them read their images with two workers. SIGKILL comes at a
random moment after a run has locked its folder: while it resumes, trains, logs or writes a checkpoint. These have to be
identical to an undisturbed run's: `model.safetensors`, and `metrics.jsonl` without the values that depend on the clock.
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
    """The bytes of a run's weights, and its metrics without the values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in SPEED} for line in lines]
    return (folder / "model.safetensors").read_bytes(), metrics


def run_with_kills(folder: Path, workers: int, longest: float, generator: random.Random, most: int) -> int:
    """Start a run and kill it, at most `most` times, until it finishes; returns the number of kills."""
    kills = 0
    while True:
        before, process = _written(folder), start(folder, workers)
        if kills < most:
            while process.poll() is None and _written(folder) == before:
                time.sleep(0.005)
            try:
                process.wait(generator.uniform(0, longest))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            return kills
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"{folder} ended with status {process.returncode}:\n{errors.decode()[-2000:]}")
        kills += 1


def _written(folder: Path) -> int:
    """When a run last locked the folder or saved in it, in nanoseconds."""
    path = folder / RUN_FILE
    return path.stat().st_mtime_ns if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least this many (default 200)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = Path(temporary) / "undisturbed"
        start_time = time.monotonic()
        if start(undisturbed, workers=0).wait() != 0:
            raise SystemExit("the undisturbed run failed")
        longest = time.monotonic() - start_time  # mostly imports, before the run locks its folder
        expected = result(undisturbed)

        kills = finished = identical = number = 0
        with ThreadPoolExecutor(args.parallel) as pool:
            while kills < args.kills:
                folders = [Path(temporary) / f"run-{number + i}" for i in range(args.parallel)]
                jobs = [
                    pool.submit(
                        run_with_kills, folder, 2 * ((number + i) % 2), longest / 5,
                        random.Random(args.seed * 10**6 + number + i), args.kills - kills,
                    )
                    for i, folder in enumerate(folders)
                ]  # fmt: skip
                kills += sum(job.result() for job in jobs)
                finished += len(folders)
                identical += sum(result(folder) == expected for folder in folders)
                number += len(folders)
                print(f"{kills} kills, {finished} runs finished, {identical} of them bit-identical", flush=True)
    text = f"{kills} kills in {finished} runs: {identical} of {finished} are bit-identical to an undisturbed run."
    measure.report("soak", "Runs killed at random", "cpu", text)
    sys.exit(identical != finished)


if __name__ == "__main__":
    main()
