"""Running our scripts as a user does: other processes, other folders, one thread each."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TIMEOUT = 300  # seconds; a process that hangs is a failure


def environment(**changes: str) -> dict[str, str]:
    """This process' environment (see conftest.py) without progress bars, and with our modules importable."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**base, "TQDM_DISABLE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **changes}


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run `python *command`; with `check`, a failure shows what the process printed."""
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment(**env), capture_output=True, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def torchrun(processes: int, *command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a script in several processes on the CPU."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone")
    return run(*launcher, *command, ACCELERATE_USE_CPU="1", **options)
