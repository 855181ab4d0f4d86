"""A process that has imported what our programs import, and forks into a program whenever it is asked to.

    python fork_server.py MODULE ...    # file 0 is a listening socket; processes.py starts it and talks to it

What it forks is as a freshly started `python`, but for the seconds that its imports would take, for those that Python
takes to free all modules at its end, and for the seed of `hash()`, which all of a server's have in common. It ends when
the last of its connections is closed, and all that it has started ends with it.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import types
from pathlib import Path

NUMBER = struct.Struct("i")  # of a process, and how it has ended
MOST_BYTES = 2**17  # of a request


def serve() -> list[str]:
    """Fork for every request. Returns in the forked process only: the words after `python` that it is to run."""
    listener, poll = socket.socket(fileno=0), select.poll()
    poll.register(listener, select.POLLIN)
    connections = {}  # by their descriptors
    running = {}  # by the descriptor that tells the end of a process: its number, and where that is reported
    while True:
        for ready, _ in poll.poll():
            if ready == listener.fileno():
                connection, _ = listener.accept()
                connections[connection.fileno()] = connection
                poll.register(connection, select.POLLIN)
                continue
            if ready in running:
                poll.unregister(ready)
                pid, report = running.pop(ready)
                with contextlib.suppress(BrokenPipeError):  # nobody asks any more
                    os.write(report, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                os.close(ready)
                os.close(report)
                continue
            request, files, _, _ = socket.recv_fds(connections[ready], MOST_BYTES, 4)
            if not request:
                poll.unregister(ready)
                connections.pop(ready).close()
                if connections:
                    continue
                for pid, _ in running.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                sys.exit()
            pid = os.fork()
            if pid == 0:
                for inherited in (listener, *connections.values()):
                    inherited.detach()  # their numbers get other files
                return _begin(json.loads(request), files)
            *standard, report = files
            for file in standard:
                os.close(file)
            os.write(report, NUMBER.pack(pid))
            end = os.pidfd_open(pid)
            poll.register(end, select.POLLIN)
            running[end] = pid, report


def _begin(request: dict, files: list[int]) -> list[str]:
    """What the system does for a process that is started: files, folder, environment."""
    os.setsid()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    os.chdir(request["cwd"])
    before, now = (environ.get("PYTHONPATH", "").split(":") for environ in (os.environ, request["environ"]))
    sys.path[1:] = [*filter(None, now), *(entry for entry in sys.path[1:] if entry not in before)]
    os.environ.clear()
    os.environ.update(request["environ"])
    if "torch" in sys.modules:  # `random` does it by itself
        sys.modules["numpy"].random.seed()
        sys.modules["torch"].seed()
    return request["words"]


def become(words: list[str]) -> None:
    """What `python *words` does."""
    kind, *rest = words
    if kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        code = rest[0]
    else:
        sys.path[0], sys.argv = str(Path(kind).resolve().parent), words
        main.__file__ = os.path.abspath(kind)
        code = compile(Path(kind).read_bytes(), main.__file__, "exec")
    exec(code, vars(main))


def end(status: int) -> None:
    """What Python does at its end, but for freeing every module and object, which takes longer than many a program."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    gc.disable()  # it would go through all that has been imported so far again and again
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.enable()
    gc.freeze()  # else every process that is forked would copy all of this the first time it collects
    try:
        become(serve())
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
            end(1)
        end(stop.code or 0)
    end(0)
