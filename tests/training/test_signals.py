import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
from processes import together

from umae.training.folder import LOCK_FILE, lock
from umae.training.signals import StopRequest


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
    (told, log), (ends, test_lives) = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(test_lives)
            with lock(tmp_path):
                os.fork()  # a loader's worker
                os.write(log, b"held")
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


LOOKING = """
import itertools, json, sys
from accelerate import Accelerator
from umae.training import signals
accelerator = Accelerator()
rank, gather, clock = accelerator.process_index, accelerator.gather, itertools.count()
signals.time.perf_counter = lambda: next(clock) / 10  # a step takes 0.1 seconds or 0.2, a look 0.1 more
def looks_until_a_stop(start, while_looking):
    stop, looks = signals.StopRequest(), []
    def gather_and_note(mine):
        looks.append(step)
        if rank == 1 and while_looking and step >= start + 200:
            stop.signal = 15  # of which `mine` does not tell
        return gather(mine)
    accelerator.gather = gather_and_note
    for step in range(start + 1, start + 400):
        for _ in range(1 + rank):
            next(clock)
        if rank == 1 and not while_looking and step == start + 200:
            stop.signal = 15
        if stop.has_come(accelerator, step):
            break
    return looks, stop.signal, stop.seconds
found = {start: [looks_until_a_stop(start, while_looking) for while_looking in (False, True)] for start in (0, 100_000)}
print(json.dumps(found))
"""


def test_two_processes_look_together_about_every_two_seconds_and_stop_after_the_same_step():
    """From the start and resumed; a signal that comes while they look is seen at the next look."""
    first, second = (json.loads(result.stdout) for result in together(2, "-c", LOOKING))
    assert first == second, "also the seconds since the start"
    for start, found in first.items():
        for (looks, signal_seen, _), looks_after_signal in zip(found, (1, 2), strict=True):
            assert signal_seen == signal.SIGTERM and looks[0] == int(start) + 1
            assert all(8 <= later - earlier <= 12 for earlier, later in pairwise(looks[3:])), looks
            assert looks[-looks_after_signal - 1] < int(start) + 200 <= looks[-looks_after_signal], looks
