"""Sharing a run through a real server that speaks the Hub's protocol (fake_hub.py)."""

import getpass
import json
import socket
from pathlib import Path

import pytest
import torch
from fake_hub import Blob, FakeHub, Repo
from golden_models import fresh_config
from processes import run

from modeling_umae import UMAEModel
from umae.hub import check_access

LOAD = """
import torch
from transformers import AutoImageProcessor, AutoModel
AutoImageProcessor.from_pretrained("tester/digits")
model = AutoModel.from_pretrained("tester/digits", trust_remote_code=True)
torch.save(model(torch.ones(1, 3, 8, 8)).pooler_output, "features.pt")
"""


@pytest.fixture
def hub():
    with FakeHub() as server:
        yield server


def online(hub, home) -> dict[str, str]:
    """The environment of somebody who is logged in to that server, with nothing cached."""
    login = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home)}
    return {**login, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def test_a_run_is_pushed_in_one_commit_and_loads_by_its_name(hub, tmp_path):
    pushed = run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "2", "--push_to_hub",
        "--hub_model_id", "tester/digits", **online(hub, tmp_path / "home"),
    )  # fmt: skip
    assert f"{hub.url}/tester/digits" in pushed.stdout
    requests = [entry["request"].split("?")[0] for entry in hub.log]
    posts = [request for request in requests if request.startswith("POST")]
    assert posts[0] == "POST /api/repos/create", "write access is checked first"
    assert sum("/commit/" in request for request in requests) == 1
    repo = hub.repos["model", "tester/digits"]
    assert set(repo.commits[repo.refs["main"]]) - {".gitattributes"} == {
        "README.md", "config.json", "configuration_umae.py", "metrics.jsonl", "model.safetensors", "modeling_umae.py",
        "preprocessor_config.json", "reconstructions.png",
    }  # fmt: skip
    run("-c", LOAD, cwd=tmp_path, PYTHONPATH="", **online(hub, tmp_path / "fresh_home"))
    expected = UMAEModel.from_pretrained(tmp_path / "digits")(torch.ones(1, 3, 8, 8)).pooler_output
    assert torch.equal(torch.load(tmp_path / "features.pt", weights_only=True), expected)


def test_a_finished_run_is_pushed_when_asked_for_later(hub, tmp_path):
    command = ("run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "1")
    run(*command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").rglob("*")}
    pushed = run(*command, "--push_to_hub", "--hub_model_id", "tester/digits", **online(hub, tmp_path / "home"))
    assert "finished; nothing to do" in pushed.stdout and f"pushed to {hub.url}/tester/digits" in pushed.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").rglob("*")}
    repo = hub.repos["model", "tester/digits"]
    assert "model.safetensors" in repo.commits[repo.refs["main"]]


@pytest.mark.parametrize("name", ["../../outside", "a/../../b", "/etc/model", "a/b/c", "a b"])
def test_names_that_are_none_are_refused_and_reach_no_server(name):
    with pytest.raises(ValueError, match=f"cannot write to {name} on the Hub: (Repo id must|Cannot have)"):
        check_access(name)


LOAD_HOSTILE = """
from transformers import AutoModel
import umae
AutoModel.from_pretrained("tester/hostile")
"""


@pytest.mark.parametrize("name", ["../../../../../../evil.safetensors", "/evil.safetensors"])
def test_an_index_on_the_hub_writes_nothing_outside_of_the_cache(hub, tmp_path, name):
    UMAEModel(fresh_config()).save_pretrained(tmp_path / "model")
    files = {path.name: Blob(path.read_bytes(), False) for path in (tmp_path / "model").iterdir()}
    files |= {name: files.pop("model.safetensors")}
    index = {"metadata": {}, "weight_map": {"layernorm.weight": name}}
    files["model.safetensors.index.json"] = Blob(json.dumps(index).encode(), False)
    hub.repos["model", "tester/hostile"] = repo = Repo("tester/hostile", private=False)
    repo.add("main", files, "hostile")
    home = tmp_path / "home"
    result = run("-c", LOAD_HOSTILE, cwd=tmp_path, check=False, **online(hub, home))
    assert result.returncode != 0
    written = {path for path in tmp_path.rglob("*") if path.is_file() and "evil" in path.name}
    assert all(home / "hub" / "models--tester--hostile" in path.parents for path in written), result.stderr
    assert not Path("/evil.safetensors").exists()


def test_no_token_is_written_and_nothing_published_tells_of_the_machine(hub, tmp_path):
    run("run_pretrain.py", "--output_dir", tmp_path / "first", "--max_train_steps", "1")
    result = run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--max_train_steps", "2", "--report_to", "tensorboard",
        "--model_name_or_path", tmp_path / "first", "--push_to_hub", "--hub_model_id", "tester/digits",
        **online(hub, tmp_path / "home"),
    )  # fmt: skip
    files = [path for path in (tmp_path / "digits").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert b"hf_test" not in path.read_bytes(), path
    assert "hf_test" not in result.stdout + result.stderr
    repo = hub.repos["model", "tester/digits"]
    traces = {str(tmp_path), str(Path.home()), socket.gethostname(), f"/{getpass.getuser()}"}
    traces = [trace for trace in traces if len(trace) > 4]  # shorter ones are found anywhere
    published = set(repo.commits[repo.refs["main"]]) - {".gitattributes"}
    assert "README.md" in published
    for name in published:
        content = (tmp_path / "digits" / name).read_bytes()
        assert [trace for trace in traces if trace.encode() in content] == [], name


def test_a_run_that_could_not_be_pushed_is_refused_before_training(hub, tmp_path):
    result = run(
        "run_pretrain.py", "--output_dir", tmp_path / "digits", "--push_to_hub", "--hub_model_id", "somebody/else",
        check=False, **online(hub, tmp_path / "home"),
    )  # fmt: skip
    assert result.returncode == 1
    assert "cannot write to somebody/else on the Hub" in result.stderr and "hf auth login" in result.stderr
    assert not (tmp_path / "digits").exists()
    assert "hf_test" not in result.stdout + result.stderr
