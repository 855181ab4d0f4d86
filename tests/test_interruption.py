import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch

from umae.interruption import LOCK_FILE, StopRequest, lock


def test_a_held_folder_is_refused_and_free_again_afterwards(tmp_path):
    with lock(tmp_path), pytest.raises(ValueError, match=f"{tmp_path} is being trained by another process; wait for"):
        lock(tmp_path).__enter__()
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    with lock(tmp_path):
        pass


def test_a_lock_file_that_nobody_holds_is_taken_whatever_it_says(tmp_path):
    (tmp_path / LOCK_FILE).write_text('{"pid": 1, "host": "elsewhere", "started": 1.0}')
    with lock(tmp_path):
        pass


def test_of_many_that_find_a_free_folder_one_takes_it(tmp_path):
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that inherit open files")
def test_a_folder_is_free_as_soon_as_its_process_is_killed_though_a_worker_lives_on(tmp_path):
    (told, tell), (ends, test_lives) = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(test_lives)
            with lock(tmp_path):
                os.fork()  # a loader's worker
                os.write(tell, b"held")
                os.read(ends, 1)  # until the test ends
        finally:
            os._exit(0)
    try:
        os.read(told, 4)
        os.read(told, 4)
        with pytest.raises(ValueError, match="is being trained by another process"):
            lock(tmp_path).__enter__()
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with lock(tmp_path):
            pass
    finally:
        os.close(test_lives)


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
