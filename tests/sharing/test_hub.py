"""Sharing a run through a real server that speaks the Hub's protocol (fake_hub.py)."""

import getpass
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from fake_hub import Blob, Repo
from golden_models import fresh_config
from huggingface_hub import ModelCard, close_session, constants
from processes import hub_user, run

import run_pretrain
from modeling_umae import UMAEForPreTraining, UMAEModel
from umae.data.inputs import evaluation_processor
from umae.sharing import hub
from umae.sharing.cards import base_model, probe_card

LOAD = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
AutoImageProcessor.from_pretrained("tester/digits")
model = AutoModel.from_pretrained("tester/digits", trust_remote_code=True)
torch.save(model(torch.ones(1, 3, 8, 8)).pooler_output, "features.pt")
assert not {"umae", "modeling_umae"} & set(sys.modules)
"""
MORE = """
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForPreTraining, pipeline
AutoModelForPreTraining.from_pretrained("tester/digits", trust_remote_code=True)
AutoModelForImageClassification.from_pretrained("tester/digits", trust_remote_code=True)
image = Image.new("RGB", (9, 9), (200, 10, 10))
tokens = pipeline("image-feature-extraction", "tester/digits", trust_remote_code=True)(image)
assert (len(tokens[0]), len(tokens[0][0])) == (17, 64)
classes = pipeline("image-classification", "tester/digits", trust_remote_code=True)(image)
assert len(classes) == 2, classes
from umae.convert import encoder_from_pretrained  # and with the package, for probes and features
assert torch.equal(encoder_from_pretrained("tester/digits")(torch.ones(1, 3, 8, 8)).pooler_output,
                   torch.load("features.pt", weights_only=True))
