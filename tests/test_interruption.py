import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import psutil
import pytest
import torch

from umae.interruption import LOCK_FILE, StopRequest, lock


def gone() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def hold(folder, **changes) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time(), **changes}
    (folder / LOCK_FILE).write_text(json.dumps(owner))


def test_a_held_folder_is_refused_and_free_again_afterwards(tmp_path):
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"is being trained by process {os.getpid()}; wait for it, or use another"):
            lock(tmp_path).__enter__()
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("changes", [{"pid": gone()}, {"started": 1.0}], ids=["dead", "another process of that number"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, changes):
    hold(tmp_path, **changes)
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_of_many_that_find_a_stale_lock_one_takes_it_over(tmp_path):
    hold(tmp_path, pid=gone())
    barrier = Barrier(8)

    def attempt(one) -> bool:
        barrier.wait()
        try:
            one.__enter__()
        except ValueError:
            return False
        return True

    locks = [lock(tmp_path) for _ in range(8)]  # kept: one that is collected lets go
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, locks)) == 1


def test_a_lock_without_content_is_taken_over(tmp_path):
    (tmp_path / LOCK_FILE).write_text("")
    with lock(tmp_path):
        pass


def test_the_lock_of_another_machine_is_refused_with_what_to_do(tmp_path):
    hold(tmp_path, host="elsewhere", pid=gone())
    with pytest.raises(
        ValueError, match=r"process \d+ on elsewhere; if that machine or process is gone, delete .*run.lock"
    ):
        lock(tmp_path).__enter__()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_the_second_one_acts(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(number) == before


class Process:
    """One of two processes, as far as a StopRequest knows: what the other one sees is given."""

    num_processes, device = 2, "cpu"

    def __init__(self):
        self.looks, self.others = [], (0.0, 1e9)

    def gather(self, mine):
        self.looks.append(mine[0].tolist())
        return torch.cat([mine, torch.tensor([self.others])])


@pytest.mark.parametrize("start", [0, 100_000], ids=["from the start", "resumed"])
def test_several_processes_look_together_about_every_two_seconds(monkeypatch, start):
    clock = iter(range(10_000))  # a step takes a tenth of a second, so does a look
    monkeypatch.setattr("umae.interruption.time.perf_counter", lambda: next(clock) / 10)
    process, stop = Process(), StopRequest()
    looked = []
    for step in range(start + 1, start + 200):
        before = len(process.looks)
        next(clock)
        assert not stop.has_come(process, step)
        if len(process.looks) > before:
            looked.append(step)
    assert looked[0] == start + 1 and 8 < len(looked) < 20, looked
    assert all(10 <= later - earlier <= 25 for earlier, later in pairwise(looked[3:])), looked
    process.others = (15.0, 3.0)  # the other one has got a signal, and makes 3 steps in that time
    assert any(stop.has_come(process, step) for step in range(start + 200, start + 230)) and stop.signal == 15


def test_a_signal_that_comes_while_processes_look_is_seen_at_the_next_look():
    process, stop = Process(), StopRequest()
    process.others = (0.0, 1.0)
    gather = process.gather

    def interrupted(mine):
        stop.signal = 15
        return gather(mine)

    process.gather = interrupted
    assert not stop.has_come(process, 1), "the others do not know of it"
    process.gather = gather
    assert stop.has_come(process, 2) and stop.signal == 15
