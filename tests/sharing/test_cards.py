"""Cards say what the Hub reads: data, base model and its relation, papers, limitations, and where curves are."""

import json
import shutil

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from golden_models import fresh_config
from huggingface_hub import ModelCard

import run_finetune
from modeling_umae import UMAEForPreTraining
from umae.data.inputs import evaluation_processor
from umae.sharing import cards

PAPERS = ("https://arxiv.org/abs/2210.08344", "https://arxiv.org/abs/2111.06377")


@pytest.mark.parametrize(
    ("descriptions", "names"),
    [
        (("uoft-cs/cifar10 (train)",), ["uoft-cs/cifar10"]),
        (("5% of a/b (train[:10%])",), ["a/b"]),
        (("a/b (train) without 5%", "a/b (test)"), ["a/b"]),
        (("a/b (train)", "c/d (test)"), ["a/b", "c/d"]),
        (("digits (train)", "folder images (train)", "3.5% of shards (train)"), []),
        (("my/../secret (train)", "/home/me/images (train)"), []),
    ],
    ids=str,
)
def test_data_is_named_by_its_name_on_the_hub_and_local_data_not_at_all(descriptions, names):
    assert cards.hub_datasets(*descriptions) == names


@pytest.fixture(scope="module")
def pretrained(finished):
    """The record of a run from scratch on the digits, to be changed."""
    folder, _ = finished
    names = ("run.json", "config.json", "metrics.jsonl", "preprocessor_config.json")
    return {name: (folder / name).read_text() for name in names}


def card_of(folder, files, **changes) -> ModelCard:
    for name, text in files.items():
        (folder / name).write_text(text)
    run = json.loads(files["run.json"])
    identity = run["identity"] | changes.pop("identity", {})
    (folder / "run.json").write_text(json.dumps({**run, **changes, "identity": identity}))
    return ModelCard(cards.model_card(folder))


def test_the_card_of_a_run_from_scratch_names_papers_licence_and_limitations_and_no_base(pretrained, tmp_path):
    card = card_of(tmp_path, pretrained)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-feature-extraction")
    assert data["license"] == "apache-2.0" and not {"base_model", "base_model_relation", "datasets"} & {*data}
    assert all(paper in card.text for paper in PAPERS)
    limits = card.text.split("## Limitations")[1].split("##")[0]
    assert "images of digits (train) only." in limits and "8 x 8 pixels" in limits and "identifying people" in limits
    assert "huggingface.co/spaces" not in card.text


def test_the_card_of_a_run_from_weights_on_data_of_the_hub_links_both(pretrained, tmp_path):
    identity = {"dataset": "uoft-cs/cifar10 (train)", "initial_weights": "facebook/vit-mae-base"}
    card = card_of(
        tmp_path, pretrained, identity=identity, base_model=["facebook/vit-mae-base"], trackio_space="me/curves"
    )
    assert card.data.base_model == ["facebook/vit-mae-base"] and card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["uoft-cs/cifar10"] and card.data.license is None
    assert "after those that the weights it started from had seen" in card.text
    assert "(https://huggingface.co/spaces/me/curves)" in card.text


@pytest.mark.parametrize("space", [None, "curves", "me/curves) <script>"])
def test_what_is_no_name_of_a_space_is_not_linked(pretrained, tmp_path, space):
    assert "spaces/" not in card_of(tmp_path, pretrained, trackio_space=space).text


TRACKIO = """
config = {}

class run:
    log = finish = staticmethod(lambda *arguments, **named: None)

def init(**named):
    return run
"""


@pytest.mark.parametrize("report_to", ["trackio", "none"])
def test_the_space_that_trackio_logs_to_is_on_the_card(tmp_path, monkeypatch, report_to):
    """trackio itself reads TRACKIO_SPACE_ID and needs the Hub; here it is replaced."""
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TRACKIO])
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/curves")
    UMAEForPreTraining(fresh_config(image_size=8, patch_size=2)).save_pretrained(tmp_path / "encoder")
    evaluation_processor((8, 8)).save_pretrained(tmp_path / "encoder")
    words = ("--max_train_steps", "1", "--per_device_train_batch_size", "32", "--report_to", report_to)
    run_finetune.main(
        ["--model_name_or_path", str(tmp_path / "encoder"), "--output_dir", str(tmp_path / "run"), *words]
    )
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert ("[Curves in a Space](https://huggingface.co/spaces/me/curves)" in card.text) == (report_to == "trackio")
    assert "one of the 10 classes that it was trained on" in card.text and all(paper in card.text for paper in PAPERS)


def test_the_card_of_a_run_without_the_term_does_not_claim_it(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for weight, said in ((0.01, "with a uniformity term that keeps"), (0, "(MAE), without the term of U-MAE.")):
        (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "uniformity_weight": weight}))
        assert said in cards.model_card(tmp_path / "run")