"""


def test_a_run_is_pushed_in_one_commit_and_loads_by_its_name(server, tmp_path):
    pushed = run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "2", "--push_to_hub",
        "--hub_model_id", "tester/digits", figures=True, **hub_user(),
    )  # fmt: skip
    assert f"{server.url}/tester/digits" in pushed.stdout
    requests = [entry["request"].split("?")[0] for entry in server.log]
    posts = [request for request in requests if request.startswith("POST")]
    assert posts[0] == "POST /api/repos/create", "write access is checked first"
    assert sum("/commit/" in request for request in requests) == 1
    repo = server.repos["model", "tester/digits"]
    assert set(repo.commits[repo.refs["main"]]) - {".gitattributes"} == {
        "README.md", "attention.png", "config.json", "configuration_umae.py", "curve.png",
        "image_processing_umae.py", "metrics.jsonl", "model.safetensors", "modeling_umae.py", "neighbours.png",
        "notebook.ipynb", "preprocessor_config.json", "progress.png",
        "reconstructions.png", "spectrum.json", "spectrum.png",
    }  # fmt: skip
    (notebook,) = (blob for name, blob in repo.commits[repo.refs["main"]].items() if name == "notebook.ipynb")
    assert b'name = \\"tester/digits\\"' in notebook.data, "where the Hub opens it there is no folder"
    run("-c", LOAD + MORE, cwd=tmp_path, PYTHONPATH="", **hub_user())
    expected = UMAEModel.from_pretrained(tmp_path / "digits")(torch.ones(1, 3, 8, 8)).pooler_output
    assert torch.equal(torch.load(tmp_path / "features.pt", weights_only=True), expected)


def test_a_finished_run_is_pushed_later_on_request(server, tmp_path):
    command = ("run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "1", "--eval_steps", "0")
    run(*command)
    card = tmp_path / "digits" / "README.md"
    assert "license: apache-2.0\n" in card.read_text(), "trained from scratch, here"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mit"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").rglob("*")}
    pushed = run(*command, "--push_to_hub", "--hub_model_id", "tester/digits", **hub_user())
    assert "finished; nothing to do" in pushed.stdout and f"pushed to {server.url}/tester/digits" in pushed.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").rglob("*")}
    repo = server.repos["model", "tester/digits"]
    files = repo.commits[repo.refs["main"]]
    assert "model.safetensors" in files and files["README.md"].data == card.read_bytes(), "a card that was edited stays"


CLASSIFY = """
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", "tester/tuned", trust_remote_code=True)
assert len(classify(Image.new("RGB", (9, 9)), top_k=10)) == 10
"""


def test_a_fine_tuned_classifier_is_pushed_and_classifies_by_its_name(server, tmp_path):
    UMAEModel(fresh_config(image_size=8, patch_size=2)).save_pretrained(tmp_path / "encoder")
    evaluation_processor((8, 8)).save_pretrained(tmp_path / "encoder")
    pushed = run(
        "run_finetune.py", "--model_name_or_path", tmp_path / "encoder", "--output_dir", tmp_path / "tuned",
        "--max_train_steps", "1", "--push_to_hub", "--hub_model_id", "tester/tuned",
        **hub_user(),
    )  # fmt: skip
    assert f"pushed to {server.url}/tester/tuned" in pushed.stdout
    repo = server.repos["model", "tester/tuned"]
    files = repo.commits[repo.refs["main"]]
    assert set(files) - {".gitattributes"} == {
        "README.md", "config.json", "configuration_umae.py", "finetune.json", "image_processing_umae.py",
        "metrics.jsonl", "model.safetensors", "modeling_umae.py", "preprocessor_config.json",
    }  # fmt: skip
    run("-c", CLASSIFY, cwd=tmp_path, PYTHONPATH="", **hub_user())


@pytest.mark.parametrize("name", ["../../outside", "a/../../b", "/etc/model", "a/b/c", "a b"])
def test_invalid_names_are_refused_and_reach_no_server(name):
    with pytest.raises(ValueError, match=f"cannot write to {name} on the Hub: (Repo id must|Cannot have)"):
        hub.check_access(name)


LOAD_HOSTILE = """
from transformers import AutoModel
import umae
AutoModel.from_pretrained("tester/hostile")
"""


@pytest.mark.parametrize("name", ["../../../../../../evil.safetensors", "/evil.safetensors"])
def test_an_index_on_the_hub_writes_nothing_outside_of_the_cache(server, tmp_path, name):
    UMAEModel(fresh_config()).save_pretrained(tmp_path / "model")
    files = {path.name: Blob(path.read_bytes(), False) for path in (tmp_path / "model").iterdir()}
    files |= {name: files.pop("model.safetensors")}
    index = {"metadata": {}, "weight_map": {"layernorm.weight": name}}
    files["model.safetensors.index.json"] = Blob(json.dumps(index).encode(), False)
    server.repos["model", "tester/hostile"] = repo = Repo("tester/hostile", private=False)
    repo.add("main", files, "hostile")
    user = hub_user()
    home = Path(user["HF_HOME"])
    result = run("-c", LOAD_HOSTILE, cwd=tmp_path, check=False, **user)
    assert result.returncode != 0
    written = {path for path in home.parent.rglob("*") if path.is_file() and "evil" in path.name}
    assert all(home / "hub" / "models--tester--hostile" in path.parents for path in written), result.stderr
    assert not Path("/evil.safetensors").exists()


def test_no_token_is_written_and_nothing_published_reveals_the_machine(server, tmp_path):
    UMAEForPreTraining(fresh_config(image_size=8, patch_size=2)).save_pretrained(tmp_path / "first")
    result = run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "2", "--report_to", "tensorboard",
        "--model_name_or_path", tmp_path / "first", "--push_to_hub", "--hub_model_id", "tester/digits",
        **hub_user(),
    )  # fmt: skip
    files = [path for path in (tmp_path / "digits").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert b"hf_test" not in path.read_bytes(), path
    assert "hf_test" not in result.stdout + result.stderr
    repo = server.repos["model", "tester/digits"]
    traces = {str(tmp_path), str(Path.home()), socket.gethostname(), f"/{getpass.getuser()}"}
    traces = [trace for trace in traces if len(trace) > 4]  # shorter ones are found anywhere
    published = set(repo.commits[repo.refs["main"]]) - {".gitattributes"}
    assert "README.md" in published
    card = ModelCard((tmp_path / "digits" / "README.md").read_text())
    assert card.data.license is None and card.data.base_model is None and "| Started from | first |" in card.text
    for name in published:
        content = (tmp_path / "digits" / name).read_bytes()
        assert [trace for trace in traces if trace.encode() in content] == [], name


def test_a_run_that_could_not_be_pushed_is_refused_before_training(server, tmp_path):
    result = run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--push_to_hub", "--hub_model_id", "somebody/else",
        check=False, **hub_user(),
    )  # fmt: skip
    assert result.returncode == 1
    assert "cannot write to somebody/else on the Hub" in result.stderr and "hf auth login" in result.stderr
    assert not (tmp_path / "digits").exists()
    assert "hf_test" not in result.stdout + result.stderr


# ------------------------------------------------------------------------------------- failures of the Hub


@pytest.fixture
def logged_in(server, monkeypatch):
    """Log this process in to that server, with short waits."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "WAITS", (0, 0, 0))
    monkeypatch.setattr(hub, "TIMEOUT", 1)
    yield server
    close_session()  # its connections are to a server that ends, and the next one has the same address


FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 16}


def names(server, repo="tester/model") -> set[str]:
    repository = server.repos["model", repo]
    return set(repository.commits[repository.refs["main"]])


def attempts(server, request: str) -> int:
    return sum(entry["request"].startswith(request) for entry in server.log)


COMMIT = "POST /api/models/tester/model/commit/"


@pytest.mark.parametrize(
    "fault",
    [
        {"match": COMMIT, "status": 503},
        {"match": COMMIT, "status": 500, "times": 2},
        {"match": COMMIT, "status": 429, "headers": {"Retry-After": "1"}},
        {"match": COMMIT, "drop": True},
        {"match": COMMIT, "delay": 30},
        {"match": "POST /api/repos/create", "status": 503},
        {"match": "POST /api/repos/create", "drop": True},
        {"match": "POST .*/preupload/", "status": 503},
        {"match": "PUT .*/_lfs/", "status": 500},
        {"match": "POST .*/tag/", "status": 503},
    ],
    ids=str,
)
def test_a_hub_that_recovers_gets_everything_in_one_commit(logged_in, fault):
    logged_in.faults.append(fault)
    repo_id = hub.check_access("model")
    assert repo_id == "tester/model"
    assert hub.push(FILES, repo_id, "Upload", tag="v1") == f"{logged_in.url}/tester/model"
    repo = logged_in.repos["model", repo_id]
    assert names(logged_in) == {".gitattributes", *FILES} and repo.refs["v1"] == repo.refs["main"]
    assert repo.commits[repo.refs["main"]]["model.safetensors"].data == FILES["model.safetensors"]
    assert len(repo.commits) == 2, "the repository's first one, and ours"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_refuses_the_repository_is_reported_before_any_work(logged_in, status):
    logged_in.faults.append({"match": "POST /api/repos/create", "status": status, "times": -1})
    with pytest.raises(ValueError, match=r"cannot write to tester/model on the Hub: .*Log in with `hf auth login`"):
        hub.check_access("tester/model")
    assert attempts(logged_in, "POST /api/repos/create") == 1


@pytest.mark.parametrize(
    ("fault", "tried"),
    [
        ({"match": COMMIT, "status": 503, "times": -1}, 4),
        ({"match": COMMIT, "drop": True, "times": -1}, 4),
        ({"match": COMMIT, "delay": 30, "times": -1}, 0),  # the server notes a request once it has answered
        ({"match": COMMIT, "status": 401, "times": -1}, 1),
        ({"match": COMMIT, "status": 403, "times": -1}, 1),
        ({"match": COMMIT, "status": 404, "times": -1}, 1),
        ({"match": COMMIT, "status": 409, "times": -1}, 1),
    ],
    ids=str,
)
def test_a_hub_that_does_not_recover_is_reported_and_shows_nothing_incomplete(logged_in, fault, tried):
    hub.check_access("tester/model")
    logged_in.faults.append(fault)
    with pytest.raises(ValueError, match="cannot push to tester/model: "):
        hub.push(FILES, "tester/model", "Upload")
    assert attempts(logged_in, COMMIT) == tried, "a refusal is not retried"
    assert names(logged_in) == {".gitattributes"}


