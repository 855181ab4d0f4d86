"""What every test runs under: one thread for each process, no network, caches and a temporary folder of its own."""

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading

# What is started in the background has SIGINT ignored, and hands that on to the programs that are to be stopped by it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until all is imported: it would go through what has been imported so far again and again

# Before anything that reads them is imported
os.environ["OMP_NUM_THREADS"] = "1"  # two processes with two threads each would wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # and has the folder of the process that has started it
if not IS_WORKER:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # for pytest's, which it removes itself
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="umae-tests-")
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="huggingface-", dir=os.environ["TMPDIR"])
tempfile.tempdir = os.environ["TMPDIR"]

import processes
import pytest
import short_runs
from browsing import CHROMIUM
from fake_hub import FakeHub
from hypothesis import settings
from training_runs import SHORT, TEN, metrics

settings.register_profile("fast", max_examples=100, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("fast")


def pytest_collection_modifyitems(items):
    """First the tests that share what takes long to make: a worker of xdist begins with its first test, and others take
    over its last ones. Users of the tests' own Hub share a fork server, others the runs below."""
    shared = (("server",), ("finished", "ten_steps"))
    items.sort(key=lambda item: [not {*names} & {*item.fixturenames} for names in shared])


def pytest_collection_finish():
    gc.enable()
    gc.freeze()  # what is imported stays; to look for garbage among it takes half a second, and every program does


def pytest_unconfigure():
    processes.end_servers()
    if not IS_WORKER:  # killed programs, among others, have left something in there, and some are still removing it
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state for a process; a test that runs a script in this one must not leave its own behind."""
    yield
    state = sys.modules.get("accelerate.state")  # its import takes seconds, and not every test needs it
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def no_figures(monkeypatch):
    """Training in this process draws none, for tests that look at none, and is shorter, as in forked processes."""
    for target, value in {**short_runs.SHORTER, **short_runs.NO_FIGURES}.items():
        monkeypatch.setattr(target, value)


@pytest.fixture
def server():
    """A Hub without repositories, always at the same address; `processes.hub_user()` is a user of it."""
    with FakeHub(processes.hub_port()) as server:
        yield server


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run on the digits, undisturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = processes.run("run_pretrain.py", "--output_dir", folder, *SHORT, figures=True)
    return folder, result.stdout


@pytest.fixture(scope="session")
def ten_steps(tmp_path_factory):
    """The curve of a run on one process, every step of it."""
    folder = tmp_path_factory.mktemp("ten") / "run"
    processes.run("run_pretrain.py", "--output_dir", folder, *TEN)
    return metrics(folder)


@pytest.fixture(scope="module")
def browser():
    """A real one, of playwright."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
