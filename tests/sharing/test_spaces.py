"""A page is shared as a Space through a real server that speaks the Hub's protocol (fake_hub.py)."""

import pytest
import yaml
from fake_hub import Blob, Repo
from processes import hub_user, run

from umae.sharing.spaces import space_files

PAGE = {
    "README.md": '---\ntitle: U-MAE demo\nsdk: gradio\npython_version: "3.10"\n---\n\n# U-MAE demo\n',
    "app.py": "print('the page')\n", "requirements.txt": "gradio==6.31.0\n", "modeling_umae.py": "",
    "umae/__init__.py": "", "umae/demo/page.py": "", "models/run/config.json": "{}",
    "models/run/model.safetensors": "weights" * 300, "images/a/000.jpg": "jpeg",
}  # fmt: skip
LEFT_BY_A_TRIAL = {
    "umae/__pycache__/page.pyc": "", "index/1234.safetensors": "", ".env": "SECRET=1", "notes.txt": "mine",
}  # fmt: skip
CARD = "---\nlibrary_name: transformers\n---\n\n# Digits\n"


@pytest.fixture
def page(tmp_path):
    for name, text in (PAGE | LEFT_BY_A_TRIAL).items():
        (tmp_path / "page" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "page" / name).write_text(text)
    return tmp_path / "page"


def files_of(server, kind, name):
    repo = server.repos[kind, name]
    return {path: blob.data for path, blob in repo.commits[repo.refs["main"]].items() if path != ".gitattributes"}


def test_a_page_is_pushed_as_a_space_and_its_model_and_it_link_each_other(server, page):
    server.repos["model", "tester/digits"] = model = Repo("tester/digits", private=False)
    model.add("main", {"README.md": Blob(CARD.encode(), False), "config.json": Blob(b"{}", False)}, "model")
    command = ("-m", "umae", "push-space", page, "tester/page", "--model", "tester/digits")
    printed = [run(*command, **hub_user()).stdout for _ in range(2)]
    url = f"{server.url}/spaces/tester/page"
    assert f"pushed to {url}\nlinked from {server.url}/tester/digits\n" in printed[0]
    assert f"pushed to {url}\n" in printed[1] and "linked from" not in printed[1], "it has the link"
    space = files_of(server, "space", "tester/page")
    assert space.keys() == PAGE.keys(), "and nothing that a trial has left"
    assert all(space[name] == PAGE[name].encode() for name in PAGE if name != "README.md")
    _, header, text = space["README.md"].decode().split("---\n", 2)
    _, before, same = PAGE["README.md"].split("---\n", 2)
    assert yaml.safe_load(header) == {**yaml.safe_load(before), "models": ["tester/digits"]} and text == same
    of_model = files_of(server, "model", "tester/digits")
    assert of_model["README.md"].decode().startswith(CARD) and of_model["README.md"].count(url.encode()) == 1
    assert of_model["config.json"] == b"{}"
    posts = [entry["request"].split("?")[0] for entry in server.log if entry["request"].startswith("POST")]
    assert sum(post.endswith("/spaces/tester/page/commit/main") for post in posts) == 1, (
        "the second push changes nothing"
    )
    assert "hf_test" not in "".join(printed)


def test_nothing_is_made_before_the_card_of_the_model_was_read(server, page):
    command = ("-m", "umae", "push-space", page, "tester/page", "--model", "tester/misspelt")
    result = run(*command, check=False, **hub_user())
    assert result.returncode == 1 and "umae push-space: cannot read the card of tester/misspelt" in result.stderr
    assert server.repos == {} and "Traceback" not in result.stderr


def test_a_dry_run_lists_the_files_shows_the_card_and_asks_no_server(page):
    printed = run("-m", "umae", "push-space", page, "tester/page", "--model", "tester/digits", "--dry_run").stdout
    assert "- tester/digits" in printed and "# U-MAE demo" in printed
    listed = [line.split("MB  ")[1] for line in printed.splitlines() if "MB  " in line]
    assert sorted(listed) == sorted(PAGE)


@pytest.mark.parametrize("missing", ["app.py", "README.md", "sdk"])
def test_a_folder_that_is_no_page_is_refused(page, missing):
    if missing == "sdk":
        (page / "README.md").write_text(CARD)
    else:
        (page / missing).unlink()
    with pytest.raises(ValueError, match="page is no page of `umae demo`: expected app"):
        space_files(page)
