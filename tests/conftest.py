"""What every test runs under: one thread for each process, no network, caches of its own."""

import os
import tempfile

# Before anything that reads them is imported
os.environ["OMP_NUM_THREADS"] = "1"  # two processes with two threads each would wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="umae-tests-")

import pytest
from accelerate.state import AcceleratorState, GradientState
from processes import run
from training_runs import SHORT, TWENTY, metrics


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state for a process; a test that runs a script in this one must not leave its own behind."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run on the digits, undisturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run("run_pretrain.py", "--output_dir", folder, *SHORT)
    return folder, result.stdout


@pytest.fixture(scope="session")
def twenty_steps(tmp_path_factory):
    """The curve of a run on one process, every step of it."""
    folder = tmp_path_factory.mktemp("twenty") / "run"
    run("run_pretrain.py", "--output_dir", folder, *TWENTY)
    return metrics(folder)
