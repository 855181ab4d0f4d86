"""Running our scripts as a user does: other processes, other folders, one thread each.

Most of what a short run takes are imports, so the processes are forked from one that has them (fork_server.py), unless
they are asked to differ in what those imports have read. There is one such process for every way to reach the Hub
that the tests use, so they should use few. The workers of xdist share them.
"""

import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from fork_server import NUMBER

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TIMEOUT = 300  # seconds; a process that hangs is a failure

# No import reads what begins so, and those of the libraries read none of Hugging Face's
LATE = ("ACCELERATE_", "FSDP_", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
LIBRARIES = (
    "torch", "torch.distributed.fsdp", "torch._dynamo", "torch.utils.flop_counter", "torch.utils.tensorboard", "pandas",
    "pyarrow.parquet", "matplotlib.backends.backend_agg", "sklearn.datasets", "psutil",
)  # fmt: skip
TRANSFORMERS = (
    "accelerate", "datasets", "transformers.pipelines", "transformers.models.vit.modeling_vit",
    "transformers.models.vit.image_processing_pil_vit", "transformers.models.auto.image_processing_auto",
)  # fmt: skip
PROGRAMS = (
    "umae.programs.pretrain", "umae.programs.finetune", "umae.programs.probe", "umae.sharing.report",
    "transformers.hf_argparser", "short_programs",
)  # fmt: skip
WITHOUT_FIGURES = ("no_figures",)


def environment(**changes: str) -> dict[str, str]:
    """This process' environment (see conftest.py) without progress bars, and with our modules importable."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**base, "TQDM_DISABLE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **changes}


@cache
def hub_port() -> int:
    """Of the tests' own Hub: one port, so that one fork server serves all who use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@cache
def _hub_home() -> Path:
    return Path(tempfile.mkdtemp(prefix="hub-")) / "home"


def hub_user() -> dict[str, str]:
    """The environment of a user who is logged in to the tests' own Hub and has nothing of it in the cache."""
    shutil.rmtree(_hub_home(), ignore_errors=True)
    login = {"HF_ENDPOINT": f"http://127.0.0.1:{hub_port()}", "HF_TOKEN": "hf_test", "HF_HOME": str(_hub_home())}
    return {**login, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class Forked:
    """A process that a server has forked, with as much of `subprocess.Popen` as is needed."""

    def __init__(self, report: int):
        self._report, self.returncode = report, None
        self.pid = self._next_number()

    def _next_number(self) -> int:
        number = os.read(self._report, NUMBER.size)
        if not number:
            raise RuntimeError(
                "the fork server has ended; run `python tests/fork_server.py torch run_pretrain` for why"
            )
        return NUMBER.unpack(number)[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = self._next_number()
            os.close(self._report)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkServer:
    """A connection to the fork server of this name that has imported `modules`. If there is none, it is started: as a
    new process, or as one that `parent` forks."""

    def __init__(self, name: str, *modules: str, parent: "ForkServer | None" = None, **env: str):
        import fcntl  # not on Windows, which has no fork either

        self.environ, self.process = environment(**env), None
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        address = f"\0umae-tests-{name}"  # of Linux: no file, and gone with its server
        with open(Path(os.environ["TMPDIR"], name), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers that want it at once, one starts it
            try:
                self._control.connect(address)
            except ConnectionRefusedError:
                self.process = self._start(address, modules, parent)
                self._control.connect(address)

    def _start(
        self, address: str, modules: tuple[str, ...], parent: "ForkServer | None"
    ) -> "subprocess.Popen | Forked":
        words = [str(ROOT / "tests" / "fork_server.py"), *modules]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, open(os.devnull, "w") as null:
            listener.bind(address)
            listener.listen()
            if parent is not None:
                return parent.fork(words, ROOT, self.environ, (listener.fileno(), null.fileno(), 2))
            return subprocess.Popen(
                [sys.executable, *words],
                stdin=listener,
                stdout=null,
                cwd=ROOT,
                env=self.environ,
                start_new_session=True,
            )

    def fork(self, words: list[str], cwd: Path, environ: dict[str, str], files: tuple[int, int, int]) -> Forked:
        """`files` are its standard input, output and error."""
        request = json.dumps({"words": words, "cwd": str(cwd), "environ": environ}).encode()
        report, far_end = os.pipe()
        try:
            socket.send_fds(self._control, [request], [*files, far_end])
        finally:
            os.close(far_end)
        return Forked(report)

    def end(self) -> None:
        self._control.close()
        if self.process is not None:
            self.process.wait()  # until the other workers have ended, too


_servers: list[ForkServer] = []  # each forked by the one before, or by an earlier one


@cache
def server(*steps: tuple[str, ...], changes: frozenset[tuple[str, str]] = frozenset()) -> ForkServer:
    """One that has imported the modules of these steps; all but the first step may see changes of the environment."""
    *earlier, modules = steps
    parent = server(*earlier, changes=changes if len(earlier) > 1 else frozenset()) if earlier else None
    key = (os.environ["TMPDIR"], steps, sorted(changes))  # the folder is that of this session of pytest
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    _servers.append(ForkServer(name, *modules, parent=parent, **dict(changes)))
    return _servers[-1]


def end_servers() -> None:
    while _servers:
        _servers.pop().end()
    server.cache_clear()


def server_for(environ: dict[str, str], figures: bool) -> ForkServer | None:
    """The one whose imports have read nothing that differs in `environ`; without ours if it has another PYTHONPATH."""
    if not hasattr(os, "pidfd_open"):
        return None  # the servers need Linux
    usual = environment()
    changed = {name for name, _ in usual.items() ^ environ.items() if not name.startswith(LATE)}
    of_hub = frozenset((name, environ[name]) for name in changed if name.startswith("HF_") and name in environ)
    if changed - {name for name, _ in of_hub} - {"PYTHONPATH"}:
        return None
    ours = () if "PYTHONPATH" in changed else (PROGRAMS,) if figures else (PROGRAMS, WITHOUT_FIGURES)
    return server(LIBRARIES, TRANSFORMERS, *ours, changes=of_hub)


def start(
    *command: str | Path, cwd: Path = ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, fresh: bool = False,
    figures: bool = False, **env: str,
) -> subprocess.Popen | Forked:  # fmt: skip
    """Start `python *command` in a session of its own.

    Args:
        stdout: an open file, if what it prints is to be kept.
        stderr: another one, if they are to be kept apart.
        fresh: in a process that is started rather than forked.
        figures: a run of pre-training draws its figures, which take a third of a short one. Without, only one in a
            fresh process does, see `no_figures`.
    """
    words, environ = [str(word) for word in command], environment(**env)
    forking = None if fresh else server_for(environ, figures)
    if forking is None:
        command = [sys.executable, *words]
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    with open(os.devnull, "r+") as null:
        out = null if stdout is subprocess.DEVNULL else stdout
        error = out if stderr is subprocess.STDOUT else stderr
        return forking.fork(words, cwd, environ, (null.fileno(), out.fileno(), error.fileno()))


def run(
    *command: str | Path,
    cwd: Path = ROOT,
    check: bool = True,
    fresh: bool = False,
    figures: bool = False,
    timeout: float = TIMEOUT,
    **env: str,
) -> subprocess.CompletedProcess:
    """Run `python *command`; with `check`, a failure shows what the process printed. The other arguments as `start`."""
    (result,) = _results([(command, env)], cwd, check, fresh, timeout, figures)
    return result


def torchrun(processes: int, *command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a script in several processes on the CPU."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone")
    return run(*launcher, *command, ACCELERATE_USE_CPU="1", fresh=True, **options)


def together(
    processes: int, *command: str | Path, cwd: Path = ROOT, check: bool = True, **env: str
) -> list[subprocess.CompletedProcess]:
    """Run a script in several processes on the CPU that know of each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    ranks = [{**where, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _results(
        [(command, {"ACCELERATE_USE_CPU": "1", **env, **rank}) for rank in ranks], cwd, check, False, TIMEOUT
    )


def _results(commands, cwd, check, fresh, timeout, figures=False) -> list[subprocess.CompletedProcess]:
    """Of (words, environment) each, at the same time; with `check`, when one fails the others are ended."""
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        processes = [
            start(*command, cwd=cwd, stdout=out, stderr=error, fresh=fresh, figures=figures, **env)
            for (command, env), (out, error) in zip(commands, files, strict=True)
        ]
        try:
            while any(process.poll() is None for process in processes):
                if check and any(process.poll() for process in processes):
                    break
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(str(commands), timeout)
                time.sleep(0.005)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        results = []
        for process, (command, _), printed in zip(processes, commands, files, strict=True):
            for file in printed:
                file.seek(0)
            output = [file.read() for file in printed]
            results.append(subprocess.CompletedProcess(command, process.returncode, *output))
    if check:
        for result in results:
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return results
