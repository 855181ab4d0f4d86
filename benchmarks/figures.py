"""Draw the figures of docs/ that show what the studies found.

    python -m benchmarks.figures

Figures of accuracies are drawn from `studies/results/`; each says in its PNG from which file, and
`tests/test_study_tables.py` finds those that are older than their file. The others are of training, spectra and
reconstructions. They need the run folders that `umae study cifar10` and `umae study imagenette64` leave in
`runs/studies/`, and stay as they are where there are none.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from umae.programs.study import groups_of
from umae.sharing.cards import read_metrics
from umae.sharing.comparison import Group
from umae.sharing.figures import COLOURS, rendered, spectrum, title_of, training_curves
from umae.sharing.study_page import study_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS, RUNS = ROOT / "studies" / "results", ROOT / "docs", ROOT / "runs" / "studies"
RUNS_SHOWN = {
    "weight 0": "uniformity_weight=0,seed=0",
    "0.01, class token": "uniformity_weight=0.01,seed=0",
    "0.1, mean": "uniformity_weight=0.1,pooling=mean,seed=0",
}
PROCESSES = (1, 2, 4, 8)
LAMB = 0.01  # of the original's own script


def of_all_weights(groups: list[Group]) -> Image.Image:
    figure = study_figure(groups)
    assert figure is not None  # the weights differ
    return figure


def of_the_original_weight(groups: list[Group]) -> Image.Image:
    """What `lamb` 0.01 gives on several processes: in the original, whose gradient on W of them is that of 0.01 / W on
    one, and here, where it is the same on any number. With seed 0."""

    def value(weight: float, metric: str) -> float:
        (group,) = (
            group
            for group in groups
            if group.settings["uniformity_weight"] == weight
            and group.settings.get("pooling", "cls") == "cls"
            and not {"regularizer", "max_train_steps"} & group.settings.keys()
        )
        return group.mean(metric, {0})

    figure = Figure(figsize=(8, 2.8), dpi=100)
    metrics = ("probe/knn20_top1/cls", "probe/effective_rank/cls")
    for axis, metric in zip(figure.subplots(1, 2), metrics, strict=True):
        lines = {
            "here": ([value(LAMB, metric)] * len(PROCESSES), {"color": COLOURS[0]}),
            "the original": ([value(LAMB / count, metric) for count in PROCESSES], {"color": COLOURS[1]}),
            "without the term": ([value(0, metric)] * len(PROCESSES), {"color": "dimgrey", "linestyle": ":"}),
        }
        for name, (values, style) in lines.items():
            axis.plot(values, label=name, marker="." if name == "the original" else None, **style)
        axis.set_xticks(range(len(PROCESSES)), [str(count) for count in PROCESSES])
        axis.set_xlabel("processes (GPUs)", fontsize=8)
        axis.set_title(title_of(metric.removeprefix("probe/")), fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.axes[0].legend(fontsize=8)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.17, top=0.9, wspace=0.15)
    return rendered(figure)


OF_RESULTS = {
    "when_it_helps.png": ("imagenette64", of_all_weights),
    "when_it_helps_processes.png": ("imagenette64", of_the_original_weight),
    "cifar10_weights.png": ("cifar10", of_all_weights),
}


def digest(results: dict[str, Any]) -> str:
    """Of the values that a figure may show."""
    values = {run["run"]: run["values"] for run in results["runs"]}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def spectra_of(folders: dict[str, Path]) -> Image.Image:
    files = {name: json.loads((folder / "spectrum.json").read_text()) for name, folder in folders.items()}
    return spectrum({name: {feature: file[feature] for feature in ("cls", "mean")} for name, file in files.items()})


def curves_of(folders: dict[str, Path]) -> Image.Image:
    """Of what all of the runs have logged."""
    runs = {name: read_metrics(folder) for name, folder in folders.items()}
    common = set.intersection(*({key for line in lines for key in line} for lines in runs.values()))
    return training_curves(
        {name: [{key: line[key] for key in line if key in common} for line in lines] for name, lines in runs.items()}
    )


def reconstructions_of(folders: dict[str, Path]) -> Image.Image:
    return Image.open(folders["0.01, class token"] / "reconstructions.png")


OF_RUNS = {
    "when_it_helps_spectrum.png": ("imagenette64", spectra_of),
    "cifar10_spectrum.png": ("cifar10", spectra_of),
    "cifar10_training.png": ("cifar10", curves_of),
    "cifar10_reconstructions.png": ("cifar10", reconstructions_of),
}


def main() -> None:
    for name, (study, draw) in OF_RESULTS.items():
        results = json.loads((RESULTS / f"{study}.json").read_text())
        information = PngImagePlugin.PngInfo()
        information.add_text("Source", f"studies/results/{study}.json {digest(results)}")
        draw(groups_of(results["runs"], results["baseline"])).save(DOCS / name, pnginfo=information)
        print(f"docs/{name}")
    for name, (study, draw_runs) in OF_RUNS.items():
        folders = {label: RUNS / study / "runs" / folder for label, folder in RUNS_SHOWN.items()}
        if all((folder / "spectrum.json").exists() for folder in folders.values()):  # they are finished
            draw_runs(folders).save(DOCS / name)
            print(f"docs/{name}")


if __name__ == "__main__":
    main()
