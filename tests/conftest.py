"""What every test runs under: one thread for each process, no network, caches of its own."""

import os
import tempfile

# Before anything that reads them is imported
os.environ["OMP_NUM_THREADS"] = "1"  # two processes with two threads each would wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="umae-tests-")

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state for a process; a test that runs a script in this one must not leave its own behind."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
