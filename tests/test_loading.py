"""Saved folders open everywhere: without this package, with it, and in transformers' own classes."""

import sysconfig
from pathlib import Path

import pytest
import torch
from golden_models import fresh_config
from PIL import Image
from processes import run
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel

from modeling_umae import UMAEForImageClassification, UMAEForPreTraining, UMAEModel
from umae.data.inputs import evaluation_processor


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = UMAEForPreTraining(fresh_config()).eval()
    for parameter in model.parameters():  # norms and biases must not be what a fresh model has
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "run")
    evaluation_processor((16, 16)).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


SOME_PIXELS = "torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)"
STRANGER = f"""
import sys, torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoModelForImageClassification
for auto in (AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoModelForImageClassification):
    model = auto.from_pretrained("run", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
model = AutoModel.from_pretrained("run", trust_remote_code=True)
assert not {{"umae", "modeling_umae", "configuration_umae", "image_processing_umae"}} & set(sys.modules)
torch.save(model({SOME_PIXELS}).pooler_output, "features.pt")
model.save_pretrained("again")
torch.save(AutoModel.from_pretrained("again", trust_remote_code=True)({SOME_PIXELS}).pooler_output, "again.pt")
"""


def pixels() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


OWNER = """
import umae
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
assert type(AutoConfig.from_pretrained("run")) is umae.UMAEConfig
assert type(AutoModel.from_pretrained("run")) is umae.UMAEModel
assert type(AutoModelForPreTraining.from_pretrained("run")) is umae.UMAEForPreTraining
assert type(AutoModelForImageClassification.from_pretrained("run")) is umae.UMAEForImageClassification
"""


LIGHT = """
import gc, sys
gc.disable()  # a third of the time
assert not {"umae", "transformers"} & set(sys.modules)
import umae
heavy = ["datasets", "matplotlib", "sklearn", "umae.data", "umae.programs", "umae.sharing", "umae.training"]
print([name for name in heavy if name in sys.modules])
gc.freeze()  # Python's end would take seconds
"""
ELSEWHERE = """
import gc, importlib, pkgutil, sys
gc.disable()
sys.modules.update(dict.fromkeys(["fcntl", "grp", "psutil", "pwd", "resource", "syslog"]))  # None: cannot be imported
import umae
import run_pretrain, run_linear_probe, run_finetune
for module in pkgutil.walk_packages(umae.__path__, "umae."):
    importlib.import_module(module.name)
umae.evaluation.feature_files.main(["run", "images", "features.parquet"])
gc.freeze()
"""


def test_a_stranger_loads_a_folder_without_the_package(folder):
    expected = UMAEModel.from_pretrained(folder)(pixels()).pooler_output
    run("-c", STRANGER, cwd=folder.parent, PYTHONPATH="")
    for name in ("features.pt", "again.pt"):
        assert torch.equal(torch.load(folder.parent / name, weights_only=True), expected)


def test_with_the_package_no_remote_code_is_needed(folder):
    run("-c", OWNER, cwd=folder.parent)


@pytest.mark.slow
def test_the_package_alone_is_light():
    assert run("-c", LIGHT, fresh=True).stdout == "[]\n", "imported before something is used"


@pytest.mark.slow
def test_all_of_it_works_without_what_only_linux_has(folder):
    (folder.parent / "images").mkdir()
    Image.new("RGB", (20, 16), (200, 30, 30)).save(folder.parent / "images" / "a.png")
    run("-c", ELSEWHERE, cwd=folder.parent, fresh=True)
    assert (folder.parent / "features.parquet").exists()


@pytest.mark.parametrize("saved_class", [UMAEModel, UMAEForPreTraining, UMAEForImageClassification])
def test_every_saved_folder_names_all_five_auto_classes_and_holds_the_code(tmp_path, saved_class):
    model = saved_class(fresh_config())
    model.save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"config.json", "model.safetensors", "modeling_umae.py", "configuration_umae.py"}
    assert set(model.config.auto_map) == {
        "AutoBackbone",
        "AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoModelForImageClassification",
    }  # fmt: skip


def test_plain_vit_opens_the_folder_and_gives_equal_features(folder):
    ours = UMAEModel.from_pretrained(folder)
    theirs, loading = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not [key for key in loading["unexpected_keys"] if not key.startswith("decoder.")]
    pixel_values = pixels()
    difference = ours(pixel_values).last_hidden_state - theirs.eval()(pixel_values).last_hidden_state
    assert difference.abs().max() < 1e-6


def test_plain_vitmae_opens_the_folder_and_gives_equal_predictions(folder):
    ours = UMAEForPreTraining.from_pretrained(folder)
    theirs, loading = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixel_values, noise = pixels(), torch.rand(2, 16)
    first, second = ours(pixel_values, noise=noise), theirs.eval()(pixel_values, noise=noise)
    assert torch.allclose(first.logits, second.logits, atol=1e-6)
    assert first.reconstruction_loss.item() == pytest.approx(second.loss.item(), rel=1e-6)


def test_plain_vit_classifier_opens_ours_and_gives_equal_logits(tmp_path):
    ours = UMAEForImageClassification(fresh_config(num_labels=5)).eval()
    ours.save_pretrained(tmp_path)
    theirs, loading = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.allclose(ours(pixels()).logits, theirs.eval()(pixels()).logits, atol=1e-6)


def test_installed_modules_import_from_any_folder(tmp_path):
    if not list(Path(sysconfig.get_path("purelib")).glob("umae-*.dist-info")):
        pytest.skip("the package is not installed here; `make test` installs it")
    run("-c", "import modeling_umae, configuration_umae, umae.data.images", cwd=tmp_path, PYTHONPATH="")
