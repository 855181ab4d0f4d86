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
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTMAEModel, ViTMAEPreTrainedModel

from modeling_umae import UMAEBackbone, UMAEForImageClassification, UMAEForPreTraining, UMAEModel
from umae import UMAEConfig

pytestmark = pytest.mark.slow
LEAST = {
    UMAEModel: 100,
    UMAEForPreTraining: 101,
    UMAEForImageClassification: 101,
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

    def __init__(self, kind: type):
        self.kind = kind
        self.masks = kind is UMAEForPreTraining or issubclass(kind, ViTMAEPreTrainedModel)
        self.seq_length = 1 + (8 if self.masks else 16)

    def prepare_config_and_inputs_for_common(self):
        inputs = {"pixel_values": torch.rand(self.batch_size, 3, 16, 16)}
        if self.masks:
            inputs["noise"] = torch.rand(self.batch_size, 16)
        if self.kind.config_class is UMAEConfig:
            return fresh_config(mask_ratio=self.mask_ratio), inputs
        config = self.kind.config_class(image_size=16, patch_size=4)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        for name, value in {**sizes, "mask_ratio": self.mask_ratio}.items():
            for field in {name, f"decoder_{name}"} & {*config.to_dict()}:
                setattr(config, field, value)
        return config, inputs


def suite(kind: type, common: types.ModuleType, configuration: types.ModuleType) -> type[unittest.TestCase]:
    """Their tests for one class."""
    classifies = kind in (UMAEForImageClassification, ViTForImageClassification)

    class Theirs(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (kind,)
        test_resize_embeddings = False
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            self.model_tester = Tester(kind)
            sizes = {"hidden_size": 36, "num_attention_heads": 6}
            self.config_tester = configuration.ConfigTester(self, kind.config_class, has_text_modality=False, **sizes)

        def test_config(self):
            self.config_tester.run_common_tests()

        def test_model_get_set_embeddings(self):  # theirs is for text; this is what their ViT does
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            model = kind(config)
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            assert not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = copy.deepcopy(inputs_dict)
            if not self.model_tester.masks:
                inputs.pop("noise", None)  # they give it to every model that takes it
            if classifies and return_labels:
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
            self.model_tester = Tester(UMAEBackbone)

    return Theirs


def outcome(kind: type) -> tuple[set[str], dict[str, str], dict[str, str]]:
    """The names of their tests that a class passes, and the reasons of those that are skipped and that fail."""
    common, configuration, backbone = theirs()
    names = common.MODEL_MAPPING_NAMES if hasattr(common, "MODEL_MAPPING_NAMES") else {}
    result = unittest.TestResult()
    cases = backbone_suite(backbone) if kind is UMAEBackbone else suite(kind, common, configuration)
    with patch.dict(names, {"umae": "UMAEModel"}):  # a base model, which has no loss
        tests = unittest.defaultTestLoader.loadTestsFromTestCase(cases)
        every = {test.id().rpartition(".")[2] for test in tests}
        tests.run(result)
    skipped = {test.id().rpartition(".")[2]: reason for test, reason in result.skipped}
    failed = {
        test.id().rpartition(".")[2]: text.strip().splitlines()[-1] for test, text in result.failures + result.errors
    }
    return every - skipped.keys() - failed.keys(), skipped, failed


@pytest.mark.parametrize(
    ("kind", "peer"),
    [
        (UMAEModel, ViTMAEModel),
        (UMAEForPreTraining, ViTMAEForPreTraining),
        (UMAEForImageClassification, ViTForImageClassification),
        (UMAEBackbone, None),
    ],
)
def test_their_tests_pass_and_all_that_vitmae_or_vit_passes(kind, peer):
    passed, skipped, failed = outcome(kind)
    print(f"{kind.__name__}: {len(passed)} passed, {len(skipped)} skipped, {len(failed)} failed")
    print("".join(f"  {test}: {reason}\n" for test, reason in skipped.items()))
    assert failed == {} and (len(passed) >= LEAST[kind] or transformers.__version__ != "5.23.0")
    if peer is not None:
        theirs_pass, _, theirs_fail = outcome(peer)
        print(f"{peer.__name__}: {len(theirs_pass)} passed; failed: {theirs_fail}")
        assert theirs_pass <= passed