def test_a_failed_background_push_is_only_logged_and_one_requested_meanwhile_is_skipped(logged_in, tmp_path):
    hub.check_access("tester/model")
    logged = []
    push = hub.BackgroundPush("tester/model", tmp_path, logged.append)
    logged_in.faults.append({"match": COMMIT, "delay": 1})
    push.start(FILES, "Step 1", "step-1")
    push.start(FILES, "Step 2", "step-2")  # the first one is still under way
    push.wait()
    logged_in.faults.append({"match": COMMIT, "status": 403})
    push.start({**FILES, "config.json": b"[]"}, "Step 3", "step-3")
    push.wait()
    assert set(logged_in.repos["model", "tester/model"].refs) == {"main", "step-1"}
    assert len(logged) == 1 and "continues" in logged[0]
    assert logged[0].startswith("step-3 is not on the Hub (cannot push")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_a_checkpoint_that_is_removed_during_its_push_arrives_complete(logged_in, tmp_path, monkeypatch, links):
    def refused(*args, **kwargs):
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    hub.check_access("tester/model")
    logged, checkpoint = [], tmp_path / "step-1"
    checkpoint.mkdir()
    for name, content in FILES.items():
        (checkpoint / name).write_bytes(content)
    push = hub.BackgroundPush("tester/model", tmp_path, logged.append)
    logged_in.faults.append({"match": "POST .*/preupload/", "delay": 1})
    push.start({**{path.name: path for path in checkpoint.iterdir()}, "README.md": b"card"}, "Step 1", "step-1")
    shutil.rmtree(checkpoint)
    (kept,) = tmp_path.iterdir()
    assert kept.suffix == ".tmp", "what a kill leaves of it is removed by the next run"
    push.wait()
    repo = logged_in.repos["model", "tester/model"]
    pushed = {name: blob.data for name, blob in repo.commits[repo.refs["step-1"]].items()}
    assert {name: pushed[name] for name in FILES} == FILES and pushed["README.md"] == b"card"
    assert logged == [] and list(tmp_path.iterdir()) == []


def test_a_run_outlives_the_hub_and_the_command_it_names_repeats_the_push(server, tmp_path):
    server.faults.append({"match": "POST .*/commit/", "status": 403, "times": -1})
    failed = run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "4", "--checkpointing_steps", "2",
        "--eval_steps", "0",
        "--push_to_hub", "--hub_model_id", "tester/digits", "--hub_private_repo", check=False,
        **hub_user(),
    )  # fmt: skip
    assert failed.returncode == 1 and "step-2 is not on the Hub" in failed.stdout + failed.stderr
    assert f"{tmp_path}/digits is finished and whole, but cannot push to tester/digits" in failed.stderr
    command = ["-m", *re.search(r"To try again: `(umae push \S+ tester/digits)`", failed.stderr)[1].split()]
    assert (tmp_path / "digits" / "model.safetensors").exists()
    assert server.repos["model", "tester/digits"].private
    server.faults.clear()
    (tmp_path / "digits" / "notes.txt").write_text("not for others")
    dry = run(*command, "--dry_run", **hub_user()).stdout
    assert "MB  model.safetensors" in dry and "# U-MAE" in dry and names(server, "tester/digits") == {".gitattributes"}
    run(*command, **hub_user())
    assert "model.safetensors" in names(server, "tester/digits")
    assert "notes.txt" not in names(server, "tester/digits")


def test_every_checkpoint_is_a_revision_that_loads(server, tmp_path):
    run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "5", "--checkpointing_steps", "4",
        "--eval_steps", "0",
        "--logging_steps", "5", "--checkpoints_total_limit", "9", "--push_to_hub", "--hub_model_id", "tester/digits",
        **hub_user(),
    )  # fmt: skip
    repo = server.repos["model", "tester/digits"]
    assert "step-4" in repo.refs, "the second one may have come while the first was under way"
    published = repo.commits[repo.refs["step-4"]]
    assert set(published) == {
        ".gitattributes", "README.md", "config.json", "configuration_umae.py", "image_processing_umae.py",
        "model.safetensors", "modeling_umae.py", "preprocessor_config.json",
    }  # fmt: skip
    assert "| Steps | 4 of 5, each of 128 images, seed 0 |" in published["README.md"].data.decode()
    load = LOAD.replace('"tester/digits"', '"tester/digits", revision="step-4"')
    run("-c", load, cwd=tmp_path, PYTHONPATH="", **hub_user())
    expected = UMAEModel.from_pretrained(tmp_path / "digits" / "step-4")(torch.ones(1, 3, 8, 8)).pooler_output
    assert torch.equal(torch.load(tmp_path / "features.pt", weights_only=True), expected)


