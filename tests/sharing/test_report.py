"""The page that shows and compares runs."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from browsing import CHROMIUM
from PIL import Image
from processes import run

from umae.sharing import cards, report
from umae.sharing.figures import COLOURS


class Page(HTMLParser):
    """What a browser would show and load."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.differing, self._marked = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        self._marked = (tag == "tr" and values.get("class") == "differs") or (self._marked and tag == "th")

    def handle_data(self, data):
        if self._marked and data.strip():
            self.differing.append(data.strip())
            self._marked = False


def test_a_report_holds_all_it_shows_and_marks_what_differs(runs, tmp_path):
    words = ("-m", "umae", "report", *sorted(runs.iterdir()), "--output", tmp_path / "report.html")
    assert run(*words).stdout == f"{tmp_path}/report.html\n{tmp_path}/report.csv\n"
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.differing == ["initial_weights", "uniformity_weight"], "and nothing else"
    settings = re.findall(r"<th>(\w+)</th>\s*<td>", text[text.index("<h2>Settings") :])
    assert settings[:2] == page.differing, "they come first"
    assert len(page.sources) == 2 + 2 * 4, "the curves, the spectra, and four figures of each run"
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not page.tags & {"link", "iframe"} and "<img src=x" not in text and "@import" not in text
    assert str(runs) not in text and "http" not in text
    assert re.search(r"<th>dimensions filled</th>\s*<td>\d+\.\d</td>", text)
    assert re.search(r"<th>dimensions at most</th>\s*<td>64</td>", text)
    assert re.search(r"<th>top1, cls</th>\s*<td>50.0</td>", text)
    of_the_probed_run = r"<th>linear, digits \(test\), 20-NN, class token</th>\s*<td></td>\s*<td>40.0</td>"
    assert re.search(of_the_probed_run, text[: text.index("<h2>Training")])
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [row["uniformity_weight"] for row in rows] == ["0.0", "0.01"]
    assert [row["linear, digits (test), class token"] for row in rows] == ["", "50.0"]
    last = [json.loads((runs / row["run"] / "metrics.jsonl").read_text().splitlines()[-1]) for row in rows]
    assert [float(row["reconstruction loss"]) for row in rows] == [line["reconstruction_loss"] for line in last]


def test_runs_that_differ_in_the_seed_alone_are_one_column_of_means(runs, tmp_path):
    losses = (0.5, 0.6, 0.7)
    for seed, loss in enumerate(losses):
        (tmp_path / f"seed{seed}").mkdir()
        record = json.loads((runs / "umae" / "run.json").read_text())
        record["identity"]["seed"] = seed
        (tmp_path / f"seed{seed}" / "run.json").write_text(json.dumps(record))
        line = json.loads((runs / "umae" / "metrics.jsonl").read_text().splitlines()[-1])
        line["reconstruction_loss"] = loss
        (tmp_path / f"seed{seed}" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = report.report(sorted(tmp_path.iterdir()))
    results = text[: text.index("<h2>Training")]
    assert "<th>seed0, seed1, seed2: 3 seeds</th>" in results
    assert re.search(r"<th>reconstruction loss</th>\s*<td>0.6000 ± 0.1000</td>\s*</tr>", results)
    assert re.search(r"<th>state</th>\s*<td>finished</td>\s*</tr>", results)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_without_a_network_shows_the_whole_page(runs, tmp_path):
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(report.report(sorted(folder for folder in runs.iterdir())))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,5000")
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}")
    subprocess.run(
        [CHROMIUM, *flags, *offline, f"--screenshot={shot}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in COLOURS[:2]:  # of the two runs' lines
        red, green, blue = (int(colour[position : position + 2], 16) for position in (1, 3, 5))
        assert (pixels == (red, green, blue)).all(axis=1).sum() > 500, colour
    marked = (pixels == (255, 243, 214)).all(axis=1).sum()
    assert marked > 10_000, "the rows of settings that differ"


def test_runs_of_the_same_name_are_shown_with_their_parents_names(runs, tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "umae").symlink_to(runs / "umae")
    (tmp_path / "a" / "umae").unlink()
    (tmp_path / "a" / "umae").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / "a" / "umae" / name).write_text((runs / "umae" / name).read_text())
    text = report.report([tmp_path / "a" / "umae", runs / "umae"])
    assert "<th>a/umae</th>" in text and f"<th>{runs.name}/umae</th>" in text


def test_features_fill_no_more_dimensions_than_a_uniformity_term_has_images():
    identity = {"pictures_per_step": 256, "gradient_accumulation_steps": 4, "config": {"hidden_size": 768}}
    assert cards.most_dimensions({**identity, "exact_uniformity": False}) == 64
    assert cards.most_dimensions({**identity, "exact_uniformity": True}) == 256
    assert cards.most_dimensions({**identity, "exact_uniformity": True, "pictures_per_step": 4096}) == 768


def test_a_run_from_before_regularizers_could_be_chosen_had_the_uniformity(runs, tmp_path):
    shutil.copytree(runs / "umae", tmp_path / "old")
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    del record["identity"]["config"]["regularizer"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    assert Page(report.report([tmp_path / "old", runs / "umae"])).differing == []
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["regularizer"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert "| Uniformity weight | 0.01 on the cls feature |" in cards.model_card(tmp_path / "old")


def test_what_is_no_run_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="holds neither a run"):
        report.report([tmp_path])
    (tmp_path / "run.json").write_text((runs / "umae" / "run.json").read_text())
    with pytest.raises(ValueError, match="has not logged any metrics yet"):
        report.report([tmp_path])


def test_a_fine_tuning_is_shown_beside_probes(runs, tmp_path):
    protocol = {"model": "umae", "test": {"data": "digits (test)"}}
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "run.json").write_text(json.dumps({"identity": {"task": "fine-tuning"}}))
    with pytest.raises(ValueError, match="a fine-tuning that has not finished"):
        report.report([tmp_path / "tuned"])
    (tmp_path / "tuned" / "finetune.json").write_text(json.dumps({"top1": 95.26, "top5": 99.7, "protocol": protocol}))
    text = report.report([tmp_path / "tuned", runs / "probe"])
    assert re.search(r"<th>top1, fine-tuned</th>\s*<td>95.26</td>\s*<td></td>", text)
    assert re.search(r"<th>top1, cls</th>\s*<td></td>\s*<td>50.0</td>", text)
