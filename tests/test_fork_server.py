"""A forked program is as a freshly started one, and neither a program nor a session leaves anything behind."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from processes import LATE, LIBRARIES, PROGRAMS, ROOT, TRANSFORMERS, Forked, hub_user, run, start

FACTS = """
import importlib, json, os, random, signal, sys, threading, warnings
for name in os.environ["MODULES"].split():
    importlib.import_module(name)
import multiprocessing, numpy, run_pretrain, torch
from accelerate.state import AcceleratorState, PartialState
facts = {
    "argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ),
    "main": [__name__, __file__, vars(sys.modules["__main__"]) is globals()],
    "leader": os.getpid() == os.getsid(0) == os.getpgrp(),
    "files": [os.path.exists(f"/proc/self/fd/{number}") for number in range(99)],
    "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    "standard": [sys.stdin.read(), sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding],
    "warnings": sorted(map(str, warnings.filters)), "threads": threading.active_count(),
    "accelerate": [len(AcceleratorState._shared_state), len(PartialState._shared_state)],
    "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled()],
    "processes": [multiprocessing.get_start_method(), len(multiprocessing.active_children())],
    "imported": sorted(name for name in sys.modules if name.split(".")[0] in ("umae", "modeling_umae")),
    "random": [random.random(), numpy.random.random(), torch.rand(()).item()],
}
print(json.dumps(facts))
run_pretrain.main(sys.argv[1:])
"""
STEP = ("--max_train_steps", "1", "--eval_steps", "0")


@pytest.mark.slow
def test_a_forked_program_is_as_a_freshly_started_one(tmp_path):
    """What it finds, what it computes and what it leaves; the first one after another as well."""
    (tmp_path / "facts.py").write_text(FACTS)
    found, bits = [], []
    for number, fresh in enumerate((True, False, False)):
        folder = tmp_path / str(number)
        folder.mkdir()
        modules = " ".join(LIBRARIES + TRANSFORMERS + PROGRAMS)
        words = ("../facts.py", "--output_dir", "run", *STEP)
        result = run(*words, cwd=folder, fresh=fresh, figures=True, MODULES=modules)
        found.append(json.loads(result.stdout.splitlines()[0].replace(str(folder), "")))
        found[-1]["warned"] = [line for line in result.stderr.splitlines() if "Warning" in line]
        bits.append({path.name: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()})
    drawn = [one.pop("random") for one in found]
    assert found[1] == found[0] and found[2] == found[0]
    assert len({number for numbers in drawn for number in numbers}) == 9, "from the system, for each"
    for name in bits[0].keys() - {"README.md", "metrics.jsonl", "run.json"}:  # which hold times
        assert bits[1][name] == bits[0][name] and bits[2][name] == bits[0][name], name


ENDS = (
    "pass", "import sys; sys.exit(3)", "import sys; sys.exit('a reason')", "print('said'); raise ValueError('why')",
    "import os; os._exit(7)", "import os; os.kill(os.getpid(), 9)", "import os; os.kill(os.getpid(), 15)",
    "import os, signal; os.kill(os.getpid(), signal.SIGINT)", "import atexit; atexit.register(print, 'at the end')",
    "import threading; threading.Timer(0.1, print, ['by a thread']).start()", "import sys; print(sys.argv, __name__)",
)  # fmt: skip


@pytest.mark.slow
def test_it_ends_as_a_freshly_started_one_and_the_server_goes_on():
    results = {}
    for fresh in (True, False):
        results[fresh] = [run("-c", code, "a", "b c", fresh=fresh, check=False) for code in ENDS]
    for mine, expected in zip(results[False], results[True], strict=True):
        assert (mine.returncode, mine.stdout) == (expected.returncode, expected.stdout)
        assert mine.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]
    assert [result.returncode for result in results[False]] == [0, 3, 1, 1, 7, -9, -15, -2, 0, 0, 0]
    parents = {run("-c", "import os; print(os.getppid())").stdout for _ in range(2)}
    assert len(parents) == 1 and psutil.Process(int(parents.pop())).is_running()


@pytest.mark.slow
def test_modules_scripts_and_lines_of_code_are_found_where_python_finds_them(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("import sys; print(sys.argv, sys.path, __name__, __package__)")
    (tmp_path / "beside.py").write_text("import sys; print(sys.argv, sys.path, __name__, __file__)")
    (tmp_path / "script.py").write_text("import beside, sys; print(sys.argv, sys.path, __name__, __file__)")
    for words in (("-m", "package", "x"), ("script.py", "x"), (tmp_path / "script.py",), ("-c", "import beside", "x")):
        for env in ({}, {"PYTHONPATH": ""}):
            mine, expected = (run(*words, cwd=tmp_path, fresh=fresh, **env).stdout for fresh in (False, True))
            assert mine == expected and (str(ROOT / "tests") in mine) == (not env), words


@pytest.mark.usefixtures("server")
def test_what_the_environment_says_is_seen_whenever_it_is_read():
    code = (
        "import os, pathlib; from huggingface_hub import constants; "
        "from umae.training.hardware import make_accelerator; "
        "accelerator = make_accelerator(os.environ, None, 1, 'none', pathlib.Path()); "
        "print(accelerator.mixed_precision, constants.HF_HUB_OFFLINE, constants.HF_HOME)"
    )
    home = hub_user()
    late = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "1"}
    assert all(name.startswith(LATE) for name in late)
    assert run("-c", code, **late).stdout == f"bf16 True {os.environ['HF_HOME']}\n"
    assert run("-c", code, **late, **home).stdout == f"bf16 False {home['HF_HOME']}\n"
    for env, forked in ((late, True), (home, True), ({"TRANSFORMERS_VERBOSITY": "error"}, False)):
        process = start("-c", "", **env)
        assert process.wait(60) == 0 and isinstance(process, Forked) == forked


@pytest.mark.slow
def test_a_program_that_hangs_is_ended_with_all_it_has_started(tmp_path):
    code = "import os, time; open(str(os.getpid()), 'w'), os.fork(), open(str(os.getpid()), 'w'), time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired):
        run("-c", code, cwd=tmp_path, timeout=3)
    numbers = [int(path.name) for path in tmp_path.iterdir()]
    time.sleep(0.2)
    assert len(numbers) == 2
    for number in numbers:
        assert not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


LEAVING = """
import os, signal, tempfile, time, processes
processes.LIBRARIES = processes.TRANSFORMERS = processes.PROGRAMS = processes.WITHOUT_FIGURES = ()
def test_that_leaves_files_and_a_program(tmp_path):
    assert "umae-tests-" in tempfile.mkdtemp()
    code = "import os, tempfile, time; print(tempfile.mkdtemp()); open('there', 'w'); os.fork(); time.sleep(600)"
    processes.start("-c", code, cwd=tmp_path, HF_ANY="1")
    while not (tmp_path / "there").exists():
        time.sleep(0.01)
"""


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_session_leaves_no_file_and_no_process(tmp_path, workers):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "test_leaving.py").write_text(LEAVING)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-n", workers, "test_leaving.py"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    left = {path.relative_to(tmp_path / "tmp") for path in (tmp_path / "tmp").rglob("*") if not path.is_symlink()}
    assert len(left) == 1 and str(left.pop()).startswith("pytest-of-"), "an empty folder of pytest's"
    for process in psutil.process_iter(["pid", "environ", "status"]):
        assert (process.info["environ"] or {}).get("TMPDIR", "").startswith(str(tmp_path)) is False, process
