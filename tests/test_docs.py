"""What README and docs/ say, against what there is."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

import arguments_umae
import umae
from command_line_umae import VERBS, given_flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
RECIPES = sorted(path for folder in ("recipes", "studies") for path in (ROOT / folder).rglob("*.yaml"))
TYPES = {  # of what is started with flags of these dataclasses
    "recipes/slurm.sh": arguments_umae.PRETRAIN,
    **{f"umae {verb}": types for verb, (types, _) in arguments_umae.PROGRAMS.items()},
}
OTHER_FLAGS = {  # of launchers, pip, the commands without a dataclass, benchmarks and examples
    "--config_file", "--machine_rank", "--main_process_ip", "--num_processes", "--nproc_per_node",
    "--batch_size", "--dry_run", "--dtype", "--format", "--help", "--model", "--most_images", "--num_workers",
    "--output", "--patches", "--private", "--split",
    "--shrunk", "--small_set",
    "--at", "--size", "--lamb", "--reg",
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def anchors(page: Path) -> set[str]:
    """As GitHub and the built pages derive them from headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The (program, arguments) of every command line that starts `umae VERB`, also by a launcher, or a shell script."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            follows = words[i + 1 :]
            if word in TYPES:
                found.append((word, follows))
            elif word == "umae" and (i == 0 or words[i - 1] == "-m") and follows and not follows[0].startswith("-"):
                found.append((f"umae {follows[0]}", follows[1:]))
    return found


def documented_commands() -> list[tuple[str, list[str]]]:
    return [command for page in PAGES for block in blocks(page, "bash") for command in commands(block)]


def inline_commands(page: Path) -> list[tuple[str, list[str]]]:
    return [command for code in re.findall(r"`([^`\n]+)`", prose(page)) for command in commands(code)]


def commands_of_comments(recipe: Path) -> list[tuple[str, list[str]]]:
    """The (program, arguments) that a recipe says it is for; `...` stands for more of them."""
    lines = re.findall(r"^# +((?:accelerate|umae) (?:.*\\\n)*.+)", recipe.read_text(), re.MULTILINE)
    found = [command for line in lines for command in commands(line.replace("\n#", "\n"))]
    return [(program, [word for word in words if word != "..."]) for program, words in found]


def check_flags(program: str, words: list[str], missing: dict[str, str] | None = None) -> None:
    """Raises `ValueError` for flags, values or recipes that the program refuses; `missing` are flags left unsaid."""
    types = TYPES[program]
    unsaid = {name: value for name, value in (missing or {}).items() if name in arguments_umae.field_names(types)}
    arguments_umae.arguments_of(types, {**unsaid, **given_flags(types, words)})


def modules(text: str) -> set[str]:
    """What is started with `python -m`."""
    return set(re.findall(r"python -m (benchmarks[.\w]*)", text))


def resolve(dotted: str) -> object:
    """What stands behind `umae.data.images.Images`; raises `AttributeError` or `ImportError` if nothing does."""
    module, *names = dotted.split(".")
    found: object = importlib.import_module(module)
    for name in names:
        module = f"{module}.{name}"
        found = getattr(found, name, None) or importlib.import_module(module)
    return found


def names_of(block: str) -> dict[str, str]:
    """What an example calls the package's modules and names, and what they are: {"load_images": "umae.data..."}."""
    names = {}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names |= {alias.asname or "umae": alias.name for alias in node.names if alias.name.split(".")[0] == "umae"}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "umae":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def check_example(block: str) -> set[str]:
    """The names of the package that an example uses, each of which exists and is called as it can be.

    Raises:
        ImportError, AttributeError: a name does not exist.
        TypeError: a function has no such arguments.
    """
    names, used = names_of(block), set()

    def dotted(node: ast.AST) -> str | None:
        text = ast.unparse(node)
        first, *rest = text.split(".")
        return ".".join([names[first], *rest]) if first in names and text.replace(".", "").isidentifier() else None

    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Name | ast.Attribute) and (name := dotted(node)):
            used.add(name)
        if isinstance(node, ast.Call) and (name := dotted(node.func)):
            given = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(resolve(name)).bind(*node.args, **given)
    for name in used | set(names.values()):
        resolve(name)
    return used


def test_every_relative_link_and_anchor_resolves():
    broken = {page.name: broken_links(page) for page in TEXTS}
    assert {name: links for name, links in broken.items() if links} == {}


def test_a_link_to_a_missing_file_or_heading_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One title\n[a](#one-title) [b](#other) [c](missing.md) [d](page.md#one-title) [e](https://x.y)\n"
    )
    assert broken_links(page) == ["#other", "missing.md"]


