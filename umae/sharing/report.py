"""One HTML page that shows and compares runs and probes.

umae report runs/umae runs/mae runs/umae_probe runs/umae_finetuned --output report.html

The page is self-contained: it needs no network and no other file, and holds no local path. Beside it, `report.csv` has
the numbers of the first table, a row for each run.
"""

import argparse
import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from configuration_umae import UMAEConfig
from umae.evaluation.accuracy import ONE_CLASS
from umae.files import write_text
from umae.sharing.cards import duration, most_dimensions, read_metrics
from umae.sharing.comparison import metrics_of_evaluation
from umae.sharing.figures import data_url, spectrum, title_of, training_curves
from umae.sharing.web_page import template

# File -> title and caption
FIGURES = {
    "progress.png": (
        "Reconstructions during training",
        "Hidden patches are grey. Below: the visible patches and the predictions of the hidden ones.",
    ),
    "reconstructions.png": (
        "Reconstructions after training",
        'Hidden patches are grey in "visible", visible ones in "predicted"; "pasted" has both.',
    ),
    "neighbours.png": ("Nearest neighbours", "Below each image those with the largest cosine of the features."),
    "attention.png": (
        "Attention of the class token",
        "To every patch, in the last layer, mean of the heads. Each map goes from 0 (blue) to its maximum (yellow).",
    ),
}
# Row title -> metric of the evaluations during training, and its format
EVALUATION_METRICS = {
    "reconstruction loss, held-out images": ("heldout_reconstruction_loss", ".4f"),
    "effective rank, class token": ("effective_rank_cls", ".1f"),
    "effective rank, mean of the patches": ("effective_rank_mean", ".1f"),
    "online linear classifier": ("online_top1", ".1%"),
    "online k-NN": ("online_knn_top1", ".1%"),
}
PAGE = template(
    """\
{% macro table(header, rows, marked=false) %}
<div class="wide"><table>
<tr><th></th>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, values in rows.items() %}
<tr{% if marked and (values | unique | list | length) > 1 %} class="differs"{% endif %}><th>{{ name }}</th>
{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% if groups | length > 1 or probes | length > 1 %}
<p class="interactive">To sort the columns by a row, click its name.</p>
{% endif %}
{% if runs %}
<h2>Results</h2>
{{ table(groups, results) }}
<p>Of several runs that differ in the seed alone: the mean, and the standard deviation over the seeds.
{% if evaluated %}Accuracies are in percent, on test images.{% endif %}</p>
<h2>Training</h2>
<img alt="Losses, ranks and accuracies over the steps" src="{{ curves }}">
{% if spectra %}
<h2>Spectrum of the features</h2>
<p>The slower a line falls, the more dimensions the features fill; a line that falls steeply shows collapse.</p>
<img alt="Singular values of the features of every run" src="{{ spectra }}">
{% endif %}
{% for title, (caption, sources) in figures.items() %}
<h2>{{ title }}</h2>
<p>{{ caption }}</p>
<div class="side">
{% for name, source in sources.items() %}<figure><figcaption>{{ name }}</figcaption>
<img alt="{{ title }} of {{ name }}" src="{{ source }}"></figure>{% endfor %}
</div>
{% endfor %}
<h2>Settings</h2>
{% if runs | length > 1 %}<p>Settings that differ between the runs are marked and come first.</p>{% endif %}
{{ table(runs, settings, marked=true) }}
{% endif %}
{% if probes %}
<h2>Probes</h2>
{{ table(probes, accuracies) }}
<p>Accuracies in percent, on test images; the complete protocol is in each probe's folder.</p>
{% endif %}
"""
)


@dataclass(frozen=True)
class Contents:
    """What a report is made of, read from its folders.

    Args:
        names: unique ones, by folder.
        runs: what is known of each run.
        probes: the reports of probes and fine-tunings.
    """

    names: Mapping[Path, str]
    runs: Mapping[Path, Mapping[str, Any]]
    probes: Mapping[Path, Mapping[str, Any]]

    def probes_of(self, run: Path) -> list[Mapping[str, Any]]:
        """Of the probes those that evaluated this run, by the name of its folder, unless another's is the same."""
        name = run.resolve().name
        if sum(other.resolve().name == name for other in self.runs) > 1:
            return []
        return [report for report in self.probes.values() if report["protocol"]["model"] == name]


