"""Runs and a probe, for tests of the pages that show them."""

import json
import shutil

import pytest
from processes import run

FLAGS = ("--max_train_steps", "4", "--logging_steps", "2", "--eval_steps", "4")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """With the uniformity term and without, the latter under a name that is HTML markup."""
    folder = tmp_path_factory.mktemp("runs")
    run("run_pretrain.py", "--output_dir", folder / "umae", *FLAGS, figures=True)
    others = ("--uniformity_weight", "0", "--model_name_or_path", folder / "umae")
    other = folder / "<img src=x onerror=alert(1)>"
    run("run_pretrain.py", "--output_dir", other, *FLAGS, *others)
    for figure in (*(folder / "umae").glob("*.png"), folder / "umae" / "spectrum.json"):  # some, to be shown
        shutil.copy(figure, other)
    numbers = {"top1": 50.0, "top5": None, "knn20_top1": 40.0, "effective_rank": 3.0}
    protocol = {"model": "umae", "test": {"data": "digits (test)"}, "linear_protocol": "cached"}
    (folder / "probe").mkdir()
    (folder / "probe" / "linear_probe.json").write_text(
        json.dumps({"cls": numbers, "mean": numbers, "protocol": protocol})
    )
    return folder