def test_a_run_that_keeps_one_checkpoint_and_a_slow_hub_make_whole_revisions(logged_in, no_figures, tmp_path):
    flags = ["--max_train_steps", "5", "--checkpointing_steps", "1", "--logging_steps", "5", "--eval_steps", "0"]
    run_pretrain.main([*flags, "--output_dir", str(tmp_path / "kept"), "--checkpoints_total_limit", "9"])
    pushed = ["--checkpoints_total_limit", "1", "--push_to_hub", "--hub_model_id", "tester/digits"]
    logged_in.faults.append({"match": "POST .*/preupload/", "delay": 0.5, "times": -1})
    run_pretrain.main([*flags, "--output_dir", str(tmp_path / "digits"), *pushed])
    repo = logged_in.repos["model", "tester/digits"]
    assert "step-1" in repo.refs
    for revision in repo.refs.keys() - {"main"}:
        files = repo.commits[repo.refs[revision]]
        for name in ("model.safetensors", "config.json", "preprocessor_config.json", "modeling_umae.py"):
            assert files[name].data == (tmp_path / "kept" / revision / name).read_bytes(), (revision, name)
    assert {path.name for path in (tmp_path / "digits").glob("*") if path.suffix == ".tmp"} == set()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nbase_model: facebook/vit-mae-base\nlicense: mit\n---\n"}, ["facebook/vit-mae-base"]),
        ({"README.md": "---\nbase_model: [a/b, ../secret, c/d]\n---\n"}, ["a/b", "c/d"]),
        ({"README.md": "# no metadata", "config.json": '{"_name_or_path": "facebook/vit-mae-base"}'},
         ["facebook/vit-mae-base"]),
        ({"README.md": "---\na: b: c\n---\n", "config.json": '{"_name_or_path": "/home/somebody/mae"}'}, []),
        ({"README.md": "---\na rule\n---\n", "config.json": "{}"}, []),
        ({"config.json": '{"_name_or_path": "./mae"}'}, []),
        ({}, []),
    ],
    ids=str,
)  # fmt: skip
def test_the_base_model_of_weights_in_a_folder_is_what_the_folder_names_and_never_a_path(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert base_model(str(tmp_path)) == expected


def test_the_base_model_of_weights_on_the_hub_is_their_name_and_files_and_fresh_weights_have_none(tmp_path):
    (tmp_path / "mae.pth").write_bytes(b"")
    assert base_model("facebook/vit-mae-base") == ["facebook/vit-mae-base"]
    assert base_model(str(tmp_path / "mae.pth")) == base_model(None) == []


HOSTILE = "a`|<b>\n---\nlicense: proprietary\n| x | [y](javascript:z)"


def test_cards_are_valid_and_quote_hostile_names(logged_in, tmp_path):
    numbers = {"top1": 50.0, "top5": None, "knn20_top1": 40.0, "effective_rank": 3.0}
    data = {"data": f"{HOSTILE} (test)", "pictures": 7}
    protocol = {
        "model": HOSTILE, "train": data, "test": data, "classes": 2, "classifier_pooling": "cls", "seeds": [0],
        "linear_protocol": "cached", "knn": {"k": [20]}, "versions": {"torch": "2"},
        "base_model": ["facebook/vit-mae-base"], "precision": {"training": "float32", "evaluation": "float32"},
    }  # fmt: skip
    (tmp_path / "linear_probe.json").write_text(json.dumps({"cls": numbers, "mean": numbers, "protocol": protocol}))
    text = probe_card(tmp_path)
    card = ModelCard(text)
    card.validate()
    assert card.data.license is None and card.data.base_model == ["facebook/vit-mae-base"]
    assert card.data.model_name == HOSTILE
    results = {(result.metric_name, result.metric_value) for result in card.data.eval_results}
    assert ("linear probe top-1, cls features", 50.0) in results and len(results) == 4
    assert not re.search(r"(?<!\\)(<b|\]\(javascript)|^license", card.text, re.MULTILINE), "no markup of theirs"
    assert "Encoder" in card.text