def read(folders: Sequence[Path]) -> Contents:
    """Run folders and probe folders, in any combination.

    Raises:
        ValueError: a folder is neither, or its run has not logged any metrics yet.
    """
    probes = [folder for folder in folders if _report_of(folder).exists()]
    for folder in folders:
        if folder not in probes and not (folder / "run.json").exists():
            raise ValueError(f"{folder} holds neither a run (run.json) nor a probe (linear_probe.json); leave it out")
    return Contents(
        _names(folders),
        {folder: _run_of(folder) for folder in folders if folder not in probes},
        {folder: json.loads(_report_of(folder).read_text()) for folder in probes},
    )


def report(folders: Sequence[Path]) -> str:
    """The HTML page for run folders and probe folders, in any combination.

    Raises:
        ValueError: a folder is neither, or its run has not logged any metrics yet.
    """
    return page(read([Path(folder) for folder in folders]))


def page(contents: Contents) -> str:
    """The HTML page."""
    names, runs = contents.names, contents.runs
    settings = _side_by_side([_settings(run) for run in runs.values()])
    figures = {}
    for file, (title, caption) in FIGURES.items():
        paths = {names[folder]: folder / file for folder in runs}
        sources = {name: data_url(Image.open(path)) for name, path in paths.items() if path.exists()}
        if sources:
            figures[title] = (caption, sources)
    groups = _groups(contents)
    return PAGE.render(
        title=", ".join(names.values()),
        runs=[names[folder] for folder in runs],
        probes=[names[folder] for folder in contents.probes],
        groups=groups,
        results=_side_by_side([_together([_results(contents, run) for run in group]) for group in groups.values()]),
        evaluated=any(contents.probes_of(run) for run in runs),
        curves=data_url(training_curves({names[folder]: run["lines"] for folder, run in runs.items()})) if runs else "",
        spectra=_spectra({names[folder]: folder / "spectrum.json" for folder in runs}),
        figures=figures,
        settings=dict(sorted(settings.items(), key=lambda row: len(set(row[1])) == 1)),  # those that differ first
        accuracies=_side_by_side([_accuracies(results) for results in contents.probes.values()]),
    )


def table(contents: Contents) -> str:
    """The numbers of the first table as CSV: a row for each run, with its seed and the settings that differ."""
    settings = [_settings(run) for run in contents.runs.values()]
    differing = [name for name, row in _side_by_side(settings).items() if len(set(row)) > 1]
    rows = []
    for (folder, run), of_run in zip(contents.runs.items(), settings, strict=True):
        results = {title: value for title, (value, _) in _results(contents, folder).items()}
        row = {"run": contents.names[folder], "seed": run["identity"]["seed"]}
        rows.append({**row, **{name: of_run.get(name, "") for name in differing}, **results})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _groups(contents: Contents) -> dict[str, list[Path]]:
    """The runs that differ in the seed alone, by a title."""
    groups: dict[tuple[str, int], list[Path]] = {}
    counts = Counter[tuple[str, int]]()  # runs of the same settings and the same seed stay apart
    for folder, run in contents.runs.items():
        identity, seed = run["identity"], run["identity"]["seed"]
        settings = json.dumps({**identity, "config": _config(identity), "seed": None}, sort_keys=True)
        groups.setdefault((settings, counts[settings, seed]), []).append(folder)
        counts[settings, seed] += 1
    titles = [
        ", ".join(contents.names[folder] for folder in group) + (f": {len(group)} seeds" if len(group) > 1 else "")
        for group in groups.values()
    ]
    return dict(zip(titles, groups.values(), strict=True))


def _spectra(files: dict[str, Path]) -> str:
    """The spectra of all finished runs in one figure; empty if none is finished."""
    spectra = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    return data_url(spectrum(spectra)) if spectra else ""


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """A unique name for each folder: its own, with as many of its parents' as needed."""
    names = {}
    for folder in folders:
        parts = folder.resolve().parts
        others = [other.resolve().parts for other in folders if other.resolve() != folder.resolve()]
        length = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        names[folder] = "/".join(parts[-length:])
    return names


def _run_of(folder: Path) -> dict[str, Any]:
    run = json.loads((folder / "run.json").read_text())
    lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    if run["identity"].get("task") == "fine-tuning":
        raise ValueError(f"{folder} holds a fine-tuning that has not finished; wait for its finetune.json")
    if not lines:
        raise ValueError(f"{folder} has not logged any metrics yet; wait until logging_steps steps are done")
    return {**run, "lines": lines}


