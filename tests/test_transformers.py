"""transformers' own tests of a model, against ours: its source distribution has them, for the version installed here.

Not in it are the tests of exporting and of generating text, which the others inherit from: they are left out.
"""

import copy
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from golden_models import fresh_config

from modeling_umae import UMAEBackbone, UMAEForImageClassification, UMAEForPreTraining, UMAEModel
from umae import UMAEConfig

pytestmark = pytest.mark.slow
LEAST = {
    UMAEModel: 96,
    UMAEForPreTraining: 97,
    UMAEForImageClassification: 97,
    UMAEBackbone: 8,
}  # tests that pass, of 5.23


def source() -> Path:
    """The unpacked source distribution of the installed version; raises `CalledProcessError` without an index."""
    folder = Path(tempfile.gettempdir()) / f"transformers-{transformers.__version__}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run(
            [*command, "-d", folder.parent, f"transformers=={transformers.__version__}"],
            check=True,
            capture_output=True,
        )
        with tarfile.open(folder.with_name(f"{folder.name}.tar.gz")) as archive:
            archive.extractall(folder.parent, filter="data")
    return folder


def theirs() -> tuple[types.ModuleType, ...]:
    """Their common tests of models, configurations and backbones. What the source distribution lacks is empty here."""
    package = types.ModuleType("tests")
    package.__path__ = [str(source() / "tests")]
    modules = {"tests": package}
    for name, attributes in {
        "exporters.test_export": {"ExportTesterMixin": object},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": {}},
    }.items():
        for module in (name.partition(".")[0], name):
            modules[f"tests.{module}"] = types.ModuleType(f"tests.{module}")
        vars(modules[f"tests.{name}"]).update(attributes)
    with (
        patch.dict(sys.modules, modules),
        patch("transformers.utils.direct_transformers_import", lambda path: transformers),  # of their own checkout
        patch.object(pytest.mark, "_config", None),  # which would refuse their marks
    ):
        names = ("test_modeling_common", "test_configuration_common", "test_backbone_common")
        return tuple(importlib.import_module(f"tests.{name}") for name in names)


class Tester:
    """What their tests ask of a model's tester: a small configuration, inputs, and the lengths that they lead to."""

    batch_size, image_size, patch_size, num_channels, mask_ratio, is_training = 13, 16, 4, 3, 0.5, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, masks: bool):
        self.masks = masks
        self.seq_length = 1 + (8 if masks else 16)

    def prepare_config_and_inputs_for_common(self):
        inputs = {"pixel_values": torch.rand(self.batch_size, 3, 16, 16)}
        if self.masks:
            inputs["noise"] = torch.rand(self.batch_size, 16)
        return fresh_config(mask_ratio=self.mask_ratio), inputs


def suite(kind: type, common: types.ModuleType, configuration: types.ModuleType) -> type[unittest.TestCase]:
    """Their tests for one of our classes."""

    class Theirs(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (kind,)
        test_resize_embeddings = False
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            self.model_tester = Tester(masks=kind is UMAEForPreTraining)
            sizes = {"hidden_size": 36, "num_attention_heads": 6}
            self.config_tester = configuration.ConfigTester(self, UMAEConfig, has_text_modality=False, **sizes)

        def test_config(self):
            self.config_tester.run_common_tests()

        def test_model_get_set_embeddings(self):  # theirs is for text; this is what their ViT does
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            model = kind(config)
            assert isinstance(model.get_input_embeddings(), torch.nn.Module) and model.get_output_embeddings() is None

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = copy.deepcopy(inputs_dict)
            if kind is not UMAEForPreTraining:
                inputs.pop("noise", None)  # they give it to every model that takes it
            if kind is UMAEForImageClassification and return_labels:
                inputs["labels"] = torch.zeros(Tester.batch_size, dtype=torch.long)
            return inputs

    return Theirs


def backbone_suite(backbone: types.ModuleType) -> type[unittest.TestCase]:
    """Their tests of what makes a model a backbone."""

    class Theirs(backbone.BackboneTesterMixin, unittest.TestCase):
        all_model_classes = (UMAEBackbone,)
        config_class = UMAEConfig
        has_attentions = False  # fused attention returns none

        def setUp(self):
            self.model_tester = Tester(masks=False)

    return Theirs


@pytest.mark.parametrize("kind", [UMAEModel, UMAEForPreTraining, UMAEForImageClassification, UMAEBackbone])
def test_their_tests_pass(kind):
    common, configuration, backbone = theirs()
    names = common.MODEL_MAPPING_NAMES if hasattr(common, "MODEL_MAPPING_NAMES") else {}
    result = unittest.TestResult()
    with patch.dict(names, {"umae": "UMAEModel"}):  # a base model, which has no loss
        tests = backbone_suite(backbone) if kind is UMAEBackbone else suite(kind, common, configuration)
        unittest.defaultTestLoader.loadTestsFromTestCase(tests).run(result)
    failed = {str(test).split()[0]: text.strip().splitlines()[-1] for test, text in result.failures + result.errors}
    passed = result.testsRun - len(failed) - len(result.skipped)
    print(f"{kind.__name__}: {passed} passed, {len(result.skipped)} skipped, {len(failed)} failed")
    for test, reason in result.skipped:
        print(f"  {str(test).split()[0]}: {reason}")
    assert failed == {} and (passed >= LEAST[kind] or transformers.__version__ != "5.23.0")
