"""The arrows of the design: who may import whom."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILES = ("configuration_umae", "modeling_umae", "image_processing_umae")
SCRIPTS = sorted(path.stem for path in ROOT.glob("run_*.py"))
PACKAGE = sorted((ROOT / "umae").rglob("*.py"))

# The rooms of the package, from left to right; a room imports from itself and from what stands left of it.
SLOPE = (
    ("seeding", "files", "progress_bar"),
    ("data",),
    ("convert", "speed"),
    ("training",),
    ("evaluation",),
    ("sharing",),
    ("demo",),
    ("programs",),
)


def module_of(path: Path) -> str:
    """umae/data/crops.py -> umae.data.crops."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, as absolute dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def arrows() -> dict[str, set[str]]:
    """The modules of the package that each of them imports, anywhere in it."""
    modules = {module_of(path): path for path in PACKAGE}
    return {
        module: {name for name in imported(path) if name in modules and name not in (module, "umae")}
        for module, path in modules.items()
        if module not in ("umae", "umae.__main__")  # the front door and the command, which lead to all rooms
    }


def test_no_room_imports_from_a_room_to_its_right_or_beside_it():
    position = {room: column for column, rooms in enumerate(SLOPE) for room in rooms}
    wrong = []
    for module, targets in arrows().items():
        room = module.split(".")[1]
        for target in targets:
            other = target.split(".")[1]
            if room != other and position[other] >= position[room]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    remaining = arrows()
    while leaves := [module for module, targets in remaining.items() if not targets & remaining.keys()]:
        for module in leaves:
            del remaining[module]
    assert not remaining


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_files_need_nothing_but_torch_and_transformers(name):
    """They travel to the Hub: what else they import becomes a demand on every stranger."""
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "configuration_umae"}
    # As transformers' image processors need; tifffile is imported, in a `try`, for the TIFFs that Pillow cannot read
    allowed |= {"numpy", "PIL", "tifffile"} if name == "image_processing_umae" else set()
    assert roots(ROOT / f"{name}.py") <= allowed


def test_only_the_page_of_the_demo_imports_gradio():
    """All else of it is there, and tested, without the extra `demo`."""
    importing = {module_of(path) for path in PACKAGE if "gradio" in roots(path)}
    assert importing == {"umae.demo.page"}


def test_the_package_imports_no_script():
    assert [path for path in PACKAGE if roots(path) & set(SCRIPTS)] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_do_not_import_each_other(name):
    assert not roots(ROOT / f"{name}.py") & set(SCRIPTS)


def test_the_package_reads_neither_the_command_line_nor_the_environment():
    """What a function does follows from its arguments; only `python -m` entry points hand over the command line."""
    readers = {}
    for path in PACKAGE:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                node.body = []
        text = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if path.parent.name == "programs":  # these know how a launcher has started them
            text.discard("os.environ")
        readers[module_of(path)] = text & {"sys.argv", "os.environ", "os.getenv"}
    assert {name: found for name, found in readers.items() if found} == {}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: module_of(path))
def test_the_package_speaks_of_parameters_and_not_of_flags(path):
    """Whoever calls it from Python has none; `command_line_umae.one_line_refusals` puts the `--` back."""
    tree = ast.parse(path.read_text())
    tree.body = tree.body[1:]  # the module's own text may say how `python -m` is called, and `main` is that
    for node in tree.body:
        if not (isinstance(node, ast.FunctionDef) and node.name == "main"):
            constants = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            texts = {constant.value for constant in constants if isinstance(constant.value, str)}
            texts = {text for text in texts if not text.startswith("--extra-index-url ")}  # a line of requirements.txt
            assert not [text for text in texts if re.search("--[a-z]", text)]


@pytest.mark.parametrize("name", ["cards", "hub", "notebook"])
def test_cards_notebooks_and_hub_know_a_folder_only(name):
    ours = {
        module
        for module in imported(ROOT / "umae" / "sharing" / f"{name}.py")
        if module.startswith(("umae", *MODEL_FILES))
    }
    assert ours <= ({"umae.sharing", "umae.sharing.notebook"} if name == "hub" else set())


def test_only_one_module_opens_pickles():
    for path in [*ROOT.glob("*.py"), *PACKAGE]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                assert module_of(path) == "umae.convert.weights" and "weights_only=True" in ast.unparse(node), path


def test_no_docstring_line_looks_like_a_relative_import():
    """transformers finds the files to copy to the Hub by a regular expression over the text."""
    for name in MODEL_FILES:
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        found = [line.strip() for line in lines if line.strip().startswith(("from .", "import ."))]
        assert found == (["from .configuration_umae import UMAEConfig"] if name == "modeling_umae" else [])
