"""One page from one or several runs, to look at and to compare.

umae report runs/umae runs/mae runs/umae_probe runs/umae_finetuned --output report.html

The page holds everything it shows: no network, no other file, no path of this machine.
"""

import argparse
import base64
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template
from PIL import Image

from umae.files import write_text
from umae.sharing.cards import duration, most_dimensions, read_metrics
from umae.sharing.figures import spectrum, training_curves

PICTURES = {
    "progress.png": "Reconstructions while it was trained",
    "reconstructions.png": "Reconstructions at the end",
    "neighbours.png": "Nearest neighbours",
    "attention.png": "Where the class token looks",
}
LOOKED_AT = {
    "effective rank, class token": ("effective_rank_cls", ".1f"),
    "effective rank, mean of the patches": ("effective_rank_mean", ".1f"),
    "online linear classifier": ("online_top1", ".1%"),
    "nearest neighbours": ("online_knn_top1", ".1%"),
}
PAGE = Template(
    """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ names | join(", ") }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  table { border-collapse: collapse; margin: 1rem 0; }
  th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
  tr.differs { background: #fff3d6; }
  img { max-width: 100%; height: auto; }
  .side { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
</style>
<h1>{{ names | join(", ") }}</h1>
{% macro table(header, rows, marked=false) %}
<table>
<tr><th></th>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, values in rows.items() %}
<tr{% if marked and (values | unique | list | length) > 1 %} class="differs"{% endif %}><th>{{ name }}</th>
{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endmacro %}
{% if runs %}
<h2>Results</h2>
{{ table(runs, results) }}
<h2>Training</h2>
<img alt="Losses, ranks and accuracies over the steps" src="{{ curves }}">
{% if spectra %}
<h2>Spectrum of the features</h2>
<p>A line that stays high fills its dimensions; one that falls at once has collapsed.</p>
<img alt="Singular values of the features of every run" src="{{ spectra }}">
{% endif %}
{% for title, shown in images.items() %}
<h2>{{ title }}</h2>
<div class="side">
{% for name, source in shown.items() %}<figure><figcaption>{{ name }}</figcaption>
<img alt="{{ title }} of {{ name }}" src="{{ source }}"></figure>{% endfor %}
</div>
{% endfor %}
<h2>Settings</h2>
{% if runs | length > 1 %}<p>What differs is marked, and comes first.</p>{% endif %}
{{ table(runs, settings, marked=true) }}
{% endif %}
{% if probes %}
<h2>Probes</h2>
{{ table(probes, accuracies) }}
<p>Accuracies in percent, on images that the heads were not trained on; the whole protocol lies beside each probe.</p>
{% endif %}
</html>
""",
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def report(folders: Sequence[Path]) -> str:
    """The page for run folders and probe folders, in any mixture.

    Raises:
        ValueError: a folder is neither, or its run has not logged a line yet.
    """
    probes = [folder for folder in folders if _report_of(folder).exists()]
    for folder in folders:
        if folder not in probes and not (folder / "run.json").exists():
            raise ValueError(f"{folder} holds neither a run (run.json) nor a probe (linear_probe.json)")
    runs = {folder: _run_of(folder) for folder in folders if folder not in probes}
    names, settings = _names(folders), _side_by_side([_settings(run) for run in runs.values()])
    return PAGE.render(
        names=list(names.values()),
        runs=[names[folder] for folder in runs],
        probes=[names[folder] for folder in probes],
        results=_side_by_side([_results(run) for run in runs.values()]),
        curves=_inline(training_curves({names[folder]: run["lines"] for folder, run in runs.items()})) if runs else "",
        spectra=_spectra({names[folder]: folder / "spectrum.json" for folder in runs}),
        images={
            title: {names[folder]: _inline(Image.open(folder / file)) for folder in runs if (folder / file).exists()}
            for file, title in PICTURES.items()
        },
        settings=dict(sorted(settings.items(), key=lambda row: len(set(row[1])) == 1)),  # what differs first
        accuracies=_side_by_side([_accuracies(folder) for folder in probes]),
    )


def _spectra(files: dict[str, Path]) -> str:
    """The spectra of all finished runs in one image, nothing if none is."""
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    return _inline(spectrum(found)) if found else ""


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """What to call each of them: its own name, with its parents' as far as that alone is not enough."""
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
        raise ValueError(f"{folder} has not logged a line yet; wait until logging_steps steps are done")
    return {**run, "lines": lines}


def _results(run: dict[str, Any]) -> dict[str, Any]:
    last, identity = run["lines"][-1], run["identity"]
    return {
        "state": "finished" if run["finished"] else f"step {last['step']:,} of {identity['total_steps']:,}",
        "reconstruction loss": f"{last['reconstruction_loss']:.4f}",
        "uniformity": f"{last['uniformity_loss']:.4f}",
        "dimensions filled": f"{last['participation_ratio']:.1f} of at most {most_dimensions(identity)}",
        **{title: _newest(run["lines"], name, form) for title, (name, form) in LOOKED_AT.items()},
        "images a second": f"{statistics.median(line['pictures_per_second'] for line in run['lines']):,.0f}",
        "time": duration(run["seconds"]),
        "images left out": len(run["unreadable"]),
    }


def _newest(lines: Sequence[dict[str, Any]], name: str, form: str) -> str:
    """The last of the values, which not every line has."""
    return next((format(line[name], form) for line in reversed(lines) if name in line), "")


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    identity = {name: value for name, value in run["identity"].items() if name != "config"}
    if identity["initial_weights"] and Path(identity["initial_weights"]).is_absolute():
        identity["initial_weights"] = Path(identity["initial_weights"]).name  # no path of this machine
    return {**identity, **run["identity"]["config"], "hardware": run["hardware"], **run["versions"]}


def _report_of(folder: Path) -> Path:
    """Of a probe or of a finished fine-tuning."""
    name = "finetune.json" if (folder / "finetune.json").exists() else "linear_probe.json"
    return folder / name


def _accuracies(folder: Path) -> dict[str, Any]:
    found = json.loads(_report_of(folder).read_text())
    if "cls" not in found:
        return {
            "encoder": found["protocol"]["model"],
            "evaluated on": found["protocol"]["test"]["data"],
            **{f"{name}, fine-tuned": found[name] for name in ("top1", "top5")},
        }
    names = ("top1", "top5", "knn20_top1", "effective_rank")
    return {
        "encoder": found["protocol"]["model"],
        "evaluated on": found["protocol"]["test"]["data"],
        "linear protocol": found["protocol"]["linear_protocol"],
        **{f"{name}, {feature}": found[feature][name] for feature in ("cls", "mean") for name in names},
        **{f"{name}, attentive": found["attentive"][name] for name in ("top1", "top5") if "attentive" in found},
    }


def _side_by_side(columns: list[dict[str, Any]]) -> dict[str, list[str]]:
    """One row for each name that any of the columns has."""
    rows = dict.fromkeys(name for column in columns for name in column)
    return {name: [str(column.get(name, "")) for column in columns] for name in rows}


def _inline(image: Image.Image) -> str:
    """An image as the address of itself."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def main(argv: Sequence[str]) -> None:
    """Write one page that shows and compares runs and probes."""
    parser = argparse.ArgumentParser(prog="umae report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="run folders and probe folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write (default report.html)")
    arguments = parser.parse_args(argv)
    write_text(arguments.output, report(list(dict.fromkeys(arguments.folders))))
    print(arguments.output)