def test_every_page_can_be_reached_from_the_home_page_and_the_navigation():
    pages = {page.name for page in PAGES[1:]} - {"index.md"}
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert {page for page in pages if page not in navigation} == set()
    assert pages - set(LINK.findall((ROOT / "docs" / "index.md").read_text())) == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_command_line_is_accepted_by_its_program():
    documented = [(program, words) for program, words in documented_commands() if program in TYPES]
    assert {program for program, _ in documented} == set(TYPES)
    for program, words in documented:
        check_flags(program, words)


def test_every_command_line_in_prose_and_in_recipes_is_accepted_by_its_program():
    in_recipes = [command for recipe in RECIPES for command in commands_of_comments(recipe)]
    in_prose = [command for page in TEXTS for command in inline_commands(page)]
    assert len(in_recipes) >= 6 and len(in_prose) > 6
    for program, words in in_recipes + in_prose:
        if program in TYPES and words != ["--help"]:
            missing = {"model_name_or_path": "runs/mine", "output_dir": "runs/other"} | {
                "folder": "my_images",
                "study": "digits",
                "run": "runs/mine",
            }
            check_flags(program, words, missing)


def test_a_command_line_with_an_unknown_flag_is_refused():
    text = "accelerate launch -m umae pretrain \\\n    --datset_name my_images  # a typo\n"
    ((program, words),) = commands(text)
    with pytest.raises(ValueError, match="did you mean --dataset_name"):
        check_flags(program, words)


def test_command_lines_are_told_from_folders_and_names_of_the_same_word():
    text = "for name in umae mae; do\n    umae report runs/umae runs/mae --output x.html\ndone\numae --help\n"
    assert commands(text) == [("umae report", ["runs/umae", "runs/mae", "--output", "x.html"])]


def test_the_pages_start_programs_by_the_command_and_name_the_scripts_once():
    for script in [path.name for path in ROOT.glob("run_*.py")]:
        assert [(page.name, page.read_text().count(script)) for page in PAGES if script in page.read_text()] == [
            ("index.md", 1)
        ]
        assert [block for page in PAGES for block in blocks(page, "bash") if script in block] == []


def test_every_module_that_is_started_can_be():
    started = {module for page in TEXTS for module in modules(page.read_text())}
    places = {module: ROOT / module.replace(".", "/") for module in started}
    files = {m: place / "__main__.py" if place.is_dir() else place.with_suffix(".py") for m, place in places.items()}
    assert len(started) > 1
    assert {m for m, file in files.items() if not file.exists() or "__main__" not in file.read_text()} == set()


def test_every_verb_of_the_command_is_documented_and_every_documented_one_exists():
    documented = documented_commands() + [command for page in TEXTS for command in inline_commands(page)]
    verbs = {program.removeprefix("umae ") for program, _ in documented if program.startswith("umae ")}
    assert verbs == set(VERBS)


def test_every_flag_that_is_named_exists():
    known = {
        f"--{name}" for types in TYPES.values() for kind in types for name in arguments_umae.field_names([kind])
    } | OTHER_FLAGS
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z]\w*(?![\w-])", page.read_text())}
    assert named - known == set()


def test_every_name_of_the_package_in_a_python_example_exists_and_is_called_as_it_can_be():
    used = set()
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")
            used |= check_example(block)
    assert used >= {"umae.pretrain", "umae.probe", "umae.finetune", "umae.diagnose", "umae.evaluation.metrics.Collapse"}


@pytest.mark.parametrize(
    "block",
    [
        "import umae\numae.pretrian()",
        "from umae.data.images import load_pictures",
        "from umae.evaluation.nothing import diagnose",
        "import umae\numae.pretrain(datset_name='my_images')",
        "from umae import diagnose as measure\nmeasure('runs/mine', set='my_images')",
    ],
)
def test_an_example_with_a_name_that_does_not_exist_is_found(block):
    with pytest.raises((AttributeError, ImportError, TypeError)):
        check_example(block)


def test_every_name_of_the_package_in_prose_and_in_the_api_exists():
    names = {name for page in TEXTS for name in re.findall(r"`(umae(?:\.\w+)+)\b(?!/)", prose(page))}
    documented = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(documented) > 20
    for name in names | set(documented):
        resolve(name)


def test_every_message_in_troubleshooting_is_one_that_the_code_prints():
    tables = (ROOT / "docs" / "troubleshooting.md").read_text().split("## No message")[0]
    messages = re.findall(r"^\| `(.+?)` \|", tables, re.MULTILINE)
    sources = [*ROOT.glob("*.py"), *(ROOT / "umae").rglob("*.py")]
    code = re.sub(r'"\s*\n\s*\+?\s*f?"', "", "\n".join(path.read_text() for path in sources))  # joins split literals
    assert len(messages) > 20
    assert [message for message in messages if message not in code] == []


def test_citation_and_changelog_are_of_this_version():
    version = umae.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert (citation["version"], newest) == (version, version)
