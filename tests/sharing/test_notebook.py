"""The notebook of a model folder."""

import json

import numpy as np
from PIL import Image
from processes import run

from umae.sharing.notebook import NAME

# What a notebook does with the last line of a cell is to show it
LAST = """
assert features.shape == (1, 64) and patch_features.shape == (1, 16, 64)
shown.save("shown.png")
"""


def test_the_notebook_of_a_run_works_in_its_folder_without_this_package(finished, tmp_path):
    folder, _ = finished
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    original = Image.effect_noise((8, 8), 60).convert("RGB")
    original.save(tmp_path / "image.jpg", quality=95)
    notebook = json.loads((tmp_path / NAME).read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    install, *code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert install.startswith("%pip install")
    *lines, last = "\n".join(code).splitlines()
    run("-c", "\n".join([*lines, f"shown = {last}", LAST]), cwd=tmp_path, PYTHONPATH="")
    image, visible, pasted = (
        np.asarray(Image.open(tmp_path / "shown.png").convert("RGB")).reshape(8, 3, 8, 3).swapaxes(0, 1)
    )
    assert np.abs(image.astype(int) - np.asarray(Image.open(tmp_path / "image.jpg"))).max() <= 1
    same = (visible == image).all(axis=-1)
    assert 0.1 < same.mean() < 0.5, "a quarter of the patches is visible"
    assert (pasted[same] == image[same]).all(), "and stays as it is"