def _results(contents: Contents, folder: Path) -> dict[str, tuple[Any, str]]:
    """By title a value and the format of a number, which is empty for words."""
    run = contents.runs[folder]
    lines, last, identity = run["lines"], run["lines"][-1], run["identity"]
    results: dict[str, tuple[Any, str]] = {
        "state": ("finished" if run["finished"] else f"step {last['step']:,} of {identity['total_steps']:,}", ""),
        "reconstruction loss": (last["reconstruction_loss"], ".4f"),
        **({"coding rate loss": (last["coding_rate_loss"], ".4f")} if "coding_rate_loss" in last else {}),
        "uniformity": (last["uniformity_loss"], ".4f"),
        "dimensions filled": (last["participation_ratio"], ".1f"),
        "dimensions at most": (most_dimensions(identity), ",.0f"),
    }
    for title, (name, spec) in EVALUATION_METRICS.items():
        newest = next((line[name] for line in reversed(lines) if name in line), None)
        if newest is not None:
            results[title] = (newest, spec)
    for probe in contents.probes_of(folder):
        protocol = probe["protocol"]
        kind = {"cached": "linear", "mae": "linear, protocol mae", None: "fine-tuned"}[protocol.get("linear_protocol")]
        for metric, value in metrics_of_evaluation(f"{kind}, {protocol['test']['data']}", probe).items():
            results[title_of(metric)] = (value, ".1f")
    pace = statistics.median(line["pictures_per_second"] for line in lines)
    return results | {
        "images per second": (pace, ",.0f"),
        "time": (duration(run["seconds"]), ""),
        "images left out": (len(run["unreadable"]), ".0f"),
    }


def _together(results: Sequence[Mapping[str, tuple[Any, str]]]) -> dict[str, str]:
    """The results of runs that differ in the seed alone: means with deviations, or the different words."""
    cells = {}
    for title in dict.fromkeys(title for result in results for title in result):
        values = [result[title][0] for result in results if title in result]
        spec = next(result[title][1] for result in results if title in result)
        if not spec:
            cells[title] = ", ".join(dict.fromkeys(values))
            continue
        cells[title] = format(statistics.mean(values), spec)
        if len(values) > 1 and len(set(values)) > 1:
            cells[title] += f" ± {format(statistics.stdev(values), spec)}"
    return cells


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    identity = {name: value for name, value in run["identity"].items() if name != "config"}
    if identity["initial_weights"] and Path(identity["initial_weights"]).is_absolute():
        identity["initial_weights"] = Path(identity["initial_weights"]).name  # no local path
    return {**identity, **_config(run["identity"]), "hardware": run["hardware"], **run["versions"]}


def _config(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"regularizer": UMAEConfig.regularizer, **identity["config"]}  # which is younger than some runs


def _report_of(folder: Path) -> Path:
    """The results file of a probe or of a finished fine-tuning."""
    name = "finetune.json" if (folder / "finetune.json").exists() else "linear_probe.json"
    return folder / name


def _accuracies(results: Mapping[str, Any]) -> dict[str, Any]:
    protocol = results["protocol"]
    rows = {"encoder": protocol["model"], "evaluated on": protocol["test"]["data"]}
    if "cls" not in results:
        return rows | {f"{name}, fine-tuned": value for name, value in results.items() if name != "protocol"}
    rows["linear protocol"] = protocol["linear_protocol"]
    for feature in ("cls", "mean"):
        for name in (*ONE_CLASS, "knn20_top1", "effective_rank"):
            rows[f"{name}, {feature}"] = results[feature].get(name)
    attentive = results.get("attentive", {})
    rows |= {f"{name}, attentive": attentive.get(name) for name in ONE_CLASS}
    return {name: value for name, value in rows.items() if value is not None}


def _side_by_side(columns: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The columns as one table: a row for each name in any of them, empty where a column lacks it."""
    rows = dict.fromkeys(name for column in columns for name in column)
    return {name: [str(column.get(name, "")) for column in columns] for name in rows}


def main(argv: Sequence[str]) -> None:
    """Write one page that shows and compares runs and probes."""
    parser = argparse.ArgumentParser(prog="umae report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="run folders and probe folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="file to write (default report.html)")
    args = parser.parse_args(argv)
    contents = read(list(dict.fromkeys(args.folders)))
    write_text(args.output, page(contents))
    print(args.output)
    if contents.runs:
        write_text(args.output.with_suffix(".csv"), table(contents))
        print(args.output.with_suffix(".csv"))
