"""The page of a study: a table with differences, figures over the weight, and every protocol."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from umae.sharing.comparison import Group
from umae.sharing.figures import data_url, over_weights, title_of
from umae.sharing.web_page import template

DIGITS = {"loss": 4, "alignment": 3}  # after the point, of the metrics with such names; others are percent and ranks
PAGE = template(
    """\
<p>{{ state }} Made by <code>{{ command }}</code>.</p>
{% if notes %}{% for note in notes %}<p>{{ note }}</p>{% endfor %}{% endif %}
{% if columns | length > 1 %}
<p class="interactive">To sort the columns by a row, click its name.</p>
{% endif %}
<div class="wide"><table>
<tr><th></th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, cells in rows.items() %}
<tr><th>{{ name }}</th>
{% for value, difference in cells %}<td>{{ value }}{% if difference %}<small>{{ difference }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
<p>Accuracies in percent, on test images. &plusmn; is the standard deviation over the seeds. Below each value stands its
difference to the runs with {{ baseline }} that have the same seed and settings otherwise, in brackets its 95 %
confidence interval; with one pair there is none. {{ unmasked }}</p>
{% if figure %}
<p>Every point is a run; a line goes through the means over the seeds that all its points have.</p>
<img alt="Metrics over the weight of the term" src="{{ figure }}">
{% endif %}
<h2>Protocols</h2>
{% for name, protocol in protocols.items() %}<details><summary>{{ name }}</summary><pre>{{ protocol }}</pre></details>
{% endfor %}
"""
)
UNMASKED = "What begins with pretraining is of the log's last lines: losses on masked training images, ranks and "
UNMASKED += "alignment of the probe images; these are no accuracies."


def study_page(content: Mapping[str, Any], groups: Sequence[Group], figure: Image.Image | None) -> str:
    """The HTML page of a study, self-contained.

    Args:
        content: of `study.json`.
        groups: of its runs.
        figure: see `study_figure`.
    """
    metrics = _metrics(groups)
    return PAGE.render(
        title=content["title"],
        command=content["command"],
        state=content["state"],
        notes=content["notes"],
        baseline=", ".join(f"{name} {_number(value)}" for name, value in content["baseline"].items()),
        columns=[_title(group) for group in groups],
        rows={title_of(metric): [cell(group, metric) for group in groups] for metric in metrics},
        unmasked=UNMASKED,
        figure=data_url(figure) if figure else "",
        protocols={name: json.dumps(protocol, indent=2) for name, protocol in content["protocols"].items()},
    )


def markdown(groups: Sequence[Group]) -> str:
    """The table as Markdown, one column for each group."""
    lines = [["", *(_title(group) for group in groups)], ["---", *("---:" for _ in groups)]]
    for metric in _metrics(groups):
        cells = [" ".join(filter(None, cell(group, metric))) for group in groups]
        lines.append([title_of(metric), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _metrics(groups: Sequence[Group]) -> list[str]:
    """Those of any group, without top-5 accuracies, which `study.json` has."""
    metrics = dict.fromkeys(metric for group in groups for metric in group.values)
    return [metric for metric in metrics if "top5" not in metric.split("/")]


def _title(group: Group) -> str:
    seeds = f", {len(group.seeds)} seeds" if len(group.seeds) > 1 else ""
    return ", ".join(f"{name} {_number(value)}" for name, value in group.settings.items()) + seeds


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def cell(group: Group, metric: str) -> tuple[str, str]:
    """A value with its deviation, and the difference to the baseline with its confidence interval."""
    if metric not in group.values:
        return "", ""
    digits = next((digits for name, digits in DIGITS.items() if name in metric), 1)
    value, deviation = f"{group.mean(metric):.{digits}f}", group.deviation(metric)
    if deviation is not None:
        value += f" ± {deviation:.{digits}f}"
    difference = group.differences.get(metric)
    if difference is None:
        return value, ""
    text = f"{difference.mean:+.{digits}f}"
    if difference.interval is not None:
        low, high = difference.mean - difference.interval, difference.mean + difference.interval
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return value, text


def study_figure(groups: Sequence[Group]) -> Image.Image | None:
    """The metrics over the weight of the term; None where weights do not differ."""
    weighted = [group for group in groups if "uniformity_weight" in group.settings]
    if len({group.settings["uniformity_weight"] for group in weighted}) < 2:
        return None
    metrics = _metrics(groups)
    evaluated = [name for name in metrics if not name.startswith("pretraining/") and "mean_class_top1" not in name]
    return over_weights(weighted, evaluated or [name for name in metrics if "effective_rank" in name])
