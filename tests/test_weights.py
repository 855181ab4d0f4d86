"""The models in weights/: that they are what they say, and how they reach the Hub."""

import json
import re
import shutil

import pytest
import torch
from golden_models import fresh_config
from PIL import Image
from processes import ROOT, hub_user, run
from safetensors import safe_open

import umae
from modeling_umae import UMAEForPreTraining
from umae.data.inputs import evaluation_processor

MODELS = sorted(config.parent for config in (ROOT / "weights").glob("*/config.json"))
LOAD = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
print(tuple(model(torch.ones(1, 3, {side}, {side})).pooler_output.shape))
"""


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_model_is_small_on_the_disk_computes_in_float32_and_loads_without_the_package(folder, tmp_path):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    assert (
        umae.encoder_from_pretrained(folder).dtype == UMAEForPreTraining.from_pretrained(folder).dtype == torch.float32
    )
    shutil.copytree(folder, tmp_path / "model")
    loaded = run("-c", LOAD.format(name="model", side=64), cwd=tmp_path, PYTHONPATH="")
    assert loaded.stdout == "(1, 128)\n"
    for code in folder.glob("*.py"):
        assert code.resolve() == ROOT / code.name, "always the repository's"


def test_the_twins_differ_in_the_term_alone_and_by_it_in_the_dimensions_that_their_features_fill():
    without, with_term = (umae.encoder_from_pretrained(folder).config.to_dict() for folder in MODELS)
    different = {name for name in with_term if with_term[name] != without[name] and not name.startswith("_")}
    assert different == {"uniformity_weight"} and without["uniformity_weight"] == 0
    collapsed, spread = (umae.diagnose(str(folder), "digits", "test", 256)["cls"] for folder in MODELS)
    assert spread["effective_rank"] > 1.5 * collapsed["effective_rank"]


def test_every_table_of_their_accuracies_is_that_of_the_probes():
    expected = []
    for images in ("groceries", "aid_aerial", "pbc_blood"):
        for name in ("mae-vit-mini-64", "umae-vit-mini-64"):
            result = json.loads((ROOT / f"weights/results/{name}_{images}.json").read_text())
            assert result["protocol"]["model"] == name and result["protocol"]["linear_protocol"] == "cached"
            pairs = (
                (result[part][key] for part in ("cls", "mean")) for key in ("top1", "knn20_top1", "effective_rank")
            )
            expected.append([" / ".join(f"{value:.1f}" for value in pair) for pair in pairs])
    for page in (ROOT / "weights").rglob("README.md"):
        rows = [
            line.split("|")[3:6] for line in page.read_text().splitlines() if "the term |" in line and " / " in line
        ]
        assert [[cell.strip() for cell in row] for row in rows] == expected, page


def test_the_first_python_example_of_the_readme_works_in_a_fresh_clone(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    Image.linear_gradient("L").save(tmp_path / "image.png")
    result = run("-c", code.replace("image.png", str(tmp_path / "image.png")) + "print(features.shape)")
    assert result.stdout == "torch.Size([1, 128])\n"


def test_the_models_are_pushed_with_their_code_and_collected_once(server, tmp_path):
    for name in ("mae-small", "umae-small"):
        UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path / name)
        evaluation_processor((16, 16)).save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        shutil.copy(MODELS[0] / "notebook.ipynb", tmp_path / name)
    shutil.copy(ROOT / "weights" / "publish.py", tmp_path)
    assert "tester/umae-small: " in run(tmp_path / "publish.py", "tester", "--dry_run").stdout
    printed = [run(tmp_path / "publish.py", "tester", **hub_user()).stdout for _ in range(2)]
    assert printed[0] == printed[1] and f"pushed to {server.url}/tester/umae-small\n" in printed[0]
    for name in ("mae-small", "umae-small"):
        repo = server.repos["model", f"tester/{name}"]
        files = repo.commits[repo.refs["main"]]
        assert set(files) - {".gitattributes"} == {
            "README.md", "config.json", "configuration_umae.py", "image_processing_umae.py", "model.safetensors",
            "modeling_umae.py", "notebook.ipynb", "preprocessor_config.json",
        }  # fmt: skip
        assert f"tester/{name}".encode() in files["notebook.ipynb"].data
    loaded = run("-c", LOAD.format(name="tester/umae-small", side=16), cwd=tmp_path, PYTHONPATH="", **hub_user())
    assert loaded.stdout == "(1, 32)\n"
    (collection,) = server.collections.values()
    assert [item["id"] for item in collection["items"]] == ["tester/mae-small", "tester/umae-small"]
    assert f"listed in {server.url}/collections/{collection['slug']}" in printed[0]
