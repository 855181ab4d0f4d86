"""The exported page: what is written, and that it runs on its own."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from processes import ROOT, environment, hub_user

from umae.data.images import load_images
from umae.demo import export
from umae.demo.models import load_model


def third_party(path: Path, known: dict[str, list[str]]) -> set[str]:
    """Names of the distributions that a file imports, by those of all `known` packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return {known[name][0] for name in names if name in known} - {"umae"}


def test_all_that_the_exported_package_imports_is_in_its_requirements():
    copied = [path for path in (ROOT / "umae").rglob("*.py") if "programs" not in path.parts]
    copied += [ROOT / f"{name}.py" for name in ("configuration_umae", "modeling_umae", "image_processing_umae")]
    known = packages_distributions()
    needed = {re.sub("[-_.]+", "-", name).lower() for path in copied for name in third_party(path, known)}
    named = {re.sub("[-_.]+", "-", name).lower() for name in export.DISTRIBUTIONS}
    optional = {
        "evaluate",
        "ipython",
        "notebook",
        "onnx",
        "onnxscript",
        "tensorboard",
        "trackio",
        "umap-learn",
        "wandb",
    }
    assert len(needed) > 8 and needed - named - optional == set()
    assert re.search(r"^torch==\d+\.\d+\.\d+$", export.requirements(), re.MULTILINE)


@pytest.fixture
def exported(run, folder, tmp_path, monkeypatch):
    """The page of a run and of a folder with one photograph that says where it was taken."""
    exif = Image.Exif()
    exif[0x0112], exif[0x8825] = 6, {1: "N", 2: (48.0, 8.0, 0.0)}
    Image.linear_gradient("L").resize((900, 600)).convert("RGB").save(folder / "a" / "0.png", exif=exif)
    (folder / "b" / "4.png").write_bytes(b"not an image")
    real = export.version
    monkeypatch.setattr(export, "version", lambda name: "6.31.0" if name == "gradio" else real(name))
    model = load_model(str(run))
    export.export([str(run)], [model], load_images(str(folder)), tmp_path / "space")
    return tmp_path / "space"


def test_the_export_has_the_weights_the_images_without_their_metadata_and_the_header(exported, run, model, folder):
    pixel_values = model.prepare(load_images(str(folder)).read(0))
    again = load_model(str(exported / "models" / "run"))
    assert (again.features(pixel_values)[1] == model.features(pixel_values)[1]).all()
    assert (again.name, again.pooling) == (model.name, model.pooling) == ("run", "cls")
    names = sorted(str(path.relative_to(exported)) for path in (exported / "images").rglob("*.jpg"))
    assert names == [*(f"images/a/{i:03}.jpg" for i in (0, 1, 2)), *(f"images/b/{i:03}.jpg" for i in (3, 5)),
                     *(f"images/c/{i:03}.jpg" for i in (6, 7, 8))]  # fmt: skip
    photo = Image.open(exported / names[0])
    assert photo.size == (341, 512), "upright, and smaller"
    assert not photo.getexif()
    _, header, _ = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "title": "U-MAE demo", "sdk": "gradio", "sdk_version": "6.31.0", "app_file": "app.py",
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
    }  # fmt: skip
    compile((exported / "app.py").read_text(), "app.py", "exec")
    everything = "".join(
        path.read_text() for path in exported.rglob("*") if path.suffix in (".py", ".md", ".txt", ".json")
    )
    assert str(run.parent) not in everything, "no local path is published"
    with pytest.raises(ValueError, match="space exists and is not empty; give a new folder"):
        export.export([str(run)], [model], None, exported)


def test_arrays_of_other_channels_are_exported_as_they_are_stored(tmp_path):
    from umae.data.decoding import Reading

    (tmp_path / "images").mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (5, 16, 16), dtype=np.uint16)
    np.save(tmp_path / "images" / "one.npy", values)
    export._write_images(load_images(str(tmp_path / "images")), Reading(5, (0.0, 4095.0)), tmp_path / "out")
    written = np.load(tmp_path / "out" / "000.npy")
    assert written.dtype == np.uint16 and (written == values).all()


DOWNLOAD = """
from huggingface_hub import snapshot_download
snapshot_download("tester/page", repo_type="space", local_dir="space")
"""


@pytest.mark.slow
def test_the_exported_folder_is_pushed_and_what_is_downloaded_runs_by_itself(run, folder, tmp_path, server):
    pytest.importorskip("gradio")
    umae, user = [sys.executable, "-m", "umae"], environment(**hub_user())
    for words in (
        [*umae, "demo", run, "--images", folder, "--export", tmp_path / "exported"],
        [*umae, "push-space", tmp_path / "exported", "tester/page"],
        [sys.executable, "-c", DOWNLOAD],
    ):
        subprocess.run(words, cwd=tmp_path, env=user, check=True, capture_output=True)
    for gone in (run, folder, tmp_path / "exported"):
        shutil.rmtree(gone)
    alone = {**environment(GRADIO_SERVER_PORT="7999"), "PYTHONPATH": ""}
    where = [sys.executable, "-c", "import umae, modeling_umae; print(umae.__file__, modeling_umae.__file__)"]
    printed = subprocess.run(
        where, cwd=tmp_path / "space", env=alone, check=True, capture_output=True, text=True
    ).stdout
    assert all(name.startswith(str(tmp_path / "space")) for name in printed.split())
    process = subprocess.Popen(
        [sys.executable, "-u", "app.py"], cwd=tmp_path / "space", env=alone, stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if "http://" in line:
                break
        url = re.search(r"http://[\d.:]+", line)[0]
        with urllib.request.urlopen(f"{url}/config", timeout=30) as answer:
            assert b"Neighbours" in answer.read()
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait()
