"""Tables and figures of a study's results on the pages are those of its file in studies/results/.

A table follows a comment that says where its numbers come from:

    <!-- studies/results/NAME.json
    columns: {20-NN: probe/knn20_top1/cls}
    rows: {without the term: {uniformity_weight: 0}}
    -->

A row is the only group of runs with these settings (`null`: one that it leaves alone). Its cells are the mean over
the seeds with the standard deviation, and the mean difference to the baseline with the 95 % confidence interval.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from arguments_umae import StudyArguments
from benchmarks import figures
from umae.programs.study import groups_of, with_recorded
from umae.programs.study_file import read_study
from umae.sharing.comparison import summary
from umae.sharing.study_page import cell

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "studies" / "results").glob("*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = re.compile(r"<!-- (studies/results/\w+\.json)\n(.*?)-->\n+((?:\|[^\n]*\n)+)", re.DOTALL)


def table(content: dict, columns: dict[str, str], rows: dict[str, dict]) -> str:
    groups = groups_of(content["runs"], content["baseline"])
    lines = [["", *columns], ["---", *("---:" for _ in columns)]]
    for name, settings in rows.items():
        (group,) = [group for group in groups if all(group.settings.get(key) == settings[key] for key in settings)]
        lines.append([name, *(_in_a_line(*cell(group, metric)) for metric in columns.values())])
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def _in_a_line(value: str, difference: str) -> str:
    """In two lines where there is an interval, or the table would be too wide."""
    return ("<br>" if "[" in difference else " ").join(filter(None, (value, difference)))


def wrong_tables(text: str) -> list[str]:
    """What should stand there instead."""
    expected = []
    for file, words, found in SOURCE.findall(text):
        right = table(json.loads((ROOT / file).read_text()), **yaml.safe_load(words))
        if found != right:
            expected.append(right)
    return expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    wrong = wrong_tables(page.read_text())
    assert not wrong, "\n".join(["expected:", *wrong])


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_are_those_of_their_study_and_agree_with_themselves(file, tmp_path):
    content = json.loads(file.read_text())
    groups = groups_of(content["runs"], content["baseline"])
    assert content["groups"] == json.loads(json.dumps([summary(group) for group in groups]))
    assert all(run["commands"] and run["versions"] for run in content["runs"])
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    args = StudyArguments(study=file.stem, data_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/study.json").write_bytes(file.read_bytes())
    study = with_recorded(read_study(args))  # which refuses results of other settings
    assert content["title"] == study.title
    assert {task.run for task in study.tasks if task.is_recorded} == {run["run"] for run in content["runs"]}


@pytest.mark.parametrize("name", figures.OF_RESULTS)
def test_figures_are_of_the_results(name):
    with Image.open(ROOT / "docs" / name) as figure:
        file, digest = figure.info["Source"].split()
    assert file == f"studies/results/{figures.OF_RESULTS[name][0]}.json"
    assert digest == figures.digest(json.loads((ROOT / file).read_text())), "draw it: python -m benchmarks.figures"


def test_a_wrong_digit_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "studies/results").mkdir(parents=True)
    values = {"probe/top1/cls": 51.24}
    run = {"run": "a", "settings": {"uniformity_weight": 0}, "seed": 0, "values": values}
    content = {"baseline": {"uniformity_weight": 0}, "runs": [run]}
    (tmp_path / "studies/results/few.json").write_text(json.dumps(content))
    source = "<!-- studies/results/few.json\ncolumns: {linear: probe/top1/cls}\n"
    source += "rows: {without: {uniformity_weight: 0}}\n-->\n"
    for value, right in (("51.2", True), ("51.3", False)):
        text = f"{source}\n| | linear |\n| --- | ---: |\n| without | {value} |\n"
        assert (wrong_tables(text) == []) == right
