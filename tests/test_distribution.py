"""What `pip install` gives: built, installed elsewhere, and used from an empty folder."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from processes import ROOT, run

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what: str, source: Path, target: Path) -> Path:
    """Call the build backend as pip does, without its isolated environment, which needs a network."""
    command = [sys.executable, "-c", BUILD, what, str(target)]
    printed = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True).stdout
    return target / printed.splitlines()[-1]


def files(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Of the files that git knows, by way of a source distribution."""
    folder = tmp_path_factory.mktemp("build")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in names:
        (folder / "clean" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "clean" / name)
    with tarfile.open(build("build_sdist", folder / "clean", folder)) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    (folder / "direct").mkdir()
    direct = build("build_wheel", folder / "clean", folder / "direct")
    built = build("build_wheel", source, folder)
    assert files(built) == files(direct)
    return built


def test_the_wheel_holds_the_package_its_recipes_and_its_types(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "umae").rglob("*.py")}
    expected |= {f"umae/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")}
    expected |= {f"umae/studies/{path.name}" for path in (ROOT / "studies").glob("*.yaml")}
    expected |= {f"{name}_umae.py" for name in ("arguments", "command_line", "configuration", "image_processing")}
    expected |= {"modeling_umae.py", "umae/py.typed", "umae/recipes/slurm.sh"}
    assert expected <= files(wheel)
    assert not {name for name in files(wheel) if name.startswith(("tests", "benchmarks", "run_"))}


@pytest.mark.parametrize(
    ("machine", "python", "implementation", "expected"),
    [
        ("x86_64", "3.11", "CPython", True),  # Linux, macOS
        ("aarch64", "3.14", "CPython", True),
        ("arm64", "3.13", "CPython", True),  # macOS
        ("AMD64", "3.12", "CPython", True),  # Windows
        ("ppc64le", "3.12", "CPython", False),
        ("armv7l", "3.12", "CPython", False),
        ("x86_64", "3.15", "CPython", False),
        ("x86_64", "3.11", "PyPy", False),
    ],
)
def test_simplejpeg_comes_with_the_package_where_it_has_wheels(machine, python, implementation, expected):
    """Of its version 1.9.0. Elsewhere pip would have to compile it, and the package works without it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [found for found in map(Requirement, project["dependencies"]) if found.name == "simplejpeg"]
    environment = {
        "platform_machine": machine,
        "python_version": python,
        "platform_python_implementation": implementation,
    }
    assert requirement.marker.evaluate(environment) == expected


def test_the_installed_package_trains_by_its_command_and_from_python(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", target, wheel], check=True, capture_output=True)
    (tmp_path / "empty").mkdir()

    def started(*command) -> str:
        return run(*command, cwd=tmp_path / "empty", PYTHONPATH=str(target)).stdout

    flags = ("--recipe", "digits", "--output_dir", "run", "--max_train_steps", "1", "--eval_steps", "0")
    assert "finished in" in started(target / "bin" / "umae", "pretrain", *flags)
    code = (
        "import sys, umae, modeling_umae; assert 'site/' in umae.__file__ and 'site/' in modeling_umae.__file__; "
        "assert [name for name in sys.modules if name.startswith('umae')] == ['umae'], 'the rest when it is used'; "
        "run = umae.pretrain(dataset_name='digits', output_dir='run', max_train_steps=1, eval_steps=0); "
        "print(run.folder, len(run.metrics), type(run.model()).__name__)"
    )
    printed = started("-c", code)
    assert printed.endswith("run holds this run, finished; nothing to do\nrun 1 UMAEForPreTraining\n")
