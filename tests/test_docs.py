"""What README and docs/ say, against what there is."""

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
TYPES = {  # of what can be started
    "run_pretrain.py": arguments_umae.PRETRAIN,
    "run_linear_probe.py": arguments_umae.PROBE,
    "run_finetune.py": arguments_umae.FINETUNE,
    "recipes/slurm.sh": arguments_umae.PRETRAIN,
    **{f"umae {verb}": types for verb, (types, _) in arguments_umae.PROGRAMS.items()},
}
OTHER_FLAGS = {  # of launchers, pip, the commands without a dataclass, benchmarks and examples
    "--config_file", "--machine_rank", "--main_process_ip", "--num_processes", "--nproc_per_node",
    "--batch_size", "--dry_run", "--most_images", "--help", "--num_workers", "--output", "--private", "--split",
    "--small_set",
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
    """The (program, flags) of every command line that is parsed by dataclasses."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("umae ", "umae\u00a0"), comments=True)  # a verb belongs to its command
        words = [word.replace("\u00a0", " ") for word in words]
        found += [(word, words[i + 1 :]) for i, word in enumerate(words) if word in TYPES]
    return found


def modules(text: str) -> set[str]:
    """What is started with `python -m`."""
    return set(re.findall(r"python -m (benchmarks[.\w]*)", text))


def verbs(page: Path) -> set[str]:
    """What the command `umae` is asked to do."""
    code = "\n".join(blocks(page, "bash"))
    return set(re.findall(r"(?:^|-m |`)umae ([a-z]\w*)", code + "\n" + prose(page), re.MULTILINE))


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


def test_every_command_line_is_accepted_by_its_program(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from there
    documented = [command for page in PAGES for block in blocks(page, "bash") for command in commands(block)]
    assert {program for program, _ in documented} == set(TYPES)
    for program, flags in documented:
        arguments_umae.arguments_of(TYPES[program], given_flags(TYPES[program], flags))


def test_a_command_line_with_an_unknown_flag_is_refused():
    ((program, flags),) = commands("accelerate launch run_pretrain.py \\\n    --datset_name my_images  # a typo\n")
    with pytest.raises(ValueError, match="did you mean --dataset_name"):
        given_flags(TYPES[program], flags)


def test_every_module_that_is_started_can_be():
    started = {module for page in TEXTS for module in modules(page.read_text())}
    files = {module: ROOT / f"{module.replace('.', '/')}.py" for module in started}
    assert len(started) > 1
    assert {m for m, file in files.items() if not file.exists() or "__main__" not in file.read_text()} == set()


def test_every_verb_of_the_command_is_documented_and_every_documented_one_exists():
    assert set().union(*map(verbs, PAGES)) == set(VERBS)


def test_every_flag_that_is_named_exists():
    known = {
        f"--{name}" for types in TYPES.values() for kind in types for name in arguments_umae.field_names([kind])
    } | OTHER_FLAGS
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z]\w*(?![\w-])", page.read_text())}
    assert named - known == set()


def test_every_python_example_compiles():
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")


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
